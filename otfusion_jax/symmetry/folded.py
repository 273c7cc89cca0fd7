"""Parameters that are constant in canonical form, where units become another number of units.

The scale of a normalisation has one number for each unit, all of them 1 once they are folded into
what reads them (see `canonical`). It stays in place when the units rotate, and gets as many numbers
as there are units.
"""

import functools
from typing import NamedTuple

from otfusion_jax.common.host import Array, array_module, program
from otfusion_jax.symmetry.groups import FOLDED, Group
from otfusion_jax.symmetry.symmetry import Symmetry


class FoldedAxis(NamedTuple):
    """Where a parameter that is constant in canonical form has its units.

    Attributes:
        group: The group of these units, which rotates.
        axis: The axis of the parameter that they lie along.
    """

    group: Group
    axis: int


@functools.lru_cache(maxsize=256)
def folded_axes(symmetry: Symmetry) -> dict[int, FoldedAxis]:
    """Finds the parameters that are constant in canonical form.

    Args:
        symmetry: The symmetry; without rotations there are none.

    Returns:
        By the position of each such parameter in `Symmetry.parts`, where its units are.
    """
    axis_of_path = {}
    for pin in symmetry.pinned:
        if pin.reason == FOLDED:
            axis_of_path[pin.path] = pin.axis
    found = {}
    for freedom in symmetry.freedoms:
        for fold in freedom.folds:
            if fold.path in axis_of_path:
                found[fold.leaf] = FoldedAxis(symmetry[freedom.group], axis_of_path[fold.path])
    return found


@program(static_argnames=("axis", "size"))
def resized(array: Array, axis: int, size: int) -> Array:
    """Gives a parameter that is the same at all units another number of them.

    Args:
        array: The parameter.
        axis: The axis that its units lie along.
        size: The number of units.

    Returns:
        The parameter, with its first number at all units: NaN stays what it is.
    """
    xp = array_module(array)
    first = array.take(xp.zeros(1, "int32"), axis)
    shape = list(array.shape)
    shape[axis] = size
    return xp.broadcast_to(first, tuple(shape))
