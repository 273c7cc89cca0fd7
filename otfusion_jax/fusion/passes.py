"""Batches of inputs that are gone through several times."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from otfusion_jax.tracing.activations import batches_of, refuse_inputs_of_one_batch


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """Batches that can be gone through again.

    Attributes:
        given: The batches, or a function that returns them anew.
        is_single: Whether they are one batch that was given by itself.
    """

    given: Iterable[Any] | Callable[[], Iterable[Any]]
    is_single: bool = False

    def batches(self) -> Iterable[tuple[Any, ...]]:
        """Yields every batch as a tuple of inputs, from the first on."""
        return batches_of(self.given() if callable(self.given) else self.given)


def passes_of(batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> Passes:
    """Makes what can be gone through several times of batches in any form.

    Args:
        batches: A list, or anything else that can be gone through again; a function that returns an
            iterator; or an iterator, as a generator is, whose batches are copied to the host.

    Returns:
        The passes.

    Raises:
        TypeError: If the batches are a single array, a dict, or a tuple of arrays, which may be one
            batch of several inputs.
    """
    if isinstance(batches, Iterator):
        return Passes([jax.device_get(batch) for batch in batches])
    if not callable(batches):
        refuse_inputs_of_one_batch(batches)
    return Passes(batches)
