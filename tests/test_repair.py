"""Compares repaired averages with a NumPy rewriting, and checks what repairing promises."""

import dataclasses
import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import zoo
from arrays import normal, normals

import otfusion_jax as otf

KINDS = pytest.mark.parametrize("kind", ref.SHAPES)
SOLVED = otf.LeastSquares(ridge=1e-6, steps=200, at="preactivation", restore=False)
BOTH = dataclasses.replace(SOLVED, restore=True)
METHODS = pytest.mark.parametrize(
    "method",
    [otf.RestoreStatistics(), SOLVED, BOTH, dataclasses.replace(SOLVED, at="activation")],
    ids=["statistics", "least squares", "both", "activations"],
)
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@functools.cache
def setting(kind, bias=True):
    nets = [ref.random_net(seed, kind, bias) for seed in range(2)]
    x = normal(64, *ref.INPUTS[kind][1:], seed=2)
    return otf.trace_symmetry(ref.network, nets[0], x), nets, x


def deviations_and_means(symmetry, net, x):
    found = otf.features(symmetry, ref.network, net, x).values()
    return np.stack([(jnp.std(y, axis=0), jnp.mean(y, axis=0)) for y in found])


def patches(x, kernel):
    """Rows that a layer multiplies with its kernel, the kernel read as a matrix."""
    if kernel.ndim == 2:
        return x.reshape(len(x), -1)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = x.shape[1:3]
    windows = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return np.stack(windows, axis=-2).reshape(*x.shape[:3], -1)


def repaired(nets, weights, x, method):
    """Both methods in NumPy, for networks with biases, layer by layer."""
    ours, theirs, result = x, [x] * len(nets), []
    for depth, layers in enumerate(zip(*nets, strict=True)):
        shape = layers[0]["kernel"].shape
        kernels = [layer["kernel"].reshape(-1, shape[-1]) for layer in layers]
        kernel = np.tensordot(weights, kernels, axes=1)
        bias = np.tensordot(weights, [layer["bias"] for layer in layers], axes=1)
        rows = patches(ours, layers[0]["kernel"])
        found = [
            patches(y, layer["kernel"]) @ k
            for y, layer, k in zip(theirs, layers, kernels, strict=True)
        ]
        over = tuple(range(rows.ndim - 1))
        if isinstance(method, otf.LeastSquares):
            target = np.tensordot(weights, found, axes=1)
            if method.at == "activation" and depth < len(nets[0]) - 1:
                before = [y + layer["bias"] for y, layer in zip(found, layers, strict=True)]
                target = np.tensordot(weights, np.maximum(before, 0), axes=1)
                target = np.where(target > 0, target, np.minimum(rows @ kernel + bias, 0)) - bias
            missing = (target - rows @ kernel).reshape(-1, shape[-1])
            flat = rows.reshape(len(missing), -1)
            if method.restore and depth < len(nets[0]) - 1:
                flat, missing = flat - flat.mean(axis=0), missing - missing.mean(axis=0)
            kernel = kernel + np.linalg.lstsq(flat, missing)[0]
        restores = not isinstance(method, otf.LeastSquares) or method.restore
        if restores and depth < len(nets[0]) - 1:
            y = rows @ kernel
            scale = np.tensordot(weights, [z.std(over) for z in found], axes=1) / y.std(over)
            bias += np.tensordot(weights, [z.mean(over) for z in found], axes=1)
            bias -= scale * y.mean(over)
            kernel = kernel * scale
        result.append({"kernel": kernel.reshape(shape), "bias": bias})
        ours = np.maximum(rows @ kernel + bias, 0)
        theirs = [np.maximum(y + layer["bias"], 0) for y, layer in zip(found, layers, strict=True)]
    return result


@KINDS
@METHODS
def test_repair_is_that_of_numpy(kind, method):
    symmetry, nets, x = setting(kind)
    weights = (0.3, 0.7)
    found = otf.repair(symmetry, ref.network, nets, x, weights=weights, method=method)
    wide = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net) for net in nets]
    expected = repaired(wide, np.asarray(weights), np.asarray(x, np.float64), method)
    # Weights to tell apart need features that tell them apart: outputs are compared.
    close(ref.network(found, x), ref.network(expected, x), atol=1e-3)
    if isinstance(method, otf.RestoreStatistics):
        jax.tree.map(close, found, expected)


