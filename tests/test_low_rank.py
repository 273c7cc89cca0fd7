"""Checks plans of low rank: their rank, their marginals, and what `LowRank` promises of them."""

import chex
import jax
import numpy as np
import pytest
from problems import (
    COST,
    MASSES_A,
    MASSES_B,
    M,
    N,
    as_cost,
    marginals,
    optimum,
    solve_example,
)

import otfusion_jax as otf
from otfusion_jax.solvers.low_rank import LowRank

RANK_3 = LowRank(rank=3)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_plans_have_their_rank_and_marginals(rank):
    solution = solve_example(LowRank(rank=rank))
    assert solution.converged
    assert np.linalg.matrix_rank(np.asarray(solution.plan), tol=1e-6) == min(rank, N, M)
    rows, columns = marginals(solution.plan)
    assert np.abs(rows - MASSES_A).sum() < 2e-3
    assert np.abs(columns - MASSES_B).sum() < 2e-3
    if rank == 1:  # one cluster says nothing of who goes where
        np.testing.assert_allclose(solution.plan, np.outer(MASSES_A, MASSES_B), atol=1e-3)
    if rank == 20:
        best = optimum(COST, MASSES_A, MASSES_B)
        assert solution.value == pytest.approx(best, rel=0.05)


def test_plans_are_always_the_same_and_see_neither_scale_nor_shift():
    first = solve_example(RANK_3)
    chex.assert_trees_all_equal(solve_example(RANK_3), first)
    other = solve_example(RANK_3, 1e4 * COST - 50)
    np.testing.assert_allclose(other.plan, first.plan, atol=1e-4)
    assert other.gap == pytest.approx(1e4 * float(first.gap), rel=1e-2)


def test_the_value_has_the_plan_as_gradient():
    a, b = as_cost(MASSES_A), as_cost(MASSES_B)

    def value(cost):
        return RANK_3.solve(otf.TransportProblem(cost, a, b)).value

    gradient = jax.grad(value)(as_cost(COST))
    np.testing.assert_allclose(gradient, solve_example(RANK_3).plan, atol=1e-6)
