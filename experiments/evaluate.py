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

    def is_correct(example: tuple[Array, Array]) -> Array:
        image, label = example
        return jnp.argmax(scores(image[None])[0]) == label

    correct = jax.lax.map(is_correct, (images, labels), batch_size=min(_BATCH_SIZE, len(labels)))
    return 100 * jnp.mean(correct, dtype=jnp.float32)


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

    def judge(example: tuple[Array, Array]) -> Array:
        image, label = example
        logits = scores(image[None])[0]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.stack([loss, 100 * (jnp.argmax(logits) != label).astype(loss.dtype)])

    judged = jax.lax.map(judge, (images, labels), batch_size=min(_BATCH_SIZE, len(labels)))
    return jnp.mean(judged, axis=0)
