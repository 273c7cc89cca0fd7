"""Checks of what is passed to `align`, and of what comes out.

Each check lists every offender by the name of its group, with what to do instead. Values are looked
at only where they are known, not inside `jax.jit`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from ott.geometry import costs

from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.method import AbstractMethod
from otfusion_jax.common.arguments import require_kind
from otfusion_jax.common.finiteness import not_finite, not_finite_counts
from otfusion_jax.solvers.base import AbstractSolver, is_distribution
from otfusion_jax.symmetry.groups import Group, Plans
from otfusion_jax.symmetry.plans import is_permutation
from otfusion_jax.symmetry.symmetry import Symmetry


def require_settings(method: Any, metric: Any, solver: Any) -> None:
    """Refuses what is no method, metric or solver: a name, or a class that has not been called.

    Args:
        method: The argument `method`.
        metric: The argument `metric`; None is the default.
        solver: The argument `solver`.

    Raises:
        TypeError: If one of them is of another type. The message says what to pass.
    """
    require_kind(method, AbstractMethod, "method", "CoordinateDescent() or ForwardPass()")
    if metric is not None:
        # JAX takes cost functions, which are pytrees, and does not say what to pass in their place.
        require_kind(
            metric,
            costs.CostFn,
            "metric",
            "an ott cost function such as ott.geometry.costs.SqEuclidean(), or None",
        )
    solvers = "Exact(), Sinkhorn(), LowRank() or GromovWasserstein()"
    require_kind(solver, AbstractSolver, "solver", solvers)


def require_rectangular_plans(symmetry: Symmetry, onto: Symmetry) -> None:
    """Refuses groups of other widths that have no plan `[n, m]`.

    Args:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, its groups in the source's order.

    Raises:
        ValueError: If members of such a group have both roles.
    """
    wrong = []
    for group, target_group in zip(symmetry.groups, onto.groups, strict=True):
        # A permutation serves both roles, as does an isometry where `match_groups` allows it; a
        # rectangular plan of masses has other weights in each.
        if group.size == target_group.size or group.rotates:
            continue
        paths = [member.path for member in group.members if member.role == "both"]
        if paths:
            wrong.append(f"  {group.name}: {', '.join(paths)} both produce and consume the units")
    if wrong:
        raise ValueError(
            "these groups need as many units in the target as in the source; give each of the two "
            "uses (an embedding, the output layer) a leaf of its own:\n" + "\n".join(wrong)
        )


def require_grams(symmetry: Symmetry, onto: Symmetry, grams: Any) -> None:
    """Refuses inner products that do not fit the groups.

    Args:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, its groups in the source's order.
        grams: The argument `grams` of `align`.

    Raises:
        TypeError: If it is no dict of `Gram`s.
        ValueError: If groups are unknown, or missing while others are there that they are matched
            together with; if shapes do not fit, or values are known not to be finite.
    """
    if grams is None:
        return
    # Activations have the same names, so that they are easily mistaken for these.
    strange = []
    if isinstance(grams, dict):
        for name, given in grams.items():
            if not isinstance(given, Gram):
                strange.append(f"{name}: {type(given).__name__}")
    else:
        strange.append(type(grams).__name__)
    if strange:
        raise TypeError(
            "grams are inner products by the names of groups, as feature_gram(symmetry, fn, "
            "source, target, batches) returns them; activations, as features(...) returns them, do "
            f"not do: got {', '.join(strange)}"
        )
    wrong = []
    for group, target_group in zip(symmetry.groups, onto.groups, strict=True):
        if group.name in grams:
            problem = _problem_of_gram(group, target_group, grams[group.name])
        else:
            problem = _problem_of_missing_gram(symmetry, group, grams)
        if problem:
            wrong.append(f"  {group.name}: {problem}")
    for name in grams:
        if name not in symmetry:
            wrong.append(f"  {name}: no such group")
    if wrong:
        raise ValueError("these grams do not fit the symmetry's groups:\n" + "\n".join(wrong))


def _problem_of_missing_gram(symmetry: Symmetry, group: Group, grams: Any) -> str | None:
    """Says why a group can't be left out, if it can't: what is nested is matched with its heads."""
    for other in symmetry.groups:
        in_one_tree = group.name == other.outer or (
            group.outer is not None and group.outer in (other.name, other.outer)
        )
        if in_one_tree and other.name in grams:
            return f"missing, but there is {other.name}, and the two are matched together"
    return None


def _problem_of_gram(group: Group, target_group: Group, given: Gram) -> str | None:
    """Says what is wrong with the inner products of a group, if anything is."""
    expected = (*group.batch, group.size, target_group.size)
    if group.outer is not None:
        # Every head of the source is compared with every head of the target.
        expected = (*group.batch, group.size, target_group.batch[-1], target_group.size)
    if given.cross.shape != expected:
        return f"shape {given.cross.shape}, expected {expected}"
    if group.signed and given.even is None:
        return (
            "its units may change their signs, and it is not known which of the activations do "
            "with them; use the grams of feature_gram with this symmetry, or one without "
            "with_signs()"
        )
    # Inside `jax.jit` there are no values to look at.
    known = [x for x in jax.tree.leaves(given) if not isinstance(x, Tracer)]
    if any(not_finite_counts(known)):
        return "not finite, activations or their squares overflow"
    return None


def require_marginals(symmetry: Symmetry, onto: Symmetry, marginals: Any) -> None:
    """Refuses masses that do not fit the groups.

    Args:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, with the names of the source's groups.
        marginals: The argument `marginals` of `align`.

    Raises:
        TypeError: If it is no pair of dicts.
        ValueError: If there is no such group, if it is matched one to one, if shapes do not fit, or
            if values are known not to be masses. Each is named with its group and its side.
    """
    # One dict alone would be taken apart into its keys.
    is_pair = isinstance(marginals, tuple | list) and len(marginals) == 2
    if not is_pair or not isinstance(marginals[0], dict) or not isinstance(marginals[1], dict):
        raise TypeError(
            "marginals are a pair of dicts, the masses of the source's units and of the target's: "
            "(weight_importance(symmetry, source), weight_importance(symmetry, target)), or {} for "
            "a side that is uniform"
        )
    wrong = []
    for side, groups, masses in (
        ("source", symmetry.groups, marginals[0]),
        ("target", onto.groups, marginals[1]),
    ):
        if not masses:
            continue
        by_name = {group.name: group for group in groups}
        outer_names = {group.outer for group in groups}
        for name, given in masses.items():
            if name not in by_name:
                problem = "no such group"
            elif by_name[name].orthogonal:
                kind = by_name[name].motion.value
                problem = f"its units are {kind}, which gives all of them the same mass"
            elif name in outer_names:
                problem = "groups are nested in it, so that it is matched one to one"
            else:
                problem = _problem_of_masses(by_name[name], given)
            if problem:
                wrong.append(f"  {name}, of the {side}: {problem}")
    if wrong:
        raise ValueError(
            "these marginals do not fit the groups:\n"
            + "\n".join(wrong)
            + f"\nIts groups: {', '.join([group.name for group in symmetry.groups])}"
        )


def require_method_for_marginals(
    method: AbstractMethod, symmetry: Symmetry, onto: Symmetry, marginals: Any
) -> None:
    """Refuses masses of units that the method can only permute.

    Args:
        method: The method that finds the plans.
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, its groups in the source's order.
        marginals: Masses that `require_marginals` has accepted.

    Raises:
        ValueError: If the method is coordinate descent, and groups of as many units in both models
            have masses. The groups are listed.
    """
    if not isinstance(method, CoordinateDescent):
        return
    wrong = []
    for group, target_group in zip(symmetry.groups, onto.groups, strict=True):
        has_masses = any(group.name in masses for masses in marginals)
        # Units of other widths have transport plans in any case.
        if has_masses and group.size == target_group.size:
            wrong.append(f"  {group.name}")
    if wrong:
        raise ValueError(
            "marginals give soft plans, and coordinate descent composes permutations; pass "
            "method=ForwardPass(), or leave out the marginals of these groups:\n" + "\n".join(wrong)
        )


def _problem_of_masses(group: Group, given: Any) -> str | None:
    """Says what is wrong with the masses of a group's units, if anything is."""
    expected = (*group.batch, group.size)
    if jnp.shape(given) != expected:
        return f"shape {jnp.shape(given)}, expected {expected}"
    if isinstance(given, Tracer):
        return None
    # They may be closed over by what is being traced; they are looked at now all the same.
    with jax.ensure_compile_time_eval():
        if not is_distribution(jnp.asarray(given)):
            return "masses are at least 0 and sum to 1; divide them by their sum"
    return None


def require_finite_plans(plans: Plans) -> None:
    """Refuses plans of costs that were out of range.

    Args:
        plans: Group name to plan, as they were found for finite models.

    Raises:
        FloatingPointError: If plans are known to be unusable. The groups are listed.
    """
    wrong = [f"  {name}" for name in unusable(plans)]
    if wrong:
        raise FloatingPointError(
            "the ground costs of these groups are not finite, though the models are: their squares "
            "are out of range. Scale parameters or features, or compute in float64 "
            "(jax_enable_x64):\n" + "\n".join(wrong)
        )


def unusable(plans: Plans) -> list[str]:
    """Finds the plans that are known to be of a problem that their solver could not solve.

    Args:
        plans: Group name to plan. Traced plans pass.

    Returns:
        The names of their groups.
    """
    names = []
    for name, plan in plans.items():
        if not isinstance(plan, Tracer) and _is_unusable(plan):
            names.append(name)
    return names


def _is_unusable(plan: Array) -> bool:
    """Whether a plan is marked as one of a problem that its solver could not solve."""
    # See `Exact`: an index out of range stands for NaN, which integers do not have.
    if is_permutation(plan):
        return bool(np.any(np.asarray(plan) >= plan.shape[-1]))
    return bool(not_finite(plan))
