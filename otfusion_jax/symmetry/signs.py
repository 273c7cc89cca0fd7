"""Permutations with signs, as matrices of which each row and column has a single 1 or -1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def signed_matrix(
    permutation: Int[Array, "*batch n"], signs: Float[Array, "*batch n"]
) -> Float[Array, "*batch n n"]:
    """Makes a matrix of a permutation with signs.

    Args:
        permutation: Position `j` receives unit `permutation[j]`. An index out of range, which is
            how a solver marks a problem that it could not solve, gives NaN.
        signs: What the unit at position `j` is multiplied by, 1 or -1.

    Returns:
        The matrix Q of the dtype of `signs`, with `Q[permutation[j], j] = signs[j]`.
    """
    n = permutation.shape[-1]
    matrix = jax.nn.one_hot(permutation, n, axis=-2, dtype=signs.dtype) * signs[..., None, :]
    is_solved = (permutation >= 0) & (permutation < n)
    return jnp.where(is_solved[..., None, :], matrix, jnp.nan)


def permutation_of(matrix: Float[Array, "*batch n n"]) -> Int[Array, "*batch n"]:
    """Returns the permutation of a matrix, without its signs.

    Args:
        matrix: A permutation with signs. One with NaN is none.

    Returns:
        The permutation, int32; indices out of range where there are NaN.
    """
    n = matrix.shape[-1]
    index = jnp.argmax(jnp.abs(matrix), axis=-2).astype(jnp.int32)
    is_nan = jnp.any(jnp.isnan(matrix), axis=-2)
    return jnp.where(is_nan, n, index)


def signs_of(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n"]:
    """Returns what the unit at each position is multiplied by.

    Args:
        matrix: A permutation with signs.
    """
    return jnp.sign(jnp.sum(matrix, axis=-2))
