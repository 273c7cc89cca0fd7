"""Fine-tuning of fused models at equal epochs for all starts (Singh & Jaggi 2020, section 5.2)."""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from experiments import report
from experiments.data import Dataset
from experiments.evaluate import ensemble_loss_and_error, loss_and_error
from experiments.methods import AVERAGES, VARIANTS, reestimated
from experiments.pairs import Network, Pair, network, pair_arguments, pair_of, parents
from experiments.runs import Request
from experiments.train import TrainConfig, train

_PARENTS = ("model A", "model B")
# What each start is made by: what moves model A, what makes one model, and the weights of the two.
_STARTS = {
    "model A": ("vanilla average", "averaged", (1.0, 0.0)),
    "model B": ("vanilla average", "averaged", (0.0, 1.0)),
    "vanilla average": ("vanilla average", "averaged", (0.5, 0.5)),
    "Algorithm 1, weights": ("Algorithm 1, weights", "averaged", (0.5, 0.5)),
    "coordinate descent": ("coordinate descent (fuse)", "averaged", (0.5, 0.5)),
    "coordinate descent, least squares": ("coordinate descent (fuse)", "least squares", (0.5, 0.5)),
    "activation matching, least squares": (
        "coordinate descent from activation matching",
        "least squares",
        (0.5, 0.5),
    ),
}
_USUAL = list(_STARTS)[:-1]  # those of the paper, and what `fuse` does
_SCHEDULES = ("one-cycle", "halved")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    pair_arguments(parser)
    parser.add_argument(
        "--fine-tune-epochs", type=int, default=5, help="of every start (default: 5)"
    )
    parser.add_argument(
        "--factors",
        nargs="+",
        type=float,
        default=(3.0, 1.0, 0.3),
        help="peak step sizes, as multiples of the recipe's (default: 3 1 0.3)",
    )
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=_SCHEDULES,
        default=_SCHEDULES,
        help="up to the step size and down again, or halved with every epoch (default: both)",
    )
    parser.add_argument(
        "--starts",
        nargs="+",
        choices=list(_STARTS),
        default=_USUAL,
        metavar="START",
        help=f"of {', '.join(map(repr, _STARTS))} (default: all but the last)",
    )
    parser.add_argument(
        "--validation-images",
        type=int,
        default=5000,
        help="last training images, which nothing is trained on, to choose by (default: 5000)",
    )


def run(request: Request) -> None:
    """Trains parents, averages and fused models on, each under several schedules.

    Models are paired in the order given: of seeds 0 1 2 3, 0 with 1 and 2 with 3. The schedule of
    each start is chosen by accuracy on images held out from training; models from files may have
    been trained on these.

    Args:
        request: The command.

    Raises:
        ValueError: A model is without another, or no training images are left.
    """
    if len(request.seeds) % 2:
        raise ValueError("Give --seeds of pairs: 0 1 for one, 0 1 2 3 for two.")
    folder = request.folder("fine_tune")
    timings: dict[str, float] = {}
    whole = request.load()
    count = len(whole.train_labels) - request.options["validation_images"]
    if count < 1 or request.options["validation_images"] < 1:
        raise ValueError(
            f"--validation-images is {request.options['validation_images']}; there are"
            f" {len(whole.train_labels)} training images to share."
        )
    dataset = whole.part(slice(count))
    architecture = network(request.model, dataset, request.train_config.augment)
    models = parents(request, architecture, dataset, folder, timings)
    bench = _Bench(architecture, whole.part(slice(count, None)), dataset)
    pairs = {}
    for i in range(0, len(models), 2):
        small = dataclasses.replace(request, seeds=request.seeds[i : i + 2])
        pair = pair_of(small, architecture, dataset, models[i : i + 2])
        pairs[", ".join(map(str, small.seeds))] = _compare(
            small, pair, dataset, bench, folder, timings
        )

    results = {"mean": _mean(pairs), "pairs": pairs}
    starts, title = results["mean"]["starts"], request.title
    if len(pairs) > 1:
        title = f"{title}: mean of {len(pairs)} pairs"
    report.plot_bars(
        folder / "starts.png",
        f"{title}: {request.options['fine_tune_epochs']} epochs more",
        "test accuracy (%)",
        {name: (found["before"], found["after"]) for name, found in starts.items()},
        ("before", "after"),
        {"ensemble of the parents": results["mean"]["ensemble"]},
    )
    report.write_results(folder, request, title, _table(results), results, timings)


class _Bench:
    """Judges models on images held out from training and on the test split; compiled once."""

    def __init__(self, architecture: Network, held_out: Dataset, dataset: Dataset):
        def judged(params: PyTree, images: Array, labels: Array) -> Array:
            return loss_and_error(lambda batch: architecture.apply(params, batch), images, labels)

        self._judged = jax.jit(judged)
        self._together = jax.jit(functools.partial(ensemble_loss_and_error, architecture.apply))
        self._splits = {
            "validation": tuple(map(jnp.asarray, (held_out.train_images, held_out.train_labels))),
            "test": tuple(map(jnp.asarray, (dataset.test_images, dataset.test_labels))),
        }

    def both(self, params: PyTree) -> dict[str, float]:
        """Accuracy in percent and loss in nats on each split."""
        found = {}
        for name, split in self._splits.items():
            loss, error = self._judged(params, *split)
            found[name] = report.rounded(100 - error)
            found[f"{name} loss"] = report.rounded(loss)
        return found

    def ensemble(self, models: list[PyTree]) -> dict[str, float]:
        """Accuracy and loss of the models' mean probabilities on the test split."""
        loss, error = self._together(models, *self._splits["test"])
        return {"ensemble": report.rounded(100 - error), "ensemble loss": report.rounded(loss)}


