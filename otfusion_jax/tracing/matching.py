"""Two axes of one size matched term by term, and tied.

Axes that meet in an operation are read side by side, from the outermost term inwards, in the finest
form known. Where the next two terms are factors of one size, they face each other, and the caller
says what follows from that. Where they are not, one of the two is split:

- `6` faces `2 * 3` (the bias of a dense layer is added to its output, which was reshaped to 2 heads
  of 3): the variable of size 6 is split into a product, and its parts face 2 and 3.
- `Sum(2, 6)` faces `Sum(5, 3)` (two concatenations of 8 units are added): both are split at the
  boundaries of either, and segments of 2, 3 and 3 face each other.
- `2 * 3` faces `3 * 2`: neither size divides the other. No permutation of units keeps both, and
  both are pinned.

The result is the coarsest common refinement: nothing is split that need not be.
"""

from collections.abc import Callable, Sequence

from otfusion_jax.tracing.axis import (
    Axis,
    Disagreement,
    Factor,
    Sum,
    Term,
    concatenated,
    factors_of,
    size_of,
)
from otfusion_jax.tracing.axis_variables import AxisVariables
from otfusion_jax.tracing.segments import segment_boundaries, split_segments

MAX_SEGMENTS = 256
"""An axis that falls into more segments than this is pinned."""

Meet = Callable[[Factor, Factor], Factor]
"""What to do with two factors that face each other. Returns the one that stands for both."""


class TermReader:
    """Reads an axis term by term, from the outermost inwards.

    Each term is expanded only when its turn comes: what has been matched a moment ago may have
    split or united a variable that stands here again.

    Attributes:
        singles: The single positions that were passed over. They are no terms that could face
            others, but whatever is made of the axis has them, too, as it matters later on whether
            they were read.
    """

    def __init__(self, variables: AxisVariables, axis: Axis) -> None:
        self.singles: list[Factor] = []
        self._variables = variables
        self._stack: list[Term] = list(reversed(axis))

    def read(self) -> Term | None:
        """Returns the next term in its finest form, None at the end."""
        while self._stack:
            term = self._stack.pop()
            outermost, *inner = self._variables.expand((term,), keep_single=True)
            self.put_back(tuple(inner))
            if isinstance(outermost, Sum) or outermost.size != 1:
                return outermost
            self.singles.append(outermost)
        return None

    def put_back(self, terms: Axis) -> None:
        """Makes terms the next ones to be read."""
        self._stack.extend(reversed(terms))

    def unread(self) -> Axis:
        """Returns the terms that have not been read, in no particular order."""
        return tuple(self._stack)


def match(variables: AxisVariables, a: Axis, b: Axis, meet: Meet) -> Axis:
    """Goes through two axes of equal size side by side, and splits them as far as needed.

    Args:
        variables: The axis variables.
        a: One axis.
        b: The other axis.
        meet: What to do with factors that face each other.

    Returns:
        The axis of what `meet` returned.

    Raises:
        Disagreement: If there is no common refinement.
    """
    matched: list[Term] = []
    left = TermReader(variables, a)
    right = TermReader(variables, b)
    while True:
        x = left.read()
        y = right.read()
        if x is None or y is None:
            # The two are of equal size, so that they end together.
            assert x is None
            assert y is None
            singles = _distinct([*left.singles, *right.singles])
            return (*singles, *matched)
        if isinstance(x, Sum) or isinstance(y, Sum):
            matched += _match_segments(variables, x, left, y, right, meet)
        elif x.size == y.size:
            matched.append(meet(x, y))
        elif x.size % y.size == 0:
            # The outer part of `x` faces `y` next, and its inner part whatever comes after `y`.
            left.put_back(variables.split_factor(x, y.size))
            right.put_back((y,))
        elif y.size % x.size == 0:
            right.put_back(variables.split_factor(y, x.size))
            left.put_back((x,))
        else:
            rest = (x, *left.unread(), y, *right.unread())
            raise Disagreement(f"{x.size} against {y.size}", rest)


