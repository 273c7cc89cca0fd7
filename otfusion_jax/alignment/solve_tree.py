"""Matching a group jointly with what is nested in it.

Which head is which can't be told before the units inside of it are matched: the cost between two
heads is that of their best match inside. So all pairs of heads are solved, then the heads, and each
head keeps the match that it was chosen for.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from otfusion_jax.alignment.costs import Gram, Masses, intra_costs
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.stack import solve_stack
from otfusion_jax.symmetry.plans import is_permutation


def _total(solution: Solution, plan: Array) -> Solution:
    """Sums up a stack of solutions."""
    return Solution(
        plan,
        jnp.sum(solution.value),
        jnp.all(solution.converged),
        jnp.max(solution.gap),
    )


def solve_group_tree(
    solver: AbstractSolver,
    cost_of: Callable[[Gram], Array],
    grams: Sequence[Gram],
    masses: Sequence[Masses],
) -> list[Solution]:
    """Matches a group jointly with what is nested in it.

    The cost between two heads is that of their best match inside; all pairs are solved.

    Args:
        solver: from cost to plan. What has something nested in it is always matched exactly.
        cost_of: the ground cost between all pairs of units, of their inner products.
        grams: of the group and of each nested one.
        masses: of the units of each.

    Returns:
        For each group its plans, values summed up. Inside of heads that do not move one to one,
        plans are for all pairs of heads.
    """
    own, *inside = grams
    if not inside:
        problem = TransportProblem(cost_of(own), *masses[0], intra_costs(cost_of, own))
        found = solve_stack(solver, problem)
        return [_total(found, found.plan)]
    problems = [_pairs(cost_of, g, pair) for g, pair in zip(inside, masses[1:], strict=True)]
    pairs: list[Solution] = []
    for _, alike in itertools.groupby(problems, key=_shapes):  # one solver for all
        found = solve_stack(solver, jax.tree.map(lambda *x: jnp.stack(x), *alike))
        pairs += [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(found.gap))]
    # The masses of a problem's units sum up to 1.
    values = (g.cross.shape[-1] * p.value for g, p in zip(inside, pairs, strict=True))
    cost = functools.reduce(jnp.add, values, cost_of(own))
    outer = solve_stack(Exact(), TransportProblem(cost))
    found = [_total(outer, outer.plan)]
    if not is_permutation(outer.plan):
        return [*found, *(_total(solution, solution.plan) for solution in pairs)]
    for solution in pairs:
        # For each head of the target, the match inside with the head that goes there.
        chosen = jax.tree.map(lambda x: picked(x, outer.plan), solution)
        found.append(_total(chosen, chosen.plan))
    return found


def _pairs(cost_of: Callable[[Gram], Array], g: Gram, masses: Masses) -> TransportProblem:
    """Sets up the problems of all pairs of heads: `[*batch, heads, heads, n, m]`."""
    # From [*batch, heads, n, heads, m].
    cross = jnp.moveaxis(g.cross, -3, -2)
    pairs = cross.shape[:-2]

    def of_source(x: Array, rank: int) -> Array:
        x = jnp.expand_dims(x, -rank - 1)
        return jnp.broadcast_to(x, (*pairs, *x.shape[x.ndim - rank :]))

    def of_target(x: Array, rank: int) -> Array:
        x = jnp.expand_dims(x, -rank - 2)
        return jnp.broadcast_to(x, (*pairs, *x.shape[x.ndim - rank :]))

    cost = cost_of(Gram(of_source(g.source_sq_norms, 1), of_target(g.target_sq_norms, 1), cross))
    a, b = masses
    intra = intra_costs(cost_of, g)
    return TransportProblem(
        cost,
        None if a is None else of_source(a, 1),
        None if b is None else of_target(b, 1),
        None if intra is None else (of_source(intra[0], 2), of_target(intra[1], 2)),
    )


def _shapes(problem: Any) -> Any:
    return jax.tree_util.tree_structure(problem), [x.shape for x in jax.tree.leaves(problem)]


def picked(pairs: Array, plan: Array) -> Array:
    """Picks for each head of the target what belongs to the pair with the head that goes there.

    Args:
        pairs: `[*batch, heads, heads, ...]`.
        plan: of the heads, int `[*batch, heads]`.

    Returns:
        `pairs[*batch, plan[*batch, j], j]` for all `j`, `[*batch, heads, ...]`.
    """
    lead = plan.ndim + 1
    index = plan.reshape(*plan.shape[:-1], 1, plan.shape[-1], *[1] * (pairs.ndim - lead))
    return jnp.take_along_axis(pairs, index, axis=plan.ndim - 1, mode="fill").squeeze(plan.ndim - 1)


def overlap(grams: Sequence[Gram], plans: Sequence[Array]) -> Array:
    """Takes the inner product of the moved source with the target.

    Args:
        grams: of a group and of each nested one.
        plans: of these, permutations.

    Returns:
        The sum over all weights that the groups were compared by.
    """
    own, *inside = grams
    outer, *rest = plans
    total = jnp.sum(_along(own.cross, outer))
    for g, plan in zip(inside, rest, strict=True):
        total = total + jnp.sum(_along(picked(jnp.moveaxis(g.cross, -3, -2), outer), plan))
    return total


def _along(cross: Array, plan: Array) -> Array:
    """Takes `ab[..., plan[..., j], j]` for all `j`."""
    return jnp.take_along_axis(cross, plan[..., None, :], axis=-2, mode="fill")
