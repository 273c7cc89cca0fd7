"""Weighted averages of models, leaf by leaf.

Weights are checked and made one array for each leaf by `mixtures`. Then there are two ways to the
average: `checked_average` takes a list of models, whose leaves may lie on several devices, and
looks at values; `average_of` takes a stack of models and can be traced. In both, floating-point
leaves are averaged, and all others are those of one model: integers and keys have no average.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.host import (
    Array,
    accumulation_dtype,
    array_module,
    as_jax,
    as_numpy,
    loaded,
    program,
)
from otfusion_jax.common.lazy import LazyArray, any_lazy
from otfusion_jax.common.sharding import laid_out_like, with_auto_axes
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_equal_integers, require_finite
from otfusion_jax.symmetry.groups import Leaf, leaves_of

WeightsByPath = Callable[[str], Sequence[float] | None]
Weights = Sequence[float] | WeightsByPath | None
"""The weights of K models: K numbers that sum to 1, or None where all count alike; or a function
from the key path of a parameter to either of these."""
_ROUNDING = 1e-5
"""How far from 1 weights may sum to: as many numbers of single precision may."""


MeanOf = Callable[[int, tuple[Any, ...], Float[Array, " k"]], Array]
"""From the position of a leaf, its K values and their weights to what stands for all of them."""


def average(models: Sequence[PyTree], weights: Weights = None) -> PyTree:
    """Averages parameters as they are: the vanilla baseline.

    Args:
        models: The models, K pytrees of the same structure and shapes.
        weights: The K weights of the models, summing to 1; uniform if None. A function of the key
            path says them parameter by parameter:
            `lambda path: (0.0, 1.0) if path.startswith("head") else None` keeps the head of the
            second of two models.

    Returns:
        The weighted average, computed in float32 or wider and rounded once. Random keys and single
        integers (counters) are those of the model that has all of the weight there, or of the last.
        Arrays of integers or booleans (quantised weights, masks) must be the same in all models,
        unless one has all of the weight there. Inside `jax.jit` that can't be looked at.

    Raises:
        ValueError: For no models, weights that do not fit, leaves that are no arrays, trees that
            differ, or integers that can't be averaged, listing every offender by key path.
        TypeError: For what is no list of models, and for shapes in place of arrays.
        FloatingPointError: For an average that is out of range.

    Warns:
        StatisticsWarning: If running statistics of batch normalisation that differ are averaged,
            listing each by key path: estimate them anew, see `estimate_statistics`.
    """
    require_alike(models)
    leaves = leaves_of(models[0])
    shares = mixtures(weights, len(models), leaves)
    warn_of_averaged_statistics(models, False, shares)
    return checked_average(leaves, models, shares, "averaging")


def checked_average(
    leaves: Sequence[Leaf],
    models: Sequence[PyTree],
    shares: Sequence[Float[Array, " k"]],
    what: str,
    mean_of: MeanOf | None = None,
) -> PyTree:
    """Averages models of one structure, each leaf by weights of its own.

    Args:
        leaves: The leaves of all models.
        models: The models, K pytrees of one structure.
        shares: The weights of the models, for each leaf.
        what: What is being done, for the message about values that are not finite.
        mean_of: How the values of a leaf are averaged; None takes their weighted mean.

    Returns:
        The average.

    Raises:
        ValueError: For integers that can't be averaged, listing every offender by key path.
        FloatingPointError: For an average that is out of range.
    """
    columns = columns_of(models)
    check_integers(leaves, columns, shares)
    # Leaf after leaf: they may lie on other devices, and widened they take twice the memory.
    means = []
    for number, (column, weights) in enumerate(zip(columns, shares, strict=True)):
        if mean_of is None and any_lazy(column):
            read = functools.partial(mean_of_leaf, column, weights)
            means.append(LazyArray(column[0].shape, column[0].dtype, read))
        elif mean_of is None:
            means.append(mean_of_leaf(column, weights))
        else:
            means.append(mean_of(number, column, weights))
    treedef = jax.tree_util.tree_structure(models[0])
    averaged = laid_out_like(treedef.unflatten(as_jax(means)), models[-1])
    require_finite(leaves, averaged, what)
    return averaged


def average_of(
    stacked: PyTree,
    weights: Float[Array, " k"] | Sequence[Float[Array, " k"]],
) -> PyTree:
    """Averages a stack of models, without checks.

    Args:
        stacked: The models, one pytree with leaves `[K, ...]`.
        weights: The weights of the models: one array for all leaves, or a list of one for each.

    Returns:
        The average. Integers, booleans and keys are those of the model that has all of the weight,
        or of the last.
    """
    leaves, treedef = jax.tree_util.tree_flatten(stacked)
    if isinstance(weights, jax.Array | np.ndarray):
        weights = [weights] * len(leaves)
    means = []
    for leaf, leaf_weights in zip(leaves, weights, strict=True):
        means.append(_mean(leaf, leaf_weights))
    return treedef.unflatten(means)


def mean_of_leaf(column: tuple[Any, ...], weights: Float[Array, " k"]) -> Array:
    """Averages the values of one leaf, which are read first if they are lazy.

    Args:
        column: The K values of the leaf: arrays, lazy ones, or Python numbers.
        weights: The K weights.

    Returns:
        The weighted mean, see `mean_of_column`.
    """
    column, weights = as_numpy((tuple(map(loaded, column)), weights))
    return mean_of_column(column, weights)


@program()
def mean_of_column(column: tuple[Array, ...], weights: Float[Array, " k"]) -> Array:
    """Averages the values of one leaf in the models.

    Args:
        column: The K values of the leaf.
        weights: The K weights.

    Returns:
        The weighted mean; see `average_of` for what is no floating-point number.
    """

    def mean(column: tuple[Array, ...], weights: Float[Array, " k"]) -> Array:
        xp = array_module(*column)
        if not jnp.issubdtype(column[0].dtype, jnp.inexact):
            return _mean(xp.stack(column), weights)
        # One after the other: a stack of large leaves would be a copy of them all.
        dtype = jnp.result_type(*column)
        wide = accumulation_dtype(dtype)
        total = None
        for value, weight in zip(column, weights.astype(wide), strict=True):
            term = weight * xp.asarray(value, wide)
            total = term if total is None else total + term
        return xp.asarray(total, dtype)

    return with_auto_axes(mean, column, column[0].shape)(column, weights)


def _mean(x: Array, weights: Float[Array, " k"]) -> Array:
    """Averages one leaf `[K, ...]`."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        has_all = weights == 1
        last = len(weights) - 1
        xp = array_module(weights)
        chosen = xp.where(has_all.any(), xp.argmax(has_all), last)
        return x[chosen]
    wide = accumulation_dtype(x.dtype)
    weights = weights.astype(wide)
    x_wide = x.astype(wide)
    # Not a product of a vector and a matrix: on accelerators it would be of fewer digits than what
    # it is made of, and it takes longer to compile.
    shares = weights.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.sum(shares * x_wide, axis=0).astype(x.dtype)


