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
                finite = np.isfinite(np.asarray(array))
                counts.append(finite.size - np.count_nonzero(finite))
            else:
                counts.append(_count_on_device(array))
        # All counts have been started by now. This waits for them, and copies them, together.
        return [int(count) for count in jax.device_get(counts)]


@jax.jit
def _count_on_device(array: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(array))
