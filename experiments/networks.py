"""Architectures as the library sees them: a function of variables and images, and its symmetry."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num, PyTree

import otfusion_jax as otf
from experiments.data import Dataset
from experiments.evaluate import Apply
from experiments.models import BATCH_NORM_MOMENTUM, ModelConfig, build_model
from experiments.train import augmented

# Flax's name for the running statistics of batch norm.
_STATISTICS = "batch_stats"
# How many images pass through a network at once where statistics are estimated.
_BATCH_SIZE = 250


@dataclasses.dataclass(frozen=True)
class Network:
    """An architecture on one dataset, and what the library reads off it.

    Attributes:
        config: Which model it is.
        classes: The number of logits.
        apply: Maps variables and images to logits, in inference mode.
        symmetry: Which axes of the variables move together.
        shapes: The variables as `jax.ShapeDtypeStruct`s.
        augment: Whether its images are cropped and flipped in training.
    """

    config: ModelConfig
    classes: int
    apply: Apply
    symmetry: otf.Symmetry
    shapes: PyTree
    augment: bool


def network(config: ModelConfig, dataset: Dataset, augment: bool = False) -> Network:
    """Builds a model and traces it; nothing is computed.

    Args:
        config: Which model to build.
        dataset: The data that the model is for.
        augment: Whether its images are cropped and flipped in training.

    Returns:
        The architecture.
    """
    model = build_model(config, dataset.classes)
    example = dataset.train_images[0]
    # Two images: on a batch of one, the axis of the batch could be any axis of size one.
    images = jax.ShapeDtypeStruct((2, *example.shape), example.dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    symmetry = otf.trace_symmetry(model.apply, shapes, images)
    return Network(config, dataset.classes, model.apply, symmetry, shapes, augment)


def counts(path: str) -> bool:
    """Says whether a leaf counts in a cost: running statistics do not say what a unit does.

    Args:
        path: The key path of the leaf.
    """
    return not path.startswith(_STATISTICS)


def training_step(network: Network) -> Callable[[PyTree, Array], PyTree] | None:
    """Returns a step in training mode that updates running statistics; None without batch norm.

    Args:
        network: The architecture; it says whether images are cropped and flipped.
    """
    if _STATISTICS not in network.shapes:
        return None

    @jax.jit
    def update(variables: PyTree, images: Array) -> PyTree:
        changed = _after_step(network, variables, _as_in_training(network, images))
        return {**variables, **changed}

    return update


def _as_in_training(network: Network, images: Num[Array, "n ..."]) -> Array:
    """Crops and flips images where training does."""
    if not network.augment:
        return images
    black = jnp.min(images, axis=(0, 1, 2), keepdims=True)
    return augmented(jax.random.key(0), images, black)


def _after_step(network: Network, variables: PyTree, images: Array) -> PyTree:
    """Returns the running statistics after a step in training mode."""
    model = build_model(network.config, network.classes)
    _, changed = model.apply(variables, images, train=True, mutable=[_STATISTICS])
    return changed


def reestimated(network: Network, variables: PyTree, images: Num[Array, "n ..."]) -> PyTree:
    """Gives batch norm the statistics that its inputs have on some images.

    They are shown as in training. Whole images have other statistics than crops with a black
    margin, which the layers behind are used to: with them a trained network loses 1 to 3 points.

    Args:
        network: The architecture; it says whether images are cropped and flipped.
        variables: The variables of the model.
        images: The images. A batch at a time passes in training mode; what is over is left out.

    Returns:
        The variables with the mean of the batches' statistics; without batch norm, unchanged.
    """
    if _STATISTICS not in variables:
        return variables
    images = _as_in_training(network, images)

    def without_momentum(new: Array, old: Array) -> Array:
        # Flax sets new = momentum * old + (1 - momentum) * batch, which is solved for `batch`.
        return (new - BATCH_NORM_MOMENTUM * old) / (1 - BATCH_NORM_MOMENTUM)

    @jax.jit
    def statistics(batch: Array) -> PyTree:
        changed = _after_step(network, variables, batch)
        return jax.tree.map(without_momentum, changed[_STATISTICS], variables[_STATISTICS])

    size = min(_BATCH_SIZE, len(images))
    found = []
    for first in range(0, len(images) - size + 1, size):
        found.append(statistics(images[first : first + size]))
    return {**variables, _STATISTICS: otf.average(found)}
