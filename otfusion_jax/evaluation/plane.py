"""A loss or an error over the plane through three models.

The picture shows whether models lie in one basin, and where between them their averages are
(Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018,
Appendix A.1).
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from otfusion_jax.alignment.costs import as_real
from otfusion_jax.averaging.average import average_of, columns_of
from otfusion_jax.averaging.stacking import stack
from otfusion_jax.common.arguments import checked_count, require_function
from otfusion_jax.common.scaling import all_scaled, common_exponent, restored
from otfusion_jax.common.typing import PyTree
from otfusion_jax.evaluation.barrier import as_numbers
from otfusion_jax.symmetry.checks import require_equal_integers
from otfusion_jax.symmetry.groups import leaves_of

# Below this share of the distance between models, what leads off their line is rounding.
_SMALLEST_ANGLE = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plane:
    """A metric over the plane through three models; `plot_plane` draws it.

    Attributes:
        x: Positions along the direction from the first model to the second, float `[X]`. The unit
            of all positions is that of the Euclidean norm of all parameters.
        y: Positions along the direction at right angles to it that leads to the third, float `[Y]`.
        values: The metric at each point, float `[Y, X]`, or `[Y, X, ...]` for several metrics.
        models: Where the three models are, float `[3, 2]`, x before y. The first is at the origin.
    """

    x: Float[Array, " x"]
    y: Float[Array, " y"]
    values: Float[Array, "y x *metrics"]
    models: Float[Array, "3 2"]


def plane(
    metric: Callable[[PyTree], ArrayLike],
    a: PyTree,
    b: PyTree,
    c: PyTree,
    *,
    points: int = 21,
    margin: float = 0.25,
    batch_size: int = 1,
) -> Plane:
    """Evaluates a metric on a grid over the plane through three models.

    The directions are orthonormal: `u` leads from `a` to `b`, and `v` is what is at right angles to
    it of the way from `a` to `c`. Distances and angles are those in the space of all parameters.

    Args:
        metric: The metric, from parameters to a scalar, or to an array of several.
        a: The parameters of the model at the origin.
        b: The parameters of the model on the horizontal axis.
        c: The parameters of the third model.
        points: How many points the grid has along each direction, 2 or more.
        margin: How far the grid goes beyond the models on each side, as a share of the distance
            between the outermost.
        batch_size: How many points are evaluated at once under `jax.vmap`.

    Returns:
        The grid, the values, and where the models are.

    Raises:
        ValueError: For models of different structures, shapes or integers, listing every offender
            by key path; for three models on one line; for fewer than two points, a batch size below
            1, and a margin below 0.
        TypeError: For a metric that is no function or returns no array, and for settings that are
            no numbers.
    """
    require_function(metric, "plane(metric, a, b, c)")
    points = checked_count(points, "points", "2 or more")
    if points < 2:
        raise ValueError(f"points is {points}; give 2 or more")
    batch_size = checked_count(batch_size, "batch_size", "1 or more")
    _require_margin(margin)
    stacked = stack([a, b, c])
    leaves = leaves_of(a)
    require_equal_integers(leaves, columns_of([a, b, c]), [False] * len(leaves), "")
    models = _coordinates(stacked)
    x, y = [_positions(models[:, axis], points, margin) for axis in (0, 1)]
    corner = models[2]
    length = models[1, 0]

    def value_at(position: Array) -> Array:
        # The point is a + share_b (b - a) + share_c (c - a).
        share_c = position[1] / corner[1]
        share_b = (position[0] - share_c * corner[0]) / length
        shares = jnp.stack([1 - share_b - share_c, share_b, share_c])
        return as_numbers(metric(average_of(stacked, shares)))

    # Row by row from the bottom, as `contourf` of matplotlib takes them.
    grid = jnp.stack(jnp.meshgrid(x, y), axis=-1)  # [Y, X, 2]
    values = jax.lax.map(value_at, grid.reshape(-1, 2), batch_size=batch_size)
    return Plane(x, y, values.reshape(points, points, *values.shape[1:]), models)


def _coordinates(stacked: PyTree) -> Float[Array, "3 2"]:
    """Returns where three models are in the plane through them, by Gram and Schmidt."""
    to_b, to_c = [], []
    for leaf in jax.tree_util.tree_leaves(stacked):
        # Integers and keys do not move.
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            first, second, third = as_real(leaf.reshape(3, -1))
            to_b.append(second - first)
            to_c.append(third - first)
    # Times a power of two, which is exact, their squares are in range.
    exponent = common_exponent([*to_b, *to_c])
    to_b, to_c = all_scaled(to_b, -exponent), all_scaled(to_c, -exponent)
    zero = jnp.zeros(())
    length = jnp.sqrt(sum(map(jnp.vdot, to_b, to_b), start=zero))
    along = sum(map(jnp.vdot, to_b, to_c), start=zero) / length
    # The difference of their squares would be rounding where c is near the line.
    off_line = []
    for step, other in zip(to_b, to_c, strict=True):
        off_line.append(other - along / length * step)
    off = jnp.sqrt(sum(map(jnp.vdot, off_line, off_line), start=zero))
    if not isinstance(off, Tracer):
        # Not the other way round: of NaN, no comparison is true.
        if not off > _SMALLEST_ANGLE * jnp.hypot(along, off):
            raise ValueError(
                "the three models lie on one line and span no plane; give three of which none is "
                "between or beyond the others, or take barrier(metric, a, b)"
            )
    return restored(jnp.array([[0, 0], [length, 0], [along, off]]), exponent)


def _positions(coordinates: Array, points: int, margin: float) -> Float[Array, " points"]:
    """Returns equal steps that go beyond what they have to hold by a margin."""
    first, last = jnp.min(coordinates), jnp.max(coordinates)
    beyond = margin * (last - first)
    return jnp.linspace(first - beyond, last + beyond, points)


def _require_margin(margin: Any) -> None:
    """Refuses a margin that is no number, or below 0."""
    if isinstance(margin, bool) or not isinstance(margin, numbers.Real):
        raise TypeError(f"margin is {margin!r:.80}, of type {type(margin).__name__}; give a number")
    if not 0 <= float(margin) < np.inf:
        raise ValueError(f"margin is {margin}; give 0 or more, a share of the models' distance")
