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
    """The ranked axis is pinned; values and indices share the others."""
    (x,) = values
    result = _with_pinned(ctx, x, jaxprs.top_k_axis(ctx.eqn))
    return [result, result]


@register_rule(P.iota_p)
def iota(ctx: RuleContext, values: Values) -> Values:
    """Counts along one axis, which is pinned, and is constant along the others."""
    dim = ctx.params["dimension"]
    positions = ctx.fresh_pinned(ctx.shape()[dim], ctx.because())
    result = ctx.constant_result()
    return [result.with_axis(dim, positions)]


def _with_pinned(ctx: RuleContext, value: TracedValue, dim: int) -> TracedValue:
    """Pins an axis of an operand; the result varies along its own, even if nothing did before."""
    reason = ctx.because_along(dim)
    ctx.pin(value.axes[dim], reason)
    positions = ctx.fresh_pinned(ctx.shape()[dim], reason)
    return value.with_axis(dim, positions)
