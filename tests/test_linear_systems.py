"""Linear systems that are solved one by one on a CPU."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

from otfusion_jax.common.linear_systems import (
    solve_by_steps,
    solve_positive_definite,
    solve_square,
)

pytestmark = pytest.mark.compatibility


def positive_definite(*shape, seed):
    root = normal(*shape, seed=seed)
    products = root @ jnp.swapaxes(root, -1, -2)
    return products + jnp.broadcast_to(jnp.eye(shape[-1]), shape)


@pytest.mark.parametrize("columns", [(), (3,)])
def test_solutions_are_those_of_numpy(columns):
    matrix, right = normal(5, 5, seed=0), normal(5, *columns, seed=1)
    np.testing.assert_allclose(
        solve_square(matrix, right), np.linalg.solve(matrix, right), atol=1e-4
    )


def test_a_batch_of_batches_is_solved():
    matrices, rights = normal(2, 3, 5, 5, seed=0), normal(2, 3, 5, 4, seed=1)
    nested = jax.vmap(jax.vmap(solve_square))
    np.testing.assert_allclose(
        nested(matrices, rights), np.linalg.solve(matrices, rights), atol=1e-4
    )
    one_right = jax.vmap(jax.vmap(solve_square, (0, None)), (0, None))
    expected = np.linalg.solve(matrices, np.broadcast_to(rights[0, 0], rights.shape))
    np.testing.assert_allclose(one_right(matrices, rights[0, 0]), expected, atol=1e-4)


def test_symmetric_systems_are_solved_and_told_where_they_are_indefinite():
    matrices, rights = positive_definite(3, 5, 5, seed=0), normal(3, 5, 2, seed=1)
    matrices = matrices.at[1].multiply(-1)
    solved = jax.vmap(solve_positive_definite)(matrices, rights)
    np.testing.assert_allclose(solved[::2], np.linalg.solve(matrices[::2], rights[::2]), atol=1e-4)
    assert np.all(np.isnan(solved[1]))
    # NumPy solves them alike.
    for matrix, right, expected in zip(*map(np.asarray, (matrices, rights, solved)), strict=True):
        np.testing.assert_allclose(solve_positive_definite(matrix, right), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 50])
def test_steps_by_numpy_are_those_of_jax(steps):
    matrix, right = positive_definite(6, 6, seed=0), normal(2, 6, seed=1)
    expected = solve_by_steps(lambda x: x @ matrix, right, steps)
    known: Any = tuple(map(np.asarray, (matrix, right)))
    found = solve_by_steps(lambda x: x @ known[0], known[1], steps)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if steps == 50:
        np.testing.assert_allclose(found, np.linalg.solve(matrix, right.T).T, atol=1e-3)


def test_derivatives_in_both_modes_are_those_of_jax():
    matrices, rights = normal(2, 4, 4, seed=0), normal(2, 4, 3, seed=1)
    directions = normal(2, 4, 4, seed=2), normal(2, 4, 3, seed=3)

    def total(solve):
        return lambda matrix, right: jnp.sum(jnp.sin(jax.vmap(solve)(matrix, right)))

    ours, theirs = total(solve_square), total(jnp.linalg.solve)
    for found, expected in zip(
        jax.grad(ours, (0, 1))(matrices, rights),
        jax.grad(theirs, (0, 1))(matrices, rights),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)
    _, slope = jax.jvp(ours, (matrices, rights), directions)
    np.testing.assert_allclose(
        slope, jax.jvp(theirs, (matrices, rights), directions)[1], atol=1e-3, rtol=1e-3
    )
    _, curved = jax.jvp(jax.grad(ours), (matrices, rights), directions)
    expected = jax.jvp(jax.grad(theirs), (matrices, rights), directions)[1]
    np.testing.assert_allclose(curved, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("solve", [solve_square, solve_positive_definite])
def test_no_factorisation_has_a_batch_on_a_cpu(solve):
    # Batched ones can wait for each other for ever, on a CPU of two cores.
    matrices, rights = positive_definite(6, 5, 5, seed=0), normal(6, 5, 4, seed=1)
    program = jax.jit(jax.vmap(solve)).lower(matrices, rights).as_text()
    calls = re.findall(r"@lapack_s\w+\(.*\) -> (.*)", program)
    assert len(calls) >= 2
    assert "tensor<6x" not in " ".join(calls)
