"""Running statistics against those of all activations at once, by NumPy, in four frameworks."""

import functools
import warnings
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, normal
from flax import linen as nn
from flax import nnx

import otfusion_jax as otf

otf_any: Any = otf  # for calls that a type checker would refuse

SIZES = (6, 10, 3)
BATCHES = [3 * normal(n, 5, seed=n) + n for n in SIZES]
W1, W2 = normal(5, 4, seed=1), normal(4, 2, seed=2)
MEANS = {"mean": "mean", "var": "mean", "mean2": "mean2", "var2": "mean2"}

pytestmark = pytest.mark.usefixtures("default_promotion")


def activations(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """What both layers of normalisation are shown in training mode, by NumPy in float64."""
    first = np.asarray(x, float) @ np.asarray(W1, float)
    normalised = (first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5)
    return first, np.maximum(normalised, 0) @ np.asarray(W2, float)


def exact(total: bool = True) -> list[np.ndarray]:
    """The mean and variance of each layer over all examples."""
    found = []
    for layer in zip(*[activations(x) for x in BATCHES], strict=True):
        everything = np.concatenate(layer)
        within = np.average([x.var(0) for x in layer], axis=0, weights=SIZES)
        found += [everything.mean(0), everything.var(0) if total else within]
    return found


def assert_exact(found: list[Any], total: bool = True, rtol: float = 1e-5) -> None:
    for value, right in zip(found, exact(total), strict=True):
        np.testing.assert_allclose(np.ravel(value), right, rtol=rtol, atol=rtol)


# No framework


def training_step(params: Any, x: Any, momentum: Any = 0.9) -> Any:
    """The network of the oracle, in JAX."""
    params = dict(params)
    h = x @ W1
    for mean, var, last in (("mean", "var", False), ("mean2", "var2", True)):
        m, v = h.mean(0), h.var(0)
        params[mean] = momentum * params[mean] + (1 - momentum) * m.astype(params[mean].dtype)
        params[var] = momentum * params[var] + (1 - momentum) * v.astype(params[var].dtype)
        if not last:
            h = jax.nn.relu((h - m) / jnp.sqrt(v + 1e-5)) @ W2
    return params


def plain(dtype: Any = jnp.float32) -> dict[str, Any]:
    shapes = {"mean": 4, "var": 4, "mean2": 2, "var2": 2}
    return {k: jnp.full(n, 7, dtype) for k, n in shapes.items()} | {"w": W1}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999, 10 / 11])
@pytest.mark.parametrize("total", [True, False])
def test_statistics_are_those_of_all_examples(momentum: float, total: bool):
    update = jax.jit(functools.partial(training_step, momentum=momentum))
    found = otf.estimate_statistics(update, plain(), iter(BATCHES), leaves=MEANS.get, total=total)
    assert_exact([found[k] for k in MEANS], total)
    np.testing.assert_array_equal(found["w"], W1)
    # The order is that in which they are given, and makes no difference.
    again = otf.estimate_statistics(update, found, BATCHES[::-1], leaves=MEANS.get, total=total)
    assert_exact([again[k] for k in MEANS], total)


def test_the_momentum_of_half_precision_is_known():
    found = otf.estimate_statistics(training_step, plain(jnp.bfloat16), BATCHES, leaves=MEANS.get)
    assert found["var"].dtype == jnp.bfloat16
    assert_exact([found[k].astype(jnp.float32) for k in MEANS], rtol=0.05)


def test_a_mean_far_from_zero_leaves_the_variance_its_digits():
    def update(params, x):
        centred = x - 1e4
        return {
            "mean": 0.9 * params["mean"] + 0.1 * (centred.mean(0) + 1e4),
            "var": 0.9 * params["var"] + 0.1 * centred.var(0),
        }

    x = 1e4 + normal(64, 3)
    start = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    found = otf.estimate_statistics(update, start, [x[:32], x[32:]])
    np.testing.assert_allclose(found["var"], np.asarray(x, float).var(0), rtol=1e-3)


