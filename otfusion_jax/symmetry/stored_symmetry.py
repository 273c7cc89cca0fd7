"""Whether a symmetry that was read from a file speaks of its own parameters, and of nothing else.

What `trace_symmetry` returns is consistent by how it is made. A file may say anything: units that
lie beyond their axis, groups in groups that are not there, shapes of which no memory could hold the
positions. Nothing is computed here that grows with the sizes that are said.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from otfusion_jax.symmetry.groups import (
    Fold,
    Freedom,
    Group,
    Leaf,
    LeafSplit,
    Member,
    Offset,
    Pin,
    Scaling,
)
from otfusion_jax.symmetry.location import StridedIndex
from otfusion_jax.symmetry.stretch import Stretch

# No array has more positions along an axis, and none has a rank beyond this.
_LONGEST_AXIS = 2**31 - 1
_MOST_AXES = 64
_MOST_PARTS = 2**20
_SIZE = f"a size up to {_LONGEST_AXIS}"


class _Entry(NamedTuple):
    """A place in the text, as `groups[3].members[0]`."""

    where: str

    def require(self, holds: bool, field: str, value: Any, expected: str) -> None:
        """Raises, with a field of this place, unless something holds."""
        if not holds:
            raise ValueError(f"{self.where}{field} is {value!r}, expected {expected}")

    def require_axis(self, axis: int, shape: tuple[int, ...], field: str = ".axis") -> None:
        """Refuses what is no axis of a shape."""
        is_axis = 0 <= axis < len(shape)
        self.require(is_axis, field, axis, f"an axis of shape {shape}")

    def require_sizes(self, field: str, *sizes: int) -> None:
        """Refuses what is no size of an axis."""
        for size in sizes:
            is_size = 0 <= size <= _LONGEST_AXIS
            self.require(is_size, field, size, _SIZE)

    def require_part(self, leaf: int, parts: Sequence[Leaf], field: str = ".leaf") -> None:
        """Refuses what is no position of a parameter."""
        is_part = 0 <= leaf < len(parts)
        self.require(is_part, field, leaf, f"less than {len(parts)}")

    def below(self, field: str, number: int) -> "_Entry":
        """Returns an entry of a list in this place."""
        return _Entry(f"{self.where}{field}[{number}]")


_TOP = _Entry("")


def require_consistent(
    tree: Any,
    *,
    groups: Sequence[Group],
    pinned: Sequence[Pin],
    leaves: Sequence[Leaf],
    leaf_splits: Sequence[LeafSplit],
    freedoms: Sequence[Freedom],
    treedef: Any,
) -> None:
    """Refuses the fields of a symmetry that do not go together.

    Args:
        tree: Containers of the structure of `treedef`, with anything for leaves.
        groups: The groups.
        pinned: The pins.
        leaves: The leaves.
        leaf_splits: The leaves that fall into parts.
        freedoms: What groups may do.
        treedef: The structure of the parameters.

    Raises:
        ValueError: At the first field that is out of range, saying where it is.
    """
    _require_leaves(tree, leaves, treedef)
    parts = _parts_of(leaves, leaf_splits)
    _require_groups(groups, parts)
    paths = {part.path for part in parts}
    for number, pin in enumerate(pinned):
        entry = _TOP.below("pinned", number)
        entry.require(pin.path in paths, ".path", pin.path, "the path of a parameter")
        entry.require(0 <= pin.axis < _MOST_AXES, ".axis", pin.axis, "an axis")
        entry.require_sizes(".size", pin.size)
    for number, freedom in enumerate(freedoms):
        entry = _TOP.below("freedoms", number)
        for position, fold in enumerate(freedom.folds):
            _require_fold(fold, parts, entry.below(".folds", position))
        for position, scaling in enumerate(freedom.scales):
            _require_scaling(scaling, parts, entry.below(".scales", position))
        for position, scaling in enumerate(freedom.signs):
            _require_scaling(scaling, parts, entry.below(".signs", position))
        for position, offset in enumerate(freedom.offsets):
            _require_offset(offset, parts, entry.below(".offsets", position))
        for leaf, axis in freedom.unread_means:
            entry.require_part(leaf, parts, ".unread_means")
            entry.require_axis(axis, parts[leaf].shape, ".unread_means")
        _require_stretch(freedom.stretch, entry)


# --- parameters


def _require_leaves(tree: Any, leaves: Sequence[Leaf], treedef: Any) -> None:
    """Refuses leaves that are not those of the tree, in its order."""
    count = treedef.num_leaves
    given = f"of {len(leaves)} entries"
    _TOP.require(len(leaves) == count, "leaves", given, f"{count} as in tree")
    paths_in_tree = jax.tree_util.tree_flatten_with_path(tree)[0]
    for number, (path, _) in enumerate(paths_in_tree):
        leaf = leaves[number]
        entry = _TOP.below("leaves", number)
        key_path = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        entry.require(leaf.path == key_path, ".path", leaf.path, repr(key_path))
        rank = len(leaf.shape)
        entry.require(rank <= _MOST_AXES, ".shape", leaf.shape, f"at most {_MOST_AXES} axes")
        entry.require_sizes(".shape", *leaf.shape)


def _parts_of(leaves: Sequence[Leaf], leaf_splits: Sequence[LeafSplit]) -> list[Leaf]:
    """Returns the parts of all leaves, as `Symmetry.parts` does, once the splits are checked."""
    split_of: dict[int, LeafSplit] = {}
    total = 0
    for number, leaf_split in enumerate(leaf_splits):
        entry = _TOP.below("leaf_splits", number)
        leaf = leaf_split.leaf
        entry.require_part(leaf, leaves)
        entry.require(leaf not in split_of, ".leaf", leaf, "each leaf once")
        shape = leaves[leaf].shape
        axis, count = leaf_split.axis, leaf_split.count
        entry.require_axis(axis, shape)
        divides = count >= 1 and shape[axis] % count == 0
        entry.require(divides, ".count", count, f"a divisor of {shape[axis]}")
        total += count
        entry.require(total <= _MOST_PARTS, ".count", count, f"{_MOST_PARTS} parts in all")
        split_of[leaf] = leaf_split
    parts: list[Leaf] = []
    for number, leaf in enumerate(leaves):
        if number in split_of:
            parts.extend(split_of[number].parts(leaf))
        else:
            parts.append(leaf)
    return parts


# --- groups


def _require_groups(groups: Sequence[Group], parts: Sequence[Leaf]) -> None:
    by_name: dict[str, Group] = {}
    for number, group in enumerate(groups):
        entry = _TOP.below("groups", number)
        entry.require(group.name not in by_name, ".name", group.name, "a name of its own")
        by_name[group.name] = group
    for number, group in enumerate(groups):
        entry = _TOP.below("groups", number)
        entry.require_sizes(".size", group.size)
        _require_stretch(group.stretch, entry)
        entry.require_sizes(".batch", *group.batch)
        if group.outer is not None:
            # That the batch is longer by one in each level keeps groups from going in circles.
            outer = by_name.get(group.outer)
            around = None if outer is None else (*outer.batch, outer.size)
            entry.require(outer is not None, ".outer", group.outer, "the name of a group")
            entry.require(group.batch == around, ".batch", group.batch, f"{around}, as around it")
        for position, member in enumerate(group.members):
            _require_member(member, group, parts, entry.below(".members", position))


def _require_member(member: Member, group: Group, parts: Sequence[Leaf], entry: _Entry) -> None:
    entry.require_part(member.leaf, parts)
    path = parts[member.leaf].path
    entry.require(member.path == path, ".path", member.path, repr(path))
    shape = parts[member.leaf].shape
    location = member.location
    place = _Entry(f"{entry.where}.location")
    _require_on_axis(location.axis, location.length, location.index, group.size, shape, place)
    levels, wanted = len(location.batch), len(group.batch)
    place.require(levels == wanted, ".batch", f"of {levels} entries", f"{wanted}, as in the group")
    for number, (axis, length, index) in enumerate(location.batch):
        level = place.below(".batch", number)
        _require_on_axis(axis, length, index, group.batch[number], shape, level)


def _require_on_axis(
    axis: int, length: int, index: StridedIndex, size: int, shape: tuple[int, ...], entry: _Entry
) -> None:
    """Refuses units that do not lie on an axis, each at positions of its own."""
    entry.require_axis(axis, shape)
    entry.require(length == shape[axis], ".length", length, f"{shape[axis]}, as in the leaf")
    entry.require(index.after >= 1, ".index.after", index.after, "1 or more")
    span = size * index.after
    for count, stride in reversed(index.outer):
        # What is inside must end before it begins anew.
        is_apart = stride >= span or (count == 1 and stride >= 0)
        wanted = f"a count, and a stride of at least {span}"
        entry.require(count >= 1 and is_apart, ".index.outer", (count, stride), wanted)
        span += (count - 1) * stride
    start = index.start
    is_inside = 0 <= start and start + span <= length
    entry.require(is_inside, ".index.start", start, f"{span} positions within {length}")


# --- freedoms


def _require_fold(fold: Fold, parts: Sequence[Leaf], entry: _Entry) -> None:
    entry.require_part(fold.leaf, parts)
    path = parts[fold.leaf].path
    entry.require(fold.path == path, ".path", fold.path, repr(path))
    for leaf, axis, power in fold.others:
        entry.require_part(leaf, parts, ".others")
        entry.require_axis(axis, parts[leaf].shape, ".others")
        entry.require(0 < abs(power) <= _MOST_AXES, ".others", power, "a power")
    entry.require(fold.shift in (0, 1), ".shift", fold.shift, "0 or 1")


def _require_offset(offset: Offset, parts: Sequence[Leaf], entry: _Entry) -> None:
    entry.require_part(offset.leaf, parts)
    shape = parts[offset.leaf].shape
    entry.require_axis(offset.axis, shape)
    for number, reader in enumerate(offset.readers):
        place = entry.below(".readers", number)
        place.require_part(reader.leaf, parts)
        place.require_part(reader.kernel, parts, ".kernel")
        of_bias, of_kernel = parts[reader.leaf].shape, parts[reader.kernel].shape
        place.require_axis(reader.axis, of_kernel)
        fits = shape[offset.axis] == of_kernel[reader.axis]
        place.require(fits, ".axis", reader.axis, "an axis of as many units as the bias has")
        for bias_axis, kernel_axis in reader.axes:
            place.require_axis(bias_axis, of_bias, ".axes")
            place.require_axis(kernel_axis, of_kernel, ".axes")
            fits = of_bias[bias_axis] == of_kernel[kernel_axis]
            place.require(fits, ".axes", (bias_axis, kernel_axis), "two axes of one size")


def _require_stretch(stretch: Stretch | None, entry: _Entry) -> None:
    if stretch is not None:
        for power in (stretch.produced, stretch.consumed):
            entry.require(abs(power) <= _MOST_AXES, ".stretch", power, "a power")


def _require_scaling(scaling: Scaling, parts: Sequence[Leaf], entry: _Entry) -> None:
    for leaf, axis, power in scaling.degrees:
        entry.require_part(leaf, parts, ".degrees")
        entry.require_axis(axis, parts[leaf].shape, ".degrees")
        entry.require(abs(power) <= _MOST_AXES, ".degrees", power, "a power")
    for leaf, axis, start in scaling.segments:
        entry.require_part(leaf, parts, ".segments")
        entry.require_axis(axis, parts[leaf].shape, ".segments")
        is_inside = 0 <= start < parts[leaf].shape[axis]
        entry.require(is_inside, ".segments", start, "a position along the axis")
