"""Pushing parameters along plans.

A plan P of the units of a group, with marginals a = P 1 and b = Pᵀ 1, says how they move. A new
unit j is the average of the old units that map to it, so an axis that *produces* units is
multiplied by `P diag(1/b)`. What consumes the units must reconstruct old unit i from the new ones,
so a *consuming* axis is multiplied by `diag(1/a) P`. For a permutation the two are the same gather.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from otfusion_jax.symmetry import Group, Member, Plans, Symmetry
from otfusion_jax.units import mixed, permuted


@runtime_checkable
class HasPlans(Protocol):
    """Anything with plans, such as the result of `align`."""

    @property
    def plans(self) -> Plans:
        """Group name to plan."""
        ...


def is_permutation(plan: Array | np.ndarray | jax.ShapeDtypeStruct) -> bool:
    """Whether a plan is an index vector rather than a matrix of masses.

    Args:
        plan: the plan.

    Returns:
        True for integer dtypes.
    """
    return jnp.issubdtype(plan.dtype, jnp.integer)


def move_axis(leaf: Array, member: Member, group: Group, plan: Array) -> Array:
    """Moves one axis of one parameter along a plan.

    Args:
        leaf: the parameter.
        member: where the units are in it, and its role.
        group: whose units.
        plan: integer `[*batch, n]` or float `[*batch, n, m]`.

    Returns:
        The parameter with that axis moved. An index out of range, which is how a solver marks a
        problem that it could not solve, gives NaN.
    """
    if is_permutation(plan):
        return permuted(leaf, member.where, group, plan)
    masses = jnp.sum(plan, axis=-2 if member.role == "produces" else -1, keepdims=True)
    weights = (plan / jnp.where(masses > 0, masses, 1)).astype(leaf.dtype)
    return mixed(leaf, member.where, group, weights)


def transport(symmetry: Symmetry, plans: Plans | HasPlans, params: PyTree) -> PyTree:
    """Moves the parameters of a network along plans.

    With permutations the moved network computes the same function as the one given. A jitted
    pytree transform; also works inside `jax.jit`, under `jax.vmap` and `jax.grad`.

    Args:
        symmetry: of the network.
        plans: group name to plan, or the result of `align`. A permutation is integer `[n]`:
            position `j` receives unit `plan[j]`. A transport plan is float `[n, m]`. Plans of a
            nested group have its batch in front; they apply to what is at an index after the group
            around has moved. Groups that are left out stay where they are.
        params: the parameters; not changed.

    Returns:
        New parameters of the same structure. Integers, booleans and keys are passed on.

    Raises:
        ValueError: for plans of unknown groups, of wrong shapes, or known not to be permutations or
            couplings, for soft plans of axes with both roles, and for parameters that do not fit.
    """
    symmetry.validate(params)
    plans = plans if isinstance(plans, dict) else plans.plans
    _check(symmetry, plans)
    return _transport(symmetry, plans, params)


@functools.partial(jax.jit, static_argnums=0)
def _transport(symmetry: Symmetry, plans: Plans, params: PyTree) -> PyTree:
    leaves, treedef = jax.tree_util.tree_flatten(params)
    return treedef.unflatten(move(symmetry, plans, i, x) for i, x in enumerate(leaves))


def compose(symmetry: Symmetry, first: Plans | HasPlans, then: Plans | HasPlans) -> Plans:
    """Chains permutations: to move along the result is to move along one and then the other.

    Args:
        symmetry: of the network.
        first: plans of all groups or of some, integer, or the result of `align`.
        then: likewise.

    Returns:
        Plans of all groups.

    Raises:
        ValueError: for plans that do not fit, or that are not permutations.
    """
    a, b = (_permutations(symmetry, plans) for plans in (first, then))
    out: Plans = {}
    for group in symmetry.groups:
        mine = a[group.name]
        if group.outer is not None:  # what is inside of an index has moved along with it
            mine = jnp.take_along_axis(mine, b[group.outer][..., None], axis=-2)
        out[group.name] = jnp.take_along_axis(mine, b[group.name], axis=-1)
    return out


def invert(symmetry: Symmetry, plans: Plans | HasPlans) -> Plans:
    """Turns permutations around: to move along plans and then along the result is to stay.

    Args:
        symmetry: of the network.
        plans: of all groups or of some, integer, or the result of `align`.

    Returns:
        Plans of all groups.

    Raises:
        ValueError: for plans that do not fit, or that are not permutations.
    """
    forth = _permutations(symmetry, plans)
    back = {name: jnp.argsort(plan, axis=-1).astype(plan.dtype) for name, plan in forth.items()}
    for group in symmetry.groups:
        if group.outer is not None:
            mine, around = back[group.name], back[group.outer]
            back[group.name] = jnp.take_along_axis(mine, around[..., None], axis=-2)
    return back


def _permutations(symmetry: Symmetry, plans: Plans | HasPlans) -> Plans:
    plans = plans if isinstance(plans, dict) else plans.plans
    _check(symmetry, plans)
    soft = [name for name, plan in plans.items() if not is_permutation(plan)]
    if soft:
        raise ValueError(f"only permutations can be chained or turned around; soft: {soft}")
    return symmetry.identity() | plans


def move(
    symmetry: Symmetry, plans: Plans, leaf: int, array: Any, stay: Collection[Member] = ()
) -> Any:
    """Moves one parameter along plans, without checks.

    Args:
        symmetry: of the network.
        plans: group name to plan; groups that are left out stay.
        leaf: position of the parameter in `symmetry.leaves`.
        array: the parameter.
        stay: members that are not to move.

    Returns:
        The parameter, moved.
    """
    for group, member in symmetry.by_leaf[leaf]:
        if group.name in plans and member not in stay:
            array = move_axis(array, member, group, plans[group.name])
    return array


def _check(symmetry: Symmetry, plans: Plans) -> None:
    known = {g.name: g for g in symmetry.groups}
    wrong = [f"  {name}: no such group" for name in plans if name not in known]
    for name, plan in plans.items():
        if name in known and (problem := _problem(known[name], plan)):
            wrong.append(f"  {name}: {problem}")
    if wrong:
        groups = ", ".join(f"{g.name} ({g.size})" for g in symmetry.groups)
        raise ValueError(
            "these plans do not fit the symmetry:\n" + "\n".join(wrong) + f"\nIts groups: {groups}"
        )


def _problem(group: Group, plan: Any) -> str | None:
    """Says what is wrong with a plan; values are looked at unless they are traced."""
    if not isinstance(plan, jax.Array | np.ndarray):
        return f"a {type(plan).__name__}, expected an array"
    n, batch = group.size, group.batch
    shape = ", ".join(map(str, (*batch, n)))
    alone = f"({n},)" if not batch else f"({shape})"
    known = not isinstance(plan, Tracer)
    if is_permutation(plan):
        if plan.shape != (*batch, n):
            return f"shape {plan.shape}, expected {alone}"
        if known and not np.all(np.sort(np.asarray(plan), axis=-1) == np.arange(n)):
            unsolved = "; its cost was not finite" if np.any(np.asarray(plan) == n) else ""
            return f"not a permutation of 0 to {n - 1}{unsolved}"
        return None
    if plan.shape[:-1] != (*batch, n):
        return f"shape {plan.shape}, expected ({shape}, m) for a transport plan or int {alone}"
    part = [m for m in group.members if not m.where.place.fills(n, m.where.length)]
    if plan.shape[-1] != n and (batch or part):
        place = part[0].path if part else "each index around"
        return (
            f"a plan to {plan.shape[-1]} units, but {place} holds other things beside these, so "
            "that only as many as before fit"
        )
    if known and not np.all(np.isfinite(np.asarray(plan)) & (np.asarray(plan) >= 0)):
        return "masses that are negative or not finite"
    both = [m.path for m in group.members if m.role == "both"]
    if both:
        return (
            f"a soft plan, but {', '.join(both)} both produce and consume the units, which only a "
            "permutation can serve"
        )
    return None


def check_symmetry(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    params: PyTree,
    *inputs: PyTree,
    key: Array | None = None,
) -> float:
    """Certifies a symmetry: permutes every group at random, all at once, and compares the outputs.

    Args:
        symmetry: to be certified.
        fn: the function that was traced.
        params: concrete parameters; random ones tell more than freshly initialised ones, whose
            biases are all 0.
        *inputs: concrete inputs, best random ones.
        key: a key of `jax.random`; `jax.random.key(0)` if None.

    Returns:
        The relative error: the largest change of any output over the largest output. Rounding
        alone leaves 1e-7 to 1e-5 in float32. NaN if there are NaN among the outputs.
    """
    plans = symmetry.random(jax.random.key(0) if key is None else key)
    outputs = fn(params, *inputs), fn(transport(symmetry, plans, params), *inputs)
    before, after = (
        np.concatenate([np.ravel(x).astype(np.complex128) for x in jax.tree_util.tree_leaves(o)])
        for o in outputs
    )
    scale = np.max(np.abs(before), initial=np.finfo(np.float32).tiny)
    return float(np.max(np.abs(after - before), initial=0.0) / scale)
