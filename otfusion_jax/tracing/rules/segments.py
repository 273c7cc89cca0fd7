"""Rules of operations that take axes apart into segments, or put them together of segments."""

from collections.abc import Sequence

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.axis import Axis, Kind, concatenated, constant, is_constant, size_of
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.positions import varies_throughout
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import P
from otfusion_jax.tracing.values import TracedValue, Values, highest_kind, sizes_of

# --- from one axis to its segments


@register_rule(P.slice_p, reads=False)
def slice_(ctx: RuleContext, values: Values) -> Values:
    """A cut axis falls into segments; a stride that divides it makes a product, others pin it."""
    (x,) = values
    params = ctx.params
    starts = params["start_indices"]
    ends = params["limit_indices"]
    strides = params["strides"] or (1,) * len(x.axes)
    old_shape = ctx.operand_shape(0)
    for dim, size in enumerate(ctx.shape()):
        if size == old_shape[dim]:
            continue
        start = int(starts[dim])
        stride = int(strides[dim])
        reason = ctx.because_along(dim)
        if stride == 1:
            end = int(ends[dim])
            segment = _segment(ctx, x.axes[dim], start, end, reason)
            x = x.with_axis(dim, segment)
        elif size * stride == old_shape[dim]:
            x = _every_kth(ctx, x, dim, start, stride)
        else:
            picked = ctx.pick_positions(x.axes[dim], size, reason)
            x = x.with_axis(dim, picked)
    return [x]


def _every_kth(ctx: RuleContext, x: TracedValue, dim: int, start: int, stride: int) -> TracedValue:
    """Takes `x[start::stride]` along an axis that the stride divides.

    That is `x.reshape(-1, stride)[:, start]`, and what is stated is what the rules of `reshape`, of
    `slice` and of `squeeze` state of that.
    """
    reason = ctx.because_along(dim)
    inner = dim + 1
    sizes = list(sizes_of(x))
    sizes[dim] //= stride
    sizes.insert(inner, stride)
    axes = ctx.regroup(x, sizes, reason)
    _segment(ctx, axes[inner], start, start + 1, reason)
    rows = TracedValue(tuple(axes), x.kind)
    # The operand has the inner axis as a part of another, the result not at all.
    ctx.note_mixing(rows, [inner])
    return rows.without([inner])


@register_rule(P.dynamic_slice_p)
def dynamic_slice(ctx: RuleContext, values: Values) -> Values:
    """Axes of which a part is taken are pinned, whole ones pass."""
    x = values[0]
    kind = highest_kind(values)
    old_shape = ctx.operand_shape(0)
    new_shape = ctx.shape()
    axes = []
    for dim, axis in enumerate(x.axes):
        size = new_shape[dim]
        if size != old_shape[dim]:
            reason = ctx.because_along(dim)
            axis = ctx.pick_positions(axis, size, reason)
        passed_on = ctx.pass_on(axis, x.kind, kind)
        axes.append(passed_on)
    return [TracedValue(tuple(axes), kind)]


@register_family(primitives.SPLIT, reads=False)
def split(ctx: RuleContext, values: Values) -> Values:
    """The axis that is split falls into segments, the others pass."""
    (x,) = values
    dim = ctx.params["axis"]
    sizes = [shape[dim] for shape in ctx.shapes()]
    segments = _split_into_results(ctx, x.axes[dim], dim, sizes)
    return [x.with_axis(dim, segment) for segment in segments]


@register_family(primitives.UNSTACK, reads=False)
def unstack(ctx: RuleContext, values: Values) -> Values:
    """The axis that is taken apart falls into single positions, the others pass."""
    (x,) = values
    dim = ctx.params["axis"]
    count = ctx.operand_shape(0)[dim]
    if count > 1:
        _split_into_results(ctx, x.axes[dim], dim, [1] * count)
    return [x.without([dim])] * count


def _segment(ctx: RuleContext, axis: Axis, start: int, end: int, reason: str) -> Axis:
    """Returns the segment of an axis between two positions."""
    size = size_of(axis)
    if (start, end) == (0, size):
        return axis
    if start >= end:
        return ctx.pick_positions(axis, 0, reason)
    segments, number = _cut_out(ctx, axis, start, end, reason)
    kept = segments[number]
    ctx.note_selection(axis, (start, end), kept=[kept])
    return kept


def _cut_out(
    ctx: RuleContext, axis: Axis, start: int, end: int, reason: str
) -> tuple[list[Axis], int]:
    """Splits an axis in front of a range and behind it; says which of the segments the range is."""
    sizes = [start, end - start, size_of(axis) - end]
    nonempty = list(filter(None, sizes))
    return ctx.split_axis(axis, nonempty, reason), int(start > 0)


def _split_into_results(ctx: RuleContext, axis: Axis, dim: int, sizes: Sequence[int]) -> list[Axis]:
    """Splits an axis into segments, one for each result, and records which of them are used."""
    reason = ctx.because_along(dim)
    segments = ctx.split_axis(axis, sizes, reason)
    kept: list[Axis] = []
    ranges: list[tuple[int, int]] = []
    start = 0
    for segment, size, is_used in zip(segments, sizes, ctx.used, strict=True):
        end = start + size
        if is_used:
            kept.append(segment)
            ranges.append((start, end))
        start = end
    ctx.note_selection(axis, *ranges, kept=kept)
    return segments


# --- from segments to one axis


