"""Where units lie in an array, and taking arrays apart into their factors.

An axis may be a product of factors (heads times the units of each) or a sum of segments (queries,
keys and values one after the other). A `Layout` cuts an array where segments meet and splits what
is left into factors. What remains is a few cells, dense arrays with one dimension for each factor;
every operation on units acts on a dimension of these, and may change its size.

All index arithmetic is done with NumPy while tracing. For the device there remain reshapes, and
gathers and concatenations where there are segments.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class StridedIndex:
    """Where units lie along an axis.

    Unit `u` is at the positions `start + i·stride + ... + u·after + a`, with one `i < count` for
    each pair in `outer`, and `a < after`.

    Attributes:
        start: position of the first unit.
        outer: counts and strides of the factors outside the units, outermost first.
        after: product of the factors inside the units.
    """

    start: int
    outer: tuple[tuple[int, int], ...]
    after: int

    @property
    def before(self) -> int:
        """Product of the factors outside the units."""
        return math.prod(count for count, _ in self.outer)

    def positions(self, size: int) -> np.ndarray:
        """Returns the positions of `size` units, int `[before, size, after]`."""
        found = np.array([self.start])
        for count, stride in self.outer:
            found = (found[:, None] + stride * np.arange(count)).reshape(-1)
        units = self.after * np.arange(size)[:, None] + np.arange(self.after)
        return found[:, None, None] + units


@dataclasses.dataclass(frozen=True)
class UnitLocation:
    """Where units lie in an array.

    Attributes:
        axis: the axis of the array.
        length: its size.
        place: where the units are along it.
        within: for each axis of the group's batch, which axis of the array it is, of which size,
            and where along it.
    """

    axis: int
    length: int
    index: StridedIndex
    batch: tuple[tuple[int, int, StridedIndex], ...] = ()


class LocatedFactor(NamedTuple):
    """A factor of an axis: `size` units at a place."""

    axis: int
    index: StridedIndex
    size: int


BlockDim = int | tuple[int, int]
"""A dimension of a cell: the number of a factor, or (axis, number) of what lies between factors."""


class Block(NamedTuple):
    """A dense part of an array.

    Attributes:
        dims: what each dimension is.
        array: the part.
    """

    dims: tuple[BlockDim, ...]
    array: Array


Blocks = dict[tuple[int, ...], Block]
"""The cells of an array by the numbers of their blocks along each axis."""


@dataclasses.dataclass(frozen=True, eq=False)
class AxisBlock:
    """A part of an axis along which the same factors are present: a product of them, row-major.

    Attributes:
        dims: what each factor is, outermost first.
        sizes: of the factors.
        positions: ascending, on the axis.
    """

    dims: tuple[BlockDim, ...]
    sizes: tuple[int, ...]
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class BlockPartition:
    """How an array falls into cells.

    Attributes:
        axes: for each axis of the array its blocks, in the order of their first positions.
    """

    axes: tuple[tuple[AxisBlock, ...], ...]

    def split(self, array: Array) -> Blocks:
        """Takes an array apart.

        Args:
            array: of the shape that the layout was made for.

        Returns:
            Its cells.
        """
        parts: dict[tuple[int, ...], Array] = {(): array}
        for axis, blocks in enumerate(self.axes):
            parts = {
                (*key, number): _taken(part, block.positions, axis)
                for key, part in parts.items()
                for number, block in enumerate(blocks)
            }
        cells = {}
        for key, part in parts.items():
            chosen = [blocks[i] for blocks, i in zip(self.axes, key, strict=True)]
            dims = tuple(dim for block in chosen for dim in block.dims)
            shape = [size for block in chosen for size in block.sizes]
            cells[key] = Block(dims, part.reshape(shape))
        return cells

    def join(self, cells: Blocks) -> Array:
        """Puts an array together.

        Args:
            cells: that belong to this layout.

        Returns:
            The array.
        """
        parts = {}
        for key, cell in cells.items():
            shape = [len(blocks[i].positions) for blocks, i in zip(self.axes, key, strict=True)]
            parts[key] = cell.array.reshape(shape)
        for axis in reversed(range(len(self.axes))):
            blocks = self.axes[axis]
            joined = {}
            for key in dict.fromkeys(key[:axis] for key in parts):
                row = [parts[*key, number] for number in range(len(blocks))]
                whole = row[0] if len(row) == 1 else jnp.concatenate(row, axis)
                order = np.argsort(np.concatenate([block.positions for block in blocks]))
                joined[key] = _taken(whole, order, axis)
            parts = joined
        return parts[()]

    def resized(self, sizes: Mapping[int, int]) -> "BlockPartition | None":
        """Returns the layout with other numbers of units.

        Args:
            sizes: the new size of each factor, by its number; others stay.

        Returns:
            The layout; None where an axis that changes has segments in between each other, so that
            where things come to lie can't be told.
        """
        axes = []
        for blocks in self.axes:
            if not any(dim in sizes for block in blocks for dim in block.dims):
                axes.append(blocks)
                continue
            spans = [block.positions[-1] + 1 - block.positions[0] for block in blocks]
            if spans != [len(block.positions) for block in blocks]:
                return None
            changed, start = [], 0
            for block in blocks:
                new = tuple(
                    sizes.get(dim, size) if isinstance(dim, int) else size
                    for dim, size in zip(block.dims, block.sizes, strict=True)
                )
                length = math.prod(new)
                changed.append(AxisBlock(block.dims, new, start + np.arange(length)))
                start += length
            axes.append(tuple(changed))
        return BlockPartition(tuple(axes))

    def together(self, dims: set[BlockDim]) -> bool:
        """Says whether there is a cell that has all of some dimensions.

        Args:
            dims: the dimensions.

        Returns:
            Whether there is one.
        """
        cells = itertools.product(*self.axes)
        return any(dims <= {dim for block in cell for dim in block.dims} for cell in cells)

    @property
    def form(self) -> tuple[tuple[tuple[BlockDim, ...], ...], ...]:
        """What the blocks of each axis are products of: what layouts of other widths share."""
        return tuple(tuple(block.dims for block in blocks) for blocks in self.axes)

    @property
    def between(self) -> dict[BlockDim, int]:
        """Sizes of what is no factor, which layouts of other widths share too."""
        return {
            dim: size
            for blocks in self.axes
            for block in blocks
            for dim, size in zip(block.dims, block.sizes, strict=True)
            if not isinstance(dim, int)
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(sum(len(block.positions) for block in blocks) for blocks in self.axes)


def _taken(array: Array, positions: np.ndarray, axis: int) -> Array:
    """Takes positions along an axis, as cheaply as can be."""
    if not len(positions):
        return jax.lax.slice_in_dim(array, 0, 0, axis=axis)
    if not np.array_equal(positions, positions[0] + np.arange(len(positions))):
        return jnp.take(array, positions, axis=axis)
    if len(positions) == array.shape[axis]:
        return array
    return jax.lax.slice_in_dim(array, int(positions[0]), int(positions[-1]) + 1, axis=axis)


@functools.lru_cache(maxsize=4096)
def partition_of(shape: tuple[int, ...], factors: tuple[LocatedFactor, ...]) -> BlockPartition:
    """Works out how an array falls into cells.

    Args:
        shape: of the array.
        factors: of its axes; the number of each is its index.

    Returns:
        The layout.
    """
    axes = []
    for axis, length in enumerate(shape):
        mine = [(number, f) for number, f in enumerate(factors) if f.axis == axis]
        axes.append(tuple(_blocks(axis, length, mine)))
    return BlockPartition(tuple(axes))


def _blocks(
    axis: int, length: int, factors: Sequence[tuple[int, LocatedFactor]]
) -> list[AxisBlock]:
    labels = np.full((len(factors), length), -1)
    for row, (_, factor) in zip(labels, factors, strict=True):
        row[factor.index.positions(factor.size)] = np.arange(factor.size)[None, :, None]
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for position, present in enumerate((labels >= 0).T.tolist()):
        patterns.setdefault(tuple(present), []).append(position)
    count = itertools.count()
    blocks = []
    for present, location in patterns.items():
        positions = np.array(location)
        levels = []
        for has, row, (number, factor) in zip(present, labels, factors, strict=True):
            if has:
                found = row[positions]
                inner = int(np.argmax(found != found[0])) or len(found)
                levels.append((inner, number, factor.size))
        dims: list[BlockDim] = []
        sizes: list[int] = []
        left = len(positions)
        for inner, number, size in sorted(levels, reverse=True):
            dims += [(axis, next(count)), number]
            sizes += [left // (size * inner), size]
            left = inner
        dims.append((axis, next(count)))
        sizes.append(left)
        blocks.append(AxisBlock(tuple(dims), tuple(sizes), positions))
    return blocks or [AxisBlock(((axis, 0),), (length,), np.arange(length))]


# --- operations on a dimension


def permuted(cell: Block, dim: BlockDim, levels: Sequence[BlockDim], plan: Array) -> Block:
    """Permutes the units along a dimension.

    Args:
        cell: that has this dimension.
        dim: the dimension.
        levels: for each axis of the plan's batch, the dimension that it is.
        plan: integer `[*batch, size]`: position `j` receives unit `plan[j]`. An index out of range,
            which is how a solver marks a problem that it could not solve, gives NaN.

    Returns:
        The cell with its units in another order.
    """
    axis = cell.dims.index(dim)
    how = {"axis": axis, "mode": "fill", "fill_value": jnp.nan}
    if not levels:
        return cell._replace(array=jnp.take(cell.array, plan, **how))
    at = [*map(cell.dims.index, levels), axis]
    index = plan.transpose(np.argsort(at))
    index = jnp.expand_dims(index, [i for i in range(cell.array.ndim) if i not in at])
    return cell._replace(array=jnp.take_along_axis(cell.array, index, **how))


def mixed(
    cell: Block, dims: Sequence[BlockDim], levels: Sequence[BlockDim], weights: Array
) -> Block:
    """Replaces the units along a dimension by weighted sums of units, or along two at once.

    Args:
        cell: that has these dimensions.
        dims: the units', after that of what is around them if it is replaced too.
        levels: for each axis of the weights' batch, the dimension that it is.
        weights: float `[*batch, old, new]`, or `[*batch, old, new, old, new]`.

    Returns:
        The cell with the new units.
    """
    rank = cell.array.ndim
    new = {cell.dims.index(dim): rank + i for i, dim in enumerate(dims)}
    by = [*map(cell.dims.index, levels), *itertools.chain(*new.items())]
    out = [new.get(i, i) for i in range(rank)]
    names, highest = list(range(rank)), jax.lax.Precision.HIGHEST
    product = jnp.einsum(cell.array, names, weights, by, out, precision=highest)
    return cell._replace(array=product)


def fronted(cell: Block, front: Sequence[BlockDim]) -> Array:
    """Brings dimensions to the front.

    Args:
        cell: that has them.
        front: the dimensions.

    Returns:
        `[*front, rest]`.
    """
    at = [*map(cell.dims.index, front)]
    array = jnp.moveaxis(cell.array, at, range(len(at)))
    return array.reshape(*array.shape[: len(at)], -1)
