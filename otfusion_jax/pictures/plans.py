"""Plans: which unit goes where, of all groups beside each other."""

import math
from typing import TYPE_CHECKING

import numpy as np

from otfusion_jax.pictures.canvas import SIGNED_COLOURS, axes_for
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import HasPlans, is_permutation, plans_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TILES_ACROSS = 6
# Of a plan of thousands of units a picture can show no more than so many rows and columns.
_MOST_CELLS = 128
# Of a tile, in inches, and the share of it that is free around it.
_TILE, _GAP, _TITLE_GAP = 1.6, 0.15, 0.35
_FONT_SIZE = 7


def plot_plans(plans: Plans | HasPlans, *, ax: "Axes | None" = None) -> "Axes":
    """Draws plans as matrices, a tile for each group: row i is an old unit, column j a new one.

    A cell is blue by how much of the new unit comes from the old, and red where it comes with the
    other sign, as it may where units rotate or change their signs. Every tile has its own scale.
    The plans of a group inside of others lie along the diagonal, one after the other. Where units
    are more than a tile has cells, a cell shows the largest entry of its part.

    Args:
        plans: Group name to plan, known values, as `align` returns them, or its result.
        ax: The matplotlib axes to draw on. None makes a new figure, which is `ax.figure`.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no plans.
        TypeError: If plans are no dict of arrays, or `ax` are no axes.
    """
    by_name = plans_of(plans)
    if not by_name:
        raise ValueError("there are no plans: nothing can be moved")
    across = min(len(by_name), _TILES_ACROSS)
    down = math.ceil(len(by_name) / across)
    width, height = across * (1 + _GAP), down * (1 + _TITLE_GAP) + _TITLE_GAP / 2
    ax = axes_for(ax, _TILE * width, _TILE * height)
    for number, (name, plan) in enumerate(by_name.items()):
        row, column = divmod(number, across)
        left, top = column * (1 + _GAP), row * (1 + _TITLE_GAP)
        # Each by its own largest: masses are far smaller than the ones of a permutation.
        cells = _cells(np.asarray(plan))
        largest = np.max(np.abs(cells), initial=0) or 1
        ax.imshow(
            cells / largest,
            extent=(left, left + 1, top + 1, top),
            cmap=SIGNED_COLOURS,
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        sizes = f"{plan.shape[-1]}"
        if not is_permutation(plan):
            sizes = f"{plan.shape[-2]} → {plan.shape[-1]}"
        ax.text(left, top - 0.04, f"{name} ({sizes})", fontsize=_FONT_SIZE, va="bottom")
        border = [left, left + 1, left + 1, left, left], [top, top, top + 1, top + 1, top]
        ax.plot(*border, color="0.5", linewidth=0.5)
    # `imshow` sets the limits to those of the last tile. The first row is on top.
    ax.set_xlim(-_GAP / 2, width - _GAP / 2)
    ax.set_ylim(height - _TITLE_GAP, -_TITLE_GAP)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def _cells(plan: np.ndarray) -> np.ndarray:
    """Returns a picture of a plan: a matrix with the entry that is largest in each part of it."""
    n = m = plan.shape[-1]
    blocks = plan.reshape(-1, n)
    if not is_permutation(plan):
        n, m = plan.shape[-2:]
        blocks = plan.reshape(-1, n, m)
    rows = _coarse(n * len(blocks))
    columns = _coarse(m * len(blocks))
    most = np.zeros((rows[-1] + 1, columns[-1] + 1))
    least = np.zeros_like(most)
    for number, block in enumerate(blocks):
        old = rows[number * n : (number + 1) * n]
        new = columns[number * m : (number + 1) * m]
        if is_permutation(plan):
            most[old[block], new] = 1
        else:
            np.maximum.at(most, np.ix_(old, new), block)
            np.minimum.at(least, np.ix_(old, new), block)
    # Entries of both signs may fall into one cell.
    return np.where(most >= -least, most, least)


def _coarse(units: int) -> np.ndarray:
    """Returns for each of some units the cell that it falls into."""
    return np.arange(units) * min(units, _MOST_CELLS) // units
