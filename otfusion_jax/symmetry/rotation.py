"""Orthogonal matrices that leave the vector of ones as it is, and random ones.

Where a mean over units is subtracted, as in a LayerNorm, the units can be rotated about the vector
of ones alone. A Householder reflection takes that vector to the first axis, where such a matrix is
a smaller one beside a 1. The same holds for maps to another number of units, which take the
direction of the ones to that of the ones there.
"""

import functools
from typing import Any

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


def fixing_ones(smaller: Float[Array, "*batch k l"]) -> Float[Array, "*batch n m"]:
    """Makes an orthogonal matrix of one more dimension, which leaves the vector of ones as it is.

    Args:
        smaller: An orthogonal matrix of one dimension less, which says what becomes of the
            complement of the vector of ones, in the basis of `reflected`; or a stack of them. It
            need not be square, if its rows or its columns are orthonormal.

    Returns:
        The matrix, of the same dtype; exactly the identity for the identity. Of other numbers of
        rows than of columns, it takes the direction of the ones to that of the ones.
    """
    k, other = smaller.shape[-2:]
    xp = array_module(smaller)
    beside = [(0, 0)] * (smaller.ndim - 2) + [(1, 0), (1, 0)]
    if k != other:
        # There is no identity to subtract: the direction of the ones has an entry of its own.
        corner = np.zeros((k + 1, other + 1), smaller.dtype)
        corner[0, 0] = 1
        return reflected(xp.pad(smaller, beside) + corner)
    # Less the identity, so that units that stay do so without the errors of two reflections.
    change = smaller - xp.eye(k, dtype=smaller.dtype)
    padded = xp.pad(change, beside)
    return xp.eye(k + 1, dtype=smaller.dtype) + reflected(padded)


def orthonormal_identity(n: int, m: int, *, fixes_ones: bool) -> np.ndarray:
    """Returns the map from n units to m that is nearest to leaving each where it is.

    Args:
        n: The number of units before.
        m: The number of units after.
        fixes_ones: Whether the direction of the ones has to become that of the ones.

    Returns:
        Float64 `[n, m]`, of orthonormal rows or columns: the identity for `n == m`.
    """
    if not fixes_ones or n == m:
        return np.eye(n, m)
    smaller: Any = np.eye(n - 1, m - 1)
    return np.asarray(fixing_ones(smaller))


def reflected(matrix: Float[Array, "*batch n m"]) -> Float[Array, "*batch n m"]:
    """Multiplies a matrix from both sides by the reflection H with `H e_1 = -1 / sqrt(n)`.

    On each side it is that of the size there. H is symmetric and its own inverse, and the sign
    cancels. The other one, with which `e_1` would go to the ones themselves, divides by zero for
    `n == 1`, and loses digits for any small n.

    Args:
        matrix: The matrix, or a stack of them.

    Returns:
        H times the matrix times H: the matrix in a basis whose first vector is along the ones.
    """
    of_columns = _columns_reflected(matrix)
    of_both = _columns_reflected(of_columns.swapaxes(-1, -2))
    return of_both.swapaxes(-1, -2)


def _columns_reflected(matrix: Float[Array, "*batch n m"]) -> Float[Array, "*batch n m"]:
    """Multiplies a matrix from the left by the Householder reflection of `reflected`."""
    n = matrix.shape[-2]
    normal = np.full((n, 1), 1 / np.sqrt(n))
    normal[0] += 1
    normal = np.asarray(normal / np.linalg.norm(normal), matrix.dtype)
    along_normal = array_module(matrix).sum(normal * matrix, axis=-2, keepdims=True)
    return matrix - 2 * normal * along_normal
