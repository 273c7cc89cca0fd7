"""Networks that run side by side: one program, evaluated in all of them equation by equation.

Networks of one architecture do the same things in the same order, whatever their widths. So it is
enough to go through the program of one of them. A `Network` holds its own equations by their paths,
with which the step that is due is done in each network.

The last network is the average of the others. What is said of parameters, of features and of units
without naming a network is about the average.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core
from jax.extend.core import primitives as P

from otfusion_jax.symmetry.correspondence import match_groups, target_names
from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.location import UnitLocation
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import Path
from otfusion_jax.tracing.jaxprs import body, closed
from otfusion_jax.tracing.trace import Trace
from otfusion_jax.tracing.views import View

# What a parameter may go through on its way to a product or a sum: linear, and nothing is mixed.
ARRANGEMENTS = (
    P.broadcast_in_dim_p,
    P.convert_element_type_p,
    P.copy_p,
    P.reshape_p,
    P.squeeze_p,
    P.transpose_p,
)


class NetworkEquation(NamedTuple):
    """An equation of a network.

    Attributes:
        eqn: The equation.
        constants: The values of the constants of the jaxpr that it stands in, by variable.
    """

    eqn: core.JaxprEqn
    constants: dict[Any, Any]


class GroupView(NamedTuple):
    """Units of a group among the features that an equation puts out.

    Attributes:
        group: The group.
        view: Where its units are in the array of these features.
    """

    group: Group
    view: View

    def within(self, scans: int) -> "GroupView":
        """Returns the view of a single iteration of the scans around the equation.

        Args:
            scans: How many scans there are. Each has an axis in front.
        """
        sliced = without_first_axes(self.group, self.view.location, scans)
        assert sliced is not None, "units do not lie along the iterations of a loop"
        return GroupView(sliced.group, View(self.view.site, sliced.location))


class SlicedUnits(NamedTuple):
    """Units in a slice of an array along its first axes.

    Attributes:
        group: The group, without the axes of its batch that lie along the first axes.
        location: Where its units are in the slice.
        kept: For each axis of the group's batch whether it is still there.
    """

    group: Group
    location: UnitLocation
    kept: tuple[bool, ...]


def without_first_axes(group: Group, location: UnitLocation, count: int) -> SlicedUnits | None:
    """Says where units are in a slice of an array.

    Args:
        group: The group of the units.
        location: Where they are in the array.
        count: How many axes the array has more than the slice, in front.

    Returns:
        The units; None if they lie along one of these axes themselves.
    """
    if location.axis < count:
        return None
    kept = tuple([axis >= count for axis, _, _ in location.batch])
    sizes = tuple(itertools.compress(group.batch, kept))
    batch = []
    for axis, length, index in itertools.compress(location.batch, kept):
        batch.append((axis - count, length, index))
    sliced = dataclasses.replace(location, axis=location.axis - count, batch=tuple(batch))
    return SlicedUnits(dataclasses.replace(group, batch=sizes), sliced, kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One of the networks that run side by side.

    Attributes:
        equations: Its equations, those inside of calls included, by path.
        produced: The groups whose units an equation puts out, by path. Groups that are nested in
            others come last.
        is_moved: Whether there are plans that its features are moved along. If not, its units are
            those of the average.
        average_names: For the name of each of its groups the name of that group in the average.
    """

    equations: dict[Path, NetworkEquation]
    produced: dict[Path, list[GroupView]]
    is_moved: bool
    average_names: dict[str, str]


def network_of(trace: Trace, average_symmetry: Symmetry, is_moved: bool) -> Network:
    """Reads off a trace what running side by side needs.

    Args:
        trace: The trace of the network.
        average_symmetry: The symmetry of the average.
        is_moved: Whether plans move its features to the groups of the average.

    Returns:
        The network.

    Raises:
        ValueError: If the network and the average differ in more than widths.
    """
    produced: dict[Path, list[GroupView]] = {}
    # Units nested in a group move together with it: their plans are by where it has moved to.
    nested_last = sorted(trace.symmetry.groups, key=lambda group: group.outer is not None)
    for group in nested_last:
        for view in trace.preactivations.get(group.name, ()):
            produced.setdefault(view.site.path, []).append(GroupView(group, view))
    matched = match_groups(trace.symmetry, average_symmetry)
    equations = _equations_of(trace.jaxpr, ())
    return Network(equations, produced, is_moved, target_names(matched, average_symmetry))


def _equations_of(jaxpr: core.ClosedJaxpr, path: Path) -> dict[Path, NetworkEquation]:
    """Returns the equations of a jaxpr and of the bodies of its calls, by path."""
    constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    equations: dict[Path, NetworkEquation] = {}
    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        equations[*path, index] = NetworkEquation(eqn, constants)
        for suffix, inner in inner_jaxprs(eqn):
            equations |= _equations_of(inner, (*path, index, *suffix))
    return equations


def inner_jaxprs(eqn: core.JaxprEqn) -> list[tuple[Path, core.ClosedJaxpr]]:
    """Returns what an equation evaluates that a repair can follow: calls, scans and branches.

    Args:
        eqn: An equation of any primitive.

    Returns:
        Each jaxpr with what its path has behind that of the equation: nothing for the body of a
        call or a scan, for a branch its number.
    """
    inner = body(eqn)
    if inner is not None:
        return [((), inner)]
    if eqn.primitive is P.scan_p:
        return [((), closed(eqn.params["jaxpr"]))]
    if eqn.primitive is P.cond_p:
        return [((number,), closed(branch)) for number, branch in enumerate(eqn.params["branches"])]
    return []


def require_same_programs(networks: Sequence[Network]) -> None:
    """Refuses networks that do not do the same thing step by step.

    Args:
        networks: The originals of the models, and the average last.

    Raises:
        ValueError: If an original runs another operation somewhere, naming both operations.
    """
    average = networks[-1].equations
    for number, network in enumerate(networks[:-1]):
        # The first difference in the order of the program says most: what follows may be its echo.
        for path in average | network.equations:
            operation = _operation_at(path, network.equations)
            expected = _operation_at(path, average)
            if operation is not expected:
                raise ValueError(
                    f"original {number} runs other operations than the function given: "
                    f"{operation} where that one has {expected}"
                )


def _operation_at(path: Path, equations: dict[Path, NetworkEquation]) -> Any:
    """Returns the primitive of an equation, None where there is no equation."""
    return equations[path].eqn.primitive if path in equations else None
