"""Two networks to fuse: trained here from two seeds, or read from files."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Num, PyTree

import otfusion_jax as otf
from experiments.data import Dataset
from experiments.networks import Network
from experiments.runs import Run, Study
from otfusion_jax.fusion.dead_leaves import dead_leaves


@dataclasses.dataclass(frozen=True)
class Pair:
    """What a method of fusion may look at.

    Attributes:
        network: The architecture of both models.
        a: The variables of the model that is moved.
        b: The variables of the model that it is moved onto.
        images: Images without labels, drawn by the seeds: of the training split, or of nothing.
        ridge: The penalty of least squares.
        learning_steps: How many steps rotations are learned by.
    """

    network: Network
    a: PyTree
    b: PyTree
    images: Num[Array, "samples ..."]
    ridge: float = 0.01
    learning_steps: int = 600


@dataclasses.dataclass(frozen=True)
class Form:
    """The form that both models of a pair are brought into before one is moved.

    Attributes:
        free: From the symmetry that was traced to that of the form, which may move units in more
            ways; None for the form in which models were trained.
    """

    free: Callable[[otf.Symmetry], otf.Symmetry] | None = None

    def suits(self, symmetry: otf.Symmetry) -> bool:
        """Says whether it is another form than the one in which models were trained.

        Args:
            symmetry: The symmetry that was traced.

        Returns:
            Whether any units may move in more ways; always, if it is that form that is meant.
        """
        return self.free is None or self.free(symmetry) != symmetry

    def __call__(self, pair: Pair) -> Pair:
        """Brings both models into this form.

        Args:
            pair: The models.

        Returns:
            The same functions, with a network whose symmetry is that of the form.
        """
        if self.free is None:
            return pair
        symmetry = self.free(pair.network.symmetry)
        return dataclasses.replace(
            pair,
            network=dataclasses.replace(pair.network, symmetry=symmetry),
            a=otf.canonicalize(symmetry, pair.a),
            b=otf.canonicalize(symmetry, pair.b),
        )


AS_TRAINED = Form()
WITH_ROTATIONS = Form(otf.Symmetry.with_rotations)
WITH_SIGNS = Form(otf.Symmetry.with_signs)
WITH_SCALES = Form(otf.Symmetry.with_scales)


def seen_images(
    dataset: Dataset, seeds: Sequence[int], count: int, draw: int = 0, synthetic: bool = False
) -> Num[Array, "samples ..."]:
    """Draws the images that a method may see, by the seeds.

    Args:
        dataset: The data.
        seeds: The seeds of the models.
        count: How many images to draw; there may be fewer.
        draw: A number; other numbers give other images.
        synthetic: Whether to draw images of dead leaves, in place of training images.

    Returns:
        The images.
    """
    if synthetic:
        shape = dataset.train_images.shape[1:]
        return jnp.asarray(dead_leaves(seeds[0] + draw, count, *shape))
    # Each seed has a say: pairs that share one model see different images.
    key = functools.reduce(jax.random.fold_in, seeds[1:], jax.random.key(seeds[0]))
    if draw:
        key = jax.random.fold_in(key, draw)
    there = len(dataset.train_labels)
    drawn = jax.random.choice(key, there, (min(count, there),), replace=False)
    return jnp.asarray(dataset.train_images[np.asarray(drawn)])


@dataclasses.dataclass(frozen=True)
class PairStudy(Study):
    """A study of pairs of models: where they come from, and how many images a method may see."""

    weights: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A B")] = None
    """Safetensors or npz with PyTorch's names and layouts, instead of training."""
    images: int = 1000
    """Training images, without labels, for methods that use data."""
    ridge: float = 0.01
    """The penalty of least squares, in units of the mean eigenvalue."""
    learning_steps: int = 600
    """Steps of 64 images that rotations are learned by."""
    synthetic: bool = False
    """Images of dead leaves instead, so that no method uses data."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that models are read from, instead of training them."""
        return self.weights or ()

    def check(self) -> None:
        """Refuses to learn rotations by no steps."""
        super().check()
        if self.learning_steps < 1:
            raise ValueError(f"--learning-steps is {self.learning_steps}; give at least 1.")

    def check_data(self, dataset: Dataset) -> None:
        """Refuses a text where images are to be drawn."""
        if self.synthetic and dataset.train_labels.ndim > 1:
            raise ValueError(f"--synthetic draws images; {dataset.name} is a text.")

    def pair(
        self,
        run: Run,
        models: Sequence[PyTree],
        seeds: Sequence[int],
        dataset: Dataset | None = None,
        draw: int = 0,
    ) -> Pair:
        """Puts two models together with the images that a method may see.

        Args:
            run: The run.
            models: A and B.
            seeds: The seeds of the two, by which images are drawn.
            dataset: The data that images are drawn from; None for all of it.
            draw: A number; other numbers give other images.

        Returns:
            The pair.
        """
        a, b = models
        images = seen_images(dataset or run.dataset, seeds, self.images, draw, self.synthetic)
        return Pair(run.network, a, b, images, self.ridge, self.learning_steps)
