"""How a parameter of an average is corrected, once it is known what features it should produce.

A repair (see `repair_pass`) comes to one product of features with a parameter after the other. It
describes each by a `Product`, and a method, a subclass of `AbstractRepair`, answers with the
corrected parameter and with what a bias that follows should add.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from otfusion_jax.averaging.average import accumulation_dtype
from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.scaling import common_exponent, deviation, scaled
from otfusion_jax.symmetry.groups import Group, Member, Role
from otfusion_jax.symmetry.location import StridedIndex
from otfusion_jax.symmetry.units import units_of, with_units
from otfusion_jax.tracing.activations import samples_of
from otfusion_jax.tracing.views import View


class UnitStatistics(NamedTuple):
    """What is known of the features of the units of a model.

    Attributes:
        mean: The mean of each unit over the samples, float `[*batch, units]`.
        deviation: The standard deviation of each unit over the samples, float `[*batch, units]`.
    """

    mean: Array
    deviation: Array


class Part(NamedTuple):
    """Units that come out of a product.

    Attributes:
        group: The group of the units.
        view: Where the units are in the features.
        role: The role of the features, as units of the group.
        statistics: The statistics of the units of each model, K of them. Where plans merge or split
            the units of a model, they are means over the statistics of its own units.
        members: The axes of the parameter that the units lie along.
    """

    group: Group
    view: View
    role: Role
    statistics: tuple[UnitStatistics, ...]
    members: tuple[Member, ...]

    def units(self, features: Array) -> Float[Array, "*batch samples units"]:
        """Brings features of the product to `[*batch, samples, units]`."""
        return samples_of(features, self.view, self.group)


class Product(NamedTuple):
    """A product of features with a parameter, in all models and in their average.

    Attributes:
        leaf: The parameter of the average, any shape.
        compute: The product as a linear function, from a parameter of this shape and dtype to the
            features that the average has.
        widened: From a parameter, or features, to the same numbers in float32 or wider.
        compute_wide: The same linear function, from a widened parameter to widened features.
        normal: `compute_wide`, followed by its transpose: from a widened parameter to another.
        model_features: The features of each model, K arrays of one shape. Those of a model of other
            widths have been moved along its plans.
        weights: The weights of the models, float `[K]`.
        parts: The features that belong to groups. No feature is in two parts.
    """

    leaf: Array
    compute: Callable[[Array], Array]
    widened: Callable[[Array], Array]
    compute_wide: Callable[[Array], Array]
    normal: Callable[[Array], Array]
    model_features: tuple[Array, ...]
    weights: Float[Array, " k"]
    parts: tuple[Part, ...]


Shifts = tuple[Float[Array, "*batch units"] | None, ...]
"""What a bias, if one follows, is to add to the units of each part of a product."""


@dataclasses.dataclass(frozen=True)
class AbstractRepair(abc.ABC):
    """How a parameter of the average is corrected. Subclasses are frozen, hashable dataclasses."""

    @abc.abstractmethod
    def correct(self, product: Product) -> tuple[Array, Shifts]:
        """Corrects one parameter. Traced: called under `jax.jit`.

        Args:
            product: The product in which the parameter is used first.

        Returns:
            The corrected parameter, and for each part of the product what a bias is to add to its
            units, or None.
        """


@dataclasses.dataclass(frozen=True)
class RestoreStatistics(AbstractRepair):
    """REPAIR: gives every unit the mean and the deviation that it has in the models, on average.

    Units are scaled by the parameter that produces them and shifted by the bias that follows. In a
    network without biases they are scaled alone. Outputs of the network are left alone.

    References:
        Jordan, Sedghi, Saukh, Entezari and Neyshabur, REPAIR, ICLR 2023, section 4.
    """

    def correct(self, product: Product) -> tuple[Array, Shifts]:
        """See `AbstractRepair.correct`."""
        leaf = product.leaf
        features = product.compute(leaf)
        shifts: list[Array | None] = []
        for part in product.parts:
            means, deviations = zip(*part.statistics, strict=True)
            weights = product.weights.astype(deviations[0].dtype)
            target_mean = jnp.tensordot(weights.astype(means[0].dtype), jnp.stack(means), axes=1)
            target_deviation = jnp.tensordot(weights, jnp.stack(deviations), axes=1)
            units = part.units(features)
            units = units.astype(accumulation_dtype(units.dtype))
            unit_deviation = deviation(units, axis=-2)
            # A unit that never varies cannot be made to, whatever it is multiplied by.
            varies = unit_deviation > 0
            scale = jnp.where(varies, target_deviation / jnp.where(varies, unit_deviation, 1), 1)
            for member in part.members:
                leaf = combine_units(jnp.multiply, leaf, member, part.group, scale)
            # scale * x + shift has the mean that is wanted.
            shift = target_mean - scale * jnp.mean(units, axis=-2)
            # Without an axis of the parameter the units have not been scaled.
            shifts.append(shift if part.members else None)
        return leaf, tuple(shifts)


@dataclasses.dataclass(frozen=True)
class LeastSquares(AbstractRepair):
    """Gives every product the features that the models have on average, in the least squares.

    The parameter is the one that comes closest to the mean of the models' features from the
    features that the average itself has there, with a penalty on the distance from the average. The
    outputs of the network are products too: they come close to the models' mean. Solved by
    conjugate gradients, so that neither shapes nor partitions matter. Layer by layer it is the
    regression of Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models
    (RegMean), ICLR 2023, on the features of the merged model instead of those of each parent.

    Attributes:
        ridge: The penalty, at least 0, in units of the mean eigenvalue of the features' inner
            products.
        steps: The number of steps of conjugate gradients, at least 1. To stop early is a penalty
            too.
    """

    ridge: float = 0.01
    steps: int = 20

    def __post_init__(self):
        require_number(self, "ridge", least=0, finite=True)
        require_number(self, "steps", least=1, whole=True)

    def correct(self, product: Product) -> tuple[Array, Shifts]:
        """See `AbstractRepair.correct`."""
        # In float32 or wider; what is found is rounded once, to the precision of the parameter.
        leaf = product.widened(product.leaf)
        # Hutchinson's estimate: of random z, |A z|² is the trace of AᵀA on average. Divided by |z|²
        # it is the mean eigenvalue.
        random = jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
        random_features = product.compute_wide(random)
        trace = _squared_length(random_features)
        mean_eigenvalue = trace / _squared_length(random)
        penalty = self.ridge * mean_eigenvalue
        # Conjugate gradients square both sides once more: these are brought to the range of the
        # parameter, which changes no digit of what is found.
        k = common_exponent([mean_eigenvalue])

        def penalised_normal(change: Array) -> Array:
            return scaled(product.normal(change) + penalty * change, -k)

        # (AᵀA + penalty) change = Aᵀ (target - A leaf), with the change from the average unknown.
        missing = -product.compute_wide(leaf)
        for weight, features in zip(product.weights, product.model_features, strict=True):
            missing += weight.astype(missing.dtype) * product.widened(features)
        (right_side,) = jax.linear_transpose(product.compute_wide, leaf)(missing)
        right_side = scaled(right_side, -k)
        change, _ = jax.scipy.sparse.linalg.cg(penalised_normal, right_side, maxiter=self.steps)
        # Where numbers are out of range, conjugate gradients stop before their first step. To
        # return the average, unchanged, would hide it.
        first_step = jnp.sum(right_side * penalised_normal(right_side))
        is_finite = jnp.isfinite(_squared_length(right_side)) & jnp.isfinite(first_step)
        vanishes = (trace == 0) & jnp.any(random_features != 0)
        change = jnp.where(is_finite & ~vanishes, change, jnp.nan)
        return (leaf + change).astype(product.leaf.dtype), (None,) * len(product.parts)


def _squared_length(x: Array) -> Array:
    return jnp.sum(x * x)


def members_at(group: Group, leaf: int, role: Role, index: StridedIndex) -> tuple[Member, ...]:
    """Returns the axes of a parameter that units of features lie along.

    Args:
        group: The group of the units.
        leaf: The position of the parameter among the parts of the symmetry.
        role: The role of the features, as units of the group.
        index: Where the units are along their axis of the features.

    Returns:
        The members of the parameter with the units at the same positions; or the only member of
        that role, wherever the units are.
    """
    in_leaf, same_index = [], []
    for member in group.members:
        if member.leaf == leaf and member.role == role:
            in_leaf.append(member)
            if member.location.index == index:
                same_index.append(member)
    if same_index:
        return tuple(same_index)
    # With several members elsewhere nobody knows which of them the units belong to.
    return tuple(in_leaf) if len(in_leaf) == 1 else ()


def combine_units(
    operation: Callable[..., Array], leaf: Array, member: Member, group: Group, numbers: Array
) -> Array:
    """Combines a parameter with one number per unit.

    Args:
        operation: The operation: a function of two arrays, as `jnp.add`.
        leaf: The parameter.
        member: Where the units are in it.
        group: The group of the units.
        numbers: One number for each unit, float `[*batch, units]`.

    Returns:
        The parameter, with each unit combined with its number.
    """
    units = units_of(leaf, member.location, group)
    wide = accumulation_dtype(leaf.dtype)
    combined = operation(units.astype(wide), numbers[..., None].astype(wide))
    return with_units(leaf, member.location, group, combined.astype(leaf.dtype))
