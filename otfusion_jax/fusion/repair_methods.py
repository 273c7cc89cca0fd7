"""How a parameter of an average is corrected, once it is known what features it should produce.

A repair (see `repair_pass`) comes to one product of features with a parameter after the other,
batch by batch. A method, a subclass of `AbstractRepair`, sums up what it has to know of them: of
each batch it is given a `Product`, and it returns sums whose size does not depend on how many
samples there are. From the sums of all batches it makes the corrected parameter, and what a bias
that follows should add.
"""

import abc
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float, Inexact

from otfusion_jax.common.host import Array, accumulation_dtype, array_module
from otfusion_jax.common.scaling import deviation
from otfusion_jax.fusion.linear_form import LinearForm
from otfusion_jax.symmetry.groups import Group, Member, Role
from otfusion_jax.symmetry.location import StridedIndex
from otfusion_jax.symmetry.units import units_of, with_units


class UnitStatistics(NamedTuple):
    """What is known of the features of the units of a model.

    Attributes:
        mean: The mean of each unit over the samples, float `[*batch, units]`.
        deviation: The standard deviation of each unit over the samples, float `[*batch, units]`.
    """

    mean: Array
    deviation: Array


class Moments(NamedTuple):
    """Statistics that those of other samples can be added to.

    Attributes:
        count: How many samples there were, float `[]`.
        mean: The mean of each unit over them, float `[*batch, units]`.
        deviation: The standard deviation of each unit over them, float `[*batch, units]`.
    """

    count: Array
    mean: Array
    deviation: Array

    @staticmethod
    def of(units: Inexact[Array, "*batch samples units"]) -> "Moments":
        """Takes the moments of some samples."""
        xp = array_module(units)
        count = xp.asarray(units.shape[-2], units.real.dtype)
        mean = xp.mean(units, axis=-2)
        return Moments(count, mean, deviation(units, axis=-2))

    def plus(self, other: "Moments") -> "Moments":
        """Returns the moments of the samples of both.

        References:
            Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample
            variances, COMPSTAT 1982. Deviations are added as lengths are, so that no square is out
            of range.
        """
        xp = array_module(self.mean, other.mean)
        count = self.count + other.count
        share = other.count / xp.maximum(count, 1)
        difference = other.mean - self.mean  # complex where units are, and nothing else here is
        own = xp.sqrt(1 - share) * self.deviation
        others = xp.sqrt(share) * other.deviation
        within = xp.hypot(own, others)
        between = xp.sqrt(share * (1 - share)) * abs(difference)
        mean = self.mean + share.astype(difference.dtype) * difference
        return Moments(count, mean, xp.hypot(within, between))


class Product(NamedTuple):
    """A product of features with a parameter in all models and in their average, on one batch.

    Attributes:
        leaf: The parameter of the average, any shape; in a loop over layers, that of one layer.
        form: The product as a linear function of the parameter.
        features: The features of the average that the parameter is multiplied by.
        model_features: What comes out in each model, K arrays of one shape. That of a model of
            other widths has been moved along its plans.
        weights: The weights of the models, float `[K]`.
        wanted: What is to come out so that a ReLU behind it puts out what it does in the models, on
            average; None if there is none, or the method does not ask for it.
        units: For each part of what comes out that belongs to a group the moments of its units in
            each model and, last, in the average. No feature is in two parts. Empty if the method
            does not look at units.
    """

    leaf: Array
    form: LinearForm
    features: Array
    model_features: tuple[Array, ...]
    weights: Float[Array, " k"]
    wanted: Array | None
    units: tuple[tuple[Moments, ...], ...]


class Part(NamedTuple):
    """Units that come out of a product.

    Attributes:
        group: The group of the units.
        members: The axes of the parameter that the units lie along.
        has_bias: Whether a bias follows that can take a shift of the units, and does nothing else.
        statistics: From the moments of the units in each model, K of them, to their statistics as
            units of the average. Where plans merge or split the units of a model, these are means
            over the statistics of its own units.
    """

    group: Group
    members: tuple[Member, ...]
    has_bias: bool
    statistics: Callable[[tuple[Moments, ...]], tuple[UnitStatistics, ...]]


class Correctable(NamedTuple):
    """A parameter that is to be corrected, when its product has been seen on all batches.

    Attributes:
        leaf: The parameter of the average, any shape.
        form: The product as a linear function of the parameter.
        weights: The weights of the models, float `[K]`.
        parts: What comes out and belongs to groups. Empty if the method does not look at units.
        is_before_relu: Whether `Product.wanted` has said what is to come out.
    """

    leaf: Array
    form: LinearForm
    weights: Float[Array, " k"]
    parts: tuple[Part, ...]
    is_before_relu: bool


Shifts = tuple[Float[Array, "*batch units"] | None, ...]
"""What a bias, if one follows, is to add to the units of each part of a product."""


class Corrected(NamedTuple):
    """What a method makes of a parameter.

    Attributes:
        leaf: The corrected parameter.
        shifts: For each part of the product what a bias is to add to its units, or None.
        ridge: The penalty that was chosen for this parameter, float `[]`; None if there was nothing
            to choose.
    """

    leaf: Array
    shifts: Shifts = ()
    ridge: Float[Array, ""] | None = None


