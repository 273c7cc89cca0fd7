"""Transport problems for the tests of the solvers, and POT and SciPy to compare with."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from scipy.optimize import linear_sum_assignment

import otfusion_jax as otf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # POT looks for every array library there is
    import ot

__all__ = [
    "COST",
    "INTRA",
    "M",
    "MASSES_A",
    "MASSES_B",
    "N",
    "as_cost",
    "best_match",
    "cost_of_match",
    "marginals",
    "masses",
    "optimum",
    "ot",
    "problem",
    "solve_example",
    "squared_distances",
]


def squared_distances(n: int, m: int, seed: int, d: int = 8) -> np.ndarray:
    """Squared distances between two clouds of Gaussian points."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 1, d))
    y = rng.normal(size=(1, m, d))
    return np.sum((x - y) ** 2, axis=-1)


def masses(n: int, seed: int) -> np.ndarray:
    """Masses of n units, none of them tiny, with sum 1."""
    return np.random.default_rng(seed).dirichlet(np.full(n, 3.0))


def as_cost(values: ArrayLike, dtype=jnp.float32) -> Array:
    """Converts in one step: what is float64 in between would warn."""
    return jnp.asarray(np.asarray(values), dtype)


def problem(
    cost: ArrayLike,
    a: ArrayLike | None = None,
    b: ArrayLike | None = None,
    intra: tuple[ArrayLike, ArrayLike] | None = None,
    dtype=jnp.float32,
) -> otf.TransportProblem:
    """A problem of known values, all in one precision."""

    def converted(values: ArrayLike | None) -> Array | None:
        return None if values is None else as_cost(values, dtype)

    pair = None
    if intra is not None:
        source, target = intra
        pair = as_cost(source, dtype), as_cost(target, dtype)
    return otf.TransportProblem(as_cost(cost, dtype), converted(a), converted(b), pair)


# One problem with everything in it, small enough for POT's dense Gromov-Wasserstein.
N, M = 8, 6
COST = squared_distances(N, M, 0)
MASSES_A = masses(N, 0)
MASSES_B = masses(M, 1)


def symmetric_distances(n: int, seed: int) -> np.ndarray:
    squares = squared_distances(n, n, seed)
    return (squares + squares.T) ** 0.5


INTRA = symmetric_distances(N, 1), symmetric_distances(M, 2)


def solve_example(
    solver: otf.AbstractSolver,
    cost: ArrayLike = COST,
    a: ArrayLike = MASSES_A,
    b: ArrayLike = MASSES_B,
    intra: tuple[ArrayLike, ArrayLike] = INTRA,
) -> otf.Solution:
    """Solves the one problem, parts of it exchanged, in float32."""
    return solver.solve(problem(cost, a, b, intra if solver.quadratic else None))


def marginals(plan: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Masses of the rows and of the columns, summed up in float64."""
    exact = np.asarray(plan, np.float64)
    return exact.sum(1), exact.sum(0)


def optimum(cost: ArrayLike, a: ArrayLike | None, b: ArrayLike | None) -> float:
    """The lowest cost of a plan with these marginals, by POT; None means uniform."""
    exact = np.asarray(cost, np.float64)
    n, m = exact.shape
    rows = np.full(n, 1 / n) if a is None else np.asarray(a, np.float64)
    columns = np.full(m, 1 / m) if b is None else np.asarray(b, np.float64)
    plan = ot.emd(rows / rows.sum(), columns / columns.sum(), exact)
    return float(np.sum(exact * plan))


def best_match(cost: ArrayLike) -> float:
    """The mean cost of an optimal assignment, by SciPy in float64."""
    exact = np.asarray(cost, np.float64)
    if exact.size == 0:
        return 0.0
    return exact[linear_sum_assignment(exact)].mean()


def cost_of_match(cost: ArrayLike, permutation: jax.Array | np.ndarray) -> float:
    """The mean cost of a match, in float64."""
    exact = np.asarray(cost, np.float64)
    columns = np.arange(len(permutation))
    return exact[np.asarray(permutation), columns].mean()
