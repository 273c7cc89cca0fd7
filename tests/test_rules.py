"""Checks each rule twice: it pins the units where their order matters, and passes them where not.

That the checks could fail is checked as well: with a rule that constrains nothing in its place, the
certificate has to break. The last test compares the tables with the registry.
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, uniform
from jax import lax
from jax._src.lax import parallel
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import linear_call
from jax.experimental import io_callback
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core
from jax.extend.random import threefry2x32_p
from zoo import makes, randomise, relative, rolled, rows_of, shapes, takes

import otfusion_jax as otf
from otfusion_jax.tracing import primitives, registry
from otfusion_jax.tracing.axis import Axis, Kind, factors_of
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.rules import families
from otfusion_jax.tracing.rules.families import ELEMENTWISE
from otfusion_jax.tracing.values import TracedValue, Values, highest_kind

pytestmark = pytest.mark.compatibility

P = core.primitives
UNIT_BY_UNIT = [*ELEMENTWISE, *primitives.EQUALITY]
EXACT, BROKEN = 1e-5, 1e-3
ROWS, UNITS = 4, 6
X = uniform(ROWS, 5)


def emitted(fn: Callable, *args: Any) -> core.Primitive:
    """The last primitive that a function emits, which JAX need not export."""
    return jax.make_jaxpr(fn)(*args).eqns[-1].primitive


BARRIER = emitted(lax.optimization_barrier, X)
BITCAST = emitted(lambda x: lax.bitcast_convert_type(x, jnp.uint32), X)
IO_CALLBACK = emitted(lambda x: io_callback(np.tanh, X, x), X)
PURE_CALLBACK = emitted(lambda x: jax.pure_callback(np.tanh, X, x), X)
RAGGED_DOT = emitted(lax.ragged_dot, X, jnp.ones((1, 5, 2)), jnp.array([ROWS]))
SPLIT = emitted(lambda x: lax.split(x, (1, 4), 1), X)
STACK = emitted(lambda x: jnp.stack([x, x]), X)
TILE = emitted(lambda x: jnp.tile(x, (2, 2)), X)
UNSTACK = emitted(jnp.unstack, X)
UNWRAP = emitted(jax.random.key_data, jax.random.key(0))


def weights(**sizes: tuple[int, ...]) -> dict[str, jax.Array]:
    return randomise(shapes(**sizes), 1)


def certificate(symmetry: otf.Symmetry, fn: Callable, params: Any, *inputs: Any) -> float:
    """The relative change of the output when every unit moves, and each group by another step."""
    return relative(fn(params, *inputs), fn(rolled(symmetry, params), *inputs))


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


def computed(number: int) -> jax.Array:
    """A number that a program does not tell before it runs."""
    return lax.optimization_barrier(jnp.int32(number))


def written(how: str) -> Callable[[jax.Array], jax.Array]:
    """Writes at two positions of the last axis."""
    return lambda h: getattr(h.at[:, jnp.array([1, 4])], how)(0.3)


def scanned(h: jax.Array) -> jax.Array:
    """A recurrence with the last axis as time."""

    def step(carry, row):
        carry = 0.5 * carry + row
        return carry, carry

    return lax.scan(step, h[:, 0] * 0, h.T)[1].T


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation on a matrix, the units as its last axis unless a table says otherwise.

    `primitive` is what to take the rule away from for the check to fail.
    """

    primitive: core.Primitive
    fn: Callable[[jax.Array], jax.Array]


BY_NAME = {str(primitive): primitive for primitive in registry.registered()}


def where_there_is(name: str, fn: Callable[[core.Primitive, jax.Array], jax.Array]) -> dict:
    """An entry of a table for a primitive that not every version of JAX has; it is passed on."""
    if name not in BY_NAME:
        return {}
    return {name: Operation(BY_NAME[name], functools.partial(fn, BY_NAME[name]))}


# The order of the last axis matters.
ORDERED = {
    "cumsum": Operation(P.cumsum_p, lambda h: lax.cumsum(h, 1)),
    "cumsum reversed": Operation(P.cumsum_p, lambda h: lax.cumsum(h, 1, reverse=True)),
    "cumsum of a constant": Operation(P.cumsum_p, lambda h: h * lax.cumsum(jnp.ones_like(h), 1)),
    "cumprod": Operation(P.cumprod_p, lambda h: lax.cumprod(h, 1)),
    "cummax": Operation(P.cummax_p, lambda h: lax.cummax(h, 1)),
    "cummin": Operation(P.cummin_p, lambda h: lax.cummin(h, 1)),
    "cumlogsumexp": Operation(P.cumlogsumexp_p, lambda h: lax.cumlogsumexp(h, 1)),
    "sort": Operation(P.sort_p, lambda h: lax.sort(h, dimension=1)),
    "sort by another": Operation(P.sort_p, lambda h: lax.sort((jnp.sin(9 * h), h), dimension=1)[1]),
    "argmax": Operation(P.argmax_p, lambda h: numbers(jnp.argmax(h, 1, keepdims=True))),
    "argmin": Operation(P.argmin_p, lambda h: numbers(jnp.argmin(h, 1, keepdims=True))),
    "top_k positions": Operation(P.top_k_p, lambda h: numbers(lax.top_k(h, 3)[1])),
    "rev": Operation(P.rev_p, lambda h: lax.rev(h, (1,))),
    "iota": Operation(P.iota_p, lambda h: h * lax.broadcasted_iota(jnp.float32, h.shape, 1)),
    "gather": Operation(P.gather_p, picked),
    "strided slice": Operation(P.slice_p, lambda h: lax.slice(h, (0, 0), h.shape, (1, 4))),
    "strided slice of a part": Operation(
        P.slice_p, lambda h: lax.slice(h, (0, 2), h.shape, (1, 2))
    ),
    "dynamic_slice": Operation(P.dynamic_slice_p, lambda h: lax.dynamic_slice_in_dim(h, 1, 3, 1)),
    "pad in between": Operation(P.pad_p, lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1)))),
    "unstack": Operation(UNSTACK, lambda h: jnp.unstack(h, axis=1)[1][:, None]),
    "dynamic_update_slice": Operation(
        P.dynamic_update_slice_p,
        lambda h: lax.dynamic_update_slice(h, h.sum(1, keepdims=True), (0, computed(2))),
    ),
    "convolution over the units": Operation(P.conv_general_dilated_p, blurred),
    "window sum": Operation(P.reduce_window_sum_p, lambda h: windowed(h, 0.0, lax.add)),
    "window max": Operation(P.reduce_window_max_p, lambda h: windowed(h, -jnp.inf, lax.max)),
    "window min": Operation(P.reduce_window_min_p, lambda h: windowed(h, jnp.inf, lax.min)),
    "random bits": Operation(P.random_bits_p, noisy),
    "scan over the units": Operation(P.scan_p, scanned),
    "scatter": Operation(P.scatter_p, written("set")),
    "scatter_add": Operation(P.scatter_add_p, written("add")),
    "scatter_max": Operation(P.scatter_max_p, written("max")),
    "scatter_min": Operation(P.scatter_min_p, written("min")),
    "scatter_mul": Operation(P.scatter_mul_p, written("multiply")),
    "scatter_sub": Operation(primitives.SCATTER_SUB[0], written("subtract")),
}


