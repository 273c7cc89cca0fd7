"""Fusing networks that were trained apart: align all of them to one, then average.

`fuse` checks its arguments and tells cases apart. Known models of one symmetry are moved one by
one, in small programs that equal leaves share (`_Fusion.one_by_one`); several at once, or what is
traced, are a stack and one jitted program (`_Fusion.in_batches`). Models of several widths cannot
be stacked: `_fuse_widths` moves them onto the reference one by one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ott.geometry import costs

from otfusion_jax.alignment.align import align, find_plans
from otfusion_jax.alignment.checks import require_settings
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.leaf_weights import leaf_weights
from otfusion_jax.alignment.method import AbstractMethod
from otfusion_jax.averaging.average import (
    Weights,
    average_of,
    check_integers,
    checked_average,
    mixtures,
)
from otfusion_jax.averaging.stacking import (
    checked_models,
    in_canonical_form,
    stack_at_once,
    unstacked,
)
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.arguments import checked_count, checked_position, require_function
from otfusion_jax.common.batching import at_once, map_in_batches
from otfusion_jax.common.host import Array, as_numpy
from otfusion_jax.common.known import all_known
from otfusion_jax.common.typing import PyTree
from otfusion_jax.solvers.base import AbstractSolver
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.canonical import canonical
from otfusion_jax.symmetry.checks import (
    require_finite,
    require_model,
    require_symmetry,
    warn_without_groups,
)
from otfusion_jax.symmetry.plans import require_movable
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import move_all, transport


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

    The defaults are the best one-shot method we have that needs no data. Models are aligned one
    after the other by jitted steps, or several at once under `jax.vmap`. To match by activations,
    use `align(..., grams=...)`, `transport` and `average`. To leave groups as they are, fuse with
    `symmetry.only(...)`.

    Args:
        symmetry: The symmetry that the models were traced with; a list with one for each model if
            their widths are not the same. With rotations, as `symmetry.with_rotations()` allows
            them, models are brought into canonical form before, and the result is in it.
        models: The K >= 2 models to be fused: a list of pytrees, or one pytree with leaves
            `[K, ...]`. With a list of symmetries, a list of pytrees.
        weights: The K weights of the models in the average, summing to 1; uniform if None. A
            function from the key path of a parameter to K weights sets them parameter by
            parameter, see `average`.
        reference: The position of the model that the others are moved onto; a negative one counts
            from the end. All models end in its order of units, and with its widths, so it matters
            for what the result can be averaged with later.
        method: The method that aligns the models, an instance, see `align`.
        metric: The ground metric between units, see `align`.
        solver: The solver that turns costs into plans, an instance, see `align`.
        leaf_weight: A function from the key path of a parameter to how much it counts in the
            alignment, see `align`.
        batch_size: The number of models that are aligned at once under `jax.vmap`. None means all,
            but on a CPU one after the other: it gains nothing there by doing the same thing to
            many models, and each would wait for the slowest. Models of several widths are always
            aligned one by one.

    Returns:
        The fused parameters, a pytree of the reference's structure, shapes and dtypes. Integers,
        booleans and keys are as in `average`, with the reference for the last model.

    Raises:
        ValueError: If models do not fit the symmetry or are not finite, listing every offender by
            key path; if there are fewer than two; if the weights do not fit; if integers can't be
            averaged; if `reference` is out of range or `batch_size` is below 1; and as `align`.
        TypeError: If an argument is of another type: a class in place of an instance, a name in
            place of a method or a metric, a float in place of a position; and as `align`.
        FloatingPointError: If numbers on the way are out of range, as `align`.

    Warns:
        SymmetryWarning: If the symmetry has no groups: the result is the plain average.
        StatisticsWarning: If running statistics of batch normalisation that differ are averaged,
            listing each by key path: estimate them anew, see `estimate_statistics`.
    """
    require_settings(method, metric, solver)
    if metric is None:
        metric = costs.SqEuclidean()
    reference = checked_position(reference, "reference")
    if batch_size is not None:
        batch_size = checked_count(batch_size, "batch_size", "1 or more, or None")
    if leaf_weight is not None:
        require_function(leaf_weight, "fuse(..., leaf_weight=lambda path: 1.0)")
    several = isinstance(symmetry, list | tuple)
    for given in symmetry if several else (symmetry,):
        require_symmetry(given, "fuse(symmetry, models), or with a list of symmetries")

    if not isinstance(symmetry, Symmetry):
        return _fuse_widths(
            symmetry,
            models,
            weights,
            reference=reference,
            method=method,
            metric=metric,
            solver=solver,
            leaf_weight=leaf_weight,
        )
    models, count, stacked = checked_models(symmetry, models)
    models = as_numpy(models)
    if symmetry.has_form:
        models = in_canonical_form(symmetry, models, count, stacked)
    order = _reference_last(reference, count)
    warn_without_groups(symmetry, models, "the result is the plain average of the models")
    shares = mixtures(weights, count, symmetry.leaves)
    fusion = _Fusion(
        symmetry=symmetry,
        method=method,
        solver=solver,
        # Evaluated here: numbers are hashable, so that a new lambda of the same weights does not
        # compile the program again.
        weight_of_leaf=leaf_weights(symmetry, leaf_weight, models if stacked else models[0]),
    )
    # The reference is not aligned, so that there is one model less to work on.
    batch_size = min(batch_size or at_once(count), count - 1)
    if batch_size == 1 and all_known(models):
        models = unstacked(models, count) if stacked else models
        return fusion.one_by_one(models, order, shares, metric)
    stack = models if stacked else stack_at_once(list(models))
    check_integers(symmetry.leaves, jax.tree_util.tree_leaves(stack), shares)
    warn_of_averaged_statistics(stack, True, shares)
    fused = fusion.in_batches(stack, order, shares, metric, batch_size)
    require_finite(symmetry.leaves, fused, "fusing")
    return fused


