"""What `trace_symmetry` finds: which parameter axes must be permuted together.

A `Symmetry` is static: hashable, comparable, free of arrays. It can be a static argument of a
jitted function, the key of a cache, or be printed and read. All that follows (costs, plans,
transport, fusion) is a pure function of a symmetry and of pytrees.

Terms. A *group* is a set of `size` interchangeable hidden units. Its *members* are the parameter
axes that these units index. In a member the axis either *produces* the units (bias, scale, output
axis of a kernel) or *consumes* them (contracted axis). An axis may be a product: when a
convolution's output is flattened before a dense layer, the kernel's axis of size H·W·C holds the
C units at stride 1, repeated H·W times. It may be a sum: a fused projection has queries, keys and
values one after the other. Each member therefore says at which `Place` of its axis the units lie.

Groups may be *nested*: a head's dimensions can be permuted in another way in each head, the hidden
units of stacked layers in another way in each layer. Such a group has a `batch` of plans, one for
each index of the axes around it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from otfusion_jax import describe
from otfusion_jax.layout import Dim, Factor, Layout, Where, layout_of
from otfusion_jax.scaling import not_finite

Role = Literal["produces", "consumes", "both"]
Plans = dict[str, Array]
"""Group name to plan: an integer `[n]` permutation or a float `[n, m]` transport plan, preceded by
the group's batch."""

NOT_USED = "not used by the function"
"""Why a parameter is pinned that nothing reads."""
UNREAD = "not read on these inputs"
"""Why an axis stays of which the function selects a part alone, or nothing but sums over itself."""
UNMET = "meets nothing but constants on these inputs"
"""Why all axes of a leaf stay: on other inputs it may meet any units, as recurrent weights do that
a first step multiplies with zeros."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One parameter axis (or one part of it) that a group's units index.

    Attributes:
        leaf: position of the parameter among the parts of the symmetry: the leaves of the pytree,
            unless there are any cuts.
        path: key path of the parameter, as in `"params/Dense_0/kernel"`, or of a part of it.
        where: at which positions of the parameter the units are.
        role: `"produces"`, `"consumes"`, or `"both"` (a tied embedding).
    """

    leaf: int
    path: str
    where: Where
    role: Role

    @property
    def axis(self) -> int:
        """The axis of the parameter."""
        return self.where.axis

    @property
    def before(self) -> int:
        """Product of the factors of the axis that are outside the units."""
        return self.where.place.before

    @property
    def after(self) -> int:
        """Product of the factors of the axis that are inside the units."""
        return self.where.place.after


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that may be permuted at will, if all members are permuted together.

    Attributes:
        name: the key path of the parameter that first produces the units.
        size: number of units.
        members: every parameter axis that the units index.
        batch: sizes of the axes around the units, for each index of which there is another
            permutation: a plan has shape `[*batch, size]`.
        outer: name of the group that is the last axis of the batch, None if that can't be permuted.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    batch: tuple[int, ...] = ()
    outer: str | None = None

    def having(self, role: Role) -> tuple[Member, ...]:
        """Returns the members of the role given; one that has both roles counts in either."""
        return tuple(m for m in self.members if m.role in (role, "both"))


@dataclasses.dataclass(frozen=True)
class Pin:
    """A parameter axis that has to stay as it is, and why.

    Attributes:
        path: key path of the parameter.
        axis: the axis.
        size: its size.
        reason: what holds it, in words.
        source: the source line where it met what holds it, if that is not in the reason.
    """

    path: str
    axis: int
    size: int
    reason: str
    source: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Path, shape and dtype of one parameter. `dtype` is JAX's, extended ones included.

    The path of parameters that are one array, and no tree, is `"params"`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def moves(self) -> bool:
        """Whether it can move and be averaged; integers, booleans and keys pass untouched."""
        return jnp.issubdtype(self.dtype, jnp.inexact)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A leaf that falls into parts of one size along an axis, each with a symmetry of its own.

    Axes of a part are numbered as those of the leaf.

    Attributes:
        leaf: position of the parameter among the leaves of the pytree.
        axis: along which the parts lie one after the other.
        count: how many there are.
    """

    leaf: int
    axis: int
    count: int

    def parts(self, leaf: Leaf) -> Iterator[Leaf]:
        """Yields path, shape and dtype of every part, the path in the manner of an index."""
        size = leaf.shape[self.axis] // self.count
        before, after = leaf.shape[: self.axis], leaf.shape[self.axis + 1 :]
        for number in range(self.count):
            # Of parts that are wider than one position the name does not depend on the width.
            index = str(number) if size == 1 else f"{number} of {self.count}"
            name = ", ".join([*[":"] * self.axis, index])
            yield Leaf(f"{leaf.path}[{name}]", (*before, size, *after), leaf.dtype)


def leaves_of(params: PyTree) -> tuple[Leaf, ...]:
    """Reads path, shape and dtype of every leaf.

    Args:
        params: a pytree of arrays, `jax.ShapeDtypeStruct`s or Python numbers.

    Returns:
        One `Leaf` per leaf, in the pytree's order.

    Raises:
        ValueError: if leaves are not arrays; all of them are named.
    """
    leaves, strange = [], []
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        try:
            aval = jax.typeof(value) if not isinstance(value, jax.ShapeDtypeStruct) else value
            leaves.append(Leaf(name, tuple(aval.shape), aval.dtype))
        except TypeError:
            strange.append(f"  {name}: {type(value).__name__}{_of_dtype(value)}")
    if strange:
        raise ValueError(
            "these leaves of the parameters are not arrays; pass a pytree of arrays alone and "
            "close over the rest (equinox.partition, nnx.split):\n" + "\n".join(strange)
        )
    return tuple(leaves)


def _of_dtype(value: Any) -> str:
    """Says which dtype makes an array one that JAX does not take."""
    dtype = getattr(value, "dtype", None)
    if not isinstance(dtype, np.dtype):
        return ""
    if not dtype.isnative:
        return (
            f" of the other byte order, {dtype.str}; convert it, x.astype(x.dtype.newbyteorder())"
        )
    return f" of dtype {dtype}"


class Use(NamedTuple):
    """A member, and the dimensions of its leaf's cells that its units and its batch are."""

    group: Group
    member: Member
    dim: Dim
    levels: tuple[Dim, ...]


