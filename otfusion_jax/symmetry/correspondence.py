"""Architectures that differ in their widths alone: which group of one is which of the other.

Groups correspond if their members are the same axes of the same leaves in the same roles. Where
they do, `match_groups` gives the target's groups the names of the source's, so that plans by these
names lead from one network to the other. Where they do not, it says in what the networks differ.
"""

import dataclasses
import functools
from typing import NamedTuple

from otfusion_jax.symmetry.folded import folded_axes
from otfusion_jax.symmetry.groups import Group, Member
from otfusion_jax.symmetry.stretch import difference
from otfusion_jax.symmetry.symmetry import Symmetry

_Pair = tuple[Group, Group]
"""A group of the source, and the group of the target that corresponds to it."""


# Every call that takes a source and a target matches them anew: `align`, `transport`, `repair`.
@functools.lru_cache(maxsize=256)
def match_groups(source: Symmetry, target: Symmetry) -> Symmetry:
    """Matches the groups of two symmetries by structure.

    Args:
        source: The symmetry that was traced from one network.
        target: The symmetry that was traced from another, of the same parameters with other widths.

    Returns:
        The target's symmetry with the names of the source's groups, in the source's order.

    Raises:
        ValueError: If the architectures differ in more than widths, naming what differs by group
            and key path.
    """
    if source == target:
        return target
    # What fails a step would be reported by the steps after it in other words, once more.
    _refuse(_differences_of_leaves(source, target))
    pairs, unmatched = _pair_groups(source, target)
    source_names = {target_group.name: group.name for group, target_group in pairs}
    differences = unmatched
    differences += _differences_of_nesting(pairs, source_names)
    differences += _widths_that_must_not_differ(source, pairs)
    _refuse(differences)
    groups = [_renamed(group, target_group, source_names) for group, target_group in pairs]
    freedoms = []
    for freedom in target.freedoms:
        if freedom.group in source_names:
            freedoms.append(dataclasses.replace(freedom, group=source_names[freedom.group]))
    matched = dataclasses.replace(target, groups=tuple(groups), freedoms=tuple(freedoms))
    _refuse(_differences_of_axes(source, matched))
    return matched


def target_names(matched: Symmetry, target: Symmetry) -> dict[str, str]:
    """Returns the names that a target's groups were traced with.

    Args:
        matched: The symmetry that `match_groups` has made of the target.
        target: The target.

    Returns:
        From the names of the source's groups to those of the target's.
    """
    # `match_groups` changes names and order alone: a group is recognised by the set of its members.
    name_of_members = {frozenset(group.members): group.name for group in target.groups}
    names = {}
    for group in matched.groups:
        members = frozenset(group.members)
        names[group.name] = name_of_members[members]
    return names


def permutable_only(symmetry: Symmetry) -> dict[str, str]:
    """Finds groups that can only be permuted: others are nested in them on two axes of a leaf.

    When such a group moves along a soft plan, each of the two would have to be moved by a plan for
    every pair of old and new index, and the leaf has the index once.

    Args:
        symmetry: The symmetry of the groups.

    Returns:
        From the name of each such group to the reason, in words.
    """
    reasons = {}
    for leaf, structure in zip(symmetry.parts, symmetry.leaf_structures, strict=True):
        unit_axes = structure.unit_axes
        for number, unit_axis in enumerate(unit_axes):
            group = unit_axis.group
            if group.outer is None:
                continue
            for other in unit_axes[:number]:
                if other.group.outer != group.outer:
                    continue
                # Along another axis the leaf has the index of the group around once more.
                if other.levels[-1] != unit_axis.levels[-1]:
                    continue
                if structure.partition.together({unit_axis.dim, other.dim}):
                    reasons[group.outer] = (
                        f"{group.name} and {other.group.name}, nested in it, are both in "
                        f"{leaf.path}, so that it can only be permuted"
                    )
    return reasons


