"""Plans of a quadratic cost, by ott: units are matched by how far they are from each other."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float
from ott.geometry import geometry
from ott.problems.quadratic import quadratic_problem
from ott.solvers.linear import sinkhorn
from ott.solvers.quadratic import gromov_wasserstein

from otfusion_jax.common.arguments import require_epsilon, require_flag, require_number
from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.assignment import slack
from otfusion_jax.solvers.base import (
    AbstractSolver,
    Solution,
    TransportProblem,
    check_cost,
    check_problem,
    nothing_to_match,
    working_dtype,
)
from otfusion_jax.solvers.sinkhorn import prepare, standardised


@dataclass(frozen=True)
class GromovWasserstein(AbstractSolver):
    """Fused Gromov-Wasserstein transport with entropy: near units go to near units.

    Minimises, over plans with the given marginals,

        (1 - alpha) <P, C> + alpha sum_ijkl (A[i, k] - B[j, l])^2 P[i, j] P[k, l] - epsilon H(P)

    where C is the cost and `intra = (A, B)`, both symmetric. ott's GromovWasserstein linearises
    the quadratic term at the last plan and solves by Sinkhorn iterations, starting from `a b^T`.
    The problem is not convex: what is found is near a stationary point, always the same one. The
    row marginals of the plan are exact, the column marginals as exact as `threshold`. Traced input
    that is not valid gives a plan of NaN.

    `Solution.value` is the objective without entropy. The plan carries no gradient: ott's outer
    loop has none. The gradient of the value, in the cost and in both `intra`, is taken with the
    plan held fixed, which makes it that of the minimum *with* entropy (envelope theorem).

    `Solution.gap` refers to the linearisation at the plan (the Frank-Wolfe gap): how much lower a
    plan with the same marginals could be there. It is 0 at a stationary point of the problem
    without entropy, measures the blur, and bounds no distance to a global minimum.

    Attributes:
        alpha: the share of the quadratic term, in [0, 1]. With 1, the cost is not looked at.
        epsilon: strength of the regularisation.
        relative: whether both terms are made comparable first, so that neither scaling nor shifting
            the cost, nor scaling or shifting both `intra` alike, changes the plan: C counts in its
            standard deviations, and so do A and B, in that of all their values. `epsilon` counts in
            these units; value and gap are again in those of the cost.
        threshold: `converged` means that the objective changes by less than this, relatively, in
            one linearisation, and that the column marginals are off by less than this in total in
            each.
        max_iterations: how many linearisations at most.
        max_inner_iterations: how many Sinkhorn iterations at most in each.

    References:
        Peyré, Cuturi and Solomon, Gromov-Wasserstein averaging of kernel and distance matrices,
        ICML 2016, section 2. Vayer et al., Optimal transport for structured data with application
        on graphs, ICML 2019 (`alpha`).
    """

    quadratic: ClassVar[bool] = True

    alpha: float = 0.5
    epsilon: float = 0.05
    relative: bool = True
    threshold: float = 1e-3
    max_iterations: int = 50
    max_inner_iterations: int = 2000

    def __post_init__(self):
        require_number(self, "alpha", least=0, most=1)
        require_epsilon(self)
        require_flag(self, "relative")
        require_number(self, "threshold", above=0)
        require_number(self, "max_iterations", least=1, whole=True)
        require_number(self, "max_inner_iterations", least=1, whole=True)

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return self.relative

    def solve(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.solve`.

        Raises:
            ValueError: without `intra`, for shapes that do not fit, for costs that are known not
                to be finite, and for a marginal that is known to be no distribution.
        """
        check_problem(problem)
        _check_intra(problem)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return _solve(self, problem)


def _check_intra(problem: TransportProblem) -> None:
    n, m = problem.cost.shape
    if problem.intra is None:
        raise ValueError(
            "GromovWasserstein compares what units of one model cost each other: it needs "
            f"intra=(source, target), of shapes {(n, n)} and {(m, m)}."
        )
    for side, x, size in zip(("source", "target"), problem.intra, (n, m), strict=True):
        if x.shape != (size, size):
            raise ValueError(
                f"The costs within the {side} have shape {x.shape}, but there are {size} units."
            )
        check_cost(x)


@functools.partial(jax.jit, static_argnames=("solver",))
def _solve(
    solver: GromovWasserstein,
    problem: TransportProblem,
) -> Solution:
    cost, a, b, intra = problem.cost, problem.a, problem.b, problem.intra
    assert intra is not None, "checked by the caller"
    n, m = cost.shape
    dtype = working_dtype(cost)
    if cost.size == 0:
        return nothing_to_match(cost)
    prepared = prepare(cost, a, b, solver.relative)
    both = jnp.concatenate([jnp.ravel(x).astype(dtype) for x in intra])
    finite = jnp.isfinite(jnp.max(jnp.abs(both)))
    valid = prepared.valid & finite
    # The same constant on both sides cancels: without it there are more digits for the rest.
    both = jnp.where(finite, both, 0)
    both, spread = standardised(scaled(both, -exponent(both)) if solver.relative else both)
    unit = prepared.scale if solver.relative else jnp.ones_like(spread)
    both = both / spread if solver.relative else both
    source, target = both[: n * n].reshape(n, n), both[n * n :].reshape(m, m)
    # The value sees all of the cost, what is solved is without its constant.
    costs = prepared.reduced, scaled(prepared.cost, -prepared.k)
    linear, whole = (x / unit * (1 - solver.alpha) for x in costs)

    # ott's linearisation leaves out the factor 2 of the quadratic term's gradient.
    geom_source, geom_target = (
        geometry.Geometry(cost_matrix=lax.stop_gradient((2 * solver.alpha) ** 0.5 * x))
        for x in (source, target)
    )
    run = gromov_wasserstein.GromovWasserstein(
        sinkhorn.Sinkhorn(threshold=solver.threshold, max_iterations=solver.max_inner_iterations),
        epsilon=solver.epsilon,
        threshold=solver.threshold,
        max_iterations=solver.max_iterations,
    )
    output = run(
        quadratic_problem.QuadraticProblem(
            geom_source,
            geom_target,
            geometry.Geometry(cost_matrix=lax.stop_gradient(linear)),
            a=lax.stop_gradient(prepared.a),
            b=lax.stop_gradient(prepared.b),
        )
    )

    plan = jnp.where(valid, lax.stop_gradient(output.matrix).astype(dtype), jnp.nan)
    distortion = _distortion(source, target, plan)
    value = jnp.sum(plan * (whole + solver.alpha * distortion))
    assert output.linear_state is not None  # only of an output that is made by hand
    v = output.linear_state.g.astype(dtype)
    gap = jnp.sum(plan * slack(linear + 2 * solver.alpha * distortion, v))
    return Solution(
        plan=plan,
        value=restored(value * unit, prepared.k),
        converged=jnp.logical_and(valid, jnp.asarray(output.converged)),
        gap=restored(lax.stop_gradient(gap * unit), prepared.k),
    )


def _distortion(
    source: Float[Array, "n n"], target: Float[Array, "m m"], plan: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    """The sum over k, l of `(source[i, k] - target[j, l])^2 plan[k, l]`, by Peyré et al., eq. 5."""
    squares = (source**2) @ jnp.sum(plan, axis=1), (target**2) @ jnp.sum(plan, axis=0)
    return squares[0][:, None] + squares[1][None, :] - 2 * source @ plan @ target.T
