"""One interpretation of a function: what becomes known of the axes of its parameters.

The interpreter goes over the jaxprs of the function (see `program_traces`), all of them with one
unifier, so that what any of them ties is tied. It starts with a fresh axis for every axis of every
parameter; those of inputs and outputs are pinned. When it is done, an `Interpretation` also knows
which parameters were read. What the inputs given do not show must not move: on other inputs the
function may read a parameter in another way.
"""

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

import otfusion_jax.tracing.package_rules
import otfusion_jax.tracing.rules  # noqa: F401, both fill the registry
from otfusion_jax.symmetry.groups import LEFT_OUT, NOT_USED, SUMMED, UNMET, UNREAD, Leaf
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.axis import Axis, Factor, Kind
from otfusion_jax.tracing.interpreter import Interpreter, OnUnsupported
from otfusion_jax.tracing.jaxprs import body, live
from otfusion_jax.tracing.positions import OnTies, let_go
from otfusion_jax.tracing.program_traces import ProgramTrace
from otfusion_jax.tracing.unification import Unifier
from otfusion_jax.tracing.values import TracedValue


@dataclasses.dataclass(frozen=True, eq=False)
class Interpretation:
    """What is known when all jaxprs of a function have been interpreted.

    Attributes:
        interpreter: The interpreter, with its unifier and its records.
        param_axes: For each parameter the axes that it started with.
        used: For each parameter, whether any output depends on it.
        featured: The axis variables along which features vary, or parameters that meet them.
        read: Those of them that an operation has taken up and that were not left out of what was
            kept, and the single positions of which the same is true or that were picked.
        dangling: The free axis variables along which parameters were contracted with constants that
            may be 0, and that no features vary along.
        summed: The same, where the constants are known not to be 0, as in a sum or a mean.
    """

    interpreter: Interpreter
    param_axes: list[tuple[Axis, ...]]
    used: list[bool]
    featured: set[int]
    read: set[int]
    dangling: set[int]
    summed: set[int]

    @property
    def unifier(self) -> Unifier:
        """What is known of the axis variables."""
        return self.interpreter.unifier

    def expanded_axes(self) -> list[tuple[Axis, ...]]:
        """Returns the axes of each parameter in the finest axis variables that are known."""
        expanded = []
        for axes in self.param_axes:
            expanded.append(tuple(map(self.unifier.expand, axes)))
        return expanded

    def pin_what_inputs_do_not_show(self) -> None:
        """Pins the axes of parameters of which these inputs do not tell what they belong to."""
        # Each kind is found in full before the first is pinned: what a pin reaches looks settled.
        for axis, reason in list(self._unmet_axes()):
            self.unifier.pin(axis, reason)
        for axis, reason in list(self._unread_axes()):
            self.unifier.pin(axis, reason)

    def incompletely_read(self) -> Iterator[int]:
        """Yields the numbers of the parameters that are unused, or of which parts are not read."""
        for number, axes in enumerate(self.param_axes):
            is_unused = not self.used[number]
            if is_unused or any(map(self._unread, axes)):
                yield number

    def _unmet_axes(self) -> Iterator[tuple[Axis, str]]:
        """Yields the axes of parameters that stay because of the constants they meet, and why."""
        dangling = self.dangling | self._summed_in_place_of_units()
        for axes in self.param_axes:
            for axis in axes:
                variables = self.unifier.variables_of(axis)
                if variables & dangling:
                    # A recurrent kernel that a first step multiplies with zeros may belong to any
                    # units, along its other axis as well.
                    yield from [(each, UNMET) for each in axes]
                    break
                if variables & self.summed:
                    yield axis, SUMMED

    def _summed_in_place_of_units(self) -> set[int]:
        """Returns those of the summed axis variables that other inputs may have units in place of.

        A state may start from ones as well as from zeros. But where fewer of them are summed than
        the smallest group has units, as in the gradient of a sum over few outputs, there is no
        group that could be met there.
        """
        sizes = []
        for axes, is_used in zip(self.param_axes, self.used, strict=True):
            for variable in set().union(*map(self.unifier.variables_of, axes)):
                is_unit = self.unifier.is_free(variable) and variable not in self.summed
                # What makes the state of later steps may have no use in a first one.
                if is_unit or (not is_used and len(axes) > 1):
                    sizes.append(self.unifier.size(variable))
        fewest = min([size for size in sizes if size > 1], default=0)
        return {variable for variable in self.summed if self.unifier.size(variable) >= fewest}

    def _unread_axes(self) -> Iterator[tuple[Axis, str]]:
        """Yields the axes of parameters of which parts are not read on these inputs, and why.

        On others they may be, in place of what is read now or beside it: positions at another
        offset, units beyond the width in use.
        """
        for axes in self.param_axes:
            for axis in axes:
                unread = self._unread(axis)
                if unread:
                    # What features vary along goes on until something takes it up, or a slice
                    # leaves it out.
                    is_left_out = unread <= self.featured
                    yield axis, LEFT_OUT if is_left_out else UNREAD

    def _unread(self, axis: Axis) -> set[int]:
        """Returns the axis variables of an axis that may still move, and that nothing has read."""
        variables = self.unifier.variables_of(axis)
        not_read = variables - self.read
        return set(filter(self.unifier.is_free, not_read))


