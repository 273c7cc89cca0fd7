"""The walk over a jaxpr: the registry of rules, what a rule sees, and the loop that applies them.

What each primitive does to the axes of its operands is said by one rule (see `rules`). The rule of
a call or a branch walks its sub-jaxpr and has the same type as any other.

The walk is sound, not complete: a wrong group silently destroys a model, a missing group only
merges less. Whatever a rule cannot express is pinned, and a primitive without a rule is an error
(or pins all that it touches, on demand).
"""

import contextlib
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from otfusion_jax import compat
from otfusion_jax.axes import (
    Axis,
    Disagreement,
    Factor,
    Kind,
    Space,
    concatenated,
    constant,
    factors_of,
    is_constant,
)

OnUnsupported = Literal["raise", "pin"]
MOST_RUNS = 8
"""A constant that varies more often along an axis, or at every other position, pins it, rather than
taking it apart."""

_ROUNDS = 16
"""So many more times than it carries axes the body of a loop is walked at most."""


class Value(NamedTuple):
    """What the walk knows of one value: its axes, and what it depends on."""

    axes: tuple[Axis, ...]
    kind: Kind


class Site(NamedTuple):
    """A place where features can be read: an operand or a result of an equation.

    `path` holds the equation's index in the jaxpr, preceded by those of the calls and scans around
    it. Of each scan the array has an axis in front, outermost first: that of the iterations.
    """

    path: tuple[int, ...]
    side: Literal["in", "out"]
    position: int


class Meeting(NamedTuple):
    """Elements along some axes of a value meet those of others in an operation.

    `over` has these axes, `together` those along which equal indices meet each other: along all
    other axes it may be any index.
    """

    axes: tuple[Axis, ...]
    over: frozenset[int]
    together: frozenset[int]


class UnsupportedPrimitiveError(NotImplementedError):
    """A primitive of the traced function has no rule."""


class Regrouping(NamedTuple):
    """Some axes of a value are read as others, which may part what lay in one axis before."""

    axes: tuple[Axis, ...]
    over: frozenset[int]


class Selection(NamedTuple):
    """Of an axis some positions were kept, the others left out."""

    whole: Axis
    kept: tuple[Axis, ...]
    singles: frozenset[int]  # atoms of single positions among those kept


Rule = Callable[["Context", list[Value]], list[Value]]
_registry: dict[core.Primitive, Rule] = {}
_selecting: set[core.Primitive] = set()
_finders: list[Callable[[core.Primitive], Rule | None]] = []


def register(*primitives: core.Primitive, reads: bool = True) -> Callable[[Rule], Rule]:
    """Decorator: declares the rule of one or more primitives.

    Args:
        *primitives: primitive objects (`jax.extend.core.primitives.add_p`).
        reads: whether the results depend on all of the operands. False where parts of them are
            selected: parts of a parameter that the program selects nowhere stay in place.

    Returns:
        The decorator. A rule takes the `Context` of the equation and the operands' `Value`s and
        returns those of the results; it ties, splits and pins axes through the context.
    """

    def add(rule: Rule) -> Rule:
        for primitive in primitives:
            _registry[primitive] = rule
            if not reads:
                _selecting.add(primitive)
        return rule

    return add


def find_with(finder: Callable[[core.Primitive], Rule | None]) -> None:
    """Declares rules that are looked for when a primitive is met that has none.

    Args:
        finder: from the primitive to its rule, or None. What it finds is not kept.
    """
    if finder not in _finders:
        _finders.append(finder)


