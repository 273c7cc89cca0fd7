"""Fusion of models that have seen different data (Singh & Jaggi 2020, skill transfer)."""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, PyTree

from experiments import report
from experiments.data import Dataset, stratified_split
from experiments.methods import AVERAGES, VARIANTS
from experiments.pairs import network, pair_of
from experiments.runs import Request
from experiments.train import initial, train

_TENTH = 10
# What moves A, and what makes one model of it and B.
_FUSED = {
    "vanilla average": ("vanilla average", "averaged"),
    "Algorithm 1, weights": ("Algorithm 1, weights", "averaged"),
    "Algorithm 1, activations": ("Algorithm 1, activations", "averaged"),
    "activation matching": ("activation matching (correlation)", "averaged"),
    "coordinate descent (fuse)": ("coordinate descent (fuse)", "averaged"),
    "vanilla, least squares": ("vanilla average", "least squares"),
    "activation matching, least squares": (
        "activation matching (correlation)",
        "least squares",
    ),
    "coordinate descent, least squares": ("coordinate descent (fuse)", "least squares"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of this study."""
    division_arguments(parser, same_start=True)
    parser.add_argument("--path-points", type=int, default=21, help="from A to B (default: 21)")
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        help="of the training images of both, held out to choose t by (default: 0.1)",
    )


def division_arguments(parser: argparse.ArgumentParser, same_start: bool) -> None:
    """Declares who sees which examples, whence they start, and what a method may see.

    Args:
        parser: Of the study.
        same_start: Whether all start from the same parameters unless told otherwise.
    """
    parser.add_argument(
        "--split",
        choices=("label", "parity", "size"),
        default="label",
        help="A has all of one label and a tenth of the rest, B the other nine tenths (default);"
        " A has the even labels; A has a tenth of the data",
    )
    parser.add_argument("--label", type=int, default=4, help="that only A sees (default: 4)")
    parser.add_argument(
        "--same-start",
        action=argparse.BooleanOptionalAction,
        default=same_start,
        help="whether both start from the first seed's parameters, as in the paper"
        f" (default: {'yes' if same_start else 'no'})",
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="of both, for methods that use data"
    )


def divide(
    labels: Int32[np.ndarray, " n"], split: str, label: int
) -> tuple[Int32[np.ndarray, " a"], Int32[np.ndarray, " b"]]:
    """Shares examples between A and B, with no randomness.

    Args:
        labels: Class of each example.
        split: `"label"`, `"parity"` or `"size"`; see the flag.
        label: That A has all of, if the split is by label.

    Returns:
        Ascending indices of A's and of B's examples.

    Raises:
        ValueError: One of them would have none.
    """
    _, tenth = stratified_split(labels, test_every=_TENTH)
    everything = np.arange(len(labels), dtype=np.int32)
    if split == "parity":
        a = everything[labels % 2 == 0]
    elif split == "size":
        a = tenth
    else:
        a = np.union1d(tenth, everything[labels == label]).astype(np.int32)
    b = np.setdiff1d(everything, a).astype(np.int32)
    if not (len(a) and len(b) and (split != "label" or (labels == label).any())):
        raise ValueError(f"The split by {split} leaves one of the models without examples.")
    return a, b


def refuse_text(dataset: Dataset) -> None:
    """Refuses what can't be divided by label.

    Args:
        dataset: The data.

    Raises:
        ValueError: It is a text, whose windows are of no class.
    """
    if dataset.train_labels.ndim > 1:
        raise ValueError(f"{dataset.name} is a text; images alone are divided by their labels.")


def run(request: Request) -> None:
    """Trains two models on different data and evaluates all paths between them.

    Args:
        request: The command.

    Raises:
        ValueError: The validation share leaves nothing to train on, or to choose by; or the data is
            a text, whose windows are of no class.
    """
    folder = request.folder(f"non_iid-{request.options['split']}")
    timings: dict[str, float] = {}
    whole = request.load()
    share = request.options["validation_share"]
    if not 0 < share <= 0.5:
        raise ValueError(f"--validation-share is {share}; give more than 0 and at most 0.5.")
    refuse_text(whole)
    train_part, held_out = stratified_split(whole.train_labels, test_every=round(1 / share))
    dataset = whole.part(train_part)
    architecture = network(request.model, dataset, request.train_config.augment)

    how = (request.options["split"], request.options["label"])
    start = initial(request.model, dataset, request.seeds[0])
    models = []
    for seed, mine in zip(request.seeds, divide(dataset.train_labels, *how), strict=True):
        trained = train(
            request.model,
            request.train_config,
            dataset.part(mine),
            seed,
            folder / "models",
            start if request.options["same_start"] else None,
        )
        timings[f"training, seed {seed}"] = trained.seconds
        models.append(trained.params)

    pair = pair_of(request, architecture, dataset, models)
    judge = _judge(architecture.apply, whole, held_out, divide(whole.test_labels, *how))
    t = np.linspace(0, 1, request.options["path_points"])
    methods: dict[str, Any] = {}
    for name, (method, average) in report.progress(_FUSED.items(), "fusing"):
        began = time.perf_counter()
        moved = VARIANTS[method](pair)
        path = [judge(AVERAGES[average](pair, moved, (1 - s, s))) for s in t.tolist()]
        methods[name] = {where: [point[where] for point in path] for where in path[0]}
        timings[name] = time.perf_counter() - began
    results = {
        "individuals": [judge(model) for model in models],
        "t": [round(position, 6) for position in t.tolist()],
        "methods": methods,
    }
    panels = {
        f"accuracy, {where} (%)": {name: found[where] for name, found in methods.items()}
        for where in ("test", "test of A", "test of B")
    }
    title = f"{request.title}, split by {request.options['split']}"
    x = (report.PATH_AXIS, results["t"])
    report.plot_lines(folder / "paths.png", title, x, panels, {})
    report.write_results(folder, request, title, _table(results), results, timings)


def _judge(apply: Any, whole: Dataset, held_out: np.ndarray, parts: tuple[np.ndarray, ...]) -> Any:
    """Returns what maps parameters to accuracies in percent on several sets of images."""
    sets = {
        "validation": (whole.train_images[held_out], whole.train_labels[held_out]),
        "test": (whole.test_images, whole.test_labels),
    }
    on_device = {name: tuple(map(jnp.asarray, found)) for name, found in sets.items()}

    @jax.jit
    def right(params: PyTree, images: Array, labels: Array) -> Array:
        return jnp.argmax(apply(params, images), axis=-1) == labels

    def judge(params: PyTree) -> dict[str, float]:
        found = {name: np.asarray(right(params, *where)) for name, where in on_device.items()}
        found |= {f"test of {name}": found["test"][i] for name, i in zip("AB", parts, strict=True)}
        return {name: report.rounded(100 * correct.mean()) for name, correct in found.items()}

    return judge


def _table(results: dict[str, Any]) -> str:
    where = ("test", "test of A", "test of B")
    rows = [
        (f"model {name}", "", *(f"{found[w]:.2f}" for w in where), "")
        for name, found in zip("AB", results["individuals"], strict=True)
    ]
    for name, path in results["methods"].items():
        best = int(np.argmax(path["validation"]))
        cells = (f"{path[w][best]:.2f}" for w in where)
        rows.append((name, f"{results['t'][best]:.2f}", *cells, f"{max(path['test']):.2f}"))
    header = ("accuracy (%)", "t by validation", *where, "test, best t")
    return report.markdown_table(header, rows)
