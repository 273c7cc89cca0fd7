"""Images of nothing, for methods that need inputs where there is no data.

Dead leaves: discs and squares of random colours, one over the other, the large ones rare. They
share with photographs what hardly depends on the subject: edges, occlusion, flat regions, and as
much contrast at every scale (Lee, Mumford and Huang 2001; that networks can learn from them:
Baradad et al., Learning to See by Looking at Noise, NeurIPS 2021).
"""

import numpy as np
from jaxtyping import Float32

_LEAVES = 45  # of an image; by then little is left of what lay below
_RADII = (0.1, 0.9)  # of the smallest and the largest, in heights of the image
_BLUR = (0.15, 0.7, 0.15)  # along each axis, as a lens would


def dead_leaves(
    seed: int, count: int, height: int, width: int, channels: int
) -> Float32[np.ndarray, "count height width channels"]:
    """Draws images, normalised to mean 0 and variance 1 in every channel.

    Args:
        seed: Source of randomness; the same arguments give the same images.
        count: How many images.
        height: In pixels.
        width: In pixels.
        channels: Of colour, correlated as in photographs.
    """
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    smallest, largest = (height * radius for radius in _RADII)
    images = _colours(random, count, channels) * np.ones((1, height, width, 1))
    for _ in range(_LEAVES):
        # The number of leaves falls with the cube of the radius, which makes all scales alike.
        inverse = random.uniform(largest**-2, smallest**-2, count)
        radius, angle = inverse**-0.5, random.uniform(0, np.pi, count)
        y, x = (
            axis - random.uniform(-0.1, 1.1, (count, 1, 1)) * size
            for axis, size in ((rows, height), (columns, width))
        )
        cosine, sine, radius = (v[:, None, None] for v in (np.cos(angle), np.sin(angle), radius))
        longer = np.exp(0.4 * random.standard_normal((count, 1, 1)))
        u, v = (x * cosine + y * sine) * longer, (y * cosine - x * sine) / longer
        square = random.random((count, 1, 1)) < 0.3
        inside = np.where(square, np.maximum(abs(u), abs(v)), np.hypot(u, v)) < radius
        shade = 1 + 0.25 * random.uniform(-1, 1, (count, 1, 1)) * u / radius
        leaf = _colours(random, count, channels) * shade[..., None]
        images = np.where(inside[..., None], leaf, images)
    for axis in (1, 2):
        padding = [(int(dim == axis),) * 2 for dim in range(4)]
        padded = np.pad(images, padding, mode="edge")
        size = images.shape[axis]
        shifted = [np.take(padded, range(i, i + size), axis) for i in range(len(_BLUR))]
        images = np.tensordot(_BLUR, np.stack(shifted), axes=1)
    images = images + 0.02 * random.standard_normal(images.shape)
    over = (0, 1, 2)
    return ((images - images.mean(over)) / images.std(over)).astype(np.float32)


def _colours(random: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Greys of any brightness with a little colour, `[count, 1, 1, channels]`."""
    grey = random.beta(1.2, 1.2, (count, 1, 1, 1))
    return np.clip(grey + 0.18 * random.standard_normal((count, 1, 1, channels)), 0, 1)
