"""`otfusion inspect`: what a checkpoint holds, and what of it can move."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro

from otfusion_jax.cli.console import Console
from otfusion_jax.cli.models import fitted, precision_of, tied
from otfusion_jax.cli.options import CommandWithSymmetry
from otfusion_jax.cli.report import Report, Table, in_words, table_of_files
from otfusion_jax.files.checkpoint import Checkpoint
from otfusion_jax.files.writing import require_free, written_whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(CommandWithSymmetry):
    """Show what a checkpoint holds, and which of its axes move together."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """The checkpoint."""
    save_symmetry: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Where to save the symmetry, which then serves all models of this architecture."""
    json: bool = False
    """Show JSON in the place of Markdown."""

    def run(self, console: Console) -> int:
        """Carries the command out, see `Command.run`."""
        # Before the work, which may take long, and not after it.
        if self.save_symmetry is not None:
            self.require_source()
            require_free(self.save_symmetry)
        (checkpoint,) = self.read([self.model], console)
        text = ""
        if self.knows_symmetry:
            self.require_source()
            with precision_of([checkpoint]):
                symmetry = self.find_symmetry(checkpoint, console)
                # A symmetry that was read may be of another architecture.
                fitted(symmetry, checkpoint, self.naming)
            text = in_words(symmetry)
            if self.save_symmetry is not None:
                with written_whole(self.save_symmetry) as partial:
                    partial.write_text(symmetry.to_json(), encoding="utf-8")
                console.step(f"saved {self.save_symmetry}")
        report = _report_of(checkpoint, console, text)
        console.show(report.to_json() if self.json else report.to_markdown())
        return 0


def _report_of(checkpoint: Checkpoint, console: Console, text: str) -> Report:
    numbers = 0
    rows = []
    for name, array in checkpoint.arrays.items():
        numbers += math.prod(array.shape)
        rows.append((name, str(array.shape), str(array.dtype), not_finite(array)))
    # The digest tells this file from another of the same name, and a whole one from a damaged one.
    tables = {
        "arrays": Table(("name", "shape", "dtype", "not finite"), tuple(rows)),
        "files": table_of_files([checkpoint]),
    }
    pairs = tied(checkpoint.arrays)
    if pairs:
        tables["equal arrays, which may be tied"] = Table(("name", "equal to"), tuple(pairs))
    facts = {
        "checkpoint": str(checkpoint.path),
        "format": checkpoint.layout.format,
        "arrays": len(rows),
        "numbers": numbers,
    }
    return Report(console.command, facts, tables, text, console.warnings)


def not_finite(array: np.ndarray) -> int:
    """Counts the numbers that are NaN or infinite.

    Args:
        array: An array of any dtype.
    """
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return 0
    return int(array.size - np.count_nonzero(np.isfinite(array)))
