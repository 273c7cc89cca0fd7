"""Plans of low rank, by ott's mirror descent: units are matched by way of a few clusters."""

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
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem, empty_solution
from otfusion_jax.solvers.prepared import prepare

# The potentials that certify a plan of low rank: blurred by this many deviations of the cost.
_CERTIFICATE_EPSILON = 0.02
_CERTIFICATE_ITERATIONS = 500


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
        rank: The number of clusters; no more are made than there are units on either side.
        epsilon: The strength of an entropic regularisation of the factors, in standard deviations
            of the cost; 0 means none.
        gamma: The step size of the mirror descent.
        threshold: The change of the factors in an iteration below which the solution counts as
            `converged`.
        max_iterations: The largest number of iterations.

    References:
        Scetbon, Cuturi and Peyré, Low-rank Sinkhorn factorization, ICML 2021, section 3.
    """

    rank: int = 10
    epsilon: float = 0.0
    gamma: float = 10.0
    threshold: float = 1e-3
    max_iterations: int = 2000

    def __post_init__(self) -> None:
        require_number(self, "rank", least=1, whole=True)
        require_number(self, "epsilon", least=0, finite=True)
        require_number(self, "gamma", above=0, finite=True)
        require_number(self, "threshold", above=0)
        require_number(self, "max_iterations", least=1, whole=True)

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return True

    @functools.partial(jax.jit, static_argnames=("self",))
    def compute(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.compute`."""
        if problem.cost.size == 0:
            return empty_solution(problem.cost)
        n, m = problem.cost.shape
        prepared = prepare(problem)
        # ott keeps part of its state in the widest type that is switched on.
        widest = jnp.zeros(()).dtype
        cost = prepared.reduced / prepared.unit
        cost = lax.stop_gradient(cost).astype(widest)
        a = lax.stop_gradient(prepared.a).astype(widest)
        b = lax.stop_gradient(prepared.b).astype(widest)
        # The plan between masses that are no distribution is NaN anyhow: ott need not iterate on.
        a = jnp.where(prepared.valid, a, 1 / n)
        b = jnp.where(prepared.valid, b, 1 / m)

        run = sinkhorn_lr.LRSinkhorn(
            rank=min(self.rank, n, m),
            gamma=self.gamma,
            epsilon=self.epsilon,
            threshold=self.threshold,
            max_iterations=self.max_iterations,
        )
        geom = geometry.Geometry(cost_matrix=cost)
        ott_problem = linear_problem.LinearProblem(geom, a, b)
        output = run(ott_problem, init=_initial_factors(a, b, run.rank))
        # ott's own flag wants changes to become smaller: of rank 1 there are none from the start.
        # Iterations that were not run have an error of -1.
        iterations = jnp.sum(output.errors != -1)
        last_change = output.errors[iterations - 1]

        converged = last_change < self.threshold
        potentials = _certifying_potentials(cost, output.matrix)

        dtype = prepared.cost.dtype
        plan = output.matrix.astype(dtype)
        plan = plan / jnp.sum(plan)
        potentials = potentials.astype(dtype) * prepared.unit
        return prepared.solution(plan, potentials, converged)


def _certifying_potentials(cost: Array, plan: Array) -> Array:
    """Returns column potentials for the marginals of a plan, close to the optimal ones.

    Mirror descent has none. These come from a Sinkhorn problem of *full* rank with little blur, so
    that the gap says what the low rank costs.
    """
    geom = geometry.Geometry(cost_matrix=cost, epsilon=_CERTIFICATE_EPSILON)
    rows = jnp.sum(plan, axis=1)
    columns = jnp.sum(plan, axis=0)
    ott_problem = linear_problem.LinearProblem(geom, rows, columns)
    run = sinkhorn.Sinkhorn(max_iterations=_CERTIFICATE_ITERATIONS)
    return run(ott_problem).g


def _initial_factors(a: Array, b: Array, rank: int) -> tuple[Array, Array, Array]:
    """Returns Q, R and g of a random start like ott's.

    NumPy draws them: the start is the same whatever types and generator are switched on in JAX.
    """
    rng = np.random.default_rng(0)
    shares_a = np.abs(rng.normal(size=(len(a), rank)))
    shares_b = np.abs(rng.normal(size=(len(b), rank)))
    weights = 1 + rng.uniform(size=rank)
    shares_a = shares_a / shares_a.sum(1, keepdims=True)
    shares_b = shares_b / shares_b.sum(1, keepdims=True)
    weights = weights / weights.sum()
    q = a[:, None] * jnp.asarray(shares_a, a.dtype)
    r = b[:, None] * jnp.asarray(shares_b, a.dtype)
    return q, r, jnp.asarray(weights, a.dtype)
