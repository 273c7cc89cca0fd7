"""Experiments on the alignment and fusion of networks: one subcommand for each study.

`python -m experiments STUDY --help` lists the flags of a study. A run leaves its folder behind,
with records, tables and a plot, and goes on where it was killed.
"""

import logging
import shlex
import sys
from collections.abc import Sequence

import tyro

from experiments import report
from experiments.runs import Run, Study
from experiments.studies import STUDIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a study.

    Args:
        arguments: The command line without the program; None for that of this process.

    Returns:
        The exit status: 0 if the study ran, 2 if it cannot run here, 130 if it was interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    study = parse(words)
    # TFDS and Orbax report through absl what only their own developers can use.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        study.check()
        run = Run(study)
        study.measure(run)
        report.write(run, shlex.join(["python", "-m", "experiments", *words]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from the last epoch.", file=sys.stderr)
        return 130
    return 0


def parse(words: Sequence[str]) -> Study:
    """Reads a command line.

    Args:
        words: The command line without the program.

    Returns:
        The study, its flags as given.

    Raises:
        SystemExit: There is no such study or flag; what there is has been printed.
    """
    return tyro.extras.subcommand_cli_from_dict(
        STUDIES,
        prog="python -m experiments",
        description=__doc__,
        args=list(words),
        config=[tyro.conf.DisallowNone],  # a flag that is left out is None; it can't be given
    )
