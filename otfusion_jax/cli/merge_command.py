"""`otfusion merge`: one model of several, by whichever way is best on inputs that are given."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from otfusion_jax.cli.alignments import finite
from otfusion_jax.cli.console import Console
from otfusion_jax.cli.functions import load_function
from otfusion_jax.cli.models import fitted, native, precision_of, results_by_name
from otfusion_jax.cli.options import CommandWithFunction, shapes_of
from otfusion_jax.cli.report import Table
from otfusion_jax.cli.results import CommandWithResult
from otfusion_jax.files.formats import read_checkpoint
from otfusion_jax.files.npz_format import SUFFIX as NPZ
from otfusion_jax.files.safetensors_format import SUFFIX as SAFETENSORS
from otfusion_jax.fusion.merge import merge
from otfusion_jax.fusion.merge_report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(CommandWithResult, CommandWithFunction):
    """Try what there is to fuse models, and keep what answers most like they do on average.

    It runs the network, so that it needs --apply, and --data or --input. Rotations and signs are
    tried where the network allows them.
    """

    models: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL ...")]
    """The checkpoints of the models, two or more. The result is like the last."""
    outputs: Literal["logits", "values"]
    """What the function returns: logits of classes along the last axis, or other numbers."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Inputs without labels, npz or safetensors: an array for each input of the function, with
    samples along the first axis. They are taken in the order that an npz has, and from safetensors
    in that of their names. Without them noise is drawn, of the shape of --input."""
    max_samples: int = 2000
    """How many samples are taken at most, from the first on. A half of them is fitted to, the other
    decides; of many more than 2,000, 1,000 decide."""
    candidate: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to match by, as "weights" or "features", once for each; all that apply by default."""
    polish: int | None = None
    """How many steps of distillation to try on the best, 0 for none. By default 300 with --data,
    and none on noise."""
    seed: int = 0
    """The seed of all that is drawn."""

    def run(self, console: Console) -> int:
        """Carries the command out, see `Command.run`."""
        self._require_flags()
        checkpoints = self.read(self.models, console)
        like = checkpoints[-1]
        # Before the work, which may take long, and not after it.
        self.require_name(like)
        with precision_of(checkpoints):
            data = self._read_data(console)
            shapes = shapes_of(self.input)
            if data is not None:
                # Of two samples: the axis of one could be any.
                shapes = [jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in data]
            # Traced here, so that what does not fit is told by file before anything runs.
            symmetry = self.trace(like, shapes, console)
            models = []
            for checkpoint in checkpoints:
                models.append(fitted(symmetry, checkpoint, self.naming, [like]))
            if self.dry_run:
                console.show(
                    f"{symmetry}\n\nwould merge {len(models)} models, and write {self.out}"
                )
                return 0
            console.step(f"merging {len(models)} models, by all that applies; this takes minutes")
            merged = merge(
                load_function(self.apply or ""),
                models,
                None if data is None else [data],
                inputs=tuple(shapes) if data is None else None,
                outputs=self.outputs,
                symmetry=symmetry,
                candidates=list(self.candidate) or None,
                polish=self.polish,
                max_samples=self.max_samples,
                key=jax.random.key(self.seed),
            )
            arrays = results_by_name(symmetry, merged.params, like, self.naming)
        facts, tables = _found(merged.report)
        facts = {"models": [str(path) for path in self.models], **facts}
        return self.finish(console, merged.symmetry, checkpoints, like, arrays, facts, tables)

    def _require_flags(self) -> None:
        """Refuses flags that leave out what `merge` needs."""
        if len(self.models) < 2:
            raise ValueError(f"{len(self.models)} model given; merging takes two or more")
        if self.apply is None:
            raise ValueError(
                "merging runs the network: give --apply package.module:function; without its code,"
                " otfusion fuse takes --symmetry file.json"
            )
        if (self.data is None) == (not self.input):
            raise ValueError(
                "give --data inputs.npz to choose by, or --input f32[2,64] to draw noise of that"
                " shape, and not both"
            )

    def _read_data(self, console: Console) -> tuple[np.ndarray, ...] | None:
        """Reads the inputs of the function."""
        if self.data is None:
            return None
        if self.data.suffix not in (NPZ, SAFETENSORS):
            raise ValueError(
                f"--data is {self.data}; give an npz with an array for each input, as"
                ' numpy.savez("inputs.npz", x) writes it, or safetensors'
            )
        console.step(f"reading {self.data}")
        arrays = read_checkpoint(self.data).arrays
        # safetensors keeps no order: its writers sort by dtype and name.
        names = sorted(arrays) if self.data.suffix == SAFETENSORS else list(arrays)
        inputs = []
        for name in names:
            array = arrays[name]
            if not array.ndim or not len(array):
                raise ValueError(
                    f"{name} in {self.data} has shape {array.shape}; its first axis must be the"
                    " samples"
                )
            # As JAX will have it: the network is traced with what it will be run on.
            inputs.append(native(array).astype(jax.dtypes.canonicalize_dtype(array.dtype)))
        return tuple(inputs)


def _found(report: Report) -> tuple[dict[str, Any], dict[str, Table]]:
    """Returns what a merge found: facts by name, and a table of the trials."""
    rows = []
    for trial in report.rows:
        score = finite(trial.score)
        chosen = "*" if trial.chosen else ""
        problem = trial.problem.partition("\n")[0]
        rows.append((chosen, trial.start, trial.units, trial.repair, score, problem))
    facts = {
        "score": f"{report.measure}; less is better",
        "scores of the models": [finite(score) for score in report.parents],
        "inputs fitted to": report.fitted,
        "inputs chosen by": report.held_out,
        "notes": list(report.notes),
    }
    # Seconds are left out: the same command on the same files gives the same report.
    columns = ("chosen", "start", "units moved by", "then", "score", "problem")
    return facts, {"trials": Table(columns, tuple(rows))}
