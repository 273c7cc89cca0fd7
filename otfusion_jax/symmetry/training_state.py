"""What belongs to parameters moves like them: optimizer states, moving averages, train states."""

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from otfusion_jax.symmetry.checks import SymmetryWarning
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import HasPlans
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport


def transport_state(
    symmetry: Symmetry,
    plans: Plans | HasPlans,
    state: PyTree,
    *,
    onto: Symmetry | None = None,
) -> PyTree:
    """Moves every part of a tree that is like the parameters along plans.

    Of Adam's state these are both moments, of a Flax `TrainState` the parameters too. Along
    permutations training goes on as it would have: the next step of the moved state is the next
    step, moved. Along soft plans second moments are averaged like weights, which is a guess.

    Args:
        symmetry: of the network.
        plans: as for `transport`.
        state: any pytree. The parts of it that have the structure and the shapes of the parameters
            are moved, all else is passed on: counts, keys, schedules. Parameters that
            `optax.masked` leaves out of a state may be missing.
        onto: as for `transport`.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: if there are moments, and no part has the structure of the parameters; if one
            has their structure and other shapes, such as factored moments, listing every such leaf
            by key path; and as `transport` raises it.

    Warns:
        SymmetryWarning: of arrays that are passed on though they have sizes of groups, such as the
            row and column accumulators of `optax.sm3`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import otfusion_jax as otf
        >>> params = {"in": jnp.ones((8, 4)), "out": jnp.ones((4, 2))}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
        >>> symmetry = otf.trace_symmetry(fn, params, jnp.ones((1, 8)))
        >>> plans = symmetry.random(jax.random.key(0))
        >>> state = optax.adam(1e-3).init(params)
        >>> moved = otf.transport_state(symmetry, plans, state)
    """
    found, left = [], []
    wrong: list[str] = []
    sizes = {group.size for group in symmetry.groups if group.size > 1}

    def is_alike(node: Any) -> bool:
        return _structure(node) == symmetry.treedef

    def moved(path: Any, node: Any) -> Any:
        at = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = jax.tree_util.tree_leaves(node, is_leaf=_is_masked)
        if is_alike(node):
            unlike = list(_unlike(symmetry, parts, at))
            if not unlike:
                found.append(at)
                return _moved(symmetry, plans, parts, onto)
            if len(parts) > 1 and any(map(_is_of_floats, parts)):
                wrong.extend(unlike)
        # Passed on: a number for each parameter, or what is no part of the state's moments.
        left.extend(
            f"  {at}: shape {jnp.shape(part)}"
            for part in parts
            if _is_of_floats(part) and any(n % size == 0 for n in part.shape for size in sizes)
        )
        return node

    result = jax.tree_util.tree_map_with_path(moved, state, is_leaf=is_alike)
    if wrong:
        raise ValueError(
            "these parts of the state have the structure of the parameters, but other shapes; what "
            "a factored or compressed moment would be after a move is not known. Start this state "
            "anew from the moved parameters (`optimizer.init`):\n" + "\n".join(wrong)
        )
    if not found and any(map(_is_of_floats, jax.tree_util.tree_leaves(state))):
        raise ValueError(
            "no part of this state has the structure of the parameters that were traced; pass the "
            "state that belongs to them, such as `optimizer.init(params)`"
        )
    if left:
        warnings.warn(
            "these arrays of the state stay as they are, and have sizes of groups; if they belong "
            "to units, start this state anew from the moved parameters (`optimizer.init`):\n"
            + "\n".join(left),
            SymmetryWarning,
            stacklevel=2,
        )
    return result


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_of_floats(part: Any) -> bool:
    """Whether something is an array of several numbers that are no integers."""
    is_array = hasattr(part, "dtype") and jnp.size(part) > 1
    return is_array and jnp.issubdtype(part.dtype, jnp.inexact)


def _structure(node: Any) -> Any:
    return jax.tree_util.tree_structure(node, is_leaf=_is_masked)


def _unlike(symmetry: Symmetry, parts: list[Any], at: str) -> Iterator[str]:
    """Yields a line for each part that has another shape than its parameter."""
    for leaf, part in zip(symmetry.leaves, parts, strict=True):
        if not _is_masked(part) and jnp.shape(part) != leaf.shape:
            path = "/".join(name for name in (at, leaf.path) if name)
            yield f"  {path}: shape {jnp.shape(part)}, of a parameter of shape {leaf.shape}"


def _moved(
    symmetry: Symmetry, plans: Plans | HasPlans, parts: list[Any], onto: Symmetry | None
) -> PyTree:
    """Moves what is there; where a parameter is left out, zeros stand for it on the way."""
    whole = [
        jnp.zeros(leaf.shape, leaf.dtype) if _is_masked(part) else part
        for leaf, part in zip(symmetry.leaves, parts, strict=True)
    ]
    moved = transport(symmetry, plans, symmetry.treedef.unflatten(whole), onto=onto)
    found = [
        part if _is_masked(part) else new
        for part, new in zip(parts, jax.tree_util.tree_leaves(moved), strict=True)
    ]
    return symmetry.treedef.unflatten(found)
