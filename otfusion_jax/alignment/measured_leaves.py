"""Distances that an alignment knows already when it ends.

A group is matched by the inner products of its units. If these units are all there is of some
parameters, and no later group moves them, then the sum of the inner products that the plan brings
together tells how far the moved parameters are from the target's: neither have they to be moved to
find out, nor gone over once more.
"""

from collections.abc import Sequence

import numpy as np

from otfusion_jax.alignment.costs import Gram, as_real
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.moved_leaves import are_same_widths
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.common.host import Array, inner_product
from otfusion_jax.symmetry.groups import Member
from otfusion_jax.symmetry.plans import is_permutation

LEAST_SHARE = 0.01
"""Of the squared norms of parameters: a smaller distance is not told by their inner products."""

Leaves = tuple[int, ...]
"""Positions in `Symmetry.parts`."""


class MeasuredLeaves:
    """The squared distances of parameters that have been seen while their units were matched.

    Args:
        problem: The alignment problem. Where NumPy does not compute, nothing is measured: there it
            takes little to go over the parameters.
    """

    def __init__(self, problem: AlignmentProblem) -> None:
        self._problem = problem
        self._compared: dict[str, Leaves] = {}
        self._sq_norms: dict[Leaves, float] = {}
        self._after: dict[Leaves, float] = {}

    def note_compared(self, tree: GroupTree, members: Sequence[Member]) -> None:
        """Notes by what the units of a group tree are compared, if that can be measured.

        Args:
            tree: The group tree.
            members: The members of its root, whose parameters no later group moves.
        """
        problem, group = self._problem, tree.groups[0]
        if problem.xp is not np or problem.lazy or len(tree.groups) > 1 or tree.siblings:
            return
        if group.batch or group.signed or group.orthogonal:
            return
        for member in members:
            partition = problem.symmetry.numbered_leaves[member.leaf].structure.partition
            is_one_block = all(len(axis_blocks) == 1 for axis_blocks in partition.axes)
            if not is_one_block or not are_same_widths(problem.symmetry, problem.onto, member.leaf):
                return
        leaves = tuple([member.leaf for member in members])
        if len(set(leaves)) == len(leaves):
            self._compared[group.name] = leaves

    def note_solved(self, tree: GroupTree, grams: Gram, plan: Array) -> None:
        """Measures the parameters that a group tree was compared by.

        Args:
            tree: The group tree.
            grams: The inner products of the units of its root.
            plan: The plan of its root.
        """
        leaves = self._compared.get(tree.groups[0].name)
        if leaves is None or not is_permutation(plan) or not (plan < len(plan)).all():
            return
        sq_norms = 0.0
        for of_units in (grams.source_sq_norms, grams.target_sq_norms):
            sq_norms += float(np.sum(of_units, dtype=np.float64))
        matched = grams.cross[plan, np.arange(len(plan))]
        self._sq_norms[leaves] = sq_norms
        _note(self._after, leaves, sq_norms, float(np.sum(matched, dtype=np.float64)))

    def before(self) -> dict[Leaves, float]:
        """Returns the squared distances of the parameters as they were given."""
        distances: dict[Leaves, float] = {}
        for leaves, sq_norms in self._sq_norms.items():
            product = 0.0
            for leaf in leaves:
                source, target = self._problem.source[leaf], self._problem.target[leaf]
                product += float(inner_product(as_real(source), as_real(target)))
            _note(distances, leaves, sq_norms, product)
        return distances

    def after(self) -> dict[Leaves, float]:
        """Returns the squared distances of the moved parameters."""
        return self._after


def _note(distances: dict[Leaves, float], leaves: Leaves, sq_norms: float, product: float) -> None:
    """Notes `|x|² + |y|² - 2 x·y`, unless too little is left of the difference to know it."""
    distance = sq_norms - 2 * product
    if distance > LEAST_SHARE * sq_norms:
        distances[leaves] = distance
