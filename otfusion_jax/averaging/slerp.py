"""The arc between two models, in place of the straight line."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from otfusion_jax.averaging.average import columns_of
from otfusion_jax.averaging.interpolate import checked_positions
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.host import accumulation_dtype
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_equal_integers, require_finite
from otfusion_jax.symmetry.groups import leaves_of

# The sine of an angle below which two vectors are taken to be parallel. There the arc is the line
# to the last digit of float32, and where they are opposite, there is no arc.
_PARALLEL = 1e-4


def slerp(a: PyTree, b: PyTree, t: float | Float[Array, "*t"], *, per_leaf: bool = True) -> PyTree:
    """Goes from one model to another along an arc (spherical linear interpolation).

    With the angle w between a and b, it is `(sin((1 - t) w) a + sin(t w) b) / sin(w)`. Vectors are
    taken as they are, not scaled to length 1: between two of one length, all have that length,
    where on the straight line they are shorter. Where they are parallel or opposite, or one is 0,
    it is the straight line.

    Args:
        a: The parameters at `t = 0`.
        b: The parameters at `t = 1`, of the same structure and shapes.
        t: The position on the arc; beyond both ends it goes on around the circle. An array `[T]`
            gives a stack of T models.
        per_leaf: Whether each leaf is a vector of its own, with an angle of its own, as tools for
            merging have it. If False, all floating-point leaves together are one vector.

    Returns:
        The parameters, with the shape of `t` in front of each leaf, computed in float32 or wider
        and rounded once. Random keys and single integers (counters) are those of `b`; arrays of
        integers or booleans must be the same in both.

    Raises:
        ValueError: As `interpolate`.
        TypeError: As `interpolate`.
        FloatingPointError: For a result that is out of range.

    Warns:
        StatisticsWarning: If running statistics that differ are combined, as `average` warns.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> halfway = otf.slerp(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 0.5)
        >>> [round(float(x), 4) for x in halfway]
        [0.7071, 0.7071]

    References:
        Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    positions = checked_positions(t)
    require_alike([a, b], names=["a", "b"])
    leaves = leaves_of(a)
    columns = columns_of([a, b])
    require_equal_integers(leaves, columns, [False] * len(leaves), "")
    warn_of_averaged_statistics([a, b], False, [jnp.array([0.5, 0.5])] * len(leaves))
    pairs = []
    for first, second in columns:
        pairs.append((jnp.asarray(first), jnp.asarray(second)))
    moving = [pair for leaf, pair in zip(leaves, pairs, strict=True) if leaf.moves]
    together = None if per_leaf else _angle(moving)
    values = []
    for leaf, (first, second) in zip(leaves, pairs, strict=True):
        if not leaf.moves:
            # Integers, booleans and keys have no values in between.
            values.append(jnp.broadcast_to(second, positions.shape + second.shape))
            continue
        angle = _angle([(first, second)]) if together is None else together
        values.append(_on_arc(first, second, angle, positions))
    found = jax.tree_util.tree_structure(a).unflatten(values)
    require_finite(leaves, found, "slerp")
    return found


@jax.jit
def _angle(pairs: list[tuple[Array, Array]]) -> Float[Array, ""]:
    """Returns the angle between two vectors that are given leaf by leaf; 0 if one is 0."""
    if not pairs:
        return jnp.zeros(())
    first = _unit([a for a, _ in pairs])
    second = _unit([b for _, b in pairs])
    # By half the angle, which is exact for small angles where the cosine has no digits.
    apart = _length([x - y for x, y in zip(first, second, strict=True)])
    along = _length([x + y for x, y in zip(first, second, strict=True)])
    angle = 2 * jnp.arctan2(apart, along)
    is_zero = (_length(first) == 0) | (_length(second) == 0)
    return jnp.where(is_zero, 0, angle)


def _unit(vector: list[Array]) -> list[Array]:
    """Scales a vector to length 1; one of 0 stays."""
    wide = [x.astype(accumulation_dtype(x.dtype)) for x in vector]
    # By the largest entry first: the squares would be out of range.
    largest = _largest(wide)
    scaled = [x / largest.astype(x.real.dtype) for x in wide]
    length = _length(scaled)
    length = jnp.where(length > 0, length, 1)
    return [x / length.astype(x.real.dtype) for x in scaled]


def _largest(vector: list[Array]) -> Array:
    widest = jnp.result_type(*[x.real.dtype for x in vector])
    largest = jnp.zeros((), widest)
    for x in vector:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(x), initial=0).astype(widest))
    return jnp.where(largest > 0, largest, 1)


def _length(vector: list[Array]) -> Array:
    widest = jnp.result_type(*[x.real.dtype for x in vector])
    total = jnp.zeros((), widest)
    for x in vector:
        total = total + jnp.sum(jnp.real(x * jnp.conj(x))).astype(widest)
    # The square root has no derivative at 0, where vectors are parallel.
    is_zero = total == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, total)))


@jax.jit
def _on_arc(a: Array, b: Array, angle: Float[Array, ""], t: Any) -> Array:
    """Returns one leaf at positions of any shape."""
    wide = accumulation_dtype(a.dtype)
    real = jnp.finfo(wide).dtype
    angle, t = angle.astype(real), t.astype(real)
    sine = jnp.sin(angle)
    is_line = sine < _PARALLEL
    safe = jnp.where(is_line, 1, sine)
    of_a = jnp.where(is_line, 1 - t, jnp.sin((1 - t) * angle) / safe)
    of_b = jnp.where(is_line, t, jnp.sin(t * angle) / safe)
    # The axes of the positions come first, then those of the leaf.
    shape = t.shape + (1,) * a.ndim
    leaf_shape = (1,) * t.ndim + a.shape
    first, second = a.astype(wide).reshape(leaf_shape), b.astype(wide).reshape(leaf_shape)
    return (of_a.reshape(shape) * first + of_b.reshape(shape) * second).astype(a.dtype)
