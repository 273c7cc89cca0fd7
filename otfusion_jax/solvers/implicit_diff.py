"""Gradients of soft plans: ott's implicit differentiation, its linear system solved directly.

Entropic potentials f and g are a root of the first order conditions, which say that the marginals
of the plan fit. By the implicit function theorem, a gradient of theirs takes one solution of a
linear system with the Jacobian of these conditions. With the plan P and diagonal matrices of what
its rows and columns sum up to (and of how far loose marginals give way), that is

    [ diag(rows)       P       ]
    [    P^T     diag(columns) ]

up to a factor (Peyré and Cuturi, Computational Optimal Transport, 2019, section 9.1).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from ott.geometry import geometry
from ott.math.unbalanced_functions import diag_jacobian_of_marginal_fit
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation

from otfusion_jax.common.linear_systems import solve_square


class _DirectSolve(implicit_differentiation.ImplicitDiff):
    """ott's implicit differentiation, its linear system solved directly.

    ott's conjugate gradients stop with an error where float32 does not take them to their
    tolerance, as it does not for plans that are nearly hard. Here the Schur complement of the
    system is an `[n, n]` matrix, scaled such that its eigenvalues lie in [0, 1]. What is zero up to
    rounding (the shift between the potentials; parts of the plan that are hard, and do not change)
    is kept from blowing up by a ridge of the size of the rounding.
    """

    def solve(
        self,
        gr: tuple[Array, Array],
        ot_prob: linear_problem.LinearProblem,
        f: Array,
        g: Array,
        lse_mode: bool,
    ) -> Array:
        """Solves with the Jacobian of the first order conditions, see ott."""
        geom = ot_prob.geom
        n, m = geom.shape
        source_gradient, target_gradient = gr
        # The Schur complement is the smaller, the smaller the side that is kept.
        if n > m:
            exchanged = target_gradient, source_gradient
            solution = self.solve(exchanged, _transposed(ot_prob), g, f, lse_mode)
            return jnp.concatenate([solution[m:], solution[:m]])
        plan = geom.transport_from_potentials(f, g)
        row_mass = jnp.sum(plan, 1)
        rows = _diagonal(row_mass, f, ot_prob.a, ot_prob.tau_a, geom.epsilon)
        column_mass = jnp.sum(plan, 0)
        columns = _diagonal(column_mass, g, ot_prob.b, ot_prob.tau_b, geom.epsilon)

        scale = jnp.sqrt(rows)
        column_scale = jnp.sqrt(columns)
        scaled = plan / scale[:, None] / column_scale[None, :]
        ridge = 10 * jnp.finfo(plan.dtype).eps
        identity = jnp.eye(n, dtype=plan.dtype)
        # The ridge is lost in products of less than full precision.
        products = jnp.matmul(scaled, scaled.T, precision="highest")
        schur = (1 + ridge) * identity - products
        right = source_gradient - plan @ (target_gradient / columns)
        # By LU: rounding may leave the matrix indefinite, where Cholesky gives NaN.
        x = solve_square(schur, right / scale) / scale
        y = (target_gradient - x @ plan) / columns
        return -geom.epsilon * jnp.concatenate([x, y])


def _transposed(problem: linear_problem.LinearProblem) -> linear_problem.LinearProblem:
    """Exchanges source and target of a problem."""
    geom = geometry.Geometry(cost_matrix=problem.geom.cost_matrix.T, epsilon=problem.geom.epsilon)
    return linear_problem.LinearProblem(
        geom, a=problem.b, b=problem.a, tau_a=problem.tau_b, tau_b=problem.tau_a
    )


def _diagonal(
    mass: Array,
    potential: Array,
    target: Array,
    tau: float,
    epsilon: float,
) -> Array:
    """Returns the diagonal block of the system that belongs to one marginal of the plan.

    Args:
        mass: The marginal that the plan has.
        potential: The potential of that side.
        target: The marginal that was asked for.
        tau: How strictly it is kept; 1 means exactly.
        epsilon: The strength of the regularisation.

    Returns:
        The marginal, and what a loose one adds; 1 where that is 0, as it is divided by.
    """
    fit = diag_jacobian_of_marginal_fit(target, potential, tau, epsilon, _ones_like)
    total = mass + epsilon * fit
    return jnp.where(total > 0, total, 1)


def _ones_like(x: Array, *_: object) -> Array:
    return jnp.ones_like(x)


def _identity(x: Array) -> Array:
    return x


# Marginals are compared as they are: ott would take logarithms, and its system would lose symmetry.
# The class that it is made from has no type outside of ott, whose decorators have none.
IMPLICIT: Any = _DirectSolve(precondition_fun=_identity)
