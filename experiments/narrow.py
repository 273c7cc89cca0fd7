"""Networks made narrower without training: some units are kept, by norm, and the others left out.

Which axes index a unit, and in which parameters, is the library's to know: nothing here knows a
layer or a model.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

import otfusion_jax as otf
from experiments.methods import counts
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.units import units_of


def narrowed(symmetry: otf.Symmetry, params: PyTree, onto: otf.Symmetry, order: int = 1) -> PyTree:
    """Prunes a network to the widths of another, by the norm of units' incoming weights.

    Args:
        symmetry: Of the network.
        params: Of the network.
        onto: Symmetry of the same network with fewer units.
        order: 1 or 2, for the l1 or the l2 norm.

    Returns:
        The parameters of the narrower network.
    """
    sizes = {group.name: group.size for group in onto.groups}
    return keep(symmetry, params, strongest(symmetry, params, sizes, order), onto)


def norms(
    symmetry: otf.Symmetry, params: PyTree, order: int = 1
) -> dict[str, Float[Array, "*batch n"]]:
    """Measures the incoming weights of every unit.

    Args:
        symmetry: Of the network.
        params: Of the network.
        order: 1 or 2, for the l1 or the l2 norm.

    Returns:
        For each group the norms of its units over all kernels that produce them; of units that only
        vectors belong to, over these.
    """
    leaves = jax.tree.leaves(params)
    found = {}
    for group in symmetry.groups:
        producing = [m for m in group.having("produces") if counts(m.path)]
        kernels = [m for m in producing if leaves[m.leaf].ndim > 1] or producing
        units = jnp.concatenate(
            [units_of(leaves[m.leaf], m.location, group) for m in kernels], axis=-1
        )
        found[group.name] = jnp.linalg.norm(units, order, axis=-1)
    return found


def strongest(
    symmetry: otf.Symmetry, params: PyTree, sizes: Mapping[str, int], order: int = 1
) -> dict[str, Int[Array, "*batch m"]]:
    """Chooses the units with the largest incoming weights (Li et al. 2017).

    Args:
        symmetry: Of the network.
        params: Of the network.
        sizes: Of each group, how many units to keep.
        order: Of the norm.

    Returns:
        For each group the units that stay, ascending.
    """
    return {
        name: jnp.sort(jnp.argsort(found, axis=-1, descending=True)[..., : sizes[name]], axis=-1)
        for name, found in norms(symmetry, params, order).items()
    }


def keep(
    symmetry: otf.Symmetry,
    params: PyTree,
    units: Mapping[str, Int[Array, "*batch m"]],
    onto: otf.Symmetry,
) -> PyTree:
    """Leaves out all units but some, on every axis of every parameter that indexes them.

    Args:
        symmetry: Of the network.
        params: Of the network.
        units: Of each group, those that stay, in the order that they are to have.
        onto: Symmetry of the same network with so many units.

    Returns:
        The parameters of the narrower network.
    """
    return otf.transport(symmetry, selected(symmetry, units), params, onto=onto)


def selected(symmetry: otf.Symmetry, units: Mapping[str, Int[Array, "*batch m"]]) -> Plans:
    """Writes a choice of units as plans, in which each new unit has the mass of one old one.

    Args:
        symmetry: Of the network.
        units: Of each group, those that stay, in the order that they are to have.

    Returns:
        Group name to plan: a permutation if all units stay.
    """
    plans = {}
    for name, chosen in units.items():
        size = symmetry[name].size
        whole = chosen.shape[-1] == size
        plans[name] = chosen if whole else jax.nn.one_hot(chosen, size, axis=-2)
    return plans


def reordered(symmetry: otf.Symmetry, plans: Plans, order: Plans) -> Plans:
    """Follows plans by permutations.

    Args:
        symmetry: Of the network that the plans start from.
        plans: Of each group; where groups lie in one another, the one around is permuted.
        order: Permutations of the units of the network that they lead to.

    Returns:
        Plans that do both at once.
    """
    found = {}
    for name, plan in plans.items():
        outer, then = symmetry[name].outer, order[name]
        if outer is not None:
            # Plans of what is in a group have the order that this group has in the end.
            at = order[outer]
            plan = jnp.take(plan, at, axis=len(symmetry[name].batch) - 1)
        soft = jnp.issubdtype(plan.dtype, jnp.floating)
        found[name] = jnp.take_along_axis(plan, then[..., None, :] if soft else then, axis=-1)
    return found
