"""Masses of units: how much each of them matters, by its weights or by its activations."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from otfusion_jax.common.scaling import common_exponent, scaled
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.units import units_of


def weight_importance(
    symmetry: Symmetry, params: PyTree, order: int = 2
) -> dict[str, Float[Array, "*batch n"]]:
    """Says how much the units of a network matter, by the norms of their incoming weights.

    Args:
        symmetry: of the network.
        params: its parameters.
        order: 1 or 2: of the norm.

    Returns:
        For each group the norms of the weights that produce its units, divided by their sum:
        masses for `align(..., marginals=...)`. Where all are 0, uniform.

    Raises:
        ValueError: for another order, or parameters that do not fit.
        TypeError: for arguments in another order, and shapes in place of arrays.

    References:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, section 4 (support and
        probability mass).
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}; it must be 1 or 2")
    require_symmetry(symmetry, "weight_importance(symmetry, params)")
    require_model(symmetry, params)
    leaves = symmetry.split(params)
    found = {}
    for group in symmetry.groups:
        members = group.having("produces") or group.members
        vectors = [units_of(leaves[m.leaf], m.location, group) for m in members]
        k = common_exponent(vectors)
        sizes = [jnp.abs(scaled(v, -k)).astype(jnp.float32) for v in vectors]
        sums = [jnp.sum(size**order, axis=-1) for size in sizes]
        found[group.name] = _masses(functools.reduce(jnp.add, sums) ** (1 / order))
    return found


def feature_importance(
    features: dict[str, Float[Array, "*batch samples n"]],
) -> dict[str, Float[Array, "*batch n"]]:
    """Says how much the units of a network matter, by the variance of their activations.

    Args:
        features: activations, as `features` returns them.

    Returns:
        For each group the variances over the samples, divided by their sum: masses for
        `align(..., marginals=...)`. Where all are 0, uniform.
    """
    return {name: _masses(jnp.var(_in_range(x), axis=-2)) for name, x in features.items()}


def _in_range(x: Array) -> Array:
    """Scales activations, so that their squares are in range; of complex ones the magnitudes."""
    x = scaled(x, -common_exponent([x]))
    return jnp.abs(x) if jnp.iscomplexobj(x) else x.astype(jnp.float32)


def _masses(importance: Array) -> Array:
    total = jnp.sum(importance, axis=-1, keepdims=True)
    return jnp.where(
        total > 0, importance / jnp.where(total > 0, total, 1), 1 / importance.shape[-1]
    )
