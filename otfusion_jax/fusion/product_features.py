"""Which units are among the features that come out of a product with a parameter.

Of the average: which of its units are there, and where the parameter has them (`role_of_units`,
`innermost`). Of each model: how its features and their statistics are moved to where these units
are in the average (`mover_of`, `network_units`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from otfusion_jax.common.host import Array, accumulation_dtype, array_module, mapped
from otfusion_jax.fusion.repair_methods import Moments, UnitStatistics
from otfusion_jax.fusion.side_by_side import GroupView, Network
from otfusion_jax.symmetry.groups import Group, Member, Plans, Role
from otfusion_jax.symmetry.leaf_structure import LeafStructure, leaf_structure_of
from otfusion_jax.symmetry.location import UnitLocation
from otfusion_jax.symmetry.transport import move_blocks, moved_units
from otfusion_jax.symmetry.units import units_of
from otfusion_jax.tracing.activations import Path

# --- the units among the features


def role_of_units(group: Group, leaf: int, index: Any) -> Role:
    """Returns the role of features that come out of a product with a parameter.

    It is that of the parameter's axis that they lie along: what is contracted with features that
    push forward is pulled back, as keys are that meet queries.

    Args:
        group: The group of the units among the features.
        leaf: The position of the parameter among the parts of the symmetry.
        index: Where the units are along their axis of the features.

    Returns:
        The role.
    """
    in_leaf = [member for member in group.members if member.leaf == leaf]
    same_index = [member for member in in_leaf if member.location.index == index]
    roles = {member.role for member in same_index or in_leaf}
    return "consumes" if roles == {"consumes"} else "produces"


def innermost(views: Sequence[GroupView]) -> list[int]:
    """Chooses views that have no features in common: of heads and of the units in them, the latter.

    Args:
        views: The groups whose units are among the features, nested ones last.

    Returns:
        The positions of the views that are chosen, ascending.
    """
    chosen = []
    for number, earlier in enumerate(views):
        if not any(_overlap(earlier, later) for later in views[number + 1 :]):
            chosen.append(number)
    return chosen


def _overlap(one: GroupView, other: GroupView) -> bool:
    """Whether there are features that are of a unit in both views."""
    location, other_location = one.view.location, other.view.location
    # Along different axes there is a feature for each pair of units.
    if location.axis != other_location.axis:
        return True
    positions = set(location.index.positions(one.group.size).flat)
    return not positions.isdisjoint(other_location.index.positions(other.group.size).flat)


# --- the features of the models


class Mover(NamedTuple):
    """How features of a network are moved to where they are in the average.

    Attributes:
        source: The units among the features of the network.
        target: The units among those of the average.
    """

    source: LeafStructure
    target: LeafStructure

    def move(self, plans: Plans, features: Array) -> Array:
        """Moves the features along plans, into the shape that they have in the average."""
        blocks = move_blocks(self.source, plans, features)
        return self.target.partition.join(blocks)


def mover_of(network: Network, average: Network, path: Path, roles: Sequence[Role]) -> Mover | None:
    """Works out how the features of a network are moved to where they are in the average.

    Args:
        network: The network.
        average: The average.
        path: Where the equation stands that puts the features out.
        roles: The role of the features for each group among them.

    Returns:
        How they are moved; None if they stay.
    """
    if not network.is_moved or path not in network.produced:
        return None
    source_members, target_members = [], []
    for source, target, role in zip(
        network.produced[path], average.produced[path], roles, strict=True
    ):
        # As both run one program, a site has the views of the same groups in the same order.
        assert network.average_names[source.group.name] == target.group.name
        # An array of features is taken apart as a parameter would be that the units index.
        source_members.append((source.group, Member(0, "", source.view.location, role)))
        target_members.append((target.group, Member(0, "", target.view.location, role)))
    source_result: Any = network.equations[path].eqn.outvars[0].aval
    target_result: Any = average.equations[path].eqn.outvars[0].aval
    return Mover(
        leaf_structure_of(source_result.shape, source_members),
        leaf_structure_of(target_result.shape, target_members),
    )


class NetworkUnits(NamedTuple):
    """Units of a network among its features, and how they move to those of the average.

    Attributes:
        group: The group, in one iteration of the scans around.
        location: Where its units are in the features.
        role: The role of the features, as units of the group.
        outer_role: Their role as units of the group around, if there is one.
    """

    group: Group
    location: UnitLocation
    role: Role
    outer_role: Role

    def moments(self, plans: Plans, features: Array) -> Moments:
        """Takes the moments of the units in some features.

        Of units that are rotated these are the moments after the move, else those before: how far a
        mixture of units spreads depends on all of them together.
        """
        units = units_of(features, self.location, self.group).swapaxes(-1, -2)
        units = units.astype(accumulation_dtype(units.dtype))
        if self.group.rotates:
            # Moved as features of a batch of samples: each axis in front of the units is one more.
            samples_first = array_module(units).moveaxis(units, -2, 0)
            moved = mapped(functools.partial(self._moved, plans), samples_first)
            units = array_module(moved).moveaxis(moved, 0, -2)
        return Moments.of(units)

    def statistics(self, plans: Plans, moments: Moments) -> UnitStatistics:
        """Returns the statistics of the units of the average.

        For a unit that several are merged into they are the means over theirs.
        """
        if self.group.rotates:
            return UnitStatistics(moments.mean, moments.deviation)
        mean = self._moved(plans, moments.mean)
        deviation = self._moved(plans, moments.deviation)
        return UnitStatistics(mean, deviation)

    def _moved(self, plans: Plans, numbers: Array) -> Array:
        return moved_units(self.group, plans, numbers, self.role, self.outer_role)


def network_units(
    network: Network, path: Path, number: int, roles: Sequence[Role], scans: int
) -> NetworkUnits:
    """Says where the units of a network are among its features.

    Args:
        network: The network.
        path: Where the equation stands that puts the features out.
        number: Which of the groups among the features is meant.
        roles: The role of the features for each of these groups.
        scans: How many scans there are around the equation.

    Returns:
        The units.
    """
    views = network.produced[path]
    group, view = views[number]
    outer_role: Role = "produces"
    for other, role in zip(views, roles, strict=True):
        # The outer group may have several views here, as queries, keys and values have heads each.
        if other.group.name == group.outer:
            *_, outer_index = view.location.batch[-1]
            if other.view.location.index == outer_index:
                outer_role = role
    sliced = views[number].within(scans)
    return NetworkUnits(sliced.group, sliced.view.location, roles[number], outer_role)
