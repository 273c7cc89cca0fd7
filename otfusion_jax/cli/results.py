"""Commands that write a checkpoint: the name is checked before the work, and the report after."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from otfusion_jax.cli.console import Console
from otfusion_jax.cli.models import tied
from otfusion_jax.cli.options import Command
from otfusion_jax.cli.report import (
    Report,
    Table,
    in_words,
    report_paths,
    require_free_names,
    table_of_files,
)
from otfusion_jax.files.checkpoint import Checkpoint, StoredArray
from otfusion_jax.files.writing import write_like
from otfusion_jax.symmetry.symmetry import Symmetry

_SUFFIXES = {"safetensors": ".safetensors", "npz": ".npz", "msgpack": ".msgpack"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandWithResult(Command):
    """A command that writes a checkpoint, and a report beside it."""

    out: Annotated[Path, tyro.conf.arg(metavar="RESULT")]
    """The file to be written, or the folder where the format has several files. It must not exist.
    The report is beside it, RESULT.report.json and RESULT.report.md."""
    dry_run: bool = False
    """Read and check everything, say what would be done, and write nothing."""

    def require_name(self, like: Checkpoint) -> None:
        """Refuses a name for the result that is taken, or that says another format.

        Args:
            like: The checkpoint that the result will be like.

        Raises:
            ValueError: If the name is taken, or has another suffix than the format.
        """
        # Whoever reads the result goes by its suffix.
        wanted = _SUFFIXES.get(like.layout.format)
        if wanted is not None and self.out.suffix != wanted:
            raise ValueError(
                f"--out is {self.out}, but {like.path} is {like.layout.format}, and so will be the"
                f" result: give a name that ends in {wanted}"
            )
        if wanted is None and self.out.suffix in _SUFFIXES.values():
            raise ValueError(
                f"--out is {self.out}, but {like.path} is of several files, and so will be the"
                " result: give the name of a folder"
            )
        require_free_names(self.out)

    def finish(
        self,
        console: Console,
        symmetry: Symmetry,
        checkpoints: Sequence[Checkpoint],
        like: Checkpoint,
        arrays: Mapping[str, StoredArray],
        facts: Mapping[str, Any],
        tables: Mapping[str, Table],
    ) -> int:
        """Writes the result and its report.

        Args:
            console: Where it says what it does.
            symmetry: The symmetry of the models.
            checkpoints: All that were read.
            like: The one that the result is like.
            arrays: The arrays that have changed, by name.
            facts: What the command found, for the report.
            tables: Tables of it.

        Returns:
            The exit status 0.
        """
        # Permutations keep tied arrays tied; canonical forms scale one and not the other.
        for first, second in untied(like, arrays):
            console.warn(
                f"{first} and {second} are equal in {like.path}, and are not in the result; if they"
                " are tied, the function should read one of them alone"
            )
        console.step(f"writing {self.out}")
        write_like(like, arrays, self.out)
        unchanged = [name for name in like.arrays if name not in arrays]
        facts = {"result": str(self.out), "format": like.layout.format, **facts}
        facts["passed on as they were"] = unchanged
        tables = {**tables, "files": table_of_files(checkpoints)}
        report = Report(console.command, facts, tables, in_words(symmetry), console.warnings)
        # After the result: a report without one would speak of what is not there.
        report.write(self.out)
        console.show(f"wrote {self.out}, {report_paths(self.out)[1].name}")
        return 0


def untied(like: Checkpoint, arrays: Mapping[str, StoredArray]) -> list[tuple[str, str]]:
    """Finds arrays that were equal and are so no longer.

    Args:
        like: The checkpoint before.
        arrays: What has changed, by name.

    Returns:
        Pairs of names.
    """
    pairs = []
    for first, second in tied(like.arrays):
        new_first = arrays.get(first, like.arrays[first])
        new_second = arrays.get(second, like.arrays[second])
        if not np.array_equal(new_first, new_second):
            pairs.append((first, second))
    return pairs
