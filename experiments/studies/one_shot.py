"""One-shot fusion of two models trained from different seeds (Singh & Jaggi 2020, section 5.1)."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import pandas as pd
import tyro

from experiments.evaluate import ACCURACY, BARRIERS, LOSS, Judge
from experiments.methods import AVERAGED, CORRECTIONS, EVENLY, METHODS, VARIANTS, Method, listed
from experiments.pairs import PairStudy
from experiments.plots import Panel, plot_lines
from experiments.report import mean, pivot, progress, table, where
from experiments.runs import Run, choice
from otfusion_jax.pictures.path import PATH_AXIS


@dataclasses.dataclass(frozen=True)
class OneShot(PairStudy):
    """Fuse two models trained from different seeds, with no retraining."""

    command: ClassVar[str] = "one_shot"

    seeds: tuple[int, int] = (0, 1)
    """Seeds of the models."""
    variants: bool = False
    """Compare all variants of Algorithm 1, the original's own settings and activation matching."""
    methods: Annotated[
        tuple[Annotated[Method, choice(VARIANTS, "METHOD")], ...] | None,
        tyro.conf.arg(
            metavar="METHOD [METHOD ...]", help=f"Compare these alone, of {listed(VARIANTS)}."
        ),
    ] = None
    path_points: int = 21
    """Points evaluated from A to B, an odd number so that the midpoint is one."""
    path_images: int | None = None
    """Evaluate paths on so many of the test images only."""

    def measure(self, run: Run) -> None:
        """Measures both models, their ensemble, and what every method makes of them."""
        judge = run.judge()
        images = run.dataset.test_images[: self.path_images]
        labels = run.dataset.test_labels[: self.path_images]
        path_judge = Judge(run.network.apply, images, labels)
        t = jnp.linspace(0, 1, self.path_points)
        pair = self.pair(run, run.models(), self.seeds)

        # A model that is no average stands in the first column of the table.
        alone = {"t": None, "measure": AVERAGED.name}
        run.add(judge.measures(pair.a), method="model A", **alone)
        run.add(judge.measures(pair.b), method="model B", **alone)
        ensemble = judge.ensemble([pair.a, pair.b])
        run.add(ensemble, method="ensemble", **alone)
        for method in progress(self._methods(run), "fusing"):
            with run.timed(method.name):
                formed = method.form(pair)
                moved = jax.block_until_ready(method.move(formed))
            for correction in method.corrections:
                with run.timed(f"{method}, {correction}"):
                    fused = jax.block_until_ready(correction.average(formed, moved, EVENLY))
                run.add(judge.measures(fused), method=method.name, measure=correction.name)
            # The paths of all variants would take long, and a plot of them show nothing.
            if method in METHODS.values() or method.is_special:
                path = path_judge.path(moved, formed.b, t)
                for metric, height in path.heights.items():
                    barrier = BARRIERS[metric]
                    run.add({metric: height}, method=method.name, measure=barrier)
                for position, values in path.points:
                    run.add(values, method=method.name, measure="path", t=position)

    def _methods(self, run: Run) -> list[Method]:
        """Returns the methods to compare: those asked for, or all that the network allows."""
        symmetry = run.network.symmetry
        if self.methods is None:
            methods = VARIANTS if self.variants else METHODS
            return [method for method in methods.values() if method.form.suits(symmetry)]
        for method in self.methods:
            if not method.form.suits(symmetry):
                label = run.network.config.label
                raise ValueError(f"The units of {label} can only be permuted: {method}")
        return list(self.methods)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows accuracies and losses, and the barriers of both."""
        single = records[records["t"].isna()]
        tables = []
        for metric, digits in {ACCURACY: 2, LOSS: 4}.items():
            of_metric = where(single, metric=metric)
            cells = pivot(of_metric, "method", "measure", mean(digits))
            columns = [*CORRECTIONS, BARRIERS[metric]]
            present = [column for column in columns if column in cells]
            tables.append(table(cells[present], metric))
        return tables

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots accuracy and loss along the paths."""
        paths = where(records, measure="path")
        ensemble = where(records, method="ensemble", metric=ACCURACY)["value"].item()
        panels = []
        for metric, levels in {ACCURACY: {"ensemble": ensemble}, LOSS: {}}.items():
            points = where(paths, metric=metric)
            panels.append(Panel(metric, points, "t", "method", PATH_AXIS, levels))
        plot_lines(path, self.title, panels)
