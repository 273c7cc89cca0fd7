"""Networks that differ in widths: split, merged, matched by structure, aligned and fused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, normal

import otfusion_jax as otf

Params = dict[str, jax.Array]


def mlp(p: Params, x: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ p["a"] + p["bias"][None])
    return jax.nn.relu(h @ p["b"]) @ p["c"]


def mlp_shapes(n: int) -> dict[str, tuple[int, ...]]:
    return {"a": (5, 2 * n), "bias": (2 * n,), "b": (2 * n, 3 * n), "c": (3 * n, 4)}


def convolution(p: Params, x: jax.Array) -> jax.Array:
    """Flattened before the dense layer: space outside, channels inside."""
    numbers = ("NHWC", "HWIO", "NHWC")
    h = x[:, :, None].reshape(len(x), 1, 5, 1)
    for name in ("a", "b"):
        h = jax.nn.relu(
            jax.lax.conv_general_dilated(h, p[name], (1, 1), "SAME", None, None, numbers)
        )
    return h.reshape(len(x), -1) @ p["c"]


def convolution_shapes(n: int) -> dict[str, tuple[int, ...]]:
    return {"a": (1, 3, 1, n), "b": (1, 3, n, 2 * n), "c": (10 * n, 4)}


def dense(p: Params, x: jax.Array) -> jax.Array:
    """Concatenation: an axis of segments, one of them pinned."""
    h = x
    for name in ("a", "b"):
        h = jnp.concatenate([h, jax.nn.relu(h @ p[name])], axis=-1)
    return h @ p["c"]


def dense_shapes(n: int) -> dict[str, tuple[int, ...]]:
    return {"a": (5, n), "b": (5 + n, 2 * n), "c": (5 + 3 * n, 4)}


def residual(p: Params, x: jax.Array) -> jax.Array:
    """Gated blocks on a residual stream, with a norm; gate and value in one kernel."""
    h = x @ p["in"]
    for name in ("0", "1"):
        y = h / jnp.sqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6) * p[f"norm{name}"][None]
        gate, value = jnp.split(y @ p[f"up{name}"], 2, axis=-1)
        h = h + (jax.nn.silu(gate) * value) @ p[f"down{name}"]
    return h @ p["out"]


def residual_shapes(n: int) -> dict[str, tuple[int, ...]]:
    shapes = {"in": (5, 2 * n), "out": (2 * n, 4)}
    for i in range(2):
        shapes |= {f"norm{i}": (2 * n,), f"up{i}": (2 * n, 6 * n), f"down{i}": (3 * n, 2 * n)}
    return shapes


def attention(p: Params, x: jax.Array) -> jax.Array:
    """Three heads, queries, keys and values in one kernel; tokens are what x has rows."""
    h = x @ p["in"]
    q, k, v = (
        y.reshape(len(x), 3, -1) for y in jnp.split(h @ p["qkv"] + p["bias"][None], 3, axis=-1)
    )
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), axis=-1)
    h = h + jnp.einsum("hts,shd->thd", weights, v).reshape(len(x), -1) @ p["proj"]
    return h @ p["out"]


def attention_shapes(n: int) -> dict[str, tuple[int, ...]]:
    shapes = {"in": (5, 2 * n), "qkv": (2 * n, 9 * n), "bias": (9 * n,), "proj": (3 * n, 2 * n)}
    return shapes | {"out": (2 * n, 4)}


def multi_head(p: Params, x: jax.Array) -> jax.Array:
    """Heads of three units, as many as there is room for."""
    h = x @ p["in"]
    q, k, v = (
        y.reshape(len(x), -1, 3) for y in jnp.split(h @ p["qkv"] + p["bias"][None], 3, axis=-1)
    )
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), axis=-1)
    h = h + jnp.einsum("hts,shd->thd", weights, v).reshape(len(x), -1) @ p["proj"]
    return h @ p["out"]


def scanned(p: Params, x: jax.Array) -> jax.Array:
    """Stacked layers: the hidden units of each have an order of their own."""

    def layer(h: jax.Array, w: Params) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ w["up"]) @ w["down"], None

    h, _ = jax.lax.scan(layer, x @ p["in"], {"up": p["up"], "down": p["down"]})
    return h @ p["out"]


def scanned_shapes(n: int) -> dict[str, tuple[int, ...]]:
    shapes = {"in": (5, 2 * n), "up": (3, 2 * n, n), "down": (3, n, 2 * n)}
    return shapes | {"out": (2 * n, 4)}


def interleaved(p: Params, x: jax.Array) -> jax.Array:
    """A gate and its value side by side in each of two positions of space."""
    h = (x @ p["a"]).reshape(len(x), 2, -1)
    gate, value = jnp.split(h, 2, axis=-1)
    return (jax.nn.sigmoid(gate) * value).sum(1) @ p["b"]


def interleaved_shapes(n: int) -> dict[str, tuple[int, ...]]:
    return {"a": (5, 4 * n), "b": (n, 4)}


NETWORKS = {
    "mlp": (mlp, mlp_shapes),
    "convolution": (convolution, convolution_shapes),
    "dense": (dense, dense_shapes),
    "residual": (residual, residual_shapes),
    "attention": (attention, attention_shapes),
    "scanned": (scanned, scanned_shapes),
    "interleaved": (interleaved, interleaved_shapes),
}
ALL = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def made(name: str, n: int, seed: int = 0) -> Params:
    shapes = NETWORKS[name][1](n)
    rng = np.random.default_rng(seed)
    return {
        path: array(rng.standard_normal(shape) * (shape[-2] if len(shape) > 1 else 1) ** -0.5)
        for path, shape in shapes.items()
    }


X = normal(6, 5, seed=9)


@functools.cache
def traced(name: str, n: int) -> otf.Symmetry:
    return otf.trace_symmetry(NETWORKS[name][0], made(name, n), X)


def shuffled(key: jax.Array, narrow: otf.Symmetry, wide: otf.Symmetry) -> dict[str, jax.Array]:
    """Plans that split units into equal parts, in random order, where the wide one has more."""
    plans = {}
    for group in narrow.groups:
        n, m = group.size, wide[group.name].size
        if n != m:
            order = jax.random.permutation(key, m) * n // m
            plan = jax.nn.one_hot(order, n, axis=0) / m
            plans[group.name] = jnp.broadcast_to(plan, (*group.batch, n, m))
    return plans


def backwards(plans: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.swapaxes(plan, -1, -2) for name, plan in plans.items()}


def close(a: jax.Array, b: jax.Array) -> bool:
    found, expected = np.asarray(a), np.asarray(b)
    return bool(abs(found - expected).max() < 1e-5 * abs(expected).max())


@ALL
def test_splitting_all_units_keeps_the_function_and_merging_undoes_it(name: str):
    fn, params = NETWORKS[name][0], made(name, 4)
    narrow, wide = traced(name, 4), traced(name, 8)
    plans = shuffled(jax.random.key(1), narrow, wide)
    split = otf.transport(narrow, plans, params, onto=wide)
    assert jax.tree.map(jnp.shape, split) == jax.tree.map(jnp.shape, made(name, 8))
    assert close(fn(split, X), fn(params, X))
    merged = otf.transport(wide, backwards(plans), split, onto=narrow)
    for path in params:
        assert close(merged[path], params[path]), path


@pytest.mark.parametrize("name", ["mlp", "attention", "interleaved"])
def test_the_widths_are_read_off_the_plans_where_they_can_be(name: str):
    params, narrow, wide = made(name, 4), traced(name, 4), traced(name, 8)
    plans = shuffled(jax.random.key(1), narrow, wide)
    if name == "interleaved":
        with pytest.raises(ValueError, match="a: units that change in number alternate"):
            otf.transport(narrow, plans, params)
        return
    found = otf.transport(narrow, plans, params)
    expected = otf.transport(narrow, plans, params, onto=wide)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))


@pytest.mark.parametrize("name", ["convolution", "attention", "scanned", "interleaved"])
def test_plans_of_matrices_do_what_permutations_do(name: str):
    params, symmetry = made(name, 4), traced(name, 4)
    plans = symmetry.random(jax.random.key(2))
    around = {group.outer for group in symmetry.groups}
    soft = {
        name: jax.nn.one_hot(plan, plan.shape[-1], axis=-2) / plan.shape[-1]
        for name, plan in plans.items()
        if name not in around
    }
    found, expected = (
        otf.transport(symmetry, plans | p, params, onto=symmetry) for p in (soft, {})
    )
    assert jax.tree.all(jax.tree.map(close, found, expected))


# Alignment and fusion


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dense", otf.ForwardPass()),
        ("attention", otf.ForwardPass()),
        ("attention", otf.CoordinateDescent(starts=("identity",))),
    ],
    ids=str,
)
def test_a_network_whose_units_were_split_is_fused_back(name: str, method: otf.AbstractMethod):
    params, narrow, wide = made(name, 4), traced(name, 4), traced(name, 8)
    plans = shuffled(jax.random.key(1), narrow, wide)
    split = otf.transport(narrow, plans, params, onto=wide)
    found = otf.align(wide, split, params, onto=narrow, method=method)
    assert found.converged
    merged = otf.transport(wide, found, split, onto=narrow)
    assert close(NETWORKS[name][0](merged, X), NETWORKS[name][0](params, X))


def scaled_as_the_original(symmetry: otf.Symmetry, onto: otf.Symmetry, params: Params) -> Params:
    """`P diag(1/b)` on consuming axes too: of n units that become m, m/n of what we have."""
    for group in symmetry.groups:
        for member in group.having("consumes"):
            scale = onto[group.name].size / group.size
            params = {**params, member.path: params[member.path] * scale}
    return params


def test_heads_are_a_width_too():
    """Two heads copied to four, each copy with its units in an order of its own, and back."""
    fn = multi_head

    def of(heads: int, seed: int) -> tuple[Params, otf.Symmetry]:
        shapes = {"in": (5, 6), "qkv": (6, 9 * heads), "bias": (9 * heads,)}
        shapes |= {"proj": (3 * heads, 6), "out": (6, 4)}
        rng = np.random.default_rng(seed)
        params = {path: array(rng.standard_normal(shape) / 2) for path, shape in shapes.items()}
        return params, otf.trace_symmetry(fn, params, X)

    (params, two), (_, four) = of(2, 0), of(4, 1)
    heads, inside = next((g.outer, g.name) for g in two.groups if g.outer)
    plans = {heads: jax.nn.one_hot(jnp.array([1, 0, 0, 1]), 2, axis=0) / 4}
    for group in two.groups:
        if group.outer == heads:
            in_order = jnp.broadcast_to(jnp.arange(3), (2, 4, 3))
            key = jax.random.key(3)
            plans[group.name] = jax.random.permutation(key, in_order, axis=-1, independent=True)
    many = otf.transport(two, plans, params, onto=four)
    assert close(fn(many, X), fn(params, X))

    found = otf.align(four, many, params, onto=two, method=otf.ForwardPass())
    assert found.plans[inside].shape == (4, 2, 3)
    back = otf.transport(four, found, many, onto=two)
    assert close(fn(back, X), fn(params, X))
    other, _ = of(2, 2)
    original = otf.Original(four, fn, many, found)
    repaired = otf.repair(two, fn, [back, other], X, originals=[original, None])
    expected = otf.repair(two, fn, [params, other], X)
    np.testing.assert_allclose(fn(repaired, X), fn(expected, X), atol=1e-3)


def test_the_scaling_of_the_original_shrinks_what_was_split():
    params, narrow, wide = made("mlp", 4), traced("mlp", 4), traced("mlp", 8)
    plans = shuffled(jax.random.key(1), narrow, wide)
    split = otf.transport(narrow, plans, params, onto=wide)
    ours = otf.transport(wide, backwards(plans), split, onto=narrow)
    expected = mlp(params, X)
    assert close(mlp(ours, X), expected)
    theirs = mlp(scaled_as_the_original(wide, narrow, ours), X)
    # Two hidden layers, each halved; the bias of the first is not.
    assert jnp.linalg.norm(theirs) < 0.5 * jnp.linalg.norm(expected)


def test_models_of_several_widths_are_fused_onto_the_one_chosen():
    sizes, shares = (4, 8, 6), (0.5, 0.3, 0.2)
    models = [made("mlp", n, seed) for seed, n in enumerate(sizes)]
    symmetries = [traced("mlp", n) for n in sizes]
    method, onto, target = otf.ForwardPass(), symmetries[1], models[1]
    fused = otf.fuse(symmetries, models, shares, reference=1, method=method)
    expected = jax.tree.map(jnp.zeros_like, target)
    for symmetry, model, share in zip(symmetries, models, shares, strict=True):
        moved = model
        if symmetry is not onto:
            plans = otf.align(symmetry, model, target, onto=onto, method=method)
            moved = otf.transport(symmetry, plans, model, onto=onto)
        expected = jax.tree.map(lambda x, y, w=share: x + w * y, expected, moved)
    assert jax.tree.all(jax.tree.map(close, fused, expected))


def test_jit_and_vmap_align_other_widths_alike():
    wide, narrow = traced("mlp", 6), traced("mlp", 4)  # no size divides the other
    sources = [made("mlp", 6, seed) for seed in range(2)]
    target = made("mlp", 4)

    def moved(source: Params) -> Params:
        plans = otf.align(wide, source, target, onto=narrow, method=otf.ForwardPass())
        return otf.transport(wide, plans, source, onto=narrow)

    together = jax.jit(jax.vmap(moved))(otf.stack(sources))
    for i, source in enumerate(sources):
        expected = moved(source)
        assert jax.tree.all(jax.tree.map(lambda x, y, i=i: close(x[i], y), together, expected))


def test_activations_of_other_widths_match_what_was_split():
    params, narrow, wide = made("dense", 4), traced("dense", 4), traced("dense", 8)
    plans = shuffled(jax.random.key(1), narrow, wide)
    split = otf.transport(narrow, plans, params, onto=wide)
    batches = [normal(6, 5, seed=i) for i in range(3)]
    grams = otf.feature_gram(wide, dense, split, params, batches, onto=narrow)
    found = otf.align(wide, split, params, onto=narrow, method=otf.ForwardPass(), grams=grams)
    merged = otf.transport(wide, found, split, onto=narrow)
    assert close(dense(merged, X), dense(params, X))


# What does not fit


def test_networks_that_differ_in_more_than_widths_are_refused():
    params, symmetry = made("dense", 4), traced("dense", 4)

    def refused(other: otf.Symmetry, text: str) -> None:
        with pytest.raises(ValueError, match="differ in more than the widths") as error:
            otf.transport(symmetry, symmetry.identity(), params, onto=other)
        assert text in str(error.value), error.value

    refused(traced("mlp", 4), "bias: only in the target")
    shapes = {**dense_shapes(4), "c": (17, 7)}
    more = {path: jnp.ones(shape) for path, shape in shapes.items()}
    refused(otf.trace_symmetry(dense, more, X), "c: shapes (17, 4) and (17, 7) differ along what")
    shapes = {"a": (5, 1), "b": (6, 8), "c": (14, 4)}
    one = {path: jnp.ones(shape) for path, shape in shapes.items()}
    refused(otf.trace_symmetry(dense, one, X), "a has one unit in the target")

    def ordered(p: Params, x: jax.Array) -> jax.Array:
        return dense(p, x) + jnp.sum(p["a"] * jnp.arange(8.0)[None])

    refused(otf.trace_symmetry(ordered, made("dense", 8), X), "in the target axis 1 of a is")


def test_experts_with_two_hidden_layers_can_only_be_permuted():
    def experts(p: Params, x: jax.Array) -> jax.Array:
        h = jnp.tanh(jnp.einsum("ni,eih->enh", x, p["a"]))
        h = jnp.tanh(jnp.einsum("enh,ehk->enk", h, p["b"]))
        return jnp.sum(jnp.einsum("enk,eko->eno", h, p["c"]), axis=0)

    def of(count: int) -> tuple[Params, otf.Symmetry]:
        shapes = {"a": (count, 5, 3), "b": (count, 3, 4), "c": (count, 4, 2)}
        params = {path: jnp.ones(shape) for path, shape in shapes.items()}
        return params, otf.trace_symmetry(experts, params, X)

    (params, two), (_, four) = of(2), of(4)
    with pytest.raises(ValueError, match="both in b, so that it can only be permuted"):
        otf.transport(two, two.identity(), params, onto=four)


def test_tied_embeddings_are_refused():
    def tied(p: Params, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["e"]) @ p["e"].T

    narrow, wide = {"e": jnp.ones((5, 4))}, {"e": jnp.ones((5, 8))}
    symmetries = [otf.trace_symmetry(tied, params, X) for params in (wide, narrow)]
    with pytest.raises(ValueError, match="e: e both produce and consume the units"):
        otf.align(symmetries[0], wide, narrow, onto=symmetries[1])


def test_plans_that_lead_elsewhere_are_refused():
    params, narrow, wide = made("mlp", 4), traced("mlp", 4), traced("mlp", 8)
    plans = shuffled(jax.random.key(1), narrow, wide)
    with pytest.raises(ValueError, match=r"b: no plan, but 12 units become 24"):
        otf.transport(narrow, {"a": plans["a"]}, params, onto=wide)
    with pytest.raises(ValueError, match=r"a: shape \(8, 8\), expected \(8, 16\)"):
        otf.transport(narrow, {**plans, "a": jnp.eye(8) / 8}, params, onto=wide)
    with pytest.raises(ValueError, match="a: a permutation, but 8 units become 16"):
        otf.transport(narrow, {**plans, "a": jnp.arange(8)}, params, onto=wide)


# Repair


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("residual", otf.RestoreStatistics()),
        ("attention", otf.RestoreStatistics()),
        ("attention", otf.LeastSquares(ridge=0.1, steps=100)),
    ],
    ids=str,
)
def test_the_original_of_another_width_tells_what_is_to_be_restored(
    name: str, method: otf.AbstractRepair
):
    """Of a network whose units were split, the features are those of the network itself."""
    fn, a, b = NETWORKS[name][0], made(name, 4), made(name, 4, seed=1)
    narrow, wide = traced(name, 4), traced(name, 8)
    plans = shuffled(jax.random.key(1), narrow, wide)
    split = otf.transport(narrow, plans, a, onto=wide)
    original = otf.Original(wide, fn, split, backwards(plans))
    x = normal(32, 5, seed=3)
    found = otf.repair(narrow, fn, [a, b], x, method=method, originals=[original, None])
    expected = otf.repair(narrow, fn, [a, b], x, method=method)
    np.testing.assert_allclose(fn(found, X), fn(expected, X), atol=1e-3)


def test_statistics_are_those_of_the_units_that_were_merged():
    wide, narrow = traced("mlp", 8), traced("mlp", 4)
    a, b = made("mlp", 8), made("mlp", 4)
    plans = otf.align(wide, a, b, onto=narrow, method=otf.ForwardPass()).plans
    moved = otf.transport(wide, plans, a, onto=narrow)
    x = normal(64, 5, seed=3)
    original = otf.Original(wide, mlp, a, plans)
    weights = (0.7, 0.3)
    fused = otf.repair(narrow, mlp, [moved, b], x, weights=weights, originals=[original, None])
    ours, theirs = (otf.features(narrow, mlp, p, x)["a"] for p in (fused, b))
    merged = otf.features(wide, mlp, a, x)["a"]
    shares = plans["a"] / plans["a"].sum(0, keepdims=True)
    for statistic in (jnp.std, jnp.mean):
        expected = 0.7 * statistic(merged, axis=0) @ shares + 0.3 * statistic(theirs, axis=0)
        if statistic is jnp.std:
            assert close(statistic(ours, axis=0), expected)
        else:  # the shift is that of the bias, which comes after
            before = otf.average([moved, b], weights)["bias"]
            assert close(statistic(ours, axis=0) + fused["bias"] - before, expected)


def test_permutations_need_no_original_but_may_have_one():
    fn, symmetry = attention, traced("attention", 4)
    a, b = made("attention", 4), made("attention", 4, seed=1)
    plans = symmetry.random(jax.random.key(5))
    moved = otf.transport(symmetry, plans, a)
    original = otf.Original(symmetry, fn, a, plans)
    x = normal(32, 5, seed=3)
    found = otf.repair(symmetry, fn, [moved, b], x, originals=[original, None])
    expected = otf.repair(symmetry, fn, [moved, b], x)
    assert close(fn(found, X), fn(expected, X))


def test_originals_that_do_not_fit_are_refused():
    fn, symmetry, a = mlp, traced("mlp", 4), made("mlp", 4)

    def other(p: Params, x: jax.Array) -> jax.Array:
        return mlp(jax.tree.map(jnp.tanh, p), x)

    with pytest.raises(ValueError, match="1 originals were given, but there are 2 models"):
        otf.repair(symmetry, fn, [a, a], X, originals=[None])
    with pytest.raises(ValueError, match="original 0 runs other operations"):
        otf.repair(symmetry, fn, [a, a], X, originals=[otf.Original(symmetry, other, a, {}), None])
