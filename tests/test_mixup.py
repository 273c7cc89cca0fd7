"""Checks mixtures of inputs, and training on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import otfusion_jax as otf


def test_a_mixture_lies_between_two_samples():
    corners = jnp.eye(6)
    mixed = np.asarray(otf.mixup(corners, jax.random.key(1)))
    # Row i keeps a share of corner i, and the rest is that of a single other one.
    np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=1e-6)
    assert (mixed >= 0).all()
    for number, row in enumerate(mixed):
        others = np.delete(row, number)
        assert np.count_nonzero(others) <= 1
    # Shares are drawn for each, and each is the partner of one.
    assert len(np.unique(np.diag(mixed))) >= 3
    assert (np.count_nonzero(mixed - np.diag(np.diag(mixed)), axis=0) <= 1).all()


def test_all_arrays_are_mixed_alike():
    x = normal(8, 3, seed=0)
    mixed = otf.mixup({"x": x, "labels": 2 * x[:, :1]}, jax.random.key(0))
    np.testing.assert_allclose(mixed["labels"], 2 * mixed["x"][:, :1], rtol=1e-6)
    assert not np.allclose(mixed["x"], x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_stay_and_jit_changes_nothing(dtype: str):
    x = normal(8, 2, 2, seed=0).astype(dtype)
    mixed = otf.mixup(x, jax.random.key(3))
    assert mixed.dtype == x.dtype
    again = jax.jit(otf.mixup)(x, jax.random.key(3))
    np.testing.assert_allclose(
        mixed.astype(jnp.float32), again.astype(jnp.float32), rtol=float(jnp.finfo(dtype).eps)
    )
    assert not np.array_equal(mixed, otf.mixup(x, jax.random.key(4)))


def test_arrays_of_numpy_are_mixed_by_a_traced_key():
    x = np.asarray(normal(4, 3, seed=0), np.float64)
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.vmap(functools.partial(otf.mixup, x))(keys)
    for mixed, key in zip(together, keys, strict=True):
        np.testing.assert_allclose(mixed, otf.mixup(x, key), rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_shardings_stay(kind: AxisType):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(kind,))
    x = normal(4, 3, seed=0)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    mixed = jax.jit(otf.mixup)(spread, jax.random.key(0))
    assert mixed.sharding.is_equivalent_to(spread.sharding, 2)
    np.testing.assert_allclose(mixed, otf.mixup(x, jax.random.key(0)), rtol=1e-6)


def test_what_cannot_be_mixed_is_named():
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="tokens is int32"):
        otf.mixup({"tokens": jnp.arange(4)}, key)
    with pytest.raises(TypeError, match="the batch is a float"):
        otf.mixup(1.0, key)
    with pytest.raises(ValueError, match=r"1 has shape \(3, 2\).*the 4 samples"):
        otf.mixup((jnp.ones((4, 2)), jnp.ones((3, 2))), key)
    with pytest.raises(ValueError, match="first axis must be samples"):
        otf.mixup(jnp.ones(()), key)
    with pytest.raises(ValueError, match="no arrays"):
        otf.mixup((), key)


def curve(params, x):
    """A line through the inputs 0 and 1, and an arch between them."""
    return params[0] * x + params[1] * x * (1 - x)


def test_distilling_on_mixtures_knows_more_than_the_inputs():
    teacher, start = jnp.array([1.0, 2.0]), jnp.zeros(2)
    inputs = jnp.array([[0.0], [1.0]] * 8)
    distill = functools.partial(
        otf.distill, curve, start, [teacher], [inputs], outputs="values", optimizer=optax.adam(0.1)
    )
    np.testing.assert_allclose(distill(), teacher, atol=0.02)
    np.testing.assert_array_equal(distill(), distill(mixes=True))
    # The inputs themselves say nothing of the arch.
    np.testing.assert_allclose(distill(mixes=False), [1, 0], atol=0.02)


def test_each_step_has_mixtures_of_its_own():
    seen = []

    def loss(params, x):
        jax.debug.callback(seen.append, x)
        return jnp.sum(params)

    start = jnp.zeros(2)
    corners = jnp.tile(jnp.eye(2), (16, 1))
    otf.distill(curve, start, [start], [corners], loss=loss, steps=2, mixes=True)
    jax.effects_barrier()
    first, second = [np.max(x, axis=1) for x in seen]
    mixed = (first < 1) & (second < 1)
    assert mixed.any()
    assert (first != second)[mixed].all()


def test_a_loss_or_tokens_are_not_mixed_unless_told():
    def at_corners(params, x):
        return jnp.sum(params) * jnp.where(jnp.all((x == 0) | (x == 1)), 1.0, jnp.nan)

    start, corners = jnp.ones(2), jnp.eye(4)
    otf.distill(curve, start, [start], [corners], loss=at_corners, steps=2)
    with pytest.raises(FloatingPointError):
        otf.distill(curve, start, [start], [corners], loss=at_corners, steps=2, mixes=True)

    def looked_up(table, tokens):
        return table[tokens]

    table, tokens = normal(5, 3, seed=0), jnp.arange(5)
    tuned = otf.distill(looked_up, table, [table + 1], [tokens], outputs="values", steps=2)
    assert not np.array_equal(tuned, table)
    with pytest.raises(TypeError, match="mixes is True"):
        otf.distill(looked_up, table, [table], [tokens], outputs="values", mixes=True)
