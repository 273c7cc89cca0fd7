"""Checks of arguments and settings that more than one room makes.

Each check raises with what is wrong, which argument it is, and what to pass instead. Checks that
need to know a `Symmetry` are in `symmetry.checks`.
"""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.common.typing import PyTree

# What is shown of a wrong argument at most: it may be a whole model.
_SHOWN_CHARACTERS = 80

# --- arguments


def kind_of(value: Any) -> str:
    """Says in words of which type a value is, or which class it is itself.

    Args:
        value: The argument that was given.

    Returns:
        Words such as "a list", "an array", or "the class Exact".
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None:
        return "None"
    # Users know arrays by this name alone, not by that of their class.
    if isinstance(value, jax.Array | np.ndarray):
        return "an array"
    name = type(value).__name__
    article = "an" if name[0] in "aeiouAEIO" else "a"
    return f"{article} {name}"


def require_kind(value: Any, kind: type, name: str, examples: str) -> None:
    """Refuses a value that is not an instance of a class.

    Args:
        value: The argument that was given.
        kind: The class of which it must be an instance.
        name: The name of the argument, for the message.
        examples: What can be passed instead, in words, for the message.

    Raises:
        TypeError: If the value is no instance of the class. That includes the class itself, passed
            without having been called.
    """
    if isinstance(value, kind):
        return
    given = kind_of(value) if isinstance(value, type) else repr(value)[:_SHOWN_CHARACTERS]
    raise TypeError(f"{name} is {given}; pass {examples}")


def require_function(fn: Any, call: str) -> None:
    """Refuses a value that cannot be called.

    Args:
        fn: The argument that was given.
        call: How the library's function is called, as in `"barrier(metric, a, b)"`, for the
            message.

    Raises:
        TypeError: If the value cannot be called.
    """
    if not callable(fn):
        raise TypeError(f"{kind_of(fn)} was given where a function is wanted: call {call}")


def require_arrays(tree: PyTree, name: str) -> None:
    """Refuses shapes in place of arrays, and arrays without values.

    Args:
        tree: Parameters or inputs, a pytree.
        name: What to call the tree in the message.

    Raises:
        TypeError: If there are leaves of type `jax.ShapeDtypeStruct`. Every one is listed by its
            key path.
        ValueError: If arrays are masked, or have been deleted, listed likewise.
    """
    shapes, useless = [], []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        reason = _why_useless(leaf)
        if reason or isinstance(leaf, jax.ShapeDtypeStruct):
            key_path = jax.tree_util.keystr(path, simple=True, separator="/")
            if reason:
                useless.append(f"  {key_path}: {reason}")
            else:
                shapes.append(f"  {key_path}: a ShapeDtypeStruct")
    if useless:
        raise ValueError(f"{name} has arrays without values:\n" + "\n".join(useless))
    if shapes:
        raise TypeError(
            f"{name} has shapes in place of arrays; only trace_symmetry takes these, here values "
            "are needed:\n" + "\n".join(shapes)
        )


def _why_useless(leaf: Any) -> str | None:
    """Says why an array has no values that could be used, or not all."""
    if isinstance(leaf, np.ma.MaskedArray):
        return "a masked array; fill in what is missing"
    is_known = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if is_known and leaf.is_deleted():
        return "deleted, as is what a jitted function is given by donate_argnums; keep a copy"
    return None


def require_batches(batches: Any) -> None:
    """Refuses a single batch where an iterable of batches is wanted.

    Without the check, an array would be iterated over by its first axis, and a dict by its keys.

    Args:
        batches: The argument that was given.

    Raises:
        TypeError: If it is an array, a dict or a string, or cannot be iterated over.
    """
    if isinstance(batches, jax.Array | np.ndarray):
        given = f"an array of shape {np.shape(batches)}"
    elif isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        given = type(batches).__name__
    else:
        return
    raise TypeError(
        f"batches is {given}, which is not a list of batches; pass a list or a generator of "
        "arrays, or of tuples of arrays, as in [x]"
    )


def checked_count(value: Any, name: str, remedy: str) -> int:
    """Refuses what is not a whole number of at least 1.

    Args:
        value: The argument that was given.
        name: The name of the argument, for the message.
        remedy: What can be passed instead, in words, for the message.

    Returns:
        The number, as Python's `int`.

    Raises:
        TypeError: If the argument is no number.
        ValueError: If the number is not whole, or is below 1.
    """
    # To Python a bool is a number; given as a count it is a mistake.
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; give {remedy}")
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} is {value}; give {remedy}")
    return int(value)


def checked_position(position: Any, name: str) -> int:
    """Refuses what is no position of a model. Whether it is in range is not checked.

    Args:
        position: The argument that was given.
        name: Its name.

    Returns:
        The position, as an integer of Python.

    Raises:
        TypeError: If it is no whole number.
    """
    # To Python a bool is an integer; given as a position it is a mistake.
    if isinstance(position, bool | np.bool_) or not isinstance(position, numbers.Integral):
        kind = type(position).__name__
        raise TypeError(f"{name} is {position!r}, of type {kind}; give a model's position")
    return int(position)


def checked_key(key: Any) -> jax.Array:
    """Returns a source of randomness that may be left out.

    Args:
        key: The argument that was given.

    Returns:
        The key, `jax.random.key(0)` if it is None.

    Raises:
        TypeError: As `require_key`.
    """
    if key is None:
        return jax.random.key(0)
    require_key(key)
    return key


def require_key(key: Any) -> None:
    """Refuses what is not a single key of `jax.random`.

    Args:
        key: The argument that was given.

    Raises:
        TypeError: If it is a number, or a batch of keys.
    """
    if isinstance(key, jax.Array):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if is_typed and key.ndim == 0:
            return
        # `jax.random.PRNGKey` makes keys that are vectors of integers.
        if key.dtype == np.uint32 and key.ndim == 1:
            return
    given = repr(key)[:_SHOWN_CHARACTERS]
    raise TypeError(f"key is {given}; pass a single key, as jax.random.key(0) is one")


# --- settings


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
    """Refuses a setting that is no number, or that is out of range.

    Args:
        owner: The dataclass whose field the setting is.
        name: The name of the field.
        least: The smallest value that is allowed. Give this or `above`.
        above: The value that the setting must be larger than.
        most: The largest value that is allowed.
        below: The value that the setting must be smaller than.
        whole: Whether the setting must be an integer.
        finite: Whether infinity is out of range.

    Raises:
        TypeError: If the setting is not a number of Python or NumPy.
        ValueError: If the number is out of range.
    """
    value: Any = getattr(owner, name)
    interval = _interval_in_words(least, above, most, below)
    wanted = f"{type(owner).__name__} needs {name} {interval}"
    kind = numbers.Integral if whole else numbers.Real
    # To Python a bool is an integer; given as a number it is a mistake.
    is_bool = isinstance(value, bool | np.bool_)
    if is_bool or not isinstance(value, kind):
        noun = "a whole number" if whole else "a number"
        given = f"{value!r}, of type {type(value).__name__}"
        raise TypeError(f"{wanted}, {noun}, got {given}.")
    number = float(value)
    in_range = (
        (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    # Without any bound, NaN would pass.
    is_forbidden = math.isnan(number) or (finite and math.isinf(number))
    if is_forbidden or not in_range:
        raise ValueError(f"{wanted}, got {value}.")


def _interval_in_words(least: Any, above: Any, most: Any, below: Any) -> str:
    """Writes an interval as `> 0`, `>= 1` or `in (0, 1]`."""
    if most is None and below is None:
        return f"> {above}" if least is None else f">= {least}"
    left = f"({above}" if least is None else f"[{least}"
    right = f"{below})" if most is None else f"{most}]"
    return f"in {left}, {right}"


def require_flag(owner: Any, name: str) -> None:
    """Refuses a setting that is neither True nor False.

    Args:
        owner: The dataclass whose field the setting is.
        name: The name of the field.

    Raises:
        TypeError: If the setting is not a bool.
    """
    value = getattr(owner, name)
    if not isinstance(value, bool):
        wanted = f"{type(owner).__name__} needs {name} to be True or False"
        raise TypeError(f"{wanted}, got {value!r}.")


def require_epsilon(solver: Any) -> None:
    """Refuses an entropic solver without entropy.

    Args:
        solver: The solver, with a field `epsilon`.

    Raises:
        TypeError: If epsilon is not a number.
        ValueError: If epsilon is not above 0, or not finite. The message names the exact solver.
    """
    try:
        require_number(solver, "epsilon", above=0, finite=True)
    except ValueError as error:
        raise ValueError(f"{error} Without entropy, use Exact().") from None
