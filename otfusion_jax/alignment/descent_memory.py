"""What a descent remembers from sweep to sweep, so that nothing is worked out twice.

A group whose neighbours have not moved since it was solved would be solved to the same end. Where
they have, the inner products change by those of the entries that have moved. A plan that stays is
the same array from sweep to sweep, so that arrays need not be compared to tell.

This is for values that are known. In a program that is traced, every sweep does all there is to do.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.leaf_programs import POSITIONS_AT_ONCE, cross_updated
from otfusion_jax.alignment.problem import AlignmentProblem, position_of
from otfusion_jax.common.host import Array
from otfusion_jax.common.sharding import is_spread
from otfusion_jax.symmetry.groups import Member, Plans
from otfusion_jax.symmetry.leaf_structure import UnitAxis
from otfusion_jax.symmetry.plans import is_permutation

LARGEST_UPDATE = 0.5
"""The share of a neighbour's units that may have moved for an update to take less time than to
compare anew."""

LEAST_WORK = 3e8
"""How many multiplications it has to take to compare anew for an update to be worth a program."""


class _Compared(NamedTuple):
    """The inner products of a group tree, and what they depend on.

    Attributes:
        grams: The inner products of each group of the tree; None if they are not kept.
        plans: The plans under which they were taken, of all groups that share a leaf with the tree.
    """

    grams: list[Gram] | None
    plans: Plans


class _Distance(NamedTuple):
    """The squared distance of a parameter, and what it depends on.

    Attributes:
        value: The squared distance, float `[]`.
        plans: The plans under which it was taken, of all groups in the leaf.
    """

    value: Array
    plans: Plans


class DescentMemory:
    """The inner products of every group tree as they were when it was last solved, and distances.

    Args:
        problem: The alignment problem, of known values.
    """

    def __init__(self, problem: AlignmentProblem):
        self._problem = problem
        self._compared: dict[int, _Compared] = {}
        self._distances: dict[int, _Distance] = {}

    def distance(self, plans: Plans) -> Float[Array, ""]:
        """Takes the squared distance of the moved source to the target.

        Args:
            plans: The plans of all groups.

        Returns:
            What `AlignmentProblem.distance` returns.
        """
        symmetry = self._problem.symmetry
        for number, part in enumerate(symmetry.parts):
            if not part.moves:
                continue
            last = self._distances.get(number)
            if last is None or _moved(last.plans, plans):
                value = self._problem.leaf_distance(number, plans)
                depends_on = symmetry.numbered_leaves[number].plans_by_name(plans)
                self._distances[number] = _Distance(value, depends_on)
        return self._problem.summed([last.value for last in self._distances.values()])

    def is_current(self, tree: GroupTree, plans: Plans) -> bool:
        """Whether nothing has moved since a group tree was compared that its comparison depends on.

        Args:
            tree: The group tree.
            plans: The plans of all groups.
        """
        compared = self._compared.get(id(tree))
        return compared is not None and not _moved(compared.plans, plans)

    def compare(
        self, tree: GroupTree, plans: Plans, members: Sequence[Collection[Member]]
    ) -> list[Gram]:
        """Compares the units of a group tree, see `AlignmentProblem.compare`.

        Args:
            tree: The group tree, one of the problem's.
            plans: The plans of all groups so far, under which the source is compared.
            members: For each group of the tree the members to compare by, the same in every call.

        Returns:
            The inner products of the units of each group of the tree.
        """
        grams = None
        compared = self._compared.pop(id(tree), None)
        if compared is not None and compared.grams is not None:
            grams = self._updated(tree, compared.grams, compared.plans, plans, members)
        # Of a large group, every array that is held while others are made counts.
        compared = None
        if grams is None:
            grams = self._problem.compare(tree, plans, members)
        depends_on = {name: plans[name] for name in self._neighbours(tree)}
        # Costs of all groups together may be larger than a model is.
        kept = None if self._problem.lazy else grams
        self._compared[id(tree)] = _Compared(kept, depends_on)
        return grams

    def _neighbours(self, tree: GroupTree) -> set[str]:
        """Returns the names of the groups on whose plans the inner products of a tree depend."""
        own = {group.name for group in tree.groups}
        # Of heads and what is in them, and of a group on two axes of a leaf, they depend on the
        # plans of these groups themselves.
        counted = set() if len(tree.groups) == 1 and not tree.siblings else own
        for group in tree.groups:
            leaves = [member.leaf for member in group.members]
            if len(set(leaves)) < len(leaves):
                counted = own
            for leaf in leaves:
                for unit_axis in self._problem.symmetry.leaf_structures[leaf].unit_axes:
                    if unit_axis.group.name not in own:
                        counted = counted | {unit_axis.group.name}
        return counted

    def _updated(
        self,
        tree: GroupTree,
        grams: list[Gram],
        last_plans: Plans,
        plans: Plans,
        members: Sequence[Collection[Member]],
    ) -> list[Gram] | None:
        """Brings inner products up to date; None where it takes less time to take them anew."""
        group, *nested = tree.groups
        if nested or tree.siblings or grams[0].intra is not None:
            return None
        # A few units of a parameter that is spread may lie on any of the devices.
        for member in group.members:
            source, target = self._problem.source[member.leaf], self._problem.target[member.leaf]
            if is_spread(source) or is_spread(target):
                return None
        moved = _moved(last_plans, plans)
        updates = []
        work = 0
        for unit_axis in self._problem.compared_axes(tree, members)[0]:
            structure = self._problem.symmetry.leaf_structures[unit_axis.member.leaf]
            names = [other.group.name for other in structure.unit_axes]
            moved_here = [number for number, name in enumerate(names) if name in moved]
            if not moved_here:
                continue
            neighbour = moved_here[0]
            is_simple = self._is_simple(unit_axis, structure.unit_axes[neighbour])
            if len(moved_here) > 1 or not is_simple:
                return None
            updates.append((unit_axis, neighbour))
            work += unit_axis.group.size * self._problem.source[unit_axis.member.leaf].size
        if work < LEAST_WORK:
            return None

        gram = grams[0]
        cross = gram.cross
        moves = {}
        for name in moved:
            if not is_permutation(plans[name]):
                # A rotation moves all units.
                return None
            columns, count = _moves(last_plans[name], plans[name])
            if count > LARGEST_UPDATE * columns.shape[1]:
                return None
            moves[name] = columns, count
        for unit_axis, neighbour in updates:
            leaf = unit_axis.member.leaf
            numbered = self._problem.symmetry.numbered_leaves[leaf]
            unit_axes = self._problem.symmetry.leaf_structures[leaf].unit_axes
            columns, count = moves[unit_axes[neighbour].group.name]
            cross = cross_updated(
                numbered.structure,
                self._problem.onto.leaf_structures[leaf].partition,
                numbered.plans(plans),
                self._problem.source[leaf],
                self._problem.target[leaf],
                cross,
                columns,
                count,
                axis=position_of(unit_axis, unit_axes),
                neighbour=neighbour,
            )
        return [dataclasses.replace(gram, cross=cross)]

    def _is_simple(self, unit_axis: UnitAxis, neighbour: UnitAxis) -> bool:
        """Whether both are groups in no batch, and of the same size in both models."""
        for other in (unit_axis, neighbour):
            target_group = self._problem.target_groups[other.group.name]
            if other.levels or other.group.size != target_group.size:
                return False
        return True


def _moved(old_plans: Plans, plans: Plans) -> set[str]:
    """Returns the names of those groups whose plan is not the same array as before."""
    return {name for name, old_plan in old_plans.items() if plans[name] is not old_plan}


def _moves(old_plan: Array, plan: Array) -> tuple[np.ndarray, np.int32]:
    """Returns where a permutation differs from another, as `cross_updated` takes it, and how often.

    Of every change of one group, the arrays are of one shape, so that one program does for all.
    """
    old, new = np.asarray(old_plan), np.asarray(plan)
    positions = np.flatnonzero(old != new)
    size = -(-len(new) // POSITIONS_AT_ONCE) * POSITIONS_AT_ONCE
    columns = np.zeros((3, size), np.int32)
    columns[:, : len(positions)] = positions, old[positions], new[positions]
    return columns, np.int32(len(positions))
