"""From a cost matrix to a transport plan: what a solver is, and the exact one.

A solver is a frozen, hashable dataclass, hence static under `jax.jit`; its `solve` is a pure
function of arrays that `jax.jit` and `jax.vmap` accept. The answer is always a `Solution`: the
plan, its value, and evidence of how good it is. The total mass is 1, so the value of a permutation
is the *mean* of the costs that it picks.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.assignment import assign, assign_copies
from otfusion_jax.solvers.base import (
    AbstractSolver,
    Solution,
    TransportProblem,
    check_problem,
    is_distribution,
    nothing_to_match,
    working_dtype,
)
from otfusion_jax.solvers.network_simplex import network_simplex, require_pot


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
        tolerance: `converged` means a gap of at most this times the range of the costs (plus their
            rounding).

    References:
        Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016. Bonneel et
        al., Displacement interpolation using Lagrangian mass transport, SIGGRAPH Asia 2011. Peyré
        and Cuturi, Computational Optimal Transport, 2019, sections 2.3 (linear program), 2.5
        (duality), 3.5 (network simplex) and 4.2 (Sinkhorn).
    """

    tolerance: float = 1e-5

    def __post_init__(self):
        require_number(self, "tolerance", least=0)

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return True

    def solve(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.solve`.

        Raises:
            ValueError: for a marginal of the wrong shape, for a cost that is known not to be
                finite, and for a marginal that is known to be no distribution.
            ImportError: where it takes the linear program and POT is not installed.
        """
        check_problem(problem)
        weighted = problem.a is not None or problem.b is not None
        if weighted or not _divides(*problem.cost.shape):
            require_pot()
        return _solve_exact(self, problem)


def _divides(n: int, m: int) -> bool:
    """Whether one size is a multiple of the other."""
    return min(n, m) == 0 or max(n, m) % min(n, m) == 0


@functools.partial(jax.jit, static_argnames=("solver",))
def _solve_exact(
    solver: Exact,
    problem: TransportProblem,
) -> Solution:
    cost, a, b = problem.cost, problem.a, problem.b
    n, m = cost.shape
    cost = cost.astype(working_dtype(cost))
    uniform = a is None and b is None
    if cost.size == 0:
        return nothing_to_match(cost, jnp.zeros(n, jnp.int32) if uniform and n == m else None)
    finite = valid = jnp.isfinite(jnp.max(jnp.abs(cost)))
    # In a range in which no sum or difference of costs overflows, and none is taken for zero.
    k = exponent(cost)
    # ott's solver may never return from NaN, so it gets a problem that takes it one step per row.
    fixed = scaled(lax.stop_gradient(cost), -k)
    safe = jnp.where(finite, fixed, 1 - jnp.eye(n, m, dtype=cost.dtype))

    if uniform and n == m:
        plan, gap = assign(safe)
        # Divided first: the sum may be out of range where the mean is not.
        value, unusable = jnp.sum(cost[plan, jnp.arange(n)] / n), n
    else:
        if uniform and _divides(n, m):
            plan, gap = assign_copies(safe)
        else:
            a, b = _masses(a, n, cost), _masses(b, m, cost)
            valid = finite & is_distribution(a) & is_distribution(b)
            a, b = (jnp.where(valid, x, 1 / len(x)) for x in (a, b))
            plan, gap = network_simplex(safe, a, b)
        value, unusable = jnp.sum(plan * cost), jnp.nan
    rounding = 8 * jnp.finfo(cost.dtype).eps * jnp.max(jnp.abs(safe))
    tolerance = solver.tolerance * (jnp.max(safe) - jnp.min(safe)) + rounding
    return Solution(
        plan=jnp.where(valid, plan, unusable),
        value=jnp.where(valid, value, jnp.nan),
        converged=valid & (gap <= tolerance),
        gap=jnp.where(valid, restored(gap, k), jnp.nan),
    )


def _masses(given: Array | None, size: int, cost: Array) -> Float[Array, " n"]:
    if given is None:
        return jnp.full(size, 1 / size, cost.dtype)
    return lax.stop_gradient(given).astype(working_dtype(given))
