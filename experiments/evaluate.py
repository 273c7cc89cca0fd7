"""Accuracy in percent over a whole split, batch by batch inside one compiled program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
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
