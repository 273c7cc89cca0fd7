"""Fusion of many models in one call: accuracy, time and memory against their number."""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
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

# From a stack of models to one, or to their barycenter; and from models to one.
_Method = Callable[[PyTree], PyTree | otf.Barycenter]
_Judge = Callable[[PyTree], Array]

_METHODS: dict[str, Callable[[otf.Symmetry, PyTree], PyTree | otf.Barycenter]] = {
    "Algorithm 1": lambda symmetry, stack: otf.fuse(
        symmetry, stack, method=otf.ForwardPass(), leaf_weight=counts
    ),
    "fuse": lambda symmetry, stack: otf.fuse(symmetry, stack, leaf_weight=counts),
    "barycenter": lambda symmetry, stack: otf.barycenter(symmetry, stack, leaf_weight=counts),
}
_REPAIRED = ("fuse, least squares", "barycenter, least squares")
_ACCURACIES = ("individuals", "ensemble", "vanilla average", *_METHODS, *_REPAIRED)
# How much better the first is than the second.
_GAINS = {
    "barycenter - fuse": ("barycenter", "fuse"),
    "the same, least squares": ("barycenter, least squares", "fuse, least squares"),
}
_RUNS = 3  # timed; the fastest counts


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    parser.add_argument(
        "--counts", nargs="+", type=int, default=(2, 4, 6, 8), help="of models fused at once"
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=5,
        help="choices of so many models, over which accuracies are averaged (default: 5)",
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="training images that repair an average"
    )


def run(request: Request) -> None:
    """Trains models from as many seeds as given, and fuses 2, 4, 6 and 8 of them, whichever.

    Args:
        request: The command.

    Raises:
        ValueError: There are not as many seeds as models asked for, or no draws.
    """
    numbers = sorted(request.options["counts"])
    if numbers[0] < 2 or numbers[-1] > len(request.seeds):
        raise ValueError(
            f"--counts are {numbers}, with {len(request.seeds)} seeds; give 2 models or more, and"
            " as many --seeds."
        )
    if request.options["draws"] < 1:
        raise ValueError(f"--draws is {request.options['draws']}; give at least 1.")
    folder = request.folder("many")
    timings: dict[str, float] = {}
    dataset = request.load()
    architecture = network(request.model, dataset, request.train_config.augment)
    models = parents(request, architecture, dataset, folder, timings)
    images, labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    seen = jnp.asarray(dataset.train_images[: request.options["images"]])
    apply, symmetry = architecture.apply, architecture.symmetry
    judged = jax.jit(lambda params: accuracy(lambda batch: apply(params, batch), images, labels))
    together = jax.jit(
        lambda models: accuracy(lambda x: otf.ensemble(apply, models, x), images, labels)
    )

    @functools.cache
    def plans(source: int, target: int) -> dict[str, Array]:
        return otf.align(symmetry, models[source], models[target], leaf_weight=counts).plans

    alone = [report.rounded(judged(model)) for model in models]
    rows = []
    for count in report.progress(numbers, "fusing"):
        drawn = draws(len(models), count, request.options["draws"])
        methods, costs = {}, {}
        for name, method in _METHODS.items():
            some = otf.stack([models[k] for k in drawn[0]])
            methods[name], costs[name] = _compiled(functools.partial(method, symmetry), some)
        found = [
            {
                "seeds": [request.seeds[k] for k in chosen],
                "individuals": report.rounded(np.mean([alone[k] for k in chosen])),
                "ensemble": report.rounded(together([models[k] for k in chosen])),
                **_fused(architecture, models, chosen, methods, plans, seen, judged),
            }
            for chosen in drawn
        ]
        rows.append({"models": count, **_summary(found), "draws": found, "cost": costs})
    share = inconsistency(symmetry, plans, len(models))
    results = {"individuals": alone, "inconsistent units (%)": share, "counts": rows}
    _plot(folder, request.title, numbers, rows)
    report.write_results(folder, request, request.title, _table(rows, share), results, timings)


def draws(number: int, count: int, wanted: int) -> list[tuple[int, ...]]:
    """Chooses some of the models, several times; the same for the same arguments.

    Args:
        number: How many models there are.
        count: How many of them to choose.
        wanted: How many choices; fewer are made where there are no more.

    Returns:
        First the first models in order, then choices at random. Any two differ in who is among
        them or, as it is what the others are moved onto, in who comes last.
    """
    rng = np.random.default_rng(0)
    found = {}
    chosen = tuple(range(count))
    while True:
        found.setdefault((frozenset(chosen), chosen[-1]), chosen)
        if len(found) == min(wanted, math.comb(number, count) * count):
            return list(found.values())
        chosen = tuple(rng.permutation(number)[:count].tolist())


