"""One-shot fusion of two models trained from different seeds (Singh & Jaggi 2020, section 5.1)."""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

import otfusion_jax as otf
from experiments import report
from experiments.data import Dataset
from experiments.evaluate import ensemble_loss_and_error, loss_and_error
from experiments.methods import AVERAGES, METHODS, VARIANTS, mended
from experiments.pairs import Pair, network, pair_arguments, pair_of, parents
from experiments.runs import Request

# Whose paths are evaluated and drawn; of all variants a plot would show nothing.
_PATHS = tuple(METHODS)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    pair_arguments(parser)
    parser.add_argument(
        "--variants",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="all variants of Algorithm 1, the original's own settings, activation matching",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(VARIANTS),
        metavar="METHOD",
        help=f"these alone, of {', '.join(map(repr, VARIANTS))}",
    )
    parser.add_argument(
        "--path-points",
        type=int,
        default=21,
        help="points evaluated from A to B, an odd number so that the midpoint is one",
    )
    parser.add_argument(
        "--path-images", type=int, help="evaluate paths on so many of the test images only"
    )


def run(request: Request) -> None:
    """Fuses two models by every method; leaves a table, a JSON file and a plot.

    Args:
        request: The command.
    """
    folder = request.folder("one_shot")
    timings: dict[str, float] = {}
    start = time.perf_counter()
    dataset = request.load()
    timings["reading data"] = time.perf_counter() - start
    architecture = network(request.model, dataset, request.train_config.augment)
    models = parents(request, architecture, dataset, folder, timings)
    pair = pair_of(request, architecture, dataset, models)
    results = _compare(request, pair, dataset, timings)

    title = request.title
    methods = results["methods"]
    panels = {
        quantity: {name: found[path] for name, found in methods.items() if path in found}
        for quantity, path in {
            "test accuracy (%)": "path accuracy",
            "test loss (nats)": "path loss",
        }.items()
    }
    levels = {"test accuracy (%)": {"ensemble": results["ensemble"]}}
    x = (report.PATH_AXIS, results["t"])
    report.plot_lines(folder / "paths.png", title, x, panels, levels)
    tables = [
        _table(("test accuracy (%)", *AVERAGES, "error barrier (points)"), results, 2),
        _table(("test loss (nats)", *AVERAGES, "loss barrier (nats)"), results["losses"], 4),
    ]
    report.write_results(folder, request, title, "\n\n".join(tables), results, timings)


def _compare(
    request: Request, pair: Pair, dataset: Dataset, timings: dict[str, float]
) -> dict[str, Any]:
    """Evaluates both models, their ensemble and every method on the test split.

    Args:
        request: The command.
        pair: The models.
        dataset: The data.
        timings: Receives the seconds that each method took, compilation included.

    Returns:
        Accuracies in percent and barriers in percentage points, and losses in nats (of a text, per
        character) in the same form, ready for JSON.
    """
    apply = pair.network.apply
    images, labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    few = slice(request.options["path_images"])
    t = jnp.linspace(0, 1, request.options["path_points"])

    @jax.jit
    def judged(params: PyTree, images: Array, labels: Array) -> Array:
        return loss_and_error(lambda batch: apply(params, batch), images, labels)

    @jax.jit
    def barrier(a: PyTree, b: PyTree, images: Array, labels: Array) -> otf.Barrier:
        return otf.barrier(lambda params: judged(params, images, labels), a, b, t, batch_size=1)

    ensemble = jax.jit(functools.partial(ensemble_loss_and_error, apply))

    def shown(found: Array) -> tuple[float, float]:
        return report.rounded(100 - found[1]), report.rounded(found[0])

    def tested(params: PyTree) -> tuple[float, float]:
        return shown(judged(params, images, labels))

    methods: dict[str, dict[str, Any]] = {}
    losses: dict[str, dict[str, float]] = {}
    some = VARIANTS if request.options["variants"] else METHODS
    wanted = {name: VARIANTS[name] for name in request.options["methods"] or some}
    for name, method in report.progress(wanted.items(), "fusing"):
        start = time.perf_counter()
        moved = jax.block_until_ready(method(pair))
        timings[name] = time.perf_counter() - start
        found = methods[name] = {}
        lost = losses[name] = {}
        for kind, mend in AVERAGES.items():
            if kind not in mended(name):
                continue
            start = time.perf_counter()
            fused = jax.block_until_ready(mend(pair, moved, (0.5, 0.5)))
            timings[f"{name}, {kind}"] = time.perf_counter() - start
            found[kind], lost[kind] = tested(fused)
        if name in _PATHS:
            path = barrier(moved, pair.b, images[few], labels[few])
            lost["barrier"], found["barrier"] = map(report.rounded, path.height)
            found["path loss"] = [report.rounded(value) for value in path.values[:, 0]]
            found["path accuracy"] = [report.rounded(100 - value) for value in path.values[:, 1]]
    both = shown(ensemble([pair.a, pair.b], images, labels))
    alone = [tested(model) for model in (pair.a, pair.b)]
    accuracies, nats = (
        {"individuals": [one[i] for one in alone], "ensemble": both[i]} for i in range(2)
    )
    return {
        **accuracies,
        "t": [round(position, 6) for position in t.tolist()],
        "methods": methods,
        "losses": {**nats, "methods": losses},
    }


def _table(header: tuple[str, ...], results: dict[str, Any], digits: int) -> str:
    """Lays out accuracies or losses, with so many digits after the point."""
    names = ("model A", "model B", "ensemble")
    single = zip(names, (*results["individuals"], results["ensemble"]), strict=True)
    rows = [[name, f"{value:.{digits}f}", *[""] * len(AVERAGES)] for name, value in single]
    for name, method in results["methods"].items():
        cells = (
            f"{method[kind]:.{digits}f}" if kind in method else ""
            for kind in (*AVERAGES, "barrier")
        )
        rows.append([name, *cells])
    return report.markdown_table(header, rows)
