"""Compares features with activations computed by hand, through JAX's control flow too."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal, normals

import otfusion_jax as otf

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def setting(kind):
    net = ref.random_net(0, kind)
    x = normal(*ref.INPUTS[kind], seed=1)
    return otf.trace_symmetry(ref.network, net, x), net, x


@pytest.mark.parametrize("kind", ref.SHAPES)
def test_features_are_the_activations_before_and_after_bias_and_nonlinearity(kind):
    symmetry, net, x = setting(kind)
    expected = ref.activations(ref.to_numpy(net), np.asarray(x, np.float64))
    for at, layers in zip(("preactivation", "activation"), expected, strict=True):
        found = otf.features(symmetry, ref.network, net, x, at=at)
        assert list(found) == [group.name for group in symmetry.groups]
        for value, layer in zip(found.values(), layers, strict=True):
            # All of batch and space are samples, in order; for a flattened image as well.
            assert value.shape == (layer.size // 8, 8)
            close(value, layer.reshape(-1, 8))


def test_a_permuted_network_has_permuted_features():
    symmetry, net, x = setting("conv")
    plans = symmetry.random(jax.random.key(2))
    moved = otf.transport(symmetry, plans, net)
    for at in ("preactivation", "activation"):
        plain = otf.features(symmetry, ref.network, net, x, at=at)
        found = otf.features(symmetry, ref.network, moved, x, at=at)
        for name, plan in plans.items():
            close(found[name], plain[name][:, plan])


def test_features_under_jit_vmap_and_grad():
    symmetry, net, x = setting("mlp")
    read = functools.partial(otf.features, symmetry, ref.network)
    plain = read(net, x)
    jitted = jax.jit(read)(net, x)
    nets = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), net)
    mapped = jax.vmap(read, in_axes=(0, None))(nets, x)
    for name, value in plain.items():
        close(jitted[name], value)
        close(mapped[name][0], value)
    gradient = jax.grad(lambda net: read(net, x)["0/kernel"].sum())(net)
    close(gradient[0]["kernel"], jnp.broadcast_to(x.sum(0)[:, None], (5, 8)))


@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.abs(x))


softsign.defjvps(lambda t, _, x: t / (1 + jnp.abs(x)) ** 2)


@jax.custom_vjp
def double(x):
    return 2 * x


double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_features_inside_of_other_functions(wrap):
    @wrap
    def layer(x, kernel):
        return double(softsign(x @ kernel))

    def fn(params, x):
        return layer(layer(x, params["a"]), params["b"]) @ params["c"]

    params, x = normals({"a": (5, 4), "b": (4, 4), "c": (4, 2)}), normal(6, 5, seed=1)
    symmetry = otf.trace_symmetry(fn, params, x)
    before = {"a": x @ params["a"]}
    after = {"a": 2 * before["a"] / (1 + abs(before["a"]))}
    before["b"] = after["a"] @ params["b"]
    after["b"] = 2 * before["b"] / (1 + abs(before["b"]))
    found = [otf.features(symmetry, fn, params, x, at=at) for at in ("preactivation", "activation")]
    for name in ("a", "b"):
        close(found[0][name], before[name])
        close(found[1][name], after[name])


def test_a_residual_stream_is_read_at_every_site():
    def fn(params, x):
        h = x @ params["embed"]
        h = h + jax.nn.relu(h @ params["up"]) @ params["down"]
        return h @ params["head"]

    params = normals({"embed": (5, 4), "up": (4, 3), "down": (3, 4), "head": (4, 2)})
    x = normal(6, 5, seed=1)
    symmetry = otf.trace_symmetry(fn, params, x)
    embedded = x @ params["embed"]
    hidden = embedded @ params["up"]
    written = jax.nn.relu(hidden) @ params["down"]
    preactivations = otf.features(symmetry, fn, params, x)
    close(preactivations["embed"], jnp.concatenate([embedded, written]))
    close(preactivations["up"], hidden)
    activations = otf.features(symmetry, fn, params, x, at="activation")
    close(activations["embed"], jnp.concatenate([embedded, embedded + written]))
    close(activations["up"], jax.nn.relu(hidden))


def test_channels_first_are_read_as_well():
    def fn(params, x):
        h = jnp.einsum("nchw,cd->ndhw", x, params["a"])
        return jnp.einsum("ndhw,de->ne", jax.nn.relu(h), params["b"])

    params, x = normals({"a": (2, 4), "b": (4, 3)}), normal(2, 2, 3, 3, seed=1)
    symmetry = otf.trace_symmetry(fn, params, x)
    (found,) = otf.features(symmetry, fn, params, x).values()
    expected = np.einsum("nchw,cd->nhwd", x, params["a"]).reshape(-1, 4)
    assert found.shape == expected.shape
    # In which order samples come does not matter to any inner product.
    close(found.T @ found, expected.T @ expected)


def test_another_function_is_refused():
    symmetry, net, x = setting("mlp")
    with pytest.raises(ValueError, match="has other groups than the symmetry given; trace it"):
        otf.features(symmetry, lambda net, x: x @ net[0]["kernel"], net, x)


def test_settings_and_values_that_do_not_fit_are_refused():
    symmetry, net, x = setting("mlp")
    at: Any = "produced"
    with pytest.raises((ValueError, TypeError), match="preactivation"):
        otf.features(symmetry, ref.network, net, x, at=at)
    with pytest.raises(ValueError, match=r"input 0 is empty: shape \(0, 5\)"):
        otf.features(symmetry, ref.network, net, x[:0])
    with pytest.raises(ValueError, match="2/kernel: missing"):
        otf.features(symmetry, ref.network, net[:2], x)
    bad = [{**net[0], "bias": net[0]["bias"] * jnp.nan}, *net[1:]]
    with pytest.raises(ValueError, match="0/bias: 8 of 8 values not finite"):
        otf.features(symmetry, ref.network, bad, x)
