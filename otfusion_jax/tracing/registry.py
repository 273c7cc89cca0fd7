"""The walk over a jaxpr: the registry of rules, what a rule sees, and the loop that applies them.

What each primitive does to the axes of its operands is said by one rule (see `rules`). The rule of
a call or a branch walks its sub-jaxpr and has the same type as any other.

The walk is sound, not complete: a wrong group silently destroys a model, a missing group only
merges less. Whatever a rule cannot express is pinned, and a primitive without a rule is an error
(or pins all that it touches, on demand).
"""

from collections.abc import Callable

from jax.extend import core

from otfusion_jax.tracing.context import RuleContext, TracedValue


class UnsupportedPrimitiveError(NotImplementedError):
    """A primitive of the traced function has no rule."""


Rule = Callable[["RuleContext", list[TracedValue]], list[TracedValue]]
_registry: dict[core.Primitive, Rule] = {}
_selecting: set[core.Primitive] = set()
_finders: list[Callable[[core.Primitive], Rule | None]] = []


def register_rule(*primitives: core.Primitive, reads: bool = True) -> Callable[[Rule], Rule]:
    """Decorator: declares the rule of one or more primitives.

    Args:
        *primitives: primitive objects (`jax.extend.core.primitives.add_p`).
        reads: whether the results depend on all of the operands. False where parts of them are
            selected: parts of a parameter that the program selects nowhere stay in place.

    Returns:
        The decorator. A rule takes the `RuleContext` of the equation and the `TracedValue`s of the
        operands, and returns those of the results. It ties, splits and pins axes through the
        context.
    """

    def add(rule: Rule) -> Rule:
        for primitive in primitives:
            _registry[primitive] = rule
            if not reads:
                _selecting.add(primitive)
        return rule

    return add


def find_with(finder: Callable[[core.Primitive], Rule | None]) -> None:
    """Declares rules that are looked for when a primitive is met that has none.

    Args:
        finder: from the primitive to its rule, or None. What it finds is not kept.
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
    """Whether a primitive takes parts of its operands, and leaves others unread."""
    return primitive in _selecting


def registered() -> dict[core.Primitive, Rule]:
    """Returns a copy of the registry: primitive to rule."""
    return dict(_registry)
