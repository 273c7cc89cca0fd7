"""Ground costs between the units of two models, from their inner products.

A unit is a vector: its weights in some members of its group, or its activations on some samples.
Every ground metric in use depends on two such vectors by their inner products alone. So these are
what is accumulated, over members or over batches, as a `Gram`, and memory is n·m however long the
vectors are. `ground_cost` makes a cost of them.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Inexact
from ott.geometry import costs

from otfusion_jax.common.host import Array, array_module, inner_product, matmul
from otfusion_jax.symmetry.groups import Group

# --- inner products


_SQUARES_IN_A_SUM = 512
"""How many squares NumPy adds up in the precision of the vectors."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
    """Inner products of the units of two models; those over members and over batches add up.

    Attributes:
        source_sq_norms: The squared norms of the source's units, float `[*batch, n]`.
        target_sq_norms: The squared norms of the target's units, float `[*batch, m]`.
        cross: The inner products of each unit of the source with each of the target, float
            `[*batch, n, m]`. For a group inside of another that can be permuted (the dimensions
            of heads), units of all indices of that one are compared with each other:
            `[*batch, heads, n, heads of the target, m]`.
        intra: The inner products among the source's units and among the target's, float
            `[*batch, n, n]` and `[*batch, m, m]`, which quadratic solvers need. None if they were
            not asked for.
        even: Of units that may change their signs, the inner products of what does not change with
            them, of the shape of `cross`, which then has the others alone. None for other units.
    """

    source_sq_norms: Float[Array, "*batch n"]
    target_sq_norms: Float[Array, "*others m"]
    cross: Float[Array, "*pairs m"]
    intra: tuple[Float[Array, "*batch n n"], Float[Array, "*others m m"]] | None = None
    even: Float[Array, "*pairs m"] | None = None

    def __add__(self, other: "Gram") -> "Gram":
        return jax.tree.map(operator.add, self, other)

    def pairwise(self, source_numbers: Array, target_numbers: Array) -> Array:
        """Multiplies a number of each unit of the source with one of each unit of the target.

        Args:
            source_numbers: One number per unit, of the shape of `source_sq_norms`.
            target_numbers: One number per unit, of the shape of `target_sq_norms`.

        Returns:
            The products, of the shape of `cross`.
        """
        # A unit of a group inside of another has two indices, its head's and its own; any other
        # unit has one.
        indices = self.cross.ndim - source_numbers.ndim
        xp = array_module(source_numbers, target_numbers)
        rows = xp.expand_dims(source_numbers, tuple(range(-indices, 0)))
        columns = xp.expand_dims(target_numbers, tuple(range(-2 * indices, -indices)))
        return rows * columns

    def told_apart(self, odd: bool) -> "Gram":
        """Notes whether what was compared changes its sign with the units.

        Args:
            odd: Whether it does.

        Returns:
            The inner products, with those that do not change in `even`.
        """
        nothing = array_module(self.cross).zeros_like(self.cross)
        cross, even = (self.cross, nothing) if odd else (nothing, self.cross)
        return dataclasses.replace(self, cross=cross, even=even)

    def with_best_signs(self) -> "Gram":
        """Returns the inner products of each pair of units by the sign that makes it largest."""
        if self.even is None:
            return self
        return dataclasses.replace(self, cross=self.even + abs(self.cross), even=None)

    def normalised(self) -> "Gram":
        """Returns the inner products of units scaled to norm 1; units that are 0 stay so."""
        source_norms_inverse = _inverse_norms(self.source_sq_norms)
        target_norms_inverse = _inverse_norms(self.target_sq_norms)
        intra, even = self.intra, self.even
        inverses = self.pairwise(source_norms_inverse, target_norms_inverse)
        if even is not None:
            even = even * inverses
        if intra is not None:
            intra = (
                intra[0] * all_products(source_norms_inverse),
                intra[1] * all_products(target_norms_inverse),
            )
        return Gram(
            self.source_sq_norms * source_norms_inverse * source_norms_inverse,
            self.target_sq_norms * target_norms_inverse * target_norms_inverse,
            self.cross * inverses,
            intra,
            even,
        )


