"""Assignments of known costs, of many sizes, by few programs or none.

A solver is by far the largest program there is, and XLA compiles another one for each size. A cost
that is an array of NumPy (see `common.host`) is solved by NumPy, which needs none. A small one of
JAX is filled up to the next of a few sizes, with units that are matched with each other in any best
match, and what belongs to them is cut off from the solution.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from otfusion_jax.common.host import Array, array_module
from otfusion_jax.solvers.base import Solution, TransportProblem
from otfusion_jax.solvers.exact import Exact

SIZES = (8, 32, 128, 512)
"""The sizes that assignments are filled up to. Beyond the last, to solve a larger problem would
take longer than to compile a program."""


def solve_assignment(solver: Exact, cost: Float[Array, "n n"]) -> Solution:
    """Solves an assignment, by NumPy or by a program that several sizes share.

    Args:
        solver: The solver.
        cost: The cost, float `[n, n]`, float32 or float64.

    Returns:
        What `solver.solve(cost)` returns, if the best match is unique. The gap is of the same
        match, and may be larger by rounding.
    """
    if array_module(cost) is np:
        return solver.compute(TransportProblem(cost))
    size = len(cost)
    for larger_size in SIZES:
        if 0 < size < larger_size:
            padded = _solved(solver, _padded(cost, larger_size))
            return _cut(padded, cost)
        if size == larger_size:
            break
    return _solved(solver, cost)


@functools.partial(jax.jit, static_argnames=("solver",))
def _solved(solver: Exact, cost: Array) -> Solution:
    return solver.solve(TransportProblem(cost))


@functools.partial(jax.jit, static_argnames=("size",))
def _padded(cost: Array, size: int) -> Array:
    """Fills a cost up with units that no best match pairs with those that are there.

    To pair one of them with a unit that is there takes two such pairs, which cost more than a pair
    of units that are there and a pair that is not.
    """
    least, largest = jnp.min(cost), jnp.max(cost)
    # Twice the range, and if there is none, twice the costs, and if these are 0, 1.
    above = jnp.where(largest > least, largest - least, jnp.abs(largest))
    above = jnp.where(above > 0, above, 1)
    far = largest + above
    filled = jnp.full((size, size), far).at[: len(cost), : len(cost)].set(cost)
    index = jnp.arange(size)
    is_added = (index[:, None] == index[None, :]) & (index[:, None] >= len(cost))
    return jnp.where(is_added, least, filled)


@jax.jit
def _cut(padded: Solution, cost: Array) -> Solution:
    """Cuts off what a solution says of units that were added."""
    size = len(cost)
    plan = padded.plan[:size]
    matched = cost.at[plan, jnp.arange(size)].get(mode="fill", fill_value=jnp.nan)
    # Divided first: the sum may be out of range where the mean is not.
    value = jnp.sum(matched / size)
    # A mean over fewer units: those that were added are matched at their least cost.
    gap = padded.gap * (len(padded.plan) / size)
    return Solution(plan, value, padded.converged, gap)
