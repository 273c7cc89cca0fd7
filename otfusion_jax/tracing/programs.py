"""Several functions of one tree of parameters: a policy and a value, training and evaluation mode.

What only one of them reads must not stay behind when the units of the others move. So they are
traced together, as the one function that computes all of them, and what moves is what all of them
allow. `together` makes this function. Where a function is asked for, most of the library takes the
list of functions with their inputs as well: `as_function` reads such a list as one function.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.typing import PyTree

EntryPoint = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function `fn(params, *inputs)` and the tuple of its inputs."""

Program = Callable[..., Any] | Sequence[EntryPoint]
"""A function of parameters and inputs, or several functions with the inputs of each."""


@dataclasses.dataclass(frozen=True)
class Together:
    """Functions of the same parameters, called as one function.

    A dataclass and no closure, because equal ones have to be one static argument to `jax.jit`.

    Attributes:
        functions: The functions `fn(params, *inputs)`, in the order of their outputs.
    """

    functions: tuple[Callable[..., Any], ...]

    def __call__(self, params: PyTree, *inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Evaluates every function.

        Args:
            params: The parameters that all functions share.
            *inputs: One tuple of inputs for each function.

        Returns:
            The output of each function.

        Raises:
            ValueError: If there are more or fewer tuples than functions.
        """
        if len(inputs) != len(self.functions):
            raise ValueError(
                f"{len(self.functions)} functions were put together, but inputs for {len(inputs)} "
                "were given; pass one tuple of inputs for each"
            )
        outputs = []
        for fn, inputs_of_fn in zip(self.functions, inputs, strict=True):
            outputs.append(fn(params, *inputs_of_fn))
        return tuple(outputs)


def together(*functions: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Makes one function of several that have the same parameters.

    It serves wherever a single function does (`feature_gram`, `learn_alignment`). `trace_symmetry`,
    `check_symmetry`, `features` and `repair` take a list of functions and inputs as well.

    Args:
        *functions: Pure functions `fn(params, *inputs)`, one or more.

    Returns:
        A function of the parameters and of one tuple of inputs for each function; it returns the
        tuple of their outputs. Equal functions give equal results here, so that what is jitted with
        it is compiled once.

    Raises:
        ValueError: If there are no functions.
        TypeError: If one of them can't be called.

    Examples:
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
            raise TypeError(f"function {number} is {kind_of(fn)}, which can't be called")
        if isinstance(fn, type):
            raise TypeError(f"function {number} is {_class_for_function(fn)}")
    return Together(functions)


def as_function(
    program: Program, inputs: tuple[PyTree, ...]
) -> tuple[Callable[..., Any], tuple[PyTree, ...]]:
    """Reads a function, or several functions with their inputs, as one function.

    Args:
        program: A function, or a list of functions each with a tuple of inputs.
        inputs: The inputs of the function; empty if `program` is a list.

    Returns:
        One function and its inputs. For a list these are the tuples of inputs of its functions.

    Raises:
        TypeError: If `program` is neither. The message says what was given instead.
        ValueError: If the list is empty, or if there are inputs beside those that it holds.
    """
    if isinstance(program, type):
        raise TypeError(f"the function is {_class_for_function(program)}")
    # A callable object may be a sequence as well; it counts as a function.
    if callable(program):
        return program, inputs
    if hasattr(program, "apply"):  # Haiku's and other pairs of `init` and `apply`
        raise TypeError(
            f"{kind_of(program)} was given as the function; pass the function that it "
            "holds, its `apply`"
        )
    if not isinstance(program, Sequence) or isinstance(program, str):
        raise TypeError(
            f"{kind_of(program)} was given as the function; pass fn(params, *inputs), or a "
            "list of (fn, inputs) with a tuple of inputs for each"
        )
    for number, entry in enumerate(program):
        _require_entry_point(number, entry)
    if inputs:
        raise ValueError("with a list of (fn, inputs) there are no further inputs to give")
    functions = [fn for fn, _ in program]
    return together(*functions), tuple(given for _, given in program)


def entry_points(program: Program, inputs: tuple[PyTree, ...]) -> list[EntryPoint]:
    """Takes a program apart into its functions.

    Args:
        program: A function, which may be one that `together` made, or a list of functions each with
            a tuple of inputs.
        inputs: The inputs of the function; empty if `program` is a list.

    Returns:
        A function and the tuple of its inputs, for each function that the program consists of.

    Raises:
        TypeError: As `as_function`.
        ValueError: As `as_function`.
    """
    fn, given = as_function(program, inputs)
    # With another number of inputs the call has to fail, with the message of `Together`.
    if isinstance(fn, Together) and len(given) == len(fn.functions):
        return list(zip(fn.functions, given, strict=True))
    return [(fn, given)]


def _class_for_function(cls: type) -> str:
    """Says of a class in place of a function what to pass."""
    return (
        f"the class {cls.__name__}; pass a function fn(params, *inputs), such as the `apply` of an "
        f"instance, {cls.__name__}(...).apply"
    )


def _require_entry_point(number: int, entry: EntryPoint) -> None:
    """Refuses an element of a program that is no pair of a function and a tuple of inputs."""
    is_pair = isinstance(entry, Sequence) and len(entry) == 2 and callable(entry[0])
    if not is_pair:
        raise TypeError(
            f"entry point {number} is no pair (fn, inputs) of a function and its inputs, but "
            f"{kind_of(entry)}; pass fn(params, *inputs), or a list such as "
            "[(fn, (x,)), (other_fn, (x, y))]"
        )
    fn, inputs = entry
    if isinstance(fn, type):
        raise TypeError(f"the function of entry point {number} is {_class_for_function(fn)}")
    if not isinstance(inputs, tuple):
        raise TypeError(
            f"the inputs of entry point {number} are {kind_of(inputs)}; pass a tuple "
            "of inputs, (x,) for a single one"
        )
