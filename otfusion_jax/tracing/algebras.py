"""What is asked of the laws of a program: how far units may be mixed, scaled and turned around.

`Rotations` asks whether units may be multiplied by any orthogonal matrix. A value that lies along
the units is then a *vector*, which the matrix multiplies, or a *pair*, the product of two vectors
unit by unit. Nothing can be done to a pair but to sum it over all units: `<g x, g y> = <x, y>`.

`Scales` asks by which powers of a scale each parameter may be multiplied unit by unit: it is the
inference of units of measurement. A product adds the degrees of its factors, terms of a sum have
one degree, a contraction has degree 0. These are linear equations, and what solves them is a
symmetry of the program. It allows any scales; `PositiveScales` asks the same of positive ones
alone, which a ReLU passes on, and `Signs` of 1 and -1, for which degrees count modulo 2.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from otfusion_jax.tracing.laws import FORMS, ZERO, Algebra, Form, PerAxis, Standing


class Vector(NamedTuple):
    """A value that is multiplied as the units are.

    Attributes:
        parameter: The number of the parameter that it is a multiple of, by factors that are the
            same at all units; None if it is no such multiple.
    """

    parameter: int | None = None


class Pair(NamedTuple):
    """The product of two vectors, unit by unit.

    Attributes:
        parameters: The numbers of the parameters that factors are multiples of. Were these 1, it
            would be a vector.
    """

    parameters: frozenset[int]


class Magnitude(NamedTuple):
    """The absolute values of a vector, of which nothing but the squares may be used.

    Attributes:
        vector: The vector.
    """

    vector: Vector


class Rotations(Algebra):
    """Whether the units of a group may be multiplied by orthogonal matrices.

    Attributes:
        source: The source line of the equation at hand, which the one who calls laws sets.
        refused: What does not allow it: the source line of the first such equation; None if all
            equations allow it.
        in_the_way: The numbers of parameters that multiply units one by one where that does not
            allow it. It may be allowed where these are 1.
        fixes_ones: The source line of the first equation that demands that matrices fix the vector
            of ones; None if there is none.
    """

    def __init__(self) -> None:
        self.source = ""
        self.refused: str | None = None
        self.in_the_way: set[int] = set()
        self.fixes_ones: str | None = None

    def alike(self, standings: Sequence[Standing]) -> Standing:
        """See `Algebra.alike`. A vector plus a number times the ones is moved as both are."""
        varying = [x for x in standings if x is not None and x is not ZERO]
        # What is 0 at all units is moved by any matrix as a vector is.
        if not varying:
            return None
        if all(isinstance(x, Vector) for x in varying):
            # A number added to all units is a multiple of the ones, which has to move as it does.
            if None in standings:
                self._demand_ones()
            return varying[0] if len(varying) == len(standings) == 1 else Vector()
        # Squares may be added up before they are summed over the units, and constants with them.
        if all(isinstance(x, Pair) for x in varying):
            return Pair(frozenset().union(*[x.parameters for x in varying]))
        return self.other(standings)

    def product(self, x: Standing, y: Standing) -> Standing:
        """See `Algebra.product`."""
        for one, other in ((x, y), (y, x)):
            if one is None or one is ZERO:
                return other
        if isinstance(x, Vector) and isinstance(y, Vector):
            parameters = [z.parameter for z in (x, y) if z.parameter is not None]
            return Pair(frozenset(parameters))
        return self.other([x, y])

    def quotient(self, x: Standing, y: Standing) -> Standing:
        """See `Algebra.quotient`."""
        return x if y is None else self.other([x, y])

    def power(self, x: Standing, exponent: int) -> Standing:
        """See `Algebra.power`."""
        if exponent != 2:
            return self.other([x])
        root = x.vector if isinstance(x, Magnitude) else x
        return self.product(root, root)

    def function(self, x: Standing, form: Form) -> Standing:
        """See `Algebra.function`."""
        if isinstance(x, Vector) and form == FORMS["abs"]:
            return Magnitude(x)
        return self.other([x])

    def contracted(self, x: Standing, y: Standing) -> None:
        """See `Algebra.contracted`."""
        if x is ZERO or y is ZERO:
            return
        if isinstance(x, Vector) and isinstance(y, Vector):
            return
        if x is None or y is None:
            self.summed(y if x is None else x)
        else:
            self.other([x, y])

    def summed(self, x: Standing) -> None:
        """See `Algebra.summed`. The sum is the inner product with the ones."""
        if isinstance(x, Vector):
            self._demand_ones()

    def other(self, standings: Sequence[Standing], unknown: bool = False) -> Standing:
        """See `Algebra.other`."""
        # Were the scale 1 that has made a pair of a vector, it would still be one.
        for standing in standings:
            if isinstance(standing, Pair):
                self.in_the_way |= standing.parameters
        if unknown or any(isinstance(x, Vector | Pair | Magnitude) for x in standings):
            self.refused = self.refused or self.source
        return None

    def along_several(self, standings: Sequence[Standing]) -> Standing:
        """See `Algebra.along_several`. A matrix is multiplied from both sides, a pair is not."""
        if any(isinstance(x, Pair | Magnitude) for x in standings):
            return self.other(standings)
        return Vector() if any(isinstance(x, Vector) for x in standings) else None

    def _demand_ones(self) -> None:
        self.fixes_ones = self.fixes_ones or self.source


Degree = dict[int, int | Fraction]
"""By the numbers of unknowns how often each counts in the degree of a value. An unknown is the
degree of a parameter, or of one of its axes if the units lie along several."""


class Scales(Algebra):
    """By which powers of a scale parameters may be multiplied, unit by unit.

    Attributes:
        equations: Sums of degrees that have to be 0.
    """

    def __init__(self) -> None:
        self.equations: list[Degree] = []
        self._known: set[frozenset[tuple[int, int | Fraction]]] = set()

    def alike(self, standings: Sequence[Standing]) -> Standing:
        """See `Algebra.alike`. What is 0 has any degree."""
        degrees = [_degree(x) for x in standings if x is not ZERO]
        if not degrees:
            return None
        first, *rest = degrees
        for degree in rest:
            self._demand(_sum(first, degree, -1))
        return first

    def product(self, x: Standing, y: Standing) -> Standing:
        """See `Algebra.product`."""
        return _sum(_degree(x), _degree(y), 1)

    def quotient(self, x: Standing, y: Standing) -> Standing:
        """See `Algebra.quotient`."""
        return _sum(_degree(x), _degree(y), -1)

    def power(self, x: Standing, exponent: int) -> Standing:
        """See `Algebra.power`."""
        return _sum({}, _degree(x), exponent)

    def contracted(self, x: Standing, y: Standing) -> None:
        """See `Algebra.contracted`."""
        if x is not ZERO and y is not ZERO:
            self._demand(_sum(_degree(x), _degree(y), 1))

    def summed(self, x: Standing) -> None:
        """See `Algebra.summed`."""
        self._demand(_degree(x))

    def other(self, standings: Sequence[Standing], unknown: bool = False) -> Standing:
        """See `Algebra.other`. What is made of values without degree has none."""
        for standing in standings:
            if isinstance(standing, PerAxis):
                for _, along in standing.standings:
                    self._demand(_degree(along))
            else:
                self._demand(_degree(standing))
        return None

    def alternatives(self, choices: Sequence[Standing], cases: Sequence[Standing]) -> Standing:
        """See `Algebra.alternatives`. A choice that no scale changes stays the same."""
        self.other(choices)
        return self.alike(cases)

    def along_several(self, standings: Sequence[Standing]) -> Standing:
        """See `Algebra.along_several`. Each axis may have a degree of its own: none is allowed."""
        return self.other(standings)

    def _demand(self, degree: Degree) -> None:
        # Equal blocks of a network, and each round of a loop, make equal equations.
        key = frozenset(degree.items())
        if degree and key not in self._known:
            self._known.add(key)
            self.equations.append(degree)

    def degrees_with(self, parameters: Collection[int]) -> dict[int, dict[int, int]]:
        """Solves the equations for one parameter of degree 1 after the other, the rest at 0.

        Args:
            parameters: The numbers of the parameters.

        Returns:
            For each parameter the degrees of all that must be scaled along with it, its own 1 among
            them. Parameters for which there is no such symmetry, or not by whole degrees, are left
            out.
        """
        pivots, rest = _eliminated(self.equations, parameters)
        idle = _sparser(self._idle(parameters, pivots), _combined)
        solved = {}
        for parameter in parameters:
            if any(parameter in row for row in rest):
                continue
            degrees = _plainest(_solution(parameter, pivots), idle)
            if all(degree.denominator == 1 for degree in degrees.values()):
                solved[parameter] = {number: int(degree) for number, degree in degrees.items()}
        return solved

    def _idle(
        self, parameters: Collection[int], pivots: Mapping[int, "_Row"]
    ) -> list[dict[int, int | Fraction]]:
        """Returns independent solutions in which some parameters have degree 0."""
        unknowns = dict.fromkeys(itertools.chain(*self.equations))
        solutions: list[Degree] = []
        for unknown in unknowns:
            if unknown not in parameters and unknown not in pivots:
                solution = _solution(unknown, pivots)
                solutions.append({**_whole(solution)})
        return solutions


class PositiveScales(Scales):
    """By which powers of a positive scale parameters may be multiplied, unit by unit."""

    def function(self, x: Standing, form: Form) -> Standing:
        """See `Algebra.function`. A power of the scale is taken out, if there is one."""
        if form.degree is None:
            return self.other([x])
        return _sum({}, _degree(x), form.degree)

    def extremum(self, standings: Sequence[Standing]) -> Standing:
        """See `Algebra.extremum`. What is the largest is so after all are multiplied."""
        return self.alike(standings)

    def compared(self, standings: Sequence[Standing], *, ordered: bool) -> Standing:
        """See `Algebra.compared`."""
        self.alike(standings)
        return None

    def independent(self, unknowns: Sequence[int]) -> list[dict[int, int]]:
        """Solves the equations.

        Args:
            unknowns: All unknowns there are.

        Returns:
            Independent solutions, from which all others are combined: for each the unknowns whose
            degree is not 0, and their degrees, of which the first is positive.
        """
        # Each unknown that no equation determines is a scaling of its own, with the others at 0.
        pivots, _ = _eliminated(self.equations, ())
        solutions = [_solution(free, pivots) for free in unknowns if free not in pivots]
        return [_whole(solution) for solution in _sparser(solutions, _combined)]


class Signs(Scales):
    """Which parameters may be multiplied by -1, unit by unit."""

    def function(self, x: Standing, form: Form) -> Standing:
        """See `Algebra.function`. An odd function hands the sign on, an even one drops it."""
        if form.parity is None:
            return self.other([x])
        return _sum({}, _degree(x), form.parity)

    def compared(self, standings: Sequence[Standing], *, ordered: bool) -> Standing:
        """See `Algebra.compared`."""
        if ordered:
            return self.other(standings)
        self.alike(standings)
        return None

    def independent(self, unknowns: Sequence[int]) -> list[dict[int, int]]:
        """Solves the equations modulo 2.

        Args:
            unknowns: All unknowns there are.

        Returns:
            Independent solutions, from which all others are combined: for each the unknowns that
            change signs, each with a 1.
        """
        # For each unknown that is determined the others that it is the sum of.
        pivots: dict[int, set[int]] = {}
        for equation in self.equations:
            # Modulo 2 an equation is a set of unknowns, and a sum of two is what is in one alone.
            row = {number for number, count in equation.items() if count % 2}
            for pivot in row & pivots.keys():
                row ^= {pivot} | pivots[pivot]
            if not row:
                continue
            pivot = min(row)
            row.remove(pivot)
            for others in pivots.values():
                if pivot in others:
                    others ^= {pivot} | row
            pivots[pivot] = row
        solutions: list[Degree] = []
        for free in unknowns:
            if free not in pivots:
                turned = {free} | {pivot for pivot, others in pivots.items() if free in others}
                solutions.append(dict.fromkeys(turned, 1))
        return [_whole(solution) for solution in _sparser(solutions, _in_one_alone)]


def _degree(standing: Standing) -> Degree:
    """Returns the degree of a value; 0 where it is the same at all units."""
    return {} if standing is None or standing is ZERO else standing


def _sum(x: Degree, y: Degree, factor: int | Fraction) -> Degree:
    """Adds a multiple of a degree to another; what cancels is left out."""
    total = dict(x)
    for number, count in y.items():
        total[number] = total.get(number, 0) + factor * count
    return {number: count for number, count in total.items() if count}


_Row = dict[int, Fraction]
"""An equation: by the numbers of unknowns their coefficients, none of them 0."""


def _eliminated(
    equations: Sequence[Degree], parameters: Collection[int]
) -> tuple[dict[int, _Row], list[_Row]]:
    """Solves homogeneous linear equations for all unknowns but some, by Gaussian elimination.

    Args:
        equations: The equations.
        parameters: The unknowns that the others are to be expressed by.

    Returns:
        For each unknown that is determined its equation, in which it has coefficient 1 and no other
        such unknown occurs; and the equations that are left between parameters alone.
    """
    pivots: dict[int, _Row] = {}
    rest = []
    for equation in equations:
        row = {unknown: Fraction(count) for unknown, count in equation.items()}
        for unknown in [unknown for unknown in row if unknown in pivots]:
            _eliminate(row, pivots[unknown], unknown)
        unknowns = [unknown for unknown in row if unknown not in parameters]
        if not unknowns:
            if row:
                rest.append(row)
            continue
        pivot = min(unknowns)
        scale = row[pivot]
        row = {unknown: count / scale for unknown, count in row.items()}
        for pivot_row in pivots.values():
            if pivot in pivot_row:
                _eliminate(pivot_row, row, pivot)
        pivots[pivot] = row
    return pivots, rest


def _eliminate(row: _Row, pivot_row: _Row, unknown: int) -> None:
    """Subtracts from a row the multiple of another that makes one of its unknowns vanish."""
    factor = row[unknown]
    for other, count in pivot_row.items():
        row[other] = row.get(other, Fraction(0)) - factor * count
        if not row[other]:
            del row[other]


def _solution(free: int, pivots: Mapping[int, _Row]) -> Degree:
    """Returns the solution in which one unknown that is free has degree 1, and the others 0."""
    degrees: Degree = {free: Fraction(1)}
    for unknown, row in pivots.items():
        if free in row:
            degrees[unknown] = -row[free]
    return degrees


def _plainest(solution: Degree, idle: Sequence[Degree]) -> Degree:
    """Adds solutions to one as long as it becomes plainer.

    A scale of a branch is multiplied into its last weights so, and not divided out of all else
    that is added to the residual stream, which is as right, but can't be done where it is 0.

    Args:
        solution: The solution.
        idle: What may be added or subtracted.

    Returns:
        The solution in which the fewest parameters are multiplied by a positive power, which is
        what a fold divides, and then the fewest at all, as far as single steps lead there.
    """
    is_done = False
    while not is_done:
        is_done = True
        for other in idle:
            for candidate in _combined(solution, other):
                if _effort(candidate) < _effort(solution):
                    solution = candidate
                    is_done = False
    return solution


def _effort(degrees: Degree) -> tuple[int, int]:
    """Says how many parameters a fold divides, and how many it changes."""
    divided = [degree for degree in degrees.values() if degree > 0]
    return len(divided), len(degrees)


def _sparser(
    solutions: list[Degree], combined: Callable[[Degree, Degree], list[Degree]]
) -> list[Degree]:
    """Combines solutions with one another as long as fewer unknowns are left in one of them.

    So a scaling that concerns one layer alone is found by itself, and not as the difference of two
    that concern all of a residual stream.

    Args:
        solutions: Independent solutions.
        combined: What may take the place of the first of two solutions.

    Returns:
        As many independent solutions, from which the same others are combined.
    """
    solutions = list(solutions)
    is_done = False
    while not is_done:
        is_done = True
        for one, other in itertools.permutations(range(len(solutions)), 2):
            for candidate in combined(solutions[one], solutions[other]):
                if len(candidate) < len(solutions[one]):
                    solutions[one] = candidate
                    is_done = False
    return solutions


def _combined(one: Degree, other: Degree) -> list[Degree]:
    """Returns the difference of two solutions, and their sum."""
    if one.keys().isdisjoint(other):
        return []
    return [_sum(one, other, -1), _sum(one, other, 1)]


def _in_one_alone(one: Degree, other: Degree) -> list[Degree]:
    """Returns the sum of two solutions modulo 2."""
    return [dict.fromkeys(one.keys() ^ other.keys(), 1)]


def _whole(solution: Degree) -> dict[int, int]:
    """Returns a solution in whole numbers without a common divisor, of which the first is positive.

    Powers of a square root are doubled.
    """
    factor = math.lcm(*[Fraction(degree).denominator for degree in solution.values()])
    degrees = {number: int(factor * solution[number]) for number in sorted(solution)}
    divisor = math.gcd(*degrees.values())
    if degrees[min(degrees)] < 0:
        divisor = -divisor
    return {number: degree // divisor for number, degree in degrees.items()}
