"""Networks that run side by side: one program, evaluated in all of them equation by equation.

Networks of one architecture do the same things in the same order, whatever their widths. So it is
enough to go through the program of one of them. A `Network` holds its own equations by their paths,
with which the step that is due is done in each network. A `Value` is what flows from equation to
equation: the arrays of all networks, and what has to be known about where they come from.

The last network is the average of the others. What is said of parameters, of features and of units
without naming a network is about the average.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Array

from otfusion_jax.symmetry.correspondence import match_groups, target_names
from otfusion_jax.symmetry.groups import Group, Plans, Role
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import Path
from otfusion_jax.tracing.jaxprs import body
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


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One of the networks that run side by side.

    Attributes:
        equations: Its equations, those inside of calls included, by path.
        produced: The groups whose units an equation puts out, by path. Groups that are nested in
            others come last.
        plans: The plans that its features are moved along; empty if its units are those of the
            average.
        average_names: For the name of each of its groups the name of that group in the average.
    """

    equations: dict[Path, NetworkEquation]
    produced: dict[Path, list[GroupView]]
    plans: Plans
    average_names: dict[str, str]


def network_of(trace: Trace, average_symmetry: Symmetry, plans: Plans) -> Network:
    """Reads off a trace what running side by side needs.

    Args:
        trace: The trace of the network.
        average_symmetry: The symmetry of the average.
        plans: The plans from the groups of the network to those of the average.

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
    return Network(equations, produced, plans, target_names(matched, average_symmetry))


def _equations_of(jaxpr: core.ClosedJaxpr, path: Path) -> dict[Path, NetworkEquation]:
    """Returns the equations of a jaxpr and of the bodies of its calls, by path."""
    constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    equations: dict[Path, NetworkEquation] = {}
    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        equations[*path, index] = NetworkEquation(eqn, constants)
        inner = body(eqn)
        if inner is not None:
            equations |= _equations_of(inner, (*path, index))
    return equations


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


# Compared by identity: an equation cannot be hashed, and JAX hashes the methods that it is given.
@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Says that a value is a single parameter in another arrangement.

    Attributes:
        leaf: The position of the parameter among the parts of the symmetry.
        steps: The equations that arrange it, first to last.
    """

    leaf: int
    steps: tuple[core.JaxprEqn, ...] = ()

    def arrange(self, parameter: Array) -> Array:
        """Arranges the parameter, or any array of its shape, as the value is arranged."""
        for eqn in self.steps:
            parameter = eqn.primitive.bind(parameter, **eqn.params)
        return parameter


class Shift(NamedTuple):
    """What is still to be added to some units of the average, by a bias that comes later.

    Attributes:
        group: The group of the units.
        view: Where the units are in the features.
        role: The role of the features, as units of the group.
        amount: What is to be added to each unit, float `[*batch, units]`.
    """

    group: Group
    view: View
    role: Role
    amount: Array


class Value(NamedTuple):
    """A value in every network.

    Attributes:
        arrays: The arrays that it is in the networks, the average's last.
        is_feature: Whether it depends on the inputs.
        origin: The parameter that it is an arrangement of, if it is nothing else.
        shifts: What is still to be added to its units in the average.
    """

    arrays: tuple[Any, ...]
    is_feature: bool = False
    origin: Origin | None = None
    shifts: tuple[Shift, ...] = ()

    def with_average(self, array: Array) -> "Value":
        """Returns the same value with another array in the average."""
        return self._replace(arrays=(*self.arrays[:-1], array))


def lifted(networks: Sequence[Network], path: Path, operands: Sequence[Any]) -> list[Value]:
    """Makes values of constants and literals among the operands of an equation.

    These may differ from network to network: a mean divides by the width.

    Args:
        networks: The networks.
        path: Where the equation stands.
        operands: Its operands: values, and constants as they are in the last network.

    Returns:
        The operands, values all of them.
    """
    values = []
    for position, operand in enumerate(operands):
        if not isinstance(operand, Value):
            arrays = [_constant_in(network, path, position, operand) for network in networks]
            operand = Value(tuple(arrays))
        values.append(operand)
    return values


def _constant_in(network: Network, path: Path, position: int, otherwise: Any) -> Any:
    """Returns an operand that is a constant, as it is in a network."""
    eqn, constants = network.equations[path]
    atom = eqn.invars[position]
    if isinstance(atom, core.Literal):
        return atom.val
    # Inside of a call, a constant may have been an operand of the call.
    return constants.get(atom, otherwise)


def evaluated(networks: Sequence[Network], path: Path, values: Sequence[Value]) -> list[Value]:
    """Evaluates an equation in every network.

    Args:
        networks: The networks.
        path: Where the equation stands.
        values: Its operands.

    Returns:
        Its results.
    """
    results_by_network = []
    for number, network in enumerate(networks):
        eqn = network.equations[path].eqn
        result = eqn.primitive.bind(*[value.arrays[number] for value in values], **eqn.params)
        results_by_network.append(result if eqn.primitive.multiple_results else [result])
    is_feature = any(value.is_feature for value in values)
    origin, shifts = _passed_on(networks[-1].equations[path].eqn, values)
    results = []
    for arrays in zip(*results_by_network, strict=True):
        results.append(Value(arrays, is_feature, origin, shifts))
    return results


def _passed_on(
    eqn: core.JaxprEqn, values: Sequence[Value]
) -> tuple[Origin | None, tuple[Shift, ...]]:
    """Returns which parameter the result of an equation is, and what is still to be added to it."""
    if eqn.primitive not in ARRANGEMENTS or len(values) != 1:
        return None, ()
    (value,) = values
    # The views of shifts say where units are in the features as the product put them out. A cast
    # alone leaves them there.
    shifts = value.shifts if eqn.primitive is P.convert_element_type_p else ()
    if value.origin is None:
        return None, shifts
    return Origin(value.origin.leaf, (*value.origin.steps, eqn)), shifts
