"""Two models that see different data: who sees which examples, and whence they start."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int32, PyTree

from experiments.data import Dataset, stratified_split
from experiments.runs import Study
from experiments.train import initial

# Every so many examples make a tenth.
_TENTH = 10


def divide(
    labels: Int32[np.ndarray, " n"], split: str, label: int
) -> tuple[Int32[np.ndarray, " a"], Int32[np.ndarray, " b"]]:
    """Shares examples between A and B, with no randomness.

    Args:
        labels: The class of each example.
        split: `"label"`, `"parity"` or `"size"`; see the flag.
        label: The label that A has all of, if the split is by label.

    Returns:
        The indices of A's and those of B's examples, both ascending.

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
        of_label = everything[labels == label]
        # Without any examples of the label, A would have a tenth of the rest all the same.
        a = np.union1d(tenth, of_label).astype(np.int32) if len(of_label) else of_label
    b = np.setdiff1d(everything, a).astype(np.int32)
    if len(a) == 0 or len(b) == 0:
        raise ValueError(f"The split by {split} leaves one of the models without examples.")
    return a, b


@dataclasses.dataclass(frozen=True)
class DividedStudy(Study):
    """A study of two models that are trained on different data."""

    seeds: tuple[int, int] = (0, 1)
    """Seeds of the models."""
    split: Literal["label", "parity", "size"] = "label"
    """How the data is divided: A has all of one label and a tenth of the rest, B the other nine
    tenths; A has the even labels; A has a tenth of the data."""
    label: int = 4
    """Label that only A sees."""
    same_start: bool = True
    """Start both from the first seed's parameters, as in the paper."""
    images: int = 1000
    """Images of both, without labels, for methods that use data."""

    def check_data(self, dataset: Dataset) -> None:
        """Refuses a text, whose windows are of no class."""
        if dataset.train_labels.ndim > 1:
            raise ValueError(f"{dataset.name} is a text; images alone are divided by their labels.")

    def divided(self, labels: Int32[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """Shares examples between A and B as the flags say.

        Args:
            labels: The class of each example.

        Returns:
            The indices of A's and those of B's examples.
        """
        return divide(labels, self.split, self.label)

    def start(self, dataset: Dataset) -> PyTree | None:
        """Returns what both are trained from; None where each has a start of its own.

        Args:
            dataset: The data of both.
        """
        if not self.same_start:
            return None
        return initial(self.model_config, dataset, self.seeds[0])

    @property
    def title(self) -> str:
        """What the run is about, in words."""
        return f"{super().title}, split by {self.split}"

    @property
    def study_label(self) -> str:
        """The name of the study in that of its folder."""
        return f"{self.command}-{self.split}"
