"""msgpack, as Flax writes it: nested dicts, with arrays as an extension of their own.

An array is a pack of its shape, the name of its dtype, and its bytes. One that msgpack could not
hold is a dict of pieces. The package `msgpack` reads and writes; all lengths are bounded by that of
the file.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows the names of its dtypes from here on
import numpy as np

from otfusion_jax.common.packages import require_package
from otfusion_jax.files.checkpoint import (
    AbstractLayout,
    Checkpoint,
    CheckpointError,
    StoredArray,
    checked_shape,
    require_booleans,
    require_regular,
)
from otfusion_jax.files.trees import put_together, take_apart

SUFFIX = ".msgpack"
# Flax's numbers for what msgpack has no type for.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_PIECES = "__msgpack_chunked_array__"
_LARGEST_PIECE = 2**30
# msgpack makes a list as soon as its length is said. Models have no longer ones.
_LONGEST_LIST = 2**16
_MOST_LEVELS = 200


@dataclasses.dataclass(frozen=True)
class MsgpackLayout(AbstractLayout):
    """One file.

    Attributes:
        slots: The tree, with slots for arrays, and all else that it has as it is.
    """

    slots: Any

    @property
    def format(self) -> str:
        """The name of the format."""
        return "msgpack"

    def write(self, arrays: Mapping[str, StoredArray], path: Path) -> None:
        """Writes a file, see `AbstractLayout.write`."""
        msgpack = _package()

        def packed(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return msgpack.ExtType(_ARRAY, _bytes_of(msgpack, value))
            if isinstance(value, np.generic):
                return msgpack.ExtType(_SCALAR, _bytes_of(msgpack, np.asarray(value)))
            if isinstance(value, complex):
                pair = msgpack.packb((value.real, value.imag))
                return msgpack.ExtType(_COMPLEX, pair)
            return value

        tree = _in_pieces(put_together(self.slots, arrays))
        path.write_bytes(msgpack.packb(tree, default=packed, strict_types=True))


def _package() -> ModuleType:
    return require_package("msgpack", "msgpack", "cli", "a checkpoint in .msgpack")


def _bytes_of(msgpack: ModuleType, array: np.ndarray) -> bytes:
    return msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)


def _in_pieces(tree: Any) -> Any:
    """Cuts arrays that are too large for msgpack, as Flax does."""
    if isinstance(tree, dict):
        return {key: _in_pieces(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [_in_pieces(child) for child in tree]
    if not isinstance(tree, np.ndarray) or tree.nbytes <= _LARGEST_PIECE:
        return tree
    # As Flax numbers them, so that it can read the result.
    flat, length = tree.reshape(-1), _LARGEST_PIECE // tree.itemsize
    pieces = {}
    for number, start in enumerate(range(0, len(flat), length)):
        pieces[str(number)] = flat[start : start + length]
    shape = {str(axis): size for axis, size in enumerate(tree.shape)}
    return {_PIECES: True, "shape": shape, "chunks": pieces}


# --- reading


def read_msgpack(path: Path) -> Checkpoint:
    """Reads a file.

    Args:
        path: The file.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the file is damaged, or no msgpack of Flax.
    """
    require_regular(path)
    msgpack = _package()
    content = path.read_bytes()

    def unpacked(code: int, data: bytes) -> Any:
        if code == _COMPLEX:
            pair = msgpack.unpackb(data)
            return complex(pair[0], pair[1])
        if code not in (_ARRAY, _SCALAR):
            raise CheckpointError(f"{path} has an extension {code}, which Flax does not write")
        array = _checked_array(msgpack.unpackb(data, raw=False), path)
        return array[()] if code == _SCALAR else array

    try:
        tree = msgpack.unpackb(
            content,
            ext_hook=unpacked,
            raw=False,
            strict_map_key=True,
            max_array_len=min(_LONGEST_LIST, len(content)),
        )
    except CheckpointError:
        raise
    except Exception as error:  # msgpack has many of its own, and says little
        said = str(error)[:200] or type(error).__name__
        raise CheckpointError(f"{path} is cut off, or no msgpack: {said}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is no dict of arrays")
    slots, arrays = take_apart(_joined(tree, path, 0), str(path))
    return Checkpoint(path, arrays, MsgpackLayout(slots), (path,))


def _checked_array(record: Any, path: Path) -> np.ndarray:
    """Refuses an array whose bytes are not as many as its shape and dtype say."""
    if not isinstance(record, list | tuple) or len(record) != 3:
        raise CheckpointError(f"{path} has an array that is not shape, dtype and bytes")
    shape = checked_shape(record[0], f"an array in {path}")
    dtype = _dtype_of(record[1], path)
    content = record[2]
    # Nothing is made of the shape before it is known to fit.
    needed = math.prod(shape) * dtype.itemsize
    if not isinstance(content, bytes) or len(content) != needed:
        raise CheckpointError(f"{path} has an array of shape {shape} that is cut off")
    array = np.frombuffer(content, dtype)
    require_booleans(array, f"an array in {path}")
    return array.reshape(shape)


def _dtype_of(name: Any, path: Path) -> np.dtype:
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    # Dtypes of `ml_dtypes` are of kind V, and of fewer than eight bits they are not packed.
    is_number = dtype is not None and (dtype.kind in "biufc" or dtype.name == name)
    if dtype is None or not is_number or dtype.hasobject or dtype.fields or dtype.itemsize == 0:
        raise CheckpointError(
            f"{path} has an array of dtype {str(name)[:40]!r}, which is no number"
        )
    return dtype


def _joined(tree: Any, path: Path, level: int) -> Any:
    """Puts arrays together that were cut into pieces."""
    if level > _MOST_LEVELS:
        raise CheckpointError(f"{path} is nested more than {_MOST_LEVELS} levels deep")
    if isinstance(tree, list):
        return [_joined(child, path, level + 1) for child in tree]
    if not isinstance(tree, dict):
        return tree
    if _PIECES not in tree:
        return {key: _joined(child, path, level + 1) for key, child in tree.items()}
    sizes, pieces = _in_order(tree.get("shape"), path), _in_order(tree.get("chunks"), path)
    shape = checked_shape(sizes, f"an array in pieces in {path}")
    count = 0
    for piece in pieces:
        if not isinstance(piece, np.ndarray) or piece.ndim != 1 or piece.dtype != pieces[0].dtype:
            raise CheckpointError(f"{path} has an array in pieces that do not go together")
        count += len(piece)
    if not pieces or count != math.prod(shape):
        raise CheckpointError(f"{path} has an array of shape {shape} whose pieces are {count} long")
    return np.concatenate(pieces).reshape(shape)


def _in_order(record: Any, path: Path) -> list[Any]:
    """Returns the values of `{"0": ..., "1": ...}`."""
    keys = [str(number) for number in range(len(record))] if isinstance(record, dict) else []
    if not isinstance(record, dict) or set(record) != set(keys):
        raise CheckpointError(f"{path} has an array in pieces that are not numbered")
    return [record[key] for key in keys]
