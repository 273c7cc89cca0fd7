"""Distances that an alignment knows already when it ends.

A group is matched by the inner products of its units. If these units are all there is of some
parameters, and no later group moves them, then the sum of the inner products that the plan brings
together tells how far the moved parameters are from the target's: neither have they to be moved to
find out, nor gone over once more.
"""

from collections.abc import Sequence

import numpy as np

from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.moved_leaves import are_same_widths
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.common.host import Array
from otfusion_jax.symmetry.groups import Member, Plans
from otfusion_jax.symmetry.plans import is_identity, is_permutation

LEAST_SHARE = 0.1
"""Of the squared norms of parameters: a smaller distance is not told by their inner products, which
are rounded by up to some millionths of the norms."""

Leaves = tuple[int, ...]
"""Positions in `Symmetry.parts`."""


class MeasuredLeaves:
    """The squared distances of parameters that have been seen while their units were matched.

    Attributes:
        before: The squared distances of the parameters as they were given.
        after: Those of the moved parameters.

    Args:
        problem: The alignment problem. Where NumPy has not taken the squared norms, nothing is
            measured: elsewhere it takes little to go over the parameters.
    """

    def __init__(self, problem: AlignmentProblem) -> None:
        self._problem = problem
        self._compared: dict[str, Leaves] = {}
        self.before: dict[Leaves, float] = {}
        self.after: dict[Leaves, float] = {}

    def note_compared(self, tree: GroupTree, members: Sequence[Member], plans: Plans) -> None:
        """Notes by what the units of a group tree are compared, if that can be measured.

        Args:
            tree: The group tree.
            members: The members of its root, whose parameters no later group moves.
            plans: The plans of all groups so far.
        """
        problem, group = self._problem, tree.groups[0]
        if problem.sums is None or problem.lazy or len(tree.groups) > 1 or tree.siblings:
            return
        if group.batch or group.orthogonal:
            return
        for member in members:
            if member.leaf not in problem.sums.products:
                return
            leaf = problem.symmetry.numbered_leaves[member.leaf]
            is_one_block = all(len(blocks) == 1 for blocks in leaf.structure.partition.axes)
            if not is_one_block or not are_same_widths(problem.symmetry, problem.onto, member.leaf):
                return
            # Only permutations leave every norm as it is, to the last digit.
            if not all(is_permutation(plan) for plan in leaf.plans_by_name(plans).values()):
                return
        leaves = tuple([member.leaf for member in members])
        if len(set(leaves)) == len(leaves):
            self._compared[group.name] = leaves

    def leaves_of(self, tree: GroupTree) -> Leaves:
        """Returns the parameters that tell a group tree's distances, none if it can't be measured.

        Args:
            tree: The group tree, once it has been compared.
        """
        return self._compared.get(tree.groups[0].name, ())

    def note_solved(self, tree: GroupTree, grams: Gram, plan: Array) -> None:
        """Measures the parameters that a group tree was compared by.

        Args:
            tree: The group tree.
            grams: The inner products of the units of its root.
            plan: The plan of its root.
        """
        leaves, sums = self.leaves_of(tree), self._problem.sums
        if not leaves or sums is None or not is_permutation(plan) or not (plan < len(plan)).all():
            return
        # What has stayed is at one distance before and after, not at two that are rounded.
        if is_identity(plan):
            return
        sq_norms, product = 0.0, 0.0
        # Sums over units, each of a long sum, would be rounded by more.
        for leaf in leaves:
            sq_norms += sums.sq_norms[leaf]
            product += sums.products[leaf]
        _note(self.before, leaves, sq_norms, product)
        matched = grams.cross[plan, np.arange(len(plan))]
        _note(self.after, leaves, sq_norms, float(np.sum(matched, dtype=np.float64)))


def _note(distances: dict[Leaves, float], leaves: Leaves, sq_norms: float, product: float) -> None:
    """Notes `|x|² + |y|² - 2 x·y`, unless too little is left of the difference to know it."""
    distance = sq_norms - 2 * product
    if distance > LEAST_SHARE * sq_norms:
        distances[leaves] = distance