def interpret_traces(
    traces: Sequence[ProgramTrace],
    symmetry: Symmetry,
    on_unsupported: OnUnsupported,
    on_ties: OnTies,
) -> Interpretation:
    """Interprets the jaxprs of a function.

    Args:
        traces: The traces of the function. The first is on the inputs given. The first arguments
            of each jaxpr are the parts of the parameters.
        symmetry: The symmetry that says which parts there are. It needs no groups.
        on_unsupported: What to do about a primitive without a rule in the first jaxpr. In the
            others, which the user has not asked for, it is pinned.
        on_ties: What to do about positions that depend on the order of equal units.

    Returns:
        What is known of the axes of the parts.
    """
    interpreter = Interpreter(on_unsupported, on_ties)
    used = _used_parameters(traces, len(symmetry.parts))
    param_axes = []
    for leaf, is_used in zip(symmetry.parts, used, strict=True):
        param_axes.append(_starting_axes(interpreter.unifier, leaf, is_used))
    first, *longer = traces
    _interpret_trace(interpreter, first, param_axes, path=())
    interpreter.on_unsupported = "pin"
    for trace in longer:
        # Features are read on the inputs given, so that there is no path to them in other jaxprs.
        _interpret_trace(interpreter, trace, param_axes, path=None)
    taken_up = interpreter.variables(interpreter.read)
    has_inputs = _has_inputs(traces)
    featured = _featured(interpreter, interpreter.features, taken_up, has_inputs)
    read = _read(interpreter, taken_up, featured)
    unifier = interpreter.unifier
    # In the gradient of what is multiplied with zeros there are features, which nothing reads.
    featured_and_read = _featured(interpreter, interpreter.read_features, taken_up, has_inputs)
    dangling = _dangling(unifier, unifier.contracted_with_constants, featured_and_read)
    summed = _dangling(unifier, unifier.contracted_with_numbers, featured)
    return Interpretation(interpreter, param_axes, used, featured, read, dangling, summed)


def _starting_axes(unifier: Unifier, leaf: Leaf, is_used: bool) -> tuple[Axis, ...]:
    """Makes the axes of a parameter, pinned if it can't move or nothing depends on it."""
    axes = tuple(map(unifier.fresh, leaf.shape))
    for axis in axes:
        if not leaf.moves:
            unifier.pin(axis, f"a leaf of dtype {leaf.dtype} passes untouched")
        elif not is_used:
            unifier.pin(axis, NOT_USED)
    return axes


def _interpret_trace(
    interpreter: Interpreter,
    trace: ProgramTrace,
    param_axes: Sequence[tuple[Axis, ...]],
    path: tuple[int, ...] | None,
) -> None:
    """Interprets one jaxpr; features can be read in it if there is a path."""
    unifier = interpreter.unifier
    args = []
    for number, axes in enumerate(param_axes):
        args.append(interpreter.parameter(axes, number))
    inputs_with_paths, _ = jax.tree_util.tree_flatten_with_path(trace.inputs)
    for key_path, value in inputs_with_paths:
        name = "input " + jax.tree_util.keystr(key_path, simple=True, separator="/")
        axes = _pinned_axes(unifier, name, value)
        args.append(interpreter.numbered(TracedValue(axes, Kind.FEATURE)))
    consts = list(map(interpreter.constant, trace.jaxpr.consts))
    outputs = interpreter.run(trace.jaxpr.jaxpr, consts, args, path)
    interpreter.outputs += [output.number for output in outputs]
    let_go(unifier, outputs)
    for number, output in enumerate(outputs):
        name = "the output" if len(outputs) == 1 else f"output {number}"
        for dim, axis in enumerate(output.axes):
            unifier.pin(axis, _tied_to(name, dim))


