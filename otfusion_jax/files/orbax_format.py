"""Orbax: a folder with the arrays of a tree, which the package `orbax-checkpoint` reads and writes.

Of its many files we look at no more than their sizes, and that none of them leads out of the
folder. Orbax says shapes and dtypes before it reads arrays, which are then bounded.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
        """Writes a folder, see `AbstractLayout.write`."""
        orbax = _package()
        tree = put_together(self.slots, arrays)
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


def read_orbax(path: Path) -> Checkpoint:
    """Reads a folder.

    Args:
        path: The folder that Orbax has written, with one tree.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the folder is damaged, has links, or would unpack to far more than it
            is.
    """
    # Before Orbax opens any of them.
    files = _files_in(path)
    stored = sum([require_regular(file) for file in files])
    orbax = _package()
    try:
        with _silent(), orbax.PyTreeCheckpointer() as checkpointer:
            described = checkpointer.metadata(path.resolve()).item_metadata
            tree = getattr(described, "tree", described)
            claimed, restore_args = _arguments(orbax, tree)
            require_bounded(claimed, stored, str(path))
            restored = checkpointer.restore(path.resolve(), restore_args=restore_args)
    except CheckpointError:
        raise
    except Exception as error:  # of Orbax and of tensorstore, of every kind
        said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} can't be read by Orbax: {said}") from None
    slots, arrays = take_apart(restored, str(path))
    return Checkpoint(path, arrays, OrbaxLayout(slots), files)


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


def _arguments(orbax: Any, tree: Any) -> tuple[int, Any]:
    """Returns how many bytes arrays are said to have, and that NumPy is to have them."""
    claimed = 0
    # Of leaves that are no arrays there is nothing to claim.
    for leaf in jax.tree_util.tree_leaves(tree):
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is not None and dtype is not None:
            claimed += math.prod(shape) * np.dtype(dtype).itemsize
    restore_args = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), tree)
    return claimed, restore_args