@register_rule(P.pad_p, reads=False)
def pad(ctx: RuleContext, values: Values) -> Values:
    """Padding adds segments along which the value is constant; in between, it pins."""
    x, filler = values
    kind = max(x.kind, filler.kind)
    axes = []
    for dim, widths in enumerate(ctx.params["padding_config"]):
        low, high, between = map(int, widths)
        axis = ctx.pass_on(x.axes[dim], x.kind, kind)
        if not (low or high or between):
            axes.append(axis)
            continue
        reason = ctx.because_along(dim)
        if between:
            ctx.pin(axis, reason)
            axis = ctx.fresh_pinned(ctx.shape()[dim], reason)
        else:
            # Padding of negative width cuts off.
            start = max(0, -low)
            end = size_of(axis) - max(0, -high)
            kept = _segment(ctx, axis, start, end, reason)
            axis = _padded(ctx, kept, low, high, reason)
        axes.append(axis)
    return [TracedValue(tuple(axes), kind)]


def _padded(ctx: RuleContext, axis: Axis, low: int, high: int, reason: str) -> Axis:
    """Returns an axis with padding on both sides, where the widths are positive."""
    low, high = max(0, low), max(0, high)
    # Beside what stays in place, as positions of an input do, the padding may be where more of the
    # same is on other inputs: there it stays, too.
    if not axis or _has_pinned(ctx, axis):
        before = ctx.fresh_pinned(low, reason)
        after = ctx.fresh_pinned(high, reason)
    else:
        before = ctx.fresh_constant(low)
        after = ctx.fresh_constant(high)
    return concatenated([before, axis, after])


def _has_pinned(ctx: RuleContext, axis: Axis) -> bool:
    """Whether any unit of an axis may not be permuted."""
    variables = ctx.unifier.variables_of(axis)
    return not all(map(ctx.unifier.is_free, variables))


@register_rule(P.dynamic_update_slice_p)
def dynamic_update_slice(ctx: RuleContext, values: Values) -> Values:
    """Axes that are updated whole, or in a part that is known, are tied, others pinned."""
    x, update, *starts = values
    shape = ctx.operand_shape(0)
    update_shape = ctx.operand_shape(1)
    in_part = [dim for dim, size in enumerate(shape) if update_shape[dim] != size]
    tied = ctx.join([x, update], skip=in_part)
    kind = highest_kind(values)
    axes: list[Axis] = []
    for dim, axis in enumerate(tied.axes):
        if dim in in_part:
            reason = ctx.because_along(dim)
            written = write_segment(ctx, (x, dim), (update, dim), starts[dim], reason)
            if written is None:
                ctx.pin(x.axes[dim], reason)
                ctx.pin(update.axes[dim], reason)
                written = ctx.fresh_pinned(shape[dim], reason)
            axis = written
        else:
            axis = ctx.pass_on(axis, tied.kind, kind)
        axes.append(axis)
    return [TracedValue(tuple(axes), kind)]


def write_segment(
    ctx: RuleContext,
    written: tuple[TracedValue, int],
    update: tuple[TracedValue, int],
    start: TracedValue,
    reason: str,
) -> Axis | None:
    """Ties an axis to the update of a part of it, where the program knows which part that is.

    Args:
        ctx: The context of the equation.
        written: An operand, and the axis along which a part of it is written.
        update: What is written there, and the axis that goes along that one.
        start: The position at which it is written.
        reason: Why the axis is pinned if it has no segment there, see `RuleContext.split_axis`.

    Returns:
        The axis of the result: what is in front, the part, which is tied to the update, and what is
        behind. None where the position is computed, or the axis has positions of its own.
    """
    (x, dim), (y, update_dim) = written, update
    axis, update_axis = x.axes[dim], y.axes[update_dim]
    width = size_of(update_axis)
    first = ctx.known_number(start)
    # Positions of an input may be at another place on other inputs, and so may what is a constant.
    is_of_units = varies_throughout(ctx.unifier, x, dim) and not _has_pinned(ctx, axis)
    if first is None or not 0 <= first <= size_of(axis) - width or not is_of_units:
        return None
    kind = max(x.kind, y.kind)
    begin = int(first)
    segments, part = _cut_out(ctx, axis, begin, begin + width, reason)
    axes = []
    for number, segment in enumerate(segments):
        # What is written over would have stood there, and goes with it.
        if number == part:
            axes.append(ctx.tie([segment, update_axis], [x.kind, y.kind]))
        else:
            axes.append(ctx.pass_on(segment, x.kind, kind))
    return concatenated(axes)


@register_rule(P.concatenate_p)
def concatenate(ctx: RuleContext, values: Values) -> Values:
    """The concatenated axis is a sum of segments, the others are tied."""
    dim = int(ctx.params["dimension"])
    tied = ctx.join(values, skip=(dim,))
    segments: list[Axis] = []
    for value in values:
        segment = ctx.pass_on(value.axes[dim], value.kind, tied.kind)
        is_filling = value.kind < tied.kind and value.kind is Kind.CONSTANT
        # Beside features, constants stand where features may be on other inputs, as the zeros do
        # that a recurrent network starts from. A parameter that is contracted with them is in use.
        if is_filling and is_constant(segment):
            size = size_of(segment)
            segment = constant(size, filled=True)
        segments.append(segment)
    return [tied.with_axis(dim, concatenated(segments))]


@register_family(primitives.STACK)
def stack(ctx: RuleContext, values: Values) -> Values:
    """The new axis is pinned, the operands are tied along the others."""
    dim = ctx.params["axis"]
    tied = ctx.join(values)
    new = ctx.fresh_pinned(len(values), ctx.because_along(dim))
    axes = list(tied.axes)
    axes.insert(dim, new)
    return [TracedValue(tuple(axes), tied.kind)]
