"""Masses of units: how much each of them matters, by its weights or by its activations."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from otfusion_jax.symmetry import Symmetry
from otfusion_jax.units import units_of


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

    References:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, section 4 (support and
        probability mass).
    """
    if order not in (1, 2):
        raise ValueError(f"order is {order}; it must be 1 or 2")
    symmetry.validate(params)
    leaves = symmetry.split(params)
    found = {}
    for group in symmetry.groups:
        members = group.having("produces") or group.members
        vectors = [units_of(leaves[m.leaf], m.where, group) for m in members]
        sums = [jnp.sum(jnp.abs(v).astype(jnp.float32) ** order, axis=-1) for v in vectors]
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
    return {name: _masses(jnp.var(_real_norm(x), axis=-2)) for name, x in features.items()}


def _real_norm(x: Array) -> Array:
    return jnp.abs(x) if jnp.iscomplexobj(x) else x.astype(jnp.float32)


def _masses(importance: Array) -> Array:
    total = jnp.sum(importance, axis=-1, keepdims=True)
    return jnp.where(
        total > 0, importance / jnp.where(total > 0, total, 1), 1 / importance.shape[-1]
    )
