"""Accuracy and loss over a whole split, batch by batch inside one compiled program."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num, PyTree

import otfusion_jax as otf
from experiments.data import Dataset
from experiments.report import rounded

# Images held in memory at once, for each model that is evaluated under a vmap.
_BATCH_SIZE = 1000


def accuracy(
    scores: Callable[[Num[Array, "1 ..."]], Float[Array, "1 ... classes"]],
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Float[Array, ""]:
    """Percentage of images, or of tokens, whose highest score is that of their label.

    Args:
        scores: Maps a batch of images to logits, or to anything that ranks the classes alike.
        images: The images.
        labels: Their classes; of windows of a text, the next tokens.

    Returns:
        A float32 scalar in [0, 100]; traceable, so it may be compiled, mapped or batched.
    """

    def is_correct(logits: Array, label: Array) -> Array:
        return jnp.argmax(logits, axis=-1) == label

    return 100 * jnp.mean(_judged(is_correct, scores, images, labels), dtype=jnp.float32)


def loss_and_error(
    scores: Callable[[Num[Array, "1 ..."]], Float[Array, "1 ... classes"]],
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Float[Array, " 2"]:
    """Mean cross-entropy in nats, and the percentage given another label than theirs.

    Args:
        scores: Maps a batch of images to logits.
        images: The images.
        labels: Their classes; of windows of a text, the next tokens.

    Returns:
        Loss and error rate, both such that less is better; traceable.
    """

    def judge(logits: Array, label: Array) -> Array:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        wrong = (jnp.argmax(logits, axis=-1) != label).astype(loss.dtype)
        return jnp.stack([loss, 100 * wrong], axis=-1)

    judged = _judged(judge, scores, images, labels)
    return jnp.mean(judged, axis=range(judged.ndim - 1))


def ensemble_loss_and_error(
    apply: Callable[[PyTree, Array], Array],
    models: Sequence[PyTree],
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Float[Array, " 2"]:
    """The same of the models' mean probabilities.

    Args:
        apply: Maps variables and a batch of images to logits.
        models: Variables of each.
        images: The images.
        labels: Their classes; of windows of a text, the next tokens.

    Returns:
        Loss and error rate; traceable.
    """

    def scores(batch: Array) -> Array:
        return jnp.log(otf.ensemble(apply, models, batch))

    return loss_and_error(scores, images, labels)


def tester(dataset: Dataset) -> Callable[[Callable[[PyTree, Array], Array], PyTree], float]:
    """Returns what tests networks, compiling once for each architecture.

    Args:
        dataset: Whose test split.

    Returns:
        From a function of parameters and images, and the parameters, to the accuracy in percent.
    """
    images, labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    return lambda apply, params: rounded(_tested(apply, params, images, labels))


@functools.partial(jax.jit, static_argnums=0)
def _tested(
    apply: Callable[[PyTree, Array], Array],
    params: PyTree,
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Float[Array, ""]:
    """Takes the images as arguments: of constants, XLA would evaluate layers while compiling."""
    return accuracy(lambda batch: apply(params, batch), images, labels)


def _judged(
    judge: Callable[[Array, Array], Array],
    scores: Callable[[Array], Array],
    images: Num[Array, "n ..."],
    labels: Int[Array, "n ..."],
) -> Array:
    """What `judge` makes of the scores and the label of each image, stacked."""

    def one(example: tuple[Array, Array]) -> Array:
        image, label = example
        return judge(scores(image[None])[0], label)

    return jax.lax.map(one, (images, labels), batch_size=min(_BATCH_SIZE, len(labels)))
