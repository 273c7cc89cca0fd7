"""The certificate of a symmetry: units are moved, and the outputs have to stay what they were."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from otfusion_jax.common.arguments import checked_key, require_arrays
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.balancing import randomly_scaled
from otfusion_jax.symmetry.canonical import simplified
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import is_permutation
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport
from otfusion_jax.symmetry.unread_means import with_random_means
from otfusion_jax.tracing.activations import require_samples
from otfusion_jax.tracing.misuse import naming_mistakes, require_params_first
from otfusion_jax.tracing.programs import Program, entry_points

_CALL = "check_symmetry(symmetry, fn, params, *inputs)"


def check_symmetry(
    symmetry: Symmetry,
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    key: Array | None = None,
) -> float:
    """Certifies a symmetry: moves every group at random, all at once, and compares the outputs.

    Twice: by permutations that leave no unit in place, and by uniform ones. Groups that rotate (see
    `Symmetry.with_rotations`) are multiplied by random orthogonal matrices, after `canonicalize`,
    and means over units that nothing reads get random numbers. Groups that are signed change their
    signs at random, and those that are scaled are multiplied by scales between 1/2 and 2.

    Args:
        symmetry: The symmetry to be certified.
        fn: The function that was traced, or the list of functions and inputs.
        params: The parameters, arrays. Random ones tell more than freshly initialised ones, whose
            biases are all 0.
        *inputs: The inputs, arrays, best random ones.
        key: A key of `jax.random` for the permutations; `jax.random.key(0)` if None.

    Returns:
        The relative error: the largest change of any output over the largest output, of several
        functions that of the worst. Rounding alone leaves 1e-7 to 1e-5 in float32. NaN if there are
        NaN among the outputs.

    Raises:
        ValueError: If the parameters do not fit the symmetry, or an input is empty.
        TypeError: For arguments in another order or of a wrong kind, shapes in place of arrays, a
            key that is none, and inside of `jax.jit`, `jax.vmap` or `jax.grad`.
    """
    require_symmetry(symmetry, _CALL)
    functions = entry_points(fn, inputs)
    require_params_first(symmetry, params, inputs, _CALL)
    require_model(symmetry, params)
    require_arrays([inputs_of_fn for _, inputs_of_fn in functions], "inputs")
    for _, inputs_of_fn in functions:
        require_samples(inputs_of_fn)
    # A member that is left behind shows best if every unit moves. Such permutations are single
    # cycles, so that uniform ones are tried as well.
    key = checked_key(key)
    uniform = symmetry.random(key)
    # Inside of `jax.jit` the permutations are traced, even if all that was passed is known.
    _refuse_traced((params, inputs, functions, uniform))
    # Rotations are those of parameters in canonical form, which computes the same as well.
    in_place = simplified(symmetry, params, "params") if symmetry.rotates else params
    moved_models = []
    for plans in (_without_fixed_points(uniform), uniform):
        moved = transport(symmetry, plans, in_place)
        if symmetry.rotates:
            moved = with_random_means(symmetry, moved, key)
        moved_models.append(randomly_scaled(symmetry, moved, key))
    errors = []
    for function, inputs_of_fn in functions:
        with naming_mistakes(function, params, inputs_of_fn):
            before, *after = _evaluated(function, [params, *moved_models], inputs_of_fn)
        for outputs in after:
            errors.append(_relative_change(before, outputs))
    return float(np.max(errors))


def _refuse_traced(values: Any) -> None:
    """Refuses to compare what has no values yet."""
    if any(isinstance(value, Tracer) for value in jax.tree_util.tree_leaves(values)):
        raise TypeError(
            "check_symmetry was called inside of jax.jit, or of another transformation, where "
            "there are no values to compare; call it outside: it returns a Python number"
        )


def _without_fixed_points(plans: Plans) -> Plans:
    """Makes permutations that leave no unit in place: all go round in turn, in the given order."""
    cycles = {}
    for name, plan in plans.items():
        if not is_permutation(plan):
            # Rotations leave no unit in place.
            cycles[name] = plan
            continue
        order = np.asarray(plan)
        next_in_turn = (np.argsort(order, axis=-1) + 1) % order.shape[-1]
        cycle = np.take_along_axis(order, next_in_turn, axis=-1)
        cycles[name] = jax.device_put(cycle)
    return cycles


def _evaluated(
    fn: Callable[..., PyTree], models: Sequence[PyTree], inputs: Sequence[PyTree]
) -> list[PyTree]:
    """Evaluates a function of several models."""
    # One program for all of them: of operation after operation, each would be compiled.
    compiled = jax.jit(functools.partial(fn))
    try:
        return [compiled(model, *inputs) for model in models]
    except NotImplementedError:
        # A primitive of one's own need not say how it is compiled.
        return [fn(model, *inputs) for model in models]


def _relative_change(before: PyTree, after: PyTree) -> float:
    """Compares outputs: the largest change of any number over the largest finite number."""
    old, new = _as_vector(before), _as_vector(after)
    # Outputs that are all 0 have to stay so.
    scale = np.max(np.abs(old[np.isfinite(old)]), initial=np.finfo(np.float32).tiny)
    # Logits of -inf, by which classes are ruled out, have to stay as well: the difference is NaN.
    has_changed = old != new
    changes = np.abs(new[has_changed] - old[has_changed])
    return float(np.max(changes, initial=0.0) / scale)


def _as_vector(outputs: PyTree) -> np.ndarray:
    """Returns all numbers of a pytree as one vector, complex `[numbers]`."""
    leaves = []
    for leaf in jax.tree_util.tree_leaves(outputs):
        # One dtype that holds integers, booleans and complex numbers of any width.
        leaves.append(np.ravel(leaf).astype(np.complex128))
    return np.concatenate(leaves)
