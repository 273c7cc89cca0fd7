"""Averages in which each number of a model has a weight of its own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from otfusion_jax.averaging.average import (
    Weights,
    checked_average,
    columns_of,
    mean_of_leaf,
    mixtures,
)
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.host import Array, accumulation_dtype
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_models
from otfusion_jax.symmetry.groups import Leaf, leaves_of


def fisher_average(
    models: Sequence[PyTree], fishers: Sequence[PyTree], weights: Weights = None
) -> PyTree:
    """Averages models, each number by how much it matters to its model.

    Each number is `sum_k w_k F_k x_k / sum_k w_k F_k`, with the weight w and the importance F of
    model k. Where no model has any, it is the plain weighted average. With the diagonal of the
    Fisher information for F, it is the mode of the product of the models' posteriors in Laplace's
    approximation. Any other importance does as well; scaling all by one number changes nothing.

    Args:
        models: The models, K pytrees of the same structure and shapes. Where they were moved by
            `transport`, so were the importances, along the same plans, if these are permutations.
        fishers: The importances of their numbers, K pytrees of the same structure and shapes, of
            any real floating-point dtype, 0 or more. Of leaves that are no floating-point numbers,
            they are not looked at. For the Fisher information, take the mean over examples of the
            squared gradient of the log-likelihood, of labels that are drawn from the model.
        weights: The K weights of the models, 0 or more and summing to 1; uniform if None; or a
            function from the key path of a parameter to either, see `average`.

    Returns:
        The average, computed in float32 or wider and rounded once. Integers, booleans and keys are
        as in `average`.

    Raises:
        ValueError: As `average`, for weights below 0, and for importances of other structures or
            shapes, below 0 or not finite, listing each by key path.
        TypeError: As `average`.
        FloatingPointError: For an average that is out of range.

    Warns:
        StatisticsWarning: As `average`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> models = [jnp.array([0.0, 0.0]), jnp.array([4.0, 4.0])]
        >>> otf.fisher_average(models, [jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])]).tolist()
        [1.0, 2.0]

    References:
        Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022.
    """
    require_alike(models)
    leaves = leaves_of(models[0])
    shares = mixtures(weights, len(models), leaves)
    for leaf, share in zip(leaves, shares, strict=True):
        # Beyond the models, sums of importances can vanish, and there is no mean.
        if not isinstance(share, Tracer) and np.min(share) < 0:
            raise ValueError(f"{leaf.path}: a weight is {np.min(share):.3g}; give 0 or more")
    importances = _checked_importances(models[0], leaves, fishers, len(models))
    warn_of_averaged_statistics(models, False, shares)

    def mean_of(number: int, column: tuple[Any, ...], share: Array) -> Array:
        if not leaves[number].moves:
            return mean_of_leaf(column, share)
        return _weighted(column, importances[number], share)

    return checked_average(leaves, models, shares, "averaging", mean_of)


@jax.jit
def _weighted(
    column: tuple[Array, ...], importances: tuple[Array, ...], weights: Float[Array, " k"]
) -> Array:
    """Averages the values of one leaf by weights of each number."""
    x = jnp.stack(column)
    wide = accumulation_dtype(x.dtype)
    real = jnp.finfo(wide).dtype
    own = jnp.stack([importance.astype(real) for importance in importances])
    shares = weights.astype(real).reshape(-1, *[1] * (x.ndim - 1))
    # Relative to the largest: squared gradients may be so small that products of them vanish.
    largest = jnp.max(own, axis=0, keepdims=True)
    relative = shares * own / jnp.where(largest > 0, largest, 1)
    total = jnp.sum(relative, axis=0, keepdims=True)
    final = jnp.where(total > 0, relative / jnp.where(total > 0, total, 1), shares)
    return jnp.sum(final * x.astype(wide), axis=0).astype(x.dtype)


def _checked_importances(
    model: PyTree, leaves: Sequence[Leaf], fishers: Any, count: int
) -> list[tuple[Any, ...]]:
    """Checks importances, and sorts them by leaf.

    Args:
        model: A model.
        leaves: Its leaves.
        fishers: The importances that were given.
        count: The number K of models.

    Returns:
        For each leaf the importances in the models.

    Raises:
        ValueError: For importances that do not fit, listing each by key path.
        TypeError: For what is no list.
    """
    if not isinstance(fishers, Sequence) or isinstance(fishers, str):
        require_models(fishers)
    if len(fishers) != count:
        raise ValueError(f"there are {len(fishers)} importances, but {count} models")
    structure = jax.tree_util.tree_structure(model)
    wrong = []
    for number, fisher in enumerate(fishers):
        if jax.tree_util.tree_structure(fisher) != structure:
            raise ValueError(f"importance {number} has another structure than the models")
        for leaf, value in zip(leaves, jax.tree_util.tree_leaves(fisher), strict=True):
            if not leaf.moves:
                continue
            problem = None
            if jnp.shape(value) != leaf.shape:
                problem = f"shape {jnp.shape(value)}, expected {leaf.shape}"
            elif not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                problem = f"dtype {jnp.result_type(value)}, which is not real floating-point"
            elif not isinstance(value, Tracer):
                known = np.asarray(value)
                if not np.all(np.isfinite(known) & (known >= 0)):
                    problem = "values below 0, or not finite"
            if problem is not None:
                wrong.append(f"  {leaf.path}: {problem}, in importance {number}")
    if wrong:
        raise ValueError("these importances do not fit the models:\n" + "\n".join(wrong))
    return columns_of(fishers)