def _inverse_norms(sq_norms: Array) -> Array:
    """Returns 1 / norm of each unit, and 1 for those that are 0."""
    # 1 / 0 would make NaN of the inner products of units that are 0.
    xp = array_module(sq_norms)
    return 1 / xp.sqrt(xp.where(sq_norms > 0, sq_norms, 1))


def all_products(numbers: Array) -> Array:
    """Multiplies the numbers of all pairs of units of one model.

    Args:
        numbers: One number per unit, `[*batch, n]`.

    Returns:
        The products, `[*batch, n, n]`.
    """
    return numbers[..., :, None] * numbers[..., None, :]


def gram(
    source: Inexact[Array, "*batch n d"],
    target: Inexact[Array, "*others m d"],
    intra: bool = False,
    norms: bool = True,
) -> Gram:
    """Takes the inner products of two sets of vectors.

    Args:
        source: The vectors of the source, one per row.
        target: The vectors of the target, one per row.
        intra: Whether to take the inner products within each set as well.
        norms: Whether to take the squared norms; if not, they are NaN.

    Returns:
        The inner products, float32 or float64, whatever the dtype of the vectors. Complex vectors
        count as real ones of twice the length.
    """
    # The real part of a complex inner product is that of twice as many real numbers.
    source = as_real(source)
    target = as_real(target)
    within = None
    if intra:
        within = _inner_products(source, source), _inner_products(target, target)
    norms_of = _squared_norms if norms else _unknown_norms
    return Gram(norms_of(source), norms_of(target), _inner_products(source, target), within)


def _unknown_norms(rows: Array) -> Array:
    return array_module(rows).full(rows.shape[:-1], np.nan, rows.dtype)


def _squared_norms(rows: Array) -> Array:
    """Takes `[*batch, n]` from `[*batch, n, d]`."""
    if array_module(rows) is np:
        total: Any = np.zeros(rows.shape[:-1])
        # Without an array of the squares. Of many, each part is rounded as a short sum is.
        for start in range(0, rows.shape[-1], _SQUARES_IN_A_SUM):
            part = rows[..., start : start + _SQUARES_IN_A_SUM]
            total += np.einsum("...d,...d->...", part, part)
        return total.astype(rows.dtype)
    return jnp.sum(rows * rows, -1)


def _inner_products(rows: Array, columns: Array) -> Array:
    """Takes `[*batch, n, m]` from `[*batch, n, d]` and `[*batch, m, d]`."""
    # Distances are differences of these: at a lower precision those of near units would be noise.
    return matmul(rows, columns.swapaxes(-1, -2))


def unit_gram(
    source: Inexact[Array, "*batch n d"],
    target: Inexact[Array, "*others m d"],
    group: Group,
    intra: bool = False,
    norms: bool = True,
) -> Gram:
    """Takes the inner products of the units of a group, across the group around it if there is one.

    Args:
        source: The units of the source, `[*batch, n, d]`.
        target: The units of the target, `[*batch, m, d]`. If there is a group around, the last axis
            of the batch may have another size than in the source.
        group: The group, of the source.
        intra: Whether to take the inner products within each model as well.
        norms: Whether to take the squared norms, see `gram`.

    Returns:
        The inner products, see `Gram`.
    """
    if group.outer is None:
        return gram(source, target, intra, norms)
    # All units of all heads are compared at once, as if there were no heads.
    *batch, heads, n, width = source.shape
    target_heads, m = target.shape[-3:-1]
    flat = gram(
        source.reshape(*batch, heads * n, width),
        target.reshape(*batch, target_heads * m, width),
        norms=norms,
    )
    within = None
    if intra:
        within = gram(source, source).cross, gram(target, target).cross
    return Gram(
        flat.source_sq_norms.reshape(*batch, heads, n),
        flat.target_sq_norms.reshape(*batch, target_heads, m),
        flat.cross.reshape(*batch, heads, n, target_heads, m),
        within,
    )


def squared_norm(x: Inexact[Array, "..."]) -> Float[Array, ""]:
    """Takes the squared norm of an array.

    Args:
        x: An array of any shape, real or complex.

    Returns:
        The sum of squares, float32, or float64 where `x` has that precision.
    """
    real = as_real(x)
    return inner_product(real, real)