def test_batches_count_as_the_caller_says():
    def update(params, batch):
        return {"ema": 0.5 * params["ema"] + 0.5 * batch["value"]}

    batches = [{"value": jnp.array(1.0)}, {"value": jnp.array(4.0)}]
    find = functools.partial(otf.estimate_statistics, update, {"ema": jnp.zeros(())}, batches)
    counted = find(leaves=lambda path: path, size=lambda batch: float(batch["value"]))
    np.testing.assert_allclose(counted["ema"], (1 + 4 * 4) / 5, rtol=1e-6)
    with pytest.raises(ValueError, match="no array with an axis; say by `size`"):
        find(leaves=lambda path: path)
    with pytest.raises(ValueError, match=r"size\(batch\) is 0.0"):
        find(leaves=lambda path: path, size=lambda batch: 0.0)


def test_arrays_of_a_batch_that_differ_in_size_are_named():
    def update(params, batch):
        return {"ema": 0.5 * params["ema"] + 0.5 * batch[1].mean()}

    # Old-style keys are arrays of two numbers, new ones have no axis.
    values = [jnp.zeros(9), jnp.ones(1)]
    find = functools.partial(otf.estimate_statistics, update, {"ema": jnp.zeros(())})
    old = [(jax.random.PRNGKey(0), value) for value in values]
    with pytest.raises(ValueError, match=r"their shapes are \[\(2,\), \(9,\)"):
        find(old, leaves=lambda path: path)
    by_size = find(old, leaves=lambda path: path, size=lambda batch: len(batch[1]))
    new = [(jax.random.key(0), value) for value in values]
    for found in (by_size, find(new, leaves=lambda path: path)):
        np.testing.assert_allclose(found["ema"], 0.1, rtol=1e-6)


# Frameworks: the recipes of the guide


def test_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.99)
            h = nn.relu(norm(name="a")(nn.Dense(4, use_bias=False, name="first")(x)))
            return norm(name="b")(nn.Dense(2, use_bias=False, name="second")(h))

    net = Net()
    variables = net.init(jax.random.key(0), BATCHES[0])
    variables["params"]["first"]["kernel"] = W1
    variables["params"]["second"]["kernel"] = W2

    @jax.jit
    def update(variables, x):
        _, changed = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return {**variables, **changed}

    found = otf.estimate_statistics(update, variables, BATCHES)
    stats = found["batch_stats"]
    assert_exact([stats[layer][k] for layer in "ab" for k in ("mean", "var")])


class NNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
        self.first, self.second = nnx.Param(W1), nnx.Param(W2)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x @ self.first[...])) @ self.second[...])


def test_nnx():
    model = NNX()
    model.train()
    graph, params = nnx.split(model)

    @jax.jit
    def update(params, x):
        model = nnx.merge(graph, params)
        model(x)
        return nnx.state(model)

    found = otf.estimate_statistics(update, params, BATCHES)
    nnx.update(model, found)
    assert_exact([x[...] for x in (model.a.mean, model.a.var, model.b.mean, model.b.var)])


