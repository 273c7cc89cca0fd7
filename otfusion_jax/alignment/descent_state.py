"""What is known while groups are solved one after the other, and what it is at the start."""

import dataclasses
import functools
import operator
from collections.abc import Sequence

import jax
import numpy as np

from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.common.host import Array, array_module, as_numpy
from otfusion_jax.solvers.base import Solution, TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.groups import Group, Plans
from otfusion_jax.symmetry.plans import is_permutation
from otfusion_jax.symmetry.rotation import orthonormal_identity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DescentState:
    """What is known while group trees are solved one after the other.

    Attributes:
        plans: The plans of all groups so far, by name.
        gaps: The duality gap of each group's last solve, float `[]`, by name.
        converged: Whether the last solve of each group has converged, bool `[]`, by name.
        improved: Whether any plan has been accepted since the last reset, bool `[]`.
    """

    plans: Plans
    gaps: dict[str, Array]
    converged: dict[str, Array]
    improved: Array

    def after(
        self, tree: GroupTree, solutions: Sequence[Solution], plans: Plans, improved: Array
    ) -> "DescentState":
        """Returns the state after one more group tree has been solved.

        Args:
            tree: The group tree.
            solutions: The solution for each of its groups.
            plans: The plans that change, by name: those of the tree, and what is carried along.
            improved: Whether they are taken for an improvement, bool `[]`.
        """
        gaps = dict(self.gaps)
        converged = dict(self.converged)
        for group, solution in zip(tree.groups, solutions, strict=True):
            # Of what was solved, and so also where the plan has been turned down.
            gaps[group.name] = solution.gap
            converged[group.name] = solution.converged
        return DescentState(self.plans | plans, gaps, converged, self.improved | improved)

    def all_converged(self) -> Array:
        """Whether the last solves of all groups have converged, bool `[]`."""
        return functools.reduce(operator.and_, self.converged.values())


def initial_state(problem: AlignmentProblem) -> DescentState:
    """Makes the state in which everything is in place, in the form that the solver returns.

    Args:
        problem: The alignment problem.

    Returns:
        The state, with plans that move nothing, or where widths differ keep the order.
    """
    xp = problem.xp
    plans = problem.symmetry.identity()
    if xp is np:
        plans = as_numpy(plans)
    gaps = {}
    converged = {}
    outer_names = set()
    for group in problem.symmetry.groups:
        outer_names.add(group.outer)
    for group in problem.symmetry.groups:
        target_group = problem.target_groups[group.name]
        if group.rotates or (group.orthogonal and group.size == target_group.size):
            n, m = group.size, target_group.size
            plan = orthonormal_identity(n, m, fixes_ones=group.fixes_ones).astype(problem.dtype)
            plan = xp.asarray(np.broadcast_to(plan, (*group.batch, n, m)))
            plans[group.name] = _for_pairs(plan, group, target_group)
            gaps[group.name] = xp.zeros((), problem.dtype)
            converged[group.name] = xp.asarray(True)
            continue
        # What has groups nested in it is always matched exactly, see `solve_tree`.
        solver = Exact() if group.name in outer_names else problem.solver
        # A loop needs plans of one form from start to end. Only the solver knows whether it
        # returns permutations, so it is asked, without being run.
        solution = solver.form(_abstract_problem(problem, group, target_group))
        gaps[group.name] = xp.zeros(solution.gap.shape, solution.gap.dtype)
        converged[group.name] = xp.asarray(True)
        plan = plans[group.name]
        if not is_permutation(solution.plan):
            n, m = group.size, target_group.size
            coupling = _order_keeping_coupling(n, m).astype(solution.plan.dtype)
            plan = xp.broadcast_to(coupling, (*group.batch, n, m))
        plans[group.name] = _for_pairs(plan, group, target_group)
    return DescentState(plans, gaps, converged, xp.asarray(False))


def _for_pairs(plan: Array, group: Group, target_group: Group) -> Array:
    """Repeats the plan inside of each head for all pairs of heads, if heads do not move one to one.

    Args:
        plan: The plan, `[*batch, n]` or `[*batch, n, m]`.
        group: The group of the source.
        target_group: The group of the target.

    Returns:
        The plan, with the heads of the target behind the batch if these are another number.
    """
    if group.outer is None or group.batch[-1] == target_group.batch[-1]:
        return plan
    rank = len(group.batch)
    xp = array_module(plan)
    shape = (*group.batch, target_group.batch[-1], *plan.shape[rank:])
    return xp.broadcast_to(xp.expand_dims(plan, rank), shape)


def _abstract_problem(
    problem: AlignmentProblem, group: Group, target_group: Group
) -> TransportProblem:
    """Returns shapes and dtypes of the transport problem that a group is to be solved by."""
    dtype = problem.dtype
    n, m = group.size, target_group.size
    source_masses, target_masses = problem.marginals
    a = jax.ShapeDtypeStruct((n,), dtype) if group.name in source_masses else None
    b = jax.ShapeDtypeStruct((m,), dtype) if group.name in target_masses else None
    intra = None
    if problem.solver.quadratic:
        intra = jax.ShapeDtypeStruct((n, n), dtype), jax.ShapeDtypeStruct((m, m), dtype)
    cost = jax.ShapeDtypeStruct((n, m), dtype)
    # `eval_shape` takes these in the place of arrays.
    return TransportProblem(cost, a, b, intra)  # pyright: ignore[reportArgumentType]


def _order_keeping_coupling(n: int, m: int) -> np.ndarray:
    """Returns the coupling of uniform masses that keeps the order: the identity where n is m."""
    # Unit i of the source has the mass from i / n to (i + 1) / n. What it shares with unit j of
    # the target is where their intervals meet.
    source_ends = np.arange(n + 1) / n
    target_ends = np.arange(m + 1) / m
    upper = np.minimum(source_ends[1:, None], target_ends[None, 1:])
    lower = np.maximum(source_ends[:-1, None], target_ends[None, :-1])
    return np.maximum(upper - lower, 0)
