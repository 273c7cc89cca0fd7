"""What a study is, and one run of it.

A `Study` is a frozen dataclass whose fields are the flags of its subcommand, with a docstring
beneath each that is the flag's help text. Three methods say what it studies: `measure` does the
work, `tables` and `plot` show what was found. A `Run` is what `measure` works with: the data, the
networks and the models that the flags name, made when they are first asked for, and the records,
one row for each value that has been measured.
"""

import abc
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import pandas as pd
from jaxtyping import Array, PyTree
from tyro.constructors import PrimitiveConstructorSpec

from experiments.data import DATASETS, Dataset, load_dataset
from experiments.evaluate import Judge
from experiments.importer import import_pytorch, read_arrays
from experiments.models import MODELS, ModelConfig
from experiments.networks import Network, network
from experiments.recipes import RECIPES
from experiments.train import Teacher, TrainConfig, train

T = TypeVar("T")

_DATASETS = {name: name for name in sorted(DATASETS)}
_MODELS = {name: name for name in sorted(MODELS)}


def choice(registry: Mapping[str, T], metavar: str | None = None) -> PrimitiveConstructorSpec[T]:
    """Makes a flag take the names of a registry, and a study get what they stand for.

    Args:
        registry: What the flag may stand for, by name.
        metavar: What the help text shows in place of a value; None for the names.

    Returns:
        What `Annotated` adds to the type of a flag.
    """
    names = tuple(registry)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar or f"{{{','.join(names)}}}",
        instance_from_str=lambda words: registry[words[0]],
        is_instance=lambda value: value in registry.values(),
        str_from_instance=lambda value: [str(value)],
        choices=names,
    )


