"""What `trace_symmetry` finds: which parameter axes must be permuted together.

A `Symmetry` is static: hashable, comparable, free of arrays. It can be a static argument of a
jitted function, the key of a cache, or be printed and read. All that follows (costs, plans,
transport, fusion) is a pure function of a symmetry and of pytrees.

Terms. A *group* is a set of `size` interchangeable hidden units. Its *members* are the parameter
axes that these units index. In a member the axis either *produces* the units (bias, scale, output
axis of a kernel) or *consumes* them (contracted axis). An axis may be a product: when a
convolution's output is flattened before a dense layer, the kernel's axis of size H·W·C holds the
C units at stride 1, repeated H·W times. It may be a sum: a fused projection has queries, keys and
values one after the other. Each member therefore says at which `Place` of its axis the units lie.

Groups may be *nested*: a head's dimensions can be permuted in another way in each head, the hidden
units of stacked layers in another way in each layer. Such a group has a `batch` of plans, one for
each index of the axes around it.
"""

from typing import NamedTuple

from otfusion_jax.symmetry.groups import Group, Member
from otfusion_jax.symmetry.partition import BlockDim, BlockPartition, LocatedFactor, partition_of


class UnitAxis(NamedTuple):
    """A member, and the dimensions of its leaf's cells that its units and its batch are."""

    group: Group
    member: Member
    dim: BlockDim
    levels: tuple[BlockDim, ...]


class LeafStructure(NamedTuple):
    """How a leaf falls into cells, and which groups index it."""

    partition: BlockPartition
    unit_axes: tuple[UnitAxis, ...]


def leaf_structure_of(shape: tuple[int, ...], pairs: list[tuple[Group, Member]]) -> LeafStructure:
    """Works out how an array falls into cells.

    Args:
        shape: of the array.
        pairs: the groups that index it, and by what.

    Returns:
        Its layout, and which dimension each member is.
    """
    factors: dict[LocatedFactor, int] = {}
    uses = []
    for group, member in pairs:
        location = member.location
        own = LocatedFactor(location.axis, location.index, group.size)
        levels = tuple(
            factors.setdefault(LocatedFactor(axis, place, size), len(factors))
            for (axis, _, place), size in zip(location.batch, group.batch, strict=True)
        )
        uses.append(UnitAxis(group, member, factors.setdefault(own, len(factors)), levels))
    return LeafStructure(partition_of(shape, tuple(factors)), tuple(uses))
