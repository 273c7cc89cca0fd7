"""Averages of models: plain, and after alignment."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree
from ott.geometry import costs

from otfusion_jax.align import align, leaf_weights, weight_by_path
from otfusion_jax.checks import (
    require_equal_integers,
    require_finite,
    require_kind,
    require_model,
    require_models,
    require_symmetry,
    warn_without_groups,
)
from otfusion_jax.matching import at_once, map_in_batches
from otfusion_jax.methods import AbstractMethod, CoordinateDescent
from otfusion_jax.solvers import AbstractSolver, Exact
from otfusion_jax.symmetry import Leaf, Symmetry, leaves_of
from otfusion_jax.transport import transport

Weights = Sequence[float] | Callable[[str], Sequence[float] | None] | None
"""Of K models: K numbers that sum to 1; or from the key path of a parameter to such numbers, or to
None where they are uniform, which is also what None means."""


def average(models: Sequence[PyTree], weights: Weights = None) -> PyTree:
    """Averages parameters as they are: the vanilla baseline.

    Args:
        models: K pytrees of the same structure and shapes.
        weights: K weights, summing to 1; uniform if None. A function of the key path says them
            parameter by parameter: `lambda path: (0.0, 1.0) if path.startswith("head") else None`
            keeps the head of the second of two models.

    Returns:
        The weighted average, computed in float32 or wider and rounded once. Random keys and single
        integers (counters) are those of the model that has all of the weight there, or of the last.
        Arrays of integers or booleans (quantised weights, masks) must be the same in all models,
        unless one has all of the weight there. Inside `jax.jit` that can't be looked at.

    Raises:
        ValueError: for no models, weights that do not fit, trees that differ, or integers that
            can't be averaged, listing every offender by key path.
        TypeError: for what is no list of models, and for shapes in place of arrays.
        FloatingPointError: for an average that is out of range.
    """
    _require_alike(models)
    leaves = leaves_of(models[0])
    shares = mixtures(weights, len(models), leaves)
    return _averaged(leaves, models, shares, "averaging")


def _averaged(
    leaves: Sequence[Leaf],
    models: Sequence[PyTree],
    shares: Sequence[Float[Array, " k"]],
    what: str,
) -> PyTree:
    """Averages models of one structure, each leaf by weights of its own."""
    columns = columns_of(models)
    check_integers(leaves, columns, shares)
    treedef = jax.tree_util.tree_structure(models[0])
    averaged = treedef.unflatten(map(_mean_of, columns, shares))
    require_finite(leaves, averaged, what)
    return averaged


def columns_of(models: Sequence[PyTree]) -> list[tuple[Any, ...]]:
    """Sorts the leaves of models by leaf.

    Args:
        models: K pytrees of one structure.

    Returns:
        For each leaf its values in the models.
    """
    return list(zip(*map(jax.tree_util.tree_leaves, models), strict=True))


def check_integers(
    leaves: Sequence[Leaf], columns: Sequence[Any], shares: Sequence[Float[Array, " k"]]
) -> None:
    """Refuses integers that differ between models that are to be averaged.

    Args:
        leaves: of all models.
        columns: for each leaf its values in the models, K arrays or one array `[K, ...]`.
        shares: the weights of the models, for each leaf.

    Raises:
        ValueError: listing every such leaf by key path.
    """
    decided = [_has_all_weight(w) for w in shares]
    remedy = (
        ", or say by weights whose to keep, as in lambda path: (0.0, 1.0) if path == 'mask' else "
        "None"
    )
    require_equal_integers(leaves, columns, decided, remedy)


def _has_all_weight(weights: Array) -> bool:
    """Whether one of the models is known to have all of the weight."""
    return not isinstance(weights, Tracer) and bool((np.asarray(weights) == 1).any())


def stack(models: Sequence[PyTree]) -> PyTree:
    """Stacks models along a new leading axis.

    Args:
        models: K pytrees of the same structure and shapes.

    Returns:
        One pytree with leaves `[K, ...]`.

    Raises:
        ValueError: for no models, values that are not finite, or trees that differ, listing every
            offender by key path.
    """
    _require_alike(models)
    return _beside(models)


def _require_alike(models: Sequence[PyTree], symmetry: Symmetry | None = None) -> None:
    """Checks that models can be combined leaf by leaf.

    Args:
        models: K pytrees.
        symmetry: what they have to fit; None means the tree of the first.

    Raises:
        ValueError: for no models, values that are known and not finite, or trees that differ,
            listing every offender by key path.
    """
    require_models(models)
    if symmetry is None:
        treedef = jax.tree_util.tree_structure(models[0])
        symmetry = Symmetry((), (), leaves_of(models[0]), treedef)
    for number, model in enumerate(models):
        require_model(symmetry, model, f"model {number}")


def _beside(models: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


# One program in place of one for each shape of a leaf. All leaves have to be on the same devices.
_beside_at_once = jax.jit(_beside)


def mixture(weights: Sequence[float] | None, count: int) -> Float[Array, " k"]:
    """Checks the weights of models.

    Args:
        weights: K weights, summing to 1; uniform if None.
        count: K.

    Returns:
        The weights.

    Raises:
        ValueError: for weights that do not fit.
    """
    if weights is None:
        return jnp.full(count, 1 / count, float)
    if np.shape(weights) != (count,):
        raise ValueError(f"weights has shape {np.shape(weights)}, but there are {count} models")
    traced = any(isinstance(w, Tracer) for w in (weights, *weights))
    if not traced and not abs(np.sum(weights) - 1) < 1e-3:
        raise ValueError(f"the weights sum to {np.sum(weights)}; divide them by their sum")
    return jnp.asarray(weights, float)


def mixtures(weights: Weights, count: int, leaves: Sequence[Leaf]) -> list[Float[Array, " k"]]:
    """Checks the weights of models, parameter by parameter.

    Args:
        weights: see `Weights`.
        count: K.
        leaves: of the models.

    Returns:
        The weights for each leaf.

    Raises:
        ValueError: for weights that do not fit, naming the key path.
    """
    if not callable(weights):
        return [mixture(weights, count)] * len(leaves)
    found = []
    for leaf in leaves:
        try:
            found.append(mixture(weights(leaf.path), count))
        except ValueError as error:
            raise ValueError(f"{leaf.path}: {error}") from None
    return found


def average_of(
    stacked: PyTree, weights: Float[Array, " k"] | Sequence[Float[Array, " k"]]
) -> PyTree:
    """Averages a stack of models, without checks.

    Args:
        stacked: leaves `[K, ...]`.
        weights: of the models, alike for all leaves or a list of one for each.

    Returns:
        The average. Integers, booleans and keys are those of the model that has all of the weight,
        or of the last.
    """
    leaves, treedef = jax.tree_util.tree_flatten(stacked)
    each = [weights] * len(leaves) if isinstance(weights, jax.Array) else weights
    return treedef.unflatten(map(_mean, leaves, each))


def _mean(x: Array, weights: Float[Array, " k"]) -> Array:
    """Averages one leaf `[K, ...]`."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        alone = weights == 1
        return x[jnp.where(alone.any(), jnp.argmax(alone), len(weights) - 1)]
    # At least float32, so that half-precision models lose nothing to the weights.
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
    w = weights.astype(wide)
    return jnp.tensordot(w, x.astype(wide), axes=1, precision="highest").astype(x.dtype)


