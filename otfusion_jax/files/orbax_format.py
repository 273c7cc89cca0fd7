"""Orbax: a folder with the arrays of a tree, which the package `orbax-checkpoint` reads and writes.

Of its many files we look at no more than their sizes, and that none of them leads out of the
folder. Orbax says shapes and dtypes before it reads arrays, which are then bounded. It also reads
one array of a tree by itself, which is how a folder is read lazily.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.common.packages import require_package
from otfusion_jax.files.checkpoint import (
    AbstractLayout,
    Checkpoint,
    CheckpointError,
    StoredArray,
    require_bounded,
    require_regular,
)
from otfusion_jax.files.trees import put_together, take_apart

MARKS = ("_METADATA", "_CHECKPOINT_METADATA")
"""Files that folders of Orbax have."""
_MOST_FILES = 2**20


@dataclasses.dataclass(frozen=True)
class OrbaxLayout(AbstractLayout):
    """One folder, written by one process.

    Attributes:
        slots: The tree, with slots for arrays.
    """

    slots: Any

    @property
    def format(self) -> str:
        """The name of the format."""
        return "orbax"

    def write(self, arrays: Mapping[str, StoredArray], path: Path) -> None:
        """Writes a folder, see `AbstractLayout.write`.

        Orbax takes a tree as a whole, so that all arrays are in memory, even if they were lazy.
        """
        orbax = _package()
        in_memory = {name: np.asarray(array) for name, array in arrays.items()}
        tree = put_together(self.slots, in_memory)
        with _silent(), orbax.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.resolve(), tree)
            checkpointer.wait_until_finished()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps Orbax from logging: its reports are for its developers, and its errors are raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _package() -> Any:
    return require_package("orbax.checkpoint", "orbax-checkpoint", "cli", "an Orbax folder")


def read_orbax(path: Path, *, lazily: bool = False) -> Checkpoint:
    """Reads a folder.

    Args:
        path: The folder that Orbax has written, with one tree.
        lazily: Whether to leave arrays on disk, to be read whenever they are looked at; single
            numbers are read. The folder has to stay as it is until then.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the folder is damaged, has links, or would unpack to far more than it
            is.
        ImportError: If Orbax is not installed, or lazily one that reads no single array.
    """
    if lazily and not hasattr(_package(), "PLACEHOLDER"):
        raise ImportError(
            "to read a folder of Orbax array by array takes a newer one: pip install "
            '"orbax-checkpoint>=0.11.14"'
        )
    # Before Orbax opens any of them.
    files = _files_in(path)
    stored = sum([require_regular(file) for file in files])
    with _of_orbax(path) as (_, checkpointer):
        described = checkpointer.metadata(path.resolve()).item_metadata
        tree = getattr(described, "tree", described)
        leaves, treedef = jax.tree_util.tree_flatten(tree)
        require_bounded(_claimed_bytes(leaves), stored, str(path))
    wanted = []
    for number, leaf in enumerate(leaves):
        if not lazily or not _is_array(leaf):
            wanted.append(number)
    values = _restored(path, tree, wanted)
    for number in set(range(len(leaves))).difference(wanted):
        shape, dtype = tuple(leaves[number].shape), np.dtype(leaves[number].dtype)
        read = functools.partial(_read_later, path, tree, number, shape, dtype)
        values[number] = LazyArray(shape, dtype, read)
    slots, arrays = take_apart(treedef.unflatten(values), str(path))
    return Checkpoint(path, arrays, OrbaxLayout(slots), files)


@contextlib.contextmanager
def _of_orbax(path: Path) -> Iterator[tuple[Any, Any]]:
    """Gives the package and a reader of a folder; says of errors of any kind whose they are."""
    orbax = _package()
    try:
        with _silent(), orbax.PyTreeCheckpointer() as checkpointer:
            yield orbax, checkpointer
    except CheckpointError:
        raise
    except Exception as error:  # of Orbax and of tensorstore, of every kind
        said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} can't be read by Orbax: {said}") from None


def _is_array(described: Any) -> bool:
    """Whether what Orbax says of a leaf is that of an array of one axis or more."""
    shape, dtype = getattr(described, "shape", None), getattr(described, "dtype", None)
    return bool(shape) and dtype is not None


def _restored(path: Path, tree: Any, wanted: Sequence[int]) -> list[Any]:
    """Reads some leaves of a tree, which is described by Orbax; of the others there is a mark."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    with _of_orbax(path) as (orbax, checkpointer):
        item = None
        if len(wanted) < len(leaves):
            items = [orbax.PLACEHOLDER] * len(leaves)
            for number in wanted:
                items[number] = leaves[number]
            item = treedef.unflatten(items)
        by_numpy = orbax.RestoreArgs(restore_type=np.ndarray)
        of_all = treedef.unflatten([by_numpy] * len(leaves))
        request = orbax.args.PyTreeRestore(item=item, restore_args=of_all)
        restored = checkpointer.restore(path.resolve(), args=request)
    return treedef.flatten_up_to(restored)


def _read_later(
    path: Path, tree: Any, number: int, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    array = _restored(path, tree, [number])[number]
    if array.shape != shape or array.dtype != dtype:
        raise CheckpointError(f"{path} has become another checkpoint while it was read")
    return array


def _files_in(folder: Path) -> tuple[Path, ...]:
    """Returns all files in a folder and below; refuses links, which may lead anywhere."""
    files = []
    for entry in sorted(folder.rglob("*")):
        if entry.is_symlink():
            raise CheckpointError(f"{entry} is a link, which could lead out of {folder}")
        if not entry.is_dir():
            files.append(entry)
        if len(files) > _MOST_FILES:
            raise CheckpointError(f"{folder} has more than {_MOST_FILES:,} files")
    return tuple(files)


def _claimed_bytes(described: Sequence[Any]) -> int:
    """Returns how many bytes arrays are said to have. Of other leaves there is nothing to claim."""
    claimed = 0
    for leaf in described:
        if _is_array(leaf):
            claimed += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return claimed
