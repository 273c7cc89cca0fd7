"""What each primitive does to units that are mixed, and not only put in another order.

A rule says which axes move together under permutations. A *law* says how what stands at the units
of one group goes through an equation: whether it is added up, multiplied or bent by a function. It
is written in the words of an `Algebra`, one for each question that is asked of a program:

- `alike`: values are added unit by unit, or are alternatives. All have to stand alike.
- `product`, `quotient`, `power`: values are multiplied unit by unit.
- `contracted`, `summed`: products, or values, are summed over the units.
- `function`, `extremum`, `compared`: a function of single values that is odd or even, or that takes
  positive factors out; the largest or smallest of values; whether one is larger than another.
- `alternatives`: one of several values is taken, and which one is said by another value.
- `other`: any other function. It demands that units are permuted at most.

A primitive without a law is `other`: what is not stated is not allowed. So the table in this module
is the whole of what is claimed. CONTRIBUTING.md says how to add to it.
"""

import abc
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.primitives import named
from otfusion_jax.tracing.rules.families import ONE_BY_ONE, P


class Zero:
    """The standing of a value that is 0 at every unit, however the units move."""


ZERO = Zero()

Standing = Any
"""How a value stands to the units of a group, as an algebra says it. None where the value is the
same at all units, or does not lie along them; `ZERO` where it is 0."""


class Form(NamedTuple):
    """What a function of single numbers does to signs and to positive factors.

    Attributes:
        parity: 1 of an odd function, `f(-x) = -f(x)`; 0 of an even one, `f(-x) = f(x)`; None of one
            that is neither.
        degree: The d of `f(c x) = c^d f(x)` for all `c > 0`; None if there is none.
    """

    parity: int | None = None
    degree: Fraction | int | None = None


@dataclasses.dataclass(frozen=True)
class PerAxis:
    """How a value stands to units that lie along several of its axes, along each by itself.

    Attributes:
        standings: The numbers of these axes, each with how the value stands along it.
    """

    standings: tuple[tuple[int, Standing], ...]

    def along(self, dim: int) -> Standing:
        """Returns how the value stands along one of its axes."""
        return dict(self.standings).get(dim)


class Algebra(abc.ABC):
    """What can be done to how values stand to the units of one group.

    Every method takes standings, of which any may be None or `ZERO`, and returns one.
    """

    @abc.abstractmethod
    def alike(self, standings: Sequence[Standing]) -> Standing:
        """Values are added unit by unit, subtracted, or one of them is taken."""

    @abc.abstractmethod
    def product(self, x: Standing, y: Standing) -> Standing:
        """Two values are multiplied unit by unit."""

    @abc.abstractmethod
    def quotient(self, x: Standing, y: Standing) -> Standing:
        """A value is divided by another, unit by unit."""

    @abc.abstractmethod
    def power(self, x: Standing, exponent: int) -> Standing:
        """A value is raised to an integer power, unit by unit."""

    @abc.abstractmethod
    def contracted(self, x: Standing, y: Standing) -> None:
        """Products of two values are summed over all units."""

    @abc.abstractmethod
    def summed(self, x: Standing) -> None:
        """A value is summed over all units."""

    @abc.abstractmethod
    def other(self, standings: Sequence[Standing], unknown: bool = False) -> Standing:
        """Anything else is done to values; what comes of it may be unknown altogether."""

    def function(self, x: Standing, form: Form) -> Standing:
        """A function of single values is applied, unit by unit."""
        return self.other([x])

    def extremum(self, standings: Sequence[Standing]) -> Standing:
        """The largest or the smallest of values is taken, unit by unit."""
        return self.other(standings)

    def compared(self, standings: Sequence[Standing], *, ordered: bool) -> Standing:
        """Values are compared unit by unit: which is larger, or whether they are equal."""
        return self.other(standings)

    def alternatives(self, choices: Sequence[Standing], cases: Sequence[Standing]) -> Standing:
        """One of several values is taken, unit by unit, as other values say."""
        if any(map(_varies, choices)):
            return self.other([*choices, *cases])
        return self.alike(cases)

    @abc.abstractmethod
    def along_several(self, standings: Sequence[Standing]) -> Standing:
        """The units lie along several axes of a value, as of a kernel from units to themselves."""


