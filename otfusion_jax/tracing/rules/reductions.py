"""Rules of reductions: axes that a sum, an extremum or a function of two numbers runs over."""

from jax.extend import core

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import COLLECTIVE, REDUCTION, SYMMETRIC, WINDOW, P
from otfusion_jax.tracing.values import TracedValue, Values, highest_kind


@register_family(REDUCTION)
def reduction(ctx: RuleContext, values: Values) -> Values:
    """A reduced axis is dropped: sums and extrema do not care about order."""
    (x,) = values
    return [x.without(ctx.params["axes"])]


@register_family(COLLECTIVE)
def collective(ctx: RuleContext, values: Values) -> Values:
    """Over an axis that `vmap` names, a reduction of each operand."""
    # `vmap` has replaced its names by numbers of axes. What is named still is an axis of devices,
    # over which each position is combined with the same one elsewhere.
    reduced = [axis for axis in ctx.params["axes"] if isinstance(axis, int)]
    return [x.without(reduced) for x in values]


@register_family(primitives.ALL_GATHER)
def all_gather(ctx: RuleContext, values: Values) -> Values:
    """The axis along which devices have their parts is pinned, others are passed on."""
    (x,) = values
    dim = ctx.params["all_gather_dimension"]
    axes = list(x.axes)
    if ctx.params["tiled"]:
        ctx.pin(axes.pop(dim), ctx.because("over devices"))
    axes.insert(dim, ctx.fresh_pinned(ctx.shapes()[0][dim], ctx.because("over devices")))
    return [TracedValue(tuple(axes), x.kind)]


@register_family(primitives.EXCHANGE)
def exchange(ctx: RuleContext, values: Values) -> Values:
    """Axes along which devices exchange parts are pinned, others are passed on."""
    (x,) = values
    params = ctx.params
    if not params["tiled"]:
        return ctx.pin_all(values, ctx.because("over devices"))
    names = ("split_axis", "concat_axis", "scatter_dimension")
    exchanged = {params[name] for name in names if name in params}
    result = x
    for dim in sorted(exchanged):
        reason = ctx.because_along(dim)
        ctx.pin(x.axes[dim], reason)
        result = result.with_axis(dim, ctx.fresh_pinned(ctx.shape()[dim], reason))
    return [result]


@register_rule(P.reduce_p)
def reduce(ctx: RuleContext, values: Values) -> Values:
    """Reduced axes are dropped if order does not matter, else pinned; the others are tied."""
    reduced = ctx.params["dimensions"]
    # The first half of the operands is reduced, each from a scalar in the second half.
    count = len(ctx.eqn.outvars)
    arrays = values[:count]
    if not _is_symmetric(ctx.params["jaxpr"].jaxpr):
        for x in arrays:
            for dim in reduced:
                detail = f"by a function that is not known to commute, over axis {dim}"
                ctx.pin(x.axes[dim], ctx.because(detail))
    tied = ctx.join(arrays)
    kept = tied.without(reduced)
    kind = highest_kind(values)
    axes = [ctx.pass_on(axis, tied.kind, kind) for axis in kept.axes]
    return [TracedValue(tuple(axes), kind)] * count


def _is_symmetric(combine: core.Jaxpr) -> bool:
    """Whether a function that combines two sets of numbers commutes and associates for certain.

    It does if it combines the numbers one by one, each pair by an operation that does.
    """
    count = len(combine.outvars)
    makers: dict[core.Var, core.JaxprEqn] = {}
    for eqn in combine.eqns:
        if eqn.primitive not in SYMMETRIC:
            return False
        makers[eqn.outvars[0]] = eqn
    if len(makers) != count:
        return False
    first, second = combine.invars[:count], combine.invars[count:]
    for out, x, y in zip(combine.outvars, first, second, strict=True):
        if isinstance(out, core.Literal) or out not in makers:
            return False
        if set(makers[out].invars) != {x, y}:
            return False
    return True


@register_family(WINDOW)
def window(ctx: RuleContext, values: Values) -> Values:
    """Axes with a window, stride or padding are pinned, the others pass."""
    (x,) = values
    params = ctx.params
    settings = zip(
        params["window_dimensions"],
        params["window_strides"],
        params["base_dilation"],
        params["window_dilation"],
        params["padding"],
        strict=True,
    )
    untouched = (1, 1, 1, 1, (0, 0))
    result = x
    for dim, setting in enumerate(settings):
        if setting == untouched:
            continue
        reason = ctx.because_along(dim)
        ctx.pin(x.axes[dim], reason)
        windows = ctx.fresh_pinned(ctx.shape()[dim], reason)
        result = result.with_axis(dim, windows)
    return [result]
