"""Following the values that the units of a group take part in, equation by equation.

What becomes of their powers (see `width_powers`) goes by the laws of primitives, as what may be
rotated does. `widths` asks where a trail begins, and what comes of the demands.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.extend import core

from otfusion_jax.tracing import laws
from otfusion_jax.tracing.axis import Axis, Kind
from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.laws import FORMS, Law, law_of
from otfusion_jax.tracing.records import Transfer
from otfusion_jax.tracing.values import TracedValue, sizes_of
from otfusion_jax.tracing.width_powers import NOTHING, SAME_NUMBER, Number, Power, as_power


class Demand(NamedTuple):
    """A power that has to be 0, and the source line that demands it."""

    produced: Number
    consumed: Number
    width: Number
    source: str


Occurrences = Callable[[Axis], tuple[int, ...]]
"""From an axis to the axis variables of the groups whose units lie along it."""


@dataclasses.dataclass
class Trail:
    """The values that the units of one group take part in, as they are followed.

    Attributes:
        interpreter: The finished pass over the program.
        occurrences: What finds the units along an axis.
        variable: The axis variable of the units.
        size: The number of units.
    """

    interpreter: Interpreter
    occurrences: Occurrences
    variable: int
    size: int

    def __post_init__(self) -> None:
        self.powers: dict[int, Power] = {}
        self.demands: list[Demand] = []
        self.constants: list[float] = []
        self._at: Transfer | None = None

    def dims_of(self, value: TracedValue) -> list[int]:
        """Returns the numbers of the axes of a value that the units lie along."""
        dims = []
        for dim, axis in enumerate(value.axes):
            dims += [dim] * self.occurrences(axis).count(self.variable)
        return dims

    def follow(self, transfer: Transfer) -> list[int]:
        """Goes through an equation.

        Args:
            transfer: The equation, once all before it have been gone through.

        Returns:
            The numbers of results that have a power now.
        """
        self._at = transfer
        found = []
        powers = self._results(transfer)
        for value, power in zip(transfer.results, powers, strict=True):
            if power is None or (power.order > 0 and not self.dims_of(value)):
                # Of queries, keys and values beside each other, a part may have no units of these.
                continue
            if value.number is not None and value.number not in self.powers:
                self.powers[value.number] = power
                found.append(value.number)
        return found

    def demand(self, power: Power, source: str | None = None) -> None:
        """Notes that a power has to be 0.

        Args:
            power: The power.
            source: What demands it; None for the equation at hand.
        """
        if source is None:
            assert self._at is not None, "an equation demands it"
            source = self._at.context.because()
        demand = Demand(power.produced, power.consumed, power.width, source)
        if any(demand[:3]):
            self.demands.append(demand)

    def _results(self, transfer: Transfer) -> list[Power | None]:
        """Returns the powers of the results of an equation, None where they have none."""
        operands, eqn = transfer.operands, transfer.context.eqn
        law = law_of(eqn.primitive)
        count = len(transfer.results)
        if law is not laws.moving and not self._is_by_number(law, operands):
            self._leave_read(operands)
        powers = [self._power(value) for value in operands]
        if all(power is None for power in powers):
            return [None] * count
        if transfer.form in ("choice", "again"):
            return [self._alike(operands)] * count
        if law is None or transfer.form == "call":
            return [self._ended(powers)] * count
        if law is laws.one_by_one:
            # Each operand comes out again, as at a checkpoint.
            return powers
        if law is laws.mul or law is laws.div:
            return [self._product(operands, -1 if law is laws.div else 1)]
        if law in _PRODUCTS:
            return [self._contracted(transfer)]
        if law is laws.singular_values:
            return [self._of_singular_values(operands[0])] * count
        if law is laws.reduce_sum:
            return [self._summed(operands[0], eqn.params["axes"])]
        if law in (laws.ordered, laws.equal):
            # Which of two is larger stays the same if both grow alike.
            self._alike(operands)
            return [None]
        degree = self._degree(transfer)
        if degree is not None:
            return [None if powers[0] is None else powers[0].scaled(degree)]
        if law in _ALIKE:
            return [self._alike([operands[position] for position in _ALIKE[law](operands)])] * count
        if law in _FIRST:
            return [powers[_FIRST[law]]] * count
        return [self._ended(powers)] * count

    def _power(self, value: TracedValue) -> Power | None:
        return None if value.number is None else self.powers.get(value.number)

    def _is_by_number(self, law: Law | None, operands: Sequence[TracedValue]) -> bool:
        """Whether an equation multiplies a value by a number that is known, or divides it."""
        if law is not laws.mul and law is not laws.div:
            return False
        return any(value.number in self.interpreter.numbers for value in operands)

    def _leave_read(self, operands: Sequence[TracedValue]) -> None:
        """Ends to follow what a parameter has read: all that multiplies it has been seen."""
        for value in operands:
            power = self._power(value)
            if power is not None and power.is_read and value.number is not None:
                self.demand(power)
                del self.powers[value.number]

    def _ended(self, powers: Sequence[Power | None]) -> None:
        """Demands that nothing changes what an equation takes."""
        for power in powers:
            if power is not None:
                self.demand(power)

    def _of_singular_values(self, value: TracedValue) -> None:
        """Refuses other numbers of units in a matrix: it would have other singular values, too.

        An isometry keeps those that there are and may add zeros, which are the smallest.
        """
        power = self._power(value)
        if self.dims_of(value):
            power = Power(width=1)
        self._ended([power])

    def _alike(self, operands: Sequence[TracedValue]) -> Power | None:
        """Values are added, or one of them is taken."""
        terms = []
        for value in operands:
            number = self.interpreter.numbers.get(value.number, 1.0)
            # Nothing is 0 or infinite, whatever it is multiplied by.
            is_any = self.interpreter.is_zero(value) or number == 0 or not math.isfinite(number)
            if not is_any:
                terms.append(self._power(value) or NOTHING)
        if not terms:
            return None
        order = max([power.order for power in terms])
        first, *others = [power.lifted(order) for power in terms]
        for power in others:
            self.demand(first.plus(power, -1))
        # A norm to which a number is added stays as it is, and so does all that is made of it.
        stays = order == 0 and NOTHING in terms
        return None if stays else first

    def _product(self, operands: Sequence[TracedValue], sign: int) -> Power | None:
        """Two values are multiplied, or with sign -1 the first is divided by the second."""
        total = NOTHING
        for value, times in zip(operands, (1, sign), strict=True):
            power = self._power(value)
            if power is not None:
                total = total.plus(power, times)
        for value, other, times in zip(operands, operands[::-1], (1, sign), strict=True):
            number = self.interpreter.numbers.get(value.number)
            if number is None or self._power(value) is not None:
                continue
            if total.count != 1 and math.isclose(number, total.count**-times, rel_tol=SAME_NUMBER):
                # A sum over tokens becomes their mean.
                total = total._replace(count=1)
            elif not (total.is_read and self._is_of_others(number, other)):
                width = self._power_of(number)
                total = total._replace(width=total.width + times * width)
        return total

    def _is_of_others(self, number: float, value: TracedValue) -> bool:
        """Whether a number is a power of the number of other units that it multiplies.

        Queries are made of the stream, and divided by the root of the number of *their* dimensions.
        """
        for axis, size in zip(value.axes, sizes_of(value), strict=True):
            is_other = any(variable != self.variable for variable in self.occurrences(axis))
            if is_other and as_power(abs(number), size) is not None:
                return True
        return False

    def _power_of(self, number: float) -> Number:
        """Returns which power of the number of units a number is; other numbers are noted."""
        magnitude = abs(number)
        if magnitude in (0, 1) or not math.isfinite(magnitude):
            return 0
        power = as_power(magnitude, self.size)
        if power is None:
            self.constants.append(number)
            return 0
        return power

    def _summed(self, value: TracedValue, axes: Sequence[int]) -> Power | None:
        """A value is summed along axes, some of which may have the units."""
        power = self._power(value)
        dims = self.dims_of(value)
        if power is None:
            return None
        for dim in dims:
            if dim in axes:
                power = power.summed(_order_along(power, dims))
        for dim, size in enumerate(sizes_of(value)):
            if dim in axes and dim not in dims:
                power = power._replace(count=power.count * max(size, 1))
        return power

    def _degree(self, transfer: Transfer) -> Number | None:
        """Returns the degree of a function of one number; None of what is no such function."""
        eqn = transfer.context.eqn
        name = eqn.primitive.name
        if name == "integer_pow":
            return int(eqn.params["y"])
        if name == "square":
            return 2
        if name == "pow":
            number = self.interpreter.numbers.get(transfer.operands[1].number)
            return None if number is None else laws.exponent_of(number)
        return FORMS[name].degree if name in FORMS else None

    def _contracted(self, transfer: Transfer) -> Power | None:
        """Two values are contracted, over the units or over other axes."""
        # Further operands are numbers of rows.
        x, y, *_ = transfer.operands
        eqn = transfer.context.eqn
        total = NOTHING
        for value in (x, y):
            total = total.plus(self._power(value) or NOTHING)
        is_summed = False
        for i, j in _contracted_dims(eqn):
            order = 0
            meets = False
            for value, dim in ((x, i), (y, j)):
                dims = self.dims_of(value)
                power = self._power(value)
                meets = meets or dim in dims
                if power is not None and dim in dims:
                    order += _order_along(power, dims)
            if meets:
                total = total.summed(order)
                is_summed = True
        is_of_features = x.kind is Kind.FEATURE and y.kind is Kind.FEATURE
        is_read = is_summed and total.order == 0 and not is_of_features
        return total._replace(is_read=is_read, count=1)


def _order_along(power: Power, dims: Sequence[int]) -> int:
    """Returns the order of a value along one of its axes with units."""
    # A parameter from units to units is a vector along each of the two.
    return power.order if len(dims) == 1 else 1


def _contracted_dims(eqn: core.JaxprEqn) -> list[tuple[int, int]]:
    """Returns the axes of both operands that a contraction sums over, index by index."""
    if laws.law_of(eqn.primitive) is laws.conv_general_dilated:
        numbers = eqn.params["dimension_numbers"]
        return [(numbers.lhs_spec[1], numbers.rhs_spec[1])]
    contracted, _ = laws.dot_dimension_numbers(eqn.params)
    return list(zip(*contracted, strict=True))


def _all(operands: Sequence[TracedValue]) -> range:
    return range(len(operands))


_PRODUCTS: tuple[Law, ...] = (laws.dot_general, laws.ragged_dot, laws.conv_general_dilated)
"""Laws of what multiplies two operands and sums over axes of both."""

_ALIKE: dict[Law | None, Callable[[Sequence[TracedValue]], Sequence[int]]] = {
    laws.adding: _all,
    laws.concatenate: _all,
    laws.extremum: _all,
    laws.extremum_along_others: _all,
    laws.select_n: lambda operands: range(1, len(operands)),
    laws.dynamic_update_slice: lambda _: (0, 1),
    laws.scatter: lambda _: (0, 2),
}
"""Which operands of an equation have to be multiplied alike, by the laws of primitives."""

_FIRST: dict[Law | None, int] = {
    laws.moving: 0,
    laws.gather: 0,
    laws.reduce_precision: 0,
    laws.tie: -1,
}
"""Which operand is passed on, by the laws of primitives."""
