"""Checks ensembles and barriers against NumPy and against losses of known shape."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import scipy.special
from arrays import normal

import otfusion_jax as otf

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits), axis=-1)


# Ensembles


def test_ensembles_average_probabilities_not_logits():
    models = [ref.random_net(seed, "mlp") for seed in range(3)]
    x = normal(*ref.INPUTS["mlp"], seed=9)
    logits = [np.asarray(ref.network(model, x)) for model in models]
    expected = np.mean(softmax(logits), axis=0)
    of_mean_logits = softmax(np.mean(logits, axis=0))
    assert np.max(np.abs(expected - of_mean_logits)) > 1e-3

    probabilities = otf.ensemble(ref.network, models, x)
    close(probabilities, expected)
    close(probabilities.sum(1), 1)
    jitted = jax.jit(lambda models: otf.ensemble(ref.network, models, x))
    close(jitted(models), expected)


def scale_and_add(params, x, y):
    return x * params + y


def test_ensembles_take_several_inputs():
    x, y = jnp.array([[0.0, 1.0]]), jnp.array([[2.0, 0.0]])
    probabilities = otf.ensemble(scale_and_add, [jnp.array(1.0), jnp.array(3.0)], x, y)
    expected = softmax([[2.0, 1.0], [2.0, 3.0]]).mean(0)
    close(probabilities[0], expected)


def test_ensembles_of_models_that_differ_are_refused():
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="no models were given"):
        otf.ensemble(scale_and_add, [], x, x)
    with pytest.raises(ValueError, match=re.escape("shape (2,), expected (1,)")):
        otf.ensemble(scale_and_add, [jnp.ones(1), jnp.ones(2)], x, x)


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (lambda z: jnp.argmax(z, axis=-1), ValueError, r"int32 of shape \(4,\).*no logits, which"),
        (lambda z: z.sum(), ValueError, r"float32 of shape \(\), .*an axis is missing"),
        (lambda z: z[0], ValueError, r"float32 of shape \(3,\), .*pass a batch of one, x\[None\]"),
        (lambda z: z[:, :1], ValueError, r"shape \(4, 1\), .*a single class is 1 whatever"),
        (lambda z: (z, z), TypeError, "the function returned a tuple; return the logits alone"),
    ],
    ids=["classes", "a scalar", "no batch", "one logit", "a tuple"],
)
def test_outputs_that_are_no_logits_are_refused(outputs, error, message):
    def fn(params, x):
        return outputs(x * params)

    with pytest.raises(error, match=message):
        otf.ensemble(fn, [jnp.array(1.0), jnp.array(2.0)], normal(4, 3))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_ensembles_in_half_precision_are_rounded_once(dtype):
    a, b = normal(500, seed=0).astype(dtype), normal(500, seed=1).astype(dtype)
    zeros = jnp.zeros((1, 1), dtype)
    probabilities = otf.ensemble(lambda p, x: x + p[None], [a, b], zeros)
    of_a = jax.nn.softmax(a.astype(jnp.float32))
    of_b = jax.nn.softmax(b.astype(jnp.float32))
    expected = ((of_a + of_b) / 2).astype(dtype)
    np.testing.assert_array_equal(probabilities[0], expected)


# Barriers

A = {"x": jnp.array([1.0, -2.0]), "y": {"z": jnp.array([[4.0]])}}
B = {"x": jnp.array([3.0, 2.0]), "y": {"z": jnp.array([[0.0]])}}


def hill(params):
    """On the line from A to B: 1 + 2 t + 12 t (1 - t)."""
    t = (params["x"][0] - 1) / 2
    return 1 + 2 * t + 12 * t * (1 - t)


def valley(params):
    return -hill(params)


def test_the_height_is_measured_from_the_line_between_the_ends():
    path = otf.barrier(hill, A, B)
    t = np.linspace(0, 1, 25)
    close(path.t, t)
    close(path.values, 1 + 2 * t + 12 * t * (1 - t))
    close(path.height, 3)
    coarse = otf.barrier(hill, A, B, jnp.array([0.0, 0.25, 1.0]))
    close(coarse.height, 12 * 0.25 * 0.75)


def test_several_metrics_at_once():
    path = otf.barrier(lambda params: jnp.stack([hill(params), valley(params)]), A, B)
    alone = otf.barrier(hill, A, B)
    close(path.values, jnp.stack([alone.values, -alone.values], axis=1))
    close(path.height, jnp.stack([alone.height, jnp.zeros(())]))


def test_a_valley_is_no_barrier():
    close(otf.barrier(valley, A, B).height, 0)


def test_identical_models_have_no_barrier():
    path = otf.barrier(hill, A, A)
    assert path.height == 0
    close(path.values, 1)


@pytest.mark.parametrize("batch_size", [1, 4, 25, 100])
def test_batches_do_not_change_the_result(batch_size):
    whole = otf.barrier(hill, A, B)
    path = otf.barrier(hill, A, B, batch_size=batch_size)
    close(path.values, whole.values)
    close(path.height, whole.height)


def test_a_batch_size_may_be_a_number_of_numpy():
    # Without the tests' checks of annotations, which would refuse it before the library sees it.
    barrier: Any = inspect.unwrap(otf.barrier)
    path = barrier(hill, A, B, batch_size=np.int64(4))
    close(path.height, otf.barrier(hill, A, B).height)


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

    path = otf.barrier(errors, A, B, jnp.array([0.0, 0.25, 1.0]))
    close(path.values, [1, 1, 0])
    close(path.height, 0.25)


def test_barriers_under_jit_and_grad():
    t = jnp.linspace(0, 1, 5)

    def height(a):
        return otf.barrier(hill, a, B, t).height

    def height_with_step(step):
        return float(height({**A, "x": A["x"].at[0].add(step)}))

    np.testing.assert_allclose(jax.jit(height)(A), height(A), atol=1e-6)
    gradient = jax.grad(height)(A)
    slope = ref.central_difference(height_with_step, 1e-2)
    np.testing.assert_allclose(gradient["x"][0], slope, rtol=1e-2)


@pytest.mark.parametrize("t", [[0.0, 0.5], [0.5, 1.0], [1.0, 0.0], [0.0], [1.0], []])
def test_positions_that_do_not_span_the_line_are_refused(t):
    with pytest.raises(ValueError, match="t must be a vector that starts at 0 and ends at 1"):
        otf.barrier(hill, A, B, jnp.asarray(t))


@pytest.mark.parametrize("t", [[0.0, 1.5, 1.0], [0.0, -0.5, 1.0]])
def test_positions_beyond_the_ends_are_refused(t):
    with pytest.raises(ValueError, match=r"t has -?\d.5; the line between the models is from 0"):
        otf.barrier(hill, A, B, jnp.asarray(t))


def test_positions_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"t is .*nan.*; positions on the line .* are finite"):
        otf.barrier(hill, A, B, jnp.array([0.0, jnp.nan, 1.0]))


def test_barriers_between_models_that_differ_are_refused():
    with pytest.raises(ValueError, match="x: missing"):
        otf.barrier(hill, A, {"y": B["y"]})


# Standard errors


def noisy_hill(params, noise):
    """A hill for each example, and what is the same at every position."""
    return hill(params) * (1 + noise[:, 0]) + 5 * noise[:, 1]


def test_standard_errors_are_those_of_paired_differences():
    noise = normal(40, 2, seed=3)
    path = otf.barrier(lambda p: noisy_hill(p, noise), A, B, per_example=True)
    t = np.linspace(0, 1, 25)
    curve = 1 + 2 * t + 12 * t * (1 - t)
    examples = curve[:, None] * (1 + np.asarray(noise[:, 0])) + 5 * np.asarray(noise[:, 1])
    close(path.values, examples.mean(1), atol=1e-4)
    assert path.values_error is not None
    close(path.values_error, examples.std(1, ddof=1) / np.sqrt(40), atol=1e-4)
    # In the difference from the line between the ends, what is the same everywhere cancels.
    rises = 3 * (1 + np.asarray(noise[:, 0]))
    close(path.height, rises.mean(), atol=1e-4)
    assert path.height_error is not None
    close(path.height_error, rises.std(ddof=1) / np.sqrt(40), atol=1e-4)
    assert path.height_error < path.values_error.min()


def test_standard_errors_tell_how_heights_scatter():
    """Of many draws of examples, heights deviate as much as each of them says."""
    positions = jnp.array([0.0, 0.5, 1.0])

    def height(noise):
        path = otf.barrier(lambda p: noisy_hill(p, noise), A, B, positions, per_example=True)
        assert path.height_error is not None
        return path.height, path.height_error

    heights, errors = jax.vmap(height)(normal(400, 30, 2, seed=5))
    np.testing.assert_allclose(heights.std(), errors.mean(), rtol=0.15)


def test_standard_errors_of_several_metrics():
    noise = normal(10, 2, seed=4)

    def metrics(params):
        values = noisy_hill(params, noise)
        return jnp.stack([values, -values], axis=1)

    path = otf.barrier(metrics, A, B, per_example=True, batch_size=4)
    alone = otf.barrier(lambda p: noisy_hill(p, noise), A, B, per_example=True)
    assert path.values_error is not None
    assert path.height_error is not None
    assert alone.values_error is not None
    assert alone.height_error is not None
    close(path.values[:, 0], alone.values)
    close(path.values_error[:, 1], alone.values_error)
    # Of the valley, the highest point is an end, where nothing is above the line.
    close(path.height, jnp.stack([alone.height, jnp.zeros(())]))
    close(path.height_error, jnp.stack([alone.height_error, jnp.zeros(())]))


@pytest.mark.parametrize("metric", [hill, lambda p: hill(p)[None]], ids=["a mean", "one example"])
def test_standard_errors_of_fewer_than_two_examples_are_refused(metric):
    with pytest.raises(ValueError, match="its first axis must be the examples, two or more"):
        otf.barrier(metric, A, B, per_example=True)


def test_without_examples_there_are_no_standard_errors():
    path = otf.barrier(hill, A, B)
    assert path.values_error is None
    assert path.height_error is None
