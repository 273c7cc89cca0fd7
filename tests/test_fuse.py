"""Checks averages by hand, and fusion against its parts and against planted permutations."""

import functools
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import array, normal, normals, unstack
from ott.geometry import costs

import otfusion_jax as otf

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


@functools.cache
def symmetry_of():
    net = ref.random_net(0, "mlp")
    return otf.trace_symmetry(ref.network, net, jnp.ones(ref.INPUTS["mlp"]))


def random_nets(count):
    return [ref.random_net(seed, "mlp") for seed in range(count)]


def permuted_copies(net, count):
    symmetry = symmetry_of()
    plans = [symmetry.random(jax.random.key(10 + seed)) for seed in range(count)]
    return [otf.transport(symmetry, plan, net) for plan in plans]


def assert_trees_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(close, a, b)


# Averages


def test_averages_are_weighted_sums():
    models = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}, {"w": jnp.zeros(2)}]
    close(otf.average(models)["w"], [4 / 3, 0])
    close(otf.average(models, [0.5, 0.25, 0.25])["w"], [1.25, 0.5])
    close(otf.average(models[:1])["w"], [1, 2])


def test_averages_keep_dtypes_and_take_other_leaves_from_the_last():
    models = [
        {
            "half": jnp.full(3, value, jnp.bfloat16),
            "complex": jnp.full(2, value * 1j, jnp.complex64),
            "steps": jnp.array([2**30 + i]),
            "mask": jnp.array([bool(i)]),
            "key": jax.random.key(i),
        }
        for i, value in enumerate([1.0, 1.0, 4.0])
    ]
    mean = otf.average(models)
    assert {k: v.dtype for k, v in mean.items()} == {k: v.dtype for k, v in models[0].items()}
    np.testing.assert_array_equal(mean["half"], jnp.full(3, 2, jnp.bfloat16))
    np.testing.assert_allclose(mean["complex"], 2j * np.ones(2), rtol=1e-6)
    assert mean["steps"] == 2**30 + 2
    assert mean["mask"] == True  # noqa: E712 (an array)
    assert jnp.array_equal(mean["key"], jax.random.key(2))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_averages_in_half_precision_are_rounded_once(dtype):
    models = [{"w": normal(500, seed=s).astype(dtype)} for s in range(3)]
    weights = [0.5, 0.3, 0.2]
    wide = jnp.stack([model["w"].astype(jnp.float32) for model in models])
    exact = jnp.tensordot(jnp.array(weights), wide, axes=1, precision="highest")
    np.testing.assert_array_equal(otf.average(models, weights)["w"], exact.astype(dtype))


def quantised(*values):
    return [
        {"q": jnp.array(v, jnp.int8), "on": jnp.array([True, v[0] > 0]), "s": jnp.ones(2)}
        for v in values
    ]


def keep(index):
    return lambda path: [float(i == index) for i in range(2)] if path in ("q", "on") else None


def test_integers_that_differ_are_refused_by_name():
    different, same = quantised([1, 2], [-1, 2]), quantised([1, 2], [1, 2])
    for call in (otf.average, lambda models: otf.interpolate(models[0], models[1], 0.5)):
        with pytest.raises(ValueError, match=r"(?s)on: bool.*model 0 as in model 1.*q: int8"):
            call(different)
        np.testing.assert_array_equal(call(same)["q"], [1, 2])
    with pytest.raises(ValueError, match="q: int8"):
        otf.barrier(lambda p: p["s"].sum(), different[0], different[1])
    np.testing.assert_array_equal(otf.stack(different)["q"], [[1, 2], [-1, 2]])
    # Inside of jit nobody can look: the last model's, as documented.
    np.testing.assert_array_equal(jax.jit(otf.average)(different)["q"], [-1, 2])


