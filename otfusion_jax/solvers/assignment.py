"""The exact assignment: shortest augmenting paths, made short by a shift of the cost.

Arrays of JAX are solved by ott's solver, those of NumPy (see `common.host`) by SciPy's, which needs
no program. What comes before is the same, and so is the certificate of what is found.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int
from ott.geometry import geometry
from ott.tools import unreg
from scipy.optimize import linear_sum_assignment

from otfusion_jax.common.host import Array, array_module, cond, fori_loop
from otfusion_jax.solvers.duality import identity_gap
from otfusion_jax.solvers.small_assignments import FEW_UNITS, assign_small, with_tiebreaks

# Annealing of the preconditioner of `Exact`: regularisation before the first level, in units of the
# mean reduced cost. By squaring the kernel it is halved, so often at each level.
_ANNEAL_FROM = 0.4
_SQUARINGS_PER_LEVEL = 2
_ANNEAL_LEVELS = 4
_SCALINGS_PER_LEVEL = 12
# SciPy's solver takes a fraction of the time of one program for all cases: less has to be done for
# it beforehand.
_FEW_ANNEAL_LEVELS = 3
_FEW_SCALINGS_PER_LEVEL = 8
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
    xp = array_module(cost)
    # Copies of few units: all others that are small go by `solve_small`.
    if xp is np and len(cost) <= FEW_UNITS:
        known: Any = cost
        plans, gaps = assign_small(known[None])
        return plans[0], gaps[0]
    # Subtracting one after the other loses no digits to a large common offset.
    row_minima = xp.min(cost, axis=1, keepdims=True)
    reduced = cost - row_minima
    column_minima = xp.min(reduced, axis=0, keepdims=True)
    reduced -= column_minima
    largest = xp.max(reduced)
    # By the same name: of a large group, every array that is held at once counts.
    reduced = _precondition(reduced)
    cheapest = _cheapest_columns(reduced)
    # Where every row is the cheapest at a column of its own, nothing is left to solve or to bound.
    return cond(
        _share_of_columns(cheapest) == 1,
        lambda: (_inverse(cheapest), xp.zeros((), cost.dtype)),
        lambda: _shortest_augmenting_paths(reduced, largest),
    )


def _inverse(columns: Int[Array, " n"]) -> Int[Array, " n"]:
    """Returns for each column its row, of the columns of all rows."""
    xp = array_module(columns)
    if xp is np:
        return xp.argsort(columns).astype(np.int32)
    rows = jnp.arange(len(columns), dtype=jnp.int32)
    return jnp.zeros_like(columns).at[columns].set(rows)


def _shortest_augmenting_paths(
    cost: Float[Array, "n n"], largest: Float[Array, ""]
) -> tuple[Int[Array, " n"], Float[Array, ""]]:
    """Finds the permutation of lowest cost, and its duality gap.

    Args:
        cost: The cost.
        largest: The largest cost before its shift, which says how its entries are rounded.

    Returns:
        The permutation and the gap, as `assign`.
    """
    if array_module(cost) is np:
        _, columns = linear_sum_assignment(_with_tiebreak(cost, largest))
        plan = _inverse(columns)
    else:
        geom = geometry.Geometry(cost_matrix=_with_tiebreak(cost, largest))
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
    xp = array_module(cost)
    copies = xp.repeat(cost, copies_of_row, axis=0)
    copies = xp.repeat(copies, copies_of_column, axis=1)
    permutation, gap = assign(copies)
    rows = permutation // copies_of_row
    # The rows at the copies of each column. Several copies of one pair of units may be matched with
    # each other: they add up.
    rows = rows.reshape(1, m, copies_of_column)
    counts = xp.sum(rows == np.arange(n)[:, None, None], axis=-1)
    return counts.astype(cost.dtype) / size, gap


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
    return cond(share > _EASY_SHARE, lambda: cost, lambda: _annealed(cost))


def _cheapest_columns(cost: Float[Array, "n n"]) -> Int[Array, " n"]:
    """Returns for each row the first of the columns that cost it the least."""
    # Of equal costs, the first counts: costs with few distinct values are crowded.
    if array_module(cost) is np:
        return np.argmin(cost, axis=1)
    # Compiled for a CPU, `argmin` takes several times as long as two minima.
    least = jnp.min(cost, axis=1, keepdims=True)
    columns = lax.broadcasted_iota(jnp.int32, cost.shape, 1)
    return jnp.min(jnp.where(cost == least, columns, len(cost) - 1), axis=1)


def _share_of_columns(chosen: Int[Array, " n"]) -> Float[Array, ""]:
    """Returns the share of the columns that some row has chosen."""
    xp = array_module(chosen)
    if xp is np:
        return xp.mean(xp.bincount(chosen, minlength=len(chosen)) > 0)
    is_chosen = jnp.zeros(len(chosen)).at[chosen].set(1)
    return jnp.mean(is_chosen)


def _annealed(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Shifts columns by the potentials that annealed Sinkhorn iterations end with, then rows."""
    xp = array_module(cost)
    levels = _FEW_ANNEAL_LEVELS if xp is np else _ANNEAL_LEVELS
    mean = xp.mean(cost)
    unit = xp.where(mean > 0, mean, 1)
    epsilon = unit * np.asarray(_ANNEAL_FROM, cost.dtype)
    kernel = xp.exp(cost / -epsilon)
    none_yet = xp.zeros(len(cost), cost.dtype)
    start = _Annealing(kernel, epsilon, none_yet, xp.ones_like(none_yet))
    g = fori_loop(levels, _anneal, start).g
    shifted = cost - g[None, :]
    row_minima = xp.min(shifted, axis=1, keepdims=True)
    shifted -= row_minima

    # Costs with few distinct values are better left alone: the shift would make their rows crowd
    # on the same columns. Random choices would hit 63 % of the columns.
    column_minima = xp.min(shifted, axis=0)
    chosen = xp.where(column_minima == 0, 1.0, 0.0)
    share = xp.mean(chosen)
    return cond(share > 0.75, lambda: shifted, lambda: cost)


