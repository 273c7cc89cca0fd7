"""Groups, read off a finished interpretation.

Every axis variable that is still free and occurs in a parameter is the units of one group; the
parameters' axes in which it occurs are the members. What is left to find out is the order of the
groups, their names, the role of each member, and which group lies within which (see `nesting`).
"""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from otfusion_jax.symmetry.groups import Group, Leaf, Member, Role
from otfusion_jax.tracing.axis import Axis, factors_of
from otfusion_jax.tracing.interpretation import Interpretation
from otfusion_jax.tracing.nesting import Nesting, find_nesting
from otfusion_jax.tracing.occurrences import locate, occurrences
from otfusion_jax.tracing.roles import RoleKey
from otfusion_jax.tracing.unification import Unifier

LeafAxes = tuple[Leaf, tuple[Axis, ...]]
"""A leaf of the parameters, or a part of one, and its expanded axes."""


class CollectedGroups(NamedTuple):
    """The groups of a function, and what their axis variables are.

    Attributes:
        groups: The groups in dataflow order.
        names: The name of each group by its axis variable, in the same order.
        nesting: What lies around the axis variables.
    """

    groups: tuple[Group, ...]
    names: dict[int, str]
    nesting: Nesting


def collect_groups(
    interpretation: Interpretation, leaf_axes: Sequence[LeafAxes]
) -> CollectedGroups:
    """Reads the groups off a finished interpretation.

    Args:
        interpretation: The interpretation, in which everything is pinned that has to be.
        leaf_axes: The parameters that it started with, and their axes.

    Returns:
        The groups.
    """
    interpreter, unifier = interpretation.interpreter, interpretation.unifier
    paths = _paths_in_dataflow_order(unifier, leaf_axes)
    nesting = find_nesting(
        unifier,
        list(paths),
        interpreter.values,
        interpreter.interactions,
        interpreter.regroupings,
    )
    names = _numbered(paths)
    members = _members(unifier, leaf_axes, nesting, names)
    groups = []
    for variable, name in names.items():
        batch = tuple(map(unifier.size, nesting.batch_variables(variable)))
        outer = nesting.outer.get(variable)
        outer_name = None if outer is None else names[outer]
        size = unifier.size(variable)
        groups.append(Group(name, size, tuple(members[variable]), batch, outer_name))
    return CollectedGroups(tuple(groups), names, nesting)


def _paths_in_dataflow_order(unifier: Unifier, leaf_axes: Sequence[LeafAxes]) -> dict[int, str]:
    """Returns the axis variables of the groups, each with the leaf that it is to be named after.

    Dataflow order is that in which the parameters put the units into features.
    """
    path_of_axis: dict[RoleKey, str] = {}
    path_of_variable: dict[int, str] = {}
    for leaf, axes in leaf_axes:
        for axis in axes:
            for factor in factors_of(axis):
                if factor.variable is not None and unifier.is_free(factor.variable):
                    role_key, _ = unifier.role_key(factor)
                    path_of_axis.setdefault(role_key, leaf.path)
                    path_of_variable.setdefault(factor.variable, leaf.path)
    # A constraint has a factor and does not know its leaf. The role key of the factor leads there.
    ordered: dict[int, str] = {}
    for constraint in unifier.role_constraints:
        for factor in factors_of(unifier.expand((constraint.parameter,))):
            role_key, _ = unifier.role_key(factor)
            if role_key in path_of_axis:
                _, variable = role_key
                ordered.setdefault(variable, path_of_axis[role_key])
    # Units that never meet features, as those of a penalty on parameters, come last.
    for variable, path in path_of_variable.items():
        ordered.setdefault(variable, path)
    return ordered


def _numbered(paths: dict[int, str]) -> dict[int, str]:
    """Makes names of key paths: the second group that is named after a leaf gets a number."""
    names: dict[int, str] = {}
    count: collections.Counter[str] = collections.Counter()
    for variable, path in paths.items():
        count[path] += 1
        names[variable] = f"{path}#{count[path]}" if count[path] > 1 else path
    return names


def _members(
    unifier: Unifier,
    leaf_axes: Sequence[LeafAxes],
    nesting: Nesting,
    variables: Iterable[int],
) -> dict[int, list[Member]]:
    """Returns the members of each group by its axis variable, in the order of the leaves."""
    role_signs = unifier.role_signs()
    members: dict[int, list[Member]] = {variable: [] for variable in variables}
    # An axis may hold the units of several groups, or those of one group several times: each
    # occurrence is a member.
    for number, (leaf, axes) in enumerate(leaf_axes):
        for dim, axis in enumerate(axes):
            for occurrence in occurrences(axis):
                variable = occurrence.factor.variable
                if variable is None or variable not in members:
                    continue
                role_key, sign = unifier.role_key(occurrence.factor)
                role = _role(role_signs.get(role_key, set()), sign)
                location = locate(axes, dim, occurrence, nesting.batch_variables(variable))
                # The nesting holds in every value, the parameters included.
                assert location is not None, leaf.path
                members[variable].append(Member(number, leaf.path, location, role))
    return members


def _role(signs: set[int], sign: int) -> Role:
    """Returns the role of a parameter's axis.

    Args:
        signs: The signs with which features meet the units of this role.
        sign: The sign of the parameter's axis relative to that role.
    """
    if len(signs) == 2:
        return "both"
    # Units that no feature meets have no role: they are moved as if they were produced.
    return "consumes" if signs == {-sign} else "produces"
