"""Dense blocks of an array, and what is done to the units along one of their dimensions.

A `BlockPartition` takes an array apart into blocks with one dimension for each factor of each axis.
Here units along a dimension are permuted, or mixed by weights, which may change how many there are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from otfusion_jax.common.host import Array, array_module, matmul, taken
from otfusion_jax.common.sharding import best_axis_to_spread, spread_along

BlockDim = int | tuple[int, int]
"""A dimension of a block: the number of a factor, or (axis, number) of what lies between two."""


class Block(NamedTuple):
    """A dense part of an array.

    Attributes:
        dims: What each dimension of the part is.
        array: The part.
    """

    dims: tuple[BlockDim, ...]
    array: Array


Blocks = dict[tuple[int, ...], Block]
"""The blocks of an array, by the number of the axis block that each is in along every axis."""


def spread_beside(block: Block, dims: Sequence[BlockDim]) -> Block:
    """Spreads a block over the devices of its mesh along a dimension that is not worked on.

    Every device then has all units of its part, and works on these without the others.

    Args:
        block: A block, traced.
        dims: The dimensions that are worked on, and have to be whole.

    Returns:
        The block, with that dimension first. On one device, and where there is no other dimension
        that is long enough, it is the block as it was.
    """
    others = [axis for axis, dim in enumerate(block.dims) if dim not in dims]
    axis = best_axis_to_spread(block.array, others)
    if axis is None:
        return block
    array = spread_along(block.array, axis)
    # What is flattened keeps its layout if the dimension that is spread comes first.
    in_front = (block.dims[axis], *block.dims[:axis], *block.dims[axis + 1 :])
    return in_order(Block(block.dims, array), in_front)


def spread_as(moved: Block, spread: Block) -> Block:
    """Spreads a block along the dimension that `spread_beside` has spread it along.

    Args:
        moved: The block, after units along other dimensions have moved.
        spread: What `spread_beside` has returned, which has that dimension first.

    Returns:
        The block. A product of it with a matrix would be laid out as the compiler likes.
    """
    return moved._replace(array=spread_along(moved.array, moved.dims.index(spread.dims[0])))


def in_order(block: Block, dims: Sequence[BlockDim]) -> Block:
    """Brings the dimensions of a block into an order.

    Args:
        block: The block.
        dims: All of its dimensions.

    Returns:
        The block, of that order.
    """
    axes = [block.dims.index(dim) for dim in dims]
    return Block(tuple(dims), block.array.transpose(axes))


def permuted(
    block: Block, dim: BlockDim, batch_dims: Sequence[BlockDim], permutation: Array
) -> Block:
    """Permutes the units along a dimension.

    Args:
        block: A block that has this dimension, and those of the batch.
        dim: The dimension of the units.
        batch_dims: For each axis of the permutation's batch, the dimension that it is.
        permutation: Integer `[*batch, size]`: position `j` receives unit `permutation[j]`. An index
            out of range, which is how a solver marks a problem that it could not solve, gives NaN.

    Returns:
        The block with its units in another order.
    """
    axis = block.dims.index(dim)
    indices = _beside(block, (*batch_dims, dim), permutation) if batch_dims else permutation
    return block._replace(array=taken(block.array, indices, axis, np.nan))


def multiplied(
    block: Block, dim: BlockDim, batch_dims: Sequence[BlockDim], factors: Array
) -> Block:
    """Multiplies the units along a dimension by a number each.

    Args:
        block: A block that has this dimension, and those of the batch.
        dim: The dimension of the units.
        batch_dims: For each axis of the batch of the factors, the dimension that it is.
        factors: `[*batch, size]`.

    Returns:
        The block with its units multiplied.
    """
    return block._replace(array=block.array * _beside(block, (*batch_dims, dim), factors))


def _beside(block: Block, dims: Sequence[BlockDim], numbers: Array) -> Array:
    """Brings the axes of numbers into the order of a block's, of size 1 where they have none.

    Args:
        block: The block.
        dims: For each axis of the numbers, the dimension that it is.
        numbers: The numbers.

    Returns:
        The numbers, of the rank of the block.
    """
    axes = [block.dims.index(dim) for dim in dims]
    in_order = numbers.transpose(np.argsort(axes))
    absent = [axis for axis in range(block.array.ndim) if axis not in axes]
    return array_module(numbers).expand_dims(in_order, absent)


def mixed(
    block: Block, dims: Sequence[BlockDim], batch_dims: Sequence[BlockDim], weights: Array
) -> Block:
    """Replaces the units along a dimension by weighted sums of units, or along two at once.

    Args:
        block: A block that has these dimensions, and those of the batch.
        dims: The dimension of the units; in front of it that of the units around them, if those are
            replaced too.
        batch_dims: For each axis of the weights' batch, the dimension that it is.
        weights: Float `[*batch, old, new]`, or `[*batch, old around, new around, old, new]`.

    Returns:
        The block with the new units.
    """
    # A product of matrices: [*batch, others, old units] with [*batch, old units, new units].
    count = len(dims)
    levels = len(batch_dims)
    batch_axes = [block.dims.index(dim) for dim in batch_dims]
    old_axes = [block.dims.index(dim) for dim in dims]
    other_axes = [x for x in range(block.array.ndim) if x not in (*batch_axes, *old_axes)]
    order = [*batch_axes, *other_axes, *old_axes]
    array = block.array.transpose(order)
    batch, others = array.shape[:levels], array.shape[levels : array.ndim - count]
    # Of the weights, old units and new ones take turns.
    old_first = [
        *range(levels),
        *range(levels, weights.ndim, 2),
        *range(levels + 1, weights.ndim, 2),
    ]
    weights = weights.transpose(old_first)
    old, new = weights.shape[levels : levels + count], weights.shape[levels + count :]
    product = matmul(
        array.reshape(*batch, math.prod(others), math.prod(old)),
        weights.reshape(*batch, math.prod(old), math.prod(new)),
    )
    product = product.reshape(*batch, *others, *new)
    return block._replace(array=product.transpose(np.argsort(order)))


def fronted(block: Block, front: Sequence[BlockDim]) -> Array:
    """Brings some dimensions of a block to the front, and flattens the others.

    Args:
        block: A block that has these dimensions.
        front: The dimensions, in the order in which they are wanted.

    Returns:
        The block as an array `[*front, rest]`.
    """
    axes = [block.dims.index(dim) for dim in front]
    others = [axis for axis in range(block.array.ndim) if axis not in axes]
    array = block.array.transpose([*axes, *others])
    return array.reshape(*array.shape[: len(axes)], -1)
