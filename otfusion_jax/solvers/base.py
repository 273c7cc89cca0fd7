"""What a solver is: the problem that it takes, the solution that it gives, the checks in between.

A solver is a frozen, hashable dataclass of settings, hence static under `jax.jit`. Its `solve` is a
pure function from a `TransportProblem` to a `Solution` that `jax.jit` and `jax.vmap` accept. It
refuses what cannot be solved, as far as that can be known, and leaves the rest to `compute`, which
is all that a subclass implements. A `Solution` is the plan, its value, and evidence of how good it
is. The total mass is 1, so the value of a permutation is the *mean* of the costs that it picks.
"""

import abc
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.host import Array, array_module, as_jax
from otfusion_jax.common.typing import HasDtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransportProblem:
    """What a solver solves: how to move the mass of source units to target units at the least cost.

    Attributes:
        cost: The ground cost, float `[n, m]`, finite: `cost[i, j]` is what it costs to match source
            unit `i` with target unit `j`. float64 is solved in float64, everything narrower in
            float32.
        a: The masses of the source units, float `[n]`, at least 0 and summing to 1. None means
            uniform masses.
        b: The masses of the target units, float `[m]`, at least 0 and summing to 1. None means
            uniform masses.
        intra: The intra-domain costs of the source and of the target, a pair of floats `[n, n]` and
            `[m, m]`, finite: what it would cost to match two units of the source, and two of the
            target. Quadratic solvers need them, and all others ignore them.
    """

    cost: Float[Array, "n m"]
    a: Float[Array, " n"] | None = None
    b: Float[Array, " m"] | None = None
    intra: tuple[Float[Array, "n n"], Float[Array, "m m"]] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        plan: The plan: int32 `[n]`, a permutation (`plan[j]` is the row, the source unit, that
            lands at column, target position, `j`), or float `[n, m]`, a transport plan of total
            mass 1 with source units as rows.
        value: What the plan costs, float `[]`: `<P, C>` in the units of the cost; of a quadratic
            solver, its objective.
        converged: Whether the solver reached its tolerance, bool `[]`. False for invalid input.
        gap: How much more the plan costs than an optimal one, at most and up to rounding, float
            `[]`, at least 0, in the units of `value`. The optimal plan that is meant has the same
            marginals as *this* plan, which are those asked for as far as the solver keeps them. The
            gap is the difference to a feasible point of the dual linear program. It carries no
            gradient.
    """

    plan: Array
    value: Array
    converged: Array
    gap: Array


@dataclass(frozen=True)
class AbstractSolver(abc.ABC):
    """Turns a transport problem into a plan.

    To write a solver, make a frozen dataclass of hashable settings that implements `compute`. Here
    is one that spreads the mass of each unit evenly over all others; no plan costs less than the
    lowest cost, so the gap is an upper bound:

        @dataclasses.dataclass(frozen=True)
        class Even(otf.AbstractSolver):
            def compute(self, problem):
                plan = jnp.full_like(problem.cost, 1 / problem.cost.size)
                value = jnp.mean(problem.cost)
                gap = value - jnp.min(problem.cost)
                return otf.Solution(plan, value, jnp.array(True), gap)

        plans = otf.align(symmetry, a, b, solver=Even())

    Attributes:
        quadratic: Whether the solver needs the intra-domain costs of a problem. A property of the
            class, no setting.
        takes_numpy: Whether `compute` also takes arrays of NumPy, and then returns such: known
            costs on a CPU are solved without a program that would have to be compiled. A property
            of the class, no setting.
    """

    quadratic: ClassVar[bool] = False
    takes_numpy: ClassVar[bool] = False

    @property
    def scale_free(self) -> bool:
        """Whether scaling the costs scales value and gap, and leaves the plan as it is.

        Then weights whose squares are out of range are scaled before they are compared.
        """
        return False

    @final
    def solve(self, problem: TransportProblem | Float[Array, "n m"]) -> Solution:
        """Finds a plan of low cost.

        Args:
            problem: The cost, the masses of the units where these are not uniform, and, for a
                quadratic solver, the intra-domain costs. A cost alone, float `[n, m]`, stands for
                the problem with uniform masses.

        Returns:
            The solution. For traced input that is not valid, nothing can be raised: `converged` is
            False, `value` and `gap` are NaN, and the plan is unusable on purpose (see the class).

        Raises:
            TypeError: For what is neither a problem nor a cost, for what is no array, and for a
                `compute` that returns no `Solution`.
            ValueError: For shapes that do not fit, for costs that are complex, or known (not
                traced) and not finite, for masses that are known to be no distribution, and for a
                quadratic solver without `intra`.
            ImportError: For `Exact`, where it takes a linear program and POT is not installed.
        """
        if isinstance(problem, jax.Array):
            problem = TransportProblem(problem)
        check_problem(problem)
        if self.quadratic:
            check_intra(problem)
        # ott and optax rely on implicit promotion, which their users may have switched off.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            solution: object = self.compute(as_jax(problem))
        if not isinstance(solution, Solution):
            raise TypeError(
                f"{type(self).__name__}.compute returned {kind_of(solution)}; it must return a "
                "Solution(plan, value, converged, gap)"
            )
        return solution

    def form(self, problem: TransportProblem) -> Solution:
        """Says of what form the solution of a problem is, without solving it.

        Args:
            problem: A problem of `jax.ShapeDtypeStruct`s in the place of arrays.

        Returns:
            The solution, likewise.
        """
        shapes, treedef = jax.tree.flatten(problem)
        return _form_of_solution(self, tuple(shapes), treedef)

    @abc.abstractmethod
    def compute(self, problem: TransportProblem) -> Solution:
        """Finds a plan for a problem that `solve` has checked. This is what a solver implements.

        Args:
            problem: A problem whose shapes fit. Its values may be traced, and are then unchecked.

        Returns:
            The solution, with arrays of the dtypes and shapes that `Solution` says, also for sides
            without units.
        """


@functools.lru_cache(maxsize=1024)
def _form_of_solution(
    solver: AbstractSolver, shapes: tuple[jax.ShapeDtypeStruct, ...], treedef: Any
) -> Solution:
    # Most groups of a deep network are of a few sizes, and to trace a solver takes a while.
    return jax.eval_shape(solver.solve, treedef.unflatten(shapes))


def check_problem(problem: object) -> None:
    """Refuses what is no problem, and a cost and masses that do not fit, as far as can be known.

    Args:
        problem: What was given: a single problem, not a stack of them.

    Raises:
        TypeError: For what is no problem, and for what is no array.
        ValueError: For a cost of another rank, for costs that are complex or known not to be
            finite, for masses of another shape, and for those that are known to be no distribution.
    """
    if not isinstance(problem, TransportProblem):
        raise TypeError(
            f"{kind_of(problem)} was given where a problem is wanted: call "
            "solver.solve(TransportProblem(cost)), with masses and intra-domain costs if need be"
        )
    _require_array("the cost", problem.cost)
    _check_cost(problem.cost)
    n, m = problem.cost.shape
    sides = [("a", problem.a, n), ("b", problem.b, m)]
    for name, masses, size in sides:
        if masses is not None:
            _require_array(f"marginal {name}", masses)
            _check_marginal(name, masses, size)


def check_intra(problem: TransportProblem) -> None:
    """Refuses a problem without the intra-domain costs that a quadratic solver needs.

    Args:
        problem: A problem that `check_problem` has accepted.

    Raises:
        TypeError: For what is no pair of arrays.
        ValueError: For a problem without them, for shapes that do not fit, and for costs that are
            known not to be finite.
    """
    n, m = problem.cost.shape
    if problem.intra is None:
        raise ValueError(
            "A quadratic solver compares what units of one model cost each other: it needs "
            f"intra=(source, target), of shapes {(n, n)} and {(m, m)}."
        )
    is_sequence = isinstance(problem.intra, tuple | list)
    if not is_sequence or len(problem.intra) != 2:
        raise TypeError(
            f"intra is {kind_of(problem.intra)}; pass a pair (source, target) of matrices, "
            f"of shapes {(n, n)} and {(m, m)}"
        )
    source, target = problem.intra
    sides = [("source", source, n), ("target", target, m)]
    for side, cost, size in sides:
        _require_array(f"the intra-domain cost of the {side}", cost)
        if cost.shape != (size, size):
            raise ValueError(
                f"The costs within the {side} have shape {cost.shape}, but there are {size} units."
            )
        _check_cost(cost)


def _require_array(name: str, value: object) -> None:
    """Refuses lists, numbers and whatever else has no shape, before one is asked for."""
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} is {kind_of(value)}; pass an array, as in jnp.asarray(x)")


def _check_cost(cost: Array) -> None:
    """Refuses what is no matrix of real numbers, and costs that are known not to be finite."""
    if cost.ndim != 2:
        raise ValueError(
            f"A cost is a matrix, got shape {cost.shape}. For a stack of them, jax.vmap the solver."
        )
    if jnp.issubdtype(cost.dtype, jnp.complexfloating):
        raise ValueError(
            f"costs are real numbers, got {cost.dtype}; pass jnp.abs(cost) or cost.real"
        )
    # A traced cost has no values yet; those that are not finite show in the solution.
    if isinstance(cost, Tracer):
        return
    values = np.asarray(cost, np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        i, j = bad[0].tolist()
        raise ValueError(
            f"{len(bad)} of {cost.size} costs are not finite, the first at row {i}, column {j}: "
            f"{cost[i, j]}. Look for NaN or overflow in the parameters that the cost is made from."
        )


def _check_marginal(name: str, masses: Array, size: int) -> None:
    """Refuses masses of another shape, and those that are known to be no distribution."""
    if masses.shape != (size,):
        raise ValueError(
            f"Marginal {name} has shape {masses.shape}, but the cost has {size} units on that "
            "side. Give one mass for each, or None for uniform masses."
        )
    if isinstance(masses, Tracer):
        return
    # Known masses may be closed over by a function that is traced: they are still to be looked at.
    with jax.ensure_compile_time_eval():
        if not is_distribution(masses):
            raise ValueError(
                f"Marginal {name} is no distribution: its sum is {jnp.sum(masses)}, its minimum "
                f"{jnp.min(masses)}. Masses are at least 0 and sum to 1: divide by their sum."
            )


def is_distribution(masses: Float[Array, "*batch n"]) -> Bool[Array, ""]:
    """Says whether masses are at least 0 and sum to 1.

    Args:
        masses: The masses of the units, with any batch axes in front.

    Returns:
        One bool `[]` for all of the batch together; False where there is NaN.
    """
    xp = array_module(masses)
    not_negative = xp.all(masses >= 0)
    totals = xp.sum(masses, axis=-1)
    # Sums of many masses, perhaps in half precision, are off by more than a rounding error.
    sums_to_1 = xp.all(abs(totals - 1) < 1e-3)
    return not_negative & sums_to_1


def working_dtype(x: HasDtype) -> DTypeLike:
    """Says in what precision to solve for input of some precision.

    Args:
        x: The input, of any dtype, or the form of it.

    Returns:
        float64 for float64, float32 for everything narrower.
    """
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def empty_solution(cost: Array, plan: Array | None = None) -> Solution:
    """Makes the solution of a problem with no units on a side.

    Args:
        cost: The cost `[n, m]`, with n or m equal to 0.
        plan: The plan, where it is of another form than a transport plan `[n, m]`.

    Returns:
        The solution, of value and gap 0.
    """
    dtype = working_dtype(cost)
    xp = array_module(cost)
    zeros = xp.zeros(cost.shape, dtype)
    zero = xp.zeros((), dtype)
    converged = xp.asarray(True)
    return Solution(zeros if plan is None else plan, value=zero, converged=converged, gap=zero)