def steep(h: jax.Array) -> jax.Array:
    return 1 + h * h


def window_gradient(h: jax.Array) -> jax.Array:
    """How the maxima of windows change, which picks from the tangent at their positions."""
    return jax.jvp(lambda h: windowed(h, -jnp.inf, lax.max), (h,), (steep(h),))[1]


def to_maxima(h: jax.Array) -> jax.Array:
    """Puts values where the maxima of windows are, as the gradient of these does."""
    _, pull = jax.vjp(lambda h: windowed(h, -jnp.inf, lax.max), h)
    return pull(steep(h))[0]


def keyed(h: jax.Array) -> jax.Array:
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), UNITS))
    return h * numbers(keys)[None, :, 0]


def bits_of(h: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(h, jnp.uint32)


def updated_factor(h: jax.Array) -> jax.Array:
    """A Cholesky factor of [units, units] after an update by the first row."""
    return lax.linalg.cholesky_update(jnp.eye(UNITS), h[0])[:ROWS]


def scaled(_: core.Primitive, h: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16
        return lax.scaled_dot(h, uniform(UNITS, 3)).astype(jnp.float32)


def words(h: jax.Array, count: int) -> list[jax.Array]:
    return [bits_of((1 + i) * h) for i in range(count)]


# Nothing is known of the order: every axis is pinned.
PINNED = {
    "cholesky_update": Operation(primitives.CHOLESKY_UPDATE[0], updated_factor),
    **where_there_is("scaled_dot", scaled),
    **where_there_is("philox2x32", lambda p, h: numbers(p.bind(*words(h, 3))[0])),
    **where_there_is("philox4x32", lambda p, h: numbers(p.bind(*words(h, 6))[0])),
    **where_there_is("threefry4x32", lambda p, h: numbers(p.bind(*words(h, 8))[0])),
    "approx_max_k": Operation(P.approx_top_k_p, lambda h: lax.approx_max_k(h, 3)[0]),
    "custom_linear_solve": Operation(
        P.linear_solve_p,
        lambda h: lax.custom_linear_solve(
            lambda v: steep(h) * v, jnp.sin(h), lambda _, b: b / steep(h)
        ),
    ),
    "window of any function": Operation(
        P.reduce_window_p, lambda h: windowed(h, 0.0, lambda a, b: a + b + a * b)
    ),
    "window gradient": Operation(P.select_and_gather_add_p, window_gradient),
    "window cotangent": Operation(P.select_and_scatter_add_p, to_maxima),
    "pure_callback": Operation(PURE_CALLBACK, lambda h: jax.pure_callback(np.fliplr, h, h)),
    "io_callback": Operation(IO_CALLBACK, lambda h: io_callback(np.fliplr, h, h)),
    "ragged_dot": Operation(
        RAGGED_DOT, lambda h: lax.ragged_dot(h.T, uniform(2, ROWS, ROWS), jnp.array([2, 4])).T
    ),
    "gamma numbers": Operation(
        P.random_gamma_p, lambda h: jax.random.gamma(jax.random.key(0), steep(h))
    ),
    "keys as numbers": Operation(UNWRAP, keyed),
    "rng_bit_generator": Operation(
        P.rng_bit_generator_p,
        lambda h: h * numbers(lax.rng_bit_generator(jnp.ones(4, jnp.uint32), (1, UNITS))[1]),
    ),
    "threefry": Operation(
        threefry2x32_p,
        lambda h: numbers(threefry2x32_p.bind(*words(h, 4))[0]),
    ),
}
ALONG = ORDERED | PINNED


def ordering(name: str) -> tuple[Callable, dict]:
    """A network with the operation along its hidden units, and its parameters."""
    op = ALONG[name].fn
    size = jax.eval_shape(op, jax.ShapeDtypeStruct((ROWS, UNITS), jnp.float32)).shape[1]
    params = weights(**{"in": (5, UNITS), "out": (size, 3)})

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        return op(h) @ p["out"] + h.sum(1, keepdims=True)  # all units are read

    return fn, params


def unruled(ctx: RuleContext, values: Values) -> Values:
    """A wrong rule for any primitive: all is read, nothing tied, and the results do not vary."""
    for value in values:
        for axis in value.axes:
            for factor in factors_of(axis):
                if factor.variable is not None:
                    ctx.unifier.contracted_parameters.append(factor)
    kind = highest_kind(values)
    results = map(ctx.constant_result, range(len(ctx.eqn.outvars)))
    return [TracedValue(result.axes, kind) for result in results]


def passing(ctx: RuleContext, values: Values) -> Values:
    """A wrong rule for what keeps the shape: as if it were elementwise."""
    return [values[0]] * len(ctx.eqn.outvars)


@pytest.mark.parametrize("name", ALONG)
def test_order_along_the_units_pins_them(name: str):
    fn, params = ordering(name)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.groups == ()
    assert ("in", 1) in {(p.path, p.axis) for p in symmetry.pinned}


def assert_breaks(name: str, rule: registry.Rule, monkeypatch: pytest.MonkeyPatch):
    """With this rule in place of its own, an operation leaves a group that is none."""
    fn, params = ordering(name)
    monkeypatch.setitem(registry._registry, ALONG[name].primitive, rule)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.groups
    assert certificate(symmetry, fn, params, X) > BROKEN


@pytest.mark.parametrize("name", ALONG)
def test_without_its_rule_the_certificate_breaks(name: str, monkeypatch: pytest.MonkeyPatch):
    assert_breaks(name, unruled, monkeypatch)


@pytest.mark.parametrize(
    "name",
    ["cumsum", "cumprod", "cummax", "cumlogsumexp", "sort", "rev", "dynamic_update_slice"]
    + ["window sum", "window of any function", "window gradient", "window cotangent"]
    + ["pure_callback", "io_callback"]
    + ["scatter", "scatter_add", "scatter_max", "scatter_min", "scatter_mul"],
)
def test_taken_for_elementwise_the_certificate_breaks(name: str, monkeypatch: pytest.MonkeyPatch):
    assert_breaks(name, passing, monkeypatch)


@pytest.mark.parametrize("name", ORDERED)
def test_order_along_another_axis_passes_the_units(name: str):
    op = ORDERED[name].fn
    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})
    found_by(
        lambda p, x: op(jnp.tanh(x @ p["in"]).T).T @ p["out"],
        params,
        {"in": {makes("in", 1), takes("out", 0)}},
    )


