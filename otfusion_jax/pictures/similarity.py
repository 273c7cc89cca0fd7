"""Cross-correlations of the units of two models, before they are matched and after."""

from typing import TYPE_CHECKING

import numpy as np

from otfusion_jax.common.arguments import require_kind
from otfusion_jax.evaluation.similarity import Similarity
from otfusion_jax.pictures.canvas import SIGNED_COLOURS, axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The free space between the two matrices, as a share of their width.
_GAP = 0.08


def plot_similarity(similarity: Similarity, group: str, *, ax: "Axes | None" = None) -> "Axes":
    """Draws the correlation of each unit of the source with each of the target.

    On the left are the units of the source as they are, on the right as they were moved: what was
    matched well is a blue diagonal there. Units that do not vary are grey. Of a group with several
    layers or the like, which are compared one by one, the matrices are those of the first.

    Args:
        similarity: What `similarity` has returned.
        group: The name of the group.
        ax: The matplotlib axes to draw on. None makes a new figure, which is `ax.figure`.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        KeyError: If there is no such group, listing those that there are.
        TypeError: If there is anything but a result of `similarity`, or but axes.
    """
    require_kind(similarity, Similarity, "similarity", "what otf.similarity(...) returns")
    if group not in similarity.groups:
        raise KeyError(f"no group {group!r}; there are {list(similarity.groups)}")
    found = similarity.groups[group]
    ax = axes_for(ax, 7.5, 4)
    left, middles = 0.0, []
    image = None
    for correlations in (found.before, found.after):
        # What is left of the batch are layers, or what else does not mix.
        matrix = np.asarray(correlations).reshape(-1, *correlations.shape[-2:])[0]
        image = ax.imshow(
            matrix,
            # Both are of one size, however many units each has.
            extent=(left, left + 1, 1, 0),
            cmap=SIGNED_COLOURS,
            vmin=-1,
            vmax=1,
            interpolation="nearest",
        )
        middles.append(left + 0.5)
        left += 1 + _GAP
    ax.figure.colorbar(image, ax=ax, label="correlation")
    ax.set_xlim(0, left - _GAP)
    ax.set_ylim(1, 0)
    # What is drawn in no colour, of units that do not vary, shows the ground.
    ax.set_facecolor("0.85")
    ax.axvspan(1, 1 + _GAP, color="white", linewidth=0)
    ax.set_xticks(middles, ["as they are", "aligned"])
    ax.set_yticks([])
    ax.set_xlabel("units of the target")
    ax.set_ylabel("units of the source")
    ax.set_title(group)
    return ax