def _refuse(differences: list[str]) -> None:
    if differences:
        raise ValueError(
            "the source and the target differ in more than the widths of their groups:\n"
            + "\n".join(differences)
        )


# --- leaves


def _differences_of_leaves(source: Symmetry, target: Symmetry) -> list[str]:
    """Returns a line for each part that only one of two networks has."""
    source_paths = [part.path for part in source.parts]
    target_paths = [part.path for part in target.parts]
    if source.treedef == target.treedef and source_paths == target_paths:
        return []
    lines = []
    for path in sorted(set(source_paths) - set(target_paths)):
        lines.append(f"  {path}: only in the source")
    for path in sorted(set(target_paths) - set(source_paths)):
        lines.append(f"  {path}: only in the target")
    return lines or ["  the same leaves in containers of other types"]


def _differences_of_axes(source: Symmetry, matched: Symmetry) -> list[str]:
    """Returns a line for each leaf whose axes are not the same products and sums of units."""
    lines = []
    folded = folded_axes(source)
    for number, leaf in enumerate(source.parts):
        if number in folded:
            # All ones, of which there are as many as units.
            group, axis = folded[number]
            shape = list(leaf.shape)
            shape[axis] = matched[group.name].size
            if tuple(shape) != matched.parts[number].shape:
                lines.append(f"  {leaf.path}: {leaf.shape} and {matched.parts[number].shape}")
            continue
        partition = source.leaf_structures[number].partition
        target_partition = matched.leaf_structures[number].partition
        if partition.dims != target_partition.dims:
            lines.append(f"  {leaf.path}: its axes are products and sums of other things")
        elif partition.sizes_between != target_partition.sizes_between:
            lines.append(
                f"  {leaf.path}: shapes {partition.shape} and {target_partition.shape} differ "
                "along what can't be permuted"
            )
    return lines


# --- groups


class _GroupStructure(NamedTuple):
    """What groups that correspond have in common, whatever their widths.

    Attributes:
        members: Of each member the leaf, the axis, the role, and the number of axes of its batch,
            sorted.
        batch_rank: The number of axes of the batch.
        is_nested: Whether the group is nested in another.
    """

    members: tuple[tuple[int, int, str, int], ...]
    batch_rank: int
    is_nested: bool


def _structure_of(group: Group) -> _GroupStructure:
    members = []
    for member in group.members:
        batch_rank = len(member.location.batch)
        members.append((member.leaf, member.axis, member.role, batch_rank))
    members.sort()
    is_nested = group.outer is not None
    return _GroupStructure(tuple(members), len(group.batch), is_nested)


def _pair_groups(source: Symmetry, target: Symmetry) -> tuple[list[_Pair], list[str]]:
    """Finds for each group of a source the group of a target that has its structure.

    Args:
        source: The source.
        target: The target, of the same leaves.

    Returns:
        The pairs, in the source's order; and a line for each group that has no partner.
    """
    unmatched: dict[_GroupStructure, list[Group]] = {}
    for group in target.groups:
        unmatched.setdefault(_structure_of(group), []).append(group)
    pairs = []
    lines = []
    for group in source.groups:
        candidates = unmatched.get(_structure_of(group), [])
        if not candidates:
            problem = _in_place_of(group, target)
            lines.append(f"  {group.name} ({group.size}): {problem}")
            continue
        # Several groups have one structure where they lie side by side along one axis, as gate and
        # value in one kernel. Their names count them in dataflow order.
        partner = _of_the_same_name(group, candidates)
        candidates.remove(partner)
        pairs.append((group, partner))
    for groups in unmatched.values():
        for group in groups:
            lines.append(f"  {group.name} ({group.size}): a group of the target alone")
    return pairs, lines


def _of_the_same_name(group: Group, candidates: list[Group]) -> Group:
    """Chooses among groups of one structure that of a group's name, otherwise the first."""
    for candidate in candidates:
        if candidate.name == group.name:
            return candidate
    return candidates[0]


