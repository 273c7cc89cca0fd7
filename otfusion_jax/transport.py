"""Pushing parameters along plans.

A plan P of the units of a group, with marginals a = P 1 and b = Pᵀ 1, says how they move. A new
unit j is the average of the old units that map to it, so an axis that *produces* units is
multiplied by `P diag(1/b)`. What consumes the units must reconstruct old unit i from the new ones,
so a *consuming* axis is multiplied by `diag(1/a) P`. For a permutation the two are the same gather.
"""

import functools
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from otfusion_jax.checks import (
    require_arrays,
    require_model,
    require_symmetry,
)
from otfusion_jax.entry_points import Program, entry_points
from otfusion_jax.layout import Cell, Cells, mixed, permuted
from otfusion_jax.symmetry import Group, Member, Plans, Role, Symmetry, Use, Uses
from otfusion_jax.widths import crowded, matched


@runtime_checkable
class HasPlans(Protocol):
    """Anything with plans, such as the result of `align`."""

    @property
    def plans(self) -> Plans:
        """Group name to plan."""
        ...


def plans_of(plans: Plans | HasPlans) -> Plans:
    """Returns the plans of what has some.

    Args:
        plans: group name to plan, or the result of `align`.

    Returns:
        Group name to plan.

    Raises:
        TypeError: for anything else.
    """
    found = plans if isinstance(plans, dict) else getattr(plans, "plans", None)
    if not isinstance(found, dict):
        raise TypeError(
            f"plans is a {type(plans).__name__}; pass a dict of arrays by the names of groups, or "
            "what align returns"
        )
    return found


def is_permutation(plan: Array | np.ndarray | jax.ShapeDtypeStruct) -> bool:
    """Whether a plan is an index vector rather than a matrix of masses.

    Args:
        plan: the plan.

    Returns:
        True for integer dtypes.
    """
    return jnp.issubdtype(plan.dtype, jnp.integer)


