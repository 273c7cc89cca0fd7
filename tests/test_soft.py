"""Checks soft plans against POT, and what their docstrings promise of them."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike
from problems import as_cost, marginals, masses, optimum, ot, squared_distances

import otfusion_jax as otf
from otfusion_jax.solvers import gromov_wasserstein
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.gromov_wasserstein import GromovWasserstein
from otfusion_jax.solvers.low_rank import LowRank
from otfusion_jax.solvers.sinkhorn import Sinkhorn


def symmetric(x):
    return (x + x.T) ** 0.5


N, M = 8, 6
COST = squared_distances(N, M, 0)
A, B = masses(N, 0), masses(M, 1)
WITHIN = symmetric(squared_distances(N, N, 1)), symmetric(squared_distances(M, M, 2))
LOOSE = Sinkhorn(epsilon=0.3, tau_a=0.8, tau_b=0.9, threshold=1e-5)
RANK_3 = LowRank(rank=3)
FUSED = GromovWasserstein(epsilon=0.2, threshold=1e-4)


def solve(solver, cost: ArrayLike = COST, a=A, b=B, intra=WITHIN):
    """Solves in float32."""
    source, target = intra
    pair = (as_cost(source), as_cost(target)) if solver.quadratic else None
    return solver.solve(otf.TransportProblem(as_cost(cost), as_cost(a), as_cost(b), pair))


def own_loss(solution, cost=COST):
    """How much more a plan costs than the best with its own marginals."""
    plan = np.asarray(solution.plan, np.float64)
    rows, columns = marginals(plan)
    return np.sum(plan * cost) - optimum(cost, rows, columns)


# --- annealing


def test_annealing_ends_where_there_is_none():
    # It ends after ten iterations, where ott looks whether it has converged.
    plain = Sinkhorn(epsilon=0.3, threshold=1e-4)
    annealed = dataclasses.replace(
        plain, epsilon_init=1024.0, epsilon_decay=0.5, max_iterations=100
    )
    solution, expected = solve(annealed), solve(plain)
    assert solution.converged
    assert np.abs(marginals(solution.plan)[1] - B).sum() < 1e-4
    np.testing.assert_allclose(solution.plan, expected.plan, atol=5e-5)


def test_annealing_that_cannot_end():
    with pytest.raises(ValueError, match="takes 139 iterations, and max_iterations is 100"):
        Sinkhorn(epsilon_init=1e6, max_iterations=100)
    with pytest.raises(ValueError, match="epsilon_init >= 1"):
        Sinkhorn(epsilon_init=0.5)
    with pytest.raises(ValueError, match="epsilon_decay in"):
        Sinkhorn(epsilon_decay=1.0)


# --- unbalanced


@pytest.mark.filterwarnings("ignore:If reg_type = entropy")  # what is ignored is none of ours
@pytest.mark.parametrize(("tau_a", "tau_b"), [(0.5, 0.5), (0.1, 0.99), (1.0, 0.8)])
def test_unbalanced_agrees_with_pot(tau_a, tau_b):
    epsilon = 2.0
    solver = Sinkhorn(epsilon, relative=False, tau_a=tau_a, tau_b=tau_b, threshold=1e-5)
    solution = solve(solver)
    strengths = tuple(epsilon * t / (1 - t) if t < 1 else np.inf for t in (tau_a, tau_b))
    expected = ot.unbalanced.sinkhorn_unbalanced(
        A, B, COST, epsilon, strengths, reg_type="entropy", numItermax=20000, stopThr=1e-12
    )
    expected = np.asarray(expected) / np.sum(expected)
    assert solution.converged
    np.testing.assert_allclose(solution.plan, expected, atol=5e-6)
    assert solution.value == pytest.approx(np.sum(expected * COST), rel=1e-4)
    # The marginals are drawn to those that are given, but not kept.
    assert np.abs(marginals(solution.plan)[1] - B).sum() > 1e-3


@pytest.mark.parametrize(("scale", "shift"), [(1e6, 0.0), (1e-6, 0.0), (1.0, 1000.0)])
def test_unbalanced_sees_neither_scale_nor_shift(scale, shift):
    expected, solution = solve(LOOSE), solve(LOOSE, scale * COST + shift)
    assert solution.converged
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)
    assert solution.gap == pytest.approx(scale * float(expected.gap), rel=1e-2)


def test_unbalanced_converges_however_little_mass_there_would_be():
    # The cheapest match is that of a unit without mass, what can be matched is far from it.
    a = np.where(np.arange(N) == 2, 0, A)
    a = a / a.sum()
    far = COST - 1000 * (np.arange(N) == 2)[:, None]
    solver = Sinkhorn(1.0, relative=False, tau_a=0.5, tau_b=0.5)
    solution, expected = solve(solver, far, a), solve(solver, a=a)
    assert solution.converged
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)


@pytest.mark.parametrize("solver", [LOOSE, RANK_3, Sinkhorn()])
def test_gap_bounds_the_loss_against_plans_with_the_same_marginals(solver):
    solution = solve(solver)
    loss = own_loss(solution)
    assert solution.converged
    assert loss > 1e-3
    assert loss * (1 - 1e-4) <= solution.gap < 2 * loss + 0.05 * np.std(COST)


@pytest.mark.usefixtures("default_promotion")
def test_unbalanced_gradient_matches_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        cost, weights, direction = (
            jnp.asarray(x) for x in (COST, rng.normal(size=COST.shape), rng.normal(size=COST.shape))
        )
        a, b, push = jnp.asarray(A), jnp.asarray(B), jnp.asarray(rng.normal(size=N))
        push = 0.01 * (push - jnp.mean(push))
        solver = Sinkhorn(epsilon=0.3, tau_a=0.8, tau_b=0.9, threshold=1e-12)

        @jax.jit
        def objective(step):
            solution = solver.solve(
                otf.TransportProblem(cost + step * direction, a + step * push, b)
            )
            return solution.value + 10 * jnp.sum(weights * solution.plan)

        step = 1e-4
        slope = float(jax.grad(objective)(0.0))
        difference = float(objective(step) - objective(-step)) / (2 * step)
        assert abs(slope) > 1e-2
        assert slope == pytest.approx(difference, rel=1e-4)


def test_what_unbalanced_needs():
    for field in ("tau_a", "tau_b"):
        for bad in (0.0, 1.5):
            with pytest.raises(ValueError, match=rf"{field} in \(0, 1\], got {bad}"):
                dataclasses.replace(Sinkhorn(), **{field: bad})


# --- low rank


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_low_rank_plan_has_its_rank_and_marginals(rank):
    solution = solve(LowRank(rank=rank))
    assert solution.converged
    assert np.linalg.matrix_rank(np.asarray(solution.plan), tol=1e-6) == min(rank, N, M)
    for got, expected in zip(marginals(solution.plan), (A, B), strict=True):
        assert np.abs(got - expected).sum() < 2e-3
    if rank == 1:  # one cluster says nothing of who goes where
        np.testing.assert_allclose(solution.plan, np.outer(A, B), atol=1e-3)
    if rank == 20:
        assert solution.value == pytest.approx(optimum(COST, A, B), rel=0.05)


def test_low_rank_is_deterministic_and_sees_neither_scale_nor_shift():
    first = solve(RANK_3)
    chex.assert_trees_all_equal(solve(RANK_3), first)
    other = solve(RANK_3, 1e4 * COST - 50)
    np.testing.assert_allclose(other.plan, first.plan, atol=1e-4)
    assert other.gap == pytest.approx(1e4 * float(first.gap), rel=1e-2)


def test_low_rank_value_has_the_plan_as_gradient():
    gradient = jax.grad(
        lambda c: RANK_3.solve(otf.TransportProblem(c, as_cost(A), as_cost(B))).value
    )(as_cost(COST))
    np.testing.assert_allclose(gradient, solve(RANK_3).plan, atol=1e-6)


def test_what_low_rank_needs():
    with pytest.raises(ValueError, match="rank >= 1, got 0"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match="epsilon >= 0, got -1"):
        LowRank(epsilon=-1)


# --- Gromov-Wasserstein


def objective(plan, alpha, intra=WITHIN, cost=COST):
    source, target = (np.asarray(x, np.float64) for x in intra)
    squares = (source[:, None, :, None] - target[None, :, None, :]) ** 2
    plan = np.asarray(plan, np.float64)
    quadratic = np.einsum("ijkl,ij,kl", squares, plan, plan)
    return (1 - alpha) * np.sum(plan * cost) + alpha * quadratic


def test_gromov_wasserstein_agrees_with_pot():
    alpha = 0.3
    solver = GromovWasserstein(
        alpha, epsilon=2.0, relative=False, threshold=1e-6, max_iterations=300
    )
    solution = solve(solver)
    expected = ot.gromov.entropic_fused_gromov_wasserstein(
        COST, *WITHIN, A, B, epsilon=2.0, alpha=alpha, max_iter=2000, tol=1e-10
    )
    assert solution.converged
    np.testing.assert_allclose(solution.plan, np.asarray(expected), atol=2e-5)
    assert solution.value == pytest.approx(objective(expected, alpha), rel=1e-4)


def test_gromov_wasserstein_finds_an_isometry():
    rng = np.random.default_rng(4)
    points = rng.normal(size=(10, 3))
    planted = rng.permutation(10)
    turned = points[planted] @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + 5
    intra = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (points, turned)]
    solver = GromovWasserstein(alpha=1.0, epsilon=0.01)
    uniform = np.full(10, 0.1)
    solution = solve(solver, np.zeros((10, 10)), uniform, uniform, intra)
    assert solution.converged
    np.testing.assert_array_equal(np.argmax(solution.plan, axis=0), planted)
    assert solution.value < 1e-3
    assert 0 <= solution.gap < 1e-3


def test_gromov_wasserstein_plan_and_its_evidence():
    solution = solve(FUSED)
    chex.assert_trees_all_equal(solve(FUSED), solution)
    assert solution.converged
    np.testing.assert_allclose(marginals(solution.plan)[0], A, atol=1e-5)
    np.testing.assert_allclose(marginals(solution.plan)[1], B, atol=1e-4)
    # In units of the cost: the quadratic term is worth as many of its deviations.
    spread = np.std(np.concatenate([x.ravel() for x in WITHIN]))
    intra = tuple(x / spread * np.std(COST) ** 0.5 for x in WITHIN)
    assert solution.value == pytest.approx(objective(solution.plan, 0.5, intra), rel=1e-4)
    # The gap bounds the loss of the linearisation, whose cost is the gradient of the objective.
    plan = np.asarray(solution.plan, np.float64)
    source, target = intra
    rows, columns = marginals(plan)
    quadratic = (source**2 @ rows)[:, None] + (target**2 @ columns) - 2 * source @ plan @ target
    gradient = 0.5 * COST + quadratic
    loss = np.sum(plan * gradient) - optimum(gradient, rows, columns)
    assert loss > 1e-3
    assert loss * (1 - 1e-4) <= solution.gap < 2 * loss


@pytest.mark.parametrize("factors", [(1e3, 0.0, 1.0, 0.0), (1.0, 40.0, 0.01, 3.0)])
def test_gromov_wasserstein_sees_neither_scales_nor_shifts(factors):
    scale, shift, scale_within, shift_within = factors
    expected = solve(FUSED)
    intra = tuple(scale_within * x + shift_within for x in WITHIN)
    solution = solve(FUSED, scale * COST + shift, intra=intra)
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)
    value = scale * float(expected.value) + 0.5 * shift
    assert solution.value == pytest.approx(value, rel=1e-3)
    assert solution.gap == pytest.approx(scale * float(expected.gap), rel=1e-2)


def test_gromov_wasserstein_value_is_differentiated_at_the_plan():
    solver = GromovWasserstein(epsilon=2.0, relative=False)
    target = as_cost(WITHIN[1])

    def value(cost, source):
        solution = solver.solve(otf.TransportProblem(cost, intra=(source, target)))
        return solution.value, solution.plan

    slopes = jax.grad(value, argnums=(0, 1), has_aux=True)
    (by_cost, by_source), plan = slopes(as_cost(COST), as_cost(WITHIN[0]))
    plan = np.asarray(plan, np.float64)
    np.testing.assert_allclose(by_cost, 0.5 * plan, atol=1e-6)
    rows = plan.sum(1)
    expected = WITHIN[0] * np.outer(rows, rows) - plan @ WITHIN[1] @ plan.T
    np.testing.assert_allclose(by_source, expected, atol=1e-5)


def test_what_gromov_wasserstein_needs():
    cost, intra = jnp.ones((2, 3)), (jnp.ones((2, 2)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match=r"needs intra=\(source, target\).*\(2, 2\) and \(3, 3\)"):
        GromovWasserstein().solve(otf.TransportProblem(cost))
    # The annotations would already refuse the wrong shape here; users run without.
    with pytest.raises(ValueError, match=r"within the target have shape \(2, 2\).*3 units"):
        gromov_wasserstein._check_intra(otf.TransportProblem(cost, intra=(intra[0], intra[0])))
    with pytest.raises(ValueError, match="1 of 9 costs are not finite"):
        GromovWasserstein().solve(
            otf.TransportProblem(cost, intra=(intra[0], intra[1].at[0, 1].set(jnp.inf)))
        )
    with pytest.raises(ValueError, match="alpha in"):
        GromovWasserstein(alpha=1.5)
    with pytest.raises(ValueError, match="GromovWasserstein needs epsilon > 0"):
        GromovWasserstein(epsilon=0.0)


# --- all


def test_only_quadratic_solvers_ask_for_costs_within():
    assert GromovWasserstein.quadratic
    assert not any(solver.quadratic for solver in (Exact, Sinkhorn, LowRank))
    intra = as_cost(WITHIN[0]), as_cost(WITHIN[1])
    ignored = LOOSE.solve(otf.TransportProblem(as_cost(COST), as_cost(A), as_cost(B), intra))
    chex.assert_trees_all_equal(ignored, solve(LOOSE))


@pytest.mark.parametrize("solver", [LOOSE, RANK_3, FUSED])
def test_batches_under_jit_one_of_which_is_not_finite(solver):
    intra = (as_cost(WITHIN[0]), as_cost(WITHIN[1])) if solver.quadratic else None
    costs = jnp.stack([as_cost(COST), as_cost(COST).at[2, 3].set(np.nan), as_cost(3 - COST**0.5)])
    found = jax.jit(
        jax.vmap(lambda c: solver.solve(otf.TransportProblem(c, as_cost(A), as_cost(B), intra)))
    )(costs)
    for i in (0, 2):
        alone = solve(solver, costs[i])
        one = jax.tree.map(lambda x, i=i: x[i], found)
        chex.assert_trees_all_close(one, alone, rtol=2e-2, atol=2e-4)
    assert found.converged.tolist() == [True, False, True]
    for x in (found.plan[1], found.value[1], found.gap[1]):
        assert np.all(np.isnan(x))


@pytest.mark.parametrize("solver", [LOOSE, RANK_3, FUSED])
def test_precision_follows_the_cost(solver):
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            shapes = (N, M), (N,), (M,), (N, N), (M, M)
            cost, a, b, *intra = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
            given: Any = (cost, a, b, tuple(intra) if solver.quadratic else None)
            solution = jax.eval_shape(solver.solve, otf.TransportProblem(*given))
            assert solution.plan.dtype == solution.value.dtype == solution.gap.dtype == dtype


@pytest.mark.parametrize("solver", [LOOSE, RANK_3, FUSED])
def test_units_without_mass_and_sides_without_units(solver):
    a = np.where(np.arange(N) == 2, 0, A)
    solution = solve(solver, a=a / a.sum())
    assert np.all(np.isfinite(solution.plan))
    assert np.all(solution.plan[2] == 0)
    assert solution.converged
    assert np.isfinite(solution.gap)
    intra = (jnp.zeros((0, 0)), jnp.zeros((3, 3))) if solver.quadratic else None
    nothing = solver.solve(otf.TransportProblem(jnp.zeros((0, 3)), intra=intra))
    chex.assert_shape(nothing.plan, (0, 3))
    assert nothing.converged
