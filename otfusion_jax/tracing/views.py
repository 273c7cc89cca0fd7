"""Where the features of each group can be read when the program runs.

While it interprets a program, the interpreter records every site at which an array depends on
inputs, with the axes of the array there. Once the groups are known, the axes tell which groups have
their units at a site, and along which positions: a `View`.
"""

import dataclasses
from collections.abc import Sequence

from otfusion_jax.symmetry.location import UnitLocation
from otfusion_jax.tracing.group_collection import CollectedGroups
from otfusion_jax.tracing.occurrences import locate, occurrences
from otfusion_jax.tracing.records import Reading, Site
from otfusion_jax.tracing.unification import Unifier


@dataclasses.dataclass(frozen=True)
class View:
    """Features of a group at a site of the program.

    Attributes:
        site: The operand or result that has the features.
        location: The positions of the group's units in the array there.
    """

    site: Site
    location: UnitLocation


def collect_views(
    unifier: Unifier, readings: Sequence[Reading], collected: CollectedGroups
) -> dict[str, tuple[View, ...]]:
    """Sorts readings by group.

    Args:
        unifier: The unifier of the finished interpretation.
        readings: The sites, with the axes of the arrays there and along which of them to look.
        collected: The groups.

    Returns:
        For each group the views of its units, in the order of the readings.
    """
    views: dict[str, list[View]] = {}
    for site, axes, dims in readings:
        expanded = tuple(map(unifier.expand, axes))
        # In order of the axes, because sets have none: the order of views is that of samples.
        for dim in sorted(dims):
            for occurrence in occurrences(expanded[dim]):
                variable = occurrence.factor.variable
                if variable is None or variable not in collected.names:
                    continue
                batch = collected.nesting.batch_variables(variable)
                # None where the units lie without what they are nested in, as after a sum over it.
                location = locate(expanded, dim, occurrence, batch)
                if location is not None:
                    views.setdefault(collected.names[variable], []).append(View(site, location))
    return {name: tuple(found) for name, found in views.items()}
