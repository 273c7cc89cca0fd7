"""Many problems of one shape: under one `jax.vmap`, or one after the other."""

import math
import operator

import jax
import numpy as np

from otfusion_jax.common.batching import at_once, map_in_batches
from otfusion_jax.common.host import Array, array_module
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem
from otfusion_jax.solvers.exact import Exact, takes_few
from otfusion_jax.solvers.small_assignments import solve_small


def solve_stack(solver: AbstractSolver, problems: TransportProblem) -> Solution:
    """Solves a stack of problems: under one `jax.vmap`, on a CPU one after the other.

    Args:
        solver: The solver of each problem. For arrays of NumPy it has to take these.
        problems: The problems, every array with the same leading axes `batch` in front, as in a
            cost `[*batch, n, m]`. Without any, it is a single problem.

    Returns:
        The solutions, with `batch` in front of every array, which are of the problems' kind.
    """
    batch = problems.cost.shape[:-2]
    at_hand = array_module(problems.cost) is np
    # Of costs that are not finite, the solution says so, known or not.
    solve = solver.compute if at_hand else solver.solve
    if not batch:
        return solve(problems)
    count = math.prod(batch)

    def flattened(x: Array) -> Array:
        return x.reshape(count, *x.shape[len(batch) :])

    def unflattened(x: Array) -> Array:
        return x.reshape(*batch, *x.shape[1:])

    # One axis in place of several: `jax.lax.map` goes along one.
    flat = jax.tree.map(flattened, problems)
    if isinstance(solver, Exact) and takes_few(flat):
        solutions = solve_small(flat.cost, solver.tolerance)
    elif at_hand:
        found = []
        for number in range(count):
            found.append(solve(jax.tree.map(operator.itemgetter(number), flat)))
        solutions = jax.tree.map(lambda *entries: np.stack(entries), *found)
    else:
        solutions = map_in_batches(solve, flat, at_once(count))
    return jax.tree.map(unflattened, solutions)
