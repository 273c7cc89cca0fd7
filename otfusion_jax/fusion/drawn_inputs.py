"""Inputs drawn at random, for choices where there is no data.

Two kinds, so that what was fitted to one is judged by the other: noise that is smooth, and the same
cut at 0, which has the edges of strokes and of objects. Of white noise a network sees little but
the mean of its weights: it says less of what units do, and nothing of what a repair is worth.
"""

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.samples import Samples

_MOST_CHANNELS = 4
"""Axes of so many entries are taken for channels, along which nothing is smooth."""
_SMOOTH_OVER = 4
"""How far apart the numbers are that smooth noise is drawn as, and interpolated between."""
_MOST_ENTRIES = 100_000_000
"""How many numbers an input has over all samples at most."""


def can_be_drawn(inputs: PyTree) -> bool:
    """Says whether inputs are numbers of a continuous kind: tokens or masks cannot be drawn.

    Args:
        inputs: The inputs of a function, arrays or shapes.
    """
    leaves = jax.tree.leaves(inputs)
    return bool(leaves) and all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)


def drawn_samples(inputs: tuple[PyTree, ...], count: int, key: Array) -> tuple[Samples, Samples]:
    """Draws inputs of mean 0 and variance 1, of two kinds.

    Args:
        inputs: The inputs of a function, floating-point arrays or shapes `[n, ...]`. They say what
            shape a sample has, and of which dtype it is.
        count: How many samples of each kind to draw; fewer if they are very large.
        key: The source of randomness, a key of JAX.

    Returns:
        Smooth noise cut at 0, which is 1 or -1 everywhere, and smooth noise.
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
            noise = _smooth_noise(own_key, (count, *leaf.shape[1:]))
            if kind == 0:
                noise = np.where(noise > 0, np.float32(1), np.float32(-1))
            arrays.append(noise.astype(leaf.dtype))
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
