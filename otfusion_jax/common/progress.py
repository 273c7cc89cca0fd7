"""Bars that show how far a long call is, for those who ask for one."""

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def with_bar(items: Iterable[Item], title: str, count: int | None = None) -> Iterable[Item]:
    """Shows a bar on the error stream while items are gone through.

    Args:
        items: The items.
        title: What stands in front of the bar.
        count: How many items there are; None if they say so themselves, or nobody knows.

    Returns:
        The same items.

    Raises:
        ImportError: If tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm; install it with: pip install tqdm, or leave it out"
        ) from None
    return tqdm(items, desc=title, total=count)
