"""Pushing parameters along plans.

A plan P of the units of a group, with marginals a = P 1 and b = Pᵀ 1, says how they move. A new
unit j is the average of the old units that map to it, so an axis that *produces* units is
multiplied by `P diag(1/b)`. What consumes the units must reconstruct old unit i from the new ones,
so a *consuming* axis is multiplied by `diag(1/a) P`. For a permutation the two are the same gather.
"""

import jax
import numpy as np
from jaxtyping import Array, PyTree

from otfusion_jax.common.arguments import require_arrays
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport
from otfusion_jax.tracing.programs import Program, entry_points


def check_symmetry(
    symmetry: Symmetry,
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    key: Array | None = None,
) -> float:
    """Certifies a symmetry: permutes every group at random, all at once, and compares the outputs.

    Twice: by permutations that leave no unit in place, and by uniform ones.

    Args:
        symmetry: to be certified.
        fn: the function that was traced, or the list of functions and inputs.
        params: concrete parameters; random ones tell more than freshly initialised ones, whose
            biases are all 0.
        *inputs: concrete inputs, best random ones.
        key: a key of `jax.random`; `jax.random.key(0)` if None.

    Returns:
        The relative error: the largest change of any output over the largest output, of several
        functions that of the worst. Rounding alone leaves 1e-7 to 1e-5 in float32. NaN if there are
        NaN among the outputs.

    Raises:
        ValueError: for parameters that do not fit.
        TypeError: for arguments in another order, shapes in place of arrays, and what is no key.
    """
    require_symmetry(symmetry, "check_symmetry(symmetry, fn, params, *inputs)")
    functions = entry_points(fn, inputs)
    require_model(symmetry, params)
    require_arrays([given for _, given in functions], "inputs")
    key = jax.random.key(0) if key is None else key
    drawn = symmetry.random(key)
    cycles = {name: _cycle(np.asarray(order)) for name, order in drawn.items()}
    moved = [transport(symmetry, plans, params) for plans in (cycles, drawn)]
    errors = []
    for function, given in functions:
        before = function(params, *given)
        errors += [_relative_change(before, function(model, *given)) for model in moved]
    return float(np.max(errors))


def _cycle(order: np.ndarray) -> Array:
    """Makes permutations that leave no unit in place: all go round in turn, in the given order."""
    following = (np.argsort(order, axis=-1) + 1) % order.shape[-1]
    return jax.device_put(np.take_along_axis(order, following, axis=-1))


def _relative_change(before: PyTree, after: PyTree) -> float:
    """Compares outputs: the largest change over the largest output."""
    flat = [
        np.concatenate([np.ravel(x).astype(np.complex128) for x in jax.tree_util.tree_leaves(o)])
        for o in (before, after)
    ]
    scale = np.max(np.abs(flat[0]), initial=np.finfo(np.float32).tiny)
    return float(np.max(np.abs(flat[1] - flat[0]), initial=0.0) / scale)
