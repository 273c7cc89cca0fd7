"""Axes as expressions over atoms, and the union-find that ties them: what moves together.

An *atom* is an index set that no primitive seen so far has taken apart. Every axis of every value
is a row-major product of terms; an axis of size 1 is the empty product. A term is a factor, which
is an occurrence of an atom, or a sum of segments one after the other, each of them an axis again.
Three relations grow while a jaxpr is walked, and never shrink:

- **same atom**: two factors have to be permuted alike (`unify`);
- **parts**: an atom is itself a product, because a reshape or a grouped convolution looked inside
  it, or a sum, because a slice or a concatenation did;
- **pinned**: an atom may not be permuted at all, with the first reason that was given.

A factor along which the value is constant has no atom at all. It is unchanged by any permutation,
so it agrees with whatever it meets and ties nothing: zeros broadcast into two layers do not
couple them.
"""

import enum
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

MOST_SEGMENTS = 256
"""An axis that falls into more segments is pinned."""
MOST_CUTS = 32
"""So is what is cut out of a segment cut out of another, and so on: shifting units by one, and
adding them to themselves, would cut them for ever."""


class Kind(enum.IntEnum):
    """What a value depends on: nothing, parameters alone, or inputs as well."""

    CONSTANT = 0
    PARAMETER = 1
    FEATURE = 2


class Factor(NamedTuple):
    """One occurrence of an atom in an axis.

    `role` is a signed variable of the roles' union-find, 0 where there is none. Along what is
    `filled`, constants lie beside what depends on inputs.
    """

    size: int
    variable: int | None
    role: int = 0
    filled: bool = False


class Sum(NamedTuple):
    """Segments of an axis, one after the other."""

    size: int
    segments: tuple["Axis", ...]


Term = Factor | Sum
Axis = tuple[Term, ...]


class RoleConstraint(NamedTuple):
    """A parameter's factor met a feature's: with `sign` +1 it produces it, with -1 consumes it."""

    parameter: Factor
    feature: Factor
    sign: int


class Disagreement(Exception):
    """Two readings of one axis have no common refinement.

    Attributes:
        rest: what does not agree.
    """

    def __init__(self, what: str, rest: "Axis") -> None:
        super().__init__(what)
        self.rest = rest


def size_of(axis: Axis) -> int:
    """Returns the number of elements of an axis."""
    return math.prod(term.size for term in axis)


def constant(size: int, filled: bool = False) -> Axis:
    """Returns an axis along which a value does not vary; see `Factor` for `filled`."""
    return (Factor(size, None, filled=filled),) if size != 1 else ()


def is_constant(axis: Axis) -> bool:
    """Whether nothing is known to vary along an axis."""
    return all(isinstance(term, Factor) and term.variable is None for term in axis)


def concatenated(segments: Iterable[Axis]) -> Axis:
    """Returns the axis of segments one after the other."""
    flat: list[Axis] = []
    for segment in segments:
        match segment:
            case (Sum(_, inner),):
                flat += inner
            case _ if size_of(segment):
                flat.append(segment)
    if len(flat) <= 1:
        return flat[0] if flat else constant(0)
    return (Sum(sum(map(size_of, flat)), tuple(flat)),)


def factors_of(axis: Axis) -> Iterator[Factor]:
    """Yields all factors of an axis, those in segments included."""
    for term in axis:
        if isinstance(term, Sum):
            for segment in term.segments:
                yield from factors_of(segment)
        else:
            yield term
