"""Orthogonal matrices that leave the vector of ones as it is, and random ones.

Where a mean over units is subtracted, as in a LayerNorm, the units can be rotated about the vector
of ones alone. A Householder reflection takes that vector to the first axis, where such a matrix is
a smaller one beside a 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from otfusion_jax.common.host import Array, array_module


@functools.partial(jax.jit, static_argnames=("size", "batch", "fixes_ones"))
def random_rotation(
    key: Array, size: int, batch: tuple[int, ...] = (), *, fixes_ones: bool = False
) -> Float[Array, "*batch n n"]:
    """Draws uniform orthogonal matrices.

    Args:
        key: A key of `jax.random`.
        size: The number of units, at least 1.
        batch: How many matrices to draw, as the leading axes of the result.
        fixes_ones: Whether each leaves the vector of ones as it is.

    Returns:
        The matrices, float32 `[*batch, n, n]`.
    """
    if not fixes_ones:
        return jax.random.orthogonal(key, size, batch, dtype=jnp.float32)
    smaller = jax.random.orthogonal(key, size - 1, batch, dtype=jnp.float32)
    extend = fixing_ones
    for _ in batch:
        extend = jax.vmap(extend)
    return extend(smaller)


def fixing_ones(smaller: Float[Array, "*batch k k"]) -> Float[Array, "*batch n n"]:
    """Makes an orthogonal matrix of one more dimension, which leaves the vector of ones as it is.

    Args:
        smaller: An orthogonal matrix of one dimension less, which says what becomes of the
            complement of the vector of ones, in the basis of `reflected`; or a stack of them.

    Returns:
        The matrix, of the same dtype; exactly the identity for the identity.
    """
    k = smaller.shape[-1]
    # Less the identity, so that units that stay do so without the errors of two reflections.
    xp = array_module(smaller)
    change = smaller - xp.eye(k, dtype=smaller.dtype)
    beside = [(0, 0)] * (smaller.ndim - 2) + [(1, 0), (1, 0)]
    padded = xp.pad(change, beside)
    return xp.eye(k + 1, dtype=smaller.dtype) + reflected(padded)


def reflected(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Multiplies a matrix from both sides by the reflection H with `H e_1 = -1 / sqrt(n)`.

    H is symmetric and its own inverse, and the sign cancels. The other one, with which `e_1` would
    go to the ones themselves, divides by zero for `n == 1`, and loses digits for any small n.

    Args:
        matrix: The matrix, or a stack of them.

    Returns:
        H times the matrix times H: the matrix in a basis whose first vector is along the ones.
    """
    of_columns = _columns_reflected(matrix)
    of_both = _columns_reflected(of_columns.swapaxes(-1, -2))
    return of_both.swapaxes(-1, -2)


def _columns_reflected(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Multiplies a matrix from the left by the Householder reflection of `reflected`."""
    n = matrix.shape[-1]
    normal = np.full((n, 1), 1 / np.sqrt(n))
    normal[0] += 1
    normal = np.asarray(normal / np.linalg.norm(normal), matrix.dtype)
    along_normal = array_module(matrix).sum(normal * matrix, axis=-2, keepdims=True)
    return matrix - 2 * normal * along_normal