class Equinox(eqx.Module):
    a: eqx.nn.BatchNorm
    b: eqx.nn.BatchNorm

    def __init__(self, mode: Any):
        self.a = eqx.nn.BatchNorm(4, "batch", mode=mode)
        self.b = eqx.nn.BatchNorm(2, "batch", mode=mode)

    def __call__(self, x, state):
        h, state = self.a(x @ W1, state)
        return self.b(jax.nn.relu(h) @ W2, state)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_equinox(mode):
    model, state = eqx.nn.make_with_state(Equinox)(mode)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def update(params_and_state, x):
        params, state = params_and_state
        apply = jax.vmap(
            eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        return params, apply(x, state)[1]

    _, found = otf.estimate_statistics(update, (params, state), BATCHES)
    index = "batch_state_index" if mode == "batch" else "ema_state_index"
    assert_exact([x for norm in (model.a, model.b) for x in found.get(getattr(norm, index))])
    # In inference they are used as they are.
    trained = eqx.nn.inference_mode(model)
    right = exact()
    h = (np.asarray(BATCHES[0]) @ np.asarray(W1) - right[0]) / np.sqrt(right[1] + 1e-5)
    out = (np.maximum(h, 0) @ np.asarray(W2) - right[2]) / np.sqrt(right[3] + 1e-5)
    answer = jax.vmap(trained, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        BATCHES[0], found
    )
    np.testing.assert_allclose(answer[0], out, atol=1e-4)
    # A state that has counted would be divided by what is expected of so many steps.
    used = update((params, state), BATCHES[0])
    with pytest.raises(ValueError, match=r"pass the state that .*make_with_state.*\n  1/"):
        otf.estimate_statistics(update, used, BATCHES)


def test_haiku():
    def forward(x, is_training):
        a = hk.BatchNorm(True, True, 0.99, name="a")
        b = hk.BatchNorm(True, True, 0.99, name="b")
        return b(jax.nn.relu(a(x @ W1, is_training)) @ W2, is_training)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = net.init(jax.random.key(0), BATCHES[0], True)

    @jax.jit
    def update(tree, x):
        return {**tree, "state": net.apply(tree["params"], tree["state"], x, True)[1]}

    tree = {"params": params, "state": state}
    found = otf.estimate_statistics(update, tree, BATCHES)
    stats = found["state"]
    names = ("mean_ema", "var_ema")
    assert_exact([stats[f"{layer}/~/{name}"]["average"] for layer in "ab" for name in names])
    with pytest.raises(ValueError, match="(?s)pass the state that `init`.*mean_ema/counter: 1"):
        otf.estimate_statistics(update, update(tree, BATCHES[0]), BATCHES)


# What does not fit


def test_what_is_no_running_average_is_named():
    def inference(params, x):
        return params

    def grows(params, x):
        return {**params, "mean": params["mean"] + x.mean(0)[:4]}

    def depends(params, x):
        new = training_step(params, x)
        return {**new, "var2": 0.9 * params["var2"] + x.var(0)[:2] / params["var"][:2]}

    find = functools.partial(otf.estimate_statistics, leaves=MEANS.get, batches=BATCHES)
    with pytest.raises(ValueError, match=r"var: keeps all of what it was; is it in training"):
        find(inference, plain())
    with pytest.raises(ValueError, match=r"mean: keeps all of what it was"):
        find(grows, plain())
    with pytest.raises(ValueError, match=r"var2: is not finite after a step") as error:
        find(depends, plain())
    assert "mean2:" not in str(error.value)
    with pytest.raises(ValueError, match=r"var2: is no running average"):
        find(lambda p, x: {**training_step(p, x), "var2": p["var2"] ** 2 / 3}, plain())


def test_mistakes_are_named():
    update, params = training_step, plain()
    find = functools.partial(otf_any.estimate_statistics, update)
    with pytest.raises(TypeError, match=r"batches is an array of shape \(6, 5\)"):
        find(params, BATCHES[0], leaves=MEANS.get)
    with pytest.raises(ValueError, match="no batches were given"):
        find(params, [], leaves=MEANS.get)
    with pytest.raises(ValueError, match="(?s)say which are by `leaves`.*  w"):
        find({"w": W1}, BATCHES)
    with pytest.raises(ValueError, match="var: its mean is 'man', which is not one"):
        find(params, BATCHES, leaves={**MEANS, "var": "man"}.get)
    with pytest.raises(ValueError, match=r"var2: shape \(2,\), its mean \(4,\)"):
        find(params, BATCHES, leaves={**MEANS, "var2": "mean"}.get)
    with pytest.raises(ValueError, match="of another structure than params"):
        otf_any.estimate_statistics(lambda p, x: {"mean": 1}, params, BATCHES, leaves=MEANS.get)
    with pytest.raises(TypeError, match="called inside of jax.jit"):
        jax.jit(lambda p: find(p, BATCHES, leaves=MEANS.get))(params)
    with pytest.raises(FloatingPointError, match="(?s)are not finite.*var2"):
        find(params, [BATCHES[0], BATCHES[1] * jnp.inf], leaves=MEANS.get)


# What is found by name, and the warning


def test_statistics_are_known_by_evidence():
    pair = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    tree = {
        "batch_stats": {"bn": pair},
        "params": {"prior": pair, "bn": {"scale": jnp.ones(3)}},
        "torch": {"running_mean": jnp.zeros(2), "running_var": jnp.ones(2)},
        "keras/bn/moving_mean": jnp.zeros(4),
        "keras/bn/moving_variance": jnp.ones(4),
        "apart": {"mean": jnp.zeros(3), "var": jnp.ones(4)},
        "alone": {"mean": jnp.zeros(3)},
        # A state dict of PyTorch, and Linen's variables, flat.
        "layer1.0.bn1.running_mean": jnp.zeros(2),
        "layer1.0.bn1.running_var": jnp.ones(2),
        "params.prior.mean": jnp.zeros(3),
        "params.prior.var": jnp.ones(3),
    }
    assert otf.running_statistics(tree) == {
        "batch_stats/bn/mean": "batch_stats/bn/mean",
        "batch_stats/bn/var": "batch_stats/bn/mean",
        "keras/bn/moving_mean": "keras/bn/moving_mean",
        "keras/bn/moving_variance": "keras/bn/moving_mean",
        "layer1.0.bn1.running_mean": "layer1.0.bn1.running_mean",
        "layer1.0.bn1.running_var": "layer1.0.bn1.running_mean",
        "torch/running_mean": "torch/running_mean",
        "torch/running_var": "torch/running_mean",
    }


def normed(p, x):
    h = (x @ p["w"] - p["bn"]["mean"]) / jnp.sqrt(p["bn"]["var"] + 1e-5)
    return jax.nn.relu(h) @ p["v"]


def net(seed: int) -> dict[str, Any]:
    statistics = {"mean": normal(4, seed=seed), "var": jnp.abs(normal(4, seed=seed + 9)) + 1}
    return {"w": normal(5, 4, seed=seed), "v": normal(4, 2, seed=seed), "bn": statistics}


def test_an_average_of_statistics_is_warned_of_once():
    a, b = net(0), net(1)
    symmetry = otf.trace_symmetry(normed, a, BATCHES[0])
    squared = jax.tree.map(jnp.square, a)
    for average in (
        otf.average,
        functools.partial(otf.fuse, symmetry),
        lambda models: otf.fuse(symmetry, otf.stack(models)),
        lambda models: otf.fuse([symmetry, symmetry], models),
        functools.partial(otf.barycenter, symmetry),
        functools.partial(otf.fuse_shared, symmetry),
        functools.partial(otf.task_arithmetic, base=a),
        functools.partial(otf.ties, base=a),
        lambda models: otf.slerp(models[0], models[1], 0.5),
        lambda models: otf.fisher_average(models, [squared, squared]),
        lambda models: otf.regmean(models, [{}, {}]),
        lambda models: otf.greedy_soup(models, lambda params: 1.0),
    ):
        with pytest.warns(otf.StatisticsWarning, match="bn/mean\n  bn/var") as caught:
            average([a, b])
        assert len(caught) == 1


def test_where_nothing_is_averaged_there_is_no_warning():
    a, b = net(0), net(1)
    statistics = otf.running_statistics(a)

    def keeps(path):
        return (0.0, 1.0) if path in statistics else None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = otf.average([a, b], keeps)
        otf.average([a, {**b, "bn": a["bn"]}])
        otf.average([a])
        jax.jit(lambda models: otf.average(models))([a, b])
    np.testing.assert_array_equal(kept["bn"]["var"], b["bn"]["var"])


def large_statistics(seed: int) -> dict[str, Any]:
    """Far larger than all that was learned."""
    return {"mean": 100 * normal(4, seed=seed), "var": jnp.abs(100 * normal(4, seed=seed + 1))}


def test_units_are_not_matched_by_statistics_unless_told():
    a = net(0)
    symmetry = otf.trace_symmetry(normed, a, BATCHES[0])
    plans = symmetry.random(jax.random.key(3))
    b = {**otf.transport(symmetry, plans, a), "bn": large_statistics(5)}
    (name,) = symmetry
    for method in (otf.CoordinateDescent(), otf.ForwardPass()):
        align = functools.partial(otf.align, symmetry, a, b, method=method)
        found = align()
        np.testing.assert_array_equal(found.plans[name], plans[name])
        # The objective is of what counts, and that is found again.
        assert found.objective == 0
        np.testing.assert_array_equal(
            align(leaf_weight=lambda path: path in ("w", "v")).history, found.history
        )
        counted = align(leaf_weight=lambda path: 1.0)
        assert not np.array_equal(counted.plans[name], plans[name])
    jitted = jax.jit(functools.partial(otf.align, symmetry))(a, b)
    np.testing.assert_array_equal(jitted.plans[name], plans[name])


FUSIONS = {
    "fuse": otf.fuse,
    "fuse a stack": lambda symmetry, models, **named: otf.fuse(
        symmetry, otf.stack(models), **named
    ),
    "fuse several symmetries": lambda symmetry, models, **named: otf.fuse(
        [symmetry] * len(models), models, **named
    ),
    "barycenter": lambda *args, **named: otf.barycenter(*args, **named).params,
    "fuse_shared": lambda *args, **named: otf.fuse_shared(*args, **named).params,
}


@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=list(FUSIONS))
def test_fused_by_what_was_learned_a_copy_is_what_it_was(fusion):
    a = net(0)
    symmetry = otf.trace_symmetry(normed, a, BATCHES[0])
    plans = symmetry.random(jax.random.key(3))
    b = {**otf.transport(symmetry, plans, a), "bn": large_statistics(5)}
    with pytest.warns(otf.StatisticsWarning):
        fused = fusion(symmetry, [a, b])
    with pytest.warns(otf.StatisticsWarning):
        counted = fusion(symmetry, [a, b], leaf_weight=lambda path: 1.0)
    hidden = jax.nn.relu(BATCHES[0] @ a["w"]) @ a["v"]

    def without_norm(params):
        return jax.nn.relu(BATCHES[0] @ params["w"]) @ params["v"]

    np.testing.assert_allclose(without_norm(fused), hidden, atol=1e-4)
    assert abs(without_norm(counted) - hidden).max() > 0.1