def _pinned_axes(unifier: Unifier, name: str, value: Any) -> tuple[Axis, ...]:
    """Makes the axes of an input, whose order is the user's."""
    axes = []
    for dim, size in enumerate(np.shape(value)):
        axes.append(unifier.pinned(size, _tied_to(name, dim)))
    return tuple(axes)


def _tied_to(name: str, dim: int) -> str:
    """Says why an axis is pinned that is tied to an input or an output."""
    return f"tied to {name}, axis {dim}"


# --- what is read


def _has_inputs(traces: Sequence[ProgramTrace]) -> bool:
    """Whether there is an array among the inputs."""
    for trace in traces:
        if jax.tree_util.tree_leaves(trace.inputs):
            return True
    return False


def _featured(
    interpreter: Interpreter, features: Iterable[Axis], taken_up: set[int], has_inputs: bool
) -> set[int]:
    """Returns the axis variables along which features vary, or parameters that meet them.

    Args:
        interpreter: The interpreter, when it is done.
        features: The axes of the features.
        taken_up: The axis variables that operations have taken up.
        has_inputs: Whether the function has inputs.
    """
    featured = interpreter.variables(features)
    # A parameter that is first multiplied with another one, as in a low-rank product, has axes that
    # no feature has. They count, because what is contracted over them goes on to meet features.
    for factor in interpreter.unifier.contracted_parameters:
        featured |= interpreter.unifier.variables_of((factor,))
    if not has_inputs:
        # Of a function of parameters alone there is nothing else that they could meet.
        featured |= taken_up
    return featured


def _read(interpreter: Interpreter, taken_up: set[int], featured: set[int]) -> set[int]:
    """Returns the axis variables that count as read."""
    read = interpreter.picked()
    for variable in taken_up:
        # Single positions need not be tied to anything, and then they are in no axis of a feature.
        is_single = interpreter.unifier.size(variable) == 1
        if is_single or variable in featured:
            read.add(variable)
    return read - interpreter.left_out()


def _dangling(unifier: Unifier, contracted: Sequence[Factor], featured: set[int]) -> set[int]:
    """Returns the free axis variables of what met constants that meet nothing else."""
    dangling = set()
    for factor in contracted:
        for variable in unifier.variables_of((factor,)):
            if variable not in featured and unifier.is_free(variable):
                dangling.add(variable)
    return dangling


def _used_parameters(traces: Sequence[ProgramTrace], count: int) -> list[bool]:
    """Says of each parameter whether an output of any of the jaxprs depends on it."""
    used = [False] * count
    for trace in traces:
        jaxpr = trace.jaxpr.jaxpr
        every_output = [True] * len(jaxpr.outvars)
        flags = _used_arguments(jaxpr, every_output)[:count]
        # It is enough that one of the functions, or sizes, needs the parameter.
        used = list(map(operator.or_, used, flags))
    return used


def _used_arguments(jaxpr: core.Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Says of each argument of a jaxpr whether any of the results that are wanted depends on it."""
    # A function that returns its argument as it is uses it, too.
    used: set[core.Var] = set()
    _add_variables(used, jaxpr.outvars, wanted)
    for _, eqn, flags in live(jaxpr, wanted):
        inner = body(eqn)
        if inner is None:
            needed = [True] * len(eqn.invars)
        else:
            # `jit` keeps arguments that its function does not use. Other primitives, loops among
            # them, may use any of theirs.
            needed = _used_arguments(inner.jaxpr, flags)
        _add_variables(used, eqn.invars, needed)
    return [var in used for var in jaxpr.invars]


def _add_variables(used: set[core.Var], atoms: Sequence[Any], wanted: Sequence[bool]) -> None:
    """Adds those of some atoms that are wanted and no literals."""
    for atom, keep in zip(atoms, wanted, strict=True):
        if keep and not isinstance(atom, core.Literal):
            used.add(atom)
