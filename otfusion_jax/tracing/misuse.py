"""Arguments that were passed by mistake, told by what the call would do without the mistake.

A function that gets something else than it expects fails somewhere inside, in words that say
nothing of the mistake. Params and inputs are any pytrees, so most mistakes can't be told from the
arguments alone. They are looked for when the function has failed, and only then: no call that works
is refused. A mistake counts as found if the function works once it is mended. Where none is found,
a note on the function's own exception says what it was called on.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.programs import Together

_NEEDING_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""What JAX raises where Python asks for a value of an array that is traced."""


class _MendedCall(NamedTuple):
    """A call that may have been meant, and what to say if it works."""

    fn: Callable[..., Any]
    args: tuple[PyTree, ...]
    advice: str


def find_mistake(fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]) -> str | None:
    """Looks for a mistake in a call `fn(params, *inputs)` that has failed.

    Args:
        fn: The function, which raised an exception.
        params: The parameters that it was called with, arrays or `jax.ShapeDtypeStruct`s.
        inputs: The inputs that it was called with, likewise.

    Returns:
        What is wrong and what to pass instead. None if the mistake is not one of those known, so
        that the function's own exception says more.
    """
    foreign = find_foreign_input(inputs)
    if foreign is not None:
        return foreign
    for call in _mended_calls(fn, params, inputs):
        if _works(call):
            return call.advice
    return None


@contextlib.contextmanager
def naming_mistakes(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> Iterator[None]:
    """Says what was passed by mistake, if that is why a call `fn(params, *inputs)` within fails.

    Args:
        fn: The function.
        params: The parameters that it is called with, arrays or `jax.ShapeDtypeStruct`s.
        inputs: The inputs that it is called with, likewise.

    Yields:
        Nothing: the call is made within.

    Raises:
        TypeError: If the function fails, and arguments of a wrong kind are the cause. All else
            that it raises is passed on, with a note on what it was called on and what may help.
    """
    try:
        yield
    except Exception as error:
        mistake = find_mistake(fn, params, inputs)
        if mistake is None:
            if not _is_refused_by_together(fn, inputs):
                error.add_note(_hint(error, fn, params, inputs))
            raise
        raise TypeError(mistake) from error


def find_foreign_input(inputs: tuple[PyTree, ...]) -> str | None:
    """Looks for an input that is no array.

    Args:
        inputs: The inputs, pytrees.

    Returns:
        Which leaf it is, and what to pass instead. None if all leaves are arrays, numbers or
        `jax.ShapeDtypeStruct`s.
    """
    leaves_with_paths, _ = jax.tree_util.tree_flatten_with_path(inputs)
    for path, value in leaves_with_paths:
        if not _is_array(value):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return f"input {name} is {kind_of(value)}; pass pytrees of arrays, close over the rest"
    return None


def _mended_calls(
    fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> Iterator[_MendedCall]:
    """Yields the calls that may have been meant."""
    apply = getattr(fn, "apply", None)
    if callable(apply):
        advice = f"the function is {kind_of(fn)}, which holds the function to pass: its `apply`"
        yield _MendedCall(apply, (params, *inputs), advice)

    # Whichever input has taken the place of the parameters, the rest is in order.
    for number, value in enumerate(inputs):
        others = (*inputs[:number], *inputs[number + 1 :])
        advice = (
            f"params and input {number} are swapped, as the function works the other way round; "
            "pass the parameters first, and then the inputs"
        )
        yield _MendedCall(fn, (value, params, *others), advice)

    if len(inputs) == 1 and isinstance(inputs[0], list | tuple):
        advice = (
            f"the inputs were given as one {type(inputs[0]).__name__}; pass each of them as an "
            "argument of its own, after the parameters: (..., params, x, y)"
        )
        yield _MendedCall(fn, (params, *inputs[0]), advice)

    if not _takes(fn, params, inputs):
        for count in range(1, len(inputs)):
            advice = (
                f"the function takes fewer inputs than the {len(inputs)} given: the first {count} "
                "do; leave out the rest, such as labels, of each batch"
            )
            yield _MendedCall(fn, (params, *inputs[:count]), advice)

    if inputs:
        advice = (
            "the function works on the inputs alone, because it holds its own parameters; pass a "
            "function fn(params, *inputs). Of a module of NNX or Equinox, functional(module) makes "
            "one, and its parameters"
        )
        yield _MendedCall(fn, inputs, advice)


def _takes(fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]) -> bool:
    """Whether a function takes so many inputs, as far as its signature says."""
    try:
        inspect.signature(fn).bind(params, *inputs)
    except TypeError:
        return False
    except ValueError:
        pass  # not every callable has a signature
    return True


def _is_refused_by_together(fn: Callable[..., Any], inputs: tuple[PyTree, ...]) -> bool:
    """Whether the library itself refuses a call, and says why: no function was called then."""
    return isinstance(fn, Together) and len(inputs) != len(fn.functions)


def _hint(
    error: Exception, fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> str:
    """Says what may help where a function has failed on arguments of the right kind."""
    if isinstance(error, _NEEDING_VALUES):
        return (
            "the function decides in Python by a value that has none while it is traced; close "
            "over flags, as in lambda params, x: fn(params, x, train=False), and use jnp.where or "
            "jax.lax.cond for all else"
        )
    described = _described(inputs)
    if not described or not _takes(fn, params, inputs):
        return (
            f"the function was called with {described or 'no inputs'} after the parameters; pass "
            "every input that it takes, in order (for tracing, a jax.ShapeDtypeStruct will do)"
        )
    return (
        f"the function was called on the parameters and {described}; batches are [n, ...], of "
        "any number n of samples. A function of one sample becomes one of a batch by "
        "jax.vmap(fn, in_axes=(None, 0)), with a 0 for each input"
    )


def _described(inputs: tuple[PyTree, ...]) -> str:
    """Names the leaves of inputs with their shapes."""
    names = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names.append(f"input {name} of shape {np.shape(leaf)}")
    return ", ".join(names)


def _works(call: _MendedCall) -> bool:
    """Whether a call can be traced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Without computing anything, because the model may be large.
            jax.eval_shape(call.fn, *call.args)
    except Exception:  # whatever a function raises for what it does not take
        return False
    return True


def _is_array(value: Any) -> bool:
    """Whether JAX takes a value for an array."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return True
    try:
        jax.typeof(value)
    except TypeError:
        return False
    return True


def require_params_first(
    symmetry: Symmetry, params: PyTree, inputs: tuple[PyTree, ...], call: str
) -> None:
    """Refuses parameters that were passed as an input, where a symmetry says what they are.

    Args:
        symmetry: The symmetry that was traced.
        params: What was passed as the parameters.
        inputs: What was passed as the inputs.
        call: How the function is called, as in `"features(symmetry, fn, params, *inputs)"`.

    Raises:
        TypeError: If an input has the tree and the shapes of the parameters, and `params` has not.
    """
    if _fits(symmetry, params):
        return
    for number, value in enumerate(inputs):
        if _fits(symmetry, value):
            raise TypeError(
                f"the parameters were given as input {number}, and something else in their place: "
                f"call {call}"
            )


def _fits(symmetry: Symmetry, tree: PyTree) -> bool:
    """Whether a pytree has the structure and the shapes of the parameters of a symmetry."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    if treedef != symmetry.treedef:
        return False
    return [np.shape(leaf) for leaf in leaves] == [leaf.shape for leaf in symmetry.leaves]
