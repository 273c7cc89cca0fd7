"""Ways to merge models with the same data, of models as they are and of aligned ones."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Num, PyTree

import otfusion_jax as otf
from experiments.evaluate import ACCURACY, LOSS, Judge
from experiments.networks import Network, counts
from experiments.plots import bars, plot_bars
from experiments.report import mean, pivot, progress, table, where
from experiments.runs import Run, Study

_AS_THEY_ARE = "as they are"
_ALIGNED = "aligned"
# How many images have their gradients taken at once: each has as many numbers as the model.
_AT_ONCE = 50


@dataclasses.dataclass(frozen=True)
class Soups(Study):
    """Compare ways to merge several models, with the same data."""

    command: ClassVar[str] = "soups"

    images: int = 500
    """Training images that inner products, gradients and the scores of soups are of."""

    def check(self) -> None:
        """Refuses networks whose layers' inputs are not known here."""
        super().check()
        if self.model != "mlpnet" or len(self.seeds) < 2 or self.images < 1:
            raise ValueError(
                "Give --model mlpnet, two --seeds or more, and at least one of --images."
            )

    def measure(self, run: Run) -> None:
        """Merges the models by every method, as they are and aligned to the last."""
        network, judge = run.network, run.judge()
        models = list(run.models())
        for model in models:
            run.add(judge.measures(model), method="individuals", measure=_AS_THEY_ARE)
        run.add(judge.ensemble(models), method="ensemble", measure=_AS_THEY_ARE)
        aligned = []
        for model in models[:-1]:
            plans = otf.align(network.symmetry, model, models[-1], leaf_weight=counts)
            aligned.append(otf.transport(network.symmetry, plans, model))
        aligned.append(models[-1])
        # Scores of soups are of labels; all else is of the same images without.
        images = jnp.asarray(run.dataset.train_images[: self.images])
        labelled = Judge(network.apply, images, run.dataset.train_labels[: self.images])
        ways = _ways(network, images, lambda params: labelled.accuracy(params)[ACCURACY])
        for measure, some in {_AS_THEY_ARE: models, _ALIGNED: aligned}.items():
            for name, merge in progress(ways.items(), measure):
                with run.timed(f"{name}, {measure}"):
                    merged = jax.block_until_ready(merge(some))
                # A partial zip is one model up to a layer, and several from there on.
                found = (
                    judge.ensemble(merged) if isinstance(merged, list) else judge.measures(merged)
                )
                run.add(found, method=name, measure=measure)

    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows accuracy and loss of every way to merge."""
        tables = []
        for metric, digits in {ACCURACY: 2, LOSS: 4}.items():
            cells = pivot(where(records, metric=metric), "method", "measure", mean(digits))
            tables.append(table(cells.reindex(columns=[_AS_THEY_ARE, _ALIGNED]), metric))
        return tables

    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots the accuracies."""
        found = where(records, metric=ACCURACY)
        alone = found["method"].isin(["individuals", "ensemble"])
        levels = found[alone].groupby("method")["value"].mean()
        shown = bars(found[~alone], "method", "measure")
        plot_bars(path, self.title, ACCURACY, shown, {str(k): float(v) for k, v in levels.items()})


def _ways(
    network: Network, images: Num[Array, "n ..."], score: Callable[[PyTree], float]
) -> dict[str, Callable[[list[PyTree]], PyTree]]:
    """Returns the ways to merge by name: from models to one, or to a list that vote.

    Args:
        network: The architecture.
        images: What inner products and gradients are of.
        score: The score of a soup.
    """

    def fisher_weighted(models: list[PyTree]) -> PyTree:
        return otf.fisher_average(models, [_fisher(network, model, images) for model in models])

    def regression(models: list[PyTree]) -> PyTree:
        return otf.regmean(models, [_grams(network, model, images) for model in models])

    return {
        "average": otf.average,
        "Fisher-weighted average": fisher_weighted,
        "RegMean": regression,
        "greedy soup (with labels)": lambda models: otf.greedy_soup(models, score).params,
        "partial zip, half of the layers": _partial_zip,
    }


def _fisher(network: Network, params: PyTree, images: Array) -> PyTree:
    """Estimates the diagonal of the Fisher information, of labels that the model draws."""

    @jax.jit
    def of_batch(batch: Array, key: Array) -> PyTree:
        def squared(image: Array, key: Array) -> PyTree:
            def log_likelihood(params: PyTree) -> Array:
                logits = network.apply(params, image[None])[0]
                label = jax.random.categorical(key, jax.lax.stop_gradient(logits))
                return jax.nn.log_softmax(logits)[label]

            return jax.tree.map(jnp.square, jax.grad(log_likelihood)(params))

        found = jax.vmap(squared)(batch, jax.random.split(key, len(batch)))
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), found)

    total = jax.tree.map(jnp.zeros_like, params)
    for first in range(0, len(images), _AT_ONCE):
        key = jax.random.fold_in(jax.random.key(0), first)
        total = jax.tree.map(jnp.add, total, of_batch(images[first : first + _AT_ONCE], key))
    return total


def _grams(network: Network, params: PyTree, images: Array) -> dict[str, Array]:
    """Takes the inner products of what every dense layer is multiplied with."""
    symmetry = network.symmetry
    activations = otf.features(symmetry, network.apply, params, images, at="activation")
    inputs = {}
    for name, group in symmetry.items():
        for member in group.having("consumes"):
            inputs[member.path] = activations[name]
    pixels = images.reshape(len(images), -1)
    grams = {}
    for leaf in symmetry.leaves:
        if len(leaf.shape) == 2:
            # The layer that consumes no units consumes the image.
            taken = inputs.get(leaf.path, pixels)
            grams[leaf.path] = taken.T @ taken
    return grams


def _partial_zip(models: list[PyTree]) -> list[PyTree]:
    """Averages the first half of the layers, and leaves every model the rest, as heads that vote.

    After Stoica et al., ZipIt! Merging Models from Different Tasks without Training, ICLR 2024, but
    for units of one model that are merged with each other.
    """
    names = []
    for path, _ in jax.tree_util.tree_flatten_with_path(models[0])[0]:
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    layers = sorted({name.rpartition("/")[0] for name in names})
    shared = set(layers[: math.ceil(len(layers) / 2)])
    zipped = []
    for number in range(len(models)):
        alone = np.eye(len(models))[number].tolist()

        def weights(path: str, alone: list[float] = alone) -> list[float] | None:
            return None if path.rpartition("/")[0] in shared else alone

        zipped.append(otf.average(models, weights))
    return zipped
