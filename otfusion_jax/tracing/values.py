"""What is known of one value of a traced program: its axes, and what it depends on."""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, SupportsIndex

from otfusion_jax.tracing.axis import Axis, Kind

Axes = tuple[Axis, ...]
"""The axes of a value, in the order of the array's."""

Shape = tuple[int, ...]
"""The sizes of an array's axes."""


class Positions(NamedTuple):
    """What it means that numbers are positions; see `positions`.

    Attributes:
        axis: The axis that they are positions along.
        reason: Why it is to be pinned if more is done with them than can be followed.
    """

    axis: Axis
    reason: str


class TracedValue(NamedTuple):
    """What is known of one value of a traced program. Rules take these and return these.

    A rule never takes an axis apart itself. It hands axes on, or to the methods of its
    `RuleContext`. The one thing that it may do with them is to multiply them: `outer + inner` is
    the axis that a row-major reshape makes of two neighbours.

    Attributes:
        axes: One `Axis` per array axis, each of the size that the array has there. An axis of size
            1 is the empty tuple.
        kind: A `Kind`, which says what the value depends on: on no argument of the traced function
            (`Kind.CONSTANT`), on parameters alone (`Kind.PARAMETER`), or on inputs
            (`Kind.FEATURE`). The kinds are ordered, and a result has the highest kind of all
            operands that it depends on: `max(x.kind, y.kind)`.
        number: The number that the pass gives to the value. Rules leave it out.
        positions: Of integers that are positions along an axis of units, which axis that is; None
            of all others. A rule that does not come with the library is never given any: the axis
            is pinned before.
    """

    axes: Axes
    kind: Kind
    number: int | None = None
    positions: Positions | None = None

    def with_axis(self, dim: int, axis: Axis) -> "TracedValue":
        """Returns this value with another axis in place of one of its own.

        `cumsum` uses it: the result has the operand's axes but for the one that is summed along.

        Args:
            dim: The number of the axis to replace, not negative.
            axis: The new axis.

        Returns:
            A value of the same kind; this one is left as it is.
        """
        axes = list(self.axes)
        axes[dim] = axis
        return self._replace(axes=tuple(axes))

    def without(self, dims: Collection[SupportsIndex]) -> "TracedValue":
        """Returns this value without some of its axes.

        `reduce_sum` and `squeeze` use it. It says that the result does not depend on the order
        along the axes that are dropped. Where it does (as for `argmax`), pin them first.

        Args:
            dims: The numbers of the axes to drop, not negative.

        Returns:
            A value of the same kind; this one is left as it is.
        """
        # `in` compares by value: under `vmap` JAX gives numbers of axes as NumPy's integers.
        kept = [axis for dim, axis in enumerate(self.axes) if dim not in dims]
        return self._replace(axes=tuple(kept))


Values = list[TracedValue]
"""The operands of an equation, or its results, in the equation's order."""


def highest_kind(values: Sequence[TracedValue]) -> Kind:
    """Returns the kind of a result that depends on all of some values."""
    return max((value.kind for value in values), default=Kind.CONSTANT)


def shape_of(var: Any) -> Shape:
    """Returns the shape of a variable or a literal of a jaxpr, in Python's own integers."""
    return tuple(map(int, var.aval.shape))  # `split` leaves NumPy's integers in shapes


def sizes_of(value: TracedValue) -> Shape:
    """Returns the sizes of the axes of a value."""
    return tuple(math.prod(term.size for term in axis) for axis in value.axes)
