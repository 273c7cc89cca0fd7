"""The transport linear program, solved on the host by POT's network simplex."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from otfusion_jax.solvers.assignment import slack

# POT stops a thousand units short by default. Pivots are counted here, each takes microseconds.
_MAX_PIVOTS = 100_000_000


def require_pot() -> None:
    """Imports POT, which is optional, before it is needed.

    Raises:
        ImportError: if it is not there.
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
    cost: Float[Array, "n m"], a: Float[Array, " n"], b: Float[Array, " m"]
) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """Finds the transport plan of lowest cost.

    Args:
        cost: finite.
        a: masses of the rows, at least 0, with a sum of about 1.
        b: masses of the columns, likewise. What is between the sums is rounding, and goes.

    Returns:
        The plan, of mass 1; and its duality gap, at least 0, in units of the cost.
    """
    shapes = jax.ShapeDtypeStruct(cost.shape, cost.dtype), jax.ShapeDtypeStruct(b.shape, cost.dtype)
    plan, v = jax.pure_callback(_solve, shapes, cost, a, b, vmap_method="sequential")
    return plan, jnp.sum(plan * slack(cost, v))


def _solve(cost: Array, a: Array, b: Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the plan and column potentials, solved in float64 and rounded to the cost's type."""
    from ot.lp import emd

    values, rows, columns = (np.asarray(x, np.float64) for x in (cost, a, b))
    rows, columns = rows / np.sum(rows), columns / np.sum(columns)
    values = values - np.min(values)
    largest = np.max(values) or 1.0
    values = values / largest
    plan, found = emd(rows, columns, values, numItermax=_MAX_PIVOTS, log=True)
    # A column without mass may have any potential, and must not restrict those of the rows.
    held = rows > 0
    bound = np.min(values[held] - found["u"][held, None], axis=0)
    v = largest * np.where(columns > 0, found["v"], bound)
    return plan.astype(cost.dtype), v.astype(cost.dtype)
