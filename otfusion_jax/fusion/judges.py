"""What scores averages: by what they answer to inputs, or by the weights alone."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from otfusion_jax.alignment.costs import squared_norm
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.divergence import Objective
from otfusion_jax.fusion.samples import Samples
from otfusion_jax.symmetry.groups import leaves_of

_MOST_KEPT = 2**28
"""How many bytes of the teachers' answers are kept, in place of computing them again."""


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """Scores models on inputs that nothing was fitted to.

    Attributes:
        objective: What is to be small.
        teachers: The parameters of the models that are to be met, K of them.
        weights: How much each of them counts, float `[K]`.
        samples: The inputs.
        kept: What the teachers answer to the first batches, once it was asked for.
    """

    objective: Objective
    teachers: Sequence[PyTree]
    weights: Float[Array, " k"]
    samples: Samples
    kept: list[list[Array]] = dataclasses.field(default_factory=list)

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
        return self.samples.count

    def score(self, params: PyTree, moved: Sequence[PyTree] = ()) -> float:
        """Takes the mean of the objective, batch by batch.

        Args:
            params: The parameters of a model.
            moved: What it is the average of, which does not matter here.

        Returns:
            The score; less is better.
        """
        total = 0.0
        for number, inputs in enumerate(self.samples.batches()):
            # The last batch may be smaller, and counts for less.
            size = len(jax.tree.leaves(inputs)[0])
            found = _distance(self.objective, params, self._target(number, inputs), inputs)
            total += float(found) * size / self.samples.count
        return total

    def _target(self, number: int, inputs: tuple[PyTree, ...]) -> list[Array]:
        """Returns what the teachers answer to a batch, and keeps it if there is room."""
        if number < len(self.kept):
            return self.kept[number]
        target = _target(self.objective, list(self.teachers), self.weights, inputs)
        size = sum(array.nbytes for array in target)
        if number == len(self.kept) and size * (number + 1) <= _MOST_KEPT:
            self.kept.append(target)
        return target


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
        leaves, means = leaves_of(params), jax.tree.leaves(params)
        for weight, model in zip(self.weights.tolist(), moved, strict=True):
            for leaf, mean, array in zip(leaves, means, jax.tree.leaves(model), strict=True):
                # Counters and keys are at no distance from each other.
                if leaf.moves:
                    counts = 1.0 if self.leaf_weight is None else float(self.leaf_weight(leaf.path))
                    total += weight * counts * float(squared_norm(jnp.asarray(array - mean)))
        return total


@functools.partial(jax.jit, static_argnames="objective")
def _target(
    objective: Objective,
    teachers: list[PyTree],
    weights: Float[Array, " k"],
    inputs: tuple[PyTree, ...],
) -> list[Array]:
    """Takes the mean answer of teachers to one batch."""
    return objective.target(teachers, weights, inputs)


@functools.partial(jax.jit, static_argnames="objective")
def _distance(
    objective: Objective, params: PyTree, target: list[Array], inputs: tuple[PyTree, ...]
) -> Float[Array, ""]:
    """Takes the objective of one batch."""
    return objective.distance(params, target, inputs)
