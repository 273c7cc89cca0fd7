"""Tables of text in which what repeats itself from layer to layer is shown once.

A network of twelve equal blocks has rows that differ by the number of the block alone. `fold` finds
them, and writes `{0..11}` instead of the number.
"""

import operator
import re
from collections.abc import Collection, Iterable, Sequence

Row = tuple[str, ...]
"""The cells of one line of a table."""

FOLDED_FROM = 3
"""Fewer repetitions are written out."""

_NUMBER_IN_NAME = re.compile(r"(?<=[A-Za-z_/.\[])\d+|^\d+")
"""Numbers that are part of a name: those that count blocks or layers. Sizes and axes are none."""

_Numbers = tuple[int, ...]
"""The numbers in the names of one block of rows, in the order in which they are read."""


def fold(blocks: Iterable[Sequence[Row]]) -> list[list[Row]]:
    """Writes blocks of rows that differ by the count of a layer alone as one.

    Args:
        blocks: Blocks of one or more rows. The numbers in their names are what may differ.

    Returns:
        The blocks, in the order of the first of each. In place of a number that runs through
        `a, a + 1, ..., b` stands `{a..b}`.
    """
    numbers_of: dict[tuple[Row, ...], list[_Numbers]] = {}
    for block in blocks:
        template, numbers = _template_of(block)
        numbers_of.setdefault(template, []).append(numbers)
    folded = []
    for template, all_numbers in numbers_of.items():
        for run in _runs(all_numbers):
            folded.append(_filled(template, run[0], run[-1]))
    return folded


def fold_rows(rows: Iterable[Row]) -> list[Row]:
    """Writes single rows that differ by the count of a layer alone as one.

    Args:
        rows: The rows.

    Returns:
        The rows, as `fold` returns blocks of them.
    """
    folded = fold([[row] for row in rows])
    return [block[0] for block in folded]


def aligned(rows: Sequence[Row]) -> list[str]:
    """Writes rows with their cells in columns.

    Args:
        rows: One row or more, all of one number of cells.

    Returns:
        One line for each row.
    """
    widths = [0] * len(rows[0])
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], len(cell))
    lines = []
    for row in rows:
        padded = map(str.ljust, row, widths)
        line = "  ".join(padded)
        lines.append(line.rstrip())
    return lines


def _template_of(block: Sequence[Row]) -> tuple[tuple[Row, ...], _Numbers]:
    """Returns a block with `{}` in the place of the numbers in its names, and these numbers."""
    template = []
    numbers = []
    for row in block:
        cells = []
        for cell in row:
            # A size that differs stays in the template, so that layers of other sizes are apart.
            cells.append(_NUMBER_IN_NAME.sub("{}", cell))
            numbers.extend(_NUMBER_IN_NAME.findall(cell))
        template.append(tuple(cells))
    return tuple(template), tuple(map(int, numbers))


def _filled(template: Sequence[Row], first: _Numbers, last: _Numbers) -> list[Row]:
    """Returns the block that stands for all from the first to the last of a run."""
    texts = []
    for start, stop in zip(first, last, strict=True):
        text = str(start)
        if start != stop:
            text = f"{{{start}..{stop}}}"
        texts.append(text)
    # `_template_of` has read the numbers row by row and cell by cell, and so they are written.
    remaining = iter(texts)
    rows = []
    for row in template:
        cells = []
        for cell in row:
            while "{}" in cell:
                cell = cell.replace("{}", next(remaining), 1)
            cells.append(cell)
        rows.append(tuple(cells))
    return rows


def _runs(all_numbers: Iterable[_Numbers]) -> list[list[_Numbers]]:
    """Sorts blocks into runs in which the same numbers go up by one, the longest that there are."""
    # A dict in place of a set: it keeps the order, and what equals another block is shown once.
    remaining = dict.fromkeys(all_numbers)
    runs = []
    while remaining:
        first = next(iter(remaining))
        run = [first]
        for step in _steps(first, remaining):
            chain = _chain(first, step, remaining)
            is_long_enough = len(chain) >= FOLDED_FROM
            if is_long_enough and len(chain) > len(run):
                run = chain
        runs.append(run)
        for numbers in run:
            del remaining[numbers]
    return runs


def _steps(first: _Numbers, others: Iterable[_Numbers]) -> list[_Numbers]:
    """Returns the differences from one block to others that are 0 or 1, and not all 0, sorted."""
    steps = set()
    for numbers in others:
        step = tuple(map(operator.sub, numbers, first))
        # All that counts layers goes up together, by one from each layer to the next.
        if any(step) and set(step) <= {0, 1}:
            steps.add(step)
    return sorted(steps)


def _chain(first: _Numbers, step: _Numbers, among: Collection[_Numbers]) -> list[_Numbers]:
    """Follows a step from one block to the next, as long as there is one."""
    chain = []
    numbers = first
    while numbers in among:
        chain.append(numbers)
        numbers = tuple(map(operator.add, numbers, step))
    return chain
