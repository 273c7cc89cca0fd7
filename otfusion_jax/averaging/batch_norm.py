"""Batch normalisation folded into its scale and bias, and the inverse.

In inference it is `scale * (x - mean) / sqrt(var + epsilon) + bias`, which is one scale and one
bias. Folded, mean is 0 and var is `1 - epsilon`: the leaves stay in their places, and the function
stays what it is. Models that are folded have equal statistics, so that their average is one of what
the layers do, and not of numbers that say little by themselves.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import running_statistics, separator_of
from otfusion_jax.common.host import (
    Array,
    accumulation_dtype,
    array_module,
    as_jax,
    as_numpy,
    kept,
    loaded,
)
from otfusion_jax.common.sharding import laid_out_like
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_finite
from otfusion_jax.symmetry.groups import leaves_of


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """The leaves of one layer of batch normalisation, by their key paths.

    All four have as many numbers, one for each channel, in shapes that may differ by axes of 1.

    Attributes:
        mean: The running mean.
        var: The running variance.
        scale: What the normalised value is multiplied by.
        bias: What is added then.
    """

    mean: str
    var: str
    scale: str
    bias: str


def fold_batch_norm(
    params: PyTree, layers: Sequence[BatchNorm] | None = None, *, epsilon: float = 1e-5
) -> PyTree:
    """Moves running statistics into the scale and bias of batch normalisation.

    With `s = scale / sqrt(var + epsilon)`, the scale becomes `s`, the bias `bias - s * mean`, the
    mean 0, and the variance `1 - epsilon`. In inference the function stays the same to rounding.

    Args:
        params: The parameters with their statistics, a pytree of arrays.
        layers: The layers. If None, those that are found by name: of a Linen tree with `params` and
            `batch_stats`, of an NNX state, of a state dict of PyTorch, and of Haiku's parameters
            and state in one tree, where the module's parameters are called as the statistics'
            module. Equinox has no names: say which leaves they are.
        epsilon: What the network adds to the variance, above 0 and below 1. No leaf says it; the
            frameworks' default is 1e-5. With another one than the network's, the function changes.
            Where layers have several, fold those of each by themselves, by `layers`.

    Returns:
        A tree of the same structure, shapes and dtypes, computed in float32 or wider and rounded
        once. A variance in half precision rounds `1 - epsilon` to 1.

    Raises:
        ValueError: If no layers are found, or for key paths that are not there, leaves that are no
            floating-point arrays, shapes that do not fit, and variances below 0, listing each; for
            epsilon out of range.
        TypeError: For an epsilon that is no number.
        FloatingPointError: If a result is out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> norm = {"mean": jnp.ones(1), "var": jnp.full(1, 3.0)}
        >>> norm |= {"scale": jnp.full(1, 4.0), "bias": jnp.zeros(1)}
        >>> folded = otf.fold_batch_norm(norm, epsilon=1e-3)
        >>> print({name: round(float(x[0]), 3) for name, x in folded.items()})
        {'bias': -2.309, 'mean': 0.0, 'scale': 2.309, 'var': 0.999}
    """
    checked = _checked_layers(params, layers)
    epsilon = _checked_epsilon(epsilon)
    targets = {}
    for layer in checked:
        targets[layer] = (np.zeros(()), np.asarray(1 - epsilon))
    return _with_statistics(params, targets, epsilon)


def unfold_batch_norm(
    params: PyTree,
    statistics: PyTree,
    layers: Sequence[BatchNorm] | None = None,
    *,
    epsilon: float = 1e-5,
) -> PyTree:
    """Gives batch normalisation other statistics, and the scale and bias that make up for them.

    The inverse of `fold_batch_norm`, where the statistics are those from before. Training goes on
    as it would from statistics that are those of the data.

    Args:
        params: The parameters, folded or not, a pytree of arrays.
        statistics: A tree of the same structure and shapes, of which only the means and variances
            are read.
        layers: The layers, see `fold_batch_norm`.
        epsilon: What the network adds to the variance, see `fold_batch_norm`.

    Returns:
        A tree of the same structure. Its function in inference is that of `params` to rounding, and
        its means and variances are those of `statistics`.

    Raises:
        ValueError: As `fold_batch_norm`, and for trees that differ.
        TypeError: As `fold_batch_norm`.
        FloatingPointError: If a result is out of range.
    """
    require_alike([params, statistics], names=["params", "statistics"])
    checked = _checked_layers(params, layers)
    _checked_layers(statistics, checked)
    epsilon = _checked_epsilon(epsilon)
    values = _by_path(as_numpy(statistics))
    targets = {layer: (loaded(values[layer.mean]), loaded(values[layer.var])) for layer in checked}
    return _with_statistics(params, targets, epsilon)


def _with_statistics(
    params: PyTree, targets: dict[BatchNorm, tuple[Any, Any]], epsilon: float
) -> PyTree:
    """Sets the statistics of layers, and keeps the function by their scales and biases."""
    # Leaves are passed on as they are, and the result must not be the caller's memory.
    values = _by_path(as_numpy(jax.tree.map(kept, params)))
    for layer, (new_mean, new_var) in targets.items():
        scale, bias, mean, var = (
            loaded(values[path]) for path in (layer.scale, layer.bias, layer.mean, layer.var)
        )
        xp = array_module(scale, bias, mean, var, new_mean, new_var)
        wide = accumulation_dtype(jnp.result_type(scale))
        flat = functools.partial(_flat, xp, wide)
        new_mean = xp.broadcast_to(flat(new_mean), flat(mean).shape)
        new_var = xp.broadcast_to(flat(new_var), flat(var).shape)
        # What the layer multiplies by in all, which is to stay.
        factor = flat(scale) / xp.sqrt(flat(var) + epsilon)
        new_scale = factor * xp.sqrt(new_var + epsilon)
        new_bias = flat(bias) + factor * (new_mean - flat(mean))
        new = {layer.mean: new_mean, layer.var: new_var}
        new |= {layer.scale: new_scale, layer.bias: new_bias}
        for path, value in new.items():
            old = values[path]
            values[path] = value.reshape(jnp.shape(old)).astype(jnp.result_type(old))
    leaves = leaves_of(params)
    found = jax.tree_util.tree_structure(params).unflatten(values[leaf.path] for leaf in leaves)
    require_finite(leaves, found, "folding batch normalisation")
    return laid_out_like(as_jax(found), params)


def _flat(xp: Any, dtype: np.dtype, value: Any) -> Array:
    return xp.ravel(xp.asarray(value)).astype(dtype)


def _by_path(params: PyTree) -> dict[str, Any]:
    paths = [leaf.path for leaf in leaves_of(params)]
    return dict(zip(paths, jax.tree_util.tree_leaves(params), strict=True))


def _checked_epsilon(epsilon: Any) -> float:
    """Refuses an epsilon that is no number between 0 and 1."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real):
        kind = type(epsilon).__name__
        raise TypeError(f"epsilon is {epsilon!r:.80}, of type {kind}; give the network's, a number")
    if not 0 < float(epsilon) < 1:
        raise ValueError(f"epsilon is {epsilon}; give the network's, above 0 and below 1")
    return float(epsilon)


