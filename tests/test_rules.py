"""Checks each rule twice: it pins the units where their order matters, and passes them where not.

That the checks could fail is checked as well: with a rule that constrains nothing in its place, the
certificate has to break.
"""

import ast
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from zoo import makes, randomise, rows_of, shapes, takes, uniform

import otfusion_jax as otf
from otfusion_jax import rules, walk
from otfusion_jax.axes import Kind, constant

P = core.primitives
EXACT, BROKEN = 1e-5, 1e-3
ROWS, UNITS = 4, 6
# Not exported by JAX.
SPLIT = jax.make_jaxpr(lambda x: lax.split(x, (1, 1)))(np.ones(2, np.float32)).eqns[-1].primitive
UNSTACK = jax.make_jaxpr(jnp.unstack)(np.ones(2, np.float32)).eqns[-1].primitive
X = uniform(ROWS, 5)


def weights(**sizes: tuple[int, ...]) -> dict[str, jax.Array]:
    return randomise(shapes(**sizes), 1)


def certificate(symmetry: otf.Symmetry, fn: Callable, params: Any, *inputs: Any) -> float:
    """The relative change of the output when every unit moves, and each group by another step."""
    plans = {
        name: jnp.roll(plan, 1 + i % (plan.shape[-1] - 1), axis=-1)
        for i, (name, plan) in enumerate(symmetry.identity().items())
    }
    before, after = fn(params, *inputs), fn(otf.transport(symmetry, plans, params), *inputs)
    return float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))


def found_by(fn: Callable, params: Any, groups: dict, *inputs: Any) -> None:
    """Asserts that a trace finds these groups and that they are symmetries."""
    inputs = inputs or (X,)
    symmetry = otf.trace_symmetry(fn, params, *inputs)
    assert {g.name: rows_of(g) for g in symmetry.groups} == groups
    assert certificate(symmetry, fn, params, *inputs) <= EXACT


def numbers(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def windowed(h: jax.Array, init: float, combine: Callable) -> jax.Array:
    return lax.reduce_window(h, init, combine, (1, 2), (1, 1), "SAME")


def blurred(h: jax.Array) -> jax.Array:
    """A convolution with the last axis as space."""
    kernel = jnp.array([1.0, 2.0, 4.0]).reshape(1, 1, 3)
    return lax.conv_general_dilated(h[:, None], kernel, (1,), "SAME")[:, 0]


def picked(h: jax.Array) -> jax.Array:
    return jnp.take(h, jnp.array([0, 2]), axis=-1)


def noisy(h: jax.Array) -> jax.Array:
    bits = jax.random.bits(jax.random.key(0), (1, h.shape[1]))
    return h * numbers(bits) / 2.0**32


@dataclasses.dataclass(frozen=True)
class Ordered:
    """An operation in which the order of the last axis of a matrix matters.

    `primitive` is what to take the rule away from for the check to fail.
    """

    primitive: core.Primitive
    fn: Callable[[jax.Array], jax.Array]


ORDERED = {
    "cumsum": Ordered(P.cumsum_p, lambda h: lax.cumsum(h, 1)),
    "cumsum reversed": Ordered(P.cumsum_p, lambda h: lax.cumsum(h, 1, reverse=True)),
    "cumsum of a constant": Ordered(P.cumsum_p, lambda h: h * lax.cumsum(jnp.ones_like(h), 1)),
    "cumprod": Ordered(P.cumprod_p, lambda h: lax.cumprod(h, 1)),
    "cummax": Ordered(P.cummax_p, lambda h: lax.cummax(h, 1)),
    "cummin": Ordered(P.cummin_p, lambda h: lax.cummin(h, 1)),
    "cumlogsumexp": Ordered(P.cumlogsumexp_p, lambda h: lax.cumlogsumexp(h, 1)),
    "sort": Ordered(P.sort_p, lambda h: lax.sort(h, dimension=1)),
    "sort by another": Ordered(P.sort_p, lambda h: lax.sort((jnp.sin(9 * h), h), dimension=1)[1]),
    "argmax": Ordered(P.argmax_p, lambda h: numbers(jnp.argmax(h, 1, keepdims=True))),
    "argmin": Ordered(P.argmin_p, lambda h: numbers(jnp.argmin(h, 1, keepdims=True))),
    "top_k": Ordered(P.top_k_p, lambda h: lax.top_k(h, 3)[0]),
    "top_k positions": Ordered(P.top_k_p, lambda h: numbers(lax.top_k(h, 3)[1])),
    "rev": Ordered(P.rev_p, lambda h: lax.rev(h, (1,))),
    "iota": Ordered(P.iota_p, lambda h: h * lax.broadcasted_iota(jnp.float32, h.shape, 1)),
    "gather": Ordered(P.gather_p, picked),
    "strided slice": Ordered(P.slice_p, lambda h: h[:, ::2]),
    "dynamic_slice": Ordered(P.dynamic_slice_p, lambda h: lax.dynamic_slice_in_dim(h, 1, 3, 1)),
    "pad in between": Ordered(P.pad_p, lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1)))),
    "unstack": Ordered(UNSTACK, lambda h: jnp.unstack(h, axis=1)[1][:, None]),
    "dynamic_update_slice": Ordered(
        P.dynamic_update_slice_p,
        lambda h: lax.dynamic_update_slice(h, h.sum(1, keepdims=True), (0, 2)),
    ),
    "convolution over the units": Ordered(P.conv_general_dilated_p, blurred),
    "window sum": Ordered(P.reduce_window_sum_p, lambda h: windowed(h, 0.0, lax.add)),
    "window max": Ordered(P.reduce_window_max_p, lambda h: windowed(h, -jnp.inf, lax.max)),
    "window min": Ordered(P.reduce_window_min_p, lambda h: windowed(h, jnp.inf, lax.min)),
    "random bits": Ordered(P.random_bits_p, noisy),
}