def as_real(x: Array) -> Array:
    """Makes real vectors of complex ones, and narrow ones wide enough to be summed.

    Args:
        x: Vectors, `[..., d]`; or a single number, `[]`.

    Returns:
        Complex vectors as real ones of twice the length, others in float32 or float64.
    """
    xp = array_module(x)
    if xp.iscomplexobj(x):
        x = xp.atleast_1d(x)
        return xp.concatenate([x.real, x.imag], axis=-1)
    return x if x.dtype == xp.float64 else xp.asarray(x, xp.float32)


# --- ground metrics


def _squared_distance(grams: Gram) -> Array:
    """|x - y|² = |x|² + |y|² - 2 x·y, which rounding must not make negative."""
    # Added in place: of a large group, every array that is held at once counts.
    squared = grams.source_sq_norms[..., :, None] - 2 * grams.cross
    squared += grams.target_sq_norms[..., None, :]
    return array_module(squared).maximum(squared, 0)


def _distance(grams: Gram) -> Array:
    squared = _squared_distance(grams)
    return array_module(squared).sqrt(squared)


def _cosine_distance(grams: Gram) -> Array:
    xp = array_module(grams.cross)
    source_norms = xp.sqrt(grams.source_sq_norms)[..., :, None]
    target_norms = xp.sqrt(grams.target_sq_norms)[..., None, :]
    # A unit that is 0 has no direction: it is at distance 1 from all others.
    norms = source_norms * target_norms
    return 1 - grams.cross / xp.where(norms > 0, norms, 1)


def _negative_product(grams: Gram) -> Array:
    return -grams.cross


METRICS: dict[type[costs.CostFn], Callable[[Gram], Array]] = {
    costs.SqEuclidean: _squared_distance,
    costs.Euclidean: _distance,
    costs.Cosine: _cosine_distance,
    costs.NegDotProduct: _negative_product,
}
"""The metrics that can be told from inner products, by the class of the ott cost function."""


DEGREES: dict[type[costs.CostFn], int] = {
    costs.SqEuclidean: 2,
    costs.Euclidean: 1,
    costs.Cosine: 0,
    costs.NegDotProduct: 2,
}
"""The power of the vectors' unit of length that each metric is in."""


def ground_cost(metric: costs.CostFn, grams: Gram) -> Float[Array, "*batch n m"]:
    """Evaluates a ground metric between all pairs of units.

    Args:
        metric: An ott cost function: `SqEuclidean()`, `Euclidean()`, `Cosine()` or
            `NegDotProduct()`, as in `ott.geometry.costs`.
        grams: The inner products of the units.

    Returns:
        The costs: `cost[i, j]` is between unit `i` of the source and unit `j` of the target.

    Raises:
        ValueError: If the metric is another one.
    """
    if type(metric) not in METRICS:
        names = ", ".join([kind.__name__ for kind in METRICS])
        raise ValueError(
            f"the ground metric {type(metric).__name__} is not a function of inner products, and "
            f"the vectors of units are never held at once; use one of {names} of "
            "ott.geometry.costs, or solve a cost of your own with otfusion_jax.Exact().solve"
        )
    return METRICS[type(metric)](grams)


def assignment_cost(metric: costs.CostFn, grams: Gram) -> Float[Array, "*batch n n"]:
    """Evaluates a ground metric as far as it tells permutations apart.

    Args:
        metric: The ground metric, see `ground_cost`.
        grams: The inner products of the units, of as many in the source as in the target.

    Returns:
        The costs, less what they have in common in each row and in each column: of squared
        distances, the squared norms, which need not be known.
    """
    if isinstance(metric, costs.SqEuclidean):
        return -2 * grams.cross
    return ground_cost(metric, grams)


def intra_costs(
    cost_of: Callable[[Gram], Array], grams: Gram
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*others m m"]]:
    """Evaluates a ground metric between the units of each model.

    Args:
        cost_of: The ground cost between all pairs of units, as a function of their inner products.
        grams: The inner products of the units, with those within each model.

    Returns:
        The intra-domain costs of the source and of the target.
    """
    assert grams.intra is not None, "the caller has looked"
    # Within one model, source and target are the same units.
    source_products, target_products = grams.intra
    source_grams = Gram(grams.source_sq_norms, grams.source_sq_norms, source_products)
    target_grams = Gram(grams.target_sq_norms, grams.target_sq_norms, target_products)
    return cost_of(source_grams), cost_of(target_grams)
