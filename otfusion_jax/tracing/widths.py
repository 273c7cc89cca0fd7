"""By what rotated units have to be multiplied to become another number of units.

An isometry keeps inner products over the units, but a program divides some of them by numbers that
depend on how many units there are: a LayerNorm its sum of squares by n, attention its logits by the
square root of the number of dimensions. Here every value that the units of a group take part in is
followed, with the power of the number of units that it is multiplied by if that number changes. It
is a linear form in two unknowns, the powers for what produces the units and for what consumes them.
Where values are added, are bent by a nonlinearity or leave the program, the power has to be 0 or
that of the other term. These are linear equations, as those of units of measurement are.

A number that multiplies such a value counts as a power of the number of units if it is one, and
otherwise as a constant. Both networks are asked, and what one of them says by chance the other
would have to say by chance as well (see `symmetry.stretch.difference`).
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.stretch import Stretch
from otfusion_jax.tracing import laws
from otfusion_jax.tracing.axis import Kind
from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.laws import FORMS, UNCHANGED, law_of
from otfusion_jax.tracing.records import Transfer
from otfusion_jax.tracing.values import Axes, TracedValue, sizes_of

_Number = int | Fraction

_POWERS = tuple([Fraction(number, 2) for number in (-4, -3, -2, -1, 1, 2, 3, 4)])
"""The powers of the number of units that a number of a program is compared with."""

_SAME_NUMBER = 1e-5
"""By how much, relative to its size, a float32 may differ from the number that it stands for."""

_CONSISTENT = 1e-6
"""By how much equations between powers, which are small fractions, may be missed by rounding."""

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "neg": np.negative,
    "pow": np.float_power,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
"""What programs do to numbers that are known, such as the root of the number of dimensions."""


class Power(NamedTuple):
    """What a value is multiplied by if the number of units changes, a power of the ratio.

    Attributes:
        produced: How often it counts the power for what produces the units.
        consumed: How often it counts the power for what consumes them.
        width: What numbers of the program add to the power.
        order: How many of its factors are vectors with an entry for each unit: 0 of a norm, 1 of
            features, 2 of their squares.
        is_read: Whether a parameter has just consumed the units. Numbers may still multiply what
            comes of that; anything else ends where these units are followed.
    """

    produced: _Number = 0
    consumed: _Number = 0
    width: _Number = 0
    order: int = 0
    is_read: bool = False

    def plus(self, other: "Power", times: _Number = 1) -> "Power":
        """Returns the power of a product, or with `times` -1 of a quotient."""
        return self._replace(
            produced=self.produced + times * other.produced,
            consumed=self.consumed + times * other.consumed,
            width=self.width + times * other.width,
            order=self.order + other.order,
        )

    def scaled(self, degree: _Number) -> "Power":
        """Returns the power of a function of this degree."""
        order = int(degree * self.order)
        return Power(degree * self.produced, degree * self.consumed, degree * self.width, order)

    def lifted(self, order: int) -> "Power":
        """Returns the power with which it is added to a value of a higher order.

        An isometry takes the ones to the ones over the root of the ratio. So what is the same at
        all units is as a vector larger by half a power, and as a square by a whole one.
        """
        width = self.width + Fraction(order - self.order, 2)
        return self._replace(width=width, order=order)

    def summed(self, order: int) -> "Power":
        """Returns the power after a sum over all units, of values of an order along these."""
        # Sums of squares are kept, sums of numbers go with the root, how many there are as it is.
        width = self.width + Fraction(2 - order, 2)
        return self._replace(width=width, order=self.order - order)


NOTHING = Power()


class _Demand(NamedTuple):
    """A power that has to be 0, and the source line that demands it."""

    produced: _Number
    consumed: _Number
    width: _Number
    source: str


DimsOf = Callable[[Axes], tuple[int, ...]]
"""From the axes of a value to the numbers of those that the units of a group lie along."""


class Widths:
    """The equations of a program, to be asked what other numbers of units would do.

    Args:
        interpreter: The finished pass over the program.
    """

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter
        self._numbers = dict(interpreter.numbers)
        self._users: dict[int | None, list[int]] = {}
        for position, transfer in enumerate(interpreter.transfers):
            for value in transfer.operands:
                self._users.setdefault(value.number, []).append(position)
            self._note_number(transfer)

    def _note_number(self, transfer: Transfer) -> None:
        """Notes the result of an equation between numbers that are known."""
        eqn = transfer.context.eqn
        found = []
        for value in transfer.operands:
            found.append(self._numbers.get(value.number))
        if transfer.form != "equation" or len(transfer.results) != 1 or None in found or not found:
            return
        number = transfer.results[0].number
        function = _FUNCTIONS.get(eqn.primitive.name)
        with np.errstate(all="ignore"):
            if eqn.primitive in UNCHANGED:
                self._numbers[number] = found[0]
            elif function is not None:
                self._numbers[number] = float(function(*found))

    def stretch(self, group: Group, start: dict[int, Power], dims_of: DimsOf) -> Stretch:
        """Finds by what the units of a group are multiplied where they become another number.

        Args:
            group: The group, which rotates.
            start: The powers of the parameters that have the units, by the numbers of their values.
            dims_of: The axes of a value that the units lie along.

        Returns:
            The powers for both roles, the smallest that there are, or why there are none.
        """
        trail = _Trail(self._interpreter, self._numbers, group.size, dims_of, dict(start))
        waiting = []
        for number in start:
            waiting += self._users.get(number, [])
        heapq.heapify(waiting)
        last = -1
        while waiting:
            # In dataflow order, and each equation once.
            position = heapq.heappop(waiting)
            if position == last:
                continue
            last = position
            for number in trail.follow(self._interpreter.transfers[position]):
                waiting_now = self._users.get(number, [])
                for user in waiting_now:
                    heapq.heappush(waiting, user)
        for number, power in trail.powers.items():
            if power.order == 0 and number not in self._users:
                trail.demand(power, "an output")
        if any(role_is_both(group)):
            trail.demands.append(_Demand(1, -1, 0, "a parameter that produces and consumes"))
        return _solved(trail.demands, tuple(dict.fromkeys(trail.constants)))


def role_is_both(group: Group) -> list[bool]:
    """Says for each member of a group whether its leaf has the units in both roles on that axis."""
    roles: dict[tuple[int, int], set[str]] = {}
    for member in group.members:
        roles.setdefault((member.leaf, member.axis), set()).add(member.role)
    both = []
    for member in group.members:
        along = roles[(member.leaf, member.axis)]
        both.append("both" in along or len(along) > 1)
    return both


@dataclasses.dataclass
class _Trail:
    """The values that the units of one group take part in, as they are followed.

    Attributes:
        interpreter: The finished pass over the program.
        numbers: By the numbers of values those that are one number throughout.
        size: The number of units.
        dims_of: The axes of a value that the units lie along.
        powers: By the numbers of values their powers, so far.
    """

    interpreter: Interpreter
    numbers: dict[int | None, float]
    size: int
    dims_of: DimsOf
    powers: dict[int, Power]

    def __post_init__(self) -> None:
        self.demands: list[_Demand] = []
        self.constants: list[float] = []
        self._source = ""

    def follow(self, transfer: Transfer) -> list[int]:
        """Goes through an equation, and returns the numbers of results that were not known."""
        self._source = transfer.context.because()
        found = []
        powers = self._results(transfer)
        for value, power in zip(transfer.results, powers, strict=True):
            if power is not None and value.number is not None and value.number not in self.powers:
                self.powers[value.number] = power
                found.append(value.number)
        return found

    def demand(self, power: Power, source: str | None = None) -> None:
        """Notes that a power has to be 0."""
        source = self._source if source is None else source
        demand = _Demand(power.produced, power.consumed, power.width, source)
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
            return powers
        if law is laws.mul or law is laws.div:
            return [self._product(operands, -1 if law is laws.div else 1)]
        if law is laws.dot_general or law is laws.conv_general_dilated:
            return [self._contracted(transfer)]
        if law is laws.reduce_sum:
            return [self._summed(operands[0], eqn.params["axes"])]
        if law in (laws.ordered, laws.equal):
            self._alike(operands)
            return [None]
        degree = _degree(eqn)
        if degree is not None:
            return [None if powers[0] is None else powers[0].scaled(degree)]
        if law in _ALIKE:
            return [self._alike([operands[position] for position in _ALIKE[law](operands)])] * count
        if law in _FIRST:
            return [powers[_FIRST[law]]] * count
        return [self._ended(powers)] * count

    def _power(self, value: TracedValue) -> Power | None:
        return None if value.number is None else self.powers.get(value.number)

    def _is_by_number(self, law: laws.Law | None, operands: Sequence[TracedValue]) -> bool:
        """Whether an equation multiplies a value by a number that is known, or divides it."""
        if law is not laws.mul and law is not laws.div:
            return False
        return any(value.number in self.numbers for value in operands)

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

    def _alike(self, operands: Sequence[TracedValue]) -> Power | None:
        """Values are added, or one of them is taken."""
        terms = []
        for value in operands:
            number = self.numbers.get(value.number, 1.0)
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
                total = total.plus(power, times)._replace(is_read=total.is_read or power.is_read)
        for value, other, times in zip(operands, operands[::-1], (1, sign), strict=True):
            number = self.numbers.get(value.number)
            if number is not None and self._power(value) is None:
                explained = total.is_read and _is_of_others(number, other, self.dims_of)
                width = 0 if explained else self._power_of(number)
                total = total._replace(width=total.width + times * width)
        return total

    def _power_of(self, number: float) -> _Number:
        """Returns which power of the number of units a number is; other numbers are noted."""
        magnitude = abs(number)
        if magnitude in (0, 1) or not math.isfinite(magnitude):
            return 0
        power = _as_power(magnitude, self.size)
        if power is None:
            self.constants.append(number)
            return 0
        return power

    def _summed(self, value: TracedValue, axes: Sequence[int]) -> Power | None:
        """A value is summed along axes, some of which may have the units."""
        power = self._power(value)
        dims = self.dims_of(value.axes)
        for dim in dims:
            if power is not None and dim in axes:
                power = power.summed(_order_along(power, dims))
        return power

    def _contracted(self, transfer: Transfer) -> Power | None:
        """Two values are contracted, over the units or over other axes."""
        (x, y), eqn = transfer.operands, transfer.context.eqn
        total = NOTHING
        for value in (x, y):
            total = total.plus(self._power(value) or NOTHING)
        is_summed = False
        for i, j in _contracted_dims(eqn):
            order = 0
            meets = False
            for value, dim in ((x, i), (y, j)):
                dims = self.dims_of(value.axes)
                power = self._power(value)
                meets = meets or dim in dims
                if power is not None and dim in dims:
                    order += _order_along(power, dims)
            if meets:
                total = total.summed(order)
                is_summed = True
        is_of_features = x.kind is Kind.FEATURE and y.kind is Kind.FEATURE
        return total._replace(is_read=is_summed and total.order == 0 and not is_of_features)


def _order_along(power: Power, dims: Sequence[int]) -> int:
    """Returns the order of a value along one of its axes with units."""
    # A parameter from units to units is a vector along each of the two.
    return power.order if len(dims) == 1 else 1


def _contracted_dims(eqn: core.JaxprEqn) -> list[tuple[int, int]]:
    """Returns the axes of both operands that a contraction sums over, index by index."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        return list(zip(*numbers[0], strict=True))
    return [(numbers.lhs_spec[1], numbers.rhs_spec[1])]


