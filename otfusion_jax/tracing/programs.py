"""Several functions of one tree of parameters: a policy and a value, training and evaluation mode.

What only one of them reads must not stay behind when the others' units move. So they are traced
together, as the function that computes all of them, and what moves is what all of them allow.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import PyTree

EntryPoint = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function `fn(params, *inputs)` and its inputs."""

Program = Callable[..., Any] | Sequence[EntryPoint]
"""A function of parameters and inputs, or several with the inputs of each."""


@dataclasses.dataclass(frozen=True)
class Together:
    """Functions of the same parameters as one; see `together`."""

    functions: tuple[Callable[..., Any], ...]

    def __call__(self, params: PyTree, *inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns what each function computes of its own inputs."""
        if len(inputs) != len(self.functions):
            raise ValueError(
                f"{len(self.functions)} functions were put together, but inputs for {len(inputs)} "
                "were given; pass one tuple of inputs for each"
            )
        pairs = zip(self.functions, inputs, strict=True)
        return tuple(fn(params, *given) for fn, given in pairs)


def together(*functions: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Makes one function of several that have the same parameters.

    It serves wherever a single function does (`feature_gram`, `learn_alignment`). `trace_symmetry`,
    `check_symmetry`, `features` and `repair` take a list of functions and inputs as well.

    Args:
        *functions: pure functions `fn(params, *inputs)`.

    Returns:
        A function of the parameters and of one tuple of inputs for each function; it returns the
        tuple of their outputs. Equal functions give equal results here, so that what is jitted with
        it is compiled once.

    Raises:
        ValueError: if there are no functions.
        TypeError: for what can't be called.

    Example:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> both = otf.together(lambda p, x: x @ p, lambda p, x, y: y - x @ p)
        >>> [out.shape for out in both(jnp.ones((3, 2)), (jnp.ones((1, 3)),), (jnp.ones(3), 1.0))]
        [(1, 2), (2,)]
    """
    if not functions:
        raise ValueError("no functions were given; pass one or more")
    for number, fn in enumerate(functions):
        if not callable(fn):
            raise TypeError(f"function {number} is a {type(fn).__name__}, which can't be called")
    return Together(functions)


def as_function(
    program: Program, inputs: tuple[PyTree, ...]
) -> tuple[Callable[..., Any], tuple[PyTree, ...]]:
    """Reads several functions with their inputs as one.

    Args:
        program: a function, or functions each with a tuple of inputs.
        inputs: of the function; none if there are several.

    Returns:
        A function and its inputs.

    Raises:
        TypeError: for what is neither, naming what is wrong.
        ValueError: if there are no functions, or inputs beside those of several functions.
    """
    if callable(program):
        return program, inputs
    if not isinstance(program, Sequence) or isinstance(program, str):
        raise TypeError(
            f"a {type(program).__name__} was given as the function; pass fn(params, *inputs), or a "
            "list of (fn, inputs) with a tuple of inputs for each"
        )
    for number, entry in enumerate(program):
        if not (isinstance(entry, Sequence) and len(entry) == 2 and callable(entry[0])):
            raise TypeError(
                f"entry point {number} is no pair (fn, inputs) of a function and its inputs"
            )
        if not isinstance(entry[1], tuple):
            raise TypeError(
                f"the inputs of entry point {number} are a {type(entry[1]).__name__}; pass a tuple "
                "of inputs, (x,) for a single one"
            )
    if inputs:
        raise ValueError("with a list of (fn, inputs) there are no further inputs to give")
    return together(*(fn for fn, _ in program)), tuple(given for _, given in program)


def entry_points(program: Program, inputs: tuple[PyTree, ...]) -> list[EntryPoint]:
    """Returns each function that a program consists of, with its inputs.

    Args:
        program: as for `as_function`.
        inputs: likewise.

    Returns:
        One pair for a function, and one for each of several.
    """
    fn, given = as_function(program, inputs)
    if isinstance(fn, Together) and len(given) == len(fn.functions):
        return list(zip(fn.functions, given, strict=True))
    return [(fn, given)]
