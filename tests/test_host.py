"""Known values on a CPU are worked on by NumPy, everything else by JAX, and to the same end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from jax.core import Tracer
from numpy.testing import assert_allclose, assert_array_equal

import otfusion_jax as otf
from otfusion_jax.common import host as typed_host
from otfusion_jax.common import scaling

# To a type checker, arrays of NumPy are none.
host: Any = typed_host
exponent: Any = scaling.exponent
restored: Any = scaling.restored
scaled: Any = scaling.scaled
any_otf: Any = otf
calls = []


@host.program(static_argnames=("power",))
def raised(x, *, power):
    calls.append(type(x))
    return x**power


def test_a_program_is_jitted_for_arrays_of_jax_and_just_runs_for_those_of_numpy():
    calls.clear()
    x = np.arange(4, dtype=np.float32)
    by_numpy = raised(x, power=2)
    by_jax = raised(jnp.asarray(x), power=2)
    assert isinstance(by_numpy, np.ndarray)
    assert isinstance(by_jax, jax.Array)
    assert_array_equal(by_numpy, by_jax)
    assert calls[0] is np.ndarray
    assert issubclass(calls[1], Tracer)


def test_numpy_works_where_all_arrays_are_known_and_on_the_cpu():
    x, y = normal(3), np.ones(3, np.float32)
    viewed = host.as_numpy({"x": x, "y": y, "number": 2.0, "key": jax.random.key(0)})
    assert isinstance(viewed["x"], np.ndarray)
    assert viewed["x"].__array_interface__["data"] == np.asarray(x).__array_interface__["data"]
    assert viewed["number"].dtype == jnp.asarray(2.0).dtype
    assert isinstance(viewed["key"], jax.Array)

    def traced(x):
        assert not host.at_hand([y])
        assert host.as_numpy([x, y])[0] is x
        return x

    jax.jit(traced)(x)
    assert host.array_module(y, x) is jnp
    assert host.array_module(y, np.float32(1)) is np


def test_values_get_the_dtypes_that_jax_gives_them():
    (viewed,) = host.as_numpy([np.ones(3, np.float64)])
    assert viewed.dtype == jnp.asarray(np.ones(3)).dtype


@pytest.mark.parametrize("fill", [None, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_entries_are_those_that_jax_takes(axis, dtype, fill):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 5, (4, 4, 4)).astype(dtype)
    fill = bool(fill) if dtype is bool and fill is not None else fill
    index = np.array([3, 0, 4, 1], np.int32)
    along = rng.integers(0, 5, (4, 1, 4)).astype(np.int32)
    for positions in (index, along, index[:2]):
        found = host.taken(array, positions, axis, fill)
        expected = host.taken(jnp.asarray(array), jnp.asarray(positions), axis, fill)
        assert found.dtype == expected.dtype
        assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_products_keep_their_dtype(dtype):
    rows, columns = normal(2, 3, 4).astype(dtype), normal(2, 4, 5, seed=1).astype(dtype)
    found = host.matmul(np.asarray(rows), np.asarray(columns))
    expected = host.matmul(rows, columns)
    assert found.dtype == expected.dtype == dtype
    assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30])
def test_powers_of_two_are_those_of_jax(size):
    x = np.asarray(size * np.arange(5), np.float32)
    k = exponent(x)
    assert k == exponent(jnp.asarray(x))
    assert_array_equal(scaled(x, -k), scaled(jnp.asarray(x), -k))
    assert_array_equal(restored(scaled(x, -k), k), x)
    pair = np.asarray([1 + 2j, 3j], np.complex64)
    assert_array_equal(scaled(pair, np.int32(3)), 8 * pair)
    assert scaled(pair, np.int32(3)).dtype == np.complex64


def test_loops_and_branches_are_the_same_for_both():
    def grown(x):
        return host.while_loop(lambda state: state < 100, lambda state: 3 * state, x)

    def summed(x):
        return host.fori_loop(4, lambda number, total: total + number * x, 0 * x)

    def halved(x):
        return host.cond(x > 5, lambda: x / 2, lambda: x)

    for function in (grown, summed, halved):
        assert function(np.float32(2)) == function(jnp.float32(2))
        assert isinstance(function(np.float32(9)), np.generic)


def test_what_is_returned_is_of_jax_and_shares_no_memory_with_what_was_given():
    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"] + params["b"][None]

    params = {"b": np.ones(2, np.float32), "v": np.ones((4, 2), np.float32)}
    params["w"] = np.array(normal(3, 4))
    symmetry = otf.trace_symmetry(apply, params, normal(1, 3))
    plans = {"w": np.array([2, 0, 3, 1])}
    moved = any_otf.transport(symmetry, plans, params)
    expected = np.array(params["w"])[:, plans["w"]]
    params["w"][:] = 0
    params["b"][:] = 0
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(moved))
    assert_array_equal(moved["w"], expected)
    assert_array_equal(moved["b"], np.ones(2))


def at_boundary(array):
    """A copy at a multiple of 64 bytes: of such arrays alone does JAX share the memory."""
    spare = np.zeros(array.nbytes + 64, np.uint8)
    start = -spare.ctypes.data % 64
    copy = spare[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


@pytest.mark.parametrize("scales", [False, True])
def test_canonical_form_shares_no_memory_with_what_was_given(scales):
    def apply(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["v"] + params["b"][None]

    shapes = {"b": (32,), "v": (32, 32), "w": (32, 32)}
    params = {name: at_boundary(np.asarray(normal(*shapes[name]))) for name in shapes}
    symmetry = otf.trace_symmetry(apply, params, normal(1, 32))
    symmetry = symmetry.with_scales() if scales else symmetry
    found = any_otf.canonicalize(symmetry, params)
    expected = jax.tree.map(np.array, found)
    for array in params.values():
        array[:] = 0
    for name in shapes:
        assert isinstance(found[name], jax.Array)
        assert_array_equal(found[name], expected[name])


def test_a_solver_of_ones_own_gets_arrays_of_jax():
    solved = []

    class Ordered(otf.AbstractSolver):
        def compute(self, problem):
            solved.append(isinstance(problem.cost, jax.Array))
            order = jnp.arange(len(problem.cost), dtype=jnp.int32)
            return otf.Solution(order, jnp.float32(0), jnp.array(True), jnp.float32(0))

    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    params = {"v": normal(4, 2), "w": normal(3, 4)}
    symmetry = otf.trace_symmetry(apply, params, normal(1, 3))
    found = otf.align(symmetry, params, params, solver=Ordered(), method=otf.ForwardPass())
    assert solved
    assert all(solved)
    assert_array_equal(found.plans["w"], np.arange(4))


def test_inner_products_of_millions_are_rounded_as_short_ones():
    x: Any = np.random.default_rng(0).uniform(0.5, 1.5, (3, 1_000_001)).astype(np.float32)
    exact = np.vdot(x.astype(np.float64), x.astype(np.float64))
    found = typed_host.inner_product(x, x)
    assert found.dtype == np.float32
    assert_allclose(found, exact, rtol=3e-7)
    assert_allclose(typed_host.inner_product(x.T, x.T), exact, rtol=3e-7)
