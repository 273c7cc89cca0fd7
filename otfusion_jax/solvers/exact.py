"""Plans without regularisation: by an assignment where there is one, by a linear program if not."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.assignment import assign, assign_copies
from otfusion_jax.solvers.base import (
    AbstractSolver,
    Solution,
    TransportProblem,
    empty_solution,
    is_distribution,
    working_dtype,
)
from otfusion_jax.solvers.network_simplex import network_simplex


@dataclass(frozen=True)
class Exact(AbstractSolver):
    """Optimal transport without regularisation, for any sizes and marginals.

    - As many source units as target units, no marginals: the plan is a permutation. Runs ott's
      (optax's) shortest augmenting paths on a cost whose rows and columns were shifted so that
      little is left to do. ott returns no dual variables; they are recovered from the permutation.
    - One size divides the other, no marginals: the same with as many copies of each unit of the
      smaller side as it takes. The plan is `[n, m]`.
    - Otherwise a linear program, solved on the host by POT's network simplex, in float64
      (`pip install otfusion-jax[lp]`). The plan is `[n, m]`. Under `jax.vmap` one after the other.

    `Solution.gap` certifies the plan independently of how it was found. For traced input that is
    not valid the permutation is filled with `n`, out of range, so that gathering with
    `mode="fill"` gives NaN, and a plan `[n, m]` with NaN. `Solution.value` is differentiable in the
    cost, its gradient being the plan, but not in the marginals.

    Attributes:
        tolerance: The largest gap, as a share of the range of the costs (plus their rounding), with
            which the solution counts as `converged`.

    References:
        Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016. Bonneel et
        al., Displacement interpolation using Lagrangian mass transport, SIGGRAPH Asia 2011. Peyré
        and Cuturi, Computational Optimal Transport, 2019, sections 2.3 (linear program), 2.5
        (duality), 3.5 (network simplex) and 4.2 (Sinkhorn).
    """

    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        require_number(self, "tolerance", least=0)

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return True

    @functools.partial(jax.jit, static_argnames=("self",))
    def compute(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.compute`."""
        cost = problem.cost.astype(working_dtype(problem.cost))
        n, m = cost.shape
        uniform = problem.a is None and problem.b is None
        permutation = uniform and n == m
        if cost.size == 0:
            if permutation:
                return empty_solution(cost, jnp.zeros(0, jnp.int32))
            return empty_solution(cost)
        largest = jnp.max(jnp.abs(cost))
        finite = jnp.isfinite(largest)
        # In a range in which no sum or difference of costs overflows, and none is taken for zero.
        k = exponent(cost)
        constant = lax.stop_gradient(cost)
        in_range = scaled(constant, -k)
        # ott's solver may never return from NaN, so it gets a problem that takes it one step a row.
        easy = 1 - jnp.eye(n, m, dtype=cost.dtype)
        safe = jnp.where(finite, in_range, easy)

        valid = finite
        if permutation:
            plan, gap = assign(safe)
            # Divided first: the sum may be out of range where the mean is not.
            matched = cost[plan, jnp.arange(n)]
            value = jnp.sum(matched / n)
            unusable = n
        else:
            if uniform and max(n, m) % min(n, m) == 0:
                plan, gap = assign_copies(safe)
            else:
                plan, gap, valid_masses = _linear_program(safe, problem.a, problem.b)
                valid = finite & valid_masses
            value = jnp.sum(plan * cost)
            unusable = jnp.nan

        # Of all costs, the largest is rounded by most.
        largest = jnp.max(jnp.abs(safe))
        rounding = 8 * jnp.finfo(cost.dtype).eps * largest
        spread = jnp.max(safe) - jnp.min(safe)
        tolerance = self.tolerance * spread + rounding
        within_tolerance = gap <= tolerance
        gap = restored(gap, k)
        return Solution(
            plan=jnp.where(valid, plan, unusable),
            value=jnp.where(valid, value, jnp.nan),
            converged=valid & within_tolerance,
            gap=jnp.where(valid, gap, jnp.nan),
        )


def _linear_program(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | None,
    b: Float[Array, " m"] | None,
) -> tuple[Float[Array, "n m"], Float[Array, ""], Bool[Array, ""]]:
    """Returns the plan between given masses, its gap, and whether the masses are valid."""
    n, m = cost.shape
    a = _masses(a, n, cost)
    b = _masses(b, m, cost)
    valid = is_distribution(a) & is_distribution(b)
    # POT raises on the host for masses that are no distribution, so it never gets any.
    a = jnp.where(valid, a, 1 / n)
    b = jnp.where(valid, b, 1 / m)
    plan, gap = network_simplex(cost, a, b)
    return plan, gap, valid


def _masses(given: Array | None, size: int, cost: Array) -> Float[Array, " n"]:
    """Returns masses without gradient in the precision of the solver, uniform ones for None."""
    if given is None:
        return jnp.full(size, 1 / size, cost.dtype)
    return lax.stop_gradient(given).astype(working_dtype(given))
