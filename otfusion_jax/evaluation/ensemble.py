"""The ensemble: what fusion aims at, at the price of running every model."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.average import accumulation_dtype
from otfusion_jax.averaging.stacking import stack
from otfusion_jax.common.arguments import require_arrays, require_function


def ensemble(
    fn: Callable[..., Array],
    models: Sequence[PyTree],
    *inputs: PyTree,
) -> Float[Array, "batch ... classes"]:
    """Averages the predicted probabilities of several models: the baseline that fusion aims at.

    Args:
        fn: The model as a function, `fn(params, *inputs)`, that returns logits
            `[batch, ..., classes]`.
        models: The parameters of the models, K pytrees.
        *inputs: A batch of inputs, as `fn` takes them.

    Returns:
        The probabilities, float `[batch, ..., classes]`, averaged in float32 or wider and rounded
        once.

    Raises:
        ValueError: For no models, leaves that are no arrays, or trees that differ, naming the model
            and every such leaf by key path.
        TypeError: For what is no list of models, for shapes in place of arrays, and for arguments
            in another order.
    """
    require_function(fn, "ensemble(fn, models, *inputs)")
    require_arrays(inputs, "inputs")
    stacked = stack(models)
    logits = jax.vmap(lambda params: fn(params, *inputs))(stacked)
    wide = accumulation_dtype(logits.dtype)
    # Probabilities, not logits: the latter are known only up to a constant for each model.
    probabilities = jax.nn.softmax(logits.astype(wide), axis=-1)
    mean = jnp.mean(probabilities, axis=0)
    return mean.astype(logits.dtype)
