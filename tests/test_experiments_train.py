"""Checks that training learns, is deterministic and survives being killed."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train as training
from experiments.data import Dataset, characters, load_dataset
from experiments.evaluate import accuracy, loss_and_error
from experiments.models import ModelConfig, build_model
from experiments.train import Teacher, TrainConfig, Trained, train

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


def interrupt(chunks: int, monkeypatch: pytest.MonkeyPatch, *arguments):
    """Trains, and kills the training after some chunks of steps."""
    run_steps, left = training._run_steps, iter(range(chunks))

    def killed(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run_steps(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_run_steps", killed)
        with pytest.raises(KeyboardInterrupt):
            train(*arguments)


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
    interrupt(chunks, monkeypatch, MODEL, CONFIG, digits, 0, tmp_path)
    resumed = train(MODEL, CONFIG, digits, 0, tmp_path)
    assert resumed.epochs_reused == (chunks - 1) // 3
    assert_identical(resumed, uninterrupted)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted", "emptied"])
def test_a_damaged_checkpoint_costs_an_epoch_and_changes_nothing(
    digits: Dataset, uninterrupted: Trained, tmp_path: Path, damage: str
):
    train(MODEL, CONFIG, digits, 0, tmp_path)
    newest = next(tmp_path.glob(f"*/{CONFIG.epochs}"))
    biggest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    content = biggest.read_bytes()
    middle = len(content) // 2
    if damage == "truncated":
        biggest.write_bytes(content[:middle])
    elif damage == "flipped":
        flipped = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
        biggest.write_bytes(content[:middle] + flipped + content[middle + 64 :])
    elif damage == "deleted":
        biggest.unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    with pytest.warns(UserWarning, match=f"{newest} is damaged.*goes on from the one before"):
        resumed = train(MODEL, CONFIG, digits, 0, tmp_path)
    assert resumed.epochs_reused == CONFIG.epochs - 1
    assert_identical(resumed, uninterrupted)
    # What was damaged has been replaced.
    assert train(MODEL, CONFIG, digits, 0, tmp_path).epochs_reused == CONFIG.epochs


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


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Sixteen bright or dark 32x32 images in colour."""
    labels = np.arange(16, dtype=np.int32) % 2
    noise = np.random.default_rng(0).uniform(-1, 1, (16, 32, 32, 3)).astype(np.float32)
    images = noise + labels[:, None, None, None].astype(np.float32)
    return Dataset("pictures", images, labels, images, labels, classes=2)


# Optax and Flax promote dtypes inside.
@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize(("name", "dtype"), [("vgg11", "float32"), ("resnet18", "bfloat16")])
def test_training_updates_parameters_and_statistics(
    pictures: Dataset, tmp_path: Path, name: str, dtype: str
):
    model = ModelConfig(name, use_bias=True, use_norm=True, width=1 / 16)
    config = TrainConfig(
        3, 8, 0.05, 0.9, weight_decay=5e-4, one_cycle=True, augment=True, dtype=dtype
    )
    trained = train(model, config, pictures, 0, tmp_path)
    assert np.isfinite(trained.history).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained.params))
    mean = trained.params["batch_stats"]["BatchNorm_0"]["mean"]
    assert jnp.abs(mean).max() > 0.01


# Optax's AdamW promotes dtypes inside.
@pytest.mark.usefixtures("default_promotion")
def test_language_model_learns_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = characters("text", "to be or not to be, " * 100, context=16)
    model = ModelConfig("gpt", width=0.25)
    config = TrainConfig(3, 16, 1e-2, 0.9, weight_decay=0.1, one_cycle=True, adam=True)
    whole = train(model, config, text, 0, tmp_path / "whole")
    loss, accuracy = whole.history.T
    assert loss[0] > 1.5 * loss[-1]
    assert accuracy[0] < accuracy[-1] <= 100
    interrupt(2, monkeypatch, model, config, text, 0, tmp_path / "killed")
    resumed = train(model, config, text, 0, tmp_path / "killed")
    assert resumed.epochs_reused == 2
    assert_identical(resumed, whole)


