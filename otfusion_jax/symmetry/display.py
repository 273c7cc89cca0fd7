"""A symmetry in words: the tables of `print` and of notebooks, and `symmetry.summary()`."""

import collections
import math
from typing import TYPE_CHECKING

from otfusion_jax.common.html import html_table
from otfusion_jax.symmetry.folding import Row, aligned, fold, fold_rows
from otfusion_jax.symmetry.groups import Freedom, Group, Member

if TYPE_CHECKING:
    from otfusion_jax.symmetry.symmetry import Symmetry

_PIN_COLUMNS = ("pinned", "size", "axis", "why")
# Of the leaves that one reason holds, the summary names so many.
_LEAVES_NAMED = 2


def table(symmetry: "Symmetry") -> str:
    """Lists the groups with their members, and what is pinned.

    Args:
        symmetry: The symmetry to be shown.

    Returns:
        The table of `print(symmetry)`.
    """
    columns, groups = _groups_in_rows(symmetry)
    lines = [headline(symmetry), *aligned([columns, *groups])]
    if symmetry.pinned:
        lines.append("")
        lines.extend(aligned([_PIN_COLUMNS, *_pins_in_rows(symmetry)]))
    return "\n".join(lines)


def html(symmetry: "Symmetry") -> str:
    """Shows the same as `table` in a notebook; what is pinned unfolds when it is clicked.

    Args:
        symmetry: The symmetry to be shown.

    Returns:
        A piece of HTML.
    """
    columns, groups = _groups_in_rows(symmetry)
    text = html_table(columns, groups, headline(symmetry))
    if symmetry.pinned:
        axes = counted(len(symmetry.pinned), "axis is", "axes are")
        pins = html_table(_PIN_COLUMNS, _pins_in_rows(symmetry), f"{axes} pinned", folded=True)
        text = f"{text}\n{pins}"
    return text


def summary(symmetry: "Symmetry") -> str:
    """Says which share of the parameters can move, and what pins the rest.

    Args:
        symmetry: The symmetry to be shown.

    Returns:
        Text, see `Symmetry.summary`.
    """
    counts: collections.Counter[Row] = collections.Counter()
    for group in symmetry.groups:
        kind = (units(group), _batch_in_words(group))
        counts[kind] += 1
    rows: list[Row] = [("groups", "units", "")]
    for kind, count in counts.items():
        rows.append((str(count), *kind))
    lines = [headline(symmetry), ""]
    lines.extend(aligned(rows))
    freedoms = _freedoms_in_rows(symmetry)
    if freedoms:
        rows = [("groups", "may be", "and no more because of")]
        rows.extend(freedoms)
        lines.append("")
        lines.extend(aligned(rows))
    reasons = _reasons_in_rows(symmetry)
    if reasons:
        rows = [("do not move", "axes", "in", "pinned because")]
        rows.extend(reasons)
        lines.append("")
        lines.extend(aligned(rows))
    return "\n".join(lines)


def headline(symmetry: "Symmetry") -> str:
    """Says how many groups there are, and which share of the parameters they reach.

    Args:
        symmetry: The symmetry to be shown.

    Returns:
        One line.
    """
    moving = set()
    for group in symmetry.groups:
        for member in group.members:
            moving.add(member.leaf)
    total = movable = 0
    for number, part in enumerate(symmetry.parts):
        size = math.prod(part.shape)
        total += size
        if number in moving:
            movable += size
    share = 100 * movable / max(1, total)
    groups = counted(len(symmetry.groups), "group", "groups")
    leaves = counted(len(symmetry.leaves), "leaf", "leaves")
    moved = "moved" if symmetry.orthogonal else "permuted"
    return (
        f"Symmetry: {groups} over {leaves}; {share:.1f} % of {total:,} "
        f"parameters lie on an axis that can be {moved}"
    )


