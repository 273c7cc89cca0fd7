"""Two networks to fuse: trained here from two seeds, or read from files."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, PyTree

import otfusion_jax as otf
from experiments.data import Dataset
from experiments.importer import import_pytorch, read_arrays
from experiments.models import ModelConfig, build_model
from experiments.runs import Request
from experiments.synthetic import dead_leaves
from experiments.train import train


@dataclasses.dataclass(frozen=True)
class Network:
    """An architecture on one dataset, and what the library reads off it.

    Attributes:
        config: Which model.
        classes: Number of logits.
        apply: Maps variables and images to logits, in inference mode.
        symmetry: Which axes of the variables move together.
        shapes: The variables as `jax.ShapeDtypeStruct`s.
        augment: Whether its images are cropped and flipped in training.
    """

    config: ModelConfig
    classes: int
    apply: Callable[[PyTree, Array], Array]
    symmetry: otf.Symmetry
    shapes: PyTree
    augment: bool


def network(config: ModelConfig, dataset: Dataset, augment: bool = False) -> Network:
    """Builds a model and traces it; nothing is computed.

    Args:
        config: Which model.
        dataset: What it is for.
        augment: Whether its images are cropped and flipped in training.
    """
    model = build_model(config, dataset.classes)
    example = dataset.train_images[0]
    images = jax.ShapeDtypeStruct((2, *example.shape), example.dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    symmetry = otf.trace_symmetry(model.apply, shapes, images)
    return Network(config, dataset.classes, model.apply, symmetry, shapes, augment)


@dataclasses.dataclass(frozen=True)
class Pair:
    """What a method of fusion may look at.

    Attributes:
        network: The architecture of both.
        a: Variables of the model that is moved.
        b: Variables of the model that it is moved onto.
        images: Drawn by the seeds: training images without labels, or images of nothing.
    """

    network: Network
    a: PyTree
    b: PyTree
    images: Num[Array, "samples ..."]


def pair_of(request: Request, network: Network, dataset: Dataset, models: list[PyTree]) -> Pair:
    """Puts two models together with the images that a method may see.

    Args:
        request: The command; its option `images` says how many, and `synthetic` whether they are of
            nothing.
        network: The architecture.
        dataset: The data.
        models: A and B.
    """
    a, b = models
    return Pair(network, a, b, seen_images(request, dataset, request.options["images"]))


def seen_images(
    request: Request, dataset: Dataset, count: int, draw: int = 0
) -> Num[Array, "samples ..."]:
    """Draws the images that a method may see, by the seeds.

    Args:
        request: The command; its option `synthetic` says whether they are of nothing.
        dataset: The data.
        count: How many; there may be fewer.
        draw: Others give other images.
    """
    if request.options.get("synthetic"):
        shape = dataset.train_images.shape[1:]
        return jnp.asarray(dead_leaves(request.seeds[0] + draw, count, *shape))
    key = functools.reduce(jax.random.fold_in, request.seeds[1:], jax.random.key(request.seeds[0]))
    key = jax.random.fold_in(key, draw) if draw else key
    there = len(dataset.train_labels)
    drawn = jax.random.choice(key, there, (min(count, there),), replace=False)
    return jnp.asarray(dataset.train_images[np.asarray(drawn)])


def pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where the two models come from, and how many images a method may see."""
    parser.add_argument(
        "--weights",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="safetensors or npz with PyTorch's names and layouts, instead of training",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="training images, without labels, for methods that use data (default: 1000)",
    )
    parser.add_argument(
        "--synthetic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="images of dead leaves instead, so that no method uses data",
    )


def parents(
    request: Request, network: Network, dataset: Dataset, folder: Path, timings: dict[str, float]
) -> list[PyTree]:
    """Returns the models that a request speaks of: read from its files, or trained.

    Args:
        request: The command; its option `weights` names two files, or is None.
        network: The architecture.
        dataset: What to train on.
        folder: Of the run.
        timings: Receives the seconds that each training took.

    Raises:
        ValueError: A file can't be read or does not fit the model.
    """
    if request.options.get("weights"):
        return [
            import_pytorch(network.symmetry, read_arrays(path))
            for path in request.options["weights"]
        ]
    models: list[Any] = []
    for seed in request.seeds:
        trained = train(network.config, request.train_config, dataset, seed, folder / "models")
        timings[f"training, seed {seed}"] = trained.seconds
        models.append(trained.params)
    return models
