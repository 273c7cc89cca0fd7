"""By what rotated units are multiplied as they become another number of units.

A matrix Q that takes n units to m with orthonormal rows (n <= m) keeps every inner product over the
units, and so all that the function does with them but for numbers of the program that depend on how
many there are: a mean of squares divides by n in one network and by m in the other, the logits of
attention by the square root of the number of dimensions. A power of m / n makes up for these, one
for what produces the units and one for what consumes them (see `tracing.widths`).
"""

import dataclasses
from typing import Literal

UNKNOWN = "what it is divided by at other widths is not known; trace it anew"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """By which powers of m / n units are multiplied where n become m, beside an isometry.

    Attributes:
        produced: The power for what produces the units: 1/2 where a mean of their squares is taken,
            as in a LayerNorm, so that it stays; 0 where their squares are summed.
        consumed: The power for what consumes them.
        constants: The numbers of the program that the units are multiplied by on their way, other
            than powers of how many there are. They have to be the same in both networks.
        refused: Why there are no such powers: an equation of the program, with its source line;
            None if there are. Two that differ in the words alone are equal.
    """

    produced: float = 0.0
    consumed: float = 0.0
    constants: tuple[float, ...] = ()
    refused: str | None = dataclasses.field(default=None, compare=False)

    def factor(self, role: Literal["produces", "consumes", "both"], n: int, m: int) -> float:
        """Returns by what a matrix of orthonormal rows or columns is multiplied.

        Args:
            role: The role in which parameters have the units. With both, the two powers are equal.
            n: The number of units before.
            m: The number of units after.

        Returns:
            The power of `m / n`; 1 where the number stays.
        """
        power = self.produced if role == "produces" else self.consumed
        return (m / n) ** power


def difference(source: Stretch | None, target: Stretch | None) -> str | None:
    """Says why units of one network cannot become another number of units of another.

    Args:
        source: The stretch of the group in the source; None if it is not known.
        target: That of the group in the target.

    Returns:
        The reason, in words; None if they can.
    """
    if source is None or target is None:
        return UNKNOWN
    refused = source.refused or target.refused
    if refused is not None:
        return refused
    if source != target:
        # The powers agree if the program asks for the same at all widths.
        return (
            "the two programs multiply these units by other numbers, "
            f"{_numbers(source)} and {_numbers(target)}, beyond what their widths explain"
        )
    return None


def _numbers(stretch: Stretch) -> str:
    powers = f"powers {stretch.produced:g} and {stretch.consumed:g} of the width"
    constants = ", ".join([f"{number:g}" for number in stretch.constants])
    return f"{powers} and {constants}" if constants else powers
