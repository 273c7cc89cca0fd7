"""Checks that data splits are sound and that missing data is reported at once and helpfully."""

import socket
from pathlib import Path

import numpy as np
import pytest

from experiments import data


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load_dataset("digits")


def test_digits_split_has_no_overlap(digits: data.Dataset):
    # The 1797 images are all different, so that images may stand for examples.
    train = {image.tobytes() for image in digits.train_images}
    test = {image.tobytes() for image in digits.test_images}
    assert not train & test
    assert len(train) + len(test) == 1797


def test_digits_are_deterministic(digits: data.Dataset):
    again = data.load_dataset("digits")
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(digits, field), getattr(again, field))
    assert digits.fingerprint() == again.fingerprint()


def test_digits_are_normalised_images(digits: data.Dataset):
    assert digits.train_images.shape[1:] == (8, 8, 1)
    assert digits.train_images.dtype == np.float32
    assert digits.train_labels.dtype == np.int32
    assert abs(digits.train_images.mean()) < 0.01
    assert abs(digits.train_images.std() - 1) < 0.01


@pytest.mark.parametrize("test_every", [2, 5])
def test_split_is_stratified(test_every: int):
    labels = np.random.default_rng(0).integers(0, 3, size=200).astype(np.int32)
    train, test = data.stratified_split(labels, test_every)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(200))
    for label in range(3):
        share = np.sum(labels[test] == label) / np.sum(labels == label)
        assert abs(share - 1 / test_every) < 0.02


def test_fingerprint_sees_every_label(digits: data.Dataset):
    labels = digits.train_labels.copy()
    labels[-1] = (labels[-1] + 1) % 10
    changed = data.Dataset(
        "digits", digits.train_images, labels, digits.test_images, digits.test_labels, 10
    )
    assert changed.fingerprint() != digits.fingerprint()


def test_text_is_cut_into_windows():
    text = "ab" * 200 + "cbab"  # 20 windows of 20, and what is left
    found = data.characters("text", text, context=20, rare=3)
    assert found.train_images.shape == found.train_labels.shape == (19, 20)
    assert found.test_images.shape == found.test_labels.shape == (1, 20)
    assert found.classes == 3
    windows = np.concatenate([found.train_images, found.test_images])
    labels = np.concatenate([found.train_labels, found.test_labels])
    assert windows.dtype == labels.dtype == np.int32
    np.testing.assert_array_equal(windows.ravel(), [1, 2] * 200)
    # Each label is the token after; of the last, a character that no training window knows.
    np.testing.assert_array_equal(labels.ravel(), [*([1, 2] * 200)[1:], 0])


def test_rare_characters_share_a_token():
    found = data.characters("text", "é" * 5 + "a" * 50 + "z" * 4 + "b" * 341, context=10, rare=5)
    assert found.train_images.shape == (38, 10)
    np.testing.assert_array_equal(
        found.train_images.ravel()[:70], [3] * 5 + [1] * 50 + [0] * 4 + [2] * 11
    )


def test_help_texts_are_one_text():
    text = data.load_dataset("pydoc")
    images = np.concatenate([text.train_images, text.test_images])
    labels = np.concatenate([text.train_labels, text.test_labels])
    np.testing.assert_array_equal(images[1:, 0], labels[:-1, -1])
    np.testing.assert_array_equal(images[:, 1:], labels[:, :-1])
    assert 0.04 < len(text.test_labels) / len(labels) <= 0.05
    assert set(np.unique(labels)) <= set(range(text.classes))
    assert 0 < np.mean(labels == 0) < 0.01
    assert text.fingerprint() == data.load_dataset("pydoc").fingerprint()


def test_unknown_dataset_names_the_known_ones():
    with pytest.raises(ValueError, match="'digits', 'mnist'"):
        data.load_dataset("imagenet")


def test_missing_data_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(data, "_tensorflow_installed", lambda: False)
    asked = []

    def offline(*address, **_):
        asked.append(address)
        raise OSError("offline")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(data.DatasetUnavailable, match="pip install tensorflow-cpu") as caught:
        data.load_dataset("mnist", tmp_path)
    assert not asked  # downloading would be retried for minutes
    assert str(tmp_path) in str(caught.value)


def test_missing_tfds_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DatasetUnavailable, match="pip install tensorflow-datasets"):
        data.load_dataset("mnist")
