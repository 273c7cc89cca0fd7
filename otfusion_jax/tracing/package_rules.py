"""Rules for primitives of packages beside JAX, and of parts of JAX that are loaded on demand.

No package is imported here. A primitive that has no rule is met only after the package that defines
it was imported by someone else, so it is looked for then: first by where it is defined, then by who
wrote its implementation.

Equinox, lineax, optimistix and diffrax implement their primitives by functions of JAX. What such a
primitive does to axes is what its implementation does, so that is traced and walked.
"""

import sys
from typing import Any

import jax
from jax.extend import core

from otfusion_jax.tracing import jaxprs, primitives
from otfusion_jax.tracing.axis import Kind, constant
from otfusion_jax.tracing.context import RuleContext, TracedValue
from otfusion_jax.tracing.registry import Rule, find_with, register_rule
from otfusion_jax.tracing.rules import pinned

IMPLEMENTED_IN_JAX = frozenset({"equinox", "lineax", "optimistix", "diffrax"})

# Kernels and programs of another compiler: nothing is known of what is in them.
OPAQUE_MODULES = (
    "jax._src.cudnn.fused_attention_stablehlo",
    "jax._src.cudnn.fusion",
    "jax._src.cudnn.scaled_matmul_stablehlo",
    "jax._src.export._export",
    "jax._src.nn.functions",
    "jax._src.pallas.pallas_call",
    "jax._src.tpu_custom_call",
    "jax.experimental.mosaic.gpu.core",
    "jax.experimental.sparse.bcoo",
    "jax.experimental.sparse.bcsr",
    "jax.experimental.sparse.coo",
    "jax.experimental.sparse.csr",
)


def implementation(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """Its implementation is walked."""
    primitive, params = ctx.eqn.primitive, ctx.params
    jaxpr = jax.make_jaxpr(lambda *args: primitive.impl(*args, **params))
    return _walked(ctx, values, jaxpr(*jaxprs.operands_of(ctx.eqn)))


def noinline(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """The function that Equinox keeps out of the program is walked."""
    home = sys.modules["equinox.internal._noinline"]
    index = ctx.eqn.invars[0]
    if not isinstance(index, core.Literal):
        return ctx.pin_all(values, ctx.because("of a function that is chosen as it runs"))
    params = ctx.params

    def run(*dynamic: Any) -> list[Any]:
        flat = home._primitive._combine(dynamic, params["static"])
        _, _, transforms, args = jax.tree_util.tree_unflatten(params["treedef"], flat)
        fn = home._index_to_fn[int(index.val)]
        for transform in transforms:
            fn = transform(fn)
        return params["flatten"](fn(args))

    return _walked(ctx, values, jax.make_jaxpr(run)(*jaxprs.operands_of(ctx.eqn)))


def _walked(
    ctx: RuleContext, values: list[TracedValue], jaxpr: core.ClosedJaxpr
) -> list[TracedValue]:
    # It is traced anew each time, so that no feature inside of it has a lasting place.
    return ctx.call(jaxpr, values, once=False, used=ctx.used)


@register_rule(*primitives.PURE_CALLBACK)
def pure_callback(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
    """All axes are pinned, as nothing is known of it. One that raises an error returns nothing."""
    if not _raises(ctx.params["callback"]):
        return pinned(ctx, values)
    shapes = map(ctx.shape, range(len(ctx.eqn.outvars)))
    return [TracedValue(tuple(map(constant, shape)), Kind.CONSTANT) for shape in shapes]


def _raises(callback: Any) -> bool:
    """Whether a callback is the one by which `equinox.error_if` fails."""
    function = getattr(callback, "callback_func", callback)
    return getattr(function, "__module__", None) == "equinox._errors"


def rule_of(primitive: core.Primitive) -> Rule | None:
    """Finds the rule of a primitive by where it is defined.

    Args:
        primitive: one that is not registered.

    Returns:
        Its rule; None if it is of no package known here.
    """
    if _defines("equinox.internal._noinline", primitive):
        return noinline
    if any(_defines(module, primitive) for module in OPAQUE_MODULES):
        return pinned
    package = getattr(primitive.impl, "__module__", "").partition(".")[0]
    return implementation if package in IMPLEMENTED_IN_JAX else None


def _defines(module: str, primitive: core.Primitive) -> bool:
    found = vars(sys.modules[module]).values() if module in sys.modules else ()
    return any(value is primitive for value in found)


find_with(rule_of)
