"""Matching a group jointly with what is nested in it.

Which head is which can't be told before the units inside of it are matched: the cost between two
heads is that of their best match inside. So all pairs of heads are solved, then the heads, and each
head keeps the match that it was chosen for.
"""

import dataclasses
from collections.abc import Collection

from otfusion_jax.symmetry.groups import Group, Member
from otfusion_jax.symmetry.symmetry import Symmetry


@dataclasses.dataclass(frozen=True)
class GroupTree:
    """A group and the groups nested in it.

    Attributes:
        root: the group around.
        nested: the groups in each index of it.
    """

    root: Group
    nested: tuple[Group, ...] = ()

    def split(self, chosen: Collection[Member]) -> list[tuple[Group, list[Member]]]:
        """Returns the chosen members of each group; of the root those with nothing nested in it."""
        inside = [m for group in self.nested for m in group.members]
        kept = {id(m) for n in inside for m in self.beside(n) if m is not n}
        own = [m for m in self.root.members if m in chosen and id(m) not in kept]
        rest = [(g, [m for m in g.members if m in chosen]) for g in self.nested]
        return [(self.root, own), *rest]

    def beside(self, member: Member) -> list[Member]:
        """Returns a member; with a nested one, the root's that say in which index it is."""
        if not self.nested or member in self.root.members:
            return [member]
        axis, _, place = member.location.batch[-1]
        roots = (m for m in self.root.members if m.leaf == member.leaf)
        return [member, *(m for m in roots if (m.axis, m.location.index) == (axis, place))]


def group_trees_of(symmetry: Symmetry) -> tuple[GroupTree, ...]:
    """Sorts groups by what they are nested in.

    Args:
        symmetry: whose groups.

    Returns:
        Families in dataflow order: one for each group that is in no other, or several if those
        nested in it are coupled. Then the root is matched anew with each of them, and the others
        are carried along, each with the index of the root that it is in.
    """
    inside: dict[str | None, list[Group]] = {}
    for group in symmetry.groups:
        inside.setdefault(group.outer, []).append(group)
    coupled = _coupled(symmetry)
    group_trees: list[GroupTree] = []
    for root in inside.get(None, ()):
        sets: list[list[Group]] = []
        for group in inside.get(root.name, ()):
            apart = (s for s in sets if not any({group.name, g.name} in coupled for g in s))
            found = next(apart, None)
            if found is None:
                sets.append([group])
            else:
                found.append(group)
        group_trees += [GroupTree(root, tuple(nested)) for nested in sets or [[]]]
    return tuple(group_trees)


def _coupled(symmetry: Symmetry) -> list[set[str]]:
    """Finds the pairs of groups, nested in one and the same, that one array of numbers has both of.

    What either gains by moving depends on where the other is: they can't be matched at once.
    """
    found = []
    for partition, unit_axes in symmetry.leaf_structures:
        for number, use in enumerate(unit_axes):
            for other in unit_axes[:number]:
                outer = use.group.outer
                if outer and outer == other.group.outer and use.group is not other.group:
                    if partition.together({use.dim, other.dim}):
                        found.append({use.group.name, other.group.name})
    return found
