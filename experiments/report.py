"""What a run leaves behind: a table for the terminal, a JSON file and a plot."""

import dataclasses
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.runs import Request

PATH_AXIS = "t: weights (1 - t) · A + t · B"
_PACKAGES = ("otfusion-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "numpy")
# Colours (mostly Okabe and Ito's) that colour-blind readers tell apart; markers serve in grey.
_STYLES = (
    {"color": "#000000", "marker": "o", "linestyle": "--", "linewidth": 1.6, "markersize": 4},
    {"color": "#56B4E9", "marker": "s", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#D55E00", "marker": "^", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#004D40", "marker": "D", "linestyle": "-", "linewidth": 1.6, "markersize": 4},
    {"color": "#CC79A7", "marker": "v", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#0072B2", "marker": "P", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#E69F00", "marker": "X", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#999999", "marker": "*", "linestyle": "-", "linewidth": 1.6, "markersize": 6},
)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays out a Markdown table that also reads well in a terminal.

    Args:
        header: Titles; all columns but the first are aligned to the right.
        rows: Cells, as many in each row as there are titles.

    Returns:
        The table, without a final line break.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def environment() -> dict[str, Any]:
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; equal content gives equal bytes, and a kill leaves no half a file."""
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


def write_results(
    folder: Path,
    request: Request,
    title: str,
    table: str,
    results: Mapping[str, Any],
    timings: Mapping[str, float],
) -> None:
    """Prints the table of a run, and leaves it as `results.md` beside `results.json`.

    Args:
        folder: Of the run.
        request: The command.
        title: Of the table.
        table: In Markdown.
        results: Everything found out, ready for JSON.
        timings: Seconds, by what took them.
    """
    config = dataclasses.asdict(request)
    command = config.pop("command")
    content = {
        "command": command,
        "config": json.loads(json.dumps(config, default=str)),
        "environment": environment(),
        "results": results,
        "timings_in_seconds": {name: round(seconds, 3) for name, seconds in timings.items()},
    }
    write_json(folder / "results.json", content)
    (folder / "results.md").write_text(f"{title}\n\n{table}\n\n`{command}`\n")
    print(f"{title}\n\n{table}\n\nwritten to {folder}")


def rounded(value: Any) -> float:
    """Rounds to what float32 tells apart; a finer figure would only look different, not be."""
    return round(float(value), 4)


def deviation(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard deviation of what a few values were drawn from (n - 1); None of a single one."""
    return rounded(np.std(values, ddof=1)) if len(values) > 1 else None


def with_deviation(mean: float, spread: float | None, sign: str = "") -> str:
    """Shows a mean and, if there is any, how far single values lie from it.

    Args:
        mean: The mean.
        spread: The deviation.
        sign: `"+"` for one before positive means.
    """
    return f"{mean:{sign}.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def summary(values: Sequence[float]) -> str:
    """Shows the mean of a few values, and their deviation."""
    return with_deviation(float(np.mean(values)), deviation(values))


def progress(items: Iterable[Any], title: str) -> Any:
    """Goes through items under a progress bar, if a person watches."""
    return tqdm(list(items), desc=title, disable=not sys.stderr.isatty())


@dataclasses.dataclass(frozen=True)
class Panel:
    """One of the plots of a figure.

    Attributes:
        quantity: What the curves show.
        x: What the axis shows, and the positions on it.
        curves: By name, as long as there are positions.
        levels: Values to show as horizontal lines, by name.
        spreads: Of some curves, by name, how far each value may be off.
        log: Whether equal factors of the positions lie equally far apart.
    """

    quantity: str
    x: tuple[str, Sequence[float]]
    curves: Mapping[str, Sequence[float]]
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    spreads: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    log: bool = False


def plot_lines(
    path: Path,
    title: str,
    x: tuple[str, Sequence[float]],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    levels: Mapping[str, Mapping[str, float]],
) -> None:
    """Plots several quantities along one axis, a panel each.

    Args:
        path: The PNG file to write.
        title: Title of the plot.
        x: What the axis shows, and the positions on it.
        panels: From the name of a quantity to curves by name, as long as there are positions. A
            curve has one style in all panels.
        levels: From the name of a quantity to values to show as horizontal lines.

    Raises:
        ValueError: There are more curves than styles that can be told apart.
    """
    found = [Panel(name, x, curves, levels.get(name, {})) for name, curves in panels.items()]
    plot_panels(path, title, found)


def plot_panels(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Plots panels side by side.

    Args:
        path: The PNG file to write.
        title: Title of the plot.
        panels: A curve has one style in all of them. Those that show other curves than the first
            have a legend of their own.

    Raises:
        ValueError: There are more curves than styles that can be told apart.
    """
    names = dict.fromkeys(name for panel in panels for name in panel.curves)
    if len(names) > len(_STYLES):
        raise ValueError(f"{len(names)} curves in one plot; draw {len(_STYLES)} at most.")
    styles = dict(zip(names, _STYLES, strict=False))
    figure = Figure(figsize=(2.5 + 5 * len(panels), 5.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        label, positions = panel.x
        for name, values in panel.curves.items():
            spread = panel.spreads.get(name)
            axes.errorbar(positions, values, spread, label=name, capsize=3, **styles[name])
        for name, level in panel.levels.items():
            axes.axhline(level, color="0.45", linewidth=1, linestyle=":", label=name)
        if panel.log:
            axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel(panel.quantity)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if panel is panels[0] or not panel.curves.keys() <= panels[0].curves.keys():
            # Below the axis, where no curve runs: the search for the best place among the curves
            # warns when it takes long, and so whenever the machine is busy.
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.suptitle(title)
    _save(figure, path)


def plot_bars(
    path: Path,
    title: str,
    quantity: str,
    bars: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    levels: Mapping[str, float],
) -> None:
    """Plots a few values for each of several names, side by side.

    Args:
        path: The PNG file to write.
        title: Title of the plot.
        quantity: What the values are.
        bars: From name to values, as many as there are labels.
        labels: What sets the values of one name apart.
        levels: Values to show as lines, by name.
    """
    figure = Figure(figsize=(8, 0.8 + 0.55 * len(bars)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(labels)
    for index, label in enumerate(labels):
        values = [found[index] for found in bars.values()]
        places = [row + index * height for row in range(len(bars))]
        drawn = axes.barh(places, values, height, label=label, color=_STYLES[index + 1]["color"])
        axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    for name, level in levels.items():
        axes.axvline(level, color="0.45", linewidth=1, linestyle=":", label=name)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(bars))], list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(quantity)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    axes.set_title(title)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # nothing was trained, if models are from files
    # Matplotlib would otherwise put its version in the file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
