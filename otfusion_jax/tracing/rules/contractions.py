"""Rules of contractions: products that are summed over axes."""

from collections.abc import Sequence

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.axis import Axis, Kind
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import P
from otfusion_jax.tracing.values import TracedValue, Values

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""Axes of the first operand and of the second that are summed over; likewise those of a batch."""


@register_rule(P.dot_general_p)
def dot_general(ctx: RuleContext, values: Values) -> Values:
    """Batch axes are tied, contracted axes too, with opposite roles; free axes pass."""
    return _product(ctx, values, ctx.params["dimension_numbers"])


@register_family(primitives.RAGGED_DOT)
def ragged_dot(ctx: RuleContext, values: Values) -> Values:
    """As `dot_general`; rows, and the groups that they are sorted by, are pinned."""
    numbers = ctx.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    (rows,) = numbers.lhs_ragged_dimensions
    x, y, *sizes = values
    # Gradients sum over the rows of a group, or have a result for each group.
    is_ordinary = rows not in (*contracted[0], *batch[0]) and len(numbers.rhs_group_dimensions) == 1
    if not is_ordinary or any(len(value.axes) != 1 for value in sizes):
        return ctx.pin_all(values, ctx.because())
    (groups,) = numbers.rhs_group_dimensions
    ctx.pin(y.axes[groups], ctx.because("along its groups"))
    for value in sizes:
        ctx.pin(value.axes[0], ctx.because("along its groups"))
    # Rows are told apart by their groups, also those that are equal before.
    reason = ctx.because_along(rows)
    numbered = ctx.fresh_pinned(ctx.operand_shape(0)[rows], reason)
    x = x.with_axis(rows, ctx.tie([x.axes[rows], numbered], [x.kind, x.kind]))
    return _product(ctx, [x, y], numbers.dot_dimension_numbers, dropped=(groups,))


def _product(
    ctx: RuleContext, values: Values, numbers: DimensionNumbers, dropped: Sequence[int] = ()
) -> Values:
    """Contracts two operands.

    Args:
        ctx: The context of the equation.
        values: The two operands.
        numbers: The axes of both that are summed over, and those of both that are kept as one.
        dropped: The axes of the second that the result does not have.

    Returns:
        The result: batch axes, then the free axes of both.
    """
    contracted, batch = numbers
    over_pairs = list(zip(*contracted, strict=True))
    batch_pairs = list(zip(*batch, strict=True))
    axes = ctx.contract(values, over_pairs, batch_pairs)
    x, y = values
    kind = max(x.kind, y.kind)
    from_parameters: list[range] = []
    for position, value in enumerate(values):
        left_out = [*contracted[position], *batch[position]]
        if position == 1:
            left_out.extend(dropped)
        free = value.without(left_out)
        first = len(axes)
        for axis in free.axes:
            axes.append(ctx.pass_on(axis, value.kind, kind))
        if value.kind is Kind.PARAMETER:
            from_parameters.append(range(first, len(axes)))
    out = TracedValue(tuple(axes), kind)
    for dims in from_parameters:
        ctx.note_produced(out, dims)
    return [out]


@register_rule(P.conv_general_dilated_p)
def conv_general_dilated(ctx: RuleContext, values: Values) -> Values:
    """Input channels are contracted, in groups where there are; spatial axes are pinned."""
    if ctx.params["batch_group_count"] > 1:  # only gradients have these
        return ctx.pin_all(values, ctx.because("with batch_group_count"))
    x, kernel = values
    kind = max(x.kind, kernel.kind)
    # Each of the three names the axes of an array: batch and features, then the spatial ones.
    numbers = ctx.params["dimension_numbers"]
    x_batch, x_channels, *x_space = numbers.lhs_spec
    _, k_inputs, *k_space = numbers.rhs_spec
    out_batch, out_channels, *out_space = numbers.out_spec

    axes: list[Axis] = [()] * len(x.axes)
    axes[out_batch] = ctx.pass_on(x.axes[x_batch], x.kind, kind)
    axes[out_channels] = _contract_channels(ctx, x, kernel, k_space)
    reason = "a spatial axis of a convolution"
    for x_dim, k_dim, out_dim in zip(x_space, k_space, out_space, strict=True):
        ctx.pin(kernel.axes[k_dim], reason)
        ctx.pin(x.axes[x_dim], reason)
        # It varies whatever the input does: at the edges there is padding.
        size = ctx.shape()[out_dim]
        axes[out_dim] = ctx.fresh_pinned(size, reason)
    ctx.note_mixing(x, x_space)

    out = TracedValue(tuple(axes), kind)
    ctx.note_consumed(0, x, [x_channels])
    ctx.note_consumed(1, kernel, [k_inputs])
    if kernel.kind is Kind.PARAMETER:
        ctx.note_produced(out, [out_channels])
    return [out]


def _contract_channels(
    ctx: RuleContext, x: TracedValue, kernel: TracedValue, k_space: Sequence[int]
) -> Axis:
    """Ties input channels to those of the kernel, group by group; returns the output channels."""
    numbers = ctx.params["dimension_numbers"]
    x_batch, x_channels = numbers.lhs_spec[:2]
    k_outputs, k_inputs = numbers.rhs_spec[:2]
    out_channels = numbers.out_spec[1]
    kinds = x.kind, kernel.kind

    # Channels are groups times channels of a group. The groups of the input are those of the
    # output, and only channels within a group are summed over.
    groups = ctx.params["feature_group_count"]
    reason = ctx.because(f"in {groups} groups")
    in_count = ctx.operand_shape(0)[x_channels]
    in_sizes = (groups, in_count // groups)
    in_groups, inputs = ctx.unflatten(x.axes[x_channels], in_sizes, reason)
    out_count = ctx.shape()[out_channels]
    out_sizes = (groups, out_count // groups)
    out_groups, outputs = ctx.unflatten(kernel.axes[k_outputs], out_sizes, reason)
    ctx.tie_contracted(inputs, kernel.axes[k_inputs], kinds)
    tied_groups = ctx.tie([in_groups, out_groups], kinds)

    axes = (x.axes[x_batch], in_groups, inputs)
    by_groups = TracedValue(axes, x.kind)
    ctx.note_contraction(by_groups, [2], [1])
    ctx.note_contraction(kernel, [k_inputs, *k_space], [k_outputs])
    produced = ctx.pass_on(outputs, kernel.kind, max(kinds))
    return tied_groups + produced
