"""Checks which units may move of which programs use the positions: experts, codes, winners."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normals, uniform
from jax import lax
from jax.extend import core

import otfusion_jax as otf
from otfusion_jax.tracing import registry
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.values import Values

pytestmark = pytest.mark.compatibility

EXACT, BROKEN = 1e-5, 1e-2
X = uniform(64, 5)

Params = dict[str, jax.Array]


def traced(fn: Callable, params: Any, *inputs: Any) -> otf.Symmetry:
    return otf.trace_symmetry(fn, params, *inputs, on_ties="ignore")


def change(symmetry: otf.Symmetry, fn: Callable, params: Any, *inputs: Any) -> float:
    """The largest relative change of the outputs under four random elements of the symmetry."""
    before = np.asarray(fn(params, *inputs))
    worst = 0.0
    for seed in range(4):
        plans = symmetry.random(jax.random.key(seed))
        after = np.asarray(fn(otf.transport(symmetry, plans, params), *inputs))
        worst = float(np.maximum(worst, abs(after - before).max() / before.std()))
    return worst


# --- what is done with the positions of 6 units

NET = normals({"in": (5, 6), "out": (6, 3)})


def one_hot(found: jax.Array) -> jax.Array:
    return jax.nn.one_hot(found, 6)


def numbers(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def counts() -> jax.Array:
    """The positions of the units, counted by the program."""
    return lax.broadcasted_iota(jnp.int32, (1, 6), 1)


def k_hot(h: jax.Array) -> jax.Array:
    """A mask of the three largest of each row."""
    return one_hot(lax.top_k(h, 3)[1]).sum(1)


def scanned(h: jax.Array) -> jax.Array:
    """The winners are marked in a loop."""
    return lax.map(lambda row: one_hot(jnp.argmax(row)), h)


FOLLOWED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "winner": lambda h: one_hot(jnp.argmax(h, -1)),
    "loser": lambda h: one_hot(jnp.argmin(h, -1)),
    "winner, jitted": lambda h: jax.jit(one_hot)(jax.jit(lambda h: jnp.argmax(h, -1))(h)),
    "winner, sample by sample": jax.vmap(lambda h: one_hot(jnp.argmax(h))),
    "winner, counted along the front": lambda h: jax.nn.one_hot(jnp.argmax(h, -1), 6, axis=0).T * h,
    "all but the winner": lambda h: h * numbers(jnp.argmax(h, -1)[:, None] != counts()),
    "winner of a softmax": lambda h: one_hot(jnp.argmax(jax.nn.softmax(h), -1)),
    "winner of a normalised row": lambda h: one_hot(
        jnp.argmax((h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True), -1)
    ),
    "three, as a mask": k_hot,
    "three, one after the other": lambda h: jnp.einsum(
        "bk,bku->bu", lax.top_k(h, 3)[0], one_hot(lax.top_k(h, 3)[1])
    ),
    "above a threshold": lambda h: jnp.where(h >= lax.top_k(h, 3)[0][:, -1:], h, 0),
    "second of the ranks": lambda h: one_hot(lax.top_k(h, 3)[1][:, 1]),
    "in sixteen bits": lambda h: one_hot(jnp.argmax(h, -1).astype(jnp.int16)),
    "in a loop": scanned,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_units_move_if_their_positions_meet_positions(name: str):
    def fn(p: Params, x: jax.Array) -> jax.Array:
        return FOLLOWED[name](x @ p["in"]) @ p["out"]

    symmetry = traced(fn, NET, X)
    assert [(group.name, group.size) for group in symmetry.groups] == [("in", 6)]
    assert {symmetry.parts[member.leaf].path for member in symmetry["in"].members} == {"in", "out"}
    assert change(symmetry, fn, NET, X) < EXACT


def carried(h: jax.Array) -> jax.Array:
    """Each row is multiplied by the unit that has won in the row before."""

    def step(winner: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(row).astype(jnp.int32), row * one_hot(winner)

    return lax.scan(step, jnp.int32(0), h)[1]


PINNED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "the next one": lambda h: one_hot((jnp.argmax(h, -1) + 1) % 6),
    "as a number": lambda h: h * jnp.argmax(h, -1)[:, None].astype(jnp.float32),
    "as a truth value": lambda h: h * numbers(jnp.argmax(h, -1)[:, None].astype(bool)),
    "smaller than positions": lambda h: h * numbers(jnp.argmax(h, -1)[:, None] < counts()),
    "the first": lambda h: h * numbers(jnp.argmax(h, -1) == 0)[:, None],
    "positions of a constant": lambda h: (
        h * numbers(jnp.argmax(h, -1)[:, None] == np.arange(6)[None])
    ),
    "fewer classes": lambda h: jnp.pad(jax.nn.one_hot(jnp.argmax(h, -1), 4), ((0, 0), (0, 2))),
    "which branch": lambda h: jax.vmap(
        lambda row: lax.switch(jnp.argmax(row), [jnp.sin, jnp.cos, jnp.tanh], row)
    )(h),
    "carried through a loop": carried,
    "one of two": lambda h: one_hot(
        lax.cond(h[0].sum() > 0, lambda: jnp.argmax(h, -1), lambda: jnp.argmin(h, -1))
    ),
    "reversed": lambda h: one_hot(lax.top_k(h, 6)[1][:, ::-1]).cumsum(1)[:, 3],
    "selected": lambda h: one_hot(jnp.where(h[:, 0] > 0, jnp.argmax(h, -1), jnp.argmin(h, -1))),
    "below the diagonal": lambda h: h @ numbers(counts().T >= counts()),
    "on the diagonal": lambda h: h @ numbers(counts().T == counts()),
}


@pytest.mark.parametrize("name", PINNED)
def test_units_stay_if_more_is_done_with_their_positions(name: str):
    def fn(p: Params, x: jax.Array) -> jax.Array:
        return PINNED[name](x @ p["in"]) @ p["out"]

    symmetry = traced(fn, NET, X)
    assert symmetry.groups == ()
    assert ("in", 1) in {(pin.path, pin.axis) for pin in symmetry.pinned}


@pytest.mark.parametrize("name", [name for name in FOLLOWED if name != "above a threshold"])
def test_units_stay_if_ties_are_not_ignored(name: str):
    def fn(p: Params, x: jax.Array) -> jax.Array:
        return FOLLOWED[name](x @ p["in"]) @ p["out"]

    symmetry = otf.trace_symmetry(fn, NET, X)
    assert symmetry.groups == ()
    assert ("in", 1) in {(pin.path, pin.axis) for pin in symmetry.pinned}


@pytest.mark.parametrize("bend", [jax.nn.relu, jnp.round, jnp.sign])
def test_units_above_a_threshold_move_whether_or_not_some_are_equal(bend: Callable):
    def fn(p: Params, x: jax.Array) -> jax.Array:
        h = bend(x @ p["in"])
        return jnp.where(h >= lax.top_k(h, 3)[0][:, -1:], h + 1, 0) @ p["out"]

    symmetry = otf.trace_symmetry(fn, NET, X)
    assert [(group.name, group.size) for group in symmetry.groups] == [("in", 6)]
    assert change(symmetry, fn, NET, X) < EXACT


def test_a_wrong_word_for_ties_is_refused():
    with pytest.raises(ValueError, match="on_ties is 'pinned'; it must be 'pin' or 'ignore'"):
        otf.trace_symmetry(lambda p, x: x @ p["in"], NET, X, on_ties="pinned")  # pyright: ignore[reportArgumentType]


def test_positions_within_heads_are_not_compared_across_heads():
    params = normals({"w": (5, 3, 4), "out": (3, 4, 2)})

    def fn(p: Params, x: jax.Array) -> jax.Array:
        h = jnp.einsum("bd,dhu->bhu", x, p["w"])
        winners = jnp.argmax(h, -1)
        agree = numbers(winners[:, :, None] == winners[:, None, :]).sum((1, 2))
        return jnp.einsum("bhu,huo->bo", jnp.tanh(h), p["out"]) * agree[:, None]

    symmetry = traced(fn, params, X)
    assert [group.size for group in symmetry.groups] == [3]
    assert change(symmetry, fn, params, X) < EXACT


@pytest.mark.parametrize(("dtype", "size"), [(jnp.int8, 200), (jnp.uint8, 300), (jnp.float16, 6)])
def test_counts_that_run_over_are_no_positions(dtype: Any, size: int):
    params = normals({"in": (5, size), "out": (size, 3)})

    def fn(p: Params, x: jax.Array) -> jax.Array:
        found = jnp.argmax(x @ p["in"], -1)[:, None]
        return numbers(found == lax.iota(dtype, size).astype(jnp.int32)[None]) @ p["out"]

    assert traced(fn, params, X).groups == ()


def test_positions_that_are_returned_pin_their_units():
    def fn(p: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = x @ p["in"]
        return one_hot(jnp.argmax(h, -1)) @ p["out"], lax.top_k(h, 2)[1]

    symmetry = traced(fn, NET, X)
    assert symmetry.groups == ()
    reasons = {pin.reason for pin in symmetry.pinned if pin.path == "in"}
    assert any(reason.startswith("top_k along axis 1") for reason in reasons)


def test_a_rule_of_ones_own_is_given_no_positions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    seen = []

    def rule(ctx: RuleContext, values: Values) -> Values:
        seen.extend(value.positions for value in values)
        return [ctx.join(values)]

    otf.register_rule(core.primitives.eq_p)(rule)
    symmetry = traced(lambda p, x: k_hot(x @ p["in"]) @ p["out"], NET, X)
    assert symmetry.groups == ()
    assert seen == [None, None]


def test_a_rule_of_ones_own_gets_no_positions_of_what_it_calls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    winner_p = core.Primitive("winner")
    winner_p.def_abstract_eval(lambda h: h.update(shape=h.shape[:1], dtype=np.dtype(np.int32)))
    body = jax.make_jaxpr(lambda h: jnp.argmax(h, -1))(X @ NET["in"])

    def rule(ctx: RuleContext, values: Values) -> Values:
        return [ctx.join([value]) for value in ctx.call(body, values)]

    otf.register_rule(winner_p)(rule)

    def fn(p: Params, x: jax.Array) -> jax.Array:
        h = x @ p["in"]
        return (h * numbers(winner_p.bind(h) > 2)[:, None]) @ p["out"]

    assert traced(fn, NET, X).groups == ()


def test_untied_the_certificate_breaks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RuleContext, "compare_positions", lambda self, values: None)

    def fn(p: Params, x: jax.Array) -> jax.Array:
        return one_hot(jnp.argmax(x @ p["in"], -1)) @ p["out"]

    symmetry = traced(fn, NET, X)
    assert change(symmetry, fn, NET, X) > BROKEN


# --- networks


EXPERTS = {"in": (5, 8), "router": (8, 4), "up": (4, 8, 7), "down": (4, 7, 8), "out": (8, 3)}


def of_gates(gates: Callable[[jax.Array], jax.Array], p: Params, x: jax.Array) -> jax.Array:
    """A mixture of four experts with a stream around it."""
    x = jnp.tanh(x @ p["in"])
    h = jax.nn.relu(jnp.einsum("bd,edh->beh", x, p["up"]))
    y = jnp.einsum("beh,ehd->bed", h, p["down"])
    return (x + jnp.einsum("be,bed->bd", gates(x @ p["router"]), y)) @ p["out"]


def switch(logits: jax.Array) -> jax.Array:
    """One expert for each sample (Fedus et al., Switch Transformers, JMLR 2022)."""
    return jax.nn.softmax(logits) * jax.nn.one_hot(jnp.argmax(logits, -1), 4)


def top_two(logits: jax.Array) -> jax.Array:
    """Two experts for each sample, weighted by a softmax of theirs (Mixtral, 2024)."""
    largest, found = lax.top_k(logits, 2)
    return jnp.einsum("bk,bke->be", jax.nn.softmax(largest), jax.nn.one_hot(found, 4))


def thresholded(logits: jax.Array) -> jax.Array:
    """The same, by the numbers of the two."""
    second = lax.top_k(logits, 2)[0][:, -1:]
    return jax.nn.softmax(jnp.where(logits >= second, logits, -jnp.inf))


@pytest.mark.parametrize("gates", [switch, top_two, thresholded])
def test_experts_that_a_router_ranks_move_and_their_hidden_units_in_them(gates: Callable):
    def fn(p: Params, x: jax.Array) -> jax.Array:
        return of_gates(gates, p, x)

    params = normals(EXPERTS)
    symmetry = traced(fn, params, X)
    hidden, units, experts = sorted(symmetry.groups, key=lambda group: (-group.size, group.batch))
    assert (hidden.size, units.batch, units.size, experts.size) == (8, (4,), 7, 4)
    assert units.outer == experts.name
    paths = {symmetry.parts[member.leaf].path for member in experts.members}
    assert paths == {"router", "up", "down"}
    assert change(symmetry, fn, params, X) < EXACT


def with_capacity(p: Params, x: jax.Array) -> jax.Array:
    """Experts that take six tokens of a sequence each, as in Switch Transformers."""
    x = jnp.tanh(x @ p["in"])
    scores = jax.nn.softmax(x @ p["router"])
    chosen = jax.nn.one_hot(jnp.argmax(scores, -1), 4)
    place = jnp.cumsum(chosen, 0) * chosen
    chosen *= numbers(place <= 6)
    slot = jnp.sum(place * chosen, -1).astype(jnp.int32) - 1
    taken = chosen[:, :, None] * jax.nn.one_hot(slot, 6)[:, None, :]
    h = jax.nn.gelu(jnp.einsum("td,tec,edh->ech", x, taken, p["up"]))
    y = jnp.einsum("ech,ehd,tec->td", h, p["down"], taken)
    used = jnp.mean(chosen, 0) * jnp.mean(scores, 0)
    return (x + y * jnp.sum(scores * chosen, -1, keepdims=True)) @ p["out"] + jnp.sum(used)


def in_layers(p: Params, x: jax.Array) -> jax.Array:
    """Two layers of experts, scanned over, which also hand on how often each was the first."""

    def layer(x: jax.Array, q: Params) -> tuple[jax.Array, jax.Array]:
        logits = x @ q["router"]
        h = jax.nn.silu(jnp.einsum("bd,edh->beh", x, q["up"]))
        y = jnp.einsum("beh,ehd,be->bd", h, q["down"], top_two(logits))
        return x + y, jnp.mean(jax.nn.one_hot(lax.top_k(logits, 2)[1][:, 0], 4), 0)

    layers = {name: jnp.stack([p[name], 2 * p[name]]) for name in ("router", "up", "down")}
    x, often = lax.scan(layer, jnp.tanh(x @ p["in"]), layers)
    return x @ p["out"] + jnp.std(often)


@pytest.mark.parametrize("fn", [with_capacity, in_layers])
def test_experts_move_in_larger_networks(fn: Callable):
    params = normals(EXPERTS)
    symmetry = traced(fn, params, X)
    sizes = sorted((*group.batch, group.size) for group in symmetry.groups)
    assert sizes == [(4,), (4, 7), (8,)]
    assert change(symmetry, fn, params, X) < EXACT


def test_experts_in_another_order_are_found():
    def fn(p: Params, x: jax.Array) -> jax.Array:
        return of_gates(top_two, p, x)

    params = normals(EXPERTS)
    symmetry = traced(fn, params, X)
    planted = otf.transport(symmetry, symmetry.random(jax.random.key(1)), params)
    by_features = otf.feature_gram(symmetry, fn, params, planted, [X])
    for alignment in (
        otf.align(symmetry, params, planted),
        otf.align(symmetry, params, planted, grams=by_features),
    ):
        moved = otf.transport(symmetry, alignment, params)
        for name, leaf in planted.items():
            np.testing.assert_allclose(moved[name], leaf, rtol=0, atol=1e-5)


def test_codes_of_a_codebook_move():
    """Vectors are replaced by the nearest code (van den Oord et al., VQ-VAE, NeurIPS 2017)."""
    params = normals({"encode": (5, 8), "codes": (6, 8), "decode": (8, 3)})

    def fn(p: Params, x: jax.Array) -> jax.Array:
        z = jnp.tanh(x @ p["encode"])
        codes = p["codes"]
        distances = jnp.sum(z**2, -1, keepdims=True) - 2 * z @ codes.T
        distances += jnp.sum(codes**2, -1)[None]
        nearest = jax.nn.one_hot(jnp.argmin(distances, -1), 6) @ codes
        return (z + lax.stop_gradient(nearest - z)) @ p["decode"]

    symmetry = traced(fn, params, X)
    assert {(group.name, group.size) for group in symmetry.groups} == {("encode", 8), ("codes", 6)}
    assert change(symmetry, fn, params, X) < EXACT