# Weights


def mixtures(
    weights: Any,
    count: int,
    leaves: Sequence[Leaf],
) -> list[Float[Array, " k"]]:
    """Checks the weights of models, parameter by parameter.

    Args:
        weights: The weights in any form that `Weights` allows.
        count: The number K of models.
        leaves: The leaves of the models.

    Returns:
        The weights for each leaf, float `[K]`.

    Raises:
        ValueError: For weights that do not fit, naming the key path.
        TypeError: For anything but a list of numbers, naming the key path.
    """
    if not callable(weights):
        return [mixture(weights, count)] * len(leaves)
    checked = []
    for leaf in leaves:
        try:
            checked.append(mixture(weights(leaf.path), count))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{leaf.path}: {error}") from None
    return checked


def mixture(weights: Any, count: int) -> Float[Array, " k"]:
    """Checks the weights of models.

    Args:
        weights: K weights, summing to 1; uniform if None.
        count: The number K of models.

    Returns:
        The weights, float `[K]`.

    Raises:
        ValueError: For weights that do not fit.
        TypeError: For anything but a list of numbers.
    """
    dtype = jax.dtypes.canonicalize_dtype(float)
    if weights is None:
        weights = [1 / count] * count
    _require_numbers(weights)
    shape = np.shape(weights)
    if shape != (count,):
        raise ValueError(f"weights has shape {shape}, but there are {count} models")
    if _is_traced(weights):
        return jnp.asarray(weights, dtype)
    total = np.sum(weights)
    # Not the other way round: of NaN, no comparison is true.
    if not abs(total - 1) < _ROUNDING:
        raise ValueError(f"the weights sum to {total}; divide them by their sum")
    known: Any = np.asarray(weights, dtype)
    return known


def _require_numbers(weights: Any) -> None:
    """Refuses weights of models that are no list of numbers. How many they are is not checked.

    Args:
        weights: The argument that was given.

    Raises:
        TypeError: If the weights are a string, a dict, a function or a single number, or if there
            is anything but numbers among them.
    """
    remedy = "one number for each model, summing to 1, or None where all count alike"
    if isinstance(weights, jax.Array | np.ndarray):
        return
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        kind = type(weights).__name__
        raise TypeError(f"weights is {weights!r:.80}, of type {kind}; give {remedy}")
    for number, weight in enumerate(weights):
        # A weight may be an array without axes, as in a function that is traced.
        if not isinstance(weight, numbers.Real | jax.Array | np.ndarray):
            kind = type(weight).__name__
            raise TypeError(f"weight {number} is {weight!r:.80}, of type {kind}; give {remedy}")


def _is_traced(weights: Sequence[float]) -> bool:
    """Whether the weights, or any one in a list of them, have no values yet."""
    if isinstance(weights, Tracer):
        return True
    return any(isinstance(weight, Tracer) for weight in weights)


# Integers


def columns_of(models: Sequence[PyTree]) -> list[tuple[Any, ...]]:
    """Sorts the leaves of models by leaf.

    Args:
        models: The models, K pytrees of one structure.

    Returns:
        For each leaf its values in the models.
    """
    rows = [jax.tree_util.tree_leaves(model) for model in models]
    return list(zip(*rows, strict=True))


def check_integers(
    leaves: Sequence[Leaf],
    columns: Sequence[Any],
    shares: Sequence[Float[Array, " k"]],
) -> None:
    """Refuses integers that differ between models that are to be averaged.

    Args:
        leaves: The leaves of all models.
        columns: For each leaf its values in the models, K arrays or one array `[K, ...]`.
        shares: The weights of the models, for each leaf.

    Raises:
        ValueError: For arrays of integers or booleans that differ while no model has all of the
            weight, listing every such leaf by key path.
    """
    decided = [_has_all_weight(weights) for weights in shares]
    remedy = (
        ", or say by weights whose to keep, as in lambda path: (0.0, 1.0) if path == 'mask' else "
        "None"
    )
    require_equal_integers(leaves, columns, decided, remedy)


def _has_all_weight(weights: Array) -> bool:
    """Whether one of the models is known to have all of the weight."""
    if isinstance(weights, Tracer):
        return False
    has_all = np.asarray(weights) == 1
    return bool(has_all.any())
