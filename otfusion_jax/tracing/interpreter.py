"""The walk over a jaxpr: the registry of rules, what a rule sees, and the loop that applies them.

What each primitive does to the axes of its operands is said by one rule (see `rules`). The rule of
a call or a branch walks its sub-jaxpr and has the same type as any other.

The walk is sound, not complete: a wrong group silently destroys a model, a missing group only
merges less. Whatever a rule cannot express is pinned, and a primitive without a rule is an error
(or pins all that it touches, on demand).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from otfusion_jax.tracing import primitives
from otfusion_jax.tracing.axis import Axis, Factor, Kind, concatenated, constant, factors_of
from otfusion_jax.tracing.context import (
    Interaction,
    Reading,
    Regrouping,
    RuleContext,
    Selection,
    Site,
    TracedValue,
    shape_of,
    sizes_of,
)
from otfusion_jax.tracing.registry import Rule, UnsupportedPrimitiveError, rule_of, selects
from otfusion_jax.tracing.unification import Unifier

OnUnsupported = Literal["raise", "pin"]
MOST_RUNS = 8
"""A constant that varies more often along an axis, or at every other position, pins it, rather than
taking it apart."""


class Interpreter:
    """One pass over a jaxpr and its sub-jaxprs."""

    def __init__(self, on_unsupported: OnUnsupported) -> None:
        self.unifier = Unifier()
        self.on_unsupported = on_unsupported
        self.loops: tuple[Axis, ...] = ()  # of the scans around, outermost first
        self.values: dict[tuple[Axis, ...], None] = {}  # the axes of every value
        self.interactions: list[Interaction] = []
        self.regroupings: list[Regrouping] = []
        self.read: dict[Axis, None] = {}  # what an operation took up, in whole
        self.selections: list[Selection] = []
        self.features: dict[Axis, None] = {}  # the axes of all that depends on inputs
        self.calls = 0  # how many sub-jaxprs have been walked
        self.produced: list[Reading] = []
        self.consumed: list[Reading] = []
        self.seen: list[Reading] = []  # every feature, in dataflow order

    def constant(self, array: Any) -> TracedValue:
        """Describes an array that the function closes over."""
        aval = jax.typeof(array)
        key = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
        opaque = key or isinstance(array, Tracer)
        axes = []
        for dim, size in enumerate(aval.shape):
            reason = f"a constant of shape {aval.shape} that varies along axis {dim}"
            runs = () if opaque or size < 2 else _runs(np.asarray(array), dim)
            # What a mask leaves out on these inputs it may let pass on others.
            masks = len(runs) > 1 and _is_mask(np.asarray(array), dim)
            if opaque or masks or len(runs) > max(1, min(MOST_RUNS, size // 2)):
                axes.append(self.unifier.pinned(size, reason))
            else:
                axes.append(concatenated(constant(n) for n in runs) if size > 1 else constant(size))
        return TracedValue(tuple(axes), Kind.CONSTANT)

    def run(
        self,
        jaxpr: core.Jaxpr,
        consts: list[TracedValue],
        args: list[TracedValue],
        path: tuple[int, ...] | None = (),
        caller: RuleContext | None = None,
        used: Sequence[bool] | None = None,
    ) -> list[TracedValue]:
        """Applies the rule of each equation in turn and returns the values of the outputs."""
        env: dict[core.Var, TracedValue] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> TracedValue:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

        for value in (*consts, *args):
            self.note(value)
        for index, eqn, flags in live(jaxpr, used):
            here = None if path is None else (*path, index)
            context = RuleContext(eqn, here, self, caller, flags)
            operands = [read(v) for v in eqn.invars]
            self.unifier.here = context
            calls = self.calls
            results = self._rule(context)(context, operands)
            assert len(results) == len(eqn.outvars), eqn.primitive
            # What a call reads, the equations within have read.
            reads = not selects(eqn.primitive) and self.calls == calls
            self._lost(context, operands, results, reads)
            for position, (var, value) in enumerate(zip(eqn.outvars, results, strict=True)):
                assert sizes_of(value) == shape_of(var), (context.source, operands)
                env[var] = value
                axes = self.note(value)
                if value.kind is Kind.FEATURE and here is not None:
                    self.seen.append(
                        (Site(here, "out", position), axes, frozenset(range(len(axes))))
                    )
        return [
            read(v) if isinstance(v, core.Literal) or v in env else self._dead(v)
            for v in jaxpr.outvars
        ]

    def _lost(
        self,
        context: RuleContext,
        operands: list[TracedValue],
        results: list[TracedValue],
        reads: bool,
    ) -> None:
        """Notes what no result keeps: a new axis in its place may be tied to it again later on."""
        kept = {
            factor.variable
            for value in results
            for axis in value.axes
            for factor in factors_of(self.unifier.expand(axis))
        }
        for value in operands:
            gone = {
                dim
                for dim, axis in enumerate(value.axes)
                if any(self._left_out(f, kept) for f in factors_of(self.unifier.expand(axis)))
            }
            if reads:
                self.read.update((value.axes[dim], None) for dim in gone)
            if 0 < len(gone) < len(value.axes):
                context.mixed(value, gone)

    @staticmethod
    def _left_out(factor: Factor, kept: Collection[int | None]) -> bool:
        """Whether a factor along which a value varies is not among those kept."""
        return factor.variable is not None and factor.variable not in kept

    def note(self, value: TracedValue) -> tuple[Axis, ...]:
        """Keeps the axes of a value, those of the loops around it first, and returns them."""
        axes = (*self.loops, *value.axes)
        self.values[axes] = None
        if value.kind is Kind.FEATURE:
            self.features.update(dict.fromkeys(value.axes))
        return axes

    def variables(self, axes: Iterable[Axis]) -> set[int]:
        """Returns the finest atoms of axes, those of single positions included."""
        return set().union(*map(self.unifier.variables, axes))

    def picked(self) -> set[int]:
        """Returns the atoms of single positions that were selected."""
        return set().union(*(selection.singles for selection in self.selections))

    def left_out(self) -> set[int]:
        """Returns free atoms that were left out where others of their axis were selected.

        Some operation may have taken up the whole axis before, such as a normalisation. They count
        as left out unless they are summed over together with something else, or taken up without
        those that were selected.
        """
        unifier = self.unifier
        elsewhere = self.picked() | self.variables(unifier.strong)
        readings = [unifier.variables(axis) for axis in self.read]
        found: set[int] = set()
        for selection in self.selections:
            kept = self.variables(selection.kept) | selection.singles
            rest = {
                variable
                for variable in unifier.variables(selection.whole)
                if unifier.is_free(variable)
            }
            for variable in rest - kept - elsewhere - found:
                if not any(variable in reading and not reading & kept for reading in readings):
                    found.add(variable)
        return found

    def _dead(self, var: core.Var) -> TracedValue:
        """Stands for an output that nothing depends on, so that it ties and pins nothing.

        What it meets, such as the same output of another branch, may well be used elsewhere.
        """
        return TracedValue(tuple(map(constant, shape_of(var))), Kind.CONSTANT)

    def _rule(self, context: RuleContext) -> Rule:
        primitive = context.eqn.primitive
        rule = rule_of(primitive)
        if rule is not None:
            return rule
        if self.on_unsupported == "pin":
            return lambda context, values: context.pin_all(
                values, context.because("(no rule, pinned on demand)")
            )
        if primitive in primitives.REFERENCES:
            raise UnsupportedPrimitiveError(
                f"the primitive {str(primitive)!r} at {context.source} makes, reads or writes a "
                "mutable reference (jax.new_ref, ref[...], ref[...] = x). What such a value "
                "depends on changes while the function runs, and no rule follows it. Ways out: "
                "keep the state in values that are returned (x.at[...].set, the carry of "
                "lax.scan); or trace_symmetry(..., on_unsupported='pin') leaves in place every "
                "axis that meets a reference."
            )
        raise UnsupportedPrimitiveError(
            f"no rule for the primitive {str(primitive)!r}, used at {context.source}. Ways out: "
            "trace_symmetry(..., on_unsupported='pin') leaves every axis that it touches in place; "
            "otfusion_jax.register_rule(primitive) declares a rule of your own; or write that line "
            "with other primitives."
        )


def _runs(array: np.ndarray, dim: int) -> tuple[int, ...]:
    """Returns the lengths of the stretches along which an array does not vary, bit by bit.

    Values would not do: 0.0 and -0.0 are equal, and a division tells them apart.
    """
    rows = np.ascontiguousarray(np.moveaxis(array, dim, 0)).reshape(array.shape[dim], -1)
    rows = rows.view(np.uint8)
    changes = np.flatnonzero(np.any(rows[1:] != rows[:-1], axis=1)) + 1
    edges = [0, *changes.tolist(), len(rows)]
    return tuple(end - start for start, end in zip(edges, edges[1:], strict=False))


def _is_mask(array: np.ndarray, dim: int) -> bool:
    """Whether an array is all 0, or False, at some positions of an axis and not at others."""
    passes = np.any(array != 0, axis=tuple(d for d in range(array.ndim) if d != dim))
    return bool(passes.any() and not passes.all())


def live(
    jaxpr: core.Jaxpr, used: Sequence[bool] | None = None
) -> Iterator[tuple[int, core.JaxprEqn, tuple[bool, ...]]]:
    """Yields the equations that matter: what is never used constrains nothing.

    Args:
        jaxpr: the jaxpr.
        used: which of its outputs are used; all if None.

    Yields:
        Index, equation, and which of its results are used, in order.
    """
    wanted = [True] * len(jaxpr.outvars) if used is None else used
    pairs = zip(jaxpr.outvars, wanted, strict=True)
    needed = {v for v, keep in pairs if keep and not isinstance(v, core.Literal)}
    found = []
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[index]
        flags = tuple(v in needed for v in eqn.outvars)
        if eqn.effects or any(flags):
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
            found.append((index, eqn, flags))
    return reversed(found)
