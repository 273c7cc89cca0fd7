"""Checks that training learns, is deterministic and survives being killed."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train as training
from experiments.data import Dataset, load_dataset
from experiments.evaluate import accuracy
from experiments.models import ModelConfig, build_model
from experiments.train import TrainConfig, Trained, train

MODEL = ModelConfig("mlpnet")
CONFIG = TrainConfig(epochs=4, batch_size=64, learning_rate=0.1, momentum=0.9)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def uninterrupted(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(MODEL, CONFIG, digits, 0, tmp_path_factory.mktemp("uninterrupted"))


def assert_identical(result: Trained, expected: Trained):
    jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)
    np.testing.assert_array_equal(result.history, expected.history)


def test_training_learns(digits: Dataset, uninterrupted: Trained):
    apply = build_model(MODEL, digits.classes).apply
    correct = accuracy(
        lambda images: apply(uninterrupted.params, images),
        jnp.asarray(digits.test_images),
        jnp.asarray(digits.test_labels),
    )
    assert correct > 90
    assert uninterrupted.history.shape == (CONFIG.epochs, 2)
    assert uninterrupted.history[-1, 1] > 90


def test_training_is_deterministic(digits: Dataset, uninterrupted: Trained, tmp_path: Path):
    assert_identical(train(MODEL, CONFIG, digits, 0, tmp_path), uninterrupted)


def test_seeds_differ(digits: Dataset, uninterrupted: Trained, tmp_path: Path):
    other = train(MODEL, CONFIG, digits, 1, tmp_path)
    kernels = [result.params["params"]["Dense_0"]["kernel"] for result in (other, uninterrupted)]
    assert jnp.abs(kernels[0] - kernels[1]).max() > 0.01


@pytest.mark.parametrize("chunks", [1, 4, 7], ids=lambda chunks: f"killed after {chunks} chunks")
def test_killed_training_resumes_to_the_same_result(
    digits: Dataset,
    uninterrupted: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunks: int,
):
    # 22 steps an epoch in chunks of 10: killed in the first, at the start of, and in a later epoch.
    monkeypatch.setattr(training, "_CHUNK_STEPS", 10)
    run_steps, left = training._run_steps, iter(range(chunks))

    def killed(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run_steps(*args)

    monkeypatch.setattr(training, "_run_steps", killed)
    with pytest.raises(KeyboardInterrupt):
        train(MODEL, CONFIG, digits, 0, tmp_path)
    monkeypatch.setattr(training, "_run_steps", run_steps)
    resumed = train(MODEL, CONFIG, digits, 0, tmp_path)
    assert resumed.epochs_reused == (chunks - 1) // 3
    assert_identical(resumed, uninterrupted)


def test_finished_training_is_reused(
    digits: Dataset, uninterrupted: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(MODEL, CONFIG, digits, 0, tmp_path)
    monkeypatch.setattr(training, "_run_steps", None)
    again = train(MODEL, CONFIG, digits, 0, tmp_path)
    assert again.epochs_reused == CONFIG.epochs
    assert_identical(again, uninterrupted)


def test_changed_configuration_is_trained_anew(digits: Dataset, tmp_path: Path):
    train(MODEL, CONFIG, digits, 0, tmp_path)
    changed = dataclasses.replace(CONFIG, learning_rate=0.2)
    assert train(MODEL, changed, digits, 0, tmp_path).epochs_reused == 0


def test_batch_larger_than_the_data_is_an_error(digits: Dataset, tmp_path: Path):
    config = TrainConfig(epochs=1, batch_size=5000, learning_rate=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="1433 examples"):
        train(MODEL, config, digits, 0, tmp_path)


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


def test_accuracy_counts_examples_beyond_the_last_full_batch():
    labels = jnp.arange(2500, dtype=jnp.int32) % 7
    images = jax.nn.one_hot(labels.at[-10:].add(1) % 7, 7)
    assert accuracy(lambda batch: batch, images, labels) == pytest.approx(100 * 2490 / 2500)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match="mlpnet"):
        build_model(ModelConfig("vgg99"), classes=10)
