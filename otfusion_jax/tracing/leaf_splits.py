"""Leaves that a program picks apart by index, each part as a parameter of its own.

Queries, keys and values in one array, of which the program takes `[0]`, `[1]` and `[2]`; layers in
a stack that is indexed in a Python loop. One array has one symmetry along each of its other axes,
three arrays have three. So the program is rewritten: the parts become its arguments, and whatever
it does to the whole leaf before it takes a part is done to the parts, one by one. What can't be
done part by part, such as a sum over them, is done to the parts put together again.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives as P

from otfusion_jax.symmetry.groups import Leaf, LeafSplit
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.axis import Axis, Sum, size_of
from otfusion_jax.tracing.jaxprs import at_source, body, scan_operands, source
from otfusion_jax.tracing.primitives import SPLIT, UNSTACK
from otfusion_jax.tracing.rules import ELEMENTWISE, REDUCTION
from otfusion_jax.tracing.unification import Unifier


def find_leaf_splits(
    unifier: Unifier, leaves: Sequence[Leaf], axes: Sequence[Sequence[Axis]]
) -> tuple[LeafSplit, ...]:
    """Finds the leaves that a program has picked apart by index.

    Args:
        unifier: of the finished interpretation.
        leaves: the parameters.
        axes: the axes of each, as the walk began with them.

    Returns:
        One cut at most for each leaf, along its first such axis.
    """
    found = []
    for number, (leaf, mine) in enumerate(zip(leaves, axes, strict=True)):
        for dim, axis in enumerate(map(unifier.expand, mine)):
            if leaf.moves and len(leaf.shape) > 1 and _is_picked_apart(axis):
                found.append(LeafSplit(number, dim, axis[0].size))
                break
    return tuple(found)


def _is_picked_apart(axis: Axis) -> bool:
    """Whether the outermost factor of an expanded axis is a sum of single positions."""
    return (
        bool(axis)
        and isinstance(axis[0], Sum)
        and all(size_of(segment) == 1 for segment in axis[0].segments)
    )


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """An array in pieces of one size along one of its axes."""

    dim: int
    parts: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Of a piece along the axis."""
        return self.parts[0].shape[self.dim]


def rewritten(jaxpr: core.ClosedJaxpr, symmetry: Symmetry) -> core.ClosedJaxpr:
    """Makes arguments of the parts of leaves.

    Args:
        jaxpr: of a function whose first arguments are the leaves of the parameters.
        symmetry: which leaves fall into which parts; its groups do not matter.

    Returns:
        The same function of the parts of all leaves, and of the other arguments as they were.
    """
    of_leaves = len(symmetry.leaves)
    others = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.jaxpr.invars]
    parts = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in symmetry.parts]

    def run(parts: list[Any], others: list[Any]) -> list[Any]:
        whole: list[Any] = []
        taken = iter(parts)
        leaf_splits = {cut.leaf: cut for cut in symmetry.leaf_splits}
        for number in range(of_leaves):
            if number in leaf_splits:
                cut = leaf_splits[number]
                whole.append(_Pieces(cut.axis, tuple(next(taken) for _ in range(cut.count))))
            else:
                whole.append(next(taken))
        return [_merged(x) for x in _evaluated(jaxpr, [*whole, *others])]

    return jax.make_jaxpr(run)(parts, others[of_leaves:])


