"""What Algorithm 1 owes to sharp plans, and to the number of samples."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import PyTree
from ott.geometry import costs

import otfusion_jax as otf
from experiments import report
from experiments.evaluate import tester
from experiments.methods import AVERAGES, counts, gram, reestimated
from experiments.pairs import Pair, network, pair_arguments, pair_of, parents, seen_images
from experiments.runs import Request

_Features = Callable[[Pair, int], dict[str, otf.Gram] | None]

# What units are compared by: their features, if any, and the ground metric.
_UNITS: dict[str, tuple[_Features, costs.CostFn]] = {
    "weights": (lambda pair, samples: None, costs.SqEuclidean()),
    "activations": (gram, costs.Euclidean()),
    "correlations": (
        lambda pair, samples: gram(pair, samples, at="activation", center=True),
        costs.Cosine(),
    ),
}
_BY_SAMPLES = ("activations", "correlations")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    pair_arguments(parser)
    parser.add_argument(
        "--epsilons",
        nargs="+",
        type=float,
        default=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        help="strengths of the entropy, in standard deviations of the cost (default: 0.001 to 1)",
    )
    parser.add_argument(
        "--iterations", type=int, default=2000, help="of Sinkhorn at most (default: 2000)"
    )
    parser.add_argument(
        "--samples",
        nargs="+",
        type=int,
        default=(10, 20, 50, 100, 200, 500, 1000),
        help="images that activations are compared on (default: 10 to 1000)",
    )
    parser.add_argument(
        "--draws", type=int, default=5, help="of images, for each number (default: 5)"
    )


def run(request: Request) -> None:
    """Fuses two models by Algorithm 1, with ever softer plans and with ever more samples.

    The softer its plans, the less is left of A, until the average does what B does. So A as it was
    moved is tested as well.

    Args:
        request: The command.

    Raises:
        ValueError: There is nothing to draw.
    """
    options = request.options
    if min(options["samples"]) < 2 or options["draws"] < 1:
        raise ValueError(
            f"--samples are {sorted(options['samples'])} and --draws {options['draws']}; give 2"
            " samples or more, and at least 1 draw."
        )
    folder = request.folder("ablate")
    timings: dict[str, float] = {}
    dataset = request.load()
    architecture = network(request.model, dataset, request.train_config.augment)
    models = parents(request, architecture, dataset, folder, timings)
    pair = pair_of(request, architecture, dataset, models)
    test = tester(dataset)

    def fused(pair: Pair, moved: PyTree) -> float:
        average = AVERAGES["averaged"](pair, moved, (0.5, 0.5))
        return test(architecture.apply, reestimated(architecture, average, pair.images))

    began = time.perf_counter()
    solvers: dict[str, otf.AbstractSolver] = {"exact": otf.Exact()}
    for epsilon in sorted(options["epsilons"]):
        solvers[f"{epsilon:g}"] = otf.Sinkhorn(epsilon, max_iterations=options["iterations"])
    entropy: dict[str, Any] = {name: {} for name in _UNITS}
    for name, (features, metric) in _UNITS.items():
        found = features(pair, options["images"])
        for label, solver in report.progress(solvers.items(), f"solvers, {name}"):
            moved, converged = _moved(pair, solver, metric, found)
            entropy[name][label] = {
                "average": fused(pair, moved),
                "moved": test(architecture.apply, reestimated(architecture, moved, pair.images)),
                "converged": converged,
            }
    timings["entropy"] = time.perf_counter() - began

    began = time.perf_counter()
    numbers = sorted(options["samples"])
    samples: dict[str, Any] = {name: {str(n): [] for n in numbers} for name in _BY_SAMPLES}
    for draw in report.progress(range(1, options["draws"] + 1), "draws"):
        seen = seen_images(request, dataset, numbers[-1], draw)
        few = dataclasses.replace(pair, images=seen)
        for name in _BY_SAMPLES:
            features, metric = _UNITS[name]
            for number in numbers:
                moved, _ = _moved(pair, otf.Exact(), metric, features(few, number))
                samples[name][str(number)].append(fused(pair, moved))
    timings["samples"] = time.perf_counter() - began

    results = {
        "individuals": [test(architecture.apply, model) for model in models],
        "vanilla average": fused(pair, pair.a),
        "entropy": entropy,
        "samples": samples,
    }
    _plot(request, folder, results)
    report.write_results(folder, request, request.title, _tables(results), results, timings)


def _moved(
    pair: Pair,
    solver: otf.AbstractSolver,
    metric: costs.CostFn,
    features: dict[str, otf.Gram] | None,
) -> tuple[PyTree, bool]:
    """Moves A by Algorithm 1; says whether each of the plans was solved to its tolerance."""
    symmetry = pair.network.symmetry
    how: dict[str, Any] = {"metric": metric, "solver": solver, "grams": features}
    plans = otf.align(symmetry, pair.a, pair.b, method=otf.ForwardPass(), leaf_weight=counts, **how)
    return otf.transport(symmetry, plans, pair.a), bool(plans.converged)


def _plot(request: Request, folder: Any, results: dict[str, Any]) -> None:
    quantity = "test accuracy (%)"
    epsilons = sorted(request.options["epsilons"])
    labels = [f"{epsilon:g}" for epsilon in epsilons]
    soft = {
        kind: {
            name: [found[label][kind] for label in labels]
            for name, found in results["entropy"].items()
        }
        for kind in ("average", "moved")
    }
    exact = {
        f"{name}, exact": [found["exact"]["average"]] * len(epsilons)
        for name, found in results["entropy"].items()
    }
    numbers = sorted(request.options["samples"])
    drawn = {
        name: [found[str(number)] for number in numbers]
        for name, found in results["samples"].items()
    }
    x = ("epsilon, in standard deviations of the cost", epsilons)
    a, b = results["individuals"]
    alone = {"model A": a, "model B": b}
    panels = [
        report.Panel(f"{quantity}, averaged", x, soft["average"] | exact, alone, log=True),
        report.Panel(f"{quantity}, A moved", x, soft["moved"], log=True),
        report.Panel(
            f"{quantity}, averaged, exact plans",
            ("images that activations are compared on", numbers),
            {name: [float(np.mean(draws)) for draws in found] for name, found in drawn.items()},
            spreads={
                name: [report.deviation(draws) or 0.0 for draws in found]
                for name, found in drawn.items()
            },
            log=True,
        ),
    ]
    report.plot_panels(folder / "ablate.png", request.title, panels)


def _tables(results: dict[str, Any]) -> str:
    entropy, samples = results["entropy"], results["samples"]
    a, b = results["individuals"]
    alone = {"model A": a, "model B": b, "vanilla average": results["vanilla average"]}
    rows = [[name, f"{value:.2f}", *[""] * (2 * len(entropy) - 1)] for name, value in alone.items()]
    for label in next(iter(entropy.values())):
        cells = []
        for found in (solved[label] for solved in entropy.values()):
            mark = "" if found["converged"] else " *"
            cells += [f"{found['average']:.2f}{mark}", f"{found['moved']:.2f}"]
        rows.append([label if label == "exact" else f"epsilon {label}", *cells])
    drawn = [
        [number, *(report.summary(found[number]) for found in samples.values())]
        for number in next(iter(samples.values()))
    ]
    columns = [title for name in entropy for title in (f"{name}, averaged", "A moved")]
    first = report.markdown_table(("accuracy (%), plans by", *columns), rows)
    second = report.markdown_table(("accuracy (%), images", *samples), drawn)
    return f"{first}\n\n*: not solved to the tolerance\n\n{second}"
