"""The exact assignment: ott's solver, made fast by a shift of the cost and certified by duals."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from ott.geometry import geometry
from ott.tools import unreg

from otfusion_jax.solvers.duality import identity_gap

# Annealing of the preconditioner of `Exact`: regularisation in units of the mean reduced cost.
_ANNEAL_FROM = 0.2
_ANNEAL_TO = 0.003
_ANNEAL_LEVELS = 6
_SCALINGS_PER_LEVEL = 10
# The share of the columns that are the cheapest of some row, from which on a cost is left as it is.
_EASY_SHARE = 0.97
# Of a column, in units of a row's: below it, scalings would overflow.
_LEAST_MASS = 1e-30


def assign(
    cost: Float[Array, "n n"],
) -> tuple[Int[Array, " n"], Float[Array, ""]]:
    """Finds the permutation of lowest cost.

    To be called where implicit promotion is allowed, as inside of `AbstractSolver.solve`: with
    64-bit types switched on, optax relies on it.

    Args:
        cost: The cost, finite.

    Returns:
        The permutation, int32 `[n]`: position `j` receives row `plan[j]`; and its duality gap, at
        least 0, in units of the mean cost of a match.
    """
    # Subtracting one after the other loses no digits to a large common offset.
    row_minima = jnp.min(cost, axis=1, keepdims=True)
    reduced = cost - row_minima
    column_minima = jnp.min(reduced, axis=0, keepdims=True)
    reduced = reduced - column_minima
    shifted = _precondition(reduced)
    cheapest = _cheapest_columns(shifted)
    # Where every row is the cheapest at a column of its own, nothing is left to solve or to bound.
    return lax.cond(
        _share_of_columns(cheapest) == 1,
        lambda: (_inverse(cheapest), jnp.zeros((), cost.dtype)),
        lambda: _shortest_augmenting_paths(shifted, _tiebreak(reduced)),
    )


def _inverse(columns: Int[Array, " n"]) -> Int[Array, " n"]:
    """Returns for each column its row, of the columns of all rows."""
    rows = jnp.arange(len(columns), dtype=jnp.int32)
    return jnp.zeros_like(columns).at[columns].set(rows)


def _shortest_augmenting_paths(
    cost: Float[Array, "n n"], tiebreak: Float[Array, "n n"]
) -> tuple[Int[Array, " n"], Float[Array, ""]]:
    """Finds the permutation of lowest cost by ott's solver, and its duality gap."""
    geom = geometry.Geometry(cost_matrix=cost + tiebreak)
    _, matching = unreg.hungarian(geom)
    rows, columns = matching.paired_indices
    plan = jnp.zeros(len(cost), jnp.int32)
    plan = plan.at[columns].set(rows.astype(jnp.int32))
    # With its rows in the order of the plan, the cost of the plan is the diagonal.
    return plan, identity_gap(cost[plan])


def assign_copies(
    cost: Float[Array, "n m"],
) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """Finds the transport plan of lowest cost between uniform masses, one size dividing the other.

    Each unit of the smaller side is split into equal copies, as many as make the sides equal. A
    plan between the units, spread evenly over their copies, costs the same, as does a plan between
    the copies, summed up. So both problems have the same minimum, and a gap of one is a gap of the
    other. Of the copies, some permutation is optimal.

    Args:
        cost: The cost, finite; `n` divides `m` or `m` divides `n`.

    Returns:
        The plan, of mass 1; and its duality gap, at least 0, in units of the mean cost of a match.
    """
    n, m = cost.shape
    size = max(n, m)
    copies_of_row = size // n
    copies_of_column = size // m
    copies = jnp.repeat(cost, copies_of_row, axis=0)
    copies = jnp.repeat(copies, copies_of_column, axis=1)
    permutation, gap = assign(copies)
    rows = permutation // copies_of_row
    columns = jnp.arange(size) // copies_of_column
    # Several copies of one pair of units may be matched with each other: they add up.
    counts = jnp.zeros((n, m), cost.dtype)
    counts = counts.at[rows, columns].add(1)
    return counts / size, gap


