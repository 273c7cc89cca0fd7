"""Biases that weights alone read are made 0: the biases behind these weights take them up.

Of `(x + b) @ W + d` only `b @ W + d` counts, however it is shared out between `b` and `d`. An
`Offset`, which the trace has proved, says which biases these are (see `tracing.offsets`).
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from otfusion_jax.common.host import (
    Array,
    accumulation_dtype,
    array_module,
    as_lazy_as,
    filled_like,
    loaded,
    program,
)
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.groups import Offset, OffsetReader
from otfusion_jax.symmetry.symmetry import Symmetry


def without_offsets(symmetry: Symmetry, params: PyTree) -> PyTree:
    """Makes biases 0 that others can take up, see `canonicalize`.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters.

    Returns:
        The parameters. Those that are lazy are read when they are looked at.
    """
    offsets = _in_order(symmetry)
    if not offsets:
        return params
    arrays = symmetry.split(params)
    for offset in offsets:
        bias = arrays[offset.leaf]
        for reader in offset.readers:
            array, kernel = arrays[reader.leaf], arrays[reader.kernel]
            add = functools.partial(_with_offset, offset, reader, array, kernel, bias)
            arrays[reader.leaf] = as_lazy_as(array, add)
        arrays[offset.leaf] = filled_like(bias, 0)
    return symmetry.join(arrays)


def _in_order(symmetry: Symmetry) -> list[Offset]:
    """Lists the offsets, those first that others take up and hand on."""
    waiting: list[Offset] = []
    for freedom in symmetry.freedoms:
        waiting.extend(freedom.offsets)
    ordered = []
    while waiting:
        targets = {reader.leaf for offset in waiting for reader in offset.readers}
        ready = [offset for offset in waiting if offset.leaf not in targets]
        # In a circle, each in turn is as good as any.
        ready = ready or waiting[:1]
        ordered += ready
        waiting = [offset for offset in waiting if offset not in ready]
    return ordered


def _with_offset(offset: Offset, reader: OffsetReader, array: Any, kernel: Any, bias: Any) -> Array:
    """Adds to one bias what weights read of another; all are first read if they are lazy."""
    layered = offset.layered
    return _taken_up(reader, loaded(array), loaded(kernel), loaded(bias), offset.axis, layered)


@program(static_argnames=("reader", "axis", "layered"))
def _taken_up(
    reader: OffsetReader, array: Array, kernel: Array, bias: Array, axis: int, layered: bool
) -> Array:
    """Adds to a bias what weights read of another one.

    Args:
        reader: The weights, and the bias that takes up what they read.
        array: This bias.
        kernel: The weights.
        bias: The other bias.
        axis: The axis of it that the units lie along.
        layered: Whether the first axis of all three are layers.

    Returns:
        The bias, of its own shape and dtype.
    """
    xp = array_module(array, kernel, bias)
    # Half precision would lose the digits of sums.
    wide = accumulation_dtype(array.dtype)
    # Axes of the weights are called by their numbers, and axes of size 1 by numbers of their own.
    of_kernel = list(range(kernel.ndim))
    of_bias = [kernel.ndim + number for number in range(bias.ndim)]
    of_bias[axis] = reader.axis
    axes = [kernel_axis for _, kernel_axis in reader.axes]
    if layered:
        of_bias[0] = 0
        axes = [0, *axes]
    # NumPy's sums have the precision of their terms.
    precision = {} if xp is not jnp else {"precision": lax.Precision.HIGHEST}
    operands = (kernel.astype(wide), of_kernel, bias.astype(wide), of_bias, axes)
    read = xp.einsum(*operands, **precision)
    return (array.astype(wide) + read.reshape(array.shape)).astype(array.dtype)
