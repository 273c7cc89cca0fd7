"""Running statistics of batch normalisation: which leaves they are, and a warning of their average.

A model that is an average has other activations than the models, so that the average of their
means and variances is not what its own units have. No framework is imported: statistics are known
by the names that frameworks give them, and those of Equinox, which have no names, by the class of
the node that they are in.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.common.warning import warn_user
from otfusion_jax.symmetry.groups import Leaf, leaves_of


class StatisticsWarning(UserWarning):
    """Running statistics were averaged, and those of the average have to be estimated anew."""


# The name of a mean, and that of the variance beside it. The last two of a path count: Haiku's
# statistics are called `batch_norm/~/mean_ema/average`.
_NAMES = (
    (("mean",), ("var",)),
    (("running_mean",), ("running_var",)),
    (("moving_mean",), ("moving_variance",)),
    (("mean_ema", "average"), ("var_ema", "average")),
)
# NNX has the value of a variable one step further down.
_WRAPPERS = ("value", "raw_value")


def running_statistics(params: PyTree) -> dict[str, str]:
    """Finds the leaves that look like running means and variances.

    What looks so is a mean and a variance of one floating-point dtype and one shape beside each
    other, called `mean` and `var` (Linen, NNX; not inside of `params`, where Linen has what is
    learned), `running_mean` and `running_var`, `moving_mean` and `moving_variance` (Keras), or
    `mean_ema/average` and `var_ema/average` (Haiku). The names of a state dict of PyTorch are one
    key each: `bn1.running_mean`. In a `State` of Equinox it is a pair of arrays of one shape.

    Args:
        params: A pytree of arrays, `jax.ShapeDtypeStruct`s or Python numbers.

    Returns:
        By the key path of a statistic that of the mean that belongs to it, which for a mean is its
        own. Empty where nothing looks like a statistic.

    Raises:
        ValueError: If some leaves are not arrays, listing every one by key path.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> norm = {"scale": jnp.ones(4), "mean": jnp.zeros(4), "var": jnp.ones(4)}
        >>> otf.running_statistics({"norm": norm})
        {'norm/mean': 'norm/mean', 'norm/var': 'norm/mean'}
    """
    leaves = {leaf.path: leaf for leaf in leaves_of(params)}
    candidates = {}
    for path in leaves:
        variance = _variance_beside(path)
        if variance is not None:
            candidates[path] = variance
    candidates |= _pairs_in_equinox_states(params)
    found = {}
    for mean, variance in candidates.items():
        if variance in leaves and _alike(leaves[mean], leaves[variance]):
            found[mean] = mean
            found[variance] = mean
    # In the order of the leaves, which is that of the frameworks' own listings.
    return {path: found[path] for path in leaves if path in found}


def _variance_beside(path: str) -> str | None:
    """Returns the key path that the variance of a mean would have; None for what is no mean."""
    separator = separator_of(path)
    parts = path.split(separator)
    wrapper = parts[-1:] if parts[-1] in _WRAPPERS else []
    parts = parts[: len(parts) - len(wrapper)]
    for mean, variance in _NAMES:
        if tuple(parts[-len(mean) :]) != mean:
            continue
        # What is learned is no statistic, whatever it is called.
        if re.match(r"params[/.]", path) and mean == ("mean",):
            continue
        return separator.join([*parts[: -len(mean)], *variance, *wrapper])
    return None


def separator_of(path: str) -> str:
    """Says what stands between a module and the name of its statistic.

    Args:
        path: The key path of a leaf.

    Returns:
        A point if the last key has one, as all of `layer1.0.bn1.running_mean` is one key of a state
        dict of PyTorch; otherwise a slash.
    """
    return "." if "." in path.rpartition("/")[2] else "/"


@dataclasses.dataclass(frozen=True)
class AllBut:
    """Counts all parameters alike, but some not at all.

    Attributes:
        paths: The key paths of the latter.
    """

    paths: frozenset[str]

    def __call__(self, path: str) -> float:
        """Returns how much a parameter counts."""
        return 0.0 if path in self.paths else 1.0


def _alike(mean: Leaf, variance: Leaf) -> bool:
    same = mean.shape == variance.shape and mean.dtype == variance.dtype
    return same and mean.moves


def _pairs_in_equinox_states(params: PyTree) -> dict[str, str]:
    """Returns the key paths of means and their variances in the states of Equinox."""
    # A state of that library can only be here if it has been imported.
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return {}

    def is_state(node: Any) -> bool:
        return isinstance(node, equinox.nn.State)

    pairs = {}
    for path, node in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_state)[0]:
        if not is_state(node):
            continue
        in_front = jax.tree_util.keystr(path, simple=True, separator="/")
        below: dict[str, list[str]] = {}
        for leaf in leaves_of(node):
            place = f"{in_front}/{leaf.path}" if in_front else leaf.path
            below.setdefault(place.rpartition("/")[0], []).append(place)
        for paths in below.values():
            # The entries of a state are one beside the other; a pair is an entry of its own.
            if len(paths) == 2 and [x.rpartition("/")[2] for x in paths] == ["0", "1"]:
                if "/" in paths[0][len(in_front) :].strip("/"):
                    pairs[paths[0]] = paths[1]
    return pairs


def warn_of_averaged_statistics(
    models: Sequence[PyTree] | PyTree,
    stacked: bool,
    shares: Sequence[Array],
) -> None:
    """Warns where running statistics that differ between models are averaged.

    Args:
        models: The models, K pytrees, or one pytree with leaves `[K, ...]`.
        stacked: Whether they are one pytree.
        shares: The weights of the models, for each leaf. Where one of them has all of the weight,
            nothing is averaged. Where values or weights are traced there is no warning: nobody
            would see why.
    """
    model = models if stacked else models[0]
    statistics = running_statistics(model)
    if not statistics:
        return
    rows = [jax.tree_util.tree_leaves(x) for x in ([models] if stacked else models)]
    wrong = []
    for number, leaf in enumerate(leaves_of(model)):
        if leaf.path not in statistics or isinstance(shares[number], Tracer):
            continue
        if np.max(np.asarray(shares[number])) == 1:
            continue
        values = rows[0][number] if stacked else [row[number] for row in rows]
        if _differ(values):
            wrong.append(f"  {leaf.path}")
    if wrong:
        warn_user(
            "these leaves look like the running statistics of batch normalisation, and are "
            "averaged. The units of an average have statistics of their own: estimate them from "
            "data by estimate_statistics(update, params, batches), or average networks in which "
            "they are folded away, see fold_batch_norm. Where you do the former, ignore this: "
            "warnings.simplefilter('ignore', otfusion_jax.StatisticsWarning), or keep those of one "
            "model until then by weights, lambda path: (0.0, 1.0) if path in "
            "running_statistics(params) else None:\n" + "\n".join(wrong),
            StatisticsWarning,
        )


def _differ(values: Any) -> bool:
    """Whether the values of a leaf in the models, K arrays or `[K, ...]`, are known to differ."""
    if isinstance(values, Tracer) or any(isinstance(value, Tracer) for value in values):
        return False
    known = [np.asarray(value) for value in values]
    return any(not np.array_equal(known[0], other) for other in known[1:])
