"""Inputs drawn at random, for choices where there is no data.

What looks like images in colour is drawn as images of dead leaves (see `dead_leaves`): networks
that were trained on photographs know more of these than of any noise. Of images of one channel,
such as those of strokes, noise says more.

All else is noise of two kinds, so that what was fitted to one is judged by the other: noise that is
smooth, and the same cut at 0, which has the edges of strokes and of objects. Of white noise a
network sees little but the mean of its weights: it says less of what units do, and nothing of what
a repair is worth.
"""

import jax
import numpy as np

from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.dead_leaves import dead_leaves
from otfusion_jax.fusion.samples import Samples

_MOST_CHANNELS = 4
"""Axes of so many entries are taken for channels, along which nothing is smooth."""
_COLOURS = (3, 4)
"""How many channels images in colour have."""
_SMOOTH_OVER = 4
"""How far apart the numbers are that smooth noise is drawn as, and interpolated between."""
_MOST_ENTRIES = 100_000_000
"""How many numbers an input has over all samples at most."""
_SMALLEST_IMAGE = 8
"""How many pixels an image has at least along each of its sides."""
_DRAWN_TOGETHER = 2_000_000
"""About how many numbers of images are drawn at once, which takes some copies of them."""


def look_like_images(inputs: PyTree) -> bool:
    """Says whether all inputs look like images, so that such are drawn.

    Args:
        inputs: The inputs of a function, arrays or shapes `[n, ...]`.

    Returns:
        Whether all are of shape `[n, height, width, channels]` or `[n, channels, height, width]`,
        with 3 or 4 channels, and 8 pixels or more along height and width.
    """
    return all(_image_size(x.shape) is not None for x in jax.tree.leaves(inputs))


def drawn_samples(inputs: tuple[PyTree, ...], count: int, key: Array) -> tuple[Samples, Samples]:
    """Draws inputs of mean 0 and variance 1, of two kinds.

    Args:
        inputs: The inputs of a function, floating-point arrays or shapes `[n, ...]`. They say what
            shape a sample has, and of which dtype it is.
        count: How many samples of each kind to draw; fewer if they are very large.
        key: The source of randomness, a key of JAX.

    Returns:
        Smooth noise cut at 0, which is 1 or -1 everywhere, and smooth noise; of an input that looks
        like images in colour two draws of dead leaves.
    """
    leaves, structure = jax.tree_util.tree_flatten(inputs)
    for leaf in leaves:
        entries = int(np.prod(leaf.shape[1:]))
        count = max(2, min(count, _MOST_ENTRIES // entries))
    kinds = []
    for kind in range(2):
        arrays = []
        for number, leaf in enumerate(leaves):
            own_key = jax.random.fold_in(jax.random.fold_in(key, kind), number)
            shape = (count, *leaf.shape[1:])
            size = _image_size(shape)
            if size is not None:
                drawn = _images(own_key, shape, size)
            else:
                drawn = _smooth_noise(own_key, shape)
                if kind == 0:
                    drawn = np.where(drawn > 0, np.float32(1), np.float32(-1))
            arrays.append(drawn.astype(leaf.dtype))
        kinds.append(Samples(structure.unflatten(arrays), count))
    return kinds[0], kinds[1]


def _smooth_noise(key: Array, shape: tuple[int, ...]) -> np.ndarray:
    """Draws noise that is smooth along all axes but the first and those of channels."""
    coarse = list(shape[:1])
    for size in shape[1:]:
        coarse.append(size if size <= _MOST_CHANNELS else -(-size // _SMOOTH_OVER))
    noise = jax.random.normal(key, tuple(coarse))
    noise = np.asarray(jax.image.resize(noise, shape, "cubic"))
    return (noise - noise.mean()) / noise.std()


def _image_size(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Returns height, width and channels of what looks like images in colour; else None."""
    if len(shape) != 4:
        return None
    # With channels last, or first.
    for height, width, channels in (shape[1:], (*shape[2:], shape[1])):
        if channels in _COLOURS and min(height, width) >= _SMALLEST_IMAGE:
            return height, width, channels
    return None


def _images(key: Array, shape: tuple[int, ...], size: tuple[int, int, int]) -> np.ndarray:
    """Draws images of dead leaves, of some height, width and channels, some at a time."""
    together = max(1, _DRAWN_TOGETHER // int(np.prod(size)))
    seeds = np.asarray(jax.random.bits(key, (-(-shape[0] // together),), np.uint32))
    drawn = []
    for number, seed in enumerate(seeds):
        count = min(together, shape[0] - number * together)
        drawn.append(dead_leaves(int(seed), count, *size))
    images = np.concatenate(drawn)
    # Channels come first where they do so in the shape.
    return images if images.shape == shape else np.moveaxis(images, -1, 1)
