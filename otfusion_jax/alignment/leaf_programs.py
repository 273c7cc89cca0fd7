"""What is computed of one parameter of both models, by programs that all of its kind share.

An `AlignmentProblem` goes over parameters one by one. Each of the functions here is a program (see
`common.host`) with the structure of a parameter (see `NumberedLeaf`) as a static argument, so that
the kernels of a hundred blocks need one. What they return is in the dtype that the problem asks
for.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from otfusion_jax.alignment.costs import Gram, as_real, gram, squared_norm, unit_gram
from otfusion_jax.common.host import Array, array_module, fori_loop, inner_product, program, taken
from otfusion_jax.common.sharding import (
    is_spread,
    replicated,
    spread_along_one,
    with_auto_axes,
)
from otfusion_jax.symmetry.blocks import BlockDim, Blocks, in_order, spread_beside
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.leaf_structure import LeafStructure
from otfusion_jax.symmetry.partition import BlockPartition
from otfusion_jax.symmetry.plans import is_permutation
from otfusion_jax.symmetry.transport import move_blocks
from otfusion_jax.symmetry.units import units_in

POSITIONS_AT_ONCE = 16
"""How many moved units `cross_updated` takes into one matrix product."""

LEAST_COSINE = 1e-6
"""What a cosine counts as at least, so that the logarithm of a product of cosines is finite."""


@program(
    static_argnames=(
        "structure",
        "target_partition",
        "axis",
        "frozen",
        "ratio",
        "intra",
        "norms",
        "dtype",
        "layouts",
    )
)
def units_compared(
    structure: LeafStructure,
    target_partition: BlockPartition,
    plans: Plans,
    source: Array,
    target: Array,
    *,
    axis: int,
    frozen: tuple[int, ...],
    ratio: float,
    intra: bool,
    norms: bool,
    dtype: Any,
    layouts: tuple[NamedSharding | None, NamedSharding | None],
) -> Gram:
    """Compares the units of one member.

    Args:
        structure: The structure of the source's parameter.
        target_partition: How the target's parameter falls into blocks.
        plans: The plans of the groups in the structure, by their numbers.
        source: The parameter of the source.
        target: The parameter of the target.
        axis: Which of the unit axes of the structure is compared.
        frozen: Which of them stay where they are.
        ratio: What the source's units are multiplied by.
        intra: Whether to take the inner products within each model as well.
        norms: Whether to take the squared norms, see `gram`.
        dtype: The dtype of the inner products.
        layouts: How both parameters lie on a mesh, as `layout_of` has returned it.

    Returns:
        The inner products.
    """
    unit_axis = structure.unit_axes[axis]
    front = [*unit_axis.levels, unit_axis.dim]
    members = [structure.unit_axes[number].member for number in frozen]

    def compare(plans: Plans, source: Array, target: Array) -> Gram:
        source, target = map(spread_along_one, (source, target), layouts)
        blocks = move_blocks(structure, plans, source, members)
        target_blocks = target_partition.split(target)
        total = None
        for some, some_of_target in _compared_together(blocks, target_blocks, front):
            source_units, target_units = units_in(some, front), units_in(some_of_target, front)
            if ratio != 1:
                source_units = source_units * ratio
            term = unit_gram(source_units, target_units, unit_axis.group, intra, norms)
            total = term if total is None else total + term
        grams = jax.tree.map(lambda x: array_module(x).asarray(x, dtype), total)
        # Where parameters are spread, each device has contracted its part, and these are added up.
        return replicated(grams)

    return with_auto_axes(compare, [source, target], None)(plans, source, target)


def _compared_together(
    blocks: Blocks, target_blocks: Blocks, front: Sequence[BlockDim]
) -> list[tuple[Blocks, Blocks]]:
    """Sorts the blocks of two parameters by which are compared in one matrix product.

    Args:
        blocks: The blocks of the source's parameter.
        target_blocks: Those of the target's, of the same keys and dimensions.
        front: The dimensions of the units.

    Returns:
        Pairs of blocks. On one device all are compared at once. Those that are spread are compared
        one by one, each where it is, as to put them side by side would gather them.
    """
    pairs = []
    for key, block in blocks.items():
        if not is_spread(block.array):
            return [(blocks, target_blocks)]
        if set(front).issubset(block.dims):
            spread = spread_beside(block, front)
            target_block = spread_beside(in_order(target_blocks[key], block.dims), front)
            pairs.append(({key: spread}, {key: target_block}))
    return pairs


@program(donate_argnames=("total",))
def added(total: Gram, term: Gram) -> Gram:
    """Adds inner products over some members to those over others.

    Args:
        total: The inner products over some members of a group. They are overwritten.
        term: Those over others, of the same shapes.

    Returns:
        The inner products over all of them.
    """
    return jax.tree.map(operator.iadd, total, term)


@program(static_argnames=("odd",))
def told_apart(grams: Gram, *, odd: bool) -> Gram:
    """Notes whether what was compared changes its sign with the units, see `Gram.told_apart`.

    Args:
        grams: The inner products.
        odd: Whether it does.

    Returns:
        The inner products.
    """
    return grams.told_apart(odd)


@program(donate_argnames=("moved",))
def in_place(moved: Gram, inverse: Array) -> Gram:
    """Brings inner products of units that have moved into the order that the units came from.

    Args:
        moved: The inner products, of no batch and without those within each model. They are
            overwritten.
        inverse: For each unit the position at which it is, int32 `[n]`.

    Returns:
        The inner products, with the source's units in their own order.
    """
    xp = array_module(moved.cross)
    source_sq_norms = xp.take(moved.source_sq_norms, inverse, mode="clip")
    cross = xp.take(moved.cross, inverse, axis=0, mode="clip")
    return Gram(source_sq_norms, moved.target_sq_norms, cross)


@program(
    static_argnames=("structure", "target_partition", "axis", "neighbour"),
    donate_argnames=("cross",),
)
def cross_updated(
    structure: LeafStructure,
    target_partition: BlockPartition,
    plans: Plans,
    source: Array,
    target: Array,
    cross: Array,
    moves: Array,
    count: Array,
    *,
    axis: int,
    neighbour: int,
) -> Array:
    """Brings inner products of units up to date, after units of a neighbouring group have moved.

    The inner products change by those of the entries that have moved, which are a few of many as a
    descent comes to its end.

    Args:
        structure: The structure of the source's parameter.
        target_partition: How the target's parameter falls into blocks.
        plans: The plans of the groups in the structure, by their numbers.
        source: The parameter of the source.
        target: The parameter of the target.
        cross: The inner products that are to be updated, float `[n, m]`. They are overwritten.
        moves: For each position of the neighbour where its plan has changed the position, the unit
            that was there, and the unit that is there now, int32 `[3, size]`. The size is a
            multiple of `POSITIONS_AT_ONCE`; in columns that are not used, the two units are one.
        count: How many columns are used, int32 `[]`.
        axis: Which of the unit axes of the structure the inner products are of.
        neighbour: Which of the unit axes has moved. It is in no batch, and no batch is in it.

    Returns:
        The inner products, float `[n, m]`.
    """
    unit_axis, moved_axis = structure.unit_axes[axis], structure.unit_axes[neighbour]
    # What is compared stays, and the neighbour is dealt with below.
    frozen = [unit_axis.member, moved_axis.member]
    blocks = move_blocks(structure, plans, source, frozen)
    target_blocks = target_partition.split(target)
    front = [unit_axis.dim]

    def entries(of: Blocks, indices: Array) -> Array:
        chosen = {}
        for key, block in of.items():
            if moved_axis.is_in(block):
                dim = block.dims.index(moved_axis.dim)
                array = array_module(block.array).take(block.array, indices, dim, mode="clip")
                chosen[key] = block._replace(array=array)
        return units_in(chosen, front)

    portions = moves.reshape(3, -1, POSITIONS_AT_ONCE)

    def update(number: int | Array, cross: Array) -> Array:
        position, before, after = portions[:, number]
        difference = entries(blocks, after) - entries(blocks, before)
        change = gram(difference, entries(target_blocks, position)).cross
        return cross + change.astype(cross.dtype)

    steps = (count + POSITIONS_AT_ONCE - 1) // POSITIONS_AT_ONCE
    return fori_loop(steps, update, cross)


@program(static_argnames=("size",))
def carried_plan(plan: Array, old_root_plan: Array, root_plan: Array, size: int) -> Array:
    """Moves the plans inside of a root's units to where these come, as the root's plan changes."""
    # The plan at position j belongs to the index that has come there.
    xp = array_module(plan, old_root_plan, root_plan)
    came_from = xp.take_along_axis(xp.argsort(old_root_plan, axis=-1), root_plan, axis=-1)
    inner_rank = plan.ndim - came_from.ndim
    index = came_from.reshape(*came_from.shape, *[1] * inner_rank)
    # An unsolved root has indices out of range; what is in it must not pass for solved.
    unusable = size if is_permutation(plan) else np.nan
    return taken(plan, index, came_from.ndim - 1, unusable)


@program(static_argnames=("dtype",))
def squared_distance(moved: Array, target: Array, *, dtype: Any) -> Array:
    """Takes the squared distance of a parameter of the moved source to the target's.

    Args:
        moved: The parameter of the source, moved.
        target: The parameter of the target, of the same shape.
        dtype: The dtype of the result.

    Returns:
        The squared distance, float `[]`.
    """

    def distance(moved: Array, target: Array) -> Array:
        return squared_norm(as_real(moved) - as_real(target)).astype(dtype)

    return with_auto_axes(distance, [moved, target], None)(moved, target)


@program(static_argnames=("dtype",))
def log_cosine(moved: Array, target: Array, *, dtype: Any) -> Array:
    """Takes the logarithm of the cosine of a parameter of the moved source and the target's.

    Args:
        moved: The parameter of the source, moved.
        target: The parameter of the target, of the same shape.
        dtype: The dtype of the result.

    Returns:
        The logarithm, float `[]`, at least that of `LEAST_COSINE`.
    """

    def similarity(moved: Array, target: Array) -> Array:
        moved, target = as_real(moved), as_real(target)
        xp = array_module(moved, target)
        norms = xp.sqrt(squared_norm(moved)) * xp.sqrt(squared_norm(target))
        cosine = inner_product(moved, target) / xp.where(norms > 0, norms, 1)
        return xp.log(xp.maximum(cosine, LEAST_COSINE)).astype(dtype)

    return with_auto_axes(similarity, [moved, target], None)(moved, target)
