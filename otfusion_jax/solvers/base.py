"""From a cost matrix to a transport plan: what a solver is, and the exact one.

A solver is a frozen, hashable dataclass, hence static under `jax.jit`; its `solve` is a pure
function of arrays that `jax.jit` and `jax.vmap` accept. The answer is always a `Solution`: the
plan, its value, and evidence of how good it is. The total mass is 1, so the value of a permutation
is the *mean* of the costs that it picks.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        plan: int32 `[n]`, a permutation (`plan[j]` is the row, the source unit, that lands at
            column, target position, `j`), or float `[n, m]`, a transport plan of total mass 1 with
            source units as rows.
        value: float `[]`, `<P, C>` in the units of the cost; of a quadratic solver, its objective.
        converged: bool `[]`, whether the solver reached its tolerance; False for invalid input.
        gap: float `[]`, at least 0, in the units of `value`: up to rounding, the plan costs at most
            this much more than an optimal transport plan with *its own* marginals, which are those
            asked for as far as the solver keeps them. The difference to a feasible point of the
            dual linear program. Carries no gradient.
    """

    plan: Array
    value: Array
    converged: Array
    gap: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransportProblem:
    """What a solver solves: how to move the mass of source units to target units at the least cost.

    Attributes:
        cost: float `[n, m]`, finite: `cost[i, j]` is what it costs to match source unit `i` with
            target unit `j`. float64 is solved in float64, everything narrower in float32.
        a: masses of the source units, float `[n]`, at least 0 and summing to 1; None means uniform.
        b: masses of the target units, float `[m]`, likewise.
        intra: intra-domain costs, float `[n, n]` and `[m, m]`, finite: what it would cost to match
            two units of the source, and two of the target. Quadratic solvers need them, and all
            others ignore them.
    """

    cost: Float[Array, "n m"]
    a: Float[Array, " n"] | None = None
    b: Float[Array, " m"] | None = None
    intra: tuple[Float[Array, "n n"], Float[Array, "m m"]] | None = None


@dataclass(frozen=True)
class AbstractSolver(abc.ABC):
    """Turns a cost into a plan. Subclasses are frozen dataclasses of hashable settings.

    Attributes:
        quadratic: whether `solve` needs the intra-domain costs of the problem. It belongs to the
            class and is no setting.
    """

    quadratic: ClassVar[bool] = False

    @property
    def scale_free(self) -> bool:
        """Whether scaling the costs scales value and gap, and leaves the plan as it is.

        Then weights whose squares are out of range are scaled before they are compared.
        """
        return False

    @abc.abstractmethod
    def solve(self, problem: TransportProblem) -> Solution:
        """Finds a plan of low cost.

        Args:
            problem: the cost, the masses of the units where these are not uniform, and, for a
                quadratic solver, the intra-domain costs.

        Returns:
            The solution. For traced input that is not valid, nothing can be raised: `converged` is
            False, `value` and `gap` are NaN, and the plan is unusable on purpose (see the class).

        Raises:
            ValueError: for shapes or marginals that the solver cannot handle, for costs that are
                known (not traced) and not finite, and for a quadratic solver without `intra`.
        """


def check_problem(problem: TransportProblem) -> None:
    """Refuses a cost and masses that do not fit, as far as that can be known.

    Args:
        problem: a single problem, not a stack of them.

    Raises:
        TypeError: for a bare cost in place of a problem.
        ValueError: for another rank, for costs that are known not to be finite, for marginals of
            another shape, and for those that are known to be no distribution.
    """
    if not isinstance(problem, TransportProblem):
        raise TypeError(
            f"a {type(problem).__name__} was given where a problem is wanted: call "
            "solver.solve(TransportProblem(cost)), with masses and intra-domain costs if need be"
        )
    check_cost(problem.cost)
    check_marginal("a", problem.a, problem.cost.shape[0])
    check_marginal("b", problem.b, problem.cost.shape[1])


def check_cost(cost: Array) -> None:
    """Refuses what is no finite matrix, as far as that can be known.

    Args:
        cost: of one problem.

    Raises:
        ValueError: for another rank, and for costs that are known not to be finite.
    """
    if cost.ndim != 2:
        raise ValueError(
            f"A cost is a matrix, got shape {cost.shape}. For a stack of them, jax.vmap the solver."
        )
    if isinstance(cost, Tracer):
        return
    bad = np.argwhere(~np.isfinite(np.asarray(cost, np.float64)))
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"{len(bad)} of {cost.size} costs are not finite, the first at row {i}, column {j}: "
            f"{cost[i, j]}. Look for NaN or overflow in the parameters that the cost is made from."
        )


def check_marginal(name: str, masses: Array | None, size: int) -> None:
    """Refuses masses that do not fit, as far as that can be known.

    Args:
        name: for the message.
        masses: of the units; None means uniform.
        size: how many units there are.

    Raises:
        ValueError: for another shape, and for masses that are known to be no distribution.
    """
    if masses is None:
        return
    if masses.shape != (size,):
        raise ValueError(
            f"Marginal {name} has shape {masses.shape}, but the cost has {size} units on that "
            "side. Give one mass for each, or None for uniform masses."
        )
    if isinstance(masses, Tracer):
        return
    with jax.ensure_compile_time_eval():  # it may be closed over by what is traced
        if not is_distribution(masses):
            raise ValueError(
                f"Marginal {name} is no distribution: its sum is {jnp.sum(masses)}, its minimum "
                f"{jnp.min(masses)}. Masses are at least 0 and sum to 1: divide by their sum."
            )


def is_distribution(masses: Float[Array, "*batch n"]) -> Bool[Array, ""]:
    """Says whether masses are at least 0 and sum to 1.

    Args:
        masses: of the units, or a batch of such.

    Returns:
        bool `[]`, for all together; False for NaN.
    """
    return jnp.all(masses >= 0) & jnp.all(jnp.abs(jnp.sum(masses, axis=-1) - 1) < 1e-3)


def working_dtype(x: Array):
    """Says in what precision to solve for input of some precision.

    Args:
        x: the input.

    Returns:
        float64 for float64, float32 for everything narrower.
    """
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def nothing_to_match(cost: Array, plan: Array | None = None) -> Solution:
    """Solves a problem with no units on a side.

    Args:
        cost: `[n, m]`, empty.
        plan: of another form than a transport plan `[n, m]`.

    Returns:
        The solution, of value 0.
    """
    dtype = working_dtype(cost)
    plan = jnp.zeros(cost.shape, dtype) if plan is None else plan
    zero = jnp.zeros((), dtype)
    return Solution(plan, zero, jnp.array(True), zero)
