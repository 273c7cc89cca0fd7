"""Pins, read off a finished interpretation: which axes of parameters stay, and why."""

from collections.abc import Iterator, Sequence

import numpy as np

from otfusion_jax.symmetry.groups import UNREAD, Leaf, Pin
from otfusion_jax.tracing.axis import Axis, factors_of
from otfusion_jax.tracing.group_collection import LeafAxes
from otfusion_jax.tracing.interpretation import Interpretation
from otfusion_jax.tracing.occurrences import occurrences
from otfusion_jax.tracing.unification import Unifier

_SINGLE_POSITIONS = "taken apart into single positions"
"""Why an axis stays that has no variable left to be pinned: each of its positions is by itself."""


def collect_pins(interpretation: Interpretation, leaf_axes: Sequence[LeafAxes]) -> tuple[Pin, ...]:
    """Reads the pins off a finished interpretation.

    Args:
        interpretation: The interpretation, in which everything is pinned that has to be.
        leaf_axes: The parameters that it started with, and their axes.

    Returns:
        One pin for each axis that holds no units of a group, or two where parts of it are pinned
        and other parts have not been read.
    """
    pins: list[Pin] = []
    for leaf, axes in leaf_axes:
        for dim, axis in enumerate(axes):
            if not _has_units(interpretation.unifier, axis):
                pins.extend(_pins_of_axis(interpretation, leaf, dim, axis))
    return tuple(pins)


def _has_units(unifier: Unifier, axis: Axis) -> bool:
    """Whether any of an axis is free to move."""
    for factor in factors_of(axis):
        if factor.variable is not None and unifier.is_free(factor.variable):
            return True
    return False


def _pins_of_axis(
    interpretation: Interpretation, leaf: Leaf, dim: int, axis: Axis
) -> Iterator[Pin]:
    """Yields what holds an axis without units: the first reason, and what is not read."""
    unifier = interpretation.unifier
    held: list[int] = []
    unread: list[np.ndarray] = []
    is_selected = False
    for occurrence in occurrences(axis):
        variable = occurrence.factor.variable
        if variable is None:
            continue
        if unifier.reason(variable) != UNREAD:
            held.append(variable)
            continue
        # Where parts of an axis are left out, all of it stays. Those that are read are not listed.
        is_selected = True
        if variable not in interpretation.read:
            unread.append(occurrence.index.positions(occurrence.factor.size).ravel())
    size = leaf.shape[dim]
    # An axis of size 1 is an empty product: nothing has to hold it.
    if held:
        yield _pin_of_variable(unifier, leaf, dim, held[0])
    elif axis and not is_selected:
        yield Pin(leaf.path, dim, size, _SINGLE_POSITIONS)
    if unread:
        positions = np.unique(np.concatenate(unread))
        is_whole = len(positions) == size
        which = "" if is_whole else f"{_ranges(positions)} "
        yield Pin(leaf.path, dim, size, f"{which}{UNREAD}")
    elif is_selected:
        yield Pin(leaf.path, dim, size, f"in part {UNREAD}")


def _pin_of_variable(unifier: Unifier, leaf: Leaf, dim: int, variable: int) -> Pin:
    """Returns the pin of an axis that a pinned variable holds."""
    reason = unifier.reason(variable)
    assert reason is not None, "a variable that is not free has a reason"
    equation = unifier.pinned_at.get(variable)
    source = None if equation is None else equation.source
    # The reason that a rule gives names the line already.
    if source and source in reason:
        source = None
    return Pin(leaf.path, dim, leaf.shape[dim], reason, source)


def _ranges(positions: np.ndarray) -> str:
    """Writes ascending positions as ranges, in the manner of a slice: `[0:2, 5:8]`."""
    # A range ends where the next position is not one further.
    ends = np.flatnonzero(np.diff(positions) != 1) + 1
    ranges = []
    for run in np.split(positions, ends):
        ranges.append(f"{run[0]}:{run[-1] + 1}")
    return "[" + ", ".join(ranges) + "]"
