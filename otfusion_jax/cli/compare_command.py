"""`otfusion compare`: how far two models are from each other, before and after alignment."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro

from otfusion_jax.cli.alignments import (
    finite,
    relative_distance,
    table_of_groups,
)
from otfusion_jax.cli.console import Console
from otfusion_jax.cli.matching import CommandThatAligns
from otfusion_jax.cli.models import native, precision_of
from otfusion_jax.cli.report import Report, Table, in_words, require_free_names, table_of_files
from otfusion_jax.files.checkpoint import Checkpoint
from otfusion_jax.symmetry.symmetry import Symmetry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(CommandThatAligns):
    """Show how far two models are from each other; with a symmetry, after alignment as well."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """The checkpoint of a model."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """The checkpoint of another. Distances are relative to its norms."""
    json: bool = False
    """Show JSON in the place of Markdown."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="NAME")] = None
    """Write NAME.report.json and NAME.report.md as well."""

    def run(self, console: Console) -> int:
        """Carries the command out, see `Command.run`."""
        # Before the work, which may take long, and not after it.
        if self.report is not None:
            require_free_names(self.report)
        if self.knows_symmetry:
            self.require_matching()
        checkpoints = self.read([self.a, self.b], console)
        with precision_of(checkpoints):
            if self.knows_symmetry:
                report = self._aligned(checkpoints, console)
            else:
                report = _by_name(checkpoints, console)
        console.show(report.to_json() if self.json else report.to_markdown())
        if self.report is not None:
            report.write(self.report)
        return 0

    def _aligned(self, checkpoints: list[Checkpoint], console: Console) -> Report:
        """Compares models before and after alignment."""
        a, b = checkpoints
        pair = self.read_pair(a, b, console)
        alignment, moved = self.align_pair(pair, console)
        facts = {
            "squared distance": pair.squared_distance(),
            "squared distance when aligned": finite(alignment.objective),
        }
        tables = {
            "groups": table_of_groups(pair.symmetry, alignment),
            "parameters": pair.distances("distance", "distance when aligned", moved),
        }
        return _report(console, checkpoints, facts, tables, pair.onto)


def _by_name(checkpoints: list[Checkpoint], console: Console) -> Report:
    """Compares arrays of the same names as they are."""
    a, b = checkpoints
    rows = []
    # All names of both, in the order in which they are met.
    for name in dict.fromkeys((*a.arrays, *b.arrays)):
        in_a, in_b = a.arrays.get(name), b.arrays.get(name)
        if in_a is None or in_b is None:
            rows.append((name, f"only in {a.path if in_b is None else b.path}", None))
        elif in_a.shape != in_b.shape:
            rows.append((name, f"shapes {in_a.shape} and {in_b.shape}", None))
        elif native(in_a).dtype != native(in_b).dtype:
            rows.append((name, f"{in_a.dtype} and {in_b.dtype}", None))
        elif in_a.tobytes() == in_b.tobytes():
            rows.append((name, "equal", 0.0))
        else:
            # The distance between integers, of counters and tables, says nothing.
            is_weight = jnp.issubdtype(in_a.dtype, jnp.inexact)
            distance = relative_distance(in_a, in_b) if is_weight else None
            rows.append((name, "differs", distance))
    tables = {"arrays": Table(("name", "what", "distance"), tuple(rows))}
    return _report(console, checkpoints, {}, tables, None)


def _report(
    console: Console,
    checkpoints: list[Checkpoint],
    facts: Mapping[str, Any],
    tables: dict[str, Table],
    symmetry: Symmetry | None,
) -> Report:
    paths = {"a": str(checkpoints[0].path), "b": str(checkpoints[1].path)}
    tables = {**tables, "files": table_of_files(checkpoints)}
    text = "" if symmetry is None else in_words(symmetry)
    return Report(console.command, {**paths, **facts}, tables, text, console.warnings)
