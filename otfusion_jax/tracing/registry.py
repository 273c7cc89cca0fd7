"""The registry of rules: what is known of each primitive, and how more is declared.

A rule says what one primitive does to the axes of its operands. The rule of a call or a branch
applies the rules of the jaxpr within, and has the same type as any other. The rules that come with
the library are in `rules`, those of other packages' primitives in `package_rules`.
"""

from collections.abc import Callable, Iterable

from jax.extend import core

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.values import Values

Rule = Callable[[RuleContext, Values], Values]
"""From an equation's context and operands to its results."""

Finder = Callable[[core.Primitive], Rule | None]
"""From a primitive to its rule, or to None if the finder knows none."""


class UnsupportedPrimitiveError(NotImplementedError):
    """A primitive of the traced function has no rule.

    The message names the primitive, the source line that uses it, and the ways out: to pin what it
    touches, to declare a rule (see `register_rule`), or to write the line with other primitives.
    """


_registry: dict[core.Primitive, Rule] = {}
_selecting: set[core.Primitive] = set()
_finders: list[Finder] = []


def register_rule(*primitives: core.Primitive, reads: bool = True) -> Callable[[Rule], Rule]:
    """Declares the rule of one or more primitives. To be used as a decorator.

    Every later call of `trace_symmetry` applies the rule. It replaces the one that the primitive
    had, be it one that comes with the library.

    Args:
        *primitives: Primitive objects, such as `jax.extend.core.primitives.add_p` or a
            `jax.extend.core.Primitive` of your own.
        reads: Whether the results depend on all of the operands. False for a primitive that selects
            parts of them, as `slice` does: a part of a parameter that the program selects nowhere
            stays in place.

    Returns:
        The decorator. It takes a function of the equation's `RuleContext` and of the list of the
        operands' `TracedValue`s, which returns the list of the results' `TracedValue`s, and leaves
        that function as it is.

    Raises:
        TypeError: For no primitives, for what is no primitive (a name, a function of `jax.numpy`,
            the rule itself), and, by the decorator, for a rule that cannot be called.

    Examples:
        >>> import otfusion_jax as otf
        >>> from jax.extend import core
        >>> swish_p = core.Primitive("swish")
        >>> @otf.register_rule(swish_p)
        ... def swish(ctx, values):
        ...     return [ctx.join(values)]  # elementwise: operand and result move together
    """
    call = "@register_rule(primitive), as in register_rule(jax.extend.core.primitives.tanh_p)"
    if not primitives:
        raise TypeError(f"register_rule was given no primitive: write {call}")
    for primitive in primitives:
        if not isinstance(primitive, core.Primitive):
            raise TypeError(
                f"{kind_of(primitive)} was given where a primitive is wanted: write {call}, above "
                "the function that is its rule"
            )

    return register_family(primitives, reads)


def register_family(
    primitives: Iterable[core.Primitive], reads: bool = True
) -> Callable[[Rule], Rule]:
    """Declares the rule of a family of primitives, of which a version of JAX may have none.

    Args:
        primitives: The primitives.
        reads: See `register_rule`.

    Returns:
        The decorator, see `register_rule`.
    """

    def add(rule: Rule) -> Rule:
        if not callable(rule):
            raise TypeError(
                f"{kind_of(rule)} was given where a rule is wanted: a function of the equation's "
                "RuleContext and of the list of its operands' TracedValues"
            )
        for primitive in primitives:
            _registry[primitive] = rule
            if reads:
                _selecting.discard(primitive)
            else:
                _selecting.add(primitive)
        return rule

    return add


def find_with(finder: Finder) -> None:
    """Declares where to look for the rule of a primitive that has none.

    Args:
        finder: A function that is asked each time such a primitive is met. What it returns is not
            kept, as the package that the primitive belongs to may be imported later on.
    """
    if finder not in _finders:
        _finders.append(finder)


def rule_of(primitive: core.Primitive) -> Rule | None:
    """Returns the rule of a primitive: the one declared for it, or else the first one found.

    Args:
        primitive: The primitive of an equation.

    Returns:
        Its rule; None if it has none.
    """
    if primitive in _registry:
        return _registry[primitive]
    for find in _finders:
        rule = find(primitive)
        if rule is not None:
            return rule
    return None


def selects(primitive: core.Primitive) -> bool:
    """Whether a primitive takes parts of its operands and leaves others unread."""
    return primitive in _selecting


def registered() -> dict[core.Primitive, Rule]:
    """Returns a copy of the registry, which maps primitives to their rules."""
    return dict(_registry)