def decompositions() -> dict[str, tuple[core.Primitive, Callable]]:
    """The parts of decompositions that are primitives in the installed version of JAX."""
    binds = {
        "eigh_jacobi": lambda p, k: p.bind(k, lower=True, sort_eigenvalues=True)[1],
        "geqp3": lambda p, k: p.bind(k, jnp.zeros(k.shape[:-1], int), use_magma=None)[0],
        "geqrf": lambda p, k: p.bind(k)[0],
        "lu_pivots_to_permutation": lambda p, k: numbers(
            p.bind((7 * k.sum(-1)).astype(jnp.int32) % k.shape[-1], permutation_size=k.shape[-1])
        )[..., None, :],
        "ormqr": lambda p, k: p.bind(k, k.mean(-1), k, left=True, transpose=False),
        "symmetric_product": lambda p, k: p.bind(k, k, alpha=1.0, beta=1.0),
    }
    found = {str(p): p for p in (*primitives.NEW_MATRIX, *primitives.PIVOTS)}
    return {name: (p, functools.partial(binds[name], p)) for name, p in found.items()}


# What is done to the last two axes: their order matters, and what is in front of them does not.
MATRIX = {
    "cholesky": Operation(P.cholesky_p, lax.linalg.cholesky),
    "eig": Operation(P.eig_p, lambda k: lax.linalg.eig(k, compute_left_eigenvectors=False)[1]),
    "eigh": Operation(P.eigh_p, lambda k: lax.linalg.eigh(k)[0]),
    "fft": Operation(P.fft_p, jnp.fft.fft),
    "fft of both axes": Operation(P.fft_p, lambda k: jnp.fft.fft2(k).real),
    "hessenberg": Operation(P.hessenberg_p, lambda k: lax.linalg.hessenberg(k)[0]),
    "householder_product": Operation(
        P.householder_product_p, lambda k: lax.linalg.householder_product(k, k.mean(-1))
    ),
    "lu": Operation(P.lu_p, lambda k: lax.linalg.lu(k)[0]),
    "qr": Operation(P.qr_p, lambda k: lax.linalg.qr(k)[1]),
    "schur": Operation(P.schur_p, lambda k: lax.linalg.schur(k)[0]),
    "svd": Operation(P.svd_p, lambda k: lax.linalg.svd(k)[0]),
    "triangular_solve": Operation(
        P.triangular_solve_p,
        lambda k: lax.linalg.triangular_solve(k, k, left_side=True, lower=True),
    ),
    "tridiagonal": Operation(P.tridiagonal_p, lambda k: lax.linalg.tridiagonal(k)[0]),
    "tridiagonal_solve": Operation(
        P.tridiagonal_solve_p,
        lambda k: lax.linalg.tridiagonal_solve(0.1 * k.sum(-1), k.sum(-1), 0.1 * k.sum(-1), k),
    ),
    # What the decompositions above are made of when they are compiled.
    **{f"{name} alone": Operation(*found) for name, found in decompositions().items()},
}


def likeness(h: jax.Array) -> jax.Array:
    """A positive definite matrix over the rows of h, [..., rows, columns]."""
    return jnp.exp(-4 * ((h[..., :, None, :] - h[..., None, :, :]) ** 2).sum(-1))


def read_out(y: jax.Array) -> jax.Array:
    """A number that depends on the order of the last two axes."""
    order = jnp.arange(y.shape[-2] * y.shape[-1], dtype=jnp.float32)
    y = jnp.abs(y).reshape(*y.shape[:-2], -1)
    return (y * jnp.cos(order).reshape((1,) * (y.ndim - 1) + (-1,))).sum(-1)


@pytest.mark.parametrize("name", MATRIX)
def test_matrices_of_units_pin_them(name: str, monkeypatch: pytest.MonkeyPatch):
    primitive, op = MATRIX[name].primitive, MATRIX[name].fn
    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        return h * read_out(op(likeness(h.T))) @ p["out"]

    found_by(fn, params, {})
    monkeypatch.setitem(registry._registry, primitive, unruled)
    found = otf.trace_symmetry(fn, params, X)
    assert found.groups
    assert certificate(found, fn, params, X) > BROKEN


@pytest.mark.parametrize("name", MATRIX)
def test_a_matrix_for_each_unit_passes_them(name: str, monkeypatch: pytest.MonkeyPatch):
    primitive, op = MATRIX[name].primitive, MATRIX[name].fn
    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        return read_out(op(likeness(h.T[..., None])))[None] @ p["out"]

    found_by(fn, params, {"in": {makes("in", 1), takes("out", 0)}})
    monkeypatch.setitem(registry._registry, primitive, unruled)
    assert certificate(otf.trace_symmetry(fn, params, X), fn, params, X) > BROKEN


def singular_values(k: jax.Array) -> jax.Array:
    return lax.linalg.svd(k, compute_uv=False)


def test_singular_values_leave_rows_and_columns_free_and_come_in_order():
    params = weights(**{"in": (5, UNITS), "mid": (UNITS, 4), "out": (4, 3), "by_size": (4,)})

    def fn(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["in"]) @ p["mid"])
        return h @ p["out"] * (singular_values(p["mid"]) @ p["by_size"])

    groups = {
        "in": {makes("in", 1), takes("mid", 0)},
        "mid": {makes("mid", 1), takes("out", 0)},
    }
    found_by(fn, params, groups)
    pins = {(pin.path, pin.axis): pin.reason for pin in otf.trace_symmetry(fn, params, X).pinned}
    assert pins["by_size", 0].startswith("svd in falling order at ")
    turned = params | {"by_size": params["by_size"][::-1]}
    assert relative(fn(params, X), fn(turned, X)) > BROKEN


def test_singular_values_of_a_matrix_for_each_unit_pass_them(monkeypatch: pytest.MonkeyPatch):
    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        return (singular_values(likeness(h.T[..., None])) ** 2).sum(-1)[None] @ p["out"]

    found_by(fn, params, {"in": {makes("in", 1), takes("out", 0)}})
    monkeypatch.setitem(registry._registry, P.svd_p, unruled)
    assert certificate(otf.trace_symmetry(fn, params, X), fn, params, X) > BROKEN


def test_a_transform_of_three_axes_pins_all_of_them():
    def fn(p, x):
        h = jnp.tanh(x @ p["in"]).T.reshape(UNITS, 2, 2)
        return jnp.einsum("uab,uo->abo", jnp.fft.fftn(h).real, p["out"])

    found_by(fn, weights(**{"in": (5, UNITS), "out": (UNITS, 3)}), {})


