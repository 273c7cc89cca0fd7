"""Fusion of many models in one call: accuracy, time and memory against their number."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, PyTree

import otfusion_jax as otf
from experiments.evaluate import ACCURACY
from experiments.joint import (
    MEBIBYTES,
    SECONDS,
    Program,
    compiled,
    draws,
    inconsistency,
    into_the_universe,
    merge,
    regressed,
)
from experiments.methods import BARYCENTER, FUSE, JOINT_METHODS, LEAST_SQUARES, VANILLA
from experiments.networks import Network, counts, reestimated
from experiments.plots import Panel, plot_lines
from experiments.report import mean, mean_and_deviation, pivot, progress, table, where
from experiments.runs import Run, Study, rounded

_REPAIRED = f", {LEAST_SQUARES}"
# How much better the first is than the second.
_GAINS = {
    "barycenter - fuse": (BARYCENTER.name, FUSE.name),
    "the same, least squares": (BARYCENTER.name + _REPAIRED, FUSE.name + _REPAIRED),
}
_INDIVIDUALS = "individuals"
_MERGED = "merge"
_COSTS = {SECONDS: "seconds, compiled", MEBIBYTES: "memory (MiB)"}
_INCONSISTENT = "inconsistent units (%)"


@dataclasses.dataclass(frozen=True)
class Many(Study):
    """Fuse 2, 4, 6 and 8 models at once: accuracy, time and memory."""

    command: ClassVar[str] = "many"

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    """Seeds of the models."""
    counts: tuple[int, ...] = (2, 4, 6, 8)
    """Numbers of models that are fused at once."""
    draws: int = 5
    """Choices of so many models, over which accuracies are averaged."""
    images: int = 1000
    """Training images that repair an average, and that `otf.merge` looks at."""
    merge: bool = False
    """Merge them by `otf.merge` as well, which takes longest."""
    rotations: bool = False
    """Rotate units that may be rotated, as residual streams; models are made canonical before."""

    @property
    def study_label(self) -> str:
        """The name of the study in that of its folder."""
        return f"{self.command}-rotated" if self.rotations else self.command

    def check(self) -> None:
        """Refuses to fuse more models than there are, or fewer than two, or none."""
        super().check()
        numbers = sorted(self.counts)
        if numbers[0] < 2 or numbers[-1] > len(self.seeds):
            raise ValueError(
                f"--counts are {numbers}, with {len(self.seeds)} seeds; give 2 models or more, and"
                " as many --seeds."
            )
        if self.draws < 1:
            raise ValueError(f"--draws is {self.draws}; give at least 1.")

    def measure(self, run: Run) -> None:
        """Trains a model from each seed, and fuses some of them, whichever, at once."""
        network = _rotating(run.network) if self.rotations else run.network
        models = run.models()
        if self.rotations:
            models = [otf.canonicalize(network.symmetry, model) for model in models]
        images = jnp.asarray(run.dataset.train_images[: self.images])
        judge = run.judge()
        alone = []
        for seed, model in zip(self.seeds, models, strict=True):
            accuracy = judge.accuracy(model)
            alone.append(rounded(accuracy[ACCURACY]))
            run.add(accuracy, method=_INDIVIDUALS, models=1, draw=str(seed))

        # Draws share pairs, and `inconsistency` asks for all of them.
        @functools.cache
        def plans(source: int, target: int) -> dict[str, Array]:
            found = otf.align(network.symmetry, models[source], models[target], leaf_weight=counts)
            return found.plans

        for count in progress(sorted(self.counts), "fusing"):
            chosen = draws(len(models), count, self.draws)
            stack = otf.stack([models[k] for k in chosen[0]])
            programs = {}
            for method in JOINT_METHODS.values():
                fuse = functools.partial(method.fuse, network.symmetry)
                program = compiled(fuse, stack)
                programs[method.name] = program
                run.add(program.costs, method=method.name, models=count)
            for some in chosen:
                seeds = [str(self.seeds[k]) for k in some]
                labels = {"models": count, "draw": " ".join(seeds)}
                few = [models[k] for k in some]
                individuals = np.mean([alone[k] for k in some])
                run.add({ACCURACY: individuals}, method=_INDIVIDUALS, **labels)
                ensemble = judge.ensemble(few)
                run.add({ACCURACY: ensemble[ACCURACY]}, method="ensemble", **labels)
                # As `fuse` does: all are moved onto the last, which stays.
                last = some[-1]
                onto_last = []
                for k in some:
                    moved = models[k]
                    if k != last:
                        moved = otf.transport(network.symmetry, plans(k, last), moved)
                    onto_last.append(moved)
                fused = _fused(network, few, onto_last, programs, images)
                if self.merge:
                    with run.timed(f"{_MERGED}, {count} models"):
                        merged = merge(network, few, batches=[images], max_samples=len(images))
                    fused[_MERGED] = merged.params
                for name, model in fused.items():
                    run.add(judge.accuracy(model), method=name, **labels)
        share = inconsistency(network.symmetry, plans, len(models))
        if share is not None:
            run.add({_INCONSISTENT: share}, method=FUSE.name)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows accuracies and what the barycenter gains, costs, and how consistent plans are."""
        # Single models are there to be looked up; the table is of several.
        records = records[records["models"] != 1]
        shown = where(records, metric=ACCURACY).astype({"models": int})
        accuracies = pivot(shown, "models", "method", mean_and_deviation)
        draws_made = shown.groupby("models")["draw"].nunique()
        accuracies.insert(0, "draws", draws_made.map(str))
        by_draw = pivot(shown, ["models", "draw"], "method", "mean")
        for name, (better, other) in _GAINS.items():
            # Within a draw, so that what the draws have in common cancels.
            gain = (by_draw[better] - by_draw[other]).groupby("models")
            accuracies[name] = gain.agg(_gain)
        costs = records[records["metric"].isin(_COSTS)].astype({"models": int})
        titles = costs["method"] + " " + costs["metric"]
        costs = costs.assign(cost=titles)
        tables = [
            table(accuracies, "models"),
            table(pivot(costs, "models", "cost", mean()), "models"),
        ]
        for share in where(records, metric=_INCONSISTENT)["value"]:
            tables.append(
                f"From a to b and on to c, {share:.1f} % of the units end elsewhere than from a to"
                " c by pairwise alignment; through a reference or a barycenter none do."
            )
        return tables

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots accuracies, seconds and memory over the number of models."""
        records = records[records["models"] != 1]
        if self.merge:
            # More curves than these could not be told apart.
            records = records[records["method"] != VANILLA.name]
        panels = []
        for metric, quantity in {ACCURACY: ACCURACY, **_COSTS}.items():
            shown = where(records, metric=metric)
            spread = metric == ACCURACY
            panel = Panel(quantity, shown, "models", "method", "models fused", spread=spread)
            panels.append(panel)
        plot_lines(path, self.title, panels)


def _rotating(network: Network) -> Network:
    """Lets the units of a network rotate."""
    symmetry = network.symmetry.with_rotations()
    if not symmetry.rotates:
        raise ValueError(f"--rotations: the units of {network.config.label} can't be rotated.")
    return dataclasses.replace(network, symmetry=symmetry)


def _fused(
    network: Network,
    models: Sequence[PyTree],
    onto_last: list[PyTree],
    programs: dict[str, Program],
    images: Array,
) -> dict[str, PyTree]:
    """Fuses models by every method, and repairs what two of them make; by names."""
    stack = otf.stack(list(models))
    fused = {VANILLA.name: otf.average(list(models))}
    moved = {FUSE.name: onto_last}
    for name, program in programs.items():
        model = program.run(stack)
        if isinstance(model, otf.Barycenter):
            moved[name] = into_the_universe(network, models, model.plans)
            model = model.params
        fused[name] = reestimated(network, model, images)
    for name, models_moved in moved.items():
        fused[name + _REPAIRED] = regressed(network, models_moved, images)
    return fused


def _gain(gains: pd.Series) -> str:
    """Shows a mean gain, its deviation, and how many of the draws gain."""
    gained = sum(gains > 0)
    return f"{mean_and_deviation(gains, '+')} ({gained} of {len(gains)})"