@pytest.mark.parametrize("kind", ["matrices", "read by features"])
def test_learned_weights_that_are_called_statistics_count(kind):
    draw = functools.partial(normal, seed=1)
    if kind == "matrices":

        def fn(p, x):
            return jax.nn.relu(x @ (p["a"]["mean"] + p["a"]["var"])) @ p["b"]

        params = {"a": {"mean": draw(5, 8), "var": normal(5, 8, seed=2)}, "b": jnp.ones((8, 3))}
    else:

        def fn(p, x):
            hidden = jax.nn.relu(x @ p["w"])
            return hidden @ p["mean"] + jnp.sqrt(hidden**2 @ p["var"] ** 2)

        params = {"w": jnp.ones((5, 8)), "mean": draw(8), "var": normal(8, seed=2)}
    assert len(otf.running_statistics(params)) == 2
    symmetry = otf.trace_symmetry(fn, params, BATCHES[0])
    plans = symmetry.random(jax.random.key(3))
    found = otf.align(symmetry, params, otf.transport(symmetry, plans, params))
    (name,) = symmetry
    np.testing.assert_array_equal(found.plans[name], plans[name])


def test_fused_and_estimated_anew_a_copy_is_what_it_was():
    def update(p, x):
        h = x @ p["w"]
        new = {"mean": 0.9 * p["bn"]["mean"] + 0.1 * h.mean(0)}
        new["var"] = 0.9 * p["bn"]["var"] + 0.1 * h.var(0)
        return {**p, "bn": new}

    symmetry = otf.trace_symmetry(normed, net(0), BATCHES[0])
    a = otf.estimate_statistics(update, net(0), BATCHES)
    copy = otf.transport(symmetry, symmetry.random(jax.random.key(3)), a)
    # Moved onto each other, their statistics are the same.
    otf.fuse(symmetry, [copy, a])
    copy = {**copy, "bn": net(1)["bn"]}
    with pytest.warns(otf.StatisticsWarning):
        fused = otf.fuse(symmetry, [copy, a])
    found = otf.estimate_statistics(update, fused, BATCHES)
    np.testing.assert_allclose(normed(found, BATCHES[0]), normed(a, BATCHES[0]), atol=1e-4)


