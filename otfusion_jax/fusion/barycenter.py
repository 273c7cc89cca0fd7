"""Many models moved to their common mean, rather than onto one of them.

The barycenter minimises, over a permutation of the units of every model, the weighted mean of the
squared distances of the moved models to their mean. `_BarycenterDescent` does it step by step:

1. All models are aligned to the one of the largest norm.
2. One model after the other is aligned to the weighted mean of the others. With these held still,
   the closest permutation to that mean is the best one for the objective too.
3. A round over all models is repeated until it improves the objective no more.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
from ott.geometry import costs

from otfusion_jax.alignment.align import find_plans
from otfusion_jax.alignment.checks import require_settings
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.costs import squared_norm
from otfusion_jax.alignment.leaf_weights import leaf_weights, rescaled
from otfusion_jax.alignment.method import AbstractMethod
from otfusion_jax.averaging.average import average_of, check_integers, mixture
from otfusion_jax.averaging.stacking import in_canonical_form, stacked_models
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.arguments import checked_count, require_function
from otfusion_jax.common.host import Array
from otfusion_jax.common.scaling import common_exponent, restored
from otfusion_jax.common.sharding import laid_out_like
from otfusion_jax.common.typing import PyTree
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.checks import require_finite, require_symmetry, warn_without_groups
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import compose
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import move_all

# The relative improvement by a round below which the descent ends. Rounding alone makes changes of
# about 1e-7 in float32, which must not keep it going.
_LEAST_IMPROVEMENT = 1e-6
# The universe is one of units: maps into it are permutations, which soft plans are not.
_SOLVER = Exact()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Barycenter:
    """Models in a common universe of units, and their mean there.

    Maps from model to model through the universe are consistent: from p to q and on to r is from p
    to r. From p to q it is `compose(symmetry, plans of p, invert(symmetry, plans of q))`.

    Attributes:
        plans: A dict from the name of each group to the permutations of all models into the
            universe, int32 `[K, *batch, n]`; of a group that rotates, orthogonal matrices, float
            `[K, *batch, n, n]`, which move the models in canonical form.
        params: The weighted mean of the models there. Integers, booleans and keys are as in
            `average`.
        history: The weighted mean of the squared distances of the models to their mean, summed over
            all parameters as they count (see `align`): at the start and after every round, float
            `[max_rounds + 1]`. After the last round it stays as it is. It is infinite where it is
            out of range, float64 where any of the models' leaves is, and float32 otherwise.
        converged: Whether no model could be moved any closer to the others, bool `[]`.
    """

    plans: Plans
    params: PyTree
    history: Float[Array, " rounds"]
    converged: Bool[Array, ""]


def barycenter(
    symmetry: Symmetry,
    models: Sequence[PyTree] | PyTree,
    weights: Sequence[float] | None = None,
    *,
    method: AbstractMethod = CoordinateDescent(),
    metric: costs.CostFn | None = None,
    leaf_weight: Callable[[str], float] | None = None,
    max_rounds: int = 20,
) -> Barycenter:
    """Fuses models by moving each to the mean of the others, until nothing improves.

    The start is all models on the one of the largest norm; the order in which they are given does
    not matter. Every step lowers the mean squared distance to the mean, or leaves the model where
    it is. One model after the other is moved, so this takes about as many times as long as `fuse`
    as there are rounds. Jitted; the same inside `jax.jit`.

    Args:
        symmetry: The symmetry that the models were traced with.
        models: The K >= 2 models: a list of pytrees, or one pytree with leaves `[K, ...]`.
        weights: The K weights of the models in the mean, summing to 1; uniform if None.
        method: The method that aligns the models for the start, an instance, see `align`.
        metric: The ground metric between units at the start, see `align`.
        leaf_weight: A function from the key path of a parameter to how much it counts in every
            squared distance, see `align`.
        max_rounds: The number of rounds over all models at most, 1 or more.

    Returns:
        The barycenter: the plans of all models, and their mean once moved along them.

    Raises:
        ValueError: If models do not fit, and for weights, as `fuse`; if `max_rounds` is below 1.
        TypeError: If an argument is of another type, as `fuse`.
        FloatingPointError: If numbers on the way are out of range, as `fuse`.

    Warns:
        SymmetryWarning: If the symmetry has no groups: the result is the plain average.
        StatisticsWarning: If running statistics that differ are averaged, as `fuse`.

    References:
        Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, Algorithm 3 (MergeMany); the
        universe is that of Crisostomi et al., C2M3: Cycle-Consistent Multi-Model Merging, NeurIPS
        2024, whose objective this descends.
    """
    max_rounds = checked_count(max_rounds, "max_rounds", "1 or more")
    require_symmetry(symmetry, "barycenter(symmetry, models)")
    require_settings(method, metric, _SOLVER)
    if metric is None:
        metric = costs.SqEuclidean()
    if leaf_weight is not None:
        require_function(leaf_weight, "barycenter(..., leaf_weight=lambda path: 1.0)")
    stacked, count = stacked_models(symmetry, models)
    warn_without_groups(symmetry, stacked, "the result is the plain average of the models")
    if symmetry.has_form:
        stacked = in_canonical_form(symmetry, stacked, count, stacked=True)
    shares = mixture(weights, count)
    stacked_leaves = jax.tree_util.tree_leaves(stacked)
    check_integers(symmetry.leaves, stacked_leaves, [shares] * len(stacked_leaves))
    warn_of_averaged_statistics(stacked, True, [shares] * len(stacked_leaves))
    weight_of_leaf = leaf_weights(symmetry, leaf_weight, stacked)
    result = _barycenter(symmetry, method, weight_of_leaf, max_rounds, stacked, shares, metric)
    require_finite(symmetry.leaves, result.params, "the barycenter")
    if jax.tree_util.tree_structure(models) == symmetry.treedef:
        return result  # of a stack, no model has a layout of its own
    return dataclasses.replace(result, params=laid_out_like(result.params, models[-1]))


@functools.partial(jax.jit, static_argnames=("symmetry", "method", "weight_of_leaf", "max_rounds"))
def _barycenter(
    symmetry: Symmetry,
    method: AbstractMethod,
    weight_of_leaf: tuple[float, ...] | None,
    max_rounds: int,
    stacked: PyTree,
    weights: Float[Array, " k"],
    metric: costs.CostFn,
) -> Barycenter:
    """Scales and orders the models, descends, and averages the models as they were given."""
    leaves = jax.tree_util.tree_leaves(stacked)
    moving = []
    for array, leaf in zip(leaves, symmetry.leaves, strict=True):
        if leaf.moves:
            moving.append(array)
    # Times a power of two, which is exact, the squares of all parameters are in range.
    exponent = common_exponent(moving)
    in_range = symmetry.treedef.unflatten(rescaled(symmetry.leaves, leaves, -exponent))

    squared_distance = _SquaredDistance(symmetry, weight_of_leaf, _precision_of(moving))
    # In an order of their own, the largest first, so that the one in which the models are given
    # does not matter.
    order = jnp.argsort(-jax.vmap(squared_distance.to_zero)(in_range))
    # Under `jax.disable_jit`, known weights are still an array of NumPy.
    ordered_weights = jnp.asarray(weights)[order]
    descent = _BarycenterDescent(symmetry, weight_of_leaf, ordered_weights, squared_distance)
    plans, history, rounds = descent.run(_at(order, in_range), method, metric, max_rounds)

    plans = _at(jnp.argsort(order), plans)
    # Moved once more, as they were given: not scaled, and in their order, because the integers of
    # an average are those of the last model.
    moved = jax.lax.map(lambda pair: move_all(symmetry, *pair), (plans, stacked))
    converged = ~_improved(history, rounds)
    # Rounds that did not take place get the last value. NaN would say more, but `jax_debug_nans`
    # would take it for a fault.
    took_place = jnp.arange(len(history), dtype=rounds.dtype) <= rounds
    history = jnp.where(took_place, history, history[rounds])
    return Barycenter(plans, average_of(moved, weights), restored(history, exponent, 2), converged)


class _Moved(NamedTuple):
    """All models on their way into the universe, each leaf with a leading axis of the models.

    Attributes:
        plans: The permutations of each model into the universe so far.
        models: The models moved along them.
    """

    plans: Plans
    models: PyTree


# Compared by identity: JAX hashes the methods that it is given, and arrays cannot be hashed.
@dataclasses.dataclass(frozen=True, eq=False)
class _BarycenterDescent:
    """Descends on the weighted mean of the squared distances of some models to their mean.

    Attributes:
        symmetry: The symmetry of the models.
        weight_of_leaf: How much each leaf counts; None counts all alike.
        weights: The weights of the models, in the order in which these are visited.
        squared_distance: What measures the squared distances of models, as their leaves count.
    """

    symmetry: Symmetry
    weight_of_leaf: tuple[float, ...] | None
    weights: Float[Array, " k"]
    squared_distance: "_SquaredDistance"

    def run(
        self, models: PyTree, method: AbstractMethod, metric: costs.CostFn, max_rounds: int
    ) -> tuple[Plans, Float[Array, " rounds"], Int[Array, ""]]:
        """Descends from all models on the first until a round improves nothing.

        Args:
            models: A stack of models, the largest first.
            method: The method that aligns all to the first.
            metric: The ground metric of that method.
            max_rounds: The number of rounds at most.

        Returns:
            The plans of all models; the objective at the start and after every round, to be read as
            far as there have been rounds; and their number.
        """

        def moved_onto_first(model: PyTree) -> _Moved:
            alignment = find_plans(
                self.symmetry,
                self.symmetry,
                model,
                _at(0, models),
                method=method,
                metric=metric,
                solver=_SOLVER,
                weights=self.weight_of_leaf,
            )
            return _Moved(alignment.plans, move_all(self.symmetry, alignment.plans, model))

        def unfinished(loop: tuple[_Moved, Array, Array]) -> Array:
            _, history, rounds = loop
            return (rounds < max_rounds) & _improved(history, rounds)

        def next_round(loop: tuple[_Moved, Array, Array]) -> tuple[_Moved, Array, Array]:
            moved, history, rounds = loop
            moved = jax.lax.fori_loop(0, len(self.weights), self.move_one, moved)
            history = history.at[rounds + 1].set(self.spread(moved.models))
            return moved, history, rounds + 1

        moved = jax.lax.map(moved_onto_first, models)
        history = jnp.full(max_rounds + 1, self.spread(moved.models))
        start = moved, history, jnp.zeros((), jnp.int32)
        moved, history, rounds = jax.lax.while_loop(unfinished, next_round, start)
        return moved.plans, history, rounds

    def move_one(self, number: int | Array, moved: _Moved) -> _Moved:
        """Moves one model as close as possible to the weighted mean of the others."""
        others = self.weights.at[number].set(0)
        # Where it has all of the weight, the others have no mean, and it stays.
        itself = jnp.zeros_like(others).at[number].set(1)
        others = jnp.where(jnp.any(others != 0), others, itself)
        mean = average_of(moved.models, others / jnp.sum(others))
        model = _at(number, moved.models)
        # Descent from where the model is comes no further away from the mean than it is.
        alignment = find_plans(
            self.symmetry,
            self.symmetry,
            model,
            mean,
            method=CoordinateDescent(starts=("identity",)),
            metric=costs.SqEuclidean(),
            solver=_SOLVER,
            weights=self.weight_of_leaf,
        )
        plans = compose(self.symmetry, _at(number, moved.plans), alignment.plans)
        model = move_all(self.symmetry, alignment.plans, model)
        return _Moved(_with(number, moved.plans, plans), _with(number, moved.models, model))

    def spread(self, models: PyTree) -> Float[Array, ""]:
        """Returns the objective: the weighted mean of the squared distances to the mean."""
        mean = average_of(models, self.weights)
        distances = jax.vmap(self.squared_distance.between, in_axes=(0, None))(models, mean)
        return jnp.sum(self.weights.astype(distances.dtype) * distances)


@dataclasses.dataclass(frozen=True)
class _SquaredDistance:
    """Measures squared distances of models, as their leaves count.

    Attributes:
        symmetry: The symmetry of the models.
        weight_of_leaf: How much each leaf counts; None counts all alike.
        dtype: The dtype of the distances.
    """

    symmetry: Symmetry
    weight_of_leaf: tuple[float, ...] | None
    dtype: Any

    def to_zero(self, model: PyTree) -> Float[Array, ""]:
        """Returns the squared norm of a model."""
        total = jnp.zeros((), self.dtype)
        for number, array in enumerate(jax.tree_util.tree_leaves(model)):
            if self.symmetry.leaves[number].moves:
                weight = 1.0 if self.weight_of_leaf is None else self.weight_of_leaf[number]
                total = total + weight * squared_norm(array).astype(self.dtype)
        return total

    def between(self, model: PyTree, other: PyTree) -> Float[Array, ""]:
        """Returns the squared distance of a model to another."""
        arrays, other_arrays = jax.tree_util.tree_leaves(model), jax.tree_util.tree_leaves(other)
        differences = []
        for array, other_array, leaf in zip(
            arrays, other_arrays, self.symmetry.leaves, strict=True
        ):
            # Random keys are among the leaves that do not move, and have no difference.
            differences.append(array - other_array if leaf.moves else array)
        return self.to_zero(differences)


def _precision_of(arrays: Sequence[Array]) -> Any:
    """Returns float64 if any array has that precision, and float32 otherwise."""
    for array in arrays:
        if array.dtype in (jnp.float64, jnp.complex128):
            return jnp.float64
    return jnp.float32


def _improved(history: Float[Array, " rounds"], rounds: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the last round improved the objective; before the first, it may."""
    # Before the first round this reads the start, a valid index whose result is not used.
    before = history[jnp.maximum(rounds - 1, 0)]
    return (rounds == 0) | (history[rounds] < (1 - _LEAST_IMPROVEMENT) * before)


def _at(index: int | Array, stacked: PyTree) -> PyTree:
    """Takes one entry, or several, of every leaf of a stack."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _with(index: int | Array, stacked: PyTree, entry: PyTree) -> PyTree:
    """Replaces one entry of every leaf of a stack."""
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), stacked, entry)
