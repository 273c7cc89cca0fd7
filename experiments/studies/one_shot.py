"""One-shot fusion of two models trained from different seeds (Singh & Jaggi 2020, section 5.1)."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

import otfusion_jax as otf
from experiments import report
from experiments.data import Dataset
from experiments.evaluate import accuracy
from experiments.models import ModelConfig, build_model
from experiments.runs import Request
from experiments.train import TrainConfig, train


@dataclasses.dataclass(frozen=True)
class OneShotConfig:
    """Everything that the results depend on, besides versions and device.

    Attributes:
        dataset: A key of `DATASETS`.
        model: The architecture of both models.
        training: The recipe of both models.
        seeds: The seeds that set them apart.
        activation_samples: Training images whose activations are aligned, drawn by the seeds.
        path_points: Points evaluated from A to B, an odd number so that the midpoint is one.
    """

    dataset: str
    model: ModelConfig
    training: TrainConfig
    seeds: tuple[int, int]
    activation_samples: int = 200
    path_points: int = 21


@dataclasses.dataclass(frozen=True)
class Pair:
    """What a method of alignment may look at.

    Attributes:
        symmetry: Which parameter axes of the models move together.
        apply: Maps parameters and images to logits.
        a: Parameters of the model that is moved.
        b: Parameters of the model that it is moved onto.
        samples: Training images.
    """

    symmetry: otf.Symmetry
    apply: Callable[..., Array]
    a: PyTree
    b: PyTree
    samples: Float[Array, "samples height width channels"]


def _moved(pair: Pair, **how: Any) -> PyTree:
    plans = otf.align(pair.symmetry, pair.a, pair.b, **how)
    return otf.transport(pair.symmetry, plans, pair.a)


def _activations(pair: Pair) -> dict[str, otf.Gram]:
    return otf.feature_gram(pair.symmetry, pair.apply, pair.a, pair.b, [pair.samples])


# Each gives model A as it enters the average with model B. `otf.fuse` would give the same average
# as coordinate descent does, but not the path that leads to it.
METHODS: dict[str, Callable[[Pair], PyTree]] = {
    "vanilla average": lambda pair: pair.a,
    "Algorithm 1, weights": lambda pair: _moved(pair, method=otf.ForwardPass()),
    "Algorithm 1, activations": lambda pair: _moved(
        pair, method=otf.ForwardPass(), features=_activations(pair)
    ),
    "coordinate descent (fuse)": _moved,
}


def run(request: Request) -> None:
    """Trains both models, fuses them by every method, prints a table and writes JSON and a plot.

    Args:
        request: The command; `request.folder` receives `results.json`, `paths.png` and the
            checkpoints of the two models.
    """
    first, second = request.seeds
    config = OneShotConfig(request.dataset, request.model, request.train_config, (first, second))
    folder = request.folder("one_shot")
    timings: dict[str, float] = {}

    start = time.perf_counter()
    dataset = request.load()
    timings["reading data"] = time.perf_counter() - start

    models = []
    for name, seed in zip("AB", config.seeds, strict=True):
        trained = train(config.model, config.training, dataset, seed, folder / "models")
        timings[f"training {name}"] = trained.seconds
        models.append(trained.params)

    results = _compare(config, dataset, models, timings)
    title = f"{config.model.label} on {config.dataset}, seeds {first}, {second}"
    content = {
        "command": request.command,
        "config": dataclasses.asdict(config),
        "environment": report.environment(),
        "results": results,
        "timings_in_seconds": {name: round(seconds, 3) for name, seconds in timings.items()},
    }
    report.write_json(folder / "results.json", content)
    report.plot_paths(
        folder / "paths.png",
        title,
        results["t"],
        {name: method["path"] for name, method in results["methods"].items()},
        {"ensemble": results["ensemble"]},
    )
    print(f"{title}\n\n{_table(results)}\n\nwritten: {folder}/results.json, {folder}/paths.png")


def _compare(
    config: OneShotConfig, dataset: Dataset, models: list[PyTree], timings: dict[str, float]
) -> dict[str, Any]:
    """Evaluates both models, their ensemble and every method on the test split.

    Args:
        config: What to compare.
        dataset: The data.
        models: Parameters of A and B.
        timings: Receives the seconds that each method took to align, compilation included.

    Returns:
        Accuracies in percent and barriers in percentage points, ready for JSON.
    """
    a, b = models
    apply = build_model(config.model, dataset.classes).apply
    images, labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    key = jax.random.fold_in(jax.random.key(config.seeds[0]), config.seeds[1])
    drawn = jax.random.choice(
        key, len(dataset.train_labels), (config.activation_samples,), replace=False
    )
    samples = jnp.asarray(dataset.train_images)[drawn]
    pair = Pair(otf.trace_symmetry(apply, a, images[:2]), apply, a, b, samples)
    t = jnp.linspace(0, 1, config.path_points)

    @jax.jit
    def error(params: PyTree, images: Array, labels: Array) -> Array:
        return 100 - accuracy(lambda batch: apply(params, batch), images, labels)

    @jax.jit
    def barrier(a: PyTree, b: PyTree, t: Array, images: Array, labels: Array) -> otf.Barrier:
        return otf.barrier(lambda params: error(params, images, labels), a, b, t)

    @jax.jit
    def ensemble(models: list[PyTree], images: Array, labels: Array) -> Array:
        return accuracy(lambda batch: otf.ensemble(apply, models, batch), images, labels)

    methods = {}
    for name, method in METHODS.items():
        start = time.perf_counter()
        moved = jax.block_until_ready(method(pair))
        timings[name] = time.perf_counter() - start
        found = barrier(moved, b, t, images, labels)
        fused = otf.average([moved, b])
        methods[name] = {
            "accuracy": _percent(100 - error(fused, images, labels)),
            "barrier": _percent(found.height),
            "path": [_percent(value) for value in 100 - found.values],
        }
    return {
        "individuals": [_percent(100 - error(model, images, labels)) for model in models],
        "ensemble": _percent(ensemble(models, images, labels)),
        "t": [round(position, 6) for position in t.tolist()],
        "methods": methods,
    }


def _percent(value: Array) -> float:
    """Rounds to what float32 tells apart; a finer figure would only look different, not be."""
    return round(float(value), 4)


def _table(results: dict[str, Any]) -> str:
    a, b = results["individuals"]
    rows = [
        ("model A", f"{a:.2f}", ""),
        ("model B", f"{b:.2f}", ""),
        ("ensemble", f"{results['ensemble']:.2f}", ""),
    ]
    for name, method in results["methods"].items():
        rows.append((name, f"{method['accuracy']:.2f}", f"{method['barrier']:.2f}"))
    return report.markdown_table(("", "test accuracy (%)", "error barrier (points)"), rows)
