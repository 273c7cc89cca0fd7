"""What a checkpoint is, whatever the format of its files: arrays by name, and how to write more.

A file is data that somebody sent. Each reader checks what the file claims before it believes it, so
that one that is damaged, or made to do harm, is a `CheckpointError` that names the file: it takes
neither more memory than the file could hold nor more time than reading it. Pickles run what their
author likes, and are never opened.
"""

import abc
import dataclasses
import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# JSON becomes Python objects of up to a hundred bytes for each of these characters.
_STRUCTURE = b"{[,"
_MOST_STRUCTURE = 4_000_000
# Archives and trees may be small and say that they are huge. What compresses better than this is
# no trained network.
_FREE_BYTES = 2**28
_MOST_EXPANSION = 100
MOST_AXES = 32
_MOST_NUMBERS = 2**48


StoredArray = Any
"""An array of a checkpoint: one of NumPy, or a `LazyArray` where the checkpoint was read lazily."""


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not fit; the message names it."""


class AbstractLayout(abc.ABC):
    """How arrays are laid out in files: all of a format that is not the arrays themselves."""

    @property
    @abc.abstractmethod
    def format(self) -> str:
        """The name of the format, as in `"safetensors"`."""

    @abc.abstractmethod
    def write(self, arrays: Mapping[str, StoredArray], path: Path) -> None:
        """Writes arrays.

        Args:
            arrays: All arrays by name, of the shapes and dtypes of those that were read.
            path: The file, or the folder where the format has several files; nothing is there yet.
        """


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
        path: The file or folder.
        arrays: The arrays by name, in the order of the file. Of formats that nest, a name is the
            keys on the way, as in `params/Dense_0/kernel`. No array may be changed in place.
        layout: What else there is: metadata, how arrays are spread over files.
        files: All files that were read.
    """

    path: Path
    arrays: Mapping[str, StoredArray]
    layout: AbstractLayout
    files: tuple[Path, ...]

    @property
    def nests(self) -> bool:
        """Whether names are paths through nested dicts, joined by `/`."""
        return self.layout.format in ("msgpack", "orbax")

    def digests(self) -> dict[str, str]:
        """Returns the SHA-256 of every file, in hexadecimal, by its name in the folder."""
        folder = self.path if self.path.is_dir() else self.path.parent
        digests = {}
        for file in self.files:
            name = file.relative_to(folder).as_posix()
            with file.open("rb") as opened:
                digests[name] = hashlib.file_digest(opened, "sha256").hexdigest()
        return digests


# --- checks that several formats share


def require_regular(path: Path) -> int:
    """Refuses what is no file: opening a pipe would wait for ever.

    Args:
        path: The path of a file.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: If there is nothing, or something else than a file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file could have
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no file")
    return status.st_size


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """Reads a JSON object from bytes that may be anything.

    Args:
        content: The bytes.
        what: What to call them in messages, the file's name among it.

    Returns:
        The object.

    Raises:
        CheckpointError: If it is no JSON object in UTF-8, is nested too deeply, has a key twice, or
            would take much more memory than its text.
    """
    if sum([content.count(character) for character in _STRUCTURE]) > _MOST_STRUCTURE:
        raise CheckpointError(f"{what} has more entries than any model has arrays")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            raise CheckpointError(f"{what} has the same key twice")
        # JSON can spell halves of characters, which no file could be given as a name.
        for text in (*record, *record.values()):
            if isinstance(text, str):
                text.encode("utf-8")
        return record

    try:
        record = json.loads(content.decode("utf-8"), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {str(error)[:200]}") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{what} is no JSON object")
    return record


def checked_shape(value: Any, what: str) -> tuple[int, ...]:
    """Refuses what is no shape.

    Args:
        value: What a file says.
        what: The array's name and file, for the message.

    Returns:
        The shape.

    Raises:
        CheckpointError: If it is no list of sizes, or a long one.
    """
    is_shape = isinstance(value, list | tuple) and len(value) <= MOST_AXES
    numbers = 1
    if is_shape:
        for size in value:
            # To Python a bool is an integer.
            is_shape = is_shape and type(size) is int and size >= 0
            # Where one axis is empty, the others would count as nothing.
            numbers *= max(1, size) if is_shape else 1
    if not is_shape or numbers > _MOST_NUMBERS:
        raise CheckpointError(f"{what} has {str(value)[:80]} in the place of a shape")
    return tuple(value)


def require_bounded(claimed: int, stored: int, what: str) -> None:
    """Refuses to unpack what would be far larger than its file.

    Args:
        claimed: The bytes that the arrays are said to take in memory.
        stored: The bytes that they take on disk.
        what: What to call them in the message.

    Raises:
        CheckpointError: If more than 256 MiB would be more than a hundred times what is stored.
    """
    if claimed > max(_FREE_BYTES, _MOST_EXPANSION * stored):
        raise CheckpointError(
            f"{what} would unpack {stored:,} bytes to {claimed:,}, which no trained model does"
        )


def require_booleans(array: np.ndarray, what: str) -> None:
    """Refuses bytes of booleans that are neither 0 nor 1, on which results could depend."""
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise CheckpointError(f"{what} has booleans that are neither 0 nor 1")
