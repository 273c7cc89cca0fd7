"""Weights of parameters: how much each leaf counts when units are compared.

The user gives a function of the key path, or all count alike but running statistics. It is
evaluated once, so that what is jitted has a tuple of numbers, which is hashable and static. A
weight multiplies squared distances, so parameters are multiplied by its square root. Here they are
multiplied by powers of two as well, which brings their squares into range.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from otfusion_jax.averaging.statistics import AllBut, running_statistics
from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.host import Array, accumulation_dtype, array_module, loaded
from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.common.scaling import all_scaled
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.groups import Leaf
from otfusion_jax.symmetry.symmetry import Symmetry


def leaf_weights(
    symmetry: Symmetry, leaf_weight: Callable[[str], float] | None, model: PyTree
) -> tuple[float, ...] | None:
    """Evaluates the weights of leaves, so that they can be static.

    Args:
        symmetry: The symmetry whose leaves are weighted.
        leaf_weight: A function from the key path of a leaf to its weight. None stands for 0 for
            running statistics of batch normalisation, see `running_statistics`, and 1 for all else.
        model: The parameters of a model, or a stack of several, in which to look for these.

    Returns:
        One weight per leaf; None if `leaf_weight` is None and there are no such statistics.

    Raises:
        ValueError: If weights are negative or not finite, or if their roots are out of range. Every
            one is listed by key path.
        TypeError: If weights are no numbers. Every one is listed by key path.
    """
    if leaf_weight is None:
        leaf_weight = counted_by_default(symmetry, model)
    if leaf_weight is None:
        return None
    weights = []
    wrong = []
    strange = []
    extreme = []
    for leaf in symmetry.leaves:
        weight = leaf_weight(leaf.path)
        # A comparison of the path is a weight, too: True counts and False does not.
        if not isinstance(weight, numbers.Real | np.bool_):
            strange.append(f"  {leaf.path}: {kind_of(weight)}")
            continue
        # A function would be hashed by identity: a new lambda of the same weights would compile
        # the program again. Numbers are hashed by value.
        weight = float(weight)
        weights.append(weight)
        # NaN is not below 0 either.
        if not (weight >= 0 and math.isfinite(weight)):
            wrong.append(f"  {leaf.path}: {weight}")
        elif weight and leaf.moves and not _has_root(weight, leaf.dtype):
            extreme.append(f"  {leaf.path}: {weight}")
    if strange:
        raise TypeError(
            "these leaf weights are no numbers; leaf_weight must return one for every key path, as "
            "in lambda path: 1.0:\n" + "\n".join(strange)
        )
    if wrong:
        raise ValueError("these leaf weights are negative or not finite:\n" + "\n".join(wrong))
    if extreme:
        raise ValueError(
            "the square roots of these leaf weights, which parameters are multiplied by, are out "
            "of range in the precision of the parameters; give smaller or larger ones:\n"
            + "\n".join(extreme)
        )
    return tuple(weights)


def _has_root(weight: float, dtype: np.dtype) -> bool:
    """Whether the square root of a weight is a number that parameters can be multiplied by."""
    info = jnp.finfo(accumulation_dtype(dtype))
    return float(info.tiny) <= math.sqrt(weight) <= float(info.max)


def counted_by_default(symmetry: Symmetry, model: PyTree) -> AllBut | None:
    """Says how much parameters count where units are matched by what was learned.

    Running variances can be far larger than weights, and would decide alone which units match.

    Args:
        symmetry: The symmetry of the model.
        model: The parameters of a model, or a stack of several.

    Returns:
        The `leaf_weight` that counts running statistics 0 and all else 1; None if there are none.
        What only looks so by its name counts (see `running_statistics`): what consumes units, or is
        a matrix of several numbers for each of them.
    """
    statistics = set(running_statistics(model))
    for number, leaf in enumerate(symmetry.leaf_of):
        path = symmetry.leaves[leaf].path
        if path in statistics and _is_learned(symmetry, number):
            statistics.remove(path)
    return AllBut(frozenset(statistics)) if statistics else None


def _is_learned(symmetry: Symmetry, number: int) -> bool:
    """Whether a part of a parameter can be no statistic: these are vectors, and produce units."""
    shape = symmetry.parts[number].shape
    for unit_axis in symmetry.leaf_structures[number].unit_axes:
        group = unit_axis.group
        is_vector = len(shape) == 1 or math.prod(shape) == math.prod(group.batch) * group.size
        if unit_axis.member.role != "produces" or not is_vector:
            return True
    return False


def weighted(symmetry: Symmetry, arrays: Sequence[Any], weights: tuple[float, ...]) -> list[Any]:
    """Scales parameters, so that their squared distances are weighted.

    Args:
        symmetry: The symmetry of the parameters.
        arrays: The parameters, as `Symmetry.split` takes them apart.
        weights: One weight per leaf.

    Returns:
        The parameters, each times the square root of its weight.
    """
    scaled = []
    for array, part, leaf in zip(arrays, symmetry.parts, symmetry.leaf_of, strict=True):
        # w |x - y|² = |√w x - √w y|²: distances, cosines and overlaps are all weighted by this.
        if part.moves and weights[leaf] != 1:
            # Roots of weights are no numbers of half precision, and products may be out of range.
            wide = accumulation_dtype(part.dtype)
            times = functools.partial(_times, array, math.sqrt(weights[leaf]), wide)
            is_lazy = isinstance(array, LazyArray)
            array = LazyArray(array.shape, wide, times) if is_lazy else times()
        scaled.append(array)
    return scaled


def _times(array: Any, factor: float, dtype: np.dtype) -> Array:
    """Multiplies a parameter, which is read first if it is lazy."""
    array = loaded(array)
    return array.astype(dtype) * array_module(array).asarray(factor, dtype)


def rescaled(leaves: Sequence[Leaf], arrays: Sequence[Any], exponent: Array) -> list[Any]:
    """Multiplies all parameters that move by a power of two.

    Args:
        leaves: What is known of each parameter.
        arrays: The parameters, or stacks of them.
        exponent: The exponent of the power, int32 `[]`.

    Returns:
        The parameters, each times `2**exponent`; those that do not move (integers) as they are.
    """
    moving = []
    for leaf, array in zip(leaves, arrays, strict=True):
        if leaf.moves:
            moving.append(array)
    # All at once: the factors of a power of two are worked out once for each dtype.
    moved = iter(all_scaled(moving, exponent))
    result = []
    for leaf, array in zip(leaves, arrays, strict=True):
        result.append(next(moved) if leaf.moves else array)
    return result
