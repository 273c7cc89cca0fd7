"""What a caller may have mistaken: arguments, settings, and models that say nothing of each other.

Each check raises, or warns, with what is wrong, where, and what to do instead.
"""

import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from otfusion_jax.scaling import not_finite
from otfusion_jax.symmetry import NOT_USED, UNMET, UNREAD, Leaf, Symmetry


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


def require_kind(value: Any, kind: type, name: str, examples: str) -> None:
    """Refuses what is no instance of a class.

    Args:
        value: what was given.
        kind: the class.
        name: of the argument.
        examples: what can be passed, in words.

    Raises:
        TypeError: for anything else, the class itself and its subclasses included.
    """
    if not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}"[:80]
        raise TypeError(f"{name} is {found}; pass {examples}")


def require_function(fn: Any, call: str) -> None:
    """Refuses what can't be called.

    Args:
        fn: what was given.
        call: how the function that it was given to is called.

    Raises:
        TypeError: for anything else.
    """
    if not callable(fn):
        raise TypeError(f"a {type(fn).__name__} was given where a function is wanted: call {call}")


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


def require_arrays(tree: PyTree, name: str) -> None:
    """Refuses shapes in place of arrays.

    Args:
        tree: parameters or inputs.
        name: what to call them in the message.

    Raises:
        TypeError: for `jax.ShapeDtypeStruct`s, listing every one by key path.
    """
    shapes = [
        f"  {jax.tree_util.keystr(path, simple=True, separator='/')}: a ShapeDtypeStruct"
        for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]
        if isinstance(value, jax.ShapeDtypeStruct)
    ]
    if shapes:
        raise TypeError(
            f"{name} has shapes in place of arrays; only trace_symmetry takes these, here values "
            "are needed:\n" + "\n".join(shapes)
        )


def require_batches(batches: Any) -> None:
    """Refuses what would be iterated over by its first axis, or by its keys.

    Args:
        batches: what was given.

    Raises:
        TypeError: for a single array, a dict, or what can't be iterated over.
    """
    single = isinstance(batches, jax.Array | np.ndarray)
    if single or isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        found = f"an array of shape {np.shape(batches)}" if single else type(batches).__name__
        raise TypeError(
            f"batches is {found}, which is not a list of batches; pass a list or a generator of "
            "arrays, or of tuples of arrays, as in [x]"
        )


# Settings


def require_number(
    owner: Any,
    name: str,
    *,
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float | None = None,
    below: int | float | None = None,
    whole: bool = False,
    finite: bool = False,
) -> None:
    """Refuses a setting that is no number, or out of range.

    Args:
        owner: a dataclass of settings.
        name: of the field.
        least: the smallest value that is allowed.
        above: what the value must be above.
        most: the largest value that is allowed.
        below: what the value must be below.
        whole: whether it must be an integer.
        finite: whether infinity is out of range.

    Raises:
        TypeError: for anything but a Python or NumPy number.
        ValueError: for a number that is out of range.
    """
    value: Any = getattr(owner, name)
    allowed = _interval(least, above, most, below)
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool | np.bool_):
        what = "a whole number" if whole else "a number"
        raise TypeError(
            f"{type(owner).__name__} needs {name} {allowed}, {what}, got {value!r}, of type "
            f"{type(value).__name__}."
        )
    number = float(value)
    fits = (
        (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
        and not math.isnan(number)
        and not (finite and math.isinf(number))
    )
    if not fits:
        raise ValueError(f"{type(owner).__name__} needs {name} {allowed}, got {value}.")


def _interval(least: Any, above: Any, most: Any, below: Any) -> str:
    if most is None and below is None:
        return f"> {above}" if least is None else f">= {least}"
    left = f"({above}" if least is None else f"[{least}"
    right = f"{below})" if most is None else f"{most}]"
    return f"in {left}, {right}"


def require_flag(owner: Any, name: str) -> None:
    """Refuses a setting that is neither True nor False.

    Args:
        owner: a dataclass of settings.
        name: of the field.

    Raises:
        TypeError: for anything else.
    """
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise TypeError(f"{type(owner).__name__} needs {name} to be True or False, got {value!r}.")


def require_epsilon(solver: Any) -> None:
    """Refuses an entropic solver without entropy.

    Args:
        solver: with a field `epsilon`.

    Raises:
        TypeError: if that is no number.
        ValueError: if it is not above 0.
    """
    try:
        require_number(solver, "epsilon", above=0, finite=True)
    except ValueError as error:
        raise ValueError(f"{error} Without entropy, use Exact().") from None


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
