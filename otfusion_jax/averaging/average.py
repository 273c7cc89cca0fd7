"""Averages of models: plain, and after alignment."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.symmetry.checks import require_equal_integers, require_finite
from otfusion_jax.symmetry.groups import Leaf, leaves_of

Weights = Sequence[float] | Callable[[str], Sequence[float] | None] | None
"""Of K models: K numbers that sum to 1; or from the key path of a parameter to such numbers, or to
None where they are uniform, which is also what None means."""


def average(models: Sequence[PyTree], weights: Weights = None) -> PyTree:
    """Averages parameters as they are: the vanilla baseline.

    Args:
        models: K pytrees of the same structure and shapes.
        weights: K weights, summing to 1; uniform if None. A function of the key path says them
            parameter by parameter: `lambda path: (0.0, 1.0) if path.startswith("head") else None`
            keeps the head of the second of two models.

    Returns:
        The weighted average, computed in float32 or wider and rounded once. Random keys and single
        integers (counters) are those of the model that has all of the weight there, or of the last.
        Arrays of integers or booleans (quantised weights, masks) must be the same in all models,
        unless one has all of the weight there. Inside `jax.jit` that can't be looked at.

    Raises:
        ValueError: for no models, weights that do not fit, trees that differ, or integers that
            can't be averaged, listing every offender by key path.
        TypeError: for what is no list of models, and for shapes in place of arrays.
        FloatingPointError: for an average that is out of range.
    """
    require_alike(models)
    leaves = leaves_of(models[0])
    shares = mixtures(weights, len(models), leaves)
    return checked_average(leaves, models, shares, "averaging")


def checked_average(
    leaves: Sequence[Leaf],
    models: Sequence[PyTree],
    shares: Sequence[Float[Array, " k"]],
    what: str,
) -> PyTree:
    """Averages models of one structure, each leaf by weights of its own."""
    columns = columns_of(models)
    check_integers(leaves, columns, shares)
    treedef = jax.tree_util.tree_structure(models[0])
    averaged = treedef.unflatten(map(_mean_of, columns, shares))
    require_finite(leaves, averaged, what)
    return averaged


def columns_of(models: Sequence[PyTree]) -> list[tuple[Any, ...]]:
    """Sorts the leaves of models by leaf.

    Args:
        models: K pytrees of one structure.

    Returns:
        For each leaf its values in the models.
    """
    return list(zip(*map(jax.tree_util.tree_leaves, models), strict=True))


def check_integers(
    leaves: Sequence[Leaf], columns: Sequence[Any], shares: Sequence[Float[Array, " k"]]
) -> None:
    """Refuses integers that differ between models that are to be averaged.

    Args:
        leaves: of all models.
        columns: for each leaf its values in the models, K arrays or one array `[K, ...]`.
        shares: the weights of the models, for each leaf.

    Raises:
        ValueError: listing every such leaf by key path.
    """
    decided = [_has_all_weight(w) for w in shares]
    remedy = (
        ", or say by weights whose to keep, as in lambda path: (0.0, 1.0) if path == 'mask' else "
        "None"
    )
    require_equal_integers(leaves, columns, decided, remedy)


def _has_all_weight(weights: Array) -> bool:
    """Whether one of the models is known to have all of the weight."""
    return not isinstance(weights, Tracer) and bool((np.asarray(weights) == 1).any())


def mixture(weights: Sequence[float] | None, count: int) -> Float[Array, " k"]:
    """Checks the weights of models.

    Args:
        weights: K weights, summing to 1; uniform if None.
        count: K.

    Returns:
        The weights.

    Raises:
        ValueError: for weights that do not fit.
    """
    if weights is None:
        return jnp.full(count, 1 / count, float)
    if np.shape(weights) != (count,):
        raise ValueError(f"weights has shape {np.shape(weights)}, but there are {count} models")
    traced = any(isinstance(w, Tracer) for w in (weights, *weights))
    if not traced and not abs(np.sum(weights) - 1) < 1e-3:
        raise ValueError(f"the weights sum to {np.sum(weights)}; divide them by their sum")
    return jnp.asarray(weights, float)


def mixtures(weights: Weights, count: int, leaves: Sequence[Leaf]) -> list[Float[Array, " k"]]:
    """Checks the weights of models, parameter by parameter.

    Args:
        weights: see `Weights`.
        count: K.
        leaves: of the models.

    Returns:
        The weights for each leaf.

    Raises:
        ValueError: for weights that do not fit, naming the key path.
    """
    if not callable(weights):
        return [mixture(weights, count)] * len(leaves)
    found = []
    for leaf in leaves:
        try:
            found.append(mixture(weights(leaf.path), count))
        except ValueError as error:
            raise ValueError(f"{leaf.path}: {error}") from None
    return found


def average_of(
    stacked: PyTree, weights: Float[Array, " k"] | Sequence[Float[Array, " k"]]
) -> PyTree:
    """Averages a stack of models, without checks.

    Args:
        stacked: leaves `[K, ...]`.
        weights: of the models, alike for all leaves or a list of one for each.

    Returns:
        The average. Integers, booleans and keys are those of the model that has all of the weight,
        or of the last.
    """
    leaves, treedef = jax.tree_util.tree_flatten(stacked)
    each = [weights] * len(leaves) if isinstance(weights, jax.Array) else weights
    return treedef.unflatten(map(_mean, leaves, each))


def _mean(x: Array, weights: Float[Array, " k"]) -> Array:
    """Averages one leaf `[K, ...]`."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        alone = weights == 1
        return x[jnp.where(alone.any(), jnp.argmax(alone), len(weights) - 1)]
    # At least float32, so that half-precision models lose nothing to the weights.
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    w = weights.astype(wide)
    return jnp.tensordot(w, x.astype(wide), axes=1, precision="highest").astype(x.dtype)


# One leaf after the other: they may lie on other devices, and widened they take twice the memory.
@jax.jit
def _mean_of(column: tuple[Array, ...], weights: Float[Array, " k"]) -> Array:
    return _mean(jnp.stack(column), weights)
