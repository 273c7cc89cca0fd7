"""Signs of units that lie several times along one axis, as gates side by side.

The kernel of an LSTM has the units of its state four times along one axis, once for each gate, and
the one behind a tanh alone changes its signs with the state. The laws do not tell the segments of
an axis apart. So the program is rewritten as for leaves that are picked apart (see `split_jaxpr`),
with the segments as its arguments. What is found there is said of the segments of whole leaves,
which the symmetry keeps: they are moved as before.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from otfusion_jax.symmetry.groups import Freedom, Group, LeafSplit, Member, Scaling
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.axis import Axis, factors_of
from otfusion_jax.tracing.freedoms import find_signs, too_coarse
from otfusion_jax.tracing.group_collection import CollectedGroups, collect_groups
from otfusion_jax.tracing.interpretation import Interpretation, interpret_traces
from otfusion_jax.tracing.interpreter import OnUnsupported
from otfusion_jax.tracing.positions import OnTies
from otfusion_jax.tracing.program_traces import ProgramTrace
from otfusion_jax.tracing.split_jaxpr import take_parts


class _Place(NamedTuple):
    """Where units begin: the position of a leaf in the pytree, an axis, and a position there."""

    leaf: int
    axis: int
    start: int


def with_signs_of_segments(
    symmetry: Symmetry,
    interpretation: Interpretation,
    collected: CollectedGroups,
    traces: Sequence[ProgramTrace],
    on_unsupported: OnUnsupported,
    on_ties: OnTies,
) -> Symmetry:
    """Finds the signs of groups whose units lie several times along an axis.

    Args:
        symmetry: The symmetry, with what has been found without telling segments apart.
        interpretation: The interpretation that it was read off.
        collected: The groups that were read off it.
        traces: The traces that were interpreted, of whole leaves.
        on_unsupported: What to do about a primitive without a rule, see `trace_symmetry`.
        on_ties: What to do about positions that depend on the order of equal units.

    Returns:
        The symmetry with the signs that were found in its freedoms.
    """
    groups = _in_question(symmetry, interpretation, collected)
    if not groups:
        return symmetry
    kept = {leaf_split.leaf for leaf_split in symmetry.leaf_splits}
    by_leaf = {leaf_split.leaf: leaf_split for leaf_split in symmetry.leaf_splits}
    for leaf_split in _splits_into_segments(symmetry, groups):
        if leaf_split.leaf not in kept:
            by_leaf[leaf_split.leaf] = leaf_split
    leaf_splits = tuple([by_leaf[leaf] for leaf in sorted(by_leaf)])
    split = Symmetry((), (), symmetry.leaves, symmetry.treedef, leaf_splits)
    signs = _signs_of_parts(split, traces, on_unsupported, on_ties)
    freedoms = []
    for freedom in symmetry.freedoms:
        if freedom.group in groups:
            freedom = _with_signs(symmetry, groups[freedom.group], freedom, signs)
        freedoms.append(freedom)
    return dataclasses.replace(symmetry, freedoms=tuple(freedoms))


# --- which groups


def _in_question(
    symmetry: Symmetry, interpretation: Interpretation, collected: CollectedGroups
) -> dict[str, Group]:
    """Returns the groups that have no signs yet, and lie several times along an axis."""
    repeated = _variables_side_by_side(interpretation)
    outer_names = {group.outer for group in symmetry.groups}
    groups = {}
    for variable, group, freedom in zip(
        collected.names, symmetry.groups, symmetry.freedoms, strict=True
    ):
        has_them = freedom.rotates or bool(freedom.signs) or group.name in outer_names
        if variable in repeated and not has_them and too_coarse(group, symmetry.parts) is None:
            groups[group.name] = group
    return groups


def _variables_side_by_side(interpretation: Interpretation) -> set[int]:
    """Returns the axis variables that lie several times along an axis of any value."""
    axes: dict[Axis, None] = {}
    for value_axes in interpretation.interpreter.values:
        axes.update(dict.fromkeys(value_axes))
    repeated = set()
    for axis in axes:
        variables = [factor.variable for factor in factors_of(interpretation.unifier.expand(axis))]
        for variable in variables:
            if variable is not None and variables.count(variable) > 1:
                repeated.add(variable)
    return repeated


def _splits_into_segments(symmetry: Symmetry, groups: Mapping[str, Group]) -> Iterator[LeafSplit]:
    """Yields how leaves are to be split for each segment with units to be a part of its own."""
    found = set()
    for group in groups.values():
        places = [(member.leaf, member.axis) for member in group.members]
        for member in group.members:
            location = member.location
            leaf = symmetry.leaf_of[member.leaf]
            is_segment = not location.index.outer and location.index.after == 1
            is_aligned = location.length % group.size == location.index.start % group.size == 0
            is_repeated = places.count((member.leaf, member.axis)) > 1
            if is_repeated and is_segment and is_aligned and leaf not in found:
                found.add(leaf)
                yield LeafSplit(leaf, location.axis, location.length // group.size)


# --- what their signs are


class _SignsOfParts(NamedTuple):
    """What was found of the program whose arguments are segments.

    Attributes:
        symmetry: The splits of leaves, and the groups of parts.
        signs: For each group the ways in which its units may change their signs.
    """

    symmetry: Symmetry
    signs: dict[str, tuple[Scaling, ...]]


def _signs_of_parts(
    split: Symmetry,
    traces: Sequence[ProgramTrace],
    on_unsupported: OnUnsupported,
    on_ties: OnTies,
) -> _SignsOfParts:
    """Interprets a program anew, with segments in place of leaves."""
    traces_of_parts = []
    for trace in traces:
        jaxpr = take_parts(trace.jaxpr, split, keeps_apart=True)
        traces_of_parts.append(ProgramTrace(jaxpr, trace.inputs))
    interpretation = interpret_traces(traces_of_parts, split, on_unsupported, on_ties)
    interpretation.pin_what_inputs_do_not_show()
    leaf_axes = list(zip(split.parts, interpretation.expanded_axes(), strict=True))
    collected = collect_groups(interpretation, leaf_axes)
    of_parts = dataclasses.replace(split, groups=collected.groups)
    return _SignsOfParts(of_parts, find_signs(interpretation, collected))


def _with_signs(
    symmetry: Symmetry, group: Group, freedom: Freedom, found: _SignsOfParts
) -> Freedom:
    """Adds to a freedom the signs of the same group in parts, as signs of whole leaves."""
    places = _places(symmetry, group)
    for other in found.symmetry.groups:
        places_of_parts = _places(found.symmetry, other)
        if other.size != group.size or set(places_of_parts) != set(places):
            continue
        signs = []
        for scaling in found.signs[other.name]:
            turned = _turned_places(places_of_parts, scaling)
            if turned is not None:
                signs.append(_scaling_of(places, turned))
        return dataclasses.replace(freedom, signs=tuple(signs))
    return freedom


def _places(symmetry: Symmetry, group: Group) -> dict[_Place, list[Member]]:
    """Returns where the units of a group begin in whole leaves, with the members there.

    Where a leaf is split along another axis than that of the units, each part has a member there.
    """
    places: dict[_Place, list[Member]] = {}
    numbers = {leaf_split.leaf: leaf_split for leaf_split in symmetry.leaf_splits}
    for member in group.members:
        leaf = symmetry.leaf_of[member.leaf]
        start = member.location.index.start
        leaf_split = numbers.get(leaf)
        if leaf_split is not None and leaf_split.axis == member.axis:
            part = member.leaf - symmetry.leaf_of.index(leaf)
            start += part * member.location.length
        places.setdefault(_Place(leaf, member.axis, start), []).append(member)
    return places


def _turned_places(places: dict[_Place, list[Member]], scaling: Scaling) -> set[_Place] | None:
    """Returns where units change their signs; None where not all parts of a leaf do so alike."""
    axes = {(leaf, axis) for leaf, axis, _ in scaling.degrees}
    turned = set()
    for place, members in places.items():
        are_turned = {(member.leaf, member.axis) in axes for member in members}
        if len(are_turned) > 1:
            return None
        if are_turned == {True}:
            turned.add(place)
    return turned


def _scaling_of(places: dict[_Place, list[Member]], turned: set[_Place]) -> Scaling:
    """Describes signs by parameters and their axes, and by segments where an axis has several."""
    axes = [(member.leaf, member.axis) for members in places.values() for member in members]
    degrees = set()
    segments = set()
    for place in turned:
        for member in places[place]:
            if axes.count((member.leaf, member.axis)) > 1:
                segments.add((member.leaf, member.axis, member.location.index.start))
            else:
                degrees.add((member.leaf, member.axis, 1))
    return Scaling(tuple(sorted(degrees)), tuple(sorted(segments)))