@pytest.mark.parametrize("index", [0, 1])
def test_weights_say_whose_integers_to_keep(index):
    models = quantised([1, 2], [-1, 2])
    for average in (otf.average, jax.jit(otf.average, static_argnums=1)):
        for weights in (keep(index), tuple(float(i == index) for i in range(2))):
            np.testing.assert_array_equal(average(models, weights)["q"], models[index]["q"])


def test_fusing_refuses_integers_that_differ_and_takes_those_that_weights_name():
    def fn(params, x):
        h = jax.nn.relu(x @ params["w"])
        return h @ params["v"] * params["mask"].astype(jnp.float32)[None]

    models = [
        normals({"w": (5, 8), "v": (8, 2)}, seed) | {"mask": array(np.arange(2) == seed, bool)}
        for seed in range(2)
    ]
    symmetry = otf.trace_symmetry(fn, models[0], jnp.ones((1, 5)))
    fuse = functools.partial(otf.fuse, symmetry, method=otf.ForwardPass())
    for given in (models, otf.stack(models)):
        for combine in (fuse, functools.partial(otf.barycenter, symmetry)):
            with pytest.raises(ValueError, match="mask: bool"):
                combine(given)
        for index in (0, 1):

            def weights(path, index=index):
                return (1.0 - index, float(index)) if path == "mask" else None

            fused = fuse(given, weights, reference=0)
            np.testing.assert_array_equal(fused["mask"], models[index]["mask"])
    with pytest.raises(ValueError, match="mask: bool"):
        otf.fuse([symmetry, symmetry], models, method=otf.ForwardPass())
    with pytest.raises(ValueError, match="mask: bool"):
        otf.repair(symmetry, fn, models, jnp.ones((3, 5)))


def test_stacks_have_a_leading_axis():
    models = random_nets(3)
    stacked = otf.stack(models)
    for i, model in enumerate(models):
        assert_trees_close(unstack(stacked, i), model)


@pytest.mark.parametrize("combine", [otf.average, otf.stack], ids=["average", "stack"])
def test_models_that_differ_are_refused(combine):
    a = {"x": jnp.ones(2), "y": jnp.ones(3), "z": jnp.ones(1)}
    with pytest.raises(ValueError, match="no models were given"):
        combine([])
    with pytest.raises(ValueError, match="model 2") as error:
        combine([a, a, {"x": jnp.ones(2), "u": {"v": jnp.ones(1)}}])
    assert {"y: missing", "z: missing", "u/v: not expected"} <= {
        line.strip() for line in str(error.value).splitlines()
    }
    with pytest.raises(ValueError, match="model 1") as error:
        combine([a, {"x": jnp.ones(3), "y": jnp.ones(3), "z": jnp.ones((1, 1))}])
    assert "x: shape (3,), expected (2,)" in str(error.value)
    assert "z: shape (1, 1), expected (1,)" in str(error.value)
    assert "y:" not in str(error.value)
    with pytest.raises(ValueError, match="the same leaves in containers of other types"):
        combine([[jnp.ones(1)], (jnp.ones(1),)])


BAD_WEIGHTS = [
    ([1.0], "weights has shape (1,), but there are 2 models"),
    ([0.5, 0.25, 0.25], "weights has shape (3,), but there are 2 models"),
    ([1.0, 1.0], "the weights sum to 2.0; divide them by their sum"),
    ([0.5, float("nan")], "the weights sum to nan"),
]


