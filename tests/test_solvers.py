"""Checks what all solvers have in common: their contract, and what is said of mistaken calls."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from problems import (
    COST,
    INTRA,
    MASSES_A,
    MASSES_B,
    N,
    as_cost,
    best_match,
    cost_of_match,
    marginals,
    optimum,
    problem,
    solve_example,
    squared_distances,
)

import otfusion_jax as otf
from otfusion_jax.solvers import base

LOOSE = otf.Sinkhorn(epsilon=0.3, tau_a=0.8, tau_b=0.9, threshold=1e-5)
LOW_RANK = otf.LowRank(rank=3)
FUSED = otf.GromovWasserstein(epsilon=0.2, threshold=1e-4)


# Under JAX's transformations


@pytest.mark.parametrize("solver", [otf.Exact(), otf.Sinkhorn()])
def test_jit_and_vmap_change_nothing(solver):
    costs = [as_cost(squared_distances(7, 7, seed)) for seed in range(4)]
    one_by_one = [solver.solve(problem(cost)) for cost in costs]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    jitted = jax.jit(solver.solve)(problem(costs[0]))
    chex.assert_trees_all_close(jitted, one_by_one[0], rtol=1e-5, atol=1e-6)
    batched = jax.vmap(solver.solve)(otf.TransportProblem(jnp.stack(costs)))
    chex.assert_trees_all_close(batched, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [LOOSE, LOW_RANK, FUSED])
def test_batches_under_jit_one_of_which_is_not_finite(solver):
    masses_and_intra = problem(COST, MASSES_A, MASSES_B, INTRA if solver.quadratic else None)
    good = masses_and_intra.cost
    costs = jnp.stack([good, good.at[2, 3].set(np.nan), as_cost(3 - COST**0.5)])

    def solve(cost):
        return solver.solve(dataclasses.replace(masses_and_intra, cost=cost))

    batched = jax.jit(jax.vmap(solve))(costs)
    for i in (0, 2):
        alone = solve_example(solver, costs[i])
        one = jax.tree.map(lambda x, i=i: x[i], batched)
        chex.assert_trees_all_close(one, alone, rtol=2e-2, atol=2e-4)
    assert batched.converged.tolist() == [True, False, True]
    assert np.all(np.isnan(batched.plan[1]))
    assert np.isnan(batched.value[1])
    assert np.isnan(batched.gap[1])


def test_solvers_are_hashable_and_equal_by_fields():
    equal = {otf.Exact(), otf.Exact(), otf.Sinkhorn(), otf.Sinkhorn(0.05)}
    assert len(equal) == 2
    assert otf.Sinkhorn(0.1) not in equal


# Values out of the ordinary


@pytest.mark.parametrize("solver", [otf.Exact(), otf.Sinkhorn()])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_costs_that_are_not_finite(solver, bad):
    good = as_cost(squared_distances(7, 7, 0))
    cost = good.at[2, 4].set(bad).at[5, 0].set(bad)
    with pytest.raises(ValueError, match="2 of 49 costs .* row 2, column 4"):
        solver.solve(problem(cost))

    traced = jax.jit(solver.solve)(problem(cost))
    assert not traced.converged
    assert np.isnan(traced.value)
    assert np.isnan(traced.gap)
    if isinstance(solver, otf.Exact):
        chex.assert_trees_all_equal(traced.plan, jnp.full(7, 7, jnp.int32))
        gathered = jnp.take(jnp.arange(7.0), traced.plan, mode="fill")
        assert np.all(np.isnan(gathered))
    else:
        assert np.all(np.isnan(traced.plan))

    both = jax.vmap(solver.solve)(otf.TransportProblem(jnp.stack([cost, good])))
    assert both.converged.tolist() == [False, True]
    alone = solver.solve(problem(good))
    chex.assert_trees_all_close(both.value[1], alone.value, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("solver", [otf.Exact(), otf.Sinkhorn()])
def test_costs_of_any_size_are_solved(solver, size):
    values = np.random.default_rng(0).uniform(size=(16, 16))
    if size == 1e-42:  # so few digits that two costs may be equal: compare with what is given
        values = np.asarray(as_cost(size * values), np.float64) / size
    cost = as_cost(size * values)
    expected = solver.solve(problem(values))
    solution = solver.solve(problem(cost))
    assert solution.converged
    if isinstance(solver, otf.Exact):
        assert cost_of_match(cost, solution.plan) == pytest.approx(best_match(cost), rel=1e-5)
    else:
        np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-5)
    if size > 1e-38:
        value = size * float(expected.value)
        gap = size * float(expected.gap)
        assert solution.value == pytest.approx(value, rel=1e-4)
        assert solution.gap == pytest.approx(gap, rel=1e-2, abs=1e-6 * size)


@pytest.mark.parametrize("solver", [LOOSE, LOW_RANK, FUSED])
def test_precision_follows_the_cost(solver):
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(True):
            given = problem(
                COST, MASSES_A, MASSES_B, INTRA if solver.quadratic else None, dtype=dtype
            )
            form = jax.eval_shape(solver.solve, given)
        assert form.plan.dtype == form.value.dtype == form.gap.dtype == dtype


@pytest.mark.parametrize("solver", [LOOSE, LOW_RANK, FUSED])
def test_units_without_mass(solver):
    a = np.where(np.arange(N) == 2, 0, MASSES_A)
    solution = solve_example(solver, a=a / a.sum())
    assert np.all(np.isfinite(solution.plan))
    assert np.all(solution.plan[2] == 0)
    assert solution.converged
    assert np.isfinite(solution.gap)


@pytest.mark.parametrize("solver", [LOOSE, LOW_RANK, FUSED])
def test_a_side_without_units(solver):
    intra = (np.zeros((0, 0)), np.zeros((3, 3))) if solver.quadratic else None
    solution = solver.solve(problem(np.zeros((0, 3)), intra=intra))
    chex.assert_shape(solution.plan, (0, 3))
    assert solution.converged


# Evidence


@pytest.mark.parametrize("solver", [LOOSE, LOW_RANK, otf.Sinkhorn()])
def test_the_gap_bounds_the_loss_against_plans_with_the_same_marginals(solver):
    solution = solve_example(solver)
    assert solution.converged
    loss = loss_of(solution.plan)
    assert loss > 1e-3
    assert loss * (1 - 1e-4) <= solution.gap < 2 * loss + 0.05 * np.std(COST)


def loss_of(plan):
    """How much more a plan costs than the best with its own marginals."""
    plan = np.asarray(plan, np.float64)
    rows, columns = marginals(plan)
    return np.sum(plan * COST) - optimum(COST, rows, columns)


# Intra-domain costs


def test_only_quadratic_solvers_ask_for_intra_domain_costs():
    assert otf.GromovWasserstein.quadratic
    for solver in (otf.Exact, otf.Sinkhorn, otf.LowRank):
        assert not solver.quadratic
    ignored = LOOSE.solve(problem(COST, MASSES_A, MASSES_B, INTRA))
    chex.assert_trees_all_equal(ignored, solve_example(LOOSE))


# Solvers of a user's own


@dataclasses.dataclass(frozen=True)
class Even(otf.AbstractSolver):
    """The example of `AbstractSolver`."""

    def compute(self, problem):
        plan = jnp.full_like(problem.cost, 1 / problem.cost.size)
        value = jnp.mean(problem.cost)
        gap = value - jnp.min(problem.cost)
        return otf.Solution(plan, value, jnp.array(True), gap)


def test_a_solver_of_ones_own_is_checked_and_aligns_as_any_other():
    solution = Even().solve(problem(COST))
    assert solution.gap >= loss_of(solution.plan)
    with pytest.raises(ValueError, match="1 of 4 costs are not finite"):
        Even().solve(problem(np.array([[1.0, np.nan], [0.0, 1.0]])))

    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    a, b = ({"w": normal(3, 4, seed=s), "v": normal(4, 2, seed=s + 2)} for s in (0, 1))
    symmetry = otf.trace_symmetry(apply, a, jnp.ones((5, 3)))
    alignment = otf.align(symmetry, a, b, method=otf.ForwardPass(), solver=Even())
    np.testing.assert_allclose(alignment.plans["w"], np.full((4, 4), 1 / 16))


def test_a_solver_that_returns_no_solution_is_named():
    @dataclasses.dataclass(frozen=True)
    class Bare(otf.AbstractSolver):
        def compute(self, problem):
            return jnp.arange(len(problem.cost))

    with pytest.raises(TypeError, match="Bare.compute returned an array; it must return a Solut"):
        Bare().solve(otf.TransportProblem(jnp.ones((2, 2))))


def test_a_solver_without_compute_cannot_be_made():
    class Unfinished(otf.AbstractSolver):
        pass

    with pytest.raises(TypeError, match="abstract method '?compute"):
        Unfinished()  # pyright: ignore[reportAbstractUsage]


# Mistakes. The annotations would already refuse most of these in `solve`; users run without.


class Shaped:
    """What has a shape, and is no array."""

    shape = (2, 2)
    ndim = 2


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (jnp.ones((3, 3)), "an array"),
        ((jnp.ones((3, 3)), None, None), "a tuple"),
        (otf.TransportProblem, "the class TransportProblem"),
    ],
)
def test_what_is_no_problem_is_told_how_to_call_a_solver(given, named):
    expected = rf"^{named} was given where a problem is wanted: call solver.solve\(TransportProblem"
    with pytest.raises(TypeError, match=expected):
        base.check_problem(given)


def test_a_cost_alone_is_the_problem_of_uniform_masses():
    cost = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    alone, problem = otf.Exact().solve(cost), otf.Exact().solve(otf.TransportProblem(cost))
    chex.assert_trees_all_equal(alone, problem)
    assert alone.plan.tolist() == [1, 0]


def test_complex_costs_are_refused():
    problem = otf.TransportProblem(jnp.ones((2, 2), jnp.complex64))
    with pytest.raises(ValueError, match=r"costs are real numbers, got complex64; pass jnp.abs"):
        base.check_problem(problem)


@pytest.mark.parametrize("cost", [[[1.0, 2.0], [3.0, 4.0]], "cost", Shaped()])
def test_a_cost_that_is_no_array(cost):
    with pytest.raises(TypeError, match=f"the cost is a {type(cost).__name__}; pass an array"):
        base.check_problem(otf.TransportProblem(cost))


def test_masses_that_are_no_array():
    lists: dict = {"a": [0.5, 0.5]}
    with pytest.raises(TypeError, match="marginal a is a list; pass an array"):
        base.check_problem(otf.TransportProblem(jnp.ones((2, 2)), **lists))


def test_masses_of_another_size():
    given = otf.TransportProblem(jnp.ones((2, 3)), a=jnp.full(3, 1 / 3))
    with pytest.raises(ValueError, match=r"Marginal a has shape \(3,\).*2 units"):
        base.check_problem(given)


def test_a_stack_of_costs_needs_vmap():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3\).*jax.vmap"):
        base.check_problem(otf.TransportProblem(jnp.ones((2, 3, 3))))


def test_intra_domain_costs_that_do_not_fit():
    cost = jnp.ones((2, 3))
    source, target = jnp.ones((2, 2)), jnp.ones((3, 3))
    with pytest.raises(ValueError, match=r"needs intra=\(source, target\).*\(2, 2\) and \(3, 3\)"):
        FUSED.solve(otf.TransportProblem(cost))
    with pytest.raises(ValueError, match=r"within the target have shape \(2, 2\).*3 units"):
        base.check_intra(otf.TransportProblem(cost, intra=(source, source)))
    infinite = target.at[0, 1].set(jnp.inf)
    with pytest.raises(ValueError, match="1 of 9 costs are not finite"):
        FUSED.solve(otf.TransportProblem(cost, intra=(source, infinite)))


@pytest.mark.parametrize("intra", [jnp.ones((2, 2)), (jnp.ones((2, 2)),)])
def test_intra_domain_costs_of_one_side_alone(intra):
    given = otf.TransportProblem(jnp.ones((2, 2)), intra=intra)
    with pytest.raises(TypeError, match=r"pass a pair \(source, target\) of matrices"):
        base.check_intra(given)


@pytest.mark.parametrize(
    ("solver", "settings", "message"),
    [
        (otf.Sinkhorn, {"epsilon": 0.0}, "epsilon > 0.*Exact"),
        (otf.Sinkhorn, {"epsilon_init": 0.5}, "epsilon_init >= 1"),
        (otf.Sinkhorn, {"epsilon_decay": 1.0}, "epsilon_decay in"),
        (otf.Sinkhorn, {"tau_a": 0.0}, r"tau_a in \(0, 1\], got 0.0"),
        (otf.Sinkhorn, {"tau_a": 1.5}, r"tau_a in \(0, 1\], got 1.5"),
        (otf.Sinkhorn, {"tau_b": 0.0}, r"tau_b in \(0, 1\], got 0.0"),
        (otf.Sinkhorn, {"tau_b": 1.5}, r"tau_b in \(0, 1\], got 1.5"),
        (otf.LowRank, {"rank": 0}, "rank >= 1, got 0"),
        (otf.LowRank, {"epsilon": -1}, "epsilon >= 0, got -1"),
        (otf.GromovWasserstein, {"alpha": 1.5}, "alpha in"),
        (otf.GromovWasserstein, {"epsilon": 0.0}, "GromovWasserstein needs epsilon > 0"),
    ],
)
def test_settings_out_of_range(solver, settings, message):
    with pytest.raises(ValueError, match=message):
        solver(**settings)
