"""Rules of what runs a jaxpr: calls, branches and loops."""

from otfusion_jax.tracing import jaxprs, primitives
from otfusion_jax.tracing.axis import Kind
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family, register_rule
from otfusion_jax.tracing.rules.families import P
from otfusion_jax.tracing.values import TracedValue, Values


@register_family(primitives.CALLS)
def call(ctx: RuleContext, values: Values) -> Values:
    """The rules of its body are applied; how it is differentiated does not matter here."""
    jaxpr = jaxprs.body(ctx.eqn)
    assert jaxpr is not None  # as the primitive is one of `CALLS`
    return ctx.call(jaxpr, values, used=ctx.used)


@register_family(primitives.HIGHER)
def higher(ctx: RuleContext, values: Values) -> Values:
    """The rules of its implementation are applied."""
    # It is traced anew each time, so that no feature inside of it has a lasting place.
    return ctx.call(jaxprs.expanded(ctx.eqn), values, once=False, used=ctx.used)


@register_family(primitives.SHARD_MAP)
def shard_map(ctx: RuleContext, values: Values) -> Values:
    """Its body's rules are applied to what a device has; axes that devices share out are pinned."""
    jaxpr = jaxprs.closed(ctx.params["jaxpr"])
    reason = ctx.because("shared out to devices")
    operands = []
    for position, (x, aval) in enumerate(zip(values, jaxpr.in_avals, strict=True)):
        operands.append(_shared_out(ctx, x, ctx.operand_shape(position), aval.shape, reason))
    results = ctx.call(jaxpr, operands, once=False)
    collected = []
    for y, aval, shape in zip(results, jaxpr.out_avals, ctx.shapes(), strict=True):
        collected.append(_shared_out(ctx, y, aval.shape, shape, reason))
    return collected


def _shared_out(
    ctx: RuleContext,
    x: TracedValue,
    shape: tuple[int, ...],
    new_shape: tuple[int, ...],
    reason: str,
) -> TracedValue:
    """Passes axes between what one device has and the whole, where they are the same length."""
    axes = list(x.axes)
    for dim, (size, new_size) in enumerate(zip(shape, new_shape, strict=True)):
        if size != new_size:
            ctx.pin(x.axes[dim], reason)
            axes[dim] = ctx.fresh_pinned(new_size, reason)
    if axes == list(x.axes):
        return x
    # Another value, which says what has become of the one that it is a part of, or has parts of.
    return ctx.one_of(TracedValue(tuple(axes), x.kind), [x])


@register_rule(P.cond_p)
def cond(ctx: RuleContext, values: Values) -> Values:
    """The rules of each branch are applied, and the branches' results tied."""
    index, *operands = values
    results_of_branches = []
    for branch in ctx.params["branches"]:
        results = ctx.call(branch, operands, once=False, used=ctx.used)
        results_of_branches.append(results)
    # The index may depend on inputs where no branch does: it makes features of the results.
    choice = TracedValue((), index.kind)
    joined = []
    for alternatives in zip(*results_of_branches, strict=True):
        result = ctx.join([*alternatives, choice])
        joined.append(ctx.one_of(result, alternatives))
    return joined


@register_rule(P.scan_p)
def scan(ctx: RuleContext, values: Values) -> Values:
    """Its body's rules are applied to slices; what is carried is tied, iterations are pinned."""
    consts, init, stacked = jaxprs.scan_operands(ctx.eqn, values)
    jaxpr = ctx.params["jaxpr"]
    length = ctx.params["length"]
    iterations = ctx.fresh_pinned(length, ctx.because("over its iterations"))
    slices = []
    for x in stacked:
        first = x.axes[0]
        ctx.tie([iterations, first], [Kind.CONSTANT, x.kind])
        ctx.note_sliced(x)
        slices.append(x.without([0]))

    def body(carry: Values) -> Values:
        operands = consts + carry + slices
        return ctx.call(jaxpr, operands, iterations=iterations)

    carry, results = ctx.repeat(body, init)
    collected = []
    for y in results[len(carry) :]:
        ctx.note_collected(y)
        # `_replace` keeps the number: what is collected is what the body returns, slice by slice.
        collected.append(y._replace(axes=(iterations, *y.axes)))
    return carry + collected


@register_rule(P.while_p)
def while_(ctx: RuleContext, values: Values) -> Values:
    """The rules of its body are applied, and what is carried is tied to itself."""
    params = ctx.params
    body_start = params["cond_nconsts"]
    init_start = body_start + params["body_nconsts"]
    cond_consts = values[:body_start]
    body_consts = values[body_start:init_start]

    def body(carry: Values) -> Values:
        (condition,) = ctx.call(params["cond_jaxpr"], cond_consts + carry, once=False)
        results = ctx.call(params["body_jaxpr"], body_consts + carry, once=False)
        # How often it runs may depend on inputs where nothing else does.
        count = TracedValue((), condition.kind)
        return [ctx.one_of(ctx.join([result, count]), [result]) for result in results]

    carry, _ = ctx.repeat(body, values[init_start:])
    return carry
