"""What is done to a parameter of an average whose features are to match those of the models."""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.scaling import deviation
from otfusion_jax.symmetry.groups import Group, Member, Role
from otfusion_jax.symmetry.partition import StridedIndex
from otfusion_jax.symmetry.units import units_of, with_units


class Part(NamedTuple):
    """Units that come out of a product.

    Attributes:
        group: whose units they are.
        units: brings features to `[*batch, samples, units]`.
        statistics: of the units of each model, K means and deviations, float `[*batch, units]`
            each; of models that plans merge or split, the means over those of their own units.
        along: the axes of the parameter that they lie along.
    """

    group: Group
    units: Callable[[Array], Array]
    statistics: tuple[tuple[Array, Array], ...]
    along: tuple[Member, ...]


class Product(NamedTuple):
    """A product of features with a parameter, in all models and in their average.

    Attributes:
        leaf: the parameter of the average.
        compute: from such a parameter to the average's features, linear.
        normal: the same, followed by its transpose.
        found: the features of each model, K arrays of one shape, those of models of another width
            moved along their plans.
        weights: of the models, float `[K]`.
        parts: the features that belong to groups; those of one part are of no other.
    """

    leaf: Array
    compute: Callable[[Array], Array]
    normal: Callable[[Array], Array]
    found: tuple[Array, ...]
    weights: Float[Array, " k"]
    parts: tuple[Part, ...]


Shifts = tuple[Float[Array, "*batch units"] | None, ...]
"""What is to be added to the units of each part of a product by a bias, if there is one."""


@dataclasses.dataclass(frozen=True)
class AbstractRepair(abc.ABC):
    """How a parameter of the average is corrected. Subclasses are frozen, hashable dataclasses."""

    @abc.abstractmethod
    def correct(self, product: Product) -> tuple[Array, Shifts]:
        """Corrects one parameter. Traced: called under `jax.jit`.

        Args:
            product: where the parameter is used.

        Returns:
            The parameter, and for each part what is to be added to its units by a bias, or None.
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
        leaf, shifts = product.leaf, []
        features = product.compute(leaf)
        for part in product.parts:
            ours = part.units(features)
            means, deviations = (
                jnp.tensordot(product.weights, jnp.stack(each), axes=1)
                for each in zip(*part.statistics, strict=True)
            )
            spread = deviation(ours, axis=-2)
            scale = jnp.where(spread > 0, deviations / jnp.where(spread > 0, spread, 1), 1)
            for member in part.along:
                leaf = along(jnp.multiply, leaf, member, part.group, scale)
            shift = means - scale * jnp.mean(ours, axis=-2)
            shifts.append(shift if part.along else None)
        return leaf, tuple(shifts)


@dataclasses.dataclass(frozen=True)
class LeastSquares(AbstractRepair):
    """Gives every product the features that the models have on average, in the least squares.

    The parameter is the one that comes closest to the mean of the models' features from the
    features that the average itself has there, with a penalty on the distance from the average. The
    outputs of the network are products too: they come close to the models' mean. Solved by
    conjugate gradients, so that neither shapes nor layouts matter. Layer by layer it is the
    regression of Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models
    (RegMean), ICLR 2023, on the features of the merged model instead of those of each parent.

    Attributes:
        ridge: the penalty, in units of the mean eigenvalue of the features' inner products.
        steps: of conjugate gradients; to stop early is a penalty too.
    """

    ridge: float = 0.01
    steps: int = 20

    def __post_init__(self):
        require_number(self, "ridge", least=0, finite=True)
        require_number(self, "steps", least=1, whole=True)

    def correct(self, product: Product) -> tuple[Array, Shifts]:
        """See `AbstractRepair.correct`."""
        leaf, compute = product.leaf, product.compute
        # The squared length of the features of random weights is the trace, on average.
        random = jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
        penalty = self.ridge * _inner(compute(random)) / _inner(random)

        def normal(x: Array) -> Array:
            return product.normal(x) + penalty * x

        target = sum(w * y for w, y in zip(product.weights, product.found, strict=True))
        short = (target - compute(leaf)).astype(product.found[0].dtype)
        (missing,) = jax.linear_transpose(compute, leaf)(short)
        change, _ = jax.scipy.sparse.linalg.cg(normal, missing, maxiter=self.steps)
        return leaf + change, (None,) * len(product.parts)


def _inner(x: Array) -> Array:
    return jnp.sum(x * x)


def members_at(group: Group, leaf: int, role: Role, place: StridedIndex) -> tuple[Member, ...]:
    """Returns the axes of a parameter that units at some place of features lie along.

    Args:
        group: whose units.
        leaf: position of the parameter.
        role: of the units.
        place: where they are in the features.

    Returns:
        The members at this place, or the only one, wherever it is.
    """
    mine = tuple(m for m in group.members if m.leaf == leaf and m.role == role)
    same = tuple(m for m in mine if m.location.index == place)
    return same or (mine if len(mine) == 1 else ())


def along(
    operation: Callable[..., Array], leaf: Array, member: Member, group: Group, numbers: Array
) -> Array:
    """Combines a parameter with one number per unit.

    Args:
        operation: of two arrays.
        leaf: the parameter.
        member: where the units are in it.
        group: whose units.
        numbers: `[*batch, units]`.

    Returns:
        The parameter.
    """
    units = units_of(leaf, member.location, group)
    changed = operation(units, numbers[..., None].astype(leaf.dtype))
    return with_units(leaf, member.location, group, changed)
