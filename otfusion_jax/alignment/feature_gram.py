"""Inner products of activations, to match units by what they compute instead of by their weights.

Both models are run on the same batches of inputs. Of a unit's activations nothing is kept but the
sums that a `Gram` needs, so memory does not grow with the number of samples.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from otfusion_jax.alignment.costs import Gram, all_products, as_real, unit_gram
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.canonical import require_canonical
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.correspondence import match_groups, target_names
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import (
    At,
    batches_of,
    features,
    refuse_inputs_of_one_batch,
)


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

    Returns:
        The inner products by the names of groups, ready for `align(..., grams=...)`. Signed groups
        are left out if it is not known whether what is read changes its sign with the units: the
        preactivations of an LSTM, some of which belong to gates.

    Raises:
        ValueError: If there are no batches, if the networks differ in more than widths, or if
            `features` raises it.
        TypeError: If the batches are a single array, a dict, or a tuple of arrays, which may be one
            batch of several inputs; or if `features` raises it.
    """
    call = "feature_gram(symmetry, fn, source, target, batches)"
    require_symmetry(symmetry, call)
    if onto is None:
        onto = symmetry
    require_symmetry(onto, call)
    refuse_inputs_of_one_batch(batches)
    # What comes after a scale is other features than those that are to be rotated.
    require_canonical(symmetry, source, "the source")
    require_canonical(onto, target, "the target")
    name_in_target = target_names(match_groups(symmetry, onto), onto)
    target_fn = fn if target_fn is None else target_fn
    left_out = _of_unknown_signs(symmetry, at)
    # Sums over batches: none is kept, and they may come from a generator.
    totals: dict[str, _Sums] = {}
    for batch in batches_of(batches):
        source_features = features(symmetry, fn, source, *batch, at=at)
        target_features = features(onto, target_fn, target, *batch, at=at)
        for group in symmetry.groups:
            if group.name in left_out:
                continue
            # Features are [*batch, samples, units]; a unit is a vector of samples.
            source_units = jnp.swapaxes(source_features[group.name], -1, -2)
            target_units = jnp.swapaxes(target_features[name_in_target[group.name]], -1, -2)
            sums = _Sums(
                unit_gram(source_units, target_units, group, intra),
                as_real(source_units).sum(-1),
                as_real(target_units).sum(-1),
                source_units.shape[-1],
            )
            if group.name in totals:
                sums = jax.tree.map(jnp.add, totals[group.name], sums)
            totals[group.name] = sums
    grams = {}
    # Means are known only after the last batch, so that they are subtracted from the sums.
    for name, sums in totals.items():
        gram = _centered(sums) if center else sums.gram
        grams[name] = gram.told_apart(odd=True) if symmetry[name].signed else gram
    return grams


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
    # What is nested is compared together with what is around it.
    roots = {symmetry[name].outer or name for name in unknown}
    for group in symmetry.groups:
        if group.outer in roots or group.name in roots:
            unknown.add(group.name)
    return unknown


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """What is summed up over the samples, for one group.

    Attributes:
        gram: The inner products.
        source_sum: The sum of each of the source's units over the samples.
        target_sum: The sum of each of the target's units over the samples.
        count: The number of samples.
    """

    gram: Gram
    source_sum: Array
    target_sum: Array
    count: Any


def _centered(sums: _Sums) -> Gram:
    """Returns the inner products of activations less their means: Σxy - (Σx)(Σy) / count."""
    gram, a, b = sums.gram, sums.source_sum, sums.target_sum
    count = jnp.maximum(jnp.asarray(sums.count, gram.cross.dtype), 1)
    intra = gram.intra
    if intra is not None:
        intra = intra[0] - all_products(a) / count, intra[1] - all_products(b) / count
    # Rounding must not make squared norms negative.
    return Gram(
        jnp.maximum(gram.source_sq_norms - a * a / count, 0),
        jnp.maximum(gram.target_sq_norms - b * b / count, 0),
        gram.cross - gram.pairwise(a, b) / count,
        intra,
    )
