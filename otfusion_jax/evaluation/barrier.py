"""How a loss or an error runs along the straight line between two models.

Where it rises on the way, the models lie in different basins, and their average is worse than both.
Two models without a barrier are linearly mode connected (Frankle et al., Linear Mode Connectivity
and the Lottery Ticket Hypothesis, ICML 2020): alignment is to make them so.
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

from otfusion_jax.averaging.interpolate import checked_positions, interpolate
from otfusion_jax.common.arguments import checked_count, kind_of, require_function
from otfusion_jax.common.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Barrier:
    """A metric along the straight line between two models.

    Attributes:
        t: The positions on the line, float `[T]`, from 0 to 1.
        values: The metric at each position, float `[T]`, or `[T, ...]` for several metrics at once.
        height: How far the metric rises above the line between its values at the ends, at most,
            float `[]`, or `[...]` for several metrics. 0 means linear mode connectivity.
        values_error: The standard error of each value as the mean over all there is that examples
            were drawn from, of the shape of `values`. None unless the metric is one per example.
        height_error: The standard error of the height, of its shape: that of the mean over the
            examples of how far each rises at the position of the height. All positions have the
            same examples, so that it is less than the errors of the values would tell. That the
            position is where these examples rise most is not in it. None as above.
    """

    t: Float[Array, " t"]
    values: Float[Array, " t *metrics"]
    height: Float[Array, "*metrics"]
    values_error: Float[Array, " t *metrics"] | None = None
    height_error: Float[Array, "*metrics"] | None = None


def barrier(
    metric: Callable[[PyTree], ArrayLike],
    a: PyTree,
    b: PyTree,
    t: Float[Array, " t"] | None = None,
    *,
    per_example: bool = False,
    batch_size: int | None = None,
) -> Barrier:
    """Evaluates a metric along the straight line between two models, and its barrier.

    Args:
        metric: The metric, from parameters to a scalar where less is better: a loss, or an error
            rate. For an accuracy, pass the error. An array of several such metrics does as well.
        a: The parameters at one end.
        b: The parameters at the other.
        t: The positions, from 0 to 1, float `[T]`; 25 equal steps if None.
        per_example: Whether the metric returns its values for each of the n >= 2 examples, `[n]`,
            or `[n, ...]` for several metrics. Values are then their means, and have standard
            errors. All positions must have the same examples. `T * n` numbers are in memory.
        batch_size: How many models are evaluated at once under `jax.vmap`; all if None. Memory
            grows with it.

    Returns:
        The values and the barrier's height.

    Raises:
        ValueError: For what `interpolate` refuses, for `t` that does not start at 0 and end at 1 or
            leaves this range, for an empty batch, and for fewer than two examples where there are
            to be standard errors.
        TypeError: For a metric that is no function or returns no array, for a batch size that is no
            number, and for positions that are none.
    """
    require_function(metric, "barrier(metric, a, b)")
    if batch_size is not None:
        batch_size = checked_count(batch_size, "batch_size", "1 or more, or None")
    if t is None:
        t = jnp.linspace(0, 1, 25)
    t = checked_positions(t)
    _require_whole_line(t)
    if batch_size is None:
        batch_size = len(t)

    def value_at(position: Array) -> Array:
        value = as_numbers(metric(interpolate(a, b, position)))
        if per_example:
            _require_examples(value)
        return value

    values = jax.lax.map(value_at, t, batch_size=batch_size)
    if not per_example:
        return Barrier(t, values, jnp.max(_above_chord(t, values), axis=0))
    examples = values  # [T, n, *metrics]
    values = jnp.mean(examples, axis=1)
    # For each metric the position at which it rises most, which is not the same for all.
    above = _above_chord(t, values)
    # Differences of the same examples: what makes an example hard does so at all positions.
    above_at_highest = jnp.take_along_axis(
        _above_chord(t, examples), jnp.argmax(above, axis=0)[None, None], axis=0
    )
    return Barrier(
        t,
        values,
        jnp.max(above, axis=0),
        _standard_error(examples),
        _standard_error(above_at_highest)[0],
    )


def _above_chord(t: Array, values: Array) -> Array:
    """Returns how far values `[T, ...]` are above the line between the first and the last."""
    # From the chord, as the two ends need not be equally good.
    value_axes = [1] * (values.ndim - 1)
    position = t.reshape(-1, *value_axes)
    first, last = values[:1], values[-1:]
    return values - ((1 - position) * first + position * last)


def _standard_error(examples: Array) -> Array:
    """Returns the standard errors of the means over examples, the axis 1."""
    return jnp.std(examples, axis=1, ddof=1) / examples.shape[1] ** 0.5


def _require_whole_line(t: Array) -> None:
    """Refuses positions that do not go from one end to the other, as far as that can be known."""
    # Where they are traced, nothing but their shape is known.
    is_line = t.ndim == 1 and len(t) >= 2
    if is_line and not isinstance(t, Tracer):
        positions = np.asarray(t)
        outside = positions[(positions < 0) | (positions > 1)]
        if len(outside):
            raise ValueError(f"t has {outside[0]}; the line between the models is from 0 to 1")
        is_line = positions[0] == 0 and positions[-1] == 1
    if not is_line:
        raise ValueError("t must be a vector that starts at 0 and ends at 1")


def as_numbers(value: Any) -> Float[Array, "..."]:
    """Reads what a metric returns.

    Args:
        value: What it returned.

    Returns:
        The numbers, floating-point.

    Raises:
        TypeError: If it is neither a number nor an array.
    """
    if not isinstance(value, jax.Array | np.ndarray | np.generic | numbers.Real):
        raise TypeError(
            f"the metric returned {kind_of(value)}; it must return a number, or an array of "
            "several, as in jnp.stack([loss, error])"
        )
    return jnp.asarray(value, float)


def _require_examples(value: Array) -> None:
    """Refuses what a metric returns if there is not a value for each of several examples."""
    if value.ndim == 0 or value.shape[0] < 2:
        raise ValueError(
            f"the metric returned an array of shape {value.shape}; with per_example=True its first "
            "axis must be the examples, two or more, as in a loss before its mean is taken"
        )