@KINDS
def test_every_unit_gets_the_statistics_of_the_models(kind):
    symmetry, nets, x = setting(kind)
    found = otf.repair(symmetry, ref.network, nets, x)
    theirs = [deviations_and_means(symmetry, net, x) for net in nets]
    biases = [np.stack([net[i]["bias"] for net in nets]) for i in range(len(theirs[0]))]
    ours = deviations_and_means(symmetry, found, x)
    close(ours[:, 0], np.mean(theirs, axis=0)[:, 0])
    # Features are read before the bias: what is missing of the mean is in there.
    for layer, mine in enumerate(ours):
        change = found[layer]["bias"] - biases[layer].mean(axis=0)
        close(mine[1] + change, np.mean(theirs, axis=0)[layer, 1])
    # The outputs are no group.
    jax.tree.map(close, found[-1], otf.average(nets)[-1])


def attention(p, x):
    """Queries, keys and values in one kernel; rows of x are tokens."""
    qkv = x @ p["in"] @ p["kernel"] + p["bias"][None]
    q, k, v = (y.reshape(len(x), 2, 3) for y in jnp.split(qkv, 3, axis=-1))
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), axis=-1)
    return jnp.einsum("hts,shd->thd", weights, v).reshape(len(x), -1) @ p["out"]


def test_queries_keys_and_values_of_one_kernel_get_their_statistics():
    shapes = {"in": (5, 6), "kernel": (6, 18), "bias": (18,), "out": (6, 4)}
    nets = [normals(shapes, seed) for seed in range(2)]
    x = normal(40, 5, seed=2)
    symmetry = otf.trace_symmetry(attention, nets[0], x)
    found = otf.repair(symmetry, attention, nets, x)
    theirs = [net["in"] @ net["kernel"] for net in nets]
    ours = x @ found["in"] @ found["kernel"]
    close(ours.std(0), np.mean([np.std(x @ w, axis=0) for w in theirs], axis=0), rtol=1e-4)
    shift = found["bias"] - otf.average(nets)["bias"]
    close(ours.mean(0) + shift, np.mean([np.mean(x @ w, axis=0) for w in theirs], axis=0))


@KINDS
def test_without_biases_least_squares_have_nothing_to_restore(kind):
    symmetry, nets, x = setting(kind, bias=False)
    methods = [otf.LeastSquares(0.1, None, restore=restore) for restore in (False, True)]
    plain, both = (otf.repair(symmetry, ref.network, nets, x, method=method) for method in methods)
    jax.tree.map(close, plain, both)


@KINDS
def test_without_biases_deviations_alone_are_restored(kind):
    symmetry, nets, x = setting(kind, bias=False)
    found = otf.repair(symmetry, ref.network, nets, x)
    theirs = [deviations_and_means(symmetry, net, x)[:, 0] for net in nets]
    close(deviations_and_means(symmetry, found, x)[:, 0], np.mean(theirs, axis=0))
    # Every unit is scaled, nothing else.
    average = otf.average(nets)
    for before, after in zip(average[:-1], found[:-1], strict=True):
        ratio = np.asarray(after["kernel"] / before["kernel"])
        ratio = ratio.reshape(-1, ratio.shape[-1])
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), 1e-3)


@METHODS
@pytest.mark.parametrize("name", ["vgg", "resnet", "residual_layer_norm", "attention", "low_rank"])
def test_a_model_averaged_with_itself_is_already_right(name, method):
    case = zoo.CASES[name]()
    symmetry = otf.trace_symmetry(case.fn, case.params, *case.inputs)
    method = dataclasses.replace(method, **({"steps": 3} if method is SOLVED else {}))
    models = [case.params, case.params]
    found = otf.repair(symmetry, case.fn, models, *case.inputs, method=method)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        case.fn(found, *case.inputs),
        case.fn(case.params, *case.inputs),
    )


@KINDS
def test_least_squares_come_closer_to_the_mean_of_the_models(kind):
    symmetry, nets, x = setting(kind)
    mean = sum(ref.network(net, x) for net in nets) / 2
    distances = {}
    for name, model in {
        "average": otf.average(nets),
        "repaired": otf.repair(symmetry, ref.network, nets, x, method=otf.LeastSquares()),
    }.items():
        distances[name] = float(jnp.sum((ref.network(model, x) - mean) ** 2))
    assert distances["repaired"] < 0.5 * distances["average"]


