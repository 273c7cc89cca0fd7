"""Arrays that are not there until they are asked for: in a file, or what comes of such by a step.

A model that is larger than the memory is a pytree of these. What goes over a model leaf by leaf has
one of them in memory at a time, and reads it anew when it comes by again.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is read, or computed, whenever it is looked at, and not kept.

    Where the library takes a model, these may be among the leaves outside of `jax.jit`, as
    `np.asarray` takes them. `transport` and `average` return such of such.

    Attributes:
        shape: The shape of the array.
        dtype: Its dtype.
        read: What returns the array, of this shape and dtype. It is called once for each look.
        checked: Whether it is made of arrays that were found finite, so that it need not be
            computed to be checked itself.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Any]
    checked: bool = False

    def __repr__(self) -> str:
        """One line: what it is made of may be a whole model."""
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.read())
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that the elements take in memory."""
        return self.size * self.dtype.itemsize


def any_lazy(arrays: Iterable[Any]) -> bool:
    """Says whether some of several arrays are lazy.

    Args:
        arrays: Arrays of any kind.
    """
    return any(isinstance(array, LazyArray) for array in arrays)
