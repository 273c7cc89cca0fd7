"""Leaves that a program picks apart by index, each part as a parameter of its own.

Queries, keys and values in one array, of which the program takes `[0]`, `[1]` and `[2]`; layers in
a stack that is indexed in a Python loop. One array has one symmetry along each of its other axes,
three arrays have three. So the program is interpreted twice: as it is, which shows what leaves it
picks apart, and rewritten so that the parts are its arguments (see `split_jaxpr`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from otfusion_jax.symmetry.groups import LeafSplit
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.axis import Axis, Sum, factors_of, size_of
from otfusion_jax.tracing.interpretation import Interpretation, interpret_traces
from otfusion_jax.tracing.interpreter import OnUnsupported
from otfusion_jax.tracing.positions import OnTies
from otfusion_jax.tracing.program_traces import ProgramTrace
from otfusion_jax.tracing.split_jaxpr import take_parts


class SplitInterpretation(NamedTuple):
    """The interpretation of a program whose leaves have been split where that frees units.

    Attributes:
        symmetry: The leaves and their splits, without groups.
        jaxpr: The program on the inputs given. Its first arguments are the parts of the leaves.
        interpretation: What is known of the axes of the parts.
    """

    symmetry: Symmetry
    jaxpr: core.ClosedJaxpr
    interpretation: Interpretation


def interpret_split(
    traces: Sequence[ProgramTrace],
    unsplit: Symmetry,
    on_unsupported: OnUnsupported,
    on_ties: OnTies,
) -> SplitInterpretation:
    """Interprets a program, its leaves split where that gives more freedom.

    Args:
        traces: The traces of the program, first that on the inputs given. The first arguments of
            each jaxpr are the leaves.
        unsplit: The leaves, without splits and groups.
        on_unsupported: What to do about a primitive without a rule, see `trace_symmetry`.
        on_ties: What to do about positions that depend on the order of equal units.

    Returns:
        The splits that are worth while, and the interpretation of the program with them.
    """
    whole = interpret_traces(traces, unsplit, on_unsupported, on_ties)
    leaf_splits = find_leaf_splits(whole, unsplit)
    while leaf_splits:
        split = dataclasses.replace(unsplit, leaf_splits=leaf_splits)
        of_parts = interpret_parts(traces, split, on_unsupported, on_ties)
        kept = _worth_while(of_parts.interpretation, split)
        if len(kept) == len(leaf_splits):
            return of_parts
        # The remaining leaves may be tied in another way once these are whole: look again.
        leaf_splits = kept
    return SplitInterpretation(unsplit, traces[0].jaxpr, whole)


def interpret_parts(
    traces: Sequence[ProgramTrace],
    split: Symmetry,
    on_unsupported: OnUnsupported,
    on_ties: OnTies,
    *,
    keeps_apart: bool = False,
) -> SplitInterpretation:
    """Interprets a program with the parts of leaves as its arguments.

    Args:
        traces: The traces of the program, of whole leaves.
        split: The leaves and their splits, without groups.
        on_unsupported: What to do about a primitive without a rule, see `trace_symmetry`.
        on_ties: What to do about positions that depend on the order of equal units.
        keeps_apart: Whether what the program puts side by side stays in pieces, see `take_parts`.

    Returns:
        The splits, the program of the parts, and its interpretation.
    """
    traces_of_parts = []
    for trace in traces:
        jaxpr = take_parts(trace.jaxpr, split, keeps_apart=keeps_apart)
        traces_of_parts.append(ProgramTrace(jaxpr, trace.inputs))
    interpretation = interpret_traces(traces_of_parts, split, on_unsupported, on_ties)
    return SplitInterpretation(split, traces_of_parts[0].jaxpr, interpretation)


def find_leaf_splits(whole: Interpretation, unsplit: Symmetry) -> tuple[LeafSplit, ...]:
    """Finds the leaves that a program has picked apart by index.

    Args:
        whole: The interpretation of the program with its leaves whole.
        unsplit: The leaves.

    Returns:
        One split at most for each leaf, along its first such axis.
    """
    leaf_splits = []
    for number, axes in enumerate(whole.param_axes):
        leaf = unsplit.leaves[number]
        # Along a single axis nothing is left beside it that a part could move by.
        if not leaf.moves or len(leaf.shape) < 2:
            continue
        for dim, axis in enumerate(axes):
            with_singles = whole.unifier.expand(axis, keep_single=True)
            if _is_picked_apart(with_singles):
                leaf_splits.append(LeafSplit(number, dim, with_singles[0].size))
                break  # parts are not split again
    return tuple(leaf_splits)


def _is_picked_apart(axis: Axis) -> bool:
    """Whether the outermost factor of an expanded axis is a sum of single positions."""
    if not axis or not isinstance(axis[0], Sum):
        return False
    return all(size_of(segment) == 1 for segment in axis[0].segments)


def _worth_while(interpretation: Interpretation, split: Symmetry) -> tuple[LeafSplit, ...]:
    """Returns the splits of leaves whose parts are all read, and may move in different ways."""
    # Of a part that is not read nothing tells where it belongs. Whole, the leaf moves as one.
    unread_leaves = {split.leaf_of[number] for number in interpretation.incompletely_read()}
    kept = []
    for leaf_split in split.leaf_splits:
        if leaf_split.leaf in unread_leaves:
            continue
        if _parts_differ(interpretation, split, leaf_split.leaf):
            kept.append(leaf_split)
    return tuple(kept)


def _parts_differ(interpretation: Interpretation, split: Symmetry, leaf: int) -> bool:
    """Whether the parts of a leaf may move in different ways."""
    free_variables = set()
    for number, leaf_of_part in enumerate(split.leaf_of):
        if leaf_of_part == leaf:
            axes = interpretation.param_axes[number]
            free_variables.add(tuple([_free_variables(interpretation, axis) for axis in axes]))
    return len(free_variables) > 1


def _free_variables(interpretation: Interpretation, axis: Axis) -> tuple[int | None, ...]:
    """Returns the variable of each factor of an axis, None where it can't move."""
    unifier = interpretation.unifier
    free: list[int | None] = []
    for factor in factors_of(unifier.expand(axis)):
        is_free = factor.variable is not None and unifier.is_free(factor.variable)
        free.append(factor.variable if is_free else None)
    return tuple(free)
