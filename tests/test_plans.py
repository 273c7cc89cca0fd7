"""Checks exact plans of any sizes and marginals against POT, and that their gap is evidence."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import as_cost, marginals, masses, optimum, squared_distances

import otfusion_jax as otf
from otfusion_jax.solvers import assignment, network_simplex
from otfusion_jax.solvers.exact import Exact

# Equal, one a multiple of the other, neither, one unit.
SHAPES = [(6, 6), (12, 4), (3, 12), (7, 5), (5, 9), (5, 1)]


def given(shape, which, dtype=jnp.float32):
    """Random marginals of the sides in `which`, None for the others."""
    a, b = (as_cost(masses(size, seed), dtype) for seed, size in enumerate(shape))
    return a if "a" in which else None, b if "b" in which else None


def as_matrix(plan):
    """A plan of either form as a matrix of masses."""
    if plan.ndim == 2:
        return np.asarray(plan, np.float64)
    matrix = np.zeros((len(plan), len(plan)))
    matrix[np.asarray(plan), np.arange(len(plan))] = 1 / len(plan)
    return matrix


@pytest.mark.parametrize("which", ["", "a", "b", "ab"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_agrees_with_pot(shape, which):
    with jax.enable_x64(True):
        cost = as_cost(squared_distances(*shape, seed=0), jnp.float64)
        a, b = given(shape, which, jnp.float64)
        solution = jax.tree.map(np.asarray, Exact().solve(otf.TransportProblem(cost, a, b)))
        cost, a, b = jax.tree.map(np.asarray, (cost, a, b))
    permutation = shape == (6, 6) and not which
    assert solution.plan.dtype == (jnp.int32 if permutation else jnp.float64)
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
def test_exact_in_float32(shape, which, scale, shift):
    cost = as_cost(scale * squared_distances(*shape, seed=1) + shift)
    a, b = given(shape, which)
    solution = Exact().solve(otf.TransportProblem(cost, a, b))
    chex.assert_type([solution.plan, solution.value, solution.gap], jnp.float32)
    chex.assert_trees_all_equal(solution, Exact().solve(otf.TransportProblem(cost, a, b)))
    largest = float(np.max(np.abs(cost)))
    assert solution.converged
    assert solution.value == pytest.approx(optimum(cost, a, b), abs=2e-6 * largest)
    assert 0 <= solution.gap <= 2e-6 * largest


def test_exact_with_units_without_mass():
    cost, a, b = as_cost(squared_distances(4, 6, 2)), masses(4, 3), masses(6, 4)
    a[2], b[[0, 4]] = 0, 0
    a, b = as_cost(a / a.sum()), as_cost(b / b.sum())
    solution = Exact().solve(otf.TransportProblem(cost, a, b))
    assert solution.converged
    np.testing.assert_allclose(marginals(solution.plan)[0], a, atol=1e-6)
    np.testing.assert_allclose(marginals(solution.plan)[1], b, atol=1e-6)
    assert solution.value == pytest.approx(optimum(cost, a, b), rel=1e-5)
    # Masses whose sum is 1 up to rounding are no obstacle, and no scaled plan either.
    rounded = Exact().solve(otf.TransportProblem(cost, a * 1.0005, b))
    np.testing.assert_allclose(rounded.plan, solution.plan, atol=1e-6)


def test_exact_without_units():
    for shape in ((0, 3), (3, 0)):
        solution = Exact().solve(otf.TransportProblem(jnp.zeros(shape)))
        chex.assert_shape(solution.plan, shape)
        assert solution.converged
        assert solution.value == solution.gap == 0


@pytest.mark.parametrize("which", ["", "ab"])
def test_exact_gap_bounds_the_loss_of_other_plans(monkeypatch, which):
    """Whatever is returned by POT, the gap says how far from optimal it may be."""
    shape = (7, 5)
    cost = as_cost(squared_distances(*shape, seed=3))
    a, b = given(shape, which)
    rng = np.random.default_rng(0)

    def wrong(cost, rows, columns):
        rows, columns = (np.asarray(x, np.float64) for x in (rows, columns))
        plan = np.outer(rows / rows.sum(), columns / columns.sum())
        return plan.astype(np.float32), rng.normal(size=columns.shape).astype(np.float32)

    monkeypatch.setattr(network_simplex, "_solve", wrong)
    # Another tolerance than elsewhere: jit must not remember the true solver.
    solution = Exact(tolerance=3e-5).solve(otf.TransportProblem(cost, a, b))
    loss = float(solution.value) - optimum(cost, a, b)
    assert loss > 0.1
    assert solution.gap >= loss * (1 - 1e-5)
    assert not solution.converged


def test_exact_gap_of_copies_bounds_the_loss_of_a_wrong_permutation(monkeypatch):
    monkeypatch.setattr(
        assignment, "assign", lambda cost: (jnp.arange(12), assignment._identity_gap(cost))
    )
    cost = as_cost(squared_distances(12, 4, 4))
    plan, gap = assignment.assign_copies(cost)
    loss = float(np.sum(np.asarray(plan, np.float64) * cost)) - optimum(cost, None, None)
    assert loss > 0.1
    assert gap >= loss * (1 - 1e-5)


@pytest.mark.parametrize(("shape", "which"), [((12, 4), ""), ((7, 5), "ab")])
def test_exact_under_jit_and_vmap(shape, which):
    costs = jnp.stack([as_cost(squared_distances(*shape, seed=seed)) for seed in range(3)])
    a, b = given(shape, which)
    loop = [Exact().solve(otf.TransportProblem(cost, a, b)) for cost in costs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)

    def solve(cost):
        return Exact().solve(otf.TransportProblem(cost, a, b))

    chex.assert_trees_all_close(jax.jit(solve)(costs[0]), loop[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.vmap(solve)(costs), stacked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "which"), [((12, 4), ""), ((7, 5), "ab")])
def test_exact_value_of_a_matrix_has_the_plan_as_gradient(shape, which):
    cost = as_cost(squared_distances(*shape, seed=5))
    a, b = given(shape, which)
    gradient = jax.jit(jax.grad(lambda c: Exact().solve(otf.TransportProblem(c, a, b)).value))(cost)
    chex.assert_trees_all_close(
        gradient, Exact().solve(otf.TransportProblem(cost, a, b)).plan, atol=1e-7
    )


@pytest.mark.parametrize(("shape", "which"), [((12, 4), ""), ((7, 5), ""), ((7, 5), "ab")])
def test_traced_costs_that_are_not_finite_make_no_plan(shape, which):
    good = as_cost(squared_distances(*shape, seed=6))
    a, b = given(shape, which)
    both = jax.vmap(lambda c: Exact().solve(otf.TransportProblem(c, a, b)))(
        jnp.stack([good.at[2, 3].set(np.nan), good])
    )
    assert both.converged.tolist() == [False, True]
    assert np.all(np.isnan(both.plan[0]))
    assert np.isnan(both.value[0])
    assert np.isnan(both.gap[0])
    assert both.value[1] == pytest.approx(optimum(good, a, b), rel=1e-5)


@pytest.mark.parametrize("bad", [[0.5, 0.7, -0.2], [0.5, 0.5, 0.5], [0.5, 0.5, np.nan]])
def test_marginals_that_are_no_distribution(bad):
    cost, bad = as_cost(squared_distances(2, 3, 7)), as_cost(bad)
    with pytest.raises(ValueError, match="Marginal b is no distribution.*divide"):
        Exact().solve(otf.TransportProblem(cost, b=bad))
    traced = jax.jit(Exact().solve)(otf.TransportProblem(cost, None, bad))
    assert not traced.converged
    assert np.all(np.isnan(traced.plan))
    assert np.isnan(traced.value)
    assert np.isnan(traced.gap)


def test_without_pot_the_linear_program_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    monkeypatch.setitem(sys.modules, "ot.lp", None)
    cost = jnp.ones((3, 2))
    with pytest.raises(ImportError, match=r"pip install otfusion-jax\[lp\], or use Sinkhorn"):
        Exact().solve(otf.TransportProblem(cost))
    with pytest.raises(ImportError, match=r"pip install otfusion-jax\[lp\], or use Sinkhorn"):
        jax.jit(Exact().solve)(otf.TransportProblem(cost))
    with pytest.raises(ImportError, match="POT, which is not installed"):
        Exact().solve(otf.TransportProblem(jnp.ones((2, 2)), a=jnp.array([0.5, 0.5])))
    # Neither takes it.
    assert Exact().solve(otf.TransportProblem(jnp.ones((12, 4)))).converged
    assert Exact().solve(otf.TransportProblem(jnp.ones((2, 2)))).converged
