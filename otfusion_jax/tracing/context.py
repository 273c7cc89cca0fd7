"""The statements about axes that a rule can make.

The pass over a jaxpr (see `interpreter`) makes one `RuleContext` for each equation and hands it to
the rule of the primitive. What a rule states of axes goes on to the unifier (see `unification`).
The rules of `rules` are written with the same methods that a user's rule has; docs/rules.md teaches
them.
"""

import contextlib
import dataclasses
import itertools
import operator
from collections.abc import Callable, Collection, Sequence

from jax.extend import core

from otfusion_jax.tracing.axis import Axis, Disagreement, Kind, constant, is_constant, size_of
from otfusion_jax.tracing.equation import EquationContext
from otfusion_jax.tracing.positions import let_go, varies_throughout
from otfusion_jax.tracing.records import Regrouping
from otfusion_jax.tracing.values import (
    Positions,
    TracedValue,
    Values,
    highest_kind,
    sizes_of,
)

_SPARE_ROUNDS = 16
"""A loop's body is interpreted at most this many times more than the loop carries axes."""


@dataclasses.dataclass(frozen=True)
class RuleContext(EquationContext):
    """What a rule sees of its equation, and the statements about axes that it can make.

    A rule is a function of a context and of the list of `TracedValue`s of the equation's operands.
    It returns the list of those of the results. Whatever it states must hold for all values that
    the operands may have: if the units along an axis are permuted in all operands that it is tied
    to, the results have to come out permuted alike. An axis for which that can't be said must be
    pinned.
    """

    # --- axes of results

    def fresh_constant(self, size: int) -> Axis:
        """Returns a new axis along which the result is the same at every position.

        It agrees with everything and ties nothing. The new axes of `broadcast_in_dim` are such.

        Args:
            size: The number of positions.
        """
        return constant(size)

    def constant_result(self, position: int = 0) -> TracedValue:
        """Returns the value of a result that is the same at every position and for any operands.

        An array of zeros is such, or what an operation makes that is never read.

        Args:
            position: The number of the result.
        """
        axes = map(self.fresh_constant, self.shape(position))
        return TracedValue(tuple(axes), Kind.CONSTANT)

    def fresh_pinned(self, size: int, reason: str) -> Axis:
        """Returns a new axis whose positions may not be permuted.

        That is right for every axis of a result that is not one of an operand: the positions that
        `iota` counts, the windows of `reduce_window_sum`.

        Args:
            size: The number of positions.
            reason: Why it is pinned, for the user to read; see `because`.
        """
        return self.unifier.pinned(size, reason)

    def counted(self, size: int) -> Positions:
        """Returns positions along a new axis, of which nothing but positions is known.

        For the rules that come with the library: of what others return, positions are pinned.

        Args:
            size: The number of positions.
        """
        return Positions(self.unifier.fresh(size), self.because())

    def pass_on(self, axis: Axis, kind: Kind, result_kind: Kind) -> Axis:
        """Passes an axis of an operand on to a result that may depend on more than this operand.

        An axis of a parameter becomes one of features there, which the parameter then *produces*.
        Call it for each axis that a result has from one operand alone while others take part, such
        as the free axes of `dot_general`. `join` does it by itself.

        Args:
            axis: An axis of the operand.
            kind: The kind of the operand.
            result_kind: The kind of the result.

        Returns:
            The axis to give to the result.
        """
        return self.unifier.enter(axis, kind, result_kind)

    # --- ties between axes

    def join(self, values: Sequence[TracedValue], skip: Collection[int] = ()) -> TracedValue:
        """States that values meet element by element: their units move together.

        This is all that there is to say of `add`, `tanh` or `select_n`. Scalars and axes of size 1
        meet anything, as they are broadcast.

        Args:
            values: The operands, of one rank but for scalars.
            skip: The numbers of axes to leave out, such as the one that `concatenate` joins. The
                result has empty axes there, to be replaced (`TracedValue.with_axis`).

        Returns:
            The result of the operation.
        """
        kind = highest_kind(values)
        rank = max((len(value.axes) for value in values), default=0)
        axes: list[Axis] = []
        for dim in range(rank):
            met: list[Axis] = []
            kinds: list[Kind] = []
            for value in values:
                axis = value.axes[dim] if value.axes else ()
                if axis:
                    met.append(axis)
                    kinds.append(value.kind)
            if dim in skip or not met:
                axes.append(())
                continue
            tied = self.tie(met, kinds)
            # An operand that is broadcast along this axis may still be what depends on inputs.
            passed_on = self.pass_on(tied, max(kinds), kind)
            axes.append(passed_on)
        return TracedValue(tuple(axes), kind)

    def one_of(self, joined: TracedValue, alternatives: Sequence[TracedValue]) -> TracedValue:
        """States that a value is one of several, as the result of `cond` is that of some branch.

        Rules of primitives that run a jaxpr call it, on what they have joined.

        Args:
            joined: What `join` made of the alternatives.
            alternatives: The values, one of which it is as the program runs.

        Returns:
            The joined value.
        """
        return self.interpreter.note_choice(self, joined, alternatives)

    def tie(self, axes: Sequence[Axis], kinds: Sequence[Kind]) -> Axis:
        """States that single axes meet index by index: their units move together.

        The batch axes of `dot_general` do, and those along which `gather` takes one index for each
        row. Where the two can't be brought together (6 units as 2 by 3 and as 3 by 2), both are
        pinned.

        Args:
            axes: Axes of one size.
            kinds: The kind of the value that each of them belongs to.

        Returns:
            The axis of the result. Where the result depends on more than these values, it is to be
            passed on from the highest of their kinds; see `pass_on`.
        """
        return self.unifier.unify(axes, kinds)

    def tie_contracted(self, a: Axis, b: Axis, kinds: tuple[Kind, Kind]) -> None:
        """States that two axes are summed over together, index by index.

        Their units move together in opposite roles: where one operand produces the units, the other
        consumes them. `contract` does the same and records the rest. A rule calls it by itself
        where the contracted axes are parts of axes, as `conv_general_dilated` in groups.

        Args:
            a: An axis of one operand.
            b: An axis of the other, of the same size.
            kinds: The kinds of the two operands.
        """
        self.unifier.contract(a, b, kinds)

    def contract(
        self,
        values: Sequence[TracedValue],
        over: Sequence[tuple[int, int]],
        batch: Sequence[tuple[int, int]] = (),
    ) -> list[Axis]:
        """States that two operands are multiplied and summed over pairs of axes, as `dot_general`.

        Args:
            values: The two operands, the first two of the equation.
            over: The pairs of axes that are summed over: one of the first operand, one of the
                second.
            batch: The pairs of axes that meet index by index and are kept.

        Returns:
            The tied batch axes. The free axes of the result are the rule's to pass on, by
            `pass_on`.
        """
        x, y = values
        kinds = x.kind, y.kind
        # A penalty on parameters ties them alike whether it is written as a sum of products or as
        # a contraction: it has no units that one produces and the other consumes.
        is_penalty = max(kinds) is Kind.PARAMETER and not self.shape()
        may_be_square = self.interpreter.come_of_the_same(x, y)
        is_nonzero = self.interpreter.is_nonzero(x) or self.interpreter.is_nonzero(y)
        for i, j in over:
            if is_penalty:
                self.tie([x.axes[i], y.axes[j]], kinds)
            else:
                self.unifier.contract(
                    x.axes[i], y.axes[j], kinds, may_be_square=may_be_square, is_nonzero=is_nonzero
                )
        tied = []
        for i, j in batch:
            axis = self.tie([x.axes[i], y.axes[j]], kinds)
            tied.append(axis)
        for position, value in enumerate(values):
            summed = [pair[position] for pair in over]
            kept = [pair[position] for pair in batch]
            self.note_contraction(value, summed, kept)
            self.note_consumed(position, value, summed)
        return tied

    # --- positions

    def known_number(self, value: TracedValue) -> float | None:
        """Returns the number that an operand is throughout, as the start of a slice may be.

        Args:
            value: The operand.

        Returns:
            The number; None where the program does not tell it.
        """
        return self.interpreter.numbers.get(value.number)

    def positions_along(self, value: TracedValue, dim: int) -> Positions | None:
        """States that a result has positions along an axis of an operand, found by its numbers.

        For the rules that come with the library: of what others return, positions are pinned.

        Args:
            value: The operand.
            dim: The number of the axis.

        Returns:
            What to give to the result. None where the axis had to be pinned, as units may be equal,
            of which another order would find another one.
        """
        axis, reason = value.axes[dim], self.because_along(dim)
        is_ignored = self.interpreter.on_ties == "ignore"
        if is_ignored and varies_throughout(self.unifier, value, dim):
            return Positions(axis, reason)
        self.pin(axis, reason)
        return None

    def compare_positions(self, values: Sequence[TracedValue]) -> None:
        """States that two operands are compared, each of which may be positions.

        For the rules that come with the library: others are given no positions.

        Args:
            values: The operands. If they are positions that were found and counts, the axes that
                they are of move together; otherwise these are pinned.
        """
        found = [value.positions for value in values]
        kinds = [value.kind for value in values]
        axes = [positions.axis for positions in found if positions is not None]
        sizes = {size_of(axis) for axis in axes}
        # Counts are constants. Positions that are compared with each other may be of units that
        # move in another way for each head, which is nowhere in their axes.
        is_count = [kind is Kind.CONSTANT for kind in kinds]
        if len(axes) == len(values) and len(sizes) == 1 and sum(is_count) == 1:
            self.tie(axes, kinds)
        else:
            let_go(self.unifier, list(values))

    # --- pins

    def pin(self, axis: Axis, reason: str) -> None:
        """States that the positions of an axis may not be permuted, as the order of them matters.

        `cumsum` pins the axis that it runs along.

        Args:
            axis: An axis of an operand. Whatever it is tied to, now or later, is pinned with it.
            reason: Why, for the user to read; see `because`. The first reason is kept.
        """
        self.unifier.pin(axis, reason)

    def pin_all(self, values: Sequence[TracedValue], reason: str) -> Values:
        """Pins every axis of the operands and of the results.

        It is the whole rule of what nothing is known of, such as `ffi_call`. It is never wrong.

        Args:
            values: The operands.
            reason: Why, for the user to read; see `because`.

        Returns:
            The results of the equation.
        """
        for value in values:
            for axis in value.axes:
                self.pin(axis, reason)
        kind = highest_kind(values)
        results = []
        for shape in self.shapes():
            axes = [self.fresh_pinned(size, reason) for size in shape]
            result = TracedValue(tuple(axes), kind)
            results.append(result)
        return results

    def pick_positions(self, axis: Axis, size: int, reason: str) -> Axis:
        """Pins an axis of which a result has only some positions, or has them in another order.

        `gather` does that, and a `slice` whose stride does not divide the axis. An axis along which
        the operand is constant need not be pinned: it stays constant.

        Args:
            axis: An axis of an operand.
            size: The number of positions in the result.
            reason: Why, for the user to read; see `because`.

        Returns:
            The axis of the result.
        """
        if is_constant(axis):
            return constant(size)
        self.pin(axis, reason)
        return self.fresh_pinned(size, reason)

    # --- axes taken apart

    def split_axis(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Splits an axis into segments, one after the other, each of which moves by itself.

        `split` and a `slice` without strides do that; the latter keeps one of the segments.

        Args:
            axis: An axis of an operand.
            sizes: The sizes of the segments, of which the sum is that of the axis.
            reason: Why the axis is pinned if it has no segments of these sizes, as one that is made
                of 2 blocks of 3 has none of 2 and 4; see `because`.

        Returns:
            One axis for each segment.
        """
        ends = list(itertools.accumulate(sizes))
        if 0 not in sizes:
            with contextlib.suppress(Disagreement):
                pieces = self.unifier.split_segments(axis, ends[:-1])
                return list(map(_by_itself, pieces))
        segments = []
        for size in sizes:
            segment = self.pick_positions(axis, size, reason)
            segments.append(segment)
        return segments

    def unflatten(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Reads one axis as several, in row-major order, each of which moves by itself.

        `conv_general_dilated` reads channels as groups times channels of a group.

        Args:
            axis: An axis of an operand.
            sizes: The sizes of the axes to read it as, of which the product is that of the axis.
            reason: Why the axis is pinned if it can't be read so; see `because`.

        Returns:
            One axis for each size. `outer + inner` is the axis that they are read from.
        """
        return self.unifier.regroup([axis], sizes, reason)

    def regroup(self, value: TracedValue, sizes: Sequence[int], reason: str) -> list[Axis]:
        """Reads all elements of an operand, in row-major order, as axes of other sizes.

        That is what `reshape` does.

        Args:
            value: The operand.
            sizes: The sizes of the new axes.
            reason: Why axes are pinned that can't be read so, as 2 by 3 can't be read as 3 by 2;
                see `because`.

        Returns:
            The new axes.
        """
        # An axis of the same size that ends after as many elements is the same axis still.
        ends = itertools.accumulate(sizes, operator.mul)
        new_axes = set(zip(ends, sizes, strict=True))
        changed = []
        end = 1
        for dim, size in enumerate(sizes_of(value)):
            end *= size
            if size > 1 and (end, size) not in new_axes:
                changed.append(dim)
        axes, over = self._inside_loops(value, changed)
        self.interpreter.regroupings.append(Regrouping(axes, over))
        return self.unifier.regroup(value.axes, sizes, reason)

    # --- jaxprs within the equation

    def call(
        self,
        jaxpr: core.ClosedJaxpr,
        args: Values,
        *,
        once: bool = True,
        used: Sequence[bool] | None = None,
        iterations: Axis | None = None,
    ) -> Values:
        """Applies the rules of a jaxpr that the equation runs, as those of `jit` and `cond` do.

        Args:
            jaxpr: The jaxpr that is run, with its constants.
            args: What it is run on.
            once: Whether it runs exactly once, or once in each iteration of `iterations`. Only then
                features can be read in it.
            used: One flag for each of its results, False where nothing depends on it; None if all
                are used.
            iterations: The axis that its operands are slices of, as those of `scan` are; None if
                they are no slices.

        Returns:
            The results of the jaxpr.
        """
        interpreter = self.interpreter
        interpreter.calls += 1
        consts = [interpreter.constant(array) for array in jaxpr.consts]
        path = self.path if once else None
        loops_outside = interpreter.loops
        if iterations is not None:
            interpreter.loops = (*loops_outside, iterations)
        try:
            return interpreter.run(jaxpr.jaxpr, consts, args, path, self, used)
        finally:
            interpreter.loops = loops_outside

    def repeat(self, body: Callable[[Values], Values], carry: Values) -> tuple[Values, Values]:
        """Applies the rules of a loop's body until what it carries is tied to what it hands on.

        The rules of `scan` and `while` call it. One application is not enough: a body that swaps
        what it carries ties more each time.

        Args:
            body: A function from what is carried into an iteration to the body's results, of which
                the first are what is carried out.
            carry: What the loop starts from.

        Returns:
            What is carried through the loop, and all results of the body's last application.
        """
        interpreter = self.interpreter
        readings = interpreter.produced, interpreter.consumed, interpreter.seen
        # Each round ties one more axis at least. A body that takes axes apart anew in every round
        # would never come to an end: it is given up, and what it carries does not move.
        rounds_left = _SPARE_ROUNDS + sum(len(value.axes) for value in carry)
        # What is carried is another value in each iteration, and what the loop starts from may be
        # used in its body, too.
        carry = [self.one_of(value, [value]) for value in carry]
        while True:
            counts = [len(found) for found in readings]
            results = body(carry)
            joined = []
            for before, after in zip(carry, results, strict=False):
                joined.append(self.one_of(self.join([before, after]), [before, after]))
                interpreter.note(joined[-1])
            previous, carry = carry, joined
            if all(map(self._is_settled, previous, carry)):
                for before, after in zip(previous, carry, strict=True):
                    interpreter.note_again(self, before, after)
                return carry, results
            rounds_left -= 1
            if rounds_left < 0:
                reason = self.because("carried through the loop in another form")
                for value in carry:
                    for axis in value.axes:
                        self.pin(axis, reason)
            # Features are to be found once, by the round that counts.
            for found, count in zip(readings, counts, strict=True):
                del found[count:]

    def _is_settled(self, before: TracedValue, after: TracedValue) -> bool:
        """Whether a round has changed neither what moves with a value nor what it depends on."""
        if before.kind is not after.kind:
            return False
        # A count starts from 0, and is not 0 again.
        if self.interpreter.is_zero(before) and not self.interpreter.is_zero(after):
            return False
        unifier = self.unifier
        for old, new in zip(before.axes, after.axes, strict=True):
            pinned = unifier.is_pinned(old) and unifier.is_pinned(new)
            if not pinned and unifier.signature(old) != unifier.signature(new):
                return False
        return True


def _by_itself(segment: Axis) -> Axis:
    """Returns a segment of an axis as an axis: a single position is the empty product there."""
    if size_of(segment) == 1:
        return ()
    return segment
