"""Checks entropic plans against POT, and what `Sinkhorn` promises of them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    COST,
    MASSES_A,
    MASSES_B,
    N,
    marginals,
    masses,
    optimum,
    ot,
    problem,
    solve_example,
    squared_distances,
)

import otfusion_jax as otf
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.sinkhorn import Sinkhorn

# Balanced


@pytest.mark.parametrize("shape", [(7, 7), (4, 3), (1, 4), (0, 3)])
def test_marginals_are_uniform_unless_given(shape):
    n, m = shape
    solution = Sinkhorn().solve(problem(squared_distances(n, m, 0)))
    chex.assert_shape(solution.plan, shape)
    assert solution.converged
    if n:
        rows, columns = marginals(solution.plan)
        np.testing.assert_allclose(rows, np.full(n, 1 / n), atol=1e-6)
        np.testing.assert_allclose(columns, np.full(m, 1 / m), atol=1e-3)


def test_plans_agree_with_pot():
    cost = squared_distances(6, 8, 1)
    a, b = masses(6, 0), masses(8, 1)
    given = problem(cost, a, b)
    solution = Sinkhorn(epsilon=0.5, relative=False, threshold=1e-5).solve(given)
    expected = np.asarray(ot.sinkhorn(a, b, cost, reg=0.5, stopThr=1e-10, numItermax=20000))
    np.testing.assert_allclose(solution.plan, expected, atol=2e-5)
    assert solution.value == pytest.approx(np.sum(expected * cost), rel=1e-4)
    in_deviations = 0.5 / float(np.std(cost))
    relative = Sinkhorn(epsilon=in_deviations, threshold=1e-5).solve(given)
    np.testing.assert_allclose(relative.plan, expected, atol=2e-5)


def test_plans_tend_to_the_optimum_and_the_gap_bounds_the_rest():
    cost = squared_distances(6, 8, 2)
    a, b = masses(6, 2), masses(8, 3)
    best = optimum(cost, a, b)
    losses = []
    for epsilon in (1.0, 0.1, 0.01):
        solver = Sinkhorn(epsilon, threshold=1e-5, max_iterations=20000)
        solution = solver.solve(problem(cost, a, b))
        assert solution.converged
        losses.append(float(solution.value) - best)
        # The column marginals are only as exact as the threshold.
        assert solution.gap >= losses[-1] - 1e-5 * cost.max()
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-2 * best
    assert solution.gap < 2e-2 * best


def test_plans_of_square_costs_tend_to_permutations():
    given = problem(squared_distances(7, 7, 0))
    permutation = Exact().solve(given).plan
    expected = jnp.zeros((7, 7)).at[permutation, jnp.arange(7)].set(1 / 7)
    soft = Sinkhorn(epsilon=0.01, max_iterations=20000).solve(given)
    np.testing.assert_allclose(soft.plan, expected, atol=5e-3)


@pytest.mark.parametrize(("scale", "shift"), [(1e6, 0.0), (1e-6, 0.0), (1.0, -50.0), (1e-25, 0.0)])
def test_plans_see_neither_scale_nor_shift(scale, shift):
    cost = squared_distances(5, 6, 4)
    expected = Sinkhorn().solve(problem(cost))
    solution = Sinkhorn().solve(problem(scale * cost + shift))
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)
    assert solution.gap == pytest.approx(scale * float(expected.gap), rel=1e-2)


def test_the_plan_of_a_constant_cost_is_the_product_of_the_marginals():
    a, b = masses(4, 5), masses(3, 6)
    solution = Sinkhorn().solve(problem(np.full((4, 3), 0.1), a, b))
    np.testing.assert_allclose(solution.plan, np.outer(a, b), rtol=1e-5)


def test_units_without_mass_get_none():
    a = np.array([0.5, 0.0, 0.5])
    solution = Sinkhorn().solve(problem(squared_distances(3, 3, 0), a, a))
    assert solution.converged
    rows, columns = marginals(solution.plan)
    np.testing.assert_allclose(rows, a, atol=1e-6)
    np.testing.assert_allclose(columns, a, atol=1e-3)
    assert 0 <= solution.gap < 1


def test_masses_that_are_no_distribution():
    given = problem(np.ones((2, 3)), b=np.ones(3))
    with pytest.raises(ValueError, match="Marginal b is no distribution.*divide"):
        Sinkhorn().solve(given)
    traced = jax.jit(Sinkhorn().solve)(given)
    assert not traced.converged
    assert np.isnan(traced.value)


def test_too_few_iterations_do_not_count_as_converged():
    solver = Sinkhorn(epsilon=1e-3, max_iterations=10)
    assert not solver.solve(problem(squared_distances(8, 8, 0))).converged


@pytest.mark.usefixtures("default_promotion")
def test_gradients_match_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(6)
        cost = jnp.asarray(squared_distances(4, 5, 5))
        weights = jnp.asarray(rng.normal(size=(4, 5)))
        direction = jnp.asarray(rng.normal(size=(4, 5)))
        solver = Sinkhorn(epsilon=0.3, threshold=1e-11, max_iterations=20000)

        def objective(cost):
            solution = solver.solve(otf.TransportProblem(cost))
            return solution.value + jnp.sum(weights * solution.plan)

        gradient = jax.grad(objective)(cost)
        chex.assert_tree_all_finite(gradient)
        step = 1e-4
        difference = objective(cost + step * direction) - objective(cost - step * direction)
        slope = float(jnp.sum(gradient * direction))
        assert slope == pytest.approx(float(difference) / (2 * step), rel=1e-3)


# Annealing


def test_annealing_ends_where_there_is_none():
    # It ends after ten iterations, where ott looks whether it has converged.
    plain = Sinkhorn(epsilon=0.3, threshold=1e-4)
    annealed = dataclasses.replace(
        plain, epsilon_init=1024.0, epsilon_decay=0.5, max_iterations=100
    )
    expected = solve_example(plain)
    solution = solve_example(annealed)
    assert solution.converged
    _, columns = marginals(solution.plan)
    assert np.abs(columns - MASSES_B).sum() < 1e-4
    np.testing.assert_allclose(solution.plan, expected.plan, atol=5e-5)


def test_annealing_that_cannot_end():
    with pytest.raises(ValueError, match="takes 139 iterations, and max_iterations is 100"):
        Sinkhorn(epsilon_init=1e6, max_iterations=100)


# Unbalanced

LOOSE = Sinkhorn(epsilon=0.3, tau_a=0.8, tau_b=0.9, threshold=1e-5)


@pytest.mark.filterwarnings("ignore:If reg_type = entropy")  # what is ignored is none of ours
@pytest.mark.parametrize(("tau_a", "tau_b"), [(0.5, 0.5), (0.1, 0.99), (1.0, 0.8)])
def test_unbalanced_plans_agree_with_pot(tau_a, tau_b):
    epsilon = 2.0
    solver = Sinkhorn(epsilon, relative=False, tau_a=tau_a, tau_b=tau_b, threshold=1e-5)
    solution = solve_example(solver)

    def strength(tau):
        return epsilon * tau / (1 - tau) if tau < 1 else np.inf

    plan = ot.unbalanced.sinkhorn_unbalanced(
        MASSES_A,
        MASSES_B,
        COST,
        epsilon,
        (strength(tau_a), strength(tau_b)),
        reg_type="entropy",
        numItermax=20000,
        stopThr=1e-12,
    )
    expected = np.asarray(plan) / np.sum(plan)
    assert solution.converged
    np.testing.assert_allclose(solution.plan, expected, atol=5e-6)
    assert solution.value == pytest.approx(np.sum(expected * COST), rel=1e-4)
    # The marginals are drawn to those that are given, but not kept.
    _, columns = marginals(solution.plan)
    assert np.abs(columns - MASSES_B).sum() > 1e-3


@pytest.mark.parametrize(("scale", "shift"), [(1e6, 0.0), (1e-6, 0.0), (1.0, 1000.0)])
def test_unbalanced_plans_see_neither_scale_nor_shift(scale, shift):
    expected = solve_example(LOOSE)
    solution = solve_example(LOOSE, scale * COST + shift)
    assert solution.converged
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)
    assert solution.gap == pytest.approx(scale * float(expected.gap), rel=1e-2)


def test_unbalanced_converges_however_little_mass_there_would_be():
    # The cheapest match is that of a unit without mass, what can be matched is far from it.
    empty = np.arange(N) == 2
    a = np.where(empty, 0, MASSES_A)
    a = a / a.sum()
    far = COST - 1000 * empty[:, None]
    solver = Sinkhorn(1.0, relative=False, tau_a=0.5, tau_b=0.5)
    solution = solve_example(solver, far, a)
    expected = solve_example(solver, a=a)
    assert solution.converged
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)


@pytest.mark.usefixtures("default_promotion")
def test_unbalanced_gradients_match_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        cost = jnp.asarray(COST)
        weights = jnp.asarray(rng.normal(size=COST.shape))
        direction = jnp.asarray(rng.normal(size=COST.shape))
        push = jnp.asarray(rng.normal(size=N))
        push = 0.01 * (push - jnp.mean(push))
        a, b = jnp.asarray(MASSES_A), jnp.asarray(MASSES_B)
        solver = Sinkhorn(epsilon=0.3, tau_a=0.8, tau_b=0.9, threshold=1e-12)

        @jax.jit
        def objective(step):
            moved = otf.TransportProblem(cost + step * direction, a + step * push, b)
            solution = solver.solve(moved)
            return solution.value + 10 * jnp.sum(weights * solution.plan)

        step = 1e-4
        slope = float(jax.grad(objective)(0.0))
        difference = float(objective(step) - objective(-step)) / (2 * step)
        assert abs(slope) > 1e-2
        assert slope == pytest.approx(difference, rel=1e-4)
