"""From the words of a command line to an exit status, and the only place that shows errors."""

import importlib
import sys
from collections.abc import Sequence

from otfusion_jax.cli.console import printable
from otfusion_jax.common.packages import require_package
from otfusion_jax.tracing.registry import UnsupportedPrimitiveError

# What callers and their files can cause. All else is a mistake of ours, and has its traceback.
_SHOWN = (ValueError, FloatingPointError, ImportError, OSError, UnsupportedPrimitiveError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program; None for that of this process.

    Returns:
        The exit status: 0 if all is well, 1 if a check failed, 2 if the command cannot be carried
        out, which is said on the error stream, and 130 if it was interrupted.

    Raises:
        SystemExit: If there is no such command or flag; what there is has been shown.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        require_package("tyro", "tyro", "cli", "the command line")
        # The flags are made by tyro, which is there from here on.
        commands = importlib.import_module("otfusion_jax.cli.commands")
        return commands.run(words)
    except _SHOWN as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; nothing was written under the result's name\n")
        return 130
