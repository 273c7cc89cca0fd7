"""Models side by side: checked to be of one structure, and stacked along a new leading axis.

Everything that combines models leaf by leaf begins here. `require_alike` refuses models that do not
fit each other, naming the model and every leaf by key path; `stack` puts a list of them into one
pytree with leaves `[K, ...]`; `stacked_models` takes either, a list or such a stack.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from otfusion_jax.common.arguments import kind_of, require_arrays
from otfusion_jax.common.known import all_known
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.canonical import canonical
from otfusion_jax.symmetry.checks import require_model, require_models
from otfusion_jax.symmetry.groups import leaves_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.validation import require_fitting


def stack(models: Sequence[PyTree]) -> PyTree:
    """Stacks models along a new leading axis.

    Args:
        models: The models, K pytrees of the same structure and shapes.

    Returns:
        One pytree with leaves `[K, ...]`.

    Raises:
        ValueError: For no models, leaves that are no arrays, values that are not finite, or trees
            that differ, naming the model and listing every offender by key path.
        TypeError: For what is no list of models, and for shapes in place of arrays.
    """
    require_alike(models)
    return stack_leaves(models)


def require_alike(
    models: Sequence[PyTree],
    symmetry: Symmetry | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Checks that models can be combined leaf by leaf.

    Args:
        models: The models, K pytrees.
        symmetry: The symmetry that they have to fit; None means the tree of the first.
        names: What to call each in the messages; None means `model 0`, `model 1` and so on.

    Raises:
        ValueError: For no models, leaves that are no arrays, values that are known and not finite,
            or trees that differ, naming the model and listing every offender by key path.
        TypeError: For what is no list of models, and for shapes in place of arrays.
    """
    require_models(models)
    if names is None:
        names = [f"model {number}" for number in range(len(models))]
    first = None
    for name, model in zip(names, models, strict=True):
        require_arrays(model, name)
        # Of what is no array, nothing can be compared: it is told first, and of which model it is.
        try:
            leaves = leaves_of(model)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if symmetry is not None:
            symmetry.validate(model, name)
            continue
        first = first or (leaves, jax.tree_util.tree_structure(model))
        require_fitting(*first, model, name, reference=names[0])


def stack_leaves(models: Sequence[PyTree]) -> PyTree:
    """Stacks models of one structure, without checks.

    Args:
        models: The models, K pytrees.

    Returns:
        One pytree with leaves `[K, ...]`.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


stack_at_once: Callable[[Sequence[PyTree]], PyTree] = jax.jit(stack_leaves)
"""The same as one program for all leaves, which have to be on the same devices."""


def checked_models(
    symmetry: Symmetry, models: Sequence[PyTree] | PyTree
) -> tuple[Sequence[PyTree] | PyTree, int, bool]:
    """Checks models that are to be combined, and tells a list of them from a stack.

    Args:
        symmetry: The symmetry of the models.
        models: The models, K >= 2 pytrees, or one pytree with leaves `[K, ...]`.

    Returns:
        The models as they are, K, and whether they are stacked.

    Raises:
        ValueError: For models that do not fit, and for fewer than two.
        TypeError: For shapes in place of arrays.
    """
    # Parameters may be a list, too: the structure tells a stack from a list of models.
    stacked = jax.tree_util.tree_structure(models) == symmetry.treedef
    if stacked:
        count = _stack_size(symmetry, models)
        require_model(symmetry, models, "the stack of models", batch=(count,))
    elif isinstance(models, list | tuple):
        count = len(models)
        require_alike(models, symmetry)
    else:
        raise ValueError(
            f"models is {kind_of(models)} of another structure than the symmetry's; pass a "
            "list of models, or one pytree with leaves [K, ...]"
        )
    if count < 2:
        raise ValueError(f"{count} model given; fusing takes at least two")
    return models, count, stacked


def stacked_models(symmetry: Symmetry, models: Sequence[PyTree] | PyTree) -> tuple[PyTree, int]:
    """Checks models that are to be fused, and stacks them.

    Args:
        symmetry: The symmetry of the models.
        models: The models, see `checked_models`.

    Returns:
        The stack, and K.

    Raises:
        ValueError: See `checked_models`.
        TypeError: See `checked_models`.
    """
    models, count, stacked = checked_models(symmetry, models)
    return models if stacked else stack_at_once(list(models)), count


def unstacked(models: PyTree, count: int) -> list[PyTree]:
    """Takes a stack of models apart.

    Args:
        models: One pytree with leaves `[K, ...]`.
        count: The number K of models.

    Returns:
        The models.
    """
    return [jax.tree.map(lambda leaf, n=n: _entry(leaf, n), models) for n in range(count)]


@jax.jit
def _entry(leaf: Array, number: int) -> Array:
    return leaf[number]


def in_canonical_form(symmetry: Symmetry, models: Any, count: int, stacked: bool) -> Any:
    """Brings models into the form in which their units can be rotated, see `canonicalize`.

    Args:
        symmetry: The symmetry of the models.
        models: The models, a list of pytrees or one pytree with leaves `[K, ...]`.
        count: The number K of models.
        stacked: Whether they are one pytree.

    Returns:
        The models, as they were given.

    Raises:
        ValueError: If a scale of one of them can't be made 1, as far as that is known.
    """
    if stacked and not all_known(models):
        return jax.vmap(lambda model: canonical(symmetry, model, "a model"))(models)
    in_form = []
    # One by one, and so by name: a scale that can't be made 1 is of one of them.
    for number, model in enumerate(unstacked(models, count) if stacked else models):
        in_form.append(canonical(symmetry, model, f"model {number}"))
    return stack_at_once(in_form) if stacked else in_form


def _stack_size(symmetry: Symmetry, stacked: PyTree) -> int:
    """Reads off how many models are stacked: the size of the axis that all leaves have in front.

    Raises:
        ValueError: If leaves have no axis of the models in front, or one of another size than most
            of the leaves have. Every one is listed by key path.
    """
    sizes = []
    for leaf, array in zip(symmetry.leaves, jax.tree_util.tree_leaves(stacked), strict=True):
        has_leading_axis = np.ndim(array) == len(leaf.shape) + 1
        sizes.append(np.shape(array)[0] if has_leading_axis else None)
    # The size that most leaves have was meant. None if these are the leaves of a single model.
    ((usual, _),) = collections.Counter(sizes).most_common(1)
    wrong = []
    for leaf, size in zip(symmetry.leaves, sizes, strict=True):
        if size is None:
            wrong.append(f"  {leaf.path}: no axis in front of shape {leaf.shape}")
        elif size != usual:
            wrong.append(f"  {leaf.path}: {size} models, where others have {usual}")
    if wrong or usual is None:
        raise ValueError(
            "one model was given, or a stack whose leaves have no leading axis of one size; pass a "
            "list of models, or leaves of shape [K, ...]:\n" + "\n".join(wrong)
        )
    return usual
