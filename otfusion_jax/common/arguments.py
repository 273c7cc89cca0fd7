"""What a caller may have mistaken: arguments, settings, and models that say nothing of each other.

Each check raises, or warns, with what is wrong, where, and what to do instead.
"""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


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