def transport(
    symmetry: Symmetry,
    plans: Plans | HasPlans,
    params: PyTree,
    *,
    onto: Symmetry | None = None,
) -> PyTree:
    """Moves the parameters of a network along plans.

    With permutations the moved network computes the same function as the one given. A jitted
    pytree transform; also works inside `jax.jit`, under `jax.vmap` and `jax.grad`.

    Args:
        symmetry: of the network.
        plans: group name to plan, or the result of `align`. A permutation is integer `[n]`:
            position `j` receives unit `plan[j]`. A transport plan is float `[n, m]`. Plans of a
            nested group have its batch in front; they apply to what is at an index after the group
            around has moved. If that moves along a transport plan `[h, g]`, there is one for every
            pair: `[*batch, g, n]` or `[*batch, g, n, m]`, where h is the last of the batch. Groups
            that are left out stay where they are.
        params: the parameters; not changed.
        onto: symmetry of the network that the plans lead to, if its widths are others. None takes
            the widths from the plans.

    Returns:
        New parameters of the same structure. Integers, booleans and keys are passed on.

    Raises:
        ValueError: for plans of unknown groups, of wrong shapes, or known not to be permutations or
            couplings, for soft plans of axes with both roles, for parameters that do not fit, and
            if the networks differ in more than widths.
        TypeError: for arguments in another order, and shapes in place of arrays.
    """
    for given in (symmetry, symmetry if onto is None else onto):
        require_symmetry(given, "transport(symmetry, plans, params, onto=symmetry_of_the_target)")
    plans = plans_of(plans)
    require_model(symmetry, params)
    onto = None if onto is None else matched(symmetry, onto)
    _check(symmetry, plans, onto)
    return _transport(symmetry, onto, plans, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _transport(symmetry: Symmetry, onto: Symmetry | None, plans: Plans, params: PyTree) -> PyTree:
    parts = symmetry.split(params)
    moved = (move(symmetry, plans, i, part, onto) for i, part in enumerate(parts))
    return (onto or symmetry).join(moved)


def compose(symmetry: Symmetry, first: Plans | HasPlans, then: Plans | HasPlans) -> Plans:
    """Chains permutations: to move along the result is to move along one and then the other.

    Args:
        symmetry: of the network.
        first: plans of all groups or of some, integer, or the result of `align`.
        then: likewise.

    Returns:
        Plans of all groups.

    Raises:
        ValueError: for plans that do not fit, or that are not permutations.
    """
    a, b = (_permutations(symmetry, plans) for plans in (first, then))
    out: Plans = {}
    for group in symmetry.groups:
        mine = a[group.name]
        if group.outer is not None:  # what is inside of an index has moved along with it
            mine = jnp.take_along_axis(mine, b[group.outer][..., None], axis=-2)
        out[group.name] = jnp.take_along_axis(mine, b[group.name], axis=-1)
    return out


def invert(symmetry: Symmetry, plans: Plans | HasPlans) -> Plans:
    """Turns permutations around: to move along plans and then along the result is to stay.

    Args:
        symmetry: of the network.
        plans: of all groups or of some, integer, or the result of `align`.

    Returns:
        Plans of all groups.

    Raises:
        ValueError: for plans that do not fit, or that are not permutations.
    """
    forth = _permutations(symmetry, plans)
    back = {name: jnp.argsort(plan, axis=-1).astype(plan.dtype) for name, plan in forth.items()}
    for group in symmetry.groups:
        if group.outer is not None:
            mine, around = back[group.name], back[group.outer]
            back[group.name] = jnp.take_along_axis(mine, around[..., None], axis=-2)
    return back


def _permutations(symmetry: Symmetry, plans: Plans | HasPlans) -> Plans:
    require_symmetry(symmetry, "compose(symmetry, first, then) or invert(symmetry, plans)")
    plans = plans_of(plans)
    _check(symmetry, plans)
    soft = [name for name, plan in plans.items() if not is_permutation(plan)]
    if soft:
        raise ValueError(f"only permutations can be chained or turned around; soft: {soft}")
    return symmetry.identity() | plans


def placed(
    symmetry: Symmetry, plans: Plans, leaf: int, array: Any, stay: Collection[Member] = ()
) -> Cells:
    """Takes one parameter apart and moves its units along plans, without checks.

    Args:
        symmetry: of the network.
        plans: group name to plan; groups that are left out stay.
        leaf: position of the parameter in `symmetry.parts`.
        array: the parameter.
        stay: members that stay where they are.

    Returns:
        The cells of the moved parameter.
    """
    return moved_along(symmetry.by_leaf[leaf], plans, array, stay)


def moved_along(uses: Uses, plans: Plans, array: Array, stay: Collection[Member] = ()) -> Cells:
    """Takes an array apart and moves its units along plans, without checks.

    Args:
        uses: how it falls into cells, and which groups index it.
        plans: group name to plan; groups that are left out stay.
        array: the array.
        stay: members that stay where they are.

    Returns:
        The cells of the moved array.
    """
    cells = uses.layout.split(array)
    moving = [use for use in uses.uses if use.group.name in plans and use.member not in stay]
    for use in moving:
        cells = {key: _along(cell, use, moving, plans) for key, cell in cells.items()}
    return cells


def _along(cell: Cell, use: Use, moving: list[Use], plans: Plans) -> Cell:
    """Moves the units of one member in a cell, if they are in it.

    Args:
        cell: the cell.
        use: the member.
        moving: all members that move, this one among them.
        plans: of their groups.

    Returns:
        The cell. Units in heads that do not move one to one move together with the heads.
    """
    if not _within(use, cell):
        return cell
    plan, role = plans[use.group.name], use.member.role
    around = [u for u in moving if u.group.name == use.group.outer and u.dim == use.levels[-1]]
    if around and not is_permutation(plans[around[0].group.name]):
        outer = _weights(plans[around[0].group.name], around[0].member.role)
        inner = _weights(_as_coupling(plan), role)
        weights = (outer[..., None, None] * inner).astype(cell.array.dtype)
        return mixed(cell, use.levels[-1:] + (use.dim,), use.levels[:-1], weights)
    if is_permutation(plan):
        return permuted(cell, use.dim, use.levels, plan)
    if any(
        u.group.outer == use.group.name and u.levels[-1] == use.dim and _within(u, cell)
        for u in moving
    ):
        return cell
    return mixed(cell, (use.dim,), use.levels, _weights(plan, role).astype(cell.array.dtype))


def _within(use: Use, cell: Cell) -> bool:
    return {use.dim, *use.levels} <= set(cell.dims)


def _as_coupling(plan: Array) -> Array:
    """Turns permutations into transport plans; others stay."""
    if not is_permutation(plan):
        return plan
    n = plan.shape[-1]
    return jax.nn.one_hot(plan, n, axis=-2) / n


def _weights(plan: Array, role: Role) -> Array:
    """Divides a plan by its marginals: those of the new units where these are produced."""
    masses = jnp.sum(plan, axis=-2 if role == "produces" else -1, keepdims=True)
    return plan / jnp.where(masses > 0, masses, 1)


def moved_units(group: Group, plans: Plans, numbers: Array, role: Role, around: Role) -> Array:
    """Moves what is known of each unit, such as a mean, without checks.

    Args:
        group: whose units.
        plans: group name to plan; groups that are left out stay.
        numbers: float `[*batch, n]`.
        role: of what is known, as the units of the group.
        around: its role as what is in the group around, if there is one.

    Returns:
        `[*batch, m]`: of a new unit that is produced the mean over the old ones that map to it,
        otherwise the sum of their shares.
    """
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if group.outer in plans:
        outer = plans[group.outer]
        if not is_permutation(outer):
            inner = _weights(_as_coupling(plans[group.name]), role)
            return product("...gn,...gh,...ghnm->...hm", numbers, _weights(outer, around), inner)
        numbers = jnp.take_along_axis(numbers, outer[..., None], axis=-2)
    if group.name not in plans:
        return numbers
    plan = plans[group.name]
    if is_permutation(plan):
        return jnp.take_along_axis(numbers, plan, axis=-1)
    return product("...n,...nm->...m", numbers, _weights(plan, role))


def move(
    symmetry: Symmetry, plans: Plans, leaf: int, array: Any, onto: Symmetry | None = None
) -> Any:
    """Moves one parameter along plans, without checks.

    Args:
        symmetry: of the network.
        plans: group name to plan; groups that are left out stay.
        leaf: position of the parameter in `symmetry.parts`.
        array: the parameter.
        onto: symmetry of the network that the plans lead to; None takes the widths from the plans.

    Returns:
        The moved parameter.
    """
    layout, uses = symmetry.by_leaf[leaf]
    if not any(use.group.name in plans for use in uses):
        return array
    if onto is None:
        target = layout.resized(_sizes(symmetry, plans, leaf))
        assert target is not None, "checked by the caller"
    else:
        target = onto.by_leaf[leaf].layout
    return target.join(placed(symmetry, plans, leaf, array))


def _sizes(symmetry: Symmetry, plans: Plans, leaf: int) -> dict[Any, int]:
    """Returns the sizes that plans give to the dimensions of a leaf, where they change."""
    found = {}
    for group, _, dim, _ in symmetry.by_leaf[leaf].uses:
        if group.name in plans and plans[group.name].shape[-1] != group.size:
            found[dim] = plans[group.name].shape[-1]
    return found


def _check(symmetry: Symmetry, plans: Plans, onto: Symmetry | None = None) -> None:
    """Refuses plans that do not fit the groups; `plans` comes as the caller gave it."""
    known = {g.name: g for g in symmetry.groups}
    sizes = {} if onto is None else {g.name: g.size for g in onto.groups}
    wrong = [f"  {name}: no such group" for name in plans if name not in known]
    for name in plans:
        if name in known and (problem := _problem(known[name], plans, sizes.get(name))):
            wrong.append(f"  {name}: {problem}")
    if not wrong and not all(map(is_permutation, plans.values())):
        wrong = [
            f"  {name}: {problem}"
            for name, problem in crowded(symmetry).items()
            if name in plans and not is_permutation(plans[name])
        ]
    if not wrong and onto is not None:
        wrong = [
            f"  {g.name}: no plan, but {g.size} units become {sizes[g.name]}"
            for g in symmetry.groups
            if g.name not in plans and g.size != sizes[g.name]
        ]
    if not wrong and onto is None:
        wrong = [
            f"  {symmetry.parts[i].path}: units that change in number alternate with other things "
            "along an axis; say where they go by `onto`, the symmetry of the network they lead to"
            for i, (layout, _) in enumerate(symmetry.by_leaf)
            if layout.resized(_sizes(symmetry, plans, i)) is None
        ]
    if wrong:
        groups = ", ".join(f"{g.name} ({g.size})" for g in symmetry.groups)
        raise ValueError(
            "these plans do not fit the symmetry:\n" + "\n".join(wrong) + f"\nIts groups: {groups}"
        )


def _problem(group: Group, plans: Plans, size: int | None = None) -> str | None:
    """Says what is wrong with a group's plan; values are looked at unless they are traced."""
    plan: Any = plans[group.name]
    if not isinstance(plan, jax.Array | np.ndarray):
        return f"a {type(plan).__name__}, expected an array"
    n, batch, note = group.size, group.batch, ""
    around: Any = None if group.outer is None else plans.get(group.outer)
    if isinstance(around, jax.Array | np.ndarray) and not is_permutation(around):
        batch = (*batch, around.shape[-1])
        note = f", one for every pair of what {group.outer} moves from and to"
    shape = ", ".join(map(str, (*batch, n)))
    alone = f"({n},)" if not batch else f"({shape})"
    known = not isinstance(plan, Tracer)
    if is_permutation(plan):
        if plan.shape != (*batch, n):
            return f"shape {plan.shape}, expected {alone}{note}"
        if size not in (None, n):
            return f"a permutation, but {n} units become {size}"
        if known and not np.all(np.sort(np.asarray(plan), axis=-1) == np.arange(n)):
            unsolved = "; its cost was not finite" if np.any(np.asarray(plan) == n) else ""
            return f"not a permutation of 0 to {n - 1}{unsolved}"
        return None
    new = "m" if size is None else str(size)
    if plan.shape[:-1] != (*batch, n) or size not in (None, plan.shape[-1]):
        expected = f"expected ({shape}, {new}) for a transport plan or int {alone}{note}"
        return f"shape {plan.shape}, {expected}"
    if known and not np.all(np.isfinite(np.asarray(plan)) & (np.asarray(plan) >= 0)):
        return "masses that are negative or not finite"
    both = [m.path for m in group.members if m.role == "both"]
    if both:
        return (
            f"a soft plan, but {', '.join(both)} both produce and consume the units, which only a "
            "permutation can serve; give each of the two uses a leaf of its own"
        )
    return None


def check_symmetry(
    symmetry: Symmetry,
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    key: Array | None = None,
) -> float:
    """Certifies a symmetry: permutes every group at random, all at once, and compares the outputs.

    Twice: by permutations that leave no unit in place, and by uniform ones.

    Args:
        symmetry: to be certified.
        fn: the function that was traced, or the list of functions and inputs.
        params: concrete parameters; random ones tell more than freshly initialised ones, whose
            biases are all 0.
        *inputs: concrete inputs, best random ones.
        key: a key of `jax.random`; `jax.random.key(0)` if None.

    Returns:
        The relative error: the largest change of any output over the largest output, of several
        functions that of the worst. Rounding alone leaves 1e-7 to 1e-5 in float32. NaN if there are
        NaN among the outputs.

    Raises:
        ValueError: for parameters that do not fit.
        TypeError: for arguments in another order, shapes in place of arrays, and what is no key.
    """
    require_symmetry(symmetry, "check_symmetry(symmetry, fn, params, *inputs)")
    functions = entry_points(fn, inputs)
    require_model(symmetry, params)
    require_arrays([given for _, given in functions], "inputs")
    key = jax.random.key(0) if key is None else key
    drawn = symmetry.random(key)
    cycles = {name: _cycle(np.asarray(order)) for name, order in drawn.items()}
    moved = [transport(symmetry, plans, params) for plans in (cycles, drawn)]
    errors = []
    for function, given in functions:
        before = function(params, *given)
        errors += [_relative_change(before, function(model, *given)) for model in moved]
    return float(np.max(errors))


def _cycle(order: np.ndarray) -> Array:
    """Makes permutations that leave no unit in place: all go round in turn, in the given order."""
    following = (np.argsort(order, axis=-1) + 1) % order.shape[-1]
    return jax.device_put(np.take_along_axis(order, following, axis=-1))


def _relative_change(before: PyTree, after: PyTree) -> float:
    """Compares outputs: the largest change over the largest output."""
    flat = [
        np.concatenate([np.ravel(x).astype(np.complex128) for x in jax.tree_util.tree_leaves(o)])
        for o in (before, after)
    ]
    scale = np.max(np.abs(flat[0]), initial=np.finfo(np.float32).tiny)
    return float(np.max(np.abs(flat[1] - flat[0]), initial=0.0) / scale)
