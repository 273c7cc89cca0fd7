"""Fusion of networks of different widths, wide into narrow and narrow into wide."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

import pandas as pd
import tyro
from jaxtyping import Array, PyTree

import otfusion_jax as otf
from experiments.crossings import Crossing, as_original, repaired
from experiments.data import Dataset
from experiments.evaluate import ACCURACY, Judge
from experiments.methods import WIDTH_METHODS, WidthMethod, listed
from experiments.networks import Network, reestimated
from experiments.pairs import seen_images
from experiments.plots import bars, plot_bars
from experiments.report import pivot, progress, table, where
from experiments.runs import Run, Study, choice
from otfusion_jax.symmetry.groups import Plans

_MOVED = "A moved"
_REPAIRED = ", least squares"
_BEST = "best (t)"
_PERMUTATIONS = tuple([method for method in WIDTH_METHODS.values() if not method.rotates])
_HELD_OUT = "held-out accuracy (%)"


@dataclasses.dataclass(frozen=True)
class _Side:
    """A network of some width, and what judges networks of its shapes."""

    factor: float
    network: Network
    model: PyTree
    judge: Judge
    chooser: Judge


@dataclasses.dataclass(frozen=True)
class Widths(Study):
    """Fuse networks of other widths, wide into narrow and narrow into wide."""

    command: ClassVar[str] = "widths"

    seeds: tuple[int, int] = (0, 1)
    """Seeds of the networks A, and of B."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="B")] = None
    """Safetensors or npz with PyTorch's names and layouts, instead of training B."""
    factors: tuple[float, ...] = (2.0, 0.5)
    """Widths of A as multiples of those of B."""
    methods: Annotated[
        tuple[Annotated[WidthMethod, choice(WIDTH_METHODS, "METHOD")], ...],
        tyro.conf.arg(
            help=f"Methods to compare, of {listed(WIDTH_METHODS)} (default: all that permute)."
        ),
    ] = _PERMUTATIONS
    t: tuple[float, ...] = (0.5, 0.67)
    """Positions of the averages, (1 - t) · A + t · B; the first is repaired too."""
    grid: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    """Positions of the averages that the best is one of."""
    held_out: float = 0.05
    """Share of the training images, the last ones, that are not for training but for choosing the
    best t."""
    images: int = 1000
    """Training images, without labels, for least squares and batch norm."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The file that B is read from, instead of training it."""
        return (self.weights,) if self.weights else ()

    def check(self) -> None:
        """Refuses an A as wide as B, and a t that is not on the way."""
        super().check()
        if not all(factor > 0 and factor != 1 for factor in self.factors):
            raise ValueError(
                f"--factors are {list(self.factors)}; give positive ones other than 1."
            )
        for flag, values in {"t": self.t, "grid": self.grid}.items():
            if not all(0 < value < 1 for value in values):
                raise ValueError(f"--{flag} is {list(values)}; give numbers between 0 and 1.")

    def check_data(self, dataset: Dataset) -> None:
        """Refuses to hold out nothing, or everything."""
        count = len(dataset.train_labels)
        rest = self._rest(dataset)
        if not 0 < rest < count:
            raise ValueError(
                f"--held-out is {self.held_out}, which leaves {rest} of {count} images to train on;"
                " give a share that holds some out, and not all."
            )

    def _rest(self, dataset: Dataset) -> int:
        """How many training images are for training."""
        count = len(dataset.train_labels)
        return count - round(self.held_out * count)

    def measure(self, run: Run) -> None:
        """Fuses networks A, wider and narrower, with a network B, each onto the other."""
        rest = self._rest(run.dataset)
        dataset = run.dataset.part(slice(rest))
        held_out = run.dataset.part(slice(rest, None))
        sides = {}
        for factor in (1.0, *self.factors):
            network = run.network_of(factor)
            if factor == 1 and self.weights:
                model = run.read(self.weights)
            else:
                seed = self.seeds[factor == 1]
                model = run.train(seed, model=network.config, dataset=dataset)
            images = held_out.train_images
            chooser = Judge(network.apply, images, held_out.train_labels, _HELD_OUT)
            judge = run.judge(network)
            run.add(judge.accuracy(model), source=factor, measure="alone")
            sides[factor] = _Side(factor, network, model, judge, chooser)

        images = seen_images(dataset, self.seeds, self.images)
        for factor in progress(self.factors, "fusing"):
            a = sides[factor]
            b = sides[1.0]
            with run.timed(f"x{factor:g} onto x1"):
                self._compare(run, a, b, images)
            with run.timed(f"x1 onto x{factor:g}"):
                self._compare(run, b, a, images)

    def _compare(self, run: Run, source: _Side, target: _Side, images: Array) -> None:
        """Measures what every method makes of a source that is moved onto a target."""
        as_trained = Crossing(source.network, target.network, source.model, target.model)
        # With and without the original's scaling, the plans are the same.
        found: dict[tuple[Callable, bool], Plans] = {}
        for method in self.methods:
            if method.narrows and source.factor < target.factor:
                continue
            crossing = as_trained.rotating() if method.rotates else as_trained
            key = method.plans, method.rotates
            if key not in found:
                found[key] = method.plans(crossing)
            plans = found[key]
            moved = crossing.moved(plans)
            if method.as_original:
                moved = as_original(source.network, target.network, moved)
            models = {_MOVED: moved}
            averages = {}
            for t in (*self.t, *sorted(self.grid)):
                both = [moved, crossing.b]
                averages[t] = otf.average(both, (1 - t, t))
            for t in self.t:
                models[f"t = {t:g}"] = averages[t]
            # Least squares solves for the kernels anew, whatever they were scaled by.
            if not method.as_original:
                t = self.t[0]
                both = [moved, crossing.b]
                alone = repaired(crossing, plans, [moved], (1.0,), images)
                models[_MOVED + _REPAIRED] = alone
                average = repaired(crossing, plans, both, (1 - t, t), images)
                models[f"t = {t:g}" + _REPAIRED] = average

            labels = {"source": source.factor, "target": target.factor, "method": method.name}
            chances = {}
            for t in sorted(self.grid):
                average = reestimated(target.network, averages[t], images)
                chances[t] = target.chooser.accuracy(average)
                run.add(chances[t], measure="average", t=t, **labels)
            # No test image has a say in the choice of t.
            best = max(chances, key=lambda t: chances[t][_HELD_OUT])
            for name, model in models.items():
                model = reestimated(target.network, model, images)
                accuracy = target.judge.accuracy(model)
                run.add(accuracy, measure=name, **labels)
            model = reestimated(target.network, averages[best], images)
            accuracy = target.judge.accuracy(model)
            run.add(accuracy, measure=_BEST, t=best, **labels)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows a row for each direction and method."""
        alone = where(records, measure="alone").set_index("source")["value"]
        alone = alone.map("{:.2f}".format)
        shown = where(records, metric=ACCURACY).dropna(subset="method")
        way = _ways(shown)
        a = shown["source"].map(alone)
        b = shown["target"].map(alone)
        both = a + " / " + b
        # The best average is shown with its t; the others have theirs in the title.
        t = shown["t"].map(" ({:g})".format)
        t = t.where(shown["t"].notna(), "")
        texts = shown["value"].map("{:.2f}".format).str.cat(t)
        shown = shown.assign(way=way, both=both, value=texts)
        cells = pivot(shown, ["way", "both", "method"], "measure", "first")
        first, *others = [f"t = {t:g}" for t in self.t]
        order = [_MOVED, _MOVED + _REPAIRED, first, first + _REPAIRED, *others, _BEST]
        return [table(cells.reindex(columns=order), "A onto B (%)", "A / B", "method")]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots A moved and the first average, as they are and repaired."""
        alone = where(records, measure="alone")
        names = alone["source"].map("x{:g} alone".format)
        levels = dict(zip(names, alone["value"], strict=True))
        first = f"t = {self.t[0]:g}"
        order = [_MOVED, _MOVED + _REPAIRED, first, first + _REPAIRED]
        shown = records[records["measure"].isin(order)]
        names = _ways(shown) + ": " + shown["method"]
        shown = shown.assign(name=names)
        cells = bars(shown, "name", "measure").reindex(columns=order)
        plot_bars(path, self.title, ACCURACY, cells, levels)


def _ways(records: pd.DataFrame) -> pd.Series:
    """Returns the direction of each record, such as "x2 onto x1"."""
    source = records["source"].map("x{:g}".format)
    target = records["target"].map("x{:g}".format)
    return source + " onto " + target
