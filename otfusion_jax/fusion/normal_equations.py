"""The normal equations of a parameter, solved for one ridge or several.

The systems of several ridges differ by multiples of the identity. Conjugate gradients go through
the same spaces for all of them, so that one product with the inner products a step solves all. Or
each of them is solved to the end, by a Cholesky factor, which all units share.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Inexact

from otfusion_jax.common.host import Array, array_module, cond, fori_loop, mapped
from otfusion_jax.common.linear_systems import solve_by_steps, solve_positive_definite
from otfusion_jax.common.scaling import all_scaled, common_exponent
from otfusion_jax.fusion.linear_form import LinearForm, matrix_product, row_gram, rows_times

_CONSTANT = 16
"""A feature that varies by no more than so many roundings of its mean is taken for constant."""

_MOST_STEPS = 200
"""After so many steps conjugate gradients are at the end, as far as float32 goes."""


class NormalSums(NamedTuple):
    """The sums that make up normal equations: X are the rows that a parameter is multiplied by.

    Of complex numbers Xᵀ, and Aᵀ below, stand for the conjugate transpose.

    Attributes:
        gram: XᵀX, real or complex `[groups, width, width]`.
        right_side: Xᵀ times what is missing from the features that are wanted, with the average's
            parameter, real or complex `[groups, width, units]`.
        is_any: Whether there is anything but zeros in X.
    """

    gram: Array
    right_side: Array
    is_any: Bool[Array, ""]

    @staticmethod
    def of(rows: Array, missing: Array) -> "NormalSums":
        """Takes the sums of some rows and of what is missing from them."""
        is_any = array_module(rows).any(rows != 0)
        return NormalSums(row_gram(rows), rows_times(rows, missing), is_any)

    def plus(self, other: "NormalSums") -> "NormalSums":
        """Returns the sums of the rows of both."""
        gram, right_side = self.gram + other.gram, self.right_side + other.right_side
        return NormalSums(gram, right_side, self.is_any | other.is_any)


class CentredSums(NamedTuple):
    """The same with means taken off, and these beside them.

    Attributes:
        count: How many rows there were, float `[]`.
        row_mean: The mean row, `[groups, width]`.
        missing_mean: The mean of what is missing, `[groups, units]`.
        gram: The inner products of X less its mean row, `[groups, width, width]`.
        right_side: Those of X and of what is missing, each less its mean, `[groups, width, units]`.
        is_any: Whether there is anything but zeros in X.
    """

    count: Float[Array, ""]
    row_mean: Array
    missing_mean: Array
    gram: Array
    right_side: Array
    is_any: Bool[Array, ""]

    @staticmethod
    def of(rows: Array, missing: Array) -> "CentredSums":
        """Takes the sums of some rows and of what is missing from them."""
        xp = array_module(rows, missing)
        count = xp.asarray(rows.shape[1], rows.real.dtype)
        # Of fewer samples than one is held out of, none are: their mean is 0.
        number = max(rows.shape[1], 1)
        row_mean = xp.sum(rows, axis=1) / number
        missing_mean = xp.sum(missing, axis=1) / number
        centred = NormalSums.of(
            rows - row_mean[:, None],
            missing - missing_mean[:, None],
        )
        return CentredSums(
            count,
            row_mean,
            missing_mean,
            centred.gram,
            centred.right_side,
            xp.any(rows != 0),
        )

    def plus(self, other: "CentredSums") -> "CentredSums":
        """Returns the sums of the rows of both, by the formula that `Moments.plus` has."""
        count = self.count + other.count
        # Counts are real where rows are complex.
        number = array_module(count).maximum(count, 1)
        share = (other.count / number).astype(self.gram.dtype)
        row_step = other.row_mean - self.row_mean
        missing_step = other.missing_mean - self.missing_mean
        between = self.count.astype(share.dtype) * share
        gram_between = between * _outer(row_step, row_step)
        right_side_between = between * _outer(row_step, missing_step)
        return CentredSums(
            count,
            self.row_mean + share * row_step,
            self.missing_mean + share * missing_step,
            self.gram + other.gram + gram_between,
            self.right_side + other.right_side + right_side_between,
            self.is_any | other.is_any,
        )

    def mean_times(self, matrix: Array) -> Array:
        """Returns the mean of the rows times a matrix, `[groups, units]`."""
        return matrix_product(self.row_mean[:, None], matrix)[:, 0]

    def uncentred(self) -> NormalSums:
        """Returns the sums with means."""
        count = self.count.astype(self.gram.dtype)
        gram_of_means = count * _outer(self.row_mean, self.row_mean)
        right_side_of_means = count * _outer(self.row_mean, self.missing_mean)
        return NormalSums(
            self.gram + gram_of_means,
            self.right_side + right_side_of_means,
            self.is_any,
        )

    def centred(self) -> NormalSums:
        """Returns the sums without means: the equations of a parameter that a bias follows."""
        xp = array_module(self.gram)
        squares = xp.diagonal(self.gram, axis1=-2, axis2=-1).real
        epsilon = jnp.finfo(squares.dtype).eps
        rounding = _CONSTANT * epsilon * abs(self.row_mean)
        # What is left of a constant is rounding, and would be divided by its own square.
        varies = squares > self.count * rounding**2
        kept = varies.astype(self.gram.dtype)
        gram = self.gram * _outer(kept, kept)
        right_side = self.right_side * kept[..., None]
        # Nothing is left of constant features, but also of those whose squares are out of range.
        has_no_squares = xp.all(squares == 0)
        is_lost = has_no_squares & xp.all(self.row_mean * self.row_mean == 0)
        is_any = xp.any(varies) | (self.is_any & is_lost)
        return NormalSums(gram, right_side, is_any)


def _outer(first: Array, second: Array) -> Array:
    """Multiplies each number of one vector with each of another, for each of some groups."""
    return first.conj()[..., :, None] * second[..., None, :]


@dataclasses.dataclass(frozen=True, eq=False)
class NormalEquations:
    """Normal equations of a change of a parameter.

    With A, which makes features of the parameter, they are (AᵀA + penalty) change = Aᵀ missing.
    Where the matrix of the parameter has each of its entries once they are solved for the matrix:
    what takes one to the other changes no length, and need not be gone through in every step.

    Attributes:
        form: The product.
        leaf: The parameter of the average, float32 or wider.
        sums: The sums that make the equations up, in range.
        steps: The number of steps of conjugate gradients; None to solve to the end.
    """

    form: LinearForm
    leaf: Array
    sums: NormalSums
    steps: int | None

    @staticmethod
    def in_range(
        form: LinearForm, leaf: Array, sums: NormalSums, steps: int | None
    ) -> "NormalEquations":
        """Brings both sides of equations to the range of the parameter, by one power of two.

        Conjugate gradients square both sides once more. Scaling changes no digit of what is found.
        """
        given = NormalEquations(form, leaf, sums, steps)
        exponent = common_exponent([given.mean_eigenvalue])
        sides = [sums.gram, sums.right_side]
        # In a branch of its own. XLA would else work the power out anew wherever it meets one of
        # the sides: of small parameters, that is half of the program.
        gram, right_side = cond(exponent == 0, lambda: sides, lambda: all_scaled(sides, -exponent))
        return NormalEquations(form, leaf, NormalSums(gram, right_side, sums.is_any), steps)

    @functools.cached_property
    def is_factorised(self) -> bool:
        """Whether systems are solved by Cholesky factors: they are the same for all units."""
        is_real = not jnp.issubdtype(self.leaf.dtype, jnp.complexfloating)
        return self.steps is None and is_real and self.is_rearranged

    @functools.cached_property
    def is_rearranged(self) -> bool:
        """Whether they are equations of the matrix of the parameter."""
        return self.form.is_rearranged(self.leaf)

    @property
    def most_steps(self) -> int:
        """The number of steps of conjugate gradients."""
        return _MOST_STEPS if self.steps is None else self.steps

    @functools.cached_property
    def _transpose(self) -> Callable[[Array], Array]:
        return self.form.transposed_matrix(self.leaf)

    def normal(self, change: Array) -> Array:
        """Returns AᵀA times a change."""
        if self.is_rearranged:
            return matrix_product(self.sums.gram, change)
        return self._transpose(matrix_product(self.sums.gram, self.form.matrix(change)))

    @functools.cached_property
    def right_side(self) -> Array:
        """Aᵀ times what is missing from the features."""
        sums = self.sums.right_side
        return sums if self.is_rearranged else self._transpose(sums)

    @functools.cached_property
    def mean_eigenvalue(self) -> Float[Array, ""]:
        """The mean eigenvalue of AᵀA."""
        if self.is_rearranged:
            # Every unit has the inner products of its group for itself.
            gram = self.sums.gram
            xp = array_module(gram)
            traces = xp.trace(gram, axis1=-2, axis2=-1)
            return xp.mean(traces.real) / gram.shape[-1]
        # Hutchinson's estimate: of random z, z · Aᵀ A z is the trace of AᵀA on average. Divided by
        # |z|² it is the mean eigenvalue.
        drawn = jax.random.normal(jax.random.key(0), self.leaf.shape, self.leaf.dtype)
        random = array_module(self.leaf).asarray(drawn)
        return _inner_product(random, self.normal(random)) / _squared_length(random)

    def solved(self, ridge: Any) -> Array:
        """Solves the equations.

        Args:
            ridge: The penalty, in units of the mean eigenvalue.

        Returns:
            The change of the parameter, in its shape; NaN where numbers are out of range.
        """
        penalty = ridge * self.mean_eigenvalue
        right_side = self.right_side
        xp = array_module(right_side)

        def penalised_normal(change: Array) -> Array:
            return self.normal(change) + penalty.astype(change.dtype) * change

        def by_steps() -> Array:
            return solve_by_steps(penalised_normal, right_side, self.most_steps)

        if self.is_factorised:
            by_factor = self.solved_by_factor(ridge)
            # Without a penalty, what has no features leaves no factor.
            change = cond(xp.all(xp.isfinite(by_factor)), lambda: by_factor, by_steps)
        else:
            change = by_steps()
        # Where numbers are out of range, conjugate gradients stop before their first step. To
        # return the average, unchanged, would hide it.
        first_step = _inner_product(right_side, penalised_normal(right_side))
        is_right = xp.isfinite(_squared_length(right_side))
        is_finite = is_right & xp.isfinite(first_step)
        vanishes = (self.mean_eigenvalue == 0) & self.sums.is_any
        if self.is_rearranged:
            change = self._transpose(change)
        return xp.where(is_finite & ~vanishes, change, xp.asarray(np.nan, change.dtype))

    def solved_by_factor(self, ridge: Any) -> Array:
        """Solves the equations by Cholesky factors: of `gram + penalty`, one for each group.

        Args:
            ridge: The penalty, in units of the mean eigenvalue.

        Returns:
            The change of the matrix; not finite where the sum is not positive definite.
        """
        gram = self.sums.gram
        penalty = ridge * self.mean_eigenvalue
        identity = array_module(gram).eye(gram.shape[-1], dtype=gram.dtype)
        gram = gram + penalty * identity[None]
        return mapped(solve_positive_definite, gram, self.sums.right_side)

    def solved_for_each(self, ridges: Float[Array, " n"]) -> Inexact[Array, "n ..."]:
        """Solves the equations for several ridges: see `solved`.

        Args:
            ridges: The penalties, in units of the mean eigenvalue.

        Returns:
            The change for each of them, `[n, ...]`; not finite where there is none.
        """
        if self.is_factorised:
            # One after the other by one program, or XLA would compile a factorisation for each.
            return mapped(self.solved_by_factor, ridges, loop=_one_after_the_other)
        shifts = ridges * self.mean_eigenvalue
        return shifted_solutions(self.normal, self.right_side, shifts, self.most_steps)


def _one_after_the_other(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return functools.partial(jax.lax.map, function)


def _inner_product(x: Array, y: Array) -> Array:
    """Takes the real part of the inner product, which is that of twice as many real numbers."""
    xp = array_module(x, y)
    if xp is np:
        # Without an array of the products.
        return xp.real(xp.vdot(x, y))
    products = jnp.conj(x) * y
    return jnp.real(jnp.sum(products))


def _squared_length(x: Array) -> Array:
    return _inner_product(x, x)


# --- several ridges


def chosen_ridge(
    fitted: NormalEquations, held_out: NormalEquations, ridges: Sequence[float]
) -> Float[Array, ""]:
    """Chooses the ridge whose fit to some samples is closest to what is wanted of others.

    Args:
        fitted: The equations of the samples to fit to.
        held_out: Those of the others.
        ridges: The ridges, in units of the mean eigenvalue.

    Returns:
        The best of the ridges; of equal ones the first.
    """
    xp = array_module(fitted.mean_eigenvalue)
    choices = xp.asarray(ridges, fitted.mean_eigenvalue.dtype)
    right_side = held_out.right_side

    def error(change: Array) -> Float[Array, ""]:
        # |A change - missing|², less what no change makes a difference to.
        return _inner_product(change, held_out.normal(change) - 2 * right_side)

    errors = mapped(error, fitted.solved_for_each(choices), loop=_one_after_the_other)
    # What is not finite is the worst: `argmin` would take it.
    found = xp.nan_to_num(errors, nan=np.inf)
    return choices[xp.argmin(found)]


def shifted_solutions(
    operator: Callable[[Array], Array],
    right_side: Array,
    shifts: Float[Array, " n"],
    steps: int,
) -> Inexact[Array, "n ..."]:
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

    def column(numbers: Array) -> Array:
        """Shapes a number for each system to be multiplied with the arrays of all."""
        return numbers.reshape(-1, *[1] * right_side.ndim).astype(right_side.dtype)

    xp = array_module(right_side, shifts)
    least = xp.min(shifts)
    above = shifts - least
    ones = xp.ones_like(shifts)
    all_directions = xp.stack([right_side] * len(shifts))

    def step(_: Any, state: Any) -> Any:
        solutions, directions, residual, direction, scale, last_scale, last_length, last_turn = (
            state
        )
        along = operator(direction) + least.astype(direction.dtype) * direction
        squared = _squared_length(residual)
        length = _ratio(squared, _inner_product(direction, along))
        # The residual of the system with a shift is `scale` times that of the first.
        denominator = length * last_turn * (last_scale - scale) + last_scale * last_length * (
            1 + length * above
        )
        next_scale = _ratio(scale * last_scale * last_length, denominator)
        shrinks = _ratio(next_scale, scale)
        solutions = solutions + column(length * shrinks) * directions
        residual = residual - length.astype(along.dtype) * along
        turn = _ratio(_squared_length(residual), squared)
        kept = column(turn * shrinks**2)
        directions = column(next_scale) * residual[None] + kept * directions
        direction = residual + turn.astype(direction.dtype) * direction
        return solutions, directions, residual, direction, next_scale, scale, length, turn

    one = xp.ones((), shifts.dtype)
    zeros = xp.zeros_like(all_directions)
    start = (zeros, all_directions, right_side, right_side, ones, ones, one, 0 * one)
    return fori_loop(steps, step, start)[0]


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Divides; 0 where there is nothing to divide by, as of a system that is solved."""
    xp = array_module(numerator, denominator)
    is_zero = denominator == 0
    return xp.where(is_zero, 0, numerator / xp.where(is_zero, 1, denominator))
