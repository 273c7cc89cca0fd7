"""Compares alignment with the papers' algorithms, and has it find permutations that are known."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from ott.geometry import costs

import otfusion_jax as otf

DESCENT = otf.CoordinateDescent()
FROM_IDENTITY = otf.CoordinateDescent(starts=("identity",))


@functools.cache
def symmetry_of(kind, bias=True):
    params = jax.eval_shape(lambda k: ref.random_net(k, kind, bias), jax.random.key(0))
    inputs = jax.ShapeDtypeStruct(ref.INPUTS[kind], jnp.float32)
    return otf.trace_symmetry(ref.network, params, inputs)


def pairs(kind, count, bias=True, seed=0):
    """Two stacks of random networks."""
    keys = jax.random.split(jax.random.key(seed), (2, count))
    draw = jax.vmap(lambda k: ref.random_net(k, kind, bias))
    return draw(keys[0]), draw(keys[1])


def as_list(plans):
    return [np.asarray(plan) for _, plan in sorted(plans.items())]


# Algorithm 1 and weight matching, as rewritten in NumPy


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "euclidean"])
@pytest.mark.parametrize("mode", ["weights", "unit_norm", "activations"])
@pytest.mark.parametrize("kind", ref.SHAPES)
def test_forward_pass_is_algorithm_1(kind, mode, squared):
    seeds, bias = 4, mode != "unit_norm"
    symmetry = symmetry_of(kind, bias)
    sources, targets = pairs(kind, seeds, bias)
    x = jax.random.normal(jax.random.key(9), ref.INPUTS[kind])
    metric = costs.SqEuclidean() if squared else costs.Euclidean()
    method = otf.ForwardPass(unit_norm=mode == "unit_norm")

    @jax.jit
    @jax.vmap
    def fused(source, target):
        grams = None
        if mode == "activations":
            grams = otf.feature_gram(symmetry, ref.network, source, target, [x])
        found = otf.align(symmetry, source, target, method=method, metric=metric, features=grams)
        return found.plans, otf.average([otf.transport(symmetry, found, source), target])

    plans, results = fused(sources, targets)
    for seed in range(seeds):
        expected_plans, expected = ref.algorithm_1(
            ref.to_numpy(ref.unstack(sources, seed)),
            ref.to_numpy(ref.unstack(targets, seed)),
            np.asarray(x, np.float64) if mode == "activations" else None,
            squared=squared,
            unit_norm=mode == "unit_norm",
        )
        np.testing.assert_array_equal(as_list(ref.unstack(plans, seed)), expected_plans)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
            ref.unstack(results, seed),
            expected,
        )


@pytest.mark.parametrize("kind", ref.SHAPES)
def test_coordinate_descent_is_weight_matching(kind):
    seeds = 4
    symmetry = symmetry_of(kind)
    sources, targets = pairs(kind, seeds, seed=1)
    align = functools.partial(otf.align, symmetry, method=FROM_IDENTITY)
    found = jax.vmap(align)(sources, targets)
    assert found.converged.all()
    for seed in range(seeds):
        source, target = ref.unstack(sources, seed), ref.unstack(targets, seed)
        plans, history = ref.weight_matching(ref.to_numpy(source), ref.to_numpy(target))
        np.testing.assert_array_equal(as_list(ref.unstack(found.plans, seed)), plans)
        np.testing.assert_allclose(found.objective[seed], history[-1], rtol=1e-4)
        np.testing.assert_allclose(found.history[seed, : len(history)], history, rtol=1e-4)
        assert jnp.isnan(found.history[seed, len(history) :]).all()
        assert len(history) > 2, "a case that teaches nothing about sweeps"
        assert np.all(np.diff(history) <= 0)


def test_more_starts_never_end_worse():
    symmetry = symmetry_of("mlp")
    sources, targets = pairs("mlp", 20, seed=2)
    ends = {
        starts: jax.vmap(
            functools.partial(otf.align, symmetry, method=otf.CoordinateDescent(starts=starts))
        )(sources, targets)
        for starts in [("identity",), ("forward",), ("forward", "identity")]
    }
    one, other, both = (end.objective for end in ends.values())
    np.testing.assert_array_equal(both, jnp.minimum(one, other))
    assert jnp.any(one < other)
    assert jnp.any(other < one)


# Alignments say how good they are


def test_an_alignment_reports_distances_before_and_after():
    symmetry = symmetry_of("mlp")
    source, target = (ref.unstack(nets, 0) for nets in pairs("mlp", 1, seed=3))
    found = otf.align(symmetry, source, target, method=otf.ForwardPass())
    moved = otf.transport(symmetry, found, source)
    ends = [
        ref.squared_distance(ref.to_numpy(net), ref.to_numpy(target)) for net in (source, moved)
    ]
    np.testing.assert_allclose(found.history, ends, rtol=1e-5)
    np.testing.assert_allclose(found.objective, ends[1], rtol=1e-5)
    assert found.converged
    assert found.gaps.keys() == found.plans.keys() == {g.name for g in symmetry.groups}
    assert all(0 <= gap < 1e-4 for gap in found.gaps.values())


def test_descent_that_is_cut_short_has_not_converged():
    symmetry = symmetry_of("mlp")
    source, target = (ref.unstack(nets, 0) for nets in pairs("mlp", 1, seed=3))
    method = otf.CoordinateDescent(max_sweeps=1)
    found = otf.align(symmetry, source, target, method=method)
    assert not found.converged
    assert found.history.shape == (2,)
    assert found.history[1] == found.objective < found.history[0]


def test_a_model_aligned_with_itself_stays():
    symmetry = symmetry_of("mlp")
    source = ref.unstack(pairs("mlp", 1, seed=4)[0], 0)
    for method in (DESCENT, otf.ForwardPass()):
        found = otf.align(symmetry, source, source, method=method)
        np.testing.assert_array_equal(as_list(found.plans), as_list(symmetry.identity()))
        assert found.objective == 0
        assert found.converged


# Transformations of JAX


@pytest.mark.parametrize("method", [DESCENT, otf.ForwardPass()], ids=lambda m: type(m).__name__)
def test_jit_vmap_and_repetition_change_nothing(method):
    symmetry = symmetry_of("mlp")
    sources, targets = pairs("mlp", 3, seed=5)
    align = functools.partial(otf.align, symmetry, method=method)
    mapped, jitted = jax.vmap(align)(sources, targets), jax.jit(align)
    for i in range(3):
        pair = ref.unstack(sources, i), ref.unstack(targets, i)
        plain = align(*pair)
        for other in (align(*pair), jitted(*pair), ref.unstack(mapped, i)):
            np.testing.assert_array_equal(as_list(other.plans), as_list(plain.plans))
            np.testing.assert_allclose(other.objective, plain.objective, rtol=1e-6)
            np.testing.assert_allclose(other.history, plain.history, rtol=1e-6)
            assert other.converged == plain.converged


# What cannot be aligned


def with_nan(net):
    return [net[0], {**net[1], "kernel": net[1]["kernel"].at[0, 0].set(jnp.nan)}, *net[2:]]


@pytest.mark.parametrize("side", ["source", "target"])
def test_weights_that_are_not_finite_are_named(side):
    symmetry = symmetry_of("mlp")
    good = ref.unstack(pairs("mlp", 1)[0], 0)
    bad = with_nan(good)
    bad[2] = {**bad[2], "bias": bad[2]["bias"] + jnp.inf}
    models = (bad, good) if side == "source" else (good, bad)
    with pytest.raises(ValueError, match=rf"(?s)the {side}.*1/kernel: 1 of.*") as error:
        otf.align(symmetry, *models)
    assert "2/bias: 3 of 3 values not finite" in str(error.value)
    assert "0/kernel" not in str(error.value)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("method", [DESCENT, otf.ForwardPass()], ids=lambda m: type(m).__name__)
def test_under_jit_they_give_a_model_of_nan(method, side):
    symmetry = symmetry_of("mlp")
    good = ref.unstack(pairs("mlp", 1)[0], 0)
    models = (with_nan(good), good) if side == "source" else (good, with_nan(good))

    @jax.jit
    def moved(source, target):
        found = otf.align(symmetry, source, target, method=method)
        return found.converged, otf.transport(symmetry, found, source)

    converged, model = moved(*models)
    assert not converged
    # The groups next to the bad kernel have no solution; it carries both.
    assert jnp.isnan(model[1]["kernel"]).all()
    assert jnp.isnan(ref.network(model, jnp.ones((1, 5)))).all()


def test_models_of_another_architecture_are_refused():
    net = ref.unstack(pairs("mlp", 1)[0], 0)
    wider = [{**net[0], "kernel": jnp.zeros((5, 9)), "bias": jnp.zeros(9)}, *net[1:]]
    with pytest.raises(ValueError, match=r"(?s)source.*0/bias: shape \(9,\), expected \(8,\).*0/k"):
        otf.align(symmetry_of("mlp"), wider, net)
    with pytest.raises(ValueError, match=r"(?s)target.*2/bias: missing.*2/kernel: missing"):
        otf.align(symmetry_of("mlp"), net, net[:2])


def test_features_have_to_fit():
    symmetry = symmetry_of("mlp")
    net = ref.unstack(pairs("mlp", 1)[0], 0)
    square = otf.Gram(jnp.ones(8), jnp.ones(8), jnp.ones((8, 8)))
    small = otf.Gram(jnp.ones(7), jnp.ones(7), jnp.ones((7, 7)))
    with pytest.raises(ValueError, match="1/kernel: missing"):
        otf.align(symmetry, net, net, features={"0/kernel": square})
    with pytest.raises(ValueError, match=r"1/kernel: shape \(7, 7\), expected \(8, 8\)"):
        otf.align(symmetry, net, net, features={"0/kernel": square, "1/kernel": small})


def test_descent_needs_permutations():
    net = ref.unstack(pairs("mlp", 1)[0], 0)
    with pytest.raises(ValueError, match=r"Sinkhorn returns soft plans; use Exact\(\), or Forw"):
        otf.align(symmetry_of("mlp"), net, net, solver=otf.Sinkhorn())


@pytest.mark.parametrize("starts", [(), ("identity", "random")])
def test_unknown_starts_are_refused(starts):
    with pytest.raises(ValueError, match=re.escape(f"starts is {starts}; choose from 'identity'")):
        otf.CoordinateDescent(starts=starts)


def test_a_network_without_groups_has_nothing_to_align():
    linear = lambda params, x: x @ params
    source, target = jnp.ones((4, 3)), jnp.zeros((4, 3))
    symmetry = otf.trace_symmetry(linear, source, jnp.ones((1, 4)))
    assert not symmetry.groups
    for method in (DESCENT, otf.ForwardPass()):
        found = otf.align(symmetry, source, target, method=method)
        assert found.plans == {}
        assert found.converged
        np.testing.assert_allclose(found.history, [12])
        np.testing.assert_array_equal(otf.transport(symmetry, found, source), source)


# Soft plans


def test_forward_pass_with_sinkhorn_gives_couplings_close_to_exact():
    symmetry = symmetry_of("mlp")
    target = ref.unstack(pairs("mlp", 1, seed=6)[0], 0)
    source = otf.transport(symmetry, symmetry.random(jax.random.key(0)), target)
    source = jax.tree.map(lambda x: x + 0.01, source)
    align = functools.partial(otf.align, symmetry, source, target, method=otf.ForwardPass())
    exact = align()
    sharp = align(solver=otf.Sinkhorn(epsilon=0.01, max_iterations=5000))
    blurred = align(solver=otf.Sinkhorn(epsilon=1.0))
    assert sharp.converged
    assert blurred.converged
    for name, plan in exact.plans.items():
        matrix = jnp.zeros((8, 8)).at[plan, jnp.arange(8)].set(1 / 8)
        for soft in (sharp.plans[name], blurred.plans[name]):
            assert (soft >= 0).all()
            np.testing.assert_allclose(soft.sum(0), 1 / 8, atol=1e-3 / 8)
            np.testing.assert_allclose(soft.sum(1), 1 / 8, atol=1e-3 / 8)
        np.testing.assert_allclose(sharp.plans[name], matrix, atol=1e-3)
        assert jnp.abs(blurred.plans[name] - matrix).max() > 0.02
    assert exact.objective <= sharp.objective < blurred.objective
    np.testing.assert_allclose(sharp.objective, exact.objective, rtol=0.01, atol=0.01)


# One group on two axes of one parameter


def recurrent(params, x):
    """`x + Dense(x)` twice, with the same weights: the group is on both axes of `loop`."""
    x = x @ params["embed"]
    for _ in range(2):
        x = x + jnp.tanh(x @ params["loop"])
    return x @ params["out"]


def random_recurrent(key):
    k = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(k[0], (4, 8)) / 2,
        "loop": jax.random.normal(k[1], (8, 8)) / 3,
        "out": jax.random.normal(k[2], (8, 2)) / 3,
    }


RECURRENT = otf.trace_symmetry(
    recurrent, jax.eval_shape(random_recurrent, jax.random.key(0)), jnp.ones((1, 4))
)


def test_a_group_on_two_axes_of_a_leaf_is_found():
    (group,) = RECURRENT.groups
    assert [(m.path, m.axis) for m in group.members].count(("loop", 0)) == 1
    assert [(m.path, m.axis) for m in group.members].count(("loop", 1)) == 1


def test_the_objective_never_rises_though_the_problem_is_quadratic():
    draw = jax.vmap(random_recurrent)
    keys = jax.random.split(jax.random.key(7), (2, 50))
    sources, targets = draw(keys[0]), draw(keys[1])
    for start in ("identity", "forward"):
        method = otf.CoordinateDescent(starts=(start,))
        found = jax.vmap(functools.partial(otf.align, RECURRENT, method=method))(sources, targets)
        history = np.asarray(found.history)
        assert found.converged.all()
        assert not np.any(np.diff(history, axis=1) > 0)  # NaN after the end compares as False
        assert np.any(np.diff(history, axis=1) < 0)
        moved = jax.vmap(functools.partial(otf.transport, RECURRENT))(found.plans, sources)
        square = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2, (1, 2)), moved, targets)
        np.testing.assert_allclose(found.objective, sum(square.values()), rtol=1e-5)
