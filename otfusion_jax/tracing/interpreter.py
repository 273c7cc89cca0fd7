"""The pass over a jaxpr, which applies the rule of each equation in turn.

What each primitive does to the axes of its operands is said by one rule (see `rules`). The rule of
a call or a branch applies those of the jaxpr within, and has the same type as any other.

The pass is sound, not complete: a wrong group silently destroys a model, a missing group only
merges less. Whatever a rule cannot express is pinned, and a primitive without a rule is an error
(or pins all that it touches, on demand).
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jax.extend import core

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.axis import Axis, Factor, Kind, Sum, constant, factors_of
from otfusion_jax.tracing.constants import constant_value, is_throughout, number_of
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.equation import EquationContext
from otfusion_jax.tracing.jaxprs import live
from otfusion_jax.tracing.laws import keeps_zero, number_made
from otfusion_jax.tracing.positions import OnTies, let_go, operands_for, results_of
from otfusion_jax.tracing.records import (
    Interaction,
    Path,
    Reading,
    Regrouping,
    Selection,
    Site,
    Transfer,
)
from otfusion_jax.tracing.registry import Rule, UnsupportedPrimitiveError, rule_of, selects
from otfusion_jax.tracing.unification import Unifier
from otfusion_jax.tracing.values import Axes, TracedValue, Values, shape_of, sizes_of

OnUnsupported = Literal["raise", "pin"]
"""What to do about a primitive without a rule: raise an error, or pin all that it touches."""


_OWN_RULES = "otfusion_jax.tracing."
"""Where the rules are that come with the library."""


class Interpreter:
    """One pass over a jaxpr and the jaxprs within it, and all that is learned on the way.

    Attributes:
        unifier: What is known of the axes: what is tied, what is pinned.
        on_unsupported: What to do about a primitive without a rule.
        on_ties: What to do about positions that depend on the order of equal units.
        loops: The iteration axes of the scans around the equation at hand, outermost first.
        values: The axes of every value, those of the scans around it first. The keys of a
            dictionary, as an ordered set.
        features: The axes of all values that depend on inputs, as an ordered set.
        read: The axes that an operation took up in whole, as an ordered set.
        read_features: Those of them that were of values that depend on inputs.
        interactions: What met other indices within an operation.
        regroupings: What was read as other axes.
        selections: What was selected from an axis, while the rest was left out.
        produced: Where contractions with parameters put out features, in dataflow order.
        consumed: Where contractions take up features, in dataflow order.
        seen: Where any value that depends on inputs can be read, in dataflow order.
        calls: How many jaxprs within others have been entered.
        transfers: All equations but calls, in dataflow order, those of a loop's body as often as it
            was interpreted.
        zeros: The numbers of the values that are 0 throughout: constants, and what is made of them.
        ones: The numbers of the constants that are 1 throughout.
        numbers: For the numbers of values that are known to be one number throughout, what that is:
            constants of one entry, and what is made of them.
        sources: For the numbers of values that depend on parameters alone, the numbers of those
            parameters.
        parameters: For the number of a value that is a parameter, which one it is.
        outputs: The numbers of the values that the program returns.
        sliced: The numbers of values of which loops take slices, each with the loop, by the
            identity of its equation.
        collected: The numbers of values that loops collect.
    """

    def __init__(self, on_unsupported: OnUnsupported, on_ties: OnTies = "pin") -> None:
        self.unifier: Unifier = Unifier()
        self.on_unsupported = on_unsupported
        self.on_ties = on_ties
        self.loops: Axes = ()
        self.values: dict[Axes, None] = {}
        self.features: dict[Axis, None] = {}
        self.read: dict[Axis, None] = {}
        self.read_features: dict[Axis, None] = {}
        self.interactions: list[Interaction] = []
        self.regroupings: list[Regrouping] = []
        self.selections: list[Selection] = []
        self.produced: list[Reading] = []
        self.consumed: list[Reading] = []
        self.seen: list[Reading] = []
        self.calls = 0
        self.transfers: list[Transfer] = []
        self.zeros: set[int] = set()
        self.ones: set[int] = set()
        self.numbers: dict[int | None, float] = {}
        self.sources: dict[int | None, frozenset[int]] = {}
        self.parameters: dict[int | None, int] = {}
        self.outputs: list[int | None] = []
        self.sliced: list[tuple[int | None, int]] = []
        self.collected: set[int | None] = set()
        self._values_numbered = 0

    # --- the pass

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: Values,
        args: Values,
        path: Path | None = (),
        caller: EquationContext | None = None,
        used: Sequence[bool] | None = None,
    ) -> Values:
        """Applies the rule of each equation that matters, in turn.

        Args:
            jaxpr: What is interpreted.
            consts: The values of its constants.
            args: The values of its arguments.
            path: The indices of the calls and scans that the jaxpr lies in, outermost first; None
                where features can't be read.
            caller: The context of the equation that the jaxpr lies in; None for the outermost.
            used: One flag for each output, False where nothing depends on it; None if all are used.

        Returns:
            The values of the outputs.
        """
        env: dict[core.Var, TracedValue] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for value in env.values():
            self.note(value)
        for index, eqn, flags in live(jaxpr, used):
            eqn_path = None if path is None else (*path, index)
            context = RuleContext(eqn, eqn_path, self, caller, flags)
            operands = [self._read(env, atom) for atom in eqn.invars]
            results = self._apply_rule(context, operands)
            env.update(zip(eqn.outvars, results, strict=True))
            for position, value in enumerate(results):
                axes = self.note(value)
                if value.kind is Kind.FEATURE and eqn_path is not None:
                    site = Site(eqn_path, "out", position)
                    every_dim = frozenset(range(len(axes)))
                    self.seen.append((site, axes, every_dim))
        outputs = [self._read(env, atom) for atom in jaxpr.outvars]
        if caller is None or self._hands_on_positions(caller):
            return outputs
        # What a loop or a branch returns is one of several values, and is nobody's if not used.
        read = outputs if used is None else itertools.compress(outputs, used)
        let_go(self.unifier, list(read))
        return [value._replace(positions=None) for value in outputs]

    def _hands_on_positions(self, caller: EquationContext) -> bool:
        """Whether an equation returns what its jaxpr does, so that positions stay positions."""
        primitive = caller.eqn.primitive
        rule = rule_of(primitive)
        return primitive in primitives.CALLS and rule is not None and _is_own(rule)

    def _read(self, env: dict[core.Var, TracedValue], atom: Any) -> TracedValue:
        """Returns the value of a variable or of a literal."""
        if isinstance(atom, core.Literal):
            return self.constant(atom.val)
        if atom in env:
            return env[atom]
        # An output that nothing depends on, so that its equation was left out. It has to tie and
        # pin nothing: what it meets, as the same output of another branch, may be used elsewhere.
        unused = TracedValue(tuple(map(constant, shape_of(atom))), Kind.CONSTANT)
        unused = self.numbered(unused)
        if unused.number is not None:
            self.zeros.add(unused.number)
        return unused

    def _apply_rule(self, context: RuleContext, operands: Values) -> Values:
        """Applies the rule of an equation and records what its results leave out."""
        self.unifier.current_equation = context
        calls_before = self.calls
        rule = self._rule(context)
        is_own = _is_own(rule)
        primitive = context.eqn.primitive
        if is_own:
            operands = operands_for(primitive, self.unifier, operands)
        else:
            operands = let_go(self.unifier, operands)
        results = rule(context, operands)
        _check_results(context, results)
        results = results_of(context.eqn, self.unifier, operands, results)
        # What a call reads, the equations within it have read already.
        is_call = self.calls > calls_before
        is_reading = not is_call and not selects(primitive)
        self._note_lost_axes(context, operands, results, is_reading)
        # What the jaxpr of a call returns has its number, and comes from the equations there. What
        # a rule from elsewhere does with it is not known.
        if is_call and is_own and all(value.number is not None for value in results):
            return results
        # A rule may pass an operand on as it is: as a result it is another value.
        numbered = [self.numbered(value) for value in results]
        form = "call" if is_call else "equation"
        self.transfers.append(Transfer(context, tuple(operands), tuple(numbered), form))
        self._note_sources(numbered, operands)
        # Of a call by a rule from elsewhere, the law of the primitive says nothing.
        if not is_call:
            self._note_numbers(context, operands, numbered)
        return numbered

    def _note_numbers(
        self, context: RuleContext, operands: Sequence[TracedValue], results: Sequence[TracedValue]
    ) -> None:
        """Notes what is known of the numbers that an equation makes of those of its operands."""
        if keeps_zero(context.eqn.primitive, list(map(self.is_zero, operands))):
            self.zeros.update([value.number for value in results if value.number is not None])
        known = [self.numbers.get(value.number) for value in operands]
        number = number_made(context.eqn, known)
        if number is not None:
            self.numbers[results[0].number] = number

    def _note_sources(
        self, results: Sequence[TracedValue], operands: Sequence[TracedValue]
    ) -> None:
        """Notes which parameters values come of that depend on parameters alone."""
        of_parameters = [value.number for value in results if value.kind is Kind.PARAMETER]
        if not of_parameters:
            return
        found = [self.sources.get(value.number, frozenset()) for value in operands]
        sources = frozenset[int]().union(*found)
        self.sources.update(dict.fromkeys(of_parameters, sources))

    def _note_lost_axes(
        self, context: RuleContext, operands: Values, results: Values, is_reading: bool
    ) -> None:
        """Records the axes of operands that no result has, as those that a sum runs over.

        Within the operation their indices meet. A new axis of the result may be tied to the lost
        one later on (by a residual connection), and then nothing but this record tells that the
        indices have been mixed.
        """
        kept: set[int | None] = {None}  # a factor without a variable does not vary
        for value in results:
            for axis in value.axes:
                kept.update(self._variables_along(axis))
        for value in operands:
            lost: set[int] = set()
            for dim, axis in enumerate(value.axes):
                if not self._variables_along(axis) <= kept:
                    lost.add(dim)
            if is_reading:
                for dim in lost:
                    self.read[value.axes[dim]] = None
                    if value.kind is Kind.FEATURE:
                        self.read_features[value.axes[dim]] = None
            if 0 < len(lost) < len(value.axes):
                context.note_mixing(value, lost)

    def _variables_along(self, axis: Axis) -> set[int | None]:
        """Returns the variables of an axis's factors; None for those along which it is constant."""
        factors = factors_of(self.unifier.expand(axis))
        return {factor.variable for factor in factors}

    def _rule(self, context: RuleContext) -> Rule:
        """Returns the rule of an equation, or says that there is none."""
        primitive = context.eqn.primitive
        rule = rule_of(primitive)
        if rule is not None:
            return rule
        if self.on_unsupported == "pin":
            return _pinned_on_demand
        if primitive in primitives.REFERENCES:
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
            "otfusion_jax.register_rule(primitive) declares a rule of your own; or write that line "
            "with other primitives."
        )

    # --- what is recorded of values

    def constant(self, array: Any) -> TracedValue:
        """Describes an array that the traced function closes over."""
        value = self.numbered(constant_value(self.unifier, array))
        for number, values in ((0, self.zeros), (1, self.ones)):
            if value.number is not None and is_throughout(array, number):
                values.add(value.number)
        number = number_of(array)
        if number is not None:
            self.numbers[value.number] = number
        return value

    def numbered(self, value: TracedValue) -> TracedValue:
        """Gives a new number to a value."""
        self._values_numbered += 1
        return value._replace(number=self._values_numbered)

    def note_choice(
        self, context: RuleContext, joined: TracedValue, alternatives: Sequence[TracedValue]
    ) -> TracedValue:
        """Numbers a value that is one of several, and records that; see `RuleContext.one_of`."""
        joined = self.numbered(joined)
        # Where one of them is no positions, the joined value is none.
        let_go(self.unifier, list(alternatives))
        self.transfers.append(Transfer(context, tuple(alternatives), (joined,), "choice"))
        self._note_sources([joined], alternatives)
        if joined.number is not None and all(map(self.is_zero, alternatives)):
            self.zeros.add(joined.number)
        return joined

    def parameter(self, axes: Axes, position: int) -> TracedValue:
        """Describes a parameter.

        Args:
            axes: The axes of the parameter.
            position: Which of the parameters it is.

        Returns:
            The value, with a number.
        """
        value = self.numbered(TracedValue(axes, Kind.PARAMETER))
        self.parameters[value.number] = position
        self.sources[value.number] = frozenset([position])
        return value

    def come_of_the_same(self, x: TracedValue, y: TracedValue) -> bool:
        """Says whether two values may be one and the same, seen from what they are made of.

        Args:
            x: A value.
            y: Another one.

        Returns:
            False if they come of parameters alone, and not of the same ones.
        """
        return self.sources.get(x.number) == self.sources.get(y.number)

    def is_nonzero(self, value: TracedValue) -> bool:
        """Whether a value is known to be one number throughout, and not 0."""
        return value.number in self.ones or bool(self.numbers.get(value.number))

    def is_zero(self, value: TracedValue) -> bool:
        """Whether a value is known to be 0 throughout, as far as it has been gone through."""
        return value.number in self.zeros

    def note_again(self, context: RuleContext, before: TracedValue, after: TracedValue) -> None:
        """Records that what a loop carries out goes in again, where another value stood for it."""
        self.transfers.append(Transfer(context, (before, after), (), "again"))

    def note(self, value: TracedValue) -> Axes:
        """Records the axes of a value, and returns them, those of the loops around it first."""
        axes = (*self.loops, *value.axes)
        self.values[axes] = None
        if value.kind is Kind.FEATURE:
            self.features.update(dict.fromkeys(value.axes))
        return axes

    # --- what is asked when the pass is over

    def variables(self, axes: Iterable[Axis]) -> set[int]:
        """Returns the finest axis variables of axes, those of single positions included."""
        return set().union(*map(self.unifier.variables_of, axes))

    def picked(self) -> set[int]:
        """Returns the axis variables of single positions that were selected."""
        picked: set[int] = set()
        for selection in self.selections:
            picked |= selection.single_positions
        return picked

    def left_out(self) -> set[int]:
        """Returns the free axis variables that were left out where others of their axis were kept.

        Some operation may have taken up the whole axis before, such as a normalisation. They count
        as left out all the same, unless they are summed over together with something else, or taken
        up without those that were kept. Where they have met padding, as in the gradient of the
        selection, they may count for nothing in such a sum: it does not tell.
        """
        unifier = self.unifier
        contracted = self.variables(unifier.contracted_with_others)
        used_elsewhere = self.picked() | (contracted - self.variables(unifier.met_padding))
        readings = [unifier.variables_of(axis) for axis in self.read]
        left_out: set[int] = set()
        for selection in self.selections:
            kept = self.variables(selection.kept) | selection.single_positions
            whole = unifier.variables_of(selection.whole)
            for variable in whole - kept - used_elsewhere - left_out:
                if unifier.is_free(variable) and not _is_read_alone(variable, kept, readings):
                    left_out.add(variable)
        return left_out


