"""Compares coordinate descent with weight matching of Git Re-Basin, as rewritten in NumPy."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal, normals, ones, stack, unstack
from numpy.testing import assert_allclose, assert_array_equal
from pairs import COUNT, FORWARD, FROM_IDENTITY, aligned, as_list, one_pair, pairs, symmetry_of

import otfusion_jax as otf

any_otf: Any = otf  # for calls that a type checker would refuse


@pytest.mark.parametrize("kind", ref.SHAPES)
def test_coordinate_descent_is_weight_matching(kind):
    sources, targets = pairs(kind)
    found = aligned(kind, FROM_IDENTITY)
    assert found.converged.all()
    for seed in range(COUNT):
        source = ref.to_numpy(unstack(sources, seed))
        target = ref.to_numpy(unstack(targets, seed))
        plans, history = ref.weight_matching(source, target)
        assert_array_equal(as_list(unstack(found.plans, seed)), plans)
        assert_allclose(found.objective[seed], history[-1], rtol=1e-4)
        assert_allclose(found.history[seed, : len(history)], history, rtol=1e-4)
        assert (found.history[seed, len(history) :] == found.objective[seed]).all()
        assert np.all(np.diff(history) <= 0)
        assert len(history) > 2, "a case that says nothing about sweeps"


def test_descent_that_is_cut_short_has_not_converged():
    method = otf.CoordinateDescent(max_sweeps=1, starts=("identity",))
    whole = aligned("mlp", FROM_IDENTITY)
    sweeps = (jnp.diff(whole.history) < 0).sum(1)
    longest = int(jnp.argmax(sweeps))
    found = otf.align(symmetry_of("mlp"), *one_pair(longest), method=method)
    assert not found.converged
    assert_allclose(found.history, whole.history[longest, :2], rtol=1e-6)
    assert found.history[1] == found.objective
    assert found.objective > 1.001 * whole.objective[longest]


def test_descent_needs_permutations():
    net, _ = one_pair()
    with pytest.raises(ValueError, match=r"Sinkhorn returns soft plans; use Exact\(\), or Forw"):
        otf.align(symmetry_of("mlp"), net, net, solver=otf.Sinkhorn())


# --- starts


def log_cosine(moved, target):
    """The sum over kernels of how alike two networks are."""
    total = 0.0
    for moved_layer, target_layer in zip(moved, target, strict=True):
        a = moved_layer["kernel"].ravel()
        b = target_layer["kernel"].ravel()
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        total += np.log(max(cosine, 1e-6))
    return total


def log_cosines(found):
    """For each pair of MLPs how alike the moved one and the target are."""
    sources, targets = pairs("mlp")
    totals = []
    for seed in range(COUNT):
        plans = as_list(unstack(found.plans, seed))
        moved = ref.moved_by(ref.to_numpy(unstack(sources, seed)), plans)
        totals.append(log_cosine(moved, ref.to_numpy(unstack(targets, seed))))
    return np.array(totals)


def test_of_several_starts_the_end_with_the_most_similar_layers_is_returned():
    forward = aligned("mlp", otf.CoordinateDescent(starts=("forward",)))
    identity = aligned("mlp", FROM_IDENTITY)
    both = aligned("mlp", otf.CoordinateDescent(starts=("forward", "identity")))
    preferred = log_cosines(forward) > log_cosines(identity)
    expected = np.where(preferred, forward.objective, identity.objective)
    assert_allclose(both.objective, expected, rtol=1e-6)
    for name, plans in both.plans.items():
        chosen = np.where(preferred[:, None], forward.plans[name], identity.plans[name])
        assert_array_equal(plans, chosen)
    different = forward.objective != identity.objective
    assert np.any(different & preferred)
    assert np.any(different & ~preferred)
    # The nearer end in the sum over layers is not always the one.
    assert np.any(both.objective > np.minimum(forward.objective, identity.objective))


@pytest.mark.parametrize("starts", [(), ("identity", "random")])
def test_unknown_starts_are_refused(starts):
    message = re.escape(f"starts is {starts}; it must be a tuple of 'identity'")
    with pytest.raises(ValueError, match=message):
        otf.CoordinateDescent(starts=starts)


@pytest.mark.parametrize("starts", ["identity", ["identity"], {"identity"}, None])
def test_starts_that_are_no_tuple_are_refused(starts):
    message = re.escape(f"starts is {starts!r}; it must be a tuple") + r".*as in \('forward',\)"
    with pytest.raises(TypeError, match=message):
        any_otf.CoordinateDescent(starts=starts)


# --- activations


def mlp_grams(**options):
    x = normal(*ref.INPUTS["mlp"], seed=9)
    return otf.feature_gram(symmetry_of("mlp"), ref.network, *one_pair(), [x], **options)


def test_features_serve_descent_as_a_start():
    symmetry, (source, target) = symmetry_of("mlp"), one_pair()
    grams = mlp_grams()
    start = otf.align(symmetry, source, target, method=FORWARD, grams=grams)
    method = otf.CoordinateDescent(max_sweeps=1, starts=("forward",))
    found = otf.align(symmetry, source, target, method=method, grams=grams)
    x = np.asarray(normal(*ref.INPUTS["mlp"], seed=9))
    expected, _ = ref.algorithm_1(ref.to_numpy(source), ref.to_numpy(target), x)
    assert_array_equal(as_list(start.plans), expected)
    assert_allclose(found.history[0], start.objective, rtol=1e-6)
    assert found.objective < start.objective
    assert not found.converged


def test_grams_that_no_start_uses_are_refused():
    message = r"(?s)grams serve only the start 'forward'.*ForwardPass\(\)"
    with pytest.raises(ValueError, match=message):
        otf.align(symmetry_of("mlp"), *one_pair(), method=FROM_IDENTITY, grams=mlp_grams())


def test_inner_products_within_models_are_left_alone_by_solvers_that_do_not_need_them():
    plain = otf.align(symmetry_of("mlp"), *one_pair(), grams=mlp_grams())
    found = otf.align(symmetry_of("mlp"), *one_pair(), grams=mlp_grams(intra=True))
    assert_array_equal(as_list(found.plans), as_list(plain.plans))


# --- one group on two axes of one parameter


def recurrent(params, x):
    """`x + Dense(x)` twice, with the same weights: the group is on both axes of `loop`."""
    x = x @ params["embed"]
    for _ in range(2):
        x = x + jnp.tanh(x @ params["loop"])
    return x @ params["out"]


def random_recurrent(seed):
    drawn = normals({"embed": (4, 8), "loop": (8, 8), "out": (8, 2)}, seed)
    return {"embed": drawn["embed"] / 2, "loop": drawn["loop"] / 3, "out": drawn["out"] / 3}


@functools.cache
def recurrent_symmetry():
    return otf.trace_symmetry(recurrent, random_recurrent(0), ones(1, 4))


def test_a_group_on_two_axes_of_a_leaf_is_found():
    (group,) = recurrent_symmetry().groups
    assert [m.axis for m in group.members if m.path == "loop"] == [0, 1]


@pytest.mark.parametrize("start", ["identity", "forward"])
def test_the_objective_never_rises_though_the_problem_is_quadratic(start):
    symmetry = recurrent_symmetry()
    drawn = [random_recurrent(seed) for seed in range(200)]
    unrelated, targets = stack(drawn[:100]), stack(drawn[100:])
    plans = jax.vmap(symmetry.random)(jax.random.split(jax.random.key(7), 100))
    transport = jax.vmap(functools.partial(otf.transport, symmetry))
    permuted = transport(plans, targets)
    method = otf.CoordinateDescent(starts=(start,))
    align = jax.vmap(functools.partial(otf.align, symmetry, method=method))
    for sources in (unrelated, permuted):
        found = align(sources, targets)
        steps = np.diff(np.asarray(found.history), axis=1)  # 0 after the end
        assert found.converged.all()
        assert not np.any(steps > 0)
        assert np.any(steps < 0) or found.objective.max() == 0
        moved = transport(found.plans, sources)
        expected = np.zeros(100)
        for name, moved_leaf in moved.items():
            expected += np.sum((moved_leaf - targets[name]) ** 2, (1, 2))
        assert_allclose(found.objective, expected, rtol=1e-5)
    if start == "forward":
        assert_array_equal(found.plans["embed"], jnp.argsort(plans["embed"], axis=1))
