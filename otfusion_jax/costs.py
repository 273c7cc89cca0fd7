"""Ground costs between the units of two models, from their weights or from their features.

A unit is a vector: its weights in some members of its group, or its activations on some samples.
Every ground metric in use depends on two such vectors by their inner products alone, so these are
accumulated, over members or over batches, and memory is n·m however long the vectors are.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, PyTree
from ott.geometry import costs

from otfusion_jax.features import At, batches_of, features
from otfusion_jax.symmetry import Member, Symmetry, factored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
    """Inner products of the units of two models; sums over members and batches add up.

    Attributes:
        aa: squared norms of the source's units, float `[n]`.
        bb: squared norms of the target's units, float `[m]`.
        ab: inner products, float `[n, m]`.
    """

    aa: Float[Array, " n"]
    bb: Float[Array, " m"]
    ab: Float[Array, "n m"]

    def __add__(self, other: "Gram") -> "Gram":
        return jax.tree.map(jnp.add, self, other)


def gram(a: Inexact[Array, "n d"], b: Inexact[Array, "m d"]) -> Gram:
    """Takes the inner products of two sets of vectors.

    Args:
        a: vectors of the source, one per row.
        b: vectors of the target.

    Returns:
        Their inner products, float32 or float64, whatever the dtype of the vectors. Complex
        vectors count as real ones of twice the length.
    """
    a, b = _real(a), _real(b)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return Gram(jnp.sum(a * a, axis=1), jnp.sum(b * b, axis=1), product(a, b.T))


def _real(x: Array) -> Array:
    if jnp.iscomplexobj(x):
        return jnp.concatenate([x.real, x.imag], axis=1)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _squared(g: Gram) -> Array:
    return jnp.maximum(g.aa[:, None] + g.bb[None, :] - 2 * g.ab, 0)


def _cosine(g: Gram) -> Array:
    norms = jnp.sqrt(g.aa)[:, None] * jnp.sqrt(g.bb)[None, :]
    return 1 - g.ab / jnp.where(norms > 0, norms, 1)


# The metrics that can be told from inner products, by the class of the ott cost function.
METRICS: dict[type[costs.CostFn], Callable[[Gram], Array]] = {
    costs.SqEuclidean: _squared,
    costs.Euclidean: lambda g: jnp.sqrt(_squared(g)),
    costs.Cosine: _cosine,
    costs.NegDotProduct: lambda g: -g.ab,
}


def ground_cost(metric: costs.CostFn, g: Gram) -> Float[Array, "n m"]:
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


def unit_vectors(leaf: Array, member: Member, size: int) -> Array:
    """Reads the rows of weights that belong to the units of one member.

    Args:
        leaf: the parameter.
        member: which of its axes, and which factor of it.
        size: the number of units.

    Returns:
        `[size, rest]`.
    """
    split = factored(leaf, member.axis, member.before, size, member.after)
    return jnp.moveaxis(split, member.axis + 1, 0).reshape(size, -1)


def weight_gram(
    source: Sequence[Array], target: Sequence[Array], members: Sequence[Member], size: int
) -> Gram:
    """Sums the inner products of units' weights over members.

    Args:
        source: for each member the source's parameter, all its *other* axes already moved by the
            current plans.
        target: for each member the target's parameter.
        members: of one group.
        size: its number of units.

    Returns:
        Inner products of the units' concatenated weights.
    """
    return functools.reduce(
        Gram.__add__,
        (
            gram(unit_vectors(a, m, size), unit_vectors(b, m, size))
            for a, b, m in zip(source, target, members, strict=True)
        ),
    )


def feature_gram(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    source: PyTree,
    target: PyTree,
    batches: Iterable[Any],
    *,
    at: At = "produced",
    center: bool = False,
) -> dict[str, Gram]:
    """Accumulates the inner products of activations over batches of inputs.

    The source is evaluated as it is. So where one axis is a product of two groups (group norm), the
    activations of each are compared with the other group still in the source's order.

    Args:
        symmetry: of this function.
        fn: the function that was traced.
        source: parameters of the source model.
        target: parameters of the target model.
        batches: arrays, or tuples of arrays for functions of several inputs. Memory does not grow
            with their number.
        at: where features are read, see `features`.
        center: whether to subtract from each unit its mean over the samples, which makes
            covariances of the inner products.

    Returns:
        For each group the inner products, ready for `align(..., features=...)`.

    Raises:
        ValueError: if there are no batches, or `features` raises it.
    """
    total = None
    for batch in batches_of(batches):
        found = {}
        a = features(symmetry, fn, source, *batch, at=at)
        b = features(symmetry, fn, target, *batch, at=at)
        for name in a:
            x, y = a[name], b[name]
            found[name] = (gram(x.T, y.T), _real(x.T).sum(1), _real(y.T).sum(1), len(x))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None
    return {name: _centered(*sums) if center else sums[0] for name, sums in total.items()}


def _centered(g: Gram, a: Array, b: Array, count: Any) -> Gram:
    count = jnp.maximum(jnp.asarray(count, g.ab.dtype), 1)
    return Gram(
        jnp.maximum(g.aa - a * a / count, 0),
        jnp.maximum(g.bb - b * b / count, 0),
        g.ab - a[:, None] * b[None, :] / count,
    )
