"""What a symmetry is made of: groups with their members, pins, and the leaves of the parameters.

A `Group` is a set of interchangeable hidden units, a `Member` one parameter axis that they index,
a `Pin` an axis that has to stay as it is. Trained parameters fall into leaves, and a leaf that the
function picks apart by index (`qkv[0]`) falls into parts, by a `LeafSplit`. All of these are
static: frozen, hashable, and without arrays.
"""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.host import Array
from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.location import UnitLocation
from otfusion_jax.symmetry.stretch import Stretch

Role = Literal["produces", "consumes", "both"]
Plans = dict[str, Array]
"""Group name to plan: an integer `[n]` permutation or a float `[n, m]` transport plan, preceded by
the group's batch. Of a group that rotates or is signed, a float `[n, n]` is orthogonal, and of one
that rotates a float `[n, m]` has orthonormal rows or columns, whichever are fewer."""

NOT_USED = "not used by the function"
"""Why a parameter is pinned that nothing reads."""
UNREAD = "not read on these inputs"
"""Why an axis is pinned of which, on these inputs, the function reads only a part, or only sums."""
LEFT_OUT = "left out by a slice on these inputs"
"""Why an axis is pinned that features vary along, of which the function goes on with a part alone,
as with the outputs of attention where it does not want those of learned tokens."""
FOLDED = "constant in canonical form"
"""Why an axis stays of a parameter that `canonicalize` makes 1, or 0 where 1 is added to it."""
UNMET = "meets nothing but constants on these inputs"
"""Why every axis of a leaf is pinned: on these inputs it met only constants, as recurrent weights
that a first step multiplies with zeros. On other inputs it may meet any units."""
SUMMED = "summed over with equal weights, and met by no features"
"""Why an axis stays along which a leaf is multiplied with a constant alone that is nowhere 0, as
the last weights of a network are in the gradient of a sum over its outputs."""


class Motion(enum.Enum):
    """By which matrices the units of a group are multiplied."""

    PERMUTED = "permuted"
    SIGNED = "permuted, with signs"
    ROTATED = "rotated"
    ROTATED_ABOUT_ONES = "rotated about the ones"


@dataclasses.dataclass(frozen=True)
class Member:
    """One parameter axis, or one part of it, that a group's units index.

    Attributes:
        leaf: The position of the parameter among the parts of the symmetry. These are the leaves
            of the pytree, unless some leaves are split.
        path: The key path of the parameter, as in `"params/Dense_0/kernel"`, or of a part of it.
        location: The positions of the parameter at which the units lie.
        role: `"produces"`, `"consumes"`, or `"both"` (a tied embedding).
        odd: Whether its numbers change their signs where the units do, in a group that is signed.
            The gates of an LSTM do not, though its cells do.
    """

    leaf: int
    path: str
    location: UnitLocation
    role: Role
    odd: bool = False

    @property
    def axis(self) -> int:
        """The axis of the parameter that the units lie along."""
        return self.location.axis

    @property
    def before(self) -> int:
        """The product of the factors of the axis that are outside the units."""
        return self.location.index.before

    @property
    def after(self) -> int:
        """The product of the factors of the axis that are inside the units."""
        return self.location.index.after


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that may be permuted at will, if all members are permuted together.

    Attributes:
        name: The key path of the parameter that first produces the units, with a number behind it
            (`#2`) where other groups are called so already.
        size: The number of units.
        members: Every parameter axis that the units index.
        batch: The sizes of the axes around the units, for each index of which there is another
            permutation. A plan has shape `[*batch, size]`.
        outer: The name of the group whose units the last axis of the batch is. None if there is no
            batch, or if its last axis cannot be permuted.
        rotates: Whether the units are multiplied by orthogonal matrices, and not permuted alone:
            only in what `Symmetry.with_rotations` returns.
        fixes_ones: Whether these matrices leave the vector of ones as it is.
        signed: Whether units may change their signs as they are permuted: only in what
            `Symmetry.with_signs` returns.
        scaled: Whether the positive scales of units are balanced before they are compared: only in
            what `Symmetry.with_scales` returns.
        stretch: Of a group that rotates, by what units are multiplied where they become another
            number of units; None if it is not known.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    batch: tuple[int, ...] = ()
    outer: str | None = None
    rotates: bool = False
    fixes_ones: bool = False
    signed: bool = False
    scaled: bool = False
    stretch: Stretch | None = None

    @property
    def motion(self) -> Motion:
        """By which matrices the units are multiplied."""
        if self.rotates:
            return Motion.ROTATED_ABOUT_ONES if self.fixes_ones else Motion.ROTATED
        return Motion.SIGNED if self.signed else Motion.PERMUTED

    @property
    def orthogonal(self) -> bool:
        """Whether a plan may be an orthogonal matrix: of a group that rotates or is signed."""
        return self.rotates or self.signed

    def having(self, role: Role) -> tuple[Member, ...]:
        """Returns the members of one role.

        Args:
            role: `"produces"` or `"consumes"`.

        Returns:
            The members with this role, and those with both.
        """
        roles = (role, "both")
        return tuple([member for member in self.members if member.role in roles])


