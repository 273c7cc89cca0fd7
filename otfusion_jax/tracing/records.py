"""What the pass over a jaxpr records beside ties and pins, for questions that are asked at its end.

Interactions and regroupings tell which groups are nested in which (see `nesting`), selections which
parts of a parameter are read at all (see `Interpreter.left_out`), readings where the features of a
group are found when the program runs (see `activations`), and transfers how units go from value to
value (see `freedoms`).
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from otfusion_jax.tracing.axis import Axis
from otfusion_jax.tracing.values import Axes, TracedValue

if TYPE_CHECKING:
    from otfusion_jax.tracing.equation import EquationContext

Path = tuple[int, ...]
"""The number of an equation in its jaxpr, preceded by those of the calls and scans around it."""


class Site(NamedTuple):
    """A point of the program where features can be read: an operand or a result of an equation.

    Attributes:
        path: Which equation it is. Of one inside of scans the array that is read has one axis in
            front for each scan, of the length of its iterations, outermost first.
        side: Whether an operand (`"in"`) or a result (`"out"`) is read.
        position: The number of the operand or of the result.
    """

    path: Path
    side: Literal["in", "out"]
    position: int


Reading = tuple[Site, Axes, frozenset[int]]
"""A site, the axes of the array there, and the numbers of those along which units lie."""


class Interaction(NamedTuple):
    """Elements along some axes of a value meet elements at other indices in one operation.

    Attributes:
        axes: The axes of the value, preceded by those of the scans around it.
        over: The numbers of the axes whose elements meet others.
        together: The numbers of the axes along which only elements of equal index meet. Along all
            remaining axes an element may meet those of any index.
    """

    axes: Axes
    over: frozenset[int]
    together: frozenset[int]


class Transfer(NamedTuple):
    """An equation that was interpreted, and the values that it took and made, by their numbers.

    Attributes:
        context: The equation.
        operands: Its operands. Each has a number.
        results: Its results. Each has a number.
        form: `"equation"` for an equation by itself; `"choice"` where the single result is one of
            the operands; `"call"` for results of a call that are no results of the jaxpr within;
            `"again"` where the second operand goes on in the place of the first, through equations
            that are not recorded once more.
    """

    context: "EquationContext"
    operands: tuple[TracedValue, ...]
    results: tuple[TracedValue, ...]
    form: Literal["equation", "choice", "call", "again"]


class Regrouping(NamedTuple):
    """Some axes of a value are read as others, as by `reshape`.

    Attributes:
        axes: The axes of the value, preceded by those of the scans around it.
        over: The numbers of the axes that may have been taken apart or merged.
    """

    axes: Axes
    over: frozenset[int]


class Selection(NamedTuple):
    """Some positions of an axis were kept and the others left out.

    Attributes:
        whole: The axis before.
        kept: The segments of it that were kept.
        single_positions: The axis variables of segments of one position among those kept. They are
            in none of the axes of `kept`, as an axis of size 1 is empty.
    """

    whole: Axis
    kept: Axes
    single_positions: frozenset[int]
