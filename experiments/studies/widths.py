"""Fusion of networks of different widths, wide into narrow and narrow into wide."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

import otfusion_jax as otf
from experiments import report
from experiments.evaluate import tester
from experiments.methods import across, counts, reestimated
from experiments.narrow import narrowed
from experiments.pairs import Network, network, seen_images
from experiments.runs import Request
from experiments.train import train

_PASS = otf.ForwardPass()


def as_original(source: Network, target: Network, moved: PyTree) -> PyTree:
    """Scales a moved model as the original's code does.

    There, what consumes units is multiplied by P diag(1/b), as what produces them is, and not by
    diag(1/a) P. Of n units that become m this makes each kernel m/n times as large.

    Args:
        source: The architecture it comes from.
        target: The architecture it has been moved to.
        moved: Its variables there.
    """
    leaves, treedef = jax.tree.flatten(moved)
    sizes = {group.name: group.size for group in target.symmetry.groups}
    for group in source.symmetry.groups:
        for member in group.having("consumes"):
            leaves[member.leaf] = leaves[member.leaf] * (sizes[group.name] / group.size)
    return jax.tree.unflatten(treedef, leaves)


def _truncated(source: Network, target: Network, a: PyTree) -> PyTree:
    return narrowed(source.symmetry, a, target.symmetry)


def _truncated_and_aligned(source: Network, target: Network, a: PyTree, b: PyTree) -> PyTree:
    few = _truncated(source, target, a)
    plans = otf.align(target.symmetry, few, b, leaf_weight=counts)
    return otf.transport(target.symmetry, plans, few)


# From both architectures and models, A in the shapes of B.
_METHODS: dict[str, Callable[[Network, Network, PyTree, PyTree], PyTree]] = {
    "Algorithm 1, scaled as in the original": lambda source, target, a, b: as_original(
        source, target, across(source, target, a, b, method=_PASS)
    ),
    "Algorithm 1": lambda source, target, a, b: across(source, target, a, b, method=_PASS),
    "coordinate descent": across,
}
# These only make networks narrower.
_NARROWING: dict[str, Callable[[Network, Network, PyTree, PyTree], PyTree]] = {
    "truncated by l1 norm": lambda source, target, a, b: _truncated(source, target, a),
    "truncated, then aligned": _truncated_and_aligned,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    parser.add_argument(
        "--factors",
        nargs="+",
        type=float,
        default=(2.0, 0.5),
        help="widths of A as multiples of those of B (default: 2 0.5)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*_METHODS, *_NARROWING],
        default=[*_METHODS, *_NARROWING],
        metavar="METHOD",
        help=f"of {', '.join(map(repr, (*_METHODS, *_NARROWING)))} (default: all)",
    )
    parser.add_argument(
        "--t",
        nargs="+",
        type=float,
        default=(0.5, 0.67),
        help="of the averages, (1 - t) · A + t · B (default: 0.5 0.67)",
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="training images that batch norm is estimated on"
    )


def run(request: Request) -> None:
    """Fuses networks A, wider and narrower, with a network B, each onto the other.

    Args:
        request: The command.

    Raises:
        ValueError: A is as wide as B.
    """
    factors = request.options["factors"]
    if not all(factor > 0 and factor != 1 for factor in factors):
        raise ValueError(f"--factors are {list(factors)}; give positive ones other than 1.")
    folder = request.folder("widths")
    timings: dict[str, float] = {}
    dataset = request.load()
    seen = seen_images(request, dataset, request.options["images"])
    test = tester(dataset)
    seed_a, seed_b = request.seeds

    def trained(factor: float, seed: int) -> tuple[Network, PyTree, float]:
        config = dataclasses.replace(request.model, width=factor * request.model.width)
        found = train(config, request.train_config, dataset, seed, folder / "models")
        timings[f"training, x{factor:g}"] = found.seconds
        architecture = network(config, dataset)
        return architecture, found.params, test(architecture.apply, found.params)

    models = {1.0: trained(1, seed_b)} | {factor: trained(factor, seed_a) for factor in factors}
    directions: dict[str, Any] = {}
    ways = [way for factor in factors for way in ((factor, 1.0), (1.0, factor))]
    for way in report.progress(ways, "fusing"):
        began = time.perf_counter()
        (source, a, alone_a), (target, b, alone_b) = (models[factor] for factor in way)
        fitting = _METHODS | (_NARROWING if way[0] > way[1] else {})
        methods = {name: fitting[name] for name in request.options["methods"] if name in fitting}
        found: dict[str, Any] = {"source": alone_a, "target": alone_b, "methods": {}}
        for name, method in methods.items():
            moved = method(source, target, a, b)
            values = found["methods"][name] = {
                "moved": test(target.apply, reestimated(target, moved, seen)),
                "averages": {},
            }
            for t in request.options["t"]:
                average = reestimated(target, otf.average([moved, b], (1 - t, t)), seen)
                values["averages"][f"{t:g}"] = test(target.apply, average)
        title = "x{:g} onto x{:g}".format(*way)
        directions[title] = found
        timings[title] = time.perf_counter() - began

    bars = {
        f"{title}: {name}": (values["moved"], *values["averages"].values())
        for title, found in directions.items()
        for name, values in found["methods"].items()
    }
    report.plot_bars(
        folder / "widths.png",
        request.title,
        "test accuracy (%)",
        bars,
        ("A moved", *(f"average, t = {t:g}" for t in request.options["t"])),
        {f"x{factor:g} alone": alone for factor, (_, _, alone) in models.items()},
    )
    results = {"directions": directions}
    report.write_results(folder, request, request.title, _table(directions), results, timings)


def _table(directions: dict[str, Any]) -> str:
    rows, titles = [], []
    for title, found in directions.items():
        alone = f"{found['source']:.2f} / {found['target']:.2f}"
        for name, values in found["methods"].items():
            cells = (values["moved"], *values["averages"].values())
            rows.append((title, alone, name, *(f"{value:.2f}" for value in cells)))
            titles = [f"t = {t}" for t in values["averages"]]
    header = ("A onto B (%)", "A / B", "method", "A moved", *titles)
    return report.markdown_table(header, rows)
