"""The batches that an alignment is learned from: stacked in arrays, or coming one by one."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from otfusion_jax.alignment.loss_descent import (
    LearningState,
    LossDescent,
    after_batch,
    after_stack,
)
from otfusion_jax.common.progress import shown_bar
from otfusion_jax.common.typing import PyTree

_NONE = "there are no batches; learning takes at least one"


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of one call.

    Attributes:
        given: What was given, a pytree of stacked arrays or an iterable of batches.
        count: How many batches there are; None if that can't be told.
        is_stacked: Whether they are stacked.
    """

    given: Any
    count: int | None
    is_stacked: bool

    def learn(
        self, descent: LossDescent, state: LearningState, most: int | None, progress: bool
    ) -> tuple[LearningState, Array]:
        """Makes one step for each batch.

        Args:
            descent: What is descended.
            state: Where learning stands.
            most: How many steps to make at most; None for as many as there are batches.
            progress: Whether to show a bar, and make steps one by one.

        Returns:
            Where learning stands after the steps, and the loss before each of them, `[steps]`.

        Raises:
            ValueError: If no batch comes.
        """
        if self.is_stacked and not progress:
            return after_stack(descent, state, jax.tree.map(lambda x: x[:most], self.given))
        batches = self._stack_by_steps() if self.is_stacked else self.given
        # Not one more is taken: a caller may go on with the rest.
        batches = itertools.islice(batches, most)
        if progress:
            batches = shown_bar()(batches, "learning", self.count if most is None else most)
        losses = []
        for batch in batches:
            state, loss = after_batch(descent, state, batch)
            losses.append(loss)
        if not losses:
            raise ValueError(_NONE)
        return state, jnp.stack(losses)

    def _stack_by_steps(self) -> Iterator[PyTree]:
        """Yields what is stacked, step by step."""
        leaves, structure = jax.tree.flatten(self.given)
        for values in zip(*leaves, strict=True):
            yield structure.unflatten(values)


def batches_given(batches: Any) -> Batches:
    """Tells stacked batches from those that come one by one.

    Args:
        batches: Arrays or a pytree of them, each `[steps, ...]`; or a list or another iterable.

    Returns:
        The batches.

    Raises:
        ValueError: If stacked arrays have no leading axis of one size, of at least 1, or if a list
            is empty.
    """
    # A tuple or a dict holds what a batch consists of. A list has always been a list of batches.
    is_tree = isinstance(batches, Mapping | tuple | str | jax.Array | np.ndarray)
    if not is_tree and isinstance(batches, Iterable):
        count = len(batches) if isinstance(batches, Sized) else None
        if count == 0:
            raise ValueError(_NONE)
        return Batches(batches, count, is_stacked=False)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            "batches must be a list or a generator of batches, or a pytree of arrays with one "
            "leading axis, of a size of at least 1, that counts the steps; found the sizes "
            f"{sorted(sizes)}"
        )
    return Batches(batches, sizes.pop()[0], is_stacked=True)