def _is_own(rule: Rule) -> bool:
    """Whether a rule comes with the library."""
    return rule.__module__.startswith(_OWN_RULES)


def _is_read_alone(variable: int, kept: set[int], readings: Sequence[set[int]]) -> bool:
    """Whether an operation took up an axis variable and none of those that were kept."""
    for reading in readings:
        if variable in reading and not reading & kept:
            return True
    return False


def _pinned_on_demand(context: RuleContext, values: Values) -> Values:
    """The rule of a primitive that has none, where the user asked for its axes to be pinned."""
    return context.pin_all(values, context.because("(no rule, pinned on demand)"))


def _wrong_result(results: Any) -> str | None:
    """Says what a rule returned in place of a list of `TracedValue`s; None if it is such a list."""
    # A single TracedValue is a tuple as well.
    if isinstance(results, TracedValue) or not isinstance(results, list | tuple):
        return kind_of(results)
    for value in results:
        if not isinstance(value, TracedValue):
            return f"a list with {kind_of(value)}"
        if not isinstance(value.kind, Kind):
            return f"a TracedValue whose kind is {value.kind!r}"
        is_axes = isinstance(value.axes, tuple) and all(map(_is_axis, value.axes))
        if not is_axes:
            return f"a TracedValue whose axes are {value.axes!r:.80}"
    return None


