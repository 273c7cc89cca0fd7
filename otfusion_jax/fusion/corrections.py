"""What a repair corrects: which piece of which parameter, from the features of which products."""

import dataclasses
from typing import NamedTuple

from otfusion_jax.fusion.flat_program import Parameter
from otfusion_jax.tracing.activations import Path


class Piece(NamedTuple):
    """A parameter, or the slice of it that an iteration of a loop gets.

    Attributes:
        leaf: The position of the parameter among the parts of the symmetry.
        indices: The positions of the slice along the first axes; empty for the whole parameter.
    """

    leaf: int
    indices: tuple[int, ...]


def overlap(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two pieces of one parameter have something in common.

    Args:
        one: The indices of one piece.
        other: Those of the other.
    """
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


class Condition(NamedTuple):
    """What has to hold for features to be real: that a branch is taken.

    Attributes:
        which: The slot that says which branch is taken.
        branch: The number of the branch.
        count: How many branches there are.
    """

    which: int
    branch: int
    count: int


class Occurrence(NamedTuple):
    """A product in which a parameter is corrected, once for each iteration around it.

    Attributes:
        step: The number of the step that evaluates it.
        features: The slot of its features.
        conditions: The branches that it is evaluated in.
    """

    step: int
    features: int
    conditions: tuple[Condition, ...]


class Receiver(NamedTuple):
    """A bias that takes what is to be added to units.

    Attributes:
        piece: Which part of which parameter.
        sign: 1 for a bias that is added to the units, -1 for one that is subtracted from them.
    """

    piece: Piece
    sign: int


@dataclasses.dataclass
class Correction:
    """A parameter that is corrected.

    Attributes:
        number: Its place among the corrections, in the order of the program.
        piece: Which part of which parameter.
        path: The path of the product.
        position: Which of its two operands the parameter is.
        parameter: How the parameter comes into the product.
        scans: How many scans there are around the product.
        occurrences: The products whose features it is corrected from.
        receivers: The biases that take what is to be added to its units.
        needs: The numbers of the corrections that its features depend on, as bits.
        stage: How many passes come before it.
        owns_bias: Whether a bias takes what is to be added to its units, and does nothing else.
    """

    number: int
    piece: Piece
    path: Path
    position: int
    parameter: Parameter
    scans: int
    occurrences: list[Occurrence] = dataclasses.field(default_factory=list)
    receivers: list[Receiver] = dataclasses.field(default_factory=list)
    needs: int = 0
    stage: int = 0
    owns_bias: bool = False
