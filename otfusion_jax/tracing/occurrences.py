"""Where the factors of an axis lie in an array, and which others they are found with.

An expression says what an axis is made of. To move units one has to know at which positions they
are, and to move them within each head by a plan of its own, where the heads are. Both are read off
here.
"""

from collections.abc import Sequence
from typing import NamedTuple

from otfusion_jax.symmetry.location import StridedIndex, UnitLocation
from otfusion_jax.tracing.axis import Axis, Factor, Sum, size_of

Repeats = tuple[tuple[int, int], ...]
"""Counts and strides of what an element is repeated over, outermost first; see `StridedIndex`."""


class IndexedFactor(NamedTuple):
    """A factor of an axis, and the positions of its units along the axis."""

    factor: Factor
    index: StridedIndex


class CompanionLocation(NamedTuple):
    """Where a variable lies that accompanies another one.

    Attributes:
        dim: The number of the axis that it lies along.
        index: The positions of its units along that axis.
    """

    dim: int
    index: StridedIndex


class Occurrence(NamedTuple):
    """A factor in an axis, and the factors that it is multiplied with there.

    Attributes:
        factor: The factor.
        index: The positions of its units along the axis.
        companions: The other factors of the product that it is in, and of the products around the
            sums that it is in: each element of the axis that has an index of this factor has one of
            each of these, too.
    """

    factor: Factor
    index: StridedIndex
    companions: tuple[IndexedFactor, ...]


def occurrences(axis: Axis) -> list[Occurrence]:
    """Returns every factor of an expanded axis, those within segments included."""
    found: list[Occurrence] = []
    _append_occurrences(found, axis, start=0, repeats=(), stride=1, companions=())
    return found


def _append_occurrences(
    found: list[Occurrence],
    axis: Axis,
    start: int,
    repeats: Repeats,
    stride: int,
    companions: tuple[IndexedFactor, ...],
) -> None:
    """Appends the factors of an axis that is a segment of another.

    Args:
        found: What the occurrences are appended to.
        axis: The expanded axis.
        start: The position of its first element.
        repeats: What the whole of it is repeated over.
        stride: How far its elements are apart.
        companions: The factors that all of it is multiplied with.
    """
    factors: list[IndexedFactor] = []
    sums: list[tuple[Sum, Repeats, int]] = []
    for number, term in enumerate(axis):
        # Row-major: one step along a term passes over all that is inside of it.
        term_stride = stride * size_of(axis[number + 1 :])
        if isinstance(term, Sum):
            sums.append((term, repeats, term_stride))
        else:
            index = StridedIndex(start, repeats, term_stride)
            factors.append(IndexedFactor(term, index))
        repeats = _repeated(repeats, term.size, term_stride)

    for number, (factor, index) in enumerate(factors):
        others = (*factors[:number], *factors[number + 1 :])
        found.append(Occurrence(factor, index, (*companions, *others)))
    for term, outer_repeats, term_stride in sums:
        segment_start = start
        for segment in term.segments:
            around = (*companions, *factors)
            _append_occurrences(found, segment, segment_start, outer_repeats, term_stride, around)
            segment_start += size_of(segment) * term_stride


def _repeated(repeats: Repeats, count: int, stride: int) -> Repeats:
    """Adds a repetition inside of others."""
    if repeats:
        outer_count, outer_stride = repeats[-1]
        # A factor right inside of another counts on where that one takes a step: 2 blocks of 3 are
        # 6.
        if outer_stride == count * stride:
            return (*repeats[:-1], (outer_count * count, stride))
    return (*repeats, (count, stride))


def companion_locations(
    axes: Sequence[Axis], dim: int, occurrence: Occurrence
) -> dict[int, CompanionLocation]:
    """Finds by which index of other variables an occurrence is accompanied.

    An element of an array has one index along each axis. So its index of a hidden unit comes
    together with those of all factors of the other axes, and with those of the companions in its
    own axis.

    Args:
        axes: The expanded axes of a value.
        dim: The number of the axis that the occurrence is in.
        occurrence: A factor of that axis.

    Returns:
        For each other variable that accompanies it exactly once, where that variable lies. Where
        there are two of a variable, neither is *the* index of it.
    """
    locations: dict[int, list[CompanionLocation]] = {}
    for factor, index in occurrence.companions:
        if factor.variable is not None:
            location = CompanionLocation(dim, index)
            locations.setdefault(factor.variable, []).append(location)
    # What is a companion in the same axis is one whatever the other axes hold.
    in_same_axis = set(locations)
    for other_dim, axis in enumerate(axes):
        if other_dim == dim:
            continue
        for factor, index, _ in occurrences(axis):
            if factor.variable is None or factor.variable in in_same_axis:
                continue
            # Only what is outside of all sums: a segment is not there at every index of the axis.
            if factor in axis:
                location = CompanionLocation(other_dim, index)
                locations.setdefault(factor.variable, []).append(location)
    unique = {}
    for variable, found in locations.items():
        if len(found) == 1 and variable != occurrence.factor.variable:
            unique[variable] = found[0]
    return unique


def locate(
    axes: Sequence[Axis], dim: int, occurrence: Occurrence, batch_variables: Sequence[int]
) -> UnitLocation | None:
    """Describes where the units of an occurrence lie in an array.

    Args:
        axes: The expanded axes of the array.
        dim: The number of the axis that the occurrence is in.
        occurrence: A factor of that axis.
        batch_variables: The variables that index the plans of its variable, in their order.

    Returns:
        The location of the units and of what indexes their plans. None if that does not accompany
        them, as in a sum of features over all heads.
    """
    locations = companion_locations(axes, dim, occurrence)
    batch = []
    for variable in batch_variables:
        if variable not in locations:
            return None
        batch_dim, index = locations[variable]
        batch_length = size_of(axes[batch_dim])
        batch.append((batch_dim, batch_length, index))
    length = size_of(axes[dim])
    return UnitLocation(dim, length, occurrence.index, tuple(batch))
