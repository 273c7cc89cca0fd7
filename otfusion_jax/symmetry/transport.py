"""Pushing parameters along plans.

A plan P of the units of a group, with marginals a = P 1 and b = Pᵀ 1, says how they move. A new
unit j is the average of the old units that map to it, so an axis that *produces* units is
multiplied by `P diag(1/b)`. What consumes the units must reconstruct old unit i from the new ones,
so a *consuming* axis is multiplied by `diag(1/a) P`. For a permutation the two are the same gather.
Units of a group that rotates are multiplied by an orthogonal matrix in either role, and those of
one that is signed are permuted and then multiplied by signs, where a member changes them. Onto
another number of units, rotations are isometries, times a power of the ratio of widths (see
`stretch`).
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from otfusion_jax.common.host import Array, array_module, as_jax, as_numpy, kept, loaded, program
from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.common.sharding import (
    constrained,
    laid_out_like,
    layout_of,
    spread_along_one,
    with_auto_axes,
)
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.blocks import (
    Block,
    Blocks,
    in_order,
    mixed,
    multiplied,
    permuted,
    spread_as,
    spread_beside,
)
from otfusion_jax.symmetry.canonical import nan_unless_canonical, require_canonical
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.correspondence import match_groups
from otfusion_jax.symmetry.folded import folded_axes, resized
from otfusion_jax.symmetry.groups import Group, Member, Plans, Role
from otfusion_jax.symmetry.leaf_structure import LeafStructure, UnitAxis
from otfusion_jax.symmetry.partition import BlockPartition
from otfusion_jax.symmetry.plans import (
    HasPlans,
    is_orthogonal,
    is_permutation,
    new_sizes,
    plans_of,
    require_plans,
)
from otfusion_jax.symmetry.signs import permutation_of, signs_of
from otfusion_jax.symmetry.symmetry import Symmetry


def transport(
    symmetry: Symmetry,
    plans: Plans | HasPlans,
    params: PyTree,
    *,
    onto: Symmetry | None = None,
) -> PyTree:
    """Moves the parameters of a network along plans.

    With permutations the moved network computes the same function as the one given. A pytree
    transform, jitted leaf by leaf; also works inside `jax.jit`, under `jax.vmap` and `jax.grad`.

    Args:
        symmetry: The symmetry of the network.
        plans: Group name to plan, or the result of `align`. A permutation is integer `[n]`:
            position `j` receives unit `plan[j]`. A transport plan is float `[n, m]`. Plans of a
            nested group have its batch in front, as in `[heads, n]`. They apply after the heads
            have moved: unit `j` of head `i` is then unit `plan[i, j]` of the head that has arrived
            at `i`. If the plan of the heads is soft, `[h, g]`, a nested group has a plan for every
            pair of an old and a new head: `[*batch, g, n]` or `[*batch, g, n, m]`, where the last
            axis of the batch counts the old heads. Of a group that rotates (see
            `Symmetry.with_rotations`), a float plan is an orthogonal matrix `Q` `[n, n]`: new unit
            `j` is the sum of `Q[i, j]` times old unit `i`. Onto another number of units it is
            `[n, m]` of orthonormal rows or columns, and what produces units and what consumes them
            is multiplied by a power of `m / n` as well. Of a group that is signed (see
            `Symmetry.with_signs`), it is a permutation whose ones may be minus ones, or onto
            another number of units a transport plan whose masses may be negative. Groups that
            are left out stay.
        params: The parameters of the network. They are not changed.
        onto: The symmetry of the network that the plans lead to, if its widths are others. None
            takes the widths from the plans.

    Returns:
        New parameters of the same structure, lazy where the parameters are (see `LazyArray`), and
        with their shardings. Integers, booleans and keys are passed on. Inside
        `jax.jit` values cannot be looked at: there a matrix that is no rotation and masses that are
        no coupling are taken as they are, and the function changes; the scales of a model that is
        not in canonical form become NaN, where groups rotate.

    Raises:
        ValueError: If plans are of unknown groups, of wrong shapes, or known not to be permutations
            or couplings; if plans of axes with both roles are soft; if the parameters do not fit,
            or are not in canonical form where groups rotate; and if the networks differ in more
            than widths.
        TypeError: If the arguments are in another order, or shapes are in the place of arrays.
    """
    call = "transport(symmetry, plans, params, onto=symmetry_of_the_target)"
    require_symmetry(symmetry, call)
    plans = plans_of(plans)
    if onto is not None:
        require_symmetry(onto, call)
    require_model(symmetry, params)
    if onto is not None:
        onto = match_groups(symmetry, onto)
    require_plans(symmetry, plans, onto)
    require_canonical(symmetry, params, "the model")
    moved = as_jax(move_all(symmetry, plans, nan_unless_canonical(symmetry, params), onto))
    return moved if onto is not None else laid_out_like(moved, params)


def move_all(
    symmetry: Symmetry, plans: Plans, params: PyTree, onto: Symmetry | None = None
) -> PyTree:
    """Moves all parameters along plans, without checks.

    Args:
        symmetry: The symmetry of the network.
        plans: Group name to plan; groups that are left out stay.
        params: The parameters.
        onto: The symmetry of the network that the plans lead to, see `move`.

    Returns:
        The moved parameters. Those that were arrays of NumPy may be so again.
    """
    # Leaf after leaf, each by a small program that equal leaves share: one program for all of a
    # deep network would take XLA longer than everything else.
    moved = []
    for number, part in enumerate(symmetry.split(params)):
        moved.append(move(symmetry, plans, number, part, onto))
    target = symmetry if onto is None else onto
    return target.join(moved)


# --- one parameter, without checks


def move(
    symmetry: Symmetry, plans: Plans, leaf: int, array: Any, onto: Symmetry | None = None
) -> Any:
    """Moves one parameter along plans, without checks.

    Args:
        symmetry: The symmetry of the network.
        plans: Group name to plan; groups that are left out stay.
        leaf: The position of the parameter in `symmetry.parts`.
        array: The parameter.
        onto: The symmetry of the network that the plans lead to, with the source's group names.
            None takes the widths from the plans.

    Returns:
        The moved parameter, of NumPy where that has moved it (see `common.host`).
    """
    numbered = symmetry.numbered_leaves[leaf]
    leaf_plans = numbered.plans(plans)
    folded = folded_axes(symmetry).get(leaf)
    if folded is not None and folded.group.name in plans:
        size = plans[folded.group.name].shape[-1]
        if size != folded.group.size:
            return _resized(array, folded.axis, size)
    if not leaf_plans:
        # The parameter is passed on as it is, of whatever dtype.
        return kept(array)
    target = None if onto is None else onto.leaf_structures[leaf].partition
    if target is numbered.structure.partition:
        # Of the same widths: one program for this and for plans that tell the shape themselves.
        target = None
    if isinstance(array, LazyArray):
        shape = array.shape if onto is None else onto.leaf_structures[leaf].partition.shape
        read = functools.partial(_moved_from_lazy, symmetry, plans, leaf, array, onto)
        return LazyArray(shape, array.dtype, read, checked=True)
    leaf_plans, array = as_numpy((leaf_plans, array))
    return _moved(numbered.structure, target, leaf_plans, array, layout=layout_of(array))


def _resized(array: Any, axis: int, size: int) -> Any:
    """Gives a parameter of ones, see `folded`, another number of them."""
    if not isinstance(array, LazyArray):
        return resized(as_numpy(array), axis=axis, size=size)
    shape = list(array.shape)
    shape[axis] = size

    def read() -> Array:
        return resized(as_numpy(loaded(array)), axis=axis, size=size)

    return LazyArray(tuple(shape), array.dtype, read)


def _moved_from_lazy(
    symmetry: Symmetry, plans: Plans, leaf: int, array: LazyArray, onto: Symmetry | None
) -> Array:
    return move(symmetry, plans, leaf, loaded(array), onto)


@program(static_argnames=("structure", "target", "layout"))
def _moved(
    structure: LeafStructure,
    target: BlockPartition | None,
    plans: Plans,
    array: Array,
    layout: NamedSharding | None,
) -> Array:
    """Moves an array along plans, which may tell its new shape by themselves."""
    if target is None:
        sizes = new_sizes(structure, plans)
        target = structure.partition.resized(sizes) if sizes else structure.partition
        assert target is not None, "require_plans has refused plans that do not tell the shape"

    def move_whole(plans: Plans, array: Array) -> Array:
        blocks = move_blocks(structure, plans, spread_along_one(array, layout))
        return constrained(target.join(blocks), layout)

    return with_auto_axes(move_whole, [array], target.shape)(plans, array)


def move_blocks(
    structure: LeafStructure, plans: Plans, array: Array, frozen: Collection[Member] = ()
) -> Blocks:
    """Takes an array apart and moves its units along plans, without checks.

    Args:
        structure: How the array falls into blocks, and which groups index it.
        plans: Group name to plan; groups that are left out stay.
        array: The array.
        frozen: The members that stay where they are, though their groups have plans.

    Returns:
        The blocks of the moved array.
    """
    blocks = structure.partition.split(array)
    moving = []
    for unit_axis in structure.unit_axes:
        if unit_axis.group.name in plans and unit_axis.member not in frozen:
            moving.append(unit_axis)
    # Outer groups come first, as `LeafStructure` lists them: the plans of nested units are for the
    # heads where they have arrived.
    for unit_axis in moving:
        for key, block in blocks.items():
            if unit_axis.is_in(block):
                spread = spread_beside(block, (unit_axis.dim, *unit_axis.levels))
                moved = _moved_along(unit_axis, spread, moving, plans)
                if spread is not block:
                    moved = spread_as(moved, spread)
                blocks[key] = in_order(moved, block.dims)
    return blocks


def _moved_along(
    unit_axis: UnitAxis, block: Block, moving: Sequence[UnitAxis], plans: Plans
) -> Block:
    """Moves the units of one member in a block.

    Args:
        unit_axis: The member, which is in the block.
        block: The block.
        moving: All members of the leaf that move, this one among them.
        plans: Group name to plan.

    Returns:
        The block, with these units moved.
    """
    plan = plans[unit_axis.group.name]
    role = unit_axis.member.role
    outer_axis = None
    if unit_axis.group.outer is not None:
        outer_axis = _axis_of_outer_group(unit_axis, moving)
    if outer_axis is not None and not is_permutation(plans[outer_axis.group.name]):
        # Heads that do not move one to one take the units in them along, by a plan for each pair
        # of an old and a new head: w[h, g, n, m] = w[h, g] · w[n, m] of that pair.
        outer_weights = _weights(plans[outer_axis.group.name], outer_axis.member.role)
        inner_weights = _unit_weights(unit_axis.group, plan, role)
        weights = outer_weights[..., None, None] * inner_weights
        *batch_dims, outer_dim = unit_axis.levels
        dims = (outer_dim, unit_axis.dim)
        return mixed(block, dims, batch_dims, weights)
    if is_permutation(plan):
        return permuted(block, unit_axis.dim, unit_axis.levels, plan)
    if unit_axis.group.signed and is_orthogonal(unit_axis.group, plan):
        block = permuted(block, unit_axis.dim, unit_axis.levels, permutation_of(plan))
        if not unit_axis.member.odd:
            return block
        signs = signs_of(plan).astype(block.array.dtype)
        return multiplied(block, unit_axis.dim, unit_axis.levels, signs)
    for nested in moving:
        if nested.group.outer != unit_axis.group.name:
            continue
        if nested.levels[-1] == unit_axis.dim and nested.is_in(block):
            # These heads move together with the units in them, when it is the turn of those.
            return block
    if unit_axis.group.signed and not unit_axis.member.odd:
        plan = abs(plan)
    weights = _unit_weights(unit_axis.group, plan, role)
    return mixed(block, (unit_axis.dim,), unit_axis.levels, weights)


def _axis_of_outer_group(unit_axis: UnitAxis, moving: Sequence[UnitAxis]) -> UnitAxis | None:
    """Returns the moving member of the group around that says in which index the units are."""
    index_dim = unit_axis.levels[-1]
    for other in moving:
        if other.dim == index_dim and other.group.name == unit_axis.group.outer:
            return other
    return None


def moved_units(group: Group, plans: Plans, numbers: Array, role: Role, outer_role: Role) -> Array:
    """Moves what is known of each unit, such as a mean, without checks.

    Args:
        group: The group of the units.
        plans: Group name to plan; groups that are left out stay.
        numbers: What is known, float `[*batch, n]`.
        role: The role in which it moves: `"produces"` for the features of the units themselves.
        outer_role: The role in which it moves with the units of the group around, if there is one.

    Returns:
        Float `[*batch, m]`. For a new unit that is produced, the mean over the old ones that map to
        it; otherwise the sum of their shares.
    """
    xp = array_module(numbers)
    product = xp.einsum
    if xp is jnp:
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if group.outer in plans:
        outer_plan = plans[group.outer]
        if not is_permutation(outer_plan):
            outer_weights = _weights(outer_plan, outer_role)
            weights = _unit_weights(group, plans[group.name], role)
            return product("...gn,...gh,...ghnm->...hm", numbers, outer_weights, weights)
        # What is inside of an index goes along with it.
        numbers = xp.take_along_axis(numbers, outer_plan[..., None], axis=-2)
    if group.name not in plans:
        return numbers
    plan = plans[group.name]
    if is_permutation(plan):
        return xp.take_along_axis(numbers, plan, axis=-1)
    weights = _unit_weights(group, plan, role)
    return product("...n,...nm->...m", numbers, weights)


# --- weights of plans


def _unit_weights(group: Group, plan: Array, role: Role) -> Array:
    """Returns by how much old units are in new ones, `[..., n, m]`, in one role."""
    if group.rotates and not is_permutation(plan):
        # An orthogonal matrix is its own inverse transpose, so that it serves both roles. The
        # program may do other things with another number of units.
        n, m = plan.shape[-2:]
        if n == m or group.stretch is None:
            return plan
        return group.stretch.factor(role, n, m) * plan
    return _weights(_as_coupling(plan), role)


def _as_coupling(plan: Array) -> Array:
    """Turns a permutation into a transport plan; others stay."""
    if not is_permutation(plan):
        return plan
    # P[i, j] = 1/n where unit i comes to position j.
    n = plan.shape[-1]
    units = array_module(plan).arange(n)
    is_there = units[:, None] == plan[..., None, :]
    return is_there.astype(jax.dtypes.canonicalize_dtype(float)) / n


def _weights(plan: Array, role: Role) -> Array:
    """Divides a transport plan by its marginals.

    Args:
        plan: Float `[..., n, m]`, of masses that may have signs.
        role: `"produces"` divides by the masses of the new units, P diag(1/b); other roles by those
            of the old ones, diag(1/a) P.

    Returns:
        The weights, `[..., n, m]`. Units without mass have weight 0.
    """
    axis_of_sum = -2 if role == "produces" else -1
    xp = array_module(plan)
    masses = xp.sum(abs(plan), axis=axis_of_sum, keepdims=True)
    # Where there is no mass, this is 0 / 1 and not 0 / 0.
    return plan / xp.where(masses > 0, masses, 1)