def ordering(name: str) -> tuple[Callable, dict]:
    """A network with the operation along its hidden units, and its parameters."""
    op = ORDERED[name].fn
    size = jax.eval_shape(op, jax.ShapeDtypeStruct((ROWS, UNITS), jnp.float32)).shape[1]
    params = weights(**{"in": (5, UNITS), "out": (size, 3)})
    return jax.jit(lambda p, x: op(jnp.tanh(x @ p["in"])) @ p["out"]), params


def unruled(ctx: walk.Context, values: list[walk.Value]) -> list[walk.Value]:
    """A wrong rule for any primitive: nothing is tied, and the results do not vary."""
    kind = max((v.kind for v in values), default=Kind.CONSTANT)
    shapes = [ctx.shape(i) for i in range(len(ctx.eqn.outvars))]
    return [walk.Value(tuple(constant(n) for n in shape), kind) for shape in shapes]


def passing(ctx: walk.Context, values: list[walk.Value]) -> list[walk.Value]:
    """A wrong rule for what keeps the shape: as if it were elementwise."""
    return [values[0]] * len(ctx.eqn.outvars)


@pytest.mark.parametrize("name", ORDERED)
def test_order_along_the_units_pins_them(name: str):
    fn, params = ordering(name)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.groups == ()
    assert ("in", 1) in {(p.path, p.axis) for p in symmetry.pinned}


def assert_breaks(name: str, rule: walk.Rule, monkeypatch: pytest.MonkeyPatch):
    """With this rule in place of its own, an operation leaves a group that is none."""
    fn, params = ordering(name)
    monkeypatch.setitem(walk._registry, ORDERED[name].primitive, rule)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.groups
    assert certificate(symmetry, fn, params, X) > BROKEN


@pytest.mark.parametrize("name", ORDERED)
def test_without_its_rule_the_certificate_breaks(name: str, monkeypatch: pytest.MonkeyPatch):
    assert_breaks(name, unruled, monkeypatch)


@pytest.mark.parametrize(
    "name",
    ["cumsum", "cumprod", "cummax", "cumlogsumexp", "sort", "rev", "dynamic_update_slice"]
    + ["window sum"],
)
def test_taken_for_elementwise_the_certificate_breaks(name: str, monkeypatch: pytest.MonkeyPatch):
    assert_breaks(name, passing, monkeypatch)


