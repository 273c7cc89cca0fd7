"""A linear problem made ready for ott's solvers, and the solution of what they return.

ott's thresholds and regularisation are in absolute units. So a cost is handed over less its minimum
and in units of its own standard deviation, unless a solver is asked to take its units as they are.
Values and gaps come back in the units of the cost that was given.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from otfusion_jax.common.scaling import exponent, restored, scaled
from otfusion_jax.solvers.base import Solution, TransportProblem, is_distribution, working_dtype
from otfusion_jax.solvers.duality import plan_gap


@dataclass(frozen=True)
class PreparedProblem:
    """A linear problem made ready for ott.

    Attributes:
        cost: The cost as given, float `[n, m]`, in the precision to solve in.
        a: The masses of the source units, float `[n]`.
        b: The masses of the target units, float `[m]`.
        reduced: The cost less its minimum, float `[n, m]`, in units of `2**k`; 0 if it is not
            finite.
        unit: What counts as 1 for the solver, float `[]`, in units of `2**k`: the standard
            deviation of the cost (1 if that is 0), or 1 where its units are taken as they are.
        k: The exponent of the power of two just above all costs, int32 `[]`; 0 where the units of
            the cost are taken as they are.
        valid: Whether the cost is finite and the masses are distributions, bool `[]`.
    """

    cost: Array
    a: Array
    b: Array
    reduced: Array
    unit: Array
    k: Array
    valid: Array

    def solution(
        self,
        plan: Float[Array, "n m"],
        v: Float[Array, " m"],
        converged: Bool[Array, ""],
    ) -> Solution:
        """Makes a solution of a plan, NaN for a problem that is not valid.

        Args:
            plan: The plan, of mass 1.
            v: The column potentials that certify it, feasible or not, in the units of `reduced`.
            converged: Whether the solver reached its tolerance.

        Returns:
            The solution, its value and its gap in the units of the cost that was given.
        """
        plan = jnp.where(self.valid, plan, jnp.nan)
        gap = lax.stop_gradient(plan_gap(plan, self.reduced, v))
        return Solution(
            plan=plan,
            value=jnp.sum(plan * self.cost),
            converged=self.valid & converged,
            gap=restored(gap, self.k),
        )


def prepare(problem: TransportProblem, relative: bool = True) -> PreparedProblem:
    """Makes a problem ready for ott.

    Args:
        problem: The problem, with units on both sides. Its intra-domain costs are not looked at.
        relative: Whether the unit of the cost does not matter, so that it can be scaled.

    Returns:
        The problem, with uniform masses where none were given.
    """
    n, m = problem.cost.shape
    cost = problem.cost.astype(working_dtype(problem.cost))
    a = _masses(problem.a, n, cost)
    b = _masses(problem.b, m, cost)
    largest = jnp.max(jnp.abs(cost))
    finite = jnp.isfinite(largest)
    # A power of two loses no digits, and keeps squares of the cost in range.
    k = exponent(cost) if relative else jnp.zeros((), jnp.int32)
    in_range = scaled(cost, -k)
    reduced, deviation = standardised(jnp.where(finite, in_range, 0))
    # By a unit of 1, nothing changes: one formula does for both kinds.
    unit = deviation if relative else jnp.ones_like(deviation)
    valid = finite & is_distribution(a) & is_distribution(b)
    return PreparedProblem(cost, a, b, reduced, unit, k, valid)


def _masses(given: Array | None, size: int, cost: Array) -> Float[Array, " n"]:
    """Returns masses in the precision of the cost, uniform ones for None."""
    if given is None:
        return jnp.full(size, 1 / size, cost.dtype)
    return given.astype(cost.dtype)


def standardised(
    x: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """Takes values less their minimum, and their standard deviation.

    Args:
        x: The values, of any shape, finite.

    Returns:
        The values less their minimum, which counts as a constant without gradient; and their
        deviation, 1 if that is 0.
    """
    least = lax.stop_gradient(jnp.min(x))
    reduced = x - least
    # The deviation does not depend on the division: it keeps squares in range.
    largest = lax.stop_gradient(jnp.max(reduced))
    largest = jnp.where(largest > 0, largest, 1)
    variance = jnp.var(reduced / largest)
    # Of equal values: the square root of 0 would have an infinite gradient.
    variance = jnp.where(variance > 0, variance, 1)
    return reduced, largest * jnp.sqrt(variance)