class Uses(NamedTuple):
    """How a leaf falls into cells, and which groups index it."""

    layout: Layout
    uses: tuple[Use, ...]


def uses_of(shape: tuple[int, ...], pairs: list[tuple[Group, Member]]) -> Uses:
    """Works out how an array falls into cells.

    Args:
        shape: of the array.
        pairs: the groups that index it, and by what.

    Returns:
        Its layout, and which dimension each member is.
    """
    factors: dict[Factor, int] = {}
    uses = []
    for group, member in pairs:
        where = member.where
        own = Factor(where.axis, where.place, group.size)
        levels = tuple(
            factors.setdefault(Factor(axis, place, size), len(factors))
            for (axis, _, place), size in zip(where.within, group.batch, strict=True)
        )
        uses.append(Use(group, member, factors.setdefault(own, len(factors)), levels))
    return Uses(layout_of(shape, tuple(factors)), tuple(uses))


@dataclasses.dataclass(frozen=True)
class Symmetry:
    """The permutation symmetry of a network: groups of parameter axes, in dataflow order.

    Attributes:
        groups: what can be permuted, in the order in which the forward pass produces it.
        pinned: what cannot, with reasons; factors of an axis that also has units are left out.
        leaves: path, shape and dtype of every parameter.
        treedef: structure of the parameters.
        cuts: the leaves that the function picks apart by index (`qkv[0]`). Their parts are as
            different as leaves are; members and pins are of parts.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pin, ...]
    leaves: tuple[Leaf, ...]
    treedef: Any
    cuts: tuple[Cut, ...] = ()

    def __getitem__(self, name: str) -> Group:
        """Returns the group of that name; `KeyError` lists the names there are."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; there are {[g.name for g in self.groups]}")

    @functools.cached_property
    def parts(self) -> tuple[Leaf, ...]:
        """Path, shape and dtype of every part: of the leaves, where they are not cut."""
        found: list[Leaf] = []
        cuts = {cut.leaf: cut for cut in self.cuts}
        for number, leaf in enumerate(self.leaves):
            found += cuts[number].parts(leaf) if number in cuts else [leaf]
        return tuple(found)

    @functools.cached_property
    def leaf_of(self) -> tuple[int, ...]:
        """For each part the position of its leaf."""
        counts = {cut.leaf: cut.count for cut in self.cuts}
        return tuple(i for i in range(len(self.leaves)) for _ in range(counts.get(i, 1)))

    def split(self, params: PyTree) -> list[Any]:
        """Takes parameters apart, without checks.

        Args:
            params: of the structure that was traced.

        Returns:
            One array for each of `parts`.
        """
        found: list[Any] = []
        cuts = {cut.leaf: cut for cut in self.cuts}
        for number, leaf in enumerate(jax.tree_util.tree_leaves(params)):
            cut = cuts.get(number)
            found += [leaf] if cut is None else jnp.split(jnp.asarray(leaf), cut.count, cut.axis)
        return found

    def join(self, parts: Iterable[Any]) -> PyTree:
        """Puts parameters together again, without checks.

        Args:
            parts: one array for each of `parts`.

        Returns:
            The parameters.
        """
        left = iter(parts)
        leaves: list[Any] = []
        cuts = {cut.leaf: cut for cut in self.cuts}
        for number in range(len(self.leaves)):
            cut = cuts.get(number)
            if cut is None:
                leaves.append(next(left))
            else:
                leaves.append(jnp.concatenate([next(left) for _ in range(cut.count)], cut.axis))
        return self.treedef.unflatten(leaves)

    @functools.cached_property
    def by_leaf(self) -> tuple["Uses", ...]:
        """For each part how it falls into cells, and which groups index it by which dimension.

        Groups around others come first: plans of nested groups are by the place that their
        surroundings have been moved to.
        """
        found: list[list[tuple[Group, Member]]] = [[] for _ in self.parts]
        for group in sorted(self.groups, key=lambda g: g.outer is not None):
            for member in group.members:
                found[member.leaf].append((group, member))
        return tuple(
            uses_of(part.shape, pairs) for part, pairs in zip(self.parts, found, strict=True)
        )

    def only(self, keep: Callable[[str], bool]) -> "Symmetry":
        """Leaves groups out: what is done with the result does not move them.

        Args:
            keep: from the name of a group, which is a key path, to whether it may move.

        Returns:
            The symmetry of the groups that are kept. The axes of the others are pinned.
        """
        kept = {g.name for g in self.groups if keep(g.name)}
        groups = (
            g if g.outer in kept else dataclasses.replace(g, outer=None)
            for g in self.groups
            if g.name in kept
        )
        pins = tuple(
            Pin(m.path, m.axis, g.size, "left out by the caller")
            for g in self.groups
            if g.name not in kept
            for m in g.members
        )
        return dataclasses.replace(self, groups=tuple(groups), pinned=self.pinned + pins)

    def identity(self) -> Plans:
        """Returns the plans that move nothing, int32 `[*batch, n]` each."""
        units = {g.name: np.arange(g.size, dtype=np.int32) for g in self.groups}
        # For each shape `jnp.asarray` would compile a program.
        return {
            g.name: jax.device_put(np.broadcast_to(units[g.name], (*g.batch, g.size)))
            for g in self.groups
        }

    def random(self, key: Array) -> Plans:
        """Draws a uniform permutation of every group.

        Args:
            key: a key of `jax.random`.

        Returns:
            Plans, int32 `[*batch, n]` each.

        Raises:
            TypeError: for a number in place of a key, and for a batch of keys.
        """
        _require_key(key)
        return {
            name: jax.random.permutation(
                jax.random.fold_in(key, number), plan, axis=-1, independent=True
            )
            for number, (name, plan) in enumerate(self.identity().items())
        }

    def validate(self, params: PyTree, name: str = "params", batch: tuple[int, ...] = ()) -> None:
        """Checks that a pytree is one that this symmetry was traced for.

        Values are looked at only where there are any: under `jax.jit` or `jax.vmap`, structure,
        shapes and dtypes are checked and finiteness is not.

        Args:
            params: the pytree.
            name: what to call it in the message.
            batch: leading axes that every leaf has in front, as in a stack of models.

        Raises:
            ValueError: on another tree structure, other shapes or kinds of dtype, or
                non-finite values, listing every offender by key path.
        """
        found = leaves_of(params)
        mine = {leaf.path: leaf for leaf in self.leaves}
        if jax.tree_util.tree_structure(params) != self.treedef:
            theirs = {leaf.path for leaf in found}
            wrong = [f"  {p}: missing" for p in mine if p not in theirs]
            wrong += [f"  {p}: not expected" for p in sorted(theirs - mine.keys())]
            wrong = wrong or ["  the same leaves in containers of other types"]
            raise ValueError(
                f"{name} has another tree than expected; all models must be of the architecture "
                "and framework that was traced:\n" + "\n".join(wrong)
            )
        wrong = []
        for leaf, here, value in zip(
            self.leaves, found, jax.tree_util.tree_leaves(params), strict=True
        ):
            shape = (*batch, *leaf.shape)
            if here.shape != shape:
                wrong.append(f"  {leaf.path}: shape {here.shape}, expected {shape}")
            elif here.moves != leaf.moves:
                wrong.append(f"  {leaf.path}: dtype {here.dtype}, expected {leaf.dtype}")
            elif leaf.moves and not isinstance(value, Tracer | jax.ShapeDtypeStruct):
                if bad := not_finite(value):
                    wrong.append(f"  {leaf.path}: {bad} of {np.size(value)} values not finite")
        if wrong:
            raise ValueError(
                f"{name} does not fit (made with the same sizes as the model that was traced? did "
                "training diverge?):\n" + "\n".join(wrong)
            )

    def __str__(self) -> str:
        """A table: per group its size and members, then what is pinned, and why.

        What repeats itself from block to block is shown once, as in `layer_{0..11}/kernel`.
        """
        return describe.table(self)

    def summary(self) -> str:
        """Says which share of the parameters can move, and what pins the rest.

        Returns:
            Text: the groups by size, then for each reason the parameters that do not move because
            of it, the most first, with the source line where they met what does not move.
        """
        return describe.summary(self)


def _require_key(key: Any) -> None:
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return
        if key.dtype == jnp.uint32 and key.ndim == 1:  # as jax.random.PRNGKey makes them
            return
    raise TypeError(f"key is {f'{key!r}'[:80]}; pass a single key, as jax.random.key(0) is one")
