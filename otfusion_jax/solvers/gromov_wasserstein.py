"""Plans of a quadratic cost, by ott: units are matched by how far they are from each other."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float
from ott.geometry import geometry
from ott.problems.quadratic import quadratic_problem
from ott.solvers.linear import sinkhorn
from ott.solvers.quadratic import gromov_wasserstein

from otfusion_jax.common.arguments import require_epsilon, require_flag, require_number
from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem, empty_solution
from otfusion_jax.solvers.duality import plan_gap
from otfusion_jax.solvers.prepared import PreparedProblem, prepare, standardised


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
        alpha: The share of the quadratic term, in [0, 1]. With 1, the cost is not looked at.
        epsilon: The strength of the regularisation.
        relative: Whether both terms are made comparable first, so that neither scaling nor shifting
            the cost, nor scaling or shifting both `intra` alike, changes the plan: C counts in its
            standard deviations, and so do A and B, in that of all their values. `epsilon` counts in
            these units; value and gap are again in those of the cost.
        threshold: The accuracy with which the solution counts as `converged`: the objective changes
            by less than this, relatively, in one linearisation, and the column marginals are off by
            less than this in total in each.
        max_iterations: The largest number of linearisations.
        max_inner_iterations: The largest number of Sinkhorn iterations in each.

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

    def __post_init__(self) -> None:
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

    @functools.partial(jax.jit, static_argnames=("self",))
    def compute(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.compute`."""
        if problem.cost.size == 0:
            return empty_solution(problem.cost)
        assert problem.intra is not None, "checked by solve"
        prepared = prepare(problem, self.relative)
        dtype = prepared.cost.dtype
        source, target, finite = _prepare_intra(*problem.intra, dtype, self.relative)
        valid = prepared.valid & finite
        linear = prepared.reduced / prepared.unit * (1 - self.alpha)
        output = self._run(linear, source, target, prepared)
        assert output.linear_state is not None  # only of an output that is made by hand
        plan = lax.stop_gradient(output.matrix).astype(dtype)
        plan = jnp.where(valid, plan, jnp.nan)

        distortion = _distortion(source, target, plan)
        # The value sees all of the cost; what has been solved is without its constant.
        whole = scaled(prepared.cost, -prepared.k)
        whole = whole / prepared.unit * (1 - self.alpha)
        objective = whole + self.alpha * distortion
        value = jnp.sum(plan * objective)
        # The gradient of the objective at the plan is the cost of the linearisation.
        gradient = linear + 2 * self.alpha * distortion
        potentials = output.linear_state.g.astype(dtype)
        gap = lax.stop_gradient(plan_gap(plan, gradient, potentials))
        return Solution(
            plan=plan,
            value=restored(value * prepared.unit, prepared.k),
            converged=valid & jnp.asarray(output.converged),
            gap=restored(gap * prepared.unit, prepared.k),
        )

    def _run(
        self,
        linear: Float[Array, "n m"],
        source: Float[Array, "n n"],
        target: Float[Array, "m m"],
        prepared: PreparedProblem,
    ) -> gromov_wasserstein.GWOutput:
        """Runs ott's solver, through which no gradient is taken."""
        # ott's linearisation leaves out the factor 2 of the quadratic term's gradient. As costs
        # enter that term squared, each takes the root of it.
        factor = (2 * self.alpha) ** 0.5
        ott_problem = quadratic_problem.QuadraticProblem(
            geometry.Geometry(cost_matrix=lax.stop_gradient(factor * source)),
            geometry.Geometry(cost_matrix=lax.stop_gradient(factor * target)),
            geometry.Geometry(cost_matrix=lax.stop_gradient(linear)),
            a=lax.stop_gradient(prepared.a),
            b=lax.stop_gradient(prepared.b),
        )
        inner = sinkhorn.Sinkhorn(
            threshold=self.threshold, max_iterations=self.max_inner_iterations
        )
        run = gromov_wasserstein.GromovWasserstein(
            inner,
            epsilon=self.epsilon,
            threshold=self.threshold,
            max_iterations=self.max_iterations,
        )
        return run(ott_problem)


def _prepare_intra(
    source: Float[Array, "n n"],
    target: Float[Array, "m m"],
    dtype: jnp.dtype,
    relative: bool,
) -> tuple[Float[Array, "n n"], Float[Array, "m m"], Bool[Array, ""]]:
    """Makes intra-domain costs ready for ott, in one common unit and less one common constant.

    Args:
        source: The costs between units of the source.
        target: The costs between units of the target.
        dtype: The precision to solve in.
        relative: Whether their unit does not matter: then it is the deviation of all their values.

    Returns:
        Both costs, 0 where any of them is not finite; and whether all of them are finite.
    """
    n, m = len(source), len(target)
    source_values = jnp.ravel(source).astype(dtype)
    target_values = jnp.ravel(target).astype(dtype)
    both = jnp.concatenate([source_values, target_values])
    largest = jnp.max(jnp.abs(both))
    finite = jnp.isfinite(largest)
    both = jnp.where(finite, both, 0)
    if relative:
        both = scaled(both, -exponent(both))
    # The same constant on both sides cancels: without it there are more digits for the rest.
    both, deviation = standardised(both)
    if relative:
        both = both / deviation
    source_values = both[: n * n]
    target_values = both[n * n :]
    return source_values.reshape(n, n), target_values.reshape(m, m), finite


def _distortion(
    source: Float[Array, "n n"],
    target: Float[Array, "m m"],
    plan: Float[Array, "n m"],
) -> Float[Array, "n m"]:
    """The sum over k, l of `(source[i, k] - target[j, l])^2 plan[k, l]`, by Peyré et al., eq. 5."""
    rows = jnp.sum(plan, axis=1)
    columns = jnp.sum(plan, axis=0)
    source_squares = (source**2) @ rows
    target_squares = (target**2) @ columns
    products = 2 * source @ plan @ target.T
    return source_squares[:, None] + target_squares[None, :] - products
