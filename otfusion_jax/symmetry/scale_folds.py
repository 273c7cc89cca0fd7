"""Scales of units that are made 1: they are multiplied into the weights that read the units.

A `Fold`, which the trace has proved, says which parameter is a scale and which others change with
it. What becomes of one parameter depends on that and on the scale alone, which is one number for
each unit. So a model whose leaves are lazy is folded leaf by leaf, when these are looked at.
"""

import functools
from typing import Any

import numpy as np
from jax.core import Tracer

from otfusion_jax.common.finiteness import not_finite
from otfusion_jax.common.host import (
    Array,
    array_module,
    as_lazy_as,
    filled_like,
    loaded,
    program,
)
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.groups import Fold
from otfusion_jax.symmetry.leaf_structure import LeafStructure
from otfusion_jax.symmetry.symmetry import Symmetry


def folded(symmetry: Symmetry, params: PyTree, name: str) -> PyTree:
    """Makes scales 1 that are read by weights alone, see `canonicalize`.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters.
        name: What to call them in the message about scales that can't be made 1.

    Returns:
        The parameters with these scales 1.

    Raises:
        ValueError: If a scale can't be made 1, as far as that is known.
    """
    folds = folds_of(symmetry)
    if not folds:
        return params
    arrays = symmetry.split(params)
    # In the order of the groups: a parameter that several folds divide is divided by each.
    for group, fold in folds:
        scale = arrays[fold.leaf]
        for other in fold.others:
            leaf, *_ = other
            array = arrays[leaf]
            divide = functools.partial(
                _without_scale, symmetry, group, fold, other, array, scale, name
            )
            # A part of a leaf has been read with it, and is not lazy even where its scale is.
            arrays[leaf] = as_lazy_as(array, divide)
        arrays[fold.leaf] = filled_like(scale, 1 - fold.shift)
    return symmetry.join(arrays)


def _without_scale(
    symmetry: Symmetry,
    group: str,
    fold: Fold,
    other: tuple[int, int, int],
    array: Any,
    scale: Any,
    name: str,
) -> Array:
    """Divides one axis of a parameter by a power of a scale; both are read if they are lazy."""
    leaf, axis, degree = other
    array, scale = loaded(array), loaded(scale)
    if fold.shift:
        scale = scale + fold.shift
    axes = []
    for number, unit_axis in enumerate(symmetry.leaf_structures[leaf].unit_axes):
        if (unit_axis.group.name, unit_axis.member.axis) == (group, axis):
            axes.append(number)
    structure = symmetry.numbered_leaves[leaf].structure
    divided = _divided(structure, array, scale, tuple(axes), degree, layered=fold.layered)
    if degree > 0:
        _require_finite(symmetry, fold, scale, leaf, divided, name)
    return divided


def folds_of(symmetry: Symmetry) -> list[tuple[str, Fold]]:
    """Returns the folds that canonical form takes, each with the name of its group."""
    folds = []
    for freedom in symmetry.freedoms:
        folds.extend((freedom.group, fold) for fold in freedom.folds)
    return folds


@program(static_argnames=("structure", "axes", "degree", "layered"))
def _divided(
    structure: LeafStructure,
    array: Array,
    scale: Array,
    axes: tuple[int, ...],
    degree: int,
    layered: bool,
) -> Array:
    """Divides units of a parameter by a power of a scale.

    Args:
        structure: The structure of the parameter.
        array: The parameter.
        scale: The scale, with one number for each unit.
        axes: Which of the unit axes of the structure the units are.
        degree: The power.
        layered: Whether the first axis of both are layers.

    Returns:
        The parameter. Where the scale is 0, a 0 that would be divided by it stays 0, as a unit that
        nothing is added to takes no part. Anything else becomes infinite: there is no such model.
    """
    layers = scale.shape[:1] if layered else ()
    # A scale may have axes of size 1 beside its units, as to be broadcast.
    factors = (scale.reshape(*layers, -1) ** abs(degree)).astype(array.dtype)
    # The dimensions that the axis of layers falls into come first in every block.
    of_layers = len(structure.partition.axes[0][0].dims) if layered else 0
    blocks = structure.partition.split(array)
    for number in axes:
        unit_axis = structure.unit_axes[number]
        for key, block in blocks.items():
            if unit_axis.is_in(block):
                rest = block.array.shape[of_layers:]
                shape = [1] * len(rest)
                shape[block.dims.index(unit_axis.dim) - of_layers] = factors.shape[-1]
                along_units = factors.reshape(*layers, *shape)
                scaled = _scaled(block.array.reshape(*layers, *rest), along_units, degree)
                blocks[key] = block._replace(array=scaled.reshape(block.array.shape))
    return structure.partition.join(blocks)


def _scaled(array: Array, factors: Array, degree: int) -> Array:
    """Multiplies by factors, or divides by them if the degree is positive; 0 divided by 0 is 0."""
    if degree < 0:
        return array * factors
    stays = (array == 0) & (factors == 0)
    xp = array_module(array, factors)
    return xp.where(stays, 0, array / xp.where(stays, 1, factors))


def _require_finite(
    symmetry: Symmetry, fold: Fold, scale: Any, leaf: int, divided: Array, name: str
) -> None:
    """Refuses a scale that is known to be 0, or next to it, where something was divided by it."""
    if isinstance(scale, Tracer) or isinstance(divided, Tracer):
        return
    if not not_finite(divided):
        return
    magnitudes = np.abs(np.asarray(scale, np.complex128))
    smallest = np.min(magnitudes)
    units = np.argwhere(magnitudes == smallest).tolist()
    places = f"[layer, unit] {units[:8]}"
    if not fold.layered:
        units = np.flatnonzero(magnitudes == smallest).tolist()
        places = f"units {units[:8]}"
    raise ValueError(
        f"{name}: {fold.path} is {smallest:.3g} at {places}, and {symmetry.parts[leaf].path} is "
        "added to them: the scale can't be made 1. Move its permutations alone: use the symmetry "
        "without with_rotations()"
    )