# What takes the last axis apart: the hidden units [start, end) that move together, and where they
# are in what comes of it.
CUT = {
    "slice": Operation(P.slice_p, lambda h: h[:, 1:4]),
    "every second": Operation(P.slice_p, lambda h: lax.slice(h, (0, 1), h.shape, (1, 2))),
    "pad": Operation(P.pad_p, lambda h: jnp.pad(h, ((0, 0), (1, 2)))),
    "pad that shifts": Operation(P.pad_p, lambda h: lax.pad(h, 0.0, ((0, 0, 0), (-1, 1, 0)))),
    "pad of a constant": Operation(
        P.pad_p, lambda h: h * lax.pad(jnp.ones_like(h), 0.0, ((0, 0, 0), (-1, 1, 0)))
    ),
    "concatenate": Operation(P.concatenate_p, lambda h: jnp.concatenate([h, jnp.tanh(h)], 1)),
    "concatenate constants": Operation(
        P.concatenate_p,
        lambda h: h * jnp.concatenate([jnp.zeros((ROWS, 2)), jnp.ones((ROWS, 4))], 1),
    ),
    "split": Operation(SPLIT, lambda h: jnp.split(h, [2], 1)[1]),
    "roll": Operation(P.concatenate_p, lambda h: jnp.roll(h, 2, 1)),
}
SEGMENTS = {
    "slice": {"in": {(1, 0, 3)}, "in#2": {(4, None, 2)}},
    "every second": {"in": {(0, 0, 3)}},
    "pad": {"in": {(0, 1, 6)}, "out": {(None, 7, 2)}},
    "pad that shifts": {"in": {(1, 0, 5)}},
    "pad of a constant": {"in": {(0, 0, 5)}},
    "concatenate": {"in": {(0, 0, 6), (None, 6, 6)}},
    "concatenate constants": {"in": {(0, 0, 2)}, "in#2": {(2, 2, 4)}},
    "split": {"in": {(0, None, 2)}, "in#2": {(2, 0, 4)}},
    "roll": {"in": {(0, 2, 4)}, "in#2": {(4, 0, 2)}},
}


def cutting(name: str) -> tuple[Callable, dict]:
    op = CUT[name].fn
    size = jax.eval_shape(op, jax.ShapeDtypeStruct((ROWS, UNITS), jnp.float32)).shape[1]
    params = weights(**{"in": (5, UNITS), "out": (size, 3), "rest": (UNITS, 3)})

    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        return op(h) @ p["out"] + h @ p["rest"]  # all units are read

    return fn, params