@dataclasses.dataclass(frozen=True)
class UnitFlow:
    """How the units of one group go through one equation.

    Attributes:
        name: The name of the primitive.
        params: The parameters of the equation.
        result_types: For each result its abstract value, with a dtype.
        standings: For each operand how it stands to the units.
        operand_dims: For each operand the numbers of the axes that the units lie along.
        result_dims: The same for each result.
        numbers: For each operand the number that it is throughout; None where that is not known.
        may_hold: For each operand whether units lie along an axis of it, or could, as they could
            along one on which it is constant and that is long enough.
    """

    name: str
    params: dict[str, Any]
    result_types: tuple[Any, ...]
    standings: tuple[Standing, ...]
    operand_dims: tuple[tuple[int, ...], ...]
    result_dims: tuple[tuple[int, ...], ...]
    numbers: tuple[float | None, ...]
    may_hold: tuple[bool, ...]

    def quantises(self) -> bool:
        """Whether what differs from unit to unit becomes whole numbers, or others that are few."""
        if not any(map(_varies, self.standings)):
            return False
        is_single = len(self.result_types) == 1
        for result, dims in zip(self.result_types, self.result_dims, strict=True):
            # Of several results those without units may come from other operands.
            if (is_single or dims) and not rounds_finely(result.dtype):
                return True
        return False

    def all_along_the_same(self) -> bool:
        """Whether all operands that differ from unit to unit lie along the axes of the results."""
        for standing, dims in zip(self.standings, self.operand_dims, strict=True):
            if _varies(standing) and any(dims != along for along in self.result_dims):
                return False
        return True

    def for_results(self, standing: Standing) -> list[Standing]:
        """Returns a standing for each result that the units lie along, None for the others."""
        return [standing if dims else None for dims in self.result_dims]


def rounds_finely(dtype: Any) -> bool:
    """Whether a dtype rounds numbers relative to their size, and not by much.

    Eight bits hold so few numbers that what is rotated and rounded is another model.
    """
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16


Law = Callable[[UnitFlow, Algebra], list[Standing]]
"""From the operands of an equation to how its results stand."""

_laws: dict[core.Primitive, Law] = {}


def law(members: Iterable[core.Primitive]) -> Callable[[Law], Law]:
    """Declares the law of some primitives. To be used as a decorator.

    Args:
        members: The primitives, of which a version of JAX may have none.

    Returns:
        The decorator, which leaves the function as it is.
    """

    def add(function: Law) -> Law:
        for primitive in members:
            _laws[primitive] = function
        return function

    return add


def law_of(primitive: core.Primitive) -> Law | None:
    """Returns the law of a primitive; None if it has none."""
    return _laws.get(primitive)


# --- the same numbers, elsewhere

MOVING = named(
    "broadcast_in_dim convert_element_type copy cumsum dynamic_slice imag neg real conj "
    "reduce_window_sum reshape rev slice split squeeze stop_gradient transpose"
)
MOVING += [
    *primitives.NAME,
    *primitives.SPLIT,
    *primitives.TILE,
    *primitives.UNSTACK,
]
"""What is linear in its first operand and treats all units alike. Other operands are positions."""


UNCHANGED = named("broadcast_in_dim convert_element_type copy reshape squeeze transpose")
"""What has the same numbers as its operand, all of them."""


