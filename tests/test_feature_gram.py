"""Compares inner products of activations with NumPy, whatever the batches that they come in."""

import functools
from typing import Any

import numpy as np
import pytest
import reference as ref
from arrays import normal
from numpy.testing import assert_allclose
from pairs import FORWARD

import otfusion_jax as otf

any_otf: Any = otf  # for calls that a type checker would refuse


@functools.cache
def setting():
    """A symmetry, two networks, inputs, and the hidden features of both in NumPy."""
    a, b = ref.random_net(0, "mlp"), ref.random_net(1, "mlp")
    x = normal(*ref.INPUTS["mlp"], seed=2)
    samples = np.asarray(x, np.float64)
    runs = [ref.activations(ref.to_numpy(net), samples) for net in (a, b)]
    return otf.trace_symmetry(ref.network, a, x), a, b, x, runs


def layer_features(run, at: str, layer: int, center: bool) -> np.ndarray:
    before, after = run
    features = before[layer] if at == "preactivation" else after[layer]
    return features - features.mean(0) if center else features


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("at", ["preactivation", "activation"])
def test_streams_agree_with_numpy_on_all_samples(at, center):
    symmetry, a, b, x, runs = setting()
    parts = [x[:7], x[7:8], x[8:]]
    close = functools.partial(assert_allclose, rtol=0, atol=1e-4)
    for batches in ([x], parts, iter(parts), [(part,) for part in parts]):
        found = otf.feature_gram(symmetry, ref.network, a, b, batches, at=at, center=center)
        for layer, name in enumerate(("0/kernel", "1/kernel")):
            u = layer_features(runs[0], at, layer, center)
            v = layer_features(runs[1], at, layer, center)
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
    for name, products in there.items():
        assert_allclose(products.cross, back[name].cross.T, rtol=1e-5, atol=1e-5)
        assert_allclose(products.source_sq_norms, back[name].target_sq_norms, rtol=1e-5)


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
def test_features_serve_a_quadratic_solver_if_taken_for_it(center):
    symmetry, a, b, x, runs = setting()
    grams = otf.feature_gram(symmetry, ref.network, a, b, [x], intra=True, center=center)
    intra = grams["1/kernel"].intra
    assert intra is not None
    for products, run in zip(intra, runs, strict=True):
        u = layer_features(run, "preactivation", 1, center)
        assert_allclose(products, u.T @ u, rtol=1e-4, atol=1e-4)
    align = functools.partial(
        otf.align, symmetry, a, b, method=FORWARD, solver=otf.GromovWasserstein()
    )
    plan = align(grams=grams).plans["1/kernel"]
    assert_allclose(plan.sum(0), np.full(8, 1 / 8), atol=1e-2)
    without_intra = otf.feature_gram(symmetry, ref.network, a, b, [x])
    with pytest.raises(ValueError, match="intra"):
        align(grams=without_intra)


# --- batches


@pytest.mark.parametrize("batches", [[], iter([])], ids=["list", "iterator"])
def test_no_batches_are_refused(batches):
    symmetry, a, b, _, _ = setting()
    with pytest.raises(ValueError, match="no batches of inputs"):
        otf.feature_gram(symmetry, ref.network, a, b, batches)


def test_empty_batches_are_refused():
    symmetry, a, b, x, _ = setting()
    with pytest.raises(ValueError, match=r"input 0 is empty: shape \(0, 5\)"):
        otf.feature_gram(symmetry, ref.network, a, b, [x, x[:0]])


X = normal(*ref.INPUTS["mlp"], seed=2)
ONE_BATCH = {
    "array": (X, r"array of shape \(20, 5\).*pass .* as in \[x\]"),
    "numpy": (np.asarray(X), r"array of shape \(20, 5\).*pass .* as in \[x\]"),
    "dict": ({"x": X}, r"batches is dict.*pass .* as in \[x\]"),
    "inputs": ((X, X), r"tuple of 2, of arrays.*pass \[\(x, y\)\] for one batch of two inputs"),
    "numpy inputs": ((np.asarray(X),), r"tuple of 1, of arrays.*pass \[\(x, y\)\] for one"),
}


@pytest.mark.parametrize("kind", ONE_BATCH)
def test_one_batch_is_no_list_of_batches(kind):
    symmetry, a, b, _, _ = setting()
    batch, message = ONE_BATCH[kind]
    with pytest.raises(TypeError, match=message):
        any_otf.feature_gram(symmetry, ref.network, a, b, batch)


def test_a_tuple_of_batches_that_are_tuples_of_inputs_is_one_of_batches():
    symmetry, a, b, x, _ = setting()
    found = otf.feature_gram(symmetry, ref.network, a, b, ((x[:7],), (x[7:],)))
    expected = otf.feature_gram(symmetry, ref.network, a, b, [x])
    assert_allclose(found["0/kernel"].cross, expected["0/kernel"].cross, rtol=1e-4, atol=1e-4)
