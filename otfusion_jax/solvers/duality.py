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


class _Distances(NamedTuple):
    """The state of Bellman-Ford: distances so far, how much the last step took off, its number."""

    v: Array
    change: Array
    iteration: int | Array


def slack(
    cost: Float[Array, "n m"],
    v: Float[Array, " m"],
) -> Float[Array, "n m"]:
    """Subtracts from a cost the feasible potentials that c-transforms make of any others.

    Args:
        cost: The cost.
        v: The column potentials, feasible or not.

    Returns:
        `cost - u - w` with `u` the c-transform of `v`, and `w` that of `u`: never below 0.
    """
    xp = array_module(cost, v)
    u = xp.min(cost - v[None, :], axis=1)
    remaining = cost - u[:, None]
    w = xp.min(remaining, axis=0)
    return remaining - w[None, :]


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
    lost = plan * slack(cost, v)
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
    residual = cost - matched[:, None]
    # Paths that get shorter by less are rounded, and might go round in circles to the last step.
    largest = xp.max(abs(cost))
    rounding = 8 * np.finfo(cost.dtype).eps * largest

    def unfinished(state: _Distances) -> Array:
        return (state.change > rounding) & (state.iteration < n)

    def relax_all_edges(state: _Distances) -> _Distances:
        by_way_of = state.v[:, None] + residual
        shorter = xp.min(by_way_of, axis=0)
        change = xp.max(state.v - shorter)
        return _Distances(shorter, change, state.iteration + 1)

    start = _Distances(
        v=xp.zeros(n, cost.dtype),
        change=xp.asarray(np.inf, cost.dtype),
        iteration=0,
    )
    shortest = while_loop(unfinished, relax_all_edges, start)
    slack_of_matches = xp.diagonal(slack(cost, shortest.v))
    return xp.mean(slack_of_matches)
