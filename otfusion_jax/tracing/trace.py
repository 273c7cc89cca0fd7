"""From a function to its symmetry.

`trace_symmetry` traces `fn(params, *inputs)` on abstract values, walks the jaxpr with every axis of
every parameter, and reads off which of them the primitives have tied together.
"""

import collections
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jaxtyping import PyTree

import otfusion_jax.tracing.package_rules
import otfusion_jax.tracing.rules  # noqa: F401, both fill the registry
from otfusion_jax.symmetry.checks import warn_not_used
from otfusion_jax.symmetry.groups import (
    NOT_USED,
    UNMET,
    UNREAD,
    Group,
    Leaf,
    LeafSplit,
    Member,
    Pin,
    Role,
    leaves_of,
)
from otfusion_jax.symmetry.partition import UnitLocation
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing import jaxprs
from otfusion_jax.tracing.axis import Axis, Kind, factors_of
from otfusion_jax.tracing.context import Reading, Site, TracedValue
from otfusion_jax.tracing.interpreter import Interpreter, OnUnsupported, live
from otfusion_jax.tracing.leaf_splits import find_leaf_splits, rewritten
from otfusion_jax.tracing.nesting import Nesting, find_nesting, locate, occurrences
from otfusion_jax.tracing.programs import Program, as_function
from otfusion_jax.tracing.unification import Unifier


@dataclasses.dataclass(frozen=True)
class View:
    """Features of a group at a site, and where the units are in the array there."""

    site: Site
    location: UnitLocation


@dataclasses.dataclass(frozen=True)
class Trace:
    """A symmetry together with the jaxpr that it was read from and where features can be read.

    Attributes:
        symmetry: the static result.
        jaxpr: the traced function, first the parameters as `Symmetry.split` takes them apart.
        produced: per group, where its features are produced (before bias and nonlinearity).
        consumed: per group, where they are consumed (after bias and nonlinearity).
    """

    symmetry: Symmetry
    jaxpr: core.ClosedJaxpr
    produced: dict[str, tuple[View, ...]]
    consumed: dict[str, tuple[View, ...]]


def trace(
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    on_unsupported: OnUnsupported = "raise",
) -> Trace:
    """Traces a function; see `trace_symmetry`. Also returns what reading features needs."""
    if on_unsupported not in ("raise", "pin"):
        raise ValueError(f"on_unsupported is {on_unsupported!r}; it must be 'raise' or 'pin'")
    fn, inputs = as_function(fn, inputs)
    whole = Symmetry((), (), leaves_of(params), jax.tree_util.tree_structure(params))
    traced = [(jax.make_jaxpr(fn)(params, *inputs), inputs)]
    longer = _longer(fn, params, inputs)
    try:
        apart, jaxpr, walked = _in_parts([*traced, *longer], whole, on_unsupported)
    except Exception:
        if not longer:
            raise
        # A function that replays what was recorded for other sizes may come to no program at all.
        apart, jaxpr, walked = _in_parts(traced, whole, on_unsupported)
    interpreter, mine = walked.interpreter, walked.mine
    unifier = interpreter.unifier
    for axis in list(walked.unmet()):
        unifier.pin(axis, UNMET)
    for axis in list(walked.unread()):
        unifier.pin(axis, UNREAD)
    groups, names, nest, pins = _collect(interpreter, apart.parts, mine, walked.read)
    symmetry = dataclasses.replace(apart, groups=groups, pinned=pins)
    seen, produced, consumed = (
        _views(unifier, readings, names, nest)
        for readings in (interpreter.seen, interpreter.produced, interpreter.consumed)
    )
    produced = {name: views[:1] for name, views in seen.items()} | produced
    return Trace(symmetry, jaxpr, produced, produced | consumed)


Traced = tuple[core.ClosedJaxpr, tuple[PyTree, ...]]
"""The jaxpr of a function, and the inputs that it was traced on."""
MOST_LONGER = 8
"""So many axes of inputs at most are lengthened one by one."""


