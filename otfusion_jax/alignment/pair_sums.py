"""Sums over the parameters of two models, in one pass.

To go over two large models takes as long as to multiply parts of them. What has to be known of all
values before they are matched, and how far the two are apart as they are given, is told by three
sums: of the squares in each, and of the products of both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from otfusion_jax.common.host import as_numpy, at_hand, inner_product, parts_to_sum
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.symmetry import Symmetry

COMFORTABLE_EXPONENT = 16
"""Known parameters are not scaled if the largest is between the powers of two of this and of less
this."""


class PairSums(NamedTuple):
    """Sums of squares and products, by the positions of parameters in `Symmetry.parts`.

    Attributes:
        sq_norms: The squared norm of a parameter in the source and in the target together.
        products: The inner product of a parameter of the source with that of the target, where both
            are of one shape.
    """

    sq_norms: dict[int, float]
    products: dict[int, float]


def sums_of_models(
    symmetry: Symmetry, onto: Symmetry, source: PyTree, target: PyTree
) -> PairSums | None:
    """Takes the sums of two models that fit their symmetries; see `sums_of_pairs`."""
    if not at_hand((source, target)):
        return None
    given = as_numpy((symmetry.split(source), onto.split(target)))
    return sums_of_pairs(moving_parts(symmetry), *given)


def moving_parts(symmetry: Symmetry) -> list[int]:
    """Returns the positions of the parameters whose values count: all but integers and keys."""
    return [number for number, part in enumerate(symmetry.parts) if part.moves]


def sums_of_pairs(
    positions: Sequence[int], sources: Sequence[Any], targets: Sequence[Any]
) -> PairSums | None:
    """Takes sums that tell all values to be finite, and the largest magnitude to be in range.

    It is not below any root mean square, and not above the root of the sum of all squares.

    Args:
        positions: The positions of the parameters.
        sources: The parameters of the source.
        targets: Those of the target.

    Returns:
        The sums. None if a value is not finite, if the magnitude may be out of range, or if
        parameters are none of NumPy and of single precision.
    """
    sq_norms: dict[int, float] = {}
    products: dict[int, float] = {}
    largest_mean_square = 0.0
    for number in positions:
        pair = sources[number], targets[number]
        for array in pair:
            if type(array) is not np.ndarray or array.dtype != np.float32 or not array.flags.forc:
                return None
        source, target = pair
        # Laid out alike, places that are next to each other in memory are so in both.
        if source.shape == target.shape and source.strides == target.strides:
            of_source, of_target, products[number] = _sums(source, target)
        else:
            of_source = float(inner_product(source, source))
            of_target = float(inner_product(target, target))
        sq_norms[number] = of_source + of_target
        for sq_norm, array in ((of_source, source), (of_target, target)):
            largest_mean_square = max(largest_mean_square, sq_norm / max(array.size, 1))
    largest = 4.0**COMFORTABLE_EXPONENT
    # Neither holds of NaN.
    if largest_mean_square > 1 / largest and sum(sq_norms.values()) < largest:
        return PairSums(sq_norms, products)
    return None


def _sums(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Takes `x·x`, `y·y` and `x·y`, part by part: what is in the cache is used three times."""
    x, y = x.ravel(order="K"), y.ravel(order="K")
    of_x = of_y = of_both = 0.0
    for x_part, y_part in parts_to_sum(x, y):
        of_x += float(np.vdot(x_part, x_part))
        of_y += float(np.vdot(y_part, y_part))
        of_both += float(np.vdot(x_part, y_part))
    return of_x, of_y, of_both
