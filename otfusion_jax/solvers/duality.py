"""Evidence of how good a plan is: its gap to a feasible point of the dual linear program.

Of the plans P with row sums a and column sums b, the cheapest solves `min <P, C>`. Its dual is
`max <u, a> + <v, b>` over potentials with `u[i] + v[j] <= C[i, j]` everywhere. The value of *any*
feasible potentials is a lower bound of the minimum, so that a plan costs at most

    <P, C> - <u, a> - <v, b> = <P, C - u - v>

more than an optimal plan with its own marginals, however plan and potentials were found. Peyré and
Cuturi, Computational Optimal Transport, 2019, sections 2.5 (duality) and 3.2 (c-transforms).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from otfusion_jax.common.host import Array, array_module, while_loop
from otfusion_jax.common.scaling import largest_magnitude


class _Distances(NamedTuple):
    """The state of Bellman-Ford: distances so far, how much the last step took off, its number."""

    v: Array
    taken_off: Array
    iteration: int | Array


def feasible_potentials(
    cost: Float[Array, "*batch n m"],
    v: Float[Array, "*batch m"],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch m"]]:
    """Makes feasible potentials of any others by c-transforms.

    Args:
        cost: The cost, or a stack of them.
        v: The column potentials, feasible or not.

    Returns:
        The c-transform `u` of `v`, and `w` of `u`, so that `(cost - u) - w` is never below 0.
    """
    xp = array_module(cost, v)
    u = xp.min(cost - v[..., None, :], axis=-1)
    return u, xp.min(cost - u[..., :, None], axis=-2)


def plan_gap(
    plan: Float[Array, "n m"],
    cost: Float[Array, "n m"],
    v: Float[Array, " m"],
) -> Float[Array, ""]:
    """Bounds how much a plan costs more than the best one with its marginals.

    Args:
        plan: The transport plan.
        cost: The cost.
        v: The column potentials. The closer they are to optimal ones, the tighter the bound.

    Returns:
        The gap, at least 0, in the units of the cost times those of the masses.
    """
    u, w = feasible_potentials(cost, v)
    lost = plan * ((cost - u[:, None]) - w[None, :])
    return array_module(lost).sum(lost)


def identity_gap(cost: Float[Array, "n n"]) -> Float[Array, ""]:
    """Bounds how much the identity costs more than the best permutation.

    Complementary slackness asks for `v[j] - v[k] <= cost[k, j] - cost[k, k]`: column potentials are
    shortest distances in the residual graph, found by Bellman-Ford, all edges at once. If the
    identity is not optimal, the graph has a negative cycle, and the iteration stops after n steps;
    c-transforms make the potentials feasible in any case.

    Args:
        cost: The cost, its rows in the order of the permutation that is judged.

    Returns:
        The gap, at least 0, in units of the mean cost of a match.
    """
    n = len(cost)
    xp = array_module(cost)
    matched = xp.diagonal(cost)
    # Paths that get shorter by less are rounded, and might go round in circles to the last step.
    rounding = 8 * np.finfo(cost.dtype).eps * largest_magnitude(cost)

    def unfinished(state: _Distances) -> Array:
        return (state.taken_off.max() > rounding) & (state.iteration < n)

    def relax_edges(state: _Distances) -> _Distances:
        # Less what is matched first: an array of all residual costs would be as large as the cost.
        by_way_of = _shortest_by_one_edge(state.v - matched, state.taken_off, cost)
        # Paths that end here are no longer than before, also where few edges were looked at.
        shorter = xp.minimum(state.v, by_way_of)
        return _Distances(shorter, state.v - shorter, state.iteration + 1)

    start = _Distances(
        v=xp.zeros(n, cost.dtype),
        taken_off=xp.full(n, np.inf, cost.dtype),
        iteration=0,
    )
    shortest = while_loop(unfinished, relax_edges, start)
    u, w = feasible_potentials(cost, shortest.v)
    slack_of_matches = (matched - u) - w
    return xp.mean(slack_of_matches)


def _shortest_by_one_edge(v: Array, taken_off: Array, cost: Array) -> Array:
    """Adds edges to distances, and returns for each place the shortest way that ends there.

    Where shapes may depend on values, only places that the last step has brought nearer are gone
    by: the others have been before. Those are a few of all, from the second step on.
    """
    xp = array_module(v, taken_off, cost)
    if xp is np:
        (nearer,) = taken_off.nonzero()
        # Without this mode, NumPy takes twice the time.
        steps = cost.take(nearer, axis=0, mode="clip")
        steps += v[nearer, None]
        return np.minimum.reduce(steps, axis=0)
    return xp.min(v[:, None] + cost, axis=0)