@dataclasses.dataclass(frozen=True)
class Pin:
    """A parameter axis that has to stay as it is, and why.

    Attributes:
        path: The key path of the parameter.
        axis: The axis that stays.
        size: The size of the axis, or of the factor of it that stays.
        reason: What holds the axis, in words.
        source: The source line where the axis met what holds it, if that is not in the reason. Two
            pins that differ in this alone are equal.
    """

    path: str
    axis: int
    size: int
    reason: str
    source: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Fold:
    """How a scale that multiplies units one by one is made 1, and the function kept.

    Attributes:
        leaf: The position of the parameter in `Symmetry.parts`. It has one number for each unit, or
            one for each unit of each layer or batch. The scale is this parameter plus `shift`.
        path: The key path of the parameter.
        others: The positions of the other parameters that change, each with an axis that the units
            lie along, and the power of the scale by which these are divided: -1 for weights that
            read the units, which are then multiplied by the scale, and 1 for what is added to them.
        layered: Whether the first axis of all of these are the layers that a `scan` goes over, or
            the batch of the group, and there is another scale at each index of it.
        shift: 1 where the function adds 1 to the parameter before it multiplies, otherwise 0.
    """

    leaf: int
    path: str
    others: tuple[tuple[int, int, int], ...]
    layered: bool = False
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class OffsetReader:
    """What takes up a bias that weights have read.

    Attributes:
        leaf: The position in `Symmetry.parts` of the bias that is added to what they have read.
        kernel: The position of the weights.
        axis: The axis of the weights that the units lie along.
        axes: Axes of the bias, each with the axis of the weights that it is. Axes of size 1 are
            left out.
    """

    leaf: int
    kernel: int
    axis: int
    axes: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Offset:
    """How a bias that weights alone read is made 0, and the function kept.

    Attributes:
        leaf: The position of the bias in `Symmetry.parts`. It has one number for each unit, or one
            for each unit of each layer.
        axis: The axis of it that the units lie along.
        readers: The weights that read it, with the biases that take up what they read.
        layered: Whether the first axis of all of these are the layers that a `scan` goes over.
    """

    leaf: int
    axis: int
    readers: tuple[OffsetReader, ...]
    layered: bool = False


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How parameters may be multiplied unit by unit, and the function kept.

    Attributes:
        degrees: The position of each parameter in `Symmetry.parts`, its axis, and the power of the
            scale by which its units are multiplied: 1 for weights that produce the units of a
            ReLU, -1 for those that consume them. Of signs the powers are all 1.
        segments: Of signs alone, where the units lie several times along an axis, as gates side by
            side do, those of the times that change: the position of the parameter, its axis, and
            the first position along it.
    """

    degrees: tuple[tuple[int, int, int], ...]
    segments: tuple[tuple[int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Freedom:
    """What the units of a group may do.

    Attributes:
        group: The name of the group.
        rotates: Whether they may be multiplied by any orthogonal matrix. If not, by permutations
            alone.
        fixes_ones: Whether the matrix must leave the vector of ones as it is, as where a mean over
            the units is subtracted.
        folds: The parameters that have to be 1 before.
        scales: By which powers of a positive scale parameters may be multiplied unit by unit.
            There may be several such scalings, each with scales of its own.
        signs: Which parameters may be multiplied by -1 unit by unit, likewise.
        linear: Whether units may be multiplied by any invertible matrix, as those of queries may if
            the keys are multiplied by its inverse transpose: they rotate, and may all be scaled.
        stretch: Of units that rotate, by what they are multiplied where they become another number
            of units; None of others.
        offsets: The biases that are taken up by others, behind the weights that read them.
        unread_means: The positions of the parameters in `Symmetry.parts` whose mean over the units
            nothing reads once scales are 1 and these biases 0, as a mean over units is subtracted
            from what they produce, or from what they consume. Each with the axis of the units.
        reason: The primitive and the source line that stand in the way of rotations, or of those
            that do not fix the ones; None if nothing does. Two freedoms that differ in this alone
            are equal.
    """

    group: str
    rotates: bool
    fixes_ones: bool = False
    folds: tuple[Fold, ...] = ()
    scales: tuple[Scaling, ...] = ()
    signs: tuple[Scaling, ...] = ()
    linear: bool = False
    stretch: Stretch | None = None
    offsets: tuple[Offset, ...] = ()
    unread_means: tuple[tuple[int, int], ...] = ()
    reason: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of one parameter without its values.

    Attributes:
        path: The key path of the parameter; `"params"` where all parameters are one array, and no
            tree.
        shape: The shape of the parameter.
        dtype: The dtype that JAX gives it, which may be an extended one (a random key).
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
        leaf: The position of the parameter among the leaves of the pytree.
        axis: The axis along which the parts lie one after the other.
        count: The number of parts.
    """

    leaf: int
    axis: int
    count: int

    def parts(self, leaf: Leaf) -> Iterator[Leaf]:
        """Yields path, shape and dtype of every part.

        Args:
            leaf: The leaf that is split.

        Yields:
            A part, with its index behind the leaf's path, as in `qkv[0]` or `kernel[:, 1]`.
        """
        shape = list(leaf.shape)
        shape[self.axis] //= self.count
        one_position_wide = shape[self.axis] == 1
        earlier_axes = ":, " * self.axis
        for number in range(self.count):
            index = str(number)
            if not one_position_wide:
                # This does not depend on the width, so that networks of other widths have parts of
                # the same names.
                index = f"{number} of {self.count}"
            path = f"{leaf.path}[{earlier_axes}{index}]"
            yield Leaf(path, tuple(shape), leaf.dtype)


