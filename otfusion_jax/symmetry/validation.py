"""Whether a pytree is one that a symmetry was traced for: its tree, shapes, dtypes and values."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.finiteness import not_finite_counts
from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.groups import Leaf, leaves_of


def require_fitting(
    leaves: Sequence[Leaf],
    treedef: Any,
    params: PyTree,
    name: str,
    batch: tuple[int, ...] = (),
    reference: str = "the model that was traced",
    *,
    looks_at_values: bool = True,
) -> None:
    """Refuses parameters that are not as others; see `Symmetry.validate`.

    Args:
        leaves: Path, shape and dtype of every parameter of the others.
        treedef: The structure of the others.
        params: The pytree to be checked.
        name: What to call the pytree in the message.
        batch: The leading axes that every leaf has in front.
        reference: What to call the others in the message.
        looks_at_values: Whether values that are not finite are refused.

    Raises:
        ValueError: If the tree, a shape, or a kind of dtype is another, or if values are not
            finite. Every offender is listed by its key path.
    """
    given_leaves = leaves_of(params, name)
    if jax.tree_util.tree_structure(params) != treedef:
        raise ValueError(
            f"{name} has another tree than {reference}; all models must be of one architecture "
            "and framework:\n"
            + "\n".join(_differences_of_trees(leaves, treedef, params, given_leaves))
        )
    problems: dict[int, str] = {}
    # The values that can be looked at: under `jax.jit` or `jax.vmap` there are none.
    known: dict[int, Any] = {}
    values = jax.tree_util.tree_leaves(params)
    for number, leaf in enumerate(leaves):
        given, value = given_leaves[number], values[number]
        shape = (*batch, *leaf.shape)
        if given.shape != shape:
            problems[number] = f"shape {given.shape}, expected {shape}"
        # Models of other precisions fit; integers in the place of weights do not.
        elif given.moves != leaf.moves:
            problems[number] = f"dtype {given.dtype}, expected {leaf.dtype}"
        elif not looks_at_values or not leaf.moves:
            continue
        elif not isinstance(value, Tracer | jax.ShapeDtypeStruct):
            if not isinstance(value, LazyArray) or not value.checked:
                known[number] = value
    counts = not_finite_counts(list(known.values()))
    for number, count in zip(known, counts, strict=True):
        if count:
            size = np.size(known[number])
            problems[number] = f"{count} of {size} values not finite, expected none"
    if problems:
        lines = []
        for number in sorted(problems):
            lines.append(f"  {leaves[number].path}: {problems[number]}")
        raise ValueError(
            f"{name} does not fit {reference} (was it made with the same sizes? did training "
            "diverge?):\n" + "\n".join(lines)
        )


def _differences_of_trees(
    leaves: Sequence[Leaf], treedef: Any, params: PyTree, given_leaves: Sequence[Leaf]
) -> list[str]:
    """Returns a line for each leaf that only one of two trees has, or else for what is empty."""
    expected_paths = {leaf.path for leaf in leaves}
    given_paths = {leaf.path for leaf in given_leaves}
    lines = []
    for leaf in leaves:
        if leaf.path not in given_paths:
            lines.append(f"  {leaf.path}: missing")
    for path in sorted(given_paths - expected_paths):
        lines.append(f"  {path}: not expected")
    if not lines:
        lines = _differences_of_empty_containers(treedef, params)
    if not lines:
        difference = _first_other_container(params, treedef)
        lines.append(f"  the same leaves in containers of other types: {difference}")
    return lines


def _differences_of_empty_containers(treedef: Any, params: PyTree) -> list[str]:
    """Returns a line for each None or empty container that only one of two trees has."""
    try:
        # Of the one there is the structure alone. Any leaves will do, unless a container of a
        # user's own looks at them.
        expected_tree = jax.tree_util.tree_unflatten(treedef, range(treedef.num_leaves))
    except Exception:
        return []
    expected, given = _empty_containers(expected_tree), _empty_containers(params)
    lines = []
    for path in sorted(expected.keys() | given.keys()):
        if path not in given:
            lines.append(f"  {path}: missing, expected {expected[path]}")
        elif path not in expected:
            lines.append(f"  {path}: {given[path]}, not expected")
        elif given[path] != expected[path]:
            lines.append(f"  {path}: {given[path]}, expected {expected[path]}")
    return lines


def _empty_containers(tree: PyTree) -> dict[str, str]:
    """Names each None or empty container of a tree by its key path, and says what it is."""
    found = {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
    for path, node in nodes:
        if _is_empty(node):
            key_path = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
            found[key_path] = kind_of(node)
    return found


def _is_empty(tree: PyTree) -> bool:
    """Whether a tree is None or a container with nothing in it, to JAX a node without leaves."""
    structure = jax.tree_util.tree_structure(tree)
    return structure.num_nodes == 1 and structure.num_leaves == 0


def _first_other_container(params: PyTree, treedef: Any) -> str:
    """Says where two trees with leaves of the same key paths have containers of other types."""
    given, expected = jax.tree_util.tree_structure(params), treedef
    # The way down leads to the first children that differ. It is told by the key path of the first
    # leaf in them, cut off at their depth.
    leaf_number = depth = 0
    differ = True
    while differ and _container(given) == _container(expected):
        differ = False
        for child, expected_child in zip(given.children(), expected.children(), strict=False):
            if child != expected_child:
                given, expected = child, expected_child
                depth += 1
                differ = True
                break
            leaf_number += child.num_leaves
    key_paths = jax.tree_util.tree_flatten_with_path(params)[0]
    if depth == 0 or leaf_number >= len(key_paths):
        position = "the tree"
    else:
        key_path, _ = key_paths[leaf_number]
        position = jax.tree_util.keystr(key_path[:depth], simple=True, separator="/")
    if not differ:
        return f"{position} is a {_container(given)} with other static fields than expected"
    return f"{position} is a {_container(given)}, expected a {_container(expected)}"


def _container(treedef: Any) -> str:
    """Names the type of the outermost container of a tree."""
    node = treedef.node_data()
    return "leaf" if node is None else node[0].__name__
