"""A symmetry as a picture: a matrix of leaves by groups."""

from typing import TYPE_CHECKING

from otfusion_jax.common.packages import require_package
from otfusion_jax.pictures.canvas import axes_for
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.display import moves_in_words, shows_motions, units
from otfusion_jax.symmetry.folding import Row, fold, fold_rows
from otfusion_jax.symmetry.groups import Group, Motion
from otfusion_jax.symmetry.symmetry import Symmetry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"produces": "tab:blue", "consumes": "tab:orange", "both": "tab:green"}
# What groups are called in: by how they move, if any of them does more than to be permuted.
_MOTION_COLOURS = {
    Motion.PERMUTED: "black",
    Motion.SIGNED: "tab:red",
    Motion.ROTATED: "tab:purple",
    Motion.ROTATED_ABOUT_ONES: "tab:pink",
}
_SCALED_COLOUR = "tab:brown"
# With more leaves than so many, what repeats itself from layer to layer is drawn once.
_MOST_LEAVES = 100
# Of a figure, in inches: what a leaf, a group and a letter of a name take, and what is left for
# legend and title.
_ROW_HEIGHT, _COLUMN_WIDTH, _LETTER_WIDTH = 0.18, 0.25, 0.06
_MARGIN = 1
# The legend has three entries in a row, however few groups there are.
_LEGEND_WIDTH = 4
# Pictures of more than 2^16 pixels cannot be written; there are 100 to the inch, unless asked for.
_LONGEST = 300
_FONT_SIZE = 7


def draw(symmetry: Symmetry, ax: "Axes | None" = None) -> "Axes":
    """Draws the groups as a matrix of leaves by groups.

    A square is coloured where a leaf has an axis of the group: blue produces its units, orange
    consumes them, green does both. Leaves without any are left blank. With signs, rotations or
    scales, the name of a group says how its units move, and has another colour than black if they
    are not permuted alone. Of networks with more than 100 leaves, what repeats itself from layer to
    layer is drawn once, as in `print(symmetry)`.

    Args:
        symmetry: The symmetry to be drawn.
        ax: The matplotlib axes to draw on. None makes a new figure, of a size that fits, which is
            `ax.figure`.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the symmetry is anything else, or `ax` are no axes.
    """
    require_symmetry(symmetry, "draw(symmetry, ax)")
    leaves, columns = _matrix(symmetry)
    names = [name for name, _ in columns]
    # Names of leaves lie on the left, those of groups stand below.
    width = _MARGIN + _COLUMN_WIDTH * max(1, len(columns)) + _length_of(leaves)
    height = _MARGIN + _ROW_HEIGHT * len(leaves) + _length_of(names)
    ax = axes_for(ax, min(_LONGEST, max(_LEGEND_WIDTH, width)), min(_LONGEST, height))
    patches = require_package("matplotlib.patches", "matplotlib", "plot", "a picture")
    row_of = {leaf: row for row, leaf in enumerate(leaves)}
    for column, roles in enumerate(columns.values()):
        for leaf, role in roles.items():
            corner = (column - 0.5, row_of[leaf] - 0.5)
            ax.add_patch(patches.Rectangle(corner, 1, 1, color=_COLOURS[role], linewidth=0))
    ax.set_xticks(range(len(columns)), names, rotation=90, fontsize=_FONT_SIZE)
    for label, (_, colour) in zip(ax.get_xticklabels(), columns, strict=False):
        label.set_color(colour)
    ax.set_yticks(range(len(leaves)), leaves, fontsize=_FONT_SIZE)
    # Without groups there is one blank column. The first leaf is on top.
    ax.set_xlim(-0.5, max(1, len(columns)) - 0.5)
    ax.set_ylim(len(leaves) - 0.5, -0.5)
    ax.set_xlabel("group (units)")
    legend = []
    for role, colour in _COLOURS.items():
        legend.append(patches.Patch(color=colour, label=role))
    # Above the names of leaves, where few groups leave no room for it.
    ax.legend(handles=legend, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    return ax


def _length_of(names: list[str]) -> float:
    """Estimates how long the longest of some names is, in inches."""
    return _LETTER_WIDTH * max(map(len, names), default=0)


_Columns = dict[tuple[str, str], dict[str, str]]
"""For each group, by its name and colour, the roles of leaves by their names."""


def _matrix(symmetry: Symmetry) -> tuple[list[str], _Columns]:
    """Returns the names of the leaves, and what each group has of them."""
    blocks: list[list[Row]] = []
    for group in symmetry.groups:
        roles: dict[str, str] = {}
        for member in group.members:
            known = roles.setdefault(member.path, member.role)
            roles[member.path] = member.role if known == member.role else "both"
        blocks.append([_header(group, shows_motions(symmetry)), *roles.items()])
    leaves = [part.path for part in symmetry.parts]
    folds = len(leaves) > _MOST_LEAVES
    if folds:
        # Those with axes of groups are folded as their groups are, which may be each otherwise.
        moving = set()
        for _, *members in blocks:
            moving.update([leaf for leaf, _ in members])
        still = fold_rows([(leaf,) for leaf in leaves if leaf not in moving])
        blocks = fold(blocks)
        leaves = []
    else:
        still = []
    columns: _Columns = {}
    for (name, colour), *members in blocks:
        columns[name, colour] = {}
        for leaf, role in fold_rows(members) if folds else members:
            columns[name, colour][leaf] = role
            leaves.append(leaf)
    leaves.extend([leaf for (leaf,) in still])
    return list(dict.fromkeys(leaves)), columns


def _header(group: Group, shows_motion: bool) -> tuple[str, str]:
    """Returns what a group is called in the picture, and in which colour."""
    colour = _MOTION_COLOURS[group.motion]
    if group.scaled and group.motion is Motion.PERMUTED:
        colour = _SCALED_COLOUR
    motion = f", {moves_in_words(group)}" if shows_motion else ""
    return f"{group.name} ({units(group)}{motion})", colour
