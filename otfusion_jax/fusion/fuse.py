"""Averages of models: plain, and after alignment."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from ott.geometry import costs

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.leaf_weights import leaf_weights, weight_by_path
from otfusion_jax.alignment.problem import AbstractMethod
from otfusion_jax.averaging.average import (
    Weights,
    average_of,
    check_integers,
    checked_average,
    mixtures,
)
from otfusion_jax.averaging.stacking import stacked_models
from otfusion_jax.common.arguments import require_kind
from otfusion_jax.common.batching import at_once, map_in_batches
from otfusion_jax.solvers.base import AbstractSolver
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.checks import (
    require_finite,
    require_model,
    require_symmetry,
    warn_without_groups,
)
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport


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
    return checked_average(onto.leaves, [*moved, target], [w[order] for w in found], "fusing")


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
