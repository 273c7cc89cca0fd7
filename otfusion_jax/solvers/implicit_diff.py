"""Gradients of soft plans: ott's implicit differentiation, its linear system solved directly."""

import jax.numpy as jnp
from jaxtyping import Array
from ott.geometry import geometry
from ott.math.unbalanced_functions import diag_jacobian_of_marginal_fit
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation


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
        geom, (n, m) = ot_prob.geom, ot_prob.geom.shape
        if n > m:
            turned = linear_problem.LinearProblem(
                geometry.Geometry(cost_matrix=geom.cost_matrix.T, epsilon=geom.epsilon),
                ot_prob.b,
                ot_prob.a,
                ot_prob.tau_b,
                ot_prob.tau_a,
            )
            found = self.solve((gr[1], gr[0]), turned, g, f, lse_mode)
            return jnp.concatenate([found[m:], found[:m]])
        plan = geom.transport_from_potentials(f, g)

        def diagonal(axis: int, potential: Array, masses: Array, tau: float) -> Array:
            fit = diag_jacobian_of_marginal_fit(
                masses, potential, tau, geom.epsilon, lambda x, *_: jnp.ones_like(x)
            )
            total = jnp.sum(plan, axis) + geom.epsilon * fit
            return jnp.where(total > 0, total, 1)

        rows = diagonal(1, f, ot_prob.a, ot_prob.tau_a)
        columns = diagonal(0, g, ot_prob.b, ot_prob.tau_b)
        scale = jnp.sqrt(rows)
        scaled = plan / scale[:, None] / jnp.sqrt(columns)[None, :]
        ridge = 10 * jnp.finfo(plan.dtype).eps
        schur = (1 + ridge) * jnp.eye(n, dtype=plan.dtype) - jnp.matmul(
            scaled, scaled.T, precision="highest"
        )
        right = gr[0] - plan @ (gr[1] / columns)
        # By LU: rounding may leave the matrix indefinite, where Cholesky gives NaN.
        x = jnp.linalg.solve(schur, right / scale) / scale
        y = (gr[1] - x @ plan) / columns
        return -geom.epsilon * jnp.concatenate([x, y])


def _identity(x: Array) -> Array:
    return x


# Marginals are compared as they are: ott would take logarithms, and its system would lose symmetry.
IMPLICIT = _DirectSolve(precondition_fun=_identity)
