"""How similar two models are, group by group, before their units are matched and after."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from otfusion_jax.alignment.align import align
from otfusion_jax.common.html import html_table
from otfusion_jax.common.known import all_known
from otfusion_jax.common.typing import PyTree
from otfusion_jax.evaluation.distance import distances
from otfusion_jax.evaluation.moments import Moments, joined, moments
from otfusion_jax.symmetry.canonical import require_canonical
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.correspondence import match_groups, target_names
from otfusion_jax.symmetry.folding import Row, aligned
from otfusion_jax.symmetry.groups import Group, Plans
from otfusion_jax.symmetry.plans import HasPlans
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport
from otfusion_jax.tracing.activations import (
    At,
    batches_of,
    features,
    refuse_inputs_of_one_batch,
)

_CALL = "similarity(symmetry, fn, source, target, batches)"


@dataclasses.dataclass(frozen=True, eq=False)
class GroupSimilarity:
    """How similar the units of one group are in two models.

    The units of a group inside of another (the dimensions of heads) are taken together, those of
    all heads one after the other: n and m count them all.

    Attributes:
        samples: How many samples of each unit there were.
        cka: The linear CKA of all units of the source with all of the target, float `[*batch]`,
            from 0 to 1, see `linear_cka`. The order of units does not matter to it, nor do
            rotations. NaN where the units of one of the two do not vary.
        before: The correlation of each unit of the source with each of the target, float
            `[*batch, n, m]`. NaN where one of the two does not vary.
        after: The same of the source as it was moved, float `[*batch, m, m]`.
        distance_before: How far the parameters with an axis of the group are from the target's: the
            norm of the difference over that of the target's. NaN if the widths differ.
        distance_after: The same of the source as it was moved.
    """

    samples: int
    cka: Float[Array, "*batch"]
    before: Float[Array, "*batch n m"]
    after: Float[Array, "*batch m m"]
    distance_before: float
    distance_after: float

    @property
    def matched_before(self) -> float:
        """The mean correlation of the units at the same position; NaN if the widths differ."""
        return _mean_of_diagonal(self.before)

    @property
    def matched_after(self) -> float:
        """The mean correlation of the units at the same position, once the source was moved."""
        return _mean_of_diagonal(self.after)


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """How similar two models are; `print` shows a table, and `plot_similarity` the correlations.

    Attributes:
        groups: What is known of each group, by its name. Groups that no input reaches are left out.
        distance_before: The distance of all parameters from the target's, over the norm of these.
            NaN if the widths differ.
        distance_after: The same of the source as it was moved. Its minimum over all plans is the
            distance of the two models up to their symmetry, which alignment bounds from above.
    """

    groups: Mapping[str, GroupSimilarity]
    distance_before: float
    distance_after: float

    def __str__(self) -> str:
        return "\n".join(aligned([_COLUMNS, *self._rows()]))

    def _repr_html_(self) -> str:
        """Shows the table in a notebook."""
        return html_table(_COLUMNS, self._rows(), caption="Similarity, before → after alignment")

    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        for name, group in self.groups.items():
            rows.append(
                (
                    name,
                    f"{group.samples:,}",
                    _number(float(jnp.mean(group.cka))),
                    _change(group.matched_before, group.matched_after),
                    _change(group.distance_before, group.distance_after),
                )
            )
        rows.append(("all", "", "", "", _change(self.distance_before, self.distance_after)))
        return rows


_COLUMNS = ("group", "samples", "CKA", "correlation", "distance")


def similarity(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    source: PyTree,
    target: PyTree,
    batches: Iterable[Any],
    *,
    plans: Plans | HasPlans | None = None,
    onto: Symmetry | None = None,
    target_fn: Callable[..., Any] | None = None,
    at: At = "activation",
) -> Similarity:
    """Measures how similar two models are, before their units are matched and after.

    Of the activations: linear CKA, which does not depend on how units are matched (Kornblith et
    al., Similarity of Neural Network Representations Revisited, ICML 2019), and the correlation of
    units at the same position (Li et al., Convergent Learning, ICLR 2016). Of the parameters: the
    distance, as Singh and Jaggi (NeurIPS 2020) and Ainsworth et al. (Git Re-Basin, ICLR 2023)
    minimise it over permutations. All of them are those of all samples together: they do not depend
    on how these fall into batches.

    Three networks run on every batch: the source as it is, the source moved along the plans, and
    the target. What is kept of the batches are means and inner products of units, quadratic in the
    number of units of a group whatever the number of batches.

    Args:
        symmetry: The symmetry of the function.
        fn: The function that was traced.
        source: The parameters of the source model.
        target: The parameters of the target model.
        batches: A list or a generator of batches: arrays, or tuples or lists of them for functions
            of several inputs. It is gone through once.
        plans: How the source's units are matched with the target's, as `align` returns it. None
            aligns by weights.
        onto: The symmetry of the target, if its widths are others than the source's.
        target_fn: The function of the target, if it is another than the source's.
        at: Where activations are read: `"activation"`, after the nonlinearity, or
            `"preactivation"`, see `features`.

    Returns:
        What was measured of each group, and of the whole.

    Raises:
        ValueError: If there are no batches, if the networks differ in more than widths, and as
            `features`, `align` and `transport` raise it.
        TypeError: If it is called inside of `jax.jit`, if the batches are a single array, a dict,
            or a tuple of arrays, which may be one batch of several inputs, and as the others.
    """
    require_symmetry(symmetry, _CALL)
    onto = symmetry if onto is None else onto
    require_symmetry(onto, _CALL)
    refuse_inputs_of_one_batch(batches)
    if not all_known(source, target):
        raise TypeError(
            "similarity was called inside of jax.jit or another transformation; call it outside: "
            "it jits what it computes"
        )
    if plans is None:
        plans = align(symmetry, source, target, onto=onto)
    # What comes after a scale is other features than those that are to be rotated.
    require_canonical(onto, target, "the target")
    moved = transport(symmetry, plans, source, onto=onto)
    matched = match_groups(symmetry, onto)
    name_in_target = target_names(matched, onto)
    target_fn = fn if target_fn is None else target_fn
    # No batch is kept, so that they may come from a generator.
    totals: dict[str, _Pair] = {}
    for batch in batches_of(batches):
        # The moved model is run as well: how activations move with soft plans, signs or rotations
        # need not be known, and what transport makes of the model is what is measured.
        of_source = features(symmetry, fn, source, *batch, at=at)
        of_moved = features(onto, target_fn, moved, *batch, at=at)
        of_target = features(onto, target_fn, target, *batch, at=at)
        for group in symmetry.groups:
            name = name_in_target[group.name]
            target_units = _units(of_target[name], group)
            if not target_units.shape[-1]:
                continue  # no input reaches the group
            pair = _Pair(
                moments(_units(of_source[group.name], group), target_units, intra=True),
                moments(_units(of_moved[name], group), target_units, intra=False),
            )
            if group.name in totals:
                pair = totals[group.name].joined(pair)
            totals[group.name] = pair
    before = distances(matched, source, target)
    after = distances(matched, moved, target)
    groups = {}
    for name, pair in totals.items():
        groups[name] = GroupSimilarity(
            samples=int(pair.before.count),
            cka=pair.before.linear_cka(),
            before=pair.before.correlations(),
            after=pair.after.correlations(),
            distance_before=before.groups[name],
            distance_after=after.groups[name],
        )
    return Similarity(groups, before.whole, after.whole)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The moments of source and target, and of the moved source and the target."""

    before: Moments
    after: Moments

    def joined(self, other: "_Pair") -> "_Pair":
        """Puts two sets of samples together."""
        return _Pair(joined(self.before, other.before), joined(self.after, other.after))


def _units(activations: Array, group: Group) -> Array:
    """Returns the units of a group `[*batch, n, samples]`, of all heads one after the other."""
    units = jnp.swapaxes(activations, -1, -2)
    if group.outer is None:
        return units
    # A dimension of one head may correspond to one of any other: all are compared with all.
    *batch, heads, n, samples = units.shape
    return units.reshape(*batch, heads * n, samples)


def _mean_of_diagonal(correlations: Array) -> float:
    """Returns the mean correlation of units at the same position, of those that vary."""
    n, m = correlations.shape[-2:]
    matched = np.diagonal(np.asarray(correlations, np.float64), axis1=-2, axis2=-1)
    # Between other widths no position is that of the same unit.
    if n != m or np.all(np.isnan(matched)):
        return float("nan")
    return float(np.nanmean(matched))


def _change(before: float, after: float) -> str:
    return f"{_number(before)} → {_number(after)}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
