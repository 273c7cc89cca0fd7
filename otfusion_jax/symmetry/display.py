"""A symmetry in words and pictures: what repeats itself is shown once."""

import collections
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otfusion_jax.symmetry.groups import Group, Member, Pin
    from otfusion_jax.symmetry.symmetry import Symmetry

FOLDED_FROM = 3
"""Fewer repetitions are written out."""

Row = tuple[str, ...]


def table(symmetry: "Symmetry") -> str:
    """Lists the groups with their members, and what is pinned.

    Args:
        symmetry: to be shown.

    Returns:
        The table of `print(symmetry)`.
    """
    blocks = _folded([_block(group) for group in symmetry.groups])
    rows: list[Row] = [("group", "units", "role", "leaf", "axis")]
    for (name, units), *members in blocks:
        shown = [row for (row,) in _folded([(member,) for member in members])]
        for i, (role, leaf, axis) in enumerate(shown):
            rows.append((name, units, role, leaf, axis) if i == 0 else ("", "", role, leaf, axis))
    lines = [_headline(symmetry), *_columns(rows)]
    if symmetry.pinned:
        pins = [((p.path, str(p.size), str(p.axis), p.reason),) for p in symmetry.pinned]
        shown = [row for (row,) in _folded(pins)]
        lines += ["", *_columns([("pinned", "size", "axis", "why"), *shown])]
    return "\n".join(lines)


def summary(symmetry: "Symmetry") -> str:
    """Says which share of the parameters can move, and what pins the rest.

    Args:
        symmetry: to be shown.

    Returns:
        See `Symmetry.summary`.
    """
    sizes = [math.prod(part.shape) for part in symmetry.parts]
    total = max(1, sum(sizes))
    free: set[tuple[str, int]] = {(m.path, m.axis) for g in symmetry.groups for m in g.members}
    moving = {path for path, _ in free}
    counts = collections.Counter((_units(g), _kind(g)) for g in symmetry.groups)
    rows: list[Row] = [("groups", "units", "")]
    rows += [(str(count), units, kind) for (units, kind), count in counts.items()]
    lines = [_headline(symmetry), "", *_columns(rows)]

    held: dict[str, list[Pin]] = {}
    for pin in symmetry.pinned:
        reason = pin.reason if pin.source is None else f"{pin.reason}, at {pin.source}"
        held.setdefault(reason, []).append(pin)
    still = {part.path: n for part, n in zip(symmetry.parts, sizes, strict=True)}
    found = []
    for reason, pins in held.items():
        paths = dict.fromkeys(pin.path for pin in pins)
        whole = sum(still[path] for path in paths if path not in moving)
        found.append((whole, len(pins), reason, paths))
    found.sort(key=lambda row: (-row[0], -row[1]))
    if found:
        pinned: list[Row] = [("do not move", "axes", "in", "pinned because")]
        for whole, count, reason, paths in found:
            shown = [row for ((row,),) in _folded([((path,),) for path in paths])]
            text = ", ".join(shown[:2]) + (", ..." if len(shown) > 2 else "")
            pinned.append((f"{100 * whole / total:.1f} %", str(count), text, reason))
        lines += ["", *_columns(pinned)]
    return "\n".join(lines)


