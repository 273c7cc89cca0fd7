"""Networks that differ in widths: split, merged, matched by structure, aligned and fused."""

import functools

import jax
import jax.numpy as jnp
import pytest

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
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        path: jax.random.normal(key, shape) * (shape[-2] if len(shape) > 1 else 1) ** -0.5
        for key, (path, shape) in zip(keys, shapes.items(), strict=True)
    }


X = jax.random.normal(jax.random.key(9), (6, 5))


@functools.cache
def traced(name: str, n: int) -> otf.Symmetry:
    return otf.trace_symmetry(NETWORKS[name][0], made(name, n), X)


def shuffled(key: jax.Array, narrow: otf.Symmetry, wide: otf.Symmetry) -> dict[str, jax.Array]:
    """Plans that split units into equal parts, in random order, where there are more in the wide."""
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
    return bool(jnp.max(jnp.abs(a - b)) < 1e-5 * jnp.max(jnp.abs(b)))


@pytest.mark.parametrize("times", [2, 3])
@ALL
def test_splitting_all_units_keeps_the_function_and_merging_undoes_it(name: str, times: int):
    fn, params = NETWORKS[name][0], made(name, 4)
    narrow, wide = traced(name, 4), traced(name, 4 * times)
    plans = shuffled(jax.random.key(1), narrow, wide)
    split = otf.transport(narrow, plans, params, onto=wide)
    assert jax.tree.map(jnp.shape, split) == jax.tree.map(jnp.shape, made(name, 4 * times))
    assert close(fn(split, X), fn(params, X))
    merged = otf.transport(wide, backwards(plans), split, onto=narrow)
    for path in params:
        assert close(merged[path], params[path]), path


@ALL
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


@ALL
def test_plans_of_matrices_do_what_permutations_do(name: str):
    params, symmetry = made(name, 4), traced(name, 4)
    plans = symmetry.random(jax.random.key(2))
    soft = {
        name: jax.nn.one_hot(plan, plan.shape[-1], axis=-2) / plan.shape[-1]
        for name, plan in plans.items()
    }
    found, expected = (otf.transport(symmetry, p, params, onto=symmetry) for p in (soft, plans))
    assert jax.tree.all(jax.tree.map(close, found, expected))
