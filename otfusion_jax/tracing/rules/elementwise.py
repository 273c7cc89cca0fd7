"""Rules of operations that act on each element by itself, or pass whole operands on."""

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import register_family
from otfusion_jax.tracing.rules.families import ELEMENTWISE, ONE_BY_ONE
from otfusion_jax.tracing.values import Values


@register_family(ELEMENTWISE)
def elementwise(ctx: RuleContext, values: Values) -> Values:
    """Operands and result move together; scalars meet anything."""
    return [ctx.join(values)]


@register_family(primitives.EQUALITY)
def equality(ctx: RuleContext, values: Values) -> Values:
    """Operands and result move together; so do the axes of which positions are compared."""
    ctx.compare_positions(values)
    return [ctx.join(values)]


@register_family(ONE_BY_ONE)
def one_by_one(ctx: RuleContext, values: Values) -> Values:
    """Each operand is passed on."""
    return values


@register_family(primitives.TIE)
def tie(ctx: RuleContext, values: Values) -> Values:
    """The last operand is passed on: it waits for the others and does not depend on them."""
    return values[-1:]


@register_family(primitives.OBSERVERS, reads=False)
def observer(ctx: RuleContext, values: Values) -> Values:
    """Looks at values and returns nothing: ties nothing."""
    return []
