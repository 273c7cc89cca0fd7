"""Reading and moving units where they lie in an array.

A member's `Where` says at which positions of one axis its units are. All index arithmetic is done
with NumPy while tracing; what remains for the device is a gather along an axis.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from otfusion_jax.symmetry import Group, Where


def _levels(where: Where, batch: Sequence[int]) -> list[tuple[int, np.ndarray]]:
    """Returns for each axis of the batch: on which axis it lies, and the index by position.

    Positions that belong to no index have -1.
    """
    levels = []
    for (axis, length, place), size in zip(where.within, batch, strict=True):
        labels = np.full(length, -1)
        labels[place.positions(size)] = np.arange(size)[None, :, None]
        levels.append((axis, labels))
    return levels


def units_of(array: Array, where: Where, group: Group) -> Array:
    """Brings the units to the front: everything else is what they are vectors of.

    Args:
        array: a parameter, or features.
        where: where the units lie in it.
        group: whose units.

    Returns:
        `[*batch, size, rest]`.
    """
    levels = _levels(where, group.batch)
    columns = np.moveaxis(where.place.positions(group.size), 1, 0).reshape(group.size, -1)
    names: list[int | str] = list(range(array.ndim))
    for axis in reversed(range(array.ndim)):
        mine = [k for k, (on, _) in enumerate(levels) if on == axis]
        sizes = [group.batch[k] for k in mine]
        if axis == where.axis:
            index = _by_label([levels[k][1][columns[0]] for k in mine], sizes, columns)
            labels: list[int | str] = [*(f"level {k}" for k in mine), axis, "units"]
        elif mine:
            everything = np.arange(array.shape[axis])[None]
            index = _by_label([levels[k][1] for k in mine], sizes, everything)[..., 0]
            labels = [*(f"level {k}" for k in mine), axis]
        else:
            continue
        if not np.array_equal(index.reshape(-1), np.arange(array.shape[axis])):
            array = jnp.take(array, index.reshape(-1), axis=axis)
        shape = array.shape
        array = array.reshape(*shape[:axis], *index.shape, *shape[axis + 1 :])
        names[axis : axis + 1] = labels
    front = [names.index(f"level {k}") for k in range(len(levels))] + [names.index("units")]
    array = jnp.moveaxis(array, front, range(len(front)))
    return array.reshape(*group.batch, group.size, -1)


def _by_label(labels: list[np.ndarray], sizes: list[int], columns: np.ndarray) -> np.ndarray:
    """Sorts the columns of `[rows, columns]` by label: `[*sizes, columns per label, rows]`."""
    combined = np.zeros(columns.shape[1], int)
    for label, size in zip(labels, sizes, strict=True):
        combined = np.where((label < 0) | (combined < 0), -1, combined * size + label)
    order = np.argsort(combined, kind="stable")[np.count_nonzero(combined < 0) :]
    return columns[:, order].T.reshape(*sizes, -1, len(columns))


def with_units(array: Array, where: Where, group: Group, units: Array) -> Array:
    """Writes units back.

    Args:
        array: what `units_of` read from.
        where: where the units lie in it.
        group: whose units.
        units: `[*batch, size, rest]`.

    Returns:
        The array with these units, everything else as it was.
    """
    read = functools.partial(units_of, where=where, group=group)
    put = jax.linear_transpose(read, jnp.zeros(array.shape, units.dtype))
    (found,) = put(units)
    if where.place.fills(group.size, where.length) and not where.within:
        return found
    (mine,) = put(jnp.ones_like(units))
    return jnp.where(mine > 0, found, array)


def permuted(array: Array, where: Where, group: Group, plan: Array) -> Array:
    """Permutes units.

    Args:
        array: a parameter.
        where: where the units lie in it.
        group: whose units.
        plan: integer `[*batch, size]`: position `j` receives unit `plan[j]`. An index out of range,
            which is how a solver marks a problem that it could not solve, gives NaN.

    Returns:
        The array with its units in another order.
    """
    own = where.place.positions(group.size).astype(plan.dtype)
    levels = _levels(where, group.batch)
    others = sorted({axis for axis, _ in levels if axis != where.axis})
    # The dimensions of the index: other axes that it depends on, then [before, after].
    before, after = own.shape[0], own.shape[2]
    rank = len(others) + 2
    picks, inside = [], np.ones([1] * rank, bool)
    for axis, labels in levels:
        shape = [1] * rank
        if axis == where.axis:
            shape[-2:] = [before, after]
            pick = labels[own[:, 0, :]].reshape(shape)
        else:
            shape[others.index(axis)] = len(labels)
            pick = labels.reshape(shape)
            inside = inside & (pick >= 0)
        picks.append(np.maximum(pick, 0))
    chosen = plan[tuple(picks)] if picks else plan.reshape([1] * rank + [-1])
    ahead = [1] * len(others)
    moved = own[:, 0, :].reshape(*ahead, before, after, 1) + chosen * where.place.after
    moved = jnp.where(chosen < group.size, moved, where.length)
    still = np.moveaxis(own, 1, 2).reshape(*ahead, before, after, group.size)
    moved = jnp.where(inside[..., None], moved, still)
    lead = moved.shape[: len(others)]
    sources = jnp.broadcast_to(moved, (*lead, before, after, group.size)).reshape(*lead, -1)
    # Every position of the axis, those that stay included, takes its source from this list.
    stay = np.broadcast_to(np.arange(where.length, dtype=plan.dtype), (*lead, where.length))
    selector = np.arange(where.length) + sources.shape[-1]
    selector[np.moveaxis(own, 1, 2).reshape(-1)] = np.arange(own.size)
    index = jnp.concatenate([sources, stay], axis=-1)[..., selector]
    if not others:
        return jnp.take(array, index, axis=where.axis, mode="fill", fill_value=jnp.nan)
    dims = [*others, where.axis]
    index = index.transpose(np.argsort(dims))
    index = jnp.expand_dims(index, [d for d in range(array.ndim) if d not in dims])
    return jnp.take_along_axis(array, index, axis=where.axis, mode="fill", fill_value=jnp.nan)


def mixed(array: Array, where: Where, group: Group, weights: Array) -> Array:
    """Replaces units by weighted sums of units.

    Args:
        array: a parameter.
        where: where the units lie in it. If they are not all of the axis, or the group is nested,
            there have to be as many new units as old ones.
        group: whose units.
        weights: float `[*batch, old, new]`.

    Returns:
        The array with the new units.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if group.batch or not where.place.fills(group.size, where.length):
        found = units_of(array, where, group)
        return with_units(array, where, group, product(jnp.swapaxes(weights, -1, -2), found))
    # Factors further in may have been resized already, so `place.after` need not hold any more.
    shape, dim, before = array.shape, where.axis, where.place.before
    split = array.reshape(*shape[:dim], before, group.size, -1, *shape[dim + 1 :])
    moved = product(jnp.moveaxis(split, dim + 1, -1), weights)
    return jnp.moveaxis(moved, -1, dim + 1).reshape(*shape[:dim], -1, *shape[dim + 1 :])