def _distinct(singles: Sequence[Factor]) -> Axis:
    """Returns single positions without their roles, as nothing moves there, each of them once."""
    without_roles = []
    for factor in singles:
        without_role = Factor(1, factor.variable)
        without_roles.append(without_role)
    found = dict.fromkeys(without_roles)
    return tuple(found)


def _match_segments(
    variables: AxisVariables, x: Term, left: TermReader, y: Term, right: TermReader, meet: Meet
) -> Axis:
    """Matches two terms, one or both of them sums, and as much more as their sizes require."""
    a, b = _read_equal(x, left, y, right)
    segments = []
    try:
        for facing_a, facing_b in _facing_segments(variables, a, b):
            segments.append(match(variables, facing_a, facing_b, meet))
    except Disagreement as inner:
        # Inner terms are repeated over all segments: what one segment contradicts, holds for none.
        rest = (*a, *b, *left.unread(), *right.unread())
        raise Disagreement(str(inner), rest) from None
    return concatenated(segments)


def _read_equal(x: Term, left: TermReader, y: Term, right: TermReader) -> tuple[Axis, Axis]:
    """Reads on after two terms until what has been read of the two axes is of equal size."""
    a, b = [x], [y]
    size_a, size_b = x.size, y.size
    while size_a != size_b:
        if size_a < size_b:
            term = left.read()
            assert term is not None
            a.append(term)
            size_a *= term.size
        else:
            term = right.read()
            assert term is not None
            b.append(term)
            size_b *= term.size
    return tuple(a), tuple(b)


def _facing_segments(variables: AxisVariables, a: Axis, b: Axis) -> list[tuple[Axis, Axis]]:
    """Splits two axes of equal size at the boundaries of the segments of either."""
    of_either = {*segment_boundaries(a), *segment_boundaries(b)}
    boundaries = sorted(of_either)
    if len(boundaries) >= MAX_SEGMENTS:
        raise Disagreement(f"more than {MAX_SEGMENTS} segments", (*a, *b))
    segments_a = split_segments(variables, a, boundaries)
    segments_b = split_segments(variables, b, boundaries)
    return list(zip(segments_a, segments_b, strict=True))


def tie_elementwise(variables: AxisVariables, a: Axis, b: Axis) -> Axis:
    """Ties two axes of equal size unit by unit, as an addition does.

    Args:
        variables: The axis variables.
        a: One axis.
        b: The other axis.

    Returns:
        The axis of the result. It is pinned, as far as the two are, where they disagree.
    """

    def meet(x: Factor, y: Factor) -> Factor:
        # A value that is constant along a factor agrees with anything, and the result varies as the
        # other one does.
        if x.variable is None:
            return y
        if y.variable is None:
            return x
        variables.unite(x, y)
        if x.role and y.role:
            variables.roles.tie(x.role, y.role, 1)
        return x if x.role else y

    try:
        result = match(variables, a, b, meet)
    except Disagreement as disagreement:
        reason = pin_disagreement(variables, disagreement)
        return variables.pinned(size_of(a), reason)
    _note_padding(variables, a, b)
    _note_padding(variables, b, a)
    return result


def _note_padding(variables: AxisVariables, padded: Axis, other: Axis) -> None:
    """Notes the segments of an axis that face padding in another one, which it has been tied to."""
    if len(padded) != 1 or not isinstance(padded[0], Sum):
        return
    is_constant = [not variables.variables_of(segment) for segment in padded[0].segments]
    if all(is_constant) or not any(is_constant):
        return
    boundaries = sorted(segment_boundaries(padded))
    facing = split_segments(variables, other, boundaries)
    for segment, is_padding in zip(facing, is_constant, strict=True):
        if is_padding:
            variables.met_padding.append(segment)


def pin_disagreement(variables: AxisVariables, disagreement: Disagreement) -> str:
    """Pins what two axes disagree about.

    Args:
        variables: The axis variables.
        disagreement: What was raised when the axes were matched.

    Returns:
        The first reason why any of it is pinned, which may be older.
    """
    reason = f"two factorisations with no common refinement ({disagreement})"
    variables.pin(disagreement.rest, reason)
    for factor in factors_of(variables.expand(disagreement.rest)):
        if factor.variable is not None:
            return variables.reason(factor.variable) or reason
    return reason
