"""Datasets as NumPy arrays in memory, by name; the only module that knows where data comes from.

`DATASETS`, at the end, names them all: a function, or an object that is called like one, reads
each. Images come normalised, a text as windows of tokens in the same place, so that nothing after
this module asks which it has.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, Int32, Num

# How many characters a window of a text has.
_CONTEXT = 64
# How often a character must occur to have a token of its own.
_RARE = 20
# One window of a text in so many is for testing: the last ones.
_TEST_EVERY = 20


class DatasetUnavailable(ValueError):
    """The data cannot be read on this machine; the message says what to do about it."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image dataset, normalised and ready for a model; or a text in the same place.

    The "images" of a text are windows of tokens, int32 `[n, context]`, and its labels are the
    tokens that follow each of them, of the same shape.

    Attributes:
        name: The name that the dataset is registered under.
        train_images: The normalised images to train on, float32 `[train, height, width, channels]`.
        train_labels: Their classes, int32 `[train]`, each in `range(classes)`.
        test_images: The images to evaluate on, float32 `[test, height, width, channels]`.
        test_labels: Their classes, int32 `[test]`.
        classes: The number of classes, or of different tokens.
    """

    name: str
    train_images: Num[np.ndarray, "train ..."]
    train_labels: Int32[np.ndarray, "train ..."]
    test_images: Num[np.ndarray, "test ..."]
    test_labels: Int32[np.ndarray, "test ..."]
    classes: int

    def part(
        self,
        train: slice | np.ndarray = slice(None),
        test: slice | np.ndarray = slice(None),
    ) -> "Dataset":
        """Returns the dataset of some of the examples.

        Args:
            train: Which examples of the training split to keep, as NumPy indexes them.
            test: Which examples of the test split to keep, likewise.

        Returns:
            A dataset of the same name.
        """
        return dataclasses.replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )

    def fingerprint(self) -> str:
        """Returns a hexadecimal digest of the training split: equal digests, equal data."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels):
            # Bytes alone do not tell arrays of different shapes or dtypes apart.
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_dataset(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Reads a registered dataset into memory.

    Args:
        name: A key of `DATASETS`.
        data_dir: The folder where TFDS keeps its data; None for TFDS's own default. Data that comes
            with a package is read from the package.

    Returns:
        The normalised dataset; the same name and files always give the same arrays in one order.

    Raises:
        ValueError: No dataset has this name.
        DatasetUnavailable: The data, or a package that reads it, is not on this machine.
    """
    if name not in DATASETS:
        raise ValueError(f"There is no dataset {name!r}; choose one of {sorted(DATASETS)}.")
    return DATASETS[name](name, data_dir)


def stratified_split(
    labels: Int32[np.ndarray, " n"], test_every: int
) -> tuple[Int32[np.ndarray, " train"], Int32[np.ndarray, " test"]]:
    """Splits examples so that every class has the same share in both parts, with no randomness.

    Args:
        labels: The class of each example.
        test_every: Every `test_every`-th example of each class, in order, goes to the test part.

    Returns:
        The indices of the training part and those of the test part, both ascending.
    """
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test[members[::test_every]] = True
    train_indices = np.flatnonzero(~test).astype(np.int32)
    test_indices = np.flatnonzero(test).astype(np.int32)
    return train_indices, test_indices


def _normalise(
    images: np.ndarray,
    scale: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float32[np.ndarray, "n height width channels"]:
    """Maps raw pixels to `(pixel / scale - mean) / std`, channel by channel."""
    # All in float32: a float64 copy of CIFAR-10 would take more than a gigabyte.
    pixels = images.astype(np.float32) / np.float32(scale)
    centred = pixels - np.asarray(mean, np.float32)
    return centred / np.asarray(std, np.float32)


def _digits(name: str, data_dir: str | Path | None) -> Dataset:
    """Scikit-learn's bundled 8x8 digits: 1437 for training, 360 for test or thereabouts."""
    del data_dir
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetUnavailable(
            "The digits come with scikit-learn, which is not installed: `pip install scikit-learn`."
        ) from error
    raw = cast(Any, load_digits())
    labels = raw.target.astype(np.int32)
    pixels = raw.images[..., None]  # one channel
    images = _normalise(pixels, 16.0, mean=(0.3053,), std=(0.3760,))
    train, test = stratified_split(labels, test_every=5)
    return Dataset(
        name,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=10,
    )


def characters(name: str, text: str, context: int = _CONTEXT, rare: int = _RARE) -> Dataset:
    """Cuts a text into windows of characters, with no randomness.

    Args:
        name: The name of the dataset.
        text: A text, long enough for a few windows.
        context: The number of characters of a window; the next window starts where one ends.
        rare: Characters that occur less often than this in the training part share token 0.

    Returns:
        The windows in the order of the text, the last twentieth of them for testing.
    """
    # Four bytes a character, so that NumPy sees the code points.
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    # The last label is the character after the last window: one character is kept for it.
    windows = (len(code_points) - 1) // context
    train = windows - windows // _TEST_EVERY
    # What is known is read off the training part alone.
    read = code_points[: train * context]
    characters_seen, occurrences = np.unique(read, return_counts=True)
    known = characters_seen[occurrences >= rare]
    position = np.searchsorted(known, code_points)
    # `searchsorted` gives len(known) for what is above all: a 0, which no text has, stands there.
    is_known = np.append(known, 0)[position] == code_points
    tokens = np.where(is_known, position + 1, 0).astype(np.int32)

    end = windows * context
    images = tokens[:end].reshape(windows, context)
    labels = tokens[1 : end + 1].reshape(windows, context)
    return Dataset(
        name,
        train_images=images[:train],
        train_labels=labels[:train],
        test_images=images[train:],
        test_labels=labels[train:],
        classes=len(known) + 1,
    )


def _pydoc(name: str, data_dir: str | Path | None) -> Dataset:
    """What Python's `help` knows of the language, as text; it differs from version to version."""
    del data_dir
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DatasetUnavailable(
            "The help texts are a part of Python's standard library that this installation lacks"
            " (the module pydoc_data.topics); some distributions package it apart."
        ) from error
    # Topics quote each other at length. A dictionary keeps each paragraph once: otherwise a third
    # of the test text would be known by heart.
    paragraphs: dict[str, None] = {}
    for topic in sorted(topics):
        paragraphs.update(dict.fromkeys(topics[topic].split("\n\n")))
    return characters(name, "\n\n".join(paragraphs))


@dataclasses.dataclass(frozen=True)
class _FromTfds:
    """Reads an image classification dataset of TFDS.

    Attributes:
        mean: The mean of each channel over the training split, of pixels between 0 and 1.
        std: The standard deviation of each channel, likewise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, name: str, data_dir: str | Path | None) -> Dataset:
        """Reads both splits; see `load_dataset`."""
        builder = _prepared_builder(name, data_dir)
        train_images, train_labels = self._split(builder, "train")
        test_images, test_labels = self._split(builder, "test")
        classes = builder.info.features["label"].num_classes
        return Dataset(name, train_images, train_labels, test_images, test_labels, classes)

    def _split(self, builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads the images and labels of one split, in the order of its files."""
        if _file_format(builder) == "array_record":
            source = builder.as_data_source(split=split)
            # One bulk read: iterating over the source takes three times as long.
            rows = source.__getitems__(range(len(source)))
            images = np.stack([row["image"] for row in rows])
            labels = np.asarray([row["label"] for row in rows])
        else:
            import tensorflow_datasets as tfds

            # shuffle_files=False is the default, so the order is that of the files.
            whole: Any = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
            images = whole["image"]
            labels = whole["label"]
        pixels = _normalise(images, 255.0, self.mean, self.std)
        return pixels, labels.astype(np.int32)


def _prepared_builder(name: str, data_dir: str | Path | None) -> Any:
    """Returns a TFDS builder whose data can be read here, preparing it first where that works.

    TFDS itself would retry a failing download for minutes and then blame a missing method, so
    everything that can be known beforehand is asked beforehand.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise DatasetUnavailable(
            f"{name} is read through TFDS, which is not installed:"
            " `pip install tensorflow-datasets array_record`. Or use --dataset digits."
        )
    import tensorflow_datasets as tfds

    # Without a file format TFDS takes whichever is already there.
    builder = tfds.builder(name, data_dir=data_dir)
    if builder.is_prepared():
        file_format = _file_format(builder)
        if file_format != "array_record" and not _tensorflow_installed():
            raise DatasetUnavailable(
                f"{name} in {builder.data_dir} is stored as {file_format}, which only TensorFlow"
                " reads. Run `pip install tensorflow-cpu`, or prepare it as array_record in"
                " another folder and name that with --data-dir. Or use --dataset digits."
            )
        return builder
    if not _tensorflow_installed():
        raise DatasetUnavailable(
            f"{name} is not in {builder.data_dir}, and TFDS needs TensorFlow, which is not"
            " installed, to download and prepare it. Run `pip install tensorflow-cpu` once, or"
            " name the folder that holds a prepared copy with --data-dir. Or use --dataset digits."
        )
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    urls: Any = builder.url_infos
    _ask_for(name, next(iter(urls)))
    builder.download_and_prepare()
    return builder


def _ask_for(name: str, url: str) -> None:
    """Checks that the server of a download answers: TFDS would retry for minutes."""
    import requests

    try:
        requests.head(url, timeout=10)
    except requests.RequestException as error:
        raise DatasetUnavailable(
            f"{name} is not on this machine, and {url} does not answer ({type(error).__name__})."
            " Get online once, or name the folder that holds a prepared copy with --data-dir. Or"
            " use --dataset digits."
        ) from error


def _file_format(builder: Any) -> str:
    """Returns how TFDS has stored a dataset, such as `array_record` or `tfrecord`."""
    return builder.info.file_format.value


def _tensorflow_installed() -> bool:
    """Whether TensorFlow could be imported; finding out does not import it."""
    return importlib.util.find_spec("tensorflow") is not None


# The one place that names the datasets. A new one needs a line here, and a recipe in recipes.py.
DATASETS: dict[str, Callable[[str, str | Path | None], Dataset]] = {
    "cifar10": _FromTfds(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "digits": _digits,
    "mnist": _FromTfds(mean=(0.1307,), std=(0.3081,)),
    "pydoc": _pydoc,
}
