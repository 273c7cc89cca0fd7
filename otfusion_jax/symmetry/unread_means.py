"""Means over units that nothing reads are made 0.

Where a mean over units is subtracted, as in a LayerNorm, a number that is added to all of them is
lost. The trace has proved which parameters this holds for (`Freedom.unread_means`). Two models
that compute the same may differ in it by anything, and so it would be noise to compare them by.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from otfusion_jax.common.host import (
    Array,
    accumulation_dtype,
    array_module,
    as_lazy_as,
    loaded,
    program,
)
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.leaf_structure import LeafStructure, UnitAxis
from otfusion_jax.symmetry.symmetry import Symmetry


def without_unread_means(symmetry: Symmetry, params: PyTree) -> PyTree:
    """Makes means over units 0 that nothing reads, see `canonicalize`.

    Args:
        symmetry: The symmetry of the network.
        params: Parameters whose scales are folded.

    Returns:
        The parameters. Those that are lazy are read when they are looked at.
    """
    places = _places(symmetry)
    if not places:
        return params
    arrays = symmetry.split(params)
    for leaf, structure, number in places:
        subtract = functools.partial(_subtracted_from, structure, number, arrays[leaf])
        arrays[leaf] = as_lazy_as(arrays[leaf], subtract)
    return symmetry.join(arrays)


def _places(symmetry: Symmetry) -> list[tuple[int, LeafStructure, int]]:
    """Lists the parameters, with their structures, and which of the unit axes the units are."""
    places = []
    for freedom in symmetry.freedoms:
        for leaf, axis in freedom.unread_means:
            unit_axes = symmetry.leaf_structures[leaf].unit_axes
            for number, unit_axis in enumerate(unit_axes):
                if (unit_axis.group.name, unit_axis.member.axis) == (freedom.group, axis):
                    places.append((leaf, symmetry.numbered_leaves[leaf].structure, number))
    return places


def _subtracted_from(structure: LeafStructure, number: int, array: Any) -> Array:
    """Subtracts the mean from one parameter, which is first read if it is lazy."""
    return _centred(structure, loaded(array), number)


@program(static_argnames=("structure", "number"))
def _centred(structure: LeafStructure, array: Array, number: int) -> Array:
    """Subtracts the mean over the units of a group from all that they are.

    Args:
        structure: The structure of the parameter.
        array: The parameter.
        number: Which of the unit axes of the structure the units are.

    Returns:
        The parameter. What is 0 already, up to rounding, stays as it is.
    """
    unit_axis = structure.unit_axes[number]
    blocks = structure.partition.split(array)
    for key, block in blocks.items():
        if unit_axis.is_in(block):
            xp = array_module(block.array)
            dim = block.dims.index(unit_axis.dim)
            wide = accumulation_dtype(array.dtype)
            units = block.array.astype(wide)
            mean = units.mean(axis=dim, keepdims=True)
            # What rounding alone leaves of a mean of 0, here and where the parameter was made.
            rounding = float(jnp.finfo(array.dtype).eps) + 4 * float(jnp.finfo(wide).eps)
            size = abs(units).mean(axis=dim, keepdims=True)
            mean = xp.where(abs(mean) <= rounding * size, 0, mean)
            units = units - mean
            # Of a large mean the rounding is left.
            rest = units.mean(axis=dim, keepdims=True)
            units = units - xp.where(mean == 0, 0, rest)
            blocks[key] = block._replace(array=units.astype(array.dtype))
    return structure.partition.join(blocks)


def with_random_means(symmetry: Symmetry, params: PyTree, key: Array) -> PyTree:
    """Adds random numbers to means over units that nothing reads.

    Args:
        symmetry: The symmetry.
        params: Parameters whose scales are folded.
        key: A key of `jax.random`.

    Returns:
        The parameters of another model of the same function. A mean differs by about as much as
        the parameter's numbers do.
    """
    arrays = symmetry.split(params)
    for leaf, structure, number in _places(symmetry):
        unit_axis = structure.unit_axes[number]
        blocks = structure.partition.split(jnp.asarray(arrays[leaf]))
        leaf_key = jax.random.fold_in(key, leaf)
        for position, (block_key, block) in enumerate(blocks.items()):
            if unit_axis.is_in(block):
                shift = _random_shift(block, unit_axis, jax.random.fold_in(leaf_key, position))
                blocks[block_key] = block._replace(array=block.array + shift)
        arrays[leaf] = structure.partition.join(blocks)
    return symmetry.join(arrays)


def _random_shift(block: Any, unit_axis: UnitAxis, key: Array) -> Array:
    """Draws one number for all units, and for each index of the other axes."""
    shape = list(block.array.shape)
    shape[block.dims.index(unit_axis.dim)] = 1
    deviation = jnp.std(block.array)
    return (deviation * jax.random.normal(key, shape)).astype(block.array.dtype)
