"""Compares ground costs with ott's own on explicit vectors, and streams with single batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal
from ott.geometry import costs

import otfusion_jax as otf
from otfusion_jax.alignment.costs import METRICS, gram, ground_cost


def vectors(n, d, seed=0):
    return normal(n, d, seed=seed)


@functools.cache
def setting():
    """A symmetry, two networks, inputs, and the hidden features of both in NumPy."""
    a, b = (ref.random_net(seed, "mlp") for seed in (0, 1))
    x = normal(*ref.INPUTS["mlp"], seed=2)
    symmetry = otf.trace_symmetry(ref.network, a, x)
    before = [ref.activations(ref.to_numpy(net), np.asarray(x, np.float64)) for net in (a, b)]
    return symmetry, a, b, x, before


@pytest.mark.parametrize("metric", [kind() for kind in METRICS], ids=lambda m: type(m).__name__)
def test_metrics_are_those_of_ott(metric):
    a, b = vectors(6, 5), vectors(4, 5, seed=1)
    expected = metric.all_pairs(a, b)
    assert expected.shape == (6, 4)
    np.testing.assert_allclose(ground_cost(metric, gram(a, b)), expected, rtol=0, atol=1e-5)


def test_the_metrics_of_the_papers_are_there():
    kinds = {costs.SqEuclidean, costs.Euclidean, costs.Cosine, costs.NegDotProduct}
    assert set(METRICS) == kinds


def test_other_metrics_are_refused_with_a_way_out():
    g = gram(vectors(3, 2), vectors(3, 2))
    with pytest.raises(ValueError, match="PNormP is not a function of inner") as error:
        ground_cost(costs.PNormP(3.0), g)
    assert all(kind.__name__ in str(error.value) for kind in METRICS)


def test_distances_of_equal_units_are_zero_and_never_nan():
    a = 1000 * vectors(5, 7)
    for metric in (costs.SqEuclidean(), costs.Euclidean()):
        cost = ground_cost(metric, gram(a, a))
        assert (cost >= 0).all()
        np.testing.assert_array_equal(jnp.argmin(cost, axis=1), jnp.arange(5))
    assert jnp.isfinite(ground_cost(costs.Cosine(), gram(0 * a, a))).all()


def test_inner_products_of_complex_vectors_are_those_of_twice_as_many_reals():
    a, b = (jax.lax.complex(vectors(3, 4, s), vectors(3, 4, s + 1)) for s in (0, 2))
    found = gram(a, b)
    x, y = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(found.source_sq_norms, (abs(x) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.target_sq_norms, (abs(y) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.cross, np.real(x @ y.conj().T), rtol=0, atol=1e-5)
    expected = (abs(x[:, None] - y[None]) ** 2).sum(-1)
    np.testing.assert_allclose(ground_cost(costs.SqEuclidean(), found), expected, rtol=0, atol=1e-5)


def test_narrow_vectors_are_summed_in_float32():
    a = jnp.ones((2, 1000), jnp.bfloat16) * 1.5
    found = gram(a, a)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(found.cross, 2250)
    np.testing.assert_array_equal(found.source_sq_norms, 2250)


def test_inner_products_add_up_over_pieces():
    a, b = vectors(4, 9), vectors(3, 9, seed=1)
    total = gram(a[:, :2], b[:, :2]) + gram(a[:, 2:], b[:, 2:])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), total, gram(a, b)
    )


# Features


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("at", ["preactivation", "activation"])
def test_streams_agree_with_numpy_on_all_samples(at, center):
    symmetry, a, b, x, runs = setting()
    parts = [x[:7], x[7:8], x[8:]]
    for batches in ([x], parts, iter(parts), [(part,) for part in parts]):
        found = otf.feature_gram(symmetry, ref.network, a, b, batches, at=at, center=center)
        for layer, name in enumerate(("0/kernel", "1/kernel")):
            u, v = (run[at == "activation"][layer] for run in runs)
            if center:
                u, v = u - u.mean(0), v - v.mean(0)
            close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
            close(found[name].cross, u.T @ v)
            close(found[name].source_sq_norms, np.diagonal(u.T @ u))
            close(found[name].target_sq_norms, np.diagonal(v.T @ v))
            if center:
                covariance = np.cov(u.T, v.T, bias=True)[:8, 8:]
                close(found[name].cross / len(x), covariance)


def test_networks_in_the_other_order_give_the_transpose():
    symmetry, a, b, x, _ = setting()
    there = otf.feature_gram(symmetry, ref.network, a, b, [x])
    back = otf.feature_gram(symmetry, ref.network, b, a, [x])
    for name, g in there.items():
        np.testing.assert_allclose(g.cross, back[name].cross.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(g.source_sq_norms, back[name].target_sq_norms, rtol=1e-5)


@pytest.mark.parametrize("batches", [[], iter([])], ids=["list", "iterator"])
def test_no_batches_are_refused(batches):
    symmetry, a, b, _, _ = setting()
    with pytest.raises(ValueError, match="no batches of inputs"):
        otf.feature_gram(symmetry, ref.network, a, b, batches)


def test_empty_batches_are_refused():
    symmetry, a, b, x, _ = setting()
    with pytest.raises(ValueError, match=r"input 0 is empty: shape \(0, 5\)"):
        otf.feature_gram(symmetry, ref.network, a, b, [x, x[:0]])
