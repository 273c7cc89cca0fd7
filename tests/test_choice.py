"""What a caller may choose: groups, weights parameter by parameter, masses, and solvers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
import reference as ref
from arrays import normal, normals
from ott.geometry import costs

import otfusion_jax as otf

Net = list[dict[str, jax.Array]]
FORWARD = otf.ForwardPass()


@functools.cache
def symmetry_of(kind: str) -> otf.Symmetry:
    return otf.trace_symmetry(ref.network, net(kind, 0), jnp.ones(ref.INPUTS[kind]))


def net(kind: str, seed: int) -> Net:
    return ref.random_net(seed, kind)


def assert_close(a, b) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), a, b)


# Groups


def test_groups_left_out_stay_and_the_others_are_matched_around_them():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    second = symmetry.only(lambda name: name.startswith("1/"))
    assert [g.name for g in second.groups] == ["1/kernel"]
    assert otf.check_symmetry(second, ref.network, a, jnp.ones((2, 5))) < 1e-5
    held = {(p.path, p.axis) for p in second.pinned if p.reason == "left out by the caller"}
    assert held == {("0/kernel", 1), ("0/bias", 0), ("1/kernel", 0)}
    found = otf.align(second, a, b, method=FORWARD)
    # The source's second layer as it stands, its inputs in the source's order.
    expected = ref.distances(
        *(np.concatenate([x[1]["kernel"], x[1]["bias"][None]]).astype(np.float64) for x in (a, b)),
        squared=True,
        unit_norm=False,
    )
    np.testing.assert_array_equal(found.plans["1/kernel"], ref.assign(expected))
    moved = otf.transport(second, found, a)
    assert_close(moved[0], a[0])


def test_what_is_nested_in_a_group_left_out_is_matched_place_by_place():
    def heads(p, x):
        h = jnp.tanh((x @ p["a"]).reshape(len(x), 3, 4))
        return (h / jnp.sum(h**2, axis=2, keepdims=True)).reshape(len(x), -1) @ p["b"]

    a = normals({"a": (5, 12), "b": (12, 2)})
    symmetry = otf.trace_symmetry(heads, a, jnp.ones((2, 5)))
    outer, inner = symmetry.groups
    assert (inner.outer, inner.batch) == (outer.name, (3,))
    alone = symmetry.only(lambda name: name == inner.name)
    assert (alone.groups[0].outer, alone.groups[0].batch) == (None, (3,))
    plans = alone.random(jax.random.key(1))
    found = otf.align(alone, a, otf.transport(alone, plans, a), method=FORWARD)
    np.testing.assert_array_equal(found.plans[inner.name], plans[inner.name])


# Weights parameter by parameter


def keeps_the_head(path: str) -> tuple[float, float] | None:
    return (0.0, 1.0) if path.startswith("2/") else None


def test_a_function_of_the_key_path_keeps_the_head_of_one_model():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    fused = otf.fuse(symmetry, [a, b], keeps_the_head, method=FORWARD)
    plain = otf.fuse(symmetry, [a, b], method=FORWARD)
    assert_close(fused[2], b[2])
    assert_close(fused[:2], plain[:2])
    assert_close(otf.average([a, b], keeps_the_head)[2], b[2])
    # Whatever the reference, weights are by the order in which the models were given.
    fused = otf.fuse(symmetry, [b, a], lambda path: (1.0, 0.0), reference=0, method=FORWARD)
    assert_close(fused, b)


def test_layers_may_be_merged_up_to_one_and_kept_from_there():
    """Merged up to the first hidden layer: what follows is the reference's, as it is."""
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    first = symmetry.only(lambda name: name.startswith("0/"))
    fused = otf.fuse(
        first, [a, b], lambda path: None if path.startswith("0/") else (0.0, 1.0), method=FORWARD
    )
    assert_close(fused[1:], b[1:])
    moved = otf.transport(first, otf.align(first, a, b, method=FORWARD), a)
    assert_close(fused[0], otf.average([moved, b])[0])


def test_weights_that_do_not_fit_name_the_key_path():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    with pytest.raises(ValueError, match=r"2/bias: weights has shape \(3,\), but there are 2"):
        otf.fuse(symmetry, [a, b], lambda path: (0.0, 0.0, 1.0) if path == "2/bias" else None)


# Masses


