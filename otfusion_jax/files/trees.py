"""Nested dicts and lists of arrays, as in msgpack and Orbax: taken apart, and put together."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.files.checkpoint import CheckpointError, StoredArray


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of an array in a tree.

    Attributes:
        name: The keys on the way to it, joined by `/`.
        is_scalar: Whether it was a NumPy scalar, and no array.
    """

    name: str
    is_scalar: bool


def take_apart(tree: Any, what: str) -> tuple[Any, dict[str, StoredArray]]:
    """Takes the arrays out of a tree.

    Args:
        tree: Nested dicts with string keys and lists, of arrays and of anything else.
        what: What to call the tree in messages.

    Returns:
        The tree with a `Slot` in the place of each array, and the arrays by name, in order.

    Raises:
        CheckpointError: If two arrays have one name, or a key is no text.
    """
    arrays: dict[str, StoredArray] = {}

    def slots_of(node: Any, name: str) -> Any:
        if isinstance(node, dict):
            children = {}
            for key, child in node.items():
                if not isinstance(key, str):
                    raise CheckpointError(f"{name or what} has the key {key!r}, which is no text")
                children[key] = slots_of(child, _below(name, key))
            return children
        # msgpack has lists alone, and Orbax writes tuples as it writes lists.
        if isinstance(node, list | tuple):
            items = []
            for number, child in enumerate(node):
                items.append(slots_of(child, _below(name, str(number))))
            return items
        if isinstance(node, np.ndarray | np.generic | LazyArray):
            if name in arrays:
                raise CheckpointError(f"{what} has two arrays of the name {name!r}")
            arrays[name] = node if isinstance(node, LazyArray) else np.asarray(node)
            return Slot(name, isinstance(node, np.generic))
        # Counters of Python, texts and None stay where they are.
        return node

    try:
        return slots_of(tree, ""), arrays
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None


def put_together(slots: Any, arrays: Mapping[str, StoredArray]) -> Any:
    """Puts arrays into a tree.

    Args:
        slots: A tree with slots, as `take_apart` returns it.
        arrays: An array for each slot, by name.

    Returns:
        The tree of arrays.
    """
    if isinstance(slots, dict):
        children = {}
        for key, child in slots.items():
            children[key] = put_together(child, arrays)
        return children
    if isinstance(slots, list):
        return [put_together(child, arrays) for child in slots]
    if isinstance(slots, Slot):
        array = arrays[slots.name]
        return array[()] if slots.is_scalar else array
    return slots


def _below(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key
