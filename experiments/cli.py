"""The command line: one subcommand per study, all of them with the same few flags."""

import argparse
import dataclasses
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.data import DATASETS
from experiments.models import MODELS, ModelConfig
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
    flags = vars(options)
    model = ModelConfig(
        flags.pop("model"), flags.pop("bias"), use_norm=flags.pop("norm"), width=flags.pop("width")
    )
    study = STUDIES[flags.pop("study")]
    common = {
        field.name: flags.pop(field.name)
        for field in dataclasses.fields(Request)
        if field.name in flags
    }
    common["seeds"] = tuple(common["seeds"])
    command = shlex.join(["python", "-m", "experiments", *words])
    request = Request(command=command, model=model, options=flags, **common)
    try:
        if not flags.get("weights"):
            _ = request.train_config  # what is not there is to be said before any work
        study.run(request)
    except ValueError as error:
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
        "--norm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="put batch norm after the convolutions (the models of the paper have none)",
    )
    common.add_argument(
        "--width", type=float, default=1.0, help="multiplies the units of every hidden layer"
    )
    common.add_argument("--recipe", help="of recipes.py (default: the first for model and data)")
    common.add_argument("--epochs", type=int, help="instead of the number in the recipe")
    common.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the activations in training"
    )
    common.add_argument("--train-images", type=int, help="train on so many only")
    common.add_argument("--test-images", type=int, help="evaluate on so many only")
    common.add_argument("--data-dir", type=Path, help="where TFDS keeps its data")
    common.add_argument("--out", type=Path, help="folder of the run (default: runs/<what runs>)")

    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    subparsers = parser.add_subparsers(dest="study", required=True, metavar="study")
    for name, study in STUDIES.items():
        subparser = subparsers.add_parser(
            name, parents=[common], help=study.summary, description=study.summary
        )
        subparser.add_argument(
            "--seeds",
            nargs="+" if study.any_number else len(study.seeds),
            type=int,
            default=study.seeds,
            help=f"seeds of the models (default: {' '.join(map(str, study.seeds))})",
        )
        study.arguments(subparser)
    return parser
