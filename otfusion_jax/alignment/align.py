"""Aligning one model to another: the public function, and the call of a method."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from ott.geometry import costs

from otfusion_jax.alignment.checks import (
    require_finite_plans,
    require_grams,
    require_marginals,
    require_method_for_marginals,
    require_rectangular_plans,
    require_settings,
)
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.leaf_weights import leaf_weights
from otfusion_jax.alignment.method import AbstractMethod, Alignment
from otfusion_jax.alignment.pair_sums import PairSums, sums_of_models
from otfusion_jax.alignment.problem import Marginals, set_up_problem
from otfusion_jax.common.arguments import require_function
from otfusion_jax.common.host import Array, as_jax, as_numpy
from otfusion_jax.common.known import all_known
from otfusion_jax.common.scaling import restored
from otfusion_jax.common.sharding import replicated
from otfusion_jax.common.typing import PyTree
from otfusion_jax.solvers.base import AbstractSolver
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.canonical import require_canonical
from otfusion_jax.symmetry.checks import require_model, require_symmetry, warn_without_groups
from otfusion_jax.symmetry.correspondence import match_groups
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

    Its steps are jitted, and shared by equal parts of a model; inside of `jax.jit`, and under
    `jax.vmap` over stacks of models, it is one program.

    Args:
        symmetry: The symmetry of the source, and of the target too unless `onto` is given. With
            rotations (see `Symmetry.with_rotations`), both models have to be in canonical form, as
            `canonicalize` returns it; groups that rotate are brought as close as can be in squared
            distance, whatever metric and solver are.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        onto: The symmetry of the target, if its widths are others than the source's. Groups are
            matched by structure; plans between groups of different sizes are float `[n, m]`, with
            negative masses where units change their signs. Units that rotate become another number
            by an isometry, `[n, m]` of orthonormal rows or columns (see `Stretch`).
        method: How the plans of all groups are found: `CoordinateDescent()` or `ForwardPass()`.
        metric: The ground metric between units, an ott cost function. None means
            `ott.geometry.costs.SqEuclidean()`, which coordinate descent uses for its objective
            whatever the metric.
        solver: What makes a plan of a cost: `Exact()`, or `Sinkhorn()` for soft plans. Groups with
            others nested in them (heads) are always matched exactly.
        grams: Inner products of activations by the names of groups, as `feature_gram` returns them,
            to match by activations instead of weights. Groups that are left out are matched by
            weights. For a quadratic solver they are taken with `intra=True`. In coordinate descent
            they serve the start `"forward"` alone.
        marginals: The masses of the source's units and of the target's, by the names of groups,
            float `[*batch, n]` and `[*batch, m]`, each summing to 1 over the last axis (see
            `weight_importance`, `feature_importance`). Groups that are left out have uniform
            masses.
        leaf_weight: A function from the key path of a parameter to how much it counts: its share of
            every squared distance between units is multiplied by this, and 0 leaves it out. None
            counts all alike, but leaves out batch norm's running statistics (see
            `running_statistics`): their scale says nothing of what units do.

    Returns:
        The alignment; pass it to `transport`.

    Raises:
        ValueError: If a model does not fit the symmetry or is not finite, listing every offender by
            key path; if grams or marginals do not fit the groups; if a leaf weight is negative or
            not finite; if method, solver and grams do not go together.
            Inside `jax.jit` values cannot be looked at: there non-finite weights give a model of
            NaN and `converged` False.
        TypeError: If there are shapes in place of arrays, or arguments of other types.
        FloatingPointError: If the costs of finite models are out of range. With a solver that is
            scale-free, as all are by default, weights of any size are in range.

    Warns:
        SymmetryWarning: If the symmetry has no groups.
    """
    call = "align(symmetry, source, target, onto=symmetry_of_the_target)"
    require_symmetry(symmetry, call)
    if onto is not None:
        require_symmetry(onto, call)
    require_settings(method, metric, solver)
    if leaf_weight is not None:
        require_function(leaf_weight, "align(..., leaf_weight=lambda path: 1.0)")
    # Values are looked at further below, those of both models at once.
    require_model(symmetry, source, "the source", looks_at_values=False)
    # From here on the groups of the target go by the names of the source's, in their order.
    onto = symmetry if onto is None else match_groups(symmetry, onto)
    require_model(onto, target, "the target", looks_at_values=False)
    sums = sums_of_models(symmetry, onto, source, target)
    if sums is None:
        # They could not be taken, or some value is not finite: each parameter is looked at.
        require_model(symmetry, source, "the source")
        require_model(onto, target, "the target")
    require_canonical(symmetry, source, "the source")
    require_canonical(onto, target, "the target")
    warn_without_groups(symmetry, (source, target), "the alignment is empty")
    require_rectangular_plans(symmetry, onto)
    require_grams(symmetry, onto, grams)
    if marginals is None:
        marginals = {}, {}
    require_marginals(symmetry, onto, marginals)
    require_method_for_marginals(method, symmetry, onto, marginals)
    # A pair may come as a list, which is another pytree to `jit`: it would compile anew.
    source_masses, target_masses = marginals
    alignment = find_plans(
        symmetry,
        onto,
        source,
        target,
        method=method,
        metric=costs.SqEuclidean() if metric is None else metric,
        solver=solver,
        grams=grams,
        marginals=(source_masses, target_masses),
        weights=leaf_weights(symmetry, leaf_weight, source),
        sums=sums,
    )
    # Finite models may still have costs that are out of range, which shows in the plans alone.
    require_finite_plans(alignment.plans)
    return alignment


