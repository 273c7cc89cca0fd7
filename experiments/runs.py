"""What the command line asks a study for, and the folder of its own that a run writes to."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from experiments.models import ModelConfig
from experiments.recipes import RECIPES
from experiments.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """One command, as given; see the flags of the command line.

    Attributes:
        command: The command itself, to be recorded.
        dataset: A key of `DATASETS`.
        model: A key of `MODELS`.
        use_bias: Whether the model's layers have biases.
        seeds: Seeds of the two models.
        epochs: Instead of those of the recipe; None keeps them.
        data_dir: Where TFDS keeps its data; None for its default.
        out: The run's folder; None for one named after the run.
    """

    command: str
    dataset: str
    model: str
    use_bias: bool
    seeds: tuple[int, int]
    epochs: int | None
    data_dir: Path | None
    out: Path | None

    @property
    def model_config(self) -> ModelConfig:
        """The model to train."""
        return ModelConfig(self.model, self.use_bias)

    @property
    def train_config(self) -> TrainConfig:
        """The recipe of this model on this dataset, with the number of epochs asked for."""
        key = (self.dataset, self.model)
        if key not in RECIPES:
            raise ValueError(
                f"There is no recipe for {self.model} on {self.dataset}; add one to recipes.py."
            )
        recipe = RECIPES[key]
        return recipe if self.epochs is None else dataclasses.replace(recipe, epochs=self.epochs)

    def folder(self, study: str) -> Path:
        """Returns the folder for this run of a study; it need not exist yet."""
        seeds = "-".join(map(str, self.seeds))
        return self.out or Path("runs", f"{study}-{self.dataset}-{self.model_config.label}-{seeds}")


@dataclasses.dataclass(frozen=True)
class Study:
    """A subcommand.

    Attributes:
        summary: One line for the help text.
        run: Does the study, prints its outcome and leaves files in the run's folder.
    """

    summary: str
    run: Callable[[Request], None]