def _precondition(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Shifts rows and columns so that shortest augmenting paths become short.

    A shift changes no optimal permutation. Annealed Sinkhorn iterations give column potentials
    close to the optimal duals; less them, most rows are cheapest where the optimal permutation has
    them, and find their column in one step. A few dozen matrix-vector products replace tens of
    thousands of sequential steps: on trained weights, 95 % and more of them. Where nearly all rows
    are cheapest at different columns to begin with, there is nothing to be gained.

    Args:
        cost: The cost, at least 0, with a 0 in each row and column.

    Returns:
        The shifted cost, with the same properties, except that some columns may have no 0.
    """
    share = _share_of_columns(_cheapest_columns(cost))
    return lax.cond(share > _EASY_SHARE, lambda: cost, lambda: _annealed(cost))


def _cheapest_columns(cost: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Returns for each row the first of the columns that cost it the least."""
    # On a CPU, `argmin` takes several times as long as two minima.
    least = jnp.min(cost, axis=1, keepdims=True)
    columns = lax.broadcasted_iota(jnp.int32, cost.shape, 1)
    # Of equal costs, the first counts: costs with few distinct values are crowded.
    return jnp.min(jnp.where(cost == least, columns, len(cost) - 1), axis=1)


def _share_of_columns(chosen: Int[Array, " n"]) -> Float[Array, ""]:
    """Returns the share of the columns that some row has chosen."""
    is_chosen = jnp.zeros(len(chosen)).at[chosen].set(1)
    return jnp.mean(is_chosen)


def _annealed(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Shifts columns by the potentials that annealed Sinkhorn iterations end with, then rows."""

    def anneal(g: Array, epsilon: Array) -> tuple[Array, None]:
        return _scaled_potentials(cost, g, epsilon), None

    relative = np.geomspace(_ANNEAL_FROM, _ANNEAL_TO, _ANNEAL_LEVELS)
    relative = relative.astype(cost.dtype)
    mean = jnp.mean(cost)
    unit = jnp.where(mean > 0, mean, 1)
    epsilons = unit * relative
    g = jnp.zeros(len(cost), cost.dtype)
    g, _ = lax.scan(anneal, g, epsilons)
    shifted = cost - g[None, :]
    row_minima = jnp.min(shifted, axis=1, keepdims=True)
    shifted = shifted - row_minima

    # Costs with few distinct values are better left alone: the shift would make their rows crowd
    # on the same columns. Random choices would hit 63 % of the columns.
    column_minima = jnp.min(shifted, axis=0)
    chosen = jnp.where(column_minima == 0, 1.0, 0.0)
    share = jnp.mean(chosen)
    return jnp.where(share > 0.75, shifted, cost)


def _scaled_potentials(cost: Array, g: Array, epsilon: Array) -> Array:
    """Improves column potentials by Sinkhorn iterations at one regularisation strength.

    Potentials are absorbed in the kernel, so that the column scaling `v` starts from 1 and stays in
    range, however small epsilon is (Peyré and Cuturi 2019, section 4.4).
    """
    remaining = cost - g[None, :]
    f = jnp.min(remaining, axis=1)
    potentials = f[:, None] + g[None, :]
    kernel = jnp.exp((potentials - cost) / epsilon)

    def scale(_: Array, v: Array) -> Array:
        row_mass = kernel @ v
        row_scaling = 1 / row_mass
        column_mass = row_scaling @ kernel
        # Far from all rows a column of the kernel may be 0; no potential has to be that large.
        return 1 / jnp.maximum(column_mass, _LEAST_MASS)

    v = jnp.ones_like(g)
    v = lax.fori_loop(0, _SCALINGS_PER_LEVEL, scale, v)
    return g + epsilon * jnp.log(v)


def _tiebreak(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Fixed values that look random, as small as rounding errors, 0 on the diagonal.

    Without them, equal units would all try the same columns in the same order, and the solver would
    take O(n^2) steps for a constant cost; with them, such a cost gives the identity in n.
    """
    i = lax.broadcasted_iota(jnp.uint32, cost.shape, 0)
    j = lax.broadcasted_iota(jnp.uint32, cost.shape, 1)
    # A multiplicative hash of the indices.
    mixed = i * np.uint32(2654435761) ^ j * np.uint32(2246822519)
    mixed = mixed ^ (mixed >> 15)
    mixed = mixed * np.uint32(2654435761)
    # The upper bits of a product are the well mixed ones.
    upper = mixed >> 16
    uniform = upper.astype(cost.dtype) / 65536
    largest = jnp.max(cost)
    unit = jnp.where(largest > 0, largest, 1)
    eps = jnp.finfo(cost.dtype).eps
    rounding = 4 * eps * unit
    return jnp.where(i == j, 0, rounding * uniform)
