"""Checks the solvers against scipy and POT, and that their evidence can be trusted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import as_cost, masses, ot, squared_distances
from scipy.optimize import linear_sum_assignment

import otfusion_jax as otf
from otfusion_jax.solvers import assignment, base
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.sinkhorn import Sinkhorn

SIZES = (0, 1, 2, 7, 64)


STRUCTURES = {
    "gaussian": lambda n: squared_distances(n, n, 0),
    "norms_dominate": lambda n: np.outer(np.arange(n), np.arange(n)) + squared_distances(n, n, 1),
    "integer_ties": lambda n: np.random.default_rng(2).integers(0, 4, (n, n)),
    "huge": lambda n: 1e6 * squared_distances(n, n, 3),
    "tiny": lambda n: 1e-6 * squared_distances(n, n, 4),
    "negative": lambda n: -squared_distances(n, n, 5),
    "offset": lambda n: 1000 + np.random.default_rng(6).integers(0, 50, (n, n)),
    "constant": lambda n: np.full((n, n), 0.3),
    "dead_units": lambda n: squared_distances(n, n, 7) * np.outer(np.arange(n) % 3, np.ones(n)),
}


def optimum(cost):
    """The mean cost of an optimal assignment, in float64."""
    cost = np.asarray(cost, np.float64)
    return cost[linear_sum_assignment(cost)].mean() if cost.size else 0.0


def value_of(cost, plan):
    return np.asarray(cost, np.float64)[np.asarray(plan), np.arange(len(plan))].mean()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", SIZES)
def test_exact_is_optimal(n, structure):
    cost = as_cost(STRUCTURES[structure](n))
    solution = Exact().solve(otf.TransportProblem(cost))
    chex.assert_shape(solution.plan, (n,))
    chex.assert_type([solution.plan, solution.value], [jnp.int32, jnp.float32])
    assert sorted(solution.plan.tolist()) == list(range(n))
    assert solution.converged
    if n == 0:
        assert solution.value == solution.gap == 0
        return
    largest = float(np.max(np.abs(cost)))
    assert value_of(cost, solution.plan) == pytest.approx(optimum(cost), abs=1e-6 * largest)
    assert solution.value == pytest.approx(optimum(cost), abs=1e-6 * largest)
    assert 0 <= solution.gap <= 1e-6 * largest


def test_exact_keeps_the_order_of_equal_units():
    chex.assert_trees_all_equal(
        Exact().solve(otf.TransportProblem(jnp.ones((7, 7)))).plan, jnp.arange(7)
    )


def test_exact_finds_a_planted_permutation():
    rng = np.random.default_rng(0)
    planted = rng.permutation(64)
    source = rng.normal(size=(64, 6))
    target = source[planted] + 0.01 * rng.normal(size=(64, 6))
    cost = np.sum((source[:, None] - target[None]) ** 2, axis=-1)
    np.testing.assert_array_equal(Exact().solve(otf.TransportProblem(as_cost(cost))).plan, planted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_exact_in_other_precisions(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        cost = as_cost(STRUCTURES["gaussian"](7), dtype)
        solution = Exact().solve(otf.TransportProblem(cost))
        assert solution.plan.dtype == jnp.int32
        assert solution.value.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        assert value_of(cost, solution.plan) == pytest.approx(optimum(cost), rel=1e-12)
        assert solution.converged


def test_exact_keeps_float32_when_float64_is_enabled():
    with jax.enable_x64(True):
        solution = Exact().solve(otf.TransportProblem(as_cost(STRUCTURES["gaussian"](7))))
        chex.assert_type([solution.plan, solution.value, solution.gap], [jnp.int32, "f4", "f4"])


@pytest.mark.parametrize("swap", [(0, 1), (3, 5)])
def test_gap_bounds_the_loss_of_a_bad_permutation(swap):
    cost = as_cost(STRUCTURES["gaussian"](7))
    best = np.asarray(Exact().solve(otf.TransportProblem(cost)).plan)
    worse = best.copy()
    worse[list(swap)] = best[list(swap)[::-1]]
    loss = value_of(cost, worse) - value_of(cost, best)
    assert loss > 1e-3
    assert assignment._identity_gap(cost[worse]) >= loss * (1 - 1e-5)
    assert assignment._identity_gap(cost[best]) <= 1e-6


def test_gap_of_every_permutation_is_an_upper_bound():
    cost = as_cost(squared_distances(7, 7, 3))
    plans = jax.vmap(lambda key: jax.random.permutation(key, 7))(
        jax.random.split(jax.random.key(0), 30)
    )
    gaps = jax.vmap(lambda plan: assignment._identity_gap(cost[plan]))(plans)
    losses = [value_of(cost, plan) - optimum(cost) for plan in plans]
    assert np.all(np.asarray(gaps) >= np.asarray(losses) * (1 - 1e-5))


def test_a_wrong_permutation_does_not_count_as_converged(monkeypatch):
    reverse = jnp.stack([jnp.arange(11)[::-1], jnp.arange(11)])

    class Matching:
        paired_indices = reverse

    monkeypatch.setattr(assignment.unreg, "hungarian", lambda geom: (0.0, Matching))
    cost = as_cost(STRUCTURES["gaussian"](11))
    # Another tolerance than elsewhere: jit must not remember the true solver.
    solution = Exact(tolerance=2e-5).solve(otf.TransportProblem(cost))
    chex.assert_trees_all_equal(solution.plan, reverse[0].astype(jnp.int32))
    assert not solution.converged
    assert solution.gap >= (value_of(cost, solution.plan) - optimum(cost)) * (1 - 1e-5)


def test_the_preconditioner_prepares_the_answer():
    """After it, nearly every row must be cheapest where the optimal permutation has it."""
    cost = as_cost(STRUCTURES["gaussian"](64))
    cost = cost - cost.min(axis=1, keepdims=True)
    cost = cost - cost.min(axis=0, keepdims=True)
    best = np.argsort(Exact().solve(otf.TransportProblem(cost)).plan)
    before = np.mean(np.argmin(cost, axis=1) == best)
    after = np.mean(np.argmin(assignment._precondition(cost), axis=1) == best)
    assert before < 0.6
    assert after > 0.9


@pytest.mark.parametrize("solver", [Exact(), Sinkhorn()])
def test_jit_and_vmap_change_nothing(solver):
    costs = jnp.stack([as_cost(squared_distances(7, 7, seed)) for seed in range(4)])
    loop = [solver.solve(otf.TransportProblem(cost)) for cost in costs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    chex.assert_trees_all_close(
        jax.jit(solver.solve)(otf.TransportProblem(costs[0])), loop[0], rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_close(
        jax.vmap(solver.solve)(otf.TransportProblem(costs)), stacked, rtol=1e-5, atol=1e-6
    )


def test_solvers_are_hashable_and_equal_by_fields():
    assert len({Exact(), Exact(), Sinkhorn(), Sinkhorn(0.05), Sinkhorn(0.1)}) == 3


@pytest.mark.parametrize("solver", [Exact(), Sinkhorn()])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_costs_that_are_not_finite(solver, bad):
    good = as_cost(STRUCTURES["gaussian"](7))
    cost = good.at[2, 4].set(bad).at[5, 0].set(bad)
    with pytest.raises(ValueError, match="2 of 49 costs .* row 2, column 4"):
        solver.solve(otf.TransportProblem(cost))

    traced = jax.jit(solver.solve)(otf.TransportProblem(cost))
    assert not traced.converged
    assert np.isnan(traced.value)
    assert np.isnan(traced.gap)
    rows = jnp.arange(7.0)
    if isinstance(solver, Exact):
        chex.assert_trees_all_equal(traced.plan, jnp.full(7, 7, jnp.int32))
        assert np.all(np.isnan(jnp.take(rows, traced.plan, mode="fill")))
    else:
        assert np.all(np.isnan(traced.plan))

    both = jax.vmap(solver.solve)(otf.TransportProblem(jnp.stack([cost, good])))
    assert both.converged.tolist() == [False, True]
    chex.assert_trees_all_close(
        both.value[1], solver.solve(otf.TransportProblem(good)).value, rtol=1e-5
    )


def test_exact_value_has_the_plan_as_gradient():
    cost = as_cost(STRUCTURES["gaussian"](7))
    gradient = jax.jit(jax.grad(lambda c: Exact().solve(otf.TransportProblem(c)).value))(cost)
    plan = Exact().solve(otf.TransportProblem(cost)).plan
    chex.assert_trees_all_close(gradient, jnp.zeros((7, 7)).at[plan, jnp.arange(7)].set(1 / 7))


@pytest.mark.parametrize("shape", [(7, 7), (4, 3), (1, 4), (0, 3)])
def test_sinkhorn_has_uniform_marginals(shape):
    n, m = shape
    solution = Sinkhorn().solve(otf.TransportProblem(as_cost(squared_distances(n, m, 0))))
    chex.assert_shape(solution.plan, shape)
    assert solution.converged
    if n:
        np.testing.assert_allclose(solution.plan.sum(1), np.full(n, 1 / n), atol=1e-6)
        np.testing.assert_allclose(solution.plan.sum(0), np.full(m, 1 / m), atol=1e-3)


def test_sinkhorn_agrees_with_pot():
    cost, a, b = squared_distances(6, 8, 1), masses(6, 0), masses(8, 1)
    solver = Sinkhorn(epsilon=0.5, relative=False, threshold=1e-5)
    solution = solver.solve(otf.TransportProblem(as_cost(cost), as_cost(a), as_cost(b)))
    expected = np.asarray(ot.sinkhorn(a, b, cost, reg=0.5, stopThr=1e-10, numItermax=20000))
    np.testing.assert_allclose(solution.plan, expected, atol=2e-5)
    assert solution.value == pytest.approx(np.sum(expected * cost), rel=1e-4)
    relative = Sinkhorn(epsilon=0.5 / float(np.std(cost)), threshold=1e-5)
    np.testing.assert_allclose(
        relative.solve(otf.TransportProblem(as_cost(cost), as_cost(a), as_cost(b))).plan,
        expected,
        atol=2e-5,
    )


def test_sinkhorn_tends_to_the_optimum_and_its_gap_bounds_the_rest():
    cost, a, b = squared_distances(6, 8, 2), masses(6, 2), masses(8, 3)
    best = float(np.sum(cost * np.asarray(ot.emd(a, b, cost))))
    losses = []
    for epsilon in (1.0, 0.1, 0.01):
        solver = Sinkhorn(epsilon, threshold=1e-5, max_iterations=20000)
        solution = solver.solve(otf.TransportProblem(as_cost(cost), as_cost(a), as_cost(b)))
        assert solution.converged
        losses.append(float(solution.value) - best)
        # The column marginals are only as exact as the threshold.
        assert solution.gap >= losses[-1] - 1e-5 * cost.max()
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-2 * best
    assert solution.gap < 2e-2 * best


def test_sinkhorn_of_a_square_cost_tends_to_exact():
    cost = as_cost(STRUCTURES["gaussian"](7))
    plan = Exact().solve(otf.TransportProblem(cost)).plan
    matrix = jnp.zeros((7, 7)).at[plan, jnp.arange(7)].set(1 / 7)
    soft = Sinkhorn(epsilon=0.01, max_iterations=20000).solve(otf.TransportProblem(cost))
    np.testing.assert_allclose(soft.plan, matrix, atol=5e-3)


@pytest.mark.parametrize(("scale", "shift"), [(1e6, 0.0), (1e-6, 0.0), (1.0, -50.0), (1e-25, 0.0)])
def test_sinkhorn_sees_neither_scale_nor_shift(scale, shift):
    cost = squared_distances(5, 6, 4)
    expected = Sinkhorn().solve(otf.TransportProblem(as_cost(cost)))
    solution = Sinkhorn().solve(otf.TransportProblem(as_cost(scale * cost + shift)))
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)
    assert solution.gap == pytest.approx(scale * float(expected.gap), rel=1e-2)


def test_sinkhorn_of_a_constant_cost_is_the_product_of_the_marginals():
    a, b = masses(4, 5), masses(3, 6)
    solution = Sinkhorn().solve(otf.TransportProblem(jnp.full((4, 3), 0.1), as_cost(a), as_cost(b)))
    np.testing.assert_allclose(solution.plan, np.outer(a, b), rtol=1e-5)


def test_sinkhorn_with_empty_units():
    a = jnp.array([0.5, 0.0, 0.5])
    solution = Sinkhorn().solve(otf.TransportProblem(as_cost(squared_distances(3, 3, 0)), a, a))
    assert solution.converged
    np.testing.assert_allclose(solution.plan.sum(1), a, atol=1e-6)
    np.testing.assert_allclose(solution.plan.sum(0), a, atol=1e-3)
    assert 0 <= solution.gap < 1


@pytest.mark.usefixtures("default_promotion")
def test_sinkhorn_gradient_matches_finite_differences():
    with jax.enable_x64(True):
        cost = as_cost(squared_distances(4, 5, 5), jnp.float64)
        weights = as_cost(np.random.default_rng(6).normal(size=(4, 5)), jnp.float64)
        direction = as_cost(np.random.default_rng(7).normal(size=(4, 5)), jnp.float64)
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


def test_what_sinkhorn_cannot_solve():
    cost = jnp.ones((2, 3))
    # The annotations would already refuse the wrong shape here; users run without.
    with pytest.raises(ValueError, match=r"Marginal a has shape \(3,\).*2 units"):
        base.check_marginal("a", jnp.full(3, 1 / 3), 2)
    with pytest.raises(ValueError, match="Marginal b is no distribution.*divide"):
        Sinkhorn().solve(otf.TransportProblem(cost, b=jnp.ones(3)))
    with pytest.raises(ValueError, match="epsilon > 0.*Exact"):
        Sinkhorn(epsilon=0.0)
    traced = jax.jit(Sinkhorn().solve)(otf.TransportProblem(cost, None, jnp.ones(3)))
    assert not traced.converged
    assert np.isnan(traced.value)


def test_sinkhorn_says_when_it_has_not_converged():
    cost = as_cost(STRUCTURES["gaussian"](8))
    assert not Sinkhorn(epsilon=1e-3, max_iterations=10).solve(otf.TransportProblem(cost)).converged


def test_a_stack_of_costs_needs_vmap():
    with pytest.raises(ValueError, match="jax.vmap"):
        base.check_cost(jnp.ones((2, 3, 3)))


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("solver", [Exact(), Sinkhorn()])
def test_costs_of_any_size_are_solved(solver, size):
    values = np.random.default_rng(0).uniform(size=(16, 16))
    if size == 1e-42:  # so few digits that two costs may be equal: compare with what is given
        values = np.asarray(as_cost(size * values), np.float64) / size
    cost = as_cost(size * values)
    expected, found = (
        solver.solve(otf.TransportProblem(as_cost(values))),
        solver.solve(otf.TransportProblem(cost)),
    )
    assert found.converged
    if isinstance(solver, Exact):
        assert value_of(cost, found.plan) == pytest.approx(optimum(cost), rel=1e-5)
    else:
        np.testing.assert_allclose(found.plan, expected.plan, atol=1e-5)
    if size > 1e-38:
        assert found.value == pytest.approx(size * float(expected.value), rel=1e-4)
        assert found.gap == pytest.approx(size * float(expected.gap), rel=1e-2, abs=1e-6 * size)


def test_costs_that_span_all_of_float32_are_solved():
    cost = as_cost(np.random.default_rng(1).uniform(-3e38, 3e38, (12, 12)))
    solution = Exact().solve(otf.TransportProblem(cost))
    assert solution.converged
    best = optimum(np.asarray(cost, np.float64))
    assert value_of(cost, solution.plan) == pytest.approx(best, rel=1e-5)
    assert solution.value == pytest.approx(best, rel=1e-5)
