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

from otfusion_jax.axes import Axis, Factor, Space, Sum, size_of
from otfusion_jax.layout import Place, Where
from otfusion_jax.walk import Meeting, Regrouping


class Occurrence(NamedTuple):
    """A factor in an axis, where it lies, and the factors that it is multiplied with there."""

    factor: Factor
    place: Place
    around: tuple[tuple[Factor, Place], ...]


def occurrences(
    axis: Axis,
    start: int = 0,
    outer: tuple[tuple[int, int], ...] = (),
    after: int = 1,
    around: tuple[tuple[Factor, Place], ...] = (),
) -> Iterator[Occurrence]:
    """Yields every factor of an expanded axis.

    Args:
        axis: the axis.
        start: position of its first element.
        outer: counts and strides of what it is repeated over.
        after: how far its elements are apart.
        around: the factors that all of it is multiplied with.
    """
    found: list[tuple[Factor, Place]] = []
    sums: list[tuple[Sum, tuple[tuple[int, int], ...], int]] = []
    for i, term in enumerate(axis):
        stride = after * size_of(axis[i + 1 :])
        if isinstance(term, Sum):
            sums.append((term, outer, stride))
        else:
            found.append((term, Place(start, outer, stride)))
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
) -> dict[int, tuple[int, Place]]:
    """Returns by which index of other atoms an occurrence is accompanied.

    Args:
        axes: expanded axes of a value.
        dim: the axis of the occurrence.
        occurrence: a factor of that axis.

    Returns:
        For each atom that occurs beside it exactly once, the axis and place of that.
    """
    found: dict[int, list[tuple[int, Place]]] = {}
    for factor, place in occurrence.around:
        if factor.atom is not None:
            found.setdefault(factor.atom, []).append((dim, place))
    own = set(found)
    for other, axis in enumerate(axes):
        if other != dim:
            for factor, place, _ in (o for o in occurrences(axis) if o.factor in axis):
                if factor.atom is not None and factor.atom not in own:
                    found.setdefault(factor.atom, []).append((other, place))
    own_atom = occurrence.factor.atom
    return {
        atom: places[0] for atom, places in found.items() if len(places) == 1 and atom != own_atom
    }


def _has_powers(axes: Sequence[Axis]) -> bool:
    """Whether an atom occurs more than once in the product of some expanded axes."""
    seen: set[int] = set()
    for axis in axes:
        mine: set[int] = set()
        for factor, _, around in occurrences(axis):
            if factor.atom is not None:
                mine.add(factor.atom)
                if any(other.atom == factor.atom for other, _ in around):
                    return True
        if mine & seen:
            return True
        seen |= mine
    return False


@dataclasses.dataclass(frozen=True)
class Nest:
    """Of each free atom: the atoms that can't be permuted, and the one that can, around it."""

    fixed: dict[int, tuple[int, ...]]
    outer: dict[int, int]

    def around(self, atom: int) -> tuple[int, ...]:
        """Returns the atoms that index the plans of an atom, outermost first."""
        movable = (self.outer[atom],) if atom in self.outer else ()
        return (*self.fixed[atom], *movable)


def find_nest(
    space: Space,
    atoms: Sequence[int],
    values: Iterable[tuple[Axis, ...]],
    meetings: Iterable[Meeting],
    regroupings: Iterable[Regrouping],
) -> Nest:
    """Finds what is nested in what.

    Of groups that can be permuted, one may be around another, not more: chains are cut short, which
    leaves less freedom and is as sound.

    Args:
        space: the atoms.
        atoms: those of the groups, in dataflow order.
        values: the axes of every value of the program, parameters included.
        meetings: all that the walk has noted.
        regroupings: likewise.

    Returns:
        The nest.
    """
    candidates: dict[int, dict[int, None]] = {}
    free = set(atoms)

    def restrict(atom: int, found: Iterable[int]) -> None:
        known = candidates.setdefault(atom, dict.fromkeys(found))
        for other in known.keys() - set(found):
            del known[other]

    for axes in dict.fromkeys(tuple(map(space.expand, axes)) for axes in values):
        for dim, axis in enumerate(axes):
            for occurrence in occurrences(axis):
                if occurrence.factor.atom in free:
                    restrict(occurrence.factor.atom, _partners(axes, dim, occurrence))
    for axes, over, together in meetings:
        axes = tuple(map(space.expand, axes))
        for dim in over:
            for occurrence in occurrences(axes[dim]):
                atom = occurrence.factor.atom
                if atom is not None and candidates.get(atom):
                    partners = _partners(axes, dim, occurrence)
                    restrict(atom, [o for o, (d, _) in partners.items() if d in together])

    for axes, over in regroupings:
        axes = tuple(map(space.expand, axes))
        if not _has_powers([axes[dim] for dim in over]):
            continue
        # An atom that is multiplied with itself has two companions of a kind: which belongs to
        # which can't be told from the axes that they come to lie in.
        for dim in over:
            for occurrence in occurrences(axes[dim]):
                atom = occurrence.factor.atom
                if atom is not None and candidates.get(atom):
                    partners = _partners(axes, dim, occurrence)
                    restrict(atom, [o for o, (d, _) in partners.items() if d not in over])

    outer: dict[int, int] = {}
    families: dict[int, list[int]] = {}
    for atom in atoms:
        beside = candidates.get(atom, ())
        movable = [other for other in beside if other in free and other not in outer]
        if movable and atom not in families:
            # The innermost: that which has the most around it.
            root = max(movable, key=lambda other: len(candidates.get(other, ())))
            outer[atom] = root
            families.setdefault(root, []).append(atom)
    fixed: dict[int, tuple[int, ...]] = {}
    for root in (atom for atom in atoms if atom not in outer):
        family = [root, *families.get(root, ())]
        shared = [
            other
            for other in candidates.get(root, ())
            if other not in free and all(other in candidates.get(a, ()) for a in family)
        ]
        fixed.update(dict.fromkeys(family, tuple(shared)))
    return Nest(fixed, outer)


def where(
    axes: Sequence[Axis], dim: int, occurrence: Occurrence, around: Sequence[int]
) -> Where | None:
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
    if any(atom not in partners for atom in around):
        return None
    lengths = tuple(map(size_of, axes))
    within = ((d, lengths[d], place) for d, place in (partners[atom] for atom in around))
    return Where(dim, lengths[dim], occurrence.place, tuple(within))
