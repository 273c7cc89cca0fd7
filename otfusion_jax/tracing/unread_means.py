"""Means over units that nothing reads, because a mean is subtracted before anything else is done.

A LayerNorm reads how its units differ from their mean. What is added to all units alike is lost
there, and so is the mean over the units of every weight that produces them. Of what comes out of
it the mean is 0, so that the mean of the weights that consume that is not read either.

Here a number is added to the units of every parameter, with its own one for each index of the other
axes, and followed through the program (see `shifts`). Where it may change anything the parameters
that it comes from are read; for all that are left it is proved that it changes nothing. As with
`laws`, a primitive of which nothing is said here reads everything.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from otfusion_jax.tracing import laws
from otfusion_jax.tracing.dataflow import Dataflow, round_finely
from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.laws import UNCHANGED, Law, law_of
from otfusion_jax.tracing.records import Transfer
from otfusion_jax.tracing.shifts import (
    CENTRED,
    LEVEL,
    Fixed,
    Leaves,
    Moment,
    Shifted,
    Squared,
    Standing,
    Term,
    cancelled,
    changes,
    leaves_of,
    product_of_moments,
    rearranged,
)
from otfusion_jax.tracing.units import Units
from otfusion_jax.tracing.values import TracedValue, shape_of

_SAME_VALUE = ("convert_element_type", "copy")
"""What makes a copy of a value, up to rounding."""


def unread_means(
    interpreter: Interpreter,
    dataflow: Dataflow,
    units: Units,
    parameters: Sequence[tuple[TracedValue, int]],
    level: Collection[int],
    zeros: Collection[int],
) -> tuple[tuple[int, int], ...]:
    """Finds the parameters whose mean over the units of a group nothing reads.

    Args:
        interpreter: The finished pass over the program.
        dataflow: The equations of the program.
        units: The units of the group.
        parameters: The parameters that have the units, each with its position in
            `Symmetry.parts`.
        level: The numbers of values that are taken to be the same at all units.
        zeros: The numbers of values that are taken to be 0.

    Returns:
        The positions of parameters, each with the axis that the units lie along.
    """
    search = _Search(interpreter, dataflow, units)
    search.standings.update(dict.fromkeys(level, LEVEL))
    search.standings.update(dict.fromkeys(zeros, CENTRED))
    axes = {}
    for value, leaf in parameters:
        dim = units.dim(value)
        if dim is not None and value.number is not None and value.number not in (*level, *zeros):
            axes[leaf] = dim
            source = value.number, len(value.axes)
            # All at once: each value says by which of them it is shifted.
            search.standings[value.number] = Shifted(frozenset({leaf}), source)
    dataflow.follow(list(search.standings), search.step)
    for number in interpreter.outputs:
        search.read(search.standings.get(number or 0))
    are_read = search.all_read(axes)
    return tuple(sorted((leaf, dim) for leaf, dim in axes.items() if leaf not in are_read))


class _Operand(NamedTuple):
    """An operand of an equation, and how it stands."""

    value: TracedValue
    standing: Standing


class _Search:
    """How values stand, as the equations of a program are gone through.

    Attributes:
        standings: By the numbers of values how they stand.
    """

    def __init__(self, interpreter: Interpreter, dataflow: Dataflow, units: Units) -> None:
        self.standings: dict[int, Standing] = {}
        self._are_read: set[int] = set()
        # What loops add to what they carry.
        self._carried: list[tuple[Leaves, Leaves]] = []
        # Whether something was taken for centred that is not, so that nothing is known.
        self._is_over = False
        self._interpreter = interpreter
        self._ambiguous = dataflow.ambiguous
        self._numbers = interpreter.numbers
        self._units = units
        self._rules: dict[Law | None, Callable[[Transfer, list[_Operand]], Standing]] = {
            laws.moving: self._moved,
            laws.gather: self._gathered,
            laws.tie: lambda _, x: x[-1].standing,
            laws.adding: self._added,
            laws.concatenate: lambda _, x: self._one_of(x, []),
            laws.dynamic_update_slice: lambda _, x: self._one_of(x[:2], x[2:]),
            laws.select_n: lambda _, x: self._one_of(x[1:], x[:1]),
            laws.mul: self._product,
            laws.div: self._quotient,
            laws.square: lambda _, x: self._power(x, 2),
            laws.integer_pow: lambda transfer, x: self._power(x, transfer.context.eqn.params["y"]),
            laws.raised: lambda _, x: self._power(x, self._numbers.get(x[1].value.number)),
            laws.reduce_sum: self._summed,
            laws.dot_general: self._contracted,
            laws.ragged_dot: self._contracted,
            laws.conv_general_dilated: self._convolved,
        }

    def read(self, *standings: Standing) -> None:
        """Notes that the shifts of values may change something."""
        self._are_read |= leaves_of(*standings)

    def all_read(self, leaves: Collection[int]) -> Collection[int]:
        """Returns the parameters whose means are read, once all equations have been gone through.

        Args:
            leaves: All parameters that were shifted.
        """
        if self._is_over:
            return leaves
        count = -1
        while count != len(self._are_read):
            count = len(self._are_read)
            for carried, added in self._carried:
                if not self._are_read.isdisjoint(carried):
                    self._are_read |= added
        return self._are_read

    def step(self, transfer: Transfer) -> list[int]:
        """Goes through an equation.

        Args:
            transfer: The equation, once all before it have been gone through.

        Returns:
            The numbers of results that something is known of.
        """
        found = []
        for value, standing in zip(transfer.results, self._results(transfer), strict=True):
            if standing is None or value.number is None or value.number in self.standings:
                continue
            # Of a part of the units, or of more than these, the mean is another one.
            lies_along = isinstance(standing, Shifted | Squared) or standing == CENTRED
            if lies_along and self._units.dim(value) is None:
                self.read(standing)
                continue
            if isinstance(standing, Shifted) and standing.source is None:
                standing = standing._replace(source=(value.number, len(value.axes)))
            self.standings[value.number] = standing
            found.append(value.number)
        return found

    def _results(self, transfer: Transfer) -> list[Standing]:
        """Returns how the results of an equation stand."""
        operands = [_Operand(value, self._standing(value)) for value in transfer.operands]
        if transfer.form == "again":
            before, after = operands
            self._again(before.standing, after.standing)
            return []
        if transfer.form == "choice":
            return [self._one_of(operands, [])]
        law = law_of(transfer.context.eqn.primitive)
        rule = self._rules.get(law) if transfer.form == "equation" else None
        if transfer.form == "equation" and law is laws.one_by_one:
            return [operand.standing for operand in operands]
        standing = self._unknown(operands) if rule is None else rule(transfer, operands)
        if changes(standing) and not round_finely(transfer):
            self.read(standing)
            standing = None
        return [standing] * len(transfer.results)

    def _standing(self, value: TracedValue) -> Standing:
        """Returns how an operand stands, of which a loop may have taken slices, or collected it."""
        standing = self.standings.get(value.number or 0)
        rank = len(value.axes)
        # It may be the slice that another loop has taken.
        is_unknown = value.number in self._ambiguous
        if isinstance(standing, Moment):
            is_unknown = is_unknown or len(standing.dims) != rank
        if isinstance(standing, Squared):
            is_unknown = is_unknown or standing.source[1] != rank
        if is_unknown:
            self.read(standing)
            return None
        if isinstance(standing, Shifted) and standing.source and standing.source[1] != rank:
            return standing._replace(source=(value.number or 0, rank))
        return standing

    def _unknown(self, operands: Sequence[_Operand]) -> None:
        """Anything may be done to operands."""
        self.read(*[operand.standing for operand in operands])

    def _again(self, before: Standing, after: Standing) -> None:
        """Takes what a loop carries out in the place of what it has carried in."""
        if before == CENTRED and after != CENTRED:
            # What has been concluded from it in the body may not hold in the next iteration.
            self._is_over = True
        if isinstance(before, Shifted):
            # Whatever would read these in the next iteration reads the others in this one.
            self._carried.append((before.leaves, leaves_of(after) - before.leaves))
        else:
            self.read(after)

    def _one_of(self, cases: Sequence[_Operand], others: Sequence[_Operand]) -> Standing:
        """One of some values is taken, or all of them are added, as other operands say."""
        self.read(*[operand.standing for operand in others])
        standings = [operand.standing for operand in cases]
        if any(map(changes, standings)):
            is_simple = all(isinstance(x, Shifted | Fixed | None) for x in standings)
            # What is taken at one unit and not at another is changed at one alone.
            if not is_simple or any(self._units.dims(operand.value) for operand in others):
                return self._unknown(cases)
            return Shifted(leaves_of(*standings))
        if others:
            return None
        for value, standing in cases:
            if standing != CENTRED and not self._interpreter.is_zero(value):
                return None
        return CENTRED if CENTRED in standings else None

    def _moved(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """The first operand is passed on, in another shape, order or sign."""
        (_, x), *positions = operands
        self._unknown(positions)
        eqn = transfer.context.eqn
        name = eqn.primitive.name
        if isinstance(x, Shifted):
            # The mean of a value is that of its copies, and of nothing else.
            return x if name in _SAME_VALUE else Shifted(x.leaves)
        if isinstance(x, Moment) and name == "neg":
            return x._replace(factor=-x.factor)
        if isinstance(x, Moment) and eqn.primitive in UNCHANGED:
            dims = rearranged(x.dims, eqn)
            return self._unknown(operands) if dims is None else x._replace(dims=dims)
        if isinstance(x, Squared | Moment):
            return x if name in _SAME_VALUE else self._unknown(operands)
        # A sum over tokens of what is the same at all units is so, too.
        return x

    def _gathered(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """Positions of the first operand are read; out of bounds a number may take their place."""
        standing = self._moved(transfer, operands)
        return standing if isinstance(standing, Shifted) else None

    def _added(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """Operands are added, or put side by side along other axes."""
        eqn = transfer.context.eqn
        if eqn.primitive.name in ("add", "sub", "add_jaxvals"):
            x, y = operands
            sign = -1 if eqn.primitive.name == "sub" else 1
            (result,) = transfer.results
            standing = cancelled(
                Term(x.standing, 1),
                Term(y.standing, sign),
                self._units.size,
                shape_of(eqn.outvars[0]),
                self._units.dim(result),
            )
            if standing != 0:
                return standing
        return self._one_of(operands, [])

    def _product(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """Operands are multiplied."""
        x, y = operands
        for one, other in ((x, y), (y, x)):
            # A sum that is divided by the number of units is their mean.
            if isinstance(one.standing, Moment) and other.value.number in self._numbers:
                return self._scaled(one.standing, self._numbers[other.value.number])
            if isinstance(one.standing, Shifted | Fixed) and self._is_level(other):
                return Shifted(one.standing.leaves) if changes(one.standing) else one.standing
        if isinstance(x.standing, Moment) and isinstance(y.standing, Moment):
            return product_of_moments(x.standing, y.standing) or self._unknown(operands)
        if isinstance(x.standing, Shifted) and isinstance(y.standing, Shifted):
            if x.standing.source == y.standing.source:
                return self._power([x], 2)
        return self._unknown(operands)

    def _quotient(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """The first operand is divided by the second."""
        x, y = operands
        number = self._numbers.get(y.value.number)
        if isinstance(x.standing, Moment) and number:
            return self._scaled(x.standing, 1 / number)
        if isinstance(x.standing, Shifted | Fixed) and self._is_level(y):
            return Shifted(x.standing.leaves) if changes(x.standing) else x.standing
        return self._unknown(operands)

    def _power(self, operands: list[_Operand], exponent: float | None) -> Standing:
        """An operand is multiplied by itself, or raised to another power."""
        x = operands[0].standing
        if exponent == 2 and isinstance(x, Shifted) and x.source:
            return Squared(x.leaves, x.source)
        if exponent == 2 and isinstance(x, Moment):
            return product_of_moments(x, x) or self._unknown(operands)
        return self._unknown(operands)

    def _summed(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """An operand is summed along axes."""
        ((value, x),) = operands
        axes = set(transfer.context.eqn.params["axes"])
        dim = self._units.dim(value)
        # A sum over other axes, too, would add up shifts that differ.
        if isinstance(x, Shifted | Squared) and x.source and axes == {dim}:
            others = tuple(number for number in range(len(value.axes)) if number != dim)
            kind = "sum" if isinstance(x, Shifted) else "squares"
            return Moment(x.leaves, x.source, kind, 1.0, others)
        if isinstance(x, Shifted) and dim not in axes:
            return Shifted(x.leaves)
        self._unknown(operands)
        return CENTRED if x == CENTRED and dim not in axes else None

    def _contracted(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """Two operands are contracted."""
        contracted, batch = laws.dot_dimension_numbers(transfer.context.eqn.params)
        pairs = list(zip(*contracted, strict=True))
        # Rows that are sorted by groups have no units along them, nor have the groups.
        return self._through_product(operands[:2], pairs, [set(dims) for dims in batch])

    def _convolved(self, transfer: Transfer, operands: list[_Operand]) -> Standing:
        """Channels are contracted with a kernel."""
        params = transfer.context.eqn.params
        if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
            return self._unknown(operands)
        inputs, kernel = params["dimension_numbers"][:2]
        pairs = [(inputs[1], kernel[1])]
        # Positions in space are shifted against each other.
        return self._through_product(operands, pairs, [set(inputs[2:]), set(kernel[2:])])

    def _through_product(
        self,
        operands: Sequence[_Operand],
        pairs: Sequence[tuple[int, int]],
        others: Sequence[set[int]],
    ) -> Standing:
        """Passes on what is not summed over.

        Args:
            operands: Two values.
            pairs: The axes of both that are summed over, with each other.
            others: For each the axes that are neither summed over nor passed on one by one.
        """
        x, y = operands
        for side, (one, other) in enumerate(((x, y), (y, x))):
            dim = self._units.dim(one.value)
            if not isinstance(one.standing, Shifted | Fixed) or dim is None or dim in others[side]:
                continue
            if changes(other.standing):
                # The other may be what is shifted, and this one centred.
                continue
            partners = [pair[1 - side] for pair in pairs if pair[side] == dim]
            if not partners:
                return Shifted(one.standing.leaves) if changes(one.standing) else one.standing
            # What is added to all units alike meets units whose sum is 0.
            if other.standing == CENTRED and self._units.dim(other.value) in partners:
                return None
        return self._unknown(operands)

    def _is_level(self, operand: _Operand) -> bool:
        """Whether an operand is the same at all units, whatever shifts there are."""
        if operand.standing == LEVEL:
            return True
        return operand.standing is None and not self._units.dims(operand.value)

    def _scaled(self, moment: Moment, number: float) -> Standing:
        return moment._replace(factor=moment.factor * number)
