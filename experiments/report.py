"""What a run leaves behind: its records as CSV, tables in Markdown, a plot, and how it came about.

Records are tidy: a pandas table with a row for each value that was measured, and columns that say
of what. A table is made of columns of text, each of them an aggregate of some of the records:
`where` picks the records, `column` and `pivot` aggregate, `table` lays out.
"""

import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from experiments.runs import Run, rounded

_PACKAGES = ("otfusion-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "numpy")

T = TypeVar("T")
Show = Callable[[pd.Series], str]
"""Shows some values in one cell of a table."""


# --- values as text


def mean(digits: int = 2) -> Show:
    """Shows the mean of some values.

    Args:
        digits: The number of digits after the point.

    Returns:
        What shows them.
    """

    def show(values: pd.Series) -> str:
        # Rounded first, as a mean that is recorded would be.
        average = rounded(np.mean(values))
        return f"{average:.{digits}f}"

    return show


def mean_and_deviation(values: pd.Series, sign: str = "") -> str:
    """Shows the mean of some values and, if there are several, how far single ones lie from it.

    Args:
        values: The values.
        sign: `"+"` for one before positive means.

    Returns:
        The text of a cell.
    """
    average = rounded(np.mean(values))
    text = f"{average:{sign}.2f}"
    if len(values) > 1:
        text += f" ± {deviation(values):.2f}"
    return text


def extent(values: pd.Series) -> str:
    """Shows the lowest and the highest of some values.

    Args:
        values: The values.

    Returns:
        The text of a cell.
    """
    lowest = min(values)
    highest = max(values)
    return f"{lowest:.2f} to {highest:.2f}"


def deviation(values: pd.Series) -> float:
    """Computes the standard deviation of what a few values were drawn from (n - 1).

    Args:
        values: At least two values.

    Returns:
        The deviation.
    """
    return rounded(np.std(values, ddof=1))


# --- records as tables


def where(records: pd.DataFrame, **labels: Any) -> pd.DataFrame:
    """Picks the records with some labels.

    Args:
        records: The records.
        **labels: The values of some columns.

    Returns:
        The rows that have all of them, in their order.
    """
    for name, label in labels.items():
        records = records[records[name] == label]
    return records


def column(records: pd.DataFrame, rows: str | list[str], show: Show) -> pd.Series:
    """Makes a column of a table.

    Args:
        records: The records that the column is about.
        rows: The labels that tell the rows of the table apart.
        show: Shows the values of one row.

    Returns:
        The text of each row, in the order that the rows come in among the records.
    """
    return records.groupby(rows, sort=False)["value"].agg(show)


def pivot(
    records: pd.DataFrame,
    rows: str | list[str],
    columns: str,
    show: Show | str,
) -> pd.DataFrame:
    """Makes columns of a table, one for each value of a label.

    Args:
        records: The records that the columns are about.
        rows: The labels that tell the rows of the table apart.
        columns: The label that tells its columns apart.
        show: Shows the values of one cell, or aggregates them, as pandas names it.

    Returns:
        What is shown in each cell, both rows and columns in the order that they come in among the
        records; NaN where there are no records.
    """
    keys = [rows] if isinstance(rows, str) else rows
    cells = records.groupby([*keys, columns], sort=False)["value"].agg(show)
    grid = cells.unstack(columns)
    # `unstack` sorts both rows and columns; tables are read in the order of the work.
    row_order = records[keys].drop_duplicates()
    index = pd.MultiIndex.from_frame(row_order)
    if isinstance(rows, str):
        index = pd.Index(row_order[rows])
    column_order = records[columns].drop_duplicates()
    return grid.reindex(index=index, columns=column_order)


def table(columns: Mapping[str, pd.Series] | pd.DataFrame, *titles: str) -> str:
    """Lays out columns of text as a table.

    Args:
        columns: The columns by their titles. The first has all rows in their order; what another
            lacks is left empty.
        *titles: The titles of the columns that name the rows.

    Returns:
        The table in Markdown.
    """
    by_title = {str(title): column for title, column in columns.items()}
    first = next(iter(by_title.values()))
    rows = []
    for key in first.index:
        names = key if isinstance(key, tuple) else (key,)
        cells = [str(name) for name in names]
        for column in by_title.values():
            cell = column.get(key)
            # A row that a column lacks is None; one that its pivot lacks is NaN.
            cells.append("" if pd.isna(cell) else cell)
        rows.append(cells)
    return markdown_table([*titles, *by_title], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a Markdown table that also reads well in a terminal.

    Args:
        header: The titles; all columns but the first are aligned to the right.
        rows: The cells, as many in each row as there are titles.

    Returns:
        The table, without a final line break.
    """
    widths = []
    for cells in zip(header, *rows, strict=True):
        widths.append(max(3, *map(len, cells)))

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        for cell, width in zip(cells[1:], widths[1:], strict=True):
            padded.append(cell.rjust(width))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0]]
    for width in widths[1:]:
        rule.append("-" * (width - 1) + ":")
    lines = [line(header), line(rule)]
    for cells in rows:
        lines.append(line(cells))
    return "\n".join(lines)


# --- what a run writes


def write(run: Run, command: str) -> None:
    """Prints the tables of a run, and leaves them in its folder beside records, plot and settings.

    Args:
        run: The run, finished.
        command: The command that started it.
    """
    study = run.study
    folder = study.folder
    folder.mkdir(parents=True, exist_ok=True)  # nothing was trained, if models are from files
    records = run.records()
    settings = {}
    for field in dataclasses.fields(study):
        settings[field.name] = getattr(study, field.name)
    timings = {}
    for label, seconds in run.seconds.items():
        timings[label] = round(seconds, 3)
    content = {
        "command": command,
        "config": settings,
        "environment": environment(),
        "timings_in_seconds": timings,
    }
    # Paths and methods are written as what they are called.
    origin = json.dumps(content, indent=2, default=str)
    shown = "\n\n".join([study.title, *study.tables(records)])
    study.plot(records, folder / f"{study.command}.png")
    _write_whole(folder / "results.csv", records.to_csv(index=False))
    _write_whole(folder / "results.json", origin + "\n")
    _write_whole(folder / "results.md", f"{shown}\n\n`{command}`\n")
    print(f"{shown}\n\nwritten to {folder}")


def _write_whole(path: Path, text: str) -> None:
    """Writes a file; a kill leaves the old one or the new one, and no half of either."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


def environment() -> dict[str, dict[str, str]]:
    """Returns the device and the versions that a result may depend on."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": versions,
    }


def progress(items: Iterable[T], title: str) -> Iterable[T]:
    """Goes through items under a progress bar, if a person watches.

    Args:
        items: The items.
        title: What is being done to them.

    Returns:
        The items.
    """
    return tqdm(list(items), desc=title, disable=not sys.stderr.isatty())