def test_training_goes_on_from_given_variables(digits: Dataset, tmp_path: Path):
    short = dataclasses.replace(CONFIG, epochs=1)
    first = train(MODEL, short, digits, 0, tmp_path).params
    kept = jax.tree.map(np.array, first)
    tuned = train(MODEL, short, digits, 0, tmp_path, start=first)
    assert tuned.epochs_reused == 0  # another start is another training
    assert tuned.history[-1, 0] < 0.7 * train(MODEL, short, digits, 0, tmp_path).history[-1, 0]
    jax.tree.map(np.testing.assert_array_equal, first, kept)


# --- a teacher


def test_divergence_from_a_teacher():
    teacher = Teacher(MODEL, {}, temperature=3.0)
    rng = np.random.default_rng(0)
    logits, answers = rng.standard_normal((2, 5, 7)).astype(np.float32) * 4

    def softened(x: np.ndarray) -> np.ndarray:
        return np.exp(x / 3) / np.exp(x / 3).sum(-1, keepdims=True)

    p, q = softened(answers), softened(logits)
    found = teacher.loss(jnp.asarray(logits), jnp.asarray(answers))
    np.testing.assert_allclose(found, 9 * (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(
        teacher.loss(jnp.asarray(answers), jnp.asarray(answers)), 0, atol=1e-5
    )
    # At a high temperature, half the squared distance of the centred logits: Hinton, section 2.1.
    hot = Teacher(MODEL, {}, temperature=1000.0)
    gradient = jax.grad(lambda x: hot.loss(x, jnp.asarray(answers)).sum())(jnp.asarray(logits))
    difference = logits - answers
    expected = (difference - difference.mean(-1, keepdims=True)) / 7
    np.testing.assert_allclose(gradient, expected, atol=2e-2)


def test_students_learn_without_labels(
    digits: Dataset, uninterrupted: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    narrow = ModelConfig("mlpnet", width=0.25)
    teacher = Teacher(MODEL, uninterrupted.params, temperature=2.0, share=1.0)
    blind = dataclasses.replace(digits, train_labels=np.zeros_like(digits.train_labels))
    student = train(narrow, CONFIG, blind, 0, tmp_path / "whole", teacher=teacher)
    apply = build_model(narrow, digits.classes).apply
    correct = accuracy(
        lambda images: apply(student.params, images),
        jnp.asarray(digits.test_images),
        jnp.asarray(digits.test_labels),
    )
    assert correct > 85
    interrupt(3, monkeypatch, narrow, CONFIG, blind, 0, tmp_path, None, teacher)
    resumed = train(narrow, CONFIG, blind, 0, tmp_path, teacher=teacher)
    assert resumed.epochs_reused == 1
    assert_identical(resumed, student)
    # What the teacher says, and how much it counts, make another training.
    one = dataclasses.replace(CONFIG, epochs=1)
    first = train(narrow, one, blind, 0, tmp_path, teacher=teacher)
    cooler = dataclasses.replace(teacher, temperature=1.0)
    assert train(narrow, one, blind, 0, tmp_path, teacher=cooler).epochs_reused == 0
    assert train(narrow, one, blind, 0, tmp_path).epochs_reused == 0
    assert_identical(train(narrow, one, blind, 0, tmp_path, teacher=teacher), first)


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"share": 1.5}], ids=str)
def test_a_teacher_that_makes_no_sense_is_an_error(
    digits: Dataset, tmp_path: Path, wrong: dict[str, float]
):
    with pytest.raises(ValueError, match="temperature above 0 and a share of 0 to 1"):
        train(MODEL, CONFIG, digits, 0, tmp_path, teacher=Teacher(MODEL, {}, **wrong))


