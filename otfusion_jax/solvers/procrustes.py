"""Orthogonal maps between units: the Procrustes problem, for units that may be rotated.

Units that only linear maps write and read, perhaps by way of a norm, may be mixed by any orthogonal
matrix, and permutations are a few of these. The best one takes a singular value decomposition, in
place of the assignment that the best permutation takes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.host import Array, array_module, cond, matmul, program, without_gradient
from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.base import Solution, working_dtype
from otfusion_jax.symmetry.rotation import fixing_ones, reflected

# What passes for rounding, in units of the precision: 1e-4 in float32. Errors of a decomposition
# grow with its size, and devices differ in how much.
_TOLERANCE = 1000
# What may be left of inner products that make no difference, in the same units: up to 2 were seen,
# for up to 4096 units.
_ROUNDING = 8

_MATRIX = (-2, -1)  # the axes of each matrix of a stack


@functools.partial(jax.jit, static_argnames=("fixes_ones",))
def procrustes(cross: Float[Array, "*batch n m"], *, fixes_ones: bool = False) -> Solution:
    """Finds the orthogonal map of source units that is closest to the target units.

    Target unit `j` is to be met by the sum over `i` of `Q[i, j]` times source unit `i`. The map Q
    maximises `<Q, cross>`, the inner product of the target units with the moved ones. For `n <= m`
    moved units have a norm that does not depend on Q, so that it also minimises their squared
    distance. It is the orthogonal factor of the polar decomposition of `cross`. Scaling `cross`
    leaves it as it is; where `cross` is zero, it is the identity. Where the rank of `cross` is not
    full, several maps are best, and this is the one of them that is nearest to the identity: what
    `cross` does not tell is moved as little as what it tells allows.

    Args:
        cross: The inner products, float `[*batch, n, m]`, finite: `cross[..., i, j]` is that of
            source unit `i` and target unit `j`. float64 is solved in float64, everything narrower
            in float32.
        fixes_ones: Whether Q must also keep the vector of ones, `Q 1 = 1` and `Q^T 1 = 1`, as maps
            must that are to commute with the mean that LayerNorm subtracts. Between different
            numbers of units it keeps the direction of the ones: `Q 1 = sqrt(m / n) 1` and
            `Q^T 1 = sqrt(n / m) 1`.

    Returns:
        The solution, every array with `batch` in front. The plan is Q, float `[n, m]`: its columns
        are orthonormal for `n >= m`, its rows for `n <= m`. The value is `-<Q, cross>`, without
        `fixes_ones` minus the nuclear norm of `cross`. The gap is by how much `<Q, cross>` is below
        the sum of the singular values, which no orthogonal map exceeds; with `fixes_ones`, those of
        the part that may be turned, plus the part that is kept. `converged` says that the gap is a
        rounding error, and that Q is orthogonal up to rounding. For input that is not finite it is
        False, and all else NaN. The plan carries no gradient; that of the value is minus the plan.

    Raises:
        TypeError: For what is no array.
        ValueError: For fewer than two axes, and for inner products that are complex.

    References:
        Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966.
        Golub and Van Loan, Matrix Computations, 2013, sections 5.1 (Householder reflections), 6.4
        (Procrustes) and 9.4 (polar decomposition). Horn and Johnson, Topics in Matrix Analysis,
        1991, section 3.4 (the nuclear norm is dual to the spectral norm).
    """
    _check_cross(cross)
    return polar_factors(cross, fixes_ones)


def polar_factors(cross: Float[Array, "*batch n m"], fixes_ones: bool) -> Solution:
    """Solves problems without checks, see `procrustes`.

    Args:
        cross: The inner products, of JAX or of NumPy (see `common.host`).
        fixes_ones: Whether the maps must also keep the vector of ones.

    Returns:
        The solutions, arrays of the same kind.
    """
    solve = functools.partial(_solve, fixes_ones=fixes_ones)
    if array_module(cross) is jnp:
        # NumPy takes a stack as it is; on an accelerator, this compiles to more.
        for _ in cross.shape[:-2]:
            solve = jax.vmap(solve)
    return solve(cross)


@program(static_argnames=("fixes_ones",))
def told_part(
    cross: Float[Array, "*batch n n"], plan: Float[Array, "*batch n n"], fixes_ones: bool
) -> Float[Array, "*batch n n"]:
    """Takes the part of a rotation that inner products tell.

    Args:
        cross: The inner products, of less than full rank perhaps.
        plan: The rotation that solves their problem, see `procrustes`.
        fixes_ones: Whether it keeps the vector of ones, which is known in any case.

    Returns:
        The rotation of the units that are told, which makes nothing of all others.
    """
    xp = array_module(cross, plan)
    if fixes_ones:
        cross = reflected(cross)[..., 1:, 1:]
    _, singular_values, v_transposed = xp.linalg.svd(cross, full_matrices=False)
    told = xp.where(_is_told(singular_values, cross)[..., None], v_transposed, 0)
    kept = matmul(told.swapaxes(-1, -2), told)
    if fixes_ones:
        kept = fixing_ones(kept)
    return matmul(plan, xp.asarray(kept, plan.dtype))


@program(static_argnames=("fixes_ones",))
def whole_rotation(
    part: Float[Array, "*batch n n"], fixes_ones: bool
) -> Float[Array, "*batch n n"]:
    """Makes a rotation of a part of one, see `told_part`, that moves all other units least."""
    return polar_factors(part, fixes_ones).plan


def _is_told(singular_values: Array, cross: Array) -> Array:
    """Says which singular values of a matrix are above rounding, as its rank counts them."""
    rounding = max(cross.shape[-2:]) * np.finfo(cross.dtype).eps
    return singular_values > rounding * singular_values[..., :1]


def _check_cross(cross: object) -> None:
    """Refuses what is no matrix of real numbers."""
    if not isinstance(cross, jax.Array):
        raise TypeError(
            f"the cross is {kind_of(cross)}; pass an array of inner products, as in a @ b.T"
        )
    if cross.ndim < 2:
        raise ValueError(
            f"The cross is a matrix or a stack of them, got shape {cross.shape}. Its rows are "
            "source units, its columns target units."
        )
    if jnp.issubdtype(cross.dtype, jnp.complexfloating):
        raise ValueError(f"inner products are real numbers, got {cross.dtype}; pass cross.real")


def _solve(cross: Float[Array, "*batch n m"], fixes_ones: bool) -> Solution:
    """Solves the problem of a matrix that has been checked, or of each in a stack."""
    xp = array_module(cross)
    cross = xp.asarray(cross, working_dtype(cross))
    if cross.size == 0:
        zeros = xp.zeros(cross.shape[:-2], cross.dtype)
        return Solution(xp.zeros_like(cross), zeros, zeros == 0, zeros)
    # A range in which no square overflows, and none is taken for zero.
    k = exponent(cross, _MATRIX)
    finite = xp.all(xp.isfinite(cross), axis=_MATRIX)
    in_range = scaled(cross, -k[..., None, None])
    in_range = xp.where(finite[..., None, None], in_range, 0)
    constant = without_gradient(in_range)
    if fixes_ones:
        plan, bound = _factor_fixing_ones(constant)
    else:
        plan, bound = _polar_factor(constant)

    reached = xp.sum(plan * in_range, axis=_MATRIX)
    gap = xp.maximum(bound - without_gradient(reached), 0)
    tolerance = _TOLERANCE * np.finfo(cross.dtype).eps
    # Where ones are kept, the bound may be nothing but what large numbers leave of each other.
    magnitude = xp.maximum(bound, xp.linalg.norm(constant, axis=_MATRIX))
    is_best = gap <= tolerance * magnitude
    is_orthogonal = _deviation_from_orthogonal(plan) <= tolerance
    return Solution(
        plan=xp.where(finite[..., None, None], plan, np.nan),
        value=xp.where(finite, restored(-reached, k), np.nan),
        converged=finite & is_best & is_orthogonal,
        gap=xp.where(finite, restored(gap, k), np.nan),
    )


def _polar_factor(
    cross: Float[Array, "*batch n m"],
) -> tuple[Float[Array, "*batch n m"], Float[Array, "*batch"]]:
    """Returns the orthogonal factor of a matrix, the identity for zeros, and its nuclear norm."""
    xp = array_module(cross)
    if cross.size == 0:
        return cross, xp.zeros(cross.shape[:-2], cross.dtype)
    identity = xp.eye(*cross.shape[-2:], dtype=cross.dtype)
    u, singular_values, v_transposed = xp.linalg.svd(cross, full_matrices=False)
    is_told = _is_told(singular_values, cross)
    factor = cond(
        xp.all(is_told),
        lambda: matmul(u, v_transposed),
        lambda: _factor_nearest_identity(cross, u, v_transposed, is_told),
    )
    # Of nothing, every orthogonal matrix is a factor, but none is a reason to move.
    is_something = xp.any(cross != 0, axis=_MATRIX)
    factor = xp.where(is_something[..., None, None], factor, identity)
    return factor, xp.sum(singular_values, axis=-1)


def _factor_nearest_identity(cross: Array, u: Array, v_transposed: Array, is_told: Array) -> Array:
    """Finds the orthogonal factor of a matrix of lower rank that moves units least.

    Args:
        cross: The matrix, `[*batch, n, m]`.
        u: Its left singular vectors, `[*batch, n, k]`.
        v_transposed: Its right ones, `[*batch, k, m]`.
        is_told: Which of its singular values are above rounding, bool `[*batch, k]`.

    Returns:
        The factor, `[*batch, n, m]`.
    """
    xp = array_module(cross)
    n, m = cross.shape[-2:]
    if n != m:
        # Of the larger side all vectors, also those that have no counterpart on the other.
        u, _, v_transposed = xp.linalg.svd(cross, full_matrices=True)
    identity = xp.eye(n, m, dtype=cross.dtype)
    # Of all U W Vᵀ, that is nearest to the identity I of which W is the polar factor of Uᵀ I V. But
    # W is given where there are singular values, in the first rows and columns.
    between = matmul(matmul(u.swapaxes(-1, -2), identity), v_transposed.swapaxes(-1, -2))
    beyond = xp.zeros((*cross.shape[:-2], max(n, m) - min(n, m)), bool)
    is_given = xp.concatenate([is_told, beyond], axis=-1)
    is_free = ~(is_given[..., :n, None] | is_given[..., None, :m])
    given = xp.where(is_given[..., :n, None], identity, 0)
    left, _, right = xp.linalg.svd(xp.where(is_free, between, given), full_matrices=False)
    return matmul(matmul(u, matmul(left, right)), v_transposed)


def _factor_fixing_ones(
    cross: Float[Array, "*batch n m"],
) -> tuple[Float[Array, "*batch n m"], Float[Array, "*batch"]]:
    """Finds the best orthogonal matrix among those that keep the direction of the ones.

    In bases whose first vectors are the direction of the ones, such a matrix has a 1 in its corner
    and zeros beside and below it. What remains is free: the polar factor of the same block.

    Args:
        cross: The inner products, of magnitudes around 1.

    Returns:
        The matrix, and the largest inner product that a matrix of this kind has with `cross`.
    """
    in_basis = reflected(cross)
    along_ones = in_basis[..., 0, 0]
    block = in_basis[..., 1:, 1:]
    # Of what all units share, nothing but rounding errors is left, which would be turned at random.
    xp = array_module(cross)
    rounding = _ROUNDING * np.finfo(cross.dtype).eps * xp.max(abs(cross), axis=_MATRIX)
    largest = xp.max(abs(block), axis=_MATRIX, initial=0)
    block = xp.where((largest > rounding)[..., None, None], block, 0)
    factor, norm = _polar_factor(block)
    return fixing_ones(factor), along_ones + norm


def _deviation_from_orthogonal(plan: Float[Array, "*batch n m"]) -> Float[Array, "*batch"]:
    """Returns the largest error among the inner products of what should be orthonormal."""
    n, m = plan.shape[-2:]
    transposed = plan.swapaxes(-1, -2)
    products = matmul(transposed, plan) if n >= m else matmul(plan, transposed)
    xp = array_module(plan)
    identity = xp.eye(min(n, m), dtype=plan.dtype)
    return xp.max(abs(products - identity), axis=_MATRIX)
