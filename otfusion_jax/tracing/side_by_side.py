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

from otfusion_jax.symmetry.groups import Group, LeafSplit, Member, Scaling
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
    splits = {}
    for leaf_split in _splits_into_segments(symmetry, groups):
        splits[leaf_split.leaf] = leaf_split
    # What is picked apart already stays as it is.
    for leaf_split in symmetry.leaf_splits:
        splits[leaf_split.leaf] = leaf_split
    in_order = []
    for leaf in sorted(splits):
        in_order.append(splits[leaf])
    split = Symmetry(
        groups=(),
        pinned=(),
        leaves=symmetry.leaves,
        treedef=symmetry.treedef,
        leaf_splits=tuple(in_order),
    )
    of_parts = _interpreted_in_parts(
        split,
        traces,
        on_unsupported,
        on_ties,
    )
    partners = {}
    for name, group in groups.items():
        partner = _same_group(symmetry, group, of_parts.symmetry)
        if partner is not None:
            partners[name] = partner
    names = {partner.name for partner in partners.values()}
    signs = find_signs(of_parts.interpretation, of_parts.collected, names)
    freedoms = []
    for freedom in symmetry.freedoms:
        name = freedom.group
        if name in partners:
            partner = partners[name]
            found = _scalings_of_leaves(
                _places(symmetry, groups[name]),
                _places(of_parts.symmetry, partner),
                _side_by_side(groups[name]),
                signs[partner.name],
            )
            freedom = dataclasses.replace(freedom, signs=found)
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
        if variable not in repeated or group.name in outer_names:
            continue
        has_signs = freedom.rotates or bool(freedom.signs)
        coarse = too_coarse(group, symmetry.parts)
        if not has_signs and coarse is None:
            groups[group.name] = group
    return groups


def _variables_side_by_side(interpretation: Interpretation) -> set[int]:
    """Returns the axis variables that lie several times along an axis of any value."""
    axes: dict[Axis, None] = {}
    for value_axes in interpretation.interpreter.values:
        axes.update(dict.fromkeys(value_axes))
    repeated = set()
    for axis in axes:
        expanded = interpretation.unifier.expand(axis)
        seen = set()
        for factor in factors_of(expanded):
            variable = factor.variable
            if variable is None:
                continue
            if variable in seen:
                repeated.add(variable)
            seen.add(variable)
    return repeated


def _splits_into_segments(symmetry: Symmetry, groups: Mapping[str, Group]) -> Iterator[LeafSplit]:
    """Yields how leaves are to be split for each segment with units to be a part of its own."""
    found = set()
    for group in groups.values():
        for member in _side_by_side(group):
            location = member.location
            leaf = symmetry.leaf_of[member.leaf]
            index = location.index
            count, rest = divmod(location.length, group.size)
            is_segment = not index.outer and index.after == 1
            is_aligned = rest == 0 and index.start % group.size == 0
            if is_segment and is_aligned and leaf not in found:
                found.add(leaf)
                yield LeafSplit(leaf, location.axis, count)


def _side_by_side(group: Group) -> list[Member]:
    """Returns the members of a group that share an axis of a parameter with others of it."""
    by_axis: dict[tuple[int, int], list[Member]] = {}
    for member in group.members:
        place = member.leaf, member.axis
        by_axis.setdefault(place, []).append(member)
    shared = []
    for members in by_axis.values():
        if len(members) > 1:
            shared.extend(members)
    return shared


# --- what their signs are


class _InParts(NamedTuple):
    """What is known of the program whose arguments are segments.

    Attributes:
        symmetry: The splits of leaves, and the groups of parts.
        interpretation: The interpretation of the program.
        collected: The groups that were read off it.
    """

    symmetry: Symmetry
    interpretation: Interpretation
    collected: CollectedGroups


def _interpreted_in_parts(
    split: Symmetry,
    traces: Sequence[ProgramTrace],
    on_unsupported: OnUnsupported,
    on_ties: OnTies,
) -> _InParts:
    """Interprets a program anew, with segments in place of leaves."""
    traces_of_parts = []
    for trace in traces:
        jaxpr = take_parts(trace.jaxpr, split, keeps_apart=True)
        traces_of_parts.append(ProgramTrace(jaxpr, trace.inputs))
    interpretation = interpret_traces(traces_of_parts, split, on_unsupported, on_ties)
    interpretation.pin_what_inputs_do_not_show()
    axes = interpretation.expanded_axes()
    leaf_axes = list(zip(split.parts, axes, strict=True))
    collected = collect_groups(interpretation, leaf_axes)
    of_parts = dataclasses.replace(split, groups=collected.groups)
    return _InParts(of_parts, interpretation, collected)


def _same_group(symmetry: Symmetry, group: Group, of_parts: Symmetry) -> Group | None:
    """Returns the group of parts whose units lie where those of a group of leaves do, all of it."""
    places = _places(symmetry, group)
    for other in of_parts.groups:
        if other.size != group.size:
            continue
        places_of_parts = _places(of_parts, other)
        if places_of_parts.keys() == places.keys():
            return other
    return None


def _scalings_of_leaves(
    places: dict[_Place, list[Member]],
    places_of_parts: dict[_Place, list[Member]],
    side_by_side: Sequence[Member],
    signs: Sequence[Scaling],
) -> tuple[Scaling, ...]:
    """Says of whole leaves which signs parts may change.

    Args:
        places: Where the units of the group begin, with the members there.
        places_of_parts: The same with the members in parts.
        side_by_side: The members that share an axis of a parameter.
        signs: The signs of parts.

    Returns:
        Those signs that all parts of a leaf change alike, beside the axis that it is split along.
    """
    found = []
    for scaling in signs:
        turned = _turned_places(places_of_parts, scaling)
        if turned is None:
            continue
        degrees = []
        segments = []
        for place in sorted(turned):
            for member in places[place]:
                start = member.location.index.start
                if member in side_by_side:
                    segments.append((member.leaf, member.axis, start))
                else:
                    degrees.append((member.leaf, member.axis, 1))
        of_leaves = Scaling(
            degrees=tuple(degrees),
            segments=tuple(segments),
        )
        found.append(of_leaves)
    return tuple(found)


def _places(symmetry: Symmetry, group: Group) -> dict[_Place, list[Member]]:
    """Returns where the units of a group begin in whole leaves, with the members there.

    Where a leaf is split along another axis than that of the units, each part has a member there.
    """
    places: dict[_Place, list[Member]] = {}
    axes_of_splits = {}
    for leaf_split in symmetry.leaf_splits:
        axes_of_splits[leaf_split.leaf] = leaf_split.axis
    for member in group.members:
        leaf = symmetry.leaf_of[member.leaf]
        start = member.location.index.start
        if axes_of_splits.get(leaf) == member.axis:
            first_part = symmetry.leaf_of.index(leaf)
            part = member.leaf - first_part
            start += part * member.location.length
        place = _Place(leaf, member.axis, start)
        places.setdefault(place, []).append(member)
    return places


def _turned_places(places: dict[_Place, list[Member]], scaling: Scaling) -> set[_Place] | None:
    """Returns where units change their signs; None where not all parts of a leaf do so alike."""
    axes = set()
    for leaf, axis, _ in scaling.degrees:
        axes.add((leaf, axis))
    turned = set()
    for place, members in places.items():
        count = 0
        for member in members:
            count += (member.leaf, member.axis) in axes
        if count not in (0, len(members)):
            return None
        if count:
            turned.add(place)
    return turned
