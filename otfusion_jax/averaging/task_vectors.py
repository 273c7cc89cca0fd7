"""What fine-tuning has added to a base model, combined: task arithmetic, TIES and DARE.

A task vector is a model minus the base that it was fine-tuned from. All three are computed leaf by
leaf in float32 or wider, and added to the base, and rounded once. Models are fine-tuned from one
base and so lie in its order of units; others are aligned to it before.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from otfusion_jax.averaging.average import check_integers, columns_of
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import running_statistics, warn_of_averaged_statistics
from otfusion_jax.common.arguments import require_key
from otfusion_jax.common.host import Array, accumulation_dtype
from otfusion_jax.common.known import all_known
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_finite, require_models
from otfusion_jax.symmetry.groups import Leaf, leaves_of

Scale = float | Array | Sequence[float] | Callable[[str], Any]
"""By how much task vectors are multiplied: a number for all, or K of them, one for each model; or a
function from the key path of a parameter to either of these."""


def task_arithmetic(models: Sequence[PyTree], base: PyTree, scale: Scale = 1.0) -> PyTree:
    """Adds what several fine-tuned models have learned to their base.

    Each parameter is `base + sum_k scale_k * (model_k - base)`. A negative scale unlearns.

    Args:
        models: The fine-tuned models, K pytrees of the same structure and shapes.
        base: The model that they were fine-tuned from, of the same structure and shapes.
        scale: A number by which all task vectors are multiplied, or K numbers, which need not sum
            to 1; or a function from the key path of a parameter to either. At 1 / K the result is
            the average. The paper chooses it on held-out data; 0.3 to 0.5 is usual.

    Returns:
        The parameters, computed in float32 or wider and rounded once. Random keys and single
        integers (counters) are those of the last model; arrays of integers or booleans must be the
        same in all models.

    Raises:
        ValueError: For no models, scales that do not fit or are not finite, leaves that are no
            arrays, trees that differ, or integers that do, listing every offender by key path. The
            base is called so.
        TypeError: For what is no list of models, for shapes in place of arrays, and for scales that
            are no numbers.
        FloatingPointError: For a result that is out of range.

    Warns:
        StatisticsWarning: If running statistics of batch normalisation that differ are combined, as
            `average` warns.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> base, german, law = jnp.array([0.0, 1.0]), jnp.array([2.0, 1.0]), jnp.array([0.0, 3.0])
        >>> otf.task_arithmetic([german, law], base, 0.5).tolist()
        [1.0, 2.0]

    References:
        Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023.
    """
    leaves, columns, bases = _checked(models, base)
    _warn_of_statistics(models, base)
    merged = []
    for leaf, column, start in zip(leaves, columns, bases, strict=True):
        scales = _scales(scale, len(models), leaf.path)
        merged.append(_added(start, column, scales) if leaf.moves else column[-1])
    return _finished(leaves, base, merged, "task arithmetic")


def ties(
    models: Sequence[PyTree],
    base: PyTree,
    scale: Scale = 1.0,
    *,
    density: float = 0.2,
    per_leaf: bool = False,
) -> PyTree:
    """Adds what fine-tuned models agree on to their base: trim, elect signs, merge.

    1. Of each task vector, the entries of the largest magnitude are kept: a share `density` of its
       n numbers, rounded up, and what equals the smallest of these. All others become 0.
    2. For each entry, the sign of the sum over the models is elected.
    3. The mean over the models whose entry has this sign, and is not 0, is multiplied by the scale
       and added to the base. Where the sum is 0, or all entries are, the base stays.

    Args:
        models: The fine-tuned models, K pytrees of the same structure and shapes.
        base: The model that they were fine-tuned from.
        scale: A number by which the merged vector is multiplied, or a function from the key path of
            a parameter to one.
        density: The share of the entries that is kept, above 0 and at most 1.
        per_leaf: Whether the largest are taken leaf by leaf. If False, they are of the whole vector
            of all floating-point leaves, as in the paper.

    Returns:
        The parameters, see `task_arithmetic`.

    Raises:
        ValueError: As `task_arithmetic`, for a density out of range, and for complex leaves.
        TypeError: As `task_arithmetic`, and for a density that is no number.
        FloatingPointError: For a result that is out of range.

    Warns:
        StatisticsWarning: As `task_arithmetic`.

    References:
        Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023.
    """
    density = _checked_share(density, "density", "the share to keep, above 0 and at most 1")
    if density == 0:
        raise ValueError("density is 0.0; give the share to keep, above 0 and at most 1")
    leaves, columns, bases = _checked(models, base)
    _require_signs(leaves)
    _warn_of_statistics(models, base)
    thresholds = _thresholds(leaves, columns, bases, density, per_leaf)
    merged = []
    for number, (leaf, column, start) in enumerate(zip(leaves, columns, bases, strict=True)):
        factor = _scales(scale, 1, leaf.path)[0]
        new = _agreed(start, column, thresholds[number], factor) if leaf.moves else column[-1]
        merged.append(new)
    return _finished(leaves, base, merged, "TIES")


def dare(models: Sequence[PyTree], base: PyTree, key: Array, *, drop: float = 0.9) -> list[PyTree]:
    """Drops most of what fine-tuning has added at random, and rescales the rest.

    Each entry of a task vector becomes 0 with probability `drop`, by itself, and is otherwise
    divided by `1 - drop`, so that its expectation stays. What is left of several models interferes
    less: give the result to `task_arithmetic`, `ties` or `average`.

    Args:
        models: The fine-tuned models, K pytrees of the same structure and shapes.
        base: The model that they were fine-tuned from.
        key: A single key of `jax.random`. Every leaf of every model gets one of its own.
        drop: The probability with which an entry is dropped, 0 or more and below 1.

    Returns:
        The K models, each the base plus what is left of its task vector, computed in float32 or
        wider and rounded to the leaf's dtype. Integers, booleans, keys and running statistics of
        batch normalisation stay as each model has them. In half precision, small changes of large
        weights are lost in that: give float32.

    Raises:
        ValueError: As `task_arithmetic`, and for a probability out of range.
        TypeError: As `task_arithmetic`, and for what is no single key or no number.
        FloatingPointError: For a result that is out of range.

    References:
        Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a
        Free Lunch, ICML 2024.
    """
    drop = _checked_share(drop, "drop", "a probability, 0 or more and below 1")
    if drop == 1:
        raise ValueError("drop is 1.0; give a probability, 0 or more and below 1")
    require_key(key)
    leaves, columns, bases = _checked(models, base)
    # A variance that is dropped and enlarged may be negative.
    statistics = running_statistics(base)
    keep = jnp.asarray(1 - drop, float)
    thinned: list[list[Any]] = [[] for _ in models]
    for number, (leaf, column, start) in enumerate(zip(leaves, columns, bases, strict=True)):
        for model, value in enumerate(column):
            if leaf.moves and leaf.path not in statistics:
                own = jax.random.fold_in(jax.random.fold_in(key, model), number)
                value = _thinned(start, value, own, keep)
            thinned[model].append(value)
    return [_finished(leaves, base, values, "DARE") for values in thinned]


# --- one leaf


@jax.jit
def _added(base: Array, column: tuple[Array, ...], scales: Float[Array, " k"]) -> Array:
    """Adds the scaled differences of the values of one leaf to its base."""
    differences, wide = _differences(base, column)
    shares = scales.astype(differences.dtype).reshape(-1, *[1] * base.ndim)
    return (wide + jnp.sum(shares * differences, axis=0)).astype(base.dtype)


@jax.jit
def _agreed(
    base: Array, column: tuple[Array, ...], thresholds: Float[Array, " k"], scale: Float[Array, ""]
) -> Array:
    """Adds the mean of those differences that are large enough, and of the elected sign."""
    differences, wide = _differences(base, column)
    limits = thresholds.astype(differences.real.dtype).reshape(-1, *[1] * base.ndim)
    kept = jnp.where(jnp.abs(differences) >= limits, differences, 0)
    elected = jnp.sign(jnp.sum(kept, axis=0))
    agrees = (jnp.sign(kept) == elected[None]) & (kept != 0)
    count = jnp.maximum(jnp.sum(agrees, axis=0, dtype=wide.dtype), 1)
    mean = jnp.sum(jnp.where(agrees, kept, 0), axis=0) / count
    return (wide + scale.astype(wide.dtype) * mean).astype(base.dtype)


@jax.jit
def _thinned(base: Array, value: Array, key: Array, keep: Float[Array, ""]) -> Array:
    """Keeps differences of one leaf at random, and rescales them."""
    (difference,), wide = _differences(base, (value,))
    stays = jax.random.bernoulli(key, keep, base.shape)
    rescaled = difference / keep.astype(wide.dtype)
    return (wide + jnp.where(stays, rescaled, 0)).astype(base.dtype)


def _differences(base: Array, column: tuple[Array, ...]) -> tuple[Array, Array]:
    """Returns the differences of one leaf, `[K, ...]`, and the base, in a wide dtype."""
    dtype = accumulation_dtype(base.dtype)
    wide = base.astype(dtype)
    return jnp.stack(column).astype(dtype) - wide[None], wide


# --- what is kept


def _thresholds(
    leaves: Sequence[Leaf],
    columns: Sequence[tuple[Any, ...]],
    bases: Sequence[Any],
    density: float,
    per_leaf: bool,
) -> list[Array | None]:
    """Returns for each leaf from which magnitude on entries are kept, float `[K]`."""
    # By model, the magnitudes of each leaf.
    magnitudes: list[list[Any]] = [[] for _ in columns[0]] if columns else []
    moving = [number for number, leaf in enumerate(leaves) if leaf.moves]
    for number in moving:
        for model, value in enumerate(columns[number]):
            magnitudes[model].append(_magnitudes(bases[number], value))
    thresholds: list[Array | None] = [None] * len(leaves)
    for place, number in enumerate(moving):
        if per_leaf:
            found = [_smallest_kept([of_model[place]], density) for of_model in magnitudes]
            thresholds[number] = jnp.stack(found)
    if moving and not per_leaf:
        common = jnp.stack([_smallest_kept(of_model, density) for of_model in magnitudes])
        for number in moving:
            thresholds[number] = common
    return thresholds


def _require_signs(leaves: Sequence[Leaf]) -> None:
    """Refuses complex numbers, which have no sign."""
    wrong = []
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            wrong.append(f"  {leaf.path}: {leaf.dtype}")
    if wrong:
        raise ValueError("these leaves are complex and have no signs:\n" + "\n".join(wrong))


@jax.jit
def _magnitudes(base: Array, value: Array) -> Array:
    differences, _ = _differences(base, (value,))
    return jnp.ravel(jnp.abs(differences))


def _smallest_kept(magnitudes: Sequence[Array], density: float) -> Array:
    """Returns the smallest of the magnitudes that are kept of several leaves."""
    count = sum(x.size for x in magnitudes)
    if count == 0:
        return jnp.zeros(())
    # A share of 0.2 of 15 numbers is 3, and by rounding a little more.
    dropped = count - max(1, math.ceil(density * count - 1e-9))
    if all_known(magnitudes):
        # NumPy finds one number in linear time, wherever the leaves lie.
        together = np.concatenate([np.asarray(x) for x in magnitudes])
        return jnp.asarray(np.partition(together, dropped)[dropped])
    widest = jnp.result_type(*magnitudes)
    return jnp.sort(jnp.concatenate([x.astype(widest) for x in magnitudes]))[dropped]


# --- arguments


def _checked(
    models: Sequence[PyTree], base: PyTree
) -> tuple[tuple[Leaf, ...], list[tuple[Any, ...]], list[Any]]:
    """Checks models and their base, and sorts them by leaf.

    Args:
        models: The models.
        base: The base.

    Returns:
        The leaves, for each of them its values in the models, and its value in the base.

    Raises:
        ValueError: For models that do not fit each other or the base.
        TypeError: For what is no list of models, and for shapes in place of arrays.
    """
    require_models(models)
    names = [f"model {number}" for number in range(len(models))]
    require_alike([*models, base], names=[*names, "the base"])
    leaves = leaves_of(base)
    columns = columns_of(models)
    undecided = [jnp.full(len(models) + 1, 1 / (len(models) + 1), float)] * len(leaves)
    check_integers(leaves, columns, undecided)
    arrays = []
    for column in columns:
        arrays.append(tuple(jnp.asarray(value) for value in column))
    return leaves, arrays, [jnp.asarray(x) for x in jax.tree_util.tree_leaves(base)]


def _warn_of_statistics(models: Sequence[PyTree], base: PyTree) -> None:
    """Warns where running statistics are combined."""
    together = [*models, base]
    uniform = jnp.full(len(together), 1 / len(together), float)
    warn_of_averaged_statistics(together, False, [uniform] * len(leaves_of(base)))


def _scales(scale: Any, count: int, path: str) -> Float[Array, " k"]:
    """Checks the scales of one parameter.

    Args:
        scale: The scale in any form that `Scale` allows.
        count: The number K of models.
        path: The key path of the parameter.

    Returns:
        The scales, float `[K]`.

    Raises:
        ValueError: For scales that do not fit or are not finite, naming the key path.
        TypeError: For anything but numbers, naming the key path.
    """
    given = scale(path) if callable(scale) else scale
    where = f"{path}: " if callable(scale) else ""
    wanted = "a number" if count == 1 else f"a number, or {count} of them, one for each model"
    values = given if isinstance(given, list | tuple) else [given]
    for value in values:
        is_array = isinstance(value, jax.Array | np.ndarray) and value.dtype.kind in "iuf"
        # To Python a bool is a number; given as a scale it is a mistake.
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_array or is_number):
            kind = type(given).__name__
            raise TypeError(f"{where}scale is {given!r:.80}, of type {kind}; give {wanted}")
    scales = jnp.asarray(given, float)
    if scales.shape not in ((), (count,)):
        raise ValueError(f"{where}scale has shape {scales.shape}; give {wanted}")
    if not isinstance(scales, Tracer) and not np.all(np.isfinite(scales)):
        raise ValueError(f"{where}scale is {given!r:.80}, which is not finite")
    return jnp.broadcast_to(scales, (count,))


def _checked_share(value: Any, name: str, wanted: str) -> float:
    """Refuses what is no number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = type(value).__name__
        raise TypeError(f"{name} is {value!r:.80}, of type {kind}; give {wanted}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} is {value}; give {wanted}")
    return float(value)


def _finished(leaves: Sequence[Leaf], base: PyTree, values: list[Any], what: str) -> PyTree:
    """Puts leaves into a tree, and refuses what is out of range."""
    merged = jax.tree_util.tree_structure(base).unflatten(values)
    require_finite(leaves, merged, what)
    return merged
