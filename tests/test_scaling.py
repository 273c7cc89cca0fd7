"""Compares scaling by powers of two with NumPy's, which knows subnormal numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otfusion_jax.common.scaling import common_exponent, deviation, exponent, restored, scaled

VALUES = (1.4e-45, 1e-42, 1.17549435e-38, 1e-10, 0.75, 1.0, 2.0, -5.0, 3e38)


@pytest.mark.parametrize("value", VALUES)
def test_scaling_by_the_exponent_brings_any_number_to_between_a_half_and_one(value):
    x = np.array([value, value / 3], np.float32)
    k = int(jax.jit(exponent)(x))
    assert k == np.frexp(x[0])[1]
    expected = [np.ldexp(np.float64(v), -k) for v in x]
    np.testing.assert_array_equal(jax.jit(scaled)(jnp.asarray(x), jnp.int32(-k)), expected)


def test_double_precision():
    with jax.enable_x64(True):
        for value in (5e-324, 1e-310, 3.0, 1e300):
            x = jnp.float64(value)
            assert exponent(x) == np.frexp(value)[1]
            assert scaled(x, -exponent(x)) == np.frexp(value)[0]


def test_zeros_have_no_exponent():
    assert exponent(jnp.zeros(3)) == 0
    assert exponent(jnp.zeros(0)) == 0
    assert common_exponent([]) == 0


def test_subnormal_numbers_have_a_common_exponent_where_they_are_traced():
    x: Any = np.asarray([1e-41, -3e-40], np.float32)
    assert jax.jit(lambda x: common_exponent([x]))(x) == common_exponent([x]) == -131


def test_arrays_of_several_precisions_have_a_common_exponent():
    arrays = [
        jnp.array([0.25], jnp.float16),
        jnp.array([1j * 40], jnp.complex64),
        jnp.array([3.0], jnp.bfloat16),
    ]
    k = common_exponent(arrays)
    assert k == 6
    for x in arrays:
        assert scaled(x, -k).dtype == x.dtype
        np.testing.assert_array_equal(scaled(scaled(x, -k), k), x)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_what_was_computed_from_scaled_numbers_is_brought_back(degree):
    # Twice 100 is out of the range of a factor, and the result is not.
    powers = {"low": np.float32(2.0**-120), "high": np.array([3, -5], np.float32) * 2.0**-90}
    found = restored(jax.tree.map(jnp.asarray, powers), jnp.int32(100), degree)
    expected = jax.tree.map(lambda x: np.ldexp(x, 100 * degree), powers)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_scaling_is_linear_to_differentiation():
    values, gradients = jax.vmap(jax.value_and_grad(lambda x: scaled(x, jnp.int32(40))))(
        jnp.array([2.0, 1e-40])
    )
    np.testing.assert_allclose(values, [2.0**41, 1e-40 * 2.0**40], rtol=1e-4)
    np.testing.assert_array_equal(gradients, [2.0**40, 2.0**40])


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_deviations_of_numbers_whose_squares_are_out_of_range(size):
    x = np.random.default_rng(0).normal(size=(50, 3))
    found = deviation(jnp.asarray(size * x, jnp.float32), 0)
    np.testing.assert_allclose(found / size, x.std(0), rtol=1e-5)
