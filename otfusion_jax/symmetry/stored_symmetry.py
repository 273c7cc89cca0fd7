"""Whether a symmetry that was read from a file speaks of its own parameters, and of nothing else.

What `trace_symmetry` returns is consistent by how it is made. A file may say anything: units that
lie beyond their axis, groups in groups that are not there, shapes of which no memory could hold the
positions. Nothing is computed here that grows with the sizes that are said.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from otfusion_jax.symmetry.groups import Fold, Freedom, Group, Leaf, LeafSplit, Member, Pin, Scaling
from otfusion_jax.symmetry.location import StridedIndex

# No array has more positions along an axis, and none has a rank beyond this.
_LONGEST_AXIS = 2**31 - 1
_MOST_AXES = 64
_MOST_PARTS = 2**20


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
        where = f"pinned[{number}]"
        _require(pin.path in paths, f"{where}.path", pin.path, "the path of a parameter")
        _require(0 <= pin.axis < _MOST_AXES, f"{where}.axis", pin.axis, "an axis")
        _require_size(pin.size, f"{where}.size")
    for number, freedom in enumerate(freedoms):
        where = f"freedoms[{number}]"
        for position, fold in enumerate(freedom.folds):
            _require_fold(fold, parts, f"{where}.folds[{position}]")
        for name in ("scales", "signs"):
            for position, scaling in enumerate(getattr(freedom, name)):
                _require_scaling(scaling, parts, f"{where}.{name}[{position}]")


def _require(holds: bool, where: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{where} is {value!r}, expected {expected}")


def _require_size(size: int, where: str) -> None:
    _require(0 <= size <= _LONGEST_AXIS, where, size, f"a size up to {_LONGEST_AXIS}")


# --- parameters


def _require_leaves(tree: Any, leaves: Sequence[Leaf], treedef: Any) -> None:
    """Refuses leaves that are not those of the tree, in its order."""
    count = treedef.num_leaves
    _require(len(leaves) == count, "leaves", f"of {len(leaves)} entries", f"{count} as in tree")
    for number, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        leaf = leaves[number]
        key_path = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
        _require(leaf.path == key_path, f"leaves[{number}].path", leaf.path, repr(key_path))
        where = f"leaves[{number}].shape"
        _require(len(leaf.shape) <= _MOST_AXES, where, leaf.shape, f"at most {_MOST_AXES} axes")
        for size in leaf.shape:
            _require_size(size, where)


def _parts_of(leaves: Sequence[Leaf], leaf_splits: Sequence[LeafSplit]) -> list[Leaf]:
    """Returns the parts of all leaves, as `Symmetry.parts` does, once the splits are checked."""
    split_of: dict[int, LeafSplit] = {}
    total = 0
    for number, leaf_split in enumerate(leaf_splits):
        where = f"leaf_splits[{number}]"
        leaf = leaf_split.leaf
        is_new = 0 <= leaf < len(leaves) and leaf not in split_of
        _require(is_new, f"{where}.leaf", leaf, "a leaf, and each once")
        shape = leaves[leaf].shape
        axis, count = leaf_split.axis, leaf_split.count
        _require(0 <= axis < len(shape), f"{where}.axis", axis, f"an axis of shape {shape}")
        total += count
        is_whole = count >= 1 and total <= _MOST_PARTS and shape[axis] % count == 0
        _require(is_whole, f"{where}.count", count, f"a divisor of {shape[axis]}")
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
        where = f"groups[{number}].name"
        _require(group.name not in by_name, where, group.name, "a name of its own")
        by_name[group.name] = group
    for number, group in enumerate(groups):
        where = f"groups[{number}]"
        _require_size(group.size, f"{where}.size")
        for size in group.batch:
            _require_size(size, f"{where}.batch")
        if group.outer is not None:
            outer = by_name.get(group.outer)
            is_around = outer is not None and outer is not group
            _require(is_around, f"{where}.outer", group.outer, "the name of another group")
            fits = outer is not None and group.batch == (*outer.batch, outer.size)
            _require(fits, f"{where}.batch", group.batch, f"the units of {group.outer!r}")
        for position, member in enumerate(group.members):
            _require_member(member, group, parts, f"{where}.members[{position}]")


def _require_member(member: Member, group: Group, parts: Sequence[Leaf], where: str) -> None:
    _require_part(member.leaf, member.path, parts, where)
    shape = parts[member.leaf].shape
    location = member.location
    where = f"{where}.location"
    _require_on_axis(location.axis, location.length, location.index, group.size, shape, where)
    levels = len(location.batch)
    wanted = f"{len(group.batch)} entries, as the batch of its group"
    _require(levels == len(group.batch), f"{where}.batch", f"of {levels} entries", wanted)
    for number, (axis, length, index) in enumerate(location.batch):
        size = group.batch[number]
        _require_on_axis(axis, length, index, size, shape, f"{where}.batch[{number}]")


def _require_on_axis(
    axis: int, length: int, index: StridedIndex, size: int, shape: tuple[int, ...], where: str
) -> None:
    """Refuses units that do not lie on an axis, each at positions of its own."""
    _require(0 <= axis < len(shape), f"{where}.axis", axis, f"an axis of shape {shape}")
    _require(length == shape[axis], f"{where}.length", length, f"{shape[axis]}, as in the leaf")
    where = f"{where}.index"
    _require(index.after >= 1, f"{where}.after", index.after, "1 or more")
    span = size * index.after
    for count, stride in reversed(index.outer):
        # What is inside must end before it begins anew.
        is_outside = count >= 1 and (stride >= span or count == 1) and stride >= 0
        wanted = f"a count, and a stride of at least {span}"
        _require(is_outside, f"{where}.outer", (count, stride), wanted)
        span += (count - 1) * stride
    is_inside = 0 <= index.start and index.start + span <= length
    _require(is_inside, f"{where}.start", index.start, f"{span} positions within {length}")


# --- freedoms


def _require_part(leaf: int, path: str, parts: Sequence[Leaf], where: str) -> None:
    """Refuses a position that is none of a parameter, or that of another one."""
    _require(0 <= leaf < len(parts), f"{where}.leaf", leaf, f"less than {len(parts)}")
    _require(path == parts[leaf].path, f"{where}.path", path, repr(parts[leaf].path))


def _require_fold(fold: Fold, parts: Sequence[Leaf], where: str) -> None:
    _require_part(fold.leaf, fold.path, parts, where)
    for leaf, power in fold.others:
        _require(0 <= leaf < len(parts), f"{where}.others", leaf, f"less than {len(parts)}")
        _require(power in (-1, 1), f"{where}.others", power, "-1 or 1")
    _require(fold.shift in (0, 1), f"{where}.shift", fold.shift, "0 or 1")


def _require_scaling(scaling: Scaling, parts: Sequence[Leaf], where: str) -> None:
    where = f"{where}.degrees"
    for leaf, axis, power in scaling.degrees:
        _require(0 <= leaf < len(parts), where, leaf, f"less than {len(parts)}")
        shape = parts[leaf].shape
        _require(0 <= axis < len(shape), where, axis, f"an axis of shape {shape}")
        _require(math.fabs(power) <= _MOST_AXES, where, power, "a power")
