"""The exact assignment: ott's solver, made fast by a shift of the cost and certified by duals."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from ott.geometry import geometry
from ott.tools import unreg

# Annealing of the preconditioner of `Exact`: regularisation in units of the mean reduced cost.
_ANNEAL_FROM, _ANNEAL_TO, _ANNEAL_LEVELS, _SCALINGS_PER_LEVEL = 0.2, 0.003, 6, 10
# Of a column, in units of a row's: below it, scalings would overflow.
_LEAST_MASS = 1e-30


def assign(cost: Float[Array, "n n"]) -> tuple[Int[Array, " n"], Float[Array, ""]]:
    """Finds the permutation of lowest cost.

    Args:
        cost: finite.

    Returns:
        The permutation, int32 `[n]`: position `j` receives row `plan[j]`; and its duality gap, at
        least 0, in units of the mean cost of a match.
    """
    n = len(cost)
    # Subtracting one after the other loses no digits to a large common offset.
    reduced = cost - jnp.min(cost, axis=1, keepdims=True)
    reduced = reduced - jnp.min(reduced, axis=0, keepdims=True)
    shifted = _precondition(reduced)
    geom = geometry.Geometry(cost_matrix=shifted + _tiebreak(reduced))
    # With 64-bit types switched on, optax relies on promotion, which users may have switched off.
    with jax.numpy_dtype_promotion("standard"):
        rows, columns = unreg.hungarian(geom)[1].paired_indices
    plan = jnp.zeros(n, jnp.int32).at[columns].set(rows.astype(jnp.int32))
    return plan, _identity_gap(shifted[plan])


def assign_copies(cost: Float[Array, "n m"]) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """Finds the transport plan of lowest cost between uniform masses, one size dividing the other.

    Each unit of the smaller side is split into equal copies, as many as make the sides equal. A
    plan between the units, spread evenly over their copies, costs the same, as does a plan between
    the copies, summed up. So both problems have the same minimum, and a gap of one is a gap of the
    other. Of the copies, some permutation is optimal.

    Args:
        cost: finite; `n` divides `m` or `m` divides `n`.

    Returns:
        The plan, of mass 1; and its duality gap, at least 0, in units of the mean cost of a match.
    """
    n, m = cost.shape
    size = max(n, m)
    copies = jnp.repeat(jnp.repeat(cost, size // n, axis=0), size // m, axis=1)
    plan, gap = assign(copies)
    counts = jnp.zeros((n, m), cost.dtype)
    counts = counts.at[plan // (size // n), jnp.arange(size) // (size // m)].add(1)
    return counts / size, gap


def _precondition(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Shifts rows and columns so that shortest augmenting paths become short.

    A shift changes no optimal permutation. Annealed Sinkhorn iterations give column potentials
    close to the optimal duals; less them, most rows are cheapest where the optimal permutation has
    them, and find their column in one step. A few dozen matrix-vector products replace tens of
    thousands of sequential steps: on trained weights, 95 % and more of them.

    Args:
        cost: at least 0, with a 0 in each row and column.

    Returns:
        The shifted cost, with the same properties, except that some columns may have no 0.
    """
    n = len(cost)

    def level(g, epsilon):
        f = jnp.min(cost - g[None, :], axis=1)
        kernel = jnp.exp((f[:, None] + g[None, :] - cost) / epsilon)

        def scale(_, v):
            # Far from all rows a column of the kernel may be 0; no potential has to be that large.
            return 1 / jnp.maximum(1 / (kernel @ v) @ kernel, _LEAST_MASS)

        v = lax.fori_loop(0, _SCALINGS_PER_LEVEL, scale, jnp.ones_like(g))
        return g + epsilon * jnp.log(v), None

    relative = np.geomspace(_ANNEAL_FROM, _ANNEAL_TO, _ANNEAL_LEVELS, dtype=cost.dtype)
    mean = jnp.mean(cost)
    unit = jnp.where(mean > 0, mean, 1)
    g, _ = lax.scan(level, jnp.zeros(n, cost.dtype), unit * relative)
    shifted = cost - g[None, :]
    shifted = shifted - jnp.min(shifted, axis=1, keepdims=True)

    # Costs with few distinct values are better left alone: the shift would make their rows crowd
    # on the same columns. Random choices would hit 63 % of the columns.
    chosen = jnp.where(jnp.min(shifted, axis=0) == 0, 1.0, 0.0)
    return jnp.where(jnp.mean(chosen) > 0.75, shifted, cost)


def _tiebreak(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Fixed values that look random, as small as rounding errors, 0 on the diagonal.

    Without them, equal units would all try the same columns in the same order, and the solver would
    take O(n^2) steps for a constant cost; with them, such a cost gives the identity in n.
    """
    i = lax.broadcasted_iota(jnp.uint32, cost.shape, 0)
    j = lax.broadcasted_iota(jnp.uint32, cost.shape, 1)
    # A multiplicative hash of the indices.
    mixed = (i * np.uint32(2654435761)) ^ (j * np.uint32(2246822519))
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(2654435761)
    uniform = (mixed >> 16).astype(cost.dtype) / 65536
    largest = jnp.max(cost)
    size = 4 * jnp.finfo(cost.dtype).eps * jnp.where(largest > 0, largest, 1)
    return jnp.where(i == j, 0, size * uniform)


def _identity_gap(cost: Float[Array, "n n"]) -> Float[Array, ""]:
    """Mean of the diagonal minus the value of a feasible dual point: at least what it loses.

    Complementary slackness asks for `v[j] - v[k] <= cost[k, j] - cost[k, k]`: column potentials are
    shortest distances in the residual graph, found by Bellman-Ford, all edges at once. If the
    identity is not optimal, the graph has a negative cycle, and the iteration stops after n steps;
    c-transforms make the potentials feasible in any case.
    """
    n = len(cost)
    residual = cost - jnp.diagonal(cost)[:, None]
    rounding = 8 * jnp.finfo(cost.dtype).eps * jnp.max(jnp.abs(cost))

    def unfinished(state):
        _, change, iteration = state
        return (change > rounding) & (iteration < n)

    def relax(state):
        v, _, iteration = state
        shorter = jnp.min(v[:, None] + residual, axis=0)
        return shorter, jnp.max(v - shorter), iteration + 1

    start = jnp.zeros(n, cost.dtype), jnp.array(jnp.inf, cost.dtype), 0
    v, _, _ = lax.while_loop(unfinished, relax, start)
    return jnp.mean(jnp.diagonal(slack(cost, v)))


def slack(cost: Float[Array, "n m"], v: Float[Array, " m"]) -> Float[Array, "n m"]:
    """Subtracts from a cost the feasible potentials that c-transforms make of any others.

    Args:
        cost: the cost.
        v: column potentials, feasible or not.

    Returns:
        `cost - u - w` with `u` the c-transform of `v`, and `w` that of `u`: never below 0.
    """
    remaining = cost - jnp.min(cost - v[None, :], axis=1)[:, None]
    return remaining - jnp.min(remaining, axis=0)[None, :]
