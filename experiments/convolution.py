"""A convolution as one matrix product over patches, for CPUs.

Inside a compiled loop XLA runs a convolution's gradient on a CPU up to fifty times slower than the
matrix products that it amounts to: a narrow ResNet18 trained at 5 images a second, so at 200.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def convolution(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns channels features"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **_: Any,
) -> Float[Array, "batch rows_out columns_out features"]:
    """Convolves like `jax.lax.conv_general_dilated` in Flax's layout, without dilation or groups.

    Args:
        images: The images, NHWC.
        kernel: The kernel, HWIO.
        window_strides: Strides along height and width.
        padding: `"SAME"`, `"VALID"`, or pixels before and after along height and width.

    Returns:
        The features, NHWC.
    """
    window = kernel.shape[:2]
    strides = tuple(window_strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], window, strides, padding)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (size - wide) // stride + 1
        for size, wide, stride in zip(padded.shape[1:3], window, strides, strict=True)
    )

    def shifted(i: int, j: int) -> Array:
        """The pixel that position (i, j) of the kernel meets, for each place in the result."""
        last = (i + (rows - 1) * strides[0] + 1, j + (columns - 1) * strides[1] + 1)
        start, limit = (0, i, j, 0), (padded.shape[0], *last, padded.shape[3])
        return jax.lax.slice(padded, start, limit, (1, *strides, 1))

    # Stacked, not concatenated: the channels remain an axis of their own for who traces this.
    patches = jnp.stack([shifted(i, j) for i in range(window[0]) for j in range(window[1])], -2)
    return jnp.tensordot(patches, kernel.reshape(-1, *kernel.shape[2:]), axes=2)
