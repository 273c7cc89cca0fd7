"""Aligning one model to another: checks, and the jitted call of a method."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree
from ott.geometry import costs

from otfusion_jax.checks import (
    require_kind,
    require_model,
    require_symmetry,
    warn_without_groups,
)
from otfusion_jax.costs import Gram
from otfusion_jax.methods import AbstractMethod, Alignment, CoordinateDescent, Problem
from otfusion_jax.scaling import all_scaled, common_exponent, not_finite, restored
from otfusion_jax.solvers import AbstractSolver, Exact, is_distribution
from otfusion_jax.symmetry import Leaf, Symmetry
from otfusion_jax.transport import is_permutation
from otfusion_jax.widths import matched


def align(
    symmetry: Symmetry,
    source: PyTree,
    target: PyTree,
    *,
    onto: Symmetry | None = None,
    method: AbstractMethod = CoordinateDescent(),
    metric: costs.CostFn | None = None,
    solver: AbstractSolver = Exact(),
    features: dict[str, Gram] | None = None,
    marginals: tuple[dict[str, Array], dict[str, Array]] | None = None,
    leaf_weight: Callable[[str], float] | None = None,
) -> Alignment:
    """Finds plans that move the units of a source model onto those of a target.

    Jitted; the same inside `jax.jit`, and under `jax.vmap` over stacks of models.

    Args:
        symmetry: of the source, and of the target too unless `onto` is given.
        source: parameters of the model to be moved.
        target: parameters of the model to be matched.
        onto: symmetry of the target, if its widths are others than the source's. Groups are matched
            by structure; plans between groups of different sizes are float `[n, m]`.
        method: `CoordinateDescent()` or `ForwardPass()`.
        metric: ground metric between units, an ott cost function; None means
            `ott.geometry.costs.SqEuclidean()`. Coordinate descent always uses that one for its
            objective.
        solver: from cost to plan: `Exact()`, or `Sinkhorn()` for soft plans. Groups with others
            nested in them (heads) are always matched exactly.
        features: inner products of activations (`feature_gram`), to match by activations instead
            of weights. For a quadratic solver, taken with `within=True`.
        marginals: masses of the source's units and of the target's, by the names of groups, float
            `[*batch, n]` and `[*batch, m]`, each summing to 1 over the last axis (see
            `weight_importance`, `feature_importance`). Groups that are left out have uniform
            masses.
        leaf_weight: from the key path of a parameter to how much it counts: its share of every
            squared distance between units is multiplied by this, 0 leaves it out. None counts all
            alike. Batch norm's running statistics are best left out: their scale says nothing of
            what units do, as in `lambda path: not path.startswith("batch_stats")`.

    Returns:
        The alignment; pass it to `transport`.

    Raises:
        ValueError: if a model does not fit the symmetry or is not finite, listing every offender by
            key path; if features do not fit the groups; if a leaf weight is negative or not finite;
            if method and solver do not go together.
            Inside `jax.jit` values can't be looked at: there non-finite weights give a model of NaN
            and `converged` False.
        TypeError: for shapes in place of arrays, and arguments of other types.
        FloatingPointError: if the costs of finite models are out of range. With a solver that is
            scale-free, as all are by default, weights of any size are in range.

    Warns:
        SymmetryWarning: if the symmetry has no groups.
    """
    for given in (symmetry, symmetry if onto is None else onto):
        require_symmetry(given, "align(symmetry, source, target, onto=symmetry_of_the_target)")
    require_kind(method, AbstractMethod, "method", "CoordinateDescent() or ForwardPass()")
    require_kind(solver, AbstractSolver, "solver", "Exact() or Sinkhorn()")
    require_model(symmetry, source, "the source")
    onto = symmetry if onto is None else matched(symmetry, onto)
    require_model(onto, target, "the target")
    warn_without_groups(symmetry, (source, target), "the alignment is empty")
    _check_widths(symmetry, onto)
    _check_features(symmetry, onto, features)
    masses = _pair(marginals)
    _check_marginals(symmetry, onto, masses)
    metric = costs.SqEuclidean() if metric is None else metric
    parts = [symmetry.split(source), onto.split(target)]
    weights = leaf_weights(symmetry, leaf_weight)
    found = _align(symmetry, onto, method, solver, weights, *parts, metric, features, masses)
    _check_solved(found)
    return found


def leaf_weights(
    symmetry: Symmetry, leaf_weight: Callable[[str], float] | None
) -> tuple[float, ...] | None:
    """Evaluates the weights of leaves, so that they can be static.

    Args:
        symmetry: whose leaves.
        leaf_weight: from key path to weight.

    Returns:
        One weight per leaf, or None.

    Raises:
        ValueError: for weights that are negative or not finite, listing every one.
    """
    if leaf_weight is None:
        return None
    weights = {leaf.path: float(leaf_weight(leaf.path)) for leaf in symmetry.leaves}
    wrong = [f"  {path}: {w}" for path, w in weights.items() if not (w >= 0 and math.isfinite(w))]
    if wrong:
        raise ValueError("these leaf weights are negative or not finite:\n" + "\n".join(wrong))
    return tuple(weights.values())


def weight_by_path(
    symmetry: Symmetry, weights: tuple[float, ...] | None
) -> Callable[[str], float] | None:
    """Turns what `leaf_weights` returns back into what it takes.

    Args:
        symmetry: whose leaves.
        weights: one per leaf, or None.

    Returns:
        From key path to weight, or None.
    """
    if weights is None:
        return None
    paths = (leaf.path for leaf in symmetry.leaves)
    return dict(zip(paths, weights, strict=True)).__getitem__


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _align(
    symmetry: Symmetry,
    onto: Symmetry,
    method: AbstractMethod,
    solver: AbstractSolver,
    weights: tuple[float, ...] | None,
    source: list[Any],
    target: list[Any],
    metric: costs.CostFn,
    features: dict[str, Gram] | None,
    marginals: tuple[dict[str, Array], dict[str, Array]],
) -> Alignment:
    if weights is not None:
        source, target = (weighted(symmetry, parts, weights) for parts in (source, target))
    k = jnp.zeros((), jnp.int32)
    if solver.scale_free:  # of large and of small weights alike the squares are in range then
        k = common_exponent(
            x for x, leaf in zip((*source, *target), 2 * symmetry.parts, strict=True) if leaf.moves
        )
        source, target = (rescaled(symmetry.parts, parts, -k) for parts in (source, target))
    problem = Problem(symmetry, onto, source, target, metric, solver, marginals)
    if not symmetry.groups:
        distance = problem.distance({})
        found = Alignment({}, distance, distance[None], jnp.array(True), {})
    else:
        found = method.run(problem, features)
    degree = method.cost_degree(metric, features is not None)
    objective, history = restored((found.objective, found.history), k, 2)
    gaps = restored(found.gaps, k, degree)
    return dataclasses.replace(found, objective=objective, history=history, gaps=gaps)


def rescaled(leaves: Sequence[Leaf], arrays: Sequence[Any], k: Array) -> list[Any]:
    """Multiplies all parameters that move by a power of two.

    Args:
        leaves: what is known of the parameters.
        arrays: the parameters, or stacks of them.
        k: the exponent.

    Returns:
        The parameters, each times `2**k`.
    """
    pairs = list(zip(arrays, leaves, strict=True))
    moving = iter(all_scaled([jnp.asarray(x) for x, leaf in pairs if leaf.moves], k))
    return [next(moving) if leaf.moves else x for x, leaf in pairs]


def weighted(symmetry: Symmetry, parts: list[Any], weights: tuple[float, ...]) -> list[Any]:
    """Scales parameters, so that their squared distances are weighted.

    Args:
        symmetry: whose parameters.
        parts: the parameters, as `Symmetry.split` takes them apart.
        weights: one per leaf.

    Returns:
        The parameters, each by the square root of its weight.
    """
    found = []
    for x, part, leaf in zip(parts, symmetry.parts, symmetry.leaf_of, strict=True):
        if part.moves and weights[leaf] != 1:
            x = jnp.asarray(x) * jnp.asarray(math.sqrt(weights[leaf]), part.dtype)
        found.append(x)
    return found


def _check_widths(symmetry: Symmetry, onto: Symmetry) -> None:
    """Refuses what has no rectangular plan."""
    wrong = []
    for group, other in zip(symmetry.groups, onto.groups, strict=True):
        both = [m.path for m in group.members if m.role == "both"]
        if both and group.size != other.size:
            wrong.append(f"  {group.name}: {', '.join(both)} both produce and consume the units")
    if wrong:
        raise ValueError(
            "these groups need as many units in the target as in the source; give each of the two "
            "uses (an embedding, the output layer) a leaf of its own:\n" + "\n".join(wrong)
        )


def _check_marginals(
    symmetry: Symmetry, onto: Symmetry, marginals: tuple[dict[str, Array], dict[str, Array]]
) -> None:
    around = {group.outer for group in symmetry.groups}
    wrong = []
    for side, groups, masses in zip(("source", "target"), (symmetry, onto), marginals, strict=True):
        known = {g.name: (*g.batch, g.size) for g in groups.groups}
        for name, found in masses.items():
            if name not in known:
                wrong.append(f"  {name}: no such group")
            elif name in around:
                wrong.append(f"  {name}: has groups nested in it, and is matched one to one")
            elif jnp.shape(found) != known[name]:
                wrong.append(
                    f"  {name}: shape {jnp.shape(found)} for the {side}, expected {known[name]}"
                )
            elif not isinstance(found, Tracer):
                with jax.ensure_compile_time_eval():  # it may be closed over by what is traced
                    if not is_distribution(jnp.asarray(found)):
                        wrong.append(f"  {name}: of the {side}; masses are at least 0 and sum to 1")
    if wrong:
        raise ValueError("these marginals do not fit the groups:\n" + "\n".join(wrong))


def _pair(marginals: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    if marginals is None:
        return {}, {}
    pair = isinstance(marginals, tuple | list) and len(marginals) == 2
    if not pair or not all(isinstance(side, dict) for side in marginals):
        raise TypeError(
            "marginals are a pair of dicts, the masses of the source's units and of the target's: "
            "(weight_importance(symmetry, source), weight_importance(symmetry, target)), or {} for "
            "a side that is uniform"
        )
    return marginals[0], marginals[1]


def _check_solved(found: Alignment) -> None:
    """Refuses plans of costs that were out of range."""
    wrong = []
    for name, plan in found.plans.items():
        if isinstance(plan, Tracer):
            continue
        if is_permutation(plan):
            bad = np.any(np.asarray(plan) >= plan.shape[-1])
        else:
            bad = not_finite(plan)
        if bad:
            wrong.append(f"  {name}")
    if wrong:
        raise FloatingPointError(
            "the ground costs of these groups are not finite, though the models are: their squares "
            "are out of range. Scale parameters or features, or compute in float64 "
            "(jax_enable_x64):\n" + "\n".join(wrong)
        )


def _check_features(symmetry: Symmetry, onto: Symmetry, features: dict[str, Gram] | None) -> None:
    if features is None:
        return
    strange = (
        {}
        if not isinstance(features, dict)
        else {name: x for name, x in features.items() if not isinstance(x, Gram)}
    )
    if strange or not isinstance(features, dict):
        found = ", ".join(f"{n}: {type(x).__name__}" for n, x in strange.items())
        raise TypeError(
            "features are inner products by the names of groups, as feature_gram(symmetry, fn, "
            "source, target, batches) returns them; activations, as features(...) returns them, do "
            f"not do: got {found or type(features).__name__}"
        )
    wrong = [f"  {g.name}: missing" for g in symmetry.groups if g.name not in features]
    for group, other in zip(symmetry.groups, onto.groups, strict=True):
        batch, n, m = group.batch, group.size, other.size
        shape = (*batch, n, other.batch[-1], m) if group.outer else (*batch, n, m)
        if group.name in features and features[group.name].ab.shape != shape:
            wrong.append(f"  {group.name}: shape {features[group.name].ab.shape}, expected {shape}")
        elif group.name in features and _overflowed(features[group.name]):
            wrong.append(f"  {group.name}: not finite, activations or their squares overflow")
    if wrong:
        raise ValueError("these features do not fit the symmetry's groups:\n" + "\n".join(wrong))


def _overflowed(g: Gram) -> bool:
    return any(not_finite(x) for x in jax.tree.leaves(g) if not isinstance(x, Tracer))
