"""Checks orthogonal maps against SciPy and against what was planted, and what they promise."""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from jax import export
from jaxtyping import Array
from problems import as_cost
from scipy.linalg import block_diag, orthogonal_procrustes

from otfusion_jax.solvers.procrustes import polar_factors, procrustes

SHAPES = [(7, 7), (4, 7), (7, 4), (1, 1), (1, 5), (5, 1)]
FIXES = [False, True]


def random_cross(*shape: int, seed: int = 0) -> np.ndarray:
    """Inner products of units that have nothing to do with each other."""
    return np.random.default_rng(seed).normal(size=shape)


def rotation(n: int, seed: int) -> np.ndarray:
    """An orthogonal matrix drawn at random."""
    q, _ = np.linalg.qr(random_cross(n, n, seed=seed))
    return q


def rotation_fixing_ones(n: int, seed: int) -> np.ndarray:
    """An orthogonal matrix drawn at random among those that keep the vector of ones."""
    ones_first = np.concatenate([np.ones((n, 1)), random_cross(n, n - 1, seed=n)], axis=1)
    basis, _ = np.linalg.qr(ones_first)
    return basis @ block_diag(1, rotation(n - 1, seed)) @ basis.T


def reached(plan: np.ndarray | Array, cross: np.ndarray) -> float:
    """The inner product of a map with the inner products of the units."""
    return float(np.sum(np.asarray(plan, np.float64) * cross))


def assert_orthogonal(plan: Array, atol: float = 3e-6):
    """Checks that rows are orthonormal, or columns, whichever are fewer."""
    q = np.asarray(plan, np.float64)
    products = q @ q.T if len(q) <= len(q.T) else q.T @ q
    np.testing.assert_allclose(products, np.eye(len(products)), atol=atol)


def assert_keeps_ones(plan: Array):
    ones = np.ones(len(plan))
    np.testing.assert_allclose(plan @ ones, ones, atol=3e-6)
    np.testing.assert_allclose(plan.T @ ones, ones, atol=3e-6)


# The best map


@pytest.mark.parametrize("n", [2, 5, 30])
def test_maps_agree_with_scipy(n):
    cross = random_cross(n, n)
    solution = procrustes(as_cost(cross))
    expected, nuclear_norm = orthogonal_procrustes(np.eye(n), cross)
    np.testing.assert_allclose(solution.plan, expected, atol=1e-4)
    assert solution.value == pytest.approx(-float(nuclear_norm), rel=1e-5)
    assert solution.converged


@pytest.mark.parametrize("fixes_ones", FIXES)
def test_planted_rotations_are_recovered(fixes_ones):
    planted = rotation_fixing_ones(6, seed=1) if fixes_ones else rotation(6, seed=1)
    source = random_cross(6, 40, seed=2)
    target = planted.T @ source
    solution = procrustes(as_cost(source @ target.T), fixes_ones=fixes_ones)
    np.testing.assert_allclose(solution.plan, planted, atol=3e-6)
    assert solution.converged


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_between_any_sizes_are_orthogonal_and_reach_the_nuclear_norm(shape):
    cross = random_cross(*shape)
    solution = procrustes(as_cost(cross))
    chex.assert_shape(solution.plan, shape)
    assert_orthogonal(solution.plan)
    nuclear_norm = np.linalg.norm(cross, "nuc")
    assert reached(solution.plan, cross) == pytest.approx(nuclear_norm, rel=1e-5)
    assert solution.value == pytest.approx(-nuclear_norm, rel=1e-5)
    assert 0 <= solution.gap <= 1e-5 * nuclear_norm
    assert solution.converged


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_ones_are_kept_and_no_other_map_that_keeps_them_is_better(n):
    cross = random_cross(n, n, seed=n)
    solution = procrustes(as_cost(cross), fixes_ones=True)
    assert_orthogonal(solution.plan)
    assert_keeps_ones(solution.plan)
    best = reached(solution.plan, cross)
    assert solution.value == pytest.approx(-best, rel=1e-5)
    assert solution.gap <= 1e-5 * np.linalg.norm(cross, "nuc")
    assert solution.converged
    for seed in range(100):
        competitor = rotation_fixing_ones(n, seed)
        assert reached(competitor, cross) <= best + 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (2, 5), (5, 2), (4, 7)])
def test_the_direction_of_the_ones_is_kept_between_other_numbers_of_units(shape):
    n, m = shape
    cross = random_cross(*shape, seed=n)
    solution = procrustes(as_cost(cross), fixes_ones=True)
    assert_orthogonal(solution.plan)
    np.testing.assert_allclose(solution.plan @ np.ones(m), np.full(n, (m / n) ** 0.5), atol=3e-6)
    np.testing.assert_allclose(np.ones(n) @ solution.plan, np.full(m, (n / m) ** 0.5), atol=3e-6)
    assert solution.converged
    best = reached(solution.plan, cross)
    assert solution.value == pytest.approx(-best, rel=1e-5)
    for seed in range(50):
        before, after = rotation_fixing_ones(n, seed), rotation_fixing_ones(m, seed + 1)
        competitor = before @ np.asarray(solution.plan, np.float64) @ after
        assert reached(competitor, cross) <= best + 1e-5


