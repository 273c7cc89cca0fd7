"""Networks made narrower without training: some units are kept, by norm, and the others left out.

Which axes index a unit, and in which parameters, is the library's to know: nothing here knows a
layer or a model.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

import otfusion_jax as otf
from experiments.networks import counts
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.units import units_of


def narrowed(symmetry: otf.Symmetry, params: PyTree, onto: otf.Symmetry, order: int = 1) -> PyTree:
    """Prunes a network to the widths of another, by the norm of units' incoming weights.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters of the network.
        onto: The symmetry of the same network with fewer units.
        order: The order of the norm, 1 or 2.

    Returns:
        The parameters of the narrower network.
    """
    units = strongest(symmetry, params, sizes(onto), order)
    return otf.transport(symmetry, selected(symmetry, units), params, onto=onto)


def sizes(symmetry: otf.Symmetry) -> dict[str, int]:
    """Returns the number of units of each group, by the group's name.

    Args:
        symmetry: The symmetry of a network.
    """
    return {group.name: group.size for group in symmetry.groups}


def norms(
    symmetry: otf.Symmetry, params: PyTree, order: int = 1
) -> dict[str, Float[Array, "*batch n"]]:
    """Measures the incoming weights of every unit.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters of the network.
        order: The order of the norm, 1 or 2.

    Returns:
        For each group the norms of its units over all kernels that produce them. Where only vectors
        produce the units, the norms are over these.
    """
    leaves = jax.tree.leaves(params)
    norms_by_group = {}
    for group in symmetry.groups:
        producing = [member for member in group.having("produces") if counts(member.path)]
        # Biases say nothing about what a unit takes in, but a lone vector is all that there is.
        kernels = [member for member in producing if leaves[member.leaf].ndim > 1]
        incoming = []
        for member in kernels or producing:
            incoming.append(units_of(leaves[member.leaf], member.location, group))
        weights = jnp.concatenate(incoming, axis=-1)
        norms_by_group[group.name] = jnp.linalg.norm(weights, order, axis=-1)
    return norms_by_group


def strongest(
    symmetry: otf.Symmetry, params: PyTree, sizes: Mapping[str, int], order: int = 1
) -> dict[str, Int[Array, "*batch m"]]:
    """Chooses the units with the largest incoming weights (Li et al. 2017).

    Args:
        symmetry: The symmetry of the network.
        params: The parameters of the network.
        sizes: The number of units to keep of each group.
        order: The order of the norm, 1 or 2.

    Returns:
        For each group the units that stay, ascending.
    """
    units = {}
    for name, strengths in norms(symmetry, params, order).items():
        strongest_first = jnp.argsort(strengths, axis=-1, descending=True)
        chosen = strongest_first[..., : sizes[name]]
        # In their old order: a network that keeps all its units is left as it was.
        units[name] = jnp.sort(chosen, axis=-1)
    return units


def selected(symmetry: otf.Symmetry, units: Mapping[str, Int[Array, "*batch m"]]) -> Plans:
    """Writes a choice of units as plans, in which each new unit has the mass of one old one.

    Args:
        symmetry: The symmetry of the network.
        units: For each group the units that stay, in the order that they are to have.

    Returns:
        The plan of each group, by its name: a permutation if all its units stay.
    """
    plans = {}
    for name, chosen in units.items():
        size = symmetry[name].size
        if chosen.shape[-1] == size:
            plans[name] = chosen
        else:
            plans[name] = jax.nn.one_hot(chosen, size, axis=-2)
    return plans


def reordered(symmetry: otf.Symmetry, plans: Plans, order: Plans) -> Plans:
    """Follows plans by permutations.

    Args:
        symmetry: The symmetry of the network that the plans start from.
        plans: The plan of each group; where groups lie in one another, the one around is permuted.
        order: Permutations of the units of the network that the plans lead to.

    Returns:
        Plans that do both at once.
    """
    both = {}
    for name, plan in plans.items():
        outer = symmetry[name].outer
        permutation = order[name]
        if outer is not None:
            # Plans of what is in a group have the order that this group has in the end.
            batch_axis = len(symmetry[name].batch) - 1
            plan = jnp.take(plan, order[outer], axis=batch_axis)
        is_matrix = jnp.issubdtype(plan.dtype, jnp.floating)
        columns = permutation[..., None, :] if is_matrix else permutation
        both[name] = jnp.take_along_axis(plan, columns, axis=-1)
    return both
