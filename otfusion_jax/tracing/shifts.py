"""How values stand where a number is added to all units of a group alike.

Words for `unread_means`, which follows what such a shift of a parameter does. A value that lies
along the units is *shifted* if a multiple of the ones is added to it, with one number for each
index of its other axes. Its sum over the units, the sum of its squares and the square of its sum
are *moments* of it: they change, but what is made of several of them may not.
"""

import math
from typing import Literal, NamedTuple

from jax.extend import core

from otfusion_jax.tracing.values import Shape, shape_of
from otfusion_jax.tracing.width_powers import SAME_NUMBER

Source = tuple[int, int]
"""Which value it is: its number, and its rank. A slice that a loop takes has one axis less."""

Dims = tuple[int | None, ...]
"""For each axis of a value the axis of another one that it is; None where it does not vary."""

Leaves = frozenset[int]
"""The parameters whose shifts a value depends on."""

NO_LEAVES: Leaves = frozenset()


class Shifted(NamedTuple):
    """A multiple of the ones is added to a value.

    Attributes:
        leaves: The parameters that it comes from.
        source: The value that it is a copy of; None of a new one.
    """

    leaves: Leaves
    source: Source | None = None


class Squared(NamedTuple):
    """The squares of a value that is shifted, unit by unit."""

    leaves: Leaves
    source: Source


class Moment(NamedTuple):
    """A sum over the units of a value that is shifted.

    Attributes:
        leaves: The parameters that the shift comes from.
        source: The value.
        kind: What it is: the sum, the sum of the squares, or the square of the sum.
        factor: The number that this is multiplied by.
        dims: For each axis the axis of the source that it is; None where it does not vary.
    """

    leaves: Leaves
    source: Source
    kind: Literal["sum", "squares", "squared sum"]
    factor: float
    dims: Dims


class Fixed(NamedTuple):
    """A value that no shift changes, and that something is known of.

    Attributes:
        is_level: Whether it is the same at all units; otherwise its sum over the units is 0.
    """

    is_level: bool

    @property
    def leaves(self) -> Leaves:
        """No parameters."""
        return NO_LEAVES


CENTRED = Fixed(is_level=False)
LEVEL = Fixed(is_level=True)

Standing = Shifted | Squared | Moment | Fixed | None
"""How a value stands. None where no shift changes it, and nothing else is known."""


def leaves_of(*standings: Standing) -> Leaves:
    """Returns the parameters whose shifts some values depend on."""
    return NO_LEAVES.union(*[x.leaves for x in standings if x is not None])


def changes(standing: Standing) -> bool:
    """Whether shifts change a value."""
    return bool(leaves_of(standing))


class Term(NamedTuple):
    """A term of a sum.

    Attributes:
        standing: How it stands.
        sign: 1, or -1 of one that is subtracted.
    """

    standing: Standing
    sign: int


def cancelled(x: Term, y: Term, size: int, shape: Shape, dim: int | None) -> Standing | Literal[0]:
    """Adds two values, if shifts of theirs make up for each other.

    Args:
        x: One term.
        y: The other.
        size: The number of units.
        shape: The shape of the sum.
        dim: The axis of it that the units lie along; None if there is none.

    Returns:
        How the sum stands: centred where a mean is subtracted from what it is the mean of. 0 if
        shifts do not make up for each other.
    """
    # The order of the terms does not matter, as each has its sign.
    for (one, sign), (other, other_sign) in ((x, y), (y, x)):
        if not isinstance(other, Moment):
            continue
        factor = other_sign * other.factor
        if isinstance(one, Shifted) and other.kind == "sum" and one.source == other.source:
            is_mean = math.isclose(factor * size, -sign, rel_tol=SAME_NUMBER)
            if is_mean and _is_aligned(other.dims, shape, dim):
                return CENTRED
        # The mean of the squares minus the square of the mean is the variance.
        if isinstance(one, Moment) and (one.kind, other.kind) == ("squares", "squared sum"):
            squares = sign * one.factor
            is_variance = math.isclose(factor * size, -squares, rel_tol=SAME_NUMBER)
            if is_variance and (one.source, one.dims) == (other.source, other.dims):
                return None
    return 0


def _is_aligned(dims: Dims, shape: Shape, unit_dim: int | None) -> bool:
    """Whether a moment meets its source at each index of the other axes."""
    # A number by itself meets arrays of any rank.
    dims = dims or (None,) * len(shape)
    for number, size in enumerate(shape):
        wanted = None if number == unit_dim else number
        if dims[number] != wanted and not (dims[number] is None and size == 1):
            return False
    return True


def product_of_moments(x: Moment, y: Moment) -> Moment | None:
    """Multiplies two moments; None unless both are the sum of one value."""
    if x.kind == y.kind == "sum" and (x.source, x.dims) == (y.source, y.dims):
        return x._replace(kind="squared sum", factor=x.factor * y.factor)
    return None


def rearranged(dims: Dims, eqn: core.JaxprEqn) -> Dims | None:
    """Follows axes through what has the same numbers as its operand.

    Args:
        dims: For each axis of the operand the axis of something else that it is; None where it does
            not vary.
        eqn: The equation, of a primitive of `laws.UNCHANGED`.

    Returns:
        The same for the result. None if axes are taken apart or merged.
    """
    name, params = eqn.primitive.name, eqn.params
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if name == "broadcast_in_dim":
        moved: list[int | None] = [None] * len(new)
        for dim, size, place in zip(dims, old, params["broadcast_dimensions"], strict=True):
            # An axis of size 1 that is made longer does not vary.
            moved[place] = dim if size == new[place] else None
        return tuple(moved)
    if name == "transpose":
        return tuple([dims[number] for number in params["permutation"]])
    if name in ("reshape", "squeeze"):
        # Axes of size 1 come and go; all others stay in their order.
        kept = [(dim, size) for dim, size in zip(dims, old, strict=True) if size != 1]
        if [size for _, size in kept] != [size for size in new if size != 1]:
            return None
        in_order = iter(kept)
        return tuple([None if size == 1 else next(in_order)[0] for size in new])
    # A cast, or a copy.
    return dims
