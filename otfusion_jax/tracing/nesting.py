"""Which groups are nested in others: heads and their dimensions, layers and their hidden units.

An atom d is nested in an atom o if in every value where d occurs, o occurs too, and no operation
makes an element of d under one index of o meet one under another. Then d may be permuted in another
way for each index of o. Operations that pass an axis on keep its indices in place, elementwise ones
bring equal indices together. What remains to be checked are the meetings that the walk has noted:
contractions over d have to run along o index by index, and no operation that keeps d may take an
index of o to another.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from otfusion_jax.symmetry.partition import StridedIndex, UnitLocation
from otfusion_jax.tracing.axis import Axis, Factor, Sum, size_of
from otfusion_jax.tracing.context import Interaction, Regrouping
from otfusion_jax.tracing.unification import Unifier


class Occurrence(NamedTuple):
    """A factor in an axis, where it lies, and the factors that it is multiplied with there."""

    factor: Factor
    place: StridedIndex
    around: tuple[tuple[Factor, StridedIndex], ...]


def occurrences(
    axis: Axis,
    start: int = 0,
    outer: tuple[tuple[int, int], ...] = (),
    after: int = 1,
    around: tuple[tuple[Factor, StridedIndex], ...] = (),
) -> Iterator[Occurrence]:
    """Yields every factor of an expanded axis.

    Args:
        axis: the axis.
        start: position of its first element.
        outer: counts and strides of what it is repeated over.
        after: how far its elements are apart.
        around: the factors that all of it is multiplied with.
    """
    found: list[tuple[Factor, StridedIndex]] = []
    sums: list[tuple[Sum, tuple[tuple[int, int], ...], int]] = []
    for i, term in enumerate(axis):
        stride = after * size_of(axis[i + 1 :])
        if isinstance(term, Sum):
            sums.append((term, outer, stride))
        else:
            found.append((term, StridedIndex(start, outer, stride)))
        if outer and outer[-1][1] == term.size * stride:  # the two count as one
            outer = (*outer[:-1], (outer[-1][0] * term.size, stride))
        else:
            outer = (*outer, (term.size, stride))
    for i, (factor, place) in enumerate(found):
        yield Occurrence(factor, place, (*around, *found[:i], *found[i + 1 :]))
    for term, before, stride in sums:
        for segment in term.segments:
            yield from occurrences(segment, start, before, stride, (*around, *found))
            start += size_of(segment) * stride
        start -= term.size * stride


def _partners(
    axes: Sequence[Axis], dim: int, occurrence: Occurrence
) -> dict[int, tuple[int, StridedIndex]]:
    """Returns by which index of other atoms an occurrence is accompanied.

    Args:
        axes: expanded axes of a value.
        dim: the axis of the occurrence.
        occurrence: a factor of that axis.

    Returns:
        For each atom that occurs beside it exactly once, the axis and place of that.
    """
    found: dict[int, list[tuple[int, StridedIndex]]] = {}
    for factor, place in occurrence.around:
        if factor.variable is not None:
            found.setdefault(factor.variable, []).append((dim, place))
    own = set(found)
    for other, axis in enumerate(axes):
        if other != dim:
            for factor, place, _ in (o for o in occurrences(axis) if o.factor in axis):
                if factor.variable is not None and factor.variable not in own:
                    found.setdefault(factor.variable, []).append((other, place))
    own_atom = occurrence.factor.variable
    return {
        variable: places[0]
        for variable, places in found.items()
        if len(places) == 1 and variable != own_atom
    }


def _has_powers(axes: Sequence[Axis]) -> bool:
    """Whether an atom occurs more than once in the product of some expanded axes."""
    seen: set[int] = set()
    for axis in axes:
        mine: set[int] = set()
        for factor, _, around in occurrences(axis):
            if factor.variable is not None:
                mine.add(factor.variable)
                if any(other.variable == factor.variable for other, _ in around):
                    return True
        if mine & seen:
            return True
        seen |= mine
    return False


@dataclasses.dataclass(frozen=True)
class Nesting:
    """Of each free atom: the atoms that can't be permuted, and the one that can, around it."""

    fixed: dict[int, tuple[int, ...]]
    outer: dict[int, int]

    def around(self, variable: int) -> tuple[int, ...]:
        """Returns the atoms that index the plans of an atom, outermost first."""
        movable = (self.outer[variable],) if variable in self.outer else ()
        return (*self.fixed[variable], *movable)


