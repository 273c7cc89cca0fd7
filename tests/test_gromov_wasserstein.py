"""Checks plans of a quadratic cost against POT, and what `GromovWasserstein` promises of them."""

import chex
import jax
import numpy as np
import pytest
from problems import (
    COST,
    INTRA,
    MASSES_A,
    MASSES_B,
    as_cost,
    marginals,
    optimum,
    ot,
    solve_example,
)

import otfusion_jax as otf
from otfusion_jax.solvers.gromov_wasserstein import GromovWasserstein

FUSED = GromovWasserstein(epsilon=0.2, threshold=1e-4)


def objective(plan, alpha, intra=INTRA):
    """The objective without entropy, by the sum over all quadruples of units."""
    source, target = intra
    squares = (source[:, None, :, None] - target[None, :, None, :]) ** 2
    plan = np.asarray(plan, np.float64)
    quadratic = np.einsum("ijkl,ij,kl", squares, plan, plan)
    return (1 - alpha) * np.sum(plan * COST) + alpha * quadratic


def test_plans_agree_with_pot():
    alpha = 0.3
    solver = GromovWasserstein(
        alpha, epsilon=2.0, relative=False, threshold=1e-6, max_iterations=300
    )
    solution = solve_example(solver)
    expected = ot.gromov.entropic_fused_gromov_wasserstein(
        COST, *INTRA, MASSES_A, MASSES_B, epsilon=2.0, alpha=alpha, max_iter=2000, tol=1e-10
    )
    assert solution.converged
    np.testing.assert_allclose(solution.plan, np.asarray(expected), atol=2e-5)
    assert solution.value == pytest.approx(objective(expected, alpha), rel=1e-4)


def pairwise_distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def test_an_isometry_is_found():
    rng = np.random.default_rng(4)
    points = rng.normal(size=(10, 3))
    planted = rng.permutation(10)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    moved = points[planted] @ rotation + 5
    intra = pairwise_distances(points), pairwise_distances(moved)
    uniform = np.full(10, 0.1)
    solver = GromovWasserstein(alpha=1.0, epsilon=0.01)
    solution = solve_example(solver, np.zeros((10, 10)), uniform, uniform, intra)
    assert solution.converged
    np.testing.assert_array_equal(np.argmax(solution.plan, axis=0), planted)
    assert solution.value < 1e-3
    assert 0 <= solution.gap < 1e-3


def test_plans_are_always_the_same_and_keep_their_marginals():
    solution = solve_example(FUSED)
    chex.assert_trees_all_equal(solve_example(FUSED), solution)
    assert solution.converged
    rows, columns = marginals(solution.plan)
    np.testing.assert_allclose(rows, MASSES_A, atol=1e-5)
    np.testing.assert_allclose(columns, MASSES_B, atol=1e-4)


def test_value_and_gap_are_in_units_of_the_cost():
    solution = solve_example(FUSED)
    # The quadratic term is worth as many of its deviations as the linear one.
    source, target = INTRA
    spread = np.std(np.concatenate([source.ravel(), target.ravel()]))
    unit = np.std(COST) ** 0.5 / spread
    source, target = source * unit, target * unit
    expected = objective(solution.plan, 0.5, (source, target))
    assert solution.value == pytest.approx(expected, rel=1e-4)
    # The gap bounds the loss of the linearisation, whose cost is the gradient of the objective.
    plan = np.asarray(solution.plan, np.float64)
    rows, columns = marginals(plan)
    source_squares = source**2 @ rows
    target_squares = target**2 @ columns
    products = 2 * source @ plan @ target
    gradient = 0.5 * COST + source_squares[:, None] + target_squares - products
    loss = np.sum(plan * gradient) - optimum(gradient, rows, columns)
    assert loss > 1e-3
    assert loss * (1 - 1e-4) <= solution.gap < 2 * loss


@pytest.mark.parametrize("factors", [(1e3, 0.0, 1.0, 0.0), (1.0, 40.0, 0.01, 3.0)])
def test_plans_see_neither_scales_nor_shifts(factors):
    scale, shift, intra_scale, intra_shift = factors
    source, target = INTRA
    intra = intra_scale * source + intra_shift, intra_scale * target + intra_shift
    expected = solve_example(FUSED)
    solution = solve_example(FUSED, scale * COST + shift, intra=intra)
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-4)
    value = scale * float(expected.value) + 0.5 * shift
    assert solution.value == pytest.approx(value, rel=1e-3)
    assert solution.gap == pytest.approx(scale * float(expected.gap), rel=1e-2)


def test_the_value_is_differentiated_at_the_plan():
    solver = GromovWasserstein(epsilon=2.0, relative=False)
    source, target = INTRA
    fixed = as_cost(target)

    def value(cost, source):
        solution = solver.solve(otf.TransportProblem(cost, intra=(source, fixed)))
        return solution.value, solution.plan

    slopes = jax.grad(value, argnums=(0, 1), has_aux=True)
    (by_cost, by_source), plan = slopes(as_cost(COST), as_cost(source))
    plan = np.asarray(plan, np.float64)
    np.testing.assert_allclose(by_cost, 0.5 * plan, atol=1e-6)
    rows = plan.sum(1)
    expected = source * np.outer(rows, rows) - plan @ target @ plan.T
    np.testing.assert_allclose(by_source, expected, atol=1e-5)