def counted(count: int, singular: str, plural: str) -> str:
    """Writes how many there are of something, as in `1 group` and `1,024 groups`.

    Args:
        count: The number.
        singular: The name of one.
        plural: The name of several, or of none.

    Returns:
        The text.
    """
    return f"{count:,} {singular if count == 1 else plural}"


def units(group: Group) -> str:
    """Writes the number of units of a group, with the sizes of its batch, as in `12 x 64`.

    Args:
        group: The group.

    Returns:
        The text.
    """
    sizes = (*group.batch, group.size)
    return " x ".join(map(str, sizes))


def moves_in_words(group: Group) -> str:
    """Says how the units of a group move, as in `permuted, scaled`.

    Args:
        group: The group.

    Returns:
        The text.
    """
    if group.scaled:
        return "linear" if group.rotates else f"{group.motion.value}, scaled"
    return group.motion.value


def shows_motions(symmetry: "Symmetry") -> bool:
    """Says whether there are groups that do more than to be permuted.

    Args:
        symmetry: The symmetry to be shown.
    """
    return symmetry.orthogonal or symmetry.has_form


# --- groups and members


def _groups_in_rows(symmetry: "Symmetry") -> tuple[Row, list[Row]]:
    """Returns the names of the columns, and a row for each member of each group."""
    columns: Row = ("group", "units")
    if shows_motions(symmetry):
        columns = (*columns, "move", "because of")
    rows: list[Row] = []
    for header, *members in fold([_block_of(symmetry, group) for group in symmetry.groups]):
        for member in fold_rows(members):
            rows.append((*header, *member))
            # What is said of a group stands in its first row alone.
            header = ("",) * len(columns)
    return (*columns, "role", "leaf", "axis"), rows


def _block_of(symmetry: "Symmetry", group: Group) -> list[Row]:
    """Returns the rows of a group: its name and size, and a row for each member."""
    header: Row = (group.name, units(group))
    if shows_motions(symmetry):
        header = (*header, moves_in_words(group), _limit_in_words(symmetry, group))
    rows: list[Row] = [header]
    for member in group.members:
        axis = _axis_in_words(member, group.size)
        rows.append((member.role, member.path, axis))
    return rows


def _limit_in_words(symmetry: "Symmetry", group: Group) -> str:
    """Says what keeps units from moving more freely, without its source line (see `summary`)."""
    for freedom in symmetry.freedoms:
        if freedom.group == group.name and freedom.reason is not None:
            return freedom.reason.partition(" at ")[0]
    return ""


def _axis_in_words(member: Member, size: int) -> str:
    """Says which axis a member is, and how to read it where the units are not all of it.

    Args:
        member: The member.
        size: The number of units.

    Returns:
        The axis, then the segment of it, then its shape around the units, as in
        `1 [0:768] as [1, 12, 64]`.
    """
    index = member.location.index
    text = str(member.axis)
    span = size * index.after
    # Where nothing is outside the units, they are one segment of the axis, or all of it.
    stride = index.outer[-1][1] if index.outer else span
    if stride != span:
        # The units are a segment of each repetition of something wider.
        start = index.start % stride
        text += f" [..., {start}:{start + span}]"
    else:
        stop = index.stop(size)
        if stop - index.start < member.location.length:
            text += f" [{index.start}:{stop}]"
    before, after = index.before, index.after
    if before * after > 1:
        text += f" as [{before}, {size}, {after}]"
    return text


def _batch_in_words(group: Group) -> str:
    """Says what a group's batch runs over; nothing without a batch."""
    if group.outer is not None:
        return "in each index of another group"
    if group.batch:
        return "in each index of what can't be permuted"
    return ""


# --- freedoms


