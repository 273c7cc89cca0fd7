"""A symmetry as a picture: a matrix of leaves by groups."""

from typing import Any

from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.display import moves_in_words, shows_motions, units
from otfusion_jax.symmetry.groups import Motion
from otfusion_jax.symmetry.symmetry import Symmetry

_COLOURS = {"produces": "tab:blue", "consumes": "tab:orange", "both": "tab:green"}
# What groups are called in: by how they move, if any of them does more than to be permuted.
_MOTION_COLOURS = {
    Motion.PERMUTED: "black",
    Motion.SIGNED: "tab:red",
    Motion.ROTATED: "tab:purple",
    Motion.ROTATED_ABOUT_ONES: "tab:pink",
}
_FONT_SIZE = 7
# Of a figure, in inches: what a leaf, a group and a letter of a name take, and what is left for
# legend and title.
_ROW_HEIGHT, _COLUMN_WIDTH, _LETTER_WIDTH = 0.18, 0.25, 0.06
_MARGIN = 1


def draw(symmetry: Symmetry, ax: Any = None) -> Any:
    """Draws the groups as a matrix of leaves by groups; needs matplotlib.

    A square is coloured where a leaf has an axis of the group: blue produces its units, orange
    consumes them, green does both. Leaves without any are left blank. With signs, rotations or
    scales, the name of a group says how its units move, and has another colour than black.

    Args:
        symmetry: The symmetry to be drawn.
        ax: The matplotlib axes to draw on. None makes a new figure, of a size that fits.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If the symmetry is anything else.
    """
    require_symmetry(symmetry, "draw(symmetry, ax)")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    leaf_names = [part.path for part in symmetry.parts]
    row_count, column_count = len(leaf_names), len(symmetry.groups)
    group_names = []
    for group in symmetry.groups:
        motion = f", {moves_in_words(group)}" if shows_motions(symmetry) else ""
        group_names.append(f"{group.name} ({units(group)}{motion})")
    if ax is None:
        # Names of leaves lie on the left, those of groups stand below.
        width = _MARGIN + _COLUMN_WIDTH * max(1, column_count) + _length_of(leaf_names)
        height = _MARGIN + _ROW_HEIGHT * row_count + _length_of(group_names)
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    for column, group in enumerate(symmetry.groups):
        roles: dict[int, set[str]] = {}
        for member in group.members:
            roles.setdefault(member.leaf, set()).add(member.role)
        for row, leaf_roles in roles.items():
            role = leaf_roles.pop() if len(leaf_roles) == 1 else "both"
            corner = (column - 0.5, row - 0.5)
            square = Rectangle(corner, 1, 1, color=_COLOURS[role], linewidth=0)
            ax.add_patch(square)
    ax.set_xticks(range(column_count), group_names, rotation=90, fontsize=_FONT_SIZE)
    for label, group in zip(ax.get_xticklabels(), symmetry.groups, strict=False):
        label.set_color(_MOTION_COLOURS[group.motion])
    ax.set_yticks(range(row_count), leaf_names, fontsize=_FONT_SIZE)
    # Without groups there is one blank column. The first leaf is on top.
    ax.set_xlim(-0.5, max(1, column_count) - 0.5)
    ax.set_ylim(row_count - 0.5, -0.5)
    ax.set_xlabel("group (units)")
    ax.legend(
        handles=[Patch(color=colour, label=role) for role, colour in _COLOURS.items()],
        # Above the names of leaves, where few groups leave no room for it.
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=3,
        frameon=False,
    )
    return ax


def _length_of(names: list[str]) -> float:
    """Estimates how long the longest of some names is, in inches."""
    return _LETTER_WIDTH * max(map(len, names), default=0)