def _in_place_of(group: Group, target: Symmetry) -> str:
    """Says what a target has where the source has a group."""
    member = group.members[0]
    target_shape = target.parts[member.leaf].shape
    if member.axis < len(target_shape) and target_shape[member.axis] == 1:
        return f"{member.path} has one unit in the target, which is no group; give it two or more"
    for pin in target.pinned:
        if pin.path == member.path and pin.axis == member.axis:
            return f"in the target axis {member.axis} of {member.path} is {pin.reason}"
    return "the target has no group with the same members"


def _differences_of_nesting(pairs: list[_Pair], source_names: dict[str, str]) -> list[str]:
    """Returns a line for each pair of groups that have other things around them.

    Args:
        pairs: The pairs of groups.
        source_names: From the name of a target's group to that of its partner.

    Returns:
        The lines.
    """
    lines = []
    for group, partner in pairs:
        partner_outer = None if partner.outer is None else source_names.get(partner.outer)
        if partner_outer != group.outer:
            lines.append(
                f"  {group.name}: in {group.outer} in the source, in {partner_outer} there"
            )
        elif _fixed_batch(group) != _fixed_batch(partner):
            lines.append(
                f"  {group.name}: {group.batch} of them in the source, {partner.batch} in the "
                "target, along what can't be permuted"
            )
    return lines


def _fixed_batch(group: Group) -> tuple[int, ...]:
    """Returns the sizes of the axes of the batch that cannot be permuted: they are no widths."""
    if group.outer is None:
        return group.batch
    return group.batch[:-1]


def _widths_that_must_not_differ(source: Symmetry, pairs: list[_Pair]) -> list[str]:
    """Returns a line for each group of another width that can only be permuted."""
    reasons = permutable_only(source)
    lines = []
    for group, partner in pairs:
        reason = reasons.get(group.name)
        sizes_differ = group.size != partner.size
        if _keeps_its_number(group) or _keeps_its_number(partner):
            kind = (group if group.signed else partner).motion.value
            reason = f"its units are {kind}, which keeps their number"
            sizes_differ = (group.batch, group.size) != (partner.batch, partner.size)
        elif group.rotates:
            # An isometry changes their number, if the program can make up for it.
            reason = reason or difference(group.stretch, partner.stretch)
        if reason is not None and sizes_differ:
            lines.append(f"  {group.name}: {reason}")
        elif group.motion is not partner.motion:
            kinds = (
                f"{group.motion.value} in one of the two and {partner.motion.value} in the other"
            )
            lines.append(f"  {group.name}: its units are {kinds}")
    return lines


def _keeps_its_number(group: Group) -> bool:
    """Whether units can only be moved onto as many: those that have signs inside of heads."""
    return group.signed and bool(group.batch)


def _renamed(group: Group, partner: Group, source_names: dict[str, str]) -> Group:
    """Returns a target's group with the name of the source's, and its members in that order.

    Args:
        group: The group of the source.
        partner: The group of the target.
        source_names: From the name of a target's group to that of its partner.

    Returns:
        The group of the target.
    """
    # Members that correspond have the same rank in both networks.
    source_members = sorted(group.members, key=_rank)
    target_members = sorted(partner.members, key=_rank)
    corresponding = dict(zip(source_members, target_members, strict=True))
    members = [corresponding[member] for member in group.members]
    outer = None
    if partner.outer is not None:
        outer = source_names[partner.outer]
    return dataclasses.replace(partner, name=group.name, members=tuple(members), outer=outer)


def _rank(member: Member) -> tuple[int, int, str, int, int]:
    """Orders the members of a group in a way that does not depend on widths.

    On one axis they come as they lie, and of two that start at the same position the one with more
    inside each unit comes first.
    """
    index = member.location.index
    return member.leaf, member.axis, member.role, index.start, -index.after
