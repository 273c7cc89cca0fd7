"""Checks masses of units: what they are, and what is done with them."""

import jax.numpy as jnp
import numpy as np
import ot
import pytest
import reference as ref
from arrays import normal
from numpy.testing import assert_allclose
from pairs import FORWARD, symmetry_of

import otfusion_jax as otf


def net(kind: str, seed: int):
    return ref.random_net(seed, kind)


def test_masses_are_the_marginals_of_the_plans():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    source_masses = otf.weight_importance(symmetry, a)
    target_masses = otf.weight_importance(symmetry, b)
    marginals = source_masses, target_masses
    found = otf.align(symmetry, a, b, method=FORWARD, marginals=marginals)
    for name, plan in found.plans.items():
        assert_allclose(plan.sum(1), source_masses[name], atol=1e-6)
        assert_allclose(plan.sum(0), target_masses[name], atol=1e-6)
    source_units = ref.incoming(ref.to_numpy(a)[0])
    target_units = ref.incoming(ref.to_numpy(b)[0])
    cost = ref.distances(source_units, target_units, squared=True, unit_norm=False)
    p = np.asarray(source_masses["0/kernel"], float)
    q = np.asarray(target_masses["0/kernel"], float)
    best = ot.emd2(p / p.sum(), q / q.sum(), cost)
    assert_allclose(np.sum(found.plans["0/kernel"] * cost), best, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_importance_by_weights_is_the_norm_of_what_produces_a_unit(order: int):
    symmetry, a = symmetry_of("conv"), net("conv", 0)
    found = otf.weight_importance(symmetry, a, order)
    norms = np.linalg.norm(ref.incoming(ref.to_numpy(a)[1]), ord=order, axis=0)
    assert_allclose(found["1/kernel"], norms / norms.sum(), rtol=1e-5)


def test_importance_by_activations_is_their_variance():
    symmetry, a = symmetry_of("mlp"), net("mlp", 0)
    x = normal(50, 5, seed=2)
    activations = otf.features(symmetry, ref.network, a, x)
    found = otf.feature_importance({**activations, "silent": jnp.ones((50, 4))})
    variances = np.var(np.asarray(activations["1/kernel"]), axis=0)
    assert_allclose(found["1/kernel"], variances / variances.sum(), rtol=1e-5)
    assert_allclose(found["silent"], np.full(4, 0.25))


def test_importance_of_integers_is_that_of_the_numbers():
    x = jnp.asarray(np.random.default_rng(0).integers(-100, 100, (50, 4)))
    found = otf.feature_importance.__wrapped__({"bytes": x.astype(jnp.int8)})
    expected = otf.feature_importance({"bytes": x.astype(jnp.float32)})
    assert_allclose(found["bytes"], expected["bytes"])


def test_features_that_say_nothing_are_named_with_their_group():
    good = normal(5, 4)
    wrong = {"a": good, "b": good.at[0, :2].set(jnp.nan), "c": good[:0]}
    with pytest.raises(ValueError, match="these features say nothing of the units") as error:
        otf.feature_importance(wrong)
    assert str(error.value).splitlines()[1:] == [
        "  b: 2 of 20 values not finite",
        "  c: shape (0, 4), no samples: no input reaches the group, leave it out",
    ]


def test_marginals_are_told_to_be_why_descent_has_soft_plans():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    masses = otf.weight_importance(symmetry, a)
    with pytest.raises(ValueError, match=r"marginals give soft plans.*method=ForwardPass\(\)"):
        otf.align(symmetry, a, b, marginals=(masses, {}))
    otf.align(symmetry, a, b, marginals=({}, {}))


@pytest.mark.parametrize("side", ["source", "target"])
def test_marginals_that_do_not_fit_are_named_with_group_and_side(side: str):
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    wrong = {"0/kernel": jnp.ones(7) / 7, "1/kernel": jnp.ones(8), "9": jnp.ones(1)}
    marginals = (wrong, {}) if side == "source" else ({}, wrong)
    with pytest.raises(ValueError, match="these marginals do not fit the groups") as error:
        otf.align(symmetry, a, b, method=FORWARD, marginals=marginals)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        f"  0/kernel, of the {side}: shape (7,), expected (8,)",
        f"  1/kernel, of the {side}: masses are at least 0 and sum to 1; divide them by their sum",
        f"  9, of the {side}: no such group",
        "Its groups: 0/kernel, 1/kernel",
    ]


@pytest.mark.parametrize("side", ["source", "target"])
def test_groups_that_are_matched_one_to_one_have_no_masses(side: str):
    def heads(p, x):
        h = jnp.tanh((x @ p["a"]).reshape(len(x), 3, 4))
        return (h / jnp.sum(h**2, axis=2, keepdims=True)).reshape(len(x), -1) @ p["b"]

    a = {"a": normal(5, 12), "b": normal(12, 2)}
    symmetry = otf.trace_symmetry(heads, a, jnp.ones((2, 5)))
    outer = symmetry.groups[0].name
    masses = {outer: jnp.ones(3) / 3}
    marginals = (masses, {}) if side == "source" else ({}, masses)
    with pytest.raises(ValueError, match=f"{outer}, of the {side}: groups are nested in it"):
        otf.align(symmetry, a, a, method=FORWARD, marginals=marginals)
