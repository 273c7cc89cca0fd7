"""The same elements read as axes of other sizes: what a reshape does to axes.

A reshape keeps the row-major order of the elements, and so do expressions: both multiply from the
outermost term inwards. The terms of all old axes, one after the other, are dealt out to the new
axes.

- `[2, 3]` to `[6]` merges: the new axis is the product of the two old ones.
- `[6]` to `[2, 3]` splits the variable of size 6 into a product, in all axes that carry it.
- `[2, 3]` to `[3, 2]` cuts across the rows: no permutation of units is kept, and all are pinned.
  No more is pinned than the shortest run of axes that holds the same elements: of `[5, 2, 3]` to
  `[5, 3, 2]` the first axis passes unharmed.
- `[Sum(4, 8)]` to `[3, 4]` makes rows of 4: the first is of the first segment, two are of the
  second. The columns run through both segments, whose units are tied thereby.
"""

from collections.abc import Sequence

from otfusion_jax.tracing.axis import (
    Axis,
    Disagreement,
    Sum,
    Term,
    concatenated,
    constant,
    size_of,
)
from otfusion_jax.tracing.axis_variables import AxisVariables
from otfusion_jax.tracing.matching import TermReader, tie_elementwise


def regroup(
    variables: AxisVariables, axes: Sequence[Axis], sizes: Sequence[int], reason: str
) -> list[Axis]:
    """Reads the same elements, in row-major order, as axes of other sizes.

    Args:
        variables: The axis variables.
        axes: The axes of a value.
        sizes: The sizes of the new axes, whose product is that of the old ones.
        reason: Why axes are pinned if the new sizes cut across the variables.

    Returns:
        The new axes.
    """
    if 0 in sizes:
        return [constant(size) for size in sizes]
    old_terms: list[Term] = []
    for axis in axes:
        old_terms += axis
    new_sizes = list(sizes)
    # Both are taken from the front, which of a list is cheap at its end only.
    old_terms.reverse()
    new_sizes.reverse()
    new_axes: list[Axis] = []
    while new_sizes:
        run, run_sizes = _shortest_run(old_terms, new_sizes)
        try:
            new_axes += _divide(variables, run, run_sizes)
        except Disagreement:
            variables.pin(run, reason)
            new_axes += [variables.pinned(size, reason) for size in run_sizes]
    return new_axes


def _shortest_run(old_terms: list[Term], new_sizes: list[int]) -> tuple[Axis, list[int]]:
    """Takes the fewest new sizes, one at least, that hold a whole number of old terms.

    Args:
        old_terms: The terms that are left, the next one last. Those that are taken are removed.
        new_sizes: The sizes that are left, the next one last. Those that are taken are removed.

    Returns:
        The terms and the sizes, whose products are equal.
    """
    run: list[Term] = []
    run_sizes = [new_sizes.pop()]
    old_size, new_size = 1, run_sizes[0]
    while old_size != new_size:
        if old_size < new_size:
            run.append(old_terms.pop())
            old_size *= run[-1].size
        else:
            run_sizes.append(new_sizes.pop())
            new_size *= run_sizes[-1]
    return tuple(run), run_sizes


def _divide(variables: AxisVariables, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Divides an axis into a product of axes.

    Raises:
        Disagreement: If a term would have to be in two of them, and cannot be split there.
    """
    reader = TermReader(variables, axis)
    outermost, *inner = [_take(variables, reader, size) for size in sizes]
    # Single positions are there wherever the others are, so that one of the axes is enough.
    return [(*reader.singles, *outermost), *inner]


def _take(variables: AxisVariables, reader: TermReader, size: int) -> Axis:
    """Takes terms of the size given off an axis, and splits the last one if need be."""
    taken: list[Term] = []
    left = size
    while left > 1:
        term = reader.read()
        assert term is not None
        if left % term.size == 0:
            taken.append(term)
            left //= term.size
        elif term.size % left:
            raise Disagreement(f"{term.size} against {left}", (term,))
        elif isinstance(term, Sum):
            rows, columns = _divide_sum(variables, term, left)
            reader.put_back(columns)
            taken += rows
            left = 1
        else:
            # Its outer part is read next, and taken whole.
            reader.put_back(variables.split_factor(term, left))
    return tuple(taken)


def _divide_sum(variables: AxisVariables, term: Sum, row_count: int) -> tuple[Axis, Axis]:
    """Reads the segments of a sum as rows of one length.

    Args:
        variables: The axis variables.
        term: The sum.
        row_count: The number of rows that all segments make together.

    Returns:
        The axis over rows, which is a sum still, of the rows of each segment; and the axis within a
        row, which is one for all segments.

    Raises:
        Disagreement: If a row would begin in one segment and end in another.
    """
    row_size = term.size // row_count
    # All segments are checked before any is divided, because a division is for good.
    for segment in term.segments:
        if size_of(segment) % row_size:
            raise Disagreement(f"segments across rows of {row_size}", (term,))
    segment_rows = []
    segment_columns = []
    for segment in term.segments:
        sizes = (size_of(segment) // row_size, row_size)
        rows, columns = _divide(variables, segment, sizes)
        segment_rows.append(rows)
        segment_columns.append(columns)
    # Below each other in one column there are units of all segments now.
    common_columns = segment_columns[0]
    for columns in segment_columns[1:]:
        common_columns = tie_elementwise(variables, common_columns, columns)
    return concatenated(segment_rows), common_columns
