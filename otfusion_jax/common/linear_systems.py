"""Linear systems that are solved one by one on a CPU, however many there are.

Of jaxlib 0.10, programs with several batched factorisations or triangular solves can hang for ever
on a CPU of two cores: each is divided among the threads of one pool, and waits there for parts that
the others keep from starting. So what this library solves goes through here, where `jax.vmap` makes
a loop of a batch on a CPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Inexact
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse.linalg import LinearOperator, cg

from otfusion_jax.common.host import Array, array_module


def solve_square(
    matrix: Inexact[Array, "n n"], right: Inexact[Array, "n ..."]
) -> Inexact[Array, "n ..."]:
    """Solves a linear system by an LU factorisation; differentiable in both modes.

    Args:
        matrix: The matrix. Where it is singular, the solution is not finite.
        right: The right side, a vector or the columns of a matrix.

    Returns:
        What the matrix takes to the right side.
    """

    def product(x: Array) -> Array:
        return jnp.matmul(matrix, x, precision="highest")

    # A linear solve is differentiated by another one, not through its factors.
    def solve(_: Callable, x: Array) -> Array:
        return _solve_by_lu(matrix, x)

    def solve_transposed(_: Callable, x: Array) -> Array:
        return _solve_by_lu(matrix.T, x)

    return jax.lax.custom_linear_solve(product, right, solve, solve_transposed)


def solve_positive_definite(
    matrix: Float[Array, "n n"], right: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    """Solves a linear system by a Cholesky factorisation.

    Args:
        matrix: A symmetric matrix, of which the lower triangle is read.
        right: The columns of the right side.

    Returns:
        What the matrix takes to the right side; NaN where it is not positive definite.
    """
    if array_module(matrix, right) is not np:
        return _solve_by_cholesky(matrix, right)
    known: Any = matrix
    solution: Any
    try:
        factor = cho_factor(known, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        solution = np.full_like(right, np.nan)
        return solution
    solution = cho_solve(factor, right, check_finite=False)
    return solution


def solve_by_steps(operator: Callable[[Array], Array], right: Array, steps: int) -> Array:
    """Solves a linear system by conjugate gradients, from zero.

    Args:
        operator: What is to be inverted: symmetric or Hermitian, without negative eigenvalues, a
            function of arrays of the shape of the right side.
        right: The right side, real or complex, of any shape.
        steps: How many steps there are at most: fewer where the residual is below 1e-5 of the right
            side.

    Returns:
        The solution as far as it goes.
    """
    if array_module(right) is not np:
        found, _ = jax.scipy.sparse.linalg.cg(operator, right, maxiter=steps)
        return found

    def flat_operator(vector: Any) -> Any:
        product: Any = operator(vector.reshape(right.shape))
        return product.ravel()

    linear_operator: Any = LinearOperator
    flat = linear_operator((right.size, right.size), flat_operator, dtype=right.dtype)
    found: Any
    found, _ = cg(flat, right.ravel(), maxiter=steps)
    return found.reshape(right.shape)


def _one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
    """Makes a function of arrays that `jax.vmap` maps by a loop on a CPU, and in one elsewhere."""
    looped = jax.custom_batching.custom_vmap(function)

    @looped.def_vmap
    def _(size: int, is_mapped: list[bool], *arguments: Array) -> tuple[Array, bool]:
        every = [
            argument if mapped else jnp.broadcast_to(argument, (size, *argument.shape))
            for argument, mapped in zip(arguments, is_mapped, strict=True)
        ]
        found = jax.lax.platform_dependent(
            *every,
            cpu=lambda *each: jax.lax.map(lambda one: looped(*one), each),
            default=jax.vmap(function),
        )
        return found, True

    return looped


@_one_by_one
def _solve_by_lu(matrix: Array, right: Array) -> Array:
    return jnp.linalg.solve(matrix, right)


@_one_by_one
def _solve_by_cholesky(matrix: Array, right: Array) -> Array:
    factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((factor, True), right)
