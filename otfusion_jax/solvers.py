"""From a cost matrix to a transport plan: what a solver is, and the exact one.

A solver is a frozen, hashable dataclass, hence static under `jax.jit`; its `solve` is a pure
function of arrays that `jax.jit` and `jax.vmap` accept. The answer is always a `Solution`: the
plan, its value, and evidence of how good it is. The total mass is 1, so the value of a permutation
is the *mean* of the costs that it picks.
"""

import abc
import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from otfusion_jax.assignment import assign, assign_copies
from otfusion_jax.checks import require_number
from otfusion_jax.scaling import exponent, restored, scaled
from otfusion_jax.simplex import network_simplex, require_pot


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


@dataclass(frozen=True)
class AbstractSolver(abc.ABC):
    """Turns a cost into a plan. Subclasses are frozen dataclasses of hashable settings.

    Attributes:
        quadratic: whether `solve` needs the costs `within` each model; of the class, not a setting.
    """

    quadratic: ClassVar[bool] = False

    @property
    def scale_free(self) -> bool:
        """Whether scaling the costs scales value and gap, and leaves the plan as it is.

        Then weights whose squares are out of range are scaled before they are compared.
        """
        return False

    @abc.abstractmethod
    def solve(
        self,
        cost: Float[Array, "n m"],
        a: Float[Array, " n"] | None = None,
        b: Float[Array, " m"] | None = None,
        within: tuple[Float[Array, "n n"], Float[Array, "m m"]] | None = None,
    ) -> Solution:
        """Finds a plan of low cost.

        Args:
            cost: `cost[i, j]`, what it costs to match source unit `i` with target unit `j`; finite.
                float64 is solved in float64, everything narrower in float32.
            a: masses of the source units, at least 0, summing to 1; None means uniform.
            b: masses of the target units, likewise.
            within: what it would cost to match two units of the source, and two of the target;
                finite. Only quadratic solvers look at them.

        Returns:
            The solution. For traced input that is not valid, nothing can be raised: `converged` is
            False, `value` and `gap` are NaN, and the plan is unusable on purpose (see the class).

        Raises:
            ValueError: for shapes or marginals that the solver cannot handle, for costs that are
                known (not traced) and not finite, and for a quadratic solver without `within`.
        """


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

    def solve(
        self,
        cost: Float[Array, "n m"],
        a: Float[Array, " n"] | None = None,
        b: Float[Array, " m"] | None = None,
        within: tuple[Float[Array, "n n"], Float[Array, "m m"]] | None = None,
    ) -> Solution:
        """See `AbstractSolver.solve`.

        Raises:
            ValueError: for a marginal of the wrong shape, for a cost that is known not to be
                finite, and for a marginal that is known to be no distribution.
            ImportError: where it takes the linear program and POT is not installed.
        """
        check_problem(cost, a, b)
        if a is not None or b is not None or not _divides(*cost.shape):
            require_pot()
        return _solve_exact(self, cost, a, b)


def check_problem(cost: Array, a: Array | None, b: Array | None) -> None:
    """Refuses a cost and masses that do not fit, as far as that can be known.

    Args:
        cost: of one problem, `[n, m]`.
        a: masses of the source units, `[n]`; None means uniform.
        b: masses of the target units, `[m]`, likewise.

    Raises:
        ValueError: for another rank, for costs that are known not to be finite, for marginals of
            another shape, and for those that are known to be no distribution.
    """
    check_cost(cost)
    check_marginal("a", a, cost.shape[0])
    check_marginal("b", b, cost.shape[1])


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


def _divides(n: int, m: int) -> bool:
    """Whether one size is a multiple of the other."""
    return min(n, m) == 0 or max(n, m) % min(n, m) == 0


@functools.partial(jax.jit, static_argnums=0)
def _solve_exact(
    solver: Exact,
    cost: Float[Array, "n m"],
    a: Float[Array, " n"] | None,
    b: Float[Array, " m"] | None,
) -> Solution:
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
