"""Checks fusing many models: planted permutations, consistency, and that order does not matter."""

import functools
import inspect
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import zoo_attention  # noqa: F401, adds its networks to `CASES`
from arrays import array, normals
from ott.geometry import costs
from zoo import CASES

import otfusion_jax as otf

COUNT = 4
"""Of models: the same in most tests, so that XLA compiles a program for it once."""


def mlp():
    net = ref.random_net(0, "mlp")
    return otf.trace_symmetry(ref.network, net, jnp.ones(ref.INPUTS["mlp"]))


def heads():
    case = CASES["attention"]()
    return otf.trace_symmetry(case.fn, case.params, *case.inputs), case.params


def close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def at(k, tree):
    return jax.tree.map(lambda x: x[k], tree)


# Chains of permutations


def test_chains_move_as_one_after_the_other_and_back():
    symmetry, params = heads()
    first, then = (symmetry.random(jax.random.key(seed)) for seed in (1, 2))
    step = otf.transport(symmetry, then, otf.transport(symmetry, first, params))
    close(otf.transport(symmetry, otf.compose(symmetry, first, then), params), step, 0)
    back = otf.invert(symmetry, first)
    close(otf.transport(symmetry, back, otf.transport(symmetry, first, params)), params, 0)
    still = otf.compose(symmetry, first, back)
    jax.tree.map(np.testing.assert_array_equal, still, symmetry.identity())


def test_groups_that_are_left_out_of_a_chain_stay():
    symmetry, params = heads()
    plans = symmetry.random(jax.random.key(3))
    name = symmetry.groups[1].name
    chained = otf.compose(symmetry, {name: plans[name]}, {})
    expected = symmetry.identity() | {name: plans[name]}
    jax.tree.map(np.testing.assert_array_equal, chained, expected)


def test_soft_plans_are_not_chained():
    symmetry, _ = heads()
    group = symmetry.groups[0]
    soft = {group.name: jnp.eye(group.size) / group.size}
    with pytest.raises(ValueError, match="only permutations can be chained"):
        otf.invert(symmetry, soft)


# Barycenters


def test_permuted_copies_have_themselves_as_their_mean():
    symmetry, params = heads()
    copies = [
        otf.transport(symmetry, symmetry.random(jax.random.key(seed)), params) for seed in range(4)
    ]
    found = otf.barycenter(symmetry, copies)
    assert bool(found.converged)
    for k, copy in enumerate(copies):
        close(otf.transport(symmetry, at(k, found.plans), copy), found.params)


def test_the_mean_is_that_of_the_moved_models_and_the_history_their_spread():
    symmetry = mlp()
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    weights = [0.4, 0.3, 0.2, 0.1]
    found = otf.barycenter(symmetry, models, weights)
    moved = [otf.transport(symmetry, at(k, found.plans), m) for k, m in enumerate(models)]
    close(otf.average(moved, weights), found.params)
    rounds = np.asarray(found.history)
    assert np.all(np.diff(rounds) <= 1e-6 * rounds[0])
    apart = [
        sum(
            np.sum((np.asarray(x) - y) ** 2)
            for x, y in zip(*map(jax.tree.leaves, pair), strict=True)
        )
        for pair in ((m, found.params) for m in moved)
    ]
    np.testing.assert_allclose(rounds[-1], np.dot(weights, apart), rtol=1e-4)


@pytest.mark.parametrize("wide", [(), ("bias",), ("bias", "kernel")], ids=str)
def test_the_history_has_the_precision_of_the_models(wide):
    """It is float64 where any leaf is, and has as many digits as the mean of all leaves."""
    # Comparing units by leaves of several precisions promotes dtypes.
    promotion = "standard" if len(wide) == 1 else "strict"
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        models = []
        for seed in range(COUNT):
            layers = ref.random_net(seed, "mlp")
            models.append([in_precision(layer, wide) for layer in layers])
        x = jnp.ones(ref.INPUTS["mlp"], jnp.float32)
        symmetry = otf.trace_symmetry(mixed_mlp, models[0], x)
        found = otf.barycenter(symmetry, models)
        assert found.history.dtype == (jnp.float64 if wide else jnp.float32)
        expected = 0.0
        for k, model in enumerate(models):
            moved = otf.transport(symmetry, at(k, found.plans), model)
            for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(found.params), strict=True):
                expected += np.sum((np.asarray(x, np.float64) - np.asarray(y)) ** 2) / COUNT
        tolerance = 1e-12 if len(wide) == 2 else 1e-5
        np.testing.assert_allclose(found.history[-1], expected, rtol=tolerance)


def in_precision(layer, wide):
    """Returns a layer whose leaves of the names given are float64, and the others float32."""
    return {
        name: jnp.asarray(np.asarray(leaf), jnp.float64 if name in wide else jnp.float32)
        for name, leaf in layer.items()
    }


def mixed_mlp(net, x):
    """Computes in float32 with parameters of any precision."""
    return ref.network(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), net), x)


def test_it_ends_no_further_apart_than_fusing_onto_the_first_of_all():
    symmetry = mlp()
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    found = otf.barycenter(symmetry, models)
    assert found.history[-1] < found.history[0]