# Folding


def linen_norms() -> tuple[Any, Any]:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (4, 2):
                x = nn.Dense(width)(x)
                x = jax.nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return x

    net = Net()
    return net.apply, net.init(jax.random.key(0), BATCHES[0])


def nnx_norms() -> tuple[Any, Any]:
    model = NNX()
    model.eval()
    return otf.functional(model)


def haiku_norms() -> tuple[Any, Any]:
    def forward(x, is_training):
        for width in (4, 2):
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(width)(x), is_training))
        return x

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    tree = net.init(jax.random.key(0), BATCHES[0], True)
    return lambda tree, x: net.apply(*tree, x, False)[0], tree


def named_norms() -> tuple[Any, Any]:
    def fn(p, x):
        h = (x @ p["w"] - p["m"]) / jnp.sqrt(p["v"] + 1e-5)
        return h * p["g"][None] + p["b"]

    return fn, {"w": W1, **{name: jnp.ones(4) for name in "mvgb"}}


def torch_norms() -> tuple[Any, Any]:
    """State dicts of PyTorch: names with points in them, each of them one key."""

    def fn(p, x):
        for name in ("block.0.bn1", "block.1.bn1"):
            x = x @ p[f"{name.removesuffix('bn1')}fc.weight"].T
            x = (x - p[f"{name}.running_mean"]) / jnp.sqrt(p[f"{name}.running_var"] + 1e-5)
            x = jax.nn.relu(x * p[f"{name}.weight"] + p[f"{name}.bias"])
        return x

    tree = {"block.0.fc.weight": W1.T, "block.1.fc.weight": W2.T}
    for name, width in (("block.0.bn1", 4), ("block.1.bn1", 2)):
        for key in ("weight", "bias", "running_mean", "running_var"):
            tree[f"{name}.{key}"] = jnp.ones(width)
    return fn, tree