def test_a_ridge_without_end_leaves_the_average():
    symmetry, nets, x = setting("mlp")
    repair = functools.partial(otf.repair, symmetry, ref.network, nets, x)
    jax.tree.map(close, repair(method=otf.LeastSquares(1e8, restore=False)), otf.average(nets))
    # What is left to do then is to restore statistics.
    jax.tree.map(close, repair(method=otf.LeastSquares(1e8, at="preactivation")), repair())


@METHODS
def test_repair_under_jit(method):
    symmetry, nets, x = setting("mlp")

    def repair(nets, x):
        return otf.repair(symmetry, ref.network, nets, x, method=method)

    jax.tree.map(close, jax.jit(repair)(nets, x), repair(nets, x))


def to(dtype, tree):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


MIXED = {
    "bytes": (jnp.float32, jnp.float32, jnp.uint8),
    "models of half precision": (jnp.bfloat16, jnp.bfloat16, jnp.float32),
    "models and inputs of half precision": (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    "inputs in bfloat16": (jnp.float32, jnp.float32, jnp.bfloat16),
    "inputs in float16": (jnp.float32, jnp.float32, jnp.float16),
    "one model of half precision": (jnp.bfloat16, jnp.float32, jnp.float32),
    "the other of half precision": (jnp.float32, jnp.bfloat16, jnp.float32),
    "inputs in double precision": (jnp.float32, jnp.float32, jnp.float64),
    "models in double precision": (jnp.float64, jnp.float64, jnp.float32),
}


@METHODS
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED)
def test_precisions_may_be_mixed(dtypes, method, default_promotion):
    # All of this is exact in bfloat16, and bytes are far too small for sums of squares.
    nets = [to(jnp.bfloat16, ref.random_net(seed, "mlp")) for seed in range(2)]
    x = jnp.round(abs(normal(64, *ref.INPUTS["mlp"][1:], seed=2)) * 50)
    first, second, inputs = dtypes
    with jax.enable_x64(jnp.float64 in dtypes):
        wide = [to(jnp.float32, net) for net in nets]
        symmetry = otf.trace_symmetry(ref.network, wide[0], x)
        expected = otf.repair(symmetry, ref.network, wide, x, method=method)
        models = [to(first, nets[0]), to(second, nets[1])]
        found = otf.repair(symmetry, ref.network, models, x.astype(inputs), method=method)
        for leaf, like in zip(
            jax.tree.leaves(found), jax.tree.leaves(otf.average(models)), strict=True
        ):
            assert leaf.dtype == like.dtype
        outputs = ref.network(to(jnp.float32, found), x)
        right, plain = ref.network(expected, x), ref.network(otf.average(wide), x)
        assert distance(outputs, right) < 0.1 * distance(plain, right)


def distance(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(jnp.sum((x.astype(float) - y.astype(float)) ** 2)) for x, y in leaves) ** 0.5


@METHODS
def test_an_original_may_be_of_another_precision(method, default_promotion):
    symmetry, nets, x = setting("mlp")
    halves = [to(jnp.bfloat16, net) for net in nets]
    wide = [to(jnp.float32, net) for net in halves]
    original = original_of(wide, params=halves[0])
    found = otf.repair(symmetry, ref.network, wide, x, method=method, originals=[original, None])
    expected = otf.repair(symmetry, ref.network, wide, x, method=method)
    jax.tree.map(close, found, expected)


@METHODS
# Without a group there are no units whose statistics could be restored.
@pytest.mark.filterwarnings("ignore:repair corrects nothing:otfusion_jax.RepairWarning")
def test_quantised_weights_stay(method):
    def quantised(params, x):
        return jnp.tanh(x @ params["w"]) @ params["q"].astype(jnp.float32)

    q = jnp.arange(24, dtype=jnp.int8).reshape(8, 3)
    models = [{"w": normal(5, 8, seed=seed), "q": q} for seed in range(2)]
    x = normal(16, 5, seed=2)
    symmetry = otf.trace_symmetry(quantised, models[0], x)
    found = otf.repair(symmetry, quantised, models, x, method=method)
    assert found["q"].dtype == jnp.int8
    np.testing.assert_array_equal(found["q"], q)


