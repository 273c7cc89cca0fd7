"""Ground costs between the units of two models, from their weights or from their features.

A unit is a vector: its weights in some members of its group, or its activations on some samples.
Every ground metric in use depends on two such vectors by their inner products alone, so these are
accumulated, over members or over batches, and memory is n·m however long the vectors are.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact
from ott.geometry import costs

from otfusion_jax.symmetry.groups import Group

Masses = tuple[Array | None, Array | None]
"""Of the units of the source and of the target, float `[*batch, n]` and `[*batch, m]`."""


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
        intra: inner products among the source's units and among the target's, float
            `[*batch, n, n]` and `[*batch, m, m]`, for quadratic solvers; None if nobody asked.
    """

    source_sq_norms: Float[Array, "*batch n"]
    target_sq_norms: Float[Array, "*others m"]
    cross: Float[Array, "*pairs m"]
    intra: tuple[Float[Array, "*batch n n"], Float[Array, "*others m m"]] | None = None

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
        axes = self.cross.ndim - a.ndim
        return jnp.expand_dims(a, range(-axes, 0)) * jnp.expand_dims(b, range(-2 * axes, -axes))

    def normalised(self) -> "Gram":
        """Returns the inner products of units scaled to norm 1; units that are 0 stay so."""
        a, b = (
            jax.lax.rsqrt(jnp.where(x > 0, x, 1))
            for x in (self.source_sq_norms, self.target_sq_norms)
        )
        intra = self.intra
        if intra is not None:
            intra = intra[0] * outer_square(a), intra[1] * outer_square(b)
        return Gram(
            self.source_sq_norms * a * a,
            self.target_sq_norms * b * b,
            self.cross * self.outer(a, b),
            intra,
        )


def gram(
    a: Inexact[Array, "*batch n d"], b: Inexact[Array, "*batch m d"], intra: bool = False
) -> Gram:
    """Takes the inner products of two sets of vectors.

    Args:
        a: vectors of the source, one per row.
        b: vectors of the target.
        intra: whether to take those within each set as well.

    Returns:
        Their inner products, float32 or float64, whatever the dtype of the vectors. Complex
        vectors count as real ones of twice the length.
    """
    a, b = as_real(a), as_real(b)

    def products(x: Array, y: Array) -> Array:
        return jnp.matmul(x, jnp.swapaxes(y, -1, -2), precision=jax.lax.Precision.HIGHEST)

    inside = (products(a, a), products(b, b)) if intra else None
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


def as_real(x: Array) -> Array:
    """Returns complex vectors as real ones of twice the length, in float32 or float64."""
    if jnp.iscomplexobj(x):
        return jnp.concatenate([x.real, x.imag], axis=-1)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def outer_square(x: Array) -> Array:
    """Returns the products of all pairs of entries, `[*batch, n, n]` from `[*batch, n]`."""
    return x[..., :, None] * x[..., None, :]


def _squared(g: Gram) -> Array:
    return jnp.maximum(
        g.source_sq_norms[..., :, None] + g.target_sq_norms[..., None, :] - 2 * g.cross, 0
    )


def _cosine(g: Gram) -> Array:
    norms = jnp.sqrt(g.source_sq_norms)[..., :, None] * jnp.sqrt(g.target_sq_norms)[..., None, :]
    return 1 - g.cross / jnp.where(norms > 0, norms, 1)


# The metrics that can be told from inner products, by the class of the ott cost function.
METRICS: dict[type[costs.CostFn], Callable[[Gram], Array]] = {
    costs.SqEuclidean: _squared,
    costs.Euclidean: lambda g: jnp.sqrt(_squared(g)),
    costs.Cosine: _cosine,
    costs.NegDotProduct: lambda g: -g.cross,
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


def intra_costs(
    cost_of: Callable[[Gram], Array], g: Gram
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*others m m"]] | None:
    """Evaluates a ground metric between the units of each model.

    Args:
        cost_of: the ground cost between all pairs of units, of their inner products.
        g: inner products of the units.

    Returns:
        The costs within the source and within the target; None if `g` has no such inner products.
    """
    if g.intra is None:
        return None
    a, b = (
        cost_of(Gram(norms, norms, inside))
        for norms, inside in zip((g.source_sq_norms, g.target_sq_norms), g.intra, strict=True)
    )
    return a, b


def unit_gram(
    a: Inexact[Array, "*batch n d"],
    b: Inexact[Array, "*others m d"],
    group: Group,
    intra: bool = False,
) -> Gram:
    """Takes the inner products of the units of a group, across the group around it if there is one.

    Args:
        a: units of the source, `[*batch, n, d]`.
        b: units of the target, `[*batch, m, d]`; the number of what is around them may be another.
        group: the group.
        intra: whether to take those within each model as well.

    Returns:
        The inner products, see `Gram`.
    """
    if group.outer is None:
        return gram(a, b, intra)
    *batch, h, n, width = a.shape
    g, m = b.shape[-3:-1]
    found = gram(a.reshape(*batch, h * n, width), b.reshape(*batch, g * m, width))
    source_sq_norms, target_sq_norms = (
        found.source_sq_norms.reshape(*batch, h, n),
        found.target_sq_norms.reshape(*batch, g, m),
    )
    inside = (gram(a, a).cross, gram(b, b).cross) if intra else None
    return Gram(source_sq_norms, target_sq_norms, found.cross.reshape(*batch, h, n, g, m), inside)
