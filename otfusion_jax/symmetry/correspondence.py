"""Architectures that differ in their widths alone: which group of one is which of the other."""

import dataclasses
import functools
from typing import Any

from otfusion_jax.symmetry.groups import Group, Member
from otfusion_jax.symmetry.symmetry import Symmetry


@functools.lru_cache(maxsize=256)
def match_groups(source: Symmetry, target: Symmetry) -> Symmetry:
    """Matches the groups of two symmetries by structure.

    Args:
        source: traced from one network.
        target: traced from another, of the same parameters with other widths.

    Returns:
        The target's symmetry with the names of the source's groups, in the source's order.

    Raises:
        ValueError: if the architectures differ in more than widths, naming what differs by group
            and key path.
    """
    if source == target:
        return target
    if source.treedef != target.treedef or _paths(source) != _paths(target):
        paths = [set(_paths(s)) for s in (source, target)]
        wrong = [f"  {p}: only in the source" for p in sorted(paths[0] - paths[1])]
        wrong += [f"  {p}: only in the target" for p in sorted(paths[1] - paths[0])]
        _refuse(wrong or ["  the same leaves in containers of other types"])
    theirs: dict[Any, list[Group]] = {}
    for group in target.groups:
        theirs.setdefault(_structure(group), []).append(group)
    pairs, wrong = [], []
    for group in source.groups:
        alike = theirs.get(_structure(group), [])
        same = [other for other in alike if other.name == group.name] or alike
        if same:
            alike.remove(same[0])
            pairs.append((group, same[0]))
        else:
            wrong.append(f"  {group.name} ({group.size}): {_missing(group, target)}")
    for group in (group for left in theirs.values() for group in left):
        wrong.append(f"  {group.name} ({group.size}): a group of the target alone")
    names = {other.name: group.name for group, other in pairs}
    for group, other in pairs:
        around = other.outer and names.get(other.outer)
        if around != group.outer:
            wrong.append(f"  {group.name}: in {group.outer} in the source, in {around} there")
        elif group.batch[: _fixed(group)] != other.batch[: _fixed(other)]:
            wrong.append(
                f"  {group.name}: {group.batch} of them in the source, {other.batch} in the target,"
                " along what can't be permuted"
            )
    crowds = crowded(source)
    for group, other in pairs:
        if group.size != other.size and group.name in crowds:
            wrong.append(f"  {group.name}: {crowds[group.name]}")
    _refuse(wrong)
    found = dataclasses.replace(
        target, groups=tuple(_renamed(mine, other, names) for mine, other in pairs)
    )
    for leaf, mine, other in zip(
        source.parts, source.leaf_structures, found.leaf_structures, strict=True
    ):
        if mine.partition.form != other.partition.form:
            wrong.append(f"  {leaf.path}: its axes are products and sums of other things")
        elif mine.partition.between != other.partition.between:
            wrong.append(
                f"  {leaf.path}: shapes {mine.partition.shape} and {other.partition.shape} differ "
                "along what can't be permuted"
            )
    _refuse(wrong)
    return found


def _paths(symmetry: Symmetry) -> list[str]:
    return [part.path for part in symmetry.parts]


def _fixed(group: Group) -> int:
    """Returns how many axes of the batch can't be permuted."""
    return len(group.batch) - (group.outer is not None)


def crowded(symmetry: Symmetry) -> dict[str, str]:
    """Finds groups that can only be permuted: others are nested in them on two axes of a parameter.

    Args:
        symmetry: whose groups.

    Returns:
        For each the reason, in words.
    """
    found = {}
    for leaf, (partition, unit_axes) in zip(symmetry.parts, symmetry.leaf_structures, strict=True):
        for number, use in enumerate(unit_axes):
            for other in unit_axes[:number]:
                same = use.group.outer == other.group.outer and use.levels[-1:] == other.levels[-1:]
                if use.group.outer and same and partition.together({use.dim, other.dim}):
                    found[use.group.outer] = (
                        f"{use.group.name} and {other.group.name}, nested in it, are both in "
                        f"{leaf.path}, so that it can only be permuted"
                    )
    return found


def names(matching: Symmetry, target: Symmetry) -> dict[str, str]:
    """Returns the names that a target's groups were traced with.

    Args:
        matching: what `matched` made of the target.
        target: the target.

    Returns:
        From the names of the source's groups to those of the target's.
    """
    own = {frozenset(group.members): group.name for group in target.groups}
    return {group.name: own[frozenset(group.members)] for group in matching.groups}


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ValueError(
            "the source and the target differ in more than the widths of their groups:\n"
            + "\n".join(wrong)
        )


def _key(member: Member) -> tuple[Any, ...]:
    place = member.location.index
    return member.leaf, member.axis, member.role, place.start > 0, place.start, -place.after


def _structure(group: Group) -> Any:
    members = sorted((m.leaf, m.axis, m.role, len(m.location.batch)) for m in group.members)
    return tuple(members), len(group.batch), group.outer is not None


def _missing(group: Group, target: Symmetry) -> str:
    """Says what the target has where the source has a group."""
    member = group.members[0]
    size = target.parts[member.leaf].shape[member.axis : member.axis + 1]
    if size == (1,):
        return f"{member.path} has one unit in the target, which is no group; give it two or more"
    path = (member.path, member.axis)
    reasons = [p.reason for p in target.pinned if (p.path, p.axis) == path]
    if reasons:
        return f"in the target axis {member.axis} of {member.path} is {reasons[0]}"
    return "the target has no group with the same members"


def _renamed(group: Group, other: Group, names: dict[str, str]) -> Group:
    """Returns a group with the name of another, and its members in the other's order."""
    order = sorted(range(len(group.members)), key=lambda i: _key(group.members[i]))
    members: list[Any] = [None] * len(order)
    for i, member in zip(order, sorted(other.members, key=_key), strict=True):
        members[i] = member
    outer = None if other.outer is None else names[other.outer]
    return dataclasses.replace(other, name=group.name, members=tuple(members), outer=outer)
