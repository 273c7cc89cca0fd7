"""Plots of records: lines over what was varied, and bars.

Both take tidy records and the names of the columns that say what goes where. Several values in one
place are shown by their mean, and their deviation where that is asked for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import deviation, pivot
from otfusion_jax.pictures.canvas import LEVEL, STYLES, frame, legend_below
from otfusion_jax.pictures.path import draw_curve


@dataclasses.dataclass(frozen=True)
class Panel:
    """One of the plots of a figure.

    Attributes:
        quantity: What the values are, as the label of the vertical axis.
        records: The records to show.
        x: The column of the positions on the horizontal axis.
        curve: The column of the names of the curves.
        label: The label of the horizontal axis.
        levels: Values to show as horizontal lines, by name.
        spread: Whether to show how far the values of one position lie from their mean.
        log: Whether equal factors of the positions lie equally far apart.
    """

    quantity: str
    records: pd.DataFrame
    x: str
    curve: str
    label: str
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    spread: bool = False
    log: bool = False

    @property
    def curves(self) -> list[str]:
        """The names of the curves, in the order of the records."""
        return list(self.records[self.curve].drop_duplicates())


def plot_lines(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Plots panels side by side.

    Args:
        path: The PNG file to write.
        title: The title of the figure.
        panels: The panels. A curve has one style in all of them. Those that show other curves than
            the first have a legend of their own.

    Raises:
        ValueError: There are more curves than styles that can be told apart.
    """
    names = []
    for panel in panels:
        for curve in panel.curves:
            if curve not in names:
                names.append(curve)
    if len(names) > len(STYLES):
        raise ValueError(f"{len(names)} curves in one plot; draw {len(STYLES)} at most.")

    width = 2.5 + 5 * len(panels)
    figure = Figure(figsize=(width, 5.5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        for curve in panel.curves:
            _draw(axes, panel, curve, names.index(curve))
        for name, level in panel.levels.items():
            axes.axhline(level, label=name, **LEVEL)
        if panel.log:
            axes.set_xscale("log")
        frame(axes, panel.label, panel.quantity)
        shows_others = not set(panel.curves) <= set(panels[0].curves)
        if panel is panels[0] or shows_others:
            legend_below(axes)
    figure.suptitle(title)
    _save(figure, path)


def plot_bars(
    path: Path, title: str, quantity: str, bars: pd.DataFrame, levels: Mapping[str, float]
) -> None:
    """Plots a few values for each of several names, side by side.

    Args:
        path: The PNG file to write.
        title: The title of the figure.
        quantity: What the values are.
        bars: The values: a row for each name, a column for what sets the values of a name apart.
        levels: Values to show as lines, by name.
    """
    tall = 0.8 + 0.55 * len(bars)
    figure = Figure(figsize=(8, tall), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(bars))
    # The bars of one name take four fifths of its row.
    height = 0.8 / len(bars.columns)
    for index, (label, values) in enumerate(bars.items()):
        places = rows + index * height
        color = STYLES[index + 1]["color"]
        drawn = axes.barh(places, values, height, label=label, color=color)
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    for name, level in levels.items():
        axes.axvline(level, label=name, **LEVEL)
    middles = rows + 0.4 - height / 2
    axes.set_yticks(middles, list(bars.index))
    axes.invert_yaxis()  # the first row on top, as in a table
    axes.set_xlabel(quantity)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    axes.set_title(title)
    _save(figure, path)


def bars(records: pd.DataFrame, rows: str, columns: str) -> pd.DataFrame:
    """Averages records for a plot of bars.

    Args:
        records: The records.
        rows: The label whose values are the names.
        columns: The label that sets the values of a name apart.

    Returns:
        The mean of the values of each bar; NaN where there are none.
    """
    return pivot(records, rows, columns, "mean")


def _draw(axes: Axes, panel: Panel, curve: str, number: int) -> None:
    """Draws one curve, where there are records of it, in the style of its number."""
    is_curve = panel.records[panel.curve] == curve
    of_curve = panel.records[is_curve]
    by_position = of_curve.groupby(panel.x)["value"]
    means = by_position.mean()
    spread = None
    if panel.spread:
        spread = by_position.agg(_spread).to_numpy()
    draw_curve(axes, number, curve, means.index.to_numpy(), means.to_numpy(), spread)


def _spread(values: pd.Series) -> float:
    """Returns how long an error bar is: a single value has none."""
    return deviation(values) if len(values) > 1 else 0.0


def _save(figure: Figure, path: Path) -> None:
    # Matplotlib would otherwise put its version in the file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
