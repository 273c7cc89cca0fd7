"""The ways to move models onto each other that `merge` tries, by name.

Each is a few calls of public functions. A `Task` is what all of them are given, in one form: with
rotations or without. What several candidates need of it is worked out once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ott.geometry import costs

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.feature_gram import feature_gram
from otfusion_jax.alignment.forward_pass import ForwardPass
from otfusion_jax.alignment.learned import learn_alignment
from otfusion_jax.alignment.method import AbstractMethod, Alignment
from otfusion_jax.averaging.average import average
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.barycenter import barycenter
from otfusion_jax.fusion.divergence import Objective
from otfusion_jax.fusion.mixup import mixup
from otfusion_jax.fusion.samples import Samples
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport
from otfusion_jax.tracing.activations import At

_LEARNING_STEPS = 600
_LEARNING_BATCH_SIZE = 64
# Of many inputs, and of mixtures, more is learned before they are known by heart.
_LEARNING_PASSES = 15
_MOST_LEARNING_STEPS = 2400
# How often each of three models or more is turned, and by how many steps at least.
_ROUNDS = 2
_FEWEST_LEARNING_STEPS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Models to be moved, with all that may be looked at for it.

    Attributes:
        symmetry: The symmetry of the models.
        fn: The function of the models.
        models: The parameters of the K models, in canonical form if the symmetry has rotations.
        weights: How much each of them counts, float `[K]`.
        leaf_weight: How much each parameter counts, see `align`.
        samples: The inputs to fit to; None if there are none.
        most_samples: How many there are at most where the same is learned from others, so that one
            program can serve all.
        objective: What a learned alignment descends on; None without inputs.
        mixes: Whether it descends on mixtures of inputs.
        key: The source of randomness.
    """

    symmetry: Symmetry
    fn: Callable[..., Any]
    models: list[PyTree]
    weights: Float[Array, " k"]
    leaf_weight: Callable[[str], Any] | None
    samples: Samples | None
    most_samples: int
    objective: Objective | None
    mixes: bool
    key: Array

    @functools.cached_property
    def grams(self) -> list[dict[str, Gram]]:
        """The inner products of what units put out, minus its mean, but of heads."""
        found = self.feature_grams(at="activation", center=True)
        return [_beside_heads(self.symmetry, grams) for grams in found]

    def feature_grams(self, at: At, center: bool) -> list[dict[str, Gram]]:
        """Takes the inner products of features of each model but the last with the last one's."""
        assert self.samples is not None
        found = []
        for model in self.models[:-1]:
            batches = self.samples.batches()
            grams = feature_gram(
                self.symmetry, self.fn, model, self.models[-1], batches, at=at, center=center
            )
            found.append(grams)
        return found

    @functools.cached_property
    def by_features(self) -> list[Alignment]:
        """How each model but the last is matched to the last by its features."""
        # Heads have weights alone, and around them all is in place: what they write says as much.
        return self.aligned(ForwardPass(members="all"), self.grams)

    def aligned(
        self,
        method: AbstractMethod,
        grams: Sequence[dict[str, Gram] | None],
        metric: costs.CostFn | None = None,
    ) -> list[Alignment]:
        """Aligns each model but the last to the last."""
        found = []
        for model, of_model in zip(self.models[:-1], grams, strict=True):
            alignment = align(
                self.symmetry,
                model,
                self.models[-1],
                method=method,
                metric=metric,
                # Where no group has features, weights decide about all.
                grams=of_model or None,
                leaf_weight=self.leaf_weight,
            )
            found.append(alignment)
        return found

    def moved(self, alignments: Sequence[Any]) -> list[PyTree]:
        """Moves each model but the last along its alignment; the last stays as it is."""
        moved = []
        for alignment, model in zip(alignments, self.models[:-1], strict=True):
            moved.append(transport(self.symmetry, alignment, model))
        return [*moved, self.models[-1]]


def _beside_heads(symmetry: Symmetry, grams: dict[str, Gram]) -> dict[str, Gram]:
    """Leaves heads out, and what is in them: their weights tell more than their features.

    Returns:
        The inner products of units that rotate, as they are, and of others their correlations.
    """
    heads = {group.outer for group in symmetry.groups}
    kept = {}
    for name, gram in grams.items():
        group = symmetry[name]
        if group.rotates and not group.batch:
            kept[name] = gram
        elif name not in heads and group.outer is None:
            kept[name] = gram.normalised()
    return kept


# --- the candidates


def _as_they_are(task: Task) -> list[PyTree]:
    return list(task.models)


def _by_weights(task: Task) -> list[PyTree]:
    return task.moved(task.aligned(CoordinateDescent(), [None] * (len(task.models) - 1)))


def _require_features(grams: Sequence[dict[str, Gram]]) -> None:
    """Refuses what would be a match by weights, under the name of one by features."""
    for number, of_model in enumerate(grams):
        if not of_model:
            raise ValueError(f"no group of model {number} has features that can be matched")


def _by_features(task: Task) -> list[PyTree]:
    _require_features(task.grams)
    return task.moved(task.by_features)


def _by_preactivations(task: Task) -> list[PyTree]:
    """Algorithm 1 of the paper with activations: its features and its metric."""
    grams = task.feature_grams(at="preactivation", center=False)
    _require_features(grams)
    return task.moved(task.aligned(ForwardPass(), grams, costs.Euclidean()))


def _by_features_then_weights(task: Task) -> list[PyTree]:
    # Features make the start alone; what descends is the cost of the weights.
    from_features = CoordinateDescent(starts=("forward",))
    _require_features(task.grams)
    return task.moved(task.aligned(from_features, task.grams))