def test_a_decomposition_that_is_off_shows_in_the_gap(monkeypatch):
    svd = jnp.linalg.svd

    def swapped(cross: Array, full_matrices: bool):
        u, singular_values, v_transposed = svd(cross, full_matrices=full_matrices)
        return u[:, ::-1], singular_values, v_transposed

    cross = random_cross(5, 5)
    monkeypatch.setattr(jnp.linalg, "svd", swapped)
    # Not the compiled program, which has been traced with the decomposition as it should be.
    worse = inspect.unwrap(procrustes)(as_cost(cross))
    assert_orthogonal(worse.plan)
    loss = np.linalg.norm(cross, "nuc") - reached(worse.plan, cross)
    assert loss > 1
    assert worse.gap == pytest.approx(loss, rel=1e-5)
    assert not worse.converged


# Input at the edges


@pytest.mark.parametrize("fixes_ones", FIXES)
@pytest.mark.parametrize("rank", [1, 3])
def test_maps_of_lower_rank_are_orthogonal(rank, fixes_ones):
    cross = random_cross(6, rank) @ random_cross(rank, 6, seed=1)
    solution = procrustes(as_cost(cross), fixes_ones=fixes_ones)
    assert_orthogonal(solution.plan)
    if fixes_ones:
        assert_keeps_ones(solution.plan)
    else:
        assert solution.value == pytest.approx(-np.linalg.norm(cross, "nuc"), rel=1e-5)
    assert solution.converged


@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8), (8, 5)])
def test_what_is_not_told_moves_least(n: int, m: int):
    """A little of the identity added to inner products of lower rank decides about the rest."""
    cross = random_cross(n, 2) @ random_cross(2, m, seed=1)
    found = procrustes(as_cost(cross)).plan
    u, _, v_transposed = np.linalg.svd(cross + 1e-6 * np.eye(n, m), full_matrices=False)
    np.testing.assert_allclose(found, u @ v_transposed, atol=1e-4)


@pytest.mark.parametrize("fixes_ones", FIXES)
@pytest.mark.parametrize(("n", "m"), [(6, 6), (5, 8), (8, 5)])
def test_numpy_and_jax_find_the_same_where_several_maps_are_best(n: int, m: int, fixes_ones: bool):
    factors = normal(3, n, 2, seed=0), normal(3, 2, m, seed=1)
    cross = jnp.matmul(*factors, precision="highest")
    by_jax = procrustes(cross, fixes_ones=fixes_ones)
    known: Any = np.asarray(cross)
    by_numpy = polar_factors(known, fixes_ones)
    np.testing.assert_allclose(by_numpy.plan, by_jax.plan, atol=1e-5)


@pytest.mark.parametrize("fixes_ones", FIXES)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_nothing_moves_without_a_reason(n, fixes_ones):
    solution = procrustes(jnp.zeros((n, n)), fixes_ones=fixes_ones)
    np.testing.assert_array_equal(solution.plan, np.eye(n))
    assert solution.value == solution.gap == 0
    assert solution.converged


@pytest.mark.parametrize("n", [9, 200])
def test_what_all_units_share_is_no_reason_to_move_where_ones_are_kept(n):
    # All maps that keep the ones are equally good, but for the rounding of these sums.
    cross = 1 + random_cross(n, 1) + random_cross(1, n, seed=1)
    solution = procrustes(as_cost(cross), fixes_ones=True)
    np.testing.assert_array_equal(solution.plan, np.eye(n))
    assert solution.value == pytest.approx(-np.trace(cross), rel=1e-5)
    assert solution.converged


@pytest.mark.parametrize("n", [2, 3, 50])
def test_maps_that_keep_the_ones_may_have_nothing_to_gain(n):
    offsets = np.arange(n) - (n - 1) / 2
    solution = procrustes(as_cost(offsets[:, None] - offsets), fixes_ones=True)
    np.testing.assert_array_equal(solution.plan, np.eye(n))
    assert solution.value == pytest.approx(0, abs=1e-5)
    assert solution.converged


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_sides_without_units(shape):
    solution = procrustes(jnp.zeros(shape), fixes_ones=shape == (0, 0))
    chex.assert_shape(solution.plan, shape)
    assert solution.value == solution.gap == 0
    assert solution.converged