def _checked_layers(params: PyTree, layers: Sequence[BatchNorm] | None) -> tuple[BatchNorm, ...]:
    """Checks the leaves of layers, which are found if they are not given.

    Args:
        params: The parameters.
        layers: The layers that were given.

    Returns:
        The layers.

    Raises:
        ValueError: If there are none, or for leaves that do not fit, listing each.
    """
    require_alike([params], names=["params"])
    if layers is not None and not isinstance(layers, Sequence):
        raise TypeError(
            f"layers is {layers!r}; pass a list of BatchNorm(mean=..., var=..., scale=..., "
            "bias=...), and epsilon by its name"
        )
    values = _by_path(params)
    checked = tuple(_found_layers(params) if layers is None else layers)
    if not checked:
        raise ValueError(
            "no layer of batch normalisation with a scale and a bias was found; name the leaves, "
            "layers=[BatchNorm(mean=..., var=..., scale=..., bias=...)]"
        )
    wrong = []
    for layer in checked:
        paths = dataclasses.astuple(layer)
        sizes = {math.prod(jnp.shape(values[path])) for path in paths if path in values}
        for path in paths:
            if path not in values:
                wrong.append(f"  {path}: not there")
            elif not jnp.issubdtype(jnp.result_type(values[path]), jnp.floating):
                wrong.append(f"  {path}: no floating-point numbers")
            elif len(sizes) > 1:
                wrong.append(f"  {path}: shape {jnp.shape(values[path])}, not as the others")
        var = values.get(layer.var)
        if var is not None and not isinstance(var, Tracer) and np.any(np.asarray(var) < 0):
            wrong.append(f"  {layer.var}: a variance below 0")
    if wrong:
        raise ValueError("these are not the leaves of a batch normalisation:\n" + "\n".join(wrong))
    return checked


def _found_layers(params: PyTree) -> list[BatchNorm]:
    """Finds the layers whose statistics, scale and bias have names that frameworks give."""
    paths = {leaf.path for leaf in leaves_of(params)}
    statistics = running_statistics(params)
    found = []
    for var, mean in statistics.items():
        if var == mean:
            continue
        for scale, bias in _beside(mean):
            if scale in paths and bias in paths:
                found.append(BatchNorm(mean, var, scale, bias))
                break
    return found


def _beside(mean: str) -> list[tuple[str, str]]:
    """Returns the key paths that the scale and the bias of a layer may have.

    Args:
        mean: The key path of its running mean.

    Returns:
        Pairs of key paths, of which one at most is there.
    """
    beside = []
    separator = separator_of(mean)
    for in_front, name, behind in _splits(mean, separator):
        if name == "mean":
            # Linen has two collections, NNX all in one module.
            learned = in_front.replace(f"batch_stats{separator}", f"params{separator}", 1)
            beside.append((f"{learned}scale{behind}", f"{learned}bias{behind}"))
        elif name == "running_mean":
            beside.append((f"{in_front}weight{behind}", f"{in_front}bias{behind}"))
        elif name == "mean_ema":
            # Haiku's two trees lie beside each other, under names that the caller gives.
            module = in_front.removesuffix("/~/").partition("/")[2]
            for tree in ("params", "0"):
                beside.append((f"{tree}/{module}/scale", f"{tree}/{module}/offset"))
    return beside


def _splits(path: str, separator: str) -> list[tuple[str, str, str]]:
    """Returns what is before, at and behind each of the last two steps of a key path."""
    parts = path.split(separator)
    splits = []
    for at in range(max(0, len(parts) - 2), len(parts)):
        in_front = "".join(f"{part}{separator}" for part in parts[:at])
        behind = "".join(f"{separator}{part}" for part in parts[at + 1 :])
        splits.append((in_front, parts[at], behind))
    return splits
