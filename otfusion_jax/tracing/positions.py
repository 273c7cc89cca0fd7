"""Values that are positions along an axis of units, as `argmax` finds them and `iota` counts them.

If units are put in another order, such numbers become others. That is no reason to keep units in
their places, as long as positions meet nothing but positions: `jax.nn.one_hot` compares those that
`top_k` has found with those that `iota` counts, and what comes of it is in the order of the units
once more. Whatever else is done with positions pins the axis that they are of.

Of units that are equal the first is found, which another order makes another one. So positions are
followed where two units are equal by chance alone: sums of products in single precision are, and
what is computed of them one to one. After a `relu` many units are 0.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.axis import Kind, factors_of, size_of
from otfusion_jax.tracing.primitives import EQUALITY, named
from otfusion_jax.tracing.values import Positions, TracedValue, Values

if TYPE_CHECKING:
    from otfusion_jax.tracing.equation import EquationContext
    from otfusion_jax.tracing.unification import Unifier

P = core.primitives

_MAKING = frozenset([P.argmax_p, P.argmin_p, P.iota_p, P.top_k_p])
"""Primitives whose results may be positions."""

_CARRYING = frozenset(
    named("broadcast_in_dim convert_element_type copy reshape slice squeeze transpose")
)
"""Primitives whose result has the numbers of their operand."""

_READING = frozenset([*_CARRYING, *EQUALITY, *primitives.CALLS])
"""Primitives that positions may meet."""

_CONTRACTIONS = frozenset([P.dot_general_p, P.conv_general_dilated_p])

_ONE_TO_ONE = frozenset(
    named(
        "abs add broadcast_in_dim convert_element_type copy div exp integer_pow log logistic mul "
        "neg reduce_max reduce_min reduce_sum reshape slice sqrt square squeeze stop_gradient sub "
        "transpose"
    )
)
"""Primitives that make equal numbers of others by chance alone."""

_SHIFTS = frozenset([P.add_p, P.sub_p, P.div_p])
"""Primitives that leave distinct numbers distinct if the other operand is alike for all of them."""

_LEAST_BITS = 32


def operands_for(primitive: core.Primitive, unifier: "Unifier", operands: Values) -> Values:
    """Returns the operands of an equation as its rule gets them.

    Args:
        primitive: The primitive, of a rule that comes with the library.
        unifier: What is known of axes.
        operands: The operands. Where they are positions that the primitive can't be followed with,
            the axis that they are of is pinned, and they are numbers like any others.
    """
    return operands if primitive in _READING else let_go(unifier, operands)


def results_of(context: "EquationContext", operands: Values, results: Values) -> Values:
    """Returns the results of an equation, with what is known of them as positions.

    Args:
        context: The context of the equation.
        operands: The operands, as `operands_for` returned them.
        results: The results of the rule.
    """
    eqn, unifier = context.eqn, context.unifier
    if eqn.primitive in _CARRYING:
        positions = operands[0].positions
        if positions is not None and not can_hold(eqn.outvars[0].aval, positions):
            let_go(unifier, operands)
            positions = None
        return [results[0]._replace(positions=positions)]
    if eqn.primitive in _READING or eqn.primitive in _MAKING:
        return results
    # Of a loop that collects positions nobody may look at them.
    let_go(unifier, list(itertools.compress(results, context.used)))
    return [value._replace(positions=None) for value in results]


def can_hold(aval: Any, positions: Positions) -> bool:
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
    released = []
    for value in values:
        if value.positions is not None:
            unifier.pin(value.positions.axis, value.positions.reason)
            value = value._replace(positions=None)
        released.append(value)
    return released


def varies_throughout(unifier: "Unifier", value: TracedValue, dim: int) -> bool:
    """Says whether a value differs between any two places along an axis, as far as axes tell."""
    factors = list(factors_of(unifier.expand(value.axes[dim])))
    return bool(factors) and all(factor.variable is not None for factor in factors)


def makes_distinct(
    context: "EquationContext",
    operands: Sequence[TracedValue],
    distinct: Sequence[bool],
    numbers: Sequence[float | None],
) -> bool:
    """Says whether two numbers in the result of an equation are equal by chance alone.

    Args:
        context: The context of the equation.
        operands: The operands.
        distinct: For each of them whether that is so.
        numbers: For each of them the number that it is throughout; None where that is not known.
    """
    eqn = context.eqn
    aval: Any = eqn.outvars[0].aval
    dtype = aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < _LEAST_BITS:
        return False
    kinds = [value.kind for value in operands]
    if eqn.primitive in _CONTRACTIONS:
        # Features may have been selected, so that those of many samples are 0.
        return Kind.FEATURE in kinds and (Kind.PARAMETER in kinds or all(distinct))
    of_features = []
    others = []
    for value, is_distinct, number in zip(operands, distinct, numbers, strict=True):
        may_shift = eqn.primitive in _SHIFTS and not is_distinct
        if value.kind is not Kind.FEATURE:
            others.append(number)
        elif not may_shift or not _is_alike(context.unifier, value):
            of_features.append(is_distinct)
    # The largest of a row starts from minus infinity, for rows of nothing.
    is_bound = eqn.primitive in (P.max_p, P.min_p) and others in ([-np.inf], [np.inf])
    if not is_bound and eqn.primitive not in _ONE_TO_ONE:
        return False
    return bool(of_features) and all(of_features)


def _is_alike(unifier: "Unifier", value: TracedValue) -> bool:
    """Whether a value is the same at all units of any axis that may move."""
    for axis in value.axes:
        if any(map(unifier.is_free, unifier.variables_of(axis))):
            return False
    return True
