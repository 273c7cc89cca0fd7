"""Writing whole: under another name first, and renamed when all of it is on disk.

Whoever looks sees nothing under the result's name, or all of it, at whatever time the process is
killed. What was being written stays behind as `.NAME.PID.partial`, and can be deleted.
"""

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.files.checkpoint import Checkpoint, CheckpointError, StoredArray


def write_like(checkpoint: Checkpoint, arrays: Mapping[str, StoredArray], target: Path) -> None:
    """Writes other values of a checkpoint: in its format, dtypes, names, metadata and files.

    Args:
        checkpoint: The checkpoint that was read; its files are not touched.
        arrays: Arrays by name, of the shapes in the checkpoint. Those left out stay as they were.
            Those that are lazy are read one by one, as they are written.
        target: The file or folder to be written, which must not exist.

    Raises:
        CheckpointError: If there is something under that name, or if arrays are unknown, of other
            shapes, or out of the range of the file's dtype, listing all of them.
    """
    values, wrong = {}, []
    for name in arrays:
        if name not in checkpoint.arrays:
            wrong.append(f"  {name}: not in {checkpoint.path}")
    for name, old in checkpoint.arrays.items():
        new = arrays.get(name, old)
        if new.shape != old.shape:
            wrong.append(f"  {name}: shape {new.shape}, expected {old.shape}")
            continue
        if isinstance(new, LazyArray):
            read = functools.partial(_narrowed, new, old.dtype, f"{target} was not written: {name}")
            values[name] = LazyArray(new.shape, old.dtype, read)
            continue
        # A float32 may be beyond a float16: the check below tells that by name.
        with np.errstate(over="ignore"):
            values[name] = new.astype(old.dtype, copy=False)
        if name in arrays and _overflows(new, values[name]):
            wrong.append(f"  {name}: beyond the range of {old.dtype}")
    if wrong:
        raise CheckpointError(f"{target} was not written:\n" + "\n".join(wrong))
    with written_whole(target) as partial:
        checkpoint.layout.write(values, partial)


def _narrowed(array: LazyArray, dtype: np.dtype, what: str) -> np.ndarray:
    """Reads an array and converts it to the dtype of a file."""
    wide = np.asarray(array)
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype, copy=False)
    if _overflows(wide, narrow):
        raise CheckpointError(f"{what} is beyond the range of {dtype}")
    return narrow


def _overflows(wide: np.ndarray, narrow: np.ndarray) -> bool:
    """Whether finite numbers have become infinite."""
    if wide.dtype == narrow.dtype or wide.dtype.kind in "biu":
        return False
    finite_before = np.isfinite(wide).all()
    return bool(finite_before and not np.isfinite(narrow.astype(wide.dtype)).all())


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Gives a path to write a file or a folder to, and renames it at the end.

    Args:
        target: The name that it will have.

    Yields:
        The path, beside the target, where nothing is yet.

    Raises:
        CheckpointError: If there is something under that name already, or no folder to hold it.
    """
    require_free(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    _remove(partial)
    try:
        yield partial
        _sync(partial)
        _rename(partial, target)
        _sync_folder(target.parent)
    finally:
        _remove(partial)


def require_free(target: Path) -> None:
    """Refuses a name that is taken: nothing that is there is ever replaced.

    Args:
        target: The file or folder to be written.

    Raises:
        CheckpointError: If there is something, or if the folder around it is not there.
    """
    # A link that leads nowhere does not exist, and would be written through.
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} is there already; nothing is replaced: give another name")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is no folder; make it before")


def _rename(partial: Path, target: Path) -> None:
    """Gives a file or a folder its name, unless another process has taken it by now."""
    if partial.is_file():
        try:
            os.link(partial, target)
        except FileExistsError:
            raise CheckpointError(f"{target} was written by another process meanwhile") from None
        except OSError:
            pass  # a file system without links
        else:
            return
    # A file would be replaced, and so would an empty folder.
    require_free(target)
    partial.rename(target)


def _sync(path: Path) -> None:
    """Waits until a file, or all of a folder, is on disk: a name must not come before content."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            _sync(entry)
        _sync_folder(path)
    else:
        with path.open("rb") as opened:
            os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    # Not every system lets folders be opened.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