@pytest.mark.parametrize("name", ORDERED)
def test_order_along_another_axis_passes_the_units(name: str):
    op = ORDERED[name].fn
    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})
    fn = jax.jit(lambda p, x: op(jnp.tanh(x @ p["in"]).T).T @ p["out"])
    found_by(fn, params, {"in": {makes("in", 1), takes("out", 0)}})


# What takes the last axis apart: the hidden units [start, end) that move together, and where they
# are in what comes of it.
CUT = {
    "slice": Ordered(P.slice_p, lambda h: h[:, 1:4]),
    "pad": Ordered(P.pad_p, lambda h: jnp.pad(h, ((0, 0), (1, 2)))),
    "pad that shifts": Ordered(P.pad_p, lambda h: lax.pad(h, 0.0, ((0, 0, 0), (-1, 1, 0)))),
    "pad of a constant": Ordered(
        P.pad_p, lambda h: h * lax.pad(jnp.ones_like(h), 0.0, ((0, 0, 0), (-1, 1, 0)))
    ),
    "concatenate": Ordered(P.concatenate_p, lambda h: jnp.concatenate([h, jnp.tanh(h)], 1)),
    "concatenate constants": Ordered(
        P.concatenate_p,
        lambda h: h * jnp.concatenate([jnp.zeros((ROWS, 2)), jnp.ones((ROWS, 4))], 1),
    ),
    "split": Ordered(SPLIT, lambda h: jnp.split(h, [2], 1)[1]),
    "roll": Ordered(P.concatenate_p, lambda h: jnp.roll(h, 2, 1)),
}
SEGMENTS = {
    "slice": {"in": {(1, 0, 3)}, "in#2": {(4, None, 2)}},
    "pad": {"in": {(0, 1, 6)}, "out": {(None, 7, 2)}},
    "pad that shifts": {"in": {(1, 0, 5)}},
    "pad of a constant": {"in": {(0, 0, 5)}},
    "concatenate": {"in": {(0, 0, 6), (None, 6, 6)}},
    "concatenate constants": {"in": {(0, 0, 2)}, "in#2": {(2, 2, 4)}},
    "split": {"in": {(0, None, 2)}, "in#2": {(2, 0, 4)}},
    "roll": {"in": {(4, 0, 2)}, "in#2": {(0, 2, 4)}},
}


def cutting(name: str) -> tuple[Callable, dict]:
    op = CUT[name].fn
    size = jax.eval_shape(op, jax.ShapeDtypeStruct((ROWS, UNITS), jnp.float32)).shape[1]
    params = weights(**{"in": (5, UNITS), "out": (size, 3)})
    return jax.jit(lambda p, x: op(jnp.tanh(x @ p["in"])) @ p["out"]), params


@pytest.mark.parametrize("name", CUT)
def test_segments_move_by_themselves(name: str):
    fn, params = cutting(name)
    symmetry = otf.trace_symmetry(fn, params, X)
    found = {
        g.name: {
            (m.where.place.start, None) if m.path == "in" else (None, m.where.place.start)
            for m in g.members
        }
        for g in symmetry.groups
    }
    expected = {
        group: {
            pair
            for start, end, _ in rows
            for pair in ((start, None), (None, end))
            if pair != (None, None)
        }
        for group, rows in SEGMENTS[name].items()
    }
    assert found == expected
    sizes = {g.name: g.size for g in symmetry.groups}
    assert sizes == {group: max(n for _, _, n in rows) for group, rows in SEGMENTS[name].items()}
    assert certificate(symmetry, fn, params, X) <= EXACT


@pytest.mark.parametrize("name", CUT)
def test_without_its_rule_segments_break(name: str, monkeypatch: pytest.MonkeyPatch):
    fn, params = cutting(name)
    monkeypatch.setitem(walk._registry, CUT[name].primitive, unruled)
    assert certificate(otf.trace_symmetry(fn, params, X), fn, params, X) > BROKEN


