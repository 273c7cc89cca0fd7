"""Rewriting a program: parts of its parameters become its arguments.

The program is evaluated on arrays in pieces (see `pieces`), and traced while this is done. What it
does to a whole leaf before it takes a part by index is done to the pieces one by one, so that in
the new program no part meets another on the way. What can't be done piece by piece, such as a sum
over the pieces, is done to the pieces put together.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as P

from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.jaxprs import at_source, body, evaluated, scan_operands, source
from otfusion_jax.tracing.pieces import Operand, Operands, Pieces, is_any_in_pieces, joined
from otfusion_jax.tracing.piecewise import PIECEWISE


def take_parts(jaxpr: ClosedJaxpr, symmetry: Symmetry, *, keeps_apart: bool = False) -> ClosedJaxpr:
    """Makes arguments of the parts of leaves.

    Args:
        jaxpr: The jaxpr of a function whose first arguments are the leaves of the parameters.
        symmetry: The symmetry that says which leaves fall into which parts. It needs no groups.
        keeps_apart: Whether arrays of one shape that the program puts side by side stay in pieces
            as well, as the kernels of gates do that are applied at once.

    Returns:
        The same function of the parts of all leaves, and of the other arguments as they were.
    """
    parts = list(map(_shape_and_dtype, symmetry.parts))
    inputs = list(map(_shape_and_dtype, jaxpr.in_avals[len(symmetry.leaves) :]))

    def run(parts: list[Any], inputs: list[Any]) -> list[Any]:
        leaves = _leaves_in_pieces(parts, symmetry)
        outputs = _evaluate(jaxpr, [*leaves, *inputs], keeps_apart)
        return _all_joined(outputs)

    return jax.make_jaxpr(run)(parts, inputs)


def _shape_and_dtype(array: Any) -> jax.ShapeDtypeStruct:
    """Returns what there is to trace with in place of a part or an abstract value."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _leaves_in_pieces(parts: list[Any], symmetry: Symmetry) -> Operands:
    """Returns the leaves, those that are split in pieces."""
    axes = {}
    for leaf_split in symmetry.leaf_splits:
        axes[leaf_split.leaf] = leaf_split.axis
    parts_of_leaves: list[list[Any]] = [[] for _ in symmetry.leaves]
    for leaf, part in zip(symmetry.leaf_of, parts, strict=True):
        parts_of_leaves[leaf].append(part)
    leaves: Operands = []
    for leaf, leaf_parts in enumerate(parts_of_leaves):
        if leaf in axes:
            leaves.append(Pieces(axes[leaf], tuple(leaf_parts)))
        else:
            leaves.extend(leaf_parts)
    return leaves


def _evaluate(jaxpr: ClosedJaxpr, args: Operands, keeps_apart: bool) -> Operands:
    """Evaluates a jaxpr on arrays, some of which are in pieces."""
    env: dict[Any, Operand] = {}
    env.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Operand:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        with _same_source(eqn):
            results = _evaluate_equation(eqn, operands, keeps_apart)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _same_source(eqn: JaxprEqn) -> contextlib.AbstractContextManager[None]:
    """Lets what is traced inside of the context keep the place of an equation in the source.

    Without it all reasons of pins would name the lines of this module.
    """
    if source(eqn) is None:
        # It lies inside of a function of JAX's own. The call's place is the one to keep.
        return contextlib.nullcontext()
    return at_source(eqn)


def _evaluate_equation(eqn: JaxprEqn, operands: Operands, keeps_apart: bool) -> Operands:
    """Evaluates an equation piece by piece where that is possible, else on whole arrays."""
    inner = body(eqn)
    if inner is not None:
        return _evaluate(inner, operands, keeps_apart)
    if keeps_apart and eqn.primitive is P.concatenate_p and _are_alike(operands):
        return [Pieces(eqn.params["dimension"], tuple(operands))]
    is_cut = is_any_in_pieces(operands)
    if eqn.primitive is P.scan_p and (is_cut or keeps_apart):
        return _scan(eqn, operands, keeps_apart)
    if not is_cut:
        return evaluated(eqn, operands)
    evaluate_piecewise = PIECEWISE.get(eqn.primitive)
    results = None
    if evaluate_piecewise is not None:
        results = evaluate_piecewise(eqn, operands)
    if results is None:
        results = evaluated(eqn, _all_joined(operands))
    return results


def _are_alike(operands: Operands) -> bool:
    """Whether several operands are whole arrays of one shape."""
    shapes = {jnp.shape(joined(operand)) for operand in operands}
    return len(operands) > 1 and len(shapes) == 1 and not is_any_in_pieces(operands)


def _all_joined(operands: Operands) -> list[Any]:
    """Returns operands or results as whole arrays."""
    return [joined(operand) for operand in operands]


def _scan(eqn: JaxprEqn, operands: Operands, keeps_apart: bool) -> Operands:
    """Evaluates a loop: pieces enter its body as such; what it hands on is put together.

    Operands of which each iteration gets a slice come to the body in pieces, too, unless it is the
    axis of the iterations along which they lie.
    """
    consts, init, xs = scan_operands(eqn, operands)
    # Operands in pieces become tuples of their parts, which are sliced one by one; others, tuples
    # of one.
    sliced: list[tuple[Any, ...]] = []
    axes_of_slices: list[int | None] = []
    for operand in xs:
        if isinstance(operand, Pieces) and operand.axis > 0:
            sliced.append(operand.parts)
            # A slice lacks the first axis, that of the iterations.
            axes_of_slices.append(operand.axis - 1)
        else:
            sliced.append((joined(operand),))
            axes_of_slices.append(None)

    def step(carry: list[Any], slices: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
        slices_in_pieces: Operands = []
        for axis, parts in zip(axes_of_slices, slices, strict=True):
            slices_in_pieces.append(parts[0] if axis is None else Pieces(axis, parts))
        operands_of_body = [*consts, *carry, *slices_in_pieces]
        outputs = _evaluate(eqn.params["jaxpr"], operands_of_body, keeps_apart)
        # A loop hands on arrays: each iteration has to give what the next one takes.
        arrays = _all_joined(outputs)
        return arrays[: len(carry)], arrays[len(carry) :]

    carry, results = lax.scan(
        step,
        _all_joined(init),
        sliced,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *results]