@dataclasses.dataclass(frozen=True)
class _DistanceOfAnswers:
    """The loss that rotations are learned by: how far a model answers from all models.

    A dataclass and no closure, because equal ones have to be one function to `jax.jit`.

    Attributes:
        objective: What measures it.
        mixes: Whether it is measured on mixtures of two inputs.
    """

    objective: Objective
    mixes: bool

    def __call__(
        self,
        models: list[PyTree],
        weights: Float[Array, " k"],
        inputs: tuple[PyTree, ...],
        params: PyTree,
        chosen: tuple[Array, Array],
    ) -> Float[Array, ""]:
        """Takes the loss of parameters on inputs at some positions, mixed by a seed."""
        positions, seed = chosen
        batch = jax.tree.map(lambda array: array[positions], inputs)
        if self.mixes:
            batch = mixup(batch, jax.random.key(seed))
        return self.objective(params, models, weights, batch)


def _by_learned_rotations(task: Task) -> list[PyTree]:
    """Turns units on from where features have them, until the average answers as the models do.

    What is to answer is the average of all models. So each in its turn moves on while the others
    stay: of three or more that were moved onto the last pair by pairwise, the average is far worse.
    """
    samples, objective = task.samples, task.objective
    assert samples is not None
    assert objective is not None
    inputs = samples.on_device(task.most_samples)
    distance = _DistanceOfAnswers(objective, task.mixes)
    loss = jax.tree_util.Partial(distance, task.models, task.weights, inputs)
    size = min(_LEARNING_BATCH_SIZE, samples.count)
    moved = task.moved(task.by_features)
    others = len(moved) - 1
    turns = others if others == 1 else _ROUNDS * others
    steps = _learning_steps(task, size, turns)
    for turn in range(turns):
        number = turn % others
        share = float(task.weights[number])
        if share == 1:
            # Nothing is left for the others, so that the average is this model.
            continue
        own_key, seed_key = jax.random.split(jax.random.fold_in(task.key, turn))
        positions = jax.random.randint(own_key, (steps, size), 0, samples.count)
        found = learn_alignment(
            task.symmetry,
            loss,
            moved[number],
            _average_of_others(task, moved, number),
            (positions, jax.random.bits(seed_key, (steps,))),
            start=task.symmetry.identity(),
            t=1 - share,
            # Permutations stay as features have found them.
            solver=None,
            leaf_weight=task.leaf_weight,
        )
        moved[number] = transport(task.symmetry, found, moved[number])
    return moved


def _learning_steps(task: Task, size: int, turns: int) -> int:
    """Says how many steps each turn takes, as many in all however many models there are."""
    assert task.samples is not None
    steps = _MOST_LEARNING_STEPS
    if not task.mixes:
        passes = _LEARNING_PASSES * task.samples.count // size
        steps = min(max(passes, _LEARNING_STEPS), steps)
    return max(steps // turns, min(steps, _FEWEST_LEARNING_STEPS))


def _average_of_others(task: Task, models: Sequence[PyTree], number: int) -> PyTree:
    """Averages all models but one, by their weights."""
    shares = np.delete(np.asarray(task.weights, np.float64), number)
    others = [*models[:number], *models[number + 1 :]]
    return average(others, (shares / shares.sum()).tolist())


def _at_the_barycenter(task: Task) -> list[PyTree]:
    weights = [float(weight) for weight in np.asarray(task.weights)]
    found = barycenter(task.symmetry, task.models, weights, leaf_weight=task.leaf_weight)
    moved = []
    for number, model in enumerate(task.models):
        plans = {name: plan[number] for name, plan in found.plans.items()}
        moved.append(transport(task.symmetry, plans, model))
    return moved


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to move models onto each other.

    Attributes:
        name: The name of the candidate.
        move: Gives the models as they enter the average.
        looks_at_inputs: Whether it needs inputs.
        moves: Whether anything is moved, so that the form of the models matters.
        rotates: Whether it is about rotations alone.
        permutes: Whether it is about permutations alone.
        learns: Whether it fits inputs so closely that they must not be drawn at random.
        least_models: How many models it makes a difference for, at least.
    """

    name: str
    move: Callable[[Task], list[PyTree]]
    looks_at_inputs: bool = False
    moves: bool = True
    rotates: bool = False
    permutes: bool = False
    learns: bool = False
    least_models: int = 2


_ALL = (
    Candidate("as they are", _as_they_are, moves=False),
    Candidate("weights", _by_weights),
    Candidate("preactivations", _by_preactivations, looks_at_inputs=True, permutes=True),
    Candidate("features", _by_features, looks_at_inputs=True),
    Candidate("features, then weights", _by_features_then_weights, looks_at_inputs=True),
    Candidate(
        "learned rotations",
        _by_learned_rotations,
        looks_at_inputs=True,
        rotates=True,
        learns=True,
    ),
    Candidate("barycenter", _at_the_barycenter, least_models=3),
)

CANDIDATES = {candidate.name: candidate for candidate in _ALL}
"""All candidates by name, in the order in which they are tried: of equal ones the first is kept."""


def checked_candidates(names: Sequence[str] | None) -> list[Candidate]:
    """Finds candidates by their names.

    Args:
        names: Some names; None for all.

    Returns:
        The candidates, in the order in which they are tried.

    Raises:
        ValueError: If there are none, or one has no such name.
        TypeError: If the names are a single string.
    """
    if names is None:
        return list(_ALL)
    if isinstance(names, str):
        raise TypeError(f"candidates is the string {names!r}; pass a list of names, as [{names!r}]")
    known = ", ".join(map(repr, CANDIDATES))
    for name in names:
        if name not in CANDIDATES:
            raise ValueError(f"there is no candidate {name!r}; choose of {known}")
    if not names:
        raise ValueError(f"candidates is empty; choose one or more of {known}, or leave it out")
    return [candidate for candidate in _ALL if candidate.name in names]