def test_the_order_of_the_models_does_not_matter():
    symmetry = mlp()
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    weights = [0.4, 0.3, 0.2, 0.1]
    expected = otf.barycenter(symmetry, models, weights)
    for order in itertools.islice(itertools.permutations(range(4)), 5, None, 9):
        found = otf.barycenter(symmetry, [models[k] for k in order], [weights[k] for k in order])
        close(found.params, expected.params)
        for place, k in enumerate(order):
            jax.tree.map(
                np.testing.assert_array_equal, at(place, found.plans), at(k, expected.plans)
            )


def test_the_same_under_jit_and_for_a_stack():
    symmetry = mlp()
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    expected = otf.barycenter(symmetry, models).params
    stacked = otf.stack(models)
    close(jax.jit(lambda s: otf.barycenter(symmetry, s).params)(stacked), expected)


def test_it_can_be_stepped_through_without_jit():
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    weights = (0.1, 0.2, 0.3, 0.4)
    expected = otf.barycenter(mlp(), models, weights)
    with jax.disable_jit():
        close(otf.barycenter(mlp(), models, weights), expected)


@pytest.mark.parametrize("only", range(3))
def test_all_weight_on_one_model_is_that_model(only: int):
    symmetry, nets = mlp(), [ref.random_net(seed, "mlp") for seed in range(3)]
    weights = [float(number == only) for number in range(3)]
    find = functools.partial(otf.barycenter, symmetry, weights=weights)
    for found in (find(nets), jax.jit(find)(nets)):
        moved = otf.transport(symmetry, at(only, found.plans), nets[only])
        close(found.params, moved, 1e-6)
        assert found.history[-1] < 1e-5


def test_what_makes_no_barycenter_is_refused():
    symmetry, params = heads()
    with pytest.raises(ValueError, match="at least two"):
        otf.barycenter(symmetry, [params])
    with pytest.raises(ValueError, match="max_rounds is 0"):
        otf.barycenter(symmetry, [params, params], max_rounds=0)


# Without the tests' checks of annotations, which would refuse other types before the library does.
barycenter: Any = inspect.unwrap(otf.barycenter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rounds": True}, "max_rounds is True, of type bool; give 1 or more"),
        ({"max_rounds": "3"}, "max_rounds is '3', of type str; give 1 or more"),
        ({"method": otf.ForwardPass}, "method is the class ForwardPass; pass CoordinateDescent()"),
        ({"method": "descent"}, "method is 'descent'; pass CoordinateDescent()"),
        ({"metric": costs.Cosine}, "metric is the class Cosine; pass an ott cost function"),
        ({"metric": "cosine"}, "metric is 'cosine'; pass an ott cost function"),
        ({"weights": "half"}, "weights is 'half', of type str; give one number for each model"),
        ({"weights": ["a", "b"]}, "weight 0 is 'a', of type str; give one number for each"),
        ({"weights": lambda path: (0.5, 0.5)}, "of type function; give one number for each model"),
        ({"leaf_weight": {"w": 1.0}}, "a dict was given where a function is wanted"),
    ],
    ids=lambda given: "" if isinstance(given, str) else next(iter(given)),
)
def test_arguments_of_other_types_are_named(options, message):
    symmetry, params = heads()
    with pytest.raises(TypeError, match=re.escape(message)):
        barycenter(symmetry, [params, params], **options)


def test_a_whole_number_of_numpy_is_a_number_of_rounds():
    symmetry = mlp()
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    assert len(barycenter(symmetry, models, max_rounds=np.int64(2)).history) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net[:-1], r"2/bias: missing"),
        (lambda net: [net[0] | {"bias": jnp.ones(9)}, *net[1:]], r"0/bias: shape \(9,\)"),
        (lambda net: [net[0] | {"bias": jnp.ones(8, int)}, *net[1:]], r"0/bias: dtype int32"),
        (lambda net: [net[0] | {"bias": net[0]["bias"] * jnp.nan}, *net[1:]], r"0/bias: 8 of 8"),
    ],
    ids=["tree", "shape", "dtype", "not finite"],
)
def test_a_model_that_does_not_fit_is_named_by_key_path(change, message):
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    models[1] = change(models[1])
    with pytest.raises(ValueError, match=f"(?s)model 1 .*{message}"):
        otf.barycenter(mlp(), models)


def test_leaves_that_do_not_move_are_those_of_the_last_model():
    def fn(p, x):
        return jnp.tanh(x @ p["in"]) @ p["out"]

    def model(seed):
        weights = normals({"in": (3, 5), "out": (5, 2)}, seed)
        return weights | {"steps": array(seed, np.int32), "key": jax.random.key(seed)}

    models = [model(seed) for seed in range(3)]
    found = otf.barycenter(otf.trace_symmetry(fn, models[0], jnp.ones((1, 3))), models).params
    assert found["steps"] == 2
    assert jnp.array_equal(found["key"], jax.random.key(2))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_models_whose_squares_are_out_of_range_have_a_mean(size):
    symmetry = mlp()
    models = [ref.random_net(seed, "mlp") for seed in range(COUNT)]
    large = [jax.tree.map(lambda x: size * x, model) for model in models]
    expected, found = otf.barycenter(symmetry, models), otf.barycenter(symmetry, large)
    for name, plan in expected.plans.items():
        np.testing.assert_array_equal(found.plans[name], plan)
    jax.tree.map(lambda x, y: close(x / size, y), found.params, expected.params)
    assert found.converged
