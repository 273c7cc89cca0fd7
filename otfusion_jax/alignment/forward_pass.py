"""Algorithm 1 of Singh and Jaggi: one pass over the groups in dataflow order.

Each group is matched by the weights (or activations) that produce it, with what came before already
in place. `ForwardSweep` is that pass, for the loop in `visit`; coordinate descent starts from it.
"""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from ott.geometry import costs

from otfusion_jax.alignment.costs import DEGREES, Gram
from otfusion_jax.alignment.descent_state import DescentState, initial_state
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.measured_leaves import MeasuredLeaves
from otfusion_jax.alignment.method import AbstractMethod, Alignment
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.alignment.progress import Progress, digests
from otfusion_jax.alignment.visit import AbstractSweep, visit_group_trees
from otfusion_jax.common.arguments import require_flag
from otfusion_jax.common.host import as_jax, program
from otfusion_jax.solvers.base import Solution
from otfusion_jax.solvers.procrustes import told_part, whole_rotation
from otfusion_jax.symmetry.groups import Group, Member

Members = Literal["producing", "all"]


@dataclasses.dataclass(frozen=True)
class ForwardPass(AbstractMethod):
    """Algorithm 1: one pass over the groups in dataflow order.

    With weights, units are compared by the members that produce them, whose consuming axes are
    already in place: the rows of incoming weights. Of a group that is written in several places (a
    residual stream), those count whose inputs have been matched by then. With inner products of
    activations (`grams`), units are compared by these, group by group; groups that are left out of
    them by weights.

    Attributes:
        unit_norm: Whether to scale units to norm 1 for the cost, as the original does on request.
        members: Which weights make up a unit: those that produce it (`"producing"`), as in the
            paper, or those that consume it as well (`"all"`), in the order in which they are.
        progress: A folder in which plans are kept as they are found, so that an alignment that was
            killed goes on from there when it is called again. None keeps nothing.

    References:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, Algorithm 1.
    """

    unit_norm: bool = False
    members: Members = "producing"
    progress: Path | None = None

    def __post_init__(self) -> None:
        require_flag(self, "unit_norm")
        if self.progress is not None and not isinstance(self.progress, Path):
            raise TypeError(f"progress is {self.progress!r}; give the pathlib.Path of a folder")
        if self.members not in ("producing", "all"):
            raise ValueError(f"members is {self.members!r}; it must be 'producing' or 'all'")

    def run(self, problem: AlignmentProblem, grams: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`.

        Raises:
            ValueError: If there is a folder for progress inside of `jax.jit`, or it has the plans
                of another call: of other models, in another order, or with other arguments.
        """
        measured = MeasuredLeaves(problem)
        sweep = ForwardSweep(
            problem, problem.metric, grams, self.unit_norm, self.members, measured=measured
        )
        start = initial_state(problem)
        state = start
        if self.progress is not None:
            if not problem.known:
                raise ValueError("progress can be kept outside of jax.jit alone; leave it None")
            settings = repr(dataclasses.replace(self, progress=None))
            call = digests(problem, settings, grams, problem.distance(start.plans))
            progress = Progress(self.progress, call)
            state, solved = progress.resumed(start, measured)
            state = state if problem.xp is np else as_jax(state)
            sweep = dataclasses.replace(sweep, progress=progress, solved=solved)
        state = visit_group_trees(problem, state, [sweep])
        before = problem.distance(start.plans, measured.before)
        after = problem.distance(state.plans, measured.after)
        history = problem.xp.stack([before, after])
        return Alignment(state.plans, after, history, state.all_converged(), state.gaps)

    def cost_degree(self, metric: costs.CostFn, by_grams: bool) -> int:
        """See `AbstractMethod.cost_degree`."""
        # Neither activations nor units of norm 1 scale with the weights.
        if by_grams or self.unit_norm:
            return 0
        return DEGREES.get(type(metric), 2)


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardSweep(AbstractSweep):
    """How each group tree is solved in Algorithm 1, once the trees before it are in place.

    Attributes:
        problem: The alignment problem.
        metric: The ground metric that units are compared by.
        grams: The inner products of activations by the names of groups. The others, or all if it is
            None, are compared by weights.
        unit_norm: Whether to scale units to norm 1.
        members: Which weights make up a unit, see `ForwardPass`.
        progress: Where plans are kept; None keeps none.
        solved: The positions of the group trees that were solved before.
        measured: Where distances are noted that are known by the way. None notes none.
        told_alone: Whether a group that rotates is moved as far as its inner products tell, and
            what they do not tell is left out until `completed` is called. Of a stream that few
            inputs write that is most of it, and later groups would be matched by noise.
    """

    problem: AlignmentProblem
    metric: costs.CostFn
    grams: dict[str, Gram] | None = None
    unit_norm: bool = False
    members: Members = "producing"
    progress: Progress | None = None
    solved: Collection[int] = ()
    measured: MeasuredLeaves | None = None
    told_alone: bool = False

    def is_settled(self, tree: GroupTree, state: DescentState) -> bool:
        """See `AbstractSweep.is_settled`."""
        return bool(self.solved) and self._position_of(tree) in self.solved

    def _position_of(self, tree: GroupTree) -> int:
        positions = [other is tree for other in self.problem.group_trees]
        return positions.index(True)

    def compare(self, tree: GroupTree, state: DescentState) -> list[Gram]:
        """See `AbstractSweep.compare`."""
        # Groups of a tree are given together, or not at all.
        if self.grams is not None and tree.groups[0].name in self.grams:
            compared = []
            for group in tree.groups:
                grams = self.grams[group.name]
                if not self.problem.solver.quadratic:
                    # A descent sweep in the same program has none, and branches must be alike.
                    grams = dataclasses.replace(grams, intra=None)
                compared.append(grams)
        else:
            members = []
            for group in tree.groups:
                if self.members == "all":
                    members.append(group.members)
                else:
                    in_place = _members_in_place(self.problem, tree, group)
                    members.append(in_place.members)
                    # Units of norm 1 tell no distances.
                    measurable = not in_place.waiting and not self.unit_norm
                    if self.measured is not None and measurable:
                        self.measured.note_compared(tree, in_place.members, state.plans)
            norms = self._needs_norms(tree)
            compared = self.problem.compare(tree, state.plans, members, norms)
        if self.unit_norm:
            compared = [_normalised(grams) for grams in compared]
        return compared

    def _needs_norms(self, tree: GroupTree) -> bool:
        """Whether a tree's cost needs norms: not that of permutations by squared distances."""
        by_distances = isinstance(self.metric, costs.SqEuclidean) and not self.unit_norm
        # Elsewhere norms are part of a larger program, and take little.
        by_numpy = self.problem.xp is np
        is_assignment = self.problem.assignment_solver(tree) is not None
        return not (by_distances and by_numpy and is_assignment)

    def accept(
        self,
        tree: GroupTree,
        state: DescentState,
        grams: list[Gram],
        solutions: list[Solution],
    ) -> DescentState:
        """See `AbstractSweep.accept`. Here every plan is kept."""
        new_plans = [solution.plan for solution in solutions]
        if self._is_told_in_part(tree):
            new_plans[0] = told_part(grams[0].cross, new_plans[0], tree.groups[0].fixes_ones)
        plans = self.problem.plans_after(tree, state.plans, new_plans)
        after = state.after(tree, solutions, plans, self.problem.xp.asarray(True))
        if self.measured is not None:
            self.measured.note_solved(tree, grams[0], new_plans[0])
            if self.progress is not None:
                leaves = self.measured.leaves_of(tree)
                self.progress.save(self._position_of(tree), plans, after, self.measured, leaves)
        return after

    def completed(self, state: DescentState) -> DescentState:
        """See `AbstractSweep.completed`. What was moved as far as it was told moves as a whole."""
        whole = {}
        for tree in self.problem.group_trees:
            if self._is_told_in_part(tree):
                group = tree.groups[0]
                whole[group.name] = whole_rotation(state.plans[group.name], group.fixes_ones)
        return dataclasses.replace(state, plans=state.plans | whole)

    def _is_told_in_part(self, tree: GroupTree) -> bool:
        """Whether what is not told of a tree is left out: its group rotates among as many units."""
        group = tree.groups[0]
        is_square = group.size == self.problem.target_groups[group.name].size
        return self.told_alone and group.rotates and is_square


@program()
def _normalised(grams: Gram) -> Gram:
    return grams.normalised()


class _InPlace(NamedTuple):
    """By what a group is matched.

    Attributes:
        members: The members.
        waiting: Whether their parameters have units of groups that are not in place yet.
    """

    members: Sequence[Member]
    waiting: bool


def _members_in_place(problem: AlignmentProblem, tree: GroupTree, group: Group) -> _InPlace:
    """Returns the members that produce a group out of earlier groups or of what is pinned.

    What a later group is added from (the blocks of a residual stream) is still in the source's
    order, and would be noise. If nothing is in place, all members count.
    """
    # Where a group is on both axes of a leaf, its own inputs there are not in place yet.
    waiting = leaves_used_twice(group)
    is_later = False
    for other in problem.group_trees:
        if is_later:
            for later_group in other.groups:
                # A root of several trees is in the later ones again, and does not wait for itself.
                if later_group is not tree.groups[0]:
                    for member in later_group.members:
                        waiting.add(member.leaf)
        is_later = is_later or other is tree
    candidates = group.having("produces") or group.members
    in_place = []
    for member in candidates:
        if member.leaf not in waiting:
            in_place.append(member)
    return _InPlace(in_place or candidates, waiting=not in_place)


def leaves_used_twice(group: Group) -> set[int]:
    """Finds the leaves that have a group on two axes, which makes a quadratic problem of it.

    Args:
        group: The group.

    Returns:
        The positions of these leaves in `Symmetry.parts`.
    """
    first_axes: dict[int, int] = {}
    used_twice = set()
    for member in group.members:
        axis = member.location.axis
        if first_axes.setdefault(member.leaf, axis) != axis:
            used_twice.add(member.leaf)
    return used_twice
