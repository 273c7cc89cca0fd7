"""Fusion of many models in one call: accuracy, time and memory against their number."""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import otfusion_jax as otf
from experiments import report
from experiments.evaluate import accuracy
from experiments.methods import counts, reestimated
from experiments.pairs import Network, network, parents
from experiments.runs import Request

# From the symmetry and a stack of models to one, or to their barycenter.
_METHODS: dict[str, Callable[[otf.Symmetry, PyTree], PyTree | otf.Barycenter]] = {
    "Algorithm 1": lambda symmetry, stack: otf.fuse(
        symmetry, stack, method=otf.ForwardPass(), leaf_weight=counts
    ),
    "fuse": lambda symmetry, stack: otf.fuse(symmetry, stack, leaf_weight=counts),
    "barycenter": lambda symmetry, stack: otf.barycenter(symmetry, stack, leaf_weight=counts),
}
_REPAIRED = ("fuse, least squares", "barycenter, least squares")
_RUNS = 3  # timed; the fastest counts


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    parser.add_argument(
        "--counts", nargs="+", type=int, default=(2, 4, 6, 8), help="of models fused at once"
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="training images that repair an average"
    )


def run(request: Request) -> None:
    """Trains models from as many seeds as given, and fuses the first 2, 4, 6 and 8 of them.

    Args:
        request: The command.

    Raises:
        ValueError: There are not as many seeds as models asked for.
    """
    numbers = sorted(request.options["counts"])
    if numbers[0] < 2 or numbers[-1] > len(request.seeds):
        raise ValueError(
            f"--counts are {numbers}, with {len(request.seeds)} seeds; give 2 models or more, and"
            " as many --seeds."
        )
    folder = request.folder("many")
    timings: dict[str, float] = {}
    dataset = request.load()
    architecture = network(request.model, dataset)
    models = parents(request, architecture, dataset, folder, timings)
    images, labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    seen = jnp.asarray(dataset.train_images[: request.options["images"]])
    apply = architecture.apply
    judged = jax.jit(lambda params: accuracy(lambda batch: apply(params, batch), images, labels))

    alone = [report.rounded(judged(model)) for model in models]
    rows = []
    for count in report.progress(numbers, "fusing"):
        some = models[:count]
        together = jax.jit(
            lambda models: accuracy(lambda x: otf.ensemble(apply, models, x), images, labels)
        )
        found: dict[str, Any] = {
            "models": count,
            "individuals": report.rounded(np.mean(alone[:count])),
            "ensemble": report.rounded(together(some)),
            "vanilla average": report.rounded(judged(otf.average(some))),
        }
        moved = {"fuse": _onto_the_last(architecture, some)}
        for name, method in _METHODS.items():
            fused, cost = _timed(architecture, method, some)
            if isinstance(fused, otf.Barycenter):
                moved[name] = _into_the_universe(architecture, some, fused.plans)
                fused = fused.params
            found[name] = {
                "accuracy": report.rounded(judged(reestimated(architecture, fused, seen))),
                **cost,
            }
        for name, models_moved in moved.items():
            found[f"{name}, least squares"] = report.rounded(
                judged(_regressed(architecture, models_moved, seen))
            )
        rows.append(found)
    results = {"individuals": alone, "counts": rows}
    _plot(folder, request.title, numbers, rows)
    report.write_results(folder, request, request.title, _table(rows), results, timings)


def _timed(
    architecture: Network,
    method: Callable[[otf.Symmetry, PyTree], PyTree | otf.Barycenter],
    models: list[PyTree],
) -> tuple[PyTree | otf.Barycenter, dict[str, float]]:
    """Fuses models in one compiled program, and says what that takes."""
    stack = otf.stack(models)
    began = time.perf_counter()
    program = jax.jit(functools.partial(method, architecture.symmetry)).lower(stack).compile()
    compiled = time.perf_counter() - began
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        fused = jax.block_until_ready(program(stack))
        seconds.append(time.perf_counter() - began)
    memory: Any = program.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return fused, {
        "compile seconds": round(compiled, 2),
        "seconds": round(min(seconds), 4),
        "MiB": round(held / 2**20, 1),
    }


def _onto_the_last(architecture: Network, models: list[PyTree]) -> list[PyTree]:
    symmetry, target = architecture.symmetry, models[-1]
    moved = [
        otf.transport(symmetry, otf.align(symmetry, source, target, leaf_weight=counts), source)
        for source in models[:-1]
    ]
    return [*moved, target]


def _into_the_universe(
    architecture: Network, models: list[PyTree], plans: dict[str, Array]
) -> list[PyTree]:
    return [
        otf.transport(architecture.symmetry, {name: plan[k] for name, plan in plans.items()}, model)
        for k, model in enumerate(models)
    ]


def _regressed(architecture: Network, moved: list[PyTree], images: Array) -> PyTree:
    """Averages models that have been moved, repaired by least squares."""
    fused = otf.repair(
        architecture.symmetry, architecture.apply, moved, images, method=otf.LeastSquares()
    )
    return reestimated(architecture, fused, images)


def _plot(folder: Any, title: str, numbers: list[int], rows: list[dict[str, Any]]) -> None:
    plain = ("individuals", "ensemble", "vanilla average", *_REPAIRED)
    panels = {
        "test accuracy (%)": {
            **{name: [row[name] for row in rows] for name in plain},
            **{name: [row[name]["accuracy"] for row in rows] for name in _METHODS},
        },
        "seconds, compiled": {name: [row[name]["seconds"] for row in rows] for name in _METHODS},
        "memory (MiB)": {name: [row[name]["MiB"] for row in rows] for name in _METHODS},
    }
    report.plot_lines(folder / "many.png", title, ("models fused", numbers), panels, {})


def _table(rows: list[dict[str, Any]]) -> str:
    plain = ("individuals", "ensemble", "vanilla average")
    header = (
        "models",
        *plain,
        *(f"{name}{what}" for name in _METHODS for what in (" (%)", " (s)", " (MiB)")),
        *_REPAIRED,
    )
    cells = [
        [
            str(row["models"]),
            *(f"{row[name]:.2f}" for name in plain),
            *(
                text
                for name in _METHODS
                for text in (
                    f"{row[name]['accuracy']:.2f}",
                    f"{row[name]['seconds']:.2f}",
                    f"{row[name]['MiB']:.0f}",
                )
            ),
            *(f"{row[name]:.2f}" for name in _REPAIRED),
        ]
        for row in rows
    ]
    return report.markdown_table(header, cells)
