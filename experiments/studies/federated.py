"""Federated averaging (McMahan et al. 2017) of two clients, with and without alignment."""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
from jaxtyping import PyTree

from experiments import report
from experiments.data import Dataset
from experiments.evaluate import tester
from experiments.methods import AVERAGES, VARIANTS, reestimated
from experiments.pairs import Network, network, pair_of
from experiments.runs import Request
from experiments.studies.non_iid import divide, division_arguments, refuse_text
from experiments.train import initial, train

# What the server does: what moves A, and what makes one model of it and B.
_SERVERS = {
    "vanilla average": ("vanilla average", "averaged"),
    "coordinate descent (fuse)": ("coordinate descent (fuse)", "averaged"),
    "activation matching": ("activation matching (correlation)", "averaged"),
    "vanilla, least squares": ("vanilla average", "least squares"),
    "coordinate descent, least squares": ("coordinate descent (fuse)", "least squares"),
    "activation matching, least squares": ("activation matching (correlation)", "least squares"),
}
# Between the seeds of one round and those of the next: each has an order of examples of its own.
_NEXT = 1000


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    division_arguments(parser, same_start=False)
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="of training by the recipe and averaging (default: 2)",
    )


def run(request: Request) -> None:
    """Lets two clients train on data of their own, and a server average them, again and again.

    Of what each client has seen, the server knows how much it is; methods that use data also see
    some images of both, without labels.

    Args:
        request: The command.

    Raises:
        ValueError: There are no rounds, or the data is a text, whose windows are of no class.
    """
    folder = request.folder(f"federated-{request.options['split']}")
    timings: dict[str, float] = {}
    rounds = request.options["rounds"]
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; give at least 1.")
    dataset = request.load()
    refuse_text(dataset)
    architecture = network(request.model, dataset, request.train_config.augment)
    test = tester(dataset)

    parts = divide(dataset.train_labels, request.options["split"], request.options["label"])
    shares = np.asarray([len(part) for part in parts]) / len(dataset.train_labels)
    clients = [dataset.part(part) for part in parts]
    methods: dict[str, Any] = {}
    for name in report.progress(_SERVERS, "servers"):
        began = time.perf_counter()
        found = methods[name] = {"global": [], "clients": []}
        shared = initial(request.model, dataset, request.seeds[0])
        starts = shared if request.options["same_start"] else None
        for number in range(rounds):
            models = _trained(request, clients, number, starts)
            starts = _averaged(request, architecture, dataset, models, shares, name)
            found["clients"].append([test(architecture.apply, model) for model in models])
            found["global"].append(test(architecture.apply, starts))
        timings[name] = time.perf_counter() - began
    config = dataclasses.replace(request.train_config, epochs=rounds * request.train_config.epochs)
    together = train(request.model, config, dataset, request.seeds[0], folder / "models")
    timings["on all data"] = together.seconds
    results = {
        "shares": [report.rounded(share) for share in shares],
        "methods": methods,
        "on all data": test(architecture.apply, together.params),
    }
    _plot(request, folder, results)
    report.write_results(folder, request, _title(request), _tables(results), results, timings)


def _trained(
    request: Request, clients: list[Dataset], number: int, start: PyTree | None
) -> list[PyTree]:
    """Trains each client by the recipe, from the model given or from its own first parameters."""
    folder = request.folder(f"federated-{request.options['split']}") / "models"
    return [
        train(
            request.model, request.train_config, client, seed + _NEXT * number, folder, start
        ).params
        for seed, client in zip(request.seeds, clients, strict=True)
    ]


def _averaged(
    request: Request,
    architecture: Network,
    dataset: Dataset,
    models: list[PyTree],
    shares: np.ndarray,
    name: str,
) -> PyTree:
    """What the server makes of the clients' models, weighted by the data that they have seen."""
    method, average = _SERVERS[name]
    pair = pair_of(request, architecture, dataset, models)
    a, b = shares.tolist()
    fused = AVERAGES[average](pair, VARIANTS[method](pair), (a, b))
    return fused if average != "averaged" else reestimated(architecture, fused, pair.images)


def _title(request: Request) -> str:
    start = "the same start" if request.options["same_start"] else "starts of their own"
    return f"{request.title}, split by {request.options['split']}, {start}"


def _plot(request: Request, folder: Any, results: dict[str, Any]) -> None:
    methods = results["methods"]
    numbers = range(1, request.options["rounds"] + 1)
    panels = {
        "test accuracy of the global model (%)": {
            name: found["global"] for name, found in methods.items()
        },
        "mean of the clients before averaging (%)": {
            name: [float(np.mean(both)) for both in found["clients"]]
            for name, found in methods.items()
        },
    }
    levels = {next(iter(panels)): {"trained on all data": results["on all data"]}}
    x = ("round", list(numbers))
    report.plot_lines(folder / "rounds.png", _title(request), x, panels, levels)


def _tables(results: dict[str, Any]) -> str:
    methods = results["methods"]
    rounds = len(next(iter(methods.values()))["global"])
    numbers = [f"round {number + 1}" for number in range(rounds)]
    together = ("trained on all data", *[""] * (rounds - 1), f"{results['on all data']:.2f}")
    after = [
        (name, *(f"{value:.2f}" for value in found["global"])) for name, found in methods.items()
    ]
    before = [
        (name, *(f"{a:.2f} / {b:.2f}" for a, b in found["clients"]))
        for name, found in methods.items()
    ]
    return "\n\n".join(
        [
            report.markdown_table(("global model (%)", *numbers), [*after, together]),
            report.markdown_table(("clients A / B before averaging (%)", *numbers), before),
        ]
    )
