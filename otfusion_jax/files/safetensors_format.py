"""Safetensors: one file, or several with an index (`model.safetensors.index.json`).

A file is the length of a header, eight bytes; the header, JSON with the dtype, shape and place of
each array; and then the bytes of the arrays, without gaps. The header is checked as a whole before
any array is read. The package `safetensors` is not needed: what it writes has metadata in an order
that differs from run to run, and NumPy's side of it does not have all dtypes.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.files.checkpoint import (
    AbstractLayout,
    Checkpoint,
    CheckpointError,
    StoredArray,
    checked_shape,
    parse_json,
    require_booleans,
    require_regular,
)

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_LENGTH_BYTES = 8
# The package's own limit is three times this, of which nothing comes near.
_LONGEST_HEADER = 2**25
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    """Where an array is: its dtype and shape, and its first byte and the one behind it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class SafetensorsLayout(AbstractLayout):
    """One file.

    Attributes:
        metadata: What the header has beside arrays, text by text; None if it says nothing.
    """

    metadata: Mapping[str, str] | None

    @property
    def format(self) -> str:
        """The name of the format."""
        return "safetensors"

    def write(self, arrays: Mapping[str, StoredArray], path: Path) -> None:
        """Writes a file, see `AbstractLayout.write`."""
        header: dict[str, Any] = {}
        if self.metadata is not None:
            header[_METADATA] = dict(self.metadata)
        position = 0
        for name, array in arrays.items():
            header[name] = {
                "dtype": _NAMES[array.dtype.newbyteorder("<")],
                "shape": array.shape,
                "data_offsets": (position, position + array.nbytes),
            }
            position += array.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Arrays begin at a multiple of eight bytes, so that they can be used where they are.
        text += b" " * (-len(text) % _LENGTH_BYTES)
        with path.open("xb") as file:
            file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for array in arrays.values():
                # One that is lazy is in memory from here until it is written.
                stored = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                file.write(stored.reshape(-1).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class ShardedLayout(AbstractLayout):
    """Several files in a folder, and an index that says which array is in which.

    Attributes:
        index_name: The name of the index.
        index: What it says: `weight_map`, and perhaps `metadata`.
        shards: The layout of each file by its name.
    """

    index_name: str
    index: Mapping[str, Any]
    shards: Mapping[str, SafetensorsLayout]

    @property
    def format(self) -> str:
        """The name of the format."""
        return "sharded safetensors"

    def write(self, arrays: Mapping[str, StoredArray], path: Path) -> None:
        """Writes a folder, see `AbstractLayout.write`."""
        path.mkdir()
        for shard, layout in self.shards.items():
            inside = {}
            for name, array in arrays.items():
                if self.index["weight_map"][name] == shard:
                    inside[name] = array
            layout.write(inside, path / shard)
        text = json.dumps(self.index, indent=2) + "\n"
        (path / self.index_name).write_text(text, encoding="utf-8")


# --- reading


def read_safetensors(path: Path, *, lazily: bool = False) -> Checkpoint:
    """Reads one file.

    Args:
        path: The file.
        lazily: Whether to leave arrays on disk, to be read whenever they are looked at. The file
            has to stay as it is until then.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the file is damaged, or no safetensors.
    """
    size = require_regular(path)
    if size < _LENGTH_BYTES:
        raise CheckpointError(f"{path} is cut off: it has {size} bytes")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        data_bytes = size - _LENGTH_BYTES - length
        if data_bytes < 0 or length > _LONGEST_HEADER:
            raise CheckpointError(
                f"{path} says that its header has {length:,} bytes, and has {size:,} in all: it is"
                " cut off, or no safetensors file"
            )
        header = parse_json(file.read(length), f"the header of {path}")
        metadata = _checked_metadata(header.pop(_METADATA, None), path)
        entries = {}
        for name, record in header.items():
            entries[name] = _checked_entry(record, f"{name!r} in {path}")
        arrays = {}
        for name in _require_gapless(entries, data_bytes, path):
            what = f"{name!r} in {path}"
            start = _LENGTH_BYTES + length
            if lazily:
                entry = entries[name]
                read = functools.partial(_read_later, path, start, entry, what)
                arrays[name] = LazyArray(entry.shape, entry.dtype, read)
            else:
                arrays[name] = _read_array(file, start, entries[name], what)
    return Checkpoint(path, arrays, SafetensorsLayout(metadata), (path,))


def _read_later(path: Path, start: int, entry: _Entry, what: str) -> np.ndarray:
    # Into memory of its own and not by a map of the file, whose pages would count for as long as
    # the system likes.
    with path.open("rb") as file:
        return _read_array(file, start, entry, what)


def _read_array(file: BinaryIO, start: int, entry: _Entry, what: str) -> np.ndarray:
    file.seek(start + entry.begin)
    count = math.prod(entry.shape)
    array = np.fromfile(file, entry.dtype, count)
    if array.size != count:
        raise CheckpointError(f"{what} has become shorter while it was read")
    require_booleans(array, what)
    return array.reshape(entry.shape)


def _checked_metadata(metadata: Any, path: Path) -> dict[str, str] | None:
    if metadata is None:
        return None
    is_text = isinstance(metadata, dict)
    if is_text:
        for value in metadata.values():
            is_text = is_text and isinstance(value, str)
    if not is_text:
        raise CheckpointError(f"the metadata of {path} is no object of texts")
    return metadata


def _checked_entry(record: Any, what: str) -> _Entry:
    """Refuses an array that is not described in full, or not as large as it is said to be."""
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} is not described by dtype, shape and data_offsets")
    dtype = _DTYPES.get(record["dtype"]) if isinstance(record["dtype"], str) else None
    if dtype is None:
        known = ", ".join(_DTYPES)
        said = str(record["dtype"])[:40]
        raise CheckpointError(f"{what} has dtype {said}, which is none of {known}")
    shape = checked_shape(record["shape"], what)
    offsets = record["data_offsets"]
    is_pair = isinstance(offsets, list) and len(offsets) == 2
    if not is_pair or type(offsets[0]) is not int or type(offsets[1]) is not int:
        raise CheckpointError(f"{what} has data_offsets that are no two numbers")
    begin, end = offsets
    # Both are unbounded integers in Python, so that nothing here can overflow.
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{what} has {end - begin:,} bytes; {record['dtype']} of shape {shape} has {needed:,}"
        )
    return _Entry(dtype, shape, begin, end)