def inconsistency(
    symmetry: otf.Symmetry, plans: Callable[[int, int], dict[str, Array]], number: int
) -> float | None:
    """Percentage of units that end elsewhere on a detour from a to b to c than from a to c.

    Args:
        symmetry: Of the models.
        plans: Permutations from one model to another, by their positions.
        number: How many models there are. All detours in their order count.

    Returns:
        The percentage; None with fewer than three models, as there is no detour.
    """
    shares = []
    for a, b, c in itertools.combinations(range(number), 3):
        detour, direct = otf.compose(symmetry, plans(a, b), plans(b, c)), plans(a, c)
        other = [np.ravel(detour[name] != plan) for name, plan in direct.items()]
        shares.append(np.mean(np.concatenate(other)))
    return report.rounded(100 * np.mean(shares)) if shares else None


def _compiled(method: _Method, stack: PyTree) -> tuple[_Method, dict[str, float]]:
    """Makes one compiled program of a method, and says what fusing a stack of models takes."""
    began = time.perf_counter()
    program = jax.jit(method).lower(stack).compile()
    compiled = time.perf_counter() - began
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        jax.block_until_ready(program(stack))
        seconds.append(time.perf_counter() - began)
    memory: Any = program.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return program, {
        "compile seconds": round(compiled, 2),
        "seconds": round(min(seconds), 4),
        "MiB": round(held / 2**20, 1),
    }


def _fused(
    architecture: Network,
    models: Sequence[PyTree],
    chosen: tuple[int, ...],
    methods: dict[str, _Method],
    plans: Callable[[int, int], dict[str, Array]],
    images: Array,
    judged: _Judge,
) -> dict[str, float]:
    """Fuses the models chosen by every method, and says how good each of the results is."""
    some = [models[k] for k in chosen]
    stack = otf.stack(some)
    found = {"vanilla average": report.rounded(judged(otf.average(some)))}
    onto = [
        otf.transport(architecture.symmetry, plans(k, chosen[-1]), models[k]) for k in chosen[:-1]
    ]
    moved = {"fuse": [*onto, some[-1]]}
    for name, method in methods.items():
        fused = method(stack)
        if isinstance(fused, otf.Barycenter):
            moved[name] = _into_the_universe(architecture, some, fused.plans)
            fused = fused.params
        found[name] = report.rounded(judged(reestimated(architecture, fused, images)))
    for name, models_moved in moved.items():
        found[f"{name}, least squares"] = report.rounded(
            judged(_regressed(architecture, models_moved, images))
        )
    return found


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means and standard deviations over the draws, of accuracies and of what one gains."""
    columns = {name: [draw[name] for draw in found] for name in _ACCURACIES}
    for name, (better, other) in _GAINS.items():
        columns[name] = list(np.subtract(columns[better], columns[other]))
    return {
        "mean": {name: report.rounded(np.mean(values)) for name, values in columns.items()},
        "standard deviation": {name: report.deviation(of) for name, of in columns.items()},
        "draws that gain": {
            name: sum(bool(value > 0) for value in columns[name]) for name in _GAINS
        },
    }


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
    x = ("models fused", numbers)

    def each(what: str, names: Sequence[str]) -> dict[str, list[float]]:
        return {name: [row[what][name] or 0.0 for row in rows] for name in names}

    def cost(what: str) -> dict[str, list[float]]:
        return {name: [row["cost"][name][what] for row in rows] for name in _METHODS}

    spreads = each("standard deviation", _ACCURACIES)
    panels = [
        report.Panel("test accuracy (%)", x, each("mean", _ACCURACIES), spreads=spreads),
        report.Panel("seconds, compiled", x, cost("seconds")),
        report.Panel("memory (MiB)", x, cost("MiB")),
    ]
    report.plot_panels(folder / "many.png", title, panels)


def _table(rows: list[dict[str, Any]], share: float | None) -> str:
    def cell(row: dict[str, Any], name: str, sign: str = "") -> str:
        return report.with_deviation(row["mean"][name], row["standard deviation"][name], sign)

    def gain(row: dict[str, Any], name: str) -> str:
        return f"{cell(row, name, '+')} ({row['draws that gain'][name]} of {len(row['draws'])})"

    accuracies = [
        [
            str(row["models"]),
            str(len(row["draws"])),
            *(cell(row, name) for name in _ACCURACIES),
            *(gain(row, name) for name in _GAINS),
        ]
        for row in rows
    ]
    costs = [
        [
            str(row["models"]),
            *(
                text
                for cost in row["cost"].values()
                for text in (f"{cost['seconds']:.2f}", f"{cost['MiB']:.0f}")
            ),
        ]
        for row in rows
    ]
    header = [f"{name}{what}" for name in _METHODS for what in (" (s)", " (MiB)")]
    parts = [
        report.markdown_table(("models", "draws", *_ACCURACIES, *_GAINS), accuracies),
        report.markdown_table(("models", *header), costs),
    ]
    if share is not None:
        parts.append(
            f"From a to b and on to c, {share:.1f} % of the units end elsewhere than from a to c"
            " by pairwise alignment; through a reference or a barycenter none do."
        )
    return "\n\n".join(parts)
