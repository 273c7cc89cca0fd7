"""Checks rules of primitives of other packages, which are found when one of them is met."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from arrays import uniform
from jax.experimental import pallas, sparse
from jax.extend import core
from zoo import makes, randomise, rows_of, shapes, takes

import otfusion_jax as otf
from otfusion_jax.tracing import package_rules

pytestmark = pytest.mark.compatibility

X = uniform(4, 5)
UNITS = 6
GROUP = {"in": {makes("in", 1), takes("out", 0)}}
EXACT = 1e-5
# The sizes of steps follow estimates of the error, which in float32 depend on the order of sums.
CHOSEN_STEPS = 1e-4


def found_by(op: Callable[[jax.Array], jax.Array], groups: dict) -> None:
    """Asserts which groups the hidden units have with an operation on them, and certifies these."""
    params = randomise(shapes(**{"in": (5, UNITS), "out": (UNITS, 3)}), 1)

    def fn(p, x):
        return op(jnp.tanh(x @ p["in"])) @ p["out"]

    symmetry = otf.trace_symmetry(fn, params, X)
    assert {g.name: rows_of(g) for g in symmetry.groups} == groups
    assert otf.check_symmetry(symmetry, fn, params, X) < EXACT


def written_once(h: jax.Array) -> jax.Array:
    """A loop that writes each row into a buffer, in the way of Equinox."""

    def step(carry):
        i, rows = carry
        return i + 1, rows.at[i].set(jnp.sin(h[i]))

    start = 0, jnp.zeros_like(h)
    return eqxi.while_loop(
        lambda c: c[0] < len(h),
        step,
        start,
        kind="checkpointed",
        max_steps=8,
        buffers=lambda c: c[1],
    )[1]


def bounded(h: jax.Array) -> jax.Array:
    return eqxi.while_loop(
        lambda c: c.sum() < 1e4, lambda c: c * 1.5 + 1, h, kind="bounded", max_steps=4
    )


def solved(h: jax.Array) -> jax.Array:
    """A linear system over the rows for each unit."""

    def solve(v):
        operator = lineax.MatrixLinearOperator(jnp.diag(2 + v) + 0.1)
        return lineax.linear_solve(operator, v).value

    return jax.vmap(solve)(h.T).T


PASSING = {
    "unvmap_any": lambda h: jnp.where(eqxi.unvmap_any(jnp.isnan(h)), 0.0, h),
    "unvmap_all": lambda h: jnp.where(eqxi.unvmap_all(h > 9), 0.0, h),
    "unvmap_max": lambda h: h * eqxi.unvmap_max((9 * h).astype(jnp.int32)).astype(jnp.float32),
    "noinline": eqxi.noinline(jnp.sin),
    "noinline in jit": jax.jit(lambda h: eqxi.noinline(jnp.sin)(h)),
    "nonbatchable": eqxi.nonbatchable,
    "nondifferentiable": eqxi.nondifferentiable,
    "nondifferentiable_backward": eqxi.nondifferentiable_backward,
    "error_if": lambda h: eqx.error_if(h, jnp.isnan(h), "not a number"),
    "while_loop, checkpointed": written_once,
    "while_loop, bounded": bounded,
    "scan, checkpointed": lambda h: eqxi.scan(
        lambda c, row: (c + row, c), h[0], h, kind="checkpointed"
    )[1],
    "linear_solve": solved,
}


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.usefixtures("default_promotion")
def test_units_are_passed_on(name: str):
    found_by(PASSING[name], GROUP)


ORDERED = {
    "noinline": eqxi.noinline(lambda h: jnp.cumsum(h, axis=1)),
    "noinline of another abstract function": eqxi.noinline(
        lambda h: jnp.cumsum(h, axis=1), lambda _, h: jnp.sin(h)
    ),
    "linear_solve": lambda h: jax.vmap(
        lambda v: (
            lineax.linear_solve(
                lineax.MatrixLinearOperator(jnp.eye(UNITS) + jnp.tri(UNITS)), v
            ).value
        )
    )(h),
    "a callback that is no error": lambda h: jax.pure_callback(np.fliplr, h, h),
}


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.usefixtures("default_promotion")
def test_order_along_the_units_pins_them(name: str):
    found_by(ORDERED[name], {})


def test_a_function_chosen_as_it_runs_pins_its_operands():
    functions = [
        eqxi.noinline(fn, lambda _, h: h) for fn in (jnp.sin, lambda h: jnp.cumsum(h, axis=1))
    ]
    traced = eqx.filter_jit(lambda fn, h: fn(h))
    found_by(lambda h: traced(functions[0], h), {})


def test_a_kernel_pins_its_operands():
    def kernel(h, out):
        out[...] = jnp.flip(h[...], 1)

    def op(h):
        shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
        return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(h)

    found_by(op, {})


@pytest.mark.usefixtures("default_promotion")
def test_sparse_matrices_pin_what_they_meet():
    matrix = sparse.BCOO.fromdense(jnp.tri(UNITS))
    found_by(lambda h: (matrix @ h.T).T, {})


def test_of_a_package_that_is_not_known_no_rule_is_found():
    cube = core.Primitive("cube")
    cube.def_impl(lambda x: x**3)
    assert package_rules.rule_of(cube) is None


# --- a neural ODE


def field(t: Any, y: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    return jnp.tanh(y @ p["in"] + p["bias"]) @ p["out"]


STEPS = {
    "fixed": (diffrax.ConstantStepSize(), diffrax.SaveAt(t1=True)),
    "adaptive": (diffrax.PIDController(rtol=1e-3, atol=1e-6), diffrax.SaveAt(t1=True)),
    "adaptive, dense in time": (
        diffrax.PIDController(rtol=1e-3, atol=1e-6),
        diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 3)),
    ),
}


def solve(
    p: dict[str, jax.Array], y: jax.Array, steps: str, adjoint: diffrax.AbstractAdjoint
) -> Any:
    controller, saved = STEPS[steps]
    term, solver = diffrax.ODETerm(field), diffrax.Tsit5()
    return diffrax.diffeqsolve(
        term,
        solver,
        0.0,
        1.0,
        0.1,
        y,
        args=p,
        stepsize_controller=controller,
        saveat=saved,
        adjoint=adjoint,
    ).ys


@pytest.mark.parametrize(
    ("steps", "adjoint"),
    [
        ("fixed", diffrax.RecursiveCheckpointAdjoint()),
        ("fixed", diffrax.DirectAdjoint()),
        ("adaptive", diffrax.RecursiveCheckpointAdjoint()),
        ("adaptive", diffrax.BacksolveAdjoint()),
        ("adaptive, dense in time", diffrax.RecursiveCheckpointAdjoint()),
    ],
    ids=str,
)
@pytest.mark.usefixtures("default_promotion")
def test_hidden_units_of_a_neural_ode_move(steps: str, adjoint: diffrax.AbstractAdjoint):
    params = randomise(shapes(**{"in": (3, UNITS), "bias": (UNITS,), "out": (UNITS, 3)}), 1)

    def fn(p, y):
        return solve(p, y, steps, adjoint)

    y = uniform(2, 3)
    symmetry = otf.trace_symmetry(fn, params, y)
    rows = {makes("in", 1), makes("bias", 0), takes("out", 0)}
    (group,) = symmetry.groups
    assert rows_of(group) == rows
    assert otf.check_symmetry(symmetry, fn, params, y) < CHOSEN_STEPS


@pytest.mark.usefixtures("default_promotion")
def test_the_state_of_a_latent_neural_ode_moves_with_its_encoder_and_decoder():
    sizes = {"in": (3, UNITS), "bias": (UNITS,), "out": (UNITS, 3), "encode": (5, 3)}
    params = randomise(shapes(**sizes, decode=(3, 2)), 1)

    def fn(p, x):
        y = jnp.tanh(x @ p["encode"])
        return solve(p, y, "adaptive", diffrax.RecursiveCheckpointAdjoint())[0] @ p["decode"]

    symmetry = otf.trace_symmetry(fn, params, X)
    assert sorted(g.size for g in symmetry.groups) == [3, UNITS]
    assert otf.check_symmetry(symmetry, fn, params, X) < CHOSEN_STEPS
