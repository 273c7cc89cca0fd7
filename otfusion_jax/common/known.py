"""Telling values that are known from those that are traced.

What loops over many small problems goes two ways. Where all values are known, Python loops, and
each step is a small jitted program that equal steps share: XLA compiles few programs, and nothing
is worked out that turns out not to be needed. Inside of a user's `jax.jit`, `jax.vmap` or
`jax.grad` there are no values to look at, and the loops are those of JAX.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def all_known(*trees: Any) -> bool:
    """Says whether Python can look at all values, now and of what is computed from them.

    Args:
        trees: Pytrees of arrays.

    Returns:
        False where any array is traced, and wherever else functions of JAX are being traced: there
        even what is computed from constants has no value yet.
    """
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, Tracer):
            return False
    probe = jax.device_put(np.zeros((), np.int32))
    return not isinstance(probe, Tracer)


def can_be_read_in_place(array: Any) -> bool:
    """Says whether NumPy can read the values of an array without a copy from another device.

    Args:
        array: An array of JAX or NumPy, or a Python number. It must not be a tracer.

    Returns:
        Whether they lie on one CPU that belongs to this process.
    """
    if not isinstance(array, jax.Array):
        return True
    # Of an array on several devices, to read it all would be to gather it.
    if len(array.devices()) > 1:
        return False
    for device in array.devices():
        if device.platform != "cpu":
            return False
    return True


def largest_magnitudes(arrays: Sequence[Any]) -> list[float]:
    """Takes the largest magnitude in each of several arrays, with one transfer for all.

    Args:
        arrays: Arrays of floating-point or complex dtypes, none of them a tracer.

    Returns:
        For each array its largest magnitude, 0 if it has no elements. Of complex numbers the real
        and the imaginary parts count, each by itself.
    """
    magnitudes: list[Any] = []
    for array in arrays:
        if can_be_read_in_place(array):
            # NumPy reads the values as they lie. JAX would compile a program for each shape.
            values = np.asarray(array)
            if values.dtype.itemsize < 4:
                # To compare numbers of bfloat16, NumPy takes ten times as long as to convert them.
                values = values.astype(np.float32)
            magnitudes.append(_largest_magnitude(np, values))
        else:
            magnitudes.append(_largest_on_device(array))
    return [float(magnitude) for magnitude in jax.device_get(magnitudes)]


@jax.jit
def _largest_on_device(array: jax.Array) -> jax.Array:
    return _largest_magnitude(jnp, array)


def _largest_magnitude(xp: Any, array: Any) -> Any:
    """Takes the largest magnitude by NumPy or by JAX."""
    parts = [array.real, array.imag] if xp.iscomplexobj(array) else [array]
    largest = xp.zeros((), parts[0].dtype)
    for part in parts:
        # Without a copy of the magnitudes.
        largest = xp.maximum(largest, xp.max(part, initial=0))
        largest = xp.maximum(largest, -xp.min(part, initial=0))
    return largest