# One leaf after the other: they may lie on other devices, and widened they take twice the memory.
@jax.jit
def _mean_of(column: tuple[Array, ...], weights: Float[Array, " k"]) -> Array:
    return _mean(jnp.stack(column), weights)


def fuse(
    symmetry: Symmetry | Sequence[Symmetry],
    models: Sequence[PyTree] | PyTree,
    weights: Weights = None,
    *,
    reference: int = -1,
    method: AbstractMethod = CoordinateDescent(),
    metric: costs.CostFn | None = None,
    solver: AbstractSolver = Exact(),
    leaf_weight: Callable[[str], float] | None = None,
    batch_size: int | None = None,
) -> PyTree:
    """Fuses independently trained models into one: aligns them to a reference and averages.

    The defaults are the best one-shot method we have that needs no data. Alignment and transport
    of the stack run under `jax.vmap`; all of it is jitted. To match by activations, use
    `align(..., features=...)`, `transport` and `average`. To leave groups as they are, fuse with
    `symmetry.only(...)`.

    Args:
        symmetry: of the models; one for each if their widths are not the same.
        models: K >= 2 pytrees, or one pytree with leaves `[K, ...]`.
        weights: K weights, summing to 1; uniform if None. A function of the key path says them
            parameter by parameter, see `average`.
        reference: which model the others are moved onto. As all of them end in its order of units,
            and with its widths, it matters for what the result can be averaged with later.
        method: see `align`.
        metric: see `align`.
        solver: see `align`.
        leaf_weight: see `align`.
        batch_size: how many models are aligned at once under `jax.vmap`. None means all, but on a
            CPU one after the other: it gains nothing there by doing the same thing to many models,
            and each would wait for the slowest. Models of several widths are always aligned one by
            one.

    Returns:
        The fused parameters. Integers, booleans and keys as in `average`, with the reference for
        the last model.

    Raises:
        ValueError: as `align`, and for fewer than two models, weights that do not fit, integers
            that can't be averaged, or an empty batch.
        TypeError: as `align`.
        FloatingPointError: as `align`.

    Warns:
        SymmetryWarning: if the symmetry has no groups: the result is the plain average.
    """
    require_kind(method, AbstractMethod, "method", "CoordinateDescent() or ForwardPass()")
    require_kind(solver, AbstractSolver, "solver", "Exact() or Sinkhorn()")
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ValueError(f"batch_size is {batch_size}; give 1 or more, or None")
    metric = costs.SqEuclidean() if metric is None else metric
    for given in symmetry if isinstance(symmetry, list | tuple) else (symmetry,):
        require_symmetry(given, "fuse(symmetry, models), or with a list of symmetries")
    if not isinstance(symmetry, Symmetry):
        how = {"method": method, "metric": metric, "solver": solver, "leaf_weight": leaf_weight}
        return _fuse_widths(tuple(symmetry), models, weights, reference, how)
    stacked, count = stacked_models(symmetry, models)
    order = _reference_last(reference, count)
    warn_without_groups(symmetry, stacked, "the result is the plain average of the models")
    found = mixtures(weights, count, symmetry.leaves)
    check_integers(symmetry.leaves, jax.tree_util.tree_leaves(stacked), found)
    counting = leaf_weights(symmetry, leaf_weight)
    lanes = min(batch_size or at_once(count), count - 1)
    static = (symmetry, method, solver, counting, lanes)
    fused = _fuse(*static, stacked, order, found, metric)
    require_finite(symmetry.leaves, fused, "fusing")
    return fused


