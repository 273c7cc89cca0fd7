"""The straight line between two models."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from otfusion_jax.averaging.average import columns_of
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.common.host import accumulation_dtype
from otfusion_jax.common.sharding import laid_out_like, on_auto_axes
from otfusion_jax.common.typing import PyTree
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
            listing every offender by key path; for positions that are not finite.
        TypeError: For shapes in place of arrays, and for positions that are no numbers.
    """
    positions = checked_positions(t)
    require_alike([a, b])
    leaves = leaves_of(a)
    undecided = [False] * len(leaves)
    require_equal_integers(leaves, columns_of([a, b]), undecided, "")

    def interpolated(x: Any, y: Any) -> Array:
        # On axes that are explicit, JAX adds up what is laid out alike and nothing else.
        x, y = on_auto_axes((jnp.asarray(x), jnp.asarray(y)))
        return _interpolate_leaf(x, y, positions)

    between = jax.tree.map(interpolated, a, b)
    return between if positions.ndim else laid_out_like(between, b)


def checked_positions(t: Any) -> Float[Array, "*t"]:
    """Refuses positions on a line that are no numbers, or that are known not to be finite.

    Args:
        t: The argument that was given: a number, or an array or a list of numbers.

    Returns:
        The positions, of the shape that they have.

    Raises:
        TypeError: If there is anything but real numbers.
        ValueError: If a number is NaN or infinite.
    """
    values = t if isinstance(t, list | tuple) else [t]
    for value in values:
        is_array = isinstance(value, jax.Array | np.ndarray) and value.dtype.kind in "iuf"
        # To Python a bool is a number; given as a position it is a mistake.
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_array or is_number):
            raise TypeError(
                f"t is {t!r:.80}, of type {type(t).__name__}; give a number, 0 for the one model "
                "and 1 for the other, or an array of numbers"
            )
    positions = jnp.asarray(t, float)
    if not isinstance(positions, Tracer) and not np.all(np.isfinite(positions)):
        raise ValueError(f"t is {t!r:.80}; positions on the line between two models are finite")
    return positions


def _interpolate_leaf(x: Array, y: Array, t: Array) -> Array:
    """Interpolates one leaf at positions of any shape."""
    # Integers, booleans and keys have no values in between.
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.broadcast_to(y, t.shape + y.shape)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    wide = accumulation_dtype(dtype)
    # The axes of the positions come first, then those of the leaf.
    position_shape = t.shape + (1,) * x.ndim
    leaf_shape = (1,) * t.ndim + x.shape
    t = t.reshape(position_shape).astype(wide)
    x = x.astype(wide).reshape(leaf_shape)
    y = y.astype(wide).reshape(leaf_shape)
    between = (1 - t) * x + t * y
    return between.astype(dtype)
