"""Reading and writing the units of a group where they lie in an array.

A member's `Where` says at which positions of one axis its units are; the axes of the group's batch
may lie on the same axis or on others.
"""

import jax.numpy as jnp
from jaxtyping import Array

from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.partition import (
    BlockDim,
    BlockPartition,
    Blocks,
    LocatedFactor,
    UnitLocation,
    fronted,
    partition_of,
)


def _layout(
    array: Array, location: UnitLocation, group: Group
) -> tuple[BlockPartition, list[BlockDim]]:
    """Returns the layout of an array, and the dimensions of the batch and of the units."""
    factors = [
        LocatedFactor(axis, place, size)
        for (axis, _, place), size in zip(location.batch, group.batch, strict=True)
    ]
    factors.append(LocatedFactor(location.axis, location.index, group.size))
    return partition_of(array.shape, tuple(factors)), list(range(len(factors)))


def units_in(cells: Blocks, front: list[BlockDim]) -> Array:
    """Reads units off cells: everything else is what they are vectors of.

    Args:
        cells: of an array.
        front: the dimensions of the batch, and that of the units.

    Returns:
        `[*batch, size, rest]`, of the cells that have all these dimensions.
    """
    found = [fronted(cell, front) for cell in cells.values() if set(front) <= set(cell.dims)]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


def units_of(array: Array, location: UnitLocation, group: Group) -> Array:
    """Brings the units to the front: everything else is what they are vectors of.

    Args:
        array: a parameter, or features.
        location: where the units lie in it.
        group: whose units.

    Returns:
        `[*batch, size, rest]`.
    """
    layout, front = _layout(array, location, group)
    return units_in(layout.split(array), front)


def with_units(array: Array, location: UnitLocation, group: Group, units: Array) -> Array:
    """Writes units back.

    Args:
        array: what `units_of` read from.
        location: where the units lie in it.
        group: whose units.
        units: `[*batch, size, rest]`.

    Returns:
        The array with these units, everything else as it was.
    """
    layout, front = _layout(array, location, group)
    cells = layout.split(array)
    start = 0
    for key, cell in cells.items():
        if not set(front) <= set(cell.dims):
            continue
        at = [*map(cell.dims.index, front)]
        shape = jnp.moveaxis(cell.array, at, range(len(at))).shape
        width = cell.array.size // units[..., 0].size
        mine = units[..., start : start + width].reshape(shape)
        cells[key] = cell._replace(array=jnp.moveaxis(mine, range(len(at)), at))
        start += width
    return layout.join(cells)
