"""Rules of operations that arrange the same elements in another shape."""

from collections.abc import Sequence

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import P
from otfusion_jax.tracing.values import TracedValue, Values


@register_rule(P.broadcast_in_dim_p)
def broadcast_in_dim(ctx: RuleContext, values: Values) -> Values:
    """Old axes are passed on; the value is constant along new and stretched ones."""
    x = values[0]
    result = TracedValue(ctx.constant_result().axes, x.kind)
    for dim, axis in zip(ctx.params["broadcast_dimensions"], x.axes, strict=True):
        if axis:  # one of size 1 is empty, and may be stretched
            result = result.with_axis(dim, axis)
    return [result]


@register_rule(P.reshape_p)
def reshape(ctx: RuleContext, values: Values) -> Values:
    """Axes, in another order where one is given, become products of axes, or are split."""
    x = values[0]
    order = ctx.params["dimensions"]  # gradients of convolutions in groups have one
    if order is not None:
        x = _reordered(x, order)
    shape = ctx.shape()
    reason = ctx.because(f"of {ctx.operand_shape(0)} to {shape}")
    axes = ctx.regroup(x, shape, reason)
    return [TracedValue(tuple(axes), x.kind)]


@register_rule(P.squeeze_p)
def squeeze(ctx: RuleContext, values: Values) -> Values:
    """Axes of size 1 are dropped."""
    (x,) = values
    return [x.without(ctx.params["dimensions"])]


@register_rule(P.transpose_p)
def transpose(ctx: RuleContext, values: Values) -> Values:
    """Axes are passed on in another order."""
    (x,) = values
    return [_reordered(x, ctx.params["permutation"])]


def _reordered(x: TracedValue, order: Sequence[int]) -> TracedValue:
    """Returns a value with its axes in another order."""
    axes = map(x.axes.__getitem__, order)
    return TracedValue(tuple(axes), x.kind)


@register_family(primitives.TILE)
def tile(ctx: RuleContext, values: Values) -> Values:
    """An axis becomes a product: the value is constant over the copies."""
    (x,) = values
    axes = []
    for count, axis in zip(ctx.params["reps"], x.axes, strict=True):
        copies = ctx.fresh_constant(count)
        axes.append(copies + axis)
    return [TracedValue(tuple(axes), x.kind)]


@register_family(primitives.BITCAST)
def bitcast(ctx: RuleContext, values: Values) -> Values:
    """Passed on, but for a last axis that appears or goes when the width of the type changes."""
    (x,) = values
    rank = len(x.axes)
    shape = ctx.shape()
    axes = list(x.axes[: len(shape)])
    # A number becomes several narrow ones, along a new last axis, or several become a wide one.
    if len(shape) < rank:
        ctx.pin(x.axes[-1], ctx.because("to a wider type"))
    for size in shape[rank:]:
        parts = ctx.fresh_pinned(size, ctx.because())
        axes.append(parts)
    return [TracedValue(tuple(axes), x.kind)]
