"""Roles: which axes of parameters produce units, and which consume them.

When the units of a layer are moved by a transport plan, the layer's features are pushed forward
along it. A kernel and a bias that produce these features are pushed forward with them. A kernel
that is contracted with them has to be pulled back, so that the product stays what it was. For
permutations the two are the same, for plans that split and merge units they are not.

How it is told which is which: nothing about a parameter itself says so, and a tied embedding is
both. It is seen where one of its axes meets features, and noted as a *role constraint*:

- In `h = x @ w + b`, the last axis of `w` is free in the contraction and becomes an axis of the
  features `h`: it produces them. `b` is added to them: it produces them, too.
- In `h @ v`, the first axis of `v` is contracted with the features `h`: it consumes them.

Features have signed roles of their own (see `parity`). Those of `q` and `k` in attention, which are
contracted with each other, are opposite: if plans push queries forward, they pull keys back.
Therefore a constraint says whether a parameter's role is that of the features it meets or the
opposite. Which of two opposite roles is called "produced" is free to choose, once for all features
that are connected.
"""

from collections.abc import Iterable
from typing import NamedTuple

from otfusion_jax.tracing.axis import Factor, factors_of
from otfusion_jax.tracing.axis_variables import AxisVariables

RoleKey = tuple[int, int]
"""The root of a role, and an axis variable: an axis of a parameter, or one part of such an axis."""


class RoleConstraint(NamedTuple):
    """A factor of a parameter has met a factor of features.

    Attributes:
        parameter: The parameter's factor.
        feature: The features' factor, of the same variable.
        sign: 1 if the parameter produces the features, -1 if it consumes them.
    """

    parameter: Factor
    feature: Factor
    sign: int


def role_key(variables: AxisVariables, factor: Factor) -> tuple[RoleKey, int]:
    """Returns which axis of a parameter a factor belongs to.

    Args:
        variables: The axis variables.
        factor: A factor of an expanded axis, with a role.

    Returns:
        The key of the axis in the result of `role_signs`, and the sign of the factor's role
        relative to that key.
    """
    assert factor.variable is not None
    root = variables.roles.find(factor.role)
    sign = 1 if root > 0 else -1
    return (abs(root), factor.variable), sign


def role_signs(
    variables: AxisVariables, constraints: Iterable[RoleConstraint]
) -> dict[RoleKey, set[int]]:
    """Solves the role constraints.

    Args:
        variables: The axis variables.
        constraints: All constraints of a program, in dataflow order.

    Returns:
        For every axis of a parameter that meets features, the signs with which it does, relative to
        its key: 1 where it produces units, -1 where it consumes them.
    """
    # Of each connected set of features, the sign of those that count as pushed forward. They are
    # the features in the set's first constraint, so that an ordinary kernel's output is "produced".
    forward: dict[int, int] = {}
    signs: dict[RoleKey, set[int]] = {}
    for constraint in constraints:
        # The variable may have been split since then, for both of them alike.
        parameter_axis = variables.expand((constraint.parameter,))
        feature_axis = variables.expand((constraint.feature,))
        pairs = zip(factors_of(parameter_axis), factors_of(feature_axis), strict=True)
        for parameter, feature in pairs:
            parameter_key, parameter_sign = role_key(variables, parameter)
            feature_key, feature_sign = role_key(variables, feature)
            feature_root = feature_key[0]
            direction = feature_sign * forward.setdefault(feature_root, feature_sign)
            found = signs.setdefault(parameter_key, set())
            roots = {parameter_key[0], feature_root}
            if roots & variables.roles.self_opposite:
                # Features that are contracted with themselves, as in a Gram matrix, have both
                # roles.
                found.update((1, -1))
            else:
                found.add(parameter_sign * constraint.sign * direction)
    return signs
