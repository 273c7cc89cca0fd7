"""Checks products of rows with a matrix for each group of them: experts by `jax.lax.ragged_dot`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normals, uniform
from jax import lax

import otfusion_jax as otf
from otfusion_jax.tracing import registry
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.primitives import RAGGED_DOT
from otfusion_jax.tracing.values import Values

pytestmark = pytest.mark.compatibility

EXACT, BROKEN = 1e-5, 1e-2
X = uniform(12, 5)
SIZES = jnp.array([5, 4, 3])
SHAPES = {"in": (5, 8), "up": (3, 8, 6), "down": (3, 6, 8), "out": (8, 4)}
EXPERTS = SHAPES | {"before": (8,), "router": (8, 3), "gate": (3, 8, 6), "after": (8,)}

Params = dict[str, jax.Array]


def by_rows(p: Params, x: jax.Array) -> jax.Array:
    """Rows that are in the order of their groups from the start."""
    x = jnp.tanh(x @ p["in"])
    h = jnp.tanh(lax.ragged_dot(x, p["up"], SIZES))
    return (x + lax.ragged_dot(h, p["down"], SIZES)) @ p["out"]


def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None]


def sorted_by_expert(p: Params, x: jax.Array) -> jax.Array:
    """Two experts for each token, whose tokens are brought together by sorting them."""
    x = x @ p["in"]
    h = normalised(x, p["before"])
    shares, found = lax.top_k(jax.nn.softmax(h @ p["router"]), 2)
    expert = found.reshape(-1)
    order = jnp.argsort(expert)
    rows, sizes = h[order // 2], jnp.bincount(expert, length=3)
    hidden = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes))
    hidden *= lax.ragged_dot(rows, p["up"], sizes)
    y = lax.ragged_dot(hidden, p["down"], sizes)[jnp.argsort(order)]
    x += jnp.sum(y.reshape(len(x), 2, -1) * shares[..., None], 1)
    return normalised(x, p["after"]) @ p["out"]


NETWORKS = {"rows in order": (by_rows, SHAPES), "tokens by expert": (sorted_by_expert, EXPERTS)}


def change(symmetry: otf.Symmetry, fn: Callable, params: Any) -> float:
    """The largest relative change of the outputs under four random elements of the symmetry."""
    before = np.asarray(fn(params, X))
    worst = 0.0
    for seed in range(4):
        plans = symmetry.random(jax.random.key(seed))
        after = np.asarray(fn(otf.transport(symmetry, plans, params), X))
        worst = max(worst, float(abs(after - before).max() / before.std()))
    return worst


@pytest.mark.parametrize("name", NETWORKS)
def test_streams_and_hidden_units_move_past_experts_that_stay(name: str):
    fn, shapes = NETWORKS[name]
    params = normals(shapes)
    symmetry = otf.trace_symmetry(fn, params, X)
    axes = {}
    for group in symmetry.groups:
        axes[group.size] = {(member.path, member.axis) for member in group.members}
    inner = {(path, 2) for path in ("up", "gate") if path in shapes} | {("down", 1)}
    assert axes[6] == inner
    assert axes[8] >= {("in", 1), ("up", 1), ("down", 2), ("out", 0)}
    reasons = {(pin.path, pin.axis): pin.reason for pin in symmetry.pinned}
    assert reasons["up", 0].startswith("ragged_dot_general along its groups at ")
    assert change(symmetry, fn, params) < EXACT


def test_a_stream_around_experts_rotates():
    params = normals(EXPERTS)
    symmetry = otf.trace_symmetry(sorted_by_expert, params, X).with_rotations()
    rotating = [group for group in symmetry.groups if group.rotates]
    assert [group.size for group in rotating] == [8]
    canonical = otf.canonicalize(symmetry, params)
    assert change(symmetry, sorted_by_expert, canonical) < 1e-4
    # Hidden units pass through silu.
    assert {group.size for group in symmetry.groups} - {8} == {6}


def test_a_stream_that_layer_norm_centres_rotates_past_experts():
    def fn(p: Params, x: jax.Array) -> jax.Array:
        x = x @ p["in"]
        x += lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], SIZES)), p["down"], SIZES)
        return jax.nn.standardize(x, epsilon=1e-6) @ p["out"]

    params = normals(SHAPES)
    symmetry = otf.trace_symmetry(fn, params, X).with_rotations()
    assert [group.size for group in symmetry.groups if group.rotates] == [8]
    assert change(symmetry, fn, otf.canonicalize(symmetry, params)) < 1e-4


@pytest.mark.parametrize("by", ["weights", "features"])
def test_planted_orders_are_found(by: str):
    params = normals(EXPERTS)
    symmetry = otf.trace_symmetry(sorted_by_expert, params, X)
    planted = otf.transport(symmetry, symmetry.random(jax.random.key(1)), params)
    grams = None
    if by == "features":
        grams = otf.feature_gram(symmetry, sorted_by_expert, params, planted, [X])
    alignment = otf.align(symmetry, params, planted, grams=grams)
    found = otf.transport(symmetry, alignment, params)
    jax.tree.map(np.testing.assert_array_equal, found, planted)


def test_rows_stay_and_differ_though_they_are_equal_before():
    params = normals({"in": (5, 12), "up": (3, 5, 6), "out": (6, 4), "pool": (12,)})

    def fn(p: Params, x: jax.Array) -> jax.Array:
        # Units of `in` as rows, and rows of ones.
        units = lax.ragged_dot(jnp.tanh(x @ p["in"])[:5].T, p["up"], SIZES)
        alike = lax.ragged_dot(jnp.ones((12, 5)), p["up"], SIZES)
        return p["pool"] @ (units + jnp.tanh(alike)) @ p["out"]

    symmetry = otf.trace_symmetry(fn, params, X)
    assert [group.size for group in symmetry.groups] == [6]
    pinned = {(pin.path, pin.axis) for pin in symmetry.pinned}
    assert pinned >= {("in", 1), ("pool", 0), ("up", 0)}
    assert change(symmetry, fn, params) < EXACT


def test_gradients_through_experts_pin_them():
    def fn(p: Params, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x @ p["in"])

        def loss(up: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(lax.ragged_dot(x, up, SIZES)))

        fast = p["up"] - jax.grad(loss)(p["up"])
        return lax.ragged_dot(lax.ragged_dot(x, fast, SIZES), p["down"], SIZES) @ p["out"]

    params = normals(SHAPES)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert "up" not in {member.path for group in symmetry.groups for member in group.members}
    assert change(symmetry, fn, params) < EXACT


def by_row_and_matrix(ctx: RuleContext, values: Values) -> Values:
    """A wrong rule: contracted axes are not tied."""
    x, y, _ = values
    axes = x.axes[0], ctx.pass_on(y.axes[2], y.kind, x.kind)
    return [x._replace(axes=axes, number=None)]


def test_untied_the_certificate_breaks(monkeypatch: pytest.MonkeyPatch):
    for primitive in RAGGED_DOT:
        monkeypatch.setitem(registry._registry, primitive, by_row_and_matrix)
    params = normals(SHAPES)
    symmetry = otf.trace_symmetry(by_rows, params, X)
    assert change(symmetry, by_rows, params) > BROKEN


def test_a_stream_becomes_wider_past_experts():
    wide = {name: tuple(12 if n == 8 else n for n in shape) for name, shape in EXPERTS.items()}
    narrow = normals(EXPERTS)
    symmetry = otf.trace_symmetry(sorted_by_expert, narrow, X).with_rotations()
    onto = otf.trace_symmetry(sorted_by_expert, normals(wide), X).with_rotations()
    narrow = otf.canonicalize(symmetry, narrow)
    (stream,) = (group.name for group in symmetry.groups if group.rotates)
    isometry, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 8)))
    plans = {stream: jnp.asarray(isometry.T, jnp.float32)}
    expanded = otf.transport(symmetry, plans, narrow, onto=onto)
    assert jax.tree.map(jnp.shape, expanded) == wide
    np.testing.assert_allclose(
        sorted_by_expert(expanded, X), sorted_by_expert(narrow, X), rtol=1e-4, atol=1e-5
    )
