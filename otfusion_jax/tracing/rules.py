"""What each primitive does to axes: one small function per primitive, one line per family.

A rule ties axes (elementwise, contraction), splits them (reshape, grouped convolution), passes
them on, drops them (reductions do not care about order), or pins them. It says what must hold
for the result to be equivariant under a permutation of the units, and nothing else.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import SupportsIndex

from jax.extend import core

from otfusion_jax.tracing import jaxprs, primitives
from otfusion_jax.tracing.axis import Axis, Kind, concatenated, constant, is_constant, size_of
from otfusion_jax.tracing.context import RuleContext, TracedValue
from otfusion_jax.tracing.primitives import named
from otfusion_jax.tracing.registry import Rule, register_rule, registered

ELEMENTWISE = named(
    "abs acos acosh add add_jaxvals and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt "
    "ceil clamp clz complex conj convert_element_type copy cos cosh digamma div eq eq_to erf "
    "erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow "
    "is_finite le le_to lgamma log log1p logistic lt lt_to max min mul ne neg nextafter not "
    "or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem "
    "round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh "
    "sqrt square stop_gradient sub tan tanh xor zeta"
)
ELEMENTWISE += primitives.NEW_ELEMENTWISE
ONE_BY_ONE = [*named("device_put sharding_constraint"), *primitives.RELOCATIONS]
REDUCTION = named(
    "reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor argmax argmin"
)
COLLECTIVE = named("pmax pmin psum")
CUMULATIVE = named("cumlogsumexp cummax cummin cumprod cumsum")
WINDOW = named("reduce_window_max reduce_window_min reduce_window_sum")
SCATTER = named("scatter scatter_add scatter_max scatter_min scatter_mul") + primitives.SCATTER_SUB
PINNED = named(
    "approx_top_k linear_solve reduce_window select_and_gather_add select_and_scatter "
    "select_and_scatter_add"
)
PINNED += primitives.OPAQUE
MATRIX = named(
    "cholesky eig eigh fft hessenberg householder_product lu qr schur svd triangular_solve "
    "tridiagonal tridiagonal_solve"
)
MATRIX += [*primitives.NEW_MATRIX, *primitives.PIVOTS]
RANDOM = [
    *named("random_bits random_fold_in random_gamma random_seed random_split rng_bit_generator"),
    *named("rng_uniform threefry2x32"),
    *primitives.WRAP,
    *primitives.NEW_RANDOM,
]
P = core.primitives
# Operations that commute and associate, up to rounding.
SYMMETRIC = {P.add_p, P.and_p, P.max_p, P.min_p, P.mul_p, P.or_p, P.xor_p}


@register_rule(*ELEMENTWISE)
def elementwise(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Operands and result move together; scalars meet anything."""
    return [ctx.join(values)]


