"""Solving one group tree: a group jointly with what is nested in it.

Which head is which cannot be told before the units inside of the heads are matched: the cost
between two heads is that of their best match inside. So all pairs of heads are solved, then the
heads, and each head keeps the match that it was chosen for. A group without any nested in it is a
single transport problem, or a batch of them.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

from otfusion_jax.alignment.costs import Gram, intra_costs
from otfusion_jax.common.host import Array, array_module, taken
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.procrustes import polar_factors
from otfusion_jax.solvers.stack import solve_stack
from otfusion_jax.symmetry.groups import Motion
from otfusion_jax.symmetry.plans import is_permutation
from otfusion_jax.symmetry.signs import signed_matrix

ROTATIONS = (Motion.ROTATED, Motion.ROTATED_ABOUT_ONES)
"""The motions whose matrices are solved for by Procrustes."""

Masses = tuple[Array | None, Array | None]
"""The masses of a group's units in the source and in the target, float `[*batch, n]` and `[*batch,
m]`; None where they are uniform."""

CostOf = Callable[[Gram], Array]
"""The ground cost between all pairs of units, as a function of their inner products."""


def solve_group_tree(
    solver: AbstractSolver,
    cost_of: CostOf,
    grams: Sequence[Gram],
    masses: Sequence[Masses],
    motions: Sequence[Motion],
) -> list[Solution]:
    """Matches a group jointly with what is nested in it.

    Args:
        solver: The solver, from cost to plan. A group with others nested in it is always matched
            exactly, and only those nested ones by this solver.
        cost_of: The ground cost between all pairs of units, as a function of their inner products.
        grams: The inner products of the root's units, then of those of each nested group.
        masses: The masses of the units of each of these groups.
        motions: By which matrices the units of each of these groups are multiplied. Those that are
            rotated are brought as close as can be in squared distance, whatever solver and ground
            cost are, and those that are signed are matched exactly.

    Returns:
        For each group its solution, values summed up over its batch. Inside of heads that do not
        move one to one, plans are for all pairs of heads.
    """
    # The better sign of each pair of units is chosen before they are matched.
    root_grams, *nested_grams = [inside.with_best_signs() for inside in grams]
    if motions[0] in ROTATIONS:
        return [_summed(_rotated(root_grams, root_grams.cross, motions[0]))]
    if not nested_grams:
        if motions[0] is Motion.SIGNED:
            matched = solve_stack(Exact(), TransportProblem(cost_of(root_grams)))
            return [_summed(_with_signs(matched, grams[0].cross))]
        cost = cost_of(root_grams)
        intra = None if root_grams.intra is None else intra_costs(cost_of, root_grams)
        problem = TransportProblem(cost, *masses[0], intra)
        return [_summed(solve_stack(solver, problem))]
    # The match inside of heads i and j depends on these two alone, so all pairs are solved first.
    pair_problems = []
    for inside, inside_masses, motion in zip(nested_grams, masses[1:], motions[1:], strict=True):
        if motion is Motion.PERMUTED:
            pair_problems.append(_problems_of_pairs(cost_of, inside, inside_masses))
    permuted = iter(_solve_alike_at_once(solver, pair_problems))
    pair_solutions = []
    for number, (inside, motion) in enumerate(zip(nested_grams, motions[1:], strict=True), 1):
        if motion is Motion.PERMUTED:
            pair_solutions.append(next(permuted))
        elif motion is Motion.SIGNED:
            problem = _problems_of_pairs(cost_of, inside, (None, None))
            cross = grams[number].cross.swapaxes(-3, -2)
            pair_solutions.append(_with_signs(solve_stack(Exact(), problem), cross))
        else:
            pair_solutions.append(_rotated_pairs(inside, motion))
    cost = cost_of(root_grams)
    for inside, solution in zip(nested_grams, pair_solutions, strict=True):
        # The masses of a problem's units sum up to 1, those of a head to its number of units.
        cost = cost + inside.cross.shape[-1] * solution.value
    # Exactly, so that each head can keep the match inside that it was chosen for.
    root_solution = solve_stack(Exact(), TransportProblem(cost))
    solutions = [_summed(root_solution)]
    for solution in pair_solutions:
        if is_permutation(root_solution.plan):
            # For each head of the target, the match inside with the head that goes there.
            pick = functools.partial(picked, plan=root_solution.plan)
            solution = jax.tree.map(pick, solution)
        solutions.append(_summed(solution))
    return solutions


def _summed(solution: Solution) -> Solution:
    """Sums up a stack of solutions, whose plans stay a stack."""
    return Solution(
        solution.plan, solution.value.sum(), solution.converged.all(), solution.gap.max()
    )


def _with_signs(solution: Solution, cross: Array) -> Solution:
    """Makes matrices of permutations, with the signs by which matched units are alike.

    Args:
        solution: The solutions, whose plans are permutations `[*batch, n]`, or the masses
            `[*batch, n, m]` by which units become another number of units.
        cross: The inner products of what changes with the signs, `[*batch, n, m]`.

    Returns:
        The solutions with plans `[*batch, n, m]`.
    """
    if not is_permutation(solution.plan):
        xp = array_module(solution.plan)
        plan = xp.where(cross < 0, -solution.plan, solution.plan)
        return dataclasses.replace(solution, plan=plan)
    index = solution.plan[..., None, :]
    matched = taken(cross, index, cross.ndim - 2).squeeze(-2)
    signs = array_module(matched).where(matched < 0, -1, 1).astype(cross.dtype)
    return dataclasses.replace(solution, plan=signed_matrix(solution.plan, signs))


def _rotated(grams: Gram, cross: Array, motion: Motion) -> Solution:
    """Rotates units as close as possible to those of the target.

    Args:
        grams: The inner products, of which the squared norms are used.
        cross: The inner products of source and target, `[*batch, n, m]`, the batch of the norms.
        motion: Whether the vector of ones has to stay.

    Returns:
        The solutions, `[*batch]`. Their value is the squared distance of the rotated units to those
        of the target over the number of units, as it is for permutations.
    """
    solution = polar_factors(cross, fixes_ones=motion is Motion.ROTATED_ABOUT_ONES)
    source_sq_norm = grams.source_sq_norms.sum(-1)
    target_sq_norm = grams.target_sq_norms.sum(-1)
    n = cross.shape[-1]
    # |a Q - b|^2 = |a|^2 + |b|^2 - 2 <Q, cross>
    value = (source_sq_norm + target_sq_norm + 2 * solution.value) / n
    return Solution(solution.plan, value, solution.converged, 2 * solution.gap / n)


def _rotated_pairs(grams: Gram, motion: Motion) -> Solution:
    """Rotates the units of every head as close as possible to those of every head of the target."""
    # From [*batch, heads, n, heads of the target, m].
    cross = grams.cross.swapaxes(-3, -2)
    pairs = cross.shape[:-2]
    of_pairs = Gram(
        _for_each_target_head(grams.source_sq_norms, pairs),
        _for_each_source_head(grams.target_sq_norms, pairs),
        cross,
    )
    return _rotated(of_pairs, cross, motion)


def _problems_of_pairs(cost_of: CostOf, grams: Gram, masses: Masses) -> TransportProblem:
    """Sets up the problems of all pairs of heads: `[*batch, heads, heads of the target, n, m]`."""
    # From [*batch, heads, n, heads of the target, m].
    cross = grams.cross.swapaxes(-3, -2)
    pairs = cross.shape[:-2]
    source_sq_norms = _for_each_target_head(grams.source_sq_norms, pairs)
    target_sq_norms = _for_each_source_head(grams.target_sq_norms, pairs)
    source_masses, target_masses = masses
    if source_masses is not None:
        source_masses = _for_each_target_head(source_masses, pairs)
    if target_masses is not None:
        target_masses = _for_each_source_head(target_masses, pairs)
    intra = None
    if grams.intra is not None:
        source_intra, target_intra = intra_costs(cost_of, grams)
        intra = (
            _for_each_target_head(source_intra, pairs),
            _for_each_source_head(target_intra, pairs),
        )
    cost = cost_of(Gram(source_sq_norms, target_sq_norms, cross))
    return TransportProblem(cost, source_masses, target_masses, intra)


def _for_each_target_head(x: Array, pairs: tuple[int, ...]) -> Array:
    """Repeats `[*batch, heads, ...]` of the source as `[*pairs, ...]`."""
    xp = array_module(x)
    x = xp.expand_dims(x, len(pairs) - 1)
    return xp.broadcast_to(x, (*pairs, *x.shape[len(pairs) :]))


def _for_each_source_head(x: Array, pairs: tuple[int, ...]) -> Array:
    """Repeats `[*batch, heads, ...]` of the target as `[*pairs, ...]`."""
    xp = array_module(x)
    x = xp.expand_dims(x, len(pairs) - 2)
    return xp.broadcast_to(x, (*pairs, *x.shape[len(pairs) :]))


def _solve_alike_at_once(
    solver: AbstractSolver, problems: Sequence[TransportProblem]
) -> list[Solution]:
    """Solves stacks of problems; those in a row that have one shape share a copy of the solver."""
    runs: list[list[TransportProblem]] = []
    last_form = None
    for problem in problems:
        form = _form(problem)
        if form != last_form:
            runs.append([])
        runs[-1].append(problem)
        last_form = form
    solutions = []
    for run in runs:
        stacked = solve_stack(solver, jax.tree.map(lambda *x: array_module(*x).stack(x), *run))
        for number in range(len(run)):
            solutions.append(jax.tree.map(operator.itemgetter(number), stacked))
    return solutions


def _form(problem: TransportProblem) -> Any:
    """Returns which arrays a problem has, and their shapes."""
    arrays, treedef = jax.tree.flatten(problem)
    return treedef, [x.shape for x in arrays]


def picked(pairs: Array, plan: Array) -> Array:
    """Picks for each head of the target what belongs to the pair with the head that goes there.

    Args:
        pairs: What is known of each pair of heads, `[*batch, heads, heads, ...]`.
        plan: The permutation of the heads, int `[*batch, heads]`.

    Returns:
        `pairs[*batch, plan[*batch, j], j]` for all `j`, `[*batch, heads, ...]`.
    """
    source_axis = plan.ndim - 1
    inner_rank = pairs.ndim - plan.ndim - 1
    index = plan.reshape(*plan.shape[:-1], 1, plan.shape[-1], *[1] * inner_rank)
    return taken(pairs, index, source_axis).squeeze(source_axis)


def overlap(grams: Sequence[Gram], plans: Sequence[Array]) -> Array:
    """Takes the inner product of the moved source with the target.

    Args:
        grams: The inner products of a group's units, then of those of each group nested in it.
        plans: The plans of these groups, permutations or orthogonal matrices.

    Returns:
        The sum over all weights that the groups were compared by, float `[]`.
    """
    # This is linear in the plan: Σ_j <source unit plan[j], target unit j> of a permutation, and
    # <Q, cross> of a rotation Q.
    root_plan = plans[0]
    total = None
    for inside, plan in zip(grams, plans, strict=True):
        around = None if total is None else root_plan
        term = _matched(inside.cross, plan, around)
        if inside.even is not None:
            unsigned = plan if is_permutation(plan) else abs(plan)
            term += _matched(inside.even, unsigned, around)
        total = term if total is None else total + term
    assert total is not None
    return total


def _matched(cross: Array, plan: Array, root_plan: Array | None) -> Array:
    """Sums up the inner products of units that a plan brings together."""
    if root_plan is not None:
        # Nested units: of each head of the target, those of the head that goes there.
        cross = picked(cross.swapaxes(-3, -2), root_plan)
    if is_permutation(plan):
        # cross[..., plan[..., j], j] for all j.
        return taken(cross, plan[..., None, :], cross.ndim - 2).sum()
    return (cross * plan).sum()
