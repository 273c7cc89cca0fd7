"""Checks the models of the experiments: shapes, initialisation, symmetry, and the convolution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, normal
from zoo import randomise

import otfusion_jax as otf
from experiments.convolution import convolution
from experiments.models import Model, ModelConfig, build_model

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def shapes(model: Model) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), IMAGES)


@pytest.mark.parametrize("use_bias", [False, True], ids=["no bias", "bias"])
def test_initialisation_is_that_of_the_recipe(use_bias: bool):
    model = build_model(ModelConfig("mlpnet", use_bias), classes=10)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    widths = [784, 400, 200, 100, 10]
    for layer, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        dense = params[f"Dense_{layer}"]
        assert dense["kernel"].shape == (fan_in, fan_out)
        assert ("bias" in dense) == use_bias
        for values in jax.tree.leaves(dense):
            assert 0.7 / fan_in**0.5 < jnp.abs(values).max() <= 1 / fan_in**0.5


# What PyTorch counts in the networks of the paper; with norm and biases, in parameters alone.
@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ModelConfig("vgg11"), 9_222_848),
        (ModelConfig("resnet18"), 11_164_352),
        (ModelConfig("vgg11", use_bias=True, use_norm=True), 9_231_114),
        (ModelConfig("resnet18", use_norm=True), 11_173_952),
    ],
    ids=lambda value: value.label if isinstance(value, ModelConfig) else "",
)
def test_networks_are_those_of_the_paper(config: ModelConfig, parameters: int):
    params = shapes(build_model(config, classes=10))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_width_multiplies_the_hidden_units():
    params = shapes(build_model(ModelConfig("vgg11", width=0.25), classes=10))["params"]
    assert params["Conv_0"]["kernel"].shape == (3, 3, 3, 16)
    assert params["Conv_7"]["kernel"].shape == (3, 3, 128, 128)
    assert params["Dense_0"]["kernel"].shape == (128, 10)


# The residual stream of a stage is one group, and each block has one inside; the stem's is stage 1.
@pytest.mark.parametrize(
    ("name", "groups", "use_norm"), [("vgg11", 8, False), ("resnet18", 4 + 8, True)]
)
def test_symmetry_of_the_networks(name: str, groups: int, use_norm: bool):
    config = ModelConfig(name, use_bias=use_norm, use_norm=use_norm, width=1 / 16)
    model = build_model(config, classes=10)
    images = normal(2, 32, 32, 3, seed=1)
    apply, variables = jax.jit(model.apply), drawn(model, images)
    symmetry = otf.trace_symmetry(apply, variables, images)
    assert len(symmetry.groups) == groups
    assert otf.check_symmetry(symmetry, apply, variables, images) < 1e-4


def drawn(model: Model, inputs: jax.Array) -> dict:
    """Variables for a model. Its own would take seconds to compile."""
    return randomise(jax.eval_shape(model.init, jax.random.key(0), inputs), 0)


def example(name: str, width: float = 0.25) -> tuple[Model, dict, jax.Array]:
    """A small transformer, its variables and two inputs."""
    model = build_model(ModelConfig(name, width=width), classes=10)
    tokens = array(np.random.default_rng(1).integers(10, size=(2, 9)), np.int32)
    chosen = tokens if name == "gpt" else normal(2, 8, 12, 3, seed=1)
    return model, drawn(model, chosen), chosen


# The residual stream, and of each block the heads, what is in them twice, and the hidden layer.
@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_symmetry_of_the_transformers(name: str):
    model, variables, images = example(name)
    apply = jax.jit(model.apply)
    symmetry = otf.trace_symmetry(apply, variables, images)
    assert len(symmetry.groups) == 1 + 2 * 4
    assert otf.check_symmetry(symmetry, apply, variables, images) < 1e-4


# In half precision Flax's layer norm promotes dtypes inside.
@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize(("name", "shape"), [("vit", (2, 10)), ("gpt", (2, 9, 10))])
def test_logits_of_the_transformers(name: str, shape: tuple[int, ...]):
    model, variables, images = example(name)
    logits = jax.jit(model.apply)(variables, images)
    assert logits.shape == shape
    assert logits.dtype == jnp.float32
    assert variables["params"]["Dense_0"]["kernel"].shape == (16, 64)
    coarse = build_model(ModelConfig(name, width=0.25), 10, "bfloat16")
    half = jax.jit(coarse.apply)(variables, images)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, logits, atol=0.2)


def test_vision_transformer_sees_all_patches_and_their_places():
    model, variables, images = example("vit")
    apply = jax.jit(model.apply)
    logits = apply(variables, images)
    for changed in (images.at[:, -1, -1].add(1), images[:, ::-1]):
        assert jnp.abs(apply(variables, changed) - logits).max(axis=-1).min() > 1e-4
    with pytest.raises(ValueError, match=r"\(8, 10\) pixels can't be cut into 4 by 4"):
        model.apply(variables, images[:, :, :10])


def test_larger_vision_transformer_keeps_the_values_of_a_patch():
    params = shapes(build_model(ModelConfig("vit-tiny"), classes=10))["params"]
    assert params["Conv_0"]["kernel"].shape == (8, 8, 3, 8 * 8 * 3)
    attention = params["MultiHeadDotProductAttention_5"]
    assert attention["query"]["kernel"].shape == (192, 3, 64)
    assert "MultiHeadDotProductAttention_6" not in params


def test_language_model_does_not_look_ahead():
    model, variables, tokens = example("gpt")
    apply = jax.jit(model.apply)
    before, after = (apply(variables, x) for x in (tokens, tokens.at[:, 5].add(1) % 10))
    changed = jnp.abs(after - before).max(axis=(0, 2)) > 1e-5
    np.testing.assert_array_equal(changed, np.arange(9) >= 5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 1), (1, 1)]], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_convolution_is_the_convolution(size: int, stride: int, padding):
    images, kernel = normal(2, 7, 8, 3), normal(size, size, 3, 5, seed=1)
    strides, layout = (stride, stride), ("NHWC", "HWIO", "NHWC")
    how: dict[str, Any] = {
        "window_strides": strides,
        "padding": padding,
        "dimension_numbers": layout,
    }
    ours = jax.jit(functools.partial(convolution, **how))(images, kernel)
    expected = jax.lax.conv_general_dilated(images, kernel, **how)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match="mlpnet"):
        build_model(ModelConfig("vgg99"), classes=10)
