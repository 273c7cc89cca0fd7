"""From a function to its symmetry.

`trace_symmetry` traces `fn(params, *inputs)` on abstract values, walks the jaxpr with every axis of
every parameter, and reads off which of them the primitives have tied together.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jaxtyping import PyTree

import otfusion_jax.rules  # noqa: F401, fills the registry
from otfusion_jax.axes import Axis, Factor, Kind, Space
from otfusion_jax.symmetry import Group, Leaf, Member, Pin, Role, Symmetry, leaves_of
from otfusion_jax.walk import OnUnsupported, Site, Value, Walk, live


@dataclasses.dataclass(frozen=True)
class View:
    """Features of a group at a site: dimension `dim` read as `[before, size, after]`."""

    site: Site
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """A symmetry together with the jaxpr that it was read from and where features can be read.

    Attributes:
        symmetry: the static result.
        jaxpr: the traced function, flat parameters first.
        produced: per group, where its features are produced (before bias and nonlinearity).
        consumed: per group, where they are consumed (after bias and nonlinearity).
    """

    symmetry: Symmetry
    jaxpr: core.ClosedJaxpr
    produced: dict[str, tuple[View, ...]]
    consumed: dict[str, tuple[View, ...]]


def trace(
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: PyTree,
    on_unsupported: OnUnsupported = "raise",
) -> Trace:
    """Traces a function; see `trace_symmetry`. Also returns what reading features needs."""
    if on_unsupported not in ("raise", "pin"):
        raise ValueError(f"on_unsupported is {on_unsupported!r}; it must be 'raise' or 'pin'")
    leaves = leaves_of(params)
    jaxpr = jax.make_jaxpr(fn)(params, *inputs)
    walk = Walk(on_unsupported)
    space = walk.space
    mine = []
    used = _used(jaxpr.jaxpr)
    for leaf, var in zip(leaves, jaxpr.jaxpr.invars, strict=False):
        axes = tuple(space.fresh(n) for n in leaf.shape)
        for axis in axes:
            if not leaf.moves:
                space.pin(axis, f"a leaf of dtype {leaf.dtype} passes untouched")
            elif var not in used:
                space.pin(axis, "not used by the function")
        mine.append(axes)
    args = [Value(axes, Kind.PARAMETER) for axes in mine]
    for path, value in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        name = "input " + jax.tree_util.keystr(path, simple=True, separator="/")
        shape = np.shape(value)
        axes = (space.pinned(n, f"tied to {name}, axis {d}") for d, n in enumerate(shape))
        args.append(Value(tuple(axes), Kind.FEATURE))
    consts = [walk.constant(c) for c in jaxpr.consts]
    for i, value in enumerate(walk.run(jaxpr.jaxpr, consts, args)):
        for dim, axis in enumerate(value.axes):
            name = "the output" if len(jaxpr.jaxpr.outvars) == 1 else f"output {i}"
            space.pin(axis, f"tied to {name}, axis {dim}")

    groups, atoms, pins = _collect(space, leaves, mine)
    symmetry = Symmetry(groups, pins, leaves, jax.tree_util.tree_structure(params))
    seen = _views(space, walk.seen, atoms, first=True)
    produced = seen | _views(space, walk.produced, atoms)
    consumed = produced | _views(space, walk.consumed, atoms)
    return Trace(symmetry, jaxpr, produced, consumed)


def trace_symmetry(
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: PyTree,
    on_unsupported: OnUnsupported = "raise",
) -> Symmetry:
    """Finds the permutation symmetry of a network by tracing it.

    Nothing is computed: arrays and `jax.ShapeDtypeStruct`s do equally well. The batch size of
    `inputs` does not matter. Inference mode is meant: pass a function with dropout switched off
    and batch norm's running statistics among `params`.

    Args:
        fn: a pure function `fn(params, *inputs)`, such as a Flax module's `apply`.
        params: pytree of arrays of any shapes. Leaves that are not floating or complex pass
            through all later steps untouched.
        *inputs: pytrees of arrays. Their axes are pinned, and so are those of the outputs.
        on_unsupported: what to do about a primitive without a rule: `"raise"`, or `"pin"` every
            axis that it touches (the result stays correct and has fewer groups).

    Returns:
        The symmetry; `print` it.

    Raises:
        UnsupportedPrimitiveError: names the primitive, the source line and ways out.
        ValueError: if leaves of `params` are not arrays.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> def mlp(params, x):
        ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
        >>> params = {"in": jnp.ones((8, 32)), "out": jnp.ones((32, 4))}
        >>> print(otf.trace_symmetry(mlp, params, jnp.ones((1, 8))))
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
    return trace(fn, params, *inputs, on_unsupported=on_unsupported).symmetry


