"""The straight line between two models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.average import accumulation_dtype, columns_of
from otfusion_jax.averaging.stacking import stack
from otfusion_jax.symmetry.checks import require_equal_integers
from otfusion_jax.symmetry.groups import leaves_of


def interpolate(a: PyTree, b: PyTree, t: float | Float[Array, "*t"]) -> PyTree:
    """Goes from one model to another in a straight line.

    Args:
        a: The parameters at `t = 0`.
        b: The parameters at `t = 1`, of the same structure and shapes.
        t: The position on the line, which may lie beyond both ends. An array `[T]` gives a stack of
            T models.

    Returns:
        `(1 - t) a + t b`, with the shape of `t` in front of each leaf, computed in float32 or wider
        and rounded once. Random keys and single integers (counters) are those of `b`; arrays of
        integers or booleans must be the same in both.

    Raises:
        ValueError: For leaves that are no arrays, for trees that differ, and for integers that do,
            listing every offender by key path.
        TypeError: For shapes in place of arrays.
    """
    stacked = stack([a, b])
    leaves = leaves_of(a)
    undecided = [False] * len(leaves)
    require_equal_integers(leaves, columns_of([a, b]), undecided, "")
    positions = jnp.asarray(t, float)

    def interpolated(pair: Array) -> Array:
        return _interpolate_leaf(pair, positions)

    return jax.tree.map(interpolated, stacked)


def _interpolate_leaf(pair: Array, t: Array) -> Array:
    """Interpolates one leaf, given as `[2, ...]`, at positions of any shape."""
    x, y = pair
    # Integers, booleans and keys have no values in between.
    if not jnp.issubdtype(pair.dtype, jnp.inexact):
        return jnp.broadcast_to(y, t.shape + y.shape)
    wide = accumulation_dtype(pair.dtype)
    # The axes of the positions come first, then those of the leaf.
    position_shape = t.shape + (1,) * x.ndim
    leaf_shape = (1,) * t.ndim + x.shape
    t = t.reshape(position_shape)
    t = t.astype(wide)
    x = x.astype(wide).reshape(leaf_shape)
    y = y.astype(wide).reshape(leaf_shape)
    between = (1 - t) * x + t * y
    return between.astype(pair.dtype)
