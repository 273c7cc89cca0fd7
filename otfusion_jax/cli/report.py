"""What a command found, as JSON for programs and as Markdown for people."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from otfusion_jax.cli.console import printable
from otfusion_jax.files.checkpoint import Checkpoint
from otfusion_jax.files.writing import require_free, written_whole
from otfusion_jax.symmetry.symmetry import Symmetry

FORMAT = "otfusion_jax.report"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values under the names of columns.

    Attributes:
        columns: The names.
        rows: For each row a value for each column: text, a number or None.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def records(self) -> list[dict[str, Any]]:
        """Returns a dict for each row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a command found.

    Attributes:
        command: The words of the command line.
        facts: Values by their names.
        tables: Tables by their names.
        text: What the library says of the symmetry; empty if there is none.
        warnings: What was warned of.
    """

    command: tuple[str, ...]
    facts: Mapping[str, Any]
    tables: Mapping[str, Table]
    text: str = ""
    warnings: Sequence[str] = ()

    def to_json(self) -> str:
        """Returns the report as JSON. The same command on the same files gives the same text."""
        # No time and no host: what is equal should look so.
        record = {
            "format": FORMAT,
            "version": VERSION,
            "command": list(self.command),
            "jax": jax.__version__,
            "facts": dict(self.facts),
            "tables": {name: table.records() for name, table in self.tables.items()},
            "symmetry": self.text,
            "warnings": list(self.warnings),
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Returns the report as Markdown."""
        # Blank lines between blocks are what Markdown tells them by.
        blocks = [f"# otfusion {self.command[1]}", f"```bash\n{shlex.join(self.command)}\n```"]
        facts = [f"- {name}: {_shown(value)}" for name, value in self.facts.items()]
        blocks.append("\n".join(facts))
        for warning in self.warnings:
            blocks.append(f"Warning: {warning}")
        for name, table in self.tables.items():
            blocks.append(f"## {name.capitalize()}")
            blocks.append(_table_in_markdown(table))
        if self.text:
            blocks.append(f"## Symmetry\n\n```text\n{self.text}\n```")
        return "\n\n".join(blocks) + "\n"

    def write(self, beside: Path) -> None:
        """Writes the report as `NAME.report.json` and `NAME.report.md`.

        Args:
            beside: The result that the report is about.

        Raises:
            ValueError: If one of the two is there already.
        """
        texts = (self.to_json(), self.to_markdown())
        for path, text in zip(report_paths(beside), texts, strict=True):
            with written_whole(path) as partial:
                partial.write_text(text, encoding="utf-8")


def in_words(symmetry: Symmetry) -> str:
    """Returns the table of a symmetry, and below it the summary.

    Args:
        symmetry: The symmetry.
    """
    # Both begin with the same line.
    _, _, summary = symmetry.summary().partition("\n\n")
    return f"{symmetry}\n\n{summary}"


def report_paths(beside: Path) -> tuple[Path, Path]:
    """Returns where the report of a result goes, as JSON and as Markdown.

    Args:
        beside: The result.
    """
    return (
        beside.with_name(f"{beside.name}.report.json"),
        beside.with_name(f"{beside.name}.report.md"),
    )


def require_free_names(target: Path) -> None:
    """Refuses a result if it, or its report, is there already.

    Args:
        target: The result to be written.

    Raises:
        ValueError: If one of the names is taken.
    """
    for path in (target, *report_paths(target)):
        require_free(path)


def table_of_files(checkpoints: Sequence[Checkpoint]) -> Table:
    """Says which files were read.

    Args:
        checkpoints: The checkpoints.

    Returns:
        A row for each file, with its SHA-256.
    """
    rows = []
    for checkpoint in checkpoints:
        for file, digest in checkpoint.digests().items():
            rows.append((str(checkpoint.path), file, digest))
    return Table(("checkpoint", "file", "sha256"), tuple(rows))


def _table_in_markdown(table: Table) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.rows:
        cells = [_shown(value).replace("|", "\\|") for value in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    # The names in a file may have the ends of lines.
    return printable(str(value)).replace("\n", "\\n")