@pytest.mark.usefixtures("default_promotion")
def test_step_sizes_follow_the_schedule():
    def step_sizes(config: TrainConfig) -> list[float]:
        optimizer = training._optimizer(config, steps=10)
        weight = jnp.zeros(())
        state, sizes = optimizer.init(weight), []
        for _ in range(10 * config.epochs):
            update, state = optimizer.update(jnp.ones(()), state, weight)
            sizes.append(-np.asarray(update).item())
        return sizes

    drops = step_sizes(TrainConfig(3, 1, 0.1, 0.0, drops=((1, 0.5), (2, 0.1))))
    np.testing.assert_allclose(drops[9:12] + drops[19:22], [0.1, 0.05, 0.05, 0.05, 0.005, 0.005])
    cycle = step_sizes(TrainConfig(3, 1, 0.1, 0.0, one_cycle=True))
    assert np.argmax(cycle) == 9
    np.testing.assert_allclose([cycle[0], cycle[9]], [0.1 / 25, 0.1], rtol=1e-5)
    assert cycle[-1] < 0.1 / 50


def test_weights_decay():
    config = TrainConfig(1, 1, 0.1, 0.0, weight_decay=0.5)
    optimizer = training._optimizer(config, steps=1)
    weight = jnp.asarray(2.0)
    update, _ = optimizer.update(jnp.zeros(()), optimizer.init(weight), weight)
    np.testing.assert_allclose(np.asarray(update), -0.1 * 0.5 * 2)


@pytest.mark.usefixtures("default_promotion")
def test_steps_of_adamw():
    config = TrainConfig(1, 1, 0.1, 0.9, weight_decay=0.5, adam=True)
    optimizer = training._optimizer(config, steps=1)
    weights = jnp.asarray([2.0, -3.0])
    update, _ = optimizer.update(jnp.asarray([1e-3, 10.0]), optimizer.init(weights), weights)
    # At first the size of the gradient does not matter, and the decay is not divided by it.
    np.testing.assert_allclose(np.asarray(update), [-0.1 - 0.1, -0.1 + 0.15], rtol=1e-3)


def test_augmented_images_are_moved_and_flipped_crops():
    black = jnp.asarray([-1.0, -2.0]).reshape(1, 1, 1, 2)
    pixels = jnp.arange(6 * 6 * 2, dtype=jnp.float32).reshape(6, 6, 2)
    images = jnp.broadcast_to(pixels, (200, 6, 6, 2))
    augmented = np.asarray(training.augmented(jax.random.key(0), images, black))
    framed = np.broadcast_to(np.asarray(black[0]), (14, 14, 2)).copy()
    framed[4:10, 4:10] = pixels
    crops = {
        framed[i : i + 6, j : j + 6][:, ::step].tobytes(): (i, j, step)
        for i in range(9)
        for j in range(9)
        for step in (1, -1)
    }
    found = [crops[image.tobytes()] for image in augmented]  # a KeyError: no such crop
    assert {i for i, _, _ in found} == {j for _, j, _ in found} == set(range(9))
    assert 60 < sum(step == 1 for _, _, step in found) < 140


def test_batch_larger_than_the_data_is_an_error(digits: Dataset, tmp_path: Path):
    config = TrainConfig(epochs=1, batch_size=5000, learning_rate=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="1433 examples"):
        train(MODEL, config, digits, 0, tmp_path)


def test_accuracy_counts_examples_beyond_the_last_full_batch():
    labels = jnp.arange(2500, dtype=jnp.int32) % 7
    images = jax.nn.one_hot(labels.at[-10:].add(1) % 7, 7)
    assert accuracy(lambda batch: batch, images, labels) == pytest.approx(100 * 2490 / 2500)


def test_every_token_of_a_window_counts():
    labels = jnp.arange(21, dtype=jnp.int32).reshape(3, 7) % 5
    shown = 4 * jax.nn.one_hot(labels.at[0, :3].add(1) % 5, 5)
    images = jnp.arange(3, dtype=jnp.int32)  # of which the scores are those in `shown`

    def scores(batch: jax.Array) -> jax.Array:
        return shown[batch]

    assert accuracy(scores, images, labels) == pytest.approx(100 * 18 / 21)
    loss, error = loss_and_error(scores, images, labels)
    right, wrong = np.log(np.exp(4) + 4) - 4, np.log(np.exp(4) + 4)
    assert loss == pytest.approx((18 * right + 3 * wrong) / 21, rel=1e-5)
    assert error == pytest.approx(100 * 3 / 21)