def leaves_of(params: PyTree, name: str = "the parameters") -> tuple[Leaf, ...]:
    """Reads path, shape and dtype of every leaf.

    Args:
        params: A pytree of arrays, `jax.ShapeDtypeStruct`s or Python numbers.
        name: What to call the pytree in the message.

    Returns:
        One `Leaf` per leaf, in the pytree's order.

    Raises:
        ValueError: If some leaves are not arrays. All of them are listed by key path.
    """
    leaves = []
    wrong = []
    for path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        key_path = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        # `jax.typeof` takes arrays and numbers alone. To trace, shapes will do.
        if isinstance(value, jax.ShapeDtypeStruct | LazyArray):
            leaves.append(Leaf(key_path, tuple(value.shape), value.dtype))
            continue
        try:
            aval = jax.typeof(value)
        except TypeError:
            kind = type(value).__name__
            wrong.append(f"  {key_path}: {kind}{_foreign_dtype(value)}")
        else:
            leaves.append(Leaf(key_path, tuple(aval.shape), aval.dtype))
    if wrong:
        raise ValueError(
            f"these leaves of {name} are not arrays; pass a pytree of arrays alone and close over "
            "the rest (equinox.partition, nnx.split):\n" + "\n".join(wrong)
        )
    return tuple(leaves)


def _foreign_dtype(value: Any) -> str:
    """Says which dtype of a NumPy array it is that JAX does not take; nothing of other values."""
    dtype = getattr(value, "dtype", None)
    if not isinstance(dtype, np.dtype):
        return ""
    if dtype.isnative:
        return f" of dtype {dtype}"
    return f" of the other byte order, {dtype.str}; convert it, x.astype(x.dtype.newbyteorder())"
