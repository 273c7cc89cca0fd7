"""Evaluating primitives piece by piece: one function for each kind of primitive.

Each function gets an equation, and its operands, of which at least one is in pieces. It returns the
results, in pieces where they can be. It returns None where the primitive can't be evaluated piece
by piece on these operands; then it is evaluated on whole arrays. So a kind of primitive that is
missing here costs freedom and is no error.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as P

from otfusion_jax.tracing.jaxprs import evaluated
from otfusion_jax.tracing.pieces import (
    Operand,
    Operands,
    Pieces,
    collected,
    first_in_pieces,
    joined,
    part_facing,
    single_or_pieces,
)
from otfusion_jax.tracing.primitives import SPLIT, UNSTACK
from otfusion_jax.tracing.rules.families import ELEMENTWISE, REDUCTION

Piecewise = Callable[[JaxprEqn, Operands], Operands | None]
"""From an equation and its operands to its results, or None if pieces won't do."""


def _each_part(eqn: JaxprEqn, operands: Operands, axis: int, **changed_params: Any) -> Operands:
    """Evaluates an equation of one array on every part of it.

    Args:
        eqn: The equation.
        operands: The array in pieces, and scalars that go with it.
        axis: The axis of the results that the axis of the pieces becomes.
        **changed_params: Parameters of the primitive that are others for a part.

    Returns:
        The results in pieces.
    """
    pieces = first_in_pieces(operands)
    results_of_parts = []
    for part in pieces.parts:
        results_of_parts.append(evaluated(eqn, [part, *operands[1:]], **changed_params))
    return collected(results_of_parts, axis)


