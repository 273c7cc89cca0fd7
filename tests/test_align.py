"""Compares alignment with the papers' algorithms, and has it find permutations that are known."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import zoo
from arrays import array, normal, normals, ones, stack, uniform, unstack
from ott.geometry import costs
from scipy.optimize import linear_sum_assignment

import otfusion_jax as otf

DESCENT = otf.CoordinateDescent()
FROM_IDENTITY = otf.CoordinateDescent(starts=("identity",))
METHODS = pytest.mark.parametrize(
    "method", [otf.ForwardPass(), DESCENT], ids=lambda method: type(method).__name__
)
# Tests share stacks of one size, so that XLA compiles each program once.
COUNT = 24


@functools.cache
def symmetry_of(kind, bias=True):
    inputs = jax.ShapeDtypeStruct(ref.INPUTS[kind], jnp.float32)
    return otf.trace_symmetry(ref.network, ref.random_net(0, kind, bias), inputs)


@functools.cache
def pairs(kind, bias=True):
    """Two stacks of random networks."""
    nets = [ref.random_net(seed, kind, bias) for seed in range(2 * COUNT)]
    return stack(nets[:COUNT]), stack(nets[COUNT:])


def one_pair(index=0):
    sources, targets = pairs("mlp")
    return unstack(sources, index), unstack(targets, index)


@functools.cache
def aligned(kind, method):
    """The whole stack, aligned."""
    return jax.vmap(functools.partial(otf.align, symmetry_of(kind), method=method))(*pairs(kind))


@functools.cache
def jitted(method):
    """Aligns and transports an MLP inside of `jax.jit`."""

    @jax.jit
    def both(source, target):
        found = otf.align(symmetry_of("mlp"), source, target, method=method)
        return found, otf.transport(symmetry_of("mlp"), found, source)

    return both


def as_list(plans):
    return [np.asarray(plan) for _, plan in sorted(plans.items())]


# Algorithm 1 and weight matching, as rewritten in NumPy


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
        return found.plans, otf.average([otf.transport(symmetry, found, source), target])

    plans, results = jax.jit(functools.partial(jax.lax.map, fused))((sources, targets))
    for seed in range(COUNT):
        expected_plans, expected = ref.algorithm_1(
            ref.to_numpy(unstack(sources, seed)),
            ref.to_numpy(unstack(targets, seed)),
            np.asarray(x, np.float64) if mode == "activations" else None,
            squared=squared,
            unit_norm=mode == "unit_norm",
        )
        np.testing.assert_array_equal(as_list(unstack(plans, seed)), expected_plans)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
            unstack(results, seed),
            expected,
        )


def test_forward_pass_by_all_members_also_sees_what_consumes_the_units():
    source, target = one_pair()
    method = otf.ForwardPass(members="all")
    found = as_list(otf.align(symmetry_of("mlp"), source, target, method=method).plans)
    (a0, a1, a2), (b0, b1, b2) = ref.to_numpy(source), ref.to_numpy(target)

    def matched(into_a, bias_a, out_of_a, into_b, bias_b, out_of_b):
        units_a = np.concatenate([into_a, bias_a[None], out_of_a.T])
        units_b = np.concatenate([into_b, bias_b[None], out_of_b.T])
        return linear_sum_assignment(-(units_b.T @ units_a))[1]

    first = matched(a0["kernel"], a0["bias"], a1["kernel"], b0["kernel"], b0["bias"], b1["kernel"])
    second = matched(
        a1["kernel"][first], a1["bias"], a2["kernel"], b1["kernel"], b1["bias"], b2["kernel"]
    )
    np.testing.assert_array_equal(found, [first, second])
    with pytest.raises(ValueError, match="members is 'some'"):
        otf.ForwardPass(members="some")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ref.SHAPES)
def test_coordinate_descent_is_weight_matching(kind):
    sources, targets = pairs(kind)
    found = aligned(kind, FROM_IDENTITY)
    assert found.converged.all()
    for seed in range(COUNT):
        source, target = unstack(sources, seed), unstack(targets, seed)
        plans, history = ref.weight_matching(ref.to_numpy(source), ref.to_numpy(target))
        np.testing.assert_array_equal(as_list(unstack(found.plans, seed)), plans)
        np.testing.assert_allclose(found.objective[seed], history[-1], rtol=1e-4)
        np.testing.assert_allclose(found.history[seed, : len(history)], history, rtol=1e-4)
        assert (found.history[seed, len(history) :] == found.objective[seed]).all()
        assert np.all(np.diff(history) <= 0)
        assert len(history) > 2, "a case that says nothing about sweeps"


def log_cosines(found):
    """For each pair of MLPs the sum over kernels of how alike the moved one and the target are."""
    sources, targets = pairs("mlp")
    sums = []
    for seed in range(COUNT):
        plans = as_list(unstack(found.plans, seed))
        moved = ref.moved_by(ref.to_numpy(unstack(sources, seed)), plans)
        kernels = [
            [layer["kernel"].ravel() for layer in net]
            for net in (moved, ref.to_numpy(unstack(targets, seed)))
        ]
        cosines = [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*kernels, strict=True)
        ]
        sums.append(np.sum(np.log(np.maximum(cosines, 1e-6))))
    return np.array(sums)


def test_of_several_starts_the_end_with_the_most_similar_layers_is_returned():
    forward, identity, both = (
        aligned("mlp", otf.CoordinateDescent(starts=starts))
        for starts in [("forward",), ("identity",), ("forward", "identity")]
    )
    preferred = log_cosines(forward) > log_cosines(identity)
    expected = np.where(preferred, forward.objective, identity.objective)
    np.testing.assert_allclose(both.objective, expected, rtol=1e-6)
    for name, plans in both.plans.items():
        chosen = np.where(preferred[:, None], forward.plans[name], identity.plans[name])
        np.testing.assert_array_equal(plans, chosen)
    different = forward.objective != identity.objective
    assert np.any(different & preferred)
    assert np.any(different & ~preferred)
    # The nearer end in the sum over layers is not always the one.
    assert np.any(both.objective > np.minimum(forward.objective, identity.objective))


# Permutations that are known


# All hidden layers of one width: XLA compiles one solver.


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(3)(x)


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.max_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


class ResNet(nn.Module):
    """Batch norm, an identity shortcut and one with weights."""

    @nn.compact
    def __call__(self, x):
        def conv(x, size=3, stride=1):
            x = nn.Conv(16, (size, size), stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(conv(x))
        x = nn.relu(x + conv(nn.relu(conv(x))))
        x = nn.relu(conv(x, size=1, stride=2) + conv(nn.relu(conv(x, stride=2))))
        return nn.Dense(3)(x.mean((1, 2)))


@functools.cache
def planted(network):
    """A function, its symmetry and input, and 100 random networks."""
    fn, like, (x,) = zoo.linen(network, uniform(4, 4, 4, 3))
    targets = stack([zoo.randomise(like, seed) for seed in range(100)])
    return fn, otf.trace_symmetry(fn, like, x), x, targets


def blurred(rng, tree, size):
    return jax.tree.map(lambda x: array(x + size * rng.standard_normal(x.shape)), tree)


@METHODS
@pytest.mark.parametrize("network", [MLP(), VGG(), ResNet()], ids=lambda n: type(n).__name__)
def test_planted_permutations_are_recovered_100_times_of_100(network, method):
    fn, symmetry, x, targets = planted(network)

    rng = np.random.default_rng(0)
    plans = {
        group.name: array(rng.permuted(np.tile(np.arange(group.size), (100, 1)), axis=1), np.int32)
        for group in symmetry.groups
    }

    @jax.jit
    def recover(plans, targets, seen):
        def one(given):
            plans, target, seen = given
            source = otf.transport(symmetry, plans, target)
            found = otf.align(symmetry, source, seen, method=method)
            return source, found, otf.transport(symmetry, found, source)

        return jax.lax.map(one, (plans, targets, seen))

    for noise in (0, 1e-3):
        sources, found, moved = recover(plans, targets, blurred(rng, targets, noise))
        jax.tree.map(np.testing.assert_array_equal, moved, targets)
        for name, plan in plans.items():
            np.testing.assert_array_equal(found.plans[name], np.argsort(plan, axis=1))
        assert found.converged.all()
    each = jax.jit(jax.vmap(fn, in_axes=(0, None)))
    before, after = np.asarray(each(targets, x)), np.asarray(each(sources, x))
    assert abs(after - before).max() <= 1e-5 * abs(before).max((1, 2)).min()


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
    scales = {"embed": 1, "out": 1} | dict.fromkeys(inner, 10)
    sizes = {"embed": (2, 8), "out": (8, 2)}

    def draw(key):
        keys = jax.random.split(key, len(scales))
        return {
            name: scales[name] * jax.random.normal(k, sizes.get(name, (8, 8)))
            for k, name in zip(keys, scales, strict=True)
        }

    symmetry = otf.trace_symmetry(fn, draw(jax.random.key(0)), jnp.ones((3, 2)))

    @jax.jit
    @jax.vmap
    def recovered(key):
        target, plans = draw(key), symmetry.random(key)
        source = otf.transport(symmetry, plans, target)
        found = otf.align(symmetry, source, target, method=otf.ForwardPass())
        return jnp.array_equal(found.plans["embed"], jnp.argsort(plans["embed"]))

    assert recovered(jax.random.split(jax.random.key(1), 100)).sum() == 100


# Alignments say how good they are


def test_an_alignment_reports_distances_before_and_after():
    source, target = one_pair()
    symmetry = symmetry_of("mlp")
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
    method = otf.CoordinateDescent(max_sweeps=1, starts=("identity",))
    whole = aligned("mlp", FROM_IDENTITY)
    longest = int(jnp.argmax((jnp.diff(whole.history) < 0).sum(1)))
    found = otf.align(symmetry_of("mlp"), *one_pair(longest), method=method)
    assert not found.converged
    np.testing.assert_allclose(found.history, whole.history[longest, :2], rtol=1e-6)
    assert found.history[1] == found.objective
    assert found.objective > 1.001 * whole.objective[longest]


@METHODS
def test_a_model_aligned_with_itself_stays(method):
    source, _ = one_pair()
    found = otf.align(symmetry_of("mlp"), source, source, method=method)
    np.testing.assert_array_equal(as_list(found.plans), as_list(symmetry_of("mlp").identity()))
    assert found.objective == 0
    assert found.converged


def test_features_serve_descent_as_a_start():
    symmetry, (source, target) = symmetry_of("mlp"), one_pair()
    x = normal(*ref.INPUTS["mlp"], seed=9)
    grams = otf.feature_gram(symmetry, ref.network, source, target, [x])
    start = otf.align(symmetry, source, target, method=otf.ForwardPass(), grams=grams)
    method = otf.CoordinateDescent(max_sweeps=1, starts=("forward",))
    found = otf.align(symmetry, source, target, method=method, grams=grams)
    expected, _ = ref.algorithm_1(ref.to_numpy(source), ref.to_numpy(target), np.asarray(x))
    np.testing.assert_array_equal(as_list(start.plans), expected)
    np.testing.assert_allclose(found.history[0], start.objective, rtol=1e-6)
    assert found.objective < start.objective
    assert not found.converged


# Transformations of JAX


@METHODS
def test_jit_vmap_and_repetition_change_nothing(method):
    align = functools.partial(otf.align, symmetry_of("mlp"), method=method)
    for i in range(3):
        plain = align(*one_pair(i))
        mapped = unstack(aligned("mlp", method), i)
        for other in (align(*one_pair(i)), jitted(method)(*one_pair(i))[0], mapped):
            np.testing.assert_array_equal(as_list(other.plans), as_list(plain.plans))
            np.testing.assert_allclose(other.objective, plain.objective, rtol=1e-6)
            np.testing.assert_allclose(other.history, plain.history, rtol=1e-6)
            assert other.converged == plain.converged


def test_a_model_may_be_closed_over_in_jit():
    source, target = one_pair()
    align = functools.partial(otf.align, symmetry_of("mlp"), method=otf.ForwardPass())
    found = jax.jit(lambda model: align(model, target))(source)
    np.testing.assert_array_equal(as_list(found.plans), as_list(align(source, target).plans))


# What cannot be aligned


def with_nan(net):
    return [net[0], {**net[1], "kernel": net[1]["kernel"].at[0, 0].set(jnp.nan)}, *net[2:]]


@pytest.mark.parametrize("side", ["source", "target"])
def test_weights_that_are_not_finite_are_named(side):
    symmetry = symmetry_of("mlp")
    good, _ = one_pair()
    bad = with_nan(good)
    bad[2] = {**bad[2], "bias": bad[2]["bias"] + jnp.inf}
    models = (bad, good) if side == "source" else (good, bad)
    with pytest.raises(ValueError, match=rf"(?s)the {side}.*1/kernel: 1 of.*") as error:
        otf.align(symmetry, *models)
    assert "2/bias: 3 of 3 values not finite" in str(error.value)
    assert "0/kernel" not in str(error.value)


@METHODS
@pytest.mark.parametrize("side", ["source", "target"])
def test_under_jit_they_give_a_model_of_nan(method, side):
    good, _ = one_pair()
    models = (with_nan(good), good) if side == "source" else (good, with_nan(good))
    found, moved = jitted(method)(*models)
    assert not found.converged
    # The groups next to the bad kernel have no solution; it carries both.
    assert jnp.isnan(moved[1]["kernel"]).all()
    assert jnp.isnan(ref.network(moved, jnp.ones((1, 5)))).all()


def test_models_of_another_architecture_are_refused():
    net, _ = one_pair()
    wider = [{**net[0], "kernel": jnp.zeros((5, 9)), "bias": jnp.zeros(9)}, *net[1:]]
    with pytest.raises(ValueError, match=r"(?s)source.*0/bias: shape \(9,\), expected \(8,\).*0/k"):
        otf.align(symmetry_of("mlp"), wider, net)
    with pytest.raises(ValueError, match=r"(?s)target.*2/bias: missing.*2/kernel: missing"):
        otf.align(symmetry_of("mlp"), net, net[:2])


def test_features_have_to_fit():
    symmetry = symmetry_of("mlp")
    net, _ = one_pair()
    square = otf.Gram(jnp.ones(8), jnp.ones(8), jnp.ones((8, 8)))
    small = otf.Gram(jnp.ones(7), jnp.ones(7), jnp.ones((7, 7)))
    with pytest.raises(ValueError, match="1/kernel: missing"):
        otf.align(symmetry, net, net, grams={"0/kernel": square})
    with pytest.raises(ValueError, match=r"1/kernel: shape \(7, 7\), expected \(8, 8\)"):
        otf.align(symmetry, net, net, grams={"0/kernel": square, "1/kernel": small})


def test_descent_needs_permutations():
    net, _ = one_pair()
    with pytest.raises(ValueError, match=r"Sinkhorn returns soft plans; use Exact\(\), or Forw"):
        otf.align(symmetry_of("mlp"), net, net, solver=otf.Sinkhorn())


@pytest.mark.parametrize("starts", [(), ("identity", "random")])
def test_unknown_starts_are_refused(starts):
    with pytest.raises(
        ValueError, match=re.escape(f"starts is {starts}; it must be a tuple of 'identity'")
    ):
        otf.CoordinateDescent(starts=starts)


def test_a_network_without_groups_has_nothing_to_align():
    def linear(params, x):
        return x @ params

    source, target = jnp.ones((4, 3)), jnp.zeros((4, 3))
    symmetry = otf.trace_symmetry(linear, source, jnp.ones((1, 4)))
    assert not symmetry.groups
    for method in (DESCENT, otf.ForwardPass()):
        with pytest.warns(otf.SymmetryWarning, match="no groups.*the alignment is empty"):
            found = otf.align(symmetry, source, target, method=method)
        assert found.plans == {}
        assert found.converged
        np.testing.assert_allclose(found.history, [12])
        np.testing.assert_array_equal(otf.transport(symmetry, found, source), source)


# Soft plans


def test_forward_pass_with_sinkhorn_gives_couplings_close_to_exact():
    symmetry = symmetry_of("mlp")
    target, _ = one_pair()
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
    np.testing.assert_allclose(sharp.objective, exact.objective, rtol=1e-2)
    assert blurred.objective > 10 * exact.objective


# One group on two axes of one parameter


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
    permuted = jax.vmap(functools.partial(otf.transport, symmetry))(plans, targets)
    method = otf.CoordinateDescent(starts=(start,))
    align = jax.vmap(functools.partial(otf.align, symmetry, method=method))
    for sources in (unrelated, permuted):
        found = align(sources, targets)
        steps = np.diff(np.asarray(found.history), axis=1)  # 0 after the end
        assert found.converged.all()
        assert not np.any(steps > 0)
        assert np.any(steps < 0) or found.objective.max() == 0
        moved = jax.vmap(functools.partial(otf.transport, symmetry))(found.plans, sources)
        square = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2, (1, 2)), moved, targets)
        np.testing.assert_allclose(found.objective, sum(square.values()), rtol=1e-5)
    if start == "forward":
        np.testing.assert_array_equal(found.plans["embed"], jnp.argsort(plans["embed"], axis=1))


# Leaves that count more or less


def test_leaves_that_do_not_count_do_not_mislead():
    source, _ = one_pair()
    symmetry = symmetry_of("mlp")
    plans = symmetry.random(jax.random.key(3))
    target = otf.transport(symmetry, plans, source)
    # What no permutation explains, and far larger than all the rest.
    target = [
        {**layer, "bias": 100 * jnp.arange(len(layer["bias"]), 0.0, -1.0)} for layer in target
    ]

    def without_biases(path):
        return not path.endswith("bias")

    misled = otf.align(symmetry, source, target).plans
    found = otf.align(symmetry, source, target, leaf_weight=without_biases).plans
    for name, plan in plans.items():
        np.testing.assert_array_equal(found[name], plan)
    assert any((misled[name] != plan).any() for name, plan in plans.items())

    fused = otf.fuse(symmetry, [source, target], leaf_weight=without_biases)
    moved = otf.transport(symmetry, plans, source)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5),
        fused,
        otf.average([moved, target]),
    )


def test_a_weight_multiplies_the_squared_distance():
    source, target = one_pair()
    symmetry = symmetry_of("mlp")
    identity = otf.align(symmetry, source, target, leaf_weight=lambda _: 1).history[0]
    doubled = otf.align(symmetry, source, target, leaf_weight=lambda _: 2).history[0]
    np.testing.assert_allclose(doubled, 2 * identity, rtol=1e-5)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_leaf_weights_are_named(value):
    source, target = one_pair()
    weight = {"1/bias": value}
    with pytest.raises(ValueError, match=r"negative or not finite:\n  1/bias: "):
        otf.align(
            symmetry_of("mlp"), source, target, leaf_weight=lambda path: weight.get(path, 1.0)
        )


# Weights whose squares are out of range


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"method": otf.ForwardPass(), "metric": costs.Euclidean()},
        {"method": otf.ForwardPass(unit_norm=True)},
        {"method": otf.ForwardPass(), "solver": otf.Sinkhorn()},
    ],
    ids=["descent", "euclidean", "unit norm", "sinkhorn"],
)
def test_plans_do_not_depend_on_the_size_of_the_weights(how, size):
    symmetry, models = symmetry_of("mlp"), one_pair()
    sized = [jax.tree.map(lambda x: size * x, model) for model in models]
    expected = otf.align(symmetry, *models, **how)
    found = otf.align(symmetry, *sized, **how)
    for name, plan in expected.plans.items():
        np.testing.assert_allclose(found.plans[name], plan, atol=1e-5)
    assert found.converged == expected.converged
    with np.errstate(over="ignore", under="ignore"):
        objective = np.float32(size) * np.float32(size) * np.float32(expected.objective)
    np.testing.assert_allclose(found.objective, objective, rtol=1e-4, atol=1e-37)
    if size == 1e12:  # where none of its powers is out of range
        by_metric = 1 if "metric" in how else 2
        degree = 0 if how.get("method") == otf.ForwardPass(unit_norm=True) else by_metric
        rounding = 1e-5 * float(expected.objective)
        for name, gap in expected.gaps.items():
            scaled = float(found.gaps[name]) / size**degree
            assert scaled == pytest.approx(float(gap), rel=1e-2, abs=rounding)


def test_what_a_solver_with_units_of_its_own_cannot_solve_is_told():
    symmetry, models = symmetry_of("mlp"), one_pair()
    large = [jax.tree.map(lambda x: 1e25 * x, model) for model in models]
    how = {"method": otf.ForwardPass(), "solver": otf.Sinkhorn(relative=False)}
    with pytest.raises(FloatingPointError, match="(?s)ground costs of these groups.*0/kernel"):
        otf.align(symmetry, *large, **how)
    assert not jax.jit(functools.partial(otf.align, symmetry, **how))(*large).converged


def test_features_that_are_not_finite_are_refused():
    symmetry, models = symmetry_of("mlp"), one_pair()
    x = 1e25 * normal(*ref.INPUTS["mlp"], seed=0)
    grams = otf.feature_gram(symmetry, ref.network, *models, [x])
    with pytest.raises(ValueError, match="not finite, activations or their squares overflow"):
        otf.align(symmetry, *models, grams=grams)


# Trees of one array


def test_a_single_array_is_a_tree():
    def fn(w, x):
        return jnp.tanh(x @ w).sum(1)

    a, x = normal(6, 8), normal(4, 6, seed=1)
    symmetry = otf.trace_symmetry(fn, a, x)
    assert [(g.name, g.size) for g in symmetry.groups] == [("params", 8)]
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(2)), a)
    np.testing.assert_allclose(otf.transport(symmetry, otf.align(symmetry, moved, a), moved), a)
    np.testing.assert_allclose(otf.fuse(symmetry, [moved, a]), a, rtol=1e-6)
    with pytest.raises(ValueError, match="params: 1 of 48 values not finite"):
        otf.align(symmetry, a.at[0, 0].set(jnp.nan), a)
