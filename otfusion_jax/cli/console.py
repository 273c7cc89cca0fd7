"""What a command says: progress and warnings on the error stream, results on the output."""

import dataclasses
import sys


@dataclasses.dataclass(frozen=True)
class Console:
    """Where a command's words go. Nothing else in the library writes to a stream.

    Attributes:
        quiet: Whether progress is left out.
        command: The words of the command line.
        warnings: The warnings so far, for the report.
    """

    quiet: bool
    command: tuple[str, ...]
    warnings: list[str] = dataclasses.field(default_factory=list)

    def step(self, text: str) -> None:
        """Says what is being done.

        Args:
            text: One line.
        """
        if not self.quiet:
            sys.stderr.write(printable(text) + "\n")
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """Warns, and keeps the warning for the report.

        Args:
            text: The warning.
        """
        self.warnings.append(text)
        sys.stderr.write(printable(f"warning: {text}\n"))

    def show(self, text: str) -> None:
        """Shows a result.

        Args:
            text: Any number of lines.
        """
        sys.stdout.write(printable(text.rstrip("\n")) + "\n")


def printable(text: str) -> str:
    """Escapes what a terminal would obey: the names in a file may be anything.

    Args:
        text: Any number of lines.

    Returns:
        The text with control escaped, but for the ends of lines.
    """
    characters = []
    for character in text:
        if character.isprintable() or character == "\n":
            characters.append(character)
        else:
            characters.append(repr(character)[1:-1])
    return "".join(characters)
