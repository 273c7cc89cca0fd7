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
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jax.extend import core

from otfusion_jax.tracing import jaxprs
from otfusion_jax.tracing.axis import Axis, Disagreement, Kind, constant, is_constant
from otfusion_jax.tracing.unification import Unifier

if TYPE_CHECKING:
    from otfusion_jax.tracing.interpreter import Interpreter

_ROUNDS = 16
"""So many more times than it carries axes the body of a loop is walked at most."""


class TracedValue(NamedTuple):
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


class Interaction(NamedTuple):
    """Elements along some axes of a value meet those of others in an operation.

    `over` has these axes, `together` those along which equal indices meet each other: along all
    other axes it may be any index.
    """

    axes: tuple[Axis, ...]
    over: frozenset[int]
    together: frozenset[int]


class Regrouping(NamedTuple):
    """Some axes of a value are read as others, which may part what lay in one axis before."""

    axes: tuple[Axis, ...]
    over: frozenset[int]


class Selection(NamedTuple):
    """Of an axis some positions were kept, the others left out."""

    whole: Axis
    kept: tuple[Axis, ...]
    singles: frozenset[int]  # atoms of single positions among those kept


@dataclasses.dataclass(frozen=True)
class RuleContext:
    """What a rule sees of its equation, and the operations on axes that it may use."""

    eqn: core.JaxprEqn
    path: tuple[int, ...] | None  # None where features can't be read: in a branch or a loop
    interpreter: "Interpreter"
    caller: "RuleContext | None"  # of the call that this equation lies in
    used: tuple[bool, ...]  # which of the results anything depends on

    @property
    def unifier(self) -> Unifier:
        """The atoms of the trace."""
        return self.interpreter.unifier

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    def shape(self, position: int = 0) -> tuple[int, ...]:
        """Returns the shape of a result."""
        return shape_of(self.eqn.outvars[position])

    def operand_shape(self, position: int) -> tuple[int, ...]:
        """Returns the shape of an operand."""
        return shape_of(self.eqn.invars[position])

    def because(self, detail: str = "") -> str:
        """Returns a reason that names the primitive and the source line."""
        detail = f" {detail}" if detail else ""
        return f"{self.eqn.primitive}{detail} at {self.source}"

    @property
    def source(self) -> str:
        """The source line: the innermost frame outside of JAX itself."""
        here = jaxprs.source(self.eqn)
        if here is None:
            # Inside its own jitted helpers JAX keeps no frame of the user's.
            return self.caller.source if self.caller else "unknown source"
        return here

    def join(self, values: Sequence[TracedValue], skip: Sequence[int] = ()) -> TracedValue:
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
            tied = self.unifier.unify([a for a, _ in met], [k for _, k in met])
            # What has no such axis may still depend on inputs, and so make features of the rest.
            axes.append(self.unifier.enter(tied, max(k for _, k in met), kind))
        return TracedValue(tuple(axes), kind)

    def enter(self, axis: Axis, value: TracedValue, into: Kind) -> Axis:
        """Carries an axis of an operand into a result that depends on more than the operand."""
        return self.unifier.enter(axis, value.kind, into)

    def cut(self, axis: Axis, size: int, reason: str) -> Axis:
        """Pins an axis of which a result holds some positions only, or in another order."""
        if is_constant(axis):
            return constant(size)
        self.unifier.pin(axis, reason)
        return self.unifier.pinned(size, reason)

    def pieces(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Takes an axis apart into segments of the sizes given; pins it if its factors forbid."""
        marks = list(itertools.accumulate(sizes))[:-1]
        with contextlib.suppress(Disagreement):
            if 0 not in sizes:
                return self.unifier.cut(axis, marks)
        return [self.cut(axis, size, reason) for size in sizes]

    def select(self, axis: Axis, *ranges: tuple[int, int], kept: Iterable[Axis]) -> None:
        """Notes that ranges of an axis are selected: single positions are read thereby."""
        found = (self.unifier.singles(axis, start, end) for start, end in ranges)
        singles = frozenset(itertools.chain.from_iterable(found))
        self.interpreter.selections.append(Selection(axis, tuple(kept), singles))

    def repeat(
        self, body: Callable[[list[TracedValue]], list[TracedValue]], carry: list[TracedValue]
    ) -> tuple[list[TracedValue], list[TracedValue]]:
        """Walks the body of a loop until what it carries is tied to what it hands on.

        Args:
            body: from what is carried in to the body's results, what is carried out first.
            carry: what the loop starts from.

        Returns:
            What is carried, and all results of the body's last walk.
        """
        interpreter = self.interpreter
        readings = interpreter.produced, interpreter.consumed, interpreter.seen
        # Each walk ties one more axis at least; a body that takes axes apart anew in each is given
        # up, and what it carries does not move.
        left = _ROUNDS + sum(len(value.axes) for value in carry)
        while True:
            counts = [len(found) for found in readings]
            results = body(carry)
            joined = [self.join([x, y]) for x, y in zip(carry, results, strict=False)]
            for value in joined:
                interpreter.note(value)
            before, carry = carry, joined
            if all(map(self._alike, before, carry)):
                return carry, results
            left -= 1
            if left < 0:
                for axis in itertools.chain.from_iterable(value.axes for value in carry):
                    self.unifier.pin(axis, self.because("carried through the loop in another form"))
            for found, count in zip(readings, counts, strict=True):
                del found[count:]

    def _alike(self, a: TracedValue, b: TracedValue) -> bool:
        """Whether two values have the same atoms, or none that move, and depend on the same."""
        unifier = self.unifier
        return a.kind is b.kind and all(
            unifier.signature(x) == unifier.signature(y)
            or (unifier.is_pinned(x) and unifier.is_pinned(y))
            for x, y in zip(a.axes, b.axes, strict=True)
        )

    def pin_all(self, values: Sequence[TracedValue], reason: str) -> list[TracedValue]:
        """Pins every axis of the operands; the results are fresh pinned values."""
        for value in values:
            for axis in value.axes:
                self.unifier.pin(axis, reason)
        kind = max((v.kind for v in values), default=Kind.CONSTANT)
        return [
            TracedValue(tuple(self.unifier.pinned(n, reason) for n in shape_of(v)), kind)
            for v in self.eqn.outvars
        ]

    def call(
        self,
        jaxpr: core.ClosedJaxpr,
        args: list[TracedValue],
        *,
        once: bool = True,
        used: Sequence[bool] | None = None,
        iterations: Axis | None = None,
    ) -> list[TracedValue]:
        """Walks a sub-jaxpr on operands.

        Args:
            jaxpr: what to walk.
            args: its operands.
            once: whether it runs just once, or once in each iteration of `iterations`, so that
                features can be read in it.
            used: which of its results anything depends on; all if None.
            iterations: the axis that its operands are slices of; None if they are none.
        """
        self.interpreter.calls += 1
        consts = [self.interpreter.constant(c) for c in jaxpr.consts]
        path = self.path if once else None
        outside = self.interpreter.loops
        if iterations is not None:
            self.interpreter.loops = (*outside, iterations)
        try:
            return self.interpreter.run(jaxpr.jaxpr, consts, args, path, self, used)
        finally:
            self.interpreter.loops = outside

    def contracted(
        self, value: TracedValue, over: Sequence[int], batch: Sequence[int] = ()
    ) -> None:
        """Notes that an operand is summed over axes, index by index along these and `batch`."""
        self.meet(value, over, [*over, *batch])
        self.mixed(value, over)

    def consumed(self, position: int, value: TracedValue, dims: Sequence[int]) -> None:
        """Notes that a contraction takes up features along some axes of an operand."""
        if value.kind is Kind.FEATURE and self.path is not None:
            self.interpreter.consumed.append(self._reading("in", position, value, dims))

    def mixed(self, value: TracedValue, dims: Collection[int]) -> None:
        """Notes that what is at one index of some axes of an operand ends up at any other."""
        rest = [dim for dim in range(len(value.axes)) if dim not in dims]
        self.meet(value, rest, rest)

    def meet(self, value: TracedValue, over: Iterable[int], together: Iterable[int]) -> None:
        """Notes a `Meeting`: axes are numbered as in the value, loops around it are together."""
        loops = len(self.interpreter.loops)
        dims = (frozenset(dim + loops for dim in found) for found in (over, together))
        first, second = dims
        axes = (*self.interpreter.loops, *value.axes)
        self.interpreter.interactions.append(Interaction(axes, first, second | set(range(loops))))

    def regroup(self, value: TracedValue, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Reads the same elements, in row-major order, as axes of other sizes; see `Space`."""
        # An axis of one size at one place, counted in elements, is the same axis before and after.
        same = set(zip(itertools.accumulate(sizes, operator.mul), sizes, strict=True))
        before = sizes_of(value)
        ends = itertools.accumulate(before, operator.mul)
        loops = len(self.interpreter.loops)
        changed = frozenset(
            dim + loops
            for dim, (end, size) in enumerate(zip(ends, before, strict=True))
            if size > 1 and (end, size) not in same
        )
        self.interpreter.regroupings.append(
            Regrouping((*self.interpreter.loops, *value.axes), changed)
        )
        return self.unifier.regroup(value.axes, sizes, reason)

    def produced(self, value: TracedValue, dims: Sequence[int]) -> None:
        """Notes that a contraction with a parameter puts out features along some axes."""
        if value.kind is Kind.FEATURE and self.path is not None:
            self.interpreter.produced.append(self._reading("out", 0, value, dims))

    def _reading(
        self, side: Literal["in", "out"], position: int, value: TracedValue, dims: Sequence[int]
    ) -> "Reading":
        assert self.path is not None
        loops = self.interpreter.loops
        along = frozenset(dim + len(loops) for dim in dims)
        return Site(self.path, side, position), (*loops, *value.axes), along


Reading = tuple[Site, tuple[Axis, ...], frozenset[int]]
"""A site, the axes of the array there, and which of them are meant."""


def shape_of(var: Any) -> tuple[int, ...]:
    """Returns the shape of a variable or a literal of a jaxpr."""
    return tuple(map(int, var.aval.shape))  # NumPy's integers get in by way of a split


def sizes_of(value: TracedValue) -> tuple[int, ...]:
    """Returns the sizes of the axes of a value."""
    return tuple(math.prod(f.size for f in axis) for axis in value.axes)
