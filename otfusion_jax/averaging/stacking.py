"""Averages of models: plain, and after alignment."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from otfusion_jax.symmetry.checks import require_model, require_models
from otfusion_jax.symmetry.groups import leaves_of
from otfusion_jax.symmetry.symmetry import Symmetry


def stack(models: Sequence[PyTree]) -> PyTree:
    """Stacks models along a new leading axis.

    Args:
        models: K pytrees of the same structure and shapes.

    Returns:
        One pytree with leaves `[K, ...]`.

    Raises:
        ValueError: for no models, values that are not finite, or trees that differ, listing every
            offender by key path.
    """
    require_alike(models)
    return _beside(models)


def require_alike(models: Sequence[PyTree], symmetry: Symmetry | None = None) -> None:
    """Checks that models can be combined leaf by leaf.

    Args:
        models: K pytrees.
        symmetry: what they have to fit; None means the tree of the first.

    Raises:
        ValueError: for no models, values that are known and not finite, or trees that differ,
            listing every offender by key path.
    """
    require_models(models)
    if symmetry is None:
        treedef = jax.tree_util.tree_structure(models[0])
        symmetry = Symmetry((), (), leaves_of(models[0]), treedef)
    for number, model in enumerate(models):
        require_model(symmetry, model, f"model {number}")


def _beside(models: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


# One program in place of one for each shape of a leaf. All leaves have to be on the same devices.
_beside_at_once = jax.jit(_beside)


def stacked_models(symmetry: Symmetry, models: Sequence[PyTree] | PyTree) -> tuple[PyTree, int]:
    """Checks models that are to be fused, and stacks them.

    Args:
        symmetry: of the models.
        models: K >= 2 pytrees, or one pytree with leaves `[K, ...]`.

    Returns:
        The stack, and K.

    Raises:
        ValueError: for models that do not fit, and for fewer than two.
    """
    stacked = _stacked(symmetry, models)
    count = jax.tree_util.tree_leaves(stacked)[0].shape[0]
    if count < 2:
        raise ValueError(f"{count} model given; fusing takes at least two")
    return stacked, count


def _stacked(symmetry: Symmetry, models: Sequence[PyTree] | PyTree) -> PyTree:
    """Tells a list of models from a stack: parameters may themselves be a list."""
    if jax.tree_util.tree_structure(models) == symmetry.treedef:
        leaves = jax.tree_util.tree_leaves(models)
        counts = {np.shape(x)[0] if np.ndim(x) else 0 for x in leaves}
        ranks = {
            np.ndim(x) - len(leaf.shape) for x, leaf in zip(leaves, symmetry.leaves, strict=True)
        }
        if ranks == {1} and len(counts) == 1:
            require_model(symmetry, models, "the stack of models", batch=(counts.pop(),))
            return models
        raise ValueError(
            "one model was given, or a stack whose leaves have no leading axis of one size; pass a "
            "list of models, or leaves of shape [K, ...]"
        )
    if not isinstance(models, list | tuple):
        raise ValueError(
            f"models is a {type(models).__name__} of another structure than the symmetry's; pass a "
            "list of models, or one pytree with leaves [K, ...]"
        )
    require_alike(models, symmetry)
    return _beside_at_once(list(models))
