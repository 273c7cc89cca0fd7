"""Accuracy and loss over a whole split, batch by batch inside one compiled program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

# Images held in memory at once, for each model that is evaluated under a vmap.
_BATCH_SIZE = 1000


def accuracy(
    scores: Callable[[Float[Array, "1 ..."]], Float[Array, "1 classes"]],
    images: Float[Array, "n ..."],
    labels: Int[Array, " n"],
) -> Float[Array, ""]:
    """Percentage of images whose highest score is that of their label.

    Args:
        scores: Maps a batch of images to logits, or to anything that ranks the classes alike.
        images: The images.
        labels: Their classes.

    Returns:
        A float32 scalar in [0, 100]; traceable, so it may be compiled, mapped or batched.
    """

    def is_correct(logits: Array, label: Array) -> Array:
        return jnp.argmax(logits) == label

    return 100 * jnp.mean(_judged(is_correct, scores, images, labels), dtype=jnp.float32)


def loss_and_error(
    scores: Callable[[Float[Array, "1 ..."]], Float[Array, "1 classes"]],
    images: Float[Array, "n ..."],
    labels: Int[Array, " n"],
) -> Float[Array, " 2"]:
    """Mean cross-entropy in nats, and the percentage of images given another label than theirs.

    Args:
        scores: Maps a batch of images to logits.
        images: The images.
        labels: Their classes.

    Returns:
        Loss and error rate, both such that less is better; traceable.
    """

    def judge(logits: Array, label: Array) -> Array:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.stack([loss, 100 * (jnp.argmax(logits) != label).astype(loss.dtype)])

    return jnp.mean(_judged(judge, scores, images, labels), axis=0)


def _judged(
    judge: Callable[[Array, Array], Array],
    scores: Callable[[Array], Array],
    images: Float[Array, "n ..."],
    labels: Int[Array, " n"],
) -> Array:
    """What `judge` makes of the scores and the label of each image, stacked."""

    def one(example: tuple[Array, Array]) -> Array:
        image, label = example
        return judge(scores(image[None])[0], label)

    return jax.lax.map(one, (images, labels), batch_size=min(_BATCH_SIZE, len(labels)))
