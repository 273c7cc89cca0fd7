"""Fine-tuning of fused models at equal epochs for all starts (Singh & Jaggi 2020, section 5.2)."""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import otfusion_jax as otf
from experiments import report
from experiments.evaluate import loss_and_error
from experiments.methods import AVERAGES, VARIANTS, reestimated
from experiments.pairs import Pair, network, pair_arguments, pair_of, parents
from experiments.runs import Request
from experiments.train import TrainConfig, train

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
        default=(1.0, 0.3, 0.1),
        help="peak step sizes, as multiples of the recipe's (default: 1 0.3 0.1)",
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

    The schedule of each start is chosen by accuracy on images held out from training; models from
    files may have been trained on these.

    Args:
        request: The command.

    Raises:
        ValueError: No training images are left.
    """
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
    held_out = (whole.train_images[count:], whole.train_labels[count:])
    architecture = network(request.model, dataset)
    models = parents(request, architecture, dataset, folder, timings)
    pair = pair_of(request, architecture, dataset, models)
    starts = _starts(request, pair)

    apply = architecture.apply
    judged = jax.jit(lambda params, x, y: loss_and_error(lambda batch: apply(params, batch), x, y))
    splits = {
        "validation": tuple(map(jnp.asarray, held_out)),
        "test": (jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)),
    }

    def both(params: PyTree) -> dict[str, float]:
        found = {}
        for name, split in splits.items():
            loss, error = judged(params, *split)
            found[name] = report.rounded(100 - error)
            found[f"{name} loss"] = report.rounded(loss)
        return found

    loss, error = loss_and_error(
        lambda batch: jnp.log(otf.ensemble(apply, models, batch)), *splits["test"]
    )
    results: dict[str, Any] = {
        "ensemble": report.rounded(100 - error),
        "ensemble loss": report.rounded(loss),
        "starts": {},
    }
    schedules = _schedules(request)
    for name, start in starts.items():
        runs = []
        for label, config in schedules.items():
            began = time.perf_counter()
            trained = train(request.model, config, dataset, request.seeds[0], folder, start)
            timings[f"{name}, {label}"] = time.perf_counter() - began
            runs.append({"schedule": label, **both(trained.params)})
        best = max(runs, key=lambda found: found["validation"])
        results["starts"][name] = {"before": both(start), "runs": runs, "best": best}
    report.plot_bars(
        folder / "starts.png",
        f"{request.title}: {request.options['fine_tune_epochs']} epochs more",
        "test accuracy (%)",
        {name: (s["before"]["test"], s["best"]["test"]) for name, s in results["starts"].items()},
        ("before", "after"),
        {"ensemble of the parents": results["ensemble"]},
    )
    report.write_results(folder, request, request.title, _table(results), results, timings)


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


def _table(results: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{start['before']['test']:.2f}",
            f"{start['best']['test']:.2f}",
            f"{start['best']['validation']:.2f}",
            f"{start['before']['test loss']:.4f}",
            f"{start['best']['test loss']:.4f}",
            start["best"]["schedule"],
        )
        for name, start in results["starts"].items()
    ]
    ensemble, loss = f"{results['ensemble']:.2f}", f"{results['ensemble loss']:.4f}"
    rows.append(("ensemble of the parents", ensemble, "", "", loss, "", ""))
    header = (
        "accuracy (%)",
        "before, test",
        "after, test",
        "validation",
        "loss before (nats)",
        "loss after",
        "chosen schedule",
    )
    return report.markdown_table(header, rows)
