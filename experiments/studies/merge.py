"""The one call against every single method, on pairs of models trained from different seeds."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import pandas as pd
import tyro

import otfusion_jax as otf
from experiments.evaluate import ACCURACY, Judge
from experiments.joint import merge
from experiments.methods import (
    EVENLY,
    METHODS,
    VARIANTS,
    Fusion,
    Method,
    listed,
)
from experiments.pairs import Pair, seen_images
from experiments.plots import bars, plot_bars
from experiments.report import mean, pivot, progress, table, where
from experiments.runs import Run, Study, choice

_MERGED = "merge"
_BEST = "the best single method"
_UNDATED = "no data"


@dataclasses.dataclass(frozen=True)
class Merge(Study):
    """Compare `otf.merge` with every single method on each pair of seeds."""

    command: ClassVar[str] = "merge"
    may_be_empty: ClassVar[tuple[str, ...]] = ("methods",)

    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the models, two for each pair."""
    weights: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A B")] = None
    """Safetensors or npz with PyTorch's names and layouts, instead of training."""
    images: int = 1000
    """Training images, without labels, for methods that use data."""
    drawn: bool = True
    """Merge without data as well, by inputs that are drawn at random."""
    polish: int = 300
    """Steps of distillation to try at the end, where there are images."""
    controls: bool = False
    """Make as many steps from model A and from the plain average, too."""
    methods: Annotated[
        tuple[Annotated[Method, choice(VARIANTS, "METHOD")], ...],
        tyro.conf.arg(
            metavar="METHOD [METHOD ...]",
            help=(
                "Single methods to compare with, with all corrections; without a METHOD none. "
                f"Of {listed(VARIANTS)}."
            ),
        ),
    ] = tuple(METHODS.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that models are read from, instead of training them."""
        return self.weights or ()

    def check(self) -> None:
        """Refuses seeds that make no pairs, and controls of no steps."""
        super().check()
        if self.controls and not self.polish:
            raise ValueError("--controls make as many steps as --polish, which are 0; give more.")
        if len(self.seeds) % 2:
            raise ValueError(f"--seeds are {len(self.seeds)}; give two for each pair.")

    def measure(self, run: Run) -> None:
        """Measures single methods and the one call on each pair, with images and without."""
        judge = run.judge()
        models = run.models()
        for first in progress(range(0, len(models), 2), "merging"):
            a, b = models[first : first + 2]
            seeds = self.seeds[first : first + 2]
            label = ", ".join(self.model_names[first : first + 2])
            pair = Pair(run.network, a, b, seen_images(run.dataset, seeds, self.images))
            run.add(judge.accuracy(a), method="model A", pair=label)
            run.add(judge.accuracy(b), method="model B", pair=label)
            run.add({ACCURACY: judge.ensemble([a, b])[ACCURACY]}, method="ensemble", pair=label)
            best = {}
            for method in self.methods:
                self._measure_single(run, judge, pair, method, label, best)
            for needs, accuracy in best.items():
                run.add({ACCURACY: accuracy}, method=f"{_BEST}, {needs.value}", pair=label)
            self._measure_merged(run, judge, pair, label)
            if self.controls:
                self._measure_controls(run, judge, pair, label)

    def _measure_single(
        self, run: Run, judge: Judge, pair: Pair, method: Method, label: str, best: dict
    ) -> None:
        """Measures one method with each of its corrections, and notes the best of its needs."""
        formed = method.form(pair)
        with run.timed(method.name):
            moved = jax.block_until_ready(method.move(formed))
        for correction in method.corrections:
            fusion = Fusion(method, correction)
            with run.timed(fusion.name):
                fused = jax.block_until_ready(correction.average(formed, moved, EVENLY))
            measured = judge.accuracy(fused)
            run.add(measured, method=fusion.name, pair=label)
            best[fusion.needs] = max(best.get(fusion.needs, 0.0), measured[ACCURACY])

    def _measure_merged(self, run: Run, judge: Judge, pair: Pair, label: str) -> None:
        """Measures the one call, and leaves its reports in the folder of the run."""
        images = pair.images
        with_images = {"batches": [images], "max_samples": len(images), "polish": self.polish}
        settings = {_UNDATED: {"inputs": images[:2]}} if self.drawn else {}
        settings[f"{len(images):,} images"] = with_images
        for name, given in settings.items():
            with run.timed(f"{_MERGED}, {name}"):
                merged = merge(run.network, [pair.a, pair.b], **given)
            run.add(judge.accuracy(merged.params), method=f"{_MERGED}, {name}", pair=label)
            file = (
                f"{_MERGED}-{label}-{name}.txt".replace(", ", "-")
                .replace(",", "")
                .replace(" ", "-")
            )
            run.study.folder.mkdir(parents=True, exist_ok=True)
            (run.study.folder / file).write_text(f"{merged.report}\n")

    def _measure_controls(self, run: Run, judge: Judge, pair: Pair, label: str) -> None:
        """Measures what as many steps of distillation make of a parent and of the plain average."""
        starts = {"model A": pair.a, "vanilla average": otf.average([pair.a, pair.b])}
        for name, start in starts.items():
            with run.timed(f"{name}, polished"):
                polished = otf.distill(
                    run.network.apply,
                    start,
                    [pair.a, pair.b],
                    [pair.images],
                    outputs="logits",
                    steps=self.polish,
                    max_samples=len(pair.images),
                )
            run.add(judge.accuracy(polished), method=f"{name}, polished", pair=label)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows the accuracy of each method on each pair."""
        return [table(pivot(where(records, metric=ACCURACY), "method", "pair", mean()), ACCURACY)]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots the same as bars."""
        plot_bars(path, self.title, ACCURACY, bars(records, "method", "pair"), {})
