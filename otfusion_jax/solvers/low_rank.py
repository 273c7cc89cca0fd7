"""Plans of low rank, by ott."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn, sinkhorn_lr

from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.scaling import restored
from otfusion_jax.solvers.assignment import slack
from otfusion_jax.solvers.base import (
    AbstractSolver,
    Solution,
    TransportProblem,
    check_problem,
    nothing_to_match,
    working_dtype,
)
from otfusion_jax.solvers.sinkhorn import prepare

# The potentials that certify a plan of low rank: blurred by this many deviations of the cost.
_CERTIFICATE_EPSILON, _CERTIFICATE_ITERATIONS = 0.02, 500


@dataclass(frozen=True)
class LowRank(AbstractSolver):
    """Optimal transport among plans of low rank: units are matched by way of a few clusters.

    Minimises `<P, C>` over `P = Q diag(1/g) R^T` with `rank` columns in `Q` and `R`, by ott's
    mirror descent with Dykstra projections, started from one fixed random point. The problem is not
    convex: what is found is a local minimum. Both marginals are as exact as the projections, 1e-3
    in total. Neither scaling nor shifting the cost changes the plan. The plan carries no gradient;
    the gradient of the value is the plan. Traced input that is not valid gives a plan of NaN.

    `Solution.gap` refers to the problem with the plan's own marginals and of *any* rank, so it
    measures what the low rank costs.

    Attributes:
        rank: how many clusters; no more than there are units on either side.
        epsilon: strength of an entropic regularisation of the factors, in standard deviations of
            the cost; 0 means none.
        gamma: step size of the mirror descent.
        threshold: `converged` means that the factors change by less than this in an iteration.
        max_iterations: how many iterations at most.

    References:
        Scetbon, Cuturi and Peyré, Low-rank Sinkhorn factorization, ICML 2021, section 3.
    """

    rank: int = 10
    epsilon: float = 0.0
    gamma: float = 10.0
    threshold: float = 1e-3
    max_iterations: int = 2000

    def __post_init__(self):
        require_number(self, "rank", least=1, whole=True)
        require_number(self, "epsilon", least=0, finite=True)
        require_number(self, "gamma", above=0, finite=True)
        require_number(self, "threshold", above=0)
        require_number(self, "max_iterations", least=1, whole=True)

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return True

    def solve(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.solve`.

        Raises:
            ValueError: for a marginal of the wrong shape, for a cost that is known not to be
                finite, and for a marginal that is known to be no distribution.
        """
        check_problem(problem)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return _solve_low_rank(self, problem)


@functools.partial(jax.jit, static_argnames=("solver",))
def _solve_low_rank(
    solver: LowRank,
    problem: TransportProblem,
) -> Solution:
    cost, a, b = problem.cost, problem.a, problem.b
    n, m = cost.shape
    dtype = working_dtype(cost)
    if cost.size == 0:
        return nothing_to_match(cost)
    prepared = prepare(cost, a, b)
    # ott keeps part of its state in the widest type that is switched on.
    widest = jnp.zeros(()).dtype
    relative, a, b = (
        lax.stop_gradient(x).astype(widest)
        for x in (prepared.reduced / prepared.scale, prepared.a, prepared.b)
    )
    a, b = (jnp.where(prepared.valid, x, 1 / len(x)) for x in (a, b))
    run = sinkhorn_lr.LRSinkhorn(
        rank=min(solver.rank, n, m),
        gamma=solver.gamma,
        epsilon=solver.epsilon,
        threshold=solver.threshold,
        max_iterations=solver.max_iterations,
    )
    geom = geometry.Geometry(cost_matrix=relative)
    output = run(linear_problem.LinearProblem(geom, a, b), init=_start(a, b, run.rank))
    # ott's own flag wants changes to become smaller: of rank 1 there are none from the start.
    last_change = output.errors[jnp.sum(output.errors != -1) - 1]
    plan = output.matrix.astype(dtype)
    plan = jnp.where(prepared.valid, plan / jnp.sum(plan), jnp.nan)

    certificate = sinkhorn.Sinkhorn(max_iterations=_CERTIFICATE_ITERATIONS)
    sharp = geometry.Geometry(cost_matrix=relative, epsilon=_CERTIFICATE_EPSILON)
    own = jnp.sum(output.matrix, axis=1), jnp.sum(output.matrix, axis=0)
    v = certificate(linear_problem.LinearProblem(sharp, *own)).g.astype(dtype)
    gap = jnp.sum(plan * slack(prepared.reduced, v * prepared.scale))
    return Solution(
        plan=plan,
        value=jnp.sum(plan * prepared.cost),
        converged=prepared.valid & (last_change < solver.threshold),
        gap=restored(lax.stop_gradient(gap), prepared.k),
    )


def _start(a: Array, b: Array, rank: int) -> tuple[Array, Array, Array]:
    """A random start like ott's, the same whatever types and generator are switched on."""
    rng = np.random.default_rng(0)
    shares = (np.abs(rng.normal(size=(len(x), rank))) for x in (a, b))
    shares_a, shares_b = (jnp.asarray(x / x.sum(1, keepdims=True), a.dtype) for x in shares)
    weights = 1 + rng.uniform(size=rank)
    weights = jnp.asarray(weights / weights.sum(), a.dtype)
    return a[:, None] * shares_a, b[:, None] * shares_b, weights
