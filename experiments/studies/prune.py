"""Structured pruning, and fusion of the whole network into what is left of it, without data."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pandas as pd
import tyro

import otfusion_jax as otf
from experiments.crossings import Crossing
from experiments.evaluate import ACCURACY
from experiments.methods import DESCENT_ACROSS
from experiments.narrow import narrowed
from experiments.plots import Panel, plot_lines
from experiments.report import mean, pivot, progress, table, where
from experiments.runs import Run, Study

_ORDERS = {"l1": 1, "l2": 2}


@dataclasses.dataclass(frozen=True)
class Prune(Study):
    """Leave out units of a network, and fuse the whole into what is left."""

    command: ClassVar[str] = "prune"

    seeds: tuple[int, ...] = (0,)
    """Seeds of the networks."""
    weights: Annotated[tuple[Path, ...] | None, tyro.conf.arg(metavar="FILE [FILE ...]")] = None
    """Safetensors or npz with PyTorch's names and layouts, instead of training."""
    shares: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8)
    """Shares of each layer's units that are left out."""
    norms: tuple[Literal["l1", "l2"], ...] = ("l1", "l2")
    """Norms of the incoming weights, by which units are chosen."""
    t: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    """Positions of the averages, (1 - t) · parent + t · child."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that networks are read from, instead of training them."""
        return self.weights or ()

    def check(self) -> None:
        """Refuses a share that leaves nothing out, or nothing over, and a t off the way."""
        super().check()
        for flag, values in {"shares": self.shares, "t": self.t}.items():
            if not all(0 < value < 1 for value in values):
                raise ValueError(f"--{flag} is {list(values)}; give numbers between 0 and 1.")

    def measure(self, run: Run) -> None:
        """Prunes each network, moves it onto its pruned child and averages the two."""
        whole = run.network
        networks = dict(zip(self.model_titles, run.models(), strict=True))
        judge = run.judge(whole)
        # A network of which nothing is left out.
        for name, parent in networks.items():
            labels = {"model": name, "share": 0.0, "norm": ""}
            run.add(judge.accuracy(parent), measure="pruned", **labels)
        for share in progress(sorted(self.shares), "pruning"):
            few = run.network_of(1 - share)
            judge = run.judge(few)
            for norm in self.norms:
                for name, parent in networks.items():
                    child = narrowed(whole.symmetry, parent, few.symmetry, _ORDERS[norm])
                    crossing = Crossing(whole, few, parent, child)
                    moved = crossing.moved(DESCENT_ACROSS.plans(crossing))
                    models = {"pruned": child, "parent, moved": moved}
                    for t in sorted(self.t):
                        average = otf.average([moved, child], (1 - t, t))
                        models[f"t = {t:g}"] = average
                    labels = {"model": name, "share": share, "norm": norm}
                    for measure, model in models.items():
                        run.add(judge.accuracy(model), measure=measure, **labels)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows a row for each share, norm and network."""
        percent = 100 * records["share"]
        records = records.assign(share=percent.map("{:.0f} %".format))
        cells = pivot(records, ["model", "share", "norm"], "measure", mean())
        return [table(cells, ACCURACY, "left out", "norm")]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots accuracy over the share, a panel for each norm."""
        whole = where(records, share=0)["value"].mean()
        panels = []
        for norm in self.norms:
            quantity = f"{ACCURACY}, kept by {norm} norm"
            levels = {} if panels else {"whole": whole}
            pruned = where(records, norm=norm)
            panel = Panel(quantity, pruned, "share", "measure", "units left out", levels)
            panels.append(panel)
        plot_lines(path, self.title, panels)
