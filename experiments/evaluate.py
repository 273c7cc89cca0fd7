"""Accuracy and loss over a whole split, batch by batch inside one compiled program.

A `Judge` measures networks of one architecture on one split; the functions below it are what it
compiles, and can be traced. All judges of one architecture share what is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Num, PyTree

import otfusion_jax as otf

# The names of what is measured, with their units: in records, in tables and on the axes of plots.
ACCURACY = "test accuracy (%)"
LOSS = "test loss (nats)"

# The names of what rises on the path from one model to another.
BARRIERS = {ACCURACY: "error barrier (points)", LOSS: "loss barrier (nats)"}

# How many images are held in memory at once, for each model that is evaluated under a vmap.
_BATCH_SIZE = 1000

Apply = Callable[[PyTree, Array], Array]
"""Maps variables and a batch of images to logits."""


@dataclasses.dataclass(frozen=True)
class Path:
    """What was measured on the straight line from one network to another.

    Attributes:
        points: Each position, and accuracy and loss there, by their names.
        heights: How far the error, in percentage points, and the loss rise above the line between
            those of the two ends; by the name of the accuracy and of the loss.
    """

    points: list[tuple[float, dict[str, float]]]
    heights: dict[str, float]


class Judge:
    """Measures networks of one architecture on labelled images."""

    def __init__(
        self,
        apply: Apply,
        images: Num[Array | np.ndarray, "n ..."],
        labels: Int[Array | np.ndarray, "n ..."],
        name: str = ACCURACY,
    ):
        """Puts the images on the device.

        Args:
            apply: The function that the networks compute, hashable.
            images: The images to measure on.
            labels: Their classes; for windows of a text, the next tokens.
            name: What accuracy on these images is called.
        """
        self._apply = apply
        self._name = name
        self._images = jnp.asarray(images)
        self._labels = jnp.asarray(labels)

    def accuracy(self, params: PyTree) -> dict[str, float]:
        """Returns the percentage of images, or of tokens, that one network gets right, by name."""
        percentage = _accuracy_of(self._apply, params, self._images, self._labels)
        return {self._name: float(percentage)}

    def correct(self, params: PyTree) -> Bool[np.ndarray, " n"]:
        """Returns for each image whether a network gets it right."""
        return np.asarray(_correct(self._apply, params, self._images, self._labels))

    def measures(self, params: PyTree) -> dict[str, float]:
        """Returns accuracy and loss of one network, by their names."""
        return _named(_loss_and_error_of(self._apply, params, self._images, self._labels))

    def ensemble(self, models: Sequence[PyTree]) -> dict[str, float]:
        """Returns accuracy and loss of the mean probabilities of some networks, by their names."""
        models = list(models)
        return _named(_ensemble_of(self._apply, models, self._images, self._labels))

    def path(self, a: PyTree, b: PyTree, t: Float[Array, " points"]) -> Path:
        """Measures the straight line from one network to another.

        Args:
            a: The variables of the network at `t = 0`.
            b: The variables of the network at `t = 1`.
            t: The positions to measure at.

        Returns:
            What was measured at each position, and the barrier.
        """
        found = _path(self._apply, a, b, t, self._images, self._labels)
        points = []
        for position, loss_and_error in zip(t.tolist(), found.values, strict=True):
            # Of float32, a finer figure would only look different from 0.05, not be.
            label = round(position, 6)
            points.append((label, _named(loss_and_error)))
        loss, error = found.height.tolist()
        return Path(points, {ACCURACY: error, LOSS: loss})


def accuracy(
    scores: Callable[[Num[Array, "1 ..."]], Float[Array, "1 ... classes"]],
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Float[Array, ""]:
    """Computes the percentage of images, or of tokens, whose highest score is their label's.

    Args:
        scores: Maps a batch of images to logits, or to anything that ranks the classes alike.
        images: The images.
        labels: Their classes; for windows of a text, the next tokens.

    Returns:
        A float32 scalar in [0, 100]; traceable, so it may be compiled, mapped or batched.
    """

    def is_correct(logits: Array, label: Array) -> Array:
        return jnp.argmax(logits, axis=-1) == label

    judged = _judged(is_correct, scores, images, labels)
    return 100 * jnp.mean(judged, dtype=jnp.float32)


def loss_and_error(
    scores: Callable[[Num[Array, "1 ..."]], Float[Array, "1 ... classes"]],
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Float[Array, " 2"]:
    """Computes the mean cross-entropy in nats, and the percentage given another label than theirs.

    Args:
        scores: Maps a batch of images to logits.
        images: The images.
        labels: Their classes; for windows of a text, the next tokens.

    Returns:
        Loss and error rate, both such that less is better; traceable.
    """

    def judge(logits: Array, label: Array) -> Array:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        is_wrong = jnp.argmax(logits, axis=-1) != label
        percent = 100 * is_wrong.astype(loss.dtype)
        return jnp.stack([loss, percent], axis=-1)

    judged = _judged(judge, scores, images, labels)
    return jnp.mean(judged, axis=range(judged.ndim - 1))


def _named(loss_and_error: Float[Array, " 2"]) -> dict[str, float]:
    """Turns loss and error rate into what is recorded."""
    loss, error = np.asarray(loss_and_error)
    correct = 100 - error
    return {ACCURACY: float(correct), LOSS: float(loss)}


# All of these take the images as arguments. Were they constants, XLA would evaluate layers while
# it compiles.
_compiled = functools.partial(jax.jit, static_argnames="apply")


@_compiled
def _accuracy_of(apply: Apply, params: PyTree, images: Array, labels: Array) -> Array:
    """Compiles `accuracy` of one network."""
    return accuracy(lambda batch: apply(params, batch), images, labels)


@_compiled
def _correct(apply: Apply, params: PyTree, images: Array, labels: Array) -> Array:
    """Says of each image whether a network gets it right."""
    return jnp.argmax(apply(params, images), axis=-1) == labels


@_compiled
def _loss_and_error_of(apply: Apply, params: PyTree, images: Array, labels: Array) -> Array:
    """Compiles `loss_and_error` of one network."""
    return loss_and_error(lambda batch: apply(params, batch), images, labels)


@_compiled
def _ensemble_of(apply: Apply, models: list[PyTree], images: Array, labels: Array) -> Array:
    """Compiles `loss_and_error` of the mean probabilities of some networks."""

    def scores(batch: Array) -> Array:
        return jnp.log(otf.ensemble(apply, models, batch))

    return loss_and_error(scores, images, labels)


@_compiled
def _path(
    apply: Apply, a: PyTree, b: PyTree, t: Array, images: Array, labels: Array
) -> otf.Barrier:
    def metric(params: PyTree) -> Array:
        return _loss_and_error_of(apply, params, images, labels)

    # One point at a time: under a vmap all points would hold their activations at once.
    return otf.barrier(metric, a, b, t, batch_size=1)


def _judged(
    judge: Callable[[Array, Array], Array],
    scores: Callable[[Array], Array],
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Array:
    """Stacks what `judge` makes of the scores and the label of each image."""

    def one(example: tuple[Array, Array]) -> Array:
        image, label = example
        scores_of_one = scores(image[None])[0]
        return judge(scores_of_one, label)

    batch_size = min(_BATCH_SIZE, len(labels))
    return jax.lax.map(one, (images, labels), batch_size=batch_size)
