"""What belongs to parameters moves like them: optimizer states, moving averages, train states."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from otfusion_jax.symmetry import Plans, Symmetry
from otfusion_jax.transport import HasPlans, transport


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
        ValueError: if no part has the structure of the parameters; if one has their structure and
            other shapes, such as factored moments, listing every such leaf by key path; and as
            `transport` raises it.

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
    found = []
    wrong: list[str] = []

    def is_alike(node: Any) -> bool:
        return _structure(node) == symmetry.treedef

    def moved(path: Any, node: Any) -> Any:
        if not is_alike(node):
            return node
        at = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = jax.tree_util.tree_leaves(node, is_leaf=_is_masked)
        unlike = list(_unlike(symmetry, parts, at))
        if not unlike:
            found.append(at)
            return _moved(symmetry, plans, parts, onto)
        if any(not _is_masked(x) and jnp.size(x) > 1 for x in parts):
            wrong.extend(unlike)
        return node  # as it is: a number for each parameter

    result = jax.tree_util.tree_map_with_path(moved, state, is_leaf=is_alike)
    if wrong:
        raise ValueError(
            "these parts of the state have the structure of the parameters, but other shapes; what "
            "a factored or compressed moment would be after a move is not known. Start this state "
            "anew from the moved parameters (`optimizer.init`):\n" + "\n".join(wrong)
        )
    if not found:
        raise ValueError(
            "no part of this state has the structure of the parameters that were traced; pass the "
            "state that belongs to them, such as `optimizer.init(params)`"
        )
    return result


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


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
