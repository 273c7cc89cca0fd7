"""Every difference between the versions of JAX that we support, 0.7.2 to 0.12, in one place.

Versions differ in which primitives there are, in which of them JAX exports, and in the names of
their parameters. Nothing here asks for the version: a primitive is found by its public name, by
tracing what emits it, or where it is defined; a parameter is told by what it is.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import source_info_util
from jax.extend import core

from otfusion_jax.tracing.primitives import CALLS


def closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Returns a jaxpr together with its constants.

    Args:
        jaxpr: a `Jaxpr` without constants, or a `ClosedJaxpr`; from JAX 0.11 on these are one
            class.

    Returns:
        The closed jaxpr.
    """
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def body(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns what a call runs exactly once on its operands.

    The parameter that holds it has many names. It is the only one that is a jaxpr: how a call is
    differentiated or batched is a function, or a jaxpr wrapped in one.

    Args:
        eqn: an equation.

    Returns:
        The body; None for other primitives.
    """
    if eqn.primitive not in CALLS:
        return None
    (jaxpr,) = (v for v in eqn.params.values() if isinstance(v, core.Jaxpr | core.ClosedJaxpr))
    return closed(jaxpr)


def expanded(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """Traces the implementation of one of the primitives `HIGHER`.

    Args:
        eqn: its equation.

    Returns:
        What it does to its operands, in terms of other primitives.
    """
    operation = eqn.params["_prim"]

    def implementation(*flat: Any) -> list[Any]:
        args = jax.tree_util.tree_unflatten(operation.in_tree, flat)
        return jax.tree_util.tree_leaves(operation.expand(*args))

    return jax.make_jaxpr(implementation)(*operands_of(eqn))


def operands_of(eqn: core.JaxprEqn) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of an equation's operands."""
    avals: list[Any] = [atom.aval for atom in eqn.invars]
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]


class ScanOperands(NamedTuple):
    """The operands of a scan: the same in each iteration, carried from one to the next, sliced."""

    consts: list[Any]
    carry: list[Any]
    xs: list[Any]


def scan_operands(eqn: core.JaxprEqn, operands: Sequence[Any]) -> ScanOperands:
    """Sorts the operands of a scan.

    Args:
        eqn: an equation of `scan`.
        operands: one of anything for each of its operands.

    Returns:
        The same, by their part in the loop.
    """
    if "ft_in" in eqn.params:  # JAX 0.11: a tree of three, in place of two counts
        consts, carry, _ = map(len, eqn.params["ft_in"].unpack())
    else:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    first, last = consts, consts + carry
    return ScanOperands(list(operands[:first]), list(operands[first:last]), list(operands[last:]))


def top_k_axis(eqn: core.JaxprEqn) -> int:
    """Returns the axis that a `top_k` ranks; before JAX 0.8 it is always the last."""
    ranked: Any = eqn.invars[0].aval
    rank = len(ranked.shape)
    return eqn.params.get("axis", rank - 1) % rank


def subjaxprs(jaxpr: core.Jaxpr) -> list[core.Jaxpr]:
    """Returns the jaxprs that the equations of a jaxpr hold, not those within them in turn.

    Args:
        jaxpr: a jaxpr without its constants.

    Returns:
        The jaxprs, without theirs.
    """
    leaves = jax.tree_util.tree_leaves([eqn.params for eqn in jaxpr.eqns])
    return [closed(x).jaxpr for x in leaves if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]


# --- where an equation comes from


@contextlib.contextmanager
def at_source(eqn: core.JaxprEqn) -> Iterator[None]:
    """Lets equations that are traced inside of the context stand where another does.

    Args:
        eqn: the other equation. JAX's own evaluation of a jaxpr does the same by the same means.

    Yields:
        Nothing.
    """
    with source_info_util.user_context(eqn.source_info.traceback):
        yield


def source(eqn: core.JaxprEqn) -> str | None:
    """Returns the source line of an equation: the innermost frame outside of JAX itself.

    Args:
        eqn: the equation.

    Returns:
        File, line and function; None if all of its frames are JAX's own.
    """
    home = os.path.dirname(jax.__file__)
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(home):
            file = frame.file_name.rpartition("site-packages/")[2]
            return f"{file}:{frame.line_num} ({frame.function_name})"
    return None
