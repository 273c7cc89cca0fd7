"""Canonical form: parameters that multiply units one by one are made 1, and the function kept.

A normalisation is followed by a scale for each unit, which a rotation of the units would mix. If
all that reads these units are weights, the scale can be multiplied into them and be 1 from then on
(a `Fold`, which the trace has proved). Both models are brought into this form before rotations of
one are looked for (see `Symmetry.with_rotations`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.common.finiteness import not_finite
from otfusion_jax.common.host import Array, array_module, as_jax, as_numpy, kept, program
from otfusion_jax.common.lazy import any_lazy
from otfusion_jax.common.sharding import laid_out_like
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.balancing import balanced
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.groups import Fold
from otfusion_jax.symmetry.leaf_structure import LeafStructure
from otfusion_jax.symmetry.symmetry import Symmetry

ROUNDING = 1e-4
"""How far from 1 a folded parameter may be: what an average of ones in half precision may give."""


def canonicalize(symmetry: Symmetry, params: PyTree) -> PyTree:
    """Chooses among the parameters of a function those that can be compared with another model's.

    The scales of normalisations become 1, by being multiplied into the weights that read them. With
    scales (see `Symmetry.with_scales`), units that may be scaled are balanced as well: what
    produces a unit of a ReLU gets the norm of what reads it, and what two matrices compute
    together, as queries and keys do, is shared evenly between them. Of all parameters that scales
    can lead to, these have the smallest norm.

    The function stays the same, up to rounding. Leaves stay in their places, so that the result can
    be used wherever the parameters were. `symmetry.freedoms` lists what is changed. A pytree
    transform; also works inside `jax.jit` and under `jax.vmap`.

    Args:
        symmetry: The symmetry of the network, with rotations or without, with scales or without.
        params: The parameters of the network. They are not changed.

    Returns:
        New parameters of the same structure. What is 1 already is passed on with what belongs to
        it, so that a second call changes nothing.

    Raises:
        ValueError: If the parameters do not fit the symmetry, or a scale is known to be 0, or next
            to it, at a unit to which something else is added: it can't be made 1. Inside `jax.jit`
            what is added becomes infinite.
        TypeError: If the arguments are in another order, or shapes are in the place of arrays.
    """
    require_symmetry(symmetry, "canonicalize(symmetry, params)")
    require_model(symmetry, params)
    _require_no_lazy(params, "params")
    # Most parameters may be passed on as they are, and the result must not be the caller's memory.
    owned = jax.tree_util.tree_map(kept, params)
    known = as_numpy(owned)
    changed = balanced(symmetry, folded(symmetry, known, "params"))
    if changed is known:
        return as_jax(owned)
    return laid_out_like(as_jax(changed), params)


def canonical(symmetry: Symmetry, params: PyTree, name: str) -> PyTree:
    """Brings parameters that fit into the form in which the units of a symmetry are compared.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters.
        name: What to call them in the message about scales that can't be made 1.

    Returns:
        The parameters, with scales made 1 if groups rotate, and units balanced that are scaled.

    Raises:
        ValueError: If a scale can't be made 1, as far as that is known; if leaves are lazy.
    """
    _require_no_lazy(params, name)
    if symmetry.rotates:
        params = folded(symmetry, params, name)
    return balanced(symmetry, params)


def _require_no_lazy(params: PyTree, name: str) -> None:
    if any_lazy(jax.tree_util.tree_leaves(params)):
        raise ValueError(
            f"{name} has lazy leaves, whose canonical form takes all of them at once: load them, "
            "jax.tree.map(np.asarray, params), or use the symmetry without rotations and scales"
        )


def folded(symmetry: Symmetry, params: PyTree, name: str) -> PyTree:
    """Makes scales 1 that are read by weights alone, see `canonicalize`.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters.
        name: What to call them in the message about scales that can't be made 1.

    Returns:
        The parameters with these scales 1.

    Raises:
        ValueError: If a scale can't be made 1, as far as that is known.
    """
    folds = folds_of(symmetry)
    if not folds:
        return params
    arrays = symmetry.split(params)
    # In the order of the groups: a parameter that several folds divide is divided by each.
    for group, fold in folds:
        scale = arrays[fold.leaf] + fold.shift if fold.shift else arrays[fold.leaf]
        for leaf, degree in fold.others:
            structure = symmetry.numbered_leaves[leaf].structure
            axes = []
            for number, unit_axis in enumerate(symmetry.leaf_structures[leaf].unit_axes):
                if unit_axis.group.name == group:
                    axes.append(number)
            divided = _divided(
                structure, arrays[leaf], scale, tuple(axes), degree, layered=fold.layered
            )
            if degree > 0:
                _require_finite(symmetry, fold, scale, leaf, divided, name)
            arrays[leaf] = divided
        arrays[fold.leaf] = array_module(scale).full_like(scale, 1 - fold.shift)
    return symmetry.join(arrays)


def folds_of(symmetry: Symmetry) -> list[tuple[str, Fold]]:
    """Returns the folds that canonical form takes, each with the name of its group."""
    folds = []
    for freedom in symmetry.freedoms:
        folds.extend((freedom.group, fold) for fold in freedom.folds)
    return folds


@program(static_argnames=("structure", "axes", "degree", "layered"))
def _divided(
    structure: LeafStructure,
    array: Array,
    scale: Array,
    axes: tuple[int, ...],
    degree: int,
    layered: bool,
) -> Array:
    """Divides units of a parameter by a power of a scale.

    Args:
        structure: The structure of the parameter.
        array: The parameter.
        scale: The scale, with one number for each unit.
        axes: Which of the unit axes of the structure the units are.
        degree: The power.
        layered: Whether the first axis of both are layers.

    Returns:
        The parameter. Where the scale is 0, a 0 that would be divided by it stays 0, as a unit that
        nothing is added to takes no part. Anything else becomes infinite: there is no such model.
    """
    layers = scale.shape[:1] if layered else ()
    # A scale may have axes of size 1 beside its units, as to be broadcast.
    factors = (scale.reshape(*layers, -1) ** abs(degree)).astype(array.dtype)
    # The dimensions that the axis of layers falls into come first in every block.
    of_layers = len(structure.partition.axes[0][0].dims) if layered else 0
    blocks = structure.partition.split(array)
    for number in axes:
        unit_axis = structure.unit_axes[number]
        for key, block in blocks.items():
            if unit_axis.is_in(block):
                rest = block.array.shape[of_layers:]
                shape = [1] * len(rest)
                shape[block.dims.index(unit_axis.dim) - of_layers] = factors.shape[-1]
                along_units = factors.reshape(*layers, *shape)
                scaled = _scaled(block.array.reshape(*layers, *rest), along_units, degree)
                blocks[key] = block._replace(array=scaled.reshape(block.array.shape))
    return structure.partition.join(blocks)


def _scaled(array: Array, factors: Array, degree: int) -> Array:
    """Multiplies by factors, or divides by them if the degree is positive; 0 divided by 0 is 0."""
    if degree < 0:
        return array * factors
    stays = (array == 0) & (factors == 0)
    xp = array_module(array, factors)
    return xp.where(stays, 0, array / xp.where(stays, 1, factors))


def _require_finite(
    symmetry: Symmetry, fold: Fold, scale: Any, leaf: int, divided: Array, name: str
) -> None:
    """Refuses a scale that is known to be 0, or next to it, where something was divided by it."""
    if isinstance(scale, Tracer) or isinstance(divided, Tracer):
        return
    if not not_finite(divided):
        return
    magnitudes = np.abs(np.asarray(scale, np.complex128))
    smallest = np.min(magnitudes)
    units = np.argwhere(magnitudes == smallest).tolist()
    places = f"[layer, unit] {units[:8]}"
    if not fold.layered:
        units = np.flatnonzero(magnitudes == smallest).tolist()
        places = f"units {units[:8]}"
    raise ValueError(
        f"{name}: {fold.path} is {smallest:.3g} at {places}, and {symmetry.parts[leaf].path} is "
        "added to them: the scale can't be made 1. Move its permutations alone: use the symmetry "
        "without with_rotations()"
    )


def require_canonical(symmetry: Symmetry, params: PyTree, name: str) -> None:
    """Refuses parameters that are known not to be in the form in which units can be rotated.

    Args:
        symmetry: The symmetry. Without rotations, every form will do.
        params: The parameters.
        name: What to call them in the message.

    Raises:
        ValueError: If scales are not 1. They are listed.
    """
    if not symmetry.rotates:
        return
    arrays = symmetry.split(params)
    wrong = []
    for _, fold in folds_of(symmetry):
        scale = arrays[fold.leaf]
        if not isinstance(scale, Tracer):
            wanted = 1 - fold.shift
            distance = np.max(np.abs(np.asarray(scale, np.complex128) - wanted), initial=0)
            if distance > ROUNDING:
                wrong.append(f"  {fold.path}: up to {distance:.3g} from {wanted}")
    if wrong:
        raise ValueError(
            f"{name} is not in canonical form, in which alone its units can be rotated; pass "
            "canonicalize(symmetry, model):\n" + "\n".join(wrong)
        )


def nan_unless_canonical(symmetry: Symmetry, params: PyTree) -> PyTree:
    """Makes NaN of scales that are not 1, where they are traced and `require_canonical` is blind.

    Args:
        symmetry: The symmetry. Without rotations, every form will do.
        params: The parameters.

    Returns:
        The parameters. Better no model at all than another one.
    """
    if not symmetry.rotates:
        return params
    arrays = symmetry.split(params)
    traced = [fold for _, fold in folds_of(symmetry) if isinstance(arrays[fold.leaf], Tracer)]
    for fold in traced:
        scale = arrays[fold.leaf]
        is_one = jnp.abs(scale - (1 - fold.shift)) <= ROUNDING
        arrays[fold.leaf] = jnp.where(is_one, scale, jnp.nan)
    return symmetry.join(arrays) if traced else params
