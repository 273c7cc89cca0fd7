"""Soft plans by ott's Sinkhorn iterations, with marginals that are kept or only drawn to."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from ott.geometry import epsilon_scheduler, geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from otfusion_jax.common.arguments import require_epsilon, require_flag, require_number
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem, empty_solution
from otfusion_jax.solvers.implicit_diff import IMPLICIT
from otfusion_jax.solvers.prepared import prepare

# ott looks whether it has converged after each so many iterations.
_BETWEEN_CHECKS = 10


@dataclass(frozen=True)
class Sinkhorn(AbstractSolver):
    """Entropic optimal transport: a smooth plan, for any widths and marginals.

    Minimises `<P, C> - epsilon H(P)` with ott's Sinkhorn iterations in the log domain, and is
    differentiable in the cost and the marginals by ott's implicit differentiation. The row
    marginals of the plan are exact, the column marginals as exact as `threshold`. Traced input that
    is not valid gives a plan of NaN.

    With `tau_a` or `tau_b` below 1 the problem is unbalanced: that marginal is not kept but drawn
    to, by a penalty `rho KL(P 1 | a)`, `rho = epsilon tau / (1 - tau)`. With both below 1 the total
    mass is free in ott and POT, and here still 1: this is their plan divided by its mass. It
    minimises the same objective among plans of mass 1; a constant added to the cost would change
    nothing but the mass.

    `Solution.gap` refers to the problem *without* entropy between the plan's own marginals, at the
    c-transforms of the entropic potentials: it measures the blur as well as what is missing to
    convergence.

    Attributes:
        epsilon: The strength of the regularisation. The plan tends to an optimal one as it goes to
            0, at the price of iterations.
        relative: Whether `epsilon` counts in standard deviations of the cost, so that neither
            scaling nor shifting the cost changes the plan. Gradients see this scale (those of ott's
            own `relative_epsilon` do not).
        threshold: The error below which the solution counts as `converged`: by how much the column
            marginals are off in total; of an unbalanced problem, both marginals, from what they
            should be given the potentials.
        max_iterations: The largest number of iterations.
        epsilon_init: Where annealing starts, as a multiple of `epsilon`; 1 means none. To start far
            above the range of the costs is to lose digits.
        epsilon_decay: The factor of each iteration of annealing, in (0, 1).
        tau_a: How strictly the masses of the source units are kept, in (0, 1]; 1 means exactly.
        tau_b: How strictly the masses of the target units are kept, in (0, 1]; 1 means exactly.

    References:
        Cuturi, Sinkhorn distances, NeurIPS 2013. Peyré and Cuturi, Computational Optimal Transport,
        2019, sections 4.2 (iterations), 4.4 (log domain), 9.1 (differentiation) and 10.2
        (unbalanced). Chizat et al., Scaling algorithms for unbalanced optimal transport problems,
        Math. Comp. 2018. Séjourné et al., Faster unbalanced optimal transport, AISTATS 2022 (mass).
    """

    epsilon: float = 0.05
    relative: bool = True
    threshold: float = 1e-3
    max_iterations: int = 2000
    epsilon_init: float = 1.0
    epsilon_decay: float = 0.9
    tau_a: float = 1.0
    tau_b: float = 1.0

    def __post_init__(self) -> None:
        require_epsilon(self)
        require_flag(self, "relative")
        require_number(self, "threshold", above=0)
        require_number(self, "max_iterations", least=1, whole=True)
        require_number(self, "tau_a", above=0, most=1)
        require_number(self, "tau_b", above=0, most=1)
        require_number(self, "epsilon_init", least=1, finite=True)
        require_number(self, "epsilon_decay", above=0, below=1)
        annealing = _annealing_iterations(self)
        if annealing >= self.max_iterations:
            raise ValueError(
                f"Annealing takes {annealing} iterations, and max_iterations is "
                f"{self.max_iterations}. Start lower, decay faster, or allow more."
            )

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return self.relative

    @functools.partial(jax.jit, static_argnames=("self",))
    def compute(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.compute`."""
        if problem.cost.size == 0:
            return empty_solution(problem.cost)
        prepared = prepare(problem, self.relative)
        cost = prepared.reduced / prepared.unit
        # Two loose marginals leave the mass free: then a constant in the cost scales the plan.
        mass_is_free = self.tau_a < 1 and self.tau_b < 1
        if mass_is_free:
            cost = cost - _free_mass_shift(self, cost, prepared.a, prepared.b)
        epsilon = epsilon_scheduler.Epsilon(
            self.epsilon, init=self.epsilon_init, decay=self.epsilon_decay
        )
        geom = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)
        ott_problem = linear_problem.LinearProblem(
            geom, prepared.a, prepared.b, self.tau_a, self.tau_b
        )
        run = sinkhorn.Sinkhorn(
            threshold=self.threshold,
            inner_iterations=_BETWEEN_CHECKS,
            min_iterations=_annealing_iterations(self),
            max_iterations=self.max_iterations,
            recenter_potentials=mass_is_free,
            implicit_diff=IMPLICIT,
        )
        output = run(ott_problem)
        plan = output.matrix
        # Among plans of mass 1, the same plan is optimal (Séjourné et al. 2022).
        if mass_is_free:
            plan = plan / jnp.sum(plan)
        potentials = output.g * prepared.unit
        return prepared.solution(plan, potentials, jnp.asarray(output.converged))


def _annealing_iterations(solver: Sinkhorn) -> int:
    """How many iterations must pass before ott may look whether it has converged.

    None without annealing. Otherwise one less than a multiple of those between its looks: ott takes
    a look at which it may not yet measure the error for divergence, and that for convergence.
    """
    if solver.epsilon_init == 1:
        return 0
    # The first iteration with epsilon_init * epsilon_decay**steps <= 1.
    log_decay = -math.log(solver.epsilon_decay)
    steps = math.ceil(math.log(solver.epsilon_init) / log_decay)
    looks = steps // _BETWEEN_CHECKS + 1
    return looks * _BETWEEN_CHECKS - 1


def _free_mass_shift(
    solver: Sinkhorn,
    cost: Array,
    a: Array,
    b: Array,
) -> Array:
    """What to subtract from a cost so that with both marginals loose, the plan has mass 1 or more.

    ott's threshold is absolute: it would take a plan of next to no mass for converged. If V is the
    minimum of the objective over plans of mass 1, the best mass is `exp(-V / strength)`, with the
    strength of all terms that are not linear, `epsilon + rho_a + rho_b`. Either penalty is at most
    that of the whole plan, `rho KL(P | a b^T)`. With these V has a closed form, an upper bound.
    """
    # In units of epsilon.
    rho_a = solver.tau_a / (1 - solver.tau_a)
    rho_b = solver.tau_b / (1 - solver.tau_b)
    strength = solver.epsilon * (1 + (rho_a + rho_b))
    independent = a[:, None] * b[None, :]
    weights = independent ** (1 - solver.epsilon / strength)
    log_mass = jax.nn.logsumexp(-cost / strength, b=weights)
    upper_bound = -strength * log_mass
    return lax.stop_gradient(upper_bound)