def test_masses_are_the_marginals_of_the_plans():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    masses = otf.weight_importance(symmetry, a), otf.weight_importance(symmetry, b)
    found = otf.align(symmetry, a, b, method=FORWARD, marginals=masses)
    for name, plan in found.plans.items():
        np.testing.assert_allclose(plan.sum(1), masses[0][name], atol=1e-6)
        np.testing.assert_allclose(plan.sum(0), masses[1][name], atol=1e-6)
    first = [np.concatenate([x[0]["kernel"], x[0]["bias"][None]]).astype(float) for x in (a, b)]
    cost = ref.distances(*first, squared=True, unit_norm=False)
    p, q = (np.asarray(x["0/kernel"], float) for x in masses)
    best = ot.emd2(p / p.sum(), q / q.sum(), cost)
    np.testing.assert_allclose(np.sum(found.plans["0/kernel"] * cost), best, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_importance_by_weights_is_the_norm_of_what_produces_a_unit(order: int):
    symmetry, a = symmetry_of("conv"), net("conv", 0)
    found = otf.weight_importance(symmetry, a, order)
    kernel = np.asarray(a[1]["kernel"]).reshape(-1, 8)
    vectors = np.concatenate([kernel, a[1]["bias"][None]])
    norms = np.linalg.norm(vectors, ord=order, axis=0)
    np.testing.assert_allclose(found["1/kernel"], norms / norms.sum(), rtol=1e-5)


def test_importance_by_activations_is_their_variance():
    symmetry, a = symmetry_of("mlp"), net("mlp", 0)
    x = normal(50, 5, seed=2)
    seen = otf.features(symmetry, ref.network, a, x)
    found = otf.feature_importance({**seen, "silent": jnp.ones((50, 4))})
    variances = np.var(np.asarray(seen["1/kernel"]), axis=0)
    np.testing.assert_allclose(found["1/kernel"], variances / variances.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["silent"], np.full(4, 0.25))


def test_marginals_that_do_not_fit_are_named():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    wrong = {"0/kernel": jnp.ones(7) / 7, "1/kernel": jnp.ones(8), "9": jnp.ones(1)}
    with pytest.raises(ValueError, match="9: no such group") as error:
        otf.align(symmetry, a, b, method=FORWARD, marginals=(wrong, {}))
    assert r"0/kernel: shape (7,) for the source, expected (8,)" in str(error.value)
    assert r"1/kernel: of the source; masses are at least 0 and sum to 1" in str(error.value)


# Quadratic solvers


def test_gromov_wasserstein_sees_the_units_own_geometry():
    """Units told apart by where they are among the others, not by their own coordinates."""
    symmetry, a = symmetry_of("mlp"), net("mlp", 0)
    plans = symmetry.random(jax.random.key(1))
    b = otf.transport(symmetry, plans, a)
    rotation = jnp.linalg.qr(normal(5, 5, seed=2))[0]
    turned = [{**b[0], "kernel": rotation @ b[0]["kernel"]}, *b[1:]]
    solver = otf.GromovWasserstein(alpha=1.0, epsilon=0.01)
    first = symmetry.only(lambda name: name.startswith("0/"))
    found = otf.align(first, a, turned, method=FORWARD, solver=solver).plans["0/kernel"]
    np.testing.assert_array_equal(jnp.argmax(found, axis=0), plans["0/kernel"])
    # What the rotation has done to the cost, no other solver undoes.
    exact = otf.align(first, a, turned, method=FORWARD).plans["0/kernel"]
    assert not np.array_equal(exact, plans["0/kernel"])


def test_features_serve_a_quadratic_solver_if_taken_for_it():
    symmetry, a, b = symmetry_of("mlp"), net("mlp", 0), net("mlp", 1)
    x = [normal(20, 5, seed=2)]
    how = {"method": FORWARD, "solver": otf.GromovWasserstein(), "metric": costs.SqEuclidean()}
    for center in (False, True):
        grams = otf.feature_gram(symmetry, ref.network, a, b, x, intra=True, center=center)
        seen = [otf.features(symmetry, ref.network, net, x[0])["1/kernel"] for net in (a, b)]
        if center:
            seen = [y - y.mean(0, keepdims=True) for y in seen]
        intra = grams["1/kernel"].intra
        assert intra is not None
        for inside, y in zip(intra, seen, strict=True):
            np.testing.assert_allclose(inside, y.T @ y, rtol=1e-4, atol=1e-4)
    plan = otf.align(symmetry, a, b, grams=grams, **how).plans["1/kernel"]
    np.testing.assert_allclose(plan.sum(0), np.full(8, 1 / 8), atol=1e-2)
    bare = otf.feature_gram(symmetry, ref.network, a, b, x)
    with pytest.raises(ValueError, match="intra"):
        otf.align(symmetry, a, b, grams=bare, **how)
