"""Axes to draw on, and what all pictures have in common: colours, frames and legends.

Figures are made without pyplot. So drawing changes no state outside of what it returns, needs no
screen, and leaves nothing in memory that had to be closed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from otfusion_jax.common.arguments import require_kind
from otfusion_jax.common.packages import require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES: tuple[Mapping[str, Any], ...] = (
    {"color": "#000000", "marker": "o", "linestyle": "--", "linewidth": 1.6, "markersize": 4},
    {"color": "#56B4E9", "marker": "s", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#D55E00", "marker": "^", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#004D40", "marker": "D", "linestyle": "-", "linewidth": 1.6, "markersize": 4},
    {"color": "#CC79A7", "marker": "v", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#0072B2", "marker": "P", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#E69F00", "marker": "X", "linestyle": "-", "linewidth": 1.6, "markersize": 5},
    {"color": "#999999", "marker": "*", "linestyle": "-", "linewidth": 1.6, "markersize": 6},
)
"""Colours (mostly Okabe and Ito's) that colour-blind readers tell apart; markers serve in grey."""

LEVEL: Mapping[str, Any] = {"color": "0.45", "linewidth": 1, "linestyle": ":"}
"""The style of a line that shows one value."""

SIGNED_COLOURS = "RdBu"
"""The colours of numbers from -1, red, to 1, blue."""

# Where curves are more than styles, other lines tell them apart.
_MORE_LINES = ("-.", ":")


def axes_for(ax: "Axes | None", width: float, height: float) -> "Axes":
    """Returns the axes to draw on.

    Args:
        ax: What the caller has given; None makes a new figure with axes.
        width: How wide a new figure is, in inches.
        height: How high it is.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If what was given are no axes.
    """
    figures = require_package("matplotlib.figure", "matplotlib", "plot", "a picture")
    axes = require_package("matplotlib.axes", "matplotlib", "plot", "a picture")
    if ax is None:
        return figures.Figure(figsize=(width, height), layout="constrained").subplots()
    require_kind(ax, axes.Axes, "ax", "axes as pyplot.gca() or figure.subplots() return them")
    return ax


def style_of(number: int) -> Mapping[str, Any]:
    """Returns the style of a curve.

    Args:
        number: Its position among the curves of a picture.

    Returns:
        Colour, marker and line, as `ax.plot` takes them.
    """
    more, number = divmod(number, len(STYLES))
    style = STYLES[number]
    return style if more == 0 else {**style, "linestyle": _MORE_LINES[more % len(_MORE_LINES)]}


def frame(ax: "Axes", x_label: str, y_label: str) -> None:
    """Labels axes, and draws a grid behind what is on them.

    Args:
        ax: The axes.
        x_label: What the horizontal axis shows.
        y_label: What the vertical axis shows.
    """
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: "Axes") -> None:
    """Puts the legend below the horizontal axis, where no curve runs.

    Args:
        ax: The axes.
    """
    # The search for the best place among the curves warns when it takes long, and so whenever the
    # machine is busy.
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
