"""A network's function and its example inputs, as words of a command line name them."""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")
_LINES_SHOWN = 3
_INPUT = re.compile(r"(\w+)\[([\d, ]*)\](?::(\d+))?")
_SHORT = {"f": "float", "bf": "bfloat", "i": "int", "u": "uint", "c": "complex"}


class FunctionError(ValueError):
    """What the function of `--apply` raised; the message has its own lines."""


def load_function(name: str) -> Callable[..., Any]:
    """Imports the function of `--apply`, from the current folder as well.

    Args:
        name: `package.module:function`; behind the colon there may be attributes of attributes.

    Returns:
        The function.

    Raises:
        ValueError: If the name has no such form, or there is no such module, or nothing of that
            name in it, or if it cannot be called.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"--apply is {name!r}; give package.module:function")
    # A console script has the folder of the script on its path, and not the one it is called in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--apply is {name!r}, but {error}; it is looked for in sys.path"
        ) from None
    # A method of an object, or a function in a class.
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--apply is {name!r}, but there is no {part!r} in {module_name}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"--apply is {name!r}, which is no function")
    return found


def parse_inputs(words: Sequence[str]) -> list[tuple[jax.ShapeDtypeStruct, int]]:
    """Reads example inputs.

    Args:
        words: For each input its dtype and shape, as `f32[8,64]`; of integers the number that all
            are below may follow, as in `i32[2,16]:50257`.

    Returns:
        For each input its shape and dtype, and that number, 2 if it is not given.

    Raises:
        ValueError: If a word has no such form, or names no dtype.
    """
    inputs = []
    for word in words:
        match = _INPUT.fullmatch(word)
        dtype = None if match is None else _dtype(match[1])
        if match is None or dtype is None:
            raise ValueError(
                f"--input is {word!r}; give dtype and shape, as f32[8,64], or i32[2,16]:100 for"
                " integers below 100"
            )
        # A scalar has none: `f32[]`.
        sizes = [int(size) for size in match[2].replace(" ", "").split(",") if size]
        bound = int(match[3]) if match[3] else 2
        inputs.append((jax.ShapeDtypeStruct(tuple(sizes), dtype), bound))
    return inputs


def _dtype(name: str) -> Any:
    """Returns the dtype of a name such as `f32` or `float32`; None if there is none."""
    short = re.fullmatch(r"([a-z]+)(\d+)", name)
    if short and short[1] in _SHORT:
        name = _SHORT[short[1]] + short[2]
    try:
        return jnp.dtype(name)
    except TypeError:
        return None


def draw_inputs(inputs: Sequence[tuple[jax.ShapeDtypeStruct, int]], seed: int) -> list[np.ndarray]:
    """Draws random inputs.

    Args:
        inputs: Their shapes, dtypes and bounds, as `parse_inputs` returns them.
        seed: The seed.

    Returns:
        Standard normal numbers; integers from 0 to below their bound.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for struct, bound in inputs:
        if jnp.issubdtype(struct.dtype, jnp.inexact):
            values = rng.standard_normal(struct.shape)
        else:
            # Tokens that are out of range would be clipped, and show nothing.
            values = rng.integers(0, bound, struct.shape)
        drawn.append(np.asarray(values).astype(struct.dtype))
    return drawn


def calling(name: str, call: Callable[[], T]) -> T:
    """Calls what calls the function of `--apply`, and shows its own lines if it fails.

    Args:
        name: The function, for the message.
        call: What is called.

    Returns:
        What it returns.

    Raises:
        FunctionError: If the function raises, with the last lines of the traceback.
    """
    try:
        return call()
    except Exception as error:
        kind = type(error).__name__
        raise FunctionError(f"{name} failed: {kind}: {error}{_own_lines(error)}") from error


def _own_lines(error: Exception) -> str:
    """Returns the last lines of a traceback that are neither JAX's nor this library's."""
    others = [os.path.dirname(jax.__file__), os.path.dirname(os.path.dirname(__file__))]
    own = []
    for frame in traceback.extract_tb(error.__traceback__):
        if not any(frame.filename.startswith(folder + os.sep) for folder in others):
            own.append(f"\n  {frame.filename}, line {frame.lineno}: {frame.line}")
    return "".join(own[-_LINES_SHOWN:])
