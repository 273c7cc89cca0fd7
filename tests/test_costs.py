"""Compares ground costs with ott's own on explicit vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from numpy.testing import assert_allclose, assert_array_equal
from ott.geometry import costs
from scipy.optimize import linear_sum_assignment

from otfusion_jax.alignment.costs import METRICS, assignment_cost, gram, ground_cost


def vectors(n, d, seed=0):
    return normal(n, d, seed=seed)


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_metrics_are_those_of_ott(kind):
    metric = kind()
    a, b = vectors(6, 5), vectors(4, 5, seed=1)
    expected = metric.all_pairs(a, b)
    assert expected.shape == (6, 4)
    assert_allclose(ground_cost(metric, gram(a, b)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_what_tells_permutations_apart_is_less_by_rows_and_columns(kind):
    a, b = vectors(6, 5), vectors(6, 5, seed=1)
    grams = gram(a, b, norms=kind is not costs.SqEuclidean)
    cost = np.asarray(assignment_cost(kind(), grams))
    left_out = np.asarray(ground_cost(kind(), gram(a, b))) - cost
    without_rows = left_out - left_out[:, :1]
    assert_allclose(without_rows, without_rows[:1].repeat(6, 0), rtol=0, atol=1e-5)
    _, expected = linear_sum_assignment(kind().all_pairs(a, b))
    assert_array_equal(linear_sum_assignment(cost)[1], expected)


def test_the_metrics_of_the_papers_are_there():
    kinds = {costs.SqEuclidean, costs.Euclidean, costs.Cosine, costs.NegDotProduct}
    assert set(METRICS) == kinds


def test_other_metrics_are_refused_with_a_way_out():
    products = gram(vectors(3, 2), vectors(3, 2))
    with pytest.raises(ValueError, match="PNormP is not a function of inner") as error:
        ground_cost(costs.PNormP(3.0), products)
    for kind in METRICS:
        assert kind.__name__ in str(error.value)


def test_distances_of_equal_units_are_zero_and_never_nan():
    a = 1000 * vectors(5, 7)
    for metric in (costs.SqEuclidean(), costs.Euclidean()):
        cost = ground_cost(metric, gram(a, a))
        assert (cost >= 0).all()
        assert_array_equal(jnp.argmin(cost, axis=1), jnp.arange(5))
    assert jnp.isfinite(ground_cost(costs.Cosine(), gram(0 * a, a))).all()


def test_inner_products_of_complex_vectors_are_those_of_twice_as_many_reals():
    a = jax.lax.complex(vectors(3, 4, 0), vectors(3, 4, 1))
    b = jax.lax.complex(vectors(3, 4, 2), vectors(3, 4, 3))
    found = gram(a, b)
    x, y = np.asarray(a), np.asarray(b)
    assert_allclose(found.source_sq_norms, (abs(x) ** 2).sum(1), rtol=1e-5)
    assert_allclose(found.target_sq_norms, (abs(y) ** 2).sum(1), rtol=1e-5)
    assert_allclose(found.cross, np.real(x @ y.conj().T), rtol=0, atol=1e-5)
    expected = (abs(x[:, None] - y[None]) ** 2).sum(-1)
    assert_allclose(ground_cost(costs.SqEuclidean(), found), expected, rtol=0, atol=1e-5)


def test_narrow_vectors_are_summed_in_float32():
    a = jnp.ones((2, 1000), jnp.bfloat16) * 1.5
    found = gram(a, a)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    assert_array_equal(found.cross, 2250)
    assert_array_equal(found.source_sq_norms, 2250)


def test_inner_products_add_up_over_pieces():
    a, b = vectors(4, 9), vectors(3, 9, seed=1)
    total = gram(a[:, :2], b[:, :2]) + gram(a[:, 2:], b[:, 2:])
    close = functools.partial(assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, total, gram(a, b))


def test_pairwise_products_have_the_shape_of_the_inner_products():
    products = gram(vectors(4, 3), vectors(5, 3, seed=1))
    a, b = np.arange(4.0, dtype=np.float32), np.arange(5.0, dtype=np.float32)
    assert_array_equal(products.pairwise(jnp.asarray(a), jnp.asarray(b)), np.outer(a, b))
