"""Canonical form: of all parameters that compute the same, those that can be compared.

A normalisation is followed by a scale for each unit, which a rotation of the units would mix. If
all that reads these units are weights, the scale can be multiplied into them and be 1 from then on
(a `Fold`, which the trace has proved). What is added to all units alike before a mean is subtracted
is lost there, and is made 0. Both models are brought into this form before rotations of one are
looked for (see `Symmetry.with_rotations`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.common.host import as_jax, as_numpy, kept
from otfusion_jax.common.lazy import any_lazy
from otfusion_jax.common.sharding import laid_out_like
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.balancing import balanced, balances_of
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.offsets import without_offsets
from otfusion_jax.symmetry.scale_folds import folded, folds_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.unread_means import without_unread_means

ROUNDING = 1e-4
"""How far from 1 a folded parameter may be: what an average of ones in half precision may give."""


def canonicalize(symmetry: Symmetry, params: PyTree) -> PyTree:
    """Chooses among the parameters of a function those that can be compared with another model's.

    The scales of normalisations become 1, multiplied into the weights that read them instead, and
    their biases 0, where every one of these weights has a bias behind it to take them up. Means
    over units become 0 that nothing reads, as a LayerNorm subtracts them from what weights produce,
    and from what others consume. With scales (see `Symmetry.with_scales`), units that may be scaled
    are balanced as well: what produces a unit of a ReLU gets the norm of what reads it, and what
    two matrices compute together, as queries and keys do, is shared evenly between them. Of all
    parameters that scales can lead to, these have the smallest norm.

    The function stays the same, up to rounding. Leaves stay in their places, so that the result can
    be used wherever the parameters were. `symmetry.freedoms` lists what is changed. A pytree
    transform; also works inside `jax.jit` and under `jax.vmap`.

    Args:
        symmetry: The symmetry of the network, with rotations or without, with scales or without.
        params: The parameters of the network. They are not changed.

    Returns:
        New parameters of the same structure. What is 1 already is passed on with what belongs to
        it, so that a second call changes nothing, and of what is balanced no more than some
        millionths. Of leaves that are lazy (see `LazyArray`), the new ones are lazy, too.

    Raises:
        ValueError: If the parameters do not fit the symmetry, or a scale is known to be 0, or next
            to it, at a unit to which something else is added: it can't be made 1. Inside `jax.jit`
            what is added becomes infinite; of what is lazy it shows when it is read. With scales
            also if leaves are lazy.
        TypeError: If the arguments are in another order, or shapes are in the place of arrays.
    """
    require_symmetry(symmetry, "canonicalize(symmetry, params)")
    require_model(symmetry, params)
    _require_no_lazy_balances(symmetry, params, "params")
    # Most parameters may be passed on as they are, and the result must not be the caller's memory.
    owned = jax.tree_util.tree_map(kept, params)
    known = as_numpy(owned)
    changed = balanced(symmetry, simplified(symmetry, known, "params"))
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
        The parameters, simplified if groups rotate, and units balanced that are scaled.

    Raises:
        ValueError: If a scale can't be made 1, as far as that is known; if units are to be
            balanced and leaves are lazy.
    """
    _require_no_lazy_balances(symmetry, params, name)
    form = simplified(symmetry, params, name) if symmetry.rotates else params
    return laid_out_like(balanced(symmetry, form), params)


def simplified(symmetry: Symmetry, params: PyTree, name: str) -> PyTree:
    """Removes what the function does not need: canonical form but for scales that are balanced.

    Args:
        symmetry: The symmetry of the network.
        params: The parameters.
        name: What to call them in the message about scales that can't be made 1.

    Returns:
        The parameters, with biases that others take up 0, scales 1, and means 0 that nothing reads.

    Raises:
        ValueError: If a scale can't be made 1, as far as that is known.
    """
    # A bias that is gone is not divided by the scale of its unit, which may be 0.
    form = folded(symmetry, without_offsets(symmetry, params), name)
    return without_unread_means(symmetry, form)


def _require_no_lazy_balances(symmetry: Symmetry, params: PyTree, name: str) -> None:
    """Refuses to balance what is lazy: scales of one group depend on all the others."""
    if balances_of(symmetry) and any_lazy(jax.tree_util.tree_leaves(params)):
        raise ValueError(
            f"{name} has lazy leaves, and to balance scales takes all of them at once: load them, "
            "jax.tree.map(np.asarray, params), or use the symmetry without with_scales()"
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