def _freedoms_in_rows(symmetry: "Symmetry") -> list[Row]:
    """Returns a row for each way in which groups may move, and for what keeps others from it.

    It counts the degrees of freedom: of `n` units `n (n - 1) / 2` of rotations, `n^2` of matrices.
    """
    counts: collections.Counter[Row] = collections.Counter()
    dimensions: collections.Counter[Row] = collections.Counter()
    is_more = False
    for freedom in symmetry.freedoms:
        if freedom.group not in symmetry:
            continue
        group = symmetry[freedom.group]
        row: Row = (_freedom_in_words(freedom), freedom.reason or "")
        count = math.prod(group.batch)
        if freedom.linear:
            dimensions[row] += count * group.size**2
        else:
            n = group.size - 1 if freedom.fixes_ones else group.size
            dimensions[row] += count * n * (n - 1) // 2 if freedom.rotates else 0
            dimensions[row] += count * group.size * len(freedom.scales)
        is_more = is_more or freedom.rotates or bool(freedom.scales or freedom.signs)
        counts[row] += 1
    # Of networks whose units are permuted alone there is nothing to say.
    if not is_more:
        return []
    rows: list[Row] = []
    for (moves, why), count in counts.items():
        number = dimensions[moves, why]
        moves = f"{moves}, {number:,} dimensions" if number else moves
        rows.append((str(count), moves, why))
    if changes := _canonical_form_in_words(symmetry):
        rows.append(("", "", f"canonicalize makes {changes}"))
    return rows


def _canonical_form_in_words(symmetry: "Symmetry") -> str:
    """Says how many parameters are constant in canonical form; nothing if none is."""
    scales = biases = means = 0
    for freedom in symmetry.freedoms:
        scales += len(freedom.folds)
        biases += len(freedom.offsets)
        means += len(freedom.unread_means)
    words = []
    if scales:
        words.append(f"{counted(scales, 'scale', 'scales')} 1")
    if biases:
        words.append(f"{counted(biases, 'bias', 'biases')} 0")
    if means:
        words.append(f"{counted(means, 'mean', 'means')} over units 0")
    return ", ".join(words)


def _freedom_in_words(freedom: Freedom) -> str:
    """Says how units may move, and be scaled."""
    words = "permuted"
    if freedom.linear:
        return "linear"
    if freedom.rotates:
        words = "rotated about the ones" if freedom.fixes_ones else "rotated"
    elif freedom.signs:
        words = "permuted with signs"
    return f"{words}, scaled" if freedom.scales else words


# --- pins


def _pins_in_rows(symmetry: "Symmetry") -> list[Row]:
    """Returns a row for each axis that stays, and why."""
    pins: list[Row] = []
    for pin in symmetry.pinned:
        pins.append((pin.path, str(pin.size), str(pin.axis), pin.reason))
    return fold_rows(pins)


def _reasons_in_rows(symmetry: "Symmetry") -> list[Row]:
    """Returns a row for each reason why parameters stay, the one that holds the most first."""
    sizes = {part.path: math.prod(part.shape) for part in symmetry.parts}
    total = max(1, sum(sizes.values()))
    for group in symmetry.groups:
        for member in group.members:
            # What moves along one axis is not held by a pin on another.
            sizes[member.path] = 0
    paths_of: dict[str, list[str]] = {}
    for pin in symmetry.pinned:
        reason = pin.reason
        if pin.source is not None:
            reason = f"{reason}, at {pin.source}"
        paths_of.setdefault(reason, []).append(pin.path)

    # By the parameters that are held, then by the axes; what is equal stays in the order of pins.
    ranked: list[tuple[int, int, Row]] = []
    for reason, paths in paths_of.items():
        axis_count = len(paths)
        paths = list(dict.fromkeys(paths))
        held = sum([sizes[path] for path in paths])
        share = f"{100 * held / total:.1f} %"
        row = (share, str(axis_count), _leaves_in_words(paths), reason)
        ranked.append((held, axis_count, row))
    ranked.sort(key=lambda entry: entry[:2], reverse=True)
    return [row for _, _, row in ranked]


def _leaves_in_words(paths: list[str]) -> str:
    """Names the first of some leaves."""
    rows = fold_rows([(path,) for path in paths])
    names = [name for (name,) in rows]
    if len(names) > _LEAVES_NAMED:
        names = [*names[:_LEAVES_NAMED], "..."]
    return ", ".join(names)
