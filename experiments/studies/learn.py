"""Alignments learned by descent on the midpoint's loss, beside those found in the weights."""

import argparse
import dataclasses
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

import otfusion_jax as otf
from experiments import report
from experiments.data import Dataset
from experiments.evaluate import ensemble_loss_and_error, loss_and_error
from experiments.methods import AVERAGES, METHODS, counts
from experiments.pairs import Network, Pair, network, pair_of, parents
from experiments.runs import Request

_LEARNED = {"learned": "plans", "learned, before rounding": "soft"}
_MENDS = ("averaged", "least squares")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    parser.add_argument("--steps", type=int, default=200, help="of the descent (default: 200)")
    parser.add_argument(
        "--batch-size", type=int, default=256, help="training images of a step (default: 256)"
    )
    parser.add_argument(
        "--step-size", type=float, default=0.1, help="of Adam at the start (default: 0.1)"
    )
    parser.add_argument(
        "--epsilon",
        type=float,
        default=0.5,
        help="of Sinkhorn, in standard deviations of the cost at the start (default: 0.5)",
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="training images that repair an average"
    )
    parser.add_argument(
        "--path-points",
        type=int,
        default=11,
        help="points evaluated from A to B, an odd number so that the midpoint is one",
    )


def run(request: Request) -> None:
    """Fuses every pair of the models, by plans from the weights and by learned ones.

    Args:
        request: The command.

    Raises:
        ValueError: There are fewer than two models, or no steps.
    """
    options = request.options
    if len(request.seeds) < 2 or options["steps"] < 1 or options["batch_size"] < 1:
        raise ValueError("Give two --seeds or more, and at least one of --steps and --batch-size.")
    folder = request.folder("learn")
    timings: dict[str, float] = {}
    dataset = request.load()
    architecture = network(request.model, dataset, request.train_config.augment)
    models = parents(request, architecture, dataset, folder, timings)
    bench = _Bench(request, architecture, dataset)
    pairs = {}
    numbered = list(zip(request.seeds, models, strict=True))
    for (i, a), (j, b) in report.progress(itertools.combinations(numbered, 2), "fusing"):
        small = dataclasses.replace(request, seeds=(i, j))
        pair = pair_of(small, architecture, dataset, [a, b])
        pairs[f"{i}, {j}"] = _compare(small, pair, bench, timings)

    t = np.linspace(0, 1, options["path_points"])
    results = {"t": t.round(6).tolist(), "mean": _mean(pairs), "pairs": pairs}
    methods = results["mean"]["methods"]
    panels = {
        "test accuracy (%)": {name: found["path accuracy"] for name, found in methods.items()},
        "test loss (nats)": {name: found["path loss"] for name, found in methods.items()},
    }
    levels = {"test accuracy (%)": {"ensemble": results["mean"]["ensemble"]}}
    title = f"{request.title}: mean of {len(pairs)} pairs"
    report.plot_lines(folder / "learn.png", title, (report.PATH_AXIS, t.tolist()), panels, levels)
    report.write_results(folder, request, title, _table(results), results, timings)


class _Bench:
    """What is the same for all pairs, compiled once."""

    def __init__(self, request: Request, architecture: Network, dataset: Dataset):
        options, apply = request.options, architecture.apply
        images, labels = map(jnp.asarray, (dataset.train_images, dataset.train_labels))
        tests = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
        t = jnp.linspace(0, 1, options["path_points"])
        shape = (options["steps"], options["batch_size"])
        batches = jax.random.randint(jax.random.key(0), shape, 0, len(labels))
        schedule = optax.cosine_decay_schedule(options["step_size"], options["steps"])

        def loss(params: PyTree, chosen: Int[Array, " batch"]) -> Array:
            logits = apply(params, images[chosen])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

        def judged(params: PyTree) -> Array:
            return loss_and_error(lambda batch: apply(params, batch), *tests)

        def together(models: list[PyTree]) -> Array:
            return ensemble_loss_and_error(apply, models, *tests)

        self.learned = functools.partial(
            otf.learn_alignment,
            architecture.symmetry,
            loss,
            batches=batches,
            solver=otf.Sinkhorn(options["epsilon"], relative=False, max_iterations=20),
            optimizer=optax.adam(schedule),
            leaf_weight=counts,
        )
        self.judged = jax.jit(judged)
        self.together = jax.jit(together)
        self.path = jax.jit(lambda a, b: otf.barrier(judged, a, b, t, batch_size=1))


def _compare(
    request: Request, pair: Pair, bench: _Bench, timings: dict[str, float]
) -> dict[str, Any]:
    """Evaluates two models, their ensemble and every method on the test split.

    Args:
        request: The command, with the seeds of this pair.
        pair: The models.
        bench: Learns and judges.
        timings: Receives the seconds of learning, for the first pair compilation included.

    Returns:
        Accuracies in percent, losses in nats and barriers in percentage points, ready for JSON.
    """
    began = time.perf_counter()
    learned = jax.block_until_ready(bench.learned(pair.a, pair.b))
    timings[f"learning, seeds {', '.join(map(str, request.seeds))}"] = time.perf_counter() - began
    moved = {name: method(pair) for name, method in METHODS.items()}
    moved |= {
        name: otf.transport(pair.network.symmetry, getattr(learned, plans), pair.a)
        for name, plans in _LEARNED.items()
    }
    methods = {}
    for name, a in moved.items():
        path = bench.path(a, pair.b)
        found = methods[name] = {
            "barrier": report.rounded(path.height[1]),
            "path loss": [report.rounded(value) for value in path.values[:, 0]],
            "path accuracy": [report.rounded(100 - value) for value in path.values[:, 1]],
        }
        for kind in _MENDS:
            loss, error = bench.judged(AVERAGES[kind](pair, a, (0.5, 0.5)))
            found[kind] = report.rounded(100 - error)
            found[f"{kind} loss"] = report.rounded(loss)
    ends = methods["vanilla average"]["path accuracy"]
    return {
        "individuals": (ends[0], ends[-1]),
        "ensemble": report.rounded(100 - bench.together([pair.a, pair.b])[1]),
        "history": [report.rounded(value) for value in learned.history],
        "methods": methods,
    }


def _mean(pairs: dict[str, Any]) -> Any:
    """Averages what was found over pairs."""

    def mean(*values: Any) -> Any:
        return report.rounded(np.mean(values))

    found = jax.tree.map(mean, *pairs.values())
    methods = next(iter(pairs.values()))["methods"]  # in their order, which JAX does not keep
    return {**found, "methods": {name: found["methods"][name] for name in methods}}


def _table(results: dict[str, Any]) -> str:
    mean, pairs = results["mean"], results["pairs"].values()
    rows = [
        ["individuals", f"{np.mean(mean['individuals']):.2f}", *[""] * 5],
        ["ensemble", f"{mean['ensemble']:.2f}", *[""] * 5],
    ]
    for name, found in mean["methods"].items():
        each = [pair["methods"][name]["averaged"] for pair in pairs]
        rows.append(
            [
                name,
                f"{found['averaged']:.2f}",
                f"{min(each):.2f} to {max(each):.2f}",
                f"{found['averaged loss']:.4f}",
                f"{found['barrier']:.2f}",
                f"{found['least squares']:.2f}",
                f"{found['least squares loss']:.4f}",
            ]
        )
    header = (
        "mean over pairs",
        "test accuracy (%)",
        "of the pairs",
        "test loss (nats)",
        "error barrier (points)",
        "least squares (%)",
        "its loss (nats)",
    )
    return report.markdown_table(header, rows)
