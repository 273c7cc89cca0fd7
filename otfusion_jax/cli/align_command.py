"""`otfusion align`: one model moved into the order of units of another."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from otfusion_jax.cli.alignments import finite, table_of_groups
from otfusion_jax.cli.console import Console
from otfusion_jax.cli.matching import CommandThatAligns
from otfusion_jax.cli.models import precision_of, results_by_name
from otfusion_jax.cli.results import CommandWithResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align(CommandWithResult, CommandThatAligns):
    """Move a model's units into the order of another model's; it computes the same as before."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """The checkpoint of the model to be moved. The result is like it, unless widths differ."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The checkpoint of the model to be matched."""

    def run(self, console: Console) -> int:
        """Carries the command out, see `Command.run`."""
        self.require_matching()
        checkpoints = self.read([self.source, self.target], console)
        source, target = checkpoints
        # Of other widths, what is moved has the target's shapes.
        like = target if self.other_widths else source
        # Before the work, which may take long, and not after it.
        self.require_name(like)
        with precision_of(checkpoints):
            pair = self.read_pair(source, target, console)
            if self.dry_run:
                console.show(f"{pair.symmetry}\n\nwould align {self.source}, and write {self.out}")
                return 0
            # The distances are of what is compared: of the canonical forms, where there are any.
            alignment, moved = self.align_pair(pair, console)
            facts = {
                "squared distance before": pair.squared_distance(),
                "squared distance after": finite(alignment.objective),
                "converged": bool(alignment.converged),
            }
            tables = {
                "groups": table_of_groups(pair.symmetry, alignment),
                "parameters": pair.distances("distance before", "distance after", moved),
            }
            arrays = results_by_name(pair.onto, moved, like, self.naming)
        return self.finish(console, pair.onto, checkpoints, like, arrays, facts, tables)
