"""Many models moved to their common mean, rather than onto one of them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree
from ott.geometry import costs

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.costs import squared_norm
from otfusion_jax.alignment.leaf_weights import leaf_weights, rescaled, weight_by_path
from otfusion_jax.alignment.problem import AbstractMethod
from otfusion_jax.averaging.average import average_of, check_integers, mixture
from otfusion_jax.averaging.stacking import stacked_models
from otfusion_jax.common.arguments import require_kind
from otfusion_jax.common.scaling import common_exponent, restored
from otfusion_jax.symmetry.checks import require_finite, require_symmetry, warn_without_groups
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import compose
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport

_LEAST = 1e-6  # relative, of an improvement that counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Barycenter:
    """Models in a common universe of units, and their mean there.

    Maps from model to model through the universe are consistent: from p to q and on to r is from p
    to r. From p to q it is `compose(symmetry, plans of p, invert(symmetry, plans of q))`.

    Attributes:
        plans: group name to the permutations of all models into the universe, int32
            `[K, *batch, n]`.
        params: the weighted mean of the models there. Integers, booleans and keys as in `average`.
        history: the weighted mean of the squared distances of the models to their mean, summed over
            all parameters: at the start and after every round, float `[max_rounds + 1]`, which
            stays as it is after the last; infinite if out of range.
        converged: whether no model could be moved any closer to the others.
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
        symmetry: of the models.
        models: K >= 2 pytrees, or one pytree with leaves `[K, ...]`.
        weights: K weights, summing to 1; uniform if None.
        method: aligns the models for the start, see `align`.
        metric: of the start, see `align`.
        leaf_weight: see `align`.
        max_rounds: how often to go over all models at most.

    Returns:
        The barycenter.

    Raises:
        ValueError: as `fuse`, and for fewer than one round.
        TypeError: as `fuse`.
        FloatingPointError: as `fuse`.

    Warns:
        SymmetryWarning: if the symmetry has no groups: the result is the plain average.

    References:
        Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, Algorithm 3 (MergeMany); the
        universe is that of Crisostomi et al., C2M3: Cycle-Consistent Multi-Model Merging, NeurIPS
        2024, whose objective this descends.
    """
    if not isinstance(max_rounds, int) or max_rounds < 1:
        raise ValueError(f"max_rounds is {max_rounds}; give 1 or more")
    require_symmetry(symmetry, "barycenter(symmetry, models)")
    require_kind(method, AbstractMethod, "method", "CoordinateDescent() or ForwardPass()")
    stacked, count = stacked_models(symmetry, models)
    warn_without_groups(symmetry, stacked, "the result is the plain average of the models")
    shares = mixture(weights, count)
    columns = jax.tree_util.tree_leaves(stacked)
    check_integers(symmetry.leaves, columns, [shares] * len(columns))
    counting = leaf_weights(symmetry, leaf_weight)
    metric = costs.SqEuclidean() if metric is None else metric
    found = _barycenter(symmetry, method, counting, max_rounds, stacked, shares, metric)
    require_finite(symmetry.leaves, found.params, "the barycenter")
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _barycenter(
    symmetry: Symmetry,
    method: AbstractMethod,
    counting: tuple[float, ...] | None,
    max_rounds: int,
    stacked: PyTree,
    weights: Float[Array, " k"],
    metric: costs.CostFn,
) -> Barycenter:
    how: dict[str, Any] = {"leaf_weight": weight_by_path(symmetry, counting)}
    counted = counting or (1.0,) * len(symmetry.leaves)

    def squared(a: PyTree, b: PyTree | None = None) -> Array:
        """Squared distance of a model to another, or its squared norm, as leaves count."""
        mine = jax.tree_util.tree_leaves(a)
        others = [0.0] * len(mine) if b is None else jax.tree_util.tree_leaves(b)
        total = jnp.zeros((), jnp.float32)
        for x, y, weight, leaf in zip(mine, others, counted, symmetry.leaves, strict=True):
            if leaf.moves:
                total = total + weight * squared_norm(x - y).astype(jnp.float32)
        return total

    leaves, treedef = jax.tree_util.tree_flatten(stacked)
    k = common_exponent(x for x, leaf in zip(leaves, symmetry.leaves, strict=True) if leaf.moves)
    near = treedef.unflatten(
        rescaled(symmetry.leaves, leaves, -k)
    )  # the squares of these are in range
    # In an order of their own, so that the one in which they are given does not matter.
    order = jnp.argsort(-jax.vmap(squared)(near))
    models, shares = _at(order, near), weights[order]

    def start(model: PyTree) -> tuple[Plans, PyTree]:
        plans = align(symmetry, model, _at(0, models), method=method, metric=metric, **how).plans
        return plans, transport(symmetry, plans, model)

    def visit(k: int | Array, state: tuple[Plans, PyTree]) -> tuple[Plans, PyTree]:
        plans, moved = state
        others = shares.at[k].set(0)
        mean = average_of(moved, others / jnp.sum(others))
        descent = CoordinateDescent(starts=("identity",))
        found = align(symmetry, _at(k, moved), mean, method=descent, **how).plans
        total = compose(symmetry, _at(k, plans), found)
        mine = transport(symmetry, found, _at(k, moved))
        return tuple(
            jax.tree.map(lambda x, y: x.at[k].set(y), x, y)
            for x, y in ((plans, total), (moved, mine))
        )

    def spread(moved: PyTree) -> Array:
        mean = average_of(moved, shares)
        return jnp.sum(shares * jax.vmap(squared, (0, None))(moved, mean))

    def improved(history: Array, done: Array) -> Array:
        before = history[jnp.maximum(done - 1, 0)]
        return (done == 0) | (history[done] < (1 - _LEAST) * before)

    def unfinished(loop: tuple[Any, Array, Array]) -> Array:
        _, history, done = loop
        return (done < max_rounds) & improved(history, done)

    def sweep(loop: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        state, history, done = loop
        state = jax.lax.fori_loop(0, len(shares), visit, state)
        return state, history.at[done + 1].set(spread(state[1])), done + 1

    plans, moved = jax.lax.map(start, models)
    history = jnp.full(max_rounds + 1, spread(moved))
    loop = (plans, moved), history, jnp.zeros((), jnp.int32)
    (plans, _), history, done = jax.lax.while_loop(unfinished, sweep, loop)
    plans = _at(jnp.argsort(order), plans)
    # Of the models as they were given: in their order, for the integers, and not scaled.
    moved = jax.lax.map(lambda pair: transport(symmetry, *pair), (plans, stacked))
    # No NaN to fill it up: `jax_debug_nans` would take it for a fault.
    filled = jnp.where(jnp.arange(len(history)) > done, history[done], history)
    history, converged = restored(filled, k, 2), ~improved(history, done)
    return Barycenter(plans, average_of(moved, weights), history, converged)


def _at(index: int | np.ndarray | Array, stacked: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[index], stacked)
