"""Soft plans by ott's Sinkhorn iterations, with marginals that are kept or only drawn to."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from ott.geometry import epsilon_scheduler, geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from otfusion_jax.common.arguments import require_epsilon, require_flag, require_number
from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.assignment import slack
from otfusion_jax.solvers.base import (
    AbstractSolver,
    Solution,
    TransportProblem,
    check_problem,
    is_distribution,
    nothing_to_match,
    working_dtype,
)
from otfusion_jax.solvers.implicit_diff import IMPLICIT

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
        epsilon: strength of the regularisation. The plan tends to an optimal one as it goes to 0,
            at the price of iterations.
        relative: whether `epsilon` counts in standard deviations of the cost, so that neither
            scaling nor shifting the cost changes the plan. Gradients see this scale (those of ott's
            own `relative_epsilon` do not).
        threshold: `converged` means that the column marginals are off by less than this in total;
            of an unbalanced problem, both marginals, from what they should be given the potentials.
        max_iterations: how many iterations at most.
        epsilon_init: annealing starts from `epsilon` times this; 1 means none. To start far above
            the range of the costs is to lose digits.
        epsilon_decay: the factor of each iteration of annealing, in (0, 1).
        tau_a: how strictly the masses of the source units are kept, in (0, 1]; 1 means exactly.
        tau_b: the same for the target units.

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

    def __post_init__(self):
        require_epsilon(self)
        require_flag(self, "relative")
        require_number(self, "threshold", above=0)
        require_number(self, "max_iterations", least=1, whole=True)
        for name in ("tau_a", "tau_b"):
            require_number(self, name, above=0, most=1)
        require_number(self, "epsilon_init", least=1, finite=True)
        require_number(self, "epsilon_decay", above=0, below=1)
        if _annealed(self) >= self.max_iterations:
            raise ValueError(
                f"Annealing takes {_annealed(self)} iterations, and max_iterations is "
                f"{self.max_iterations}. Start lower, decay faster, or allow more."
            )

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return self.relative

    def solve(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.solve`.

        Raises:
            ValueError: for a marginal of the wrong shape, for a cost that is known not to be
                finite, and for a marginal that is known to be no distribution.
        """
        check_problem(problem)
        # ott's Sinkhorn relies on implicit promotion, which its users may have switched off.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return _solve_sinkhorn(self, problem)


class PreparedCost(NamedTuple):
    """A linear problem made ready for ott.

    Attributes:
        cost: `[n, m]` as given, in the precision to solve in.
        a: `[n]`, masses of the source units.
        b: `[m]`, masses of the target units.
        reduced: `[n, m]`, the cost less its minimum, in units of `2**k`; 0 if it is not finite.
        scale: `[]`, the standard deviation of the cost, in the same units; 1 if that is 0.
        k: int32 `[]`, which power of two is just above all costs; 0 if they are not to be scaled.
        valid: bool `[]`, whether the cost is finite and the marginals are distributions.
    """

    cost: Array
    a: Array
    b: Array
    reduced: Array
    scale: Array
    k: Array
    valid: Array


def prepare(cost: Array, a: Array | None, b: Array | None, relative: bool = True) -> PreparedCost:
    """Makes a problem ready for ott.

    Args:
        cost: `[n, m]`, not empty.
        a: masses of the source units; None means uniform.
        b: masses of the target units, likewise.
        relative: whether the unit of the cost does not matter, so that it can be scaled.

    Returns:
        The problem.
    """
    n, m = cost.shape
    cost = cost.astype(working_dtype(cost))
    a = jnp.full(n, 1 / n, cost.dtype) if a is None else a.astype(cost.dtype)
    b = jnp.full(m, 1 / m, cost.dtype) if b is None else b.astype(cost.dtype)
    finite = jnp.isfinite(jnp.max(jnp.abs(cost)))
    k = exponent(cost) if relative else jnp.zeros((), jnp.int32)
    reduced, scale = standardised(jnp.where(finite, scaled(cost, -k), 0))
    return PreparedCost(
        cost, a, b, reduced, scale, k, finite & is_distribution(a) & is_distribution(b)
    )