@dataclasses.dataclass(frozen=True)
class AbstractRepair(abc.ABC):
    """How a parameter of the average is corrected. Subclasses are frozen, hashable dataclasses.

    Methods are given arrays of JAX, traced, or on a CPU known ones of NumPy: see `common.host`.

    Attributes:
        needs_units: Whether the method corrects nothing where there are no units of groups.
    """

    needs_units: ClassVar[bool] = True

    @property
    def looks_at_activations(self) -> bool:
        """Whether the method asks for what is wanted of a product because of the ReLU behind it."""
        return False

    @property
    def corrects_outputs_alone(self) -> bool:
        """Whether only those parameters are corrected that no other correction depends on."""
        return False

    def looks_at_units(self, has_bias: bool) -> bool:
        """Says whether the method asks for the units of groups that come out of a product.

        Where it does not, layers of one shape share what is compiled.

        Args:
            has_bias: Whether a bias follows that can take a shift of the units, and does nothing
                else.
        """
        return self.needs_units

    @abc.abstractmethod
    def summed(self, product: Product) -> Any:
        """Sums up what is needed of one batch.

        Args:
            product: The product in which the parameter is used first.

        Returns:
            A pytree of arrays. Zeros in place of all of them stand for no samples.
        """

    @abc.abstractmethod
    def added(self, one: Any, other: Any) -> Any:
        """Adds up the sums of some batches and of others."""

    @abc.abstractmethod
    def correct(self, correctable: Correctable, sums: Any) -> Corrected:
        """Corrects one parameter.

        Args:
            correctable: The parameter.
            sums: The sums over all batches.

        Returns:
            The corrected parameter, and what goes with it.
        """


@dataclasses.dataclass(frozen=True)
class RestoreStatistics(AbstractRepair):
    """REPAIR: gives every unit the mean and the deviation that it has in the models, on average.

    Units are scaled by the parameter that produces them and shifted by the bias that follows. In a
    network without biases they are scaled alone. Outputs of the network are left alone.

    References:
        Jordan, Sedghi, Saukh, Entezari and Neyshabur, REPAIR, ICLR 2023, section 4.
    """

    def summed(self, product: Product) -> tuple[tuple[Moments, ...], ...]:
        """See `AbstractRepair.summed`."""
        return product.units

    def added(self, one: Any, other: Any) -> tuple[tuple[Moments, ...], ...]:
        """See `AbstractRepair.added`."""
        return added_moments(one, other)

    def correct(self, correctable: Correctable, sums: Any) -> Corrected:
        """See `AbstractRepair.correct`."""
        leaf = correctable.leaf
        shifts: list[Array | None] = []
        for part, (*theirs, ours) in zip(correctable.parts, sums, strict=True):
            leaf, shift = restored(leaf, part, correctable.weights, tuple(theirs), ours)
            # Without an axis of the parameter the units have not been scaled.
            shifts.append(shift if part.members else None)
        return Corrected(leaf, tuple(shifts))


def added_moments(
    one: tuple[tuple[Moments, ...], ...], other: tuple[tuple[Moments, ...], ...]
) -> tuple[tuple[Moments, ...], ...]:
    """Adds up the moments of some samples and of others, as `Product.units` has them."""
    added = []
    for parts in zip(one, other, strict=True):
        pairs = zip(*parts, strict=True)
        added.append(tuple([first.plus(second) for first, second in pairs]))
    return tuple(added)


def restored(
    leaf: Array,
    part: Part,
    weights: Float[Array, " k"],
    theirs: tuple[Moments, ...],
    ours: UnitStatistics | Moments,
) -> tuple[Array, Array]:
    """Scales the units of a parameter to the deviation that they have in the models.

    Args:
        leaf: The parameter.
        part: The units.
        weights: The weights of the models, float `[K]`.
        theirs: The moments of the units in each model.
        ours: The mean and the deviation that they have with the parameter.

    Returns:
        The parameter, and what a bias has to add for the mean that the units have in the models.
    """
    means, deviations = zip(*part.statistics(theirs), strict=True)
    xp = array_module(leaf, *means)
    weights = weights.astype(deviations[0].dtype)
    weights_of_means = weights.astype(means[0].dtype)
    target_mean = xp.tensordot(weights_of_means, xp.stack(means), axes=1)
    target_deviation = xp.tensordot(weights, xp.stack(deviations), axes=1)
    # A unit that never varies cannot be made to, whatever it is multiplied by.
    varies = ours.deviation > 0
    scale = xp.where(varies, target_deviation / xp.where(varies, ours.deviation, 1), 1)
    for member in part.members:
        leaf = combine_units(operator.mul, leaf, member, part.group, scale)
    # scale * x + shift has the mean that is wanted.
    return leaf, target_mean - scale.astype(ours.mean.dtype) * ours.mean


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
        operation: The operation: a function of two arrays, as `operator.add`.
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