class _Annealing(NamedTuple):
    """Sinkhorn iterations on their way to less and less regularisation.

    Attributes:
        kernel: `exp((f[i] + g[j] - cost[i, j]) / epsilon)` at the level before, its potentials
            less the last scaling, float `[n, n]`. The largest of each row is 1.
        epsilon: The regularisation strength of that level, float `[]`.
        g: The column potentials, with the last scaling, float `[n]`.
        v: The last scaling of columns, float `[n]`.
    """

    kernel: Array
    epsilon: Array
    g: Array
    v: Array


def _anneal(_: int | Array, last: _Annealing) -> _Annealing:
    """Improves column potentials by Sinkhorn iterations at the next regularisation strength.

    Potentials are absorbed in the kernel, so that the column scaling `v` starts from 1 and stays in
    range, however small epsilon is (Peyré and Cuturi 2019, section 4.4). The kernel of half of a
    regularisation strength is the square: exponentials would take longer than all iterations.
    """
    kernel, epsilon, g, v = last
    xp = array_module(kernel)
    kernel *= v[None, :]
    kernel /= xp.max(kernel, axis=1, keepdims=True)
    for _ in range(_SQUARINGS_PER_LEVEL):
        kernel *= kernel
    epsilon = epsilon / 2**_SQUARINGS_PER_LEVEL

    def scale(_: int | Array, v: Array) -> Array:
        row_mass = kernel @ v
        row_scaling = 1 / row_mass
        column_mass = row_scaling @ kernel
        # Far from all rows a column of the kernel may be 0; no potential has to be that large.
        return 1 / xp.maximum(column_mass, _LEAST_MASS)

    scalings = _FEW_SCALINGS_PER_LEVEL if xp is np else _SCALINGS_PER_LEVEL
    v = fori_loop(scalings, scale, xp.ones_like(g))
    return _Annealing(kernel, epsilon, g + epsilon * xp.log(v), v)


def _with_tiebreak(cost: Float[Array, "n n"], largest: Float[Array, ""]) -> Float[Array, "n n"]:
    """Adds values as small as rounding errors, 0 on the diagonal: of equal units, those stay.

    SciPy's solver takes n steps for a constant cost. With ott's, equal units would all try the same
    columns in the same order, and take O(n^2): values that look random keep them apart, and such a
    cost gives the identity in n.
    """
    xp = array_module(cost, largest)
    if xp is np:
        known: Any = cost
        apart: Any = with_tiebreaks(known[None], np.asarray(largest)[None])
        return apart[0]
    unit = jnp.where(largest > 0, largest, 1)
    rounding = 4 * np.finfo(cost.dtype).eps * unit
    i = jnp.arange(len(cost), dtype=np.uint32)[:, None]
    j = jnp.arange(len(cost), dtype=np.uint32)[None, :]
    # A multiplicative hash of the indices.
    mixed = i * np.uint32(2654435761) ^ j * np.uint32(2246822519)
    mixed = mixed ^ (mixed >> 15)
    mixed = mixed * np.uint32(2654435761)
    # The upper bits of a product are the well mixed ones.
    upper = mixed >> 16
    uniform = upper.astype(cost.dtype) / 65536
    return cost + jnp.where(i == j, 0, rounding * uniform)