def draw(symmetry: "Symmetry", ax: Any = None) -> Any:
    """Draws the groups as a matrix of leaves by groups; needs matplotlib.

    A square is coloured where a leaf has an axis of the group: blue produces its units, orange
    consumes them, green does both. Leaves without any are left blank.

    Args:
        symmetry: to be drawn.
        ax: matplotlib axes to draw on; a new figure that fits if None.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    colours = {"produces": "tab:blue", "consumes": "tab:orange", "both": "tab:green"}
    leaves = [part.path for part in symmetry.parts]
    if ax is None:
        width, height = 4 + 0.25 * len(symmetry.groups), 2 + 0.18 * len(leaves)
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    for column, group in enumerate(symmetry.groups):
        roles: dict[int, set[str]] = {}
        for member in group.members:
            roles.setdefault(member.leaf, set()).add(member.role)
        for row, found in roles.items():
            role = found.pop() if len(found) == 1 else "both"
            place = (column - 0.5, row - 0.5)
            ax.add_patch(Rectangle(place, 1, 1, color=colours[role], linewidth=0))
    names = [f"{group.name} ({_units(group)})" for group in symmetry.groups]
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(leaves)), leaves, fontsize=7)
    ax.set(xlim=(-0.5, max(1, len(names)) - 0.5), ylim=(len(leaves) - 0.5, -0.5))
    ax.set_xlabel("group (units)")
    ax.legend(
        handles=[Patch(color=colour, label=role) for role, colour in colours.items()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
    )
    return ax


def _headline(symmetry: "Symmetry") -> str:
    moving = {m.leaf for g in symmetry.groups for m in g.members}
    sizes = [math.prod(part.shape) for part in symmetry.parts]
    total = sum(sizes)
    share = 100 * sum(sizes[i] for i in moving) / total if total else 0.0
    count = "1 group" if len(symmetry.groups) == 1 else f"{len(symmetry.groups)} groups"
    return (
        f"Symmetry: {count} over {len(symmetry.leaves)} leaves; {share:.1f} % of {total:,} "
        "parameters lie on an axis that can be permuted"
    )


def _kind(group: "Group") -> str:
    if group.outer is not None:
        return "in each index of another group"
    return "in each index of what can't be permuted" if group.batch else ""


def _units(group: "Group") -> str:
    return " x ".join(map(str, (*group.batch, group.size)))


def _block(group: "Group") -> tuple[Row, ...]:
    members = ((m.role, m.path, _view(m, group.size)) for m in group.members)
    return ((group.name, _units(group)), *members)


def _view(member: "Member", size: int) -> str:
    """Says which axis, and how to read it where the units are not all of it."""
    place, text = member.location.index, str(member.axis)
    end = max(place.positions(size).flat) + 1
    if place.outer and place.outer[-1][1] != size * place.after:
        inner = place.start % place.outer[-1][1]
        text += f" [..., {inner}:{inner + size * place.after}]"
    elif end - place.start < member.location.length:
        text += f" [{place.start}:{end}]"
    if member.before * member.after > 1:
        text += f" as [{member.before}, {size}, {member.after}]"
    return text


# --- folding


_NAMES = re.compile(r"(?<=[A-Za-z_/.\[])\d+|^\d+")
"""Numbers that are part of a name: those that count blocks or layers."""


def _folded(blocks: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Writes blocks of rows that differ by the count of a layer alone as one.

    Args:
        blocks: each of some rows; the numbers in its names are what may differ.

    Returns:
        The blocks, in the order of the first of each. In place of a number that runs through
        `a, a + 1, ..., b` stands `{a..b}`.
    """
    alike: dict[tuple[Row, ...], list[tuple[int, ...]]] = {}
    for block in blocks:
        template = tuple(tuple(_NAMES.sub("{}", cell) for cell in row) for row in block)
        numbers = tuple(int(n) for row in block for cell in row for n in _NAMES.findall(cell))
        alike.setdefault(template, []).append(numbers)
    out = []
    for template, vectors in alike.items():
        for run in _runs(vectors):
            texts = iter(
                str(first) if first == last else f"{{{first}..{last}}}"
                for first, last in zip(run[0], run[-1], strict=True)
            )
            out.append([tuple(_filled(cell, texts) for cell in row) for row in template])
    return out


def _filled(cell: str, texts: Iterable[str]) -> str:
    pieces = cell.split("{}")
    return "".join(
        piece + text
        for piece, text in itertools.zip_longest(
            pieces, itertools.islice(texts, len(pieces) - 1), fillvalue=""
        )
    )


def _runs(vectors: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Cuts a set into runs in which the same numbers go up by one, the longest that there are."""
    left = dict.fromkeys(vectors)
    runs = []
    while left:
        first = next(iter(left))
        steps = {tuple(b - a for a, b in zip(first, v, strict=True)) for v in left}
        chains = [_chain(first, step, left) for step in sorted(steps) if set(step) in ({0, 1}, {1})]
        longest = max(chains, key=len, default=[first])
        runs.append(longest if len(longest) >= FOLDED_FROM else [first])
        for vector in runs[-1]:
            del left[vector]
    return runs


def _chain(
    first: tuple[int, ...], step: tuple[int, ...], among: dict[tuple[int, ...], None]
) -> list[tuple[int, ...]]:
    chain = [first]
    while (following := tuple(a + d for a, d in zip(chain[-1], step, strict=True))) in among:
        chain.append(following)
    return chain


def _columns(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
