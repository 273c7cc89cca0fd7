"""What comes out: ensembles, and how loss or accuracy runs along the path between two models."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.average import columns_of
from otfusion_jax.averaging.stacking import stack
from otfusion_jax.symmetry.checks import require_equal_integers
from otfusion_jax.symmetry.groups import leaves_of


def accumulation_dtype(dtype: Any) -> Any:
    """What to compute a mean of values of some precision in, to be rounded once."""
    return jnp.float32 if dtype.itemsize < 4 else dtype


def interpolate(a: PyTree, b: PyTree, t: float | Float[Array, "*t"]) -> PyTree:
    """Goes from one model to another in a straight line.

    Args:
        a: parameters at `t = 0`.
        b: parameters at `t = 1`, of the same structure and shapes.
        t: where on the line; `[T]` gives a stack of T models.

    Returns:
        `(1 - t) a + t b`, with the shape of `t` in front of each leaf, computed in float32 or wider
        and rounded once. Random keys and single integers (counters) are those of `b`; arrays of
        integers or booleans must be the same in both.

    Raises:
        ValueError: for trees that differ, and for integers that do, listing every offender by key
            path.
    """
    stacked = stack([a, b])
    leaves = leaves_of(a)
    require_equal_integers(leaves, columns_of([a, b]), [False] * len(leaves), "")
    t = jnp.asarray(t, float)

    def between(pair: Array) -> Array:
        x, y = pair
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.broadcast_to(y, t.shape + y.shape)
        wide = accumulation_dtype(x.dtype)
        s = t.reshape(t.shape + (1,) * x.ndim).astype(wide)
        x, y = (z.astype(wide).reshape((1,) * t.ndim + z.shape) for z in (x, y))
        return ((1 - s) * x + s * y).astype(pair.dtype)

    return jax.tree.map(between, stacked)
