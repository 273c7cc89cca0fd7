"""npz: a zip archive with one npy file for each array.

What an archive says of its sizes is compared with what its arrays' headers say before anything is
unpacked. Objects would be pickles, and are refused by name.
"""

import dataclasses
import io
import math
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from otfusion_jax.files.checkpoint import (
    AbstractLayout,
    Checkpoint,
    CheckpointError,
    StoredArray,
    checked_shape,
    require_booleans,
    require_bounded,
    require_regular,
)

SUFFIX = ".npz"
_NPY = ".npy"
_MOST_MEMBERS = 2**17
# As much as a header of an array without fields may take.
_LONGEST_HEADER = 10_000
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# As readers of archives raise them, of what the archive holds.
_DAMAGE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)
_DAMAGE += (NotImplementedError, OverflowError, SyntaxError, KeyError, IndexError, TypeError)


@dataclasses.dataclass(frozen=True)
class NpzLayout(AbstractLayout):
    """One archive.

    Attributes:
        compressions: How each array is compressed, a constant of `zipfile`.
        column_major: The arrays whose first axis is the fastest, as the file has them.
    """

    compressions: Mapping[str, int]
    column_major: frozenset[str]

    @property
    def format(self) -> str:
        """The name of the format."""
        return "npz"

    def write(self, arrays: Mapping[str, StoredArray], path: Path) -> None:
        """Writes an archive, see `AbstractLayout.write`."""
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                order = "F" if name in self.column_major else "C"
                # Of a fixed date: the same arrays give the same file.
                member = zipfile.ZipInfo(name + _NPY)
                member.compress_type = self.compressions[name]
                with archive.open(member, "w", force_zip64=True) as file:
                    np.lib.format.write_array(
                        file, np.asarray(array, order=order), allow_pickle=False
                    )


def read_npz(path: Path) -> Checkpoint:
    """Reads an archive.

    Args:
        path: The file.

    Returns:
        The checkpoint. Arrays are in the byte order of the file.

    Raises:
        CheckpointError: If the file is damaged, no npz, holds objects, or would unpack to far more
            than it is.
    """
    size = require_regular(path)
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            # zipfile warns of names that come twice, which are refused here.
            warnings.simplefilter("ignore")
            return _read_archive(archive, path, size)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path} can't be read: {str(error)[:200]}") from None


def _read_archive(archive: zipfile.ZipFile, path: Path, size: int) -> Checkpoint:
    members = archive.infolist()
    if len(members) > _MOST_MEMBERS:
        raise CheckpointError(f"{path} has {len(members):,} members, more than a model has arrays")
    # zip says how large each member will be, and unpacking stops there.
    claimed = sum([member.file_size for member in members])
    require_bounded(claimed, size, str(path))
    arrays, compressions, column_major = {}, {}, set()
    for member in members:
        name = member.filename.removesuffix(_NPY)
        what = f"{name!r} in {path}"
        if not member.filename.endswith(_NPY) or name in arrays:
            raise CheckpointError(f"{what} is no array, or is there twice")
        if member.compress_type not in _COMPRESSIONS or member.flag_bits & 1:
            raise CheckpointError(f"{what} is encrypted, or compressed in a way npz has not")
        with archive.open(member) as file:
            array, is_column_major = _read_array(file, member.file_size, what)
        arrays[name] = array
        compressions[name] = member.compress_type
        if is_column_major:
            column_major.add(name)
    layout = NpzLayout(compressions, frozenset(column_major))
    return Checkpoint(path, arrays, layout, (path,))


def _read_array(file: IO[bytes], size: int, what: str) -> tuple[np.ndarray, bool]:
    """Reads one npy file, and whether its first axis is the fastest."""
    shape, is_column_major, dtype, header_bytes = _read_header(file, what)
    if dtype.hasobject or dtype.kind not in "biufc":
        raise CheckpointError(
            f"{what} has dtype {dtype}, which is no number; NumPy saves bfloat16 so: save it as"
            " safetensors, or as float32"
        )
    shape = checked_shape(shape, what)
    needed = math.prod(shape) * dtype.itemsize
    if needed != size - header_bytes:
        raise CheckpointError(
            f"{what} has {size - header_bytes:,} bytes; {dtype} of shape {shape} has {needed:,}"
        )
    # Once more than there is: only at the end does zipfile compare the checksum.
    content = file.read(needed + 1)
    if len(content) != needed:
        raise CheckpointError(f"{what} is cut off")
    array = np.frombuffer(content, dtype)
    require_booleans(array, what)
    return array.reshape(shape, order="F" if is_column_major else "C"), is_column_major


def _read_header(file: IO[bytes], what: str) -> tuple[Any, bool, np.dtype, int]:
    """Returns shape, order and dtype of an npy file, and how many bytes say so."""
    # The magic, the version, and the length of the header, of two bytes or of four.
    beginning = io.BytesIO(file.read(12))
    version = np.lib.format.read_magic(beginning)
    if version not in ((1, 0), (2, 0)):
        raise CheckpointError(f"{what} has an npy header of version {version}")
    length_bytes = 2 if version == (1, 0) else 4
    length = int.from_bytes(beginning.getvalue()[8 : 8 + length_bytes], "little")
    if length > _LONGEST_HEADER:
        raise CheckpointError(f"{what} has a header of {length:,} bytes")
    header_bytes = 8 + length_bytes + length
    rest = file.read(header_bytes - 12)
    header = io.BytesIO(beginning.getvalue()[8:] + rest)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_column_major, dtype = read(header, max_header_size=_LONGEST_HEADER)
    return shape, is_column_major, dtype, header_bytes
