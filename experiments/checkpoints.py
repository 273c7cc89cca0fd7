"""Checkpoints that are known to be whole: a manifest beside each holds the digests of its files."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import orbax.checkpoint as ocp
from jaxtyping import PyTree

_MANIFEST = "manifest.json"
# One to go on from if the newest is damaged.
_KEPT = 2


class Checkpoints:
    """The newest checkpoints of one training, each a folder named by its number of epochs.

    Orbax writes and reads the arrays. Its storage format has no checksums over them, and a kill or
    a full disk can leave a part of a folder. So a checkpoint is written under another name, and
    gets its own only when the manifest in it lists the SHA-256 of every file.
    """

    def __init__(self, folder: Path):
        """Opens a folder, which need not exist yet."""
        self._folder = folder.resolve()  # Orbax takes absolute paths only

    def newest(self, like: PyTree) -> tuple[int, PyTree]:
        """Reads the newest checkpoint that is whole, and warns of those after it.

        Args:
            like: A tree with the structure, shapes and dtypes of those saved.

        Returns:
            The number and the content of the checkpoint; 0 and `like` itself if there is none.
        """
        for number in reversed(self._numbers()):
            folder = self._folder / str(number)
            damage = _damage(folder)
            if damage is None:
                with ocp.StandardCheckpointer() as orbax:
                    return number, orbax.restore(folder / "state", like)
            warnings.warn(
                f"The checkpoint {folder} is damaged: {damage}. Training goes on from the one"
                " before it, or from the start if there is none, and replaces it.",
                stacklevel=2,
            )
        return 0, like

    def save(self, number: int, state: PyTree) -> None:
        """Writes a checkpoint, and deletes those that are not among the newest up to it.

        Args:
            number: The number of epochs done, at least 1. A checkpoint of this number is replaced.
            state: A tree of arrays.
        """
        unfinished = self._folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        with ocp.StandardCheckpointer() as orbax:
            orbax.save(unfinished / "state", state)
            orbax.wait_until_finished()
        digests = {}
        for name in _files(unfinished):
            digests[name] = _digest(unfinished / name)
        (unfinished / _MANIFEST).write_text(json.dumps(digests, indent=2) + "\n")
        finished = self._folder / str(number)
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.rename(finished)
        # Those of higher numbers are damaged, or else training would have gone on from them.
        up_to_this = [earlier for earlier in self._numbers() if earlier <= number]
        for old in up_to_this[:-_KEPT]:
            shutil.rmtree(self._folder / str(old))

    def _numbers(self) -> list[int]:
        """Numbers of all checkpoints, whole or not, ascending."""
        if not self._folder.exists():
            return []
        numbers = []
        for entry in self._folder.iterdir():
            if entry.is_dir() and entry.name.isdecimal():  # `unfinished` is no number
                numbers.append(int(entry.name))
        return sorted(numbers)


def _damage(folder: Path) -> str | None:
    """Says what is wrong with a checkpoint; None if nothing is."""
    try:
        digests = json.loads((folder / _MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"it has no {_MANIFEST}"
    except (OSError, ValueError):  # ValueError: no JSON, or no text at all
        digests = None
    if not isinstance(digests, dict):
        return f"its {_MANIFEST} can't be read"
    for name, digest in digests.items():
        try:
            changed = _digest(folder / name) != digest
        except (OSError, ValueError):  # ValueError: no name that a file could have
            return f"its file {name} is missing or can't be read"
        if changed:
            return f"its file {name} has changed since it was written"
    return None


def _files(folder: Path) -> list[str]:
    """Names of all files in a folder and the folders in it, in order."""
    names = []
    for path in folder.rglob("*"):
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def _digest(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
