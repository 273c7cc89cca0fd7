"""Axes taken apart into segments, as slices and splits do.

`h[:, :4]` of features with 12 units keeps the first 4 of them. No order is known among the units,
but it is known now that there are two kinds of them: those that are kept, and the others. The axis
becomes a sum of two segments, within each of which the units may still be permuted.

A product can be split between the blocks of its outermost term only. Of an axis of 3 heads times 4
units, the first 4 positions are the first head, and the heads fall into a first one and two others.
The first 6 positions hold two units of the second head, but all of the first head. No split of the
heads or of the units says so.
"""

import bisect
from collections.abc import Sequence

from otfusion_jax.tracing.axis import (
    Axis,
    Disagreement,
    Sum,
    Term,
    concatenated,
    size_of,
)
from otfusion_jax.tracing.axis_variables import AxisVariables


def split_segments(variables: AxisVariables, axis: Axis, boundaries: Sequence[int]) -> list[Axis]:
    """Takes an axis apart into segments, wherever its variables occur.

    Args:
        variables: The axis variables.
        axis: The axis.
        boundaries: The positions at which a new segment begins, in ascending order, neither 0 nor
            the end of the axis.

    Returns:
        The axis of each segment, one more than there are boundaries. Segments of size 1 may be
        single positions, as segments of a sum are; by itself such a one is the empty product.

    Raises:
        Disagreement: If a boundary lies within a block of a product.
    """
    if not boundaries:
        return [axis]
    terms = variables.expand(axis, keep_single=True)
    first = 0
    while terms[first].size == 1:
        first += 1
    # Single positions outside of all other terms are there in every segment.
    around = terms[:first]
    outermost = terms[first]
    inner = terms[first + 1 :]
    # Each index of the outermost term is a block of all that is inside of it.
    block_size = size_of(inner)
    block_boundaries = []
    for boundary in boundaries:
        if boundary % block_size:
            raise Disagreement(f"split at {boundary} within blocks of {block_size}", axis)
        block_boundaries.append(boundary // block_size)
    pieces = _split_term(variables, outermost, block_boundaries)
    return [(*around, *piece, *inner) for piece in pieces]


def _split_term(variables: AxisVariables, term: Term, boundaries: Sequence[int]) -> list[Axis]:
    """Takes a single term apart."""
    sizes = []
    start = 0
    for end in (*boundaries, term.size):
        sizes.append(end - start)
        start = end
    if isinstance(term, Sum):
        return _split_sum(variables, term, boundaries)
    return variables.split_factor_segments(term, sizes)


def _split_sum(variables: AxisVariables, term: Sum, boundaries: Sequence[int]) -> list[Axis]:
    """Deals the segments of a sum out to pieces, and splits a segment where a piece ends in it."""
    pieces: list[list[Axis]] = [[]]
    pieces += [[] for _ in boundaries]
    segment_start = 0
    for segment in term.segments:
        segment_size = size_of(segment)
        segment_end = segment_start + segment_size
        within = []
        for boundary in boundaries:
            if segment_start < boundary < segment_end:
                within.append(boundary - segment_start)
        # The piece that the segment begins in.
        first_piece = bisect.bisect_right(boundaries, segment_start)
        for number, part in enumerate(split_segments(variables, segment, within)):
            pieces[first_piece + number].append(part)
        segment_start = segment_end
    return list(map(concatenated, pieces))


def segment_boundaries(axis: Axis) -> list[int]:
    """Returns the positions at which the segments of an axis begin, but for the first.

    Args:
        axis: An expanded axis.

    Returns:
        The positions in ascending order. There are none unless the outermost term is a sum.
    """
    outermost, *inner = axis
    if not isinstance(outermost, Sum):
        return []
    block_size = size_of(tuple(inner))
    boundaries = []
    position = 0
    for segment in outermost.segments[:-1]:
        position += size_of(segment) * block_size
        boundaries.append(position)
    return boundaries


def single_positions(variables: AxisVariables, axis: Axis, start: int, end: int) -> set[int]:
    """Returns the variables of single positions that lie within a range of an axis.

    A segment of a single position is in no axis any more once it has been selected, since axes of
    size 1 are empty. That it was read has to be noted when it is selected.

    Args:
        variables: The axis variables.
        axis: An axis that has been split where the range begins and ends.
        start: The first position of the range.
        end: The position after the last.
    """
    terms = list(variables.expand(axis, keep_single=True))
    inside: set[int] = set()
    # Outside of all other terms, a single position is there at every position of the range.
    while terms and terms[0].size == 1:
        inside |= variables.variables_of((terms.pop(0),))
    if terms and isinstance(terms[0], Sum):
        block_size = size_of(tuple(terms[1:]))
        first = start // block_size
        last = end // block_size
        for segment in terms[0].segments:
            segment_size = size_of(segment)
            if first < segment_size and last > 0:
                first_inside = max(first, 0)
                last_inside = min(last, segment_size)
                inside |= single_positions(variables, segment, first_inside, last_inside)
            # From here on counted from the beginning of the next segment.
            first -= segment_size
            last -= segment_size
    return {variable for variable in inside if variables.size(variable) == 1}
