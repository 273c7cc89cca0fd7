"""What the command line asks a study for, and the folder of its own that a run writes to."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.data import Dataset, load_dataset
from experiments.models import ModelConfig
from experiments.recipes import RECIPES
from experiments.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """One command, as given; see the flags of the command line.

    Attributes:
        command: The command itself, to be recorded.
        dataset: A key of `DATASETS`.
        model: The architecture of all models.
        seeds: Seeds of the models.
        recipe: Name of the training recipe; None for the first.
        epochs: Instead of those of the recipe; None keeps them.
        dtype: Of the activations in training, instead of the recipe's; None keeps it.
        train_images: How many of the training images to train on; None for all.
        test_images: How many of the test images to evaluate on; None for all.
        data_dir: Where TFDS keeps its data; None for its default.
        out: The run's folder; None for one named after the run.
        options: Flags of this study alone.
    """

    command: str
    dataset: str
    model: ModelConfig
    seeds: tuple[int, ...]
    recipe: str | None = None
    epochs: int | None = None
    dtype: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    data_dir: Path | None = None
    out: Path | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def train_config(self) -> TrainConfig:
        """The recipe of this model on this dataset, with what was asked for changed.

        Raises:
            ValueError: There is no such recipe; the message lists what there is.
        """
        recipes = RECIPES.get((self.dataset, self.model.name))
        if recipes is None:
            known = ", ".join(f"{model} on {dataset}" for dataset, model in RECIPES)
            raise ValueError(
                f"There is no recipe for {self.model.name} on {self.dataset}, only for {known}; "
                "add one to recipes.py."
            )
        name = next(iter(recipes)) if self.recipe is None else self.recipe
        if name not in recipes:
            raise ValueError(
                f"There is no recipe {name!r} for {self.model.name} on {self.dataset}; choose one "
                f"of {sorted(recipes)}."
            )
        changes = {"epochs": self.epochs, "dtype": self.dtype}
        given = {field: value for field, value in changes.items() if value is not None}
        return dataclasses.replace(recipes[name], **given)

    def load(self) -> Dataset:
        """Reads the dataset, and keeps the first images of each split if fewer were asked for.

        Raises:
            ValueError: Fewer than one image was asked for, or images to stand for a text.
            DatasetUnavailable: The data is not on this machine.
        """
        for name, count in (("train", self.train_images), ("test", self.test_images)):
            if count is not None and count < 1:
                raise ValueError(f"--{name}-images is {count}; give at least 1.")
        whole = load_dataset(self.dataset, self.data_dir)
        if self.options.get("synthetic") and whole.train_labels.ndim > 1:
            raise ValueError(f"--synthetic draws images; {whole.name} is a text.")
        return whole.part(slice(self.train_images), slice(self.test_images))

    @property
    def title(self) -> str:
        """What a run is about, in words."""
        named = "" if self.options.get("weights") else "seeds "
        return f"{self.model.label} on {self.dataset}, {named}{', '.join(self._models)}"

    def folder(self, study: str) -> Path:
        """Returns the folder for this run of a study; it need not exist yet."""
        label = "-".join((study, self.dataset, self.model.label, *self._models))
        return self.out or Path("runs", label)

    @property
    def _models(self) -> list[str]:
        """Names of the models: of their files, or else their seeds."""
        files = self.options.get("weights")
        return [path.stem for path in files] if files else [str(seed) for seed in self.seeds]


@dataclasses.dataclass(frozen=True)
class Study:
    """A subcommand.

    Attributes:
        summary: One line for the help text.
        run: Does the study, prints its outcome and leaves files in the run's folder.
        arguments: Declares the flags of this study alone.
        seeds: Of the models, unless others are asked for.
        any_number: Whether there may be another number of seeds.
    """

    summary: str
    run: Callable[[Request], None]
    arguments: Callable[[argparse.ArgumentParser], None]
    seeds: tuple[int, ...] = (0, 1)
    any_number: bool = False
