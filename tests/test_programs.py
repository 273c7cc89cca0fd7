"""Checks the certificate on random programs, and that wrong rules would not pass.

`pytest tests/test_programs.py` takes some hundred programs, the same each time. A long run, with
others each time, is `python -m tests.generate`, or

    OTFUSION_EXAMPLES=2000 pytest tests/test_programs.py -k certificate

A failure is printed as a program that can be pasted into `FOUND` below, where it stays.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from generate import certificate
from hypothesis import HealthCheck, Phase, find, given, settings
from jax.extend import core
from programs import (
    BLOCKS,
    Program,
    conv,
    evaluate,
    factors,
    gradient,
    gram,
    layers,
    mixer,
    order,
    partly,
    parts,
    programs,
    residual,
    tied,
)

import otfusion_jax as otf
from otfusion_jax.tracing import jaxprs, registry
from otfusion_jax.tracing.axis import Kind, constant
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.registry import Rule, registered
from otfusion_jax.tracing.values import TracedValue

EXAMPLES = int(os.environ.get("OTFUSION_EXAMPLES", "0"))
"""Number of programs of a long run; 0 for the few of every day."""
RANDOM = settings(
    max_examples=EXAMPLES or 200,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
SEARCH = settings(RANDOM, max_examples=300, derandomize=True, phases=[Phase.generate])


@RANDOM
@given(programs())
def test_the_certificate_holds(program: Program):
    assert certificate(program).holds


FOUND = {
    "groups of a convolution nested in what it sums over": Program(
        space=(),
        width=6,
        blocks=(
            layers(
                count=2,
                body=(conv(width=6, kernel=1, stride=1, pick=1, kind="groups"),),
                reverse=False,
                collect=False,
            ),
        ),
    ),
    "nested in an axis that is summed up, which meets itself as it was": Program(
        space=(), width=6, blocks=(factors(op="cumsum outer", pick=0), tied(pick=0, turn=False))
    ),
    "nested in an axis that is sorted, which meets itself as it was": Program(
        space=(), width=6, blocks=(factors(op="sort inner", pick=1), tied(pick=0, turn=False))
    ),
    "nested in positions that are summed up, which meet themselves as they were": Program(
        space=(3, 3),
        width=2,
        blocks=(mixer(hidden=2), residual(body=(order(how="cumsum", units=False),))),
    ),
    "nested in units whose products with each other are taken": Program(
        space=(), width=2, blocks=(gram(how="mixing"),)
    ),
    "columns that are picked apart of a kernel whose rows are read in steps": Program(
        space=(),
        width=4,
        blocks=(
            parts(how="stack", cut=3, by="lax", pick=2),
            partly(how="stride", width=2, beside=""),
            parts(how="stack", cut=3, by="lax", pick=2),
        ),
    ),
    "a loop that takes what it carries apart anew in each iteration": Program(
        space=(),
        width=6,
        blocks=(
            parts(how="stack", cut=1, by="slice", pick=0),
            layers(
                count=3,
                body=(tied(pick=4, turn=True), factors(op="softmax outer", pick=0)),
                reverse=False,
                collect=False,
            ),
        ),
    ),
    "a scan by halves, with segments of no positions": Program(
        space=(), width=2, blocks=(order(how="associative", units=False),)
    ),
    "the gradient of a running maximum": Program(
        space=(), width=2, blocks=(gradient(body=(order(how="cummax", units=False),)),)
    ),
    "a reshape that reorders axes first": Program(
        space=(),
        width=6,
        blocks=(gradient(body=(conv(width=9, kernel=3, stride=1, pick=0, kind="groups"),)),),
        seed=3,
    ),
}
"""Programs that have failed once, each with what was wrong."""


@pytest.mark.parametrize("name", FOUND)
def test_what_has_failed_once(name: str):
    assert certificate(FOUND[name]).holds


# --- what the programs are made of


def primitives(jaxpr: core.Jaxpr) -> Iterator[core.Primitive]:
    """All primitives of a jaxpr, those of the jaxprs within included."""
    yield from (eqn.primitive for eqn in jaxpr.eqns)
    for inner in jaxprs.subjaxprs(jaxpr.eqns):
        yield from primitives(inner)


UNSEEN = {
    "collective": "a reduction by another name",
    "all_gather": "needs the devices of a mesh, see `on_eight_devices.py`",
    "exchange": "likewise",
    "shard_map": "likewise",
    "empty": "appears in the gradients of branches, not of all",
    "bitcast": "no network does this to its features",
    "observer": "returns nothing",
    "ragged_dot": "a dot_general but for its rows, see `test_ragged.py`",
    "random": "draws at fixed positions, pinned as a constant is",
    "pinned": "ties nothing",
    "pure_callback": "NumPy can't compute what a host does",
    "tie": "not a function of the public API",
    "higher": "networks leave it to JAX, and its implementation is walked",
}
"""Rules that no program needs."""


def test_every_rule_occurs_in_some_block():
    seen = set()
    for name, kind in BLOCKS.items():
        for word in itertools.chain(*kind.words.values()) if kind.words else [""]:

            @settings(SEARCH, max_examples=2)
            @given(programs(2, 1, (f"{name} {word}",)))
            def tally(program: Program) -> None:
                with jax.enable_x64(True):
                    params, entries, *_ = program.build()
                    jaxprs = [jax.make_jaxpr(fn)(params, *inputs) for fn, inputs in entries]
                seen.update(*(primitives(jaxpr.jaxpr) for jaxpr in jaxprs))

            tally()
    rules = {rule.__name__ for rule in registered().values()}
    met = {rule.__name__ for primitive, rule in registered().items() if primitive in seen}
    assert rules - met <= set(UNSEEN)


@pytest.mark.filterwarnings("ignore::otfusion_jax.SymmetryWarning")
def test_most_programs_have_groups():
    counts = collections.Counter()

    @settings(SEARCH, max_examples=60)
    @given(programs())
    def tally(program: Program) -> None:
        with jax.enable_x64(True):
            params, entries, *_ = program.build()
            symmetry = otf.trace_symmetry(entries, params)
        counts[min(3, len(symmetry.groups))] += 1

    tally()
    assert counts[0] < 0.4 * counts.total()
    assert counts[3] > 0.1 * counts.total()


def test_numpy_and_xla_compute_the_same():
    @settings(RANDOM, max_examples=15, derandomize=True, phases=[Phase.generate])
    @given(programs(most=4))
    def compare(program: Program) -> None:
        with jax.enable_x64(True):
            params, ((fn, inputs), *_), *_ = program.build()
            jaxpr = jax.make_jaxpr(fn)(params, *inputs)
            (mine,) = evaluate(jaxpr, *jax.tree.leaves((params, inputs)))
            theirs = jax.jit(fn)(params, *inputs)
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)

    compare()


# --- wrong rules

P = core.primitives
# Not exported by JAX.
SPLIT = jax.make_jaxpr(lambda x: jax.lax.split(x, (1, 1)))(np.ones(2)).eqns[-1].primitive

Change = Callable[[Rule], Rule]


def deaf(position: int, along: Callable[[RuleContext], Any] = lambda ctx: None) -> Change:
    """The rule takes an operand for constant, along some axes or (`None`) along all."""

    def change(rule: Rule) -> Rule:
        def wrong(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
            if position >= len(values):
                return rule(ctx, values)
            value, dims = values[position], along(ctx)
            sizes = enumerate(ctx.operand_shape(position))
            axes = [constant(n) if dims is None or d in dims else value.axes[d] for d, n in sizes]
            before, after = values[:position], values[position + 1 :]
            return rule(ctx, [*before, TracedValue(tuple(axes), value.kind), *after])

        return wrong

    return change


def passes(rule: Rule) -> Rule:
    """The operand is passed on, where it has the shape of the result."""

    def wrong(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
        if any(ctx.shape(i) != ctx.operand_shape(0) for i in range(len(ctx.eqn.outvars))):
            return rule(ctx, values)
        return [values[0] for _ in ctx.eqn.outvars]

    return wrong


def forgets(rule: Rule) -> Rule:
    """The results are constant along every axis."""

    def wrong(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
        kind = max((value.kind for value in values), default=Kind.CONSTANT)
        shapes = [ctx.shape(i) for i in range(len(ctx.eqn.outvars))]
        return [TracedValue(tuple(constant(n) for n in shape), kind) for shape in shapes]

    return wrong


def tampered(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    """The rule reads other parameters than the equation has."""

    def wrap(rule: Rule) -> Rule:
        def wrong(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
            params = ctx.params | change(ctx.params)
            return rule(dataclasses.replace(ctx, eqn=ctx.eqn.replace(params=params)), values)

        return wrong

    return wrap


def backwards(rule: Rule) -> Rule:
    """The operands are taken in the opposite order."""
    return lambda ctx, values: rule(ctx, values[::-1])


def crossed(rule: Rule) -> Rule:
    """The last two axes are taken in the opposite order."""
    return lambda ctx, values: rule(
        ctx, [TracedValue((*v.axes[:-2], *v.axes[-2:][::-1]), v.kind) for v in values]
    )


def first_branch(rule: Rule) -> Rule:
    """Of several branches only one is looked at."""
    return lambda ctx, values: ctx.call(ctx.params["branches"][0], values[1:])


def blank(ctx: RuleContext, position: int, value: TracedValue) -> TracedValue:
    """Hides along which axes an operand varies."""
    return TracedValue(tuple(map(constant, ctx.operand_shape(position))), value.kind)


def deaf_to_starts(rule: Rule) -> Rule:
    """What a loop starts from is taken for constant."""

    def wrong(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
        last = len(values)
        if ctx.eqn.primitive is P.scan_p:
            consts, carry, _ = jaxprs.scan_operands(ctx.eqn, values)
            first, last = len(consts), len(consts) + len(carry)
        else:
            first = ctx.params["cond_nconsts"] + ctx.params["body_nconsts"]
        starts = [blank(ctx, i, values[i]) for i in range(first, last)]
        return rule(ctx, [*values[:first], *starts, *values[last:]])

    return wrong


def turned_results(rule: Rule) -> Rule:
    """The results are given in the opposite order, where they have one shape."""

    def wrong(ctx: RuleContext, values: list[TracedValue]) -> list[TracedValue]:
        results = rule(ctx, values)
        shapes = {ctx.shape(i) for i in range(len(results))}
        return results[::-1] if len(shapes) == 1 else results

    return wrong


def other_end(p: dict[str, Any]) -> dict[str, Any]:
    return {"padding_config": tuple((high, low, mid) for low, high, mid in p["padding_config"])}


def earlier(p: dict[str, Any]) -> dict[str, Any]:
    """The segment before the one that is cut out."""
    starts, ends = p["start_indices"], p["limit_indices"]
    steps = [min(i, j - i) if i else 0 for i, j in zip(starts, ends, strict=True)]
    return {
        "start_indices": tuple(i - k for i, k in zip(starts, steps, strict=True)),
        "limit_indices": tuple(j - k for j, k in zip(ends, steps, strict=True)),
    }


def summed(ctx: RuleContext) -> Sequence[int]:
    return ctx.params["dimension_numbers"][0][1]


def batch(ctx: RuleContext) -> Sequence[int]:
    return ctx.params["dimension_numbers"][1][1]


def input_channels(ctx: RuleContext) -> Sequence[int]:
    return ctx.params["dimension_numbers"].rhs_spec[1:2]


def others(ctx: RuleContext) -> set[int]:
    return set(range(len(ctx.shape()))) - {ctx.params["dimension"]}


class Mutation(NamedTuple):
    """A wrong rule for a primitive, and the kinds of blocks among which to look for it."""

    primitive: core.Primitive
    change: Change
    only: tuple[str, ...]


MUTATIONS = {
    "an addition ties nothing": Mutation(P.add_p, deaf(1), ("residual", "param", "dense")),
    "a product ties nothing": Mutation(P.mul_p, deaf(1), ("param", "parts", "dense")),
    "a maximum ties nothing": Mutation(P.max_p, deaf(0), ("param", "parts max")),
    "a selection ignores a case": Mutation(P.select_n_p, deaf(1), ("where mask", "layer")),
    "a selection ignores its predicate": Mutation(P.select_n_p, deaf(0), ("where own", "layer")),
    "a contraction ties nothing": Mutation(P.dot_general_p, deaf(1, summed), ("dense", "act")),
    "batch axes are not tied": Mutation(
        P.dot_general_p, deaf(1, batch), ("juggle batch", "factors per outer", "local")
    ),
    "input channels are not tied": Mutation(
        P.conv_general_dilated_p, deaf(1, input_channels), ("conv", "act")
    ),
    "output channels are forgotten": Mutation(P.conv_general_dilated_p, forgets, ("conv", "act")),
    "cumsum passes its axis": Mutation(
        P.cumsum_p, passes, ("order cumsum", "factors cumsum inner")
    ),
    "cumprod passes its axis": Mutation(P.cumprod_p, passes, ("order cumprod",)),
    "rev passes its axis": Mutation(P.rev_p, passes, ("order flip", "factors flip inner")),
    "sort passes its axis": Mutation(P.sort_p, passes, ("order sort", "factors sort inner")),
    "a window passes its axis": Mutation(P.reduce_window_sum_p, passes, ("order window",)),
    "iota is constant": Mutation(P.iota_p, forgets, ("gate",)),
    "broadcasting forgets": Mutation(P.broadcast_in_dim_p, forgets, ("beside", "outer")),
    "transposition passes": Mutation(P.transpose_p, passes, ("factors transpose", "mixer")),
    "reshape forgets": Mutation(P.reshape_p, forgets, ("factors", "attention")),
    "reshape merges the wrong way round": Mutation(P.reshape_p, crossed, ("factors", "flatten")),
    "concatenation ties nothing else": Mutation(P.concatenate_p, deaf(1, others), ("concat",)),
    "concatenation the wrong way round": Mutation(P.concatenate_p, backwards, ("beside", "parts")),
    "a slice is the one before": Mutation(P.slice_p, tampered(earlier), ("parts", "segment")),
    "a split the wrong way round": Mutation(SPLIT, turned_results, ("parts", "shuffle")),
    "padding at the other end": Mutation(P.pad_p, tampered(other_end), ("pad", "param")),
    "what is picked from is passed": Mutation(P.gather_p, deaf(0), ("take", "order")),
    "updates are not tied": Mutation(P.scatter_add_p, deaf(2), ("update add", "update many")),
    "an update is not tied": Mutation(
        P.dynamic_update_slice_p, deaf(1), ("update slice", "update cache")
    ),
    "only one branch counts": Mutation(P.cond_p, first_branch, ("branch", "dense")),
    "a scan starts anywhere": Mutation(P.scan_p, deaf_to_starts, ("stack", "dense", "recurrent")),
    "a loop starts anywhere": Mutation(P.while_p, deaf_to_starts, ("loop", "dense")),
}


def search(only: tuple[str, ...] = ()) -> Program:
    """Looks for a program that breaks the certificate."""
    drawn = programs(2, 3, only)
    return find(drawn, lambda program: not certificate(program).holds, settings=SEARCH)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    primitive, change, only = MUTATIONS[name]
    monkeypatch.setitem(registry._registry, primitive, change(registry._registry[primitive]))
    search(() if EXAMPLES else only)


def test_nests_that_disregard_contractions_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RuleContext, "note_interaction", lambda *_, **__: None)
    search(("factors square",))
