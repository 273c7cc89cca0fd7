"""Rules for primitives of packages beside JAX, and of parts of JAX that are loaded on demand.

No package is imported here. A primitive that has no rule is met only after the package that defines
it was imported by someone else, so it is looked for then: first by where it is defined, then by who
wrote its implementation.

Equinox, lineax, optimistix and diffrax implement their primitives by functions of JAX. What such a
primitive does to axes is what its implementation does, so that is traced, and its rules applied.
"""

import sys
from typing import Any

import jax
from jax.extend import core

from otfusion_jax.tracing import jaxprs, primitives
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import Rule, find_with, register_family
from otfusion_jax.tracing.rules import pinned
from otfusion_jax.tracing.values import Values

# Packages whose primitives are implemented by functions of JAX, which can be traced.
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


def implementation(ctx: RuleContext, values: Values) -> Values:
    """The rules of its implementation are applied."""
    primitive = ctx.eqn.primitive
    params = ctx.params

    def run(*args: Any) -> Any:
        return primitive.impl(*args, **params)

    jaxpr = jax.make_jaxpr(run)(*jaxprs.operands_of(ctx.eqn))
    return _apply(ctx, jaxpr, values)


def noinline(ctx: RuleContext, values: Values) -> Values:
    """The rules of the function that Equinox keeps out of the program are applied."""
    equinox_noinline = sys.modules["equinox.internal._noinline"]
    index = ctx.eqn.invars[0]
    if not isinstance(index, core.Literal):
        return ctx.pin_all(values, ctx.because("of a function that is chosen as it runs"))
    params = ctx.params

    # As Equinox's own implementation does it: the operands and the static parameters hold a tree of
    # the function's number, of the transforms to apply to it, and of its arguments.
    def run(*dynamic: Any) -> list[Any]:
        flat = equinox_noinline._primitive._combine(dynamic, params["static"])
        tree = jax.tree_util.tree_unflatten(params["treedef"], flat)
        _, _, transforms, args = tree
        number = int(index.val)
        function = equinox_noinline._index_to_fn[number]
        for transform in transforms:
            function = transform(function)
        return params["flatten"](function(args))

    jaxpr = jax.make_jaxpr(run)(*jaxprs.operands_of(ctx.eqn))
    return _apply(ctx, jaxpr, values)


def _apply(ctx: RuleContext, jaxpr: core.ClosedJaxpr, values: Values) -> Values:
    """Applies the rules of a jaxpr that was traced for this equation."""
    # It is traced anew each time, so that no feature inside of it has a lasting place.
    return ctx.call(jaxpr, values, once=False, used=ctx.used)


@register_family(primitives.PURE_CALLBACK)
def pure_callback(ctx: RuleContext, values: Values) -> Values:
    """All axes are pinned, as nothing is known of it. One that raises an error returns nothing."""
    if not _raises(ctx.params["callback"]):
        return pinned(ctx, values)
    # What it returns is never used: it does not return.
    positions = range(len(ctx.eqn.outvars))
    return list(map(ctx.constant_result, positions))


def _raises(callback: Any) -> bool:
    """Whether a callback is the one by which `equinox.error_if` fails."""
    function = getattr(callback, "callback_func", callback)
    return getattr(function, "__module__", None) == "equinox._errors"


def rule_of(primitive: core.Primitive) -> Rule | None:
    """Finds the rule of a primitive by where it is defined.

    Args:
        primitive: A primitive that is not registered.

    Returns:
        Its rule; None if it is of no package known here.
    """
    if _is_defined_in("equinox.internal._noinline", primitive):
        return noinline
    for module in OPAQUE_MODULES:
        if _is_defined_in(module, primitive):
            return pinned
    package = getattr(primitive.impl, "__module__", "").partition(".")[0]
    if package in IMPLEMENTED_IN_JAX:
        return implementation
    return None


def _is_defined_in(module: str, primitive: core.Primitive) -> bool:
    """Whether a module that has been imported holds a primitive under any name."""
    if module not in sys.modules:
        return False
    for value in vars(sys.modules[module]).values():
        if value is primitive:
            return True
    return False


find_with(rule_of)
