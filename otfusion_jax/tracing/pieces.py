"""Arrays in pieces: parts of one size that lie one after the other along an axis."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Pieces:
    """An array in pieces.

    Attributes:
        axis: The axis along which the parts lie one after the other.
        parts: The parts, arrays of one shape.
    """

    axis: int
    parts: tuple[Any, ...]

    @property
    def length(self) -> int:
        """The size of a part along the axis of the pieces."""
        return self.parts[0].shape[self.axis]

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of every part."""
        return self.parts[0].shape


Operand = ArrayLike | Pieces
"""An operand or a result of an equation: whole, or in pieces."""

Operands = list[Operand]
"""All operands or all results of an equation."""


def joined(operand: Operand) -> Any:
    """Returns an operand as one array."""
    if isinstance(operand, Pieces):
        return lax.concatenate(operand.parts, operand.axis)
    return operand


def single_or_pieces(axis: int, parts: Sequence[Any]) -> Operand:
    """Returns parts as pieces, and a part that is alone as the array that it is."""
    return parts[0] if len(parts) == 1 else Pieces(axis, tuple(parts))


def is_any_in_pieces(operands: Operands) -> bool:
    """Whether any of some operands is in pieces."""
    return any(isinstance(operand, Pieces) for operand in operands)


def first_in_pieces(operands: Operands) -> Pieces:
    """Returns the first operand that is in pieces. There has to be one."""
    for operand in operands:
        if isinstance(operand, Pieces):
            return operand
    raise ValueError("no operand is in pieces")


def part_facing(operand: Operand, number: int, pieces: Pieces, axis: int) -> Any:
    """Takes from an operand what meets one part of another operand.

    Args:
        operand: The operand, whole or in any pieces.
        number: The number of the part that it meets.
        pieces: The other operand.
        axis: The axis of `operand` that meets the axis of the pieces.

    Returns:
        The positions along `axis` that face those of the part.
    """
    if isinstance(operand, Pieces) and operand.axis == axis and operand.length == pieces.length:
        return operand.parts[number]
    # It is whole, or in pieces of another kind: two leaves may be split into different numbers.
    start = number * pieces.length
    return lax.slice_in_dim(joined(operand), start, start + pieces.length, axis=axis)


def collected(results_of_parts: Sequence[Sequence[Any]], axis: int) -> Operands:
    """Makes one result in pieces of the results that an equation has for each part.

    Args:
        results_of_parts: For each part all results of the equation.
        axis: The axis along which the results of the parts lie one after the other.

    Returns:
        All results of the equation, each in pieces.
    """
    results: Operands = []
    for parts in zip(*results_of_parts, strict=True):
        results.append(Pieces(axis, parts))
    return results
