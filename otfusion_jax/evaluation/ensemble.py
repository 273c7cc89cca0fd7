"""The ensemble: what fusion aims at, at the price of running every model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from otfusion_jax.averaging.stacking import stack
from otfusion_jax.common.arguments import kind_of, require_arrays, require_function
from otfusion_jax.common.host import accumulation_dtype
from otfusion_jax.common.typing import PyTree


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
            and every such leaf by key path; for outputs that are no logits of two classes or more.
        TypeError: For what is no list of models, for shapes in place of arrays, for arguments in
            another order, and for a function that returns something else than one array.
    """
    require_function(fn, "ensemble(fn, models, *inputs)")
    require_arrays(inputs, "inputs")
    stacked = stack(models)
    logits = jax.vmap(lambda params: fn(params, *inputs))(stacked)
    _require_logits(logits)
    wide = accumulation_dtype(logits.dtype)
    # Probabilities, not logits: the latter are known only up to a constant for each model.
    probabilities = jax.nn.softmax(logits.astype(wide), axis=-1)
    mean = jnp.mean(probabilities, axis=0)
    return mean.astype(logits.dtype)


def _require_logits(logits: Any) -> None:
    """Refuses outputs, `[K, ...]`, that would give numbers which are no probabilities."""
    if not isinstance(logits, jax.Array):
        raise TypeError(
            f"the function returned {kind_of(logits)}; return the logits alone, as in "
            "lambda params, x: fn(params, x)[0]"
        )
    shape = logits.shape[1:]
    problem = None
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        problem = "these are no logits, which are floating-point numbers"
    elif len(shape) < 2:
        problem = "an axis is missing; for a single input, pass a batch of one, x[None]"
    elif shape[-1] < 2:
        problem = (
            "the probability of a single class is 1 whatever its logit; of one logit z, return "
            "jnp.concatenate([jnp.zeros_like(z), z], axis=-1)"
        )
    if problem is not None:
        raise ValueError(
            f"the function returned {logits.dtype} of shape {shape}, where logits [batch, ..., "
            f"classes] are wanted: {problem}"
        )
