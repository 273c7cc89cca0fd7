"""Structured pruning, and fusion of the whole network into what is left of it, without data."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

import otfusion_jax as otf
from experiments import report
from experiments.evaluate import tester
from experiments.methods import across
from experiments.narrow import narrowed
from experiments.pairs import network, parents
from experiments.runs import Request

_ORDERS = {"l1": 1, "l2": 2}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    parser.add_argument(
        "--weights",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="safetensors or npz with PyTorch's names and layouts, instead of training",
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=(0.3, 0.5, 0.7, 0.8),
        help="of each layer's units that are left out (default: 0.3 0.5 0.7 0.8)",
    )
    parser.add_argument(
        "--norms",
        nargs="+",
        choices=list(_ORDERS),
        default=list(_ORDERS),
        help="of the incoming weights, by which units are chosen (default: both)",
    )
    parser.add_argument(
        "--t",
        nargs="+",
        type=float,
        default=(0.25, 0.5, 0.75, 0.9),
        help="of the averages, (1 - t) · parent + t · child (default: 0.25 0.5 0.75 0.9)",
    )


def run(request: Request) -> None:
    """Prunes networks, moves each onto its pruned child and averages the two.

    Args:
        request: The command.

    Raises:
        ValueError: A share leaves nothing out, or nothing over; or a t is not on the way.
    """
    options = request.options
    for name, values in (("shares", options["shares"]), ("t", options["t"])):
        if not all(0 < value < 1 for value in values):
            raise ValueError(f"--{name} is {list(values)}; give numbers between 0 and 1.")
    folder = request.folder("prune")
    timings: dict[str, float] = {}
    dataset = request.load()
    whole = network(request.model, dataset)
    models = parents(request, whole, dataset, folder, timings)
    test = tester(dataset)

    t = sorted(options["t"])
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for share in report.progress(sorted(options["shares"]), "pruning"):
        left = request.model.width * (1 - share)
        few = network(dataclasses.replace(request.model, width=left), dataset)
        for norm in options["norms"]:
            for name, model in zip(_names(request), models, strict=True):
                child = narrowed(whole.symmetry, model, few.symmetry, _ORDERS[norm])
                moved = across(whole, few, model, child)
                averages = {
                    f"{s:g}": test(few.apply, otf.average([moved, child], (1 - s, s))) for s in t
                }
                rows.append(
                    {
                        "network": name,
                        "share": share,
                        "norm": norm,
                        "pruned": test(few.apply, child),
                        "parent, moved": test(few.apply, moved),
                        "averages": averages,
                    }
                )
    timings["pruning and fusing"] = time.perf_counter() - began
    individuals = [test(whole.apply, model) for model in models]
    results = {"individuals": individuals, "rows": rows}
    _plot(request, folder, results)
    report.write_results(folder, request, request.title, _table(request, results), results, timings)


def _names(request: Request) -> list[str]:
    files = request.options["weights"]
    return [path.stem for path in files] if files else [f"seed {seed}" for seed in request.seeds]


def _plot(request: Request, folder: Path, results: dict[str, Any]) -> None:
    shares = sorted(request.options["shares"])
    panels = {}
    for norm in request.options["norms"]:

        def curve(what: str, t: str | None = None, norm: str = norm) -> list[float]:
            found: dict[float, list[float]] = {share: [] for share in shares}
            for row in results["rows"]:
                if row["norm"] == norm:
                    found[row["share"]].append(row[what] if t is None else row[what][t])
            return [float(np.mean(values)) for values in found.values()]

        panels[f"test accuracy (%), kept by {norm} norm"] = {
            "pruned": curve("pruned"),
            "parent, moved": curve("parent, moved"),
            **{f"average, t = {t}": curve("averages", t) for t in results["rows"][0]["averages"]},
        }
    levels = {next(iter(panels)): {"whole": float(np.mean(results["individuals"]))}}
    report.plot_lines(
        folder / "prune.png", request.title, ("units left out", shares), panels, levels
    )


def _table(request: Request, results: dict[str, Any]) -> str:
    averages = [f"t = {t}" for t in results["rows"][0]["averages"]]
    rows = [
        [name, "", "", f"{value:.2f}", *[""] * (1 + len(averages))]
        for name, value in zip(_names(request), results["individuals"], strict=True)
    ]
    for row in results["rows"]:
        cells = (row["pruned"], row["parent, moved"], *row["averages"].values())
        title = (row["network"], f"{100 * row['share']:.0f} %", row["norm"])
        rows.append([*title, *(f"{value:.2f}" for value in cells)])
    header = ("accuracy (%)", "left out", "norm", "network", "parent, moved", *averages)
    return report.markdown_table(header, rows)
