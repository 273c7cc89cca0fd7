"""Plans without regularisation: by an assignment where there is one, by a linear program if not."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Float

from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.host import Array, array_module, cond, program, without_gradient
from otfusion_jax.common.scaling import exponent, largest_magnitude, restored, scaled
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
from otfusion_jax.solvers.small_assignments import FEW_UNITS, solve_small

_COMFORTABLE_EXPONENT = 64
"""Known costs of an assignment are solved as they are if the largest is between the powers of two
of this and of less this."""


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
    takes_numpy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_number(self, "tolerance", least=0)

    @property
    def scale_free(self) -> bool:
        """See `AbstractSolver.scale_free`."""
        return True

    def form(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.form`. Which form a plan has is known without tracing the solver."""
        if not _is_assignment(problem):
            return super().form(problem)
        number = jax.ShapeDtypeStruct((), working_dtype(problem.cost))
        permutation = jax.ShapeDtypeStruct(problem.cost.shape[:1], np.int32)
        solution: Any = (permutation, number, jax.ShapeDtypeStruct((), bool), number)
        return Solution(*solution)

    @program(static_argnames=("self",))
    def compute(self, problem: TransportProblem) -> Solution:
        """See `AbstractSolver.compute`."""
        xp = array_module(problem.cost)
        cost = xp.asarray(problem.cost, working_dtype(problem.cost))
        n, m = cost.shape
        uniform = problem.a is None and problem.b is None
        permutation = _is_assignment(problem)
        if cost.size == 0:
            if permutation:
                return empty_solution(cost, xp.zeros(0, np.int32))
            return empty_solution(cost)
        if takes_few(problem):
            return jax.tree.map(operator.itemgetter(0), solve_small(cost[None], self.tolerance))
        largest = largest_magnitude(cost)
        finite = xp.isfinite(largest)
        # In a range in which no sum or difference of costs overflows, and none is taken for zero.
        # The largest that XLA finds is 0 among subnormal ones; `exponent` reads the bits of all.
        k = exponent(largest if xp is np else cost)
        constant = without_gradient(cost)
        if permutation and xp is np and abs(k) <= _COMFORTABLE_EXPONENT:
            # The same digits, without another array of the size of the cost.
            k, in_range = 0 * k, constant
        else:
            in_range = scaled(constant, -k)
        # ott's solver may never return from NaN, so it gets a problem that takes it one step a row.
        safe = cond(finite, lambda: in_range, lambda: 1 - xp.eye(n, m, dtype=cost.dtype))

        valid = finite
        if permutation:
            plan, gap = assign(safe)
            # Divided first: the sum may be out of range where the mean is not.
            matched = cost[plan, np.arange(n)]
            value = xp.sum(matched / n)
            unusable = n
        else:
            if uniform and max(n, m) % min(n, m) == 0:
                plan, gap = assign_copies(safe)
            else:
                plan, gap, valid_masses = _linear_program(safe, problem.a, problem.b)
                valid = finite & valid_masses
            value = xp.sum(plan * cost)
            unusable = np.nan

        # Of all costs, the largest is rounded by most.
        highest, lowest = xp.max(safe), xp.min(safe)
        rounding = 8 * np.finfo(cost.dtype).eps * xp.maximum(highest, -lowest)
        tolerance = self.tolerance * (highest - lowest) + rounding
        within_tolerance = gap <= tolerance
        gap = restored(gap, k)
        return Solution(
            plan=xp.where(valid, plan, unusable),
            value=xp.where(valid, value, np.nan),
            converged=valid & within_tolerance,
            gap=xp.where(valid, gap, np.nan),
        )


def takes_few(problem: TransportProblem) -> bool:
    """Says whether a problem, or each of a stack, is one for `solve_small`.

    Args:
        problem: The problem, or several with a leading axis in front of every array.

    Returns:
        Whether it is a small assignment of a known cost.
    """
    is_known = array_module(problem.cost) is np and problem.cost.size > 0
    return is_known and problem.cost.shape[-1] <= FEW_UNITS and _is_assignment(problem)


def _is_assignment(problem: TransportProblem) -> bool:
    """Whether a permutation is the best plan of a problem, whatever it costs."""
    n, m = problem.cost.shape[-2:]
    return n == m and problem.a is None and problem.b is None


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
    xp = array_module(cost)
    plan, gap = network_simplex(cost, xp.where(valid, a, 1 / n), xp.where(valid, b, 1 / m))
    return plan, gap, valid


def _masses(given: Array | None, size: int, cost: Array) -> Float[Array, " n"]:
    """Returns masses without gradient in the precision of the solver, uniform ones for None."""
    xp = array_module(cost)
    if given is None:
        return xp.full(size, 1 / size, cost.dtype)
    return xp.asarray(without_gradient(given), working_dtype(given))