def _reference_last(reference: int, count: int) -> np.ndarray:
    """Puts the reference last, which is where `average_of` takes integers from."""
    if not -count <= reference < count:
        raise ValueError(f"reference is {reference}, but there are {count} models")
    return np.append(np.delete(np.arange(count), reference), reference % count)


def _fuse_widths(
    symmetries: tuple[Symmetry, ...],
    models: Sequence[PyTree],
    weights: Weights,
    reference: int,
    how: dict[str, Any],
) -> PyTree:
    """Fuses models of several widths, one after the other."""
    count = len(symmetries)
    if not isinstance(models, list | tuple) or len(models) != count or count < 2:
        raise ValueError(
            f"{count} symmetries were given; pass a list of as many models, at least two"
        )
    order = _reference_last(reference, count)
    onto, target = symmetries[order[-1]], models[order[-1]]
    found = mixtures(weights, count, onto.leaves)
    moved = []
    for i in order[:-1]:
        symmetry, model = symmetries[i], models[i]
        require_model(symmetry, model, f"model {i}")
        plans = align(symmetry, model, target, onto=onto, **how)
        moved.append(transport(symmetry, plans, model, onto=onto))
    return _averaged(onto.leaves, [*moved, target], [w[order] for w in found], "fusing")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _fuse(
    symmetry: Symmetry,
    method: AbstractMethod,
    solver: AbstractSolver,
    counting: tuple[float, ...] | None,
    batch_size: int,
    stacked: PyTree,
    order: Int[Array, " k"],
    weights: list[Float[Array, " k"]],
    metric: costs.CostFn,
) -> PyTree:
    ordered = jax.tree.map(lambda x: x[order], stacked)
    others, target = jax.tree.map(lambda x: x[:-1], ordered), jax.tree.map(lambda x: x[-1], ordered)
    how: dict[str, Any] = {"method": method, "metric": metric, "solver": solver}
    how["leaf_weight"] = weight_by_path(symmetry, counting)

    def moved(source: PyTree) -> PyTree:
        return transport(symmetry, align(symmetry, source, target, **how), source)

    aligned = map_in_batches(moved, others, batch_size)
    together = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), aligned, target)
    return average_of(together, [w[order] for w in weights])


def stacked_models(symmetry: Symmetry, models: Sequence[PyTree] | PyTree) -> tuple[PyTree, int]:
    """Checks models that are to be fused, and stacks them.

    Args:
        symmetry: of the models.
        models: K >= 2 pytrees, or one pytree with leaves `[K, ...]`.

    Returns:
        The stack, and K.

    Raises:
        ValueError: for models that do not fit, and for fewer than two.
    """
    stacked = _stacked(symmetry, models)
    count = jax.tree_util.tree_leaves(stacked)[0].shape[0]
    if count < 2:
        raise ValueError(f"{count} model given; fusing takes at least two")
    return stacked, count


def _stacked(symmetry: Symmetry, models: Sequence[PyTree] | PyTree) -> PyTree:
    """Tells a list of models from a stack: parameters may themselves be a list."""
    if jax.tree_util.tree_structure(models) == symmetry.treedef:
        leaves = jax.tree_util.tree_leaves(models)
        counts = {np.shape(x)[0] if np.ndim(x) else 0 for x in leaves}
        ranks = {
            np.ndim(x) - len(leaf.shape) for x, leaf in zip(leaves, symmetry.leaves, strict=True)
        }
        if ranks == {1} and len(counts) == 1:
            require_model(symmetry, models, "the stack of models", batch=(counts.pop(),))
            return models
        raise ValueError(
            "one model was given, or a stack whose leaves have no leading axis of one size; pass a "
            "list of models, or leaves of shape [K, ...]"
        )
    if not isinstance(models, list | tuple):
        raise ValueError(
            f"models is a {type(models).__name__} of another structure than the symmetry's; pass a "
            "list of models, or one pytree with leaves [K, ...]"
        )
    _require_alike(models, symmetry)
    return _beside_at_once(list(models))
