"""What an alignment did, in rows of a report."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.alignment.method import Alignment
from otfusion_jax.cli.report import Table
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.plans import count_moved_units
from otfusion_jax.symmetry.symmetry import Symmetry


def table_of_groups(symmetry: Symmetry, alignment: Alignment) -> Table:
    """Says of each group how many of its units have moved.

    Args:
        symmetry: The symmetry of the models.
        alignment: The alignment.

    Returns:
        A row for each group: its name, its units, how they move, how many are at another place
        (None where they are mixed), and the duality gap of their plan (None where there is none).
    """
    rows = []
    for group in symmetry.groups:
        moved = count_moved_units(alignment.plans[group.name])
        gap = alignment.gaps.get(group.name)
        units = " x ".join(map(str, (*group.batch, group.size)))
        number = None if gap is None else finite(gap)
        rows.append((group.name, units, group.motion.value, moved, number))
    return Table(("group", "units", "move", "moved", "gap"), tuple(rows))


def table_of_distances(symmetry: Symmetry, models: dict[str, PyTree], target: PyTree) -> Table:
    """Says how far models are from another one, parameter by parameter.

    Args:
        symmetry: The symmetry of the models.
        models: The models, by what they are called in the table.
        target: The model that they are compared to.

    Returns:
        A row for each parameter that moves: its key path, its shape, and for each model the norm of
        the difference over that of the target's parameter (None where that is 0).
    """
    targets = jax.tree_util.tree_leaves(target)
    columns = [jax.tree_util.tree_leaves(model) for model in models.values()]
    rows = []
    for number, leaf in enumerate(symmetry.leaves):
        if leaf.moves:
            distances = [relative_distance(column[number], targets[number]) for column in columns]
            rows.append((leaf.path, str(leaf.shape), *distances))
    return Table(("parameter", "shape", *models), tuple(rows))


def table_of_norms(
    symmetry: Symmetry, models: Sequence[PyTree], averaged: PyTree, fused: PyTree
) -> Table:
    """Says how much of the norm of models is left in their average, and in what they were fused to.

    What does not correspond cancels, so that a small norm is a sign of units that do not match.

    Args:
        symmetry: The symmetry of the models.
        models: The models.
        averaged: Their average as they are.
        fused: What they were fused to.

    Returns:
        A row for each parameter that moves: its key path, its shape, and the norms over the mean
        norm of the models (None where that is 0).
    """
    leaves_of_models = [jax.tree_util.tree_leaves(model) for model in models]
    averaged_leaves = jax.tree_util.tree_leaves(averaged)
    fused_leaves = jax.tree_util.tree_leaves(fused)
    rows = []
    for number, leaf in enumerate(symmetry.leaves):
        if not leaf.moves:
            continue
        # What all models have in common is in their mean; the rest cancels if units do not match.
        norms = [_norm(leaves[number]) for leaves in leaves_of_models]
        mean = np.mean(norms)
        left = [None, None]
        if mean > 0:
            left = [
                finite(_norm(averaged_leaves[number]) / mean),
                finite(_norm(fused_leaves[number]) / mean),
            ]
        rows.append((leaf.path, str(leaf.shape), *left))
    columns = (
        "parameter",
        "shape",
        "norm left in the plain average",
        "norm left in the result",
    )
    return Table(columns, tuple(rows))


def _norm(array: Any) -> float:
    return float(np.linalg.norm(_wide(array)))


def distance(array: Any, target: Any) -> float:
    """Returns the norm of a difference, taken in float64.

    Args:
        array: An array of floating-point or complex numbers.
        target: Another one of its shape.
    """
    return _norm(_wide(array) - _wide(target))


def relative_distance(array: Any, target: Any) -> float | None:
    """Returns the norm of a difference over that of the target; None if that is 0.

    Args:
        array: An array of floating-point or complex numbers.
        target: Another one of its shape.
    """
    norm = _norm(target)
    return finite(distance(array, target) / norm) if norm > 0 else None


def _wide(array: Any) -> np.ndarray:
    """Returns an array in float64 or complex128: norms may be out of the range of float16."""
    known = np.asarray(array)
    is_complex = jnp.issubdtype(known.dtype, jnp.complexfloating)
    return known.astype(np.complex128 if is_complex else np.float64)


def finite(value: Any) -> float | None:
    """Returns a number as Python's, and None for one that JSON has no word for.

    Args:
        value: A number, or an array of one.
    """
    number = float(np.asarray(value))
    return number if np.isfinite(number) else None
