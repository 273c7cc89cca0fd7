"""What a run leaves behind: a table for the terminal, a JSON file and a plot."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

_PACKAGES = ("otfusion-jax", "jax", "jaxlib", "flax", "optax", "ott-jax", "numpy")
# Colours (mostly Okabe and Ito's) that colour-blind readers tell apart; markers serve in grey.
_STYLES = (
    {"color": "#000000", "marker": "o", "linestyle": "--", "linewidth": 1.6, "markersize": 4},
    {"color": "#56B4E9", "marker": "s", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#D55E00", "marker": "^", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#004D40", "marker": "D", "linestyle": "-", "linewidth": 1.6, "markersize": 4},
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


def plot_paths(
    path: Path,
    title: str,
    t: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    levels: Mapping[str, float],
) -> None:
    """Plots test accuracy along paths from model A to model B.

    Args:
        path: The PNG file to write.
        title: Title of the plot.
        t: Positions on the paths, from 0 (model A) to 1 (model B).
        curves: For each path its accuracies in percent, as many as there are positions.
        levels: Accuracies in percent to show as horizontal lines.

    Raises:
        ValueError: There are more curves than styles that can be told apart.
    """
    if len(curves) > len(_STYLES):
        raise ValueError(f"{len(curves)} curves in one plot; draw {len(_STYLES)} at most.")
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, values), style in zip(curves.items(), _STYLES, strict=False):
        axes.plot(t, values, label=label, **style)
    for label, level in levels.items():
        axes.axhline(level, color="0.45", linewidth=1, linestyle=":", label=label)
    axes.set_title(title)
    axes.set_xlabel("t: weights (1 - t) · A + t · B")
    axes.set_ylabel("test accuracy (%)")
    axes.set_xlim(0, 1)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    # Matplotlib would otherwise put its version in the file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
