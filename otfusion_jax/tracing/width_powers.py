"""Powers of a ratio of widths: what values are multiplied by as units become another number.

See `widths`, which asks, and `width_trail`, which follows values through equations.
"""

import math
from fractions import Fraction
from typing import NamedTuple

Number = int | Fraction

_POWERS = tuple([Fraction(number, 2) for number in (-4, -3, -2, -1, 1, 2, 3, 4)])
"""The powers of the number of units that a number of a program is compared with."""

SAME_NUMBER = 1e-5
"""By how much, relative to its size, a float32 may differ from the number that it stands for."""


class Power(NamedTuple):
    """What a value is multiplied by if the number of units changes, a power of the ratio.

    Attributes:
        produced: How often it counts the power for what produces the units.
        consumed: How often it counts the power for what consumes them.
        width: What numbers of the program add to the power.
        order: How many of its factors are vectors with an entry for each unit: 0 of a norm, 1 of
            features, 2 of their squares.
        is_read: Whether a parameter has just consumed the units. Numbers may still multiply what
            comes of that; anything else ends where these units are followed.
        count: Over how many other things it has been summed, as for a mean over tokens.
    """

    produced: Number = 0
    consumed: Number = 0
    width: Number = 0
    order: int = 0
    is_read: bool = False
    count: int = 1

    def plus(self, other: "Power", times: Number = 1) -> "Power":
        """Returns the power of a product with another value, or with -1 of a quotient.

        Args:
            other: The power of the other value.
            times: The exponent of the other value.
        """
        return self._replace(
            produced=self.produced + times * other.produced,
            consumed=self.consumed + times * other.consumed,
            width=self.width + times * other.width,
            order=self.order + other.order,
            is_read=self.is_read or other.is_read,
            count=self.count * other.count,
        )

    def scaled(self, degree: Number) -> "Power":
        """Returns the power of a function of the value.

        Args:
            degree: The d of `f(c x) = c^d f(x)`.
        """
        order = int(degree * self.order)
        return Power(degree * self.produced, degree * self.consumed, degree * self.width, order)

    def lifted(self, order: int) -> "Power":
        """Returns the power with which it is added to a value of a higher order.

        An isometry takes the ones to the ones over the root of the ratio. So what is the same at
        all units is as a vector larger by half a power, and as a square by a whole one.

        Args:
            order: The order of what it is added to.
        """
        width = self.width + Fraction(order - self.order, 2)
        return self._replace(width=width, order=order)

    def summed(self, order: int) -> "Power":
        """Returns the power after a sum over all units.

        Args:
            order: How many of its factors are vectors along these units.
        """
        # Sums of squares are kept, sums of numbers go with the root, how many there are as it is.
        width = self.width + Fraction(2 - order, 2)
        return self._replace(width=width, order=self.order - order)


NOTHING = Power()
PRODUCED = Power(produced=1, order=1)
CONSUMED = Power(consumed=1, order=1)


def as_power(magnitude: float, size: int) -> Fraction | None:
    """Finds which power of a number of units a number is.

    Args:
        magnitude: The number, positive.
        size: The number of units, at least 2.

    Returns:
        The power, in halves; None if it is none.
    """
    for power in _POWERS:
        if math.isclose(magnitude, size ** float(power), rel_tol=SAME_NUMBER):
            return power
    return None
