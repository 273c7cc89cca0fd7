"""Where units lie in an array: at which positions of which axis.

An axis may be a product: when a convolution's output is flattened before a dense layer, the
kernel's axis of size H·W·C holds the C units at stride 1, repeated H·W times. It may be a sum: a
fused projection has queries, keys and values one after the other. A `StridedIndex` says where units
are along such an axis, a `UnitLocation` in which axis they are, and where the batch around them is.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class StridedIndex:
    """Where units lie along an axis.

    Unit `u` is at the positions `start + i·stride + ... + u·after + a`, with one `i < count` for
    each pair in `outer`, and `a < after`.

    Attributes:
        start: The position of the first unit.
        outer: The counts and strides of the factors outside the units, outermost first.
        after: The product of the factors inside the units.
    """

    start: int
    outer: tuple[tuple[int, int], ...]
    after: int

    @property
    def before(self) -> int:
        """The product of the factors outside the units."""
        return math.prod(count for count, _ in self.outer)

    def stop(self, size: int) -> int:
        """Returns the position behind the last of some units.

        Args:
            size: The number of units.
        """
        stop = self.start + size * self.after
        for count, stride in self.outer:
            stop += (count - 1) * stride
        return stop

    def positions(self, size: int) -> np.ndarray:
        """Returns the positions of some units.

        Args:
            size: The number of units.

        Returns:
            Positions on the axis, int `[before, size, after]`.
        """
        # Row-major: every combination of the factors outside, then the units, then what is inside.
        starts = np.array([self.start])
        for count, stride in self.outer:
            steps = stride * np.arange(count)
            starts = np.add.outer(starts, steps).reshape(-1)
        units = self.after * np.arange(size)
        inside = np.arange(self.after)
        return np.add.outer(starts, np.add.outer(units, inside))


@dataclasses.dataclass(frozen=True)
class UnitLocation:
    """Where units lie in an array.

    Attributes:
        axis: The axis of the array that the units lie along.
        length: The size of that axis.
        index: The positions of the units along that axis.
        batch: For each axis of the group's batch the axis of the array that it lies along, the size
            of that axis, and the positions along it.
    """

    axis: int
    length: int
    index: StridedIndex
    batch: tuple[tuple[int, int, StridedIndex], ...] = ()


class LocatedFactor(NamedTuple):
    """A factor of an axis: some units, and where they lie.

    Attributes:
        axis: The axis of the array.
        index: The positions of the units along the axis.
        size: The number of units.
    """

    axis: int
    index: StridedIndex
    size: int
