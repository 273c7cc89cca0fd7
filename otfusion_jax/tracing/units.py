"""Where the units of one group lie, for what is followed through a program."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from otfusion_jax.tracing.values import TracedValue, sizes_of


class Units(NamedTuple):
    """The units of a group, and where they lie.

    Attributes:
        size: The number of units.
        dims: From a value to the numbers of its axes that they lie along.
    """

    size: int
    dims: Callable[[TracedValue], Sequence[int]]

    def dim(self, value: TracedValue) -> int | None:
        """Returns the axis of a value that is the units and nothing else; None if there is none."""
        dims = self.dims(value)
        if len(dims) != 1 or sizes_of(value)[dims[0]] != self.size:
            return None
        return dims[0]