@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.uniform])
def test_random_numbers_belong_to_their_positions(draw: Callable):
    key = jax.random.key(0)
    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})

    def along(p, x):
        return (jnp.tanh(x @ p["in"]) * draw(key, (1, UNITS))) @ p["out"]

    def across(p, x):
        return (jnp.tanh(x @ p["in"]) * draw(key, (ROWS, 1))) @ p["out"]

    found_by(along, params, {})
    found_by(across, params, {"in": {makes("in", 1), takes("out", 0)}})


PASSED_ON = {
    "debug.print": lambda h: (jax.debug.print("{}", h.sum()), h)[1],
    "stack": lambda h: jnp.stack([h, 2 * h], 1)[:, 0],
    "unstack": lambda h: h * jnp.unstack(h)[1][None],
    "tile": lambda h: jnp.tile(h, (2, 1)),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_units_are_passed_on(name: str):
    def fn(p, x):
        return PASSED_ON[name](jnp.tanh(x @ p["in"])) @ p["out"]

    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})
    found_by(fn, params, {"in": {makes("in", 1), takes("out", 0)}})


@pytest.mark.parametrize("op", [picked, lambda h: jnp.cumsum(h, axis=1)])
def test_reasons_from_inside_of_jax_name_the_callers_line(op: Callable):
    def fn(p, x):
        return jnp.sin(op(x @ p["in"])).sum()

    (first, second) = otf.trace_symmetry(fn, weights(**{"in": (5, UNITS)}), X).pinned
    assert first.reason == "tied to input 0, axis 1"
    assert __file__ in second.reason


# --- rules that tie


def straight(p, x):
    return jnp.tanh(x @ p["in"]) @ p["out"]


def residual(p, x):
    h = jnp.tanh(x @ p["in"])
    return (h + jnp.tanh(x @ p["side"])) @ p["out"]


def selected(p, x):
    a, b = x @ p["in"], x @ p["side"]
    return jnp.where(a > 0, a, b) @ p["out"]


def sorted_along(p, x):
    return lax.sort((jnp.tanh(x @ p["in"]), x @ p["side"]), dimension=0)[1] @ p["out"]


def updated(p, x):
    a, b = jnp.tanh(x @ p["in"]), jnp.tanh(x @ p["side"])
    return lax.dynamic_update_slice(a, b[:2], (1, 0)) @ p["out"]


def stacked(p, x):
    return jnp.concatenate([jnp.tanh(x @ p["in"]), x @ p["side"]], 0) @ p["out"]


def branched(p, x):
    a, b = x @ p["in"], x @ p["side"]
    either = [lax.cond(x[0, 0] > t, lambda: jnp.tanh(a), lambda: b) for t in (-2, 2)]
    return jnp.concatenate([h @ p["out"] for h in either], 0)


def clamped(p, x):
    a, b = x @ p["in"], x @ p["side"]
    return lax.clamp(-abs(b), a, abs(b)) @ p["out"]


def batched(p, x):
    h = jnp.einsum("bi,bi->bi", jnp.tanh(x @ p["in"]), jnp.tanh(x @ p["side"]))
    return h @ p["out"]


def gathered(p, x):
    h = jnp.tanh(x @ p["in"])
    order = jnp.argsort(x @ p["side"], axis=0)
    return jnp.take_along_axis(h, order, axis=0) @ p["out"]


# For each network: the primitive that ties, and whether "side" is tied as well.
TYING = {
    "dot_general": (straight, P.dot_general_p, False),
    "add": (residual, P.add_p, True),
    "select_n": (selected, P.select_n_p, True),
    "sort": (sorted_along, P.sort_p, True),
    "dynamic_update_slice": (updated, P.dynamic_update_slice_p, True),
    "concatenate": (stacked, P.concatenate_p, True),
    "cond": (branched, P.cond_p, True),
    "clamp": (clamped, P.clamp_p, True),
    "dot_general over a batch": (batched, P.dot_general_p, True),
    "gather over a batch": (gathered, P.gather_p, True),
}


