"""Checks the line between two models against NumPy, and what is said of models that do not fit.

Averages are checked where they are compared with fusion, in the tests of `fuse`.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import otfusion_jax as otf

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
A = {"x": jnp.array([1.0, -2.0]), "y": {"z": jnp.array([[4.0]])}}
B = {"x": jnp.array([3.0, 2.0]), "y": {"z": jnp.array([[0.0]])}}


# Lines


def test_lines_start_at_a_and_end_at_b():
    start, end = otf.interpolate(A, B, 0.0), otf.interpolate(A, B, 1.0)
    jax.tree.map(np.testing.assert_array_equal, start, A)
    jax.tree.map(np.testing.assert_array_equal, end, B)
    between = otf.interpolate(A, B, 0.25)
    close(between["x"], [1.5, -1])
    close(between["y"]["z"], [[3]])
    beyond = otf.interpolate(A, B, 2.0)
    close(beyond["x"], [5, 6])


def test_vectors_of_positions_give_stacks():
    stacked = otf.interpolate(A, B, jnp.array([0.0, 0.5, 1.0]))
    close(stacked["x"], [[1, -2], [2, 0], [3, 2]])
    assert stacked["y"]["z"].shape == (3, 1, 1)
    grid = otf.interpolate(A, B, jnp.array([[0.0, 1.0]]))
    close(grid["x"], [[[1, -2], [3, 2]]])


@pytest.mark.parametrize(("t", "shape"), [(0.5, ()), ([0.0, 0.5], (2,))])
def test_lines_keep_dtypes_and_take_other_leaves_from_b(t, shape):
    a = {"half": jnp.zeros(2, jnp.bfloat16), "steps": jnp.array([7]), "key": jax.random.key(0)}
    b = {"half": jnp.ones(2, jnp.bfloat16), "steps": jnp.array([9]), "key": jax.random.key(1)}
    between = otf.interpolate(a, b, jnp.array(t))
    assert between["half"].dtype == jnp.bfloat16
    assert between["half"].shape == (*shape, 2)
    half = jnp.broadcast_to(jnp.array(t)[..., None], (*shape, 2))
    np.testing.assert_array_equal(between["half"].astype(jnp.float32), half)
    np.testing.assert_array_equal(between["steps"], jnp.full((*shape, 1), 9))
    assert between["steps"].dtype == jnp.int32
    assert between["key"].shape == shape
    assert jnp.all(between["key"] == jax.random.key(1))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_lines_in_half_precision_are_rounded_once(dtype):
    a, b = normal(500, seed=0).astype(dtype), normal(500, seed=1).astype(dtype)
    t = jnp.array([0.3, 0.7])
    wide_a, wide_b = a.astype(jnp.float32), b.astype(jnp.float32)
    exact = (1 - t)[:, None] * wide_a[None] + t[:, None] * wide_b[None]
    np.testing.assert_array_equal(otf.interpolate(a, b, t), exact.astype(dtype))


def test_lines_between_models_that_differ_are_refused():
    with pytest.raises(ValueError, match=re.escape("x: shape (3,), expected (2,)")):
        otf.interpolate(A, {**B, "x": jnp.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="y/z: missing"):
        otf.interpolate(A, {"x": jnp.ones(2)}, 0.5)


@pytest.mark.parametrize("t", [float("nan"), float("inf"), jnp.array([0.0, jnp.nan])])
def test_positions_that_are_not_finite_are_refused(t):
    with pytest.raises(ValueError, match="positions on the line between two models are finite"):
        otf.interpolate(A, B, t)


def test_the_derivative_along_the_line_is_the_difference():
    slope = jax.jacfwd(lambda t: otf.interpolate(A, B, t))(jnp.array(0.3))
    close(slope["x"], B["x"] - A["x"])


# What is no model, or one of another kind


def logits(params, inputs):
    return inputs * params["x"]


COMBINED: dict[str, Callable[[list], Any]] = {
    "average": otf.average,
    "stack": otf.stack,
    "ensemble": lambda models: otf.ensemble(logits, models, jnp.ones(2)),
    "interpolate": lambda models: otf.interpolate(models[0], models[1], 0.5),
}
OTHER_KINDS = {
    "a string": ("x", "w/b: str"),
    "a class": (dict, "w/b: type"),
    "a function": (logits, "w/b: function"),
    "an array of strings": (np.array(["x"]), "w/b: ndarray of dtype"),
    "integers": (jnp.ones(3, int), "w/b: dtype int32, expected float32"),
    "another shape": (jnp.ones(2), r"w/b: shape \(2,\), expected \(3,\)"),
    "None": (None, "w/b: missing"),
}


@pytest.mark.parametrize("other", OTHER_KINDS)
@pytest.mark.parametrize("name", COMBINED)
def test_a_model_of_another_kind_is_named_with_its_leaf(name, other):
    leaf, expected = OTHER_KINDS[other]
    good = {"w": {"b": jnp.ones(3)}, "x": jnp.ones(2)}
    bad = {"w": {"b": leaf}, "x": jnp.ones(2)}
    with pytest.raises(ValueError, match=rf"(?s)^model 1\W.*{expected}"):
        COMBINED[name]([good, bad])


@pytest.mark.parametrize("name", COMBINED)
def test_what_is_no_model_at_all_is_named(name):
    with pytest.raises(ValueError, match=r"(?s)^model 0: .*not arrays.*params: Exact"):
        COMBINED[name]([otf.Exact(), otf.Exact()])


def test_a_list_of_models_to_fuse_names_the_model_and_the_leaf():
    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    good = {"w": normal(3, 4), "v": normal(4, 2)}
    symmetry = otf.trace_symmetry(apply, good, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"(?s)^model 1: .*w: str"):
        otf.fuse(symmetry, [good, {**good, "w": "w"}])
