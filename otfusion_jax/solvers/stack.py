"""Many problems of one shape: under one `jax.vmap`, or one after the other."""

import math

import jax

from otfusion_jax.common.batching import at_once, map_in_batches
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem


def solve_stack(solver: AbstractSolver, problems: TransportProblem) -> Solution:
    """Solves a stack of problems: under one `jax.vmap`, on a CPU one after the other.

    Args:
        solver: from problem to plan.
        problems: every array has the same leading axes `batch` in front, as in a cost
            `[*batch, n, m]`. Without any, it is a single problem.

    Returns:
        The solutions, with `batch` in front of every array.
    """
    batch = problems.cost.shape[:-2]
    if not batch:
        return solver.solve(problems)
    count = math.prod(batch)
    flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(batch) :]), problems)
    found = map_in_batches(solver.solve, flat, at_once(count))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)
