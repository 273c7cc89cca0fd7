"""What moves model A onto model B before the two are averaged; methods.py gives each its name."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, PyTree
from ott.geometry import costs

import otfusion_jax as otf
from experiments.networks import counts
from experiments.pairs import Pair

# How many images are held in memory at once where features are read.
_BATCH_SIZE = 250


def by_weights(
    pair: Pair, method: otf.AbstractMethod, metric: costs.CostFn | None = None
) -> PyTree:
    """Moves A by plans that are found in the weights.

    Args:
        pair: The models.
        method: How plans are found.
        metric: The ground metric; None for the library's default.

    Returns:
        A, moved.
    """
    symmetry = pair.network.symmetry
    plans = otf.align(symmetry, pair.a, pair.b, method=method, metric=metric, leaf_weight=counts)
    return otf.transport(symmetry, plans, pair.a)


def with_outputs(pair: Pair, method: otf.AbstractMethod, metric: costs.CostFn) -> PyTree:
    """Moves A as the original does by default: the output layer is transported too.

    Args:
        pair: The models.
        method: How plans are found.
        metric: The ground metric.

    Returns:
        A, moved.
    """

    def total(params: PyTree, images: Array) -> Array:
        # A sum has no order, hence its terms are free to be permuted.
        return jnp.sum(pair.network.apply(params, images), axis=-1)

    symmetry = otf.trace_symmetry(total, pair.network.shapes, pair.images[:2])
    plans = otf.align(symmetry, pair.a, pair.b, method=method, metric=metric, leaf_weight=counts)
    return otf.transport(symmetry, plans, pair.a)


def preactivation_grams(pair: Pair, samples: int) -> dict[str, otf.Gram]:
    """Compares the units of both models by what they compute before the nonlinearity.

    Args:
        pair: The models.
        samples: How many of the pair's images to look at.

    Returns:
        The inner products of each group's activations, by its name.
    """
    return _grams(pair, samples, "preactivation", center=False)


def activation_grams(pair: Pair, samples: int) -> dict[str, otf.Gram]:
    """Compares the units of both models by what they put out, minus its mean.

    Args:
        pair: The models.
        samples: How many of the pair's images to look at.

    Returns:
        The inner products of each group's activations, by its name.
    """
    return _grams(pair, samples, "activation", center=True)


def _grams(
    pair: Pair, samples: int, at: Literal["preactivation", "activation"], center: bool
) -> dict[str, otf.Gram]:
    """Compares the units of both models on some of the pair's images, batch by batch."""
    network = pair.network
    batches = _batches(pair.images[:samples])
    return otf.feature_gram(
        network.symmetry, network.apply, pair.a, pair.b, batches, at=at, center=center
    )


def by_activations(pair: Pair, samples: int) -> PyTree:
    """Moves A by Algorithm 1 of the paper with activations.

    Args:
        pair: The models.
        samples: How many of the pair's images to look at.

    Returns:
        A, moved.
    """
    # The metric of the paper for activations; its features are those before the nonlinearity.
    grams = preactivation_grams(pair, samples)
    return _by_grams(pair, grams, otf.ForwardPass(), costs.Euclidean())


def by_correlations(pair: Pair) -> PyTree:
    """Moves A by activation matching, as in Git Re-Basin and REPAIR.

    Args:
        pair: The models.

    Returns:
        A, moved.
    """
    grams = activation_grams(pair, len(pair.images))
    return _by_grams(pair, grams, otf.ForwardPass(), costs.Cosine())


def by_descent_from_correlations(pair: Pair) -> PyTree:
    """Moves A by coordinate descent on the weights that starts from activation matching.

    Args:
        pair: The models.

    Returns:
        A, moved.
    """
    grams = {}
    for name, gram in activation_grams(pair, len(pair.images)).items():
        grams[name] = correlations(gram)
    # Features make the start alone; what descends is the cost of the weights.
    descent = otf.CoordinateDescent(starts=("forward",))
    return _by_grams(pair, grams, descent, metric=None)


def by_rotated_streams(pair: Pair) -> PyTree:
    """Moves A by the features of residual streams, and by the weights of all else.

    Args:
        pair: The models, in canonical form.

    Returns:
        A, moved.
    """
    return _by_grams(pair, stream_grams(pair), otf.ForwardPass(), metric=None)


def by_descent_from_rotated_streams(pair: Pair) -> PyTree:
    """Moves A by coordinate descent on the weights that starts from features of residual streams.

    Args:
        pair: The models, in canonical form.

    Returns:
        A, moved.
    """
    descent = otf.CoordinateDescent(starts=("forward",))
    return _by_grams(pair, stream_grams(pair), descent, metric=None)


def stream_grams(pair: Pair) -> dict[str, otf.Gram]:
    """Compares the features of residual streams, as blocks take them up, minus their mean.

    Args:
        pair: The models, in canonical form.

    Returns:
        The inner products of the groups that rotate and are nested in no others.
    """
    grams = activation_grams(pair, len(pair.images))
    streams = {}
    for group in pair.network.symmetry.groups:
        if group.rotates and not group.batch:
            streams[group.name] = grams[group.name]
    return streams


def correlations(gram: otf.Gram) -> otf.Gram:
    """Divides inner products by the norms of both units; units that are 0 stay so.

    Args:
        gram: The inner products of any group.

    Returns:
        The inner products of units of norm 1.
    """
    source_sq_norms = jnp.ones_like(gram.source_sq_norms)
    target_sq_norms = jnp.ones_like(gram.target_sq_norms)
    return otf.Gram(source_sq_norms, target_sq_norms, gram.normalised().cross)


def _by_grams(
    pair: Pair,
    grams: dict[str, otf.Gram],
    method: otf.AbstractMethod,
    metric: costs.CostFn | None,
) -> PyTree:
    symmetry = pair.network.symmetry
    plans = otf.align(
        symmetry,
        pair.a,
        pair.b,
        method=method,
        metric=metric,
        grams=grams,
        leaf_weight=counts,
    )
    return otf.transport(symmetry, plans, pair.a)


def _batches(images: Array) -> list[Array]:
    return [images[first : first + _BATCH_SIZE] for first in range(0, len(images), _BATCH_SIZE)]