def _longer(fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]) -> list[Traced]:
    """Traces a function on inputs that have size 2 where those given have size 1.

    An axis of size 1 tells little: what is broadcast along it, or computed from its length, varies
    at no other length than 1. The function need not take other sizes: those that it takes count.

    Args:
        fn: the function.
        params: its parameters.
        inputs: as they were given.

    Returns:
        One trace with all such axes lengthened if there are any and the function takes that, else
        one for each of them that it takes.
    """
    leaves, structure = jax.tree_util.tree_flatten(inputs)
    short = [
        (number, axis)
        for number, leaf in enumerate(leaves)
        for axis, size in enumerate(np.shape(leaf))
        if size == 1
    ]

    def lengthened(axes: Sequence[tuple[int, int]]) -> list[Traced]:
        changed = list(leaves)
        for number in {number for number, _ in axes}:
            shape = [
                2 if (number, axis) in axes else size
                for axis, size in enumerate(np.shape(leaves[number]))
            ]
            changed[number] = jax.ShapeDtypeStruct(tuple(shape), leaves[number].dtype)
        given = jax.tree_util.tree_unflatten(structure, changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return [(jax.make_jaxpr(fn)(params, *given), given)]
        except Exception:  # whatever a function raises for sizes that it does not take
            return []

    if not short:
        return []
    found = lengthened(short)
    if not found and len(short) > 1:
        for each in short[:MOST_LONGER]:
            found += lengthened([each])
    return found


class _Walked(NamedTuple):
    """A finished walk.

    Attributes:
        walk: what it found.
        mine: the axes of the parameters that it began with.
        used: of each parameter, whether anything depends on it.
        read: the atoms of all that an operation has taken up, and that features vary along.
        dangling: atoms along which parameters meet constants and no features.
    """

    interpreter: Interpreter
    mine: list[tuple[Axis, ...]]
    used: list[bool]
    read: set[int]
    dangling: set[int]

    def unmet(self) -> Iterator[Axis]:
        """Yields all axes of the parameters that meet nothing but constants along one of them."""
        for axes in self.mine:
            if any(self.interpreter.unifier.variables(axis) & self.dangling for axis in axes):
                yield from axes

    def unread(self) -> Iterator[Axis]:
        """Yields the axes of parameters of which parts have not been taken up on these inputs.

        On others they may be, in place of what is read now or beside it: positions at another
        offset, units beyond the width in use.
        """
        for axes in self.mine:
            for axis in axes:
                if self._is_unread(axis):
                    yield axis

    def not_all_read(self) -> Iterator[int]:
        """Yields the numbers of the parameters that have such axes, or that nothing depends on."""
        for number, (axes, used) in enumerate(zip(self.mine, self.used, strict=True)):
            if not used or any(map(self._is_unread, axes)):
                yield number

    def parts_differ(self, symmetry: Symmetry, cut: LeafSplit) -> bool:
        """Whether the parts of a leaf may move in different ways."""
        forms = set()
        for number, leaf in enumerate(symmetry.leaf_of):
            if leaf == cut.leaf:
                forms.add(tuple(map(self._free_atoms, self.mine[number])))
        return len(forms) > 1

    def _free_atoms(self, axis: Axis) -> tuple[int | None, ...]:
        unifier = self.interpreter.unifier
        variables = (factor.variable for factor in factors_of(unifier.expand(axis)))
        return tuple(None if a is None or not unifier.is_free(a) else a for a in variables)

    def _is_unread(self, axis: Axis) -> bool:
        unifier = self.interpreter.unifier
        return any(
            unifier.is_free(variable) and variable not in self.read
            for variable in unifier.variables(axis)
        )


def _in_parts(
    traced: Sequence[Traced], whole: Symmetry, on_unsupported: OnUnsupported
) -> tuple[Symmetry, core.ClosedJaxpr, _Walked]:
    """Walks jaxprs of a function, its leaves cut into parts where that gives more freedom.

    Args:
        traced: first of the arguments of each jaxpr are the leaves.
        whole: the leaves, without cuts.
        on_unsupported: see `trace_symmetry`.

    Returns:
        The cuts, the first jaxpr of the parts, and the walk over all.
    """
    walked = _walked(traced, whole, on_unsupported)
    leaf_splits = find_leaf_splits(walked.interpreter.unifier, whole.leaves, walked.mine)
    while leaf_splits:
        apart = dataclasses.replace(whole, leaf_splits=leaf_splits)
        of_parts = [(rewritten(jaxpr, apart), inputs) for jaxpr, inputs in traced]
        walked_apart = _walked(of_parts, apart, on_unsupported)
        # Of a part that is not read nothing tells where it belongs. Whole, the leaf moves as one.
        unread = {apart.leaf_of[number] for number in walked_apart.not_all_read()}
        kept = [
            cut
            for cut in leaf_splits
            if cut.leaf not in unread and walked_apart.parts_differ(apart, cut)
        ]
        if len(kept) == len(leaf_splits):
            return apart, of_parts[0][0], walked_apart
        leaf_splits = tuple(kept)
    return whole, traced[0][0], walked


def _walked(traced: Sequence[Traced], symmetry: Symmetry, on_unsupported: OnUnsupported) -> _Walked:
    """Walks jaxprs whose first arguments are the parts of the parameters."""
    interpreter = Interpreter(on_unsupported)
    unifier = interpreter.unifier
    mine = []
    flags = [_used(jaxpr.jaxpr)[: len(symmetry.parts)] for jaxpr, _ in traced]
    used = [any(found) for found in zip(*flags, strict=True)]
    for leaf, matters in zip(symmetry.parts, used, strict=True):
        axes = tuple(unifier.fresh(n) for n in leaf.shape)
        for axis in axes:
            if not leaf.moves:
                unifier.pin(axis, f"a leaf of dtype {leaf.dtype} passes untouched")
            elif not matters:
                unifier.pin(axis, NOT_USED)
        mine.append(axes)
    (jaxpr, inputs), *longer = traced
    _walk_on(interpreter, jaxpr, inputs, mine, ())
    interpreter.on_unsupported = "pin"  # of the function on these inputs alone all has to be known
    for jaxpr, inputs in longer:
        _walk_on(interpreter, jaxpr, inputs, mine, None)
    taken = interpreter.variables(interpreter.read)
    features = interpreter.variables(interpreter.features) | interpreter.variables(
        (f,) for f in unifier.summed
    )
    if not jax.tree_util.tree_leaves([inputs for _, inputs in traced]):
        features |= taken  # of parameters alone: there is nothing else for them to meet
    unmet = interpreter.variables((factor,) for factor in unifier.unmet)
    dangling = {variable for variable in unmet - features if unifier.is_free(variable)}
    # Single positions are in no axis of a feature: they need not be tied to anything.
    features |= {variable for variable in taken if unifier.size(variable) == 1}
    read = (interpreter.picked() | (taken & features)) - interpreter.left_out()
    return _Walked(interpreter, mine, used, read, dangling)


def _walk_on(
    interpreter: Interpreter,
    jaxpr: core.ClosedJaxpr,
    inputs: tuple[PyTree, ...],
    mine: Sequence[tuple[Axis, ...]],
    path: tuple[int, ...] | None,
) -> None:
    """Walks one jaxpr; with a path, features can be read there."""
    unifier = interpreter.unifier
    args = [TracedValue(axes, Kind.PARAMETER) for axes in mine]
    for path_in, value in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        name = "input " + jax.tree_util.keystr(path_in, simple=True, separator="/")
        shape = np.shape(value)
        axes = (unifier.pinned(n, f"tied to {name}, axis {d}") for d, n in enumerate(shape))
        args.append(TracedValue(tuple(axes), Kind.FEATURE))
    consts = [interpreter.constant(c) for c in jaxpr.consts]
    for i, value in enumerate(interpreter.run(jaxpr.jaxpr, consts, args, path)):
        for dim, axis in enumerate(value.axes):
            name = "the output" if len(jaxpr.jaxpr.outvars) == 1 else f"output {i}"
            unifier.pin(axis, f"tied to {name}, axis {dim}")


def trace_symmetry(
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    on_unsupported: OnUnsupported = "raise",
) -> Symmetry:
    """Finds the permutation symmetry of a network by tracing it.

    Nothing is computed: arrays and `jax.ShapeDtypeStruct`s do equally well. Inference mode is
    meant: pass a function with dropout switched off and batch norm's running statistics among
    `params`.

    Parts of parameters that the function does not read on these inputs stay, and so does all that
    meets nothing but constants there, as recurrent weights do in a first step from zeros: other
    inputs may read them. What Python or NumPy computes from the size of an input (a mask, a number
    of groups) is a constant to the trace, and the symmetry holds for inputs of that size. An axis
    of size 1, along which nothing varies, is traced at size 2 as well if the function takes that.

    Args:
        fn: a pure function `fn(params, *inputs)`, such as a Flax module's `apply`. Or several
            functions of the same parameters (a policy and a value, training and evaluation mode),
            as a list of pairs `(fn, inputs)` with a tuple of inputs for each: what moves is then
            what all of them allow.
        params: pytree of arrays of any shapes. Leaves that are not floating or complex pass
            through all later steps untouched.
        *inputs: pytrees of arrays. Their axes are pinned, and so are those of the outputs.
        on_unsupported: what to do about a primitive without a rule: `"raise"`, or `"pin"` every
            axis that it touches (the result stays correct and has fewer groups).

    Returns:
        The symmetry; `print` it.

    Warns:
        SymmetryWarning: names parameters that the function does not use, or multiplies with
            constants alone, though units may lie along them.

    Raises:
        UnsupportedPrimitiveError: names the primitive, the source line and ways out.
        ValueError: if leaves of `params` are not arrays.
        TypeError: if `fn` is neither a function nor a list of functions and inputs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
        >>> params = {"in": jnp.ones((8, 32)), "out": jnp.ones((32, 4))}
        >>> print(otf.trace_symmetry(mlp, params, jnp.ones((2, 8))))
        Symmetry: 1 group over 2 leaves; 100.0 % of 384 parameters lie on an axis that can be \
permuted
        group  units  role      leaf  axis
        in     32     produces  in    1
                      consumes  out   0
        <BLANKLINE>
        pinned  size  axis  why
        in      8     0     tied to input 0, axis 1
        out     4     1     tied to the output, axis 1
    """
    symmetry = trace(fn, params, *inputs, on_unsupported=on_unsupported).symmetry
    warn_not_used(symmetry)
    return symmetry


def _used(jaxpr: core.Jaxpr, wanted: Sequence[bool] | None = None) -> list[bool]:
    """Says of each argument whether any of the results that are wanted depends on it."""
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    outputs = zip(jaxpr.outvars, wanted, strict=True)
    used = {v for v, keep in outputs if keep and not isinstance(v, core.Literal)}
    for _, eqn, flags in live(jaxpr, wanted):
        inner = jaxprs.body(eqn)
        # `jit` keeps arguments that its function does not use.
        taken = [True] * len(eqn.invars) if inner is None else _used(inner.jaxpr, flags)
        pairs = zip(eqn.invars, taken, strict=True)
        used.update(v for v, keep in pairs if keep and not isinstance(v, core.Literal))
    return [v in used for v in jaxpr.invars]


def _collect(
    interpreter: Interpreter,
    leaves: tuple[Leaf, ...],
    mine: Sequence[tuple[Axis, ...]],
    read: set[int],
) -> tuple[tuple[Group, ...], dict[int, str], Nesting, tuple[Pin, ...]]:
    """Reads groups, the name of each group's atom, their nest and pins off the finished walk."""
    unifier = interpreter.unifier
    expanded = [tuple(map(unifier.expand, axes)) for axes in mine]
    owners: dict[tuple[int, int], str] = {}
    found: dict[int, str] = {}
    pins = []
    for leaf, axes in zip(leaves, expanded, strict=True):
        for dim, axis in enumerate(axes):
            has_units = False
            for factor in factors_of(axis):
                if factor.variable is not None and unifier.is_free(factor.variable):
                    owners.setdefault(unifier.use(factor)[0], leaf.path)
                    found.setdefault(factor.variable, leaf.path)
                    has_units = True
            if not has_units:
                pins += _pins(unifier, leaf, dim, axis, read)

    # Dataflow order: by the first use of a parameter that puts the units into the features.
    order: dict[int, str] = {}
    for contact in unifier.role_constraints:
        for factor in factors_of(unifier.expand((contact.parameter,))):
            use = unifier.use(factor)[0]
            if use in owners:
                order.setdefault(use[1], owners[use])
    order |= {variable: path for variable, path in found.items() if variable not in order}
    nest = find_nesting(
        unifier, list(order), interpreter.values, interpreter.interactions, interpreter.regroupings
    )
    names: dict[int, str] = {}
    count: collections.Counter[str] = collections.Counter()
    for variable, name in order.items():
        count[name] += 1
        names[variable] = f"{name}#{count[name]}" if count[name] > 1 else name

    signs = unifier.signs()
    members: dict[int, list[Member]] = {variable: [] for variable in order}
    for i, (leaf, axes) in enumerate(zip(leaves, expanded, strict=True)):
        for dim, axis in enumerate(axes):
            for occurrence in occurrences(axis):
                variable = occurrence.factor.variable
                if variable in names:
                    use, flip = unifier.use(occurrence.factor)
                    role = _role({flip * sign for sign in signs.get(use, ())})
                    place = locate(axes, dim, occurrence, nest.around(variable))
                    assert place is not None, leaf.path
                    members[variable].append(Member(i, leaf.path, place, role))
    groups = tuple(
        Group(
            name,
            unifier.size(variable),
            tuple(members[variable]),
            tuple(map(unifier.size, nest.around(variable))),
            names.get(nest.outer.get(variable, -1)),
        )
        for variable, name in names.items()
    )
    return groups, names, nest, tuple(pins)


def _pins(unifier: Unifier, leaf: Leaf, dim: int, axis: Axis, read: set[int]) -> Iterator[Pin]:
    """Yields what holds an axis of a leaf without units: the first reason, and what isn't read."""
    held, unread, selected = [], [], False
    for occurrence in occurrences(axis):
        variable = occurrence.factor.variable
        if variable is None:
            continue
        if unifier.reason(variable) != UNREAD:
            held.append(variable)
            continue
        selected = True
        if variable not in read:
            unread.append(occurrence.place.positions(occurrence.factor.size).ravel())
    size = leaf.shape[dim]
    if axis and (held or not selected):
        reason = unifier.reason(held[0]) if held else None
        reason = reason or "taken apart into single positions"
        met = unifier.met.get(held[0]) if held else None
        source = met and met.source
        yield Pin(leaf.path, dim, size, reason, None if source and source in reason else source)
    if unread:
        positions = np.unique(np.concatenate(unread))
        some = "" if len(positions) == size else f"{_ranges(positions)} "
        yield Pin(leaf.path, dim, size, f"{some}{UNREAD}")
    elif selected:
        yield Pin(leaf.path, dim, size, f"in part {UNREAD}")


def _ranges(positions: np.ndarray) -> str:
    """Writes ascending positions as ranges, in the manner of a slice."""
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    runs = np.split(positions, starts[1:])
    return "[" + ", ".join(f"{run[0]}:{run[-1] + 1}" for run in runs) + "]"


def _role(signs: set[int]) -> Role:
    if signs == {1, -1}:
        return "both"
    return "consumes" if signs == {-1} else "produces"


def _views(
    unifier: Unifier, readings: Sequence[Reading], names: dict[int, str], nest: Nesting
) -> dict[str, tuple[View, ...]]:
    """Sorts the places where features can be read by group."""
    found: dict[str, list[View]] = {}
    for site, axes, dims in readings:
        axes = tuple(map(unifier.expand, axes))
        for dim in sorted(dims):
            for occurrence in occurrences(axes[dim]):
                variable = occurrence.factor.variable
                if variable in names:
                    place = locate(axes, dim, occurrence, nest.around(variable))
                    if place is not None:
                        found.setdefault(names[variable], []).append(View(site, place))
    return {name: tuple(views) for name, views in found.items()}
