"""Pushing parameters along plans.

A plan P of the units of a group, with marginals a = P 1 and b = Pᵀ 1, says how they move. A new
unit j is the average of the old units that map to it, so an axis that *produces* units is
multiplied by `P diag(1/b)`. What consumes the units must reconstruct old unit i from the new ones,
so a *consuming* axis is multiplied by `diag(1/a) P`. For a permutation the two are the same gather.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.correspondence import crowded
from otfusion_jax.symmetry.groups import Group, Plans
from otfusion_jax.symmetry.symmetry import Symmetry


@runtime_checkable
class HasPlans(Protocol):
    """Anything with plans, such as the result of `align`."""

    @property
    def plans(self) -> Plans:
        """Group name to plan."""
        ...


def plans_of(plans: Plans | HasPlans) -> Plans:
    """Returns the plans of what has some.

    Args:
        plans: group name to plan, or the result of `align`.

    Returns:
        Group name to plan.

    Raises:
        TypeError: for anything else.
    """
    found = plans if isinstance(plans, dict) else getattr(plans, "plans", None)
    if not isinstance(found, dict):
        raise TypeError(
            f"plans is a {type(plans).__name__}; pass a dict of arrays by the names of groups, or "
            "what align returns"
        )
    return found


def is_permutation(plan: Array | np.ndarray | jax.ShapeDtypeStruct) -> bool:
    """Whether a plan is an index vector rather than a matrix of masses.

    Args:
        plan: the plan.

    Returns:
        True for integer dtypes.
    """
    return jnp.issubdtype(plan.dtype, jnp.integer)


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
    require_symmetry(symmetry, "compose(symmetry, first, then) or invert(symmetry, plans)")
    plans = plans_of(plans)
    require_plans(symmetry, plans)
    soft = [name for name, plan in plans.items() if not is_permutation(plan)]
    if soft:
        raise ValueError(f"only permutations can be chained or turned around; soft: {soft}")
    return symmetry.identity() | plans


def new_sizes(symmetry: Symmetry, plans: Plans, leaf: int) -> dict[Any, int]:
    """Returns the sizes that plans give to the dimensions of a leaf, where they change."""
    found = {}
    for group, _, dim, _ in symmetry.leaf_structures[leaf].unit_axes:
        if group.name in plans and plans[group.name].shape[-1] != group.size:
            found[dim] = plans[group.name].shape[-1]
    return found


def require_plans(symmetry: Symmetry, plans: Plans, onto: Symmetry | None = None) -> None:
    """Refuses plans that do not fit the groups; `plans` comes as the caller gave it."""
    known = {g.name: g for g in symmetry.groups}
    sizes = {} if onto is None else {g.name: g.size for g in onto.groups}
    wrong = [f"  {name}: no such group" for name in plans if name not in known]
    for name in plans:
        if name in known and (problem := _problem(known[name], plans, sizes.get(name))):
            wrong.append(f"  {name}: {problem}")
    if not wrong and not all(map(is_permutation, plans.values())):
        wrong = [
            f"  {name}: {problem}"
            for name, problem in crowded(symmetry).items()
            if name in plans and not is_permutation(plans[name])
        ]
    if not wrong and onto is not None:
        wrong = [
            f"  {g.name}: no plan, but {g.size} units become {sizes[g.name]}"
            for g in symmetry.groups
            if g.name not in plans and g.size != sizes[g.name]
        ]
    if not wrong and onto is None:
        wrong = [
            f"  {symmetry.parts[i].path}: units that change in number alternate with other things "
            "along an axis; say where they go by `onto`, the symmetry of the network they lead to"
            for i, (layout, _) in enumerate(symmetry.leaf_structures)
            if layout.resized(new_sizes(symmetry, plans, i)) is None
        ]
    if wrong:
        groups = ", ".join(f"{g.name} ({g.size})" for g in symmetry.groups)
        raise ValueError(
            "these plans do not fit the symmetry:\n" + "\n".join(wrong) + f"\nIts groups: {groups}"
        )


def _problem(group: Group, plans: Plans, size: int | None = None) -> str | None:
    """Says what is wrong with a group's plan; values are looked at unless they are traced."""
    plan: Any = plans[group.name]
    if not isinstance(plan, jax.Array | np.ndarray):
        return f"a {type(plan).__name__}, expected an array"
    n, batch, note = group.size, group.batch, ""
    around: Any = None if group.outer is None else plans.get(group.outer)
    if isinstance(around, jax.Array | np.ndarray) and not is_permutation(around):
        batch = (*batch, around.shape[-1])
        note = f", one for every pair of what {group.outer} moves from and to"
    shape = ", ".join(map(str, (*batch, n)))
    alone = f"({n},)" if not batch else f"({shape})"
    known = not isinstance(plan, Tracer)
    if is_permutation(plan):
        if plan.shape != (*batch, n):
            return f"shape {plan.shape}, expected {alone}{note}"
        if size not in (None, n):
            return f"a permutation, but {n} units become {size}"
        if known and not np.all(np.sort(np.asarray(plan), axis=-1) == np.arange(n)):
            unsolved = "; its cost was not finite" if np.any(np.asarray(plan) == n) else ""
            return f"not a permutation of 0 to {n - 1}{unsolved}"
        return None
    new = "m" if size is None else str(size)
    if plan.shape[:-1] != (*batch, n) or size not in (None, plan.shape[-1]):
        expected = f"expected ({shape}, {new}) for a transport plan or int {alone}{note}"
        return f"shape {plan.shape}, {expected}"
    if known and not np.all(np.isfinite(np.asarray(plan)) & (np.asarray(plan) >= 0)):
        return "masses that are negative or not finite"
    both = [m.path for m in group.members if m.role == "both"]
    if both:
        return (
            f"a soft plan, but {', '.join(both)} both produce and consume the units, which only a "
            "permutation can serve; give each of the two uses a leaf of its own"
        )
    return None
