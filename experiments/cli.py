"""The command line: one subcommand per study, all of them with the same few flags."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.data import DATASETS, DatasetUnavailable
from experiments.models import MODELS
from experiments.runs import Request
from experiments.studies import STUDIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a study.

    Args:
        arguments: The command line without the program; None for that of this process.

    Returns:
        The exit status: 0 if the study ran, 2 if it cannot run here, 130 if it was interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    # TFDS and Orbax report through absl what only their own developers can use.
    logging.getLogger("absl").setLevel(logging.ERROR)
    request = Request(
        command=shlex.join(["python", "-m", "experiments", *words]),
        dataset=options.dataset,
        model=options.model,
        use_bias=options.bias,
        seeds=tuple(options.seeds),
        epochs=options.epochs,
        data_dir=options.data_dir,
        out=options.out,
    )
    try:
        STUDIES[options.study].run(request)
    except DatasetUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from the last epoch.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dataset", choices=sorted(DATASETS), default="digits")
    common.add_argument("--model", choices=sorted(MODELS), default="mlpnet")
    common.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="give the layers biases (the models of the paper have none)",
    )
    common.add_argument(
        "--seeds",
        nargs=2,
        type=int,
        default=(0, 1),
        metavar=("A", "B"),
        help="seeds of the two models (default: 0 1)",
    )
    common.add_argument("--epochs", type=int, help="instead of the number in the recipe")
    common.add_argument("--data-dir", type=Path, help="where TFDS keeps its data")
    common.add_argument("--out", type=Path, help="folder of the run (default: runs/<what runs>)")

    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    subparsers = parser.add_subparsers(dest="study", required=True, metavar="study")
    for name, study in STUDIES.items():
        subparsers.add_parser(name, parents=[common], help=study.summary, description=study.summary)
    return parser
