"""Transport problems for the tests of the solvers, and POT to compare with."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # POT looks for every array library there is
    import ot

__all__ = ["as_cost", "marginals", "masses", "optimum", "ot", "squared_distances"]


def squared_distances(n: int, m: int, seed: int, d: int = 8) -> np.ndarray:
    """Between two clouds of Gaussian points."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 1, d)), rng.normal(size=(1, m, d))
    return np.sum((x - y) ** 2, axis=-1)


def masses(n: int, seed: int) -> np.ndarray:
    """Of n units, none of them tiny, with sum 1."""
    return np.random.default_rng(seed).dirichlet(np.full(n, 3.0))


def as_cost(values, dtype=jnp.float32) -> Array:
    return jnp.asarray(np.asarray(values), dtype)


def marginals(plan: jax.typing.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Masses of the rows and of the columns, summed up in float64."""
    exact = np.asarray(plan, np.float64)
    return exact.sum(1), exact.sum(0)


def optimum(cost, a, b) -> float:
    """The lowest cost of a plan with these marginals; None means uniform."""
    cost = np.asarray(cost, np.float64)
    n, m = cost.shape
    a = np.full(n, 1 / n) if a is None else np.asarray(a, np.float64)
    b = np.full(m, 1 / m) if b is None else np.asarray(b, np.float64)
    return float(np.sum(cost * ot.emd(a / a.sum(), b / b.sum(), cost)))
