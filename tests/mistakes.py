"""Calls that are mistaken, and what is said of each.

Run as a program, in a process of its own: the tests' annotations would refuse other types before
the library does, and users run without. Prints what each call raises or warns of, as JSON.
"""

import json
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Primitive
from ott.geometry import costs

import otfusion_jax as otf

X = jnp.asarray(np.random.default_rng(9).normal(size=(4, 6)), jnp.float32)


def fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def draw(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (6, 8), "v": (8, 3)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def loss(params, batch):
    return jnp.mean(fn(params, batch) ** 2)


A, B = draw(0), draw(1)
SHAPES = {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32), "v": A["v"]}
S = otf.trace_symmetry(fn, A, X)

Call = Callable[[Any], Any]  # any: the calls are mistaken on purpose
NO_SYMMETRY: dict[str, Call] = {
    "align": lambda s: otf.align(s, A, B),
    "align(onto)": lambda s: otf.align(S, A, B, onto=s),
    "fuse": lambda s: otf.fuse(s, [A, B]),
    "fuse(list)": lambda s: otf.fuse([S, s], [A, B]),
    "fuse_shared": lambda s: otf.fuse_shared(s, [A, B]),
    "barycenter": lambda s: otf.barycenter(s, [A, B]),
    "transport": lambda s: otf.transport(s, {}, A),
    "transport(onto)": lambda s: otf.transport(S, {}, A, onto=s),
    "compose": lambda s: otf.compose(s, {}, {}),
    "invert": lambda s: otf.invert(s, {}),
    "repair": lambda s: otf.repair(s, fn, [A, B], X),
    "repair(originals)": lambda s: otf.repair(
        S, fn, [A, B], X, originals=[otf.Original(s, fn, A, {}), None]
    ),
    "learn_alignment": lambda s: otf.learn_alignment(s, loss, A, B, X[None]),
    "features": lambda s: otf.features(s, fn, A, X),
    "feature_gram": lambda s: otf.feature_gram(s, fn, A, B, [X]),
    "feature_gram(onto)": lambda s: otf.feature_gram(S, fn, A, B, [X], onto=s),
    "similarity": lambda s: otf.similarity(s, fn, A, B, [X]),
    "similarity(onto)": lambda s: otf.similarity(S, fn, A, B, [X], onto=s),
    "weight_importance": lambda s: otf.weight_importance(s, A),
    "check_symmetry": lambda s: otf.check_symmetry(s, fn, A, X),
}
NO_ARRAYS: dict[str, Call] = {
    "align(source)": lambda p: otf.align(S, p, B),
    "align(target)": lambda p: otf.align(S, A, p),
    "average": lambda p: otf.average([A, p]),
    "task_arithmetic": lambda p: otf.task_arithmetic([A, p], B),
    "task_arithmetic(base)": lambda p: otf.task_arithmetic([A, B], p),
    "ties": lambda p: otf.ties([A, p], B),
    "dare": lambda p: otf.dare([A, p], B, jax.random.key(0)),
    "slerp": lambda p: otf.slerp(A, p, 0.5),
    "greedy_soup": lambda p: otf.greedy_soup([A, p], lambda q: q["w"].sum()),
    "fisher_average": lambda p: otf.fisher_average([A, p], [A, A]),
    "regmean": lambda p: otf.regmean([A, p], [{}, {}]),
    "estimate_statistics": lambda p: otf.estimate_statistics(lambda q, x: q, p, [X]),
    "fold_batch_norm": lambda p: otf.fold_batch_norm(p),
    "stack": lambda p: otf.stack([A, p]),
    "ensemble": lambda p: otf.ensemble(fn, [A, p], X),
    "interpolate": lambda p: otf.interpolate(A, p, 0.5),
    "barrier": lambda p: otf.barrier(lambda q: q["w"].sum(), A, p),
    "plane": lambda p: otf.plane(lambda q: q["w"].sum(), A, B, p),
    "fuse": lambda p: otf.fuse(S, [A, p]),
    "fuse_shared": lambda p: otf.fuse_shared(S, [p, A]),
    "average_adapters": lambda p: otf.average_adapters([A, p]),
    "barycenter": lambda p: otf.barycenter(S, [A, p]),
    "transport": lambda p: otf.transport(S, {}, p),
    "repair": lambda p: otf.repair(S, fn, [A, p], X),
    "learn_alignment": lambda p: otf.learn_alignment(S, loss, A, p, X[None]),
    "features": lambda p: otf.features(S, fn, p, X),
    "feature_gram": lambda p: otf.feature_gram(S, fn, A, p, [X]),
    "similarity": lambda p: otf.similarity(S, fn, A, p, [X]),
    "weight_importance": lambda p: otf.weight_importance(S, p),
    "check_symmetry": lambda p: otf.check_symmetry(S, fn, p, X),
}
any_otf: Any = otf
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "a model where a function is wanted": (
        lambda: any_otf.features(S, A, fn, X),
        r"TypeError: a dict was given as the function; pass fn\(params, \*inputs\), or a list of",
    ),
    "models before the metric": (
        lambda: any_otf.barrier(A, B, fn),
        r"TypeError: a dict was given where a function is wanted: call barrier\(metric, a, b\)",
    ),
    "models of a plane before the metric": (
        lambda: any_otf.plane(A, B, A, fn),
        r"TypeError: a dict was given .* call plane\(metric, a, b, c\)",
    ),
    "a margin that is no number": (
        lambda: any_otf.plane(lambda p: p["w"].sum(), A, B, draw(2), margin="wide"),
        "TypeError: margin is 'wide', of type str; give a number",
    ),
    "activations that are no pairs": (
        lambda: any_otf.linear_cka([X, X]),
        r"TypeError: a batch is an array; give pairs of activations, as in linear_cka\(\[\(x, y",
    ),
    "activations that are lists": (
        lambda: any_otf.linear_cka([([[1.0], [2.0]], X)]),
        "TypeError: activations are a list; give arrays",
    ),
    "one pair of activations in place of several": (
        lambda: any_otf.linear_cka(X),
        "TypeError: batches is an array of shape",
    ),
    "models before the function": (
        lambda: any_otf.ensemble([A, B], fn, X),
        r"TypeError: a list was given .* call ensemble\(fn, models, \*inputs\)",
    ),
    "one model where several are wanted": (
        lambda: any_otf.average(A),
        "TypeError: models is a dict; pass a list of pytrees",
    ),
    "a generator of models": (
        lambda: any_otf.stack(m for m in (A, B)),
        "TypeError: models is a generator; pass a list of pytrees",
    ),
    "an array whose rows would be models": (
        lambda: any_otf.average(X),
        "TypeError: models is an array; pass a list of pytrees",
    ),
    "inputs that are shapes": (
        lambda: otf.features(S, fn, A, jax.ShapeDtypeStruct((4, 6), jnp.float32)),
        "TypeError: inputs has shapes in place of arrays",
    ),
    "inputs of the certificate that are shapes": (
        lambda: otf.check_symmetry(S, fn, A, jax.ShapeDtypeStruct((4, 6), jnp.float32)),
        "TypeError: inputs has shapes in place of arrays",
    ),
    "no samples for the certificate": (
        lambda: otf.check_symmetry(S, fn, A, X[:0]),
        r"ValueError: input 0 is empty: shape \(0, 6\); pass some samples",
    ),
    "no samples for one of several functions": (
        lambda: otf.check_symmetry(S, [(fn, (X,)), (fn, (X[:0],))], A),
        r"ValueError: input 0 is empty: shape \(0, 6\); pass some samples",
    ),
    "a certificate inside of jit": (
        lambda: jax.jit(lambda p: otf.check_symmetry(S, fn, p, X))(A),
        "TypeError: check_symmetry was called inside of jax.jit.*call it outside: it returns a",
    ),
    "a certificate of known values inside of jit": (
        lambda: jax.jit(lambda: otf.check_symmetry(S, fn, A, X))(),
        "TypeError: check_symmetry was called inside of jax.jit",
    ),
    "a primitive by name": (
        lambda: any_otf.register_rule("tanh"),
        r"TypeError: a str was given where a primitive is wanted: write @register_rule\(primitive",
    ),
    "a function for its primitive": (
        lambda: any_otf.register_rule(jnp.tanh),
        "TypeError: .* was given where a primitive is wanted: .*primitives.tanh_p",
    ),
    "a decorator that is not called": (
        lambda: any_otf.register_rule(lambda ctx, values: values),
        "TypeError: a function was given where a primitive is wanted",
    ),
    "no primitive": (
        lambda: otf.register_rule(),
        "TypeError: register_rule was given no primitive",
    ),
    "a rule that is a number": (
        lambda: any_otf.register_rule(Primitive("mine"))(3),
        "TypeError: an int was given where a rule is wanted: a function of the equation's",
    ),
    "activations for inner products": (
        lambda: any_otf.align(S, A, B, grams=otf.features(S, fn, A, X)),
        "TypeError: grams are inner products .* feature_gram.* got w: ArrayImpl",
    ),
    "activations alone": (
        lambda: any_otf.align(S, A, B, grams=X),
        "TypeError: grams are inner products .* got ArrayImpl",
    ),
    "marginals of the source alone": (
        lambda: any_otf.align(S, A, B, marginals=otf.weight_importance(S, A)),
        "TypeError: marginals are a pair of dicts",
    ),
    "activations that are one array": (
        lambda: any_otf.feature_importance(X),
        r"TypeError: features is an array; pass what features\(symmetry, fn, params, x\) returns",
    ),
    "inner products for activations": (
        lambda: any_otf.feature_importance(otf.feature_gram(S, fn, A, B, [X])),
        r"TypeError: the features of w are a Gram; pass what features\(",
    ),
    "a leaf weight that is nothing": (
        lambda: any_otf.align(S, A, B, leaf_weight=lambda path: {"w": 1.0}.get(path)),
        "TypeError: .*these leaf weights are no numbers.*v: None",
    ),
    "leaf weights that are strings": (
        lambda: any_otf.fuse(S, [A, B], leaf_weight=lambda path: "1"),
        "TypeError: .*these leaf weights are no numbers.*v: a str\n  w: a str",
    ),
    "leaf weights that are arrays": (
        lambda: any_otf.align(S, A, B, leaf_weight=lambda path: jnp.ones(1)),
        "TypeError: .*these leaf weights are no numbers.*v: an array",
    ),
    "a method by name": (
        lambda: any_otf.align(S, A, B, method="descent"),
        r"TypeError: method is 'descent'; pass CoordinateDescent\(\) or ForwardPass\(\)",
    ),
    "a method that is a class": (
        lambda: any_otf.fuse(S, [A, B], method=otf.ForwardPass),
        r"TypeError: method is the class ForwardPass; pass CoordinateDescent\(\)",
    ),
    "a method of the average that is a name": (
        lambda: any_otf.fuse(S, [A, B], method="descent"),
        r"TypeError: method is 'descent'; pass CoordinateDescent\(\) or ForwardPass\(\)",
    ),
    "a metric that is a class": (
        lambda: any_otf.fuse(S, [A, B], metric=costs.Cosine),
        "TypeError: metric is the class Cosine; pass an ott cost function such as",
    ),
    "a metric by name": (
        lambda: any_otf.fuse(S, [A, B], metric="cosine"),
        "TypeError: metric is 'cosine'; pass an ott cost function such as",
    ),
    "a solver of the average that is a class": (
        lambda: any_otf.fuse(S, [A, B], solver=otf.Exact),
        r"TypeError: solver is the class Exact; pass Exact\(\), Sinkhorn\(\), LowRank\(\) or G",
    ),
    "a solver to learn by that is a class": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], solver=otf.Sinkhorn),
        r"TypeError: solver is the class Sinkhorn; pass Sinkhorn\(\)",
    ),
    "a solver to learn by that is a name": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], solver="sinkhorn"),
        r"TypeError: solver is 'sinkhorn'; pass Sinkhorn\(\)",
    ),
    "a solver that is a class": (
        lambda: any_otf.align(S, A, B, solver=otf.Exact),
        r"TypeError: solver is the class Exact; pass Exact\(\), Sinkhorn\(\), LowRank\(\) or G",
    ),
    "a repair that is a class": (
        lambda: any_otf.repair(S, fn, [A, B], X, method=otf.LeastSquares),
        "TypeError: method is the class LeastSquares; pass RestoreStatistics",
    ),
    "a solver without gradients": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], solver=otf.Exact()),
        r"TypeError: solver is Exact\(.*\); pass Sinkhorn\(\)",
    ),
    "plans that are one array": (
        lambda: any_otf.transport(S, jnp.arange(8), A),
        "TypeError: plans is an array; pass a dict of arrays",
    ),
    "a plan that is a list": (
        lambda: any_otf.transport(S, {"w": list(range(8))}, A),
        "ValueError: .*w: a list, expected an array",
    ),
    "a seed for a key": (
        lambda: any_otf.check_symmetry(S, fn, A, X, key=0),
        r"TypeError: key is 0; pass a single key, as jax.random.key\(0\) is one",
    ),
    "a seed for what is dropped": (
        lambda: any_otf.dare([A], B, 0),
        "TypeError: key is 0; pass a single key",
    ),
    "one model where several are merged": (
        lambda: any_otf.ties(A, B),
        "TypeError: models is a dict; pass a list of pytrees",
    ),
    "a name for a scale": (
        lambda: any_otf.task_arithmetic([A], B, "half"),
        "TypeError: scale is 'half', of type str; give a number",
    ),
    "a whole number for a density": (
        lambda: otf.ties([A], B, density=0),
        "ValueError: density is 0",
    ),
    "models before the score": (
        lambda: any_otf.greedy_soup(lambda q: 0, [A, B]),
        r"TypeError: a list was given where a function is wanted: call greedy_soup\(models, score",
    ),
    "inner products that are one dict": (
        lambda: any_otf.regmean([A, B], {"w": jnp.eye(6)}),
        "TypeError: grams is a dict; pass a list of dicts",
    ),
    "an epsilon that is an array": (
        lambda: any_otf.fold_batch_norm(A, epsilon=X),
        "TypeError: epsilon is .*; give the network's, a number|ValueError: no layer of batch",
    ),
    "a batch for batches of statistics": (
        lambda: any_otf.estimate_statistics(lambda q, x: q, A, X),
        r"TypeError: batches is an array of shape \(4, 6\)",
    ),
    "a seed for random plans": (
        lambda: S.random(0),  # pyright: ignore[reportArgumentType]
        "TypeError: key is 0; pass a single key",
    ),
    "a batch for a list of batches": (
        lambda: any_otf.feature_gram(S, fn, A, B, X),
        r"TypeError: batches is an array of shape \(4, 6\).*as in \[x\]",
    ),
    "what was learned for a state of learning": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], state={}, steps=2),
        "TypeError: state is {}; pass that of an earlier call",
    ),
    "a dict for a list of batches": (
        lambda: any_otf.feature_gram(S, fn, A, B, {"x": X}),
        "TypeError: batches is dict, which is not a list of batches",
    ),
    "an original that is a model": (
        lambda: any_otf.repair(S, fn, [A, B], X, originals=[A, None]),
        "TypeError: original 0 is .*; pass an Original, or None",
    ),
    "a fraction of a batch": (
        lambda: any_otf.fuse(S, [A, B], batch_size=1.5),
        "ValueError: batch_size is 1.5; give 1 or more, or None",
    ),
    "an optimizer that is a function": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], optimizer=optax.adam),
        r"TypeError: optimizer is <function adam.*pass an optimizer of optax such as optax.ad",
    ),
    "a step size for an optimizer": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], optimizer=0.1),
        r"TypeError: optimizer is 0.1; pass an optimizer of optax such as optax.adam\(1e-2\)",
    ),
    "a position to learn at that is a word": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], t="half"),
        "TypeError: t is 'half', of type str; give a number",
    ),
    "several positions to learn at": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], t=jnp.array([0.5])),
        r"ValueError: t has shape \(1,\); give a single number",
    ),
    "a leaf weight to learn by that is a number": (
        lambda: any_otf.learn_alignment(S, loss, A, B, X[None], leaf_weight=1.0),
        r"TypeError: a float .* call learn_alignment\(..., leaf_weight=lambda path: 1.0\)",
    ),
    "a position that is a string": (
        lambda: any_otf.interpolate(A, B, "0.5"),
        "TypeError: t is '0.5', of type str; give a number, 0 for the one model and 1 for the",
    ),
    "no position": (
        lambda: any_otf.interpolate(A, B, None),
        "TypeError: t is None, of type NoneType; give a number",
    ),
    "positions of a line that are words": (
        lambda: any_otf.barrier(lambda p: p["w"].sum(), A, B, ["0", "1"]),
        r"TypeError: t is \['0', '1'\], of type list; give a number",
    ),
    "a metric that returns a dict": (
        lambda: any_otf.barrier(lambda p: {"loss": p["w"].sum()}, A, B),
        "TypeError: the metric returned a dict; it must return a number, or an array",
    ),
    "a metric that returns nothing": (
        lambda: any_otf.barrier(lambda p: None, A, B),
        "TypeError: the metric returned None; it must return a number, or an array",
    ),
    "a flag for a batch size": (
        lambda: otf.barrier(lambda p: p["w"].sum(), A, B, batch_size=True),
        "TypeError: batch_size is True, of type bool; give 1 or more, or None",
    ),
    "no batch": (
        lambda: otf.barrier(lambda p: p["w"].sum(), A, B, batch_size=0),
        "ValueError: batch_size is 0; give 1 or more, or None",
    ),
    "rounds by half": (
        lambda: any_otf.barycenter(S, [A, B], max_rounds=0.5),
        "ValueError: max_rounds is 0.5; give 1 or more",
    ),
}


def expected() -> dict[str, str]:
    """What is to be said of each mistake, as a regular expression."""
    found = {
        f"{name} without a symmetry": "TypeError: a dict .*call .*symm" for name in NO_SYMMETRY
    }
    found |= {
        f"{name} of shapes": "TypeError: .*shapes in place of arrays.*w: a ShapeDtypeStruct"
        for name in NO_ARRAYS
    }
    return found | {name: message for name, (_, message) in OTHERS.items()}


def main() -> None:
    """Makes every mistake and prints what is said."""
    calls = {f"{n} without a symmetry": (lambda f=f: f(A)) for n, f in NO_SYMMETRY.items()}
    calls |= {f"{n} of shapes": (lambda f=f: f(SHAPES)) for n, f in NO_ARRAYS.items()}
    calls |= {name: call for name, (call, _) in OTHERS.items()}
    said = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
        else:
            said[name] = "nothing"
    print(json.dumps(said))


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
