"""A metric over the plane through three models."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from otfusion_jax.common.arguments import checked_count, require_kind
from otfusion_jax.evaluation.plane import Plane
from otfusion_jax.pictures.canvas import axes_for
from otfusion_jax.pictures.path import one_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = "viridis_r"  # what is low, and so good, is bright


def plot_plane(
    plane: Plane,
    *,
    metric: int | None = None,
    label: str = "metric",
    names: Sequence[str] = ("A", "B", "C"),
    levels: int | Sequence[float] = 20,
    ax: "Axes | None" = None,
) -> "Axes":
    """Plots a metric over the plane through three models, and where the models are.

    Distances in the picture are those between parameters, the same along both axes (Garipov et al.,
    Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018, Figure 1).

    Args:
        plane: What `plane` has returned.
        metric: The position of the metric, if there are several.
        label: What the metric is, for the bar of colours.
        names: What the three models are called, in the order in which `plane` took them.
        levels: How many steps of colour there are; or where they are, which shows what is beyond
            them by the colour of the last: for a loss that is far higher outside than between.
        ax: The matplotlib axes to plot on. None makes a new figure, which is `ax.figure`.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If it is not said which of several metrics is meant, if no value is finite, if
            there are not three names, or if the number of levels is below 1.
        TypeError: If there is anything but a result of `plane`, or but axes.
    """
    require_kind(plane, Plane, "plane", "what otf.plane(metric, a, b, c) returns")
    if len(names) != 3:
        raise ValueError(f"there are {len(names)} names, for three models")
    if isinstance(levels, int):
        levels = checked_count(levels, "levels", "1 or more, or where they are")
    values = one_metric(plane.values, 2, metric)
    if not np.any(np.isfinite(values)):
        raise ValueError("no value in the plane is finite; give a smaller margin to otf.plane")
    x, y = np.asarray(plane.x), np.asarray(plane.y)
    # Of equal scales along both axes, a plane is as high as it is.
    ratio = (y[-1] - y[0]) / (x[-1] - x[0])
    ax = axes_for(ax, 6, float(np.clip(1 + 4.5 * ratio, 2, 9)))
    # Where the metric is not finite the picture is blank.
    shown = np.ma.masked_invalid(values)
    # Levels that the caller has chosen may leave values out.
    extend = "neither" if isinstance(levels, int) else "both"
    areas = ax.contourf(x, y, shown, levels, cmap=_COLOURS, extend=extend)
    ax.figure.colorbar(areas, ax=ax, label=label)
    for name, place in zip(names, np.asarray(plane.models), strict=True):
        ax.plot(*place, marker="o", color="black", markeredgecolor="white")
        ax.annotate(
            name,
            (place[0], place[1]),
            xytext=(6, 6),
            textcoords="offset points",
            bbox={"boxstyle": "round", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )
    ax.set_aspect("equal")
    ax.set_xlabel(f"distance towards {names[1]}")
    ax.set_ylabel("distance at right angles")
    return ax
