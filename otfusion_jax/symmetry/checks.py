"""What a caller may have mistaken: arguments of other kinds, and models that do not go together.

Each check raises, or warns, with what is wrong, where, and what to do instead.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.common.arguments import kind_of, require_arrays
from otfusion_jax.common.finiteness import not_finite_counts
from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.common.typing import PyTree
from otfusion_jax.common.warning import warn_user
from otfusion_jax.symmetry.groups import NOT_USED, UNMET, UNREAD, Leaf
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.validation import require_fitting


class SymmetryWarning(UserWarning):
    """A symmetry that is right, and perhaps not what was meant: no groups, parameters not used."""


# --- arguments


def require_symmetry(symmetry: Any, call: str) -> None:
    """Refuses what is no symmetry.

    Args:
        symmetry: The argument that was given.
        call: How the library's function is called, as in `"transport(symmetry, plans, params)"`,
            for the message.

    Raises:
        TypeError: If the argument is anything else.
    """
    if not isinstance(symmetry, Symmetry):
        raise TypeError(
            f"{kind_of(symmetry)} was given where a symmetry is wanted: call {call}, with "
            "what trace_symmetry returns"
        )


def require_models(models: Any, name: str = "models") -> None:
    """Refuses what is no list of models.

    Args:
        models: The argument that was given.
        name: The name of the argument, for the message.

    Raises:
        TypeError: If it is one model, a stack of models, or a generator.
        ValueError: If it is an empty list.
    """
    # Arrays, dicts and generators are no sequences.
    if not isinstance(models, Sequence) or isinstance(models, str):
        raise TypeError(f"{name} is {kind_of(models)}; pass a list of pytrees, one for each model")
    if not models:
        raise ValueError(f"no {name} were given; pass at least one pytree of parameters")


def require_model(
    symmetry: Symmetry,
    params: PyTree,
    name: str = "params",
    batch: tuple[int, ...] = (),
    *,
    looks_at_values: bool = True,
) -> None:
    """Refuses a model that does not fit a symmetry, and shapes in place of arrays.

    Args:
        symmetry: The symmetry that the model should have.
        params: The parameters of the model.
        name: What to call the model in the message.
        batch: The leading axes that every leaf has in front.
        looks_at_values: Whether values that are not finite are refused.

    Raises:
        TypeError: If there are `jax.ShapeDtypeStruct`s, listing every one by key path.
        ValueError: As `Symmetry.validate` raises it.
    """
    require_arrays(params, name)
    require_fitting(
        symmetry.leaves,
        symmetry.treedef,
        params,
        name,
        batch,
        looks_at_values=looks_at_values,
    )


# --- models


def require_equal_integers(
    leaves: Sequence[Leaf], columns: Iterable[Any], decided: Sequence[bool], remedy: str
) -> None:
    """Refuses models whose integers or booleans cannot be averaged.

    What is compared are arrays of more than one number: quantised weights, masks, tables. A single
    number is taken for a counter, and random keys differ in any case. Traced values pass.

    Args:
        leaves: Path, shape and dtype of every leaf, the same for all models.
        columns: For each leaf its values in the models, K arrays or one array `[K, ...]`.
        decided: For each leaf whether the caller has said which model's to keep.
        remedy: What else can be done about such a leaf, for the message; it continues a sentence.

    Raises:
        ValueError: If leaves differ, listing every one by key path.
    """
    wrong = []
    for leaf, values, is_decided in zip(leaves, columns, decided, strict=True):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        if leaf.moves or is_key or is_decided or math.prod(leaf.shape) <= 1:
            continue
        # A stack that is traced is not iterated over: it would be sliced on the device.
        if isinstance(values, Tracer) or _any_traced(values):
            continue
        known = [np.asarray(value) for value in values]
        # The last is the one whose values would be kept.
        last = len(known) - 1
        for number in range(last):
            if not np.array_equal(known[number], known[last]):
                wrong.append(
                    f"  {leaf.path}: {leaf.dtype} of shape {leaf.shape}, not the same in model "
                    f"{number} as in model {last}"
                )
                break
    if wrong:
        raise ValueError(
            "these leaves are integers or booleans that differ between the models, of which there "
            "is no average. Make floating-point weights of quantised ones first, or make them equal"
            f"{remedy}:\n" + "\n".join(wrong)
        )


def require_finite(leaves: Sequence[Leaf], params: PyTree, what: str) -> None:
    """Refuses a result that is known not to be finite.

    Args:
        leaves: Path, shape and dtype of every parameter.
        params: Parameters that have been computed from finite models.
        what: The name of what was computed, as in `"fusing"`, for the message.

    Raises:
        FloatingPointError: If values are NaN or infinite, listing every such leaf by key path.
            Traced values pass.
    """
    paths = []
    values = []
    for leaf, value in zip(leaves, jax.tree_util.tree_leaves(params), strict=True):
        # Of what is lazy it shows when it is read.
        if leaf.moves and not isinstance(value, Tracer | LazyArray):
            paths.append(leaf.path)
            values.append(value)
    wrong = []
    for path, count in zip(paths, not_finite_counts(values), strict=True):
        if count:
            wrong.append(f"  {path}")
    if wrong:
        raise FloatingPointError(
            f"{what} gave values that are not finite, of models that are: numbers on the way were "
            "out of range. Scale the parameters or the inputs, or compute in float64 "
            "(jax_enable_x64). Not finite:\n" + "\n".join(wrong)
        )


# --- symmetries


def warn_without_groups(symmetry: Symmetry, arrays: PyTree, result: str) -> None:
    """Warns that there is nothing to align.

    Args:
        symmetry: The symmetry of the models.
        arrays: The models. Where they are traced there is no warning: nobody would see why.
        result: What comes of it, for the message.
    """
    if symmetry.groups or _any_traced(jax.tree.leaves(arrays)):
        return
    warn_user(
        f"the symmetry has no groups, so that no unit can move: {result}. print(symmetry) says "
        "what pins the parameters",
        SymmetryWarning,
    )


def _any_traced(arrays: Iterable[Any]) -> bool:
    return any(isinstance(array, Tracer) for array in arrays)


def warn_not_used(symmetry: Symmetry) -> None:
    """Warns of parameters that the function does not use, though units may lie along them.

    Args:
        symmetry: The symmetry, as it was traced.
    """
    reasons: dict[str, set[str]] = {}
    for pin in symmetry.pinned:
        reasons.setdefault(pin.path, set()).add(pin.reason)
    unused = _unused_leaves(symmetry, reasons)
    if unused:
        warn_user(
            "the function does not use these parameters, so that they stay as they are when units "
            "move. If other functions use them (another head, training mode), trace all of them "
            "together, trace_symmetry([(fn, inputs), (other_fn, other_inputs)], params):\n"
            + "\n".join(unused),
            SymmetryWarning,
        )
    unmet = []
    for path, path_reasons in reasons.items():
        if UNMET in path_reasons:
            unmet.append(f"  {path}")
    if unmet:
        warn_user(
            "these parameters are multiplied with constants alone (a first step from a state of "
            "zeros, an input that is absent), so that nothing tells which units they belong to: "
            "they stay, and so does what moves with them. Trace more steps, or give all inputs:\n"
            + "\n".join(unmet),
            SymmetryWarning,
        )


def _unused_leaves(symmetry: Symmetry, reasons: dict[str, set[str]]) -> list[str]:
    """Returns a line for each leaf that nothing reads and that may have an axis of units.

    Args:
        symmetry: The symmetry, as it was traced.
        reasons: By the key path of a leaf why its axes are pinned.

    Returns:
        The lines.
    """
    member_paths = set()
    for group in symmetry.groups:
        for member in group.members:
            member_paths.add(member.path)
    unused = []
    for leaf in symmetry.leaves:
        leaf_reasons = reasons.get(leaf.path)
        # A leaf that moves along one axis need not be read along another.
        if leaf_reasons is None or leaf.path in member_paths:
            continue
        is_unused = leaf_reasons <= {NOT_USED, UNREAD}
        if is_unused and may_have_units(symmetry, leaf.shape):
            unused.append(f"  {leaf.path}: shape {leaf.shape}")
    return unused


def may_have_units(symmetry: Symmetry, shape: tuple[int, ...]) -> bool:
    """Says whether an array that was not traced may have the units of some group along an axis.

    Args:
        symmetry: The symmetry with the groups.
        shape: The shape of the array.

    Returns:
        Whether an axis that is not empty has as many positions as a group has units, or a multiple.
    """
    for group in symmetry.groups:
        # Any axis is a multiple of one unit, which says nothing.
        if group.size <= 1:
            continue
        for length in shape:
            if length > 0 and length % group.size == 0:
                return True
    return False