def _reference_last(reference: int, count: int) -> np.ndarray:
    """Returns the positions of all models with that of the reference last.

    An average takes its integers, booleans and keys from the last model, and these are to be those
    of the reference.
    """
    if not -count <= reference < count:
        raise ValueError(f"reference is {reference}, but there are {count} models")
    others = np.delete(np.arange(count), reference)
    return np.append(others, reference % count)


def _fuse_widths(
    symmetries: Sequence[Symmetry],
    models: Any,
    weights: Any,
    *,
    reference: int,
    method: AbstractMethod,
    metric: costs.CostFn,
    solver: AbstractSolver,
    leaf_weight: Callable[[str], float] | None,
) -> PyTree:
    """Fuses models of several widths, one after the other."""
    count = len(symmetries)
    if not isinstance(models, list | tuple) or len(models) != count or count < 2:
        raise ValueError(
            f"{count} symmetries were given; pass a list of as many models, at least two"
        )
    # Checked here by their numbers: `align` would call them the source and the target.
    in_form = []
    for number, model in enumerate(models):
        require_model(symmetries[number], model, f"model {number}")
        in_form.append(
            canonical(symmetries[number], model, f"model {number}")
            if symmetries[number].has_form
            else model
        )
    models = in_form
    order = _reference_last(reference, count)
    # Of the reference are the widths, the order of units and, in an average, the integers.
    onto, target = symmetries[order[-1]], models[order[-1]]
    shares = mixtures(weights, count, onto.leaves)
    moved = []
    for number in order[:-1]:
        source_symmetry, source = symmetries[number], models[number]
        alignment = align(
            source_symmetry,
            source,
            target,
            onto=onto,
            method=method,
            metric=metric,
            solver=solver,
            leaf_weight=leaf_weight,
        )
        moved.append(transport(source_symmetry, alignment, source, onto=onto))
    ordered_shares = [leaf_shares[order] for leaf_shares in shares]
    warn_of_averaged_statistics([*moved, target], False, ordered_shares)
    return checked_average(onto.leaves, [*moved, target], ordered_shares, "fusing")


@dataclasses.dataclass(frozen=True)
class _Fusion:
    """How models of one symmetry are fused: all that is static.

    Attributes:
        symmetry: The symmetry of the models.
        method: The method that aligns them.
        solver: The solver that turns costs into plans.
        weight_of_leaf: How much each leaf counts in the alignment; None counts all alike.
    """

    symmetry: Symmetry
    method: AbstractMethod
    solver: AbstractSolver
    weight_of_leaf: tuple[float, ...] | None

    def moved_onto(self, target: PyTree, source: PyTree, metric: costs.CostFn) -> PyTree:
        """Aligns one model to another, and moves it there."""
        alignment = find_plans(
            self.symmetry,
            self.symmetry,
            source,
            target,
            method=self.method,
            metric=metric,
            solver=self.solver,
            weights=self.weight_of_leaf,
        )
        require_movable(self.symmetry, alignment.plans)
        return move_all(self.symmetry, alignment.plans, source)

    def one_by_one(
        self,
        models: Sequence[PyTree],
        order: np.ndarray,
        shares: list[Float[Array, " k"]],
        metric: costs.CostFn,
    ) -> PyTree:
        """Moves models onto one of them, the last in `order`, one after the other, and averages."""
        target = models[order[-1]]
        moved = []
        for number in order[:-1]:
            moved.append(self.moved_onto(target, models[number], metric))
        # The reference goes last: integers, booleans and keys are taken from there.
        ordered_shares = [leaf_shares[order] for leaf_shares in shares]
        # As they were moved: copies of one network have the same statistics then.
        warn_of_averaged_statistics([*moved, target], False, ordered_shares)
        return checked_average(self.symmetry.leaves, [*moved, target], ordered_shares, "fusing")

    @functools.partial(jax.jit, static_argnames=("self", "batch_size"))
    def in_batches(
        self,
        stack: PyTree,
        order: Int[Array, " k"],
        shares: list[Float[Array, " k"]],
        metric: costs.CostFn,
        batch_size: int,
    ) -> PyTree:
        """Moves a stack of models onto one of them, the last in `order`, and averages."""
        # Loops in place of `jax.tree.map`: whoever steps through sees one leaf after the other.
        source_leaves, target_leaves = [], []
        for leaf in jax.tree_util.tree_leaves(stack):
            ordered = leaf[order]
            source_leaves.append(ordered[:-1])
            target_leaves.append(ordered[-1])
        sources = self.symmetry.treedef.unflatten(source_leaves)
        target = self.symmetry.treedef.unflatten(target_leaves)

        def moved_onto_target(source: PyTree) -> PyTree:
            return self.moved_onto(target, source, metric)

        # A model at a time, or several under one `jax.vmap`: more at once take more memory.
        moved = map_in_batches(moved_onto_target, sources, batch_size)
        # The reference goes last, as in `order`.
        aligned_leaves = []
        for moved_leaf, target_leaf in zip(
            jax.tree_util.tree_leaves(moved), target_leaves, strict=True
        ):
            aligned_leaves.append(jnp.concatenate([moved_leaf, target_leaf[None]]))
        ordered_shares = [leaf_shares[order] for leaf_shares in shares]
        return average_of(self.symmetry.treedef.unflatten(aligned_leaves), ordered_shares)
