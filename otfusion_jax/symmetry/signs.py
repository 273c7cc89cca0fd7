"""Permutations with signs, as matrices of which each row and column has a single 1 or -1."""

import numpy as np
from jaxtyping import Float, Int

from otfusion_jax.common.host import Array, array_module


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
    is_there = permutation[..., None, :] == np.arange(n)[:, None]
    is_solved = (permutation >= 0) & (permutation < n)
    xp = array_module(permutation, signs)
    value = xp.where(is_solved, signs, np.nan)
    return xp.where(is_there | ~is_solved[..., None, :], value[..., None, :], 0)


def permutation_of(matrix: Float[Array, "*batch n n"]) -> Int[Array, "*batch n"]:
    """Returns the permutation of a matrix, without its signs.

    Args:
        matrix: A permutation with signs. One with NaN is none.

    Returns:
        The permutation, int32; indices out of range where there are NaN.
    """
    n = matrix.shape[-1]
    xp = array_module(matrix)
    index = xp.argmax(abs(matrix), axis=-2).astype(np.int32)
    is_nan = xp.any(xp.isnan(matrix), axis=-2)
    return xp.where(is_nan, np.int32(n), index)


def signs_of(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n"]:
    """Returns what the unit at each position is multiplied by.

    Args:
        matrix: A permutation with signs.
    """
    xp = array_module(matrix)
    return xp.sign(xp.sum(matrix, axis=-2))
