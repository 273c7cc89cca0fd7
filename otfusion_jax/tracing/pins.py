"""Pins, read off a finished interpretation: which axes of parameters stay, and why."""

from collections.abc import Iterator, Sequence

import numpy as np

from otfusion_jax.symmetry.groups import LEFT_OUT, UNREAD, Leaf, Pin
from otfusion_jax.tracing.axis import Axis, factors_of
from otfusion_jax.tracing.axis_variables import TAKEN_APART
from otfusion_jax.tracing.group_collection import LeafAxes
from otfusion_jax.tracing.interpretation import Interpretation
from otfusion_jax.tracing.occurrences import occurrences
from otfusion_jax.tracing.unification import Unifier

_NOT_READ = (UNREAD, LEFT_OUT)
"""Why an axis stays that these inputs do not show in full."""


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
    unifier = interpretation.unifier
    for (leaf, axes), starting_axes in zip(leaf_axes, interpretation.param_axes, strict=True):
        for dim, axis in enumerate(axes):
            if not _has_units(unifier, axis):
                with_singles = unifier.expand(starting_axes[dim], keep_single=True)
                pins.extend(_pins_of_axis(interpretation, leaf, dim, with_singles))
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
    reasons: dict[int, str] = {}
    for factor in factors_of(axis):
        # A single position moves nowhere: nothing pins it.
        if factor.variable is not None and factor.size > 1:
            reason = unifier.reason(factor.variable)
            assert reason is not None, "a variable that is not free has a reason"
            reasons[factor.variable] = reason
    held: list[int] = []
    selected: list[str] = []
    for variable, reason in reasons.items():
        if reason in _NOT_READ:
            selected.append(reason)
        else:
            held.append(variable)
    size = leaf.shape[dim]
    # An axis of size 1 is an empty product: nothing has to hold it.
    if held:
        yield _pin_of_variable(unifier, leaf, dim, held[0])
    elif size > 1 and not reasons:
        yield Pin(leaf.path, dim, size, TAKEN_APART)
    if not selected:
        return
    # Where parts of an axis are not read, all of it stays. Those that are read are not listed.
    unread = _unread_positions(interpretation, axis)
    for reason, positions in unread.items():
        is_whole = len(positions) == size
        which = "" if is_whole else f"{_ranges(positions)} "
        yield Pin(leaf.path, dim, size, f"{which}{reason}")
    if not unread:
        yield Pin(leaf.path, dim, size, f"tied to what is in part {selected[0]}")


def _unread_positions(interpretation: Interpretation, axis: Axis) -> dict[str, np.ndarray]:
    """Returns which positions of an axis are not read, in ascending order, by the reason."""
    unifier = interpretation.unifier
    unread: dict[str, list[np.ndarray]] = {}
    for occurrence in occurrences(axis):
        variable = occurrence.factor.variable
        if variable is None or variable in interpretation.read:
            continue
        is_single = unifier.size(variable) == 1
        if is_single or unifier.reason(variable) in _NOT_READ:
            is_featured = variable in interpretation.featured
            reason = LEFT_OUT if is_featured else UNREAD
            positions = occurrence.index.positions(occurrence.factor.size)
            unread.setdefault(reason, []).append(positions.ravel())
    ascending = {}
    for reason, found in unread.items():
        positions = np.concatenate(found)
        ascending[reason] = np.unique(positions)
    return ascending


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
