"""Rules of reading and writing at positions that are computed as the program runs."""

from typing import NamedTuple

from otfusion_jax.tracing.axis import Axis
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import SCATTER, P
from otfusion_jax.tracing.rules.segments import write_segment
from otfusion_jax.tracing.values import TracedValue, Values, highest_kind


@register_rule(P.gather_p)
def gather(ctx: RuleContext, values: Values) -> Values:
    """Axes taken whole pass, those that are picked from are pinned; index axes come in front.

    There is one place only from which an axis can be taken whole. Where an index says otherwise it
    is clamped, or all of the slice is filled: either way the same along the axis.
    """
    x, index = values
    kind = highest_kind(values)
    dims = ctx.params["dimension_numbers"]
    slice_sizes = ctx.params["slice_sizes"]
    # The last axis of the indices is the vector of positions, always; the others are a batch.
    ctx.pin(index.axes[-1], ctx.because("by a vector of positions"))
    index_batch = list(index.axes[:-1])
    pairs = zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True)
    batch = dict(pairs)
    kept: list[Axis] = []
    picked: list[int] = []
    for dim, axis in enumerate(x.axes):
        if dim in batch:
            index_dim = batch[dim]
            pair = [axis, index_batch[index_dim]]
            index_batch[index_dim] = ctx.tie(pair, [x.kind, index.kind])
            continue
        taken = slice_sizes[dim]
        if taken == ctx.operand_shape(0)[dim]:
            axis = ctx.pass_on(axis, x.kind, kind)
        else:
            picked.append(dim)
            reason = ctx.because_along(dim)
            axis = ctx.pick_positions(axis, taken, reason)
        if dim not in dims.collapsed_slice_dims:
            kept.append(axis)
    # The axes of the indices may be tied to those that they pick from.
    ctx.note_mixing(x, picked)
    passed_on = [ctx.pass_on(axis, index.kind, kind) for axis in index_batch]
    of_indices = iter(passed_on)
    of_slices = iter(kept)
    axes = []
    for dim in range(len(ctx.shape())):
        source = of_slices if dim in dims.offset_dims else of_indices
        axes.append(next(source))
    return [TracedValue(tuple(axes), kind)]


@register_family(SCATTER)
def scatter(ctx: RuleContext, values: Values) -> Values:
    """Axes that are written whole, or in a part that is known, are tied, others pinned.

    There is one place only at which an axis can be written whole; see `gather`.
    """
    x, index, updates = values
    kind = highest_kind(values)
    x_shape = ctx.operand_shape(0)
    updates_shape = ctx.operand_shape(2)
    reason = ctx.because()
    dims = _scatter_dims(ctx)
    aligned = set(dims.updates_batch.values())
    # Of a single index, written along one axis, it may be known what it is.
    index_vector = ctx.params["dimension_numbers"].scatter_dims_to_operand_dims
    if ctx.operand_shape(1) != (1,):
        index_vector = ()
    # Which index and which update comes first matters: they are written to positions.
    for dim, axis in enumerate(index.axes):
        if dim not in dims.index_batch.values():
            ctx.pin(axis, reason)
    for dim, axis in enumerate(updates.axes):
        if dim not in aligned and dim not in dims.window.values():
            ctx.pin(axis, reason)

    axes: list[Axis] = []
    written_at: list[int] = []
    for dim, axis in enumerate(x.axes):
        if dim in dims.index_batch:
            of_index = index.axes[dims.index_batch[dim]]
            of_updates = updates.axes[dims.updates_batch[dim]]
            met = [axis, of_index, of_updates]
            tied = ctx.tie(met, [x.kind, index.kind, updates.kind])
            axes.append(tied)
            continue
        window_dim = dims.window.get(dim)
        if window_dim is not None and x_shape[dim] == updates_shape[window_dim]:
            aligned.add(window_dim)
            met = [axis, updates.axes[window_dim]]
            tied = ctx.tie(met, [x.kind, updates.kind])
            tied = ctx.pass_on(tied, max(x.kind, updates.kind), kind)
            axes.append(tied)
            continue
        if window_dim is not None and index_vector == (dim,):
            written = write_segment(ctx, (x, dim), (updates, window_dim), index, reason)
            if written is not None:
                aligned.add(window_dim)
                axes.append(written)
                continue
        written_at.append(dim)
        ctx.pin(axis, reason)
        if window_dim is not None:
            ctx.pin(updates.axes[window_dim], reason)
        positions = ctx.fresh_pinned(x_shape[dim], reason)
        axes.append(positions)
    ctx.note_mixing(x, written_at)
    spread = [dim for dim in range(len(updates.axes)) if dim not in aligned]
    ctx.note_mixing(updates, spread)
    return [TracedValue(tuple(axes), kind)]


class _ScatterDims(NamedTuple):
    """Which axes belong together in a scatter. The keys are numbers of the operand's axes.

    Attributes:
        index_batch: The axis of the indices that meets a batch axis of the operand.
        updates_batch: The axis of the updates that meets it.
        window: The axis of the updates that is written along an axis of the operand, in whole or in
            part. The operand's axes that are written at single positions are in none of the three.
    """

    index_batch: dict[int, int]
    updates_batch: dict[int, int]
    window: dict[int, int]


def _scatter_dims(ctx: RuleContext) -> _ScatterDims:
    """Reads the dimension numbers of a scatter."""
    dims = ctx.params["dimension_numbers"]
    window_dims = dims.update_window_dims
    # The axes of the updates outside of the window and those of the indices, all but the last, go
    # together in order.
    updates_rank = len(ctx.operand_shape(2))
    outside = [dim for dim in range(updates_rank) if dim not in window_dims]
    index_batch, updates_batch = {}, {}
    batch_dims = dims.operand_batching_dims
    for dim, index_dim in zip(batch_dims, dims.scatter_indices_batching_dims, strict=True):
        index_batch[dim] = index_dim
        updates_batch[dim] = outside[index_dim]
    without_window = {*batch_dims, *dims.inserted_window_dims}
    rank = len(ctx.operand_shape(0))
    windowed = [dim for dim in range(rank) if dim not in without_window]
    window = dict(zip(windowed, window_dims, strict=True))
    return _ScatterDims(index_batch, updates_batch, window)
