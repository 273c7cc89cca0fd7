"""What makes one model of A, moved, and B; methods.py gives each its name."""

from typing import Literal

from jaxtyping import PyTree

import otfusion_jax as otf
from experiments.alignments import batches_of
from experiments.networks import reestimated
from experiments.pairs import Pair

Weights = tuple[float, float]
"""How much A and B count in an average; the two sum to 1."""


def averaged(pair: Pair, moved: PyTree, weights: Weights) -> PyTree:
    """Averages the two, and does nothing more.

    Args:
        pair: The models.
        moved: A, moved onto B.
        weights: How much A and B count.

    Returns:
        The average.
    """
    return otf.average([moved, pair.b], weights)


def restored(pair: Pair, moved: PyTree, weights: Weights) -> PyTree:
    """Gives every unit of the average the mean and deviation that it has in the models (REPAIR).

    With batch norm, its statistics are estimated anew instead.

    Args:
        pair: The models, and the images that statistics are taken on.
        moved: A, moved onto B.
        weights: How much A and B count.

    Returns:
        The average, corrected.
    """
    # Batch norm sets mean and deviation of its inputs anyway; to restore them would do it twice.
    if pair.network.config.use_norm:
        average = averaged(pair, moved, weights)
        return reestimated(pair.network, average, pair.images)
    return _repaired(pair, moved, weights, otf.RestoreStatistics())


def regressed(
    pair: Pair,
    moved: PyTree,
    weights: Weights,
    *,
    at: Literal["preactivation", "activation", "output"],
) -> PyTree:
    """Corrects each layer of the average so that its features come closest to the models' mean.

    Args:
        pair: The models, and the images that features are taken on.
        moved: A, moved onto B.
        weights: How much A and B count.
        at: Whether features are compared before a ReLU or behind it; or outputs alone, so that only
            the last layer is corrected.

    Returns:
        The average, corrected.
    """
    # Layers are fitted in inference, with batch norm's statistics as they are averaged. Estimated
    # anew they would be others, and cost a ResNet18 a point.
    return _repaired(pair, moved, weights, otf.LeastSquares(pair.ridge, at=at))


def _repaired(pair: Pair, moved: PyTree, weights: Weights, method: otf.AbstractRepair) -> PyTree:
    network = pair.network
    return otf.repair(
        network.symmetry,
        network.apply,
        [moved, pair.b],
        batches=batches_of(pair.images),
        weights=weights,
        method=method,
    )
