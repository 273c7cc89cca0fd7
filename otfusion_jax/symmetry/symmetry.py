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
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from otfusion_jax.common.scaling import not_finite
from otfusion_jax.symmetry import display as describe
from otfusion_jax.symmetry.groups import Group, Leaf, LeafSplit, Member, Pin, Plans, leaves_of
from otfusion_jax.symmetry.leaf_structure import LeafStructure, leaf_structure_of


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
    leaf_splits: tuple[LeafSplit, ...] = ()

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
        leaf_splits = {cut.leaf: cut for cut in self.leaf_splits}
        for number, leaf in enumerate(self.leaves):
            found += leaf_splits[number].parts(leaf) if number in leaf_splits else [leaf]
        return tuple(found)

    @functools.cached_property
    def leaf_of(self) -> tuple[int, ...]:
        """For each part the position of its leaf."""
        counts = {cut.leaf: cut.count for cut in self.leaf_splits}
        return tuple(i for i in range(len(self.leaves)) for _ in range(counts.get(i, 1)))

    def split(self, params: PyTree) -> list[Any]:
        """Takes parameters apart, without checks.

        Args:
            params: of the structure that was traced.

        Returns:
            One array for each of `parts`.
        """
        found: list[Any] = []
        leaf_splits = {cut.leaf: cut for cut in self.leaf_splits}
        for number, leaf in enumerate(jax.tree_util.tree_leaves(params)):
            cut = leaf_splits.get(number)
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
        leaf_splits = {cut.leaf: cut for cut in self.leaf_splits}
        for number in range(len(self.leaves)):
            cut = leaf_splits.get(number)
            if cut is None:
                leaves.append(next(left))
            else:
                leaves.append(jnp.concatenate([next(left) for _ in range(cut.count)], cut.axis))
        return self.treedef.unflatten(leaves)

    @functools.cached_property
    def leaf_structures(self) -> tuple[LeafStructure, ...]:
        """For each part how it falls into cells, and which groups index it by which dimension.

        Groups around others come first: plans of nested groups are by the place that their
        surroundings have been moved to.
        """
        found: list[list[tuple[Group, Member]]] = [[] for _ in self.parts]
        for group in sorted(self.groups, key=lambda g: g.outer is not None):
            for member in group.members:
                found[member.leaf].append((group, member))
        return tuple(
            leaf_structure_of(part.shape, pairs)
            for part, pairs in zip(self.parts, found, strict=True)
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
