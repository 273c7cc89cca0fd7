"""What moves model A onto model B before the two are averaged; methods.py gives each its name."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree
from ott.geometry import costs

import otfusion_jax as otf
from experiments.networks import counts
from experiments.pairs import Pair

# How many images are held in memory at once where features are read.
_BATCH_SIZE = 250
# Of how many images a step is that rotations are learned by.
_LEARNING_BATCH_SIZE = 64


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
    pair: Pair,
    samples: int,
    at: Literal["preactivation", "activation"],
    center: bool,
    by_sensitivity: bool = False,
) -> dict[str, otf.Gram]:
    """Compares the units of both models on some of the pair's images, batch by batch."""
    network = pair.network
    batches = batches_of(pair.images[:samples])
    return otf.feature_gram(
        network.symmetry,
        network.apply,
        pair.a,
        pair.b,
        batches,
        at=at,
        center=center,
        by_sensitivity=by_sensitivity,
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


def by_features(pair: Pair) -> PyTree:
    """Moves A by the features of residual streams and hidden units, and by the weights of heads.

    All that surrounds heads is in place by then, so that what they write tells as much as what they
    read.

    Args:
        pair: The models, in canonical form.

    Returns:
        A, moved.
    """
    return otf.transport(pair.network.symmetry, _matched_by_features(pair), pair.a)


def _matched_by_features(pair: Pair) -> otf.Alignment:
    """Aligns A as `by_features` moves it."""
    grams = grams_beside_heads(pair)
    return _aligned_by_grams(pair, grams, otf.ForwardPass(members="all"), metric=None)


def by_descent_from_features(pair: Pair) -> PyTree:
    """Moves A by coordinate descent on the weights that starts from `by_features`.

    Args:
        pair: The models, in canonical form.

    Returns:
        A, moved.
    """
    descent = otf.CoordinateDescent(starts=("forward",))
    return _by_grams(pair, grams_beside_heads(pair), descent, metric=None)


def by_learned_rotations(pair: Pair) -> PyTree:
    """Turns A on from where `by_features` has it, until the average answers as the models do.

    No labels are needed: what the average is to predict is the mean of what the two predict, on
    mixtures of images, as a few images by themselves would soon be known by heart.

    Args:
        pair: The models, in canonical form, and the images to learn on.

    Returns:
        A, moved.
    """
    network = pair.network
    start = _matched_by_features(pair)

    # There is nothing between tokens.
    mixes = jnp.issubdtype(pair.images.dtype, jnp.floating)

    def loss(params: PyTree, chosen: tuple[Int[Array, " batch"], Array]) -> Array:
        positions, seed = chosen
        images = pair.images[positions]
        if mixes:
            images = otf.mixup(images, jax.random.key(seed))
        answers = []
        for model in (pair.a, pair.b):
            answers.append(jax.nn.softmax(network.apply(model, images)))
        answer = (answers[0] + answers[1]) / 2
        return optax.softmax_cross_entropy(network.apply(params, images), answer).mean()

    shape = (pair.learning_steps, _LEARNING_BATCH_SIZE)
    positions = jax.random.randint(jax.random.key(0), shape, 0, len(pair.images))
    seeds = jax.random.bits(jax.random.key(1), shape[:1])
    # Permutations stay as features have found them.
    learned = otf.learn_alignment(
        network.symmetry, loss, pair.a, pair.b, (positions, seeds), start=start, solver=None
    )
    return otf.transport(network.symmetry, learned, pair.a)


def grams_beside_heads(pair: Pair) -> dict[str, otf.Gram]:
    """Compares what residual streams and hidden units put out, minus its mean.

    Each place of an image counts by how much the outputs depend on it. Heads are left out, and what
    is in them: their weights tell more.

    Args:
        pair: The models, in canonical form.

    Returns:
        The inner products of the features of units that rotate, and of others their correlations.
    """
    groups = pair.network.symmetry.groups
    heads = {group.outer for group in groups}
    grams = {}
    found = _grams(pair, len(pair.images), "activation", center=True, by_sensitivity=True)
    for name, gram in found.items():
        group = pair.network.symmetry[name]
        if group.rotates and not group.batch:
            grams[name] = gram
        elif name not in heads and group.outer is None:
            grams[name] = correlations(gram)
    return grams


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
    aligned = _aligned_by_grams(pair, grams, method, metric)
    return otf.transport(pair.network.symmetry, aligned, pair.a)


def _aligned_by_grams(
    pair: Pair,
    grams: dict[str, otf.Gram],
    method: otf.AbstractMethod,
    metric: costs.CostFn | None,
) -> otf.Alignment:
    return otf.align(
        pair.network.symmetry,
        pair.a,
        pair.b,
        method=method,
        metric=metric,
        grams=grams,
        leaf_weight=counts,
    )


def batches_of(images: Array) -> list[Array]:
    """Cuts images into batches of which features are held in memory at once.

    Args:
        images: The images.

    Returns:
        The batches; the last one may be smaller.
    """
    return [images[first : first + _BATCH_SIZE] for first in range(0, len(images), _BATCH_SIZE)]