@dataclasses.dataclass(frozen=True)
class Study(abc.ABC):
    """What all studies have in common: the flags that say what is trained on what, and where to."""

    command: ClassVar[str]
    """The name of the subcommand."""
    may_be_empty: ClassVar[tuple[str, ...]] = ()
    """Flags of several values that may be given without one."""

    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the models."""
    dataset: Annotated[str, choice(_DATASETS)] = "digits"
    """Data to train and to evaluate on."""
    model: Annotated[str, choice(_MODELS)] = "mlpnet"
    """Architecture of the models."""
    bias: bool = False
    """Give the layers biases (the models of the paper have none)."""
    norm: bool = False
    """Put batch norm after the convolutions (the models of the paper have none)."""
    width: float = 1.0
    """Factor that multiplies the units of every hidden layer."""
    recipe: str | None = None
    """Name of a recipe in recipes.py; by default the first for model and data."""
    epochs: int | None = None
    """Epochs of training, instead of the number in the recipe."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the activations in training, instead of the recipe's."""
    train_images: int | None = None
    """Train on so many images only."""
    test_images: int | None = None
    """Evaluate on so many images only."""
    data_dir: Path | None = None
    """Folder where TFDS keeps its data."""
    out: Path | None = None
    """Folder of the run; by default one in runs/ that is named after what runs."""

    @abc.abstractmethod
    def measure(self, run: "Run") -> None:
        """Does the study, and adds a row to the records for each value that it measures."""

    @abc.abstractmethod
    def tables(self, records: pd.DataFrame) -> list[str]:
        """Shows the records as Markdown."""

    @abc.abstractmethod
    def plot(self, records: pd.DataFrame, path: Path) -> None:
        """Plots the records into a PNG file."""

    def check(self) -> None:
        """Refuses flags that make no sense, before any work.

        Raises:
            ValueError: A flag makes no sense; the message says which, and what would.
        """
        for field in dataclasses.fields(self):
            # A flag that takes several values also takes none, which hardly any has a use for.
            if getattr(self, field.name) == () and field.name not in self.may_be_empty:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} has no value; give at least one.")
        for name, count in (("train", self.train_images), ("test", self.test_images)):
            if count is not None and count < 1:
                raise ValueError(f"--{name}-images is {count}; give at least 1.")
        if not self.files:
            _ = self.train_config  # a recipe that is not there is an error

    def check_data(self, dataset: Dataset) -> None:  # noqa: B027, most studies take any data
        """Refuses data that the study has no use for, before any work.

        Args:
            dataset: The data, as much of it as was asked for.

        Raises:
            ValueError: The data will not do; the message says why.
        """

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that models are read from, instead of training them; most studies have none."""
        return ()

    @property
    def model_config(self) -> ModelConfig:
        """The architecture of the models."""
        return ModelConfig(self.model, self.bias, use_norm=self.norm, width=self.width)

    @property
    def train_config(self) -> TrainConfig:
        """The recipe of this model on this dataset, with what was asked for changed.

        Raises:
            ValueError: There is no such recipe; the message lists what there is.
        """
        recipes = RECIPES.get((self.dataset, self.model))
        if recipes is None:
            known = ", ".join(f"{model} on {dataset}" for dataset, model in RECIPES)
            raise ValueError(
                f"There is no recipe for {self.model} on {self.dataset}, only for {known}; "
                "add one to recipes.py."
            )
        name = next(iter(recipes)) if self.recipe is None else self.recipe
        if name not in recipes:
            raise ValueError(
                f"There is no recipe {name!r} for {self.model} on {self.dataset}; choose one "
                f"of {sorted(recipes)}."
            )
        config = recipes[name]
        if self.epochs is not None:
            config = dataclasses.replace(config, epochs=self.epochs)
        if self.dtype is not None:
            config = dataclasses.replace(config, dtype=self.dtype)
        return config

    @property
    def model_names(self) -> list[str]:
        """The names of the models: those of their files, or else their seeds."""
        return [path.stem for path in self.files] or [str(seed) for seed in self.seeds]

    @property
    def model_titles(self) -> list[str]:
        """The names of the models as a table shows them."""
        return [path.stem for path in self.files] or [f"seed {seed}" for seed in self.seeds]

    @property
    def title(self) -> str:
        """What the run is about, in words."""
        kind = "" if self.files else "seeds "
        names = ", ".join(self.model_names)
        return f"{self.model_config.label} on {self.dataset}, {kind}{names}"

    @property
    def study_label(self) -> str:
        """The name of the study in that of its folder."""
        return self.command

    @property
    def folder(self) -> Path:
        """The folder of the run; it need not exist yet."""
        label = "-".join(
            [self.study_label, self.dataset, self.model_config.label, *self.model_names]
        )
        return self.out or Path("runs", label)


class Run:
    """One run of a study: what its flags name, and what has been measured so far.

    Attributes:
        study: The flags.
        rows: The records: for each value its labels, such as the method, and what it measures.
        seconds: How long each part of the run took.
    """

    def __init__(self, study: Study):
        """Starts without any records.

        Args:
            study: The flags.
        """
        self.study = study
        self.rows: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data, or as much of it as was asked for."""
        with self.timed("reading data"):
            whole = load_dataset(self.study.dataset, self.study.data_dir)
        train_part = slice(self.study.train_images)  # of None, all
        test_part = slice(self.study.test_images)
        dataset = whole.part(train_part, test_part)
        self.study.check_data(dataset)
        return dataset

    @functools.cached_property
    def network(self) -> Network:
        """The architecture of the models."""
        return self.network_of(1)

    def network_of(self, factor: float) -> Network:
        """Builds the architecture at another width.

        Args:
            factor: A factor that multiplies the units of every hidden layer.
        """
        config = self.study.model_config
        config = dataclasses.replace(config, width=factor * config.width)
        # Models that come from files may have no recipe.
        trained_here = (self.study.dataset, self.study.model) in RECIPES
        augment = trained_here and self.study.train_config.augment
        return network(config, self.dataset, augment)

    def judge(self, architecture: Network | None = None) -> Judge:
        """Makes what measures networks on the test split.

        Args:
            architecture: The architecture of the networks; None for that of the flags.

        Returns:
            The judge.
        """
        images, labels = self._tests
        return Judge((architecture or self.network).apply, images, labels)

    @functools.cached_property
    def _tests(self) -> tuple[Array, Array]:
        """The test split on the device, once for all judges."""
        return jnp.asarray(self.dataset.test_images), jnp.asarray(self.dataset.test_labels)

    def models(self, dataset: Dataset | None = None) -> list[PyTree]:
        """Trains a model from each seed, or reads the models from their files.

        Args:
            dataset: The data to train on; None for all of it.

        Returns:
            The variables of each model.

        Raises:
            ValueError: A file can't be read or does not fit the model.
        """
        if self.study.files:
            return [self.read(path) for path in self.study.files]
        return [self.train(seed, dataset=dataset) for seed in self.study.seeds]

    def read(self, path: Path) -> PyTree:
        """Reads the variables of one model from a file of PyTorch's names and layouts."""
        return import_pytorch(self.network.symmetry, read_arrays(path))

    def train(
        self,
        seed: int,
        *,
        model: ModelConfig | None = None,
        config: TrainConfig | None = None,
        dataset: Dataset | None = None,
        start: PyTree | None = None,
        teacher: Teacher | None = None,
    ) -> PyTree:
        """Trains one model, or goes on from where an earlier run was killed; see `train`.

        Args:
            seed: The source of the initialisation and of the order of the examples.
            model: Which model to train; None for that of the flags.
            config: How to train it; None for the recipe.
            dataset: The data to train it on; None for all of it.
            start: Variables to go on from; None draws them by the seed.
            teacher: A model whose answers to learn; None for the labels alone.

        Returns:
            The variables of the model.
        """
        model = model or self.study.model_config
        trained = train(
            model,
            config or self.study.train_config,
            dataset or self.dataset,
            seed,
            self.study.folder / "models",
            start,
            teacher,
        )
        # Trainings that differ in more than this add up.
        label = f"training, {model.label}, seed {seed}"
        self.seconds[label] = self.seconds.get(label, 0.0) + trained.seconds
        return trained.params

    @contextlib.contextmanager
    def timed(self, label: str) -> Iterator[None]:
        """Notes how long a part of the run takes.

        Args:
            label: What the part does; the seconds of parts of one label are added up.
        """
        began = time.perf_counter()
        yield
        elapsed = time.perf_counter() - began
        self.seconds[label] = self.seconds.get(label, 0.0) + elapsed

    def add(self, values: Mapping[str, Any], **labels: Any) -> None:
        """Adds a row to the records for each of some values.

        Args:
            values: The values, numbers or scalar arrays, by what they measure.
            **labels: What the values are of, such as the method or the position on a path.
        """
        for metric, value in values.items():
            self.rows.append({**labels, "metric": metric, "value": rounded(value)})

    def records(self) -> pd.DataFrame:
        """Returns all that has been measured, a row for each value.

        Returns:
            A table with the columns `study`, `dataset`, `network` and `seeds`, those of the labels,
            and at the end `metric` and `value`.
        """
        records = pd.DataFrame(self.rows)
        last = records[["metric", "value"]]
        labels = records.drop(columns=["metric", "value"])
        # What is the same in all rows stands in front, so that files can be put together.
        labels.insert(0, "study", self.study.command)
        labels.insert(1, "dataset", self.study.dataset)
        labels.insert(2, "network", self.study.model_config.label)
        labels.insert(3, "seeds", " ".join(self.study.model_names))
        return pd.concat([labels, last], axis=1)


def rounded(value: Any) -> float:
    """Rounds to what float32 tells apart; a finer figure would only look different, not be.

    Args:
        value: A number, or an array of one.
    """
    return round(float(jax.device_get(value)), 4)
