"""What belongs to parameters moves like them: optimizer states, moving averages, train states.

A state is a tree in which there are trees like that of the parameters, such as Adam's two moments.
Each of these is moved by `transport`, and all else is passed on.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from otfusion_jax.common.typing import PyTree
from otfusion_jax.common.warning import warn_user
from otfusion_jax.symmetry.checks import SymmetryWarning, may_have_units, require_symmetry
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import HasPlans, plans_of
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
        symmetry: The symmetry of the network.
        plans: The plans, as for `transport`.
        state: Any pytree. The parts of it that have the structure and the shapes of the parameters
            are moved, all else is passed on: counts, keys, schedules. Parameters that
            `optax.masked` leaves out of a state may be missing.
        onto: The symmetry of the network that the plans lead to, as for `transport`.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: If there are moments, and no part has the structure of the parameters; if one
            has their structure and other shapes, such as factored moments, listing every such leaf
            by key path; and as `transport` raises it.
        TypeError: If the arguments are in another order, or plans are no dict of arrays.

    Warns:
        SymmetryWarning: If arrays are passed on though they have sizes of groups, such as the row
            and column accumulators of `optax.sm3`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> import otfusion_jax as otf
        >>> params = {"in": jnp.ones((8, 4)), "out": jnp.ones((4, 2))}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
        >>> symmetry = otf.trace_symmetry(fn, params, jnp.ones((1, 8)))
        >>> plans = symmetry.random(jax.random.key(0))
        >>> state = optax.adam(1e-3).init(params)
        >>> moved = otf.transport_state(symmetry, plans, state)
    """
    call = "transport_state(symmetry, plans, state, onto=symmetry_of_the_target)"
    require_symmetry(symmetry, call)
    plans = plans_of(plans)
    if symmetry.orthogonal:
        raise ValueError(
            "the state of an optimizer can't be rotated or change signs: it has a moment for each "
            "number. Start it anew from the moved parameters (`optimizer.init`), or move along "
            "permutations, by a symmetry without with_rotations() and with_signs()"
        )
    if onto is not None:
        require_symmetry(onto, call)
    # A node is the largest part of the state that has the structure of the parameters, or a leaf.
    nodes, treedef = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda node: _structure_of(node) == symmetry.treedef
    )
    moved = []
    of_other_shapes: list[str] = []
    passed_on: list[tuple[str, Any]] = []
    any_like_parameters = False
    for path, node in nodes:
        key_path = jax.tree_util.keystr(path, simple=True, separator="/")
        leaves = jax.tree_util.tree_leaves(node, is_leaf=_is_masked)
        if _structure_of(node) == symmetry.treedef:
            differences = _differences_of_shapes(symmetry, leaves, key_path)
            if not differences:
                any_like_parameters = True
                moved.append(_moved_like_parameters(symmetry, plans, leaves, onto))
                continue
            # Where the parameters are one array, any array has their structure.
            if len(leaves) > 1 and _has_moments(leaves):
                of_other_shapes.extend(differences)
        moved.append(node)
        passed_on.extend((key_path, leaf) for leaf in leaves)
    if of_other_shapes:
        raise ValueError(
            "these parts of the state have the structure of the parameters, but other shapes; what "
            "a factored or compressed moment would be after a move is not known. Start this state "
            "anew from the moved parameters (`optimizer.init`):\n" + "\n".join(of_other_shapes)
        )
    if not any_like_parameters and _has_moments(jax.tree_util.tree_leaves(state)):
        raise ValueError(
            "no part of this state has the structure of the parameters that were traced; pass the "
            "state that belongs to them, such as `optimizer.init(params)`"
        )
    _warn_of_arrays_with_units(symmetry, passed_on)
    return treedef.unflatten(moved)


# --- the parts of a state


def _structure_of(node: Any) -> Any:
    """Returns the structure of a part of a state, in which a masked parameter is a leaf."""
    return jax.tree_util.tree_structure(node, is_leaf=_is_masked)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_moment(leaf: Any) -> bool:
    """Whether a leaf is an array of several numbers that are no integers."""
    # A single number is a count, a learning rate, or what optax puts in the place of a moment.
    if not hasattr(leaf, "dtype") or jnp.size(leaf) <= 1:
        return False
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _has_moments(leaves: Sequence[Any]) -> bool:
    return any(_is_moment(leaf) for leaf in leaves)


def _differences_of_shapes(symmetry: Symmetry, leaves: Sequence[Any], key_path: str) -> list[str]:
    """Returns a line for each leaf that has another shape than its parameter.

    Args:
        symmetry: The symmetry of the network.
        leaves: The leaves of a part of the state that has the structure of the parameters.
        key_path: The key path of that part.

    Returns:
        The lines.
    """
    lines = []
    for parameter, leaf in zip(symmetry.leaves, leaves, strict=True):
        if _is_masked(leaf) or jnp.shape(leaf) == parameter.shape:
            continue
        path = f"{key_path}/{parameter.path}" if key_path else parameter.path
        lines.append(
            f"  {path}: shape {jnp.shape(leaf)}, of a parameter of shape {parameter.shape}"
        )
    return lines


def _moved_like_parameters(
    symmetry: Symmetry, plans: Plans, leaves: Sequence[Any], onto: Symmetry | None
) -> PyTree:
    """Moves a part of a state whose leaves have the shapes of the parameters, or are masked."""
    filled = []
    for parameter, leaf in zip(symmetry.leaves, leaves, strict=True):
        # `transport` takes whole trees. What moves in the place of a masked parameter is dropped.
        if _is_masked(leaf):
            leaf = jnp.zeros(parameter.shape, parameter.dtype)
        filled.append(leaf)
    moved = transport(symmetry, plans, symmetry.treedef.unflatten(filled), onto=onto)
    moved_leaves = jax.tree_util.tree_leaves(moved)
    for number, leaf in enumerate(leaves):
        if _is_masked(leaf):
            moved_leaves[number] = leaf
    return symmetry.treedef.unflatten(moved_leaves)


def _warn_of_arrays_with_units(symmetry: Symmetry, passed_on: Sequence[tuple[str, Any]]) -> None:
    """Warns of arrays that are passed on though units may lie along them.

    Args:
        symmetry: The symmetry of the network.
        passed_on: The leaves that are passed on, each with the key path of its part of the state.
    """
    lines = []
    for key_path, leaf in passed_on:
        if _is_moment(leaf) and may_have_units(symmetry, leaf.shape):
            lines.append(f"  {key_path}: shape {jnp.shape(leaf)}")
    if lines:
        warn_user(
            "these arrays of the state stay as they are, and have sizes of groups; if they belong "
            "to units, start this state anew from the moved parameters (`optimizer.init`):\n"
            + "\n".join(lines),
            SymmetryWarning,
        )
