"""Which groups index a leaf, and by which dimensions of its blocks.

A leaf is taken apart into blocks (see `partition`) once for all groups that have members in it, so
that each of them is a dimension of the blocks, whichever of them move.

A network of many blocks has many leaves of a few structures, which differ in nothing but names. A
`NumberedLeaf` has numbers in the place of the names. Equal leaves then share one structure, and
what is jitted with it as a static argument is compiled once for all of them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

from otfusion_jax.common.host import Array
from otfusion_jax.symmetry.blocks import Block, BlockDim
from otfusion_jax.symmetry.groups import Group, Member
from otfusion_jax.symmetry.location import LocatedFactor
from otfusion_jax.symmetry.partition import BlockPartition, partition_of


class UnitAxis(NamedTuple):
    """A unit axis: one member of a group, and which dimensions of its leaf's blocks it is.

    Attributes:
        group: The group.
        member: The member.
        dim: The label of the dimension that the units are.
        levels: The labels of the dimensions that the axes of the group's batch are, outermost
            first. Of units that are nested in heads, the last is the label of the heads.
    """

    group: Group
    member: Member
    dim: BlockDim
    levels: tuple[BlockDim, ...]

    def is_in(self, block: Block) -> bool:
        """Returns whether a block has the dimensions of the units and of their batch.

        Args:
            block: A block of the leaf.
        """
        for dim in (self.dim, *self.levels):
            if dim not in block.dims:
                return False
        return True


# Compared by identity, which is what makes it a cheap static argument.
@dataclasses.dataclass(frozen=True, eq=False)
class LeafStructure:
    """How a leaf falls into blocks, and which groups index it.

    Attributes:
        partition: How the leaf falls into blocks.
        unit_axes: The members that lie in the leaf. Of groups that are nested in each other, the
            outer one comes first.
    """

    partition: BlockPartition
    unit_axes: tuple[UnitAxis, ...]


def leaf_structure_of(shape: tuple[int, ...], members: list[tuple[Group, Member]]) -> LeafStructure:
    """Works out how an array falls into blocks.

    Args:
        shape: The shape of the array.
        members: The members that lie in it, each with its group.

    Returns:
        The structure, with the members in the order given.
    """
    # Units that several members share, as those of a group and of the batch nested in it, are one
    # factor. The numbers count factors in the order in which they are met.
    numbers: dict[LocatedFactor, int] = {}
    unit_axes = []
    for group, member in members:
        location = member.location
        levels = []
        for (axis, _, index), size in zip(location.batch, group.batch, strict=True):
            factor = LocatedFactor(axis, index, size)
            level = numbers.setdefault(factor, len(numbers))
            levels.append(level)
        factor = LocatedFactor(location.axis, location.index, group.size)
        dim = numbers.setdefault(factor, len(numbers))
        unit_axis = UnitAxis(group, member, dim, tuple(levels))
        unit_axes.append(unit_axis)
    partition = partition_of(shape, tuple(numbers))
    return LeafStructure(partition, tuple(unit_axes))


class NumberedLeaf(NamedTuple):
    """A leaf whose groups have numbers in the place of their names.

    Attributes:
        structure: The structure, whose groups are called `"0"`, `"1"`, ... and have no members.
            Leaves of one shape, which are indexed in the same way, have the same one.
        names: The name in the symmetry of each of these groups.
    """

    structure: LeafStructure
    names: tuple[str, ...]

    def plans(self, plans: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the plans of the groups in the leaf, by their numbers.

        Args:
            plans: Group name to plan; groups that are left out stay.
        """
        numbered = {}
        for number, name in enumerate(self.names):
            if name in plans:
                numbered[str(number)] = plans[name]
        return numbered

    def plans_by_name(self, plans: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the plans of the groups in the leaf, by their names.

        Args:
            plans: Group name to plan; groups that are left out stay.
        """
        named = {}
        for name in self.names:
            if name in plans:
                named[name] = plans[name]
        return named


def numbered_leaf(shape: tuple[int, ...], structure: LeafStructure) -> NumberedLeaf:
    """Puts numbers in the place of the names of a leaf's groups.

    Args:
        shape: The shape of the leaf.
        structure: The structure of the leaf.

    Returns:
        The leaf with numbered groups.
    """
    numbers: dict[str, str] = {}
    members = []
    for unit_axis in structure.unit_axes:
        group, member = unit_axis.group, unit_axis.member
        name = numbers.setdefault(group.name, str(len(numbers)))
        outer = None
        if group.outer is not None:
            outer = numbers.setdefault(group.outer, str(len(numbers)))
        numbered_group = dataclasses.replace(group, name=name, members=(), outer=outer)
        numbered_member = dataclasses.replace(member, leaf=0, path="")
        members.append((numbered_group, numbered_member))
    return NumberedLeaf(_shared_structure(shape, tuple(members)), tuple(numbers))


@functools.cache
def _shared_structure(
    shape: tuple[int, ...], members: tuple[tuple[Group, Member], ...]
) -> LeafStructure:
    """Makes one structure for all leaves of a kind, of which there are few."""
    return leaf_structure_of(shape, list(members))
