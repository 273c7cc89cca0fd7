"""Values that are positions along an axis of units, as `argmax` finds them and `iota` counts them.

If units are put in another order, such numbers become others. That is no reason to keep units in
their places, as long as positions that were found meet nothing but counts: `jax.nn.one_hot`
compares those that `top_k` has found with those that `iota` counts, and what comes of it is in the
order of the units once more. Whatever else is done with positions pins the axis that they are of.

Of units that are equal the first is found, which another order makes another one. A program does
not tell whether units may be equal, so that positions are followed on demand alone (see `OnTies`).
"""

from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.axis import factors_of, size_of
from otfusion_jax.tracing.primitives import EQUALITY, named
from otfusion_jax.tracing.values import Positions, TracedValue, Values

if TYPE_CHECKING:
    from otfusion_jax.tracing.unification import Unifier

OnTies = Literal["pin", "ignore"]
"""What to do about positions that depend on the order of units that are equal: pin the units, or
take it that none are."""

_CARRYING = frozenset(
    named("broadcast_in_dim convert_element_type copy reshape slice squeeze transpose")
)
"""Primitives whose result has the numbers of their operand."""

_READING = frozenset([*_CARRYING, *EQUALITY, *primitives.CALLS])
"""Primitives that positions may meet without being pinned."""


def operands_for(primitive: core.Primitive, unifier: "Unifier", operands: Values) -> Values:
    """Returns the operands of an equation as its rule gets them.

    Args:
        primitive: The primitive, of a rule that comes with the library.
        unifier: What is known of axes.
        operands: The operands. Where they are positions that the primitive can't be followed with,
            the axis that they are of is pinned, and they are numbers like any others.
    """
    return operands if primitive in _READING else let_go(unifier, operands)


def results_of(eqn: core.JaxprEqn, unifier: "Unifier", operands: Values, results: Values) -> Values:
    """Returns the results of an equation, with what is known of them as positions.

    Args:
        eqn: The equation.
        unifier: What is known of axes.
        operands: The operands, as `operands_for` returned them.
        results: The results of the rule.
    """
    if eqn.primitive in _CARRYING:
        results = [results[0]._replace(positions=operands[0].positions)]
    held = []
    for value, var in zip(results, eqn.outvars, strict=True):
        if value.positions is not None and not _can_hold(var.aval, value.positions):
            (value,) = let_go(unifier, [value])
        held.append(value)
    return held


def _can_hold(aval: Any, positions: Positions) -> bool:
    """Says whether an array of some dtype has positions in it as they are."""
    is_integer = jnp.issubdtype(aval.dtype, np.integer)
    return is_integer and jnp.iinfo(aval.dtype).max >= size_of(positions.axis) - 1


def let_go(unifier: "Unifier", values: Values) -> Values:
    """Pins the axes that values are positions of.

    Args:
        unifier: What is known of axes.
        values: The values.

    Returns:
        The values, as numbers like any others.
    """
    for value in values:
        if value.positions is not None:
            unifier.pin(value.positions.axis, value.positions.reason)
    return [value._replace(positions=None) for value in values]


def varies_throughout(unifier: "Unifier", value: TracedValue, dim: int) -> bool:
    """Says whether a value differs between any two places along an axis, as far as axes tell."""
    factors = list(factors_of(unifier.expand(value.axes[dim])))
    return bool(factors) and all(factor.variable is not None for factor in factors)
