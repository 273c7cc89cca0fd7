"""What comes out: ensembles, and how loss or accuracy runs along the path between two models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.interpolate import interpolate
from otfusion_jax.common.arguments import require_function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Barrier:
    """A metric along the straight line between two models.

    Attributes:
        t: positions, float `[T]`.
        values: the metric there, float `[T]`, or `[T, ...]` for several metrics at once.
        height: float `[]` or `[...]`, how far the metric rises above the line between its ends, at
            most; 0 means linear mode connectivity.
    """

    t: Float[Array, " t"]
    values: Float[Array, " t *metrics"]
    height: Float[Array, "*metrics"]


def barrier(
    metric: Callable[[PyTree], Any],
    a: PyTree,
    b: PyTree,
    t: Float[Array, " t"] | None = None,
    *,
    batch_size: int | None = None,
) -> Barrier:
    """Evaluates a metric along the straight line between two models, and its barrier.

    Args:
        metric: maps parameters to a scalar where less is better: a loss, or an error rate. For an
            accuracy, pass the error. An array of several such metrics does as well.
        a: parameters at one end.
        b: parameters at the other.
        t: positions from 0 to 1, float `[T]`; 25 equal steps if None.
        batch_size: how many models are evaluated at once under `jax.vmap`; all if None. Memory
            grows with it.

    Returns:
        The values and the barrier's height. Frankle et al., Linear Mode Connectivity, ICML 2020.

    Raises:
        ValueError: as `interpolate`, for `t` that does not start at 0 and end at 1, and for an
            empty batch.
        TypeError: for a metric that is no function.
    """
    require_function(metric, "barrier(metric, a, b)")
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size is {batch_size}; give 1 or more, or None")
    t = jnp.linspace(0, 1, 25) if t is None else jnp.asarray(t, float)
    ends = t.ndim == 1 and t.shape[0] >= 2
    if not ends or (not isinstance(t, Tracer) and (np.asarray(t)[[0, -1]] != (0, 1)).any()):
        raise ValueError("t must be a vector that starts at 0 and ends at 1")
    values = jax.lax.map(
        lambda s: jnp.asarray(metric(interpolate(a, b, s)), float),
        t,
        batch_size=t.shape[0] if batch_size is None else batch_size,
    )
    s = t.reshape(-1, *[1] * (values.ndim - 1))
    line = (1 - s) * values[:1] + s * values[-1:]
    return Barrier(t, values, jnp.max(values - line, axis=0))
