"""Inner products of activations, to match units by what they compute instead of by their weights.

Both models are run on the same batches of inputs. Of a unit's activations nothing is kept but the
sums that a `Gram` needs, so memory does not grow with the number of samples. Where values are known
and lie on a CPU, NumPy takes the sums, which differ in shape from group to group: to compile them
would take longer than the models.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from otfusion_jax.alignment.costs import Gram, all_products, as_real, unit_gram
from otfusion_jax.common.arguments import checked_key
from otfusion_jax.common.host import (
    Array,
    accumulation_dtype,
    array_module,
    as_jax,
    as_numpy,
    sums_over_last,
)
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.canonical import require_canonical
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.correspondence import match_groups, target_names
from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import (
    At,
    batches_of,
    features,
    refuse_inputs_of_one_batch,
)
from otfusion_jax.tracing.sensitivities import features_with_sensitivities

_LEAST_COUNT = 1e8
"""By how much the sensitivities of all samples together exceed what is too small to be squared."""


def feature_gram(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    source: PyTree,
    target: PyTree,
    batches: Iterable[Any],
    *,
    onto: Symmetry | None = None,
    target_fn: Callable[..., Any] | None = None,
    at: At = "preactivation",
    center: bool = False,
    intra: bool = False,
    by_sensitivity: bool = False,
    key: Array | None = None,
) -> dict[str, Gram]:
    """Accumulates the inner products of activations over batches of inputs.

    The source is evaluated as it is. So where one axis is a product of two groups and neither is
    nested in the other, the activations of each are compared with the other still in the source's
    order.

    Args:
        symmetry: The symmetry of this function.
        fn: The function that was traced.
        source: The parameters of the source model.
        target: The parameters of the target model.
        batches: A list or a generator of batches: arrays, or tuples or lists of them for functions
            of several inputs. Memory does not grow with their number.
        onto: The symmetry of the target, if its widths are others than the source's.
        target_fn: The function of the target, if it is another than the source's.
        at: Where features are read, see `features`.
        center: Whether to subtract from each unit its mean over the samples, which makes
            covariances of the inner products.
        intra: Whether to take the inner products within each model as well, which quadratic
            solvers (`GromovWasserstein`) need.
        by_sensitivity: Whether a sample (an input at a place: a token, a pixel) counts by how much
            the outputs depend on it, in place of all alike: by the squared norm of their derivative
            by the features there, averaged over both models. What a difference of features changes
            in the outputs is then, to first order and whatever its direction, what is compared; and
            a place that nothing reads does not count. It takes about five times as long.
        key: The source of randomness for derivatives, which are taken of a few random sums of the
            outputs; `jax.random.key(0)` if None. Only by sensitivity is anything drawn.

    Returns:
        The inner products by the names of groups, ready for `align(..., grams=...)`. Signed groups
        are left out if it is not known whether what is read changes its sign with the units: the
        preactivations of an LSTM, some of which belong to gates. By sensitivity, so are groups that
        the outputs do not depend on, at one index of their batch or more, and all that are matched
        together with these. Inside of `jax.jit` values cannot be looked at: there such groups stay,
        with inner products that are 0, and derivatives that are not finite give NaN.

    Raises:
        ValueError: If there are no batches, if the networks differ in more than widths, or if
            `features` raises it; by sensitivity, also if the function can't be derived in reverse
            mode.
        FloatingPointError: If a derivative is not finite, or the squares of all derivatives by a
            group's features are out of range.
        TypeError: If the batches are a single array, a dict, or a tuple of arrays, which may be one
            batch of several inputs; or if `features` raises it.
    """
    call = "feature_gram(symmetry, fn, source, target, batches)"
    require_symmetry(symmetry, call)
    if onto is None:
        onto = symmetry
    require_symmetry(onto, call)
    key = checked_key(key)
    refuse_inputs_of_one_batch(batches)
    # What comes after a scale is other features than those that are to be rotated.
    require_canonical(symmetry, source, "the source")
    require_canonical(onto, target, "the target")
    name_in_target = target_names(match_groups(symmetry, onto), onto)
    target_fn = fn if target_fn is None else target_fn
    left_out = _of_unknown_signs(symmetry, at)
    # Sums over batches: none is kept, and they may come from a generator.
    totals: dict[str, _Sums] = {}
    for number, batch in enumerate(batches_of(batches)):
        if by_sensitivity:
            own_key = jax.random.fold_in(key, number)
            source_read = features_with_sensitivities(symmetry, fn, source, batch, at, own_key)
            target_read = features_with_sensitivities(onto, target_fn, target, batch, at, own_key)
        else:
            source_read = features(symmetry, fn, source, *batch, at=at), None
            target_read = features(onto, target_fn, target, *batch, at=at), None
        source_read, target_read = as_numpy((source_read, target_read))
        for group in symmetry.groups:
            if group.name in left_out:
                continue
            of_source = _read_of(source_read, group.name)
            of_target = _read_of(target_read, name_in_target[group.name])
            _require_as_many_samples(group, of_source[0], of_target[0])
            sums = _sums_of(group, of_source, of_target, intra)
            totals[group.name] = _added(totals[group.name], sums) if group.name in totals else sums
    if by_sensitivity:
        _drop_unread(symmetry, totals)
    grams = {}
    # Means are known only after the last batch, so that they are subtracted from the sums.
    for name, sums in totals.items():
        gram = _centered(sums) if center else sums.gram
        grams[name] = gram.told_apart(odd=True) if symmetry[name].signed else gram
    # In the order of the groups: JAX would sort a dict by names.
    return dict(zip(grams, as_jax(list(grams.values())), strict=True))


def _read_of(
    read: tuple[dict[str, Array], dict[str, Array] | None], name: str
) -> tuple[Array, Array | None]:
    """Returns the units of a group, a vector of samples each, and the sensitivities of samples."""
    activations, sensitivities = read
    # Features are [*batch, samples, units].
    units = activations[name].swapaxes(-1, -2)
    return units, None if sensitivities is None else sensitivities[name]


# What is out of range shows in the result, as it does where JAX computes it.
@np.errstate(all="ignore")
def _sums_of(
    group: Group,
    of_source: tuple[Array, Array | None],
    of_target: tuple[Array, Array | None],
    intra: bool,
) -> "_Sums":
    """Sums up what one batch says about a group, each sample by how much it counts."""
    source_units, source_sensitivities = of_source
    target_units, target_sensitivities = of_target
    xp = array_module(source_units, target_units)
    if source_sensitivities is None or target_sensitivities is None:
        return _Sums(
            unit_gram(source_units, target_units, group, intra),
            sums_over_last(as_real(source_units)),
            sums_over_last(as_real(target_units)),
            xp.asarray(source_units.shape[-1], np.int32),
        )
    if group.outer is not None:
        # Which head is which is not known yet, so that a sample counts alike in all of them.
        source_sensitivities = source_sensitivities.mean(-2, keepdims=True)
        target_sensitivities = target_sensitivities.mean(-2, keepdims=True)
    weights = (source_sensitivities + target_sensitivities) / 2
    # Units are vectors of samples. The square root is for either side of an inner product.
    roots = xp.sqrt(weights)[..., None, :]
    source_units, target_units = _scaled(source_units, roots), _scaled(target_units, roots)
    return _Sums(
        unit_gram(source_units, target_units, group, intra),
        sums_over_last(as_real(_scaled(source_units, roots))),
        sums_over_last(as_real(_scaled(target_units, roots))),
        sums_over_last(weights),
    )


@np.errstate(all="ignore")
def _added(sums: "_Sums", other: "_Sums") -> "_Sums":
    """Adds what two parts of the batches say."""
    return jax.tree.map(operator.add, sums, other)


def _scaled(units: Array, roots: Array) -> Array:
    """Scales the samples of all units; what does not count is 0 even if it is not finite."""
    dtype = accumulation_dtype(units.dtype)
    counted = array_module(units, roots).where(roots > 0, units.astype(dtype), dtype.type(0))
    return counted * roots.astype(dtype)


def _require_as_many_samples(group: Group, source_units: Array, target_units: Array) -> None:
    """Refuses features of two functions that do not belong to the same inputs."""
    n, m = source_units.shape[-1], target_units.shape[-1]
    if n != m:
        raise ValueError(
            f"{group.name}: the source has {n} samples of its features and the target {m}, so that "
            "they can't be compared; give a target_fn that treats the inputs of a batch alike"
        )


def _drop_unread(symmetry: Symmetry, totals: dict[str, "_Sums"]) -> None:
    """Leaves out groups that the outputs do not depend on, with all that are matched with them."""
    unread = set()
    for name, sums in totals.items():
        # Inside of `jax.jit` there are no values to look at.
        if isinstance(sums.count, Tracer):
            continue
        counts = np.asarray(sums.count)
        # Sums of squares that are the smallest number there is, each, tell one sample from another
        # no more.
        is_lost = (counts > 0) & (counts < _LEAST_COUNT * np.finfo(counts.dtype).tiny)
        if is_lost.any() or not np.all(np.isfinite(counts)):
            raise FloatingPointError(
                f"{name}: the derivative of the outputs by its features is not finite, or its "
                "square is out of range; leave by_sensitivity out, or scale the outputs"
            )
        if not np.all(counts > 0):
            unread.add(name)
    for name in _with_trees(symmetry, unread):
        totals.pop(name, None)


def _of_unknown_signs(symmetry: Symmetry, at: At) -> set[str]:
    """Returns the groups whose features may change signs or not, and all matched with these.

    A sum over the units has no sign, so that what is contracted with a parameter changes as that
    does; and what a contraction with a parameter puts out changes as the parameter does.
    """
    unknown = set()
    for group in symmetry.groups:
        met = group.having("consumes" if at == "activation" else "produces")
        if group.signed and not (met and all(member.odd for member in met)):
            unknown.add(group.name)
    return _with_trees(symmetry, unknown)


def _with_trees(symmetry: Symmetry, names: set[str]) -> set[str]:
    """Adds what groups are compared together with: what is around them, and nested in that."""
    roots = {symmetry[name].outer or name for name in names}
    together = set()
    for group in symmetry.groups:
        if group.outer in roots or group.name in roots:
            together.add(group.name)
    return together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """What is summed up over the samples, for one group.

    Attributes:
        gram: The inner products.
        source_sum: The sum of each of the source's units over the samples.
        target_sum: The sum of each of the target's units over the samples.
        count: The number of samples, an integer; or the sum of what they count, float `[*batch]`.
            If there is a group around, its axis has size 1 here.
    """

    gram: Gram
    source_sum: Array
    target_sum: Array
    count: Array


def _spread(numbers: Array, units: Array) -> Array:
    """Brings numbers, one for all units or one for each of the batch, in front of units."""
    return array_module(numbers, units).broadcast_to(numbers, units.shape[:-1])[..., None]


@np.errstate(all="ignore")
def _centered(sums: _Sums) -> Gram:
    """Returns the inner products of activations less their means: Σxy - (Σx)(Σy) / count."""
    gram = sums.gram
    xp = array_module(gram.cross)
    count = sums.count.astype(gram.cross.dtype)
    # Without samples there are no means.
    root = xp.sqrt(xp.where(count > 0, count, 1))
    a = sums.source_sum / _spread(root, sums.source_sum)
    b = sums.target_sum / _spread(root, sums.target_sum)
    intra = gram.intra
    if intra is not None:
        intra = intra[0] - all_products(a), intra[1] - all_products(b)
    # Rounding must not make squared norms negative.
    return Gram(
        xp.maximum(gram.source_sq_norms - a * a, 0),
        xp.maximum(gram.target_sq_norms - b * b, 0),
        gram.cross - gram.pairwise(a, b),
        intra,
    )