def _degree(eqn: core.JaxprEqn) -> _Number | None:
    """Returns the degree of a function of one number; None of what is no such function."""
    name = eqn.primitive.name
    if name == "integer_pow":
        return int(eqn.params["y"])
    if name == "square":
        return 2
    return FORMS[name].degree if name in FORMS else None


def _as_power(magnitude: float, size: int) -> Fraction | None:
    """Returns which power of a number of units a number is; None if it is none."""
    for power in _POWERS:
        if math.isclose(magnitude, size ** float(power), rel_tol=_SAME_NUMBER):
            return power
    return None


def _is_of_others(number: float, value: TracedValue, dims_of: DimsOf) -> bool:
    """Whether a number is a power of the size of another axis of the value that it multiplies.

    Queries are made of the stream and divided by the root of the number of *their* dimensions.
    """
    own = dims_of(value.axes)
    for dim, size in enumerate(sizes_of(value)):
        if dim not in own and size > 1 and _as_power(abs(number), size) is not None:
            return True
    return False


def _all(operands: Sequence[TracedValue]) -> range:
    return range(len(operands))


_ALIKE: dict[laws.Law | None, Callable[[Sequence[TracedValue]], Sequence[int]]] = {
    laws.adding: _all,
    laws.concatenate: _all,
    laws.extremum: _all,
    laws.extremum_along_others: _all,
    laws.select_n: lambda operands: range(1, len(operands)),
    laws.dynamic_update_slice: lambda _: (0, 1),
    laws.scatter: lambda _: (0, 2),
}
"""Which operands of an equation have to be multiplied alike, by the laws of primitives."""

_FIRST: dict[laws.Law | None, int] = {
    laws.moving: 0,
    laws.gather: 0,
    laws.reduce_precision: 0,
    laws.tie: -1,
}
"""Which operand is passed on, by the laws of primitives."""


def _solved(demands: Sequence[_Demand], constants: tuple[float, ...]) -> Stretch:
    """Solves the equations, each of which a source line demands."""
    powers = np.zeros(2)
    distinct: dict[tuple[_Number, ...], str] = {}
    for demand in demands:
        distinct.setdefault(demand[:3], demand.source)
    rows: list[tuple[float, ...]] = []
    for equation, source in distinct.items():
        rows.append(tuple(map(float, equation)))
        matrix = np.array(rows)
        # Of several solutions the smallest, which shares a factor evenly between both roles.
        powers = np.linalg.lstsq(matrix[:, :2], -matrix[:, 2], rcond=None)[0]
        misses = np.abs(matrix[:, :2] @ powers + matrix[:, 2])
        if np.max(misses) > _CONSISTENT:
            return Stretch(refused=f"no factor makes up for another number of units in {source}")
    produced, consumed = [float(Fraction(x).limit_denominator(1000)) for x in powers]
    return Stretch(produced, consumed, constants)
