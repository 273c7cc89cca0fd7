"""Orthogonal maps between units: the Procrustes problem, for units that may be rotated.

Units that only linear maps write and read, perhaps by way of a norm, may be mixed by any orthogonal
matrix, and permutations are a few of these. The best one takes a singular value decomposition, in
place of the assignment that the best permutation takes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.base import Solution, empty_solution, working_dtype
from otfusion_jax.symmetry.rotation import fixing_ones, reflected

# What passes for rounding, in units of the precision: 1e-4 in float32. Errors of a decomposition
# grow with its size, and devices differ in how much.
_TOLERANCE = 1000
# What may be left of inner products that make no difference, in the same units: up to 2 were seen,
# for up to 4096 units.
_ROUNDING = 8

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("fixes_ones",))
def procrustes(cross: Float[Array, "*batch n m"], *, fixes_ones: bool = False) -> Solution:
    """Finds the orthogonal map of source units that is closest to the target units.

    Target unit `j` is to be met by the sum over `i` of `Q[i, j]` times source unit `i`. The map Q
    maximises `<Q, cross>`, the inner product of the target units with the moved ones. For `n <= m`
    moved units have a norm that does not depend on Q, so that it also minimises their squared
    distance. It is the orthogonal factor of the polar decomposition of `cross`. Scaling `cross`
    leaves it as it is; where `cross` is zero, it is the identity. Where the rank of `cross` is not
    full, several maps are best, and this is one of them.

    Args:
        cross: The inner products, float `[*batch, n, m]`, finite: `cross[..., i, j]` is that of
            source unit `i` and target unit `j`. float64 is solved in float64, everything narrower
            in float32.
        fixes_ones: Whether Q must also keep the vector of ones, `Q 1 = 1` and `Q^T 1 = 1`, as maps
            must that are to commute with the mean that LayerNorm subtracts. Needs `n == m`.

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
        ValueError: For fewer than two axes, for inner products that are complex, and for
            `fixes_ones` between different numbers of units.

    References:
        Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966.
        Golub and Van Loan, Matrix Computations, 2013, sections 5.1 (Householder reflections), 6.4
        (Procrustes) and 9.4 (polar decomposition). Horn and Johnson, Topics in Matrix Analysis,
        1991, section 3.4 (the nuclear norm is dual to the spectral norm).
    """
    _check_cross(cross, fixes_ones)
    solve = functools.partial(_solve_single, fixes_ones=fixes_ones)
    for _ in cross.shape[:-2]:
        solve = jax.vmap(solve)
    return solve(cross)


def _check_cross(cross: object, fixes_ones: bool) -> None:
    """Refuses what is no matrix of real numbers, and what cannot keep the ones."""
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
    n, m = cross.shape[-2:]
    if fixes_ones and n != m:
        raise ValueError(
            f"fixes_ones needs as many source units as target units, got {n} and {m}: the vector "
            "of ones has a length of its own on either side. Leave fixes_ones out."
        )


def _solve_single(cross: Float[Array, "n m"], fixes_ones: bool) -> Solution:
    """Solves the problem of a single matrix that has been checked."""
    cross = cross.astype(working_dtype(cross))
    if cross.size == 0:
        return empty_solution(cross)
    # A range in which no square overflows, and none is taken for zero.
    k = exponent(cross)
    finite = jnp.all(jnp.isfinite(cross))
    in_range = jnp.where(finite, scaled(cross, -k), 0)
    constant = lax.stop_gradient(in_range)
    if fixes_ones:
        plan, bound = _factor_fixing_ones(constant)
    else:
        plan, bound = _polar_factor(constant)

    reached = jnp.sum(plan * in_range)
    gap = jnp.maximum(bound - lax.stop_gradient(reached), 0)
    tolerance = _TOLERANCE * jnp.finfo(cross.dtype).eps
    # Where ones are kept, the bound may be nothing but what large numbers leave of each other.
    magnitude = jnp.maximum(bound, jnp.linalg.norm(constant))
    is_best = gap <= tolerance * magnitude
    is_orthogonal = _deviation_from_orthogonal(plan) <= tolerance
    return Solution(
        plan=jnp.where(finite, plan, jnp.nan),
        value=jnp.where(finite, restored(-reached, k), jnp.nan),
        converged=finite & is_best & is_orthogonal,
        gap=jnp.where(finite, restored(gap, k), jnp.nan),
    )


def _polar_factor(cross: Float[Array, "n m"]) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """Returns the orthogonal factor of a matrix, the identity for zeros, and its nuclear norm."""
    identity = jnp.eye(*cross.shape, dtype=cross.dtype)
    if cross.size == 0:
        return identity, jnp.zeros((), cross.dtype)
    u, singular_values, v_transposed = jnp.linalg.svd(cross, full_matrices=False)
    factor = _matmul(u, v_transposed)
    # Of nothing, every orthogonal matrix is a factor, but none is a reason to move.
    factor = jnp.where(jnp.any(cross != 0), factor, identity)
    return factor, jnp.sum(singular_values)


def _factor_fixing_ones(
    cross: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """Finds the best orthogonal matrix among those that keep the vector of ones.

    In a basis whose first vector is the direction of the ones, such a matrix has a 1 in its corner
    and zeros beside and below it. What remains is free: the polar factor of the same block.

    Args:
        cross: The inner products, of magnitudes around 1.

    Returns:
        The matrix, and the largest inner product that a matrix of this kind has with `cross`.
    """
    in_basis = reflected(cross)
    along_ones = in_basis[0, 0]
    block = in_basis[1:, 1:]
    # Of what all units share, nothing but rounding errors is left, which would be turned at random.
    rounding = _ROUNDING * jnp.finfo(cross.dtype).eps * jnp.max(jnp.abs(cross))
    largest = jnp.max(jnp.abs(block), initial=0)
    block = jnp.where(largest > rounding, block, 0)
    factor, norm = _polar_factor(block)
    return fixing_ones(factor), along_ones + norm


def _deviation_from_orthogonal(plan: Float[Array, "n m"]) -> Float[Array, ""]:
    """Returns the largest error among the inner products of what should be orthonormal."""
    n, m = plan.shape
    products = _matmul(plan.T, plan) if n >= m else _matmul(plan, plan.T)
    identity = jnp.eye(min(n, m), dtype=plan.dtype)
    return jnp.max(jnp.abs(products - identity))
