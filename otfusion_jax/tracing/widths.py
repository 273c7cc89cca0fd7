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

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.stretch import Stretch
from otfusion_jax.tracing.dataflow import Dataflow
from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.values import TracedValue
from otfusion_jax.tracing.width_powers import CONSUMED, NOTHING, PRODUCED, Number
from otfusion_jax.tracing.width_trail import Demand, Occurrences, Trail

_CONSISTENT = 1e-6
"""By how much equations between powers, which are small fractions, may be missed by rounding."""


class Widths:
    """The equations of a program, to be asked what other numbers of units would do.

    Args:
        interpreter: The finished pass over the program.
        dataflow: The equations of the program.
        occurrences: What finds the units along an axis.
    """

    def __init__(
        self, interpreter: Interpreter, dataflow: Dataflow, occurrences: Occurrences
    ) -> None:
        self._interpreter = interpreter
        self._dataflow = dataflow
        self._occurrences = occurrences

    def stretch(
        self, group: Group, variable: int, parameters: Sequence[tuple[TracedValue, int]]
    ) -> Stretch:
        """Finds by what the units of a group are multiplied where they become another number.

        Args:
            group: The group, which rotates.
            variable: Its axis variable.
            parameters: The parameters that have the units, each with its position in
                `Symmetry.parts`.

        Returns:
            The powers for both roles, the smallest that there are, or why there are none.
        """
        trail = Trail(self._interpreter, self._occurrences, variable, group.size)
        _note_parameters(trail, group, parameters)
        self._dataflow.follow(list(trail.powers), trail.follow)
        for number, power in trail.powers.items():
            if power.order == 0 and number not in self._dataflow.users:
                trail.demand(power, "an output")
        # One array has one factor, whichever way it is read.
        if _has_both_roles(group):
            source = "a parameter that both produces and consumes the units"
            trail.demands.append(Demand(1, -1, 0, source))
        return _solved(trail.demands, tuple(dict.fromkeys(trail.constants)))


def _note_parameters(
    trail: Trail, group: Group, parameters: Sequence[tuple[TracedValue, int]]
) -> None:
    """Notes the powers of parameters."""
    roles = {(member.leaf, member.axis): member.role for member in group.members}
    for value, leaf in parameters:
        power = NOTHING
        for dim in dict.fromkeys(trail.dims_of(value)):
            is_consumed = roles[(leaf, dim)] == "consumes"
            power = power.plus(CONSUMED if is_consumed else PRODUCED)
        trail.powers[value.number or 0] = power


def _has_both_roles(group: Group) -> bool:
    """Whether an axis of a parameter both produces the units and consumes them."""
    roles: dict[tuple[int, int], str] = {}
    for member in group.members:
        # Queries and keys may lie beside each other along one axis.
        if member.role != roles.setdefault((member.leaf, member.axis), member.role):
            return True
        if member.role == "both":
            return True
    return False


def _solved(demands: Sequence[Demand], constants: tuple[float, ...]) -> Stretch:
    """Solves the equations, each of which a source line demands."""
    powers = np.zeros(2)
    distinct: dict[tuple[Number, ...], str] = {}
    for demand in demands:
        distinct.setdefault(demand[:3], demand.source)
    rows: list[tuple[float, ...]] = []
    for equation, source in distinct.items():
        # One more at a time, so that the first that contradicts those before is the one named.
        rows.append(tuple(map(float, equation)))
        matrix = np.array(rows)
        # Of several solutions the smallest, which shares a factor evenly between both roles.
        powers = np.linalg.lstsq(matrix[:, :2], -matrix[:, 2], rcond=None)[0]
        misses = np.abs(matrix[:, :2] @ powers + matrix[:, 2])
        if np.max(misses) > _CONSISTENT:
            return Stretch(refused=f"no factor makes up for another number of units in {source}")
    produced, consumed = [float(Fraction(x).limit_denominator(1000)) for x in powers]
    return Stretch(produced, consumed, constants)
