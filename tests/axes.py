"""Axes read out for the tests of the modules that know how axes are made of units."""

from otfusion_jax.tracing.axis import Axis, Kind, Sum, Term, factors_of
from otfusion_jax.tracing.unification import Unifier

FEATURE = Kind.FEATURE
PARAMETER = Kind.PARAMETER
CONSTANT = Kind.CONSTANT
BOTH_FEATURES = (FEATURE, FEATURE)

Units = tuple[tuple[int, int], ...]
"""Variables and the indices of their units."""


def tie(unifier: Unifier, a: Axis, b: Axis) -> Axis:
    """Ties axes of features as an addition does."""
    return unifier.unify([a, b], BOTH_FEATURES)


def product(unifier: Unifier, *factor_sizes: int) -> Axis:
    """An axis that is a product of new variables."""
    axis: Axis = ()
    for size in factor_sizes:
        axis += unifier.fresh(size)
    return axis


def divisors(number: int) -> list[int]:
    """The divisors of a number, 1 and itself included."""
    return [size for size in range(1, number + 1) if number % size == 0]


def sizes(unifier: Unifier, axis: Axis) -> list:
    """The sizes of what an axis is made of, the segments of a sum as a list."""
    found = []
    for term in unifier.expand(axis):
        if isinstance(term, Sum):
            segments = [sizes(unifier, segment) for segment in term.segments]
            found.append(segments)
        else:
            found.append(term.size)
    return found


def variables(unifier: Unifier, axis: Axis) -> list[int | None]:
    """The variables of an axis in order, those within segments included."""
    expanded = unifier.expand(axis)
    return [factor.variable for factor in factors_of(expanded)]


def free_variables(unifier: Unifier, axis: Axis) -> list[int]:
    """The variables of an axis that may be permuted, in order."""
    free = []
    for variable in variables(unifier, axis):
        if variable is not None and unifier.is_free(variable):
            free.append(variable)
    return free


def single_positions(unifier: Unifier, axis: Axis) -> set[int]:
    """The variables of an axis that are of single positions."""
    found = unifier.variables_of(axis)
    return {variable for variable in found if unifier.size(variable) == 1}


def reasons(unifier: Unifier, axis: Axis) -> set[str | None]:
    """Why the variables of an axis are pinned; None stands for those that are free."""
    found = set()
    for variable in variables(unifier, axis):
        if variable is not None:
            found.add(unifier.reason(variable))
    return found


def assert_same(unifier: Unifier, a: Axis, b: Axis) -> None:
    """Two axes are made of the same variables."""
    of_a = variables(unifier, a)
    of_b = variables(unifier, b)
    assert of_a == of_b, f"{of_a} and {of_b}"


def assert_free(unifier: Unifier, *axes: Axis) -> None:
    """All of some axes may be permuted."""
    for axis in axes:
        found = reasons(unifier, axis)
        assert found == {None}, f"{axis} is pinned: {found}"


def assert_pinned(unifier: Unifier, reason: str, *axes: Axis) -> None:
    """None of some axes may be permuted, for one reason."""
    for axis in axes:
        found = reasons(unifier, axis)
        assert found == {reason}, f"{axis} is not pinned alone by {reason!r}: {found}"


def free_units(unifier: Unifier, axis: Axis) -> list[Units]:
    """For each position of an axis, which units of free variables lie there, outermost first."""
    positions: list[Units] = [()]
    for term in unifier.expand(axis):
        inner_positions = _units_of_term(unifier, term)
        refined = []
        for outer in positions:
            for inner in inner_positions:
                refined.append(outer + inner)
        positions = refined
    return positions


def _units_of_term(unifier: Unifier, term: Term) -> list[Units]:
    positions: list[Units] = []
    if isinstance(term, Sum):
        for segment in term.segments:
            positions += free_units(unifier, segment)
        return positions
    variable = term.variable
    if variable is None or not unifier.is_free(variable):
        return [()] * term.size
    for unit in range(term.size):
        positions.append(((variable, unit),))
    return positions
