"""`otfusion fuse`: one model made of several."""

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from otfusion_jax.averaging.average import average
from otfusion_jax.averaging.statistics import StatisticsWarning
from otfusion_jax.cli.alignments import table_of_norms
from otfusion_jax.cli.console import Console
from otfusion_jax.cli.matching import CommandThatAligns
from otfusion_jax.cli.models import fitted, precision_of, results_by_name
from otfusion_jax.cli.report import Table
from otfusion_jax.cli.results import CommandWithResult
from otfusion_jax.common.typing import PyTree
from otfusion_jax.files.checkpoint import Checkpoint
from otfusion_jax.fusion.fuse import fuse
from otfusion_jax.symmetry.canonical import canonicalize
from otfusion_jax.symmetry.symmetry import Symmetry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fuse(CommandWithResult, CommandThatAligns):
    """Align models to one of them, and average what then corresponds."""

    models: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL ...")]
    """The checkpoints of the models, two or more."""
    weight: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """The weight of a model in the average, once for each model. They sum to 1; uniform by default.
    """
    reference: int = -1
    """The position of the model that the others are aligned to, and that the result is like. It is
    the last by default; the first is 0."""

    def run(self, console: Console) -> int:
        """Carries the command out, see `Command.run`."""
        self.require_matching()
        self._require_models()
        checkpoints = self.read(self.models, console)
        like = checkpoints[self.reference]
        # Before the work, which may take long, and not after it.
        self.require_name(like)
        with precision_of(checkpoints):
            symmetries = self.find_symmetries(checkpoints, like, console)
            symmetry = symmetries[self.reference]
            models = []
            for own_symmetry, checkpoint in zip(symmetries, checkpoints, strict=True):
                others = _others(checkpoints, checkpoint)
                models.append(fitted(own_symmetry, checkpoint, self.naming, others))
            # All that can be told without moving a unit has been told by now.
            if self.dry_run:
                console.show(f"{symmetry}\n\nwould fuse {len(models)} models, and write {self.out}")
                return 0
            console.step(f"fusing {len(models)} models")
            fused = fuse(
                symmetries if self.other_widths else symmetry,
                models,
                self.weight or None,
                reference=self.reference,
                method=self.chosen_method,
                solver=self.chosen_solver,
            )
            tables = {}
            # Models of several widths have no average as they are, to compare the result with.
            if not self.other_widths:
                tables["parameters"] = self._norms(symmetry, models, fused)
            arrays = results_by_name(symmetry, fused, like, self.naming)
        facts = {
            "models": [str(path) for path in self.models],
            "weights": list(self.weight) or "uniform",
            "reference": str(like.path),
        }
        return self.finish(console, symmetry, checkpoints, like, arrays, facts, tables)

    def _norms(self, symmetry: Symmetry, models: list[PyTree], fused: PyTree) -> Table:
        """Says how much is lost in the average of units that do not match: it shows in the norm."""
        if symmetry.has_form:
            # So is the result, whose norms are compared with those of the models.
            models = [canonicalize(symmetry, model) for model in models]
        with warnings.catch_warnings():
            # Said of the result already.
            warnings.simplefilter("ignore", StatisticsWarning)
            plain = average(models, self.weight or None)
        return table_of_norms(symmetry, models, plain, fused)

    def _require_models(self) -> None:
        count = len(self.models)
        if count < 2:
            raise ValueError(f"{count} models are given; give two or more")
        if not -count <= self.reference < count:
            raise ValueError(f"--reference is {self.reference}, but there are {count} models")
        if self.weight and len(self.weight) != count:
            raise ValueError(f"{len(self.weight)} --weight are given for {count} models")


def _others(checkpoints: list[Checkpoint], checkpoint: Checkpoint) -> list[Checkpoint]:
    return [other for other in checkpoints if other is not checkpoint]
