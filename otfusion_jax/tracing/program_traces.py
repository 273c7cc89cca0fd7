"""The jaxprs of a program: on the inputs that were given, and on longer ones.

An axis of size 1 tells little. What is broadcast along it, or computed from its length, varies at
no other length than 1. So a function whose inputs have such axes is traced at size 2 as well, if it
takes that, and its symmetry is what all the jaxprs allow.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from otfusion_jax.common.typing import PyTree
from otfusion_jax.tracing.misuse import naming_mistakes

MOST_LONGER = 8
"""So many axes of inputs at most are lengthened one by one: each costs a trace of the function."""


class ProgramTrace(NamedTuple):
    """A function traced on some inputs.

    Attributes:
        jaxpr: The jaxpr, whose first arguments are the leaves of the parameters.
        inputs: The inputs, of which only the shapes and dtypes matter.
    """

    jaxpr: core.ClosedJaxpr
    inputs: tuple[PyTree, ...]


class _InputAxis(NamedTuple):
    """An axis of one of the leaves of the inputs."""

    leaf: int
    axis: int


def trace_program(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> ProgramTrace:
    """Traces a function on the inputs given.

    Args:
        fn: The function `fn(params, *inputs)`.
        params: Its parameters, arrays or `jax.ShapeDtypeStruct`s.
        inputs: Its inputs, likewise.

    Returns:
        The trace.

    Raises:
        TypeError: If the function fails, and arguments of a wrong kind are the cause. All else
            that it raises is passed on.
    """
    with naming_mistakes(fn, params, inputs):
        jaxpr = jax.make_jaxpr(fn)(params, *inputs)
    return ProgramTrace(jaxpr, inputs)


def trace_longer(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> list[ProgramTrace]:
    """Traces a function on inputs that have size 2 where those given have size 1.

    The function need not take other sizes: those that it takes count.

    Args:
        fn: The function `fn(params, *inputs)`.
        params: Its parameters.
        inputs: Its inputs, as they were given.

    Returns:
        One trace with all such axes lengthened, if there are any and the function takes that. Else
        one trace for each axis that can be lengthened alone, of the first few.
    """
    axes = _axes_of_size_one(inputs)
    if not axes:
        return []
    # One trace costs the least, and shows as much as several.
    together = _trace_lengthened(fn, params, inputs, axes)
    if together is not None:
        return [together]
    if len(axes) == 1:
        return []
    traces = []
    for axis in axes[:MOST_LONGER]:
        alone = _trace_lengthened(fn, params, inputs, [axis])
        if alone is not None:
            traces.append(alone)
    return traces


def _axes_of_size_one(inputs: tuple[PyTree, ...]) -> list[_InputAxis]:
    """Returns the axes of size 1, in the order of the leaves."""
    axes = []
    for number, leaf in enumerate(jax.tree_util.tree_leaves(inputs)):
        for axis, size in enumerate(np.shape(leaf)):
            if size == 1:
                axes.append(_InputAxis(number, axis))
    return axes


def _trace_lengthened(
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    axes: Sequence[_InputAxis],
) -> ProgramTrace | None:
    """Traces a function with some axes of its inputs at size 2; None if it does not take that."""
    leaves, structure = jax.tree_util.tree_flatten(inputs)
    for number, axis in axes:
        shape = list(np.shape(leaves[number]))
        shape[axis] = 2  # the least size at which something can vary
        leaves[number] = jax.ShapeDtypeStruct(tuple(shape), leaves[number].dtype)
    longer = jax.tree_util.tree_unflatten(structure, leaves)
    try:
        with warnings.catch_warnings():
            # The user's function may well warn of sizes that the user has not given.
            warnings.simplefilter("ignore")
            return ProgramTrace(jax.make_jaxpr(fn)(params, *longer), longer)
    except Exception:  # whatever a function raises for sizes that it does not take
        return None
