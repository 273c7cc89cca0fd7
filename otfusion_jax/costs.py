"""Ground costs between the units of two models, from their weights or from their features.

A unit is a vector: its weights in some members of its group, or its activations on some samples.
Every ground metric in use depends on two such vectors by their inner products alone, so these are
accumulated, over members or over batches, and memory is n·m however long the vectors are.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, PyTree
from ott.geometry import costs

from otfusion_jax.checks import require_symmetry
from otfusion_jax.features import At, batches_of, features
from otfusion_jax.symmetry import Group, Symmetry
from otfusion_jax.widths import matched, names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
    """Inner products of the units of two models; sums over members and batches add up.

    Attributes:
        aa: squared norms of the source's units, float `[*batch, n]`.
        bb: squared norms of the target's units, float `[*batch, m]`.
        ab: inner products, float `[*batch, n, m]`. For a group inside of another that can be
            permuted, the units of all indices of that one are compared with each other:
            `[*batch, heads, n, heads of the target, m]`.
        within: inner products among the source's units and among the target's, float
            `[*batch, n, n]` and `[*batch, m, m]`, for quadratic solvers; None if nobody asked.
    """

    aa: Float[Array, "*batch n"]
    bb: Float[Array, "*others m"]
    ab: Float[Array, "*pairs m"]
    within: tuple[Float[Array, "*batch n n"], Float[Array, "*others m m"]] | None = None

    def __add__(self, other: "Gram") -> "Gram":
        return jax.tree.map(jnp.add, self, other)

    def outer(self, a: Array, b: Array) -> Array:
        """Multiplies a number of each unit of the source with one of each unit of the target.

        Args:
            a: of the shape of `aa`.
            b: of the shape of `bb`.

        Returns:
            Products, of the shape of `ab`.
        """
        # A unit of a group inside of another has two indices, any other has one.
        axes = self.ab.ndim - a.ndim
        return jnp.expand_dims(a, range(-axes, 0)) * jnp.expand_dims(b, range(-2 * axes, -axes))

    def normalised(self) -> "Gram":
        """Returns the inner products of units scaled to norm 1; units that are 0 stay so."""
        a, b = (jax.lax.rsqrt(jnp.where(x > 0, x, 1)) for x in (self.aa, self.bb))
        within = self.within
        if within is not None:
            within = within[0] * _square(a), within[1] * _square(b)
        return Gram(self.aa * a * a, self.bb * b * b, self.ab * self.outer(a, b), within)


def gram(
    a: Inexact[Array, "*batch n d"], b: Inexact[Array, "*batch m d"], within: bool = False
) -> Gram:
    """Takes the inner products of two sets of vectors.

    Args:
        a: vectors of the source, one per row.
        b: vectors of the target.
        within: whether to take those within each set as well.

    Returns:
        Their inner products, float32 or float64, whatever the dtype of the vectors. Complex
        vectors count as real ones of twice the length.
    """
    a, b = _real(a), _real(b)

    def products(x: Array, y: Array) -> Array:
        return jnp.matmul(x, jnp.swapaxes(y, -1, -2), precision=jax.lax.Precision.HIGHEST)

    inside = (products(a, a), products(b, b)) if within else None
    return Gram(jnp.sum(a * a, -1), jnp.sum(b * b, -1), products(a, b), inside)


def squared_norm(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """Takes the squared norm of an array.

    Args:
        x: of any shape, real or complex.

    Returns:
        The sum of squares, float32, or float64 where `x` has that precision.
    """
    x = jnp.abs(x)
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jnp.sum(wide * wide)


def _real(x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return jnp.concatenate([x.real, x.imag], axis=-1)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _square(x: Array) -> Array:
    return x[..., :, None] * x[..., None, :]


def _squared(g: Gram) -> Array:
    return jnp.maximum(g.aa[..., :, None] + g.bb[..., None, :] - 2 * g.ab, 0)


def _cosine(g: Gram) -> Array:
    norms = jnp.sqrt(g.aa)[..., :, None] * jnp.sqrt(g.bb)[..., None, :]
    return 1 - g.ab / jnp.where(norms > 0, norms, 1)


# The metrics that can be told from inner products, by the class of the ott cost function.
METRICS: dict[type[costs.CostFn], Callable[[Gram], Array]] = {
    costs.SqEuclidean: _squared,
    costs.Euclidean: lambda g: jnp.sqrt(_squared(g)),
    costs.Cosine: _cosine,
    costs.NegDotProduct: lambda g: -g.ab,
}


# The power of the unit of length that each of these is in.
DEGREES: dict[type[costs.CostFn], int] = {
    costs.SqEuclidean: 2,
    costs.Euclidean: 1,
    costs.Cosine: 0,
    costs.NegDotProduct: 2,
}


def ground_cost(metric: costs.CostFn, g: Gram) -> Float[Array, "*batch n m"]:
    """Evaluates a ground metric between all pairs of units.

    Args:
        metric: an ott cost function: `SqEuclidean()`, `Euclidean()`, `Cosine()` or
            `NegDotProduct()`, as in `ott.geometry.costs`.
        g: inner products of the units.

    Returns:
        `cost[i, j]` between unit `i` of the source and unit `j` of the target.

    Raises:
        ValueError: for another metric.
    """
    if type(metric) not in METRICS:
        names = ", ".join(kind.__name__ for kind in METRICS)
        raise ValueError(
            f"the ground metric {type(metric).__name__} is not a function of inner products, and "
            f"the vectors of units are never held at once; use one of {names} of "
            "ott.geometry.costs, or solve a cost of your own with otfusion_jax.Exact().solve"
        )
    return METRICS[type(metric)](g)


def costs_within(
    cost_of: Callable[[Gram], Array], g: Gram
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*others m m"]] | None:
    """Evaluates a ground metric between the units of each model.

    Args:
        cost_of: the ground cost between all pairs of units, of their inner products.
        g: inner products of the units.

    Returns:
        The costs within the source and within the target; None if `g` has no such inner products.
    """
    if g.within is None:
        return None
    a, b = (
        cost_of(Gram(norms, norms, inside))
        for norms, inside in zip((g.aa, g.bb), g.within, strict=True)
    )
    return a, b


def unit_gram(
    a: Inexact[Array, "*batch n d"],
    b: Inexact[Array, "*others m d"],
    group: Group,
    within: bool = False,
) -> Gram:
    """Takes the inner products of the units of a group, across the group around it if there is one.

    Args:
        a: units of the source, `[*batch, n, d]`.
        b: units of the target, `[*batch, m, d]`; the number of what is around them may be another.
        group: the group.
        within: whether to take those within each model as well.

    Returns:
        The inner products, see `Gram`.
    """
    if group.outer is None:
        return gram(a, b, within)
    *batch, h, n, width = a.shape
    g, m = b.shape[-3:-1]
    found = gram(a.reshape(*batch, h * n, width), b.reshape(*batch, g * m, width))
    aa, bb = found.aa.reshape(*batch, h, n), found.bb.reshape(*batch, g, m)
    inside = (gram(a, a).ab, gram(b, b).ab) if within else None
    return Gram(aa, bb, found.ab.reshape(*batch, h, n, g, m), inside)


def feature_gram(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    source: PyTree,
    target: PyTree,
    batches: Iterable[Any],
    *,
    onto: Symmetry | None = None,
    target_fn: Callable[..., Any] | None = None,
    at: At = "produced",
    center: bool = False,
    within: bool = False,
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
        within: whether to take the inner products within each model as well, which quadratic
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
    named = names(matched(symmetry, onto), onto)
    target_fn = fn if target_fn is None else target_fn
    for batch in batches_of(batches):
        found = {}
        a = features(symmetry, fn, source, *batch, at=at)
        b = features(onto, target_fn, target, *batch, at=at)
        for group in symmetry.groups:
            pair = a[group.name], b[named[group.name]]
            x, y = (jnp.swapaxes(found, -1, -2) for found in pair)
            sums = _real(x).sum(-1), _real(y).sum(-1)
            found[group.name] = (unit_gram(x, y, group, within), *sums, x.shape[-1])
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None
    return {name: _centered(*sums) if center else sums[0] for name, sums in total.items()}


def _centered(g: Gram, a: Array, b: Array, count: Any) -> Gram:
    count = jnp.maximum(jnp.asarray(count, g.ab.dtype), 1)
    within = g.within
    if within is not None:
        within = within[0] - _square(a) / count, within[1] - _square(b) / count
    return Gram(
        jnp.maximum(g.aa - a * a / count, 0),
        jnp.maximum(g.bb - b * b / count, 0),
        g.ab - g.outer(a, b) / count,
        within,
    )
