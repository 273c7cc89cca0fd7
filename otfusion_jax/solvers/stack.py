"""Many problems of one shape: under one `jax.vmap`, or one after the other."""

import math

import jax
from jaxtyping import Array

from otfusion_jax.common.batching import at_once, map_in_batches
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem


def solve_stack(solver: AbstractSolver, problems: TransportProblem) -> Solution:
    """Solves a stack of problems: under one `jax.vmap`, on a CPU one after the other.

    Args:
        solver: The solver of each problem.
        problems: The problems, every array with the same leading axes `batch` in front, as in a
            cost `[*batch, n, m]`. Without any, it is a single problem.

    Returns:
        The solutions, with `batch` in front of every array.
    """
    batch = problems.cost.shape[:-2]
    if not batch:
        return solver.solve(problems)
    count = math.prod(batch)

    def flattened(x: Array) -> Array:
        return x.reshape(count, *x.shape[len(batch) :])

    def unflattened(x: Array) -> Array:
        return x.reshape(*batch, *x.shape[1:])

    # One axis in place of several: `jax.lax.map` goes along one.
    flat = jax.tree.map(flattened, problems)
    solutions = map_in_batches(solver.solve, flat, at_once(count))
    return jax.tree.map(unflattened, solutions)
