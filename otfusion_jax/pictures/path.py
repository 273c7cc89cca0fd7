"""Metrics along the lines between models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from otfusion_jax.common.arguments import kind_of, require_kind
from otfusion_jax.evaluation.barrier import Barrier
from otfusion_jax.pictures.canvas import axes_for, frame, legend_below, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATH_AXIS = "t: weights (1 - t) · A + t · B"
"""The label of an axis along the straight line from one model to another."""


def plot_path(
    paths: Barrier | Mapping[str, Barrier],
    *,
    metric: int | None = None,
    label: str = "metric",
    ax: "Axes | None" = None,
) -> "Axes":
    """Plots a metric along the line between two models, a curve for each method.

    The legend has the height of each barrier. Standard errors are shown where `barrier` was asked
    for them. Of a loss and an error at once, `metric` says which is plotted: call it once for each,
    on axes beside each other.

    Args:
        paths: What `barrier` has returned; or several of these by the names of methods.
        metric: The position of the metric, if there are several.
        label: What the metric is, for the vertical axis.
        ax: The matplotlib axes to plot on. None makes a new figure, which is `ax.figure`.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no paths, or if it is not said which of several metrics is meant.
        TypeError: If there is anything but results of `barrier`, or but axes.

    Example:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> def loss(params):
        ...     return jnp.sum(jnp.sin(3 * params))
        >>> path = otf.barrier(loss, jnp.zeros(2), jnp.ones(2))
        >>> ax = otf.plot_path({"as they are": path}, label="loss")
        >>> ax.get_ylabel()
        'loss'
    """
    named = {"": paths} if isinstance(paths, Barrier) else paths
    if not isinstance(named, Mapping):
        raise TypeError(
            f"paths is {kind_of(named)}; give what barrier returns, or a dict of these by the names"
            " of methods"
        )
    if not named:
        raise ValueError("no paths were given; give what barrier returns, by the names of methods")
    # All are looked at before anything is drawn on axes that may be the caller's.
    curves = []
    for name, path in named.items():
        require_kind(path, Barrier, f"path {name!r}", "what barrier returns")
        curves.append((name, path, one_metric(path.values, 1, metric)))
    ax = axes_for(ax, 5, 4)
    for number, (name, path, values) in enumerate(curves):
        errors = path.values_error
        if errors is not None:
            errors = one_metric(errors, 1, metric)
        height = _height(path, metric)
        text = f"{name}, {height}" if name else height
        draw_curve(ax, number, text, np.asarray(path.t), values, errors)
    frame(ax, PATH_AXIS, label)
    legend_below(ax)
    return ax


def draw_curve(
    ax: "Axes",
    number: int,
    name: str,
    positions: Sequence[float] | np.ndarray,
    values: Sequence[float] | np.ndarray,
    errors: Sequence[float] | np.ndarray | None = None,
) -> None:
    """Draws one of several curves.

    Args:
        ax: The matplotlib axes.
        number: Its position among the curves, which its style depends on.
        name: Its name in the legend.
        positions: Where its points are on the horizontal axis.
        values: Where they are on the vertical axis.
        errors: How long error bars are to either side; None for none.
    """
    style: dict[str, Any] = dict(style_of(number))
    ax.errorbar(positions, values, errors, label=name, capsize=3, **style)


def one_metric(values: Any, axes: int, metric: int | None) -> np.ndarray:
    """Chooses one of several metrics.

    Args:
        values: The values; the metrics come after so many axes.
        axes: The number of axes before.
        metric: The position of the metric; None if there is one alone.

    Returns:
        The values of that metric.

    Raises:
        ValueError: If there are several and none is chosen, or if there is no such one.
    """
    values = np.asarray(values)
    if values.ndim == axes:
        if metric is not None:
            raise ValueError(f"metric is {metric}, but there is one alone; leave it out")
        return values
    flat = values.reshape(*values.shape[:axes], -1)
    count = flat.shape[-1]
    if metric is None:
        raise ValueError(f"there are {count} metrics; say which to plot, as metric=0")
    if not 0 <= metric < count:
        raise ValueError(f"metric is {metric}, but there are {count} of them, from 0")
    return flat[..., metric]


def _height(path: Barrier, metric: int | None) -> str:
    """Says how high a barrier is, with its standard error."""
    height = float(one_metric(path.height, 0, metric))
    if path.height_error is None:
        return f"barrier {height:.3g}"
    return f"barrier {height:.3g} ± {float(one_metric(path.height_error, 0, metric)):.1g}"
