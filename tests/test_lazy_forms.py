"""Checks models that are brought into canonical form leaf by leaf, and rotated onto each other."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normals

import otfusion_jax as otf

SHAPES = {
    "embed": (12, 8),
    "gain": (8,),
    "shift": (8,),
    "up": (8, 12),
    "down": (12, 8),
    "last_gain": (8,),
    "read": (8, 6),
}
GAINS = ("gain", "last_gain")
X = normals({"x": (3, 12)}, seed=9)["x"]


def rms_norm(h):
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True))


def network(p, x):
    """A residual block behind an RMSNorm, whose features may be rotated once its gain is 1."""
    h = x @ p["embed"]
    normed = rms_norm(h) * p["gain"][None] + p["shift"][None]
    h = h + jnp.tanh(normed @ p["up"]) @ p["down"]
    return (rms_norm(h) * p["last_gain"][None]) @ p["read"]


def model(seed: int) -> dict[str, Any]:
    params = {name: np.asarray(value) for name, value in normals(SHAPES, seed).items()}
    for name in GAINS:
        params[name] = params[name] + np.sign(params[name])
    return params


class Lazily:
    """A model whose leaves are lazy, and the names of those that have been looked at."""

    def __init__(self, params: dict[str, Any]):
        self.looked_at: list[str] = []
        self.params = {}
        for name, array in params.items():
            self.params[name] = otf.LazyArray(array.shape, array.dtype, self.look(name, array))

    def look(self, name: str, array: np.ndarray):
        def read() -> np.ndarray:
            self.looked_at.append(name)
            return array

        return read


def lazy(params: dict[str, Any]) -> dict[str, Any]:
    return Lazily(params).params


@pytest.fixture(scope="module")
def symmetry() -> otf.Symmetry:
    return otf.trace_symmetry(network, model(0), X).with_rotations()


@pytest.mark.compatibility
def test_lazy_models_have_the_canonical_form_of_others(symmetry):
    expected = otf.canonicalize(symmetry, model(0))
    found = otf.canonicalize(symmetry, lazy(model(0)))
    for name, value in expected.items():
        assert isinstance(found[name], otf.LazyArray)
        np.testing.assert_array_equal(np.asarray(found[name]), value)
    for name in GAINS:
        np.testing.assert_array_equal(np.asarray(found[name]), 1)


def test_the_form_of_a_leaf_takes_that_leaf_and_its_gain_alone(symmetry):
    counted = Lazily(model(0))
    found = otf.canonicalize(symmetry, counted.params)
    counted.looked_at.clear()
    np.asarray(found["up"])
    np.asarray(found["down"])
    np.asarray(found["gain"])
    assert sorted(counted.looked_at) == ["down", "gain", "up"]


def test_leaves_that_fall_into_parts_are_read_with_their_gains():
    def two_in_one(p, x):
        normed = rms_norm(x @ p["embed"]) * p["gain"][None]
        return jnp.tanh(normed @ p["both"][0]) @ p["read"] + jnp.tanh(normed @ p["both"][1])

    shapes = {"embed": (12, 8), "gain": (8,), "both": (2, 8, 6), "read": (6, 6)}
    params = {name: np.asarray(value) for name, value in normals(shapes, 3).items()}
    parts = otf.trace_symmetry(two_in_one, params, X).with_rotations()
    assert parts.leaf_splits
    found = otf.canonicalize(parts, lazy(params))
    for name, value in otf.canonicalize(parts, params).items():
        np.testing.assert_array_equal(np.asarray(found[name]), value)


def test_what_was_checked_is_not_computed_to_be_checked_again(symmetry):
    counted = Lazily(model(0))
    found = otf.canonicalize(symmetry, counted.params)
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(0)), found)
    counted.looked_at.clear()
    averaged = otf.average([moved, moved])
    assert counted.looked_at == []
    np.asarray(averaged["down"])
    assert counted.looked_at == ["down", "down"]
    not_finite = model(0) | {"down": np.full(SHAPES["down"], np.nan, np.float32)}
    with pytest.raises(ValueError, match="down"):
        otf.canonicalize(symmetry, lazy(not_finite))


def test_a_gain_of_0_is_refused_when_what_is_added_to_it_is_looked_at(symmetry):
    params = model(0)
    params["gain"] = np.where(np.arange(8) == 2, 0, params["gain"])
    found = otf.canonicalize(symmetry, lazy(params))
    np.asarray(found["up"])
    with pytest.raises(ValueError, match=r"gain is 0 at units \[2\].*shift is added"):
        np.asarray(found["shift"])


def test_to_balance_scales_takes_all_leaves_at_once():
    def relu_mlp(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["v"]

    params = {"w": np.ones((12, 4), np.float32), "v": np.ones((4, 2), np.float32)}
    scaled = otf.trace_symmetry(relu_mlp, params, X).with_scales()
    with pytest.raises(ValueError, match=r"params has lazy leaves.*without with_scales\(\)"):
        otf.canonicalize(scaled, lazy(params))


def test_rotations_are_found_leaf_by_leaf(symmetry, tmp_path: Path):
    """The planted element, by Algorithm 1 in which every plan is kept on disk."""
    planted = symmetry.random(jax.random.key(1))
    # The same function in other coordinates, with other gains in its norms.
    target = dict(otf.transport(symmetry, planted, otf.canonicalize(symmetry, model(0))))
    gains = np.asarray(normals({"gain": (8,)}, 5)["gain"])
    target["last_gain"], target["read"] = gains, np.asarray(target["read"]) / gains[:, None]
    np.testing.assert_allclose(network(target, X), network(model(0), X), rtol=1e-3, atol=1e-4)

    source, target = (otf.canonicalize(symmetry, lazy(params)) for params in (model(0), target))
    method = otf.ForwardPass(progress=tmp_path / "plans")
    # Of the two calls the second finds all plans on disk.
    for alignment in [otf.align(symmetry, source, target, method=method) for _ in range(2)]:
        for name, plan in planted.items():
            np.testing.assert_allclose(alignment.plans[name], plan, atol=1e-5)
        assert alignment.objective < 1e-6
    fused = otf.fuse(symmetry, [source, target], method=otf.ForwardPass())
    for name, value in target.items():
        assert isinstance(fused[name], otf.LazyArray)
        np.testing.assert_allclose(np.asarray(fused[name]), np.asarray(value), atol=1e-5)


def test_half_precision_is_rounded_once_when_it_is_rotated(symmetry):
    """Neither the matrix nor the sums are in half precision, only what is returned."""
    plans = symmetry.random(jax.random.key(2))
    exact = {name: value.astype(jnp.bfloat16) for name, value in normals(SHAPES).items()}
    exact |= {name: jnp.ones(8, jnp.bfloat16) for name in GAINS}
    wide = {name: np.asarray(value, np.float32) for name, value in exact.items()}
    expected = otf.transport(symmetry, plans, wide)
    of_jax = jax.jit(lambda params: otf.transport(symmetry, plans, params))(exact)
    for found in (otf.transport(symmetry, plans, exact), of_jax):
        for name, value in found.items():
            assert value.dtype == jnp.bfloat16
            # The rounding of bfloat16, and what float32 leaves of sums.
            np.testing.assert_allclose(
                np.asarray(value, np.float32), expected[name], rtol=2**-8 * 1.001, atol=1e-6
            )
