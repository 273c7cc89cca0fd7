"""Fusion of models that have seen different data (Singh & Jaggi 2020, skill transfer)."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from experiments.data import stratified_split
from experiments.divisions import DividedStudy
from experiments.evaluate import ACCURACY, Judge
from experiments.methods import (
    ACTIVATIONS,
    DESCENT,
    LEAST_SQUARES,
    MATCHING,
    VANILLA,
    WEIGHTS,
    Fusion,
)
from experiments.pairs import Pair, seen_images
from experiments.plots import Panel, plot_lines
from experiments.report import mean, pivot, progress, table, where
from experiments.runs import Run
from otfusion_jax.pictures.path import PATH_AXIS

_FUSIONS = (
    Fusion(VANILLA),
    Fusion(WEIGHTS),
    Fusion(ACTIVATIONS),
    Fusion(MATCHING),
    Fusion(DESCENT),
    Fusion(VANILLA, LEAST_SQUARES),
    Fusion(MATCHING, LEAST_SQUARES),
    Fusion(DESCENT, LEAST_SQUARES),
)
# The images that accuracies are of; those of A and of B are of the kind that each has seen.
_TESTS = (ACCURACY, "test of A", "test of B")


@dataclasses.dataclass(frozen=True)
class NonIid(DividedStudy):
    """Fuse two models that have seen different data."""

    command: ClassVar[str] = "non_iid"

    path_points: int = 21
    """Points evaluated from A to B."""
    validation_share: float = 0.1
    """Share of the training images of both that is held out to choose t by."""

    def check(self) -> None:
        """Refuses a validation share that leaves nothing to train on, or to choose by."""
        super().check()
        if not 0 < self.validation_share <= 0.5:
            raise ValueError(
                f"--validation-share is {self.validation_share}; give more than 0 and at most 0.5."
            )

    def measure(self, run: Run) -> None:
        """Trains two models on different data and measures all paths between them."""
        whole = run.dataset
        test_every = round(1 / self.validation_share)
        train_part, held_out = stratified_split(whole.train_labels, test_every)
        dataset = whole.part(train_part)
        start = self.start(dataset)
        parts = self.divided(dataset.train_labels)
        models = []
        for seed, part in zip(self.seeds, parts, strict=True):
            seen = dataset.part(part)
            models.append(run.train(seed, dataset=seen, start=start))

        apply = run.network.apply
        test = run.judge()
        chooser = Judge(apply, whole.train_images[held_out], whole.train_labels[held_out])
        of_a, of_b = self.divided(whole.test_labels)

        def add(model, **labels) -> None:
            correct = test.correct(model)
            parts = (chooser.correct(model), correct, correct[of_a], correct[of_b])
            for name, part in zip(("validation", *_TESTS), parts, strict=True):
                run.add({name: 100 * part.mean()}, **labels)

        add(models[0], method="model A", t=None)
        add(models[1], method="model B", t=None)
        images = seen_images(dataset, self.seeds, self.images)
        pair = Pair(run.network, models[0], models[1], images)
        for fusion in progress(_FUSIONS, "fusing"):
            with run.timed(fusion.name):
                moved = fusion.method.move(pair)
                for t in np.linspace(0, 1, self.path_points).tolist():
                    model = fusion.correction.average(pair, moved, (1 - t, t))
                    add(model, method=fusion.name, t=round(t, 6))

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows each model, and each method at the t that is best by validation."""
        alone = records[records["t"].isna()]
        paths = records.dropna(subset="t")
        validation = where(paths, metric="validation")
        # No test image has a say in the choice of t.
        best_rows = validation.groupby("method", sort=False)["value"].idxmax()
        best = validation.loc[best_rows]
        chosen = paths.merge(best[["method", "t"]])
        shown = pd.concat([alone, chosen])
        cells = pivot(shown, "method", "metric", mean())[[*_TESTS]]
        chosen_t = best.set_index("method")["t"].map("{:.2f}".format)
        cells.insert(0, "t by validation", chosen_t.reindex(cells.index))
        highest = where(paths, metric=ACCURACY).groupby("method")["value"].max()
        cells["best t"] = highest.map("{:.2f}".format)
        return [table(cells, "model")]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots the accuracies along the paths, on all test images and on those of each kind."""
        paths = records.dropna(subset="t")
        panels = []
        for test in _TESTS:
            points = where(paths, metric=test)
            panels.append(Panel(test, points, "t", "method", PATH_AXIS))
        plot_lines(path, self.title, panels)