@METHODS
def test_inputs_that_are_not_finite_are_named(method):
    symmetry, nets, x = setting("mlp")
    message = r"(?s)of inputs that are not.*input 0: 2 of \d+ values not finite"
    with pytest.raises(FloatingPointError, match=message):
        otf.repair(symmetry, ref.network, nets, x.at[3, :2].set(jnp.nan), method=method)


def linear(params, x):
    return x @ params["first"] @ params["second"]


@pytest.mark.parametrize("scale", [1e12, 1e-12])
def test_least_squares_are_the_same_at_any_scale_whose_squares_are_in_range(scale):
    shapes = {"first": (5, 8), "second": (8, 3)}
    nets = [normals(shapes, seed) for seed in range(2)]
    x = normal(64, 5, seed=2)
    symmetry = otf.trace_symmetry(linear, nets[0], x)
    expected = otf.repair(symmetry, linear, nets, x, method=otf.LeastSquares())
    found = otf.repair(symmetry, linear, nets, x * scale, method=otf.LeastSquares())
    jax.tree.map(close, found, expected)
    assert distance(found, otf.average(nets)) > 0.1


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_least_squares_out_of_range_are_refused(scale):
    symmetry, nets, x = setting("mlp")
    with pytest.raises(FloatingPointError, match="numbers on the way were out of range"):
        otf.repair(symmetry, ref.network, nets, x * scale, method=otf.LeastSquares())


def test_repair_leaves_its_inputs_alone():
    symmetry, nets, x = setting("mlp")
    before = jax.tree.map(np.array, nets)
    otf.repair(symmetry, ref.network, nets, x)
    jax.tree.map(np.testing.assert_array_equal, nets, before)


def test_constant_features_are_for_the_bias_to_take():
    x = jnp.concatenate([normal(32, 4, seed=3), jnp.full((32, 1), 3.7)], axis=1)
    shapes = {"in": (5, 6), "bias": (6,), "out": (6, 2)}
    nets = [normals(shapes, seed) for seed in range(2)]
    net = lambda p, x: jax.nn.relu(x @ p["in"] + p["bias"][None]) @ p["out"]  # noqa: E731
    symmetry = otf.trace_symmetry(net, nets[0], x)
    method = otf.LeastSquares(at="preactivation")
    found = otf.repair(symmetry, net, nets, x, method=method)
    average = otf.average(nets)
    # Only scaled, as all of its unit is.
    ratio = found["in"] / average["in"]
    close(ratio[4], jnp.std(x @ found["in"], axis=0) / jnp.std(x @ average["in"], axis=0), atol=0.1)
    theirs = [x @ net["in"] + net["bias"][None] for net in nets]
    ours = x @ found["in"] + found["bias"][None]
    close(ours.mean(0), np.mean([y.mean(0) for y in theirs], axis=0))
    close(ours.std(0), np.mean([y.std(0) for y in theirs], axis=0))


def test_a_unit_that_never_fires_stays():
    symmetry, nets, x = setting("mlp", bias=False)
    nets = [[{"kernel": net[0]["kernel"].at[:, 3].set(0)}, *net[1:]] for net in nets]
    found = otf.repair(symmetry, ref.network, nets, x)
    close(found[0]["kernel"][:, 3], 0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nets, x: (nets, x[:0]), "is empty"),
        (lambda nets, x: ([], x), "no models"),
        (lambda nets, x: ([nets[0], nets[1][:-1]], x), "model 1 .*2/bias: missing"),
        (
            lambda nets, x: ([nets[0], with_bias(nets[1], jnp.ones(9))], x),
            r"model 1 .*0/bias: shape \(9,\), expected \(8,\)",
        ),
        (
            lambda nets, x: ([nets[0], with_bias(nets[1], jnp.ones(8, int))], x),
            "model 1 .*0/bias: dtype int32, expected float32",
        ),
        (
            lambda nets, x: ([nets[0], with_bias(nets[1], jnp.full(8, jnp.inf))], x),
            "model 1 .*0/bias: 8 of 8 values not finite",
        ),
    ],
    ids=["empty batch", "no models", "another tree", "shape", "dtype", "not finite"],
)
def test_what_does_not_fit_is_named(change, message):
    symmetry, nets, x = setting("mlp")
    nets, x = change(list(nets), x)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        otf.repair(symmetry, ref.network, nets, x)


