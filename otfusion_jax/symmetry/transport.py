"""Pushing parameters along plans.

A plan P of the units of a group, with marginals a = P 1 and b = Pᵀ 1, says how they move. A new
unit j is the average of the old units that map to it, so an axis that *produces* units is
multiplied by `P diag(1/b)`. What consumes the units must reconstruct old unit i from the new ones,
so a *consuming* axis is multiplied by `diag(1/a) P`. For a permutation the two are the same gather.
"""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.correspondence import match_groups
from otfusion_jax.symmetry.groups import Group, Member, Plans, Role
from otfusion_jax.symmetry.leaf_structure import LeafStructure, UnitAxis
from otfusion_jax.symmetry.partition import Block, Blocks, mixed, permuted
from otfusion_jax.symmetry.plans import HasPlans, is_permutation, new_sizes, plans_of, require_plans
from otfusion_jax.symmetry.symmetry import Symmetry


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
    onto = None if onto is None else match_groups(symmetry, onto)
    require_plans(symmetry, plans, onto)
    return _transport(symmetry, onto, plans, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _transport(symmetry: Symmetry, onto: Symmetry | None, plans: Plans, params: PyTree) -> PyTree:
    parts = symmetry.split(params)
    moved = (move(symmetry, plans, i, part, onto) for i, part in enumerate(parts))
    return (onto or symmetry).join(moved)


def split_and_move(
    symmetry: Symmetry, plans: Plans, leaf: int, array: Any, frozen: Collection[Member] = ()
) -> Blocks:
    """Takes one parameter apart and moves its units along plans, without checks.

    Args:
        symmetry: of the network.
        plans: group name to plan; groups that are left out stay.
        leaf: position of the parameter in `symmetry.parts`.
        array: the parameter.
        frozen: members that stay where they are.

    Returns:
        The cells of the moved parameter.
    """
    return move_blocks(symmetry.leaf_structures[leaf], plans, array, frozen)


def move_blocks(
    uses: LeafStructure, plans: Plans, array: Array, frozen: Collection[Member] = ()
) -> Blocks:
    """Takes an array apart and moves its units along plans, without checks.

    Args:
        uses: how it falls into cells, and which groups index it.
        plans: group name to plan; groups that are left out stay.
        array: the array.
        frozen: members that stay where they are.

    Returns:
        The cells of the moved array.
    """
    cells = uses.partition.split(array)
    moving = [use for use in uses.unit_axes if use.group.name in plans and use.member not in frozen]
    for use in moving:
        cells = {key: _along(cell, use, moving, plans) for key, cell in cells.items()}
    return cells


def _along(cell: Block, use: UnitAxis, moving: list[UnitAxis], plans: Plans) -> Block:
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


def _within(use: UnitAxis, cell: Block) -> bool:
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
    layout, uses = symmetry.leaf_structures[leaf]
    if not any(use.group.name in plans for use in uses):
        return array
    if onto is None:
        target = layout.resized(new_sizes(symmetry, plans, leaf))
        assert target is not None, "checked by the caller"
    else:
        target = onto.leaf_structures[leaf].partition
    return target.join(split_and_move(symmetry, plans, leaf, array))
