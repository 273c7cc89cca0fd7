"""The methods that the studies compare: what moves model A, and what mends the average."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num, PyTree
from ott.geometry import costs

import otfusion_jax as otf
from experiments.models import BATCH_NORM_MOMENTUM, build_model
from experiments.pairs import Network, Pair
from experiments.train import augmented
from otfusion_jax.symmetry.groups import Plans

# Images held in memory at once where features are read.
_BATCH_SIZE = 250
_STATISTICS = "batch_stats"


def counts(path: str) -> bool:
    """Whether a leaf counts in a cost: running statistics do not say what a unit does."""
    return not path.startswith(_STATISTICS)


# --- alignment


def _moved(pair: Pair, symmetry: otf.Symmetry | None = None, **how: Any) -> PyTree:
    symmetry = symmetry or pair.network.symmetry
    plans = otf.align(symmetry, pair.a, pair.b, leaf_weight=counts, **how)
    return otf.transport(symmetry, plans, pair.a)


def _with_outputs(pair: Pair, **how: Any) -> PyTree:
    """As the original does by default: the output layer is transported too."""

    def total(params: PyTree, images: Array) -> Array:
        return jnp.sum(pair.network.apply(params, images), axis=-1)  # in no order, hence free

    symmetry = otf.trace_symmetry(total, pair.network.shapes, pair.images[:2])
    return _moved(pair, symmetry, **how)


def gram(pair: Pair, samples: int, **how: Any) -> dict[str, otf.Gram]:
    """Compares the units of both models by their activations.

    Args:
        pair: The models.
        samples: How many of the pair's images.
        **how: As `otf.feature_gram` takes it.
    """
    images = pair.images[:samples]
    batches = [images[i : i + _BATCH_SIZE] for i in range(0, len(images), _BATCH_SIZE)]
    return otf.feature_gram(
        pair.network.symmetry, pair.network.apply, pair.a, pair.b, batches, **how
    )


def _by_activations(pair: Pair, samples: int) -> PyTree:
    return _moved(
        pair,
        method=otf.ForwardPass(),
        metric=costs.Euclidean(),
        grams=gram(pair, samples),
    )


def _by_correlation(pair: Pair) -> PyTree:
    """Activation matching as in Git Re-Basin and REPAIR: correlations after the nonlinearity."""
    grams = gram(pair, len(pair.images), at="activation", center=True)
    return _moved(pair, method=otf.ForwardPass(), metric=costs.Cosine(), grams=grams)


def correlations(g: otf.Gram) -> otf.Gram:
    """Divides inner products by the norms of both units; units that are 0 stay so.

    Args:
        g: Of any group.

    Returns:
        Inner products of units of norm 1.
    """
    return otf.Gram(
        jnp.ones_like(g.source_sq_norms), jnp.ones_like(g.target_sq_norms), g.normalised().cross
    )


def _descent_from_correlation(pair: Pair) -> PyTree:
    found = gram(pair, len(pair.images), at="activation", center=True)
    grams = {name: correlations(g) for name, g in found.items()}
    return _moved(pair, method=otf.CoordinateDescent(starts=("forward",)), grams=grams)


def _algorithm_1(unit_norm: bool, metric: costs.CostFn) -> dict[str, Any]:
    return {"method": otf.ForwardPass(unit_norm=unit_norm), "metric": metric}


_WEIGHTS = {
    "squared": _algorithm_1(False, costs.SqEuclidean()),
    "Euclidean": _algorithm_1(False, costs.Euclidean()),
    "unit norm, squared": _algorithm_1(True, costs.SqEuclidean()),
    "unit norm, Euclidean": _algorithm_1(True, costs.Euclidean()),
}

# Each gives model A as it enters the average with model B.
METHODS: Mapping[str, Callable[[Pair], PyTree]] = {
    "vanilla average": lambda pair: pair.a,
    "Algorithm 1, weights": lambda pair: _moved(pair, method=otf.ForwardPass()),
    "Algorithm 1, activations": lambda pair: _by_activations(pair, 200),
    "coordinate descent (fuse)": _moved,
}
# The original's own code, which moves the outputs as well.
ORIGINAL: Mapping[str, Callable[[Pair], PyTree]] = {
    f"the original: {name}": lambda pair, how=how: _with_outputs(pair, **how)
    for name, how in _WEIGHTS.items()
}
VARIANTS: Mapping[str, Callable[[Pair], PyTree]] = {
    **METHODS,
    **{
        f"Algorithm 1, weights, {name}": lambda pair, how=how: _moved(pair, **how)
        for name, how in list(_WEIGHTS.items())[1:]  # the first is the default above
    },
    **ORIGINAL,
    "Algorithm 1, activations of 100": lambda pair: _by_activations(pair, 100),
    "Algorithm 1, activations of 400": lambda pair: _by_activations(pair, 400),
    "activation matching (correlation)": _by_correlation,
    "coordinate descent from activation matching": _descent_from_correlation,
}


# --- across widths


def plans_across(source: Network, target: Network, a: PyTree, b: PyTree, **how: Any) -> Plans:
    """Aligns a model with one of other widths.

    Args:
        source: The architecture of A.
        target: The architecture of B: that of A with other widths.
        a: Variables of the model that is moved.
        b: Variables of the model that it is moved onto.
        **how: As `otf.align` takes it.

    Returns:
        Group name to plan.
    """
    found = otf.align(source.symmetry, a, b, onto=target.symmetry, leaf_weight=counts, **how)
    return found.plans


def across(source: Network, target: Network, a: PyTree, b: PyTree, **how: Any) -> PyTree:
    """Moves a model onto one of other widths; see `plans_across`.

    Returns:
        A in the shapes of B.
    """
    plans = plans_across(source, target, a, b, **how)
    return otf.transport(source.symmetry, plans, a, onto=target.symmetry)


# --- what follows the average


def reestimated(network: Network, variables: PyTree, images: Num[Array, "n ..."]) -> PyTree:
    """Gives batch norm the statistics that its inputs have on some images.

    They are shown as in training. Whole images have other statistics than crops with a black
    margin, which the layers behind are used to: with them a trained network loses 1 to 3 points.

    Args:
        network: The architecture; says whether images are cropped and flipped.
        variables: Of the model.
        images: A batch at a time passes in training mode; what is over is left out.

    Returns:
        The variables with the mean of the batches' statistics; without batch norm, unchanged.
    """
    if _STATISTICS not in variables:
        return variables
    model = build_model(network.config, network.classes)
    if network.augment:
        black = jnp.min(images, axis=(0, 1, 2), keepdims=True)
        images = augmented(jax.random.key(0), images, black)

    @jax.jit
    def of_batch(batch: Array) -> PyTree:
        _, changed = model.apply(variables, batch, train=True, mutable=[_STATISTICS])
        return jax.tree.map(
            lambda new, old: (new - BATCH_NORM_MOMENTUM * old) / (1 - BATCH_NORM_MOMENTUM),
            changed[_STATISTICS],
            variables[_STATISTICS],
        )

    size = min(_BATCH_SIZE, len(images))
    found = [of_batch(images[i : i + size]) for i in range(0, len(images) - size + 1, size)]
    return {**variables, _STATISTICS: otf.average(found)}


def _averaged(pair: Pair, moved: PyTree, weights: tuple[float, float]) -> PyTree:
    return otf.average([moved, pair.b], weights)


def _repaired(
    pair: Pair, moved: PyTree, weights: tuple[float, float], method: otf.AbstractRepair
) -> PyTree:
    models, network = [moved, pair.b], pair.network
    fused = otf.repair(
        network.symmetry, network.apply, models, pair.images, weights=weights, method=method
    )
    return reestimated(network, fused, pair.images)


def _restored(pair: Pair, moved: PyTree, weights: tuple[float, float]) -> PyTree:
    if pair.network.config.use_norm:
        return reestimated(pair.network, _averaged(pair, moved, weights), pair.images)
    return _repaired(pair, moved, weights, otf.RestoreStatistics())


def _regressed(pair: Pair, moved: PyTree, weights: tuple[float, float]) -> PyTree:
    return _repaired(pair, moved, weights, otf.LeastSquares())


# Each makes one model of model A as moved, model B and their weights.
AVERAGES: Mapping[str, Callable[[Pair, PyTree, tuple[float, float]], PyTree]] = {
    "averaged": _averaged,
    "statistics restored": _restored,
    "least squares": _regressed,
}


def mended(method: str) -> tuple[str, ...]:
    """What follows a method of `VARIANTS` in a table of all: of many variants, repairs are few."""
    if method in ORIGINAL:
        return ("averaged",)
    if method.startswith("Algorithm 1") and method not in METHODS:
        return ("averaged", "statistics restored")
    return tuple(AVERAGES)
