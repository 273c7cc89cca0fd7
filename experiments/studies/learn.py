"""Alignments learned by descent on the midpoint's loss, beside those found in the weights."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
import pandas as pd
from jaxtyping import Array, Int, PyTree

import otfusion_jax as otf
from experiments.evaluate import ACCURACY, BARRIERS, LOSS
from experiments.methods import AVERAGED, EVENLY, LEAST_SQUARES, METHODS
from experiments.networks import counts
from experiments.pairs import Pair, seen_images
from experiments.plots import Panel, plot_lines
from experiments.report import column, extent, mean, progress, table, where
from experiments.runs import Run, Study
from otfusion_jax.pictures.path import PATH_AXIS


@dataclasses.dataclass(frozen=True)
class Learn(Study):
    """Learn the alignment by descent on the loss of the average."""

    command: ClassVar[str] = "learn"

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Seeds of the models, of which all pairs are fused."""
    steps: int = 200
    """Steps of the descent."""
    batch_size: int = 256
    """Training images of a step."""
    step_size: float = 0.1
    """Step size of Adam at the start."""
    epsilon: float = 0.5
    """Strength of Sinkhorn's entropy, in standard deviations of the cost at the start."""
    images: int = 1000
    """Training images that repair an average."""
    path_points: int = 11
    """Points evaluated from A to B, an odd number so that the midpoint is one."""

    @property
    def title(self) -> str:
        """What the run is about, in words."""
        pairs = math.comb(len(self.seeds), 2)
        return f"{super().title}: mean of {pairs} pairs"

    def check(self) -> None:
        """Refuses to learn from nothing."""
        super().check()
        is_pair = len(self.seeds) >= 2
        if not is_pair or self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                "Give two --seeds or more, and at least one of --steps and --batch-size."
            )

    def measure(self, run: Run) -> None:
        """Fuses every pair of the models, by plans from the weights and by learned ones."""
        network = run.network
        judge = run.judge()
        t = jnp.linspace(0, 1, self.path_points)
        models = dict(zip(self.seeds, run.models(), strict=True))
        learn = self._learner(run)
        for seeds in progress(itertools.combinations(self.seeds, 2), "fusing"):
            a, b = (models[seed] for seed in seeds)
            pair = Pair(network, a, b, seen_images(run.dataset, seeds, self.images))
            name = ", ".join(map(str, seeds))
            add = functools.partial(run.add, pair=name)
            add(judge.measures(a), method="individuals", measure=AVERAGED.name)
            add(judge.measures(b), method="individuals", measure=AVERAGED.name)
            add(judge.ensemble([a, b]), method="ensemble", measure=AVERAGED.name)
            # For the first pair, compilation is included.
            with run.timed(f"learning, seeds {name}"):
                learned = jax.block_until_ready(learn(a, b))
            for step, loss in enumerate(learned.history.tolist()):
                add({"training loss of the average (nats)": loss}, method="learned", step=step)

            moved = {}
            for method in METHODS.values():
                moved[method.name] = method.move(pair)
            # Learned costs are matched exactly in the end: A is permuted, as by any other method.
            moved["learned"] = otf.transport(network.symmetry, learned.plans, a)
            moved["learned, before rounding"] = otf.transport(network.symmetry, learned.soft, a)
            for method, model in moved.items():
                for correction in (AVERAGED, LEAST_SQUARES):
                    fused = correction.average(pair, model, EVENLY)
                    add(judge.measures(fused), method=method, measure=correction.name)
                path = judge.path(model, b, t)
                height = {ACCURACY: path.heights[ACCURACY]}
                add(height, method=method, measure=BARRIERS[ACCURACY])
                for position, values in path.points:
                    add(values, method=method, measure="path", t=position)

    def _learner(self, run: Run) -> Callable[[PyTree, PyTree], otf.LearnedAlignment]:
        """Makes what learns the alignment of two models, compiled once for all pairs."""
        apply = run.network.apply
        images = jnp.asarray(run.dataset.train_images)
        labels = jnp.asarray(run.dataset.train_labels)

        def loss(params: PyTree, chosen: Int[Array, " batch"]) -> Array:
            logits = apply(params, images[chosen])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen])
            return losses.mean()

        # All pairs see the same batches, so that they differ in the models alone.
        key = jax.random.key(0)
        shape = (self.steps, self.batch_size)
        batches = jax.random.randint(key, shape, 0, len(labels))
        schedule = optax.cosine_decay_schedule(self.step_size, self.steps)
        return functools.partial(
            otf.learn_alignment,
            run.network.symmetry,
            loss,
            batches=batches,
            solver=otf.Sinkhorn(self.epsilon, relative=False, max_iterations=20),
            optimizer=optax.adam(schedule),
            leaf_weight=counts,
        )

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows the mean of each method over the pairs."""
        averaged = where(records, measure=AVERAGED.name)
        repaired = where(records, measure=LEAST_SQUARES.name)
        barriers = where(records, measure=BARRIERS[ACCURACY])
        methods = averaged[~averaged["method"].isin(["individuals", "ensemble"])]
        columns = {
            ACCURACY: column(where(averaged, metric=ACCURACY), "method", mean()),
            "of the pairs": column(where(methods, metric=ACCURACY), "method", extent),
            LOSS: column(where(averaged, metric=LOSS), "method", mean(4)),
            BARRIERS[ACCURACY]: column(barriers, "method", mean()),
            "least squares (%)": column(where(repaired, metric=ACCURACY), "method", mean()),
            "its loss (nats)": column(where(repaired, metric=LOSS), "method", mean(4)),
        }
        return [table(columns, "mean over pairs")]

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots accuracy and loss along the paths, means over the pairs."""
        paths = where(records, measure="path")
        ensemble = where(records, method="ensemble", metric=ACCURACY)["value"]
        panels = []
        for metric, levels in {ACCURACY: {"ensemble": ensemble.mean()}, LOSS: {}}.items():
            points = where(paths, metric=metric)
            panels.append(Panel(metric, points, "t", "method", PATH_AXIS, levels))
        plot_lines(path, self.title, panels)
