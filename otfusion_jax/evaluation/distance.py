"""How far the parameters of two models are from each other, group by group."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.symmetry import Symmetry


@dataclasses.dataclass(frozen=True)
class Distances:
    """Norms of differences over those of the model that the other is compared to.

    Attributes:
        groups: By the name of a group, that of all parameters with an axis of it. NaN if widths
            differ.
        whole: That of all floating-point parameters.
    """

    groups: dict[str, float]
    whole: float


def distances(symmetry: Symmetry, model: PyTree, target: PyTree) -> Distances:
    """Takes the distances of a model to another.

    Args:
        symmetry: The symmetry of the target.
        model: The parameters of the model, of the target's structure, but maybe other widths.
        target: The parameters of the target, not all 0.

    Returns:
        The distances. A parameter with axes of several groups counts for each of them.
    """
    differences, norms = [], []
    for part, other in zip(symmetry.split(model), symmetry.split(target), strict=True):
        difference, norm = _squares(part, other)
        differences.append(difference)
        norms.append(norm)
    of_groups = {}
    for group in symmetry.groups:
        # A parameter may have several axes of one group, and is counted once.
        parts = {member.leaf for member in group.members}
        of_groups[group.name] = _ratio(
            sum([differences[number] for number in parts]), sum([norms[number] for number in parts])
        )
    return Distances(of_groups, _ratio(sum(differences), sum(norms)))


def _squares(array: Any, other: Any) -> tuple[float, float]:
    """Returns the squared norms of a difference and of the second array."""
    # Of Python's numbers, too.
    dtype = jnp.result_type(other)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0, 0.0
    # In double precision: squares of many small numbers are out of the range of half precision.
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    wide = np.complex128 if is_complex else np.float64
    target = np.asarray(other).astype(wide)
    norm = np.vdot(target, target).real
    if np.shape(array) != target.shape:
        return math.nan, float(norm)
    difference = np.asarray(array).astype(wide) - target
    return float(np.vdot(difference, difference).real), float(norm)


def _ratio(difference: float, norm: float) -> float:
    """Returns how long a difference is, of squared norms; NaN if there is nothing to compare to."""
    return math.sqrt(difference / norm) if norm > 0 else math.nan