@pytest.mark.parametrize(("weights", "message"), BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(weights, message):
    models = random_nets(2)
    with pytest.raises(ValueError, match=re.escape(message)):
        otf.average(models, weights)
    with pytest.raises(ValueError, match=re.escape(message)):
        otf.fuse(symmetry_of(), models, weights)


# Fusion


def test_fusing_is_aligning_transporting_and_averaging():
    symmetry, models = symmetry_of(), random_nets(3)
    moved = [otf.transport(symmetry, otf.align(symmetry, m, models[2]), m) for m in models[:2]]
    fused = otf.fuse(symmetry, models, [0.2, 0.3, 0.5])
    assert_trees_close(fused, otf.average([*moved, models[2]], [0.2, 0.3, 0.5]))
    assert_trees_close(otf.fuse(symmetry, models), otf.average([*moved, models[2]]))


def test_lists_stacks_and_jit_give_the_same():
    symmetry, models = symmetry_of(), random_nets(3)
    fuse = functools.partial(otf.fuse, symmetry, method=otf.ForwardPass())
    expected = fuse(models)
    for other in (fuse(tuple(models)), fuse(otf.stack(models)), jax.jit(fuse)(models)):
        assert_trees_close(other, expected)
    assert_trees_close(jax.jit(fuse)(otf.stack(models)), expected)


@pytest.mark.parametrize("reference", [0, 1, -1])
def test_permuted_copies_fuse_to_the_reference(reference):
    copies = permuted_copies(random_nets(1)[0], 3)
    fused = otf.fuse(symmetry_of(), copies, [0.5, 0.3, 0.2], reference=reference)
    assert_trees_close(fused, copies[reference])
    distance = jnp.abs(fused[1]["kernel"] - copies[(reference + 1) % 3][1]["kernel"])
    assert distance.max() > 0.1


def test_weights_stay_with_their_models_whatever_the_reference():
    models = random_nets(3)
    for index in range(3):
        weights = [float(i == index) for i in range(3)]
        fused = otf.fuse(symmetry_of(), models, weights, reference=index)
        assert_trees_close(fused, models[index])
        # All weight on another model: that model, in the reference's order of units.
        fused = otf.fuse(symmetry_of(), models, weights, reference=(index + 1) % 3)
        for layer, original in zip(fused, models[index], strict=True):
            close(np.sort(layer["kernel"].ravel()), np.sort(original["kernel"].ravel()))


def test_method_and_solver_reach_the_alignment():
    symmetry, models = symmetry_of(), random_nets(3)[:2]
    options = {"method": otf.ForwardPass(unit_norm=True), "solver": otf.Sinkhorn()}
    alignment = otf.align(symmetry, *models, **options)
    moved = otf.transport(symmetry, alignment, models[0])
    assert_trees_close(otf.fuse(symmetry, models, **options), otf.average([moved, models[1]]))
    with pytest.raises(ValueError, match="Sinkhorn returns soft plans"):
        otf.fuse(symmetry, models, solver=otf.Sinkhorn())


@pytest.mark.parametrize("batch_size", [None, 2])
def test_soft_plans_of_a_leaf_that_is_used_twice_are_refused(batch_size):
    def tied(params, x):
        stream = x @ params["embed"]
        stream = stream + jax.nn.relu(stream @ params["up"]) @ params["down"]
        return stream @ params["embed"].T

    shapes = {"embed": (5, 8), "up": (8, 12), "down": (12, 8)}
    models = [normals(shapes, seed) for seed in range(3)]
    symmetry = otf.trace_symmetry(tied, models[0], normal(4, 5))
    options = {"method": otf.ForwardPass(), "batch_size": batch_size}
    with pytest.raises(ValueError, match="embed both produce and consume the units"):
        otf.fuse(symmetry, models, solver=otf.Sinkhorn(), **options)
    assert otf.fuse(symmetry, models, **options)["embed"].shape == (5, 8)


def test_integers_are_those_of_the_reference():
    def fn(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["v"]

    models = [
        normals({"w": (5, 8), "v": (8, 2)}, seed) | {"steps": array(seed, np.int32)}
        for seed in range(3)
    ]
    symmetry = otf.trace_symmetry(fn, models[0], jnp.ones((1, 5)))
    for reference in (0, 1, 2):
        fused = otf.fuse(symmetry, models, reference=reference, method=otf.ForwardPass())
        assert fused["steps"] == reference
        assert fused["steps"].dtype == jnp.int32


def test_parameters_that_are_lists_are_told_from_lists_of_models():
    # Two layers and two models: the outer lists are of one length.
    def fn(params, x):
        (w, b), (v, c) = params
        return jax.nn.relu(x @ w + b[None]) @ v + c[None]

    w, b, v, c = normals({"w": (5, 8), "b": (8,), "v": (8, 2), "c": (2,)}).values()
    model, x = [(w, b), (v, c)], normal(3, 5, seed=1)
    symmetry = otf.trace_symmetry(fn, model, x)
    copy = otf.transport(symmetry, symmetry.random(jax.random.key(2)), model)
    fuse = functools.partial(otf.fuse, symmetry, method=otf.ForwardPass())
    for models in ([copy, model], (copy, model), otf.stack([copy, model])):
        assert_trees_close(fuse(models), model)
    with pytest.raises(ValueError, match="one model was given, or a stack"):
        fuse(model)


def test_models_that_cannot_be_fused_are_refused():
    symmetry, models = symmetry_of(), random_nets(2)
    fuse = functools.partial(otf.fuse, symmetry)
    with pytest.raises(ValueError, match="1 model given; fusing takes at least two"):
        fuse(models[:1])
    with pytest.raises(ValueError, match="1 model given; fusing takes at least two"):
        fuse(otf.stack(models[:1]))
    with pytest.raises(ValueError, match="no models were given"):
        fuse([])
    with pytest.raises(ValueError, match="one model was given, or a stack"):
        fuse(models[0])
    with pytest.raises(ValueError, match="models is a dict of another structure"):
        fuse(dict(enumerate(models)))
    for reference in (2, -3):
        with pytest.raises(ValueError, match=f"reference is {reference}, but there are 2 models"):
            fuse(models, reference=reference)
    with pytest.raises(ValueError, match=r"(?s)model 1 .*2/bias: missing.*2/kernel: missing"):
        fuse([models[0], models[1][:2]])
    shapes = [{**models[1][0], "bias": jnp.ones(9), "kernel": jnp.ones((5, 9))}, *models[1][1:]]
    with pytest.raises(ValueError, match=r"(?s)model 1 .*0/bias: shape \(9,\).*0/kernel: shape"):
        fuse([models[0], shapes])
    bad = [{**models[0][0], "bias": models[0][0]["bias"] * jnp.inf}, *models[0][1:]]
    with pytest.raises(ValueError, match=r"(?s)model 0 .*0/bias: 8 of 8 values not finite"):
        fuse([bad, models[1]])
    with pytest.raises(ValueError, match=r"0/bias: 8 of 16 values not finite"):
        fuse(jax.tree.map(lambda *leaves: jnp.stack(leaves), bad, models[1]))


def test_under_jit_what_is_not_finite_gives_nan():
    models = random_nets(3)
    bad = [{**models[0][0], "bias": models[0][0]["bias"] * jnp.nan}, *models[0][1:]]
    fuse = functools.partial(otf.fuse, symmetry_of(), method=otf.ForwardPass())
    fused = jax.jit(fuse)([bad, *models[1:]])
    assert jnp.isnan(fused[0]["kernel"]).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_the_batch_size_changes_nothing(batch_size):
    models = random_nets(4)
    found = otf.fuse(symmetry_of(), models, batch_size=batch_size)
    assert_trees_close(found, otf.fuse(symmetry_of(), models))


def test_a_batch_of_none_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        otf.fuse(symmetry_of(), random_nets(2), batch_size=0)


# Without the tests' checks of annotations, which would refuse other types before the library does.
fuse_of_any_type: Any = inspect.unwrap(otf.fuse)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": 1.0}, "reference is 1.0, of type float; give a model's position"),
        ({"reference": True}, "reference is True, of type bool; give a model's position"),
        ({"reference": "last"}, "reference is 'last', of type str; give a model's position"),
        ({"batch_size": True}, "batch_size is True, of type bool; give 1 or more, or None"),
        ({"batch_size": "2"}, "batch_size is '2', of type str; give 1 or more, or None"),
        ({"method": otf.ForwardPass}, "method is the class ForwardPass; pass CoordinateDescent()"),
        ({"method": "descent"}, "method is 'descent'; pass CoordinateDescent()"),
        (
            {"solver": otf.Exact},
            "solver is the class Exact; pass Exact(), Sinkhorn(), LowRank() or Gromov",
        ),
        ({"solver": "exact"}, "solver is 'exact'; pass Exact(), Sinkhorn(), LowRank() or Gromov"),
        ({"metric": costs.Cosine}, "metric is the class Cosine; pass an ott cost function"),
        ({"metric": "cosine"}, "metric is 'cosine'; pass an ott cost function"),
        ({"weights": "half"}, "weights is 'half', of type str; give one number for each model"),
        ({"weights": ["a", "b"]}, "weight 0 is 'a', of type str; give one number for each model"),
        ({"weights": {"0": 1.0}}, "weights is {'0': 1.0}, of type dict; give one number"),
        ({"leaf_weight": {"w": 1.0}}, "a dict was given where a function is wanted"),
        ({"leaf_weight": "w"}, "a str was given where a function is wanted"),
    ],
    ids=str,
)
def test_arguments_of_other_types_are_named(options, message):
    symmetry, models = symmetry_of(), random_nets(2)
    for given in (symmetry, [symmetry, symmetry]):
        with pytest.raises(TypeError, match=re.escape(message)):
            fuse_of_any_type(given, models, **options)


