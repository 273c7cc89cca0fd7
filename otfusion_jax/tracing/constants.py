"""Constants of a traced program: along which axes an array varies, and where.

A constant holds units in place wherever it varies along them, since a permuted network would meet
the same constant. Along an axis that it does not vary along it agrees with anything. One that falls
into a few stretches of equal entries (ones for the first half of the units, zeros for the others)
holds no unit within a stretch: there it is the axis that is split into segments.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.tracing.axis import Axis, Kind, concatenated, constant
from otfusion_jax.tracing.unification import Unifier
from otfusion_jax.tracing.values import TracedValue

MAX_STRETCHES = 8
"""A constant of more stretches along an axis, or of one at every other position, pins the axis in
place of splitting it."""


def constant_value(unifier: Unifier, array: Any) -> TracedValue:
    """Describes an array that the traced function closes over.

    Args:
        unifier: What is known of the axes of the trace, for new pinned axes.
        array: The array, a scalar of Python, or what JAX has in its place (keys, tracers).

    Returns:
        Its axes: constant, split into constant segments, or pinned.
    """
    aval = jax.typeof(array)
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
    # Of keys, and of what belongs to a trace around this one, the numbers can't be read.
    is_opaque = is_key or isinstance(array, Tracer)
    axes = []
    for dim, size in enumerate(aval.shape):
        axis = None if is_opaque else _axis_along(array, dim, size)
        if axis is None:
            reason = f"a constant of shape {aval.shape} that varies along axis {dim}"
            axis = unifier.pinned(size, reason)
        axes.append(axis)
    return TracedValue(tuple(axes), Kind.CONSTANT)


def is_throughout(array: Any, number: int) -> bool:
    """Says whether all of an array that the traced function closes over is known to be a number."""
    aval = jax.typeof(array)
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended) or isinstance(array, Tracer):
        return False
    return bool(np.all(np.asarray(array) == number))


def number_of(array: Any) -> float | None:
    """Returns the number that an array of one entry holds; None of other arrays.

    Args:
        array: An array that the traced function closes over, or a literal.

    Returns:
        The number. None if it is complex, not known, or no number.
    """
    aval = jax.typeof(array)
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
    if is_key or isinstance(array, Tracer) or aval.size != 1:
        return None
    if not jnp.issubdtype(aval.dtype, jnp.floating) and not jnp.issubdtype(aval.dtype, jnp.integer):
        return None
    return float(np.asarray(array).reshape(()))


def _axis_along(array: Any, dim: int, size: int) -> Axis | None:
    """Returns an axis of an array; None where the array holds its positions in place."""
    if size < 2:
        return constant(size)
    numbers = np.asarray(array)
    lengths = _stretches(numbers, dim)
    if len(lengths) > max(1, min(MAX_STRETCHES, size // 2)):
        return None
    # What a mask leaves out on these inputs it may let pass on others.
    if len(lengths) > 1 and _is_mask(numbers, dim):
        return None
    return concatenated(map(constant, lengths))


def _stretches(numbers: np.ndarray, dim: int) -> list[int]:
    """Returns the lengths of the stretches along which an array does not vary, bit by bit."""
    size = numbers.shape[dim]
    slices = np.moveaxis(numbers, dim, 0)
    rows = np.ascontiguousarray(slices)
    rows = rows.reshape(size, -1)
    # Values would not do: 0.0 and -0.0 are equal, and a division tells them apart.
    bits = rows.view(np.uint8)
    changed = bits[1:] != bits[:-1]
    starts = np.flatnonzero(changed.any(axis=1)) + 1
    lengths = np.diff(starts, prepend=0, append=size)
    return lengths.tolist()


def _is_mask(numbers: np.ndarray, dim: int) -> bool:
    """Whether an array is all 0, or False, at some positions of an axis and not at others."""
    size = numbers.shape[dim]
    slices = np.moveaxis(numbers, dim, 0)
    rows = slices.reshape(size, -1)
    nonzero = rows != 0
    passes = nonzero.any(axis=1)
    return bool(passes.any() and not passes.all())
