"""What `merge` has tried, what each trial scored, and what was taken: as a table and as a plot."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from otfusion_jax.common.html import html_lines, html_table
from otfusion_jax.common.typing import PyTree
from otfusion_jax.pictures.canvas import LEVEL, axes_for, frame, legend_below
from otfusion_jax.pictures.path import draw_curve
from otfusion_jax.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = ("", "start", "units moved by", "then", "score", "again", "seconds")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One thing that was tried.

    Attributes:
        start: What the models were matched by, the name of a candidate.
        units: What units were moved by: "permutations", "signs" (permutations and signs),
            "rotations" (which are permutations of the groups that do not rotate), or "nothing".
        repair: What was done after the average, such as "LeastSquares", "nothing" or "distilled".
        score: The objective on inputs that nothing was fitted to; less is better. NaN if the trial
            failed.
        again: The same with the two exchanged: fitted to what was held out, and scored on what was
            fitted to. NaN if that was not tried; of those that have it, the least sum is best.
        seconds: How long it took on the wall clock, compilation included. What several trials
            share is counted where it was first needed.
        problem: Why it failed; empty if it did not.
        chosen: Whether its parameters are the result.
        ridges: Where a repair chose of several ridges, that of each parameter, by key path.
    """

    start: str
    units: str
    repair: str
    score: float
    seconds: float
    problem: str = ""
    chosen: bool = False
    again: float = math.nan
    ridges: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class Line:
    """Scores along the straight line from a model to the last one.

    Attributes:
        model: The number of the model that the line starts from.
        start: What the models were matched by, the name of a candidate.
        t: The positions, from 0, the model as it was moved, to 1, the last model.
        scores: The score at each position.
    """

    model: int
    start: str
    t: tuple[float, ...]
    scores: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was tried, and what each trial scored. `print(report)` shows it as a table.

    Attributes:
        rows: The trials, in their order.
        models: How many models there were.
        parents: The score of each of the models by itself; empty if there were no inputs.
        measure: What scores are, in words.
        fitted: How many inputs were fitted to, until all was chosen.
        held_out: How many others the choices were made by.
        notes: What else there is to know, such as why no inputs could be drawn.
        path: Scores along lines from model to model; empty if they were not asked for.
        seconds: How long all of it took on the wall clock.
    """

    rows: tuple[Trial, ...]
    models: int
    parents: tuple[float, ...]
    measure: str
    fitted: int
    held_out: int
    notes: tuple[str, ...]
    path: tuple[Line, ...]
    seconds: float

    @property
    def chosen(self) -> Trial:
        """The trial whose parameters are the result."""
        (row,) = [row for row in self.rows if row.chosen]
        return row

    def __str__(self) -> str:
        lines = [self._heading(), "", *_aligned([*self._shown([_COLUMNS]), *self._cells()])]
        notes = self._all_notes()
        if notes:
            lines.extend(["", *notes])
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Shows the table in a notebook."""
        (columns,) = self._shown([_COLUMNS])
        text = html_table(columns, self._cells(), self._heading())
        notes = self._all_notes()
        if notes:
            text = f"{text}\n{html_lines(notes)}"
        return text

    def _cells(self) -> list[tuple[str, ...]]:
        """Returns a row for each model by itself, and for each trial."""
        cells = []
        for number, score in enumerate(self.parents):
            cells.append(("", f"model {number}", "", "", _number(score), "", ""))
        for row in self.rows:
            mark = "*" if row.chosen else ""
            score = "failed" if row.problem else _number(row.score)
            again = "" if math.isnan(row.again) else _number(row.again)
            seconds = f"{row.seconds:.1f}"
            cells.append((mark, row.start, row.units, row.repair, score, again, seconds))
        return self._shown(cells)

    def _shown(self, cells: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Leaves out the second score where there is none."""
        return list(cells) if self._is_again else [(*row[:5], *row[6:]) for row in cells]

    def _all_notes(self) -> list[str]:
        """Returns why trials have failed, what ridges were chosen, and what else there is."""
        failed = []
        for row in self.rows:
            if row.problem:
                first_line = row.problem.splitlines()[0]
                failed.append(f"{row.start}, {row.units}, {row.repair}: {first_line}")
        ridges = _counted(self.chosen.ridges.values())
        return [*failed, *ridges, *self.notes]

    def _heading(self) -> str:
        heading = f"{self.models} models, {len(self.rows)} trials in {self.seconds:.0f} s"
        if not self.held_out:
            heading += f", fitted to {self.fitted:,} inputs" if self.fitted else ""
            return f"{heading}; * has the least {self.measure}"
        heading += f", fitted to {self.fitted:,} inputs; * "
        # Where weights have decided which match is repaired, another one may score less.
        least = min([row.score for row in self.rows if not row.problem])
        is_least = self._is_again or self.chosen.score == least
        heading += "has the least" if is_least else "was chosen; scores are the"
        heading += f" {self.measure} on {self.held_out:,} others"
        return f"{heading}, and again with the two exchanged" if self._is_again else heading

    @property
    def _is_again(self) -> bool:
        return any(not math.isnan(row.again) for row in self.rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Plots the scores along the lines between the models: as they were, and as they are moved.

        Args:
            ax: The matplotlib axes to plot on. None makes a new figure, which is `ax.figure`.

        Returns:
            The matplotlib axes.

        Raises:
            ValueError: If no path was taken.
            ImportError: If matplotlib is not installed.
            TypeError: If `ax` are no axes.
        """
        if not self.path:
            raise ValueError(
                "there is no path to plot; call merge with path=11, and with inputs to score by"
            )
        ax = axes_for(ax, 5, 4)
        several = self.models > 2
        for number, line in enumerate(self.path):
            name = f"{line.start}, from model {line.model}" if several else line.start
            draw_curve(ax, number, name, line.t, line.scores)
        ax.axhline(self.chosen.score, label="the result", **LEVEL)
        frame(ax, f"from a model (0) to model {self.models - 1} (1)", self.measure)
        legend_below(ax)
        return ax


@dataclasses.dataclass(frozen=True, eq=False)
class Merged:
    """One model of several. `print(merged)` shows the report, and not the parameters.

    Attributes:
        params: The parameters, a pytree of the models' structure and shapes.
        report: What was tried, and what was taken.
        symmetry: The symmetry of the parameters: with rotations if units were rotated, and then
            they are in canonical form up to what was repaired.
        models: The K models as they were moved, of which `params` is made.
    """

    params: PyTree
    report: Report
    symmetry: Symmetry
    models: list[PyTree]

    def __repr__(self) -> str:
        """One line; `str` has the table of the report."""
        chosen = self.report.chosen
        ways = f"{chosen.start}, {chosen.units}, then {chosen.repair}"
        return f"<Merged: {self.report.models} models, {ways}, score {_number(chosen.score)}>"

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        """Shows the table of the report in a notebook."""
        return self.report._repr_html_()


_FIRST_NUMBER = 4
"""The first column of a table that has numbers."""


def _number(score: float) -> str:
    """Shows a score to four digits."""
    return f"{score:.4g}" if math.isfinite(score) else str(score)


def _counted(ridges: Iterable[float]) -> list[str]:
    """Says in a line how many parameters have which ridge; nothing if there are none."""
    counts = Counter(ridges)
    words = [f"{ridge:g} of {counts[ridge]}" for ridge in sorted(counts)]
    return [f"Ridges by the number of parameters: {', '.join(words)}."] if words else []


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lays out rows of cells in columns, text to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            is_number = number >= _FIRST_NUMBER
            padded.append(cell.rjust(width) if is_number else cell.ljust(width))
        lines.append("  ".join(padded).rstrip())
    return lines
