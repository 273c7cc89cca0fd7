"""Where a rule stands: its equation, and the records of the pass that the equation belongs to.

This is the part of a `RuleContext` that does not change what is known of axes: it reads the
equation, and records what is asked when the pass over the jaxpr is over (see `records`).
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jax.extend import core

from otfusion_jax.tracing import jaxprs
from otfusion_jax.tracing.axis import Axis, Kind
from otfusion_jax.tracing.records import Interaction, Path, Reading, Selection, Site
from otfusion_jax.tracing.unification import Unifier
from otfusion_jax.tracing.values import Axes, Shape, TracedValue, shape_of

if TYPE_CHECKING:
    from otfusion_jax.tracing.interpreter import Interpreter


@dataclasses.dataclass(frozen=True)
class EquationContext:
    """What a rule sees of its equation, and what it records of it.

    Attributes:
        eqn: The equation, a `jax.extend.core.JaxprEqn`.
        path: Which equation it is; None inside of a branch or a loop, where no features can be
            read. Rules have no need of it.
        interpreter: The pass over the jaxpr that the equation belongs to. Rules have no need of it.
        caller: The context of the call that the equation lies in; None in the outermost jaxpr.
            Rules have no need of it.
        used: One flag for each result, False where nothing depends on it.
    """

    eqn: core.JaxprEqn
    path: Path | None
    interpreter: "Interpreter"
    caller: "EquationContext | None"
    used: tuple[bool, ...]

    # --- the equation

    @property
    def unifier(self) -> Unifier:
        """What is known of all axes of the trace. Rules make their statements by methods."""
        return self.interpreter.unifier

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the equation, such as `params["axis"]` of `cumsum`."""
        return self.eqn.params

    def shape(self, position: int = 0) -> Shape:
        """Returns the shape of the result with this number."""
        return shape_of(self.eqn.outvars[position])

    def shapes(self) -> list[Shape]:
        """Returns the shapes of all results."""
        return list(map(shape_of, self.eqn.outvars))

    def operand_shape(self, position: int) -> Shape:
        """Returns the shape of the operand with this number."""
        return shape_of(self.eqn.invars[position])

    def because(self, detail: str = "") -> str:
        """Writes a reason for a pin, which names the primitive and the user's source line.

        Args:
            detail: What goes between the two, such as "along axis 1".

        Returns:
            The reason, such as "cumsum along axis 1 at model.py:12 (apply)".
        """
        primitive = str(self.eqn.primitive)
        what = f"{primitive} {detail}" if detail else primitive
        return f"{what} at {self.source}"

    def because_along(self, dim: int) -> str:
        """Writes the reason that most pins have: what happens along one axis; see `because`."""
        return self.because(f"along axis {dim}")

    @property
    def source(self) -> str:
        """The user's source line that the equation comes from: file, line and function."""
        source = jaxprs.source(self.eqn)
        if source is not None:
            return source
        # Inside its own jitted helpers JAX keeps no frame of the user's.
        return self.caller.source if self.caller else "unknown source"

    # --- records, for what is asked when the pass is over

    def note_contraction(
        self, value: TracedValue, over: Sequence[int], batch: Sequence[int] = ()
    ) -> None:
        """Records that an operand is summed over axes. `contract` does it by itself.

        Units along an axis that is summed over meet those of the other operand. They may move in
        another way for each index of a batch axis, as the dimensions of heads that are compared
        head by head, but not for each index of any other axis. Units along the other axes have to
        move alike for all indices of the axes that are summed over.

        Args:
            value: The operand.
            over: The numbers of the axes that are summed over, index by index with another
                operand's.
            batch: The numbers of the axes that meet index by index and are kept.
        """
        self.note_interaction(value, over, [*over, *batch])
        self.note_mixing(value, over)

    def note_mixing(self, value: TracedValue, dims: Collection[int]) -> None:
        """Records that what is at one index of some axes ends up at, or acts on, any other index.

        Then units along the other axes have to move alike for all indices of these: dimensions of
        heads can't move head by head through an operation that mixes heads. For axes of an operand
        that no result has, it is recorded without the rule's doing, so that a rule that pins an
        axis and returns a fresh one need not call this. `gather` does, where the axis that it picks
        from may be tied to one of the result.

        Args:
            value: The operand.
            dims: The numbers of the axes whose indices are mixed.
        """
        rest = [dim for dim in range(len(value.axes)) if dim not in dims]
        self.note_interaction(value, rest, rest)

    def note_interaction(
        self, value: TracedValue, over: Iterable[int], together: Iterable[int]
    ) -> None:
        """Records an `Interaction`. `note_contraction` and `note_mixing` are made of it.

        Args:
            value: The operand.
            over: The numbers of the axes whose elements meet others.
            together: The numbers of the axes along which only elements of equal index meet.
        """
        axes, meeting = self._inside_loops(value, over)
        _, aligned = self._inside_loops(value, together)
        # Iterations of a loop do not meet each other but through what is carried.
        iterations = range(len(self.interpreter.loops))
        interaction = Interaction(axes, meeting, aligned.union(iterations))
        self.interpreter.interactions.append(interaction)

    def note_selection(self, axis: Axis, *ranges: tuple[int, int], kept: Iterable[Axis]) -> None:
        """Records which ranges of an axis are kept, where the others may never be read.

        `slice` and `split` call it after `split_axis`. A part of a parameter that the program
        selects nowhere stays in place, as on other inputs it may be read. The rule is registered
        with `reads=False`.

        Args:
            axis: The axis that was split.
            *ranges: The first position of each range, and the one after its last.
            kept: The axes of the segments in these ranges.
        """
        found: set[int] = set()
        for start, end in ranges:
            found |= self.unifier.single_positions(axis, start, end)
        selection = Selection(axis, tuple(kept), frozenset(found))
        self.interpreter.selections.append(selection)

    def note_sliced(self, value: TracedValue) -> None:
        """Records that a loop takes slices of an operand along its first axis, one an iteration.

        Args:
            value: The operand.
        """
        self.interpreter.sliced.append((value.number, id(self.eqn)))

    def note_collected(self, value: TracedValue) -> None:
        """Records that a loop collects a value, which goes by one number inside and outside.

        Args:
            value: The value, as it is in one iteration.
        """
        self.interpreter.collected.add(value.number)

    def note_consumed(self, position: int, value: TracedValue, dims: Sequence[int]) -> None:
        """Records where features can be read as activations. `contract` does it by itself.

        Args:
            position: The number of the operand.
            value: The operand.
            dims: The numbers of its axes that a contraction sums over.
        """
        reading = self._reading("in", position, value, dims)
        if reading is not None:
            self.interpreter.consumed.append(reading)

    def note_produced(self, value: TracedValue, dims: Sequence[int]) -> None:
        """Records where features can be read as preactivations, as `dot_general` does.

        Without it they are read where the units first appear.

        Args:
            value: The first result.
            dims: The numbers of its axes that come from a parameter.
        """
        reading = self._reading("out", 0, value, dims)
        if reading is not None:
            self.interpreter.produced.append(reading)

    def _reading(
        self, side: Literal["in", "out"], position: int, value: TracedValue, dims: Sequence[int]
    ) -> Reading | None:
        """Describes an operand or a result; None where there are no features to be read."""
        if value.kind is not Kind.FEATURE or self.path is None:
            return None
        axes, along = self._inside_loops(value, dims)
        return Site(self.path, side, position), axes, along

    def _inside_loops(self, value: TracedValue, dims: Iterable[int]) -> tuple[Axes, frozenset[int]]:
        """Puts the axes of the scans around in front of a value's, and numbers `dims` anew."""
        loops = self.interpreter.loops
        depth = len(loops)
        shifted = frozenset(depth + dim for dim in dims)
        return loops + value.axes, shifted
