"""Align, fuse, merge and compare networks in files: safetensors, npz, msgpack, folders of Orbax.

`otfusion COMMAND --help` lists the flags of a command. A network's symmetry is traced from its
function (`--apply package.module:function --input f32[1,64]`), or read from an earlier trace
(`--symmetry file.json`). Inputs are never changed, and nothing is replaced.
"""

import warnings
from collections.abc import Sequence

import tyro

from otfusion_jax.averaging.statistics import StatisticsWarning
from otfusion_jax.cli.align_command import Align
from otfusion_jax.cli.check_command import Check
from otfusion_jax.cli.compare_command import Compare
from otfusion_jax.cli.console import Console
from otfusion_jax.cli.fuse_command import Fuse
from otfusion_jax.cli.inspect_command import Inspect
from otfusion_jax.cli.merge_command import Merge
from otfusion_jax.cli.options import Command
from otfusion_jax.symmetry.checks import SymmetryWarning

COMMANDS: dict[str, type[Command]] = {
    "inspect": Inspect,
    "align": Align,
    "fuse": Fuse,
    "merge": Merge,
    "check": Check,
    "compare": Compare,
}

AVERAGED_STATISTICS = (
    "running statistics of batch norm are averaged, and are wrong for an average that is not"
    " repaired. Measure them anew on training data: in PyTorch by"
    " torch.optim.swa_utils.update_bn(batches, model), in JAX by otfusion_jax.estimate_statistics"
)


def parse(words: Sequence[str]) -> Command:
    """Reads a command line.

    Args:
        words: The command line without the program.

    Returns:
        The command, its flags as given.

    Raises:
        SystemExit: If there is no such command or flag; what there is has been shown.
    """
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="otfusion",
        description=__doc__,
        args=list(words),
        config=[tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff],
    )


def run(words: Sequence[str]) -> int:
    """Runs a command line.

    Args:
        words: The command line without the program.

    Returns:
        The exit status: 0, or 1 if a check failed.

    Raises:
        ValueError: If the command cannot be carried out, and others that say so.
    """
    command = parse(words)
    console = Console(quiet=command.quiet, command=("otfusion", *words))
    with warnings.catch_warnings():
        # They belong to the report, without the source lines that Python puts before them.
        warnings.simplefilter("always", SymmetryWarning)
        warnings.simplefilter("always", StatisticsWarning)
        # All others are shown as they would be.
        show = warnings.showwarning

        def showwarning(message: Warning | str, category: type[Warning], *rest, **named) -> None:
            if issubclass(category, SymmetryWarning):
                console.warn(str(message))
            elif issubclass(category, StatisticsWarning):
                # Its own words are for those who call the library, who can give weights.
                console.warn(AVERAGED_STATISTICS)
            else:
                show(message, category, *rest, **named)

        warnings.showwarning = showwarning
        return command.run(console)
