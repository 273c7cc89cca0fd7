"""Compares inner products of activations with NumPy, whatever the batches that they come in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal, normals
from numpy.testing import assert_allclose, assert_array_equal
from pairs import FORWARD

import otfusion_jax as otf

any_otf: Any = otf  # for calls that a type checker would refuse


@functools.cache
def setting():
    """A symmetry, two networks, inputs, and the hidden features of both in NumPy."""
    a, b = ref.random_net(0, "mlp"), ref.random_net(1, "mlp")
    x = normal(*ref.INPUTS["mlp"], seed=2)
    samples = np.asarray(x, np.float64)
    runs = [ref.activations(ref.to_numpy(net), samples) for net in (a, b)]
    return otf.trace_symmetry(ref.network, a, x), a, b, x, runs


def layer_features(run, at: str, layer: int, center: bool) -> np.ndarray:
    before, after = run
    features = before[layer] if at == "preactivation" else after[layer]
    return features - features.mean(0) if center else features


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("at", ["preactivation", "activation"])
def test_streams_agree_with_numpy_on_all_samples(at, center):
    symmetry, a, b, x, runs = setting()
    parts = [x[:7], x[7:8], x[8:]]
    close = functools.partial(assert_allclose, rtol=0, atol=1e-4)
    for batches in ([x], parts, iter(parts), [(part,) for part in parts]):
        found = otf.feature_gram(symmetry, ref.network, a, b, batches, at=at, center=center)
        for layer, name in enumerate(("0/kernel", "1/kernel")):
            u = layer_features(runs[0], at, layer, center)
            v = layer_features(runs[1], at, layer, center)
            close(found[name].cross, u.T @ v)
            close(found[name].source_sq_norms, np.diagonal(u.T @ u))
            close(found[name].target_sq_norms, np.diagonal(v.T @ v))
            if center:
                covariance = np.cov(u.T, v.T, bias=True)[:8, 8:]
                close(found[name].cross / len(x), covariance)


def test_networks_in_the_other_order_give_the_transpose():
    symmetry, a, b, x, _ = setting()
    there = otf.feature_gram(symmetry, ref.network, a, b, [x])
    back = otf.feature_gram(symmetry, ref.network, b, a, [x])
    for name, products in there.items():
        assert_allclose(products.cross, back[name].cross.T, rtol=1e-5, atol=1e-5)
        assert_allclose(products.source_sq_norms, back[name].target_sq_norms, rtol=1e-5)


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
def test_features_serve_a_quadratic_solver_if_taken_for_it(center):
    symmetry, a, b, x, runs = setting()
    grams = otf.feature_gram(symmetry, ref.network, a, b, [x], intra=True, center=center)
    intra = grams["1/kernel"].intra
    assert intra is not None
    for products, run in zip(intra, runs, strict=True):
        u = layer_features(run, "preactivation", 1, center)
        assert_allclose(products, u.T @ u, rtol=1e-4, atol=1e-4)
    align = functools.partial(
        otf.align, symmetry, a, b, method=FORWARD, solver=otf.GromovWasserstein()
    )
    plan = align(grams=grams).plans["1/kernel"]
    assert_allclose(plan.sum(0), np.full(8, 1 / 8), atol=1e-2)
    without_intra = otf.feature_gram(symmetry, ref.network, a, b, [x])
    with pytest.raises(ValueError, match="intra"):
        align(grams=without_intra)


# --- batches


@pytest.mark.parametrize("batches", [[], iter([])], ids=["list", "iterator"])
def test_no_batches_are_refused(batches):
    symmetry, a, b, _, _ = setting()
    with pytest.raises(ValueError, match="no batches of inputs"):
        otf.feature_gram(symmetry, ref.network, a, b, batches)


def test_empty_batches_are_refused():
    symmetry, a, b, x, _ = setting()
    with pytest.raises(ValueError, match=r"input 0 is empty: shape \(0, 5\)"):
        otf.feature_gram(symmetry, ref.network, a, b, [x, x[:0]])


X = normal(*ref.INPUTS["mlp"], seed=2)
ONE_BATCH = {
    "array": (X, r"array of shape \(20, 5\).*pass .* as in \[x\]"),
    "numpy": (np.asarray(X), r"array of shape \(20, 5\).*pass .* as in \[x\]"),
    "dict": ({"x": X}, r"batches is dict.*pass .* as in \[x\]"),
    "inputs": ((X, X), r"tuple of 2, of arrays.*pass \[\(x, y\)\] for one batch of two inputs"),
    "numpy inputs": ((np.asarray(X),), r"tuple of 1, of arrays.*pass \[\(x, y\)\] for one"),
}


@pytest.mark.parametrize("kind", ONE_BATCH)
def test_one_batch_is_no_list_of_batches(kind):
    symmetry, a, b, _, _ = setting()
    batch, message = ONE_BATCH[kind]
    with pytest.raises(TypeError, match=message):
        any_otf.feature_gram(symmetry, ref.network, a, b, batch)


def test_a_tuple_of_batches_that_are_tuples_of_inputs_is_one_of_batches():
    symmetry, a, b, x, _ = setting()
    found = otf.feature_gram(symmetry, ref.network, a, b, ((x[:7],), (x[7:],)))
    expected = otf.feature_gram(symmetry, ref.network, a, b, [x])
    assert_allclose(found["0/kernel"].cross, expected["0/kernel"].cross, rtol=1e-4, atol=1e-4)


# --- samples weighed by what the outputs owe to them


def squared_derivatives(rest, features) -> np.ndarray:
    """The squared norm of the derivative by the features of each sample, of one output each."""
    gradient = np.asarray(jax.grad(lambda h: rest(h).sum())(features))
    return (gradient**2).reshape(-1, gradient.shape[-1]).sum(-1)


def weighed_covariance(weights, u, v):
    """Covariances of the columns of two arrays, times the sum of the weights."""
    flat = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (u, v)]
    u, v = (x - np.average(x, axis=0, weights=weights) for x in flat)
    return (u * weights[:, None]).T @ v


def recurrent(params, x):
    """A state that is carried along, and read at its end; one output."""

    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h @ params["back"])
        return h, None

    start = jnp.zeros((x.shape[0], 4)) + x[:, 0] @ params["start"]
    h, _ = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))
    return h @ params["out"]


def test_samples_count_by_the_derivative_of_the_outputs():
    params = normals({"first": (5, 6), "second": (6, 4), "out": (4, 1)}, 0)
    other = normals({"first": (5, 6), "second": (6, 4), "out": (4, 1)}, 1)

    def from_second(params, h):
        return jnp.tanh(h @ params["second"]) @ params["out"]

    def fn(params, x):
        return from_second(params, jnp.tanh(x @ params["first"]))

    x = normal(30, 5, seed=2)
    symmetry = otf.trace_symmetry(fn, params, x)
    hidden = [jnp.tanh(x @ net["first"]) for net in (params, other)]
    weights = []
    for net, h in zip((params, other), hidden, strict=True):
        weights.append(squared_derivatives(functools.partial(from_second, net), h))
    # Of one output for each input, every random sum has the derivative's square itself.
    expected = weighed_covariance(sum(weights) / 2, *hidden)
    gram = functools.partial(otf.feature_gram, symmetry, fn, params, other, at="activation")
    for batches in ([x], [x[:11], x[11:]]):
        found = gram(batches, center=True, by_sensitivity=True)["first"]
        assert_allclose(found.cross, expected, rtol=1e-4, atol=1e-4)


def test_samples_count_by_derivatives_inside_of_loops():
    shapes = {"in": (3, 4), "back": (4, 4), "start": (3, 4), "out": (4, 1)}
    params, x = normals(shapes, 0), normal(10, 5, 3, seed=2)
    symmetry = otf.trace_symmetry(recurrent, params, x)
    (name,) = symmetry
    found = otf.feature_gram(
        symmetry, recurrent, params, params, [x], at="activation", by_sensitivity=True
    )[name]
    # The state is read by each step, and by the outputs at its end.
    states, weights = [], []
    h = x[:, 0] @ params["start"]
    for t in range(6):

        def rest(state, t=t):
            # What the product at step t owes to the state, and nothing else does.
            for later in range(t, 5):
                state = jnp.tanh(x[:, later] @ params["in"] + state @ params["back"])
            return state @ params["out"]

        states.append(h)
        weights.append(squared_derivatives(rest, h))
        if t < 5:
            h = jnp.tanh(x[:, t] @ params["in"] + h @ params["back"])
    u = np.concatenate(states)
    expected = (u * np.concatenate(weights)[:, None]).T @ u
    assert_allclose(found.cross, expected, rtol=1e-4, atol=1e-4)


def first_token(params, x):
    return jax.nn.relu(x @ params["in"])[:, 0] @ params["out"]


def test_places_that_nothing_reads_do_not_count():
    params, other = (normals({"in": (5, 6), "out": (6, 3)}, seed) for seed in range(2))
    x = normal(8, 4, 5, seed=2)
    symmetry = otf.trace_symmetry(first_token, params, x)
    gram = functools.partial(otf.feature_gram, symmetry, first_token, params, other)
    found = gram([x], at="preactivation", by_sensitivity=True)["in"]
    again = gram([x.at[:, 1:].multiply(100)], at="preactivation", by_sensitivity=True)["in"]
    assert_allclose(found.cross, again.cross, rtol=1e-6)
    assert abs(np.asarray(found.cross)).max() > 0.1
    # Not even what is no number.
    unknown = gram([x.at[:, 1:].set(np.nan)], at="preactivation", by_sensitivity=True)["in"]
    assert_allclose(unknown.cross, found.cross, rtol=1e-6)


@jax.custom_jvp
def step(h):
    """A step, whose derivative is taken to be that of a logistic function."""
    return jnp.heaviside(h, 0.5)


@step.defjvp
def _(primals, tangents):
    (h,), (tangent,) = primals, tangents
    return step(h), tangent * jax.nn.sigmoid(h)


@jax.custom_vjp
def doubled_until_large(h):
    return jax.lax.while_loop(lambda h: abs(h).sum() < 10, lambda h: 2 * h, h)


doubled_until_large.defvjp(lambda h: (doubled_until_large(h), h), lambda h, g: (g * (1 + h * h),))


@pytest.mark.parametrize("nonlinearity", [jax.nn.relu, step, doubled_until_large])
def test_functions_have_the_derivatives_that_they_say(nonlinearity):
    def fn(params, x):
        return nonlinearity(x @ params["in"]) @ params["out"]

    params, other = (normals({"in": (5, 6), "out": (6, 1)}, seed) for seed in range(2))
    # Zeros are where relu has two derivatives.
    x = normal(8, 5, seed=2).at[3:].set(0)
    symmetry = otf.trace_symmetry(fn, params, x)
    found = otf.feature_gram(symmetry, fn, params, other, [x], center=True, by_sensitivity=True)
    h, weights = [], []
    for net in (params, other):
        h.append(x @ net["in"])
        weights.append(squared_derivatives(lambda h, net=net: nonlinearity(h) @ net["out"], h[-1]))
    expected = weighed_covariance(sum(weights) / 2, *h)
    assert_allclose(found["in"].cross, expected, rtol=1e-4, atol=1e-4)


def test_a_rule_that_looks_at_other_values_gives_way_to_what_is_computed():
    def fn(params, x):
        is_there = (x.sum(-1, keepdims=True) > 0).astype(x.dtype)
        masked = jax.custom_vjp(lambda h: jnp.tanh(h) * is_there)
        masked.defvjp(
            lambda h: (masked(h), h), lambda h, g: (g * is_there * (1 - jnp.tanh(h) ** 2),)
        )
        return masked(x @ params["in"]) @ params["out"]

    params, x = normals({"in": (5, 6), "out": (6, 1)}, 0), normal(8, 5, seed=2)
    symmetry = otf.trace_symmetry(fn, params, x)
    found = otf.feature_gram(symmetry, fn, params, params, [x], by_sensitivity=True)["in"]
    h, is_there = x @ params["in"], (x.sum(-1, keepdims=True) > 0).astype(x.dtype)
    weights = squared_derivatives(lambda h: (jnp.tanh(h) * is_there) @ params["out"], h)
    assert_allclose(found.cross, (h * weights[:, None]).T @ h, rtol=1e-4, atol=1e-4)


def test_samples_that_say_next_to_nothing_may_come_alone():
    def fn(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"] * jnp.exp(-x[:, :1])

    params, other = (normals({"in": (5, 6), "out": (6, 1)}, seed) for seed in range(2))
    # Of one sample the derivative is too small to be squared.
    x = normal(8, 5, seed=2).at[0, 0].set(60)
    symmetry = otf.trace_symmetry(fn, params, x)
    gram = functools.partial(otf.feature_gram, symmetry, fn, params, other, by_sensitivity=True)
    together = gram([x])["in"].cross
    alone = gram([x[i : i + 1] for i in range(8)])["in"].cross
    assert_allclose(alone, together, rtol=1e-5, atol=1e-5)
    with pytest.raises(FloatingPointError, match="out of range"):
        gram([x[:1]])


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centered"])
def test_sums_over_many_samples_lose_no_digits(center):
    def fn(params, x):
        return jax.nn.relu(x @ params["in"]) @ params["out"]

    params, x = normals({"in": (5, 6), "out": (6, 1)}, 0), normal(100_000, 5, seed=2) + 1
    symmetry = otf.trace_symmetry(fn, params, x[:2])
    gram = functools.partial(otf.feature_gram, symmetry, fn, params, params, [x], at="activation")
    found = gram(center=center)["in"]
    # The features themselves are rounded to single precision; their sums are not by much more.
    h = np.asarray(jax.nn.relu(x @ params["in"]), np.float64)
    u = h - h.mean(0) if center else h
    assert_allclose(found.source_sq_norms, (u * u).sum(0), rtol=3e-6)
    assert_allclose(np.diagonal(found.cross), found.source_sq_norms, rtol=1e-5)


def test_groups_come_in_their_order():
    symmetry, a, b, x, _ = setting()
    assert list(otf.feature_gram(symmetry, ref.network, a, b, [x])) == list(symmetry)
    wide = {f"layer_{i}": normal(4, 4, seed=i) for i in range(12)}

    def chain(params, x):
        for i in range(12):
            x = jnp.tanh(x @ params[f"layer_{i}"])
        return x

    symmetry = otf.trace_symmetry(chain, wide, normal(3, 4, seed=0))
    grams = otf.feature_gram(symmetry, chain, wide, wide, [normal(3, 4, seed=1)])
    assert list(grams) == list(symmetry.identity()) == list(symmetry)


def test_of_many_outputs_all_count_and_both_parts_of_complex_ones():
    def from_hidden(params, h):
        spectrum = jnp.fft.rfft(h @ params["out"])
        return {"spectrum": 1j * spectrum, "sum": h.sum(-1), "sign": jnp.int32(h.sum(-1) > 0)}

    def fn(params, x):
        return from_hidden(params, jax.nn.relu(x @ params["in"]))

    params, x = normals({"in": (5, 6), "out": (6, 5)}, 0), normal(8, 5, seed=2)
    symmetry = otf.trace_symmetry(fn, params, x)
    h = jax.nn.relu(x @ params["in"])

    def parts(h):
        outputs = from_hidden(params, h)
        return outputs["spectrum"].real, outputs["spectrum"].imag, outputs["sum"]

    weights = np.zeros(8)
    for jacobian in jax.vmap(jax.jacrev(parts))(h):
        weights += (np.asarray(jacobian) ** 2).reshape(8, -1).sum(-1)
    expected = weighed_covariance(weights, h, h)
    gram = functools.partial(otf.feature_gram, symmetry, fn, params, params, at="activation")
    crosses = []
    for seed in range(60):
        key = jax.random.key(seed)
        crosses.append(gram([x], center=True, by_sensitivity=True, key=key)["in"].cross)
    # Random sums are right on average: of 240 draws, the error is a few hundredths.
    assert_allclose(np.mean(crosses, axis=0), expected, atol=0.1 * abs(expected).max())


def test_sensitivities_of_half_precision_are_promoted_by_no_one_else():
    def fn(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    params, x = normals({"in": (5, 6), "out": (6, 1)}, 0), normal(8, 5, seed=2)
    symmetry = otf.trace_symmetry(fn, params, x)
    expected = otf.feature_gram(symmetry, fn, params, params, [x], by_sensitivity=True)["in"]
    half, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, x))
    symmetry = otf.trace_symmetry(fn, half, x)
    with jax.numpy_dtype_promotion("strict"):
        found = otf.feature_gram(symmetry, fn, half, half, [x], by_sensitivity=True)["in"]
    assert_allclose(found.cross, expected.cross, rtol=0.1, atol=0.1)


def test_groups_that_outputs_do_not_depend_on_are_left_out():
    def stopped(params, x):
        h = jax.nn.relu(jax.lax.stop_gradient(x @ params["in"]))
        return jax.nn.relu(h @ params["on"]) @ params["out"]

    params, x = normals({"in": (5, 6), "on": (6, 4), "out": (4, 3)}, 0), normal(8, 5, seed=2)
    symmetry = otf.trace_symmetry(stopped, params, x)
    found = otf.feature_gram(symmetry, stopped, params, params, [x], by_sensitivity=True)
    assert set(found) == {"on"}
    assert set(symmetry) == {"in", "on"}


def test_groups_of_which_one_index_is_not_read_are_left_out():
    def branches(params, x):
        h = jnp.tanh(jnp.einsum("nd,ldk->nlk", x, params["in"]))
        h = h * jnp.asarray([[[1.0], [0.0], [1.0]]])
        return jnp.einsum("nlk,lko->no", h, params["out"])

    params, x = normals({"in": (3, 5, 6), "out": (3, 6, 2)}, 0), normal(8, 5, seed=2)
    symmetry = otf.trace_symmetry(branches, params, x)
    assert set(symmetry) == {"in"}
    gram = functools.partial(otf.feature_gram, symmetry, branches, params, params, [x])
    assert gram(by_sensitivity=True) == {}
    # What is matched without values stays, and says nothing of that index.
    traced = jax.jit(lambda: gram(by_sensitivity=True))()["in"]
    assert_array_equal(abs(traced.cross).max((1, 2)) > 0, [True, False, True])


def test_random_sums_are_drawn_anew_for_each_batch_and_alike_for_the_same_key():
    symmetry, a, b, x, _ = setting()
    gram = functools.partial(otf.feature_gram, symmetry, ref.network, a, b, by_sensitivity=True)
    once, again = gram([x, x]), gram([x, x], key=jax.random.key(0))
    other = gram([x, x], key=jax.random.key(1))
    single = gram([x])
    for name, products in once.items():
        np.testing.assert_array_equal(products.cross, again[name].cross)
        assert not np.allclose(products.cross, other[name].cross, rtol=1e-6)
        assert not np.allclose(products.cross, 2 * single[name].cross, rtol=1e-6)


def test_what_has_no_derivative_is_named():
    def looping(params, x):
        h = jax.nn.relu(x @ params["in"])
        h = jax.lax.while_loop(lambda h: h.sum() < 10, lambda h: 2 * h, h)
        return h @ params["out"]

    params, x = normals({"in": (5, 6), "out": (6, 3)}, 0), normal(8, 5, seed=2)
    symmetry = otf.trace_symmetry(looping, params, x)
    with pytest.raises(ValueError, match="can't be derived by its features"):
        otf.feature_gram(symmetry, looping, params, params, [x], by_sensitivity=True)

    def with_root(params, x):
        return jnp.sqrt(jnp.maximum(x @ params["in"], 0)) @ params["out"]

    symmetry = otf.trace_symmetry(with_root, params, x)
    with pytest.raises(FloatingPointError, match="in: the derivative of the outputs"):
        otf.feature_gram(symmetry, with_root, params, params, [x], by_sensitivity=True)
    # Outputs so small that squares are 0 are not those that depend on nothing.
    tiny = {**params, "out": params["out"] * 1e-24}
    symmetry = otf.trace_symmetry(first_token, tiny, x[:, None])
    with pytest.raises(FloatingPointError, match="its square is out of range"):
        otf.feature_gram(symmetry, first_token, tiny, tiny, [x[:, None]], by_sensitivity=True)


@pytest.mark.parametrize("by_sensitivity", [False, True])
def test_functions_with_other_numbers_of_samples_are_named(by_sensitivity):
    symmetry, a, b, x, _ = setting()

    def of_half(params, x):
        return ref.network(params, x[::2])

    gram = functools.partial(otf.feature_gram, symmetry, ref.network, a, b, [x])
    with pytest.raises(ValueError, match="0/kernel: the source has 20 samples .* the target 10"):
        gram(target_fn=of_half, by_sensitivity=by_sensitivity)
    with pytest.raises(TypeError, match="key is 3"):
        any_otf.feature_gram(symmetry, ref.network, a, b, [x], key=3)
