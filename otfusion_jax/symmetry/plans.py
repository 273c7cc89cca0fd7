"""What plans are, whether they fit a symmetry, and chains of permutations.

A plan says where the units of a group go: a permutation is an integer `[n]`, where position `j`
receives unit `plan[j]`; a transport plan is a float `[n, m]` of masses. What the parameters become
along plans is in `transport`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import HasDtype
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.correspondence import permutable_only
from otfusion_jax.symmetry.groups import Group, Plans
from otfusion_jax.symmetry.leaf_structure import LeafStructure
from otfusion_jax.symmetry.stretch import difference
from otfusion_jax.symmetry.symmetry import Symmetry

LARGEST_ERROR = 1e-2
"""How far from orthogonal a rotation may be, as one that was rounded to half precision is."""


@runtime_checkable
class HasPlans(Protocol):
    """Anything with plans, such as the result of `align`."""

    @property
    def plans(self) -> Plans:
        """Group name to plan."""
        ...


def plans_of(plans: Plans | HasPlans) -> Plans:
    """Returns the plans themselves, of what has some.

    Args:
        plans: A dict from group name to plan, or the result of `align`.

    Returns:
        The dict from group name to plan.

    Raises:
        TypeError: If it is anything else.
    """
    by_name = plans if isinstance(plans, dict) else getattr(plans, "plans", None)
    if not isinstance(by_name, dict):
        raise TypeError(
            f"plans is {kind_of(plans)}; pass a dict of arrays by the names of groups, or "
            "what align returns"
        )
    return by_name


def is_permutation(plan: HasDtype) -> bool:
    """Says whether a plan is an index vector rather than a matrix of masses.

    Args:
        plan: The plan.

    Returns:
        True for integer dtypes.
    """
    return np.issubdtype(plan.dtype, np.integer)


def is_identity(plan: Array) -> bool:
    """Says whether a plan leaves every unit where it is.

    Args:
        plan: A plan whose values are known.

    Returns:
        Whether it is a permutation of every unit to itself, or the identity as a matrix. False for
        a transport plan, whose masses sum to 1.
    """
    values = np.asarray(plan)
    if is_permutation(plan):
        return bool((values == np.arange(values.shape[-1])).all())
    # Of more than one unit, masses would be smaller.
    is_square = values.ndim > 1 and values.shape[-1] == values.shape[-2] > 1
    return is_square and bool((values == np.eye(values.shape[-1])).all())


def count_moved_units(plan: Array | np.ndarray) -> int | None:
    """Counts the units that a plan takes to another place.

    Args:
        plan: A plan whose values are known.

    Returns:
        The number, over the whole batch. None where units are mixed: then none has stayed, and none
        has gone to another place.
    """
    if not is_permutation(plan):
        return None
    return int(np.count_nonzero(np.asarray(plan) != np.arange(plan.shape[-1])))


def is_orthogonal(group: Group, plan: Array | np.ndarray) -> bool:
    """Says whether a plan of a group is made of orthogonal matrices, by its shape alone.

    Args:
        group: The group.
        plan: A plan of it, of floating-point numbers.

    Returns:
        False for plans of masses, and so for those with signs onto another number of units.
    """
    return group.orthogonal and plan.shape[-1:] == (group.size,)


# --- chains of permutations and rotations


def compose(symmetry: Symmetry, first: Plans | HasPlans, then: Plans | HasPlans) -> Plans:
    """Chains permutations: to move along the result is to move along one and then the other.

    Args:
        symmetry: The symmetry of the network that the plans move.
        first: Integer plans of all groups or of some, or the result of `align`. Groups that rotate
            may have orthogonal matrices.
        then: The plans that come after, of the same kind.

    Returns:
        The plans of all groups.

    Raises:
        ValueError: If plans do not fit the symmetry, or are soft.
        TypeError: If the arguments are in another order, or plans are no dict of arrays.
    """
    first = _invertible_plans_of_all_groups(symmetry, first)
    then = _invertible_plans_of_all_groups(symmetry, then)
    composed: Plans = {}
    for group in symmetry.groups:
        name, outer = group.name, group.outer
        plan = first[name]
        if outer is not None:
            # What is inside of an index has moved along with it: the second plan finds it there.
            plan = _taken_along(plan, then[outer], group)
        composed[name] = chained(plan, then[name])
    return composed


def invert(symmetry: Symmetry, plans: Plans | HasPlans) -> Plans:
    """Turns permutations around: to move along plans and then along the result is to stay.

    Args:
        symmetry: The symmetry of the network that the plans move.
        plans: Integer plans of all groups or of some, or the result of `align`. Groups that rotate
            may have orthogonal matrices.

    Returns:
        The plans of all groups.

    Raises:
        ValueError: If plans do not fit the symmetry, or are soft.
        TypeError: If the arguments are in another order, or plans are no dict of arrays.
    """
    inverse = {}
    for name, plan in _invertible_plans_of_all_groups(symmetry, plans).items():
        if is_permutation(plan):
            inverse[name] = jnp.argsort(plan, axis=-1).astype(plan.dtype)
        else:
            inverse[name] = jnp.swapaxes(plan, -1, -2)
    for group in symmetry.groups:
        if group.outer is not None:
            # The inverse at an index is for what has come back to it.
            inverse[group.name] = _taken_along(inverse[group.name], inverse[group.outer], group)
    return inverse


def _taken_along(plan: Array, outer_plan: Array, group: Group) -> Array:
    """Moves the plans inside of each unit of the group around to where that unit comes."""
    axis = len(group.batch) - 1
    inner_rank = plan.ndim - outer_plan.ndim
    index = outer_plan.reshape(*outer_plan.shape, *[1] * inner_rank)
    return jnp.take_along_axis(plan, index, axis=axis)


def chained(first: Array, then: Array) -> Array:
    """Chains two plans of one group, without checks.

    Args:
        first: A permutation, int `[*batch, n]`, or orthogonal matrices, float `[*batch, n, n]`.
        then: The plan that comes after, of either kind.

    Returns:
        The plan that is both, a permutation if both are.
    """
    if is_permutation(then):
        index = then if is_permutation(first) else then[..., None, :]
        return jnp.take_along_axis(first, index, axis=-1)
    if is_permutation(first):
        # Row i of the second matrix is for the unit that the first plan has brought to i.
        inverse = jnp.argsort(first, axis=-1)
        return jnp.take_along_axis(then, inverse[..., None], axis=-2)
    # Of a model of float64 plans are found in float64, and `Symmetry.random` draws float32.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.matmul(first, then, precision=jax.lax.Precision.HIGHEST)


def _invertible_plans_of_all_groups(symmetry: Symmetry, plans: Plans | HasPlans) -> Plans:
    """Checks plans that are to be chained, and fills in the groups that they leave out."""
    require_symmetry(symmetry, "compose(symmetry, first, then) or invert(symmetry, plans)")
    plans = plans_of(plans)
    require_plans(symmetry, plans)
    # What several units have been mixed into does not tell them apart again.
    soft = []
    for name, plan in plans.items():
        if not is_permutation(plan) and not is_orthogonal(symmetry[name], plan):
            soft.append(name)
    if soft:
        raise ValueError(f"only permutations can be chained or turned around; soft: {soft}")
    return symmetry.identity() | plans


# --- whether plans fit


def new_sizes(structure: LeafStructure, plans: Plans) -> dict[int, int]:
    """Returns the sizes that plans give to the dimensions of a leaf, where they change.

    Args:
        structure: How the leaf falls into blocks, and which groups index it.
        plans: Group name to plan; groups that are left out keep their size.

    Returns:
        By the number of a factor its new size.
    """
    sizes = {}
    for unit_axis in structure.unit_axes:
        group = unit_axis.group
        if group.name not in plans:
            continue
        size = plans[group.name].shape[-1]
        if size != group.size:
            sizes[unit_axis.dim] = size
    return sizes


def require_plans(symmetry: Symmetry, plans: Plans, onto: Symmetry | None = None) -> None:
    """Refuses plans that do not fit a symmetry.

    Args:
        symmetry: The symmetry of the network that the plans move.
        plans: Group name to plan, as the caller gave them: anything may be in the place of an
            array.
        onto: The symmetry of the network that the plans lead to, with the source's group names.
            None if it is not known, and its widths are those of the plans.

    Raises:
        ValueError: If a group is unknown, a shape is another, a plan is known to be neither a
            permutation nor a coupling, or the plans do not say where all units go. Every such group
            or leaf is listed.
    """
    problems = {}
    has_soft_plan = False
    for name, plan in plans.items():
        if name not in symmetry:
            problems[name] = "no such group"
            continue
        group = symmetry[name]
        target_size = None if onto is None else onto[name].size
        problem = _problem_of_plan(group, plan, plans, target_size)
        if problem is not None:
            problems[name] = problem
        elif not is_permutation(plan):
            has_soft_plan = True
    # The following look at the shapes of plans, which are known to be right only now.
    if not problems and has_soft_plan:
        problems = _groups_that_soft_plans_cannot_move(symmetry, plans)
    if not problems and onto is not None:
        for group in symmetry.groups:
            size = onto[group.name].size
            if group.name not in plans and group.size != size:
                problems[group.name] = f"no plan, but {group.size} units become {size}"
    # Permutations change no width.
    if not problems and onto is None and has_soft_plan:
        problems = _leaves_without_known_shape(symmetry, plans)
    _refuse(symmetry, problems)


def require_movable(symmetry: Symmetry, plans: Plans) -> None:
    """Refuses soft plans of groups that can only be permuted, as plans of a solver may be.

    Shapes and dtypes alone are looked at, so that plans may be traced.

    Args:
        symmetry: The symmetry of the network that the plans move.
        plans: Group name to plan, as `align` has found them.

    Raises:
        ValueError: If there are any, listing each group with the reason.
    """
    _refuse(symmetry, _groups_that_soft_plans_cannot_move(symmetry, plans))


def _refuse(symmetry: Symmetry, problems: Mapping[str, str]) -> None:
    """Raises if there are problems, by the names of groups or leaves."""
    if problems:
        lines = ["these plans do not fit the symmetry:"]
        for name, problem in problems.items():
            lines.append(f"  {name}: {problem}")
        sizes = [f"{group.name} ({group.size})" for group in symmetry.groups]
        lines.append("Its groups: " + ", ".join(sizes))
        raise ValueError("\n".join(lines))


def _groups_that_soft_plans_cannot_move(symmetry: Symmetry, plans: Plans) -> dict[str, str]:
    """Returns for each group with a soft plan that can only be permuted the reason, in words."""
    reasons = permutable_only(symmetry)
    problems = {}
    for name, plan in plans.items():
        group = symmetry[name]
        # What rotates is multiplied by a matrix that serves both roles.
        if is_permutation(plan) or is_orthogonal(group, plan) or group.rotates:
            continue
        both = [member.path for member in group.members if member.role == "both"]
        if both:
            problems[name] = (
                f"a soft plan, but {', '.join(both)} both produce and consume the units, which "
                "only a permutation can serve; give each of the two uses a leaf of its own"
            )
        elif name in reasons:
            problems[name] = reasons[name]
    return problems


def _leaves_without_known_shape(symmetry: Symmetry, plans: Plans) -> dict[str, str]:
    """Returns for each leaf whose new shape the plans do not tell the reason, in words."""
    problems = {}
    for part, structure in zip(symmetry.parts, symmetry.leaf_structures, strict=True):
        sizes = new_sizes(structure, plans)
        if structure.partition.resized(sizes) is None:
            problems[part.path] = (
                "units that change in number alternate with other things along an axis; say where "
                "they go by `onto`, the symmetry of the network they lead to"
            )
    return problems


def _problem_of_plan(
    group: Group,
    plan: Any,
    plans: Mapping[str, Any],
    target_size: int | None,
) -> str | None:
    """Says what is wrong with a group's plan; values are looked at unless they are traced.

    Args:
        group: The group.
        plan: Its plan, or what was given in the place of one.
        plans: The plans of all groups.
        target_size: The number of units that the plan should lead to; None if any will do.

    Returns:
        The problem, in words; None if there is none.
    """
    if not isinstance(plan, jax.Array | np.ndarray):
        return f"{kind_of(plan)}, expected an array"
    batch, note = group.batch, ""
    outer_plan = None
    if group.outer is not None:
        outer_plan = plans.get(group.outer)
    is_array = isinstance(outer_plan, jax.Array | np.ndarray)
    if is_array and not is_permutation(outer_plan):
        if group.signed:
            kind = group.motion.value
            return f"its units are {kind} inside of {group.outer}, which may only be permuted"
        # The units inside of an old index are matched anew with those of each new one.
        batch = (*batch, outer_plan.shape[-1])
        note = f", one for every pair of what {group.outer} moves from and to"
    if is_permutation(plan):
        return _problem_of_permutation(group, plan, batch, note, target_size)
    if is_orthogonal(group, plan) or group.rotates:
        return _problem_of_rotation(group, plan, batch, note, target_size)
    if group.signed and plan.ndim and target_size != group.size:
        # Masses whose signs say by what units are multiplied.
        plan = abs(plan)
    return _problem_of_coupling(group, plan, batch, note, target_size)


def _problem_of_permutation(
    group: Group,
    plan: Any,
    batch: tuple[int, ...],
    note: str,
    target_size: int | None,
) -> str | None:
    """Says what is wrong with an integer plan that should have shape `[*batch, n]`."""
    n = group.size
    expected = (*batch, n)
    if plan.ndim == len(expected) + 1 and plan.shape[:-1] == expected:
        return (
            f"{plan.dtype} of shape {plan.shape}, expected int {expected}{note}; a plan of masses "
            "is floating-point, as in plan.astype(float)"
        )
    if plan.shape != expected:
        return f"shape {plan.shape}, expected {expected}{note}"
    if target_size not in (None, n):
        return f"a permutation, but {n} units become {target_size}"
    # Under a trace there are no values to look at: there an index out of range gives NaN.
    if isinstance(plan, Tracer):
        return None
    values = np.asarray(plan)
    in_order = np.sort(values, axis=-1)
    if np.all(in_order == np.arange(n)):
        return None
    reason = ""
    if np.any(np.all(values == n, axis=-1)):
        # Solvers mark by indices out of range what they could not solve.
        reason = "; its cost was not finite"
    elif np.all(in_order == np.arange(1, n + 1)):
        reason = "; its indices start at 1, subtract 1"
    return f"not a permutation of 0 to {n - 1}{reason}"


def _problem_of_rotation(
    group: Group, plan: Any, batch: tuple[int, ...], note: str, target_size: int | None
) -> str | None:
    """Says what is wrong with a plan of orthogonal matrices `[*batch, n, n]`, or `[*batch, n, m]`.

    A matrix that is not square has orthonormal rows or columns, whichever are fewer.
    """
    n = group.size
    m = n if target_size is None else target_size
    rows = (*batch, n)
    if target_size is None and group.rotates and plan.shape[:-1] == rows:
        m = plan.shape[-1]
    if group.signed and m != n:
        return f"{n} units become {m}, but these units keep their number"
    if plan.shape != (*rows, m):
        kind = "a permutation with signs" if group.signed else "a rotation"
        return f"shape {plan.shape}, expected {(*rows, m)} for {kind} or int {rows}{note}"
    if n != m:
        reason = difference(group.stretch, group.stretch)
        if reason is not None:
            return f"{n} units become {m}, but {reason}"
    if not jnp.issubdtype(plan.dtype, jnp.floating):
        return f"dtype {plan.dtype}, but a rotation is floating-point"
    if isinstance(plan, Tracer):
        return None
    matrices = np.asarray(plan, np.float64)
    if not np.all(np.isfinite(matrices)):
        return "a matrix that is not finite"
    transposed = np.swapaxes(matrices, -1, -2)
    products = matrices @ transposed if n <= m else transposed @ matrices
    if np.max(np.abs(products - np.eye(min(n, m))), initial=0) > LARGEST_ERROR:
        return f"a matrix that is not orthogonal; the units of this group are {group.motion.value}"
    if group.signed and np.max(np.abs(np.abs(matrices) - np.round(np.abs(matrices)))) > 0:
        return "a matrix of more than ones and minus ones; the units change their signs alone"
    # An isometry takes 1 / sqrt(n) at each of n units to 1 / sqrt(m) at each of m, and back.
    changes = [np.sum(matrices, axis=-1) - np.sqrt(m / n)]
    changes.append(np.sum(matrices, axis=-2) - np.sqrt(n / m))
    largest = max(np.max(np.abs(change), initial=0) for change in changes)
    if group.fixes_ones and largest > LARGEST_ERROR * np.sqrt(max(n, m)):
        return "a rotation that moves the vector of ones, over which a mean is taken"
    return None


def _problem_of_coupling(
    group: Group,
    plan: Any,
    batch: tuple[int, ...],
    note: str,
    target_size: int | None,
) -> str | None:
    """Says what is wrong with a plan of masses that should have shape `[*batch, n, m]`."""
    rows = (*batch, group.size)
    has_rows = plan.shape[:-1] == rows
    has_columns = target_size is None or plan.shape[-1:] == (target_size,)
    if not (has_rows and has_columns):
        sizes = ", ".join(map(str, rows))
        m = "m" if target_size is None else target_size
        expected = f"({sizes}, {m}) for a transport plan or int {rows}"
        return f"shape {plan.shape}, expected {expected}{note}"
    if not jnp.issubdtype(plan.dtype, jnp.floating):
        return f"dtype {plan.dtype}, but a plan of masses is floating-point"
    if not isinstance(plan, Tracer):
        values = np.asarray(plan)
        is_mass = np.isfinite(values) & (values >= 0)
        if not np.all(is_mass):
            return (
                "masses that are negative or not finite; a matrix of rotations or signs is for the "
                "symmetry with_rotations() or with_signs()"
            )
        has_mass = np.any(values, axis=(-2, -1))
        # Of the pairs of outer indices, those that nothing moves between need no masses.
        is_coupling = np.any(has_mass) if note else np.all(has_mass)
        if values.size and not is_coupling:
            return "no mass at all, which would make the units 0"
    return None
