"""Taking arrays apart into blocks with one dimension for each factor, and putting them together.

An axis may be a product of factors (heads times the units of each) or a sum of segments (queries,
keys and values one after the other). A `BlockPartition` cuts an array where segments meet, and
splits what is left into factors. What remains is a few blocks, dense arrays with one dimension for
each factor; every operation on units (see `blocks`) acts on a dimension of these.

All index arithmetic is done with NumPy while tracing. For the device there remain reshapes, and
gathers and concatenations where there are segments.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from otfusion_jax.common.host import Array, array_module
from otfusion_jax.symmetry.blocks import Block, BlockDim, Blocks
from otfusion_jax.symmetry.location import LocatedFactor


@dataclasses.dataclass(frozen=True, eq=False)
class AxisBlock:
    """A part of an axis along which the same factors are present: a product of them, row-major.

    Attributes:
        dims: What each factor is, outermost first. Between any two of the factors that hold units,
            and on both ends, is a factor of what lies between them, often of size 1.
        sizes: The sizes of the factors.
        positions: The positions on the axis, int, ascending.
    """

    dims: tuple[BlockDim, ...]
    sizes: tuple[int, ...]
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class BlockPartition:
    """How an array falls into blocks.

    Attributes:
        axes: For each axis of the array its axis blocks, in the order of their first positions. A
            block of the array is where one of them along each axis meet.
    """

    axes: tuple[tuple[AxisBlock, ...], ...]

    def split(self, array: Array) -> Blocks:
        """Takes an array apart.

        Args:
            array: An array of the shape that the partition was made for.

        Returns:
            Its blocks.
        """
        # Axis by axis: parts that are later cut along another axis share the slice along this one.
        parts: dict[tuple[int, ...], Array] = {(): array}
        for axis, axis_blocks in enumerate(self.axes):
            if len(axis_blocks) == 1:
                # The whole axis is one block.
                parts = {(*key, 0): part for key, part in parts.items()}
                continue
            finer_parts = {}
            for key, part in parts.items():
                for number, axis_block in enumerate(axis_blocks):
                    finer_parts[*key, number] = _take(part, axis_block.positions, axis)
            parts = finer_parts
        blocks = {}
        for key, part in parts.items():
            dims: list[BlockDim] = []
            sizes: list[int] = []
            for axis, number in enumerate(key):
                axis_block = self.axes[axis][number]
                dims.extend(axis_block.dims)
                sizes.extend(axis_block.sizes)
            blocks[key] = Block(tuple(dims), part.reshape(sizes))
        return blocks

    def join(self, blocks: Blocks) -> Array:
        """Puts an array together.

        Args:
            blocks: Blocks of the sizes that this partition has.

        Returns:
            The array.
        """
        parts = {}
        for key, block in blocks.items():
            shape = []
            for axis, number in enumerate(key):
                shape.append(len(self.axes[axis][number].positions))
            parts[key] = block.array.reshape(shape)
        # From the last axis to the first, so that those before it are still numbered by the keys.
        for axis in reversed(range(len(self.axes))):
            rows: dict[tuple[int, ...], list[Array]] = {}
            for key, part in parts.items():
                rows.setdefault(key[:-1], []).append(part)
            parts = {}
            for key, row in rows.items():
                parts[key] = _concatenated(row, self.axes[axis], axis)
        return parts[()]

    def resized(self, sizes: Mapping[int, int]) -> "BlockPartition | None":
        """Returns the partition with other numbers of units.

        Args:
            sizes: By the number of a factor its new size. The other factors stay as they are.

        Returns:
            The partition. None where an axis that changes has blocks that lie in between each
            other, so that it cannot be told where things come to lie.
        """
        axes = []
        for axis_blocks in self.axes:
            dims = set()
            for axis_block in axis_blocks:
                dims.update(axis_block.dims)
            if dims.isdisjoint(sizes):
                # Its blocks may lie in between each other: nothing about them changes.
                axes.append(axis_blocks)
                continue
            start = 0
            resized_blocks = []
            for axis_block in axis_blocks:
                if not _is_contiguous(axis_block.positions):
                    return None
                resized_block = _with_sizes(axis_block, sizes, start)
                resized_blocks.append(resized_block)
                start += len(resized_block.positions)
            axes.append(tuple(resized_blocks))
        return BlockPartition(tuple(axes))

    def together(self, dims: set[BlockDim]) -> bool:
        """Says whether some block of the array has all of some dimensions.

        Args:
            dims: The dimensions.

        Returns:
            Whether there is such a block.
        """
        for axis_blocks in itertools.product(*self.axes):
            block_dims = set()
            for axis_block in axis_blocks:
                block_dims.update(axis_block.dims)
            if dims <= block_dims:
                return True
        return False

    @property
    def dims(self) -> list[list[tuple[BlockDim, ...]]]:
        """The dimensions of each block of each axis, which networks of other widths share."""
        dims = []
        for axis_blocks in self.axes:
            dims.append([axis_block.dims for axis_block in axis_blocks])
        return dims

    @property
    def sizes_between(self) -> dict[BlockDim, int]:
        """The sizes of what lies between factors, which networks of other widths share too."""
        sizes = {}
        for axis_blocks in self.axes:
            for block in axis_blocks:
                for dim, size in zip(block.dims, block.sizes, strict=True):
                    if not isinstance(dim, int):
                        sizes[dim] = size
        return sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        lengths = []
        for axis_blocks in self.axes:
            length = 0
            for axis_block in axis_blocks:
                length += len(axis_block.positions)
            lengths.append(length)
        return tuple(lengths)


def _take(array: Array, positions: np.ndarray, axis: int) -> Array:
    """Takes positions along an axis by what is cheapest: no operation, a slice, or a gather."""
    start = int(positions[0]) if len(positions) else 0
    stop = start + len(positions)
    if not np.array_equal(positions, np.arange(start, stop)):
        return array_module(array).take(array, positions, axis=axis)
    if len(positions) == array.shape[axis]:
        return array
    return array[(slice(None),) * axis + (slice(start, stop),)]


def _concatenated(parts: Sequence[Array], axis_blocks: Sequence[AxisBlock], axis: int) -> Array:
    """Puts parts of an array together along an axis, each position where it belongs.

    Args:
        parts: The part of the array in each block of the axis.
        axis_blocks: The blocks of the axis, which may lie in between each other.
        axis: The axis.

    Returns:
        The whole.
    """
    if len(parts) == 1:
        return parts[0]
    whole = array_module(*parts).concatenate(parts, axis)
    positions = np.concatenate([block.positions for block in axis_blocks])
    return _take(whole, np.argsort(positions), axis)


def _is_contiguous(positions: np.ndarray) -> bool:
    span = positions[-1] + 1 - positions[0]
    return span == len(positions)


def _with_sizes(block: AxisBlock, sizes: Mapping[int, int], start: int) -> AxisBlock:
    """Returns a contiguous block of an axis with other numbers of units, from a position on."""
    new_sizes = []
    for dim, size in zip(block.dims, block.sizes, strict=True):
        if isinstance(dim, int):
            size = sizes.get(dim, size)
        new_sizes.append(size)
    length = math.prod(new_sizes)
    positions = np.arange(start, start + length)
    return AxisBlock(block.dims, tuple(new_sizes), positions)


# --- finding the partition


@functools.lru_cache(maxsize=4096)
def partition_of(shape: tuple[int, ...], factors: tuple[LocatedFactor, ...]) -> BlockPartition:
    """Works out how an array falls into blocks.

    Args:
        shape: The shape of the array.
        factors: The factors of its axes that hold units. The number of each is its index.

    Returns:
        The partition.
    """
    axes = []
    for axis, length in enumerate(shape):
        numbers = [number for number, factor in enumerate(factors) if factor.axis == axis]
        axis_blocks = _axis_blocks(axis, length, numbers, factors)
        axes.append(tuple(axis_blocks))
    return BlockPartition(tuple(axes))


def _axis_blocks(
    axis: int, length: int, numbers: Sequence[int], factors: Sequence[LocatedFactor]
) -> list[AxisBlock]:
    """Cuts an axis where the set of factors that are present changes.

    Args:
        axis: The number of the axis.
        length: Its size.
        numbers: The numbers of the factors that lie along it.
        factors: All factors of the array.

    Returns:
        The blocks of the axis, in the order of their first positions.
    """
    if not numbers or length == 0:
        whole_axis = AxisBlock(((axis, 0),), (length,), np.arange(length))
        return [whole_axis]
    # Row by row the unit of one factor that each position belongs to, -1 where it has none.
    unit_at = np.full((len(numbers), length), -1)
    for row, number in enumerate(numbers):
        factor = factors[number]
        positions = factor.index.positions(factor.size)
        units = np.arange(factor.size)
        unit_at[row, positions] = units[None, :, None]

    # Where the same factors are present there is one block, though its positions be scattered.
    positions_by_rows: dict[tuple[bool, ...], list[int]] = {}
    has_unit = unit_at >= 0
    for position, present in enumerate(has_unit.T.tolist()):
        positions_by_rows.setdefault(tuple(present), []).append(position)

    blocks = []
    # What lies between factors is numbered through all blocks of the axis.
    gaps = zip(itertools.repeat(axis), itertools.count())
    for present, block_positions in positions_by_rows.items():
        positions = np.array(block_positions)
        strides = []
        for row, number in enumerate(numbers):
            if present[row]:
                stride = _stride(unit_at[row, positions])
                strides.append((stride, number))
        block = _axis_block(positions, strides, factors, gaps)
        blocks.append(block)
    return blocks


def _stride(units: np.ndarray) -> int:
    """Returns how many positions on end belong to the first of the units of a factor."""
    others = units != units[0]
    # `argmax` is 0 where there are no others: the factor has one unit in these positions.
    return int(np.argmax(others)) or len(units)


def _axis_block(
    positions: np.ndarray,
    strides: list[tuple[int, int]],
    factors: Sequence[LocatedFactor],
    gaps: Iterator[tuple[int, int]],
) -> AxisBlock:
    """Writes some positions of an axis as a product of factors and of what lies between them.

    Args:
        positions: The positions, at all of which the same factors are present.
        strides: For each of these factors its stride within the positions, and its number.
        factors: All factors of the array.
        gaps: The dimensions of what lies between factors, from the next on.

    Returns:
        The block.
    """
    dims: list[BlockDim] = []
    sizes: list[int] = []
    # From outside to inside, as the strides fall. What is left of a stride, after the units and the
    # strides inside them, is the size of what lies between.
    outer_stride = len(positions)
    for stride, number in sorted(strides, reverse=True):
        size = factors[number].size
        size_between = outer_stride // (size * stride)
        dims += [next(gaps), number]
        sizes += [size_between, size]
        outer_stride = stride
    dims.append(next(gaps))
    sizes.append(outer_stride)
    return AxisBlock(tuple(dims), tuple(sizes), positions)