def with_bias(net, bias):
    return [net[0] | {"bias": bias}, *net[1:]]


# Without the tests' checks of annotations, which would refuse other types before the library does.
repair_of_any_type: Any = inspect.unwrap(otf.repair)


def original_of(nets, **changes):
    symmetry = setting("mlp")[0]
    fields = {"symmetry": symmetry, "fn": ref.network, "params": nets[0], "plans": {}}
    return otf.Original(**(fields | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda nets: {"method": otf.LeastSquares}, "method is the class LeastSquares; pass Rest"),
        (lambda nets: {"method": "least squares"}, "method is 'least squares'; pass Restore"),
        (
            lambda nets: {"originals": original_of(nets)},
            "originals is of type Original; pass a list with an Original, or None, for each model",
        ),
        (lambda nets: {"originals": {0: None}}, "originals is of type dict; pass a list with an"),
        (lambda nets: {"originals": "ab"}, "originals is of type str; pass a list with an"),
        (
            lambda nets: {"originals": [otf.Original, None]},
            "original 0 is the class Original; pass an Original, or None",
        ),
        (
            lambda nets: {"originals": [original_of(nets, fn=nets[0]), None]},
            "a list was given where a function is wanted: call Original(symmetry, fn, params",
        ),
        (
            lambda nets: {"originals": [original_of(nets, plans="ab"), None]},
            "plans is a str; pass a dict of arrays by the names of groups",
        ),
        (lambda nets: {"weights": "half"}, "weights is 'half', of type str; give one number for"),
        (lambda nets: {"weights": ["a", "b"]}, "weight 0 is 'a', of type str; give one number"),
        (lambda nets: {"weights": lambda path: None}, "of type function; give one number for each"),
    ],
)
def test_arguments_of_other_types_are_named(options, message):
    symmetry, nets, x = setting("mlp")
    with pytest.raises(TypeError, match=re.escape(message)):
        repair_of_any_type(symmetry, ref.network, nets, x, **options(nets))


def test_an_original_that_does_not_fit_is_named_by_key_path():
    symmetry, nets, x = setting("mlp")
    original = original_of(nets, params=with_bias(nets[0], jnp.ones(9)))
    with pytest.raises(ValueError, match=r"(?s)original 0 .*0/bias: shape \(9,\)"):
        otf.repair(symmetry, ref.network, nets, x, originals=[original, None])


def test_another_function_is_named():
    symmetry, nets, x = setting("mlp")
    with pytest.raises(ValueError, match="other groups"):
        otf.repair(symmetry, lambda net, x: ref.network(net, x).sum() + net[0]["bias"], nets, x)


@pytest.mark.parametrize(
    ("values", "message"), [({"ridge": -1.0}, "ridge >= 0"), ({"steps": 0}, "steps >= 1")]
)
def test_settings_of_least_squares_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        otf.LeastSquares(**values)


@METHODS
def test_layers_of_a_stack_are_repaired_like_layers_of_a_list(method):
    def fn(p, x):
        for kernel, bias in zip(p["w"], p["b"], strict=True):
            x = jnp.tanh(x @ kernel + bias[None])
        return x @ p["out"]

    a, b = (zoo.randomise(zoo.shapes(w=(3, 5, 5), b=(3, 5), out=(5, 2)), seed=s) for s in (0, 1))
    x = normal(64, 5, seed=0)
    stacked = otf.trace_symmetry(fn, a, x)
    assert stacked.leaf_splits
    listed = [{k: list(v) if k != "out" else v for k, v in model.items()} for model in (a, b)]
    symmetry = otf.trace_symmetry(fn, listed[0], x)
    found = otf.repair(stacked, fn, [a, b], x, method=method)
    expected = otf.repair(symmetry, fn, listed, x, method=method)
    close(found["w"], jnp.stack(expected["w"]))
    close(found["b"], jnp.stack(expected["b"]))
    close(found["out"], expected["out"])
    assert jnp.max(jnp.abs(found["w"] - (a["w"] + b["w"]) / 2)) > 1e-2
