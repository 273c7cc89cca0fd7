"""Ground costs between the units of two models, from their weights or from their features.

A unit is a vector: its weights in some members of its group, or its activations on some samples.
Every ground metric in use depends on two such vectors by their inner products alone, so these are
accumulated, over members or over batches, and memory is n·m however long the vectors are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from otfusion_jax.alignment.costs import Gram, as_real, outer_square, unit_gram
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.correspondence import match_groups, names
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import At, batches_of, features


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
        symmetry: of this function.
        fn: the function that was traced.
        source: parameters of the source model.
        target: parameters of the target model.
        batches: arrays, or tuples of arrays for functions of several inputs. Memory does not grow
            with their number.
        onto: symmetry of the target, if its widths are others than the source's.
        target_fn: the function of the target, if it is another.
        at: where features are read, see `features`.
        center: whether to subtract from each unit its mean over the samples, which makes
            covariances of the inner products.
        intra: whether to take the inner products within each model as well, which quadratic
            solvers (`GromovWasserstein`) need.

    Returns:
        For each group the inner products, ready for `align(..., features=...)`.

    Raises:
        ValueError: if there are no batches, if the networks differ in more than widths, or
            `features` raises it.
        TypeError: for batches that are a single array or a dict, or as `features`.
    """
    total = None
    onto = symmetry if onto is None else onto
    for given in (symmetry, onto):
        require_symmetry(given, "feature_gram(symmetry, fn, source, target, batches)")
    named = names(match_groups(symmetry, onto), onto)
    target_fn = fn if target_fn is None else target_fn
    for batch in batches_of(batches):
        found = {}
        a = features(symmetry, fn, source, *batch, at=at)
        b = features(onto, target_fn, target, *batch, at=at)
        for group in symmetry.groups:
            pair = a[group.name], b[named[group.name]]
            x, y = (jnp.swapaxes(found, -1, -2) for found in pair)
            sums = as_real(x).sum(-1), as_real(y).sum(-1)
            found[group.name] = (unit_gram(x, y, group, intra), *sums, x.shape[-1])
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None
    return {name: _centered(*sums) if center else sums[0] for name, sums in total.items()}


def _centered(g: Gram, a: Array, b: Array, count: Any) -> Gram:
    count = jnp.maximum(jnp.asarray(count, g.cross.dtype), 1)
    intra = g.intra
    if intra is not None:
        intra = intra[0] - outer_square(a) / count, intra[1] - outer_square(b) / count
    return Gram(
        jnp.maximum(g.source_sq_norms - a * a / count, 0),
        jnp.maximum(g.target_sq_norms - b * b / count, 0),
        g.cross - g.outer(a, b) / count,
        intra,
    )
