"""The parameters of a source, each as it was last moved.

To move a parameter is most of what it takes to compare it. Once moved, it serves all groups in it,
and the objective; and where one group has got another plan since, only that one is moved again.
Of a large parameter, to compare takes far longer than to move, which is done anew each time: what
is kept of all of them would be another model.
"""

import operator
from typing import Any

import numpy as np

from otfusion_jax.common.host import Array
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import is_identity, is_permutation
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import move

LARGEST_KEPT = 2**24
"""The largest parameter, in bytes, that is kept once it has been moved."""


class MovedLeaves:
    """Known parameters of a source as they were last moved, and the plans that moved them.

    Args:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, its groups in the source's order.
        source: The parameters of the source, one array for each of `symmetry.parts`.
    """

    def __init__(self, symmetry: Symmetry, onto: Symmetry, source: list[Any]):
        self._symmetry = symmetry
        self._onto = onto
        self._source = source
        self._last: dict[int, tuple[Array, dict[str, Array]]] = {}

    def moved(self, number: int, plans: Plans) -> Array:
        """Returns a parameter of the source, moved.

        Args:
            number: The position of the parameter in `symmetry.parts`.
            plans: The plans of all groups.

        Returns:
            The moved parameter.
        """
        along = self._symmetry.numbered_leaves[number].plans_by_name(plans)
        moved, last = self._last.get(number, (self._source[number], {}))
        if number in self._last and _are_same(last, along):
            return moved
        steps = self._steps(number, last, along)
        # From the source, rounding is that of one move, however many plans there have been.
        if steps is None:
            moved = move(self._symmetry, plans, number, self._source[number], self._onto)
        elif steps:
            moved = move(self._symmetry, steps, number, moved, self._onto)
        if moved.nbytes <= LARGEST_KEPT:
            self._last[number] = moved, along
        return moved

    def _steps(self, number: int, last: Plans, plans: Plans) -> Plans | None:
        """Finds what is left to do for a parameter that has moved along other plans.

        Args:
            number: The position of the parameter.
            last: The plans that it has moved along; groups that are left out have stayed.
            plans: The plans that it is to be moved along, of the same groups or more.

        Returns:
            The plans of those groups that have to move on from where they are. None if it has to
            be moved from the start: where not all plans are permutations, of units that are
            neither in a batch nor nested in others.
        """
        # Where widths differ, plans tell the shape that a parameter gets, and all have to be there.
        if not are_same_widths(self._symmetry, self._onto, number):
            return None
        # The plans of what is in a batch are in the order of the batch, which may have moved.
        for unit_axis in self._symmetry.leaf_structures[number].unit_axes:
            if unit_axis.group.batch:
                return None
        steps = {}
        for name, plan in plans.items():
            before = last.get(name)
            if before is plan:
                continue
            if not is_permutation(plan):
                return None
            step = plan if before is None else _step_between(before, plan)
            if step is None:
                return None
            if not is_identity(step):
                steps[name] = step
        return steps


def are_same_widths(symmetry: Symmetry, onto: Symmetry, number: int) -> bool:
    """Says whether a parameter falls into the same blocks in two networks.

    Args:
        symmetry: The symmetry of one network.
        onto: That of the other, which has the same groups.
        number: The position of the parameter in `Symmetry.parts`.

    Returns:
        Whether it does, so that plans move it by permutations or rotations alone.
    """
    partition = symmetry.numbered_leaves[number].structure.partition
    return onto.leaf_structures[number].partition is partition


def _are_same(last: Plans, plans: Plans) -> bool:
    """Whether plans are the very arrays that they were, so that none has to be looked at."""
    return len(last) == len(plans) and all(map(operator.is_, last.values(), plans.values()))


def _step_between(before: Array, plan: Array) -> Array | None:
    """Finds the permutation that leads from one permutation to another.

    Args:
        before: Integer `[n]`: position `j` has unit `before[j]`.
        plan: Integer `[n]`: position `j` is to receive unit `plan[j]`.

    Returns:
        Integer `[n]`: position `j` receives what is at position `step[j]`. None if either is no
        permutation, as of a cost that could not be solved.
    """
    if not is_permutation(before):
        return None
    # What is at each position now, asked for by its unit.
    positions = np.arange(len(before))
    place = np.argsort(np.asarray(before))
    new_units = np.asarray(plan)
    for units in (np.asarray(before)[place], np.sort(new_units)):
        if not np.array_equal(units, positions):
            return None
    step: Any = place[new_units].astype(np.int32)
    return step
