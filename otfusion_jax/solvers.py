"""From a cost matrix to a transport plan: the only module that calls ott's solvers.

A solver is a frozen, hashable dataclass, hence static under `jax.jit`; its `solve` is a pure
function of arrays that `jax.jit` and `jax.vmap` accept. The answer is always a `Solution`: the
plan, its value, and evidence of how good it is. The total mass is 1, so the value of a permutation
is the *mean* of the costs that it picks.
"""

import abc
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float
from ott.geometry import geometry
from ott.math.unbalanced_functions import diag_jacobian_of_marginal_fit
from ott.problems.linear import linear_problem
from ott.solvers.linear import implicit_differentiation, sinkhorn

from otfusion_jax.assignment import assign, slack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        plan: int32 `[n]`, a permutation (`plan[j]` is the row, the source unit, that lands at
            column, target position, `j`), or float `[n, m]`, a transport plan of total mass 1 with
            source units as rows.
        value: float `[]`, `<P, C>` in the units of the cost.
        converged: bool `[]`, whether the solver reached its tolerance; False for invalid input.
        gap: float `[]`, at least 0, in the units of `value`: up to rounding, the plan costs at most
            this much more than an optimal transport plan with its marginals. The difference to
            a feasible point of the dual linear program. Carries no gradient.
    """

    plan: Array
    value: Array
    converged: Array
    gap: Array


@dataclass(frozen=True)
class AbstractSolver(abc.ABC):
    """Turns a cost into a plan. Subclasses are frozen dataclasses of hashable settings."""

    @abc.abstractmethod
    def solve(
        self,
        cost: Float[Array, "n m"],
        a: Float[Array, " n"] | None = None,
        b: Float[Array, " m"] | None = None,
    ) -> Solution:
        """Finds a plan of low cost.

        Args:
            cost: `cost[i, j]`, what it costs to match source unit `i` with target unit `j`; finite.
                float64 is solved in float64, everything narrower in float32.
            a: masses of the source units, at least 0, summing to 1; None means uniform.
            b: masses of the target units, likewise.

        Returns:
            The solution. For traced input that is not valid, nothing can be raised: `converged` is
            False, `value` and `gap` are NaN, and the plan is unusable on purpose (see the class).

        Raises:
            ValueError: for shapes or marginals that the solver cannot handle, and for costs that
                are known (not traced) and not finite.
        """


@dataclass(frozen=True)
class Exact(AbstractSolver):
    """Optimal assignment of n source units to n target units, all of the same mass.

    Runs ott's (optax's) shortest augmenting paths on a cost whose rows and columns were shifted so
    that little is left to do. ott returns no dual variables; they are recovered from the
    permutation, so `Solution.gap` certifies it independently of how it was found. For a traced cost
    that is not finite the plan is filled with `n`, out of range, so that gathering with
    `mode="fill"` gives NaN. `Solution.value` is differentiable in the cost; no marginals are taken.

    Attributes:
        tolerance: `converged` means a gap of at most this times the range of the costs (plus their
            rounding).

    References:
        Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016. Peyré and
        Cuturi, Computational Optimal Transport, 2019, sections 2.5 (duality) and 4.2 (Sinkhorn).
    """

    tolerance: float = 1e-5

    def solve(
        self,
        cost: Float[Array, "n m"],
        a: Float[Array, " n"] | None = None,
        b: Float[Array, " m"] | None = None,
    ) -> Solution:
        """See `AbstractSolver.solve`.

        Raises:
            ValueError: for a cost that is not square or known not to be finite, and for marginals.
        """
        _check_cost(cost)
        if cost.shape[0] != cost.shape[1]:
            raise ValueError(
                f"Exact matches one to one and cannot solve a cost of shape {cost.shape}: a "
                "transport linear program is not implemented yet. Use Sinkhorn()."
            )
        if a is not None or b is not None:
            raise ValueError(
                "Exact takes no marginals a, b, its masses are uniform: a transport linear program "
                "is not implemented yet. Leave them out, or use Sinkhorn()."
            )
        return _solve_exact(self, cost)


@dataclass(frozen=True)
class Sinkhorn(AbstractSolver):
    """Entropic optimal transport: a smooth plan, for any widths and marginals.

    Minimises `<P, C> - epsilon H(P)` with ott's Sinkhorn iterations in the log domain, and is
    differentiable in the cost and the marginals by ott's implicit differentiation, which takes one
    direct solve of the size of the smaller side. The row marginals of the plan are exact, the
    column marginals as exact as `threshold`. `Solution.gap` refers to the problem *without*
    entropy, at the c-transforms of the entropic potentials: it measures the blur as well as what is
    missing to convergence. Traced input that is not valid gives a plan of NaN.

    Attributes:
        epsilon: strength of the regularisation. The plan tends to an optimal one as it goes to 0,
            at the price of iterations.
        relative: whether `epsilon` counts in standard deviations of the cost, so that neither
            scaling nor shifting the cost changes the plan. Gradients see this scale (those of ott's
            own `relative_epsilon` do not).
        threshold: `converged` means that the column marginals are off by less than this in total.
        max_iterations: how many iterations at most.

    References:
        Cuturi, Sinkhorn distances, NeurIPS 2013. Peyré and Cuturi, Computational Optimal Transport,
        2019, sections 4.2 (iterations), 4.4 (log domain) and 9.1 (differentiation).
    """

    epsilon: float = 0.05
    relative: bool = True
    threshold: float = 1e-3
    max_iterations: int = 2000

    def __post_init__(self):
        if not self.epsilon > 0:
            raise ValueError(
                f"Sinkhorn needs epsilon > 0, got {self.epsilon}. Without entropy, use Exact()."
            )

    def solve(
        self,
        cost: Float[Array, "n m"],
        a: Float[Array, " n"] | None = None,
        b: Float[Array, " m"] | None = None,
    ) -> Solution:
        """See `AbstractSolver.solve`.

        Raises:
            ValueError: for a marginal of the wrong shape, for a cost that is known not to be
                finite, and for a marginal that is known to be no distribution.
        """
        _check_cost(cost)
        _check_marginal("a", a, cost.shape[0])
        _check_marginal("b", b, cost.shape[1])
        # ott's Sinkhorn relies on implicit promotion, which its users may have switched off.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return _solve_sinkhorn(self, cost, a, b)


class _Implicit(implicit_differentiation.ImplicitDiff):
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
_IMPLICIT = _Implicit(precondition_fun=_identity)


def _check_cost(cost: Array) -> None:
    if cost.ndim != 2:
        raise ValueError(
            f"A cost is a matrix, got shape {cost.shape}. For a stack of them, jax.vmap the solver."
        )
    if isinstance(cost, Tracer):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(cost, np.float64)))
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"{len(bad)} of {cost.size} costs are not finite, the first at row {i}, column {j}: "
            f"{cost[i, j]}. Look for NaN or overflow in the parameters that the cost is made from."
        )


def _check_marginal(name: str, masses: Array | None, size: int) -> None:
    if masses is None:
        return
    if masses.shape != (size,):
        raise ValueError(
            f"Marginal {name} has shape {masses.shape}, but the cost has {size} units on that "
            "side. Give one mass for each, or None for uniform masses."
        )
    if isinstance(masses, Tracer):
        return
    with jax.ensure_compile_time_eval():  # it may be closed over by what is traced
        if not _is_distribution(masses):
            raise ValueError(
                f"Marginal {name} is no distribution: its sum is {jnp.sum(masses)}, its minimum "
                f"{jnp.min(masses)}. Masses are at least 0 and sum to 1: divide by their sum."
            )


def _is_distribution(masses: Float[Array, " n"]) -> Bool[Array, ""]:
    return jnp.all(masses >= 0) & (jnp.abs(jnp.sum(masses) - 1) < 1e-3)


def _working_dtype(x: Array):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


@functools.partial(jax.jit, static_argnums=0)
def _solve_exact(solver: Exact, cost: Float[Array, "n n"]) -> Solution:
    n = len(cost)
    cost = cost.astype(_working_dtype(cost))
    zero = jnp.zeros((), cost.dtype)
    if n == 0:
        return Solution(jnp.zeros(0, jnp.int32), zero, jnp.array(True), zero)
    # ott's solver may never return from NaN, so it gets a problem that takes it one step per row.
    finite = jnp.isfinite(jnp.max(jnp.abs(cost)))
    safe = jnp.where(finite, lax.stop_gradient(cost), 1 - jnp.eye(n, dtype=cost.dtype))

    plan, gap = assign(safe)
    rounding = 8 * jnp.finfo(cost.dtype).eps * jnp.max(jnp.abs(safe))
    tolerance = solver.tolerance * (jnp.max(safe) - jnp.min(safe)) + rounding
    value = jnp.mean(cost[plan, jnp.arange(n)])
    return Solution(
        plan=jnp.where(finite, plan, n),
        value=jnp.where(finite, value, jnp.nan),
        converged=finite & (gap <= tolerance),
        gap=jnp.where(finite, gap, jnp.nan),
    )


@functools.partial(jax.jit, static_argnums=0)
def _solve_sinkhorn(
    solver: Sinkhorn,
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | None,
    b: Float[Array, " m"] | None,
) -> Solution:
    n, m = cost.shape
    cost = cost.astype(_working_dtype(cost))
    if cost.size == 0:
        zero = jnp.zeros((), cost.dtype)
        return Solution(jnp.zeros((n, m), cost.dtype), zero, jnp.array(True), zero)
    a = jnp.full(n, 1 / n, cost.dtype) if a is None else a.astype(cost.dtype)
    b = jnp.full(m, 1 / m, cost.dtype) if b is None else b.astype(cost.dtype)
    finite = jnp.isfinite(jnp.max(jnp.abs(cost)))
    valid = finite & _is_distribution(a) & _is_distribution(b)
    safe = jnp.where(finite, cost, 0)

    # The plan depends neither on the shift nor on the first division: they keep squares in range.
    reduced = safe - lax.stop_gradient(jnp.min(safe))
    scale = jnp.ones((), cost.dtype)
    if solver.relative:
        largest = lax.stop_gradient(jnp.max(reduced))
        largest = jnp.where(largest > 0, largest, 1)
        variance = jnp.var(reduced / largest)
        scale = largest * jnp.sqrt(jnp.where(variance > 0, variance, 1))
    geom = geometry.Geometry(cost_matrix=reduced / scale, epsilon=solver.epsilon)
    run = sinkhorn.Sinkhorn(
        threshold=solver.threshold,
        max_iterations=solver.max_iterations,
        implicit_diff=_IMPLICIT,
    )
    output = run(linear_problem.LinearProblem(geom, a=a, b=b))

    plan = jnp.where(valid, output.matrix, jnp.nan)
    gap = jnp.sum(plan * slack(reduced, output.g * scale))
    return Solution(
        plan=plan,
        value=jnp.sum(plan * cost),
        converged=jnp.logical_and(valid, jnp.asarray(output.converged)),
        gap=lax.stop_gradient(gap),
    )
