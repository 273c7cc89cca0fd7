"""The transport linear program, solved on the host by POT's network simplex."""

import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from otfusion_jax.common.host import Array, array_module
from otfusion_jax.solvers.duality import plan_gap

# POT stops a thousand units short by default. Pivots are counted here, each takes microseconds.
_MAX_PIVOTS = 100_000_000


def require_pot() -> None:
    """Imports POT, which is optional, before it is needed.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # POT looks for every array library there is
            import ot.lp  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Exact solves a transport linear program where marginals are given or neither size "
            "divides the other, by POT, which is not installed. Install it, pip install "
            "otfusion-jax[lp], or use Sinkhorn()."
        ) from error


def network_simplex(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """Finds the transport plan of lowest cost.

    Args:
        cost: The cost, finite.
        a: The masses of the rows, at least 0, with a sum of about 1.
        b: The masses of the columns, at least 0, with a sum of about 1. What is between the two
            sums is rounding, and goes.

    Returns:
        The plan, of mass 1; and its duality gap, at least 0, in units of the cost.

    Raises:
        ImportError: If POT is not installed.
    """
    require_pot()
    if array_module(cost) is np:
        solved: Any = _solve_on_host(cost, a, b)
        plan, v = solved
        return plan, plan_gap(plan, cost, v)
    plan_form = jax.ShapeDtypeStruct(cost.shape, cost.dtype)
    potentials_form = jax.ShapeDtypeStruct(b.shape, cost.dtype)
    plan, v = jax.pure_callback(
        _solve_on_host, (plan_form, potentials_form), cost, a, b, vmap_method="sequential"
    )
    return plan, plan_gap(plan, cost, v)


def _solve_on_host(cost: Array, a: Array, b: Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the plan and column potentials, solved in float64 and rounded to the cost's type."""
    from ot.lp import emd

    rows = np.asarray(a, np.float64)
    columns = np.asarray(b, np.float64)
    # POT refuses masses with different sums.
    rows = rows / np.sum(rows)
    columns = columns / np.sum(columns)

    # Whatever POT's tolerances are relative to, they suit costs between 0 and 1.
    values = np.asarray(cost, np.float64)
    values = values - np.min(values)
    largest = np.max(values) or 1.0
    values = values / largest
    plan, log = emd(rows, columns, values, numItermax=_MAX_PIVOTS, log=True)

    # A column without mass may have any potential, and must not restrict those of the rows.
    held = rows > 0
    u = log["u"][held]
    remaining = values[held] - u[:, None]
    bound = np.min(remaining, axis=0)
    v = np.where(columns > 0, log["v"], bound)
    v = largest * v
    return plan.astype(cost.dtype), v.astype(cost.dtype)
