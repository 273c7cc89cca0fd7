"""How far a model is from what others answer on average: a measure that needs no labels."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from otfusion_jax.averaging.average import mixture
from otfusion_jax.common.arguments import kind_of, require_function
from otfusion_jax.common.host import Array, accumulation_dtype
from otfusion_jax.common.typing import PyTree
from otfusion_jax.tracing.misuse import naming_mistakes

Outputs = Literal["logits", "values"]
"""What a function returns: logits of classes along the last axis, or numbers to be met as such."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is to be small for a model on a batch of inputs.

    A dataclass and no closure, because equal ones have to be one static argument to `jax.jit`.

    Attributes:
        fn: The function of the models, `fn(params, *inputs)`.
        outputs: What it returns; None if a loss is given.
        loss: A loss, `loss(params, *inputs)`, in place of the divergence; None for that.
    """

    fn: Callable[..., Any]
    outputs: Outputs | None
    loss: Callable[..., Any] | None

    def __call__(
        self,
        params: PyTree,
        teachers: Sequence[PyTree],
        weights: Float[Array, " k"],
        inputs: tuple[PyTree, ...],
    ) -> Float[Array, ""]:
        """Takes the objective of a model; traceable and differentiable.

        Args:
            params: The parameters of the model.
            teachers: Those of the K models whose mean answer is to be met.
            weights: How much each of these counts, float `[K]`.
            inputs: A batch of inputs.

        Returns:
            The loss, or for logits the Kullback-Leibler divergence of the mean of the teachers'
            probabilities from the model's, in nats, mean over all positions; for values the mean
            squared difference from the teachers' mean, summed over arrays. 0 is the best for both.
        """
        return self.distance(params, self.target(teachers, weights, inputs), inputs)

    def target(
        self, teachers: Sequence[PyTree], weights: Float[Array, " k"], inputs: tuple[PyTree, ...]
    ) -> list[Array]:
        """Returns the mean of what the teachers answer: probabilities, or values; of a loss, none.

        Args:
            teachers: The parameters of the K models.
            weights: How much each of these counts, float `[K]`.
            inputs: A batch of inputs.

        Returns:
            A list of arrays, in float32 or wider: that of the probabilities, or one for each array
            of the answer.
        """
        if self.loss is not None:
            return []
        # Unrolled, not under `vmap`: there are few teachers, and their answers fit one by one.
        answers = [jax.tree.leaves(self.fn(teacher, *inputs)) for teacher in teachers]
        means = []
        for others in zip(*answers, strict=True):
            # Differences of near numbers in half precision would be rounding.
            wide = [other.astype(accumulation_dtype(other.dtype)) for other in others]
            if self.outputs == "logits":
                wide = [jax.nn.softmax(logits, axis=-1) for logits in wide]
            means.append(_weighted(weights, wide))
        return means

    def distance(
        self, params: PyTree, target: list[Array], inputs: tuple[PyTree, ...]
    ) -> Float[Array, ""]:
        """Takes the objective of a model, of what `target` has returned for the same inputs."""
        if self.loss is not None:
            return jnp.asarray(self.loss(params, *inputs))
        answer = jax.tree.leaves(self.fn(params, *inputs))
        if self.outputs == "logits":
            return _divergence(answer[0], target[0])
        total = jnp.zeros(())
        for own, mean in zip(answer, target, strict=True):
            difference = jnp.abs(own.astype(mean.dtype) - mean)
            total = total + jnp.mean(difference * difference).astype(total.dtype)
        return total

    def check(self, params: PyTree, inputs: tuple[PyTree, ...]) -> None:
        """Refuses outputs that the objective is not meant for. Nothing is computed.

        Args:
            params: The parameters of a model.
            inputs: A batch of inputs, arrays or shapes.

        Raises:
            ValueError: If outputs have no axis of samples, or logits none of two classes or more;
                if a loss is no scalar.
            TypeError: If outputs are not floating-point numbers, or logits not a single array.
        """
        if self.loss is not None:
            with naming_mistakes(self.loss, params, inputs):
                found = jax.eval_shape(self.loss, params, *inputs)
            shape = getattr(found, "shape", None)
            if shape != ():
                raise ValueError(
                    f"the loss returned {kind_of(found) if shape is None else f'shape {shape}'}; "
                    "return a scalar, the mean over a batch"
                )
            return
        with naming_mistakes(self.fn, params, inputs):
            found = jax.eval_shape(self.fn, params, *inputs)
        for array in jax.tree.leaves(found):
            if not jnp.issubdtype(array.dtype, jnp.inexact):
                raise TypeError(
                    f"the function returned {array.dtype} of shape {array.shape}, where "
                    "floating-point numbers are compared; return those that it is made of, or pass "
                    "a loss"
                )
        _require_samples(found)
        if self.outputs == "logits":
            _require_logits(found)


def objective_of(fn: Callable[..., Any], outputs: Any, loss: Any, call: str) -> Objective:
    """Makes the objective of what a user has said of it.

    Args:
        fn: The function of the models.
        outputs: What it returns, or None.
        loss: A loss, or None.
        call: How the library's function is called, for the message.

    Returns:
        The objective.

    Raises:
        ValueError: If neither is given, or both are, or the outputs have another name.
        TypeError: If the loss cannot be called.
    """
    if loss is not None:
        require_function(loss, f"{call}, with loss(params, *inputs) to a scalar")
        if outputs is not None:
            raise ValueError(f"both loss and outputs={outputs!r} are given; leave one of them out")
    elif outputs not in get_args(Outputs):
        raise ValueError(
            f"outputs is {outputs!r}; say what the function returns, as that decides what its "
            "answers are compared by: outputs='logits' (classes along the last axis), "
            "outputs='values' (numbers, compared by squared differences), or a loss"
        )
    return Objective(fn, outputs, loss)


def checked_shares(weights: Sequence[float] | None, count: int, outputs: Any) -> Float[Array, " k"]:
    """Checks how much each of K models counts in their mean prediction.

    Args:
        weights: The K weights, summing to 1; uniform if None.
        count: The number K of models.
        outputs: What the user said that the function of the models returns.

    Returns:
        The weights.

    Raises:
        ValueError: If weights do not fit, or are below 0 where probabilities are averaged.
    """
    shares = mixture(weights, count)
    if outputs == "logits" and min(shares.tolist()) < 0:
        raise ValueError(
            f"weights are {weights}; of negative ones there is no mean of probabilities to compare "
            "with: give none below 0, or outputs='values'"
        )
    return shares


def _divergence(logits: Array, mean: Array) -> Array:
    """Takes the divergence of mean probabilities from those of some logits."""
    predicted = jax.nn.log_softmax(logits.astype(mean.dtype), axis=-1)
    # p log p is 0 at 0, and so is its derivative here: the mean does not depend on the model. Where
    # classes are ruled out by logits of -inf, the product with 0 would be NaN.
    predicted = jnp.where(mean > 0, predicted, 0)
    terms = jax.scipy.special.xlogy(mean, mean) - mean * predicted
    return jnp.mean(jnp.sum(terms, axis=-1))


def _weighted(weights: Array, arrays: list[Array]) -> Array:
    """Takes the weighted sum of some arrays of one shape."""
    total = jnp.zeros_like(arrays[0])
    for weight, array in zip(weights, arrays, strict=True):
        total = total + weight.astype(array.dtype) * array
    return total


def _require_samples(found: Any) -> None:
    """Refuses outputs, as shapes, that are one number for a whole batch."""
    for path, array in jax.tree_util.tree_flatten_with_path(found)[0]:
        if not array.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            output = f"output {name}" if name else "the output"
            raise ValueError(
                f"{output} of the function is a scalar, where outputs need an axis of samples, "
                "[n, ...]; return an answer for each sample, or pass a scalar loss, the mean over "
                "a batch, as loss=, in place of outputs"
            )


def _require_logits(found: Any) -> None:
    """Refuses outputs, as shapes, that are no logits."""
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise TypeError(
            f"the function returned {kind_of(found)}, where outputs='logits' is a single array; "
            "return the logits alone, as in lambda params, x: fn(params, x)[0]"
        )
    if len(found.shape) < 2 or found.shape[-1] < 2:
        raise ValueError(
            f"the function returned shape {found.shape}, where logits [batch, ..., classes] of "
            "two classes or more are wanted; of one logit z, return "
            "jnp.concatenate([jnp.zeros_like(z), z], axis=-1), or say outputs='values'"
        )
