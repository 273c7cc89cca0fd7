"""The repair by least squares.

All that is kept of the features of a layer are the inner products that make up its normal
equations. They serve every ridge (`normal_equations`).
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.arguments import require_flag, require_number
from otfusion_jax.common.host import Array, array_module
from otfusion_jax.fusion.linear_form import LinearForm, matrix_product
from otfusion_jax.fusion.normal_equations import (
    CentredSums,
    NormalEquations,
    NormalSums,
    chosen_ridge,
)
from otfusion_jax.fusion.repair_methods import (
    AbstractRepair,
    Correctable,
    Corrected,
    Moments,
    Part,
    Product,
    UnitStatistics,
    added_moments,
    restored,
)
from otfusion_jax.symmetry.units import units_of

_HELD_OUT = 5
"""One of so many samples of each batch is held out where a ridge is to be chosen."""


@dataclasses.dataclass(frozen=True)
class LeastSquares(AbstractRepair):
    """Gives every product the features that the models have on average, in the least squares.

    The parameter is the one that comes closest to the mean of the models' features from the
    features that the average itself has there, with a penalty on the distance from the average. The
    outputs of the network are products too: they come close to the models' mean. Solved by
    conjugate gradients on the normal equations, so that neither shapes nor partitions matter, nor
    that inner products have less than full rank: what has no features stays as the average has it.
    Or solved to the end, by a Cholesky factor of the inner products for each ridge.
    Layer by layer it is the regression of Jin et al., Dataless Knowledge Fusion by Merging Weights
    of Language Models (RegMean), ICLR 2023, on the features of the merged model instead of those of
    each parent.

    Of several ridges, the best is chosen for each parameter: each is fitted to the first four
    fifths of the samples of each batch, and the one is taken whose features are closest on the last
    fifth; then the parameter is fitted to all. So let samples be in no order. Of a batch of fewer
    than five samples a fifth of all their positions is held out; where there are fewer than five of
    these, the first ridge is taken. It takes no more passes over the data, and twice the memory for
    sums. At activations large ridges look better than they are, see below: what is wanted
    of a unit that is to be off is what the average does.

    Where a ReLU follows, a fit to the mean of what comes before it asks for too much, and too
    little. Where a unit is inactive in all models, how negative its input is does not matter. Where
    it is active in one of two, the mean of their inputs may be negative, and the fit would silence
    it. So what is fitted is what the ReLU puts out (`at`): where a unit is active in any model, the
    mean of the models' activations; elsewhere its input is to be negative, and as the average has
    it where it is so already. Biases, batch normalisation and a residual on the way to the
    ReLU are allowed for, if the residual is computed before the product.

    Where a bias follows units of a group, and nothing else reads it, both are fitted together
    (`restore`). Fitted features vary less than their targets. So where preactivations are fitted,
    units are then brought to the mean and deviation that they have in the models, as
    `RestoreStatistics` does, before what comes behind them is fitted.

    Models that were aligned by what their average answers, as by `learn_alignment`, need not agree
    on features. To fit these would undo some of it, and all that is worth a fit are the outputs.

    Attributes:
        ridge: The penalty, at least 0, in units of the mean eigenvalue of the features' inner
            products; or a tuple of several to choose from.
        steps: The number of steps of conjugate gradients, at least 1. To stop early is a penalty
            too. None solves to the end; where there is no Cholesky factor in the precision at hand,
            or the parameter is repeated on its way into the product, by 200 steps.
        at: Whether features are compared at the `"activation"`, behind a ReLU, or at the
            `"preactivation"`. It makes no difference where no ReLU follows, where anything else
            reads what it is given, and beside models that were moved along soft plans. Or at the
            `"output"` alone: only products that no other depends on are corrected.
        restore: Whether a parameter is fitted together with the bias behind it; and, at
            preactivations, its units are then given the mean and deviation that they have in the
            models, on average. Of batch normalisation the running mean is such a bias. Where none
            follows, where something else reads the product or the bias, where units of a group are
            not all that comes out (outputs are of none), and of complex numbers, it makes no
            difference.
    """

    needs_units: ClassVar[bool] = False

    ridge: float | tuple[float, ...] = 0.01
    steps: int | None = 20
    at: Literal["activation", "preactivation", "output"] = "activation"
    restore: bool = True

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
        if self.steps is not None:
            require_number(self, "steps", least=1, whole=True)
        if self.at not in ("activation", "preactivation", "output"):
            raise ValueError(
                f"at is {self.at!r}; it must be 'activation', 'preactivation' or 'output'"
            )
        require_flag(self, "restore")

    @property
    def looks_at_activations(self) -> bool:
        """See `AbstractRepair.looks_at_activations`."""
        return self.at == "activation"

    @property
    def corrects_outputs_alone(self) -> bool:
        """See `AbstractRepair.corrects_outputs_alone`."""
        return self.at == "output"

    def looks_at_units(self, has_bias: bool) -> bool:
        """See `AbstractRepair.looks_at_units`."""
        return self.restore and has_bias

    def summed(self, product: Product) -> "_Sums":
        """See `AbstractRepair.summed`."""
        form = product.form
        rows = form.rows(product.features)
        columns = form.columns(_target(product))
        # In float32 or wider: nothing is rounded on the way.
        columns = columns - matrix_product(rows, form.matrix(form.widened(product.leaf)))
        # Without units there is nothing to restore.
        sums = CentredSums.of if product.units else NormalSums.of
        # At activations nothing but a mean is, which these sums have.
        units = product.units if product.wanted is None else ()
        if not isinstance(self.ridge, tuple):
            whole = sums(rows, columns)
            return _Sums((whole,), units)
        # A sample may make many rows, as a sequence does. They are alike: hold all out, or none.
        count = form.count_samples(product.features)
        if count < _HELD_OUT:
            count = rows.shape[1]
        rows_of_one = rows.shape[1] // max(count, 1)
        edge = (count - count // _HELD_OUT) * rows_of_one
        fitted = sums(rows[:, :edge], columns[:, :edge])
        held_out = sums(rows[:, edge:], columns[:, edge:])
        return _Sums((fitted, held_out), units)

    def added(self, one: Any, other: Any) -> "_Sums":
        """See `AbstractRepair.added`."""
        normal = [
            first.plus(second) for first, second in zip(one.normal, other.normal, strict=True)
        ]
        return _Sums(tuple(normal), added_moments(one.units, other.units))

    def correct(self, correctable: Correctable, sums: Any) -> Corrected:
        """See `AbstractRepair.correct`."""
        # In float32 or wider; what is found is rounded once, to the precision of the parameter.
        form = correctable.form
        leaf = form.widened(correctable.leaf)
        part = _part_to_restore(correctable) if self.restore else None

        def equations(of: Any) -> NormalEquations:
            if isinstance(of, CentredSums):
                of = of.uncentred() if part is None else of.centred()
            return NormalEquations.in_range(form, leaf, of, self.steps)

        whole = sums.normal[0]
        ridge: Any = self.ridge
        chosen = None
        if isinstance(self.ridge, tuple):
            fitted, held_out = sums.normal
            chosen = chosen_ridge(equations(fitted), equations(held_out), self.ridge)
            whole, ridge = fitted.plus(held_out), chosen
        change = equations(whole).solved(ridge)
        leaf = leaf + change
        shifts: tuple[Array | None, ...] = (None,) * len(correctable.parts)
        if part is not None and correctable.is_before_relu:
            shifts = (_intercept(form, change, part, whole),)
        elif part is not None:
            *theirs, _ = sums.units[0]
            ours = _statistics(form, leaf, part, whole)
            leaf, shift = restored(leaf, part, correctable.weights, tuple(theirs), ours)
            shifts = (shift,)
        return Corrected(leaf.astype(correctable.leaf.dtype), shifts, chosen)


def _target(product: Product) -> Array:
    """Returns the features that are wanted of a product, in float32 or wider."""
    form = product.form
    if product.wanted is not None:
        return form.widened(product.wanted)
    wanted: Any = 0
    for weight, features in zip(product.weights, product.model_features, strict=True):
        features = form.widened(features)
        wanted = wanted + weight.astype(features.dtype) * features
    return wanted


class _Sums(NamedTuple):
    """What least squares have to know of a product.

    Attributes:
        normal: The sums of all samples, or of those to fit to and of those that are held out.
        units: As `Product` has them. Empty unless deviations are restored.
    """

    normal: tuple[NormalSums | CentredSums, ...]
    units: tuple[tuple[Moments, ...], ...]


def _part_to_restore(correctable: Correctable) -> Part | None:
    """Returns the units whose statistics can be restored; None if there are others beside them."""
    leaf, form = correctable.leaf, correctable.form
    if len(correctable.parts) != 1:
        return None
    (part,) = correctable.parts
    if not part.has_bias or len(part.members) != 1:
        return None
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return None
    if not form.is_rearranged(form.widened(leaf)):
        return None
    (member,) = part.members
    find_units = functools.partial(units_of, location=member.location, group=part.group)
    # To trace it takes longer than to do it.
    is_known = array_module(leaf) is np
    units = find_units(leaf) if is_known else jax.eval_shape(find_units, leaf)
    return part if units.size == leaf.size else None


def _intercept(form: LinearForm, change: Array, part: Part, sums: CentredSums) -> Array:
    """Returns what a bias has to add for the mean of what is wanted, behind a change."""
    moved = sums.mean_times(form.matrix(change))
    by_units = _by_units(form, change, part, sums.missing_mean - moved)
    return array_module(by_units).mean(by_units, axis=-1)


def _by_units(form: LinearForm, leaf: Array, part: Part, columns: Array) -> Array:
    """Brings a number for each column of a matrix to the units, each with those of its weights."""
    shape = form.matrix_shape(leaf)
    spread = array_module(columns).broadcast_to(columns[:, None], shape)
    by_weight = form.transposed_matrix(leaf)(spread)
    (member,) = part.members
    return units_of(by_weight, member.location, part.group)


def _statistics(form: LinearForm, leaf: Array, part: Part, sums: CentredSums) -> UnitStatistics:
    """Returns the mean and the deviation that units have with a parameter."""
    matrix = form.matrix(leaf)
    xp = array_module(matrix)
    squares = xp.sum(matrix * matrix_product(sums.gram, matrix), axis=1)
    variances = xp.maximum(squares / xp.maximum(sums.count, 1), 0)
    # Several columns may be one unit.
    means = _by_units(form, leaf, part, sums.mean_times(matrix))
    variances = _by_units(form, leaf, part, variances)
    mean = xp.mean(means, axis=-1)
    between = (means - mean[..., None]) ** 2
    variance = xp.mean(variances + between, axis=-1)
    return UnitStatistics(mean, xp.sqrt(variance))
