"""What comes out: ensembles, and how loss or accuracy runs along the path between two models."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.interpolate import accumulation_dtype
from otfusion_jax.averaging.stacking import stack
from otfusion_jax.common.arguments import require_arrays, require_function


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
    probabilities = jax.nn.softmax(logits.astype(accumulation_dtype(logits.dtype)), axis=-1)
    return jnp.mean(probabilities, axis=0).astype(logits.dtype)
