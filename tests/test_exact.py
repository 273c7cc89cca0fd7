"""Checks exact plans against SciPy and POT, and that their gap is evidence.

First permutations, between as many units on both sides; then plans of any sizes and marginals.
"""

import operator
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    as_cost,
    best_match,
    cost_of_match,
    marginals,
    masses,
    optimum,
    problem,
    squared_distances,
)

import otfusion_jax as otf
from otfusion_jax.solvers import assignment, duality, network_simplex
from otfusion_jax.solvers.base import TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.padding import solve_assignment
from otfusion_jax.solvers.stack import solve_stack

# Permutations

SIZES = (0, 1, 2, 7, 64)


def integers(n, seed, high):
    return np.random.default_rng(seed).integers(0, high, (n, n))


def dead_units(n):
    return squared_distances(n, n, 7) * np.outer(np.arange(n) % 3, np.ones(n))


def norms_dominate(n):
    return np.outer(np.arange(n), np.arange(n)) + squared_distances(n, n, 1)


STRUCTURES = {
    "gaussian": lambda n: squared_distances(n, n, 0),
    "norms_dominate": norms_dominate,
    "integer_ties": lambda n: integers(n, 2, 4),
    "huge": lambda n: 1e6 * squared_distances(n, n, 3),
    "tiny": lambda n: 1e-6 * squared_distances(n, n, 4),
    "negative": lambda n: -squared_distances(n, n, 5),
    "offset": lambda n: 1000 + integers(n, 6, 50),
    "constant": lambda n: np.full((n, n), 0.3),
    "dead_units": dead_units,
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", SIZES)
def test_permutations_are_optimal(n, structure):
    cost = as_cost(STRUCTURES[structure](n))
    solution = Exact().solve(problem(cost))
    chex.assert_shape(solution.plan, (n,))
    chex.assert_type([solution.plan, solution.value], [jnp.int32, jnp.float32])
    assert sorted(solution.plan.tolist()) == list(range(n))
    assert solution.converged
    if n == 0:
        assert solution.value == solution.gap == 0
        return
    best = best_match(cost)
    rounding = 1e-6 * float(np.max(np.abs(cost)))
    assert cost_of_match(cost, solution.plan) == pytest.approx(best, abs=rounding)
    assert solution.value == pytest.approx(best, abs=rounding)
    assert 0 <= solution.gap <= rounding


def test_equal_units_keep_their_order():
    solution = Exact().solve(problem(np.ones((7, 7))))
    chex.assert_trees_all_equal(solution.plan, jnp.arange(7))


def test_a_planted_permutation_is_found():
    rng = np.random.default_rng(0)
    planted = rng.permutation(64)
    source = rng.normal(size=(64, 6))
    target = source[planted] + 0.01 * rng.normal(size=(64, 6))
    cost = np.sum((source[:, None] - target[None]) ** 2, axis=-1)
    solution = Exact().solve(problem(cost))
    np.testing.assert_array_equal(solution.plan, planted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_permutations_in_other_precisions(dtype):
    wide = dtype == jnp.float64
    with jax.enable_x64(wide):
        cost = as_cost(STRUCTURES["gaussian"](7), dtype)
        solution = Exact().solve(problem(cost, dtype=dtype))
        assert solution.plan.dtype == jnp.int32
        assert solution.value.dtype == (jnp.float64 if wide else jnp.float32)
        assert cost_of_match(cost, solution.plan) == pytest.approx(best_match(cost), rel=1e-12)
        assert solution.converged


def test_float32_stays_when_float64_is_enabled():
    with jax.enable_x64(True):
        solution = Exact().solve(problem(STRUCTURES["gaussian"](7)))
        chex.assert_type([solution.plan, solution.value, solution.gap], [jnp.int32, "f4", "f4"])


@pytest.mark.parametrize("swap", [(0, 1), (3, 5)])
def test_the_gap_bounds_the_loss_of_a_bad_permutation(swap):
    cost = as_cost(STRUCTURES["gaussian"](7))
    best = np.asarray(Exact().solve(problem(cost)).plan)
    worse = best.copy()
    worse[list(swap)] = best[list(swap)[::-1]]
    loss = cost_of_match(cost, worse) - cost_of_match(cost, best)
    assert loss > 1e-3
    assert duality.identity_gap(cost[worse]) >= loss * (1 - 1e-5)
    assert duality.identity_gap(cost[best]) <= 1e-6


def test_the_gap_of_every_permutation_is_an_upper_bound():
    cost = as_cost(squared_distances(7, 7, 3))
    keys = jax.random.split(jax.random.key(0), 30)
    plans = jax.vmap(lambda key: jax.random.permutation(key, 7))(keys)
    gaps = jax.vmap(lambda plan: duality.identity_gap(cost[plan]))(plans)
    best = best_match(cost)
    for plan, gap in zip(plans, gaps, strict=True):
        loss = cost_of_match(cost, plan) - best
        assert gap >= loss * (1 - 1e-5)


def test_a_wrong_permutation_does_not_count_as_converged(monkeypatch):
    reverse = jnp.stack([jnp.arange(11)[::-1], jnp.arange(11)])

    class Matching:
        paired_indices = reverse

    monkeypatch.setattr(assignment.unreg, "hungarian", lambda geom: (0.0, Matching))
    # Costs with ties: where each row is cheapest at a column of its own, no solver is asked.
    cost = as_cost(integers(11, seed=0, high=3))
    # Another tolerance than elsewhere: jit must not remember the true solver.
    solution = Exact(tolerance=2e-5).solve(problem(cost))
    chex.assert_trees_all_equal(solution.plan, reverse[0].astype(jnp.int32))
    assert not solution.converged
    loss = cost_of_match(cost, solution.plan) - best_match(cost)
    assert solution.gap >= loss * (1 - 1e-5)


def test_the_preconditioner_prepares_the_answer():
    """After it, nearly every row must be cheapest where the optimal permutation has it."""
    cost = as_cost(STRUCTURES["gaussian"](64))
    cost = cost - cost.min(axis=1, keepdims=True)
    cost = cost - cost.min(axis=0, keepdims=True)
    best = np.argsort(Exact().solve(problem(cost)).plan)
    before = np.mean(np.argmin(cost, axis=1) == best)
    after = np.mean(np.argmin(assignment._precondition(cost), axis=1) == best)
    assert before < 0.6
    assert after > 0.9


def test_the_value_has_the_permutation_as_gradient():
    cost = as_cost(STRUCTURES["gaussian"](7))

    def value(c):
        return Exact().solve(otf.TransportProblem(c)).value

    gradient = jax.jit(jax.grad(value))(cost)
    plan = Exact().solve(problem(cost)).plan
    expected = jnp.zeros((7, 7)).at[plan, jnp.arange(7)].set(1 / 7)
    chex.assert_trees_all_close(gradient, expected)


def test_costs_that_span_all_of_float32_are_solved():
    cost = as_cost(np.random.default_rng(1).uniform(-3e38, 3e38, (12, 12)))
    solution = Exact().solve(problem(cost))
    assert solution.converged
    best = best_match(cost)
    assert cost_of_match(cost, solution.plan) == pytest.approx(best, rel=1e-5)
    assert solution.value == pytest.approx(best, rel=1e-5)


# Plans of any sizes and marginals

# Equal, one a multiple of the other, neither, one unit.
SHAPES = [(6, 6), (12, 4), (3, 12), (7, 5), (5, 9), (5, 1)]


def given(shape, which, dtype=jnp.float32):
    """Random marginals of the sides in `which`, None for the others."""
    n, m = shape
    a = as_cost(masses(n, 0), dtype) if "a" in which else None
    b = as_cost(masses(m, 1), dtype) if "b" in which else None
    return a, b


def as_matrix(plan):
    """A plan of either form as a matrix of masses."""
    if plan.ndim == 2:
        return np.asarray(plan, np.float64)
    matrix = np.zeros((len(plan), len(plan)))
    matrix[np.asarray(plan), np.arange(len(plan))] = 1 / len(plan)
    return matrix


@pytest.mark.parametrize("which", ["", "a", "b", "ab"])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_agree_with_pot(shape, which):
    with jax.enable_x64(True):
        cost = as_cost(squared_distances(*shape, seed=0), jnp.float64)
        a, b = given(shape, which, jnp.float64)
        solution = Exact().solve(otf.TransportProblem(cost, a, b))
        solution, cost, a, b = jax.tree.map(np.asarray, (solution, cost, a, b))
    is_permutation = shape == (6, 6) and not which
    assert solution.plan.dtype == (jnp.int32 if is_permutation else jnp.float64)
    assert solution.value.dtype == solution.gap.dtype == jnp.float64
    plan = as_matrix(solution.plan)
    chex.assert_shape(plan, shape)
    assert np.all(plan >= 0)
    for got, asked in zip(marginals(plan), (a, b), strict=True):
        expected = np.full(len(got), 1 / len(got)) if asked is None else asked
        np.testing.assert_allclose(got, expected, atol=1e-12)
    assert solution.converged
    assert solution.value == pytest.approx(optimum(cost, a, b), rel=1e-6)
    assert solution.value == pytest.approx(np.sum(plan * cost), rel=1e-12)
    assert 0 <= solution.gap <= 1e-9 * np.max(cost)


@pytest.mark.parametrize(("shape", "which"), [((12, 4), ""), ((7, 5), ""), ((7, 5), "ab")])
@pytest.mark.parametrize(("scale", "shift"), [(1e6, 0.0), (1e-6, 0.0), (-1.0, 30.0), (0.0, 0.3)])
def test_plans_in_float32(shape, which, scale, shift):
    cost = as_cost(scale * squared_distances(*shape, seed=1) + shift)
    a, b = given(shape, which)
    solution = Exact().solve(otf.TransportProblem(cost, a, b))
    chex.assert_type([solution.plan, solution.value, solution.gap], jnp.float32)
    again = Exact().solve(otf.TransportProblem(cost, a, b))
    chex.assert_trees_all_equal(solution, again)
    rounding = 2e-6 * float(np.max(np.abs(cost)))
    assert solution.converged
    assert solution.value == pytest.approx(optimum(cost, a, b), abs=rounding)
    assert 0 <= solution.gap <= rounding


def test_units_without_mass():
    cost = as_cost(squared_distances(4, 6, 2))
    a, b = masses(4, 3), masses(6, 4)
    a[2] = 0
    b[[0, 4]] = 0
    a, b = as_cost(a / a.sum()), as_cost(b / b.sum())
    solution = Exact().solve(problem(cost, a, b))
    assert solution.converged
    rows, columns = marginals(solution.plan)
    np.testing.assert_allclose(rows, a, atol=1e-6)
    np.testing.assert_allclose(columns, b, atol=1e-6)
    assert solution.value == pytest.approx(optimum(cost, a, b), rel=1e-5)
    # Masses whose sum is 1 up to rounding are no obstacle, and no scaled plan either.
    rounded = Exact().solve(problem(cost, a * 1.0005, b))
    np.testing.assert_allclose(rounded.plan, solution.plan, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_side_without_units(shape):
    solution = Exact().solve(problem(np.zeros(shape)))
    chex.assert_shape(solution.plan, shape)
    assert solution.converged
    assert solution.value == solution.gap == 0


@pytest.mark.parametrize("which", ["", "ab"])
def test_the_gap_bounds_the_loss_of_other_plans(monkeypatch, which):
    """Whatever is returned by POT, the gap says how far from optimal it may be."""
    shape = (7, 5)
    cost = as_cost(squared_distances(*shape, seed=3))
    a, b = given(shape, which)
    rng = np.random.default_rng(0)

    def independent(cost, rows, columns):
        rows = np.asarray(rows, np.float64)
        columns = np.asarray(columns, np.float64)
        plan = np.outer(rows / rows.sum(), columns / columns.sum())
        potentials = rng.normal(size=columns.shape)
        return plan.astype(np.float32), potentials.astype(np.float32)

    monkeypatch.setattr(network_simplex, "_solve_on_host", independent)
    # Another tolerance than elsewhere: jit must not remember the true solver.
    solution = Exact(tolerance=3e-5).solve(otf.TransportProblem(cost, a, b))
    loss = float(solution.value) - optimum(cost, a, b)
    assert loss > 0.1
    assert solution.gap >= loss * (1 - 1e-5)
    assert not solution.converged


def test_the_gap_of_copies_bounds_the_loss_of_a_wrong_permutation(monkeypatch):
    def identity(cost):
        return jnp.arange(12), duality.identity_gap(cost)

    monkeypatch.setattr(assignment, "assign", identity)
    cost = as_cost(squared_distances(12, 4, 4))
    plan, gap = assignment.assign_copies(cost)
    value = float(np.sum(np.asarray(plan, np.float64) * cost))
    loss = value - optimum(cost, None, None)
    assert loss > 0.1
    assert gap >= loss * (1 - 1e-5)


@pytest.mark.parametrize(("shape", "which"), [((12, 4), ""), ((7, 5), "ab")])
def test_jit_and_vmap_change_no_plan(shape, which):
    costs = [as_cost(squared_distances(*shape, seed=seed)) for seed in range(3)]
    a, b = given(shape, which)

    def solve(cost):
        return Exact().solve(otf.TransportProblem(cost, a, b))

    one_by_one = [solve(cost) for cost in costs]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    batched = jax.vmap(solve)(jnp.stack(costs))
    chex.assert_trees_all_close(batched, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.jit(solve)(costs[0]), one_by_one[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "which"), [((12, 4), ""), ((7, 5), "ab")])
def test_the_value_has_the_plan_as_gradient(shape, which):
    cost = as_cost(squared_distances(*shape, seed=5))
    a, b = given(shape, which)

    def value(c):
        return Exact().solve(otf.TransportProblem(c, a, b)).value

    gradient = jax.jit(jax.grad(value))(cost)
    solution = Exact().solve(otf.TransportProblem(cost, a, b))
    chex.assert_trees_all_close(gradient, solution.plan, atol=1e-7)


@pytest.mark.parametrize(("shape", "which"), [((12, 4), ""), ((7, 5), ""), ((7, 5), "ab")])
def test_traced_costs_that_are_not_finite_make_no_plan(shape, which):
    good = as_cost(squared_distances(*shape, seed=6))
    bad = good.at[2, 3].set(np.nan)
    a, b = given(shape, which)

    def solve(cost):
        return Exact().solve(otf.TransportProblem(cost, a, b))

    both = jax.vmap(solve)(jnp.stack([bad, good]))
    assert both.converged.tolist() == [False, True]
    assert np.all(np.isnan(both.plan[0]))
    assert np.isnan(both.value[0])
    assert np.isnan(both.gap[0])
    assert both.value[1] == pytest.approx(optimum(good, a, b), rel=1e-5)


@pytest.mark.parametrize("bad", [[0.5, 0.7, -0.2], [0.5, 0.5, 0.5], [0.5, 0.5, np.nan]])
def test_masses_that_are_no_distribution(bad):
    given = problem(squared_distances(2, 3, 7), b=np.array(bad))
    with pytest.raises(ValueError, match="Marginal b is no distribution.*divide"):
        Exact().solve(given)
    traced = jax.jit(Exact().solve)(given)
    assert not traced.converged
    assert np.all(np.isnan(traced.plan))
    assert np.isnan(traced.value)
    assert np.isnan(traced.gap)


def test_without_pot_the_linear_program_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    monkeypatch.setitem(sys.modules, "ot.lp", None)
    neither_divides = problem(np.ones((3, 2)))
    with pytest.raises(ImportError, match=r"pip install otfusion-jax\[lp\], or use Sinkhorn"):
        Exact().solve(neither_divides)
    with pytest.raises(ImportError, match=r"pip install otfusion-jax\[lp\], or use Sinkhorn"):
        jax.jit(Exact().solve)(neither_divides)
    with pytest.raises(ImportError, match="POT, which is not installed"):
        Exact().solve(problem(np.ones((2, 2)), a=np.full(2, 0.5)))
    # Neither takes it.
    assert Exact().solve(problem(np.ones((12, 4)))).converged
    assert Exact().solve(problem(np.ones((2, 2)))).converged


# --- filled up to a size that several problems share


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 9, 31, 33, 100])
@pytest.mark.parametrize("kind", ["distances", "normal", "negative", "tiny", "huge", "integers"])
def test_a_problem_filled_up_has_the_same_solution(n: int, kind: str):
    draw = np.random.default_rng(n)
    values = {
        "distances": squared_distances(n, n, seed=n),
        "normal": draw.normal(size=(n, n)),
        "negative": -1 - draw.random((n, n)),
        "tiny": 1e-30 * draw.normal(size=(n, n)),
        "huge": 1e35 * draw.normal(size=(n, n)),
        "integers": draw.integers(0, 3, (n, n)),
    }[kind]
    cost = as_cost(values)
    found = solve_assignment(otf.Exact(), cost)
    assert found.converged
    assert sorted(found.plan.tolist()) == list(range(n))
    np.testing.assert_allclose(found.value, best_match(cost), rtol=1e-5)
    np.testing.assert_allclose(found.value, cost_of_match(cost, found.plan), rtol=1e-5)
    assert 0 <= found.gap <= 2e-5 * float(jnp.max(jnp.abs(cost)))


@pytest.mark.parametrize("value", [0, 3, -3])
def test_equal_costs_filled_up_leave_everything_in_place(value: float):
    found = solve_assignment(otf.Exact(), as_cost(np.full((5, 5), value)))
    assert found.plan.tolist() == list(range(5))
    assert found.value == value


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_problem_without_a_solution_has_none_filled_up(bad: float):
    cost = as_cost(np.ones((5, 5))).at[1, 2].set(bad)
    found = solve_assignment(otf.Exact(), cost)
    assert not found.converged
    assert (np.asarray(found.plan) >= 5).all()
    assert np.isnan(found.value)


# --- known costs, many at once


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_small_costs_are_solved_together_as_one_by_one(n, structure):
    cost: Any = np.asarray(as_cost(STRUCTURES[structure](n)))
    rng = np.random.default_rng(n)
    # Of other sizes, in another order, and one that cannot be solved.
    stack: Any = np.stack([cost, 1e4 * cost, cost[rng.permutation(n)], np.full_like(cost, np.nan)])
    together = solve_stack(Exact(), TransportProblem(stack))
    assert not together.converged[3]
    assert (together.plan[3] == n).all()
    assert np.isnan(together.value[3])
    for number in range(3):
        alone = Exact().compute(TransportProblem(stack[number]))
        chex.assert_trees_all_equal(jax.tree.map(operator.itemgetter(number), together), alone)
        best = best_match(stack[number])
        rounding = 1e-6 * float(np.max(np.abs(stack[number])))
        assert cost_of_match(stack[number], alone.plan) == pytest.approx(best, abs=rounding)
        assert alone.value == pytest.approx(best, abs=rounding)
        assert alone.converged
        assert 0 <= alone.gap <= rounding


def test_more_small_costs_than_are_solved_at_once():
    costs: Any = np.random.default_rng(0).random((300, 64, 64)).astype(np.float32)
    solutions = solve_stack(Exact(), TransportProblem(costs.reshape(20, 15, 64, 64)))
    assert solutions.plan.shape == (20, 15, 64)
    expected = np.reshape([best_match(cost) for cost in costs], (20, 15))
    np.testing.assert_allclose(solutions.value, expected, rtol=1e-5)
    assert solutions.converged.all()
