"""Checks that networks of PyTorch's names and layouts compute the same in Flax."""

import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import otfusion_jax as otf
from experiments.importer import import_pytorch, read_arrays
from experiments.models import ModelConfig, build_model

RNG = np.random.default_rng(0)
WIDTHS = (3, 4, 5)  # of the network below: images, first and second convolution


class Network(nn.Module):
    """Two convolutions, a batch norm, and two dense layers after a flattened 4x4 image."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(WIDTHS[1], (3, 3))(x))
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(WIDTHS[2], (3, 3))(x)))
        x = nn.relu(nn.Dense(7)(x.reshape(len(x), -1)))
        return nn.Dense(2)(x)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float16)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return {
        "features.0.weight": draw(4, 3, 3, 3),
        "features.0.bias": draw(4),
        "features.10.weight": draw(5, 4, 3, 3),  # a later module than 2, if an earlier string
        "features.10.bias": draw(5),
        "features.2.weight": draw(5),
        "features.2.bias": draw(5),
        "features.2.running_mean": draw(5),
        "features.2.running_var": abs(draw(5)),
        "features.2.num_batches_tracked": np.asarray(3),
        "head.0.weight": draw(7, 5 * 4 * 4),
        "head.0.bias": draw(7),
        "head.1.weight": draw(2, 7),
        "head.1.bias": draw(2),
    }


@pytest.fixture(scope="module")
def symmetry() -> otf.Symmetry:
    images = jnp.zeros((1, 4, 4, 3))
    variables = jax.eval_shape(Network().init, jax.random.key(0), images)
    return otf.trace_symmetry(Network().apply, variables, images)


def as_pytorch_computes(arrays: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The network in NumPy, on images in PyTorch's layout (n, channels, height, width)."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}

    def convolved(x: np.ndarray, module: str) -> np.ndarray:
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
        result = np.einsum("nchwij,ocij->nohw", windows, a[f"{module}.weight"])
        return result + a[f"{module}.bias"][:, None, None]

    x = np.maximum(convolved(images, "features.0"), 0)
    x = convolved(x, "features.10")
    mean, variance, weight, bias = (
        a[f"features.2.{name}"][:, None, None]
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    x = np.maximum((x - mean) / np.sqrt(variance + 1e-5) * weight + bias, 0)
    x = np.maximum(x.reshape(len(x), -1) @ a["head.0.weight"].T + a["head.0.bias"], 0)
    return x @ a["head.1.weight"].T + a["head.1.bias"]


def test_imported_network_computes_the_same(symmetry: otf.Symmetry, arrays: dict[str, np.ndarray]):
    variables = import_pytorch(symmetry, arrays)
    images = RNG.normal(size=(6, 3, 4, 4)).astype(np.float32)
    ours = np.asarray(Network().apply(variables, images.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(ours, as_pytorch_computes(arrays, images), rtol=1e-3, atol=1e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_names_overrule_the_order(symmetry: otf.Symmetry, arrays: dict[str, np.ndarray]):
    renamed = {re.sub(r"^head\.1", "a_head", name): array for name, array in arrays.items()}
    with pytest.raises(ValueError, match="a_head.weight: shape"):
        import_pytorch(symmetry, renamed)
    found = import_pytorch(symmetry, renamed, names={"a_head": "Dense_1"})
    jax.tree.map(np.testing.assert_array_equal, found, import_pytorch(symmetry, arrays))
    with pytest.raises(ValueError, match="not there: 'head.1', 'Dense_2'"):
        import_pytorch(symmetry, renamed, names={"head.1": "Dense_2"})


def test_everything_that_does_not_fit_is_named(
    symmetry: otf.Symmetry, arrays: dict[str, np.ndarray]
):
    arrays["features.0.weight"] = draw(4, 2, 3, 3)
    arrays["head.0.weight"] = draw(7, 10)
    arrays["head.1.bias"] = np.asarray([np.nan, 0])
    arrays["head.2.weight"] = draw(2, 2)
    arrays["features.2.scale"] = draw(5)
    del arrays["features.10.bias"]
    with pytest.raises(ValueError, match="do not fit the model") as error:
        import_pytorch(symmetry, arrays)
    lines = str(error.value).splitlines()[1:]
    assert sorted(lines) == [
        "  features.0.weight: shape (4, 2, 3, 3) does not fit params/Conv_0/kernel, "
        "(3, 3, 3, 4) in Flax",
        "  features.2.scale: batch norm, nothing to receive it",
        "  head.0.weight: shape (7, 10) does not fit params/Dense_0/kernel, (80, 7) in Flax",
        "  head.1.bias: values that are not finite",
        "  head.2.weight: dense layer, nothing to receive it",
        "  params/Conv_1/bias: no array for it",
    ]


def test_modules_of_a_residual_network_pair_in_order():
    config = ModelConfig("resnet18", use_norm=True, use_bias=True, width=1 / 16)
    model = build_model(config, classes=10)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    symmetry = otf.trace_symmetry(model.apply, variables, images)
    blocks = [f"layer{stage}.{block}." for stage in (1, 2, 3, 4) for block in (0, 1)]
    modules = {"conv1": "Conv_0", "bn1": "BatchNorm_0", "linear": "Dense_0"}
    count = 1
    for block in blocks:
        parts = [("conv1", "bn1"), ("conv2", "bn2")]
        if block[5] != "1" and block[7] == "0":
            parts.append(("downsample.0", "downsample.1"))
        for convolution, norm in parts:
            modules |= {block + convolution: f"Conv_{count}", block + norm: f"BatchNorm_{count}"}
            count += 1
    arrays = {}
    for theirs, mine in modules.items():
        for collection, module in ((c, v[mine]) for c, v in variables.items() if mine in v):
            for parameter, leaf in module.items():
                name = {"kernel": "weight", "scale": "weight"}.get(parameter, parameter)
                if collection == "batch_stats":
                    name = f"running_{parameter}"
                order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
                arrays[f"{theirs}.{name}"] = draw(*(leaf.shape[axis] for axis in order))
    imported = import_pytorch(symmetry, arrays)
    for theirs, mine in modules.items():
        if mine.startswith("Conv"):
            kernel = arrays[f"{theirs}.weight"].transpose(2, 3, 1, 0)
            np.testing.assert_array_equal(imported["params"][mine]["kernel"], kernel)
        if mine.startswith("Batch"):
            mean = arrays[f"{theirs}.running_mean"]
            np.testing.assert_array_equal(imported["batch_stats"][mine]["mean"], mean)


def test_files_are_read_without_unpickling(tmp_path: Path):
    arrays = {"a.weight": draw(2, 3), "b": np.arange(4)}
    save_file(arrays, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **arrays)  # pyright: ignore[reportArgumentType]
    for name in ("x.safetensors", "x.npz"):
        jax.tree.map(np.testing.assert_array_equal, read_arrays(tmp_path / name), arrays)
    np.savez(tmp_path / "objects.npz", a=np.asarray([{}], dtype=object))
    (tmp_path / "x.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00")
    for name in ("objects.npz", "x.pt", "torn.safetensors", "missing.npz"):
        with pytest.raises(ValueError, match=name):
            read_arrays(tmp_path / name)
