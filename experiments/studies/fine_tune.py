"""Fine-tuning of fused models at equal epochs for all starts (Singh & Jaggi 2020, section 5.2)."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pandas as pd
import tyro
from jaxtyping import PyTree

from experiments.data import Dataset
from experiments.evaluate import ACCURACY, LOSS, Judge
from experiments.methods import (
    AVERAGED,
    DESCENT,
    DESCENT_FROM_MATCHING,
    LEAST_SQUARES,
    VANILLA,
    WEIGHTS,
    Fusion,
    by_name,
    listed,
)
from experiments.networks import reestimated
from experiments.pairs import Pair, PairStudy
from experiments.plots import bars, plot_bars
from experiments.report import column, mean, mean_and_deviation, pivot, table, where
from experiments.runs import Run, choice
from experiments.train import TrainConfig

_A = Fusion(VANILLA, weights=(1.0, 0.0), label="model A")
_B = Fusion(VANILLA, weights=(0.0, 1.0), label="model B")
_STARTS = by_name(
    _A,
    _B,
    Fusion(VANILLA),
    Fusion(WEIGHTS),
    Fusion(DESCENT),
    Fusion(DESCENT, LEAST_SQUARES),
    Fusion(DESCENT_FROM_MATCHING, LEAST_SQUARES, label="activation matching, least squares"),
)
# Those of the paper, and what `fuse` does.
_USUAL = tuple(_STARTS.values())[:-1]
_VALIDATION = "validation accuracy (%)"
_ENSEMBLE = "ensemble of the parents"


@dataclasses.dataclass(frozen=True)
class FineTune(PairStudy):
    """Train fused models on, beside their parents and the vanilla average."""

    command: ClassVar[str] = "fine_tune"

    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the models, which are paired in this order: of 0 1 2 3, 0 with 1 and 2 with 3."""
    fine_tune_epochs: int = 5
    """Epochs of training from every start."""
    factors: tuple[float, ...] = (3.0, 1.0, 0.3)
    """Peak step sizes, as multiples of the recipe's."""
    schedules: tuple[Literal["one-cycle", "halved"], ...] = ("one-cycle", "halved")
    """Schedules of the step size: up to it and down again, or halved with every epoch."""
    starts: Annotated[
        tuple[Annotated[Fusion, choice(_STARTS, "START")], ...],
        tyro.conf.arg(
            help=f"Starts to train on, of {listed(_STARTS)} (default: all but the last)."
        ),
    ] = _USUAL
    validation_images: int = 5000
    """Last training images, which nothing is trained on, to choose schedules by."""

    @property
    def title(self) -> str:
        """What the run is about, in words."""
        pairs = len(self.model_names) // 2
        mean_of = f": mean of {pairs} pairs" if pairs > 1 else ""
        return f"{super().title}{mean_of}: {self.fine_tune_epochs} epochs more"

    def check(self) -> None:
        """Refuses a model that is without another."""
        super().check()
        if len(self.seeds) % 2:
            raise ValueError("Give --seeds of pairs: 0 1 for one, 0 1 2 3 for two.")

    def check_data(self, dataset: Dataset) -> None:
        """Refuses to hold out no training images, or all."""
        super().check_data(dataset)
        count = len(dataset.train_labels)
        if not 0 < self.validation_images < count:
            raise ValueError(
                f"--validation-images is {self.validation_images}; there are"
                f" {count} training images to share."
            )

    def measure(self, run: Run) -> None:
        """Trains parents, averages and fused models on, each under several schedules.

        The schedule of each start is chosen by accuracy on images held out from training; models
        from files may have been trained on these.
        """
        count = len(run.dataset.train_labels) - self.validation_images
        dataset = run.dataset.part(slice(count))
        held_out = run.dataset.part(slice(count, None))
        test = run.judge()
        chooser = Judge(
            run.network.apply, held_out.train_images, held_out.train_labels, _VALIDATION
        )

        def add(model: PyTree, **labels) -> None:
            run.add(test.measures(model), **labels)
            run.add(chooser.accuracy(model), **labels)

        models = run.models(dataset)
        for first in range(0, len(models), 2):
            seeds = self.seeds[first : first + 2]
            both = models[first : first + 2]
            pair = self.pair(run, both, seeds, dataset)
            labels = {"pair": ", ".join(map(str, seeds))}
            for name, start in self._starts(pair).items():
                add(start, start=name, trained="before", **labels)
                for schedule, config in self._schedules().items():
                    with run.timed(f"{name}, {schedule}"):
                        tuned = run.train(seeds[0], config=config, dataset=dataset, start=start)
                    step = {"schedule": schedule, "step_size": config.learning_rate}
                    add(tuned, start=name, trained="after", **step, **labels)
            ensemble = test.ensemble([pair.a, pair.b])
            run.add(ensemble, start=_ENSEMBLE, trained="before", **labels)

    def _starts(self, pair: Pair) -> dict[str, PyTree]:
        """Makes what is trained on, by its name."""
        moved: dict[str, PyTree] = {}
        starts = {}
        for start in self.starts:
            method = start.method
            if method.name not in moved:
                moved[method.name] = method.move(pair)
            model = start.correction.average(pair, moved[method.name], start.weights)
            # A parent has statistics of its own, and a repaired average has been given some.
            if start.correction is AVERAGED and max(start.weights) < 1:
                model = reestimated(pair.network, model, pair.images)
            starts[start.name] = model
        return starts

    def _schedules(self) -> dict[str, TrainConfig]:
        """Makes each kind of schedule with each step size, by name."""
        epochs = self.fine_tune_epochs
        halvings = tuple((epoch, 0.5) for epoch in range(1, epochs))
        schedules = {}
        for factor in self.factors:
            rate = factor * self.train_config.learning_rate
            for kind in self.schedules:
                one_cycle = kind == "one-cycle"
                schedules[f"{kind}, {rate:g}"] = dataclasses.replace(
                    self.train_config,
                    epochs=epochs,
                    learning_rate=rate,
                    one_cycle=one_cycle,
                    drops=() if one_cycle else halvings,
                )
        return schedules

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows the mean of each start over the pairs, before and after the best schedule."""
        before = where(records, trained="before")
        chosen = _chosen(records)
        validation = where(chosen, metric=_VALIDATION)
        after = pivot(where(chosen, metric=ACCURACY), "pair", "start", "mean")
        # The parents count with their own best schedules.
        above = pd.Series(dtype=str)
        if {_A.name, _B.name} <= set(after.columns):
            better = after[[_A.name, _B.name]].max(axis=1)
            above = after.sub(better, axis=0).agg(mean_and_deviation, sign="+")
        columns = {
            "before": column(where(before, metric=ACCURACY), "start", mean()),
            "after": column(where(chosen, metric=ACCURACY), "start", mean()),
            "above the better parent": above,
            "validation": column(validation, "start", mean()),
            "loss before (nats)": column(where(before, metric=LOSS), "start", mean(4)),
            "loss after": column(where(chosen, metric=LOSS), "start", mean(4)),
            "chosen schedule": validation.groupby("start")["schedule"].agg(self._shown),
        }
        return [table(columns, ACCURACY)]

    def _shown(self, chosen: pd.Series) -> str:
        """Shows the schedules chosen for a start; marks steps beyond which more may be gained."""
        steps = {name: config.learning_rate for name, config in self._schedules().items()}
        lowest = min(steps.values())
        highest = max(steps.values())
        texts = []
        for schedule in chosen.drop_duplicates():
            # Between steps that were tried on either side, nothing is said.
            if lowest < highest == steps[schedule]:
                schedule += " (largest tried)"
            elif lowest == steps[schedule] < highest:
                schedule += " (smallest tried)"
            texts.append(schedule)
        return "; ".join(texts)

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots the accuracy of each start before and after."""
        ensemble = where(records, start=_ENSEMBLE, metric=ACCURACY)["value"].mean()
        starts = where(records[records["start"] != _ENSEMBLE], trained="before")
        both = where(pd.concat([starts, _chosen(records)]), metric=ACCURACY)
        cells = bars(both, "start", "trained")
        plot_bars(path, self.title, ACCURACY, cells, {_ENSEMBLE: ensemble})


def _chosen(records: pd.DataFrame) -> pd.DataFrame:
    """Returns the records of each start after the schedule that is best by validation."""
    after = where(records, trained="after")
    validation = where(after, metric=_VALIDATION)
    best = validation.groupby(["pair", "start"], sort=False)["value"].idxmax()
    return after.merge(validation.loc[best, ["pair", "start", "schedule"]])
