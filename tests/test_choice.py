"""What a caller may choose: groups, weights parameter by parameter, and quadratic solvers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal, normals

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
