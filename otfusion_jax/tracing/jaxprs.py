"""What is asked of jaxprs and their equations, in one way for all supported versions of JAX.

Versions differ in the names and forms of an equation's parameters. Nothing here asks for the
version: a parameter is told by what it is. Which primitives a version has is in `primitives`.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import source_info_util
from jax.extend import core

from otfusion_jax.tracing.primitives import CALLS


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Returns a jaxpr together with its constants.

    Args:
        jaxpr: A `Jaxpr` without constants, or a `ClosedJaxpr`. From JAX 0.11 on these are one
            class.

    Returns:
        The closed jaxpr.
    """
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr
    return core.ClosedJaxpr(jaxpr, ())


def live(
    jaxpr: core.Jaxpr, used: Sequence[bool] | None = None
) -> Iterator[tuple[int, core.JaxprEqn, tuple[bool, ...]]]:
    """Yields the equations that matter: what is never used constrains nothing.

    Args:
        jaxpr: The jaxpr.
        used: One flag for each of its outputs, False where nothing depends on it; None if all are
            used.

    Yields:
        For each equation, in order: its index, the equation, and one flag for each of its results,
        which says whether anything depends on it.
    """
    if used is None:
        used = [True] * len(jaxpr.outvars)
    needed: set[core.Var] = set()
    for var, is_used in zip(jaxpr.outvars, used, strict=True):
        if is_used:
            needed |= _variables([var])
    found = []
    # Backwards: what an equation reads is needed only if what it makes is.
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        flags = tuple(var in needed for var in eqn.outvars)
        # An equation with effects runs in any case, and what it reads matters.
        if eqn.effects or any(flags):
            needed |= _variables(eqn.invars)
            found.append((index, eqn, flags))
    return reversed(found)


def _variables(atoms: Iterable[Any]) -> set[core.Var]:
    """Returns the variables among the operands or outputs of a jaxpr, without the literals."""
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


# --- jaxprs within equations


def is_jaxpr(parameter: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr, closed or not."""
    return isinstance(parameter, core.Jaxpr | core.ClosedJaxpr)


def body(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns what a call runs exactly once on its operands.

    The parameter that holds it has many names. It is the only one that is a jaxpr: how a call is
    differentiated or batched is a function, or a jaxpr wrapped in one.

    Args:
        eqn: An equation of any primitive.

    Returns:
        The body of the call; None if the primitive is none of `primitives.CALLS`.
    """
    if eqn.primitive not in CALLS:
        return None
    parameters = eqn.params.values()
    (jaxpr,) = filter(is_jaxpr, parameters)
    return closed(jaxpr)


def expanded(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """Traces the implementation of one of the primitives `HIGHER`.

    Args:
        eqn: An equation of such a primitive.

    Returns:
        What it does to its operands, in terms of other primitives.
    """
    operation = eqn.params["_prim"]

    def implementation(*flat: Any) -> list[Any]:
        args = jax.tree_util.tree_unflatten(operation.in_tree, flat)
        result = operation.expand(*args)
        return jax.tree_util.tree_leaves(result)

    return jax.make_jaxpr(implementation)(*operands_of(eqn))


def subjaxprs(eqns: Sequence[core.JaxprEqn]) -> list[core.Jaxpr]:
    """Returns the jaxprs that equations hold, not those within them in turn.

    Args:
        eqns: The equations.

    Returns:
        The jaxprs, without their constants.
    """
    params = [eqn.params for eqn in eqns]
    # Branches, for one, are a tuple of jaxprs.
    leaves = jax.tree_util.tree_leaves(params)
    return [closed(leaf).jaxpr for leaf in leaves if is_jaxpr(leaf)]


def equations_within(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Returns the equations within an equation, those within them included."""
    found = []
    for jaxpr in subjaxprs([eqn]):
        for inner in jaxpr.eqns:
            found.append(inner)
            found.extend(equations_within(inner))
    return found


def evaluated(eqn: core.JaxprEqn, operands: Sequence[Any], **changed_params: Any) -> list[Any]:
    """Evaluates an equation.

    Args:
        eqn: The equation. A call is made as a call, and derived by its own rule if it has one.
        operands: Its operands, known or traced.
        **changed_params: Parameters of the primitive that are others than the equation's.

    Returns:
        Its results, a list also where there is one alone.
    """
    given = eqn.primitive.get_bind_params(eqn.params | changed_params)
    # In JAX 0.7, bodies come as functions, in front of the operands.
    functions, params = ((), given) if isinstance(given, dict) else given
    results = eqn.primitive.bind(*functions, *operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


# --- operands and parameters


def operands_of(eqn: core.JaxprEqn) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of an equation's operands."""
    structs = []
    for atom in eqn.invars:
        aval: Any = atom.aval
        struct = jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
        structs.append(struct)
    return structs


class ScanOperands(NamedTuple):
    """The operands of a scan, by their part in the loop.

    Attributes:
        consts: Those that are the same in each iteration.
        carry: Those that the loop starts from, and hands on from one iteration to the next.
        xs: Those of which each iteration gets one slice.
    """

    consts: list[Any]
    carry: list[Any]
    xs: list[Any]


def scan_operands(eqn: core.JaxprEqn, operands: Sequence[Any]) -> ScanOperands:
    """Sorts the operands of a scan.

    Args:
        eqn: An equation of `scan`.
        operands: One object of any type for each of its operands.

    Returns:
        The same objects, by their part in the loop.
    """
    params = eqn.params
    if "ft_in" in params:  # JAX 0.11: a tree of three, in place of two counts
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    else:
        num_consts = params["num_consts"]
        num_carry = params["num_carry"]
    remaining = list(operands)
    consts, remaining = remaining[:num_consts], remaining[num_consts:]
    carry, xs = remaining[:num_carry], remaining[num_carry:]
    return ScanOperands(consts, carry, xs)


def top_k_axis(eqn: core.JaxprEqn) -> int:
    """Returns the axis that a `top_k` ranks; before JAX 0.8 it is always the last."""
    ranked: Any = eqn.invars[0].aval
    rank = len(ranked.shape)
    return eqn.params.get("axis", rank - 1) % rank


# --- where an equation comes from


@contextlib.contextmanager
def at_source(eqn: core.JaxprEqn) -> Iterator[None]:
    """Lets equations that are traced inside of the context stand where another does.

    Args:
        eqn: The other equation. JAX's own evaluation of a jaxpr does the same by the same means.

    Yields:
        Nothing.
    """
    with source_info_util.user_context(eqn.source_info.traceback):
        yield


def source(eqn: core.JaxprEqn) -> str | None:
    """Returns the source line of an equation: the innermost frame outside of JAX itself.

    Args:
        eqn: The equation.

    Returns:
        File, line and function; None if all of its frames are JAX's own.
    """
    traceback = eqn.source_info.traceback
    if traceback is None:
        return None
    # To the end of its name: `jaxopt` and `jax_md` are installed beside it.
    home_of_jax = os.path.join(os.path.dirname(jax.__file__), "")
    for frame in traceback.frames:
        if not frame.file_name.startswith(home_of_jax):
            file = frame.file_name.rpartition("site-packages/")[2]
            return f"{file}:{frame.line_num} ({frame.function_name})"
    return None
