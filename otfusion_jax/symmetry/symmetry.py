"""What `trace_symmetry` finds: which parameter axes must be permuted together.

A `Symmetry` is static: hashable, comparable, free of arrays. It can be a static argument of a
jitted function, the key of a cache, or be printed and read. All that follows (costs, plans,
transport, fusion) is a pure function of a symmetry and of pytrees.

Terms. A *group* is a set of `size` interchangeable hidden units. Its *members* are the parameter
axes that these units index. In a member the axis either *produces* the units (bias, scale, output
axis of a kernel) or *consumes* them (contracted axis). An axis may be a product: when a
convolution's output is flattened before a dense layer, the kernel's axis of size H·W·C holds the
C units at stride 1, repeated H·W times. It may be a sum: a fused projection has queries, keys and
values one after the other. Each member therefore has a `UnitLocation`: the positions of its axis
at which the units lie.

Groups may be *nested*: a head's dimensions can be permuted in another way in each head, the hidden
units of stacked layers in another way in each layer. Such a group has a `batch` of plans, one for
each index of the axes around it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from otfusion_jax.common.arguments import require_function, require_key, require_kind
from otfusion_jax.common.host import loaded
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry import display, serialization
from otfusion_jax.symmetry.groups import (
    FOLDED,
    Freedom,
    Group,
    Leaf,
    LeafSplit,
    Member,
    Pin,
    Plans,
)
from otfusion_jax.symmetry.leaf_structure import (
    LeafStructure,
    NumberedLeaf,
    leaf_structure_of,
    numbered_leaf,
)
from otfusion_jax.symmetry.rotation import random_rotation
from otfusion_jax.symmetry.signs import signed_matrix
from otfusion_jax.symmetry.validation import require_fitting


@dataclasses.dataclass(frozen=True, repr=False)
class Symmetry(Mapping[str, Group]):
    """The permutation symmetry of a network: groups of parameter axes, in dataflow order.

    It is a mapping from the names of groups to groups: `symmetry["Dense_0/kernel"]`, `len`, `in`,
    and iteration over the names. Two symmetries are equal if all their attributes are.

    Attributes:
        groups: What can be permuted, in the order in which the forward pass produces it.
        pinned: What cannot be permuted, with reasons. Factors of an axis that also has units are
            left out.
        leaves: Path, shape and dtype of every parameter.
        treedef: The structure of the parameters.
        leaf_splits: The leaves that the function picks apart by index (`qkv[0]`). Their parts are
            as different as leaves are; members and pins are of parts.
        freedoms: What each group may do beyond being permuted. It comes into force by
            `with_rotations`.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pin, ...]
    leaves: tuple[Leaf, ...]
    treedef: Any
    leaf_splits: tuple[LeafSplit, ...] = ()
    freedoms: tuple[Freedom, ...] = ()

    # --- a static value, and a mapping

    def __getitem__(self, name: str) -> Group:
        """Returns the group of that name; `KeyError` lists the names there are."""
        try:
            return self._group_by_name[name]
        except KeyError:
            names = list(self._group_by_name)
            raise KeyError(f"no group {name!r}; there are {names}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._group_by_name)

    def __len__(self) -> int:
        return len(self.groups)

    @functools.cached_property
    def _group_by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # Every call of a jitted function hashes its static arguments, and a symmetry of a deep
        # network has thousands of members.
        fields = (self.groups, self.pinned, self.leaves, self.treedef, self.leaf_splits)
        return hash((fields, self.freedoms))

    def __getstate__(self) -> dict[str, Any]:
        # A pickle has the fields alone. What is cached beside them would be wrong in another
        # process, where strings have other hashes.
        state = {}
        for field in dataclasses.fields(self):
            state[field.name] = getattr(self, field.name)
        return state

    def __repr__(self) -> str:
        """One line; `str` has the table."""
        parameter_count = 0
        for leaf in self.leaves:
            parameter_count += math.prod(leaf.shape)
        return (
            f"<Symmetry: {display.counted(len(self.groups), 'group', 'groups')}, "
            f"{display.counted(len(self.leaves), 'leaf', 'leaves')}, "
            f"{display.counted(parameter_count, 'parameter', 'parameters')}>"
        )

    def __str__(self) -> str:
        """A table: per group its size and members, then what is pinned, and why.

        What repeats itself from block to block is shown once, as in `layer_{0..11}/kernel`.
        """
        return display.table(self)

    def _repr_html_(self) -> str:
        """Shows the table in a notebook."""
        return display.html(self)

    def summary(self) -> str:
        """Says which share of the parameters can move, and what pins the rest.

        Returns:
            Text: the groups by size, then for each reason the parameters that do not move because
            of it, the most first, with the source line where they met what does not move.
        """
        return display.summary(self)

    def to_json(self) -> str:
        """Writes the symmetry as JSON, for other processes and for models without their code.

        Returns:
            The text. It has a version, and every field that there is, reasons and source lines
            among them. The same symmetry always gives the same text.

        Raises:
            ValueError: If the parameters lie in other containers than dicts with string keys, lists
                and tuples (an NNX state, a `NamedTuple`), naming where: what cannot be named cannot
                be read again.
        """
        return serialization.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> "Symmetry":
        """Reads a symmetry that `to_json` has written, and checks all of it.

        Args:
            text: The text, which may come from anywhere.

        Returns:
            The symmetry, equal to the one that was written and with the same hash.

        Raises:
            ValueError: If the text is no JSON, no symmetry, or of another version, or if a field is
                missing, of another kind, or out of range. The message says which, as in
                `groups[3].members[0].role`.
            TypeError: If it is no text.
        """
        require_kind(text, str, "text", "what symmetry.to_json() has returned")
        return cls(**serialization.loads(text))

    # --- leaves and their parts

    @functools.cached_property
    def parts(self) -> tuple[Leaf, ...]:
        """Path, shape and dtype of every part: of the leaves, where they are not split."""
        parts: list[Leaf] = []
        for number, leaf in enumerate(self.leaves):
            if number in self._split_of_leaf:
                parts.extend(self._split_of_leaf[number].parts(leaf))
            else:
                parts.append(leaf)
        return tuple(parts)

    @functools.cached_property
    def leaf_of(self) -> tuple[int, ...]:
        """For each part the position of its leaf."""
        positions: list[int] = []
        for number in range(len(self.leaves)):
            leaf_split = self._split_of_leaf.get(number)
            count = 1 if leaf_split is None else leaf_split.count
            positions.extend([number] * count)
        return tuple(positions)

    @functools.cached_property
    def _split_of_leaf(self) -> dict[int, LeafSplit]:
        return {leaf_split.leaf: leaf_split for leaf_split in self.leaf_splits}

    @functools.cached_property
    def leaf_structures(self) -> tuple[LeafStructure, ...]:
        """For each part how it falls into blocks, and which groups index it by which dimension."""
        members: list[list[tuple[Group, Member]]] = [[] for _ in self.parts]
        # Groups around others come first: a nested group's plan at an index is for the units that
        # have been moved there.
        outermost_first = sorted(self.groups, key=lambda group: group.outer is not None)
        for group in outermost_first:
            for member in group.members:
                members[member.leaf].append((group, member))
        structures = []
        for part, part_members in zip(self.parts, members, strict=True):
            structures.append(leaf_structure_of(part.shape, part_members))
        return tuple(structures)

    @functools.cached_property
    def numbered_leaves(self) -> tuple[NumberedLeaf, ...]:
        """For each part its structure with numbers for groups, which equal parts share."""
        numbered = []
        for part, structure in zip(self.parts, self.leaf_structures, strict=True):
            numbered.append(numbered_leaf(part.shape, structure))
        return tuple(numbered)

    def split(self, params: PyTree) -> list[Any]:
        """Takes parameters apart, without checks.

        Args:
            params: A pytree of the structure that was traced.

        Returns:
            One array for each of `parts`.
        """
        arrays: list[Any] = []
        for number, leaf in enumerate(jax.tree_util.tree_leaves(params)):
            leaf_split = self._split_of_leaf.get(number)
            if leaf_split is None:
                arrays.append(leaf)
            else:
                # A leaf in parts is in memory as long as they are, even if it was lazy.
                arrays.extend(_split(loaded(leaf), leaf_split.count, leaf_split.axis))
        return arrays

    def join(self, parts: Iterable[Any]) -> PyTree:
        """Puts parameters together again, without checks.

        Args:
            parts: One array for each of `parts`.

        Returns:
            A pytree of the structure that was traced.
        """
        remaining = iter(parts)
        leaves: list[Any] = []
        for number in range(len(self.leaves)):
            leaf_split = self._split_of_leaf.get(number)
            if leaf_split is None:
                leaves.append(next(remaining))
            else:
                arrays = [next(remaining) for _ in range(leaf_split.count)]
                leaves.append(_concatenated(arrays, leaf_split.axis))
        return self.treedef.unflatten(leaves)

    # --- other symmetries and plans

    def only(self, keep: Callable[[str], bool]) -> "Symmetry":
        """Leaves groups out: what is done with the result does not move them.

        Args:
            keep: A function from the name of a group, which is a key path, to whether the group may
                move.

        Returns:
            The symmetry of the groups that are kept. The axes of the others are pinned.

        Raises:
            TypeError: If `keep` is no function, but a list of names, for one.
        """
        require_function(keep, 'symmetry.only(lambda name: name in ("a", "b"))')
        kept_names = {group.name for group in self.groups if keep(group.name)}
        groups = []
        pins = []
        for group in self.groups:
            if group.name not in kept_names:
                for member in group.members:
                    pin = Pin(member.path, member.axis, group.size, "left out by the caller")
                    pins.append(pin)
                continue
            if group.outer not in kept_names:
                # What stays around a group is an axis of its batch like any other.
                group = dataclasses.replace(group, outer=None)
            groups.append(group)
        # Folds would divide by scales along units that are known no more.
        freedoms = [freedom for freedom in self.freedoms if freedom.group in kept_names]
        pinned = (*self.pinned, *pins)
        return dataclasses.replace(
            self, groups=tuple(groups), pinned=pinned, freedoms=tuple(freedoms)
        )

    @property
    def rotates(self) -> bool:
        """Whether units of any group are rotated, and not permuted alone."""
        return any(group.rotates for group in self.groups)

    @property
    def orthogonal(self) -> bool:
        """Whether units of any group are rotated or change their signs."""
        return any(group.orthogonal for group in self.groups)

    @property
    def has_form(self) -> bool:
        """Whether models are brought into canonical form before they are compared."""
        return any(group.rotates or group.scaled for group in self.groups)

    def with_rotations(self) -> "Symmetry":
        """Lets units be multiplied by orthogonal matrices where the function allows it.

        It is the symmetry of parameters in canonical form, see `canonicalize`. `print` of the
        result shows which groups rotate, and `summary` what stands in the way for the others.

        Returns:
            The symmetry whose groups move by all that `freedoms` says: the features of a residual
            stream, and those of the queries, keys and values inside of each head. Equal to this one
            if no group may rotate.
        """
        freedom_of = {freedom.group: freedom for freedom in self.freedoms if freedom.rotates}
        groups = []
        pins = []
        for group in self.groups:
            freedom = freedom_of.get(group.name)
            if freedom is None or group.rotates:
                groups.append(group)
                continue
            folded = {fold.leaf for fold in freedom.folds}
            members = []
            for member in group.members:
                if member.leaf in folded:
                    # It is 1 for every unit, and so it stays.
                    pins.append(Pin(member.path, member.axis, group.size, FOLDED))
                else:
                    members.append(member)
            # Rotations have signs among them.
            members = [dataclasses.replace(member, odd=False) for member in members]
            rotating = dataclasses.replace(
                group,
                members=tuple(members),
                rotates=True,
                fixes_ones=freedom.fixes_ones,
                signed=False,
                scaled=group.scaled and freedom.linear,
                stretch=freedom.stretch,
            )
            groups.append(rotating)
        pinned = (*self.pinned, *pins)
        return dataclasses.replace(self, groups=tuple(groups), pinned=pinned)

    def with_signs(self) -> "Symmetry":
        """Lets units change their signs as they are permuted, where the function allows it.

        The units of a tanh do: `tanh(-x) = -tanh(x)`, so that a unit may be turned around if all
        that reads it is. `print` of the result shows which groups are signed.

        Returns:
            The symmetry whose groups are signed where `freedoms` says so, by the first of the
            scalings there. Those that rotate already have signs among their matrices. Equal to this
            one if no group may change signs.
        """
        signs_of = {freedom.group: freedom.signs for freedom in self.freedoms if freedom.signs}
        groups = []
        for group in self.groups:
            if group.name not in signs_of or group.orthogonal:
                groups.append(group)
                continue
            signs = signs_of[group.name][0]
            turned = {(leaf, axis) for leaf, axis, _ in signs.degrees}
            members = []
            for member in group.members:
                segment = member.leaf, member.axis, member.location.index.start
                odd = segment in signs.segments or (member.leaf, member.axis) in turned
                members.append(dataclasses.replace(member, odd=odd))
            groups.append(dataclasses.replace(group, members=tuple(members), signed=True))
        return dataclasses.replace(self, groups=tuple(groups))

    def with_scales(self) -> "Symmetry":
        """Lets the positive scales of units be balanced, where the function allows it.

        The units of a ReLU may be scaled by any positive number, if all that reads them is divided
        by it, and queries multiplied by any matrix, if the keys are by its inverse transpose.
        `canonicalize` chooses the scales by which a model has the smallest weights. `fuse` and
        `barycenter` do that by themselves; give `align` models that are canonical.

        Returns:
            The symmetry of parameters in that form. Equal to this one if no group may be scaled.
        """
        freedom_of = {freedom.group: freedom for freedom in self.freedoms if freedom.scales}
        groups = []
        for group in self.groups:
            freedom = freedom_of.get(group.name)
            # What rotates can be scaled by matrices alone.
            scaled = freedom is not None and (freedom.linear or not group.rotates)
            groups.append(dataclasses.replace(group, scaled=scaled))
        return dataclasses.replace(self, groups=tuple(groups))

    def as_free_as(self, other: "Symmetry") -> "Symmetry":
        """Lets units move in the ways in which those of another symmetry do.

        Args:
            other: The other symmetry.

        Returns:
            The symmetry with rotations, signs and scales, as far as the other one has them.
        """
        result = self
        if other.rotates:
            result = result.with_rotations()
        if any(group.signed for group in other.groups):
            result = result.with_signs()
        if any(group.scaled for group in other.groups):
            result = result.with_scales()
        return result

    def identity(self) -> Plans:
        """Returns the plans that move nothing, int32 `[*batch, n]` each."""
        orders = []
        for group in self.groups:
            shape = (*group.batch, group.size)
            orders.append(np.broadcast_to(np.arange(group.size, dtype=np.int32), shape))
        # For each shape `jnp.broadcast_to` and `jnp.asarray` would compile a program.
        plans = jax.device_put(orders)
        return {group.name: plan for group, plan in zip(self.groups, plans, strict=True)}

    def random(self, key: Array) -> Plans:
        """Draws a uniform permutation of every group, or a matrix of those that have one.

        Args:
            key: A single key of `jax.random`.

        Returns:
            The plans, int32 `[*batch, n]` each; of groups that rotate or are signed, orthogonal
            matrices, float32 `[*batch, n, n]`.

        Raises:
            TypeError: If a number is given in place of a key, or a batch of keys.
        """
        require_key(key)
        identity = self.identity()
        plans = {}
        for number, group in enumerate(self.groups):
            name = group.name
            # Groups of one size would be permuted alike by one key.
            group_key = jax.random.fold_in(key, number)
            if group.rotates:
                plans[name] = random_rotation(
                    group_key, group.size, group.batch, fixes_ones=group.fixes_ones
                )
                continue
            plan = jax.random.permutation(group_key, identity[name], axis=-1, independent=True)
            if group.signed:
                # By the key of the permutation the two would depend on each other.
                signs_key = jax.random.fold_in(group_key, 0)
                signs = jax.random.rademacher(signs_key, plan.shape, jnp.float32)
                plan = signed_matrix(plan, signs)
            plans[name] = plan
        return plans

    def validate(self, params: PyTree, name: str = "params", batch: tuple[int, ...] = ()) -> None:
        """Checks that a pytree is one that this symmetry was traced for.

        Values are looked at only where there are any: under `jax.jit` or `jax.vmap`, structure,
        shapes and dtypes are checked and finiteness is not.

        Args:
            params: The pytree.
            name: What to call the pytree in the message.
            batch: The leading axes that every leaf has in front, as in a stack of models.

        Raises:
            ValueError: If the tree, a shape, or a kind of dtype is another, or if values are not
                finite. Every offender is listed by its key path, with what is expected.
            TypeError: If `batch` is no tuple.
        """
        require_kind(batch, tuple, "batch", "the sizes of the leading axes as a tuple, as (3,)")
        require_fitting(self.leaves, self.treedef, params, name, batch)


@functools.partial(jax.jit, static_argnames=("count", "axis"))
def _split(leaf: Array, count: int, axis: int) -> list[Array]:
    return jnp.split(leaf, count, axis)


@functools.partial(jax.jit, static_argnames=("axis",))
def _concatenated(arrays: list[Array], axis: int) -> Array:
    return jnp.concatenate(arrays, axis)