def standardised(x: Array) -> tuple[Array, Array]:
    """Takes values less their minimum, and their standard deviation.

    Args:
        x: finite values.

    Returns:
        The values less their minimum, a constant without gradient; the deviation, 1 if that is 0.
    """
    reduced = x - lax.stop_gradient(jnp.min(x))
    # The deviation does not depend on the division: it keeps squares in range.
    largest = lax.stop_gradient(jnp.max(reduced))
    largest = jnp.where(largest > 0, largest, 1)
    variance = jnp.var(reduced / largest)
    return reduced, largest * jnp.sqrt(jnp.where(variance > 0, variance, 1))


def _annealed(solver: Sinkhorn) -> int:
    """How many iterations must pass before ott may look whether it has converged.

    None without annealing. Otherwise one less than a multiple of those between its looks: ott takes
    a look at which it may not yet measure the error for divergence, and that for convergence.
    """
    if solver.epsilon_init == 1:
        return 0
    steps = math.ceil(math.log(solver.epsilon_init) / -math.log(solver.epsilon_decay))
    return (steps // _BETWEEN_CHECKS + 1) * _BETWEEN_CHECKS - 1


@functools.partial(jax.jit, static_argnames=("solver",))
def _solve_sinkhorn(
    solver: Sinkhorn,
    problem: TransportProblem,
) -> Solution:
    cost, a, b = problem.cost, problem.a, problem.b
    if cost.size == 0:
        return nothing_to_match(cost)
    prepared = prepare(cost, a, b, solver.relative)
    unit = prepared.scale if solver.relative else jnp.ones_like(prepared.scale)
    relative = prepared.reduced / unit
    tau_a, tau_b = solver.tau_a, solver.tau_b
    loose = tau_a < 1 and tau_b < 1
    if loose:
        relative = relative - _free_mass_shift(solver, relative, prepared.a, prepared.b)
    epsilon = epsilon_scheduler.Epsilon(
        solver.epsilon, init=solver.epsilon_init, decay=solver.epsilon_decay
    )
    run = sinkhorn.Sinkhorn(
        threshold=solver.threshold,
        inner_iterations=_BETWEEN_CHECKS,
        min_iterations=_annealed(solver),
        max_iterations=solver.max_iterations,
        recenter_potentials=loose,
        implicit_diff=IMPLICIT,
    )
    geom = geometry.Geometry(cost_matrix=relative, epsilon=epsilon)
    output = run(linear_problem.LinearProblem(geom, prepared.a, prepared.b, tau_a, tau_b))

    plan = output.matrix / jnp.sum(output.matrix) if loose else output.matrix
    plan = jnp.where(prepared.valid, plan, jnp.nan)
    gap = jnp.sum(plan * slack(prepared.reduced, output.g * unit))
    return Solution(
        plan=plan,
        value=jnp.sum(plan * prepared.cost),
        converged=jnp.logical_and(prepared.valid, jnp.asarray(output.converged)),
        gap=restored(lax.stop_gradient(gap), prepared.k),
    )


def _free_mass_shift(solver: Sinkhorn, cost: Array, a: Array, b: Array) -> Array:
    """What to subtract from a cost so that with both marginals loose, the plan has mass 1 or more.

    ott's threshold is absolute: it would take a plan of next to no mass for converged. If V is the
    minimum of the objective over plans of mass 1, the best mass is `exp(-V / strength)`, with the
    strength of all terms that are not linear, `epsilon + rho_a + rho_b`. Either penalty is at most
    that of the whole plan, `rho KL(P | a b^T)`. With these V has a closed form, an upper bound.
    """
    strength = solver.epsilon * (1 + sum(t / (1 - t) for t in (solver.tau_a, solver.tau_b)))
    weights = (a[:, None] * b[None, :]) ** (1 - solver.epsilon / strength)
    return lax.stop_gradient(-strength * jax.nn.logsumexp(-cost / strength, b=weights))
