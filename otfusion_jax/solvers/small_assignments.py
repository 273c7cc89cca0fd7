"""Small assignments of known costs, many at once, by NumPy.

Every pair of heads of a transformer is an assignment of its own, and a network of a hundred blocks
has thousands. To call NumPy takes longer than what it computes for one of them, so that all of them
are gone over together: what comes before SciPy's solver, and the certificate of what it finds.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from otfusion_jax.common.scaling import exponent, largest_magnitude, restored, scaled
from otfusion_jax.solvers.base import Solution, working_dtype
from otfusion_jax.solvers.duality import feasible_potentials

FEW_UNITS = 128
"""Up to how many units SciPy's solver needs no help: larger costs are shifted before."""

_ENTRIES_AT_ONCE = 2**20
"""How many costs are gone over together: what is computed of them takes some megabytes."""


def solve_small(costs: Float[np.ndarray, "k n n"], tolerance: float) -> Solution:
    """Finds the permutations of lowest cost of several problems.

    Args:
        costs: The costs, arrays of NumPy, of at least one unit.
        tolerance: See `Exact`.

    Returns:
        The solutions, with k in front of every array, each as `Exact` defines it.
    """
    costs = np.asarray(costs, working_dtype(costs))
    at_once = max(_ENTRIES_AT_ONCE // costs[0].size, 1)
    found = []
    for start in range(0, len(costs), at_once):
        found.append(_solve(costs[start : start + at_once], tolerance))
    if len(found) == 1:
        return found[0]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def _solve(costs: Float[np.ndarray, "k n n"], tolerance: float) -> Solution:
    """Solves as many as fit into a few megabytes."""
    n = costs.shape[-1]
    given: Any = costs
    finite: Any = np.isfinite(largest_magnitude(given, axis=(1, 2)))
    k = exponent(given, axis=(1, 2))
    safe: Any = scaled(given, -k[:, None, None])
    if not finite.all():
        # Costs that are not finite stand for others, whose solution is thrown away.
        safe = np.where(finite[:, None, None], safe, 1 - np.eye(n, dtype=costs.dtype))
    plans, gaps = assign_small(safe)
    matched = np.take_along_axis(costs, plans[:, None, :], axis=1)[:, 0]
    # Divided first: the sum may be out of range where the mean is not.
    values = np.sum(matched / n, axis=-1)
    spread = np.max(safe, axis=(1, 2)) - np.min(safe, axis=(1, 2))
    within_tolerance = gaps <= tolerance * spread + _rounding(safe)
    solution: Any = (
        np.where(finite[:, None], plans, n).astype(np.int32),
        np.where(finite, values, np.nan).astype(costs.dtype),
        finite & within_tolerance,
        np.where(finite, restored(gaps, k), np.nan).astype(costs.dtype),
    )
    return Solution(*solution)


def _rounding(costs: Float[np.ndarray, "k n n"]) -> Float[np.ndarray, " k"]:
    """Says for each problem how much sums of its costs are rounded."""
    given: Any = costs
    largest: Any = largest_magnitude(given, axis=(1, 2))
    return 8 * np.finfo(costs.dtype).eps * largest


def assign_small(
    costs: Float[np.ndarray, "k n n"],
) -> tuple[Int[np.ndarray, "k n"], Float[np.ndarray, " k"]]:
    """Finds the permutations of lowest cost of several problems.

    Args:
        costs: The costs, finite arrays of NumPy.

    Returns:
        The permutations, int32, and their duality gaps, as `assign` returns them.
    """
    n = costs.shape[-1]
    # Subtracting one after the other loses no digits to a large common offset.
    reduced = costs - np.min(costs, axis=2, keepdims=True)
    reduced -= np.min(reduced, axis=1, keepdims=True)
    cheapest = np.argmin(reduced, axis=2)
    plans = np.argsort(cheapest, axis=1).astype(np.int32)
    # Where every row is the cheapest at a column of its own, nothing is left to solve or to bound.
    is_solved = (np.take_along_axis(cheapest, plans, axis=1) == np.arange(n)).all(axis=1)
    gaps = np.zeros(len(costs), costs.dtype)
    hard = np.flatnonzero(~is_solved)
    if hard.size:
        left = reduced[hard]
        largest = np.max(left, axis=(1, 2))
        for number, cost in zip(hard, with_tiebreaks(left, largest), strict=True):
            _, columns = linear_sum_assignment(cost)
            plans[number] = np.argsort(columns)
        # With its rows in the order of the plan, the cost of the plan is the diagonal.
        gaps[hard] = _identity_gaps(np.take_along_axis(left, plans[hard][:, :, None], axis=1))
    return plans, gaps


def with_tiebreaks(
    costs: Float[np.ndarray, "k n n"], largest: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "k n n"]:
    """Adds to all but the diagonal what is as small as rounding errors: equal units stay.

    Args:
        costs: The costs, arrays of NumPy.
        largest: The largest of each before any shift, which says how its entries are rounded.

    Returns:
        The costs in float64, in which SciPy's solver works: it would copy what is narrower.
    """
    rounding = 4 * np.finfo(costs.dtype).eps * np.where(largest > 0, largest, 1)
    apart = np.add(costs, rounding[:, None, None], dtype=np.float64)
    units = np.arange(costs.shape[-1])
    apart[:, units, units] = costs[:, units, units]
    return apart


def _identity_gaps(costs: Float[np.ndarray, "k n n"]) -> Float[np.ndarray, " k"]:
    """Bounds how much the identity costs more than the best permutation, see `identity_gap`."""
    matched = np.diagonal(costs, axis1=1, axis2=2)
    residual = costs - matched[:, :, None]
    rounding = _rounding(costs)
    v = np.zeros(matched.shape, costs.dtype)
    unfinished = np.ones(len(costs), bool)
    for _ in range(costs.shape[-1]):
        shorter = np.minimum(v, np.min(v[:, :, None] + residual, axis=1))
        taken_off = np.max(v - shorter, axis=1)
        v = np.where(unfinished[:, None], shorter, v)
        unfinished &= taken_off > rounding
        if not unfinished.any():
            break
    potentials: Any = costs, v
    u, w = feasible_potentials(*potentials)
    return np.mean((matched - u) - w, axis=1)
