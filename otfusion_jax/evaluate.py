"""What comes out: ensembles, and how loss or accuracy runs along the path between two models."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from otfusion_jax.fuse import stack


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
    """
    logits = jax.vmap(lambda params: fn(params, *inputs))(stack(models))
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=0)


def interpolate(a: PyTree, b: PyTree, t: float | Float[Array, "*t"]) -> PyTree:
    """Goes from one model to another in a straight line.

    Args:
        a: parameters at `t = 0`.
        b: parameters at `t = 1`, of the same structure and shapes.
        t: where on the line; `[T]` gives a stack of T models.

    Returns:
        `(1 - t) a + t b`, with the shape of `t` in front of each leaf. Integers, booleans and keys
        are those of `b`.

    Raises:
        ValueError: for trees that differ, listing every offender by key path.
    """
    t = jnp.asarray(t, float)

    def between(pair: Array) -> Array:
        x, y = pair
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.broadcast_to(y, t.shape + y.shape)
        s = t.reshape(t.shape + (1,) * x.ndim).astype(x.dtype)
        x, y = x.reshape((1,) * t.ndim + x.shape), y.reshape((1,) * t.ndim + y.shape)
        return (1 - s) * x + s * y

    return jax.tree.map(between, stack([a, b]))


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
        ValueError: for trees that differ, or `t` that does not start at 0 and end at 1.
    """
    t = jnp.linspace(0, 1, 25) if t is None else t
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
