"""Compares the forward pass with Algorithm 1 of Singh and Jaggi, as rewritten in NumPy."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal, normals, unstack
from numpy.testing import assert_allclose, assert_array_equal
from ott.geometry import costs
from pairs import COUNT, FORWARD, as_list, one_pair, pairs, symmetry_of
from scipy.optimize import linear_sum_assignment

import otfusion_jax as otf


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "euclidean"])
@pytest.mark.parametrize("mode", ["weights", "unit_norm", "activations"])
@pytest.mark.parametrize("kind", ref.SHAPES)
def test_forward_pass_is_algorithm_1(kind, mode, squared):
    bias = mode != "unit_norm"  # as in the paper's own networks
    symmetry = symmetry_of(kind, bias)
    sources, targets = pairs(kind, bias)
    x = normal(*ref.INPUTS[kind], seed=9)
    metric = costs.SqEuclidean() if squared else costs.Euclidean()
    method = otf.ForwardPass(unit_norm=mode == "unit_norm")

    def fused(pair):
        source, target = pair
        grams = None
        if mode == "activations":
            grams = otf.feature_gram(symmetry, ref.network, source, target, [x])
        found = otf.align(symmetry, source, target, method=method, metric=metric, grams=grams)
        moved = otf.transport(symmetry, found, source)
        return found.plans, otf.average([moved, target])

    plans, results = jax.jit(functools.partial(jax.lax.map, fused))((sources, targets))
    samples = np.asarray(x, np.float64) if mode == "activations" else None
    for seed in range(COUNT):
        source = ref.to_numpy(unstack(sources, seed))
        target = ref.to_numpy(unstack(targets, seed))
        expected_plans, expected = ref.algorithm_1(
            source, target, samples, squared=squared, unit_norm=mode == "unit_norm"
        )
        assert_array_equal(as_list(unstack(plans, seed)), expected_plans)
        close = functools.partial(assert_allclose, rtol=0, atol=1e-5)
        jax.tree.map(close, unstack(results, seed), expected)


def test_all_members_are_those_that_consume_the_units_too():
    source, target = one_pair()
    method = otf.ForwardPass(members="all")
    found = as_list(otf.align(symmetry_of("mlp"), source, target, method=method).plans)
    a, b = ref.to_numpy(source), ref.to_numpy(target)

    def matched(layer, next_layer, target_layer, next_target_layer):
        source_units = np.concatenate([ref.incoming(layer), next_layer["kernel"].T])
        target_units = np.concatenate([ref.incoming(target_layer), next_target_layer["kernel"].T])
        return linear_sum_assignment(-(target_units.T @ source_units))[1]

    first = matched(a[0], a[1], b[0], b[1])
    moved = {**a[1], "kernel": a[1]["kernel"][first]}
    second = matched(moved, a[2], b[1], b[2])
    assert_array_equal(found, [first, second])


def test_unknown_members_are_refused():
    with pytest.raises(ValueError, match="members is 'some'"):
        otf.ForwardPass(members="some")  # pyright: ignore[reportArgumentType]


# --- what is added to a group later


def residual(params, x):
    h = x @ params["embed"]
    return (h + jnp.tanh(h @ params["up"]) @ params["down"]) @ params["out"]


def recurrent(params, x):
    """`x + Dense(x)` twice, with the same weights: the group is on both axes of `loop`."""
    x = x @ params["embed"]
    for _ in range(2):
        x = x + jnp.tanh(x @ params["loop"])
    return x @ params["out"]


@pytest.mark.parametrize(
    ("fn", "inner"), [(residual, ("up", "down")), (recurrent, ("loop",))], ids=["up_down", "loop"]
)
def test_what_is_not_in_place_yet_does_not_disturb_the_forward_pass(fn, inner):
    # Two numbers tell units apart; what is added to them later is loud, and still scrambled.
    shapes = {"embed": (2, 8), "out": (8, 2)} | dict.fromkeys(inner, (8, 8))

    def draw(key):
        params = {}
        for number, (name, shape) in enumerate(shapes.items()):
            scale = 10 if name in inner else 1
            params[name] = scale * jax.random.normal(jax.random.fold_in(key, number), shape)
        return params

    symmetry = otf.trace_symmetry(fn, draw(jax.random.key(0)), jnp.ones((3, 2)))

    @jax.jit
    @jax.vmap
    def recovered(key):
        target, plans = draw(key), symmetry.random(key)
        source = otf.transport(symmetry, plans, target)
        found = otf.align(symmetry, source, target, method=FORWARD)
        return jnp.array_equal(found.plans["embed"], jnp.argsort(plans["embed"]))

    assert recovered(jax.random.split(jax.random.key(1), 100)).sum() == 100


def grouped(params, x):
    """Units of two groups along one axis, and a parameter that none of them moves."""
    both = jnp.concatenate([jnp.tanh(x @ params["left"]), jnp.tanh(x @ params["right"])], axis=-1)
    return both @ params["read"] + params["bias"][None]


OBJECTIVES = {
    "residual": (residual, {"embed": (2, 8), "up": (8, 9), "down": (9, 8), "out": (8, 3)}),
    "recurrent": (recurrent, {"embed": (2, 8), "loop": (8, 8), "out": (8, 3)}),
    "grouped": (
        grouped,
        {"left": (2, 8), "right": (2, 5), "read": (13, 4), "bias": (4,)},
    ),
}


@pytest.mark.parametrize("noise", [1e-4, 0.05, 3], ids=["near", "closer", "far"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_distances_before_and_after_are_those_of_the_models(name, noise):
    """Whether they are known by the way or measured in the end."""
    fn, shapes = OBJECTIVES[name]
    target, other = normals(shapes, seed=1), normals(shapes, seed=2)
    symmetry = otf.trace_symmetry(fn, target, jnp.ones((3, 2)))
    near = jax.tree.map(lambda x, y: x + noise * y, target, other)
    source = otf.transport(symmetry, symmetry.random(jax.random.key(0)), near)
    found = otf.align(symmetry, source, target, method=FORWARD)
    moved = otf.transport(symmetry, found, source)
    for model, measured in ((source, found.history[0]), (moved, found.objective)):
        squares = [np.sum((np.float64(model[key]) - target[key]) ** 2) for key in shapes]
        assert_allclose(measured, sum(squares), rtol=1e-5)
    assert found.objective == found.history[1]


def test_distances_are_those_of_the_models_behind_a_soft_plan():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    shapes = {"a": (3, 8), "b": (8, 9), "c": (9, 4)}
    source, target = normals(shapes, seed=1), normals(shapes, seed=2)
    symmetry = otf.trace_symmetry(fn, target, jnp.ones((2, 3)))
    masses = []
    for seed in (3, 4):
        drawn = np.random.default_rng(seed).uniform(0.2, 1.2, 8).astype(np.float32)
        masses.append({"a": jnp.asarray(drawn / drawn.sum())})
    found = otf.align(symmetry, source, target, method=FORWARD, marginals=(masses[0], masses[1]))
    squares = [np.sum((np.float64(source[key]) - target[key]) ** 2) for key in shapes]
    assert_allclose(found.history[0], sum(squares), rtol=1e-6)


def test_what_stays_is_at_one_distance():
    """Units of long vectors, whose inner products are rounded by more."""
    target = normals({"a": (20000, 8), "c": (8, 4)}, seed=1)
    source = dict(target, a=target["a"] + 0.5 * normal(20000, 8, seed=2))

    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["c"]

    symmetry = otf.trace_symmetry(fn, target, jnp.ones((1, 20000)))
    found = otf.align(symmetry, source, target, method=FORWARD)
    assert found.history[0] == found.history[1]
    expected = np.sum((np.float64(source["a"]) - target["a"]) ** 2)
    assert_allclose(found.objective, expected, rtol=3e-5)


# --- soft plans


def assert_is_coupling(plan):
    assert (plan >= 0).all()
    assert_allclose(plan.sum(0), 1 / 8, atol=1e-3 / 8)
    assert_allclose(plan.sum(1), 1 / 8, atol=1e-3 / 8)


def test_forward_pass_with_sinkhorn_gives_couplings_close_to_exact():
    symmetry = symmetry_of("mlp")
    target, _ = one_pair()
    source = otf.transport(symmetry, symmetry.random(jax.random.key(0)), target)
    source = jax.tree.map(lambda x: x + 0.01, source)
    align = functools.partial(otf.align, symmetry, source, target, method=FORWARD)
    exact = align()
    sharp = align(solver=otf.Sinkhorn(epsilon=0.01, max_iterations=5000))
    blurred = align(solver=otf.Sinkhorn(epsilon=1.0))
    assert sharp.converged
    assert blurred.converged
    for name, permutation in exact.plans.items():
        assert_is_coupling(sharp.plans[name])
        assert_is_coupling(blurred.plans[name])
        coupling = jnp.zeros((8, 8)).at[permutation, jnp.arange(8)].set(1 / 8)
        assert_allclose(sharp.plans[name], coupling, atol=1e-3)
        assert jnp.abs(blurred.plans[name] - coupling).max() > 0.02
    assert_allclose(sharp.objective, exact.objective, rtol=1e-2)
    assert blurred.objective > 10 * exact.objective


def test_solvers_that_take_no_arrays_of_numpy_find_the_same():
    @dataclasses.dataclass(frozen=True)
    class OnDevice(otf.Exact):
        takes_numpy: ClassVar[bool] = False

    def net(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]

    shapes = {"a": (8, 16), "b": (16, 12), "c": (12, 4)}
    a, b = normals(shapes, seed=0), normals(shapes, seed=1)
    symmetry = otf.trace_symmetry(net, a, jnp.ones((2, 8)))
    found = otf.align(symmetry, a, b, method=otf.ForwardPass(), solver=OnDevice())
    expected = otf.align(symmetry, a, b, method=otf.ForwardPass())
    for name, plan in expected.plans.items():
        assert_array_equal(found.plans[name], plan)
    assert_allclose(found.history, expected.history, rtol=1e-5)