def test_whole_numbers_of_numpy_are_numbers():
    symmetry, models = symmetry_of(), random_nets(2)
    options = {"reference": np.int64(0), "batch_size": np.int64(1)}
    fused = fuse_of_any_type(symmetry, models, **options)
    assert_trees_close(fused, otf.fuse(symmetry, models, reference=0))


def with_bias(net, bias):
    return [net[0] | {"bias": bias}, *net[1:]]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net[:-1], r"2/bias: missing"),
        (lambda net: with_bias(net, jnp.ones(9)), r"0/bias: shape \(9,\), expected \(8,\)"),
        (lambda net: with_bias(net, jnp.ones(8, int)), r"0/bias: dtype int32, expected float32"),
        (lambda net: with_bias(net, net[0]["bias"] * jnp.nan), r"0/bias: 8 of 8 values not finite"),
    ],
    ids=["tree", "shape", "dtype", "not finite"],
)
def test_a_model_that_does_not_fit_is_named_by_key_path(change, message, number):
    """By its number in the list, whether it is moved or is the reference."""
    symmetry, models = symmetry_of(), random_nets(2)
    models[number] = change(models[number])
    for given in (symmetry, [symmetry, symmetry]):
        with pytest.raises(ValueError, match=f"(?s)model {number} .*{message}"):
            otf.fuse(given, models)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (jnp.ones((3, 8)), "0/bias: 3 models, where others have 2"),
        (jnp.ones(8), r"0/bias: no axis in front of shape \(8,\)"),
        (jnp.ones((2, 9)), r"0/bias: shape \(2, 9\), expected \(2, 8\)"),
    ],
    ids=["another number", "no leading axis", "another shape"],
)
def test_a_leaf_that_does_not_fit_its_stack_is_named_by_key_path(bias, message):
    stacked = with_bias(otf.stack(random_nets(2)), bias)
    for combine in (otf.fuse, otf.barycenter):
        with pytest.raises(ValueError, match=f"(?s)stack.*{message}"):
            combine(symmetry_of(), stacked)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_models_whose_squares_are_out_of_range_are_fused(size):
    models = random_nets(2)
    sized = [jax.tree.map(lambda x: size * x, model) for model in models]
    fused = otf.fuse(symmetry_of(), sized)
    assert_trees_close(jax.tree.map(lambda x: x / size, fused), otf.fuse(symmetry_of(), models))