def find_plans(
    symmetry: Symmetry,
    onto: Symmetry,
    source: PyTree,
    target: PyTree,
    *,
    method: AbstractMethod,
    metric: costs.CostFn,
    solver: AbstractSolver,
    grams: dict[str, Gram] | None = None,
    marginals: Marginals = ({}, {}),
    weights: tuple[float, ...] | None = None,
    sums: PairSums | None = None,
) -> Alignment:
    """Aligns one model to another, without checks.

    Known values are gone over by Python, in small programs that equal parts of the models share.
    What is traced becomes one program.

    Args:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, with the names of the source's groups in their order.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        method: See `align`.
        metric: See `align`; an ott cost function.
        solver: See `align`.
        grams: See `align`.
        marginals: See `align`; two dicts, which may be empty.
        weights: One weight per leaf, as `leaf_weights` returns them, or None.
        sums: Sums over the models, if they have been taken.

    Returns:
        The alignment.
    """
    known = all_known(source, target, grams, marginals)
    find = _find_plans if known else _find_plans_jitted
    return find(
        symmetry,
        onto,
        source,
        target,
        method=method,
        metric=metric,
        solver=solver,
        grams=grams,
        marginals=marginals,
        weights=weights,
        sums=sums,
    )


# What is out of range shows in the plans, as it does where JAX computes them.
@np.errstate(all="ignore")
def _find_plans(
    symmetry: Symmetry,
    onto: Symmetry,
    source: PyTree,
    target: PyTree,
    *,
    method: AbstractMethod,
    metric: costs.CostFn,
    solver: AbstractSolver,
    grams: dict[str, Gram] | None,
    marginals: Marginals,
    weights: tuple[float, ...] | None,
    sums: PairSums | None,
) -> Alignment:
    """Aligns one model to another, see `find_plans`."""
    problem, exponent = set_up_problem(
        symmetry,
        onto,
        source,
        target,
        metric,
        solver,
        marginals=marginals,
        weights=weights,
        sums=sums,
    )
    if symmetry.groups:
        alignment = method.run(problem, as_numpy(grams) if problem.xp is np else grams)
    else:
        # Nothing can move, and a method would have nothing to go over.
        distance = problem.distance({})
        alignment = Alignment({}, distance, distance[None], problem.xp.asarray(True), {})
    if problem.known and exponent == 0:
        return as_jax(alignment)
    alignment = dataclasses.replace(alignment, plans=replicated(alignment.plans))
    # The problem's parameters are those of the models times 2**-exponent. Objectives are squares
    # of these; in which power gaps are depends on the ground cost.
    objective, history = restored((alignment.objective, alignment.history), exponent, 2)
    gaps = {}
    for name, gap in alignment.gaps.items():
        degree = method.cost_degree(metric, grams is not None and name in grams)
        gaps[name] = restored(gap, exponent, degree)
    scaled_back = dataclasses.replace(alignment, objective=objective, history=history, gaps=gaps)
    return as_jax(scaled_back)


_find_plans_jitted = jax.jit(
    _find_plans, static_argnames=("symmetry", "onto", "method", "solver", "weights")
)
