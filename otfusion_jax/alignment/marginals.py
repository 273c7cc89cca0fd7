"""Masses of units: how much each of them matters, by its weights or by its activations.

Both functions return what `align(..., marginals=...)` takes for one of the two models.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.finiteness import not_finite
from otfusion_jax.common.scaling import common_exponent, scaled
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.units import units_of


def weight_importance(
    symmetry: Symmetry, params: PyTree, order: int = 2
) -> dict[str, Float[Array, "*batch n"]]:
    """Says how much the units of a network matter, by the norms of their incoming weights.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters of the network.
        order: The order of the norm: 1 for the sum of magnitudes, 2 for the Euclidean norm.

    Returns:
        For each group the norms of the weights that produce its units, divided by their sum. Where
        all are 0, they are uniform.

    Raises:
        ValueError: If the order is another one, or if the parameters do not fit.
        TypeError: If the arguments are in another order, or shapes are in the place of arrays.

    References:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, section 4 (support and
        probability mass).
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}; it must be 1 or 2")
    require_symmetry(symmetry, "weight_importance(symmetry, params)")
    require_model(symmetry, params)
    leaves = symmetry.split(params)
    importance = {}
    for group in symmetry.groups:
        vectors = []
        # Units that no parameter produces count by what consumes them.
        for member in group.having("produces") or group.members:
            vectors.append(units_of(leaves[member.leaf], member.location, group))
        # Masses do not change with the scale of the weights, and their squares are in range.
        exponent = common_exponent(vectors)
        total = None
        for vector in vectors:
            magnitudes = jnp.abs(scaled(vector, -exponent)).astype(jnp.float32)
            powers = jnp.sum(magnitudes**order, axis=-1)
            total = powers if total is None else total + powers
        assert total is not None, "a group has members"
        importance[group.name] = _masses(total ** (1 / order))
    return importance


def feature_importance(
    features: dict[str, Float[Array, "*batch samples n"]],
) -> dict[str, Float[Array, "*batch n"]]:
    """Says how much the units of a network matter, by the variance of their activations.

    Args:
        features: The activations by the names of groups, as `features` returns them. Those of
            integers or booleans are read as float32.

    Returns:
        For each group the variances over the samples, divided by their sum. Where all are 0, they
        are uniform.

    Raises:
        TypeError: For what is no dict of arrays of numbers.
        ValueError: For activations without samples, of which there is no variance, and for those
            that are known not to be finite. Every group is listed.
    """
    _require_activations(features)
    importance = {}
    for name, activations in features.items():
        if not jnp.issubdtype(activations.dtype, jnp.inexact):
            activations = jnp.asarray(activations).astype(jnp.float32)
        # Squares of large activations would be out of range; the masses are the same at any scale.
        activations = scaled(activations, -common_exponent([activations]))
        if jnp.iscomplexobj(activations):
            magnitudes = jnp.abs(activations)
        else:
            magnitudes = activations.astype(jnp.float32)
        importance[name] = _masses(jnp.var(magnitudes, axis=-2))
    return importance


def _require_activations(features: Any) -> None:
    """Refuses what is not as `features` returns it."""
    remedy = "pass what features(symmetry, fn, params, x) returns, arrays [samples, units] by group"
    if not isinstance(features, dict):
        raise TypeError(f"features is {kind_of(features)}; {remedy}")
    wrong = []
    for name, activations in features.items():
        is_array = isinstance(activations, jax.Array | np.ndarray)
        if not is_array or not (
            jnp.issubdtype(activations.dtype, jnp.number) or activations.dtype == bool
        ):
            raise TypeError(f"the features of {name} are {kind_of(activations)}; {remedy}")
        problem = _problem_of_activations(activations)
        if problem is not None:
            wrong.append(f"  {name}: {problem}")
    if wrong:
        raise ValueError("these features say nothing of the units:\n" + "\n".join(wrong))


def _problem_of_activations(activations: Any) -> str | None:
    """Says what is wrong with the activations of a group, if anything is."""
    shape = activations.shape
    if len(shape) < 2:
        return f"shape {shape}, expected [samples, units]"
    if shape[-2] == 0:
        return f"shape {shape}, no samples: no input reaches the group, leave it out"
    if isinstance(activations, Tracer) or not jnp.issubdtype(activations.dtype, jnp.inexact):
        return None
    count = not_finite(activations)
    return f"{count} of {activations.size} values not finite" if count else None


def _masses(importance: Array) -> Array:
    """Divides numbers by their sum, over the last axis; where that is 0, they become uniform."""
    total = jnp.sum(importance, axis=-1, keepdims=True)
    uniform = 1 / importance.shape[-1]
    return jnp.where(total > 0, importance / jnp.where(total > 0, total, 1), uniform)