def tying(name: str) -> tuple[Callable, dict]:
    fn, _, side = TYING[name]
    sizes = {"in": (5, UNITS), "out": (UNITS, 3)} | ({"side": (5, UNITS)} if side else {})
    return jax.jit(fn), weights(**sizes)


@pytest.mark.parametrize("name", TYING)
def test_what_meets_moves_together(name: str):
    fn, params = tying(name)
    rows = {makes(path, 1) for path in params if path != "out"}
    (first,) = (g.name for g in otf.trace_symmetry(fn, params, X).groups)
    found_by(fn, params, {first: rows | {takes("out", 0)}})


@pytest.mark.parametrize("name", TYING)
def test_untied_the_certificate_breaks(name: str, monkeypatch: pytest.MonkeyPatch):
    def first_only(ctx, values):
        """Ties nothing, but passes the axes of the first operand that has the result's shape."""
        free = unruled(ctx, values)
        shape = ctx.shape()
        for i, value in enumerate(values):
            if ctx.operand_shape(i) == shape:
                return [value] * len(free)
        return free

    fn, params = tying(name)
    monkeypatch.setitem(walk._registry, TYING[name][1], first_only)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.groups
    assert certificate(symmetry, fn, params, X) > BROKEN


# --- rules that rearrange axes


def two_axes(op: Callable[[jax.Array], jax.Array]) -> tuple[Callable, dict]:
    """A hidden layer of 12 units that `op` sees as [2, 6]."""

    def fn(p, x):
        h = jnp.tanh(x @ p["in"]).reshape(-1, 2, 6)
        return op(h).reshape(x.shape[0], -1) @ p["out"]

    return jax.jit(fn), weights(**{"in": (5, 12), "out": (12, 3)})


def test_reshape_splits_and_merges_in_order():
    groups = {
        "in": {makes("in", 1, after=6), takes("out", 0, after=6)},
        "in#2": {makes("in", 1, before=2), takes("out", 0, before=2)},
    }
    found_by(*two_axes(jnp.tanh), groups)


def test_transpose_swaps_factors():
    groups = {
        "in": {makes("in", 1, after=6), takes("out", 0, before=6)},
        "in#2": {makes("in", 1, before=2), takes("out", 0, after=2)},
    }
    found_by(*two_axes(lambda h: h.transpose(0, 2, 1)), groups)


def test_tiled_units_repeat_as_the_inner_factor():
    def fn(p, x):
        return jnp.tile(jnp.tanh(x @ p["in"]), (1, 2)) @ p["out"]

    params = weights(**{"in": (5, UNITS), "out": (2 * UNITS, 3)})
    symmetry = otf.trace_symmetry(fn, params, X)
    rows = {(m.path, m.axis, m.before, m.after) for m in symmetry["in"].members}
    assert rows == {("in", 1, 1, 1), ("out", 0, 2, 1)}
    assert certificate(symmetry, fn, params, X) <= EXACT


def test_a_factor_can_be_pinned_alone():
    groups = {"in": {makes("in", 1, after=6), takes("out", 0, after=6)}}
    found_by(*two_axes(lambda h: lax.cumsum(h, 2)), groups)


def test_reshape_across_factors_pins_them():
    fn, params = two_axes(lambda h: h.transpose(0, 2, 1).reshape(-1, 4, 3).transpose(0, 2, 1))
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.groups == ()
    reasons = {(p.path, p.axis): p.reason for p in symmetry.pinned}
    assert reasons["in", 1] == reasons["out", 0]
    assert reasons["in", 1].startswith("reshape of (4, 6, 2) to (4, 4, 3)")