def _is_axis(axis: Any) -> bool:
    # Factors and sums are tuples themselves; an axis is a tuple of them.
    is_term = isinstance(axis, Factor | Sum)
    return (
        isinstance(axis, tuple)
        and not is_term
        and all(isinstance(term, Factor | Sum) for term in axis)
    )


def _check_results(context: RuleContext, results: Values) -> None:
    """Checks that a rule returned values of the equation's number and shapes."""
    eqn = context.eqn
    wrong = _wrong_result(results)
    if wrong is not None:
        raise TypeError(
            f"the rule of {str(eqn.primitive)!r} returned {wrong}, at {context.source}; it must "
            "return a list of one TracedValue(axes, kind) for each result, of a tuple of axes and "
            "a Kind, such as [ctx.join(values)] or [values[0]]"
        )
    if len(results) != len(eqn.outvars):
        raise ValueError(
            f"the rule of {str(eqn.primitive)!r} returned {len(results)} values for the "
            f"{len(eqn.outvars)} results of the equation at {context.source}; it must return one "
            "TracedValue for each"
        )
    for position, value in enumerate(results):
        shape = context.shape(position)
        if sizes_of(value) != shape:
            raise ValueError(
                f"the rule of {str(eqn.primitive)!r} returned axes of sizes {sizes_of(value)} for "
                f"result {position} of shape {shape}, at {context.source}; it must return one axis "
                "of the same size for each of the array's"
            )
