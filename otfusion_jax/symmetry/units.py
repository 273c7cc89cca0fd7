"""Reading and writing the units of a group where they lie in an array.

A member's `UnitLocation` says at which positions of one axis its units are; the axes of the group's
batch may lie on the same axis or on others. Here they come to the front, in an array `[*batch,
size, rest]`, and go back.
"""

from otfusion_jax.common.host import Array, array_module
from otfusion_jax.symmetry.blocks import BlockDim, Blocks, fronted
from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.location import LocatedFactor, UnitLocation
from otfusion_jax.symmetry.partition import BlockPartition, partition_of


def units_of(array: Array, location: UnitLocation, group: Group) -> Array:
    """Reads the units of a group off an array: everything else is what they are vectors of.

    Args:
        array: A parameter, or features.
        location: The location of the units in the array.
        group: The group.

    Returns:
        The units, `[*batch, size, rest]`.
    """
    partition, front = _partition_by(array, location, group)
    return units_in(partition.split(array), front)


def units_in(blocks: Blocks, front: list[BlockDim]) -> Array:
    """Reads the units of a group off blocks: everything else is what they are vectors of.

    Args:
        blocks: The blocks of an array.
        front: The dimensions of the group's batch, and after them that of its units.

    Returns:
        The units, `[*batch, size, rest]`, of the blocks that have all these dimensions.
    """
    vectors = []
    for block in blocks.values():
        # Of a concatenation, some blocks have other units, or none.
        if set(front).issubset(block.dims):
            vectors.append(fronted(block, front))
    if len(vectors) == 1:
        return vectors[0]
    return array_module(*vectors).concatenate(vectors, axis=-1)


def with_units(array: Array, location: UnitLocation, group: Group, units: Array) -> Array:
    """Writes the units of a group into an array.

    Args:
        array: The array that `units_of` has read from.
        location: The location of the units in the array.
        group: The group.
        units: The new units, `[*batch, size, rest]`.

    Returns:
        The array with these units, and everything else as it was.
    """
    partition, front = _partition_by(array, location, group)
    blocks = partition.split(array)
    start = 0
    for key, block in blocks.items():
        if not set(front).issubset(block.dims):
            continue
        # This undoes `fronted`: the last axis has the other dimensions of one block after another.
        axes = [block.dims.index(dim) for dim in front]
        new_axes = range(len(axes))
        xp = array_module(block.array, units)
        shape = xp.moveaxis(block.array, axes, new_axes).shape
        width = block.array.size // units[..., 0].size
        stop = start + width
        vectors = units[..., start:stop].reshape(shape)
        moved_back = xp.moveaxis(vectors, new_axes, axes)
        blocks[key] = block._replace(array=moved_back)
        start = stop
    return partition.join(blocks)


def _partition_by(
    array: Array, location: UnitLocation, group: Group
) -> tuple[BlockPartition, list[BlockDim]]:
    """Returns how an array falls into blocks by one group, and the dimensions of batch and units.

    The dimensions are the numbers 0, 1, ... of the factors: first the batch, then the units.
    """
    factors = []
    for (axis, _, index), size in zip(location.batch, group.batch, strict=True):
        factors.append(LocatedFactor(axis, index, size))
    factors.append(LocatedFactor(location.axis, location.index, group.size))
    dims: list[BlockDim] = list(range(len(factors)))
    partition = partition_of(array.shape, tuple(factors))
    return partition, dims
