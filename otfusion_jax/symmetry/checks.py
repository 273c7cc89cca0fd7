"""What a caller may have mistaken: arguments, settings, and models that say nothing of each other.

Each check raises, or warns, with what is wrong, where, and what to do instead.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from otfusion_jax.common.arguments import require_arrays
from otfusion_jax.common.scaling import not_finite
from otfusion_jax.symmetry.groups import NOT_USED, UNMET, UNREAD, Leaf
from otfusion_jax.symmetry.symmetry import Symmetry


class SymmetryWarning(UserWarning):
    """A symmetry that is right, and perhaps not what was meant: no groups, parameters not used."""


# Arguments


def require_symmetry(symmetry: Any, call: str) -> None:
    """Refuses what is no symmetry.

    Args:
        symmetry: what was given.
        call: how the function is called, as in `"transport(symmetry, plans, params)"`.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(symmetry, Symmetry):
        raise TypeError(
            f"a {type(symmetry).__name__} was given where a symmetry is wanted: call {call}, with "
            "what trace_symmetry returns"
        )


def require_models(models: Any) -> None:
    """Refuses what is no list of models.

    Args:
        models: what was given.

    Raises:
        TypeError: for one model, a stack of models, or a generator.
        ValueError: for an empty list.
    """
    if not isinstance(models, Sequence) or isinstance(models, str):
        raise TypeError(
            f"models is a {type(models).__name__}; pass a list of pytrees, one for each model"
        )
    if not models:
        raise ValueError("no models were given; pass at least one pytree of parameters")


def require_model(
    symmetry: Symmetry, params: PyTree, name: str = "params", batch: tuple[int, ...] = ()
) -> None:
    """Refuses a model that does not fit a symmetry, and shapes in place of arrays.

    Args:
        symmetry: of the model.
        params: the model.
        name: what to call it in the message.
        batch: leading axes that every leaf has in front.

    Raises:
        TypeError: for `jax.ShapeDtypeStruct`s, listing every one by key path.
        ValueError: as `Symmetry.validate`.
    """
    require_arrays(params, name)
    symmetry.validate(params, name, batch)


# Models


def require_equal_integers(
    leaves: Sequence[Leaf], columns: Iterable[Any], decided: Sequence[bool], remedy: str
) -> None:
    """Refuses models whose integers or booleans can't be averaged.

    What is compared are arrays of more than one number: quantised weights, masks, tables. A single
    number is taken for a counter, and random keys differ in any case. Traced values pass.

    Args:
        leaves: of all the models.
        columns: for each leaf its values in the models, K arrays or one array `[K, ...]`.
        decided: for each leaf, whether the caller has said whose to keep.
        remedy: what can be done about it beside that, after a comma.

    Raises:
        ValueError: listing every such leaf by key path.
    """
    wrong = []
    for leaf, values, settled in zip(leaves, columns, decided, strict=True):
        exempt = leaf.moves or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        if exempt or settled or math.prod(leaf.shape) <= 1:
            continue
        if any(isinstance(x, Tracer) for x in (values, *values)):
            continue
        known = [np.asarray(x) for x in values]
        differ = [i for i, x in enumerate(known) if not np.array_equal(x, known[-1])]
        if differ:
            wrong.append(
                f"  {leaf.path}: {leaf.dtype} of shape {leaf.shape}, not the same in model "
                f"{differ[0]} as in model {len(known) - 1}"
            )
    if wrong:
        raise ValueError(
            "these leaves are integers or booleans that differ between the models, of which there "
            "is no average. Make floating-point weights of quantised ones first, or make them equal"
            f"{remedy}:\n" + "\n".join(wrong)
        )


def require_finite(leaves: Sequence[Leaf], params: PyTree, what: str) -> None:
    """Refuses a result that is known not to be finite.

    Args:
        leaves: of the parameters.
        params: what has been computed from finite models.
        what: has been done.

    Raises:
        FloatingPointError: listing every leaf that is not finite by key path.
    """
    wrong = [
        f"  {leaf.path}"
        for leaf, x in zip(leaves, jax.tree_util.tree_leaves(params), strict=True)
        if leaf.moves and not isinstance(x, Tracer) and not_finite(x)
    ]
    if wrong:
        raise FloatingPointError(
            f"{what} gave values that are not finite, of models that are: numbers on the way were "
            "out of range. Scale the parameters or the inputs, or compute in float64 "
            "(jax_enable_x64). Not finite:\n" + "\n".join(wrong)
        )


# Symmetries


def warn_without_groups(symmetry: Symmetry, arrays: PyTree, result: str) -> None:
    """Warns that there is nothing to align. Not inside of a trace, where nobody would see why.

    Args:
        symmetry: of the models.
        arrays: the models.
        result: what comes of it.
    """
    if not symmetry.groups and not any(isinstance(x, Tracer) for x in jax.tree.leaves(arrays)):
        warnings.warn(
            f"the symmetry has no groups, so that no unit can move: {result}. print(symmetry) says "
            "what pins the parameters",
            SymmetryWarning,
            stacklevel=3,
        )


def warn_not_used(symmetry: Symmetry) -> None:
    """Warns of parameters that the function does not use, though units may lie along them.

    Args:
        symmetry: as it was traced.
    """
    reasons: dict[str, set[str]] = {}
    for pin in symmetry.pinned:
        reasons.setdefault(pin.path, set()).add(pin.reason)
    members = {member.path for group in symmetry.groups for member in group.members}
    idle = {
        path
        for path, found in reasons.items()
        if found <= {NOT_USED, UNREAD} and path not in members
    }
    sizes = {group.size for group in symmetry.groups if group.size > 1}
    suspect = [
        f"  {leaf.path}: shape {leaf.shape}"
        for leaf in symmetry.leaves
        if leaf.path in idle and any(n and n % size == 0 for n in leaf.shape for size in sizes)
    ]
    if suspect:
        warnings.warn(
            "the function does not use these parameters, so that they stay as they are when units "
            "move. If other functions use them (another head, training mode), trace all of them "
            "together, trace_symmetry([(fn, inputs), (other_fn, other_inputs)], params):\n"
            + "\n".join(suspect),
            SymmetryWarning,
            stacklevel=3,
        )
    unmet = [path for path, found in reasons.items() if UNMET in found]
    if unmet:
        warnings.warn(
            "these parameters are multiplied with constants alone (a first step from a state of "
            "zeros, an input that is absent), so that nothing tells which units they belong to: "
            "they stay, and so does what moves with them. Trace more steps, or give all inputs:\n"
            + "\n".join(f"  {path}" for path in unmet),
            SymmetryWarning,
            stacklevel=3,
        )
