"""Counting the values of arrays that are not finite, with one transfer from the device for all.

To wait for the device once per array would take longer than all else that is checked of a model of
many leaves.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.known import can_be_read_in_place


def not_finite(array: Any) -> int:
    """Counts the values of one array that are not finite.

    Args:
        array: An array of any shape and of a floating-point or complex dtype. It must not be a
            tracer.

    Returns:
        The number of values that are NaN or infinite.
    """
    return not_finite_counts([array])[0]


def not_finite_counts(arrays: Sequence[Any]) -> list[int]:
    """Counts the values that are not finite in each of several arrays.

    Args:
        arrays: Arrays of JAX or NumPy, or Python numbers, of any shapes and of floating-point or
            complex dtypes. They may lie on different devices. None may be a tracer.

    Returns:
        For each array the number of values that are NaN or infinite.
    """
    counts: list[Any] = []
    # The arrays may be closed over by what is being traced; they are looked at now all the same.
    with jax.ensure_compile_time_eval():
        for array in arrays:
            if can_be_read_in_place(array):
                # NumPy reads the values as they lie. JAX would compile a program for each shape.
                counts.append(_count(np.asarray(array)))
            else:
                counts.append(_count_on_device(array))
        # All counts have been started by now. This waits for them, and copies them, together.
        return [int(count) for count in jax.device_get(counts)]


def _count(array: np.ndarray) -> int:
    """Counts the values of an array of NumPy that are not finite."""
    is_plain = array.dtype in (np.float32, np.float64) and array.flags.forc
    # A sum of squares is finite only if all values are, and takes a fraction of the time. Where it
    # is not, squares may be out of range, and values are counted one by one.
    if is_plain and np.isfinite(np.vdot(array, array)):
        return 0
    finite = np.isfinite(array)
    return finite.size - int(np.count_nonzero(finite))


@jax.jit
def _count_on_device(array: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(array))
