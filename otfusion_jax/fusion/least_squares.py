"""The repair by least squares.

All that is kept of the features of a layer are the inner products that make up its normal
equations. They serve every ridge (`normal_equations`).
"""

import dataclasses
from typing import Any, ClassVar

from otfusion_jax.common.arguments import require_number
from otfusion_jax.fusion.normal_equations import NormalEquations, NormalSums, chosen_ridge
from otfusion_jax.fusion.repair_methods import AbstractRepair, Correctable, Corrected, Product

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

    Of several ridges, the best is chosen for each parameter: those are fitted to four fifths of the
    samples of each batch, and that one is taken whose features are closest on the last fifth; then
    the parameter is fitted to all. So let samples be in no order. It takes no more passes over the
    data, and twice the memory for sums. Where batches have fewer than five samples each, the first
    ridge is taken.

    Attributes:
        ridge: The penalty, at least 0, in units of the mean eigenvalue of the features' inner
            products; or a tuple of several to choose from.
        steps: The number of steps of conjugate gradients, at least 1. To stop early is a penalty
            too. None solves to the end; where there is no Cholesky factor in the precision at hand,
            or the parameter is repeated on its way into the product, by 200 steps.
    """

    looks_at_units: ClassVar[bool] = False

    ridge: float | tuple[float, ...] = 0.01
    steps: int | None = 20

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
            equations = NormalEquations(form, leaf, fitted, self.steps)
            others = NormalEquations(form, leaf, held_out, self.steps)
            chosen = chosen_ridge(equations, others, self.ridge)
            whole, ridge = fitted.plus(held_out), chosen
        change = NormalEquations(form, leaf, whole, self.steps).solved(ridge)
        return Corrected((leaf + change).astype(correctable.leaf.dtype), (), chosen)