def _evaluated(jaxpr: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr on arrays, some of which are in pieces."""
    env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        inner = body(eqn)
        # An equation keeps its place in the user's source. One inside of a function of JAX's own
        # has none, and takes that of the call.
        with contextlib.nullcontext() if source(eqn) is None else at_source(eqn):
            if inner is not None:
                results = _evaluated(inner, operands)
            elif any(isinstance(x, _Pieces) for x in operands):
                results = _in_pieces(eqn, operands)
            else:
                results = _bound(eqn, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _bound(eqn: core.JaxprEqn, operands: Sequence[Any], **changed: Any) -> list[Any]:
    found = eqn.primitive.bind(*operands, **(eqn.params | changed))
    return list(found) if eqn.primitive.multiple_results else [found]


def _merged(x: Any) -> Any:
    return lax.concatenate(x.parts, x.dim) if isinstance(x, _Pieces) else x


def _in_pieces(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    """Evaluates an equation piece by piece where that is possible, else on what is put together."""
    evaluate = _PIECEWISE.get(eqn.primitive)
    found = None if evaluate is None else evaluate(eqn, operands)
    return _bound(eqn, [_merged(x) for x in operands]) if found is None else found


# --- one small function for each kind of primitive: its results, or None if pieces won't do

Piecewise = Callable[[core.JaxprEqn, list[Any]], list[Any] | None]


def _piece_of(x: Any, number: int, pieces: _Pieces, dim: int) -> Any:
    """Takes from an operand what belongs to a piece of another along its axis `dim`."""
    if isinstance(x, _Pieces) and (x.dim, x.size) == (dim, pieces.size):
        return x.parts[number]
    array = _merged(x)
    return lax.slice_in_dim(array, number * pieces.size, (number + 1) * pieces.size, axis=dim)


def _each(
    eqn: core.JaxprEqn,
    pieces: _Pieces,
    dim: int,
    operands: Callable[[int], Sequence[Any]],
    **changed: Any,
) -> list[Any]:
    """Evaluates an equation on the operands of each piece, which come to lie along `dim`."""
    columns = [_bound(eqn, operands(i), **changed) for i in range(len(pieces.parts))]
    return [_Pieces(dim, parts) for parts in zip(*columns, strict=True)]


def _first(operands: Sequence[Any]) -> _Pieces:
    return next(x for x in operands if isinstance(x, _Pieces))


def _elementwise(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    pieces = _first(operands)

    # What is not in the same pieces is given whole: in parts where it has any, and as it is where
    # it is a scalar or has size 1 there.
    whole = [x if isinstance(x, _Pieces) and x.dim == pieces.dim else _merged(x) for x in operands]

    def of(number: int) -> list[Any]:
        found = []
        for x in whole:
            shape = jax.numpy.shape(_shaped(x))
            meets_all = not isinstance(x, _Pieces) and (not shape or shape[pieces.dim] == 1)
            found.append(x if meets_all else _piece_of(x, number, pieces, pieces.dim))
        return found

    return _each(eqn, pieces, pieces.dim, of)


def _shaped(x: Any) -> Any:
    return x.parts[0] if isinstance(x, _Pieces) else x


def _moved(eqn: core.JaxprEqn, operands: list[Any], dim: int, **changed: Any) -> list[Any]:
    """An operation on one operand that leaves the axis of the pieces whole."""
    pieces = _first(operands)
    return _each(eqn, pieces, dim, lambda i: [pieces.parts[i], *operands[1:]], **changed)


def _transpose(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    return _moved(eqn, operands, eqn.params["permutation"].index(operands[0].dim))


def _broadcast_in_dim(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    (pieces,) = operands
    dim = int(eqn.params["broadcast_dimensions"][pieces.dim])
    shape = _with(eqn.params["shape"], dim, pieces.size)
    return _moved(eqn, operands, dim, shape=shape)


def _with(sizes: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _squeeze(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    (pieces,) = operands
    return _moved(eqn, operands, _without(eqn.params["dimensions"], pieces.dim))


def _without(gone: Sequence[Any], dim: int) -> int:
    """Returns where an axis comes to lie without others. Of vmap these are NumPy's integers."""
    return dim - sum(int(d) < dim for d in gone)


def _reduce(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    (pieces,) = operands
    gone = eqn.params["axes"]
    return None if pieces.dim in gone else _moved(eqn, operands, _without(gone, pieces.dim))


def _reshape(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """The pieces lie one after the other still, along an axis that ends where theirs did."""
    (pieces,) = operands
    if eqn.params["dimensions"] is not None:
        return None
    old, new = pieces.parts[0].shape, eqn.params["new_sizes"]
    before, count = math.prod(old[: pieces.dim]), len(pieces.parts)
    for dim, size in enumerate(new):
        if math.prod(new[:dim]) == before and size % count == 0:
            return _moved(eqn, operands, dim, new_sizes=_with(new, dim, size // count))
    return None


def _slice(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    (pieces,) = operands
    dim, size = pieces.dim, pieces.size
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"]
    if (strides and strides[dim] != 1) or starts[dim] % size or ends[dim] % size:
        return None
    kept = _Pieces(dim, pieces.parts[starts[dim] // size : ends[dim] // size])
    if not kept.parts:
        return None
    starts, ends = _with(starts, dim, 0), _with(ends, dim, size)
    strided = any(stride != 1 for stride in strides or ())
    if not (strided or any(starts)) and tuple(ends) == kept.parts[0].shape:
        return [_alone(kept)]
    found = _moved(eqn, [kept], dim, start_indices=starts, limit_indices=ends)
    return [_alone(x) for x in found]


def _alone(pieces: _Pieces) -> Any:
    return pieces.parts[0] if len(pieces.parts) == 1 else pieces


def _split(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    (pieces,) = operands
    sizes, dim = eqn.params["sizes"], pieces.dim
    if eqn.params["axis"] != dim:
        return _moved(eqn, operands, dim)
    if any(size == 0 or size % pieces.size for size in sizes):
        return None
    parts, found = iter(pieces.parts), []
    for size in sizes:
        taken = tuple(next(parts) for _ in range(size // pieces.size))
        found.append(_alone(_Pieces(dim, taken)))
    return found


def _unstack(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    (pieces,) = operands
    axis = eqn.params["axis"]
    if axis != pieces.dim:
        return _moved(eqn, operands, pieces.dim - (axis < pieces.dim))
    if pieces.size != 1:
        return None
    return [lax.squeeze(part, (axis,)) for part in pieces.parts]


def _dot_general(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Pieces along an axis that remains do so; those along a contracted one are put together."""
    (x_sum, y_sum), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    side = int(not isinstance(operands[0], _Pieces))
    pieces, other = operands[side], operands[1 - side]
    sums, batch = ((x_sum, x_batch), (y_sum, y_batch))[side]
    others_batch = (y_batch, x_batch)[side]
    if pieces.dim in sums:
        return None
    ranks = [jax.numpy.ndim(_shaped(x)) for x in operands]
    if pieces.dim in batch:
        place = batch.index(pieces.dim)

        def of(number: int) -> list[Any]:
            return [pieces.parts[number], _piece_of(other, number, pieces, others_batch[place])]
    else:
        free = [d for d in range(ranks[side]) if d not in (*sums, *batch)]
        before = ranks[0] - len(x_sum) if side else len(batch)
        place = before + free.index(pieces.dim)
        whole = _merged(other)

        def of(number: int) -> list[Any]:
            return [pieces.parts[number], whole]

    return _each(eqn, pieces, place, lambda i: of(i)[:: -1 if side else 1])


def _concatenate(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    pieces = _first(operands)
    if eqn.params["dimension"] == pieces.dim:
        return None
    return _elementwise(eqn, operands)


def _scan(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Pieces enter the body as such; what it hands on is put together."""
    consts, init, stacked = scan_operands(eqn, operands)
    stacked = [_merged(x) if isinstance(x, _Pieces) and x.dim == 0 else x for x in stacked]
    dims = [x.dim - 1 if isinstance(x, _Pieces) else None for x in stacked]
    arrays = [x.parts if isinstance(x, _Pieces) else (x,) for x in stacked]

    def step(carry: list[Any], slices: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
        given = [
            x[0] if dim is None else _Pieces(dim, x) for dim, x in zip(dims, slices, strict=True)
        ]
        results = [_merged(x) for x in _evaluated(eqn.params["jaxpr"], [*consts, *carry, *given])]
        return results[: len(carry)], results[len(carry) :]

    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, results = lax.scan(step, [_merged(x) for x in init], arrays, **how)
    return [*carry, *results]


_PIECEWISE: dict[core.Primitive, Piecewise] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTION, _reduce),
    **dict.fromkeys(SPLIT, _split),
    **dict.fromkeys(UNSTACK, _unstack),
    P.broadcast_in_dim_p: _broadcast_in_dim,
    P.concatenate_p: _concatenate,
    P.dot_general_p: _dot_general,
    P.reshape_p: _reshape,
    P.scan_p: _scan,
    P.slice_p: _slice,
    P.squeeze_p: _squeeze,
    P.transpose_p: _transpose,
}
