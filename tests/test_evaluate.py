"""Checks ensembles, lines and barriers against NumPy and against losses of known shape."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import scipy.special
from arrays import normal

import otfusion_jax as otf

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
A = {"x": jnp.array([1.0, -2.0]), "y": {"z": jnp.array([[4.0]])}}
B = {"x": jnp.array([3.0, 2.0]), "y": {"z": jnp.array([[0.0]])}}


# Ensembles


def test_ensembles_average_probabilities_not_logits():
    models = [ref.random_net(seed, "mlp") for seed in range(3)]
    x = normal(*ref.INPUTS["mlp"], seed=9)
    logits = [np.asarray(ref.network(model, x)) for model in models]
    found = otf.ensemble(ref.network, models, x)
    expected = np.mean([scipy.special.softmax(z, axis=1) for z in logits], axis=0)
    close(found, expected)
    close(found.sum(1), 1)
    assert abs(expected - scipy.special.softmax(np.mean(logits, axis=0), axis=1)).max() > 1e-3
    close(jax.jit(lambda models: otf.ensemble(ref.network, models, x))(models), expected)


def test_ensembles_take_several_inputs_and_refuse_models_that_differ():
    def fn(params, x, y):
        return x * params + y

    x, y = jnp.array([[0.0, 1.0]]), jnp.array([[2.0, 0.0]])
    found = otf.ensemble(fn, [jnp.array(1.0), jnp.array(3.0)], x, y)
    expected = scipy.special.softmax(np.array([[2.0, 1.0], [2.0, 3.0]]), axis=1).mean(0)
    close(found[0], expected)
    with pytest.raises(ValueError, match="no models were given"):
        otf.ensemble(fn, [], x, y)
    with pytest.raises(ValueError, match=re.escape("shape (2,), expected (1,)")):
        otf.ensemble(fn, [jnp.ones(1), jnp.ones(2)], x, y)


# Lines


def test_lines_start_at_a_and_end_at_b():
    for t, expected in ((0.0, A), (1.0, B)):
        found = otf.interpolate(A, B, t)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    close(otf.interpolate(A, B, 0.25)["x"], [1.5, -1])
    close(otf.interpolate(A, B, 0.25)["y"]["z"], [[3]])
    close(otf.interpolate(A, B, 2.0)["x"], [5, 6])


def test_vectors_of_positions_give_stacks():
    t = jnp.array([0.0, 0.5, 1.0])
    found = otf.interpolate(A, B, t)
    close(found["x"], [[1, -2], [2, 0], [3, 2]])
    assert found["y"]["z"].shape == (3, 1, 1)
    grid = otf.interpolate(A, B, jnp.array([[0.0, 1.0]]))
    close(grid["x"], [[[1, -2], [3, 2]]])


def test_lines_keep_dtypes_and_take_other_leaves_from_b():
    a = {"half": jnp.zeros(2, jnp.bfloat16), "steps": jnp.array([7]), "key": jax.random.key(0)}
    b = {"half": jnp.ones(2, jnp.bfloat16), "steps": jnp.array([9]), "key": jax.random.key(1)}
    for t, shape in ((0.5, ()), (jnp.array([0.0, 0.5]), (2,))):
        found = otf.interpolate(a, b, t)
        assert found["half"].dtype == jnp.bfloat16
        assert found["half"].shape == (*shape, 2)
        np.testing.assert_array_equal(found["steps"], jnp.full((*shape, 1), 9))
        assert found["steps"].dtype == jnp.int32
        assert found["key"].shape == shape
        assert jnp.all(found["key"] == jax.random.key(1))
    close(found["half"].astype(jnp.float32), [[0, 0], [0.5, 0.5]])


def test_lines_between_models_that_differ_are_refused():
    with pytest.raises(ValueError, match=re.escape("x: shape (3,), expected (2,)")):
        otf.interpolate(A, {**B, "x": jnp.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="y/z: missing"):
        otf.interpolate(A, {"x": jnp.ones(2)}, 0.5)


def test_the_derivative_along_the_line_is_the_difference():
    slope = jax.jacfwd(lambda t: otf.interpolate(A, B, t))(jnp.array(0.3))
    close(slope["x"], B["x"] - A["x"])


# Barriers


def hill(params):
    """On the line from A to B: 1 + 2 t + 12 t (1 - t)."""
    t = (params["x"][0] - 1) / 2
    return 1 + 2 * t + 12 * t * (1 - t)


def test_the_height_is_measured_from_the_line_between_the_ends():
    found = otf.barrier(hill, A, B)
    t = np.linspace(0, 1, 25)
    close(found.t, t)
    np.testing.assert_allclose(found.values, 1 + 2 * t + 12 * t * (1 - t), atol=1e-5)
    np.testing.assert_allclose(found.height, 3, atol=1e-5)
    coarse = otf.barrier(hill, A, B, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(coarse.height, 12 * 0.25 * 0.75, atol=1e-5)


def test_several_metrics_at_once():
    found = otf.barrier(lambda params: jnp.stack([hill(params), -hill(params)]), A, B)
    alone = otf.barrier(hill, A, B)
    close(found.values, jnp.stack([alone.values, -alone.values], axis=1))
    close(found.height, jnp.stack([alone.height, jnp.zeros(())]))


def test_a_valley_is_no_barrier():
    close(otf.barrier(lambda params: -hill(params), A, B).height, 0)


def test_identical_models_have_no_barrier():
    found = otf.barrier(hill, A, A)
    assert found.height == 0
    close(found.values, 1)


@pytest.mark.parametrize("batch_size", [1, 4, 25, 100])
def test_batches_do_not_change_the_result(batch_size):
    whole = otf.barrier(hill, A, B)
    found = otf.barrier(hill, A, B, batch_size=batch_size)
    close(found.values, whole.values)
    close(found.height, whole.height)


def test_at_most_a_batch_of_models_is_evaluated_at_once():
    sizes = []

    @jax.custom_batching.custom_vmap
    def metric(x):
        return x.sum()

    @metric.def_vmap
    def _(size, mapped, x):
        sizes.append(size)
        return x.sum(1), True

    otf.barrier(lambda params: metric(params["x"]), A, B, batch_size=5)
    assert set(sizes) == {5}
    sizes.clear()
    otf.barrier(lambda params: metric(params["x"]), A, B)
    assert set(sizes) == {25}


def test_metrics_may_be_error_rates_and_integers():
    def errors(params):
        return jnp.sum(params["x"] < 0)

    found = otf.barrier(errors, A, B, jnp.array([0.0, 0.25, 1.0]))
    close(found.values, [1, 1, 0])
    close(found.height, 0.25)


def test_barriers_under_jit_and_grad():
    t = jnp.linspace(0, 1, 5)

    def height(a):
        return otf.barrier(hill, a, B, t).height

    np.testing.assert_allclose(jax.jit(height)(A), height(A), atol=1e-6)
    gradient = jax.grad(height)(A)
    step = ref.central_difference(lambda h: float(height({**A, "x": A["x"].at[0].add(h)})), 1e-2)
    np.testing.assert_allclose(gradient["x"][0], step, rtol=1e-2)


@pytest.mark.parametrize("t", [[0.0, 0.5], [0.5, 1.0], [1.0, 0.0], [0.0], [1.0], []])
def test_positions_that_do_not_span_the_line_are_refused(t):
    with pytest.raises(ValueError, match="t must be a vector that starts at 0 and ends at 1"):
        otf.barrier(hill, A, B, jnp.asarray(t))


def test_barriers_between_models_that_differ_are_refused():
    with pytest.raises(ValueError, match="x: missing"):
        otf.barrier(hill, A, {"y": B["y"]})


# Half precision


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_lines_and_ensembles_in_half_precision_are_rounded_once(dtype):
    a, b = (normal(500, seed=seed).astype(dtype) for seed in (0, 1))
    t = jnp.array([0.3, 0.7])
    wide = [x.astype(jnp.float32)[None] for x in (a, b)]
    exact = (1 - t)[:, None] * wide[0] + t[:, None] * wide[1]
    np.testing.assert_array_equal(otf.interpolate(a, b, t), exact.astype(dtype))
    logits = jnp.zeros((1, 1), dtype)
    found = otf.ensemble(lambda p, x: x + p[None], [a, b], logits)
    softmax = [jax.nn.softmax(x.astype(jnp.float32)) for x in (a, b)]
    np.testing.assert_array_equal(found[0], ((softmax[0] + softmax[1]) / 2).astype(dtype))
