"""Rules of operations of which little is known but which axes they may act on."""

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import MATRIX, PINNED, RANDOM, P
from otfusion_jax.tracing.values import TracedValue, Values


@register_family(PINNED)
def pinned(ctx: RuleContext, values: Values) -> Values:
    """Nothing is known of what it does with positions: all axes are pinned."""
    return ctx.pin_all(values, ctx.because())


@register_family(RANDOM)
def random(ctx: RuleContext, values: Values) -> Values:
    """Random numbers belong to their positions: all axes are pinned."""
    return ctx.pin_all(values, ctx.because())


@register_family(primitives.EMPTY)
def empty(ctx: RuleContext, values: Values) -> Values:
    """An array that is not filled yet is taken for constant."""
    return [ctx.constant_result()]


@register_family(MATRIX)
def matrix(ctx: RuleContext, values: Values) -> Values:
    """Decompositions, solutions, transforms: their own axes are pinned, batch axes are tied."""
    if ctx.eqn.primitive in primitives.PIVOTS:
        inner_rank = 1
    else:
        # A transform says by its lengths how many axes it goes over, a matrix has two.
        inner_rank = len(ctx.params.get("fft_lengths", (0, 0)))
    # Some operands have fewer axes of their own than others, but all have the same batch axes.
    rank = max(len(value.axes) for value in values)
    batch_rank = rank - inner_rank
    reason = ctx.because()
    batches = []
    for value in values:
        batch_axes = value.axes[:batch_rank]
        inner_axes = value.axes[batch_rank:]
        for axis in inner_axes:
            ctx.pin(axis, reason)
        batches.append(TracedValue(batch_axes, value.kind))
    batch = ctx.join(batches)
    results = []
    for shape in ctx.shapes():
        axes = list(batch.axes)
        for size in shape[batch_rank:]:
            axis = ctx.fresh_pinned(size, reason)
            axes.append(axis)
        results.append(TracedValue(tuple(axes), batch.kind))
    return results


@register_rule(P.svd_p)
def svd(ctx: RuleContext, values: Values) -> Values:
    """Singular values alone do not depend on the order of rows or columns; else as `matrix`."""
    if ctx.params["compute_uv"]:
        return matrix(ctx, values)
    (x,) = values
    rank = len(x.axes)
    *batch, rows, columns = range(rank)
    # A row is one across all columns, and a column across all rows, each matrix by itself.
    ctx.note_interaction(x, [rows], [*batch, rows])
    ctx.note_interaction(x, [columns], [*batch, columns])
    ctx.note_mixing(x, [rows, columns])
    # They come out by their size, whatever the order of what they are made of.
    *_, count = ctx.shape()
    reason = ctx.because("in falling order")
    numbers = ctx.fresh_pinned(count, reason)
    result = x.without([columns])
    return [result.with_axis(rows, numbers)]