def _compare(
    request: Request,
    pair: Pair,
    dataset: Dataset,
    bench: _Bench,
    folder: Path,
    timings: dict[str, float],
) -> dict[str, Any]:
    """Trains every start of one pair on, under every schedule.

    Args:
        request: The command, with the seeds of this pair.
        pair: The parents.
        dataset: What to train on.
        bench: Judges.
        folder: Of the run.
        timings: Receives the seconds of each training.

    Returns:
        Accuracies in percent and losses in nats, ready for JSON.
    """
    starts = {}
    for name, start in _starts(request, pair).items():
        runs = []
        for label, config in _schedules(request).items():
            began = time.perf_counter()
            trained = train(request.model, config, dataset, request.seeds[0], folder, start)
            seconds = time.perf_counter() - began
            timings[f"seeds {', '.join(map(str, request.seeds))}: {name}, {label}"] = seconds
            judged = bench.both(trained.params)
            runs.append({"schedule": label, "step size": config.learning_rate, **judged})
        best = max(runs, key=lambda found: found["validation"])
        starts[name] = {"before": bench.both(start), "runs": runs, "best": best}
    return {**bench.ensemble([pair.a, pair.b]), "starts": starts}


def _starts(request: Request, pair: Pair) -> dict[str, PyTree]:
    """What is trained on."""
    chosen = {name: _STARTS[name] for name in request.options["starts"]}
    methods = dict.fromkeys(method for method, _, _ in chosen.values())
    moved = {method: VARIANTS[method](pair) for method in methods}
    found = {}
    for name, (method, average, weights) in chosen.items():
        found[name] = AVERAGES[average](pair, moved[method], weights)
        # A parent has statistics of its own, and a repaired average has been given some.
        if average == "averaged" and max(weights) < 1:
            found[name] = reestimated(pair.network, found[name], pair.images)
    return found


def _schedules(request: Request) -> dict[str, TrainConfig]:
    """Each kind of schedule with each step size."""
    recipe = request.train_config
    epochs = request.options["fine_tune_epochs"]
    found = {}
    for factor in request.options["factors"]:
        rate = factor * recipe.learning_rate
        halvings = tuple((epoch, 0.5) for epoch in range(1, epochs))
        kinds = {"one-cycle": (True, ()), "halved": (False, halvings)}
        for kind in request.options["schedules"]:
            one_cycle, drops = kinds[kind]
            found[f"{kind}, {rate:g}"] = dataclasses.replace(
                recipe, epochs=epochs, learning_rate=rate, one_cycle=one_cycle, drops=drops
            )
    return found


def _mean(pairs: dict[str, Any]) -> dict[str, Any]:
    """Averages over pairs; what a start ends above the better parent, with its deviation.

    Parents are trained on like any start, where they are among the starts.
    """
    found: dict[str, Any] = {
        key: report.rounded(np.mean([pair[key] for pair in pairs.values()]))
        for key in ("ensemble", "ensemble loss")
    }
    every = [pair["starts"] for pair in pairs.values()]
    better = []
    if set(_PARENTS) <= set(every[0]):
        better = [max(starts[name]["best"]["test"] for name in _PARENTS) for starts in every]
    found["starts"] = {}
    for name in every[0]:
        means = {
            "before": [starts[name]["before"]["test"] for starts in every],
            "after": [starts[name]["best"]["test"] for starts in every],
            "validation": [starts[name]["best"]["validation"] for starts in every],
            "loss before": [starts[name]["before"]["test loss"] for starts in every],
            "loss after": [starts[name]["best"]["test loss"] for starts in every],
        }
        found["starts"][name] = {key: report.rounded(np.mean(of)) for key, of in means.items()}
        if better:
            above = np.subtract([starts[name]["best"]["test"] for starts in every], better)
            found["starts"][name]["above the better parent"] = report.rounded(np.mean(above))
            found["starts"][name]["deviation"] = report.deviation(above)
    return found


def _chosen(found: dict[str, Any]) -> str:
    """The schedule chosen for a start; says so where a step beyond those tried may be better."""
    best, steps = found["best"], [run["step size"] for run in found["runs"]]
    if len(set(steps)) == 1 or min(steps) < best["step size"] < max(steps):
        return best["schedule"]
    edge = "largest" if best["step size"] == max(steps) else "smallest"
    return f"{best['schedule']} ({edge} tried)"


def _table(results: dict[str, Any]) -> str:
    mean, pairs = results["mean"], results["pairs"].values()
    rows = []
    for name, found in mean["starts"].items():
        schedules = dict.fromkeys(_chosen(pair["starts"][name]) for pair in pairs)
        above = found.get("above the better parent")
        rows.append(
            (
                name,
                f"{found['before']:.2f}",
                f"{found['after']:.2f}",
                "" if above is None else report.with_deviation(above, found["deviation"], "+"),
                f"{found['validation']:.2f}",
                f"{found['loss before']:.4f}",
                f"{found['loss after']:.4f}",
                "; ".join(schedules),
            )
        )
    ensemble, loss = f"{mean['ensemble']:.2f}", f"{mean['ensemble loss']:.4f}"
    rows.append(("ensemble of the parents", ensemble, "", "", "", loss, "", ""))
    header = (
        "accuracy (%)",
        "before, test",
        "after, test",
        "above the better parent",
        "validation",
        "loss before (nats)",
        "loss after",
        "chosen schedule",
    )
    return report.markdown_table(header, rows)
