"""Federated averaging (McMahan et al. 2017) of two clients, with and without alignment."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import pandas as pd

from experiments.divisions import DividedStudy
from experiments.evaluate import ACCURACY
from experiments.methods import AVERAGED, DESCENT, LEAST_SQUARES, MATCHING, VANILLA, Fusion
from experiments.networks import reestimated
from experiments.pairs import Pair, seen_images
from experiments.plots import Panel, plot_lines
from experiments.report import mean, pivot, progress, table, where
from experiments.runs import Run

# What the server does.
_SERVERS = (
    Fusion(VANILLA),
    Fusion(DESCENT),
    Fusion(MATCHING),
    Fusion(VANILLA, LEAST_SQUARES),
    Fusion(DESCENT, LEAST_SQUARES),
    Fusion(MATCHING, LEAST_SQUARES),
)
# Between the seeds of one round and those of the next: each has an order of examples of its own.
_NEXT = 1000
_GLOBAL = "global model"
_ON_ALL_DATA = "trained on all data"


@dataclasses.dataclass(frozen=True)
class Federated(DividedStudy):
    """Average two clients that hold different data, round by round."""

    command: ClassVar[str] = "federated"

    same_start: bool = False
    """Start both clients from the first seed's parameters."""
    rounds: int = 2
    """Rounds of training by the recipe and averaging."""

    @property
    def title(self) -> str:
        """What the run is about, in words."""
        start = "the same start" if self.same_start else "starts of their own"
        return f"{super().title}, {start}"

    def check(self) -> None:
        """Refuses to run without a round."""
        super().check()
        if self.rounds < 1:
            raise ValueError(f"--rounds is {self.rounds}; give at least 1.")

    def measure(self, run: Run) -> None:
        """Lets two clients train on data of their own, and a server average them, again and again.

        The server knows how many examples each client has seen; methods that use data also see some
        images of both, without labels.
        """
        dataset = run.dataset
        judge = run.judge()
        parts = self.divided(dataset.train_labels)
        clients = [dataset.part(part) for part in parts]
        # The server weights the clients by how much they hold.
        count = len(dataset.train_labels)
        a = len(parts[0]) / count
        b = len(parts[1]) / count
        run.add({"share of the data": a}, method="client A")
        run.add({"share of the data": b}, method="client B")
        images = seen_images(dataset, self.seeds, self.images)
        first = self.start(dataset)
        for server in progress(_SERVERS, "servers"):
            start = first
            for number in range(self.rounds):
                labels = {"method": server.name, "round": number + 1}
                models = []
                for client, seed, name in zip(clients, self.seeds, "AB", strict=True):
                    model = run.train(seed + _NEXT * number, dataset=client, start=start)
                    models.append(model)
                    accuracy = judge.accuracy(model)
                    run.add(accuracy, model=f"client {name}", **labels)
                pair = Pair(run.network, models[0], models[1], images)
                with run.timed(server.name):
                    moved = server.method.move(pair)
                    start = server.correction.average(pair, moved, (a, b))
                    # A repaired average has statistics of its own.
                    if server.correction is AVERAGED:
                        start = reestimated(run.network, start, images)
                run.add(judge.accuracy(start), model=_GLOBAL, **labels)
        # One model that has seen as many examples as both clients together.
        recipe = self.train_config
        recipe = dataclasses.replace(recipe, epochs=self.rounds * recipe.epochs)
        together = run.train(self.seeds[0], config=recipe)
        labels = {"method": _ON_ALL_DATA, "model": _GLOBAL, "round": self.rounds}
        run.add(judge.accuracy(together), **labels)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows the global model after each round, and the clients before it is made."""
        accuracies = where(records, metric=ACCURACY)
        titles = accuracies["round"].map("round {:.0f}".format)
        accuracies = accuracies.assign(round=titles)
        shared = pivot(where(accuracies, model=_GLOBAL), "method", "round", mean())
        clients = accuracies[accuracies["model"] != _GLOBAL]
        both = pivot(clients, "method", "round", _both)
        return [
            table(shared, "global model (%)"),
            table(both, "clients A / B before averaging (%)"),
        ]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots the global model, and the mean of the clients, over the rounds."""
        together = where(records, method=_ON_ALL_DATA)["value"].item()
        servers = where(records, metric=ACCURACY)
        servers = servers[servers["method"] != _ON_ALL_DATA]
        is_global = servers["model"] == _GLOBAL
        after = Panel(
            f"{ACCURACY}, global model",
            servers[is_global],
            x="round",
            curve="method",
            label="round",
            levels={_ON_ALL_DATA: together},
        )
        before = dataclasses.replace(
            after,
            quantity=f"{ACCURACY}, mean of the clients before averaging",
            records=servers[~is_global],
            levels={},
        )
        plot_lines(path, self.title, [after, before])


def _both(values: pd.Series) -> str:
    a, b = values
    return f"{a:.2f} / {b:.2f}"
