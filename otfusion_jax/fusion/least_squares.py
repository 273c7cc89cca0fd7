"""The repair by least squares, and how its ridge is chosen.

All that is kept of the features of a layer are the inner products that make up its normal
equations. They serve every ridge: the systems of several ridges differ by multiples of the
identity, and conjugate gradients go through the same spaces for all of them, so that one product
with the inner products a step solves all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.host import Array
from otfusion_jax.common.scaling import common_exponent, scaled
from otfusion_jax.fusion.linear_form import LinearForm, row_gram, rows_times
from otfusion_jax.fusion.repair_methods import AbstractRepair, Correctable, Corrected, Product

_HELD_OUT = 5
"""One of so many samples of each batch is held out where a ridge is to be chosen."""


class NormalSums(NamedTuple):
    """The sums that make up normal equations: X are the rows that a parameter is multiplied by.

    Attributes:
        gram: XᵀX, float `[groups, width, width]`.
        right_side: Xᵀ times what is missing from the features that are wanted, with the average's
            parameter, float `[groups, width, units]`.
        is_any: Whether there is anything but zeros in X.
    """

    gram: Array
    right_side: Array
    is_any: Bool[Array, ""]

    @staticmethod
    def of(rows: Array, missing: Array) -> "NormalSums":
        """Takes the sums of some rows and of what is missing from them."""
        return NormalSums(row_gram(rows), rows_times(rows, missing), jnp.any(rows != 0))

    def plus(self, other: "NormalSums") -> "NormalSums":
        """Returns the sums of the rows of both."""
        gram, right_side = self.gram + other.gram, self.right_side + other.right_side
        return NormalSums(gram, right_side, self.is_any | other.is_any)


@dataclasses.dataclass(frozen=True)
class LeastSquares(AbstractRepair):
    """Gives every product the features that the models have on average, in the least squares.

    The parameter is the one that comes closest to the mean of the models' features from the
    features that the average itself has there, with a penalty on the distance from the average. The
    outputs of the network are products too: they come close to the models' mean. Solved by
    conjugate gradients on the normal equations, so that neither shapes nor partitions matter, nor
    that inner products have less than full rank: what has no features stays as the average has it.
    Layer by layer it is the regression of Jin et al., Dataless Knowledge Fusion by Merging Weights
    of Language Models (RegMean), ICLR 2023, on the features of the merged model instead of those of
    each parent.

    Of several ridges, the best is chosen for each parameter: those are fitted to four fifths of the
    samples of each batch, and that one is taken whose features are closest on the last fifth; then
    the parameter is fitted to all. So let samples be in no order. It takes no more passes over the
    data, and twice the memory for sums. Where batches have fewer than five samples each, the first
    ridge is taken.

    Attributes:
        ridge: The penalty, at least 0, in units of the mean eigenvalue of the features' inner
            products; or a tuple of several to choose from.
        steps: The number of steps of conjugate gradients, at least 1. To stop early is a penalty
            too.
    """

    looks_at_units: ClassVar[bool] = False

    ridge: float | tuple[float, ...] = 0.01
    steps: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.ridge, tuple):
            require_number(self, "ridge", least=0, finite=True)
        elif not self.ridge:
            raise ValueError("LeastSquares needs a ridge, or several to choose from; got ()")
        else:
            for ridge in self.ridge:
                if isinstance(ridge, tuple):
                    raise TypeError(f"LeastSquares needs numbers to choose from; got {self.ridge}")
                dataclasses.replace(self, ridge=ridge)
        require_number(self, "steps", least=1, whole=True)

    def summed(self, product: Product) -> tuple[NormalSums, ...]:
        """See `AbstractRepair.summed`."""
        form = product.form
        missing = -form.compute_wide(product.features, product.leaf)
        for weight, features in zip(product.weights, product.model_features, strict=True):
            missing += weight.astype(missing.dtype) * form.widened(features)
        rows, columns = form.rows(product.features), form.columns(missing)
        if not isinstance(self.ridge, tuple):
            return (NormalSums.of(rows, columns),)
        # The first axis of features comes first among the rows, so that the last are whole samples.
        edge = rows.shape[1] - rows.shape[1] // _HELD_OUT
        fitted = NormalSums.of(rows[:, :edge], columns[:, :edge])
        return fitted, NormalSums.of(rows[:, edge:], columns[:, edge:])

    def added(self, one: Any, other: Any) -> tuple[NormalSums, ...]:
        """See `AbstractRepair.added`."""
        return tuple([first.plus(second) for first, second in zip(one, other, strict=True)])

    def correct(self, correctable: Correctable, sums: Any) -> Corrected:
        """See `AbstractRepair.correct`."""
        # In float32 or wider; what is found is rounded once, to the precision of the parameter.
        form = correctable.form
        leaf = form.widened(correctable.leaf)
        whole = sums[0]
        ridge: Any = self.ridge
        chosen = None
        if isinstance(self.ridge, tuple):
            fitted, held_out = sums
            chosen = _chosen_ridge(form, leaf, fitted, held_out, self.ridge, self.steps)
            whole, ridge = fitted.plus(held_out), chosen
        equations = _equations(form, leaf, whole)
        k = common_exponent([equations.mean_eigenvalue])
        penalty = ridge * equations.mean_eigenvalue

        def penalised_normal(change: Array) -> Array:
            return scaled(equations.normal(change) + penalty * change, -k)

        # (AᵀA + penalty) change = Aᵀ (target - A leaf), with the change from the average unknown.
        # Conjugate gradients square both sides once more: these are brought to the range of the
        # parameter, which changes no digit of what is found.
        right_side = scaled(equations.right_side, -k)
        change, _ = jax.scipy.sparse.linalg.cg(penalised_normal, right_side, maxiter=self.steps)
        # Where numbers are out of range, conjugate gradients stop before their first step. To
        # return the average, unchanged, would hide it.
        first_step = jnp.sum(right_side * penalised_normal(right_side))
        is_finite = jnp.isfinite(_squared_length(right_side)) & jnp.isfinite(first_step)
        vanishes = (equations.mean_eigenvalue == 0) & whole.is_any
        change = jnp.where(is_finite & ~vanishes, change, jnp.nan)
        return Corrected((leaf + change).astype(correctable.leaf.dtype), (), chosen)


class _Equations(NamedTuple):
    """Normal equations of a parameter, in the shape that it has.

    Attributes:
        normal: From a change of the parameter to AᵀA times the change, where A makes features of
            the parameter.
        right_side: Aᵀ times what is missing from the features.
        mean_eigenvalue: The mean eigenvalue of AᵀA.
    """

    normal: Callable[[Array], Array]
    right_side: Array
    mean_eigenvalue: Float[Array, ""]


def _equations(form: LinearForm, leaf: Array, sums: NormalSums) -> _Equations:
    """Reads normal equations off their sums."""
    transpose = form.transposed_matrix(leaf)

    def normal(parameter: Array) -> Array:
        highest = jax.lax.Precision.HIGHEST
        return transpose(jnp.matmul(sums.gram, form.matrix(parameter), precision=highest))

    # Hutchinson's estimate: of random z, z · Aᵀ A z is the trace of AᵀA on average. Divided by
    # |z|² it is the mean eigenvalue.
    random = jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
    mean_eigenvalue = jnp.sum(random * normal(random)) / _squared_length(random)
    return _Equations(normal, transpose(sums.right_side), mean_eigenvalue)


def _squared_length(x: Array) -> Array:
    return jnp.sum(x * x)


# --- the choice of a ridge


def _chosen_ridge(
    form: LinearForm,
    leaf: Array,
    fitted: NormalSums,
    held_out: NormalSums,
    ridges: Sequence[float],
    steps: int,
) -> Float[Array, ""]:
    """Chooses the ridge whose fit to some samples is closest to what is wanted of others.

    Args:
        form: The product.
        leaf: The parameter of the average, float32 or wider.
        fitted: The sums of the samples to fit to.
        held_out: The sums of the others.
        ridges: The ridges, in units of the mean eigenvalue.
        steps: The number of steps of conjugate gradients.

    Returns:
        The best of the ridges; of equal ones the first.
    """
    equations, others = _equations(form, leaf, fitted), _equations(form, leaf, held_out)
    k = common_exponent([equations.mean_eigenvalue])
    choices = jnp.asarray(ridges, equations.mean_eigenvalue.dtype)
    changes = shifted_solutions(
        lambda change: scaled(equations.normal(change), -k),
        scaled(equations.right_side, -k),
        choices * scaled(equations.mean_eigenvalue, -k),
        steps,
    )
    errors = []
    for change in changes:
        # |A change - missing|², less what no change makes a difference to.
        error = change * (others.normal(change) - 2 * others.right_side)
        errors.append(jnp.sum(error))
    # What is not finite is the worst: `argmin` would take it.
    found = jnp.nan_to_num(jnp.stack(errors), nan=jnp.inf)
    return choices[jnp.argmin(found)]


def shifted_solutions(
    operator: Callable[[Array], Array],
    right_side: Array,
    shifts: Float[Array, " n"],
    steps: int,
) -> Float[Array, "n ..."]:
    """Solves (B + shift) x = b for several shifts by one run of conjugate gradients.

    Args:
        operator: B, symmetric and without negative eigenvalues, as a function of arrays of the
            shape of b.
        right_side: The right side b.
        shifts: The shifts, float `[n]`, at least 0.
        steps: The number of steps.

    Returns:
        For each shift what `steps` steps of conjugate gradients from zero give.

    References:
        Frommer and Maass, Fast CG-based methods for Tikhonov-Phillips regularization, SIAM Journal
        on Scientific Computing 20 (1999): residuals of all systems are multiples of one another.
    """
    # A number for each system, to be multiplied with the arrays of all.
    column = (-1, *[1] * right_side.ndim)
    least = jnp.min(shifts)
    above = shifts - least
    ones = jnp.ones_like(shifts)
    all_directions = jnp.stack([right_side] * len(shifts))

    def step(_: Any, state: Any) -> Any:
        solutions, directions, residual, direction, scale, last_scale, last_length, last_turn = (
            state
        )
        along = operator(direction) + least * direction
        squared = _squared_length(residual)
        length = _ratio(squared, jnp.sum(direction * along))
        # The residual of the system with a shift is `scale` times that of the first.
        denominator = length * last_turn * (last_scale - scale) + last_scale * last_length * (
            1 + length * above
        )
        next_scale = _ratio(scale * last_scale * last_length, denominator)
        shrinks = _ratio(next_scale, scale)
        solutions = solutions + (length * shrinks).reshape(column) * directions
        residual = residual - length * along
        turn = _ratio(_squared_length(residual), squared)
        kept = (turn * shrinks**2).reshape(column)
        directions = next_scale.reshape(column) * residual[None] + kept * directions
        direction = residual + turn * direction
        return solutions, directions, residual, direction, next_scale, scale, length, turn

    one = jnp.ones((), shifts.dtype)
    zeros = jnp.zeros_like(all_directions)
    start = (zeros, all_directions, right_side, right_side, ones, ones, one, 0 * one)
    return jax.lax.fori_loop(0, steps, step, start)[0]


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Divides; 0 where there is nothing to divide by, as of a system that is solved."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))