@law(MOVING)
def moving(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Passed on: the first operand, in another shape, order or sign."""
    first, *positions = flow.standings
    if any(_varies(position) for position in positions):
        return flow.for_results(algebra.other(flow.standings))
    if isinstance(first, PerAxis):
        return flow.for_results(_moved_axes(flow, first, algebra))
    return flow.for_results(first)


def _moved_axes(flow: UnitFlow, x: PerAxis, algebra: Algebra) -> Standing:
    """Follows axes through what transposes, or leaves axes where they are."""
    permutation = flow.params.get("permutation")
    if permutation is not None:
        moved = [(permutation.index(dim), standing) for dim, standing in x.standings]
        return PerAxis(tuple(sorted(moved, key=operator.itemgetter(0))))
    if len(flow.result_dims) == 1 and flow.result_dims[0] == flow.operand_dims[0]:
        return x
    return algebra.other([x])


@law([P.gather_p])
def gather(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Passed on; where positions are out of bounds, numbers that are given may take the place."""
    fill = flow.params["fill_value"]
    fills = flow.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    x, positions = flow.standings
    # NaN, which it is if nothing is said, stays NaN however units are mixed.
    if not fills or fill is None or fill == 0 or np.isnan(fill):
        return moving(flow, algebra)
    return _alternatives(flow, algebra, [x, None], [positions])


@law(named("reduce_precision"))
def reduce_precision(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Passed on, if numbers are rounded no more than half precision does."""
    coarsest = jnp.finfo(jnp.bfloat16).nmant, jnp.finfo(jnp.float16).nexp
    bits = flow.params["mantissa_bits"], flow.params["exponent_bits"]
    if bits[0] < coarsest[0] or bits[1] < coarsest[1]:
        return flow.for_results(algebra.other(flow.standings))
    return moving(flow, algebra)


@law(ONE_BY_ONE)
def one_by_one(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Passed on, each operand by itself."""
    return list(flow.standings)


@law(primitives.TIE)
def tie(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Passed on: the last operand, which waits for the others."""
    return [flow.standings[-1]]


# --- sums and alternatives, unit by unit


@law(named("add add_jaxvals sub pad") + primitives.STACK)
def adding(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Added, or put side by side along other axes: all operands stand alike."""
    return flow.for_results(algebra.alike(flow.standings))


@law([P.select_n_p])
def select_n(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """One of several is taken, and the first operand says which."""
    choice, *cases = flow.standings
    return _alternatives(flow, algebra, cases, [choice])


@law([P.dynamic_update_slice_p])
def dynamic_update_slice(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Written into: the operand and the update stand alike."""
    x, update, *positions = flow.standings
    return _alternatives(flow, algebra, [x, update], positions)


@law(named("scatter scatter_add") + primitives.SCATTER_SUB)
def scatter(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Written or added at positions: the operand and the updates stand alike."""
    x, positions, updates = flow.standings
    if flow.name == "scatter" and not _replaces(flow.params.get("update_jaxpr")):
        # `x.at[i].apply(f)` is a scatter, too, of any function.
        return flow.for_results(algebra.other(flow.standings))
    return _alternatives(flow, algebra, [x, updates], [positions])


def _replaces(jaxpr: Any) -> bool:
    """Whether a function of an old and a new value returns the new one."""
    if jaxpr is None:
        return True
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return not inner.eqns and list(inner.outvars) == list(inner.invars[1:])


def _alternatives(
    flow: UnitFlow,
    algebra: Algebra,
    cases: Sequence[Standing],
    positions: Sequence[Standing],
) -> list[Standing]:
    """Takes one of several cases."""
    return flow.for_results(algebra.alternatives(positions, cases))


@law([P.concatenate_p])
def concatenate(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Put one after the other: units along the axis stay apart, along others they stand alike."""
    along = flow.params["dimension"]
    if set(flow.result_dims[0]) == {along}:
        # Each segment has units of its own, or none. Constants may be read as more of them further
        # on, as by a reshape of `[units, ones]` to two rows.
        met = zip(flow.standings, flow.may_hold, strict=True)
        standings = [standing for standing, may_hold in met if may_hold]
        return flow.for_results(algebra.alike(standings))
    return adding(flow, algebra)


# --- products, unit by unit


@law([P.mul_p])
def mul(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Multiplied."""
    return flow.for_results(algebra.product(*flow.standings))


@law([P.div_p])
def div(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Divided."""
    return flow.for_results(algebra.quotient(*flow.standings))


@law(named("square"))
def square(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Multiplied by itself."""
    return flow.for_results(algebra.power(flow.standings[0], 2))


@law([P.integer_pow_p])
def integer_pow(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Raised to a power."""
    return flow.for_results(algebra.power(flow.standings[0], flow.params["y"]))


_LARGEST_DENOMINATOR = 12
_SAME_FRACTION = 1e-6


def exponent_of(number: float) -> Fraction | None:
    """Returns the fraction that a floating-point exponent stands for; None if it is none.

    Args:
        number: The exponent, which for a third is a float32 next to it.
    """
    if not math.isfinite(number):
        return None
    fraction = Fraction(number).limit_denominator(_LARGEST_DENOMINATOR)
    return fraction if math.isclose(fraction, number, rel_tol=_SAME_FRACTION) else None


@law([P.pow_p])
def raised(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Raised to a power that may be any number; what it is, is known, or it is another function."""
    x, exponent = flow.standings
    number = flow.numbers[1]
    fraction = None if number is None else exponent_of(number)
    if _varies(exponent) or fraction is None:
        return flow.for_results(algebra.other(flow.standings))
    if fraction.denominator == 1:
        return flow.for_results(algebra.power(x, int(fraction)))
    # Of a negative number it is NaN, and so it is of its multiples.
    return flow.for_results(algebra.function(x, Form(None, fraction)))


POWERS: tuple[Law, ...] = (square, integer_pow, raised)
"""Laws of powers."""


# --- functions of single values

FORMS: dict[str, Form] = {
    "abs": Form(0, 1),
    "sign": Form(1, 0),
    "cbrt": Form(1, Fraction(1, 3)),
    "sqrt": Form(None, Fraction(1, 2)),
    "rsqrt": Form(None, Fraction(-1, 2)),
    **dict.fromkeys(("sin", "asin", "sinh", "asinh", "tan", "atan", "tanh", "atanh"), Form(1)),
    **dict.fromkeys(("erf", "erf_inv", "round"), Form(1)),
    **dict.fromkeys(("cos", "cosh"), Form(0)),
}
"""What functions do to signs and factors, by the names of primitives. Others do neither."""


@law(named(" ".join(FORMS)))
def function(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """A function of each value by itself."""
    return flow.for_results(algebra.function(flow.standings[0], FORMS[flow.name]))


@law(named("max min clamp"))
def extremum(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """The largest or the smallest, unit by unit."""
    return flow.for_results(algebra.extremum(flow.standings))


@law(named("reduce_max reduce_min reduce_window_max reduce_window_min"))
def extremum_along_others(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """The largest or the smallest along axes without units; among units it is another function."""
    if flow.operand_dims[0] and not flow.result_dims[0]:
        return flow.for_results(algebra.other(flow.standings))
    return flow.for_results(algebra.extremum(flow.standings))


@law(named("gt lt ge le"))
def ordered(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Which of two is larger."""
    return flow.for_results(algebra.compared(flow.standings, ordered=True))


@law(named("eq ne"))
def equal(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Whether two are equal."""
    return flow.for_results(algebra.compared(flow.standings, ordered=False))


COMPARISONS: tuple[Law, ...] = (ordered, equal)
"""Laws of what makes truth values of numbers, which are meant to be few."""


# --- sums over units


@law([P.reduce_sum_p])
def reduce_sum(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Summed, where the units lie along a reduced axis; passed on along others."""
    (x,) = flow.standings
    reduced = set(flow.params["axes"])
    if reduced.intersection(flow.operand_dims[0]):
        algebra.summed(x)
    return flow.for_results(x)


@law([P.dot_general_p])
def dot_general(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Contracted, multiplied along batch axes, passed on along free ones."""
    return _products(flow, algebra)


@law(primitives.RAGGED_DOT)
def ragged_dot(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """As `dot_general`: there are no units along the rows, nor along groups of them."""
    if any(map(_varies, flow.standings[2:])):
        return flow.for_results(algebra.other(flow.standings))
    return _products(flow, algebra)


def dot_dimension_numbers(params: dict[str, Any]) -> Any:
    """Returns the axes that an equation sums over, and those of its batch, of both operands each.

    Args:
        params: The parameters of the equation, a `dot_general` or a `ragged_dot_general`.
    """
    ragged = params.get("ragged_dot_dimension_numbers")
    return params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers


def _products(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Says how the result of a contraction stands."""
    contracted, batch = dot_dimension_numbers(flow.params)
    free: list[Standing] = []
    for operand, (dims, over, along) in enumerate(
        zip(flow.operand_dims[:2], contracted, batch, strict=True)
    ):
        # Each axis that is left goes on as it is. Of several the same is said, or none is right.
        for dim in sorted(set(dims).difference(over, along)):
            free.append(_along(flow, operand, dim))
    for i, j in zip(*contracted, strict=True):
        pair = _along(flow, 0, i), _along(flow, 1, j)
        if any(map(_varies, pair)):
            algebra.contracted(*pair)
    for i, j in zip(*batch, strict=True):
        pair = _along(flow, 0, i), _along(flow, 1, j)
        if any(map(_varies, pair)):
            free.append(algebra.product(*pair))
    return flow.for_results(algebra.alike(free) if free else None)


@law([P.conv_general_dilated_p])
def conv_general_dilated(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Input channels are contracted, output channels and samples passed on; in groups, other."""
    numbers = flow.params["dimension_numbers"]
    if flow.params["feature_group_count"] > 1 or flow.params["batch_group_count"] > 1:
        return flow.for_results(algebra.other(flow.standings))
    _, channels = numbers.lhs_spec[:2]
    outputs, inputs = numbers.rhs_spec[:2]
    pair = _along(flow, 0, channels), _along(flow, 1, inputs)
    if any(map(_varies, pair)):
        algebra.contracted(*pair)
    free: list[Standing] = []
    for dim in sorted(set(flow.operand_dims[0]) - {channels}):
        free.append(_along(flow, 0, dim))
    if outputs in flow.operand_dims[1]:
        free.append(_along(flow, 1, outputs))
    return flow.for_results(algebra.alike(free) if free else None)


@law([P.svd_p])
def singular_values(flow: UnitFlow, algebra: Algebra) -> list[Standing]:
    """Of the singular values alone, rows or columns may be rotated, as in a sum of squares."""
    # Where there is a matrix for each unit, its singular values are not linear in it.
    has_batch = any(flow.result_dims)
    if flow.params["compute_uv"] or has_batch:
        standing = algebra.other(flow.standings)
        return flow.for_results(standing)
    (dims,) = flow.operand_dims
    for dim in sorted(set(dims)):
        standing = _along(flow, 0, dim)
        if _varies(standing):
            algebra.contracted(standing, standing)
    return flow.for_results(None)


SINGLE: tuple[Law, ...] = (
    moving,
    gather,
    reduce_precision,
    one_by_one,
    tie,
    reduce_sum,
    dot_general,
    ragged_dot,
    conv_general_dilated,
    singular_values,
)
"""Laws of what adds nothing up unit by unit, so that it does not matter which axes units are on."""


AXIS_BY_AXIS: tuple[Law, ...] = (
    moving,
    dot_general,
    ragged_dot,
    conv_general_dilated,
    singular_values,
)
"""Laws that say of each axis of an operand what becomes of it, see `PerAxis`."""


def keeps_zero(primitive: core.Primitive, zeros: Sequence[bool]) -> bool:
    """Says whether the results of an equation are 0 for certain.

    Args:
        primitive: The primitive of the equation.
        zeros: For each operand whether it is known to be 0.
    """
    # What is moved is the first operand, others are positions. Of factors one is enough.
    counts: dict[Law | None, int] = {moving: 1, div: 1, mul: 2}
    return any(zeros[: counts.get(law_of(primitive), 0)])


_ARITHMETIC: dict[str, Callable[..., Any]] = {
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


def number_made(eqn: core.JaxprEqn, numbers: Sequence[float | None]) -> float | None:
    """Returns the one number that the result of an equation is throughout.

    Args:
        eqn: The equation.
        numbers: For each operand the number that it is throughout; None where that is not known.

    Returns:
        The number, rounded as the result is; None if it is not known.
    """
    if len(eqn.outvars) != 1 or not numbers or None in numbers:
        return None
    types: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    # Integers are divided in another way, and run over.
    are_floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in types)
    function = _ARITHMETIC.get(eqn.primitive.name)
    value = None
    with np.errstate(all="ignore"):
        # A cast or a broadcast is the same number, and a root of one is another that is known.
        if eqn.primitive in UNCHANGED:
            value = numbers[0]
        elif function is not None and are_floats:
            value = function(*numbers)
        if value is None or jnp.issubdtype(types[-1].dtype, jnp.complexfloating):
            return None
        return float(np.asarray(value).astype(types[-1].dtype))


def _along(flow: UnitFlow, operand: int, dim: int) -> Standing:
    """Returns how an operand stands along one of its axes; None where the units are elsewhere."""
    standing = flow.standings[operand]
    if standing is ZERO:
        # Wherever the units lie that it will meet, it is 0 for all of them.
        return ZERO
    if dim not in flow.operand_dims[operand]:
        return None
    return standing.along(dim) if isinstance(standing, PerAxis) else standing


def _varies(standing: Standing) -> bool:
    """Whether a value differs from unit to unit."""
    return standing is not None and standing is not ZERO