@pytest.mark.parametrize("fixes_ones", FIXES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_maps_do_not_see_the_scale(scale, fixes_ones):
    cross = random_cross(5, 5, seed=4)
    solve = functools.partial(procrustes, fixes_ones=fixes_ones)
    expected = solve(as_cost(cross))
    solution = solve(as_cost(scale * cross))
    np.testing.assert_allclose(solution.plan, expected.plan, atol=1e-5)
    assert solution.value == pytest.approx(scale * float(expected.value), rel=1e-5)
    assert solution.gap <= 1e-5 * abs(solution.value)
    assert solution.converged


@pytest.mark.parametrize("fixes_ones", FIXES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite_gives_nan(bad, fixes_ones):
    cross = as_cost(random_cross(4, 4)).at[1, 2].set(bad)
    solution = procrustes(cross, fixes_ones=fixes_ones)
    assert np.all(np.isnan(solution.plan))
    assert np.isnan(solution.value)
    assert np.isnan(solution.gap)
    assert not solution.converged


def test_what_cannot_be_solved_is_refused():
    # Where types are checked, shapes and dtypes are refused before the function is.
    unchecked = inspect.unwrap(procrustes)
    with pytest.raises(ValueError, match=r"a stack of them, got shape \(3,\)"):
        unchecked(jnp.zeros(3))
    with pytest.raises(ValueError, match="real numbers, got complex64; pass cross.real"):
        unchecked(jnp.zeros((3, 3), jnp.complex64))
    with pytest.raises(TypeError, match="the cross is a list; pass an array"):
        unchecked([[1.0]])


# Precisions


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.parametrize("fixes_ones", FIXES)
def test_maps_in_other_precisions(dtype, fixes_ones):
    wide = dtype == jnp.float64
    planted = rotation_fixing_ones(6, seed=1) if fixes_ones else rotation(6, seed=1)
    with jax.enable_x64(wide):
        solution = procrustes(as_cost(planted, dtype), fixes_ones=fixes_ones)
        expected = jnp.float64 if wide else jnp.float32
        chex.assert_type([solution.plan, solution.value, solution.gap], expected)
        assert_orthogonal(solution.plan, 1e-13 if wide else 3e-6)
        np.testing.assert_allclose(solution.plan, planted, atol=1e-13 if wide else 2e-2)
        assert solution.converged


def test_float32_stays_when_float64_is_enabled():
    with jax.enable_x64(True):
        for fixes_ones in FIXES:
            solution = procrustes(as_cost(random_cross(5, 5)), fixes_ones=fixes_ones)
            chex.assert_type([solution.plan, solution.value, solution.gap], jnp.float32)


# Transformations


@pytest.mark.parametrize("fixes_ones", FIXES)
def test_batches_are_solved_one_by_one(fixes_ones):
    # Each at a scale of its own, and one of them not finite: none is to disturb the others.
    scales = np.array([[1.0, 1e-30, 1e30], [1.0, 0.0, np.nan]])
    cross = as_cost(random_cross(2, 3, 4, 4) * scales[:, :, None, None])
    solve = functools.partial(procrustes, fixes_ones=fixes_ones)
    together = solve(cross)
    chex.assert_shape(together.plan, (2, 3, 4, 4))
    chex.assert_shape([together.value, together.converged, together.gap], (2, 3))
    np.testing.assert_array_equal(together.converged, np.isfinite(scales))
    for index in np.ndindex(2, 3):
        alone = solve(cross[index])
        np.testing.assert_allclose(together.plan[index], alone.plan, atol=1e-6)
        np.testing.assert_allclose(together.value[index], alone.value, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 6), (0, 4, 4)])
def test_maps_under_vmap_and_jit_are_the_same(shape):
    cross = as_cost(random_cross(*shape))
    expected = procrustes(cross)
    mapped = jax.vmap(procrustes)(cross)
    jitted = jax.jit(procrustes)(cross)
    for other in (mapped, jitted):
        np.testing.assert_allclose(other.plan, expected.plan, atol=1e-6)
        np.testing.assert_allclose(other.value, expected.value, rtol=1e-6)


@pytest.mark.parametrize("fixes_ones", FIXES)
def test_the_same_input_gives_the_same_bits(fixes_ones):
    cross = as_cost(random_cross(20, 20))
    first = procrustes(cross, fixes_ones=fixes_ones)
    second = procrustes(cross, fixes_ones=fixes_ones)
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("fixes_ones", FIXES)
def test_the_gradient_of_the_value_is_minus_the_map(fixes_ones):
    # Also where singular values are equal, at which a decomposition has no derivative.
    for cross in (as_cost(random_cross(5, 5)), jnp.eye(5), jnp.zeros((5, 5))):
        solve = functools.partial(procrustes, fixes_ones=fixes_ones)
        gradient = jax.grad(lambda cross, solve=solve: solve(cross).value)(cross)
        np.testing.assert_allclose(gradient, -solve(cross).plan, atol=1e-6)


@pytest.mark.compatibility
@pytest.mark.parametrize("fixes_ones", FIXES)
def test_maps_are_one_program_for_accelerators(fixes_ones):
    solve = jax.jit(functools.partial(procrustes, fixes_ones=fixes_ones))
    cross = jax.ShapeDtypeStruct((2, 8, 8), jnp.float32)
    exported = export.export(solve, platforms=("cuda", "tpu"))(cross)
    text = exported.mlir_module()
    assert "callback" not in text
    assert "f64" not in text
