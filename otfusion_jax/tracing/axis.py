"""Axes as expressions: which units lie along an axis, and in which order.

The trace describes every axis of every value in a program by an expression. It is built of these:

- An **axis variable** is a number that stands for an index set: 64 hidden units, or 8 heads. It is
  an unknown of the analysis: by which permutation are these units reordered? All that carries one
  variable is permuted alike.
- A **factor** is one occurrence of an axis variable along an axis. Where a value is constant along
  a factor, as zeros broadcast over the units are, the factor has no variable: any permutation
  leaves it as it is, so it agrees with whatever it meets and ties nothing.
- A **sum** is a sequence of **segments**, one after the other. Each segment is again an axis.
- An **axis** is a row-major product of **terms**: factors and sums. The empty product is an axis of
  size 1.
- A **single position** is a factor of size 1. Nothing can be permuted along it, but it matters
  whether it is read: what a program reads in part stays. So it is kept where it is a segment of a
  sum, or a factor of a longer product. An axis of size 1 is the empty product nevertheless.

Two operations of the array make the two constructors of an expression. Merging axes makes a
product:

>>> heads, units = Factor(2, variable=0), Factor(3, variable=1)
>>> merged: Axis = (heads, units)  # of x.reshape(batch, heads * units): element 3 * head + unit
>>> size_of(merged)
6

Concatenating arrays makes a sum:

>>> queries, keys = (Factor(4, variable=2),), (Factor(8, variable=3),)
>>> [term.size for term in concatenated([queries, keys])]
[12]

They nest. A kernel whose last axis holds queries, keys and values of every head, the heads
outermost, has the axis `(heads, Sum(queries, keys, values))`.

Expressions are immutable. What becomes known of the variables while the program is interpreted,
such as that two of them are the same, is kept elsewhere (see `axis_variables`), and an expression
that was written down before is brought up to date when it is used.
"""

import enum
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Kind(enum.IntEnum):
    """What a value depends on: on nothing, on parameters alone, or on inputs as well."""

    CONSTANT = 0
    PARAMETER = 1
    FEATURE = 2


class Factor(NamedTuple):
    """One occurrence of an axis variable in an axis.

    Attributes:
        size: The number of elements of the variable's index set.
        variable: The axis variable. None where the value is constant along the factor.
        role: A signed role, which tells what is pushed forward along a transport plan from what is
            pulled back (see `parity` and `roles`). 0 where there is none, as along inputs.
        filled: Whether the factor is padding: a constant that was concatenated with values that
            depend on inputs. On other inputs there may be units in its place, as there are when a
            recurrent network starts from a state other than zeros.
    """

    size: int
    variable: int | None
    role: int = 0
    filled: bool = False


class Sum(NamedTuple):
    """Segments of an axis, one after the other.

    Attributes:
        size: The number of elements of all segments together.
        segments: The axis of each segment, two or more of them. None is a sum itself, because a sum
            of sums is written as one.
    """

    size: int
    segments: tuple["Axis", ...]


Term = Factor | Sum
Axis = tuple[Term, ...]


class Disagreement(Exception):
    """Two readings of one axis have no common refinement.

    A product `2 * 3` and a product `3 * 2` of the same six elements are an example: no units can be
    named of which both are made.

    Attributes:
        rest: The terms, of either reading, that do not agree. What stands before them does agree.
    """

    def __init__(self, what: str, rest: Axis) -> None:
        super().__init__(what)
        self.rest = rest


def size_of(axis: Axis) -> int:
    """Returns the number of elements of an axis."""
    size = 1
    for term in axis:
        size *= term.size
    return size


def constant(size: int, filled: bool = False) -> Axis:
    """Returns an axis along which a value does not vary.

    Args:
        size: The number of elements.
        filled: Whether it is padding; see `Factor`.

    Returns:
        An axis of a factor without a variable, or the empty product if the size is 1.
    """
    if size == 1:
        return ()  # the empty product
    return (Factor(size, None, filled=filled),)


def is_constant(axis: Axis) -> bool:
    """Says whether nothing is known to vary along an axis."""
    for term in axis:
        if isinstance(term, Sum):
            return False
        # A single position has a variable, and nothing that could vary.
        if term.size > 1 and term.variable is not None:
            return False
    return True


def concatenated(segments: Iterable[Axis]) -> Axis:
    """Returns the axis of segments one after the other.

    Args:
        segments: The axes. Those of size 0 are left out, and a segment that is a sum itself is
            replaced by its own segments.

    Returns:
        An axis of one sum; the segment itself where there is only one.
    """
    flat: list[Axis] = []
    size = 0
    for segment in segments:
        segment_size = size_of(segment)
        if segment_size == 0:
            continue
        size += segment_size
        # A sum of sums is one sum, or else equal orders of units would be different expressions.
        if len(segment) == 1 and isinstance(segment[0], Sum):
            flat += segment[0].segments
        else:
            flat.append(segment)
    if not flat:
        return constant(0)
    if len(flat) == 1:
        return flat[0]
    return (Sum(size, tuple(flat)),)


def factors_of(axis: Axis) -> Iterator[Factor]:
    """Yields all factors of an axis in order, those within segments included."""
    for term in axis:
        if isinstance(term, Sum):
            for segment in term.segments:
                yield from factors_of(segment)
        else:
            yield term
