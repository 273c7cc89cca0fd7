"""Aligning one model to another: checks, and the jitted call of a method."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from otfusion_jax.common.scaling import all_scaled
from otfusion_jax.symmetry.groups import Leaf
from otfusion_jax.symmetry.symmetry import Symmetry


def leaf_weights(
    symmetry: Symmetry, leaf_weight: Callable[[str], float] | None
) -> tuple[float, ...] | None:
    """Evaluates the weights of leaves, so that they can be static.

    Args:
        symmetry: whose leaves.
        leaf_weight: from key path to weight.

    Returns:
        One weight per leaf, or None.

    Raises:
        ValueError: for weights that are negative or not finite, listing every one.
    """
    if leaf_weight is None:
        return None
    weights = {leaf.path: float(leaf_weight(leaf.path)) for leaf in symmetry.leaves}
    wrong = [f"  {path}: {w}" for path, w in weights.items() if not (w >= 0 and math.isfinite(w))]
    if wrong:
        raise ValueError("these leaf weights are negative or not finite:\n" + "\n".join(wrong))
    return tuple(weights.values())


def weight_by_path(
    symmetry: Symmetry, weights: tuple[float, ...] | None
) -> Callable[[str], float] | None:
    """Turns what `leaf_weights` returns back into what it takes.

    Args:
        symmetry: whose leaves.
        weights: one per leaf, or None.

    Returns:
        From key path to weight, or None.
    """
    if weights is None:
        return None
    paths = (leaf.path for leaf in symmetry.leaves)
    return dict(zip(paths, weights, strict=True)).__getitem__


def rescaled(leaves: Sequence[Leaf], arrays: Sequence[Any], k: Array) -> list[Any]:
    """Multiplies all parameters that move by a power of two.

    Args:
        leaves: what is known of the parameters.
        arrays: the parameters, or stacks of them.
        k: the exponent.

    Returns:
        The parameters, each times `2**k`.
    """
    pairs = list(zip(arrays, leaves, strict=True))
    moving = iter(all_scaled([jnp.asarray(x) for x, leaf in pairs if leaf.moves], k))
    return [next(moving) if leaf.moves else x for x, leaf in pairs]


def weighted(symmetry: Symmetry, parts: list[Any], weights: tuple[float, ...]) -> list[Any]:
    """Scales parameters, so that their squared distances are weighted.

    Args:
        symmetry: whose parameters.
        parts: the parameters, as `Symmetry.split` takes them apart.
        weights: one per leaf.

    Returns:
        The parameters, each by the square root of its weight.
    """
    found = []
    for x, part, leaf in zip(parts, symmetry.parts, symmetry.leaf_of, strict=True):
        if part.moves and weights[leaf] != 1:
            x = jnp.asarray(x) * jnp.asarray(math.sqrt(weights[leaf]), part.dtype)
        found.append(x)
    return found
