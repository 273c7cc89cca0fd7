"""Rules of operations that depend on the order along an axis, or change it."""

from otfusion_jax.tracing import jaxprs
from otfusion_jax.tracing.axis import is_constant
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import CUMULATIVE, P
from otfusion_jax.tracing.values import TracedValue, Values


@register_family(CUMULATIVE)
def cumulative(ctx: RuleContext, values: Values) -> Values:
    """The axis is pinned: the order matters. The result varies along it even if nothing did."""
    (x,) = values
    return [_with_pinned(ctx, x, ctx.params["axis"])]


@register_rule(P.rev_p)
def rev(ctx: RuleContext, values: Values) -> Values:
    """Reversed axes are pinned."""
    (x,) = values
    for dim in ctx.params["dimensions"]:
        # Along a constant axis nothing changes when it is reversed.
        if not is_constant(x.axes[dim]):
            x = _with_pinned(ctx, x, dim)
    return [x]


@register_rule(P.sort_p)
def sort(ctx: RuleContext, values: Values) -> Values:
    """The sorted axis is pinned; all operands are sorted alike along the others."""
    dim = ctx.params["dimension"]
    tied = ctx.join(values, skip=(dim,))
    # All operands are put in the order that one of them defines, so that one new axis does for all.
    ranks = _with_pinned(ctx, values[0], dim).axes[dim]
    for value in values:
        ctx.pin(value.axes[dim], ctx.because_along(dim))
    result = tied.with_axis(dim, ranks)
    return [result] * len(values)


@register_rule(P.top_k_p)
def top_k(ctx: RuleContext, values: Values) -> Values:
    """Ranks are pinned. The ranked axis is, unless its positions are compared with positions."""
    (x,) = values
    dim = jaxprs.top_k_axis(ctx.eqn)
    ranks = ctx.fresh_pinned(ctx.shape()[dim], ctx.because_along(dim))
    largest = x.with_axis(dim, ranks)
    # The largest are the same numbers in any order of the units.
    are_positions_used = ctx.used[1]
    if not are_positions_used:
        return [largest, largest]
    positions = ctx.positions_along(x, dim)
    return [largest, largest._replace(positions=positions)]


@register_rule(P.argmax_p, P.argmin_p)
def extreme_position(ctx: RuleContext, values: Values) -> Values:
    """The searched axis is dropped, and pinned unless positions are compared with positions."""
    (x,) = values
    (dim,) = ctx.params["axes"]
    positions = ctx.positions_along(x, dim)
    return [x.without([dim])._replace(positions=positions)]


@register_rule(P.iota_p)
def iota(ctx: RuleContext, values: Values) -> Values:
    """Counts along one axis, pinned unless counts are compared with positions; no other varies."""
    dim = ctx.params["dimension"]
    counted = ctx.counted(ctx.shape()[dim])
    result = ctx.constant_result().with_axis(dim, counted.axis)
    return [result._replace(positions=counted)]


def _with_pinned(ctx: RuleContext, value: TracedValue, dim: int) -> TracedValue:
    """Pins an axis of an operand; the result varies along its own, even if nothing did before."""
    reason = ctx.because_along(dim)
    ctx.pin(value.axes[dim], reason)
    positions = ctx.fresh_pinned(ctx.shape()[dim], reason)
    return value.with_axis(dim, positions)