@register_rule(*ONE_BY_ONE)
def one_by_one(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Each operand is passed on."""
    return values


@register_rule(*REDUCTION)
def reduction(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """A reduced axis is dropped: sums and extrema do not care about order, positions do."""
    (x,) = values
    dropped = ctx.params["axes"]
    if ctx.eqn.primitive in (P.argmax_p, P.argmin_p):
        for dim in dropped:
            ctx.unifier.pin(x.axes[dim], ctx.because(f"over axis {dim}"))
    return [_dropped(x, dropped)]


@register_rule(*COLLECTIVE)
def collective(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Over an axis that `vmap` names, a reduction of each operand."""
    reduced = ctx.params["axes"]
    if not all(isinstance(axis, int) for axis in reduced):
        return ctx.pin_all(values, ctx.because("over devices"))
    return [_dropped(x, reduced) for x in values]


@register_rule(P.reduce_p)
def reduce(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Reduced axes are dropped if order does not matter, else pinned; the others are tied."""
    reduced = ctx.params["dimensions"]
    if not _is_symmetric(ctx.params["jaxpr"].jaxpr):
        for value in values:
            for dim in reduced if value.axes else ():
                reason = f"by a function that is not known to commute, over axis {dim}"
                ctx.unifier.pin(value.axes[dim], ctx.because(reason))
    tied = ctx.join(values[: len(values) // 2])
    kind = max(v.kind for v in values)
    kept = (a for d, a in enumerate(tied.axes) if d not in reduced)
    return [TracedValue(tuple(ctx.enter(a, tied, kind) for a in kept), kind)] * len(ctx.eqn.outvars)


def _is_symmetric(combine: core.Jaxpr) -> bool:
    """Whether a function that combines two sets of numbers commutes and associates for certain.

    It does if it combines the numbers one by one, each pair by an operation that does.
    """
    count = len(combine.outvars)
    pairs = zip(combine.invars[:count], combine.invars[count:], strict=True)
    made = {eqn.outvars[0]: eqn for eqn in combine.eqns if eqn.primitive in SYMMETRIC}
    return len(made) == len(combine.eqns) == count and all(
        not isinstance(out, core.Literal) and out in made and set(made[out].invars) == {x, y}
        for out, (x, y) in zip(combine.outvars, pairs, strict=True)
    )


@register_rule(*CUMULATIVE)
def cumulative(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The axis is pinned: the order matters. The result varies along it even if nothing did."""
    (x,) = values
    return [_vary(ctx, x, ctx.params["axis"])]


@register_rule(P.rev_p)
def rev(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Reversed axes are pinned."""
    (x,) = values
    for dim in ctx.params["dimensions"]:
        if not is_constant(x.axes[dim]):
            x = _vary(ctx, x, dim)
    return [x]


@register_rule(P.sort_p)
def sort(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The sorted axis is pinned; all operands are sorted alike along the others."""
    dim = ctx.params["dimension"]
    tied = ctx.join(values, skip=(dim,))
    axis = _vary(ctx, values[0], dim).axes[dim]
    for value in values:
        ctx.unifier.pin(value.axes[dim], ctx.because(f"along axis {dim}"))
    axes = (*tied.axes[:dim], axis, *tied.axes[dim + 1 :])
    return [TracedValue(axes, tied.kind) for _ in values]


@register_rule(P.top_k_p)
def top_k(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The ranked axis is pinned; values and indices share the others."""
    (x,) = values
    ranked = jaxprs.top_k_axis(ctx.eqn)
    reason = ctx.because(f"along axis {ranked}")
    ctx.unifier.pin(x.axes[ranked], reason)
    axes = list(x.axes)
    axes[ranked] = ctx.unifier.pinned(ctx.shape()[ranked], reason)
    return [TracedValue(tuple(axes), x.kind)] * 2


@register_rule(P.iota_p)
def iota(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Counts along one axis, which is pinned, and is constant along the others."""
    dim = ctx.params["dimension"]
    axes = [constant(n) for n in ctx.shape()]
    axes[dim] = ctx.unifier.pinned(ctx.shape()[dim], ctx.because())
    return [TracedValue(tuple(axes), Kind.CONSTANT)]


@register_rule(*primitives.EMPTY)
def empty(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Space without values that vary."""
    return [TracedValue(tuple(constant(n) for n in ctx.shape()), Kind.CONSTANT)]


@register_rule(*RANDOM)
def random(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Random numbers belong to their positions: all axes are pinned."""
    return ctx.pin_all(values, ctx.because())


@register_rule(*primitives.TIE)
def tie(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The last operand is passed on: it waits for the others and does not depend on them."""
    return values[-1:]


@register_rule(P.broadcast_in_dim_p)
def broadcast_in_dim(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Old axes are passed on; the value is constant along new and stretched ones."""
    x = values[0]
    axes = [constant(n) for n in ctx.shape()]
    for dim, axis in zip(ctx.params["broadcast_dimensions"], x.axes, strict=True):
        if axis:
            axes[dim] = axis
    return [TracedValue(tuple(axes), x.kind)]


@register_rule(P.reshape_p)
def reshape(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes, in another order where one is given, become products of axes, or are split."""
    x = values[0]
    order = ctx.params["dimensions"]  # gradients of convolutions in groups have one
    if order is not None:
        x = TracedValue(tuple(x.axes[dim] for dim in order), x.kind)
    reason = ctx.because(f"of {ctx.operand_shape(0)} to {ctx.shape()}")
    return [TracedValue(tuple(ctx.regroup(x, ctx.shape(), reason)), x.kind)]


@register_rule(P.squeeze_p)
def squeeze(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes of size 1 go."""
    (x,) = values
    return [_dropped(x, ctx.params["dimensions"])]


@register_rule(P.transpose_p)
def transpose(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes are passed on in another order."""
    (x,) = values
    return [TracedValue(tuple(x.axes[d] for d in ctx.params["permutation"]), x.kind)]


@register_rule(P.slice_p, reads=False)
def slice_(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """An axis that is cut falls into segments, one of which is kept; with strides it is pinned."""
    (x,) = values
    axes = list(x.axes)
    strides = ctx.params["strides"] or (1,) * len(axes)
    bounds = zip(ctx.params["start_indices"], ctx.params["limit_indices"], strides, strict=True)
    for dim, (start, end, stride) in enumerate(bounds):
        start, end = int(start), int(end)
        size, reason = ctx.operand_shape(0)[dim], ctx.because(f"along axis {dim}")
        if stride == 1:
            axes[dim] = _segment(ctx, axes[dim], start, end, size, reason)
        elif ctx.shape()[dim] != size:
            axes[dim] = ctx.cut(axes[dim], ctx.shape()[dim], reason)
    return [TracedValue(tuple(axes), x.kind)]


@register_rule(P.dynamic_slice_p)
def dynamic_slice(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes of which a part is taken are pinned, whole ones pass."""
    x = values[0]
    kind = max(v.kind for v in values)
    axes = []
    for dim, (axis, old, new) in enumerate(
        zip(x.axes, ctx.operand_shape(0), ctx.shape(), strict=True)
    ):
        cut = old != new
        axis = ctx.cut(axis, new, ctx.because(f"along axis {dim}")) if cut else axis
        axes.append(ctx.enter(axis, x, kind))
    return [TracedValue(tuple(axes), kind)]


@register_rule(P.pad_p, reads=False)
def pad(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Padding adds segments along which the value is constant; in between, it pins."""
    x, filler = values
    kind = max(x.kind, filler.kind)
    axes = []
    for dim, pads in enumerate(ctx.params["padding_config"]):
        low, high, between = map(int, pads)
        axis, size = ctx.enter(x.axes[dim], x, kind), ctx.operand_shape(0)[dim]
        reason = ctx.because(f"along axis {dim}")
        if between:
            ctx.unifier.pin(axis, reason)
            axis = ctx.unifier.pinned(ctx.shape()[dim], reason)
        elif low or high:
            kept = _segment(ctx, axis, max(0, -low), size - max(0, -high), size, reason)
            # Beside what stays, as positions of an input do, the padding may be where more of the
            # same is on other inputs.
            stays = not kept or any(not ctx.unifier.is_free(a) for a in ctx.unifier.variables(kept))
            before, after = (
                ctx.unifier.pinned(max(0, n), reason) if stays else constant(max(0, n))
                for n in (low, high)
            )
            axis = concatenated([before, kept, after])
        axes.append(axis)
    return [TracedValue(tuple(axes), kind)]


@register_rule(P.dynamic_update_slice_p)
def dynamic_update_slice(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes that are updated whole are tied, those updated in part are pinned."""
    x, update = values[:2]
    shapes = ctx.operand_shape(0), ctx.operand_shape(1)
    partial = [d for d, (n, m) in enumerate(zip(*shapes, strict=True)) if n != m]
    out = ctx.join([x, update], skip=partial)
    kind = max(v.kind for v in values)
    axes = [ctx.enter(a, out, kind) for a in out.axes]
    for dim in partial:
        reason = ctx.because(f"along axis {dim}")
        ctx.unifier.pin(x.axes[dim], reason)
        ctx.unifier.pin(update.axes[dim], reason)
        axes[dim] = ctx.unifier.pinned(shapes[0][dim], reason)
    return [TracedValue(tuple(axes), kind)]


@register_rule(P.concatenate_p)
def concatenate(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The concatenated axis is a sum of segments, the others are tied."""
    dim = int(ctx.params["dimension"])
    out = ctx.join(values, skip=(dim,))
    segments = []
    for value in values:
        axis = ctx.enter(value.axes[dim], value, out.kind)
        if value.kind is Kind.CONSTANT is not out.kind and is_constant(axis):
            axis = constant(size_of(axis), filled=True)
        segments.append(axis)
    axis = concatenated(segments)
    return [TracedValue((*out.axes[:dim], axis, *out.axes[dim + 1 :]), out.kind)]


@register_rule(*primitives.SPLIT, reads=False)
def split(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The axis that is split falls into segments, the others pass."""
    (x,) = values
    dim = ctx.params["axis"]
    reason = ctx.because(f"along axis {dim}")
    sizes = [ctx.shape(i)[dim] for i in range(len(ctx.eqn.outvars))]
    pieces = ctx.pieces(x.axes[dim], sizes, reason)
    _select_used(ctx, x.axes[dim], pieces, sizes)
    return [TracedValue((*x.axes[:dim], piece, *x.axes[dim + 1 :]), x.kind) for piece in pieces]


def _select_used(
    ctx: RuleContext, axis: Axis, pieces: Sequence[Axis], sizes: Sequence[int]
) -> None:
    """Notes of which results, one after the other along an axis, anything depends."""
    found = [
        (piece, (end - size, end))
        for piece, size, end, used in zip(
            pieces, sizes, itertools.accumulate(sizes), ctx.used, strict=True
        )
        if used
    ]
    ctx.select(axis, *(span for _, span in found), kept=[piece for piece, _ in found])


@register_rule(*primitives.UNSTACK, reads=False)
def unstack(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The axis that is taken apart falls into single positions, the others pass."""
    (x,) = values
    dim = ctx.params["axis"]
    if ctx.operand_shape(0)[dim] > 1:
        sizes = [1] * len(ctx.eqn.outvars)
        pieces = ctx.pieces(x.axes[dim], sizes, ctx.because(f"along axis {dim}"))
        _select_used(ctx, x.axes[dim], pieces, sizes)
    return [TracedValue((*x.axes[:dim], *x.axes[dim + 1 :]), x.kind) for _ in ctx.eqn.outvars]


@register_rule(*primitives.STACK)
def stack(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The new axis is pinned, the operands are tied along the others."""
    dim = ctx.params["axis"]
    out = ctx.join(values)
    axis = ctx.unifier.pinned(len(values), ctx.because(f"along axis {dim}"))
    return [TracedValue((*out.axes[:dim], axis, *out.axes[dim:]), out.kind)]


@register_rule(*primitives.TILE)
def tile(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """An axis becomes a product: the value is constant over the copies."""
    (x,) = values
    pairs = zip(ctx.params["reps"], x.axes, strict=True)
    return [TracedValue(tuple((*constant(count), *axis) for count, axis in pairs), x.kind)]


@register_rule(*primitives.BITCAST)
def bitcast(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Passed on, but for a last axis that appears or goes when the width of the type changes."""
    (x,) = values
    rank = len(ctx.shape())
    if rank < len(x.axes):
        ctx.unifier.pin(x.axes[-1], ctx.because("to a wider type"))
    new = [ctx.unifier.pinned(n, ctx.because()) for n in ctx.shape()[len(x.axes) :]]
    return [TracedValue((*x.axes[:rank], *new), x.kind)]


@register_rule(*primitives.OBSERVERS, reads=False)
def observer(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Looks at values and returns nothing: ties nothing."""
    return []


@register_rule(P.gather_p)
def gather(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes taken whole pass, those that are picked from are pinned; index axes come in front.

    There is one place only from which an axis can be taken whole. Where an index says otherwise it
    is clamped, or all of the slice is filled: either way the same along the axis.
    """
    x, index = values
    dims = ctx.params["dimension_numbers"]
    sizes, shape = ctx.params["slice_sizes"], ctx.operand_shape(0)
    kind = max(x.kind, index.kind)
    ctx.unifier.pin(index.axes[-1], ctx.because("by a vector of positions"))
    batch = list(index.axes[:-1])
    tied = dict(zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True))
    window = []
    for dim, axis in enumerate(x.axes):
        if dim in tied:  # the index vector is the last axis of the indices, always
            pair = [axis, batch[tied[dim]]]
            batch[tied[dim]] = ctx.unifier.unify(pair, [x.kind, index.kind])
        elif sizes[dim] != shape[dim]:
            window.append((dim, ctx.cut(axis, sizes[dim], ctx.because(f"along axis {dim}"))))
        else:
            window.append((dim, ctx.enter(axis, x, kind)))
    kept = iter([a for d, a in window if d not in dims.collapsed_slice_dims])
    rest = iter([ctx.enter(a, index, kind) for a in batch])
    offsets = set(dims.offset_dims)
    axes = tuple(next(kept if d in offsets else rest) for d in range(len(ctx.shape())))
    # The axes of the indices may be tied to those that they pick from.
    ctx.mixed(x, [d for d in range(len(sizes)) if sizes[d] != shape[d] and d not in tied])
    return [TracedValue(axes, kind)]


@register_rule(P.dot_general_p)
def dot_general(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Batch axes are tied, contracted axes too, with opposite roles; free axes pass."""
    x, y = values
    (x_sum, y_sum), (x_batch, y_batch) = ctx.params["dimension_numbers"]
    kind = max(x.kind, y.kind)
    # One number made of parameters alone is a penalty, written as a sum of products or in this way.
    penalty = kind is Kind.PARAMETER and not ctx.shape()
    for i, j in zip(x_sum, y_sum, strict=True):
        if penalty:
            ctx.unifier.unify([x.axes[i], y.axes[j]], [x.kind, y.kind])
        else:
            ctx.unifier.contract(x.axes[i], y.axes[j], (x.kind, y.kind))
    batch = [
        ctx.unifier.unify([x.axes[i], y.axes[j]], [x.kind, y.kind])
        for i, j in zip(x_batch, y_batch, strict=True)
    ]
    x_free = [d for d in range(len(x.axes)) if d not in (*x_sum, *x_batch)]
    y_free = [d for d in range(len(y.axes)) if d not in (*y_sum, *y_batch)]
    axes = [
        *batch,
        *(ctx.enter(x.axes[d], x, kind) for d in x_free),
        *(ctx.enter(y.axes[d], y, kind) for d in y_free),
    ]
    out = TracedValue(tuple(axes), kind)
    for position, (value, sums, ties) in enumerate(((x, x_sum, x_batch), (y, y_sum, y_batch))):
        ctx.contracted(value, sums, ties)
        ctx.consumed(position, value, sums)
    first = len(batch)
    for value, free in ((x, x_free), (y, y_free)):
        if value.kind is Kind.PARAMETER:
            ctx.produced(out, range(first, first + len(free)))
        first += len(free)
    return [out]


@register_rule(P.conv_general_dilated_p)
def conv_general_dilated(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Input channels are contracted, in groups where there are; space is pinned."""
    x, kernel = values
    unifier, params = ctx.unifier, ctx.params
    (n, c, *x_space), (o, i, *k_space), (out_n, out_c, *out_space) = params["dimension_numbers"]
    kind = max(x.kind, kernel.kind)
    groups = params["feature_group_count"]
    axes: list[Axis] = [()] * len(x.axes)

    if params["batch_group_count"] > 1:  # only gradients have these
        return ctx.pin_all(values, ctx.because("with batch_group_count"))
    axes[out_n] = ctx.enter(x.axes[n], x, kind)
    size = ctx.operand_shape(0)[c]
    reason = ctx.because(f"in {groups} groups")
    whole, part = unifier.regroup([x.axes[c]], (groups, size // groups), reason)
    outputs = ctx.shape()[out_c]
    k_whole, k_part = unifier.regroup([kernel.axes[o]], (groups, outputs // groups), reason)
    unifier.contract(part, kernel.axes[i], (x.kind, kernel.kind))
    tied = unifier.unify([whole, k_whole], [x.kind, kernel.kind])
    axes[out_c] = (*tied, *ctx.enter(k_part, kernel, kind))
    for dim, k_dim, out in zip(x_space, k_space, out_space, strict=True):
        reason = "a spatial axis of a convolution"
        unifier.pin(kernel.axes[k_dim], reason)
        unifier.pin(x.axes[dim], reason)
        axes[out] = unifier.pinned(ctx.shape()[out], reason)  # padding: it varies, whatever x does
    out = TracedValue(tuple(axes), kind)
    # Of the channels only those within a group are summed over; the groups are met one by one.
    ctx.contracted(TracedValue((x.axes[n], whole, part), x.kind), [2], [1])
    ctx.mixed(x, x_space)
    ctx.contracted(kernel, [i, *k_space], [o])
    ctx.consumed(0, x, [c])
    ctx.consumed(1, kernel, [i])
    if kernel.kind is Kind.PARAMETER:
        ctx.produced(out, [out_c])
    return [out]


@register_rule(*WINDOW)
def window(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes with a window, stride or padding are pinned, the others pass."""
    (x,) = values
    names = "window_dimensions", "window_strides", "base_dilation", "window_dilation", "padding"
    axes = list(x.axes)
    for dim, setting in enumerate(zip(*(ctx.params[name] for name in names), strict=True)):
        if setting != (1, 1, 1, 1, (0, 0)):
            reason = ctx.because(f"along axis {dim}")
            ctx.unifier.pin(axes[dim], reason)
            axes[dim] = ctx.unifier.pinned(ctx.shape()[dim], reason)
    return [TracedValue(tuple(axes), x.kind)]


@register_rule(*primitives.CALLS)
def call(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The body of the call is walked; how it is differentiated does not matter here."""
    jaxpr = jaxprs.body(ctx.eqn)
    assert jaxpr is not None
    return ctx.call(jaxpr, values, used=ctx.used)


@register_rule(*primitives.HIGHER)
def higher(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Its implementation is walked."""
    # It is traced anew each time, so that no feature inside of it has a lasting place.
    return ctx.call(jaxprs.expanded(ctx.eqn), values, once=False, used=ctx.used)


@register_rule(P.cond_p)
def cond(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Branches are walked each, and their results tied."""
    index, *operands = values
    branches = [
        ctx.call(branch, operands, once=False, used=ctx.used) for branch in ctx.params["branches"]
    ]
    # The index may depend on inputs where no branch does: it makes features of the results.
    scalar = TracedValue((), index.kind)
    return [ctx.join([*alternatives, scalar]) for alternatives in zip(*branches, strict=True)]


@register_rule(P.scan_p)
def scan(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The body is walked on slices; what is carried is tied to itself, iterations are pinned."""
    consts, init, stacked = jaxprs.scan_operands(ctx.eqn, values)
    index = ctx.unifier.pinned(ctx.params["length"], ctx.because("over its iterations"))
    for x in stacked:
        ctx.unifier.unify([index, x.axes[0]], [Kind.CONSTANT, x.kind])
    slices = [TracedValue(x.axes[1:], x.kind) for x in stacked]

    def body(carry: list[TracedValue]) -> list[TracedValue]:
        return ctx.call(ctx.params["jaxpr"], [*consts, *carry, *slices], iterations=index)

    carry, results = ctx.repeat(body, init)
    return [*carry, *(TracedValue((index, *y.axes), y.kind) for y in results[len(carry) :])]


@register_rule(P.while_p)
def while_(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The body is walked, and what is carried is tied to itself."""
    first = ctx.params["cond_nconsts"]
    last = first + ctx.params["body_nconsts"]
    of_cond, of_body, init = values[:first], values[first:last], values[last:]

    def body(carry: list[TracedValue]) -> list[TracedValue]:
        (going,) = ctx.call(ctx.params["cond_jaxpr"], [*of_cond, *carry], once=False)
        results = ctx.call(ctx.params["body_jaxpr"], [*of_body, *carry], once=False)
        # How often it runs may depend on inputs where nothing else does.
        return [ctx.join([x, TracedValue((), going.kind)]) for x in results]

    return ctx.repeat(body, init)[0]


@register_rule(*PINNED)
def pinned(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Nothing is known of what it does with positions: all axes are pinned."""
    return ctx.pin_all(values, ctx.because())


@register_rule(*MATRIX)
def matrix(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Decompositions, solutions, transforms: their own axes are pinned, batch axes are tied."""
    inner = (
        1 if ctx.eqn.primitive in primitives.PIVOTS else len(ctx.params.get("fft_lengths", (0, 0)))
    )
    batched = max(len(v.axes) for v in values) - inner
    reason = ctx.because()
    for value in values:
        for axis in value.axes[batched:]:
            ctx.unifier.pin(axis, reason)
    batch = ctx.join([TracedValue(v.axes[:batched], v.kind) for v in values])
    shapes = (ctx.shape(i)[batched:] for i in range(len(ctx.eqn.outvars)))
    return [
        TracedValue((*batch.axes, *(ctx.unifier.pinned(n, reason) for n in shape)), batch.kind)
        for shape in shapes
    ]


@register_rule(*SCATTER)
def scatter(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Axes written whole are tied to the updates', those written at positions are pinned.

    There is one place only at which an axis can be written whole; see `gather`.
    """
    x, index, updates = values
    dims = ctx.params["dimension_numbers"]
    shapes = ctx.operand_shape(0), ctx.operand_shape(2)
    kind = max(v.kind for v in values)
    reason = ctx.because()
    # Axes of the indices, all but the last, and those of the updates outside of the window go
    # together, in order.
    outside = [d for d in range(len(updates.axes)) if d not in dims.update_window_dims]
    batch = zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True)
    tied = {dim: (of_index, outside[of_index]) for dim, of_index in batch}
    alone = [d for d in range(len(x.axes)) if d not in tied and d not in dims.inserted_window_dims]
    window = dict(zip(alone, dims.update_window_dims, strict=True))
    for dim, axis in enumerate(index.axes):
        if dim not in dims.scatter_indices_batching_dims:
            ctx.unifier.pin(axis, reason)
    for dim in outside:
        if dim not in {of_updates for _, of_updates in tied.values()}:
            ctx.unifier.pin(updates.axes[dim], reason)
    axes, picked = [], []
    for dim, axis in enumerate(x.axes):
        if dim in tied:
            of_index, of_updates = tied[dim]
            met = [axis, index.axes[of_index], updates.axes[of_updates]]
            axes.append(ctx.unifier.unify(met, [v.kind for v in values]))
        elif dim in window and shapes[0][dim] == shapes[1][window[dim]]:
            met = [axis, updates.axes[window[dim]]]
            among = max(x.kind, updates.kind)
            axis = ctx.unifier.unify(met, [x.kind, updates.kind])
            axes.append(ctx.unifier.enter(axis, among, kind))
        else:
            picked.append(dim)
            ctx.unifier.pin(axis, reason)
            if dim in window:
                ctx.unifier.pin(updates.axes[window[dim]], reason)
            axes.append(ctx.unifier.pinned(shapes[0][dim], reason))
    ctx.mixed(x, picked)
    kept = {window[d] for d in window if d not in picked} | {d for _, d in tied.values()}
    ctx.mixed(updates, [d for d in range(len(updates.axes)) if d not in kept])
    return [TracedValue(tuple(axes), kind)]


def _segment(ctx: RuleContext, axis: Axis, start: int, end: int, size: int, reason: str) -> Axis:
    """Returns the piece of an axis between two positions."""
    if (start, end) == (0, size):
        return axis
    sizes = [n for n in (start, end - start, size - end) if n]
    if start >= end:
        return ctx.cut(axis, 0, reason)
    kept = ctx.pieces(axis, sizes, reason)[int(start > 0)]
    ctx.select(axis, (start, end), kept=[kept])
    return kept


def _dropped(value: TracedValue, dims: Collection[SupportsIndex]) -> TracedValue:
    """Returns the value without some of its axes. Those of vmap are NumPy's integers."""
    return TracedValue(tuple(a for d, a in enumerate(value.axes) if d not in dims), value.kind)


def _vary(ctx: RuleContext, value: TracedValue, dim: int) -> TracedValue:
    """Returns the value with one axis pinned, also where it was constant along it."""
    reason = ctx.because(f"along axis {dim}")
    ctx.unifier.pin(value.axes[dim], reason)
    axes = list(value.axes)
    axes[dim] = ctx.unifier.pinned(ctx.operand_shape(0)[dim], reason)
    return TracedValue(tuple(axes), value.kind)


def primitive_table() -> str:
    """Returns the supported primitives as a Markdown table, one row per rule.

    Returns:
        Markdown, made from the registry, so that it can't fall behind it.
    """
    rows = ["| rule | primitives | what it does to axes |", "|---|---|---|"]
    by_rule: dict[Rule, list[str]] = {}
    for primitive, rule in registered().items():
        by_rule.setdefault(rule, []).append(str(primitive))
    for rule, found in by_rule.items():
        names = ", ".join(f"`{name}`" for name in sorted(found))
        rows.append(f"| {rule.__name__} | {names} | {(rule.__doc__ or '').splitlines()[0]} |")
    return "\n".join(rows)