def find_nesting(
    unifier: Unifier,
    variables: Sequence[int],
    values: Iterable[tuple[Axis, ...]],
    interactions: Iterable[Interaction],
    regroupings: Iterable[Regrouping],
) -> Nesting:
    """Finds what is nested in what.

    Of groups that can be permuted, one may be around another, not more: chains are cut short, which
    leaves less freedom and is as sound.

    Args:
        unifier: the axis variables.
        variables: those of the groups, in dataflow order.
        values: the axes of every value of the program, parameters included.
        interactions: all that the walk has noted.
        regroupings: likewise.

    Returns:
        The nest.
    """
    candidates: dict[int, dict[int, None]] = {}
    free = set(variables)

    def restrict(variable: int, found: Iterable[int]) -> None:
        known = candidates.setdefault(variable, dict.fromkeys(found))
        for other in known.keys() - set(found):
            del known[other]

    for axes in dict.fromkeys(tuple(map(unifier.expand, axes)) for axes in values):
        for dim, axis in enumerate(axes):
            for occurrence in occurrences(axis):
                if occurrence.factor.variable in free:
                    restrict(occurrence.factor.variable, _partners(axes, dim, occurrence))
    for axes, over, together in interactions:
        axes = tuple(map(unifier.expand, axes))
        for dim in over:
            for occurrence in occurrences(axes[dim]):
                variable = occurrence.factor.variable
                if variable is not None and candidates.get(variable):
                    partners = _partners(axes, dim, occurrence)
                    restrict(variable, [o for o, (d, _) in partners.items() if d in together])

    for axes, over in regroupings:
        axes = tuple(map(unifier.expand, axes))
        if not _has_powers([axes[dim] for dim in over]):
            continue
        # An atom that is multiplied with itself has two companions of a kind: which belongs to
        # which can't be told from the axes that they come to lie in.
        for dim in over:
            for occurrence in occurrences(axes[dim]):
                variable = occurrence.factor.variable
                if variable is not None and candidates.get(variable):
                    partners = _partners(axes, dim, occurrence)
                    restrict(variable, [o for o, (d, _) in partners.items() if d not in over])

    outer: dict[int, int] = {}
    group_trees: dict[int, list[int]] = {}
    for variable in variables:
        beside = candidates.get(variable, ())
        movable = [other for other in beside if other in free and other not in outer]
        if movable and variable not in group_trees:
            # The innermost: that which has the most around it.
            root = max(movable, key=lambda other: len(candidates.get(other, ())))
            outer[variable] = root
            group_trees.setdefault(root, []).append(variable)
    fixed: dict[int, tuple[int, ...]] = {}
    for root in (variable for variable in variables if variable not in outer):
        family = [root, *group_trees.get(root, ())]
        shared = [
            other
            for other in candidates.get(root, ())
            if other not in free and all(other in candidates.get(a, ()) for a in family)
        ]
        fixed.update(dict.fromkeys(family, tuple(shared)))
    return Nesting(fixed, outer)


def locate(
    axes: Sequence[Axis], dim: int, occurrence: Occurrence, around: Sequence[int]
) -> UnitLocation | None:
    """Describes where an occurrence lies in an array.

    Args:
        axes: expanded axes of the array.
        dim: the axis of the occurrence.
        occurrence: a factor of that axis.
        around: the atoms that index its plans.

    Returns:
        Its place and those of `around`; None if these do not accompany it.
    """
    partners = _partners(axes, dim, occurrence)
    if any(variable not in partners for variable in around):
        return None
    lengths = tuple(map(size_of, axes))
    batch = ((d, lengths[d], place) for d, place in (partners[variable] for variable in around))
    return UnitLocation(dim, lengths[dim], occurrence.place, tuple(batch))