@pytest.mark.parametrize("name", CUT)
def test_segments_move_by_themselves(name: str):
    fn, params = cutting(name)
    symmetry = otf.trace_symmetry(fn, params, X)
    found = {
        g.name: {
            (m.location.index.start, None) if m.path == "in" else (None, m.location.index.start)
            for m in g.members
            if m.path != "rest"
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
    monkeypatch.setitem(registry._registry, CUT[name].primitive, unruled)
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


def called(primitive: core.Primitive, *, closed: bool) -> Callable[[jax.Array], jax.Array]:
    """Calls tanh by a primitive that no public function emits any more."""
    outer = jax.make_jaxpr(jax.jit(jnp.tanh))(np.ones((ROWS, UNITS), np.float32))
    (eqn,) = outer.jaxpr.eqns
    body = eqn.params["jaxpr"]
    eqn = eqn.replace(primitive=primitive, params={"call_jaxpr": body if closed else body.jaxpr})
    fn = core.jaxpr_as_fun(outer.replace(jaxpr=outer.jaxpr.replace(eqns=[eqn])))
    return lambda h: fn(h)[0]


@jax.custom_jvp
def with_tangents(h):
    return jnp.sin(h)


with_tangents.defjvps(lambda t, _, h: t * h)


@jax.custom_vjp
def with_cotangents(h):
    return jnp.sin(h)


with_cotangents.defvjp(lambda h: (h, h), lambda h, t: (t * h,))


def reduced(h: jax.Array) -> jax.Array:
    return lax.reduce((h, h * h), (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] + b[1]), (0,))[1]


@custom_vmap
def with_a_batched_twin(h):
    return jnp.sin(h)


with_a_batched_twin.def_vmap(lambda size, batched, h: (jnp.sin(h), batched[0]))


@custom_partitioning
def in_parts(h):
    return jnp.sin(h)


in_parts.def_partition(
    infer_sharding_from_operands=lambda mesh, args, result: result.sharding,
    partition=lambda mesh, args, result: (mesh, jnp.sin, result.sharding, ()),
    sharding_rule="i j -> i j",
)


@jax.custom_vjp
def with_fewer_residuals(h):
    return jnp.sin(h)


with_fewer_residuals.defvjp(lambda h: (jnp.sin(h), h), lambda h, t: (t * h,), optimize_remat=True)


REPLICATED = jax.sharding.NamedSharding(jax.make_mesh((1,), ("devices",)), jax.P())


def annotated(h: Any) -> Any:
    return set_xla_metadata(h, note="h")


def sine(h: jax.Array) -> core.ClosedJaxpr:
    return jax.make_jaxpr(jnp.sin)(h)


HIGHER: Any
try:
    from jax.experimental import hijax
except ImportError:  # JAX 0.7
    HIGHER = object
else:
    HIGHER = getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive


class Sine(HIGHER):
    """A primitive that says by its own method what it does."""

    def __init__(self, aval: Any):
        self.in_avals, self.out_aval, self.params = (aval,), aval, {}
        super().__init__()

    def expand(self, x):
        return jnp.sin(x)


def over_rows(collective: Callable) -> Callable[[jax.Array], jax.Array]:
    return jax.vmap(lambda row: collective(row, "rows"), axis_name="rows")


MESH = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


def on_each_device(name: str, body: Callable, given: tuple = ("devices",)) -> dict[str, Operation]:
    out = jax.P("devices")
    mapped = jax.shard_map(body, mesh=MESH, in_specs=jax.P(*given), out_specs=out)
    return where_there_is(name, lambda _, h: mapped(h))


def varying(h: jax.Array) -> jax.Array:
    """What is the same on all devices, taken for something that is not."""
    # By whichever name this JAX has for it.
    cast = getattr(lax, "pvary", None) or functools.partial(lax.pcast, to="varying")
    return cast(h, "devices")


def gathered_alike(h: jax.Array) -> jax.Array:
    """Gathers, with a result that is known to be the same everywhere."""
    # It has no public name, and another one in each version.
    private = "_all_gather_invariant"
    gather = getattr(parallel, private, None) or parallel.all_gather_invariant
    return gather(h, "devices", axis=0, tiled=False)[0]


# The units are the last axis before and after.
PASSED_ON = {
    **on_each_device("shard_map", jnp.sin),
    **on_each_device("psum_invariant", lambda h: lax.psum(h, "devices")),
    **on_each_device("pvary", varying, given=()),
    **on_each_device("ppermute", lambda h: lax.ppermute(h, "devices", [(0, 0)])),
    **on_each_device("all_gather", lambda h: lax.all_gather(h, "devices", axis=0, tiled=True)),
    **on_each_device("all_gather_invariant", gathered_alike),
    **on_each_device("all_to_all", lambda h: lax.all_to_all(h, "devices", 0, 0, tiled=True)),
    **on_each_device("reduce_scatter", lambda h: lax.psum_scatter(h, "devices", tiled=True)),
    "device_put": Operation(P.device_put_p, lambda h: jax.device_put(h, jax.devices()[0])),
    "sharding_constraint": Operation(
        P.sharding_constraint_p,
        lambda h: lax.with_sharding_constraint(
            h, jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
    ),
    "optimization_barrier": Operation(BARRIER, lambda h: lax.optimization_barrier((h, h.T))[0]),
    "all": Operation(P.reduce_and_p, lambda h: numbers((h > -0.5).all(0))[None]),
    "any": Operation(P.reduce_or_p, lambda h: numbers((h > 0.4).any(0))[None]),
    "parity": Operation(
        P.reduce_xor_p, lambda h: numbers(lax.reduce_xor((9 * h).astype(jnp.int32), (0,)))[None]
    ),
    "max": Operation(P.reduce_max_p, lambda h: h.max(0)[None]),
    "min": Operation(P.reduce_min_p, lambda h: h.min(0)[None]),
    "prod": Operation(P.reduce_prod_p, lambda h: h.prod(0)[None]),
    "sum": Operation(P.reduce_sum_p, lambda h: h.sum(0)[None]),
    "sum over a name": Operation(P.psum_p, over_rows(lax.psum)),
    "max over a name": Operation(P.pmax_p, over_rows(lax.pmax)),
    "min over a name": Operation(P.pmin_p, over_rows(lax.pmin)),
    "reduce": Operation(P.reduce_p, lambda h: reduced(h)[None]),
    "argmax": Operation(P.argmax_p, lambda h: numbers(jnp.argmax(h, 0))[None]),
    "top_k": Operation(P.top_k_p, lambda h: lax.top_k(h.T, 1)[0].T),
    "squeeze": Operation(P.squeeze_p, lambda h: lax.squeeze(h[:, None], (1,))),
    "bitcast": Operation(BITCAST, lambda h: lax.bitcast_convert_type(bits_of(h), jnp.float32)),
    "stack": Operation(STACK, lambda h: jnp.stack([h, 2 * h], 1)[:, 0]),
    "unstack": Operation(UNSTACK, lambda h: jnp.unstack(h)[1][None]),
    "tile": Operation(TILE, lambda h: jnp.tile(h, (2, 1))),
    "jit": Operation(P.jit_p, jax.jit(jnp.sin)),
    "remat": Operation(emitted(jax.checkpoint(jnp.sin), X), jax.checkpoint(jnp.sin)),
    "call": Operation(P.call_p, called(P.call_p, closed=False)),
    "closed_call": Operation(P.closed_call_p, called(P.closed_call_p, closed=True)),
    "custom_jvp": Operation(P.custom_jvp_call_p, with_tangents),
    "custom_vjp": Operation(P.custom_vjp_call_p, with_cotangents),
    "custom_vjp that saves memory": Operation(
        emitted(lambda h: jax.vjp(with_fewer_residuals, h)[0], X),
        lambda h: jax.vjp(with_fewer_residuals, h)[0],
    ),
    "custom_vmap": Operation(emitted(with_a_batched_twin, X), with_a_batched_twin),
    "custom_partitioning": Operation(emitted(in_parts, X), in_parts),
    "composite": Operation(
        emitted(lax.composite(jnp.sin, "tests.sin"), X), lax.composite(jnp.sin, "tests.sin")
    ),
    "linear_call": Operation(
        emitted(lambda h: linear_call(lambda r, x: x * r, lambda r, t: t * r, h, h), X),
        lambda h: linear_call(lambda r, x: x * r, lambda r, t: t * r, h, h),
    ),
    **where_there_is(
        "compute_on",
        lambda p, h: p.bind(
            h,
            jaxpr=sine(h),
            compute_type="device_host",
            out_memory_spaces=(jax.memory.Space.Device,),
            compiler_options_json=None,
        )[0],
    ),
    **where_there_is(
        "custom_dce_call",
        lambda p, h: p.bind(h, fun_jaxpr=sine(h), num_consts=0, dce_jaxpr_thunk=None)[0],
    ),
    **where_there_is(
        "xla_metadata_call",
        lambda p, h: p.bind(h, jaxpr=sine(h), xla_metadata=(("a", "b"),), ad_metadata="same")[0],
    ),
    **where_there_is("call_hi_primitive", lambda _, h: Sine(jax.typeof(h))(h)),
    **where_there_is("shard_alike", lambda p, h: p.bind(h, h)[0]),
    "tie": Operation(primitives.TIE[0], lambda h: primitives.TIE[0].bind(X, h)),
    "reshard": Operation(
        emitted(lambda h: jax.sharding.reshard(h, REPLICATED), X),
        lambda h: jax.sharding.reshard(h, REPLICATED),
    ),
    "layout_constraint": Operation(
        emitted(lambda h: with_layout_constraint(h, Layout((0, 1))), X),
        lambda h: with_layout_constraint(h, Layout((0, 1))),
    ),
    "xla_metadata_value": Operation(
        emitted(annotated, X),
        annotated,
    ),
}


def passing_on(op: Callable) -> tuple[Callable, dict]:
    params = weights(**{"in": (5, UNITS), "out": (UNITS, 3)})
    return lambda p, x: op(jnp.tanh(x @ p["in"])) @ p["out"], params


@pytest.mark.parametrize("name", PASSED_ON)
def test_units_are_passed_on(name: str):
    fn, params = passing_on(PASSED_ON[name].fn)
    found_by(fn, params, {"in": {makes("in", 1), takes("out", 0)}})


def test_units_pass_by_the_number_of_a_device():
    def body(h: jax.Array) -> jax.Array:
        return h * numbers(1 + lax.axis_index("devices"))

    mapped = jax.shard_map(
        body, mesh=MESH, in_specs=jax.P("devices"), out_specs=jax.P("devices"), check_vma=False
    )
    fn, params = passing_on(mapped)
    found_by(fn, params, {"in": {makes("in", 1), takes("out", 0)}})


@pytest.mark.parametrize("name", PASSED_ON)
def test_lost_on_the_way_the_certificate_breaks(name: str, monkeypatch: pytest.MonkeyPatch):
    fn, params = passing_on(PASSED_ON[name].fn)
    monkeypatch.setitem(registry._registry, PASSED_ON[name].primitive, unruled)
    assert certificate(otf.trace_symmetry(fn, params, X), fn, params, X) > BROKEN


@pytest.mark.parametrize(
    "look", [lambda h: jax.debug.print("{}", h.sum()), lambda h: jax.debug.callback(np.sum, h)]
)
def test_to_look_at_units_ties_nothing(look: Callable):
    fn, params = passing_on(lambda h: (look(h), h)[1])
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


def carried(p, x):
    a, b = jnp.tanh(x @ p["in"]), jnp.tanh(x @ p["side"])
    return lax.scan(lambda c, _: ((c[1], jnp.sin(c[0])), None), (a, b), length=3)[0][0] @ p["out"]


def looped(p, x):
    def body(carry):
        i, a, b = carry
        return i + 1, b, jnp.sin(a)

    start = 0, jnp.tanh(x @ p["in"]), jnp.tanh(x @ p["side"])
    return lax.while_loop(lambda c: c[0] < 3, body, start)[1] @ p["out"]


def reduced_together(p, x):
    """Of each unit the value on the side where that in front is largest."""

    def larger(a, b):
        keep = a[0] > b[0]
        return lax.select(keep, a[0], b[0]), lax.select(keep, a[1], b[1])

    pair = jnp.tanh(x @ p["in"]), jnp.tanh(x @ p["side"])
    return lax.reduce(pair, (-jnp.inf, 0.0), larger, (0,))[1][None] @ p["out"]


def written_whole(p, x):
    a, b = jnp.tanh(x @ p["in"]), jnp.tanh(x @ p["side"])
    return a.at[jnp.array([2, 0])].add(b[:2]) @ p["out"]


def solved(p, x):
    """A triangular system of two unknowns for each unit."""
    a, b = (jnp.tanh(x @ p[name]).T.reshape(UNITS, 2, 2) for name in ("in", "side"))
    y = lax.linalg.triangular_solve(steep(a), b, left_side=True, lower=True)
    return y.reshape(UNITS, ROWS).T @ p["out"]


def stacked_aside(p, x):
    return jnp.stack([jnp.tanh(x @ p["in"]), x @ p["side"]], 1).max(1) @ p["out"]


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
    "scan": (carried, P.scan_p, True),
    "while": (looped, P.while_p, True),
    "reduce": (reduced_together, P.reduce_p, True),
    "scatter": (written_whole, P.scatter_add_p, True),
    "triangular_solve": (solved, P.triangular_solve_p, True),
    "stack": (stacked_aside, STACK, True),
}


def tying(name: str) -> tuple[Callable, dict]:
    fn, _, side = TYING[name]
    sizes = {"in": (5, UNITS), "out": (UNITS, 3)} | ({"side": (5, UNITS)} if side else {})
    return fn, weights(**sizes)


def first_only(ctx: RuleContext, values: Values) -> Values:
    """A wrong rule: ties nothing, but passes the axes of the first operand of a result's shape."""
    shapes = [ctx.operand_shape(i) for i in range(len(values))]
    results = unruled(ctx, values)
    for position, shape in enumerate(ctx.shapes()):
        if shape in shapes:
            results[position] = values[shapes.index(shape)]
    return results


@pytest.mark.parametrize("name", TYING)
def test_what_meets_moves_together(name: str):
    fn, params = tying(name)
    rows = {makes(path, 1) for path in params if path != "out"}
    (first,) = (g.name for g in otf.trace_symmetry(fn, params, X).groups)
    found_by(fn, params, {first: rows | {takes("out", 0)}})


@pytest.mark.parametrize("name", TYING)
def test_untied_the_certificate_breaks(name: str, monkeypatch: pytest.MonkeyPatch):
    fn, params = tying(name)
    monkeypatch.setitem(registry._registry, TYING[name][1], first_only)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.groups
    assert certificate(symmetry, fn, params, X) > BROKEN


# --- rules that rearrange axes


def two_axes(op: Callable[[jax.Array], jax.Array]) -> tuple[Callable, dict]:
    """A hidden layer of 12 units that `op` sees as [2, 6]."""

    def fn(p, x):
        h = jnp.tanh(x @ p["in"]).reshape(-1, 2, 6)
        return op(h).reshape(x.shape[0], -1) @ p["out"]

    return fn, weights(**{"in": (5, 12), "out": (12, 3)})


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


def test_wider_numbers_pin_what_they_are_made_of(monkeypatch: pytest.MonkeyPatch):
    def fn(p, x):
        halves = jnp.tanh(x @ p["in"]).astype(jnp.bfloat16).reshape(ROWS, 3, 2)
        return lax.bitcast_convert_type(halves, jnp.float32) @ p["out"]

    params = weights(**{"in": (5, UNITS), "out": (3, 3)})
    found_by(fn, params, {"in": {makes("in", 1, after=2), takes("out", 0)}})
    monkeypatch.setitem(
        registry._registry, BITCAST, lambda ctx, v: [TracedValue(v[0].axes[:2], v[0].kind)]
    )
    assert certificate(otf.trace_symmetry(fn, params, X), fn, params, X) > BROKEN


REARRANGING = [P.reshape_p, P.transpose_p, P.broadcast_in_dim_p, P.dot_general_p]


@pytest.mark.parametrize("primitive", REARRANGING, ids=str)
def test_rearranged_wrongly_the_certificate_breaks(
    primitive: core.Primitive, monkeypatch: pytest.MonkeyPatch
):
    def fn(p, x):
        h = jnp.tanh(x @ p["in"]).reshape(-1, 2, 6)
        gate = lax.broadcast_in_dim(p["gate"], (6, 2), (0,))
        return (h.transpose(0, 2, 1) * gate[None]).reshape(x.shape[0], -1) @ p["out"]

    params = weights(**{"in": (5, 12), "gate": (6,), "out": (12, 3)})
    rows = {"in#2": {makes("in", 1, before=2), makes("gate", 0), takes("out", 0, after=2)}}
    rows["in"] = {makes("in", 1, after=6), takes("out", 0, before=6)}
    found_by(fn, params, rows)
    monkeypatch.setitem(registry._registry, primitive, unruled)
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

    params = weights(**{"in": (2, 2, 3, 6), "mid": (2, 2, 6 // groups, 12), "out": (12, 3)})
    symmetry = otf.trace_symmetry(fn, params, x)
    assert {g.size for g in symmetry.groups} == {1: {6, 12}, 2: {2, 3, 6}, 6: {6, 2}}[groups]
    assert certificate(symmetry, fn, params, x) <= EXACT
    monkeypatch.setitem(registry._registry, P.conv_general_dilated_p, unruled)
    assert certificate(otf.trace_symmetry(fn, params, x), fn, params, x) > BROKEN


# --- what is nested

HEADS, INNER = 3, 4
GATE = jnp.array([0.5, 1.0, 2.0])


def along_heads(op: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Applies to the middle axis of [rows, heads, units] what is defined for the last of two."""

    def fn(h):
        flat = h.transpose(0, 2, 1).reshape(-1, HEADS)
        return op(flat).reshape(-1, INNER, HEADS).transpose(0, 2, 1)

    return fn


# Operations that mix heads and keep their number.
MIXING = {
    "rev": Operation(P.rev_p, lambda h: lax.rev(h, (1,))),
    "cumsum": Operation(P.cumsum_p, lambda h: lax.cumsum(h, 1)),
    "sort": Operation(P.sort_p, lambda h: lax.sort(h, dimension=1)),
    "gather": Operation(P.gather_p, lambda h: jnp.take(h, jnp.array([1, 2, 0]), axis=1)),
    "convolution": Operation(P.conv_general_dilated_p, along_heads(blurred)),
    "window sum": Operation(
        P.reduce_window_sum_p, along_heads(lambda h: windowed(h, 0.0, lax.add))
    ),
}


def by_heads(op: Callable) -> tuple[Callable, dict]:
    """Heads of units, which an input holds in place, with the operation on [rows, heads, units]."""

    def fn(p, x, gate):
        h = jnp.tanh(jnp.einsum("ri,ihk->rhk", x, p["in"])) * gate[None, :, None]
        return jnp.einsum("rhk,hko->ro", op(h), p["out"])

    return fn, weights(**{"in": (5, HEADS, INNER), "out": (HEADS, INNER, 2)})


def batches(symmetry: otf.Symmetry) -> list[tuple[int, ...]]:
    return [g.batch for g in symmetry.groups]


def certificate_by_heads(symmetry: otf.Symmetry, fn: Callable, params: Any, *inputs: Any) -> float:
    """The relative change of the output when the units of each head move by another step."""
    (group,) = symmetry.groups
    steps = np.arange(HEADS)[:, None] if group.batch else np.ones((), int)
    plan = array((np.arange(INNER) + steps) % INNER, np.int32)
    moved = otf.transport(symmetry, {group.name: plan}, params)
    return relative(fn(params, *inputs), fn(moved, *inputs))


def spectrally_normed(axes: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """Divides by the largest singular value of each matrix along two axes."""
    return lambda h: h / jnp.linalg.norm(h, 2, axes, keepdims=True)


@pytest.mark.parametrize("op", [jnp.sin, spectrally_normed((0, 2))])
def test_units_of_heads_are_nested_where_nothing_mixes_heads(op: Callable):
    fn, params = by_heads(op)
    symmetry = otf.trace_symmetry(fn, params, X, GATE)
    assert batches(symmetry) == [(HEADS,)]
    assert certificate_by_heads(symmetry, fn, params, X, GATE) <= EXACT


@pytest.mark.parametrize("name", MIXING)
def test_units_are_not_nested_in_heads_that_mix(name: str, monkeypatch: pytest.MonkeyPatch):
    fn, params = by_heads(MIXING[name].fn)
    symmetry = otf.trace_symmetry(fn, params, X, GATE)
    assert batches(symmetry) == [()]
    assert certificate_by_heads(symmetry, fn, params, X, GATE) <= EXACT

    # A wrong rule: the heads that come out are the heads that went in.
    monkeypatch.setitem(registry._registry, MIXING[name].primitive, passing)
    symmetry = otf.trace_symmetry(fn, params, X, GATE)
    assert batches(symmetry) == [(HEADS,)]
    assert certificate_by_heads(symmetry, fn, params, X, GATE) > BROKEN


@pytest.mark.parametrize(
    "op",
    [
        lambda h: jnp.roll(h, 1, 1),
        lambda h: lax.dynamic_slice_in_dim(jnp.concatenate([h, h], 1), 1, HEADS, 1),
        lambda h: jnp.concatenate([h[:, 1:], h[:, :1]], 1),
        lambda h: jnp.stack(jnp.unstack(h, axis=1)[::-1], 1),
        lambda h: h + h.mean(1, keepdims=True),
        spectrally_normed((1, 2)),
        spectrally_normed((2, 1)),
        lambda h: lax.top_k(h.transpose(0, 2, 1), HEADS)[0].transpose(0, 2, 1),
        lambda h: jnp.einsum("rhk,hg->rgk", h, uniform(HEADS, HEADS)),
        lambda h: lax.dynamic_update_slice(h, h.sum(1, keepdims=True), (0, 1, 0)),
        lambda h: h.at[:, jnp.array([1, 0])].add(jnp.sin(h.max(1, keepdims=True))),
        lambda h: lax.scan(lambda c, x: (c + x, c), h[:, 0], jnp.moveaxis(h, 1, 0))[1].swapaxes(
            0, 1
        ),
    ],
)
def test_units_are_not_nested_in_heads_that_are_reordered_or_summed(op: Callable):
    fn, params = by_heads(op)
    symmetry = otf.trace_symmetry(fn, params, X, GATE)
    assert batches(symmetry) == [()]
    assert certificate_by_heads(symmetry, fn, params, X, GATE) <= EXACT


# A residual connection ties the heads that come out of an operation to those that went in, so that
# their axis variable does not tell that it mixes them.
@pytest.mark.parametrize("name", MIXING)
def test_units_are_not_nested_in_heads_that_a_residual_ties(name: str):
    fn, params = by_heads(lambda h: h + MIXING[name].fn(h))
    symmetry = otf.trace_symmetry(fn, params, X, GATE)
    assert batches(symmetry) == [()]
    assert certificate_by_heads(symmetry, fn, params, X, GATE) <= EXACT


@pytest.mark.parametrize("residual", [True, False])
def test_units_are_not_nested_in_heads_that_a_matrix_mixes(residual: bool):
    def fn(p, x):
        h = jnp.tanh(jnp.einsum("ri,ihk->rhk", x, p["in"]))
        mix = p["mix"] if residual else p["mix"] + p["mix"].T
        mixed = jnp.einsum("rhk,hg->rgk", h, mix)
        return jnp.einsum("rhk,hko->ro", h + mixed if residual else mixed, p["out"])

    params = weights(**{"in": (5, HEADS, INNER), "mix": (HEADS, HEADS), "out": (HEADS, INNER, 2)})
    symmetry = otf.trace_symmetry(fn, params, X)
    assert {(g.size, g.batch) for g in symmetry.groups} == {(HEADS, ()), (INNER, ())}
    assert otf.check_symmetry(symmetry, fn, params, X) <= EXACT


def test_contractions_between_heads_unnest(monkeypatch: pytest.MonkeyPatch):
    fn, params = by_heads(lambda h: jnp.einsum("rhk,rgk->rhg", h, h).sum(2, keepdims=True) * h)
    assert batches(otf.trace_symmetry(fn, params, X, GATE)) == [()]
    monkeypatch.setattr(RuleContext, "note_contraction", lambda *args: None)
    symmetry = otf.trace_symmetry(fn, params, X, GATE)
    assert batches(symmetry) == [(HEADS,)]
    assert certificate_by_heads(symmetry, fn, params, X, GATE) > BROKEN


# --- families


def family_names() -> list[str]:
    """The names that `families` looks up in `jax.extend.core.primitives`, of every version."""
    tree = ast.parse(inspect.getsource(families))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "named":
            (argument,) = node.args
            names += ast.literal_eval(argument).split()
    return names


def test_every_name_of_a_family_is_a_primitive():
    names = family_names()
    assert len(names) > 100
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(P, f"{name}_p")] == []


# Where `jax.lax` has no function of that name, one that does more than bind the primitive, or one
# that is constant on the operands that we draw.
SPELLED = {
    "acosh": lambda x: lax.acosh(1 + x),
    "and": lax.bitwise_and,
    "ceil": lambda x: lax.ceil(9 * x),
    "clamp": lambda x, y: lax.clamp(-y, x, y),
    "convert_element_type": lambda x: lax.convert_element_type(x, jnp.float16),
    "floor": lambda x: lax.floor(9 * x),
    "imag": lambda x: lax.imag(x * x),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "is_finite": lambda x: lax.is_finite(lax.log(x - 0.5)),
    "name": lambda x: checkpoint_name(x, "x"),
    "mulhi": lambda x, y: primitives.internal("lax.lax", "mulhi")[0].bind(x << 27, y << 27),
    "not": lax.bitwise_not,
    "or": lax.bitwise_or,
    "polynomial": lambda x, y: BY_NAME["polynomial"].bind(x, y, y),
    "polygamma": lambda m, x: lax.polygamma(lax.floor(9 * m), x),
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 10),
    "regularized_incomplete_beta": lax.betainc,
    "select_n": lambda x, y: lax.select_n(x > 0.5, x, y),
    "sign": lambda x: lax.sign(x - 0.5),
    "xor": lax.bitwise_xor,
    "zeta": lambda x, q: lax.zeta(1 + x, q),
}


@functools.cache
def eligible(
    primitive: core.Primitive,
) -> tuple[Callable, tuple[jax.Array, ...], core.JaxprEqn]:
    """A function that binds a primitive, operands of [8] that it takes, and the equation."""
    name = str(primitive)
    fn = SPELLED.get(name) or getattr(lax, name, primitive.bind)
    draw = np.random.default_rng(0).uniform(0.1, 0.9, (3, 8))
    draw[1, ::2] = draw[0, ::2]  # for equality to depend on either
    values = [draw.astype(np.float32), (draw * 9).astype(np.int32), (draw + 1j * draw**2)]
    for kind in values:
        for count in (1, 2, 3):
            args = tuple(jnp.asarray(row) for row in kind[:count])
            try:
                eqns = jax.make_jaxpr(fn)(*args).eqns
            except (TypeError, ValueError, AssertionError):
                continue
            for eqn in eqns:
                if eqn.primitive is primitive:
                    return fn, args, eqn
    raise AssertionError(f"found no operands for {primitive}")


def same(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays are equal, NaN to NaN."""
    return all(np.array_equal(part(a), part(b), equal_nan=True) for part in (np.real, np.imag))


@pytest.mark.parametrize("primitive", UNIT_BY_UNIT, ids=str)
def test_elementwise_primitives_commute_with_permutations(primitive: core.Primitive):
    fn, args, _ = eligible(primitive)
    order = np.roll(np.arange(8), 3)
    whole, permuted = fn(*args), fn(*(x[order] for x in args))
    assert whole.shape == (8,)
    assert same(whole[order], permuted)
    # And only if all operands move, and the result with them: a rule that does not tie is wrong.
    assert not same(whole, permuted)
    for i in range(len(args) if len(args) > 1 else 0):
        one_stays = fn(*(x if i == j else x[order] for j, x in enumerate(args)))
        assert not same(one_stays, permuted)


@pytest.mark.parametrize("primitive", UNIT_BY_UNIT, ids=str)
def test_elementwise_rules_tie_all_operands_and_the_result(primitive: core.Primitive):
    _, _, eqn = eligible(primitive)
    interpreter = Interpreter("raise")
    unifier = interpreter.unifier
    context = RuleContext(eqn, (), interpreter, None, (True,))
    operands = []
    for position in range(len(eqn.invars)):
        fresh = map(unifier.fresh, context.operand_shape(position))
        operands.append(TracedValue(tuple(fresh), Kind.FEATURE))
    (result,) = registry.registered()[primitive](context, operands)
    axes: list[Axis] = [axis for value in (*operands, result) for axis in value.axes]
    assert len(axes) > 1
    assert len({unifier.signature(axis) for axis in axes}) == 1


# --- the registry

EXEMPT = {
    # Nothing comes of them that could be tied or pinned.
    "debug_callback",
    "debug_print",
    "check",
    "dce_sink",
    "inspect_sharding",
    # Takes no arrays, and what it returns does not vary.
    "empty",
    "empty2",
    # Needs a backend that has several devices to run at all.
    "ragged_all_to_all",
    # Calls what is written in another language, of which nothing is at hand here.
    "buffer_callback",
    "ffi_call",
    # Between an extended dtype and how it is stored: made when JAX lowers what has one.
    "from_edtype",
    "to_edtype",
    # Takes no arrays and returns a scalar, the number of a device.
    "axis_index",
    # Takes no arrays and returns a scalar, which chooses the branch of a `cond`.
    "platform_index",
    # Keys come of them, and whatever makes numbers of keys pins every axis in its turn.
    "iota_2x32_shape",
    "random_clone",
    "random_fold_in",
    "random_seed",
    "random_split",
    "random_wrap",
    # Draws anew at each call, so that a certificate would break whatever the rule.
    "rng_uniform",
    # Makes the layout part of an array's type, which most operations do not take.
    "relayout",
    # JAX makes it of `select_and_scatter_add` when it lowers that, after tracing.
    "select_and_scatter",
}


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (lambda ctx, values: [], "'tanh' returned 0 values for the 1 results"),
        (
            lambda ctx, values: [values[0].without([1])],
            r"sizes \(4,\) for result 0 of shape \(4, 6\)",
        ),
    ],
)
def test_a_rule_that_returns_what_does_not_fit_is_named(
    rule: registry.Rule, complaint: str, monkeypatch: pytest.MonkeyPatch
):
    fn, params = passing_on(jnp.tanh)
    monkeypatch.setitem(registry._registry, P.tanh_p, rule)
    with pytest.raises(ValueError, match=complaint) as info:
        otf.trace_symmetry(fn, params, X)
    assert __file__ in str(info.value)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (lambda ctx, values: None, "returned None, at"),
        (lambda ctx, values: values[0], "returned a TracedValue, at"),
        (lambda ctx, values: [values], "returned a list with a list, at"),
        (
            lambda ctx, values: [values[0]._replace(kind="feature")],
            "returned a TracedValue whose kind is 'feature', at",
        ),
        (
            lambda ctx, values: [values[0]._replace(axes=values[0].axes[0])],
            r"returned a TracedValue whose axes are \(Factor.*, at",
        ),
    ],
    ids=["nothing", "no list", "a list in a list", "a kind by name", "one axis"],
)
def test_a_rule_that_returns_no_values_is_named(
    rule: Any, complaint: str, monkeypatch: pytest.MonkeyPatch
):
    fn, params = passing_on(jnp.tanh)
    monkeypatch.setitem(registry._registry, P.tanh_p, rule)
    with pytest.raises(TypeError, match=f"the rule of 'tanh' {complaint}") as info:
        otf.trace_symmetry(fn, params, X)
    assert __file__ in str(info.value)
    assert "it must return a list of one TracedValue" in str(info.value)


def test_a_rule_that_reads_all_replaces_one_that_selects(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(registry, "_selecting", set(registry._selecting))
    assert registry.selects(P.slice_p)
    otf.register_rule(P.slice_p)(passing)
    assert not registry.selects(P.slice_p)


def test_for_every_primitive_a_wrong_rule_is_caught():
    tables = ALONG, MATRIX, CUT, PASSED_ON, MIXING
    covered = {operation.primitive for table in tables for operation in table.values()}
    covered |= {primitive for _, primitive, _ in TYING.values()}
    covered |= {*REARRANGING, P.conv_general_dilated_p}
    ruled = {str(p) for p in registry.registered()} - {str(p) for p in UNIT_BY_UNIT}
    assert ruled - {str(p) for p in covered} - EXEMPT == set()
