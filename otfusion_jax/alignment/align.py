"""Aligning one model to another: checks, and the jitted call of a method."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree
from ott.geometry import costs

from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.leaf_weights import leaf_weights, rescaled, weighted
from otfusion_jax.alignment.problem import AbstractMethod, Alignment, AlignmentProblem
from otfusion_jax.common.arguments import require_kind
from otfusion_jax.common.scaling import common_exponent, not_finite, restored
from otfusion_jax.solvers.base import AbstractSolver, is_distribution
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.checks import require_model, require_symmetry, warn_without_groups
from otfusion_jax.symmetry.correspondence import match_groups
from otfusion_jax.symmetry.plans import is_permutation
from otfusion_jax.symmetry.symmetry import Symmetry


def align(
    symmetry: Symmetry,
    source: PyTree,
    target: PyTree,
    *,
    onto: Symmetry | None = None,
    method: AbstractMethod = CoordinateDescent(),
    metric: costs.CostFn | None = None,
    solver: AbstractSolver = Exact(),
    grams: dict[str, Gram] | None = None,
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
        grams: inner products of activations (`feature_gram`), to match by activations instead
            of weights. For a quadratic solver, taken with `intra=True`.
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
    onto = symmetry if onto is None else match_groups(symmetry, onto)
    require_model(onto, target, "the target")
    warn_without_groups(symmetry, (source, target), "the alignment is empty")
    _check_widths(symmetry, onto)
    _check_grams(symmetry, onto, grams)
    masses = _pair(marginals)
    _check_marginals(symmetry, onto, masses)
    metric = costs.SqEuclidean() if metric is None else metric
    parts = [symmetry.split(source), onto.split(target)]
    weights = leaf_weights(symmetry, leaf_weight)
    found = _align(symmetry, onto, method, solver, weights, *parts, metric, grams, masses)
    _check_solved(found)
    return found


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
    grams: dict[str, Gram] | None,
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
    problem = AlignmentProblem(symmetry, onto, source, target, metric, solver, marginals)
    if not symmetry.groups:
        distance = problem.distance({})
        found = Alignment({}, distance, distance[None], jnp.array(True), {})
    else:
        found = method.run(problem, grams)
    degree = method.cost_degree(metric, grams is not None)
    objective, history = restored((found.objective, found.history), k, 2)
    gaps = restored(found.gaps, k, degree)
    return dataclasses.replace(found, objective=objective, history=history, gaps=gaps)


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


def _check_grams(symmetry: Symmetry, onto: Symmetry, grams: dict[str, Gram] | None) -> None:
    if grams is None:
        return
    strange = (
        {}
        if not isinstance(grams, dict)
        else {name: x for name, x in grams.items() if not isinstance(x, Gram)}
    )
    if strange or not isinstance(grams, dict):
        found = ", ".join(f"{n}: {type(x).__name__}" for n, x in strange.items())
        raise TypeError(
            "features are inner products by the names of groups, as feature_gram(symmetry, fn, "
            "source, target, batches) returns them; activations, as features(...) returns them, do "
            f"not do: got {found or type(grams).__name__}"
        )
    wrong = [f"  {g.name}: missing" for g in symmetry.groups if g.name not in grams]
    for group, other in zip(symmetry.groups, onto.groups, strict=True):
        batch, n, m = group.batch, group.size, other.size
        shape = (*batch, n, other.batch[-1], m) if group.outer else (*batch, n, m)
        if group.name in grams and grams[group.name].cross.shape != shape:
            wrong.append(f"  {group.name}: shape {grams[group.name].cross.shape}, expected {shape}")
        elif group.name in grams and _overflowed(grams[group.name]):
            wrong.append(f"  {group.name}: not finite, activations or their squares overflow")
    if wrong:
        raise ValueError("these features do not fit the symmetry's groups:\n" + "\n".join(wrong))


def _overflowed(g: Gram) -> bool:
    return any(not_finite(x) for x in jax.tree.leaves(g) if not isinstance(x, Tracer))
