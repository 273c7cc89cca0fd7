"""Checks that modules of NNX and Equinox become pure functions, and back."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import uniform
from flax import linen as nn
from flax import nnx

import otfusion_jax as otf

X = uniform(4, 5)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


@pytest.mark.usefixtures("default_promotion")
def test_nnx_modules_fuse_and_come_back():
    models = [Net(nnx.Rngs(seed)) for seed in (0, 1)]
    for model in models:
        model.eval()
    (fn, a), (other, b) = map(otf.functional, models)
    np.testing.assert_array_equal(fn(a, X), models[0](X))
    np.testing.assert_array_equal(other(a, X), models[0](X))
    symmetry = otf.trace_symmetry(fn, a, X)
    assert [(g.name, g.size) for g in symmetry.groups] == [("first/kernel/value", 8)]
    assert otf.check_symmetry(symmetry, fn, a, X) <= 1e-5
    before = np.asarray(models[0].first.kernel[...])
    fused = otf.fuse(symmetry, [a, b])
    np.testing.assert_array_equal(models[0].first.kernel[...], before)  # nothing was changed
    nnx.update(models[1], fused)
    np.testing.assert_array_equal(models[1](X), fn(fused, X))


def test_equinox_modules_fuse_and_come_back():
    models = [eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(seed)) for seed in (0, 1)]
    (fn, a), (_, b) = map(otf.functional, models)
    np.testing.assert_array_equal(fn(a, X[0]), models[0](X[0]))
    symmetry = otf.trace_symmetry(fn, a, X[0])
    assert [g.name for g in symmetry.groups] == ["layers/0/weight", "layers/1/weight"]
    assert otf.check_symmetry(symmetry, fn, a, X[0]) <= 1e-5
    fused = otf.fuse(symmetry, [a, b])
    np.testing.assert_array_equal(eqx.combine(fused, models[0])(X[0]), fn(fused, X[0]))


@pytest.mark.parametrize("module", [nn.Dense(3), jnp.tanh, {"w": 1}])
def test_anything_else_is_refused_with_what_to_do(module):
    with pytest.raises(TypeError, match="no module of NNX or Equinox. Of a Linen module take"):
        otf.functional(module)


def test_a_class_in_place_of_a_module_is_refused():
    with pytest.raises(TypeError, match="the class Net was given as the module; pass an instance"):
        otf.functional(Net)
