"""How far a model is from what others answer on average: a measure that needs no labels."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from otfusion_jax.alignment.costs import squared_norm
from otfusion_jax.averaging.average import accumulation_dtype
from otfusion_jax.common.arguments import kind_of, require_function
from otfusion_jax.common.host import Array
from otfusion_jax.fusion.samples import Samples

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
        if self.loss is not None:
            return jnp.asarray(self.loss(params, *inputs))
        # Unrolled, not under `vmap`: there are few teachers, and their answers fit one by one.
        answers = [self.fn(teacher, *inputs) for teacher in teachers]
        answer = self.fn(params, *inputs)
        if self.outputs == "logits":
            return _mean_divergence(answer, answers, weights)
        total = jnp.zeros(())
        arrays = [jax.tree.leaves(tree) for tree in (answer, *answers)]
        for own, *others in zip(*arrays, strict=True):
            # Differences of near numbers in half precision would be rounding.
            wide = accumulation_dtype(own.dtype)
            mean = _weighted(weights, [other.astype(wide) for other in others])
            difference = jnp.abs(own.astype(wide) - mean)
            total = total + jnp.mean(difference * difference).astype(total.dtype)
        return total

    def check(self, params: PyTree, inputs: tuple[PyTree, ...]) -> None:
        """Refuses outputs that the objective is not meant for. Nothing is computed.

        Args:
            params: The parameters of a model.
            inputs: A batch of inputs, arrays or shapes.

        Raises:
            ValueError: If logits have no axis of two classes or more, or a loss is no scalar.
            TypeError: If outputs are not floating-point numbers, or logits not a single array.
        """
        if self.loss is not None:
            found = jax.eval_shape(self.loss, params, *inputs)
            shape = getattr(found, "shape", None)
            if shape != ():
                raise ValueError(
                    f"the loss returned {kind_of(found) if shape is None else f'shape {shape}'}; "
                    "return a scalar, the mean over a batch"
                )
            return
        found = jax.eval_shape(self.fn, params, *inputs)
        for array in jax.tree.leaves(found):
            if not jnp.issubdtype(array.dtype, jnp.inexact):
                raise TypeError(
                    f"the function returned {array.dtype} of shape {array.shape}, where "
                    "floating-point numbers are compared; return those that it is made of, or pass "
                    "a loss"
                )
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


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """Scores models on inputs that nothing was fitted to.

    Attributes:
        objective: What is to be small.
        teachers: The parameters of the models that are to be met, K of them.
        weights: How much each of them counts, float `[K]`.
        samples: The inputs; several kinds count alike.
    """

    objective: Objective
    teachers: Sequence[PyTree]
    weights: Float[Array, " k"]
    samples: Sequence[Samples]

    @property
    def measure(self) -> str:
        """What scores are, in words."""
        if self.objective.loss is not None:
            return "loss"
        if self.objective.outputs == "logits":
            return "divergence from the models' mean prediction (nats)"
        return "squared difference from the models' mean prediction"

    @property
    def count(self) -> int:
        """How many inputs are looked at."""
        return sum(samples.count for samples in self.samples)

    def score(self, params: PyTree, moved: Sequence[PyTree] = ()) -> float:
        """Takes the mean of the objective, batch by batch.

        Args:
            params: The parameters of a model.
            moved: What it is the average of, which does not matter here.

        Returns:
            The score; less is better.
        """
        total = 0.0
        for samples in self.samples:
            for inputs in samples.batches():
                # The last batch may be smaller, and counts for less.
                size = len(jax.tree.leaves(inputs)[0])
                found = _score(self.objective, params, list(self.teachers), self.weights, inputs)
                total += float(found) * size / samples.count
        return total / len(self.samples)


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Scores averages by the weights alone: how far models were from each other.

    Attributes:
        weights: How much each of the models counts, float `[K]`.
        leaf_weight: How much each parameter counts; None counts all alike.
    """

    weights: Float[Array, " k"]
    leaf_weight: Callable[[str], Any] | None

    @property
    def measure(self) -> str:
        """What scores are, in words."""
        return "mean squared distance of the models, as moved, to their average"

    @property
    def count(self) -> int:
        """How many inputs are looked at: none."""
        return 0

    def score(self, params: PyTree, moved: Sequence[PyTree]) -> float:
        """Takes the weighted mean of the squared distances of models to their average.

        Args:
            params: The parameters of the average.
            moved: The models that it is the average of, K of them.

        Returns:
            The score; less is better.
        """
        total = 0.0
        for weight, model in zip(self.weights.tolist(), moved, strict=True):
            pairs = zip(
                jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(model), strict=True
            )
            for (path, mean), leaf in pairs:
                # Counters and keys are at no distance from each other.
                if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                    name = jax.tree_util.keystr(path, simple=True, separator="/")
                    counts = 1.0 if self.leaf_weight is None else float(self.leaf_weight(name))
                    total += weight * counts * float(squared_norm(jnp.asarray(leaf - mean)))
        return total


@functools.partial(jax.jit, static_argnames="objective")
def _score(
    objective: Objective,
    params: PyTree,
    teachers: list[PyTree],
    weights: Float[Array, " k"],
    inputs: tuple[PyTree, ...],
) -> Float[Array, ""]:
    """Takes the objective of one batch."""
    return objective(params, teachers, weights, inputs)


def _mean_divergence(logits: Array, teachers: list[Array], weights: Array) -> Array:
    """Takes the divergence of the teachers' mean probabilities from those of some logits."""
    wide = accumulation_dtype(logits.dtype)
    predicted = jax.nn.log_softmax(logits.astype(wide), axis=-1)
    mean = _weighted(weights, [jax.nn.softmax(other.astype(wide), axis=-1) for other in teachers])
    # p log p is 0 at 0, and so is its derivative here: the mean does not depend on the model.
    terms = jax.scipy.special.xlogy(mean, mean) - mean * predicted
    return jnp.mean(jnp.sum(terms, axis=-1))


def _weighted(weights: Array, arrays: list[Array]) -> Array:
    """Takes the weighted sum of some arrays of one shape."""
    total = jnp.zeros_like(arrays[0])
    for weight, array in zip(weights, arrays, strict=True):
        total = total + weight.astype(array.dtype) * array
    return total


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
