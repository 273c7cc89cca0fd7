"""Which groups are nested in others: a head's units in its head, hidden units in a stacked layer.

Units that are nested may be permuted in another way for each index of what is around them: each
head has a permutation of its own.

A variable `units` is nested in a variable `heads` if both of these hold:

- In every value where `units` occurs, `heads` occurs too: whichever element is looked at, it is
  known of which head its unit is.
- No operation makes a unit of one head meet a unit of another.

Operations that pass an axis on keep its indices in place, and elementwise ones bring equal indices
together. What remains to be checked is recorded by the rules (see `records`): contractions over
`units` have to run along `heads` index by index, and no operation that keeps `units` may take an
index of `heads` to another one.

So the search begins with what accompanies a variable in all values, and goes on to leave out what
an operation contradicts.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from otfusion_jax.tracing.axis import Axis
from otfusion_jax.tracing.axis_variables import AxisVariables
from otfusion_jax.tracing.occurrences import Occurrence, companion_locations, occurrences
from otfusion_jax.tracing.records import Interaction, Regrouping

Candidates = dict[int, list[int]]
"""For each free variable the variables that may be around it, in the order of their discovery."""


@dataclasses.dataclass(frozen=True)
class Nesting:
    """What each free variable is nested in.

    Attributes:
        fixed: The variables around it that cannot be permuted, such as the layers of a stack, over
            which a program iterates in order.
        outer: The variable around it that can be permuted, such as the heads. Only variables that
            are nested in such a one are keys.
    """

    fixed: dict[int, tuple[int, ...]]
    outer: dict[int, int]

    def batch_variables(self, variable: int) -> tuple[int, ...]:
        """Returns the variables that index the plans of a variable, the movable one last."""
        if variable in self.outer:
            return (*self.fixed[variable], self.outer[variable])
        return self.fixed[variable]


def find_nesting(
    variables: AxisVariables,
    free: Sequence[int],
    values: Iterable[tuple[Axis, ...]],
    interactions: Iterable[Interaction],
    regroupings: Iterable[Regrouping],
) -> Nesting:
    """Finds what is nested in what.

    Args:
        variables: All axis variables of the trace.
        free: Those that may be permuted, in dataflow order: each becomes a group.
        values: The axes of every value of the program, parameters included.
        interactions: All interactions that the rules have recorded.
        regroupings: All regroupings that the rules have recorded.

    Returns:
        The nesting. Of groups that can be permuted, one may be around another, not more: a longer
        chain is cut off, which leaves less freedom and is as sound.
    """
    candidates = _candidates_from_values(variables, set(free), values)
    _restrict_by_interactions(variables, candidates, interactions)
    _restrict_by_regroupings(variables, candidates, regroupings)
    outer = _choose_outer(free, candidates)
    fixed = _find_shared_fixed(free, candidates, outer)
    return Nesting(fixed, outer)


# --- what may be around a variable


def _candidates_from_values(
    variables: AxisVariables, free: set[int], values: Iterable[tuple[Axis, ...]]
) -> Candidates:
    """Returns for each free variable what accompanies it in every value where it occurs."""
    candidates: Candidates = {}
    # Most values of a program have the axes of another one.
    distinct = dict.fromkeys(_expand_all(variables, axes) for axes in values)
    for axes in distinct:
        for dim, axis in enumerate(axes):
            for occurrence in occurrences(axis):
                variable = occurrence.factor.variable
                if variable not in free:
                    continue
                accompanying = companion_locations(axes, dim, occurrence)
                if variable in candidates:
                    _restrict(candidates, variable, accompanying)
                else:
                    candidates[variable] = list(accompanying)
    return candidates


def _restrict_by_interactions(
    variables: AxisVariables, candidates: Candidates, interactions: Iterable[Interaction]
) -> None:
    """Leaves out candidates along which elements of different index meet."""
    for interaction in interactions:
        axes = _expand_all(variables, interaction.axes)
        for variable, dim, occurrence in _occurrences_along(axes, interaction.over, candidates):
            kept = []
            for other, location in companion_locations(axes, dim, occurrence).items():
                # Along all other axes a unit meets units of any index of the candidate.
                if location.dim in interaction.together:
                    kept.append(other)
            _restrict(candidates, variable, kept)


def _restrict_by_regroupings(
    variables: AxisVariables, candidates: Candidates, regroupings: Iterable[Regrouping]
) -> None:
    """Leaves out candidates that a reshape may part from what is in them.

    A variable that is multiplied with itself, as in a flattened square of heads by heads, has two
    companions of a kind: which of them belongs to which can't be told from the axes that they come
    to lie in. Other reshapes keep companions together.
    """
    for regrouping in regroupings:
        axes = _expand_all(variables, regrouping.axes)
        if not _is_any_squared([axes[dim] for dim in regrouping.over]):
            continue
        for variable, dim, occurrence in _occurrences_along(axes, regrouping.over, candidates):
            kept = []
            for other, location in companion_locations(axes, dim, occurrence).items():
                if location.dim not in regrouping.over:
                    kept.append(other)
            _restrict(candidates, variable, kept)


def _expand_all(variables: AxisVariables, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    return tuple(variables.expand(axis) for axis in axes)


def _occurrences_along(
    axes: Sequence[Axis], dims: Iterable[int], candidates: Candidates
) -> Iterator[tuple[int, int, Occurrence]]:
    """Yields variable, axis number and occurrence of what lies along axes and has candidates."""
    for dim in dims:
        for occurrence in occurrences(axes[dim]):
            variable = occurrence.factor.variable
            # What has no candidates left has none to lose.
            if variable is not None and candidates.get(variable):
                yield variable, dim, occurrence


def _restrict(candidates: Candidates, variable: int, allowed: Iterable[int]) -> None:
    """Leaves out the candidates of a variable that are not among those allowed."""
    allowed_set = set(allowed)
    before = candidates[variable]
    candidates[variable] = [other for other in before if other in allowed_set]


def _is_any_squared(axes: Sequence[Axis]) -> bool:
    """Says whether a variable occurs more than once in the product of some expanded axes."""
    in_axes_before: set[int] = set()
    for axis in axes:
        in_axis: set[int] = set()
        for factor, _, companions in occurrences(axis):
            if factor.variable is None:
                continue
            in_axis.add(factor.variable)
            for companion, _ in companions:
                if companion.variable == factor.variable:
                    return True
        if in_axis & in_axes_before:
            return True
        in_axes_before |= in_axis
    return False


# --- the choice among candidates


def _choose_outer(free: Sequence[int], candidates: Candidates) -> dict[int, int]:
    """Chooses for each free variable at most one free variable that it is nested in.

    A variable that others are nested in is nested in none itself, so that a nested group's plans
    have a single movable batch axis. Where there is a chain, its innermost pair is chosen.
    """
    outer: dict[int, int] = {}
    free_set = set(free)
    has_nested: set[int] = set()

    def number_around(variable: int) -> int:
        return len(candidates.get(variable, ()))

    for variable in free:
        if variable in has_nested:
            continue
        movable = []
        for other in candidates.get(variable, ()):
            if other in free_set and other not in outer:
                movable.append(other)
        if movable:
            # The innermost of them is the one that has the most around itself.
            innermost = max(movable, key=number_around)
            outer[variable] = innermost
            has_nested.add(innermost)
    return outer


def _find_shared_fixed(
    free: Sequence[int], candidates: Candidates, outer: dict[int, int]
) -> dict[int, tuple[int, ...]]:
    """Returns for each free variable the pinned ones around it that its whole group tree shares.

    A group and those nested in it are matched together, so that their plans need the same batch.
    """
    free_set = set(free)
    # By the variable at the root of each tree.
    trees: dict[int, list[int]] = {}
    for variable in free:
        if variable not in outer:
            trees[variable] = [variable]
    for variable, root in outer.items():
        trees[root].append(variable)

    fixed: dict[int, tuple[int, ...]] = {}
    for root, tree in trees.items():
        shared = []
        for other in candidates.get(root, ()):
            is_shared = all(other in candidates.get(member, ()) for member in tree)
            if is_shared and other not in free_set:
                shared.append(other)
        for member in tree:
            fixed[member] = tuple(shared)
    return fixed
