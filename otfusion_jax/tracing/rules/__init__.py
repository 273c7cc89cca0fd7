"""What each primitive does to axes: one small function per primitive, one line per family.

A rule ties axes (elementwise operations, contractions), takes them apart (reshape, grouped
convolution), passes them on, drops them (reductions do not care about order), or pins them. It says
what must hold for the result to be equivariant under a permutation of the units, and nothing else.

`families` lists the primitives that share a rule. The other modules hold the rules by subject, and
importing this package registers all of them. docs/rules.md says how to write one.
"""

# Importing a module of rules registers them, in the order of the table in docs/primitives.md.
from otfusion_jax.tracing.registry import Rule, registered
from otfusion_jax.tracing.rules import (
    contractions,
    control_flow,
    elementwise,
    indexing,
    opaque,
    ordering,
    reductions,
    segments,
    shapes,
)
from otfusion_jax.tracing.rules.families import ELEMENTWISE, REDUCTION
from otfusion_jax.tracing.rules.opaque import pinned

__all__ = [
    "ELEMENTWISE",
    "REDUCTION",
    "contractions",
    "control_flow",
    "elementwise",
    "indexing",
    "opaque",
    "ordering",
    "pinned",
    "primitive_table",
    "reductions",
    "segments",
    "shapes",
]


def primitive_table() -> str:
    """Returns the supported primitives as a Markdown table, one row per rule.

    Returns:
        Markdown, made from the registry, so that it can't fall behind it.
    """
    names_by_rule: dict[Rule, list[str]] = {}
    for primitive, rule in registered().items():
        names = names_by_rule.setdefault(rule, [])
        names.append(f"`{primitive}`")
    rows = ["| rule | primitives | what it does to axes |", "|---|---|---|"]
    for rule, names in names_by_rule.items():
        primitives = ", ".join(sorted(names))
        summary, *_ = (rule.__doc__ or "").splitlines()
        rows.append(f"| {rule.__name__} | {primitives} | {summary} |")
    return "\n".join(rows)
