"""Checks what holds for every method: planted permutations, evidence, transformations, refusals."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import zoo
from arrays import array, normal, stack, uniform, unstack
from numpy.testing import assert_allclose, assert_array_equal
from ott.geometry import costs
from pairs import DESCENT, FORWARD, aligned, as_list, one_pair, symmetry_of

import otfusion_jax as otf

any_otf: Any = otf  # for calls that a type checker would refuse
METHODS = pytest.mark.parametrize(
    "method", [FORWARD, DESCENT], ids=lambda method: type(method).__name__
)


# --- permutations that are known


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


def random_plans(rng, symmetry):
    """A hundred permutations of each group."""
    plans = {}
    for group in symmetry.groups:
        identities = np.tile(np.arange(group.size), (100, 1))
        plans[group.name] = array(rng.permuted(identities, axis=1), np.int32)
    return plans


def blurred(rng, tree, size):
    return jax.tree.map(lambda x: array(x + size * rng.standard_normal(x.shape)), tree)


@METHODS
@pytest.mark.parametrize("network", [MLP(), VGG(), ResNet()], ids=lambda n: type(n).__name__)
def test_planted_permutations_are_recovered_100_times_of_100(network, method):
    fn, symmetry, x, targets = planted(network)
    rng = np.random.default_rng(0)
    plans = random_plans(rng, symmetry)

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
        jax.tree.map(assert_array_equal, moved, targets)
        for name, plan in plans.items():
            assert_array_equal(found.plans[name], np.argsort(plan, axis=1))
        assert found.converged.all()
    each = jax.jit(jax.vmap(fn, in_axes=(0, None)))
    before = np.asarray(each(targets, x))
    after = np.asarray(each(sources, x))
    assert abs(after - before).max() <= 1e-5 * abs(before).max((1, 2)).min()


# --- alignments say how good they are


def test_an_alignment_reports_distances_before_and_after():
    source, target = one_pair()
    symmetry = symmetry_of("mlp")
    found = otf.align(symmetry, source, target, method=FORWARD)
    moved = otf.transport(symmetry, found, source)
    before = ref.squared_distance(ref.to_numpy(source), ref.to_numpy(target))
    after = ref.squared_distance(ref.to_numpy(moved), ref.to_numpy(target))
    assert_allclose(found.history, [before, after], rtol=1e-5)
    assert_allclose(found.objective, after, rtol=1e-5)
    assert found.converged
    assert found.gaps.keys() == found.plans.keys() == {g.name for g in symmetry.groups}
    assert all(0 <= gap < 1e-4 for gap in found.gaps.values())


@METHODS
def test_a_model_aligned_with_itself_stays(method):
    source, _ = one_pair()
    found = otf.align(symmetry_of("mlp"), source, source, method=method)
    assert_array_equal(as_list(found.plans), as_list(symmetry_of("mlp").identity()))
    assert found.objective == 0
    assert found.converged


# --- transformations of JAX


@functools.cache
def jitted(method):
    """Aligns and transports an MLP inside of `jax.jit`."""

    @jax.jit
    def both(source, target):
        found = otf.align(symmetry_of("mlp"), source, target, method=method)
        return found, otf.transport(symmetry_of("mlp"), found, source)

    return both


@METHODS
def test_jit_vmap_and_repetition_change_nothing(method):
    align = functools.partial(otf.align, symmetry_of("mlp"), method=method)
    for i in range(3):
        pair = one_pair(i)
        plain = align(*pair)
        mapped = unstack(aligned("mlp", method), i)
        for other in (align(*pair), jitted(method)(*pair)[0], mapped):
            assert_array_equal(as_list(other.plans), as_list(plain.plans))
            assert_allclose(other.objective, plain.objective, rtol=1e-6)
            assert_allclose(other.history, plain.history, rtol=1e-6)
            assert other.converged == plain.converged


def test_a_model_may_be_closed_over_in_jit():
    source, target = one_pair()
    align = functools.partial(otf.align, symmetry_of("mlp"), method=FORWARD)
    found = jax.jit(lambda model: align(model, target))(source)
    assert_array_equal(as_list(found.plans), as_list(align(source, target).plans))


# --- what cannot be aligned


def with_nan(net):
    broken = {**net[1], "kernel": net[1]["kernel"].at[0, 0].set(jnp.nan)}
    return [net[0], broken, *net[2:]]


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


MISTAKES = {
    "method class": ({"method": otf.ForwardPass}, r"method is the class ForwardPass; pass Coord"),
    "method name": ({"method": "descent"}, r"method is 'descent'; pass CoordinateDescent\(\) or"),
    "solver class": ({"solver": otf.Exact}, r"solver is the class Exact; pass Exact\(\), Sink"),
    "solver name": (
        {"solver": "exact"},
        r"solver is 'exact'; pass Exact\(\), Sinkhorn\(\), LowRank\(\) or G",
    ),
    "metric class": ({"metric": costs.Cosine}, "metric is the class Cosine; pass an ott cost func"),
    "metric name": ({"metric": "cosine"}, r"metric is 'cosine'; .*costs.SqEuclidean\(\), or None"),
    "leaf weight": ({"leaf_weight": 2.0}, "a float was given where a function is wanted"),
    "grams": ({"grams": [1]}, r"grams are inner products .* as feature_gram\(.*: got list"),
    "marginals": ({"marginals": {}}, "marginals are a pair of dicts"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_arguments_of_other_types_are_told_what_to_pass(name):
    arguments, message = MISTAKES[name]
    with pytest.raises(TypeError, match=message):
        any_otf.align(symmetry_of("mlp"), *one_pair(), **arguments)


def test_grams_have_to_fit():
    symmetry = symmetry_of("mlp")
    net, _ = one_pair()
    square = otf.Gram(jnp.ones(8), jnp.ones(8), jnp.ones((8, 8)))
    small = otf.Gram(jnp.ones(7), jnp.ones(7), jnp.ones((7, 7)))
    with pytest.raises(ValueError, match=r"1/kernel: shape \(7, 7\), expected \(8, 8\)"):
        otf.align(symmetry, net, net, grams={"0/kernel": square, "1/kernel": small})


def test_groups_without_grams_are_matched_by_weights():
    symmetry = symmetry_of("mlp")
    source, target = one_pair()
    chosen = np.random.default_rng(0).permutation(8)
    # The unit of the target at j has the activations of the source's unit `chosen[j]`.
    activations = np.eye(8)
    cross = jnp.asarray(activations[:, chosen])
    grams = {"0/kernel": otf.Gram(jnp.ones(8), jnp.ones(8), cross)}
    found = otf.align(symmetry, source, target, method=otf.ForwardPass(), grams=grams)
    assert_array_equal(found.plans["0/kernel"], chosen)
    moved = otf.transport(symmetry, {"0/kernel": jnp.asarray(chosen)}, source)
    rest = symmetry.only(lambda name: name != "0/kernel")
    by_weights = otf.align(rest, moved, target, method=otf.ForwardPass())
    assert_array_equal(found.plans["1/kernel"], by_weights.plans["1/kernel"])


def test_grams_of_unknown_groups_are_refused():
    symmetry = symmetry_of("mlp")
    net, _ = one_pair()
    square = otf.Gram(jnp.ones(8), jnp.ones(8), jnp.ones((8, 8)))
    grams = {"0/kernel": square, "1/kernel": square, "2/kernel": square}
    with pytest.raises(ValueError, match=r"2/kernel: no such group$"):
        otf.align(symmetry, net, net, grams=grams)


def test_grams_that_are_not_finite_are_refused():
    symmetry, models = symmetry_of("mlp"), one_pair()
    x = 1e25 * normal(*ref.INPUTS["mlp"], seed=0)
    grams = otf.feature_gram(symmetry, ref.network, *models, [x])
    with pytest.raises(ValueError, match="not finite, activations or their squares overflow"):
        otf.align(symmetry, *models, grams=grams)


def test_a_network_without_groups_has_nothing_to_align():
    def linear(params, x):
        return x @ params

    source, target = jnp.ones((4, 3)), jnp.zeros((4, 3))
    symmetry = otf.trace_symmetry(linear, source, jnp.ones((1, 4)))
    assert not symmetry.groups
    for method in (DESCENT, FORWARD):
        with pytest.warns(otf.SymmetryWarning, match="no groups.*the alignment is empty"):
            found = otf.align(symmetry, source, target, method=method)
        assert found.plans == {}
        assert found.converged
        assert_allclose(found.history, [12])
        assert_array_equal(otf.transport(symmetry, found, source), source)


# --- leaves that count more or less


def without_biases(path):
    return not path.endswith("bias")


def test_leaves_that_do_not_count_do_not_mislead():
    source, _ = one_pair()
    symmetry = symmetry_of("mlp")
    plans = symmetry.random(jax.random.key(3))
    target = otf.transport(symmetry, plans, source)
    # What no permutation explains, and far larger than all the rest.
    for layer in target:
        layer["bias"] = 100 * jnp.arange(len(layer["bias"]), 0.0, -1.0)
    misled = otf.align(symmetry, source, target).plans
    found = otf.align(symmetry, source, target, leaf_weight=without_biases).plans
    for name, plan in plans.items():
        assert_array_equal(found[name], plan)
    assert any((misled[name] != plan).any() for name, plan in plans.items())

    fused = otf.fuse(symmetry, [source, target], leaf_weight=without_biases)
    moved = otf.transport(symmetry, plans, source)
    close = functools.partial(assert_allclose, atol=1e-5)
    jax.tree.map(close, fused, otf.average([moved, target]))


def test_a_weight_multiplies_the_squared_distance():
    source, target = one_pair()
    symmetry = symmetry_of("mlp")
    single = otf.align(symmetry, source, target, leaf_weight=lambda _: 1).history[0]
    doubled = otf.align(symmetry, source, target, leaf_weight=lambda _: 2).history[0]
    assert_allclose(doubled, 2 * single, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *[(value, "negative or not finite") for value in (-1.0, float("nan"), float("inf"))],
        *[(value, "out of range .*") for value in (1e-80, 1e80)],
    ],
)
def test_impossible_leaf_weights_are_named(value, reason):
    source, target = one_pair()

    def weight(path):
        return value if path == "1/bias" else 1.0

    with pytest.raises(ValueError, match=rf"{reason}:\n  1/bias: "):
        otf.align(symmetry_of("mlp"), source, target, leaf_weight=weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("weight", [3.0, 1e-16, 1e10])
def test_a_weight_of_all_leaves_changes_no_plan_in_half_precision(dtype, weight):
    source, target = jax.tree.map(lambda x: x.astype(dtype), one_pair())
    symmetry = otf.trace_symmetry(ref.network, source, normal(2, 5).astype(dtype))
    alone = otf.align(symmetry, source, target)
    found = otf.align(symmetry, source, target, leaf_weight=lambda _: weight)
    jax.tree.map(assert_array_equal, found.plans, alone.plans)
    assert_allclose(found.objective, weight * alone.objective, rtol=1e-5)


def test_improvements_are_told_from_rounding_by_the_precision():
    with jax.enable_x64(True):
        source = jax.tree.map(lambda x: np.asarray(x, np.float64) + 1000, one_pair()[0])
        symmetry = otf.trace_symmetry(ref.network, source, np.ones((2, 5)))
        plans = symmetry.random(jax.random.key(3))
        target = otf.transport(symmetry, plans, source)
        method = otf.CoordinateDescent(starts=("identity",))
        found = otf.align(symmetry, source, target, method=method)
        assert found.history[-1] < 1e-6 * found.history[0]


# --- precision, and weights whose squares are out of range


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_float64_on_either_side_is_kept(side):
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: array(x, np.float64), model) for model in one_pair()]
        narrow = [jax.tree.map(lambda x: array(x, np.float32), model) for model in one_pair()]
        source = narrow[0] if side == "target" else wide[0]
        target = narrow[1] if side == "source" else wide[1]
        found = otf.align(symmetry_of("mlp"), source, target, method=FORWARD)
        assert found.objective.dtype == jnp.float64
        assert {gap.dtype for gap in found.gaps.values()} == {jnp.dtype(jnp.float64)}


SETTINGS: dict[str, dict[str, Any]] = {
    "descent": {},
    "euclidean": {"method": FORWARD, "metric": costs.Euclidean()},
    "unit norm": {"method": otf.ForwardPass(unit_norm=True)},
    "sinkhorn": {"method": FORWARD, "solver": otf.Sinkhorn()},
}
# The power of the weights' unit that gaps are in.
DEGREES = {"descent": 2, "euclidean": 1, "unit norm": 0, "sinkhorn": 2}


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize("setting", SETTINGS)
def test_plans_do_not_depend_on_the_size_of_the_weights(setting, size):
    symmetry, models = symmetry_of("mlp"), one_pair()
    sized = [jax.tree.map(lambda x: size * x, model) for model in models]
    expected = otf.align(symmetry, *models, **SETTINGS[setting])
    found = otf.align(symmetry, *sized, **SETTINGS[setting])
    for name, plan in expected.plans.items():
        assert_allclose(found.plans[name], plan, atol=1e-5)
    assert found.converged == expected.converged
    with np.errstate(over="ignore", under="ignore"):
        objective = np.float32(size) * np.float32(size) * np.float32(expected.objective)
    assert_allclose(found.objective, objective, rtol=1e-4, atol=1e-37)
    if size == 1e12:  # where none of its powers is out of range
        rounding = 1e-5 * float(expected.objective)
        for name, gap in expected.gaps.items():
            scaled = float(found.gaps[name]) / size ** DEGREES[setting]
            assert scaled == pytest.approx(float(gap), rel=1e-2, abs=rounding)


def test_what_a_solver_with_units_of_its_own_cannot_solve_is_told():
    symmetry, models = symmetry_of("mlp"), one_pair()
    large = [jax.tree.map(lambda x: 1e25 * x, model) for model in models]
    solver = otf.Sinkhorn(relative=False)
    align = functools.partial(otf.align, symmetry, method=FORWARD, solver=solver)
    with pytest.raises(FloatingPointError, match="(?s)ground costs of these groups.*0/kernel"):
        align(*large)
    assert not jax.jit(align)(*large).converged


# --- trees of one array


def test_a_single_array_is_a_tree():
    def fn(w, x):
        return jnp.tanh(x @ w).sum(1)

    a, x = normal(6, 8), normal(4, 6, seed=1)
    symmetry = otf.trace_symmetry(fn, a, x)
    assert [(g.name, g.size) for g in symmetry.groups] == [("params", 8)]
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(2)), a)
    assert_allclose(otf.transport(symmetry, otf.align(symmetry, moved, a), moved), a)
    assert_allclose(otf.fuse(symmetry, [moved, a]), a, rtol=1e-6)
    with pytest.raises(ValueError, match="params: 1 of 48 values not finite"):
        otf.align(symmetry, a.at[0, 0].set(jnp.nan), a)
