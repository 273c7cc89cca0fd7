"""Types for annotations, as static type checkers want them.

To these, jaxtyping's `PyTree` is of unknown type: it may be subscripted, which `Any` may not. A
package whose public functions take one is not completely typed, and whoever checks their own code
strictly is told so wherever they call it. We never subscript it, so that it may be `Any` to them.
What checks annotations at run time meets jaxtyping's own.
"""

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    PyTree: TypeAlias = Any
else:
    from jaxtyping import PyTree as PyTree


@runtime_checkable
class HasDtype(Protocol):
    """An array, or the form of one: `jax.ShapeDtypeStruct` has parameters without types."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its values."""
        ...
