"""Images of nothing, for methods that need inputs where there is no data.

Dead leaves: discs and squares of random colours and textures, one over the other, the large ones
rare. They share with photographs what hardly depends on the subject: edges, occlusion, regions that
are flat or rough, and as much contrast at every scale (Lee, Mumford and Huang 2001; that networks
can learn from them, and from textured ones best: Baradad et al., Learning to See by Looking at
Noise, NeurIPS 2021).
"""

import numpy as np
from jaxtyping import Float32

# How many leaves an image has; by then little is left of what lay below.
_LEAVES = 45
# The radii of the smallest and of the largest leaf, in heights of the image.
_SMALLEST = 0.1
_LARGEST = 0.9
# How much brightness varies within a leaf at most, as a standard deviation.
_ROUGHEST = 0.3
# By which powers of the frequency amplitudes of a texture fall: from those of sand to those of
# clouds. Photographs as a whole have about 1.
_LEAST_FALL = 0.5
_LARGEST_FALL = 2.0
# How many textures there are at least, where few images are drawn.
_LEAST_TEXTURES = 16
# The weights of three neighbours along each axis: a slight blur, as a lens would make.
_BLUR = (0.15, 0.7, 0.15)


def dead_leaves(
    seed: int, count: int, height: int, width: int, channels: int
) -> Float32[np.ndarray, "count height width channels"]:
    """Draws images, normalised to mean 0 and variance 1 in every channel.

    Args:
        seed: The source of randomness; the same arguments give the same images.
        count: How many images to draw.
        height: The height of an image in pixels.
        width: The width of an image in pixels.
        channels: The number of colour channels, correlated as in photographs.

    Returns:
        The images.
    """
    random = np.random.default_rng(seed)
    background = _colours(random, count, channels)
    images = np.broadcast_to(background, (count, height, width, channels))
    # Drawn once, and shuffled for each leaf: leaves of an image have several.
    textures = _textures(random, max(count, _LEAST_TEXTURES), height, width)
    for _ in range(_LEAVES):
        inside, across, radius = _leaf(random, count, height, width)
        # A leaf is a little brighter on one side.
        slope = 0.25 * random.uniform(-1, 1, (count, 1, 1))
        shade = 1 + slope * across / radius
        roughness = _ROUGHEST * random.random((count, 1, 1))
        texture = roughness * textures[random.permutation(len(textures))[:count]]
        colour = _colours(random, count, channels) * shade[..., None] + texture[..., None]
        images = np.where(inside[..., None], colour, images)
    images = _blurred(images)
    images = images + 0.02 * random.standard_normal(images.shape)
    pixels = (0, 1, 2)
    normalised = (images - images.mean(pixels)) / images.std(pixels)
    return normalised.astype(np.float32)


def _leaf(
    random: np.random.Generator, count: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one leaf for each image, somewhere on it or on its edge.

    Returns:
        Which pixels the leaf covers, how far each pixel is from its middle along its longer axis,
        and its radius.
    """
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)
    smallest = height * _SMALLEST
    largest = height * _LARGEST
    # The number of leaves falls with the cube of the radius, which makes all scales alike.
    inverse_square = random.uniform(largest**-2, smallest**-2, count)
    radius = inverse_square**-0.5
    angle = random.uniform(0, np.pi, count)
    # One number for each image, beside the axes of its pixels.
    radius = radius[:, None, None]
    angle = angle[:, None, None]
    each = (count, 1, 1)
    middle_y = random.uniform(-0.1, 1.1, each) * height
    middle_x = random.uniform(-0.1, 1.1, each) * width
    y = rows - middle_y
    x = columns - middle_x
    # Turned by the angle, and stretched along one axis as much as it is squeezed along the other.
    cosine = np.cos(angle)
    sine = np.sin(angle)
    elongation = np.exp(0.4 * random.standard_normal(each))
    u = (x * cosine + y * sine) * elongation
    v = (y * cosine - x * sine) / elongation
    is_square = random.random(each) < 0.3
    in_square = np.maximum(abs(u), abs(v))
    in_disc = np.hypot(u, v)
    distance = np.where(is_square, in_square, in_disc)
    inside = distance < radius
    return inside, u, radius


def _textures(random: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Draws noise of mean 0 and variance 1, `[count, height, width]`, each of a smoothness."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    # The mean is left out.
    frequency[0, 0] = np.inf
    fall = random.uniform(_LEAST_FALL, _LARGEST_FALL, (count, 1, 1))
    white = np.fft.rfft2(random.standard_normal((count, height, width)))
    noise = np.fft.irfft2(white * frequency**-fall, (height, width))
    return noise / noise.std((1, 2), keepdims=True)


def _blurred(images: np.ndarray) -> np.ndarray:
    """Blurs images along height and width; the pixels on an edge count as their neighbours."""
    for axis in (1, 2):
        size = images.shape[axis]
        padding = [(0, 0)] * images.ndim
        padding[axis] = (1, 1)
        padded = np.pad(images, padding, mode="edge")
        neighbours = []
        for shift in range(len(_BLUR)):
            pixels = range(shift, shift + size)
            neighbours.append(np.take(padded, pixels, axis))
        images = np.tensordot(_BLUR, np.stack(neighbours), axes=1)
    return images


def _colours(random: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """Draws greys of any brightness with a little colour, `[count, 1, 1, channels]`."""
    grey = random.beta(1.2, 1.2, (count, 1, 1, 1))
    tint = 0.18 * random.standard_normal((count, 1, 1, channels))
    return np.clip(grey + tint, 0, 1)