def registered() -> dict[core.Primitive, Rule]:
    """Returns a copy of the registry: primitive to rule."""
    return dict(_registry)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a rule sees of its equation, and the operations on axes that it may use."""

    eqn: core.JaxprEqn
    path: tuple[int, ...] | None  # None where features can't be read: in a branch or a loop
    walk: "Walk"
    caller: "Context | None"  # of the call that this equation lies in
    used: tuple[bool, ...]  # which of the results anything depends on

    @property
    def space(self) -> Space:
        """The atoms of the trace."""
        return self.walk.space

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    def shape(self, position: int = 0) -> tuple[int, ...]:
        """Returns the shape of a result."""
        return _shape(self.eqn.outvars[position])

    def operand_shape(self, position: int) -> tuple[int, ...]:
        """Returns the shape of an operand."""
        return _shape(self.eqn.invars[position])

    def because(self, detail: str = "") -> str:
        """Returns a reason that names the primitive and the source line."""
        detail = f" {detail}" if detail else ""
        return f"{self.eqn.primitive}{detail} at {self.source}"

    @property
    def source(self) -> str:
        """The source line: the innermost frame outside of JAX itself."""
        here = compat.source(self.eqn)
        if here is None:
            # Inside its own jitted helpers JAX keeps no frame of the user's.
            return self.caller.source if self.caller else "unknown source"
        return here

    def join(self, values: Sequence[Value], skip: Sequence[int] = ()) -> Value:
        """Ties values elementwise; scalars and axes of size 1 meet anything.

        Axes in `skip` are left empty.
        """
        kind = max((v.kind for v in values), default=Kind.CONSTANT)
        axes: list[Axis] = []
        for dim in range(max((len(v.axes) for v in values), default=0)):
            met = [(v.axes[dim], v.kind) for v in values if v.axes and v.axes[dim]]
            if dim in skip or not met:
                axes.append(())
                continue
            tied = self.space.unify([a for a, _ in met], [k for _, k in met])
            # What has no such axis may still depend on inputs, and so make features of the rest.
            axes.append(self.space.enter(tied, max(k for _, k in met), kind))
        return Value(tuple(axes), kind)

    def enter(self, axis: Axis, value: Value, into: Kind) -> Axis:
        """Carries an axis of an operand into a result that depends on more than the operand."""
        return self.space.enter(axis, value.kind, into)

    def cut(self, axis: Axis, size: int, reason: str) -> Axis:
        """Pins an axis of which a result holds some positions only, or in another order."""
        if is_constant(axis):
            return constant(size)
        self.space.pin(axis, reason)
        return self.space.pinned(size, reason)

    def pieces(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Takes an axis apart into segments of the sizes given; pins it if its factors forbid."""
        marks = list(itertools.accumulate(sizes))[:-1]
        with contextlib.suppress(Disagreement):
            if 0 not in sizes:
                return self.space.cut(axis, marks)
        return [self.cut(axis, size, reason) for size in sizes]

    def select(self, axis: Axis, *ranges: tuple[int, int], kept: Iterable[Axis]) -> None:
        """Notes that ranges of an axis are selected: single positions are read thereby."""
        found = (self.space.singles(axis, start, end) for start, end in ranges)
        singles = frozenset(itertools.chain.from_iterable(found))
        self.walk.selections.append(Selection(axis, tuple(kept), singles))

    def repeat(
        self, body: Callable[[list[Value]], list[Value]], carry: list[Value]
    ) -> tuple[list[Value], list[Value]]:
        """Walks the body of a loop until what it carries is tied to what it hands on.

        Args:
            body: from what is carried in to the body's results, what is carried out first.
            carry: what the loop starts from.

        Returns:
            What is carried, and all results of the body's last walk.
        """
        walk = self.walk
        readings = walk.produced, walk.consumed, walk.seen
        # Each walk ties one more axis at least; a body that takes axes apart anew in each is given
        # up, and what it carries does not move.
        left = _ROUNDS + sum(len(value.axes) for value in carry)
        while True:
            counts = [len(found) for found in readings]
            results = body(carry)
            joined = [self.join([x, y]) for x, y in zip(carry, results, strict=False)]
            for value in joined:
                walk.note(value)
            before, carry = carry, joined
            if all(map(self._alike, before, carry)):
                return carry, results
            left -= 1
            if left < 0:
                for axis in itertools.chain.from_iterable(value.axes for value in carry):
                    self.space.pin(axis, self.because("carried through the loop in another form"))
            for found, count in zip(readings, counts, strict=True):
                del found[count:]

    def _alike(self, a: Value, b: Value) -> bool:
        """Whether two values have the same atoms, or none that move, and depend on the same."""
        space = self.space
        return a.kind is b.kind and all(
            space.signature(x) == space.signature(y) or (space.is_pinned(x) and space.is_pinned(y))
            for x, y in zip(a.axes, b.axes, strict=True)
        )

    def pin_all(self, values: Sequence[Value], reason: str) -> list[Value]:
        """Pins every axis of the operands; the results are fresh pinned values."""
        for value in values:
            for axis in value.axes:
                self.space.pin(axis, reason)
        kind = max((v.kind for v in values), default=Kind.CONSTANT)
        return [
            Value(tuple(self.space.pinned(n, reason) for n in _shape(v)), kind)
            for v in self.eqn.outvars
        ]

    def call(
        self,
        jaxpr: core.ClosedJaxpr,
        args: list[Value],
        *,
        once: bool = True,
        used: Sequence[bool] | None = None,
        iterations: Axis | None = None,
    ) -> list[Value]:
        """Walks a sub-jaxpr on operands.

        Args:
            jaxpr: what to walk.
            args: its operands.
            once: whether it runs just once, or once in each iteration of `iterations`, so that
                features can be read in it.
            used: which of its results anything depends on; all if None.
            iterations: the axis that its operands are slices of; None if they are none.
        """
        self.walk.calls += 1
        consts = [self.walk.constant(c) for c in jaxpr.consts]
        path = self.path if once else None
        outside = self.walk.loops
        if iterations is not None:
            self.walk.loops = (*outside, iterations)
        try:
            return self.walk.run(jaxpr.jaxpr, consts, args, path, self, used)
        finally:
            self.walk.loops = outside

    def contracted(self, value: Value, over: Sequence[int], batch: Sequence[int] = ()) -> None:
        """Notes that an operand is summed over axes, index by index along these and `batch`."""
        self.meet(value, over, [*over, *batch])
        self.mixed(value, over)

    def consumed(self, position: int, value: Value, dims: Sequence[int]) -> None:
        """Notes that a contraction takes up features along some axes of an operand."""
        if value.kind is Kind.FEATURE and self.path is not None:
            self.walk.consumed.append(self._reading("in", position, value, dims))

    def mixed(self, value: Value, dims: Collection[int]) -> None:
        """Notes that what is at one index of some axes of an operand ends up at any other."""
        rest = [dim for dim in range(len(value.axes)) if dim not in dims]
        self.meet(value, rest, rest)

    def meet(self, value: Value, over: Iterable[int], together: Iterable[int]) -> None:
        """Notes a `Meeting`: axes are numbered as in the value, loops around it are together."""
        loops = len(self.walk.loops)
        dims = (frozenset(dim + loops for dim in found) for found in (over, together))
        first, second = dims
        axes = (*self.walk.loops, *value.axes)
        self.walk.meetings.append(Meeting(axes, first, second | set(range(loops))))

    def regroup(self, value: Value, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Reads the same elements, in row-major order, as axes of other sizes; see `Space`."""
        # An axis of one size at one place, counted in elements, is the same axis before and after.
        same = set(zip(itertools.accumulate(sizes, operator.mul), sizes, strict=True))
        before = _sizes(value)
        ends = itertools.accumulate(before, operator.mul)
        loops = len(self.walk.loops)
        changed = frozenset(
            dim + loops
            for dim, (end, size) in enumerate(zip(ends, before, strict=True))
            if size > 1 and (end, size) not in same
        )
        self.walk.regroupings.append(Regrouping((*self.walk.loops, *value.axes), changed))
        return self.space.regroup(value.axes, sizes, reason)

    def produced(self, value: Value, dims: Sequence[int]) -> None:
        """Notes that a contraction with a parameter puts out features along some axes."""
        if value.kind is Kind.FEATURE and self.path is not None:
            self.walk.produced.append(self._reading("out", 0, value, dims))

    def _reading(
        self, side: Literal["in", "out"], position: int, value: Value, dims: Sequence[int]
    ) -> "Reading":
        assert self.path is not None
        loops = self.walk.loops
        along = frozenset(dim + len(loops) for dim in dims)
        return Site(self.path, side, position), (*loops, *value.axes), along


Reading = tuple[Site, tuple[Axis, ...], frozenset[int]]
"""A site, the axes of the array there, and which of them are meant."""


class Walk:
    """One pass over a jaxpr and its sub-jaxprs."""

    def __init__(self, on_unsupported: OnUnsupported) -> None:
        self.space = Space()
        self.on_unsupported = on_unsupported
        self.loops: tuple[Axis, ...] = ()  # of the scans around, outermost first
        self.values: dict[tuple[Axis, ...], None] = {}  # the axes of every value
        self.meetings: list[Meeting] = []
        self.regroupings: list[Regrouping] = []
        self.read: dict[Axis, None] = {}  # what an operation took up, in whole
        self.selections: list[Selection] = []
        self.features: dict[Axis, None] = {}  # the axes of all that depends on inputs
        self.calls = 0  # how many sub-jaxprs have been walked
        self.produced: list[Reading] = []
        self.consumed: list[Reading] = []
        self.seen: list[Reading] = []  # every feature, in dataflow order

    def constant(self, array: Any) -> Value:
        """Describes an array that the function closes over."""
        aval = jax.typeof(array)
        key = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
        opaque = key or isinstance(array, Tracer)
        axes = []
        for dim, size in enumerate(aval.shape):
            reason = f"a constant of shape {aval.shape} that varies along axis {dim}"
            runs = () if opaque or size < 2 else _runs(np.asarray(array), dim)
            # What a mask leaves out on these inputs it may let pass on others.
            masks = len(runs) > 1 and _is_mask(np.asarray(array), dim)
            if opaque or masks or len(runs) > max(1, min(MOST_RUNS, size // 2)):
                axes.append(self.space.pinned(size, reason))
            else:
                axes.append(concatenated(constant(n) for n in runs) if size > 1 else constant(size))
        return Value(tuple(axes), Kind.CONSTANT)

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: list[Value],
        args: list[Value],
        path: tuple[int, ...] | None = (),
        caller: Context | None = None,
        used: Sequence[bool] | None = None,
    ) -> list[Value]:
        """Applies the rule of each equation in turn and returns the values of the outputs."""
        env: dict[core.Var, Value] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

        for value in (*consts, *args):
            self.note(value)
        for index, eqn, flags in live(jaxpr, used):
            here = None if path is None else (*path, index)
            context = Context(eqn, here, self, caller, flags)
            operands = [read(v) for v in eqn.invars]
            self.space.here = context
            calls = self.calls
            results = self._rule(context)(context, operands)
            assert len(results) == len(eqn.outvars), eqn.primitive
            # What a call reads, the equations within have read.
            reads = eqn.primitive not in _selecting and self.calls == calls
            self._lost(context, operands, results, reads)
            for position, (var, value) in enumerate(zip(eqn.outvars, results, strict=True)):
                assert _sizes(value) == _shape(var), (context.source, operands)
                env[var] = value
                axes = self.note(value)
                if value.kind is Kind.FEATURE and here is not None:
                    self.seen.append(
                        (Site(here, "out", position), axes, frozenset(range(len(axes))))
                    )
        return [
            read(v) if isinstance(v, core.Literal) or v in env else self._dead(v)
            for v in jaxpr.outvars
        ]

    def _lost(
        self, context: Context, operands: list[Value], results: list[Value], reads: bool
    ) -> None:
        """Notes what no result keeps: a new axis in its place may be tied to it again later on."""
        kept = {
            factor.atom
            for value in results
            for axis in value.axes
            for factor in factors_of(self.space.expand(axis))
        }
        for value in operands:
            gone = {
                dim
                for dim, axis in enumerate(value.axes)
                if any(self._left_out(f, kept) for f in factors_of(self.space.expand(axis)))
            }
            if reads:
                self.read.update((value.axes[dim], None) for dim in gone)
            if 0 < len(gone) < len(value.axes):
                context.mixed(value, gone)

    @staticmethod
    def _left_out(factor: Factor, kept: Collection[int | None]) -> bool:
        """Whether a factor along which a value varies is not among those kept."""
        return factor.atom is not None and factor.atom not in kept

    def note(self, value: Value) -> tuple[Axis, ...]:
        """Keeps the axes of a value, those of the loops around it first, and returns them."""
        axes = (*self.loops, *value.axes)
        self.values[axes] = None
        if value.kind is Kind.FEATURE:
            self.features.update(dict.fromkeys(value.axes))
        return axes

    def atoms(self, axes: Iterable[Axis]) -> set[int]:
        """Returns the finest atoms of axes, those of single positions included."""
        return set().union(*map(self.space.atoms, axes))

    def picked(self) -> set[int]:
        """Returns the atoms of single positions that were selected."""
        return set().union(*(selection.singles for selection in self.selections))

    def left_out(self) -> set[int]:
        """Returns free atoms that were left out where others of their axis were selected.

        Some operation may have taken up the whole axis before, such as a normalisation. They count
        as left out unless they are summed over together with something else, or taken up without
        those that were selected.
        """
        space = self.space
        elsewhere = self.picked() | self.atoms(space.strong)
        readings = [space.atoms(axis) for axis in self.read]
        found: set[int] = set()
        for selection in self.selections:
            kept = self.atoms(selection.kept) | selection.singles
            rest = {atom for atom in space.atoms(selection.whole) if space.is_free(atom)}
            for atom in rest - kept - elsewhere - found:
                if not any(atom in reading and not reading & kept for reading in readings):
                    found.add(atom)
        return found

    def _dead(self, var: core.Var) -> Value:
        """Stands for an output that nothing depends on, so that it ties and pins nothing.

        What it meets, such as the same output of another branch, may well be used elsewhere.
        """
        return Value(tuple(map(constant, _shape(var))), Kind.CONSTANT)

    def _rule(self, context: Context) -> Rule:
        primitive = context.eqn.primitive
        if primitive in _registry:
            return _registry[primitive]
        for find in _finders:
            if (rule := find(primitive)) is not None:
                return rule
        if self.on_unsupported == "pin":
            return lambda context, values: context.pin_all(
                values, context.because("(no rule, pinned on demand)")
            )
        if primitive in compat.REFERENCES:
            raise UnsupportedPrimitiveError(
                f"the primitive {str(primitive)!r} at {context.source} makes, reads or writes a "
                "mutable reference (jax.new_ref, ref[...], ref[...] = x). What such a value "
                "depends on changes while the function runs, and no rule follows it. Ways out: "
                "keep the state in values that are returned (x.at[...].set, the carry of "
                "lax.scan); or trace_symmetry(..., on_unsupported='pin') leaves in place every "
                "axis that meets a reference."
            )
        raise UnsupportedPrimitiveError(
            f"no rule for the primitive {str(primitive)!r}, used at {context.source}. Ways out: "
            "trace_symmetry(..., on_unsupported='pin') leaves every axis that it touches in place; "
            "otfusion_jax.register(primitive) declares a rule of your own; or write that line with "
            "other primitives."
        )


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(map(int, atom.aval.shape))  # NumPy's integers get in by way of a split


def _runs(array: np.ndarray, dim: int) -> tuple[int, ...]:
    """Returns the lengths of the stretches along which an array does not vary, bit by bit.

    Values would not do: 0.0 and -0.0 are equal, and a division tells them apart.
    """
    rows = np.ascontiguousarray(np.moveaxis(array, dim, 0)).reshape(array.shape[dim], -1)
    rows = rows.view(np.uint8)
    changes = np.flatnonzero(np.any(rows[1:] != rows[:-1], axis=1)) + 1
    edges = [0, *changes.tolist(), len(rows)]
    return tuple(end - start for start, end in zip(edges, edges[1:], strict=False))


def _is_mask(array: np.ndarray, dim: int) -> bool:
    """Whether an array is all 0, or False, at some positions of an axis and not at others."""
    passes = np.any(array != 0, axis=tuple(d for d in range(array.ndim) if d != dim))
    return bool(passes.any() and not passes.all())


def _sizes(value: Value) -> tuple[int, ...]:
    return tuple(math.prod(f.size for f in axis) for axis in value.axes)


def live(
    jaxpr: core.Jaxpr, used: Sequence[bool] | None = None
) -> Iterator[tuple[int, core.JaxprEqn, tuple[bool, ...]]]:
    """Yields the equations that matter: what is never used constrains nothing.

    Args:
        jaxpr: the jaxpr.
        used: which of its outputs are used; all if None.

    Yields:
        Index, equation, and which of its results are used, in order.
    """
    wanted = [True] * len(jaxpr.outvars) if used is None else used
    pairs = zip(jaxpr.outvars, wanted, strict=True)
    needed = {v for v, keep in pairs if keep and not isinstance(v, core.Literal)}
    found = []
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        flags = tuple(v in needed for v in eqn.outvars)
        if eqn.effects or any(flags):
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
            found.append((index, eqn, flags))
    return reversed(found)
