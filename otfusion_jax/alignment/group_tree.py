"""Group trees: a group, and those of the groups nested in it that are matched together with it.

Which head is which cannot be told before the units inside of the heads are matched, and how these
match depends on which heads are compared. So a group (heads) and what is nested in it (the
dimensions of each head) are one subproblem, and `group_trees_of` sorts the groups of a symmetry
into such trees. A group on its own, as in networks without heads, is a tree of one.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from otfusion_jax.symmetry.groups import Group, Member, Motion
from otfusion_jax.symmetry.symmetry import Symmetry


@dataclasses.dataclass(frozen=True)
class GroupTree:
    """A group and groups nested in it, which are matched together.

    Attributes:
        groups: The root, and after it the groups nested in each index of the root.
        siblings: The groups nested in the root that belong to another tree. When the root moves,
            they are carried along.
    """

    groups: tuple[Group, ...]
    siblings: tuple[Group, ...] = ()

    @property
    def motions(self) -> tuple[Motion, ...]:
        """By which matrices the units of each group are multiplied."""
        return tuple([group.motion for group in self.groups])

    def root_members_around(self, member: Member) -> list[Member]:
        """Finds the members of the root that say in which of its indices some units are.

        Args:
            member: A member of a nested group. One of the root has nothing of the root around it.

        Returns:
            The members of the root in the same leaf, at the place of the innermost axis of the
            batch.
        """
        root = self.groups[0]
        if member in root.members:
            return []
        # The last axis of a nested unit's batch is the one that the root's units lie along.
        batch_axis, _, batch_index = member.location.batch[-1]
        around = []
        for candidate in root.members:
            location = candidate.location
            same_axis = candidate.leaf == member.leaf and location.axis == batch_axis
            if same_axis and location.index == batch_index:
                around.append(candidate)
        return around


def group_trees_of(symmetry: Symmetry) -> tuple[GroupTree, ...]:
    """Sorts groups by what they are nested in.

    Args:
        symmetry: The symmetry whose groups are sorted.

    Returns:
        The group trees in dataflow order: one for each group that is in no other, or several if
        those nested in it are coupled. Then the root is matched anew with each of them.
    """
    # The symmetry has its groups in dataflow order, and this keeps it.
    groups_in: dict[str | None, list[Group]] = {}
    for group in symmetry.groups:
        groups_in.setdefault(group.outer, []).append(group)
    coupled_pairs = _coupled_pairs(symmetry) if len(groups_in) > 1 else set()
    trees = []
    for root in groups_in.get(None, []):
        nested = groups_in.get(root.name, [])
        if not nested:
            trees.append(GroupTree((root,)))
            continue
        # Each set of nested groups has a tree of its own, with the same root.
        for together in _without_coupling(nested, coupled_pairs):
            siblings = [group for group in nested if group not in together]
            trees.append(GroupTree((root, *together), tuple(siblings)))
    return tuple(trees)


def _without_coupling(
    nested: Sequence[Group], coupled_pairs: set[frozenset[str]]
) -> list[list[Group]]:
    """Distributes groups over sets without coupled pairs, each to the first set that takes it."""
    sets: list[list[Group]] = []
    for group in nested:
        for chosen in sets:
            pairs = {frozenset((group.name, other.name)) for other in chosen}
            if pairs.isdisjoint(coupled_pairs):
                chosen.append(group)
                break
        else:
            sets.append([group])
    return sets


def _coupled_pairs(symmetry: Symmetry) -> set[frozenset[str]]:
    """Finds the pairs of groups, nested in one and the same, that share a block of a parameter.

    What either gains by moving depends on where the other is: they cannot be matched at once.
    """
    pairs = set()
    for structure in symmetry.leaf_structures:
        for one, other in itertools.combinations(structure.unit_axes, 2):
            same_outer = one.group.outer and one.group.outer == other.group.outer
            if same_outer and one.group is not other.group:
                # In different blocks of a leaf (queries, values) they do not meet.
                if structure.partition.together({one.dim, other.dim}):
                    pairs.add(frozenset((one.group.name, other.group.name)))
    return pairs
