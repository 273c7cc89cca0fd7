"""Regression mean: the linear layers whose outputs are closest to those of all models."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from otfusion_jax.averaging.average import Weights, checked_average, mean_of_leaf, mixtures
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.host import Array, accumulation_dtype
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.groups import Leaf, leaves_of


def regmean(
    models: Sequence[PyTree],
    grams: Sequence[Mapping[str, Array]],
    weights: Weights = None,
    *,
    off_diagonal: float = 0.9,
    output_axis: int = -1,
) -> PyTree:
    """Averages models so that each linear layer answers its inputs as the models' layers do theirs.

    A kernel W `[n, m]` minimises `sum_k w_k ||X_k W - X_k W_k||^2` over the inputs X_k that the
    layer has in model k, of which only the inner products `G_k = X_k^T X_k` are needed. In
    directions that no model's inputs have, it is the plain average. All other parameters are
    averaged.

    Args:
        models: The models, K pytrees of the same structure and shapes, aligned to each other.
        grams: For each model a dict from the key path of a kernel to the inner products of its
            inputs, float `[n, n]`, summed over the examples. For a kernel of more axes, as of a
            convolution, n is the product of all axes but that of the outputs, in their order.
        weights: The K weights of the models, summing to 1; uniform if None; or a function from the
            key path of a parameter to either, see `average`.
        off_diagonal: What the inner products of two different inputs are multiplied by, from 0 to
            1. The paper has 0.9, and 0.1 for some models: below 1 it is less sure of them.
        output_axis: The axis of the outputs in the kernels that have inner products: -1 in Flax and
            Haiku, 0 in Equinox.

    Returns:
        The parameters, computed in float32 or wider and rounded once. Integers, booleans and keys
        are as in `average`.

    Raises:
        ValueError: As `average`; for inner products of a parameter that is not there or is no
            matrix of real floating-point numbers, of other shapes, or not of all models, listing
            each by key path; for `off_diagonal` out of range.
        TypeError: As `average`, and for what is no list of dicts.
        FloatingPointError: For a result that is out of range.

    Warns:
        StatisticsWarning: As `average`.

    References:
        Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023.
    """
    require_alike(models)
    if not 0 <= off_diagonal <= 1:
        raise ValueError(f"off_diagonal is {off_diagonal}; give a factor from 0 to 1")
    leaves = leaves_of(models[0])
    shares = mixtures(weights, len(models), leaves)
    _check_grams(leaves, grams, len(models), output_axis)
    warn_of_averaged_statistics(models, False, shares)

    def mean_of(number: int, column: tuple[Any, ...], share: Array) -> Array:
        path = leaves[number].path
        if path not in grams[0]:
            return mean_of_leaf(column, share)
        own = tuple(jnp.asarray(of_model[path]) for of_model in grams)
        kernels = tuple(jnp.moveaxis(jnp.asarray(x), output_axis, -1) for x in column)
        solved = _solved(kernels, own, share, jnp.asarray(off_diagonal, float))
        return jnp.moveaxis(solved, -1, output_axis)

    return checked_average(leaves, models, shares, "regmean", mean_of)


@jax.jit
def _solved(
    kernels: tuple[Array, ...],
    grams: tuple[Array, ...],
    weights: Float[Array, " k"],
    off_diagonal: Float[Array, ""],
) -> Array:
    """Solves the least squares of one kernel, whose outputs are its last axis."""
    shape, dtype = kernels[0].shape, kernels[0].dtype
    wide = accumulation_dtype(dtype)
    x = jnp.stack(kernels).astype(wide).reshape(len(kernels), -1, shape[-1])
    gram = jnp.stack(grams).astype(wide) * weights.astype(wide)[:, None, None]
    diagonal = jnp.eye(gram.shape[-1], dtype=bool)[None]
    gram = jnp.where(diagonal, gram, gram * off_diagonal.astype(wide))
    # The largest of all is 1: squares of activations may be of any size.
    largest = jnp.max(jnp.abs(gram), initial=0)
    gram = gram / jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(weights.astype(wide)[:, None, None] * x, axis=0)
    # What is added to the average: in directions without inputs, nothing.
    highest = jax.lax.Precision.HIGHEST
    wanted = jnp.einsum("knj,kjm->nm", gram, x - mean[None], precision=highest)
    inverse = jnp.linalg.pinv(jnp.sum(gram, axis=0), hermitian=True)
    added = jnp.matmul(inverse, wanted, precision=highest)
    return (mean + added).reshape(shape).astype(dtype)


def _check_grams(leaves: Sequence[Leaf], grams: Any, count: int, output_axis: int) -> None:
    """Refuses inner products that do not fit the models.

    Args:
        leaves: The leaves of the models.
        grams: The inner products that were given.
        count: The number K of models.
        output_axis: The axis of the outputs.

    Raises:
        ValueError: For inner products that do not fit, listing each by key path.
        TypeError: For what is no list of dicts.
    """
    if not isinstance(grams, list | tuple) or not all(isinstance(x, Mapping) for x in grams):
        raise TypeError(
            f"grams is {kind_of(grams)}; pass a list of dicts, one for each model, from the key "
            "path of a kernel to the inner products of its inputs"
        )
    if len(grams) != count:
        raise ValueError(f"there are {len(grams)} dicts of inner products, but {count} models")
    known = {leaf.path: leaf for leaf in leaves}
    wrong = []
    for number, of_model in enumerate(grams):
        for path in grams[0].keys() - of_model.keys():
            wrong.append(f"  {path}: none of model {number}")
        for path, gram in of_model.items():
            leaf = known.get(path)
            if leaf is None:
                wrong.append(f"  {path}: not a parameter, in model {number}")
                continue
            if path not in grams[0]:
                wrong.append(f"  {path}: none of model 0")
            axes = len(leaf.shape)
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or axes < 2:
                wrong.append(f"  {path}: {leaf.dtype} of shape {leaf.shape} is no kernel")
            elif not -axes <= output_axis < axes:
                wrong.append(f"  {path}: shape {leaf.shape} has no axis {output_axis}")
            else:
                size = math.prod(leaf.shape) // max(1, leaf.shape[output_axis])
                if jnp.shape(gram) != (size, size):
                    wrong.append(
                        f"  {path}: shape {jnp.shape(gram)} in model {number}, expected "
                        f"{(size, size)}"
                    )
    if wrong:
        raise ValueError("these inner products do not fit:\n" + "\n".join(sorted(wrong)))