def _used(jaxpr: core.Jaxpr) -> set[Any]:
    used = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    for _, eqn, _ in live(jaxpr):
        used.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return used


def _factors(space: Space, axis: Axis) -> Iterator[tuple[Factor, int, int]]:
    """Yields the finest factors of an axis with the products of those before and after."""
    factors = space.expand(axis)
    for i, factor in enumerate(factors):
        before = math.prod(f.size for f in factors[:i])
        yield factor, before, math.prod(f.size for f in factors[i + 1 :])


def _collect(
    space: Space, leaves: tuple[Leaf, ...], mine: Sequence[tuple[Axis, ...]]
) -> tuple[tuple[Group, ...], dict[int, str], tuple[Pin, ...]]:
    """Reads groups, the name of each group's atom, and pins off the finished space."""
    signs = space.signs()
    members: dict[int, list[Member]] = {}
    owners: dict[tuple[int, int], str] = {}
    pins = []
    for i, (leaf, axes) in enumerate(zip(leaves, mine, strict=True)):
        for dim, axis in enumerate(axes):
            reason = None
            free = False
            for factor, before, after in _factors(space, axis):
                assert factor.atom is not None
                held = space.reason(factor.atom)
                if held is None and factor.size > 1:
                    use, flip = space.use(factor)
                    role = _role({flip * sign for sign in signs.get(use, ())})
                    member = Member(i, leaf.path, dim, before, after, role)
                    members.setdefault(factor.atom, []).append(member)
                    owners.setdefault(use, leaf.path)
                    free = True
                reason = reason or held
            if not free and reason:
                pins.append(Pin(leaf.path, dim, leaf.shape[dim], reason))

    # Dataflow order: by the first use of a parameter that puts the units into the features.
    order: dict[int, str] = {}
    for contact in space.contacts:
        for factor in space.expand((contact.parameter,)):
            use = space.use(factor)[0]
            if use in owners:
                order.setdefault(use[1], owners[use])
    for atom, found in members.items():
        order.setdefault(atom, found[0].path)
    groups, names = [], {}
    count: collections.Counter[str] = collections.Counter()
    for atom, name in order.items():
        count[name] += 1
        names[atom] = f"{name}#{count[name]}" if count[name] > 1 else name
        groups.append(Group(names[atom], space.size(atom), tuple(members[atom])))
    return tuple(groups), names, tuple(pins)


def _role(signs: set[int]) -> Role:
    if signs == {1, -1}:
        return "both"
    return "consumes" if signs == {-1} else "produces"


def _views(
    space: Space, sites: Sequence[tuple[Site, Axis]], names: dict[int, str], first: bool = False
) -> dict[str, tuple[View, ...]]:
    """Sorts sites by group."""
    found: dict[str, list[View]] = {}
    for site, axis in sites:
        for factor, before, after in _factors(space, axis):
            if factor.atom in names:
                views = found.setdefault(names[factor.atom], [])
                if not (first and views):
                    views.append(View(site, before, after))
    return {name: tuple(views) for name, views in found.items()}
