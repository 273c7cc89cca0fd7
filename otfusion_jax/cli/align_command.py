"""`otfusion align`: one model moved into the order of units of another."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from otfusion_jax.alignment.align import align
from otfusion_jax.cli.alignments import finite, table_of_distances, table_of_groups
from otfusion_jax.cli.console import Console
from otfusion_jax.cli.models import fitted, precision_of, results_by_name
from otfusion_jax.cli.results import CommandWithResult
from otfusion_jax.symmetry.canonical import canonicalize
from otfusion_jax.symmetry.transport import transport


@dataclasses.dataclass(frozen=True, kw_only=True)
class Align(CommandWithResult):
    """Move a model's units into the order of another model's; it computes the same as before."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """The checkpoint of the model to be moved. The result is like it."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """The checkpoint of the model to be matched."""

    def run(self, console: Console) -> int:
        """Carries the command out, see `Command.run`."""
        self.require_source()
        checkpoints = self.read([self.source, self.target], console)
        source, target = checkpoints
        # Before the work, which may take long, and not after it.
        self.require_name(source)
        with precision_of(checkpoints):
            symmetry = self.find_symmetry(source, console)
            params = fitted(symmetry, source, self.naming, [target])
            target_params = fitted(symmetry, target, self.naming, [source])
            if self.dry_run:
                console.show(f"{symmetry}\n\nwould align {self.source}, and write {self.out}")
                return 0
            console.step("aligning")
            if symmetry.has_form:
                # Rotations and scales are those of models in canonical form.
                params = canonicalize(symmetry, params)
                target_params = canonicalize(symmetry, target_params)
            # The distances are of what is compared: of the canonical forms, where there are any.
            alignment = align(symmetry, params, target_params)
            moved = transport(symmetry, alignment, params)
            facts = {
                "squared distance before": finite(alignment.history[0]),
                "squared distance after": finite(alignment.objective),
                "converged": bool(alignment.converged),
            }
            models = {"distance before": params, "distance after": moved}
            tables = {
                "groups": table_of_groups(symmetry, alignment),
                "parameters": table_of_distances(symmetry, models, target_params),
            }
            arrays = results_by_name(symmetry, moved, source, self.naming)
        return self.finish(console, symmetry, checkpoints, source, arrays, facts, tables)