NORMS = {
    "linen": linen_norms,
    "nnx": nnx_norms,
    "haiku": haiku_norms,
    "torch": torch_norms,
    "named": named_norms,
}
NAMED = [otf.BatchNorm(mean="m", var="v", scale="g", bias="b")]


def drawn(tree: Any, seed: int) -> Any:
    """Fills all leaves but counters with positive numbers."""
    leaves, treedef = jax.tree.flatten(tree)
    filled = []
    for number, leaf in enumerate(leaves):
        values = np.abs(np.asarray(normal(*leaf.shape, seed=seed + number))) + 0.2
        filled.append(leaf if leaf.dtype == jnp.int32 else array(values))
    return treedef.unflatten(filled)


@pytest.mark.parametrize("name", NORMS)
def test_folding_keeps_the_function_and_is_undone(name: str):
    fn, tree = NORMS[name]()
    layers = NAMED if name == "named" else None
    params = drawn(tree, seed=5)
    folded = otf.fold_batch_norm(params, layers)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    right = np.asarray(fn(params, BATCHES[0]))
    np.testing.assert_allclose(fn(folded, BATCHES[0]), right, rtol=1e-4, atol=1e-4)
    changed = [
        not np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, (params, folded)), strict=True)
    ]
    assert sum(changed) == (4 if name == "named" else 8)
    back = otf.unfold_batch_norm(folded, params, layers)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), back, params)
    jitted = jax.jit(lambda params: otf.fold_batch_norm(params, layers))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), jitted, folded)
    # What is folded already has equal statistics: an average of it has nothing to be estimated.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        otf.average([folded, otf.fold_batch_norm(drawn(tree, seed=50), layers)])


def test_a_variance_is_what_the_network_adds_epsilon_to():
    fn, tree = named_norms()
    folded = otf.fold_batch_norm(drawn(tree, 0), NAMED)
    np.testing.assert_array_equal(folded["m"], 0)
    np.testing.assert_allclose(folded["v"] + 1e-5, 1, atol=1e-7)


def test_what_cannot_be_folded_is_named():
    _, tree = named_norms()
    with pytest.raises(ValueError, match=r"name the leaves, layers=\[BatchNorm"):
        otf.fold_batch_norm(tree)
    with pytest.raises(ValueError, match="gain: not there"):
        otf.fold_batch_norm(tree, [otf.BatchNorm("m", "v", "gain", "b")])
    with pytest.raises(ValueError, match=r"w: shape \(5, 4\), not as the others"):
        otf.fold_batch_norm(tree, [otf.BatchNorm("m", "v", "w", "b")])
    with pytest.raises(ValueError, match="v: a variance below 0"):
        otf.fold_batch_norm({**tree, "v": -tree["v"]}, NAMED)
    with pytest.raises(ValueError, match="epsilon is 0; give the network's, above 0"):
        otf.fold_batch_norm(tree, NAMED, epsilon=0)
    with pytest.raises(ValueError, match="w: missing"):
        otf.unfold_batch_norm(tree, {k: v for k, v in tree.items() if k != "w"}, NAMED)
