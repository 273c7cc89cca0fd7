"""Bars that show how far a long call is, for those who ask for one."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from otfusion_jax.common.packages import require_package

Item = TypeVar("Item")


class Bar(Protocol):
    """What goes through items, and may show how many are done."""

    def __call__(
        self, items: Iterable[Item], title: str, count: int | None = None
    ) -> Iterable[Item]:
        """Goes through items.

        Args:
            items: The items.
            title: What stands in front of the bar.
            count: How many items there are; None if they say so themselves, or nobody knows.

        Returns:
            The same items.
        """
        ...


def shown_bar() -> Bar:
    """Returns what shows a bar on the error stream.

    Raises:
        ImportError: If tqdm is not installed.
    """
    tqdm = require_package("tqdm", "tqdm", "plot", "progress=True").tqdm

    def bar(items: Iterable[Item], title: str, count: int | None = None) -> Iterable[Item]:
        return tqdm(items, desc=title, total=count)

    return bar


def silent_bar(items: Iterable[Item], title: str, count: int | None = None) -> Iterable[Item]:
    """Goes through items, and shows nothing."""
    del title, count
    return items