def _require_gapless(entries: Mapping[str, _Entry], data_bytes: int, path: Path) -> list[str]:
    """Returns names as arrays lie; refuses any that overlap, leave gaps, or go beyond."""
    position, before = 0, "the header"
    in_order = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
    for name in in_order:
        begin = entries[name].begin
        if begin != position:
            relation = "overlaps" if begin < position else "leaves a gap behind"
            raise CheckpointError(f"{name!r} {relation} {before} in {path}")
        position, before = entries[name].end, repr(name)
    if position != data_bytes:
        raise CheckpointError(
            f"{path} has {data_bytes:,} bytes of arrays, its header describes {position:,}: it is"
            " cut off, or was written over"
        )
    return in_order


# --- several files


def read_sharded(index_path: Path, *, lazily: bool = False) -> Checkpoint:
    """Reads all files of an index.

    Args:
        index_path: The index.
        lazily: Whether to leave arrays on disk, see `read_safetensors`.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the index or a file is damaged, if the index names files outside of its
            folder, or if an array is not where the index says.
    """
    if require_regular(index_path) > _LONGEST_HEADER:
        raise CheckpointError(f"{index_path} is too long for an index")
    index = parse_json(index_path.read_bytes(), str(index_path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path} has no weight_map")
    shards: dict[str, SafetensorsLayout] = {}
    # Only what both the index and the file agree on is read.
    found: dict[str, StoredArray] = {}
    files = [index_path]
    for shard in _shards_of(weight_map, index_path):
        part = read_safetensors(index_path.parent / shard, lazily=lazily)
        if not isinstance(part.layout, SafetensorsLayout):
            raise TypeError(part.layout)
        for name, array in part.arrays.items():
            if weight_map.get(name) != shard:
                said = weight_map.get(name, "in no file")
                raise CheckpointError(f"{name!r} is in {part.path}; by the index it is {said}")
            found[name] = array
        shards[shard] = part.layout
        files.append(part.path)
    arrays = {}
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{name!r} is not in {shard}, where {index_path} has it")
        arrays[name] = found[name]
    layout = ShardedLayout(index_path.name, index, shards)
    return Checkpoint(index_path, arrays, layout, tuple(files))


def _shards_of(weight_map: Mapping[str, Any], index_path: Path) -> Sequence[str]:
    """Returns the files of an index, each once; refuses any that is not beside it."""
    shards = []
    # Links are followed: a cache of downloads consists of them, and what is behind one is checked.
    for name, shard in weight_map.items():
        is_name = isinstance(shard, str) and shard.endswith(SUFFIX) and "\0" not in shard
        if not is_name or "/" in shard or "\\" in shard:
            raise CheckpointError(
                f"{index_path} has {name!r} in {str(shard)[:80]!r}, which is no {SUFFIX} file"
                " beside the index"
            )
        if shard not in shards:
            shards.append(shard)
    return shards