@pytest.mark.parametrize(
    "primitive", [P.reshape_p, P.transpose_p, P.broadcast_in_dim_p, P.dot_general_p]
)
def test_rearranged_wrongly_the_certificate_breaks(
    primitive: core.Primitive, monkeypatch: pytest.MonkeyPatch
):
    def fn(p, x):
        h = jnp.tanh(x @ p["in"]).reshape(-1, 2, 6)
        gate = lax.broadcast_in_dim(p["gate"], (6, 2), (0,))
        return (h.transpose(0, 2, 1) * gate[None]).reshape(x.shape[0], -1) @ p["out"]

    fn, params = jax.jit(fn), weights(**{"in": (5, 12), "gate": (6,), "out": (12, 3)})
    rows = {"in#2": {makes("in", 1, before=2), makes("gate", 0), takes("out", 0, after=2)}}
    rows["in"] = {makes("in", 1, after=6), takes("out", 0, before=6)}
    found_by(fn, params, rows)
    monkeypatch.setitem(walk._registry, primitive, unruled)
    assert certificate(otf.trace_symmetry(fn, params, X), fn, params, X) > BROKEN


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions_tie_channels(groups: int, monkeypatch: pytest.MonkeyPatch):
    x = uniform(2, 5, 5, 3)

    def conv(x, kernel, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def fn(p, x):
        h = conv(jnp.tanh(conv(x, p["in"])), p["mid"], groups)
        return jnp.tanh(h).mean((1, 2)) @ p["out"]

    fn = jax.jit(fn)
    params = weights(**{"in": (2, 2, 3, 6), "mid": (2, 2, 6 // groups, 12), "out": (12, 3)})
    symmetry = otf.trace_symmetry(fn, params, x)
    assert {g.size for g in symmetry.groups} == {1: {6, 12}, 2: {2, 3, 6}, 6: {6, 2}}[groups]
    assert certificate(symmetry, fn, params, x) <= EXACT
    monkeypatch.setitem(walk._registry, P.conv_general_dilated_p, unruled)
    assert certificate(otf.trace_symmetry(fn, params, x), fn, params, x) > BROKEN


# --- families


def family_names() -> list[str]:
    """The names that `rules` looks up in `jax.extend.core.primitives`."""
    tree = ast.parse(inspect.getsource(rules))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    named = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "_named"]
    return [name for call in named for arg in call.args for name in ast.literal_eval(arg).split()]


def test_every_name_of_a_family_is_a_primitive():
    names = family_names()
    assert len(names) > 100
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(P, f"{name}_p")] == []


# Where `jax.lax` has no function of that name, or one that does more than bind the primitive.
SPELLED = {
    "and": lax.bitwise_and,
    "clamp": lambda x, y: lax.clamp(-y, x, y),
    "convert_element_type": lambda x: lax.convert_element_type(x, jnp.float16),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "name": lambda x: checkpoint_name(x, "x"),
    "not": lax.bitwise_not,
    "or": lax.bitwise_or,
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 10),
    "regularized_incomplete_beta": lax.betainc,
    "select_n": lambda x, y: lax.select_n(x > y, x, y),
    "xor": lax.bitwise_xor,
}


def eligible(primitive: core.Primitive, fn: Callable) -> tuple[jax.Array, ...]:
    """Operands of [8] of the first kind and number that a primitive takes."""
    draw = np.random.default_rng(0).uniform(0.1, 0.9, (3, 8))
    values = [draw.astype(np.float32), (draw * 9).astype(np.int32), draw.astype(np.complex64)]
    for kind in values:
        for count in (1, 2, 3):
            args = tuple(jnp.asarray(row) for row in kind[:count])
            try:
                eqns = jax.make_jaxpr(fn)(*args).eqns
            except (TypeError, ValueError, AssertionError):
                continue
            if primitive in [eqn.primitive for eqn in eqns]:
                return args
    raise AssertionError(f"found no operands for {primitive}")


@pytest.mark.parametrize("primitive", rules.ELEMENTWISE, ids=str)
def test_elementwise_primitives_commute_with_permutations(primitive: core.Primitive):
    name = str(primitive)
    fn = SPELLED.get(name) or getattr(lax, name, primitive.bind)
    args = eligible(primitive, fn)
    order = np.random.default_rng(1).permutation(8)
    whole, permuted = fn(*args), fn(*(x[order] for x in args))
    assert whole.shape == (8,)
    np.testing.assert_array_equal(np.asarray(whole)[order], np.asarray(permuted))
