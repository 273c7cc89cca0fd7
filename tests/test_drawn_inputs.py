"""Checks what is drawn where there is no data: shapes, moments, and what it is drawn by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from otfusion_jax.fusion import drawn_inputs
from otfusion_jax.fusion.dead_leaves import dead_leaves
from otfusion_jax.fusion.drawn_inputs import drawn_samples, look_like_images


def shape_of(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, *sizes), dtype)


def near_correlation(x: np.ndarray, axis: int) -> float:
    """Of neighbours along an axis."""
    size = x.shape[axis]
    former = np.take(x, range(size - 1), axis)
    latter = np.take(x, range(1, size), axis)
    return float(np.corrcoef(former.ravel(), latter.ravel())[0, 1])


def test_dead_leaves_are_normalised_and_smooth():
    images = dead_leaves(0, 50, 32, 24, 3)
    assert images.shape == (50, 32, 24, 3)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_array_equal(images, dead_leaves(0, 50, 32, 24, 3))
    assert abs(images - dead_leaves(1, 50, 32, 24, 3)).max() > 1

    # Neighbours are alike, and so are colours; far pixels less.
    def correlation(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    near = correlation(images[:, 1:], images[:, :-1])
    far = correlation(images[:, 16:], images[:, :-16])
    assert near > 0.8 > 0.5 > far
    assert correlation(images[..., 0], images[..., 1]) > 0.5


def test_leaves_have_textures(monkeypatch: pytest.MonkeyPatch):
    def within_leaves():
        images = dead_leaves(0, 2, 64, 64, 3)
        # Most neighbours lie on one leaf.
        return np.median(abs(np.diff(images, axis=1)))

    rough = within_leaves()
    monkeypatch.setattr("otfusion_jax.fusion.dead_leaves._ROUGHEST", 0.0)
    assert rough > 1.2 * within_leaves()


@pytest.mark.parametrize("sizes", [(16, 12, 3), (3, 16, 12), (9, 9, 4)], ids=str)
def test_images_are_drawn_where_inputs_look_like_images(sizes, monkeypatch: pytest.MonkeyPatch):
    # Some at a time, the last of them fewer.
    monkeypatch.setattr(drawn_inputs, "_DRAWN_TOGETHER", 7 * int(np.prod(sizes)))
    assert look_like_images((shape_of(*sizes),))
    fit, held_out = drawn_samples((shape_of(*sizes, dtype=jnp.bfloat16),), 60, jax.random.key(0))
    drawn = []
    for samples in (fit, held_out):
        (images,) = samples.inputs
        assert images.shape == (60, *sizes)
        assert images.dtype == jnp.bfloat16
        images = images.astype(np.float32)
        np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=5e-3)
        # Smooth along both sides, and no two alike.
        for axis in (axis for axis in (1, 2, 3) if images.shape[axis] > 4):
            assert near_correlation(images, axis) > 0.6
        assert len(np.unique(images.reshape(60, -1), axis=0)) == 60
        drawn.append(images)
    assert abs(drawn[0] - drawn[1]).max() > 1
    again, _ = drawn_samples((shape_of(*sizes, dtype=jnp.bfloat16),), 60, jax.random.key(0))
    np.testing.assert_array_equal(again.inputs[0], fit.inputs[0])


@pytest.mark.parametrize(
    "sizes", [(30,), (20, 24), (16, 12, 1), (16, 12, 5), (6, 16, 3), (4, 16, 16, 3)], ids=str
)
def test_all_else_is_noise_and_the_same_cut_at_0(sizes):
    assert not look_like_images((shape_of(16, 16, 3), shape_of(*sizes)))
    fit, held_out = drawn_samples((shape_of(16, 16, 3), shape_of(*sizes)), 40, jax.random.key(1))
    assert set(np.unique(fit.inputs[1])) == {-1, 1}
    np.testing.assert_allclose(
        [held_out.inputs[1].mean(), held_out.inputs[1].std()], [0, 1], atol=1e-4
    )
    # Each input by itself.
    assert near_correlation(fit.inputs[0], 1) > 0.6
    assert len(np.unique(fit.inputs[0])) > 1000