def _with_size(sizes: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    """Returns sizes of which one is another."""
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _axis_after_removal(removed: Sequence[Any], axis: int) -> int:
    """Returns where an axis comes to lie when others are removed."""
    # `int`, because axes that `vmap` has computed are NumPy's integers.
    return axis - sum(int(other) < axis for other in removed)


# --- several operands


def _elementwise(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    pieces = first_in_pieces(operands)
    axis = pieces.axis
    # What is in pieces along another axis is put together first, once for all parts.
    facing: Operands = []
    for operand in operands:
        is_alike = isinstance(operand, Pieces) and operand.axis == axis
        facing.append(operand if is_alike else joined(operand))
    results_of_parts = []
    for number in range(len(pieces.parts)):
        part_operands = []
        for operand in facing:
            if not _meets_every_part(operand, axis):
                operand = part_facing(operand, number, pieces, axis)
            part_operands.append(operand)
        results_of_parts.append(evaluated(eqn, part_operands))
    return collected(results_of_parts, axis)


def _meets_every_part(operand: Operand, axis: int) -> bool:
    """Whether an operand is the same for all parts: a scalar, or of size 1 along their axis."""
    if isinstance(operand, Pieces):
        return False
    shape = jnp.shape(operand)
    return not shape or shape[axis] == 1


def _concatenate(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    if eqn.params["dimension"] == first_in_pieces(operands).axis:
        return None
    return _elementwise(eqn, operands)


def _dot_general(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    """Pieces along an axis that remains stay apart; those along a contracted axis can't."""
    contracted, batch = eqn.params["dimension_numbers"]
    side = 0 if isinstance(operands[0], Pieces) else 1
    pieces = first_in_pieces(operands)
    if pieces.axis in contracted[side]:
        return None
    is_batch = pieces.axis in batch[side]
    facing = operands[1 - side]
    # Along a batch axis a part meets a part of the other operand, else all of it.
    facing_axis = None
    if is_batch:
        position = list(batch[side]).index(pieces.axis)
        facing_axis = batch[1 - side][position]
    else:
        facing = joined(facing)
    results_of_parts = []
    for number, part in enumerate(pieces.parts):
        facing_part = facing
        if facing_axis is not None:
            facing_part = part_facing(facing, number, pieces, facing_axis)
        pair = [part, facing_part] if side == 0 else [facing_part, part]
        results_of_parts.append(evaluated(eqn, pair))
    return collected(results_of_parts, _axis_of_product(eqn, side, pieces.axis))


def _axis_of_product(eqn: JaxprEqn, side: int, axis: int) -> int:
    """Returns where an axis that is not contracted comes to lie in a `dot_general`'s result.

    Batch axes come first, then the free axes of the left operand, and last those of the right one.

    Args:
        eqn: The equation.
        side: Which operand has the axis: 0 for the left one, 1 for the right one.
        axis: The axis.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    if axis in batch[side]:
        return list(batch[side]).index(axis)
    bound = (*contracted[side], *batch[side])
    free_before = 0
    for other in range(axis):
        if other not in bound:
            free_before += 1
    if side == 0:
        return len(batch[0]) + free_before
    left: Any = eqn.invars[0].aval
    return left.ndim - len(contracted[0]) + free_before


def _conv_general_dilated(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    """Pieces of a kernel along its output channels give pieces of the result along its channels."""
    numbers = eqn.params["dimension_numbers"]
    image, kernel = operands
    is_grouped = eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1
    if is_grouped or not isinstance(kernel, Pieces) or kernel.axis != numbers.rhs_spec[0]:
        return None
    whole = joined(image)
    results_of_parts = [evaluated(eqn, [whole, part]) for part in kernel.parts]
    return collected(results_of_parts, numbers.out_spec[1])


# --- one operand


def _transpose(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    axis = list(eqn.params["permutation"]).index(first_in_pieces(operands).axis)
    return _each_part(eqn, operands, axis)


def _broadcast_in_dim(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    pieces = first_in_pieces(operands)
    axis = int(eqn.params["broadcast_dimensions"][pieces.axis])
    shape = _with_size(eqn.params["shape"], axis, pieces.length)
    return _each_part(eqn, operands, axis, shape=shape)


def _squeeze(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    axis = _axis_after_removal(eqn.params["dimensions"], first_in_pieces(operands).axis)
    return _each_part(eqn, operands, axis)


def _reduce(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    pieces = first_in_pieces(operands)
    reduced = eqn.params["axes"]
    # A sum over the pieces is no longer in pieces.
    if pieces.axis in reduced:
        return None
    return _each_part(eqn, operands, _axis_after_removal(reduced, pieces.axis))


def _reshape(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    """The pieces lie one after the other still, along an axis that starts where theirs did."""
    if eqn.params["dimensions"] is not None:
        return None
    pieces = first_in_pieces(operands)
    count = len(pieces.parts)
    new_sizes = eqn.params["new_sizes"]
    # Row-major order is kept, so the new axis has as many elements in front of it as the old one.
    wanted = math.prod(pieces.part_shape[: pieces.axis])
    before = 1
    for axis, size in enumerate(new_sizes):
        if before == wanted and size % count == 0:
            part_sizes = _with_size(new_sizes, axis, size // count)
            return _each_part(eqn, operands, axis, new_sizes=part_sizes)
        before *= size
    return None


# --- parts of one operand


def _slice(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    """A slice that takes some of the parts, and any range along other axes."""
    pieces = first_in_pieces(operands)
    axis, length = pieces.axis, pieces.length
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    if strides[axis] != 1 or starts[axis] % length or ends[axis] % length:
        return None
    parts = pieces.parts[starts[axis] // length : ends[axis] // length]
    if not parts:
        return None
    # The same slice of a part: all of it along the axis of the pieces.
    starts = _with_size(starts, axis, 0)
    ends = _with_size(ends, axis, length)
    is_whole = not any(starts) and ends == pieces.part_shape and set(strides) == {1}
    if is_whole:
        return [single_or_pieces(axis, parts)]
    sliced_parts = []
    for part in parts:
        (sliced,) = evaluated(eqn, [part], start_indices=starts, limit_indices=ends)
        sliced_parts.append(sliced)
    return [single_or_pieces(axis, sliced_parts)]


def _split(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    pieces = first_in_pieces(operands)
    if eqn.params["axis"] != pieces.axis:
        return _each_part(eqn, operands, pieces.axis)
    results: Operands = []
    start = 0
    for size in eqn.params["sizes"]:
        # A boundary within a part cuts it in two, and what is empty is no pieces at all.
        if size == 0 or size % pieces.length:
            return None
        end = start + size // pieces.length
        results.append(single_or_pieces(pieces.axis, pieces.parts[start:end]))
        start = end
    return results


def _unstack(eqn: JaxprEqn, operands: Operands) -> Operands | None:
    pieces = first_in_pieces(operands)
    axis = eqn.params["axis"]
    if axis != pieces.axis:
        return _each_part(eqn, operands, _axis_after_removal([axis], pieces.axis))
    # Parts that are wider than one position would have to be taken apart in turn.
    if pieces.length != 1:
        return None
    return [lax.squeeze(part, (axis,)) for part in pieces.parts]


PIECEWISE: dict[Primitive, Piecewise] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTION, _reduce),
    **dict.fromkeys(SPLIT, _split),
    **dict.fromkeys(UNSTACK, _unstack),
    P.broadcast_in_dim_p: _broadcast_in_dim,
    P.concatenate_p: _concatenate,
    P.conv_general_dilated_p: _conv_general_dilated,
    P.dot_general_p: _dot_general,
    P.reshape_p: _reshape,
    P.slice_p: _slice,
    P.squeeze_p: _squeeze,
    P.transpose_p: _transpose,
}
"""The function that evaluates a primitive piece by piece. `scan` is in `split_jaxpr`, because it
evaluates a jaxpr in turn."""
