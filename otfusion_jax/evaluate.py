"""What comes out: ensembles, and how loss or accuracy runs along the path between two models."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from otfusion_jax.checks import require_arrays, require_equal_integers, require_function
from otfusion_jax.fuse import columns_of, stack
from otfusion_jax.symmetry import leaves_of


def ensemble(
    fn: Callable[..., Array], models: Sequence[PyTree], *inputs: PyTree
) -> Float[Array, "batch ... classes"]:
    """Averages the predicted probabilities of several models: the baseline that fusion aims at.

    Args:
        fn: `fn(params, *inputs)`, returns logits `[batch, ..., classes]`.
        models: K pytrees of parameters.
        *inputs: a batch of inputs.

    Returns:
        Probabilities, float `[batch, ..., classes]`.

    Raises:
        ValueError: for no models, or trees that differ.
        TypeError: for what is no list of models, and arguments in another order.
    """
    require_function(fn, "ensemble(fn, models, *inputs)")
    require_arrays(inputs, "inputs")
    logits = jax.vmap(lambda params: fn(params, *inputs))(stack(models))
    probabilities = jax.nn.softmax(logits.astype(_wide(logits.dtype)), axis=-1)
    return jnp.mean(probabilities, axis=0).astype(logits.dtype)


def _wide(dtype: Any) -> Any:
    """What to compute a mean of values of some precision in, to be rounded once."""
    return jnp.float32 if dtype.itemsize < 4 else dtype


def interpolate(a: PyTree, b: PyTree, t: float | Float[Array, "*t"]) -> PyTree:
    """Goes from one model to another in a straight line.

    Args:
        a: parameters at `t = 0`.
        b: parameters at `t = 1`, of the same structure and shapes.
        t: where on the line; `[T]` gives a stack of T models.

    Returns:
        `(1 - t) a + t b`, with the shape of `t` in front of each leaf, computed in float32 or wider
        and rounded once. Random keys and single integers (counters) are those of `b`; arrays of
        integers or booleans must be the same in both.

    Raises:
        ValueError: for trees that differ, and for integers that do, listing every offender by key
            path.
    """
    stacked = stack([a, b])
    leaves = leaves_of(a)
    require_equal_integers(leaves, columns_of([a, b]), [False] * len(leaves), "")
    t = jnp.asarray(t, float)

    def between(pair: Array) -> Array:
        x, y = pair
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.broadcast_to(y, t.shape + y.shape)
        wide = _wide(x.dtype)
        s = t.reshape(t.shape + (1,) * x.ndim).astype(wide)
        x, y = (z.astype(wide).reshape((1,) * t.ndim + z.shape) for z in (x, y))
        return ((1 - s) * x + s * y).astype(pair.dtype)

    return jax.tree.map(between, stacked)


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
