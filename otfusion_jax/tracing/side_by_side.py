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
from otfusion_jax.tracing.interpretation import Interpretation
from otfusion_jax.tracing.interpreter import OnUnsupported
from otfusion_jax.tracing.leaf_splits import SplitInterpretation, interpret_parts
from otfusion_jax.tracing.positions import OnTies
from otfusion_jax.tracing.program_traces import ProgramTrace


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
    split = Symmetry(
        groups=(),
        pinned=(),
        leaves=symmetry.leaves,
        treedef=symmetry.treedef,
        leaf_splits=_splits_with_segments(symmetry, groups),
    )
    found = _signs_in_parts(
        interpret_parts(traces, split, on_unsupported, on_ties, keeps_apart=True),
        symmetry,
        groups,
    )
    freedoms = []
    for freedom in symmetry.freedoms:
        if freedom.group in found:
            group = groups[freedom.group]
            signs = []
            for turned in found[freedom.group]:
                signs.append(_signs_at(symmetry, group, turned))
            freedom = dataclasses.replace(freedom, signs=tuple(signs))
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


def _splits_with_segments(symmetry: Symmetry, groups: Mapping[str, Group]) -> tuple[LeafSplit, ...]:
    """Returns the splits of a symmetry, and those of other leaves into segments."""
    splits = {}
    for leaf_split in (*_splits_into_segments(symmetry, groups), *symmetry.leaf_splits):
        # What is picked apart already comes last, and stays as it is.
        splits[leaf_split.leaf] = leaf_split
    return tuple([splits[leaf] for leaf in sorted(splits)])


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


def _signs_in_parts(
    of_parts: SplitInterpretation, symmetry: Symmetry, groups: Mapping[str, Group]
) -> dict[str, list[set[_Place]]]:
    """Finds where groups change their signs, in the program whose arguments are segments.

    Args:
        of_parts: The interpretation of that program.
        symmetry: The symmetry of whole leaves.
        groups: Some of its groups, by name.

    Returns:
        For each group that is one there, too, of the same units, for each way to change signs where
        they are that change. Those that not all parts of a leaf change alike are left out.
    """
    interpretation = of_parts.interpretation
    interpretation.pin_what_inputs_do_not_show()
    axes = interpretation.expanded_axes()
    leaf_axes = list(zip(of_parts.symmetry.parts, axes, strict=True))
    collected = collect_groups(interpretation, leaf_axes)
    # Groups have no places in common, so that all of them tell which group it is.
    names = {}
    for name, group in groups.items():
        places = frozenset(_places(symmetry, group))
        names[group.size, places] = name
    partners = {}
    for group in collected.groups:
        places_of_parts = _places(of_parts.symmetry, group)
        name = names.get((group.size, frozenset(places_of_parts)))
        if name is not None:
            partners[group.name] = name, places_of_parts
    found = {}
    for partner, scalings in find_signs(interpretation, collected, partners).items():
        name, places_of_parts = partners[partner]
        turned = [_turned_places(places_of_parts, scaling) for scaling in scalings]
        found[name] = [where for where in turned if where is not None]
    return found


def _signs_at(symmetry: Symmetry, group: Group, turned: set[_Place]) -> Scaling:
    """Describes signs by parameters and their axes, and by segments where an axis has several."""
    shared = _side_by_side(group)
    places = _places(symmetry, group)
    degrees = []
    segments = []
    for place in sorted(turned):
        for member in places[place]:
            if member in shared:
                segments.append((member.leaf, member.axis, member.location.index.start))
            else:
                degrees.append((member.leaf, member.axis, 1))
    return Scaling(tuple(degrees), tuple(segments))


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
