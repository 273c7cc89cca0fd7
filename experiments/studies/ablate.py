"""What Algorithm 1 owes to sharp plans, and to the number of samples."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pandas as pd
from jaxtyping import PyTree
from ott.geometry import costs

import otfusion_jax as otf
from experiments.alignments import activation_grams, preactivation_grams
from experiments.evaluate import ACCURACY
from experiments.methods import AVERAGED, EVENLY, VANILLA
from experiments.networks import counts, reestimated
from experiments.pairs import Pair, PairStudy
from experiments.plots import Panel, plot_lines
from experiments.report import mean_and_deviation, pivot, progress, table, where
from experiments.runs import Run

Grams = dict[str, otf.Gram] | None


@dataclasses.dataclass(frozen=True)
class _Units:
    """What units are compared by: inner products of what they compute, if any, under a metric."""

    name: str
    grams: Callable[[Pair, int], Grams]
    metric: costs.CostFn


_WEIGHTS = _Units("weights", lambda pair, samples: None, costs.SqEuclidean())
_ACTIVATIONS = _Units("activations", preactivation_grams, costs.Euclidean())
_CORRELATIONS = _Units("correlations", activation_grams, costs.Cosine())


@dataclasses.dataclass(frozen=True)
class Ablate(PairStudy):
    """Entropy of the plans, and the number of samples, of Algorithm 1."""

    command: ClassVar[str] = "ablate"

    seeds: tuple[int, int] = (0, 1)
    """Seeds of the models."""
    epsilons: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Strengths of the entropy, in standard deviations of the cost."""
    iterations: int = 2000
    """Iterations of Sinkhorn at most."""
    samples: tuple[int, ...] = (10, 20, 50, 100, 200, 500, 1000)
    """Numbers of images that activations are compared on."""
    draws: int = 5
    """Draws of images, for each number."""

    def check(self) -> None:
        """Refuses to draw nothing, or single images, which have no deviation."""
        super().check()
        if min(self.samples) < 2 or self.draws < 1:
            raise ValueError(
                f"--samples are {sorted(self.samples)} and --draws {self.draws}; give 2 samples or"
                " more, and at least 1 draw."
            )

    def measure(self, run: Run) -> None:
        """Fuses two models with ever softer plans and with ever more samples.

        The softer its plans, the less is left of A, until the average does what B does. So A as it
        was moved is measured as well.
        """
        network = run.network
        judge = run.judge()
        pair = self.pair(run, run.models(), self.seeds)

        def add(pair: Pair, model: PyTree, **labels) -> None:
            model = reestimated(network, model, pair.images)
            run.add(judge.accuracy(model), **labels)

        # A model that no plans have made stands in the first column of the table.
        alone = {"units": _WEIGHTS.name, "measure": AVERAGED.name, "converged": True, "draw": 0}
        run.add(judge.accuracy(pair.a), plans="model A", **alone)
        run.add(judge.accuracy(pair.b), plans="model B", **alone)
        vanilla = AVERAGED.average(pair, pair.a, EVENLY)
        add(pair, vanilla, plans=VANILLA.name, **alone)

        # By their epsilon; exact plans are those without entropy.
        solvers: dict[float, otf.AbstractSolver] = {0: otf.Exact()}
        for epsilon in sorted(self.epsilons):
            solvers[epsilon] = otf.Sinkhorn(epsilon, max_iterations=self.iterations)
        with run.timed("entropy"):
            for units in (_WEIGHTS, _ACTIVATIONS, _CORRELATIONS):
                grams = units.grams(pair, self.images)
                for epsilon, solver in progress(solvers.items(), f"solvers, {units.name}"):
                    moved, converged = _moved(pair, solver, units, grams)
                    plans = f"epsilon {epsilon:g}" if epsilon else "exact"
                    labels = {"units": units.name, "plans": plans, "epsilon": epsilon, "draw": 0}
                    average = AVERAGED.average(pair, moved, EVENLY)
                    add(pair, average, measure=AVERAGED.name, converged=converged, **labels)
                    add(pair, moved, measure="A moved", converged=True, **labels)

        numbers = sorted(self.samples)
        with run.timed("samples"):
            for draw in progress(range(1, self.draws + 1), "draws"):
                # The fewer images of a draw are the first of the many.
                most = dataclasses.replace(self, images=numbers[-1])
                few = most.pair(run, [pair.a, pair.b], self.seeds, draw=draw)
                for units in (_ACTIVATIONS, _CORRELATIONS):
                    for number in numbers:
                        grams = units.grams(few, number)
                        moved, _ = _moved(few, otf.Exact(), units, grams)
                        average = AVERAGED.average(pair, moved, EVENLY)
                        labels = {"plans": "exact", "images": number, "draw": draw}
                        labels |= {"units": units.name, "measure": AVERAGED.name}
                        add(pair, average, **labels)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows accuracies by plans and by images."""
        soft = where(records, draw=0)
        marks = soft["converged"].map({True: "", False: " *"})
        soft = soft.assign(
            value=soft["value"].map("{:.2f}".format) + marks,
            measure=soft["units"] + ", " + soft["measure"],
        )
        drawn = records[records["draw"] > 0].astype({"images": int})
        samples = pivot(drawn, "images", "units", mean_and_deviation)
        return [
            table(pivot(soft, "plans", "measure", "first"), ACCURACY),
            "*: not solved to the tolerance",
            table(samples, "images"),
        ]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots accuracy over the entropy, averaged and of A as moved, and over the images."""
        soft = records[(records["epsilon"] > 0)]
        exact = where(records, epsilon=0)
        # The accuracy of exact plans is a level, shown as a curve to have a style of its own.
        names = exact["units"] + ", exact"
        exact = exact.assign(units=names).drop(columns="epsilon")
        epsilons = pd.DataFrame({"epsilon": sorted(self.epsilons)})
        exact = exact.merge(epsilons, how="cross")
        averaged = where(pd.concat([soft, exact]), measure=AVERAGED.name)
        levels = {}
        for name in ("model A", "model B"):
            levels[name] = where(records, plans=name)["value"].item()
        drawn = records[records["draw"] > 0]
        average = Panel(
            f"{ACCURACY}, averaged",
            averaged,
            x="epsilon",
            curve="units",
            label="epsilon, in standard deviations of the cost",
            levels=levels,
            log=True,
        )
        a_moved = dataclasses.replace(
            average,
            quantity=f"{ACCURACY}, A moved",
            records=where(soft, measure="A moved"),
            levels={},
        )
        by_images = Panel(
            f"{ACCURACY}, averaged, exact plans",
            drawn,
            x="images",
            curve="units",
            label="images that activations are compared on",
            spread=True,
            log=True,
        )
        plot_lines(path, self.title, [average, a_moved, by_images])


def _moved(
    pair: Pair, solver: otf.AbstractSolver, units: _Units, grams: Grams
) -> tuple[PyTree, bool]:
    """Moves A by Algorithm 1; says whether each of the plans was solved to its tolerance."""
    symmetry = pair.network.symmetry
    plans = otf.align(
        symmetry,
        pair.a,
        pair.b,
        method=otf.ForwardPass(),
        metric=units.metric,
        solver=solver,
        grams=grams,
        leaf_weight=counts,
    )
    return otf.transport(symmetry, plans, pair.a), bool(plans.converged)
