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
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from otfusion_jax.symmetry.partition import UnitLocation

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
    location: UnitLocation
    role: Role

    @property
    def axis(self) -> int:
        """The axis of the parameter."""
        return self.location.axis

    @property
    def before(self) -> int:
        """Product of the factors of the axis that are outside the units."""
        return self.location.index.before

    @property
    def after(self) -> int:
        """Product of the factors of the axis that are inside the units."""
        return self.location.index.after


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
class LeafSplit:
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
