"""What a repair has to know of the features that come out of a product with a parameter.

Of the average: the product as a linear function of the parameter (`LinearProduct`), and which units
are among its features (`role_of_units`, `innermost`). Of each model: its features and their
statistics, moved to where these units are in the average (`moved_features`, `unit_statistics`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Array

from otfusion_jax.averaging.average import accumulation_dtype
from otfusion_jax.common.scaling import deviation
from otfusion_jax.fusion.repair_methods import UnitStatistics
from otfusion_jax.fusion.side_by_side import GroupView, Network, Origin
from otfusion_jax.symmetry.groups import Group, Member, Role
from otfusion_jax.symmetry.leaf_structure import leaf_structure_of
from otfusion_jax.symmetry.transport import move_blocks, moved_units
from otfusion_jax.tracing.activations import Path, samples_of

# --- the product, as a linear function of the parameter


@dataclasses.dataclass(frozen=True, eq=False)
class RowGram:
    """Inner products of the features that a parameter is multiplied by: XᵀX in place of X.

    Applying Xᵀ X to a parameter costs as much as the features are wide then, however many samples
    there are.

    Attributes:
        matrix: The inner products, with the contracted axes of the features twice:
            `[*width, *width]`.
        axes: The axes of the parameter that are contracted, in the order of these.
    """

    matrix: Array
    axes: tuple[int, ...]

    def apply(self, parameter: Array) -> Array:
        """Multiplies a parameter by XᵀX along its contracted axes."""
        count = len(self.axes)
        contracted = tuple(range(count, 2 * count)), self.axes
        result = jax.lax.dot_general(
            self.matrix,
            parameter,
            (contracted, ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.moveaxis(result, range(count), self.axes)


def row_gram_of(eqn: core.JaxprEqn, features: Array, position: int) -> RowGram | None:
    """Takes the inner products of the features in a matrix product.

    Args:
        eqn: The product of features with a parameter.
        features: The features.
        position: Which of the two operands the parameter is.

    Returns:
        The inner products. None for convolutions and batched products, and if there are fewer
        samples than the features are wide, so that nothing would be gained.
    """
    if eqn.primitive is not P.dot_general_p:
        return None
    contracted, batch = eqn.params["dimension_numbers"]
    feature_axes, parameter_axes = [], []
    for feature_axis, parameter_axis in sorted(
        zip(contracted[1 - position], contracted[position], strict=True)
    ):
        feature_axes.append(feature_axis)
        parameter_axes.append(parameter_axis)
    width = math.prod(features.shape[axis] for axis in feature_axes)
    samples = features.size // width
    if batch[0] or width > samples:
        return None
    sample_axes = [axis for axis in range(features.ndim) if axis not in feature_axes]
    # Sums of squares: in the dtype of integers or of half precision they would overflow.
    features = features.astype(wide_dtype(eqn, features.dtype))
    matrix = jax.lax.dot_general(
        features,
        features,
        ((sample_axes, sample_axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return RowGram(matrix, tuple(parameter_axes))


def wide_dtype(eqn: core.JaxprEqn, dtype: Any) -> Any:
    """Says in what precision to compute with what meets in a product.

    Args:
        eqn: The product of features with a parameter.
        dtype: The dtype of the features, of the parameter or of their product. It may be one of
            integers.

    Returns:
        A real dtype, or a complex one for complex numbers: float64 or complex128 if the product is
        of that precision, float32 or complex64 if it is of less.
    """
    result: Any = eqn.outvars[0].aval
    is_double = jnp.finfo(result.dtype).bits == 64
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(jnp.complex128 if is_double else jnp.complex64)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


# Compared by identity: JAX hashes the methods that it is given, and arrays cannot be hashed.
@dataclasses.dataclass(frozen=True, eq=False)
class LinearProduct:
    """A product of the average's features with a parameter, as a linear function of the parameter.

    Attributes:
        eqn: The product: a matrix product or a convolution.
        operands: Its two operands in the average.
        position: Which of them is the parameter.
        origin: Which parameter it is, and how it is arranged on its way into the product.
        row_gram: The inner products of the features, if there are any that save work.
    """

    eqn: core.JaxprEqn
    operands: tuple[Array, Array]
    position: int
    origin: Origin
    row_gram: RowGram | None

    def compute(self, parameter: Array) -> Array:
        """Returns the features that the average has with some parameter, in its own dtypes."""
        operands = list(self.operands)
        operands[self.position] = self.origin.arrange(parameter)
        return self.eqn.primitive.bind(*operands, **self.eqn.params)

    def widened(self, array: Array) -> Array:
        """Returns a parameter or features in the precision that `compute_wide` computes in."""
        return array.astype(wide_dtype(self.eqn, array.dtype))

    def compute_wide(self, parameter: Array) -> Array:
        """Returns the same features, in float32 or wider: nothing is rounded on the way to them."""
        operands = list(self.operands)
        operands[self.position] = self._arrange_wide(parameter)
        wide_operands = [self.widened(operand) for operand in operands]
        result: Any = self.eqn.outvars[0].aval
        highest = jax.lax.Precision.HIGHEST
        options = {
            "preferred_element_type": wide_dtype(self.eqn, result.dtype),
            "precision": (highest, highest),
        }
        return self.eqn.primitive.bind(*wide_operands, **self.eqn.params | options)

    def normal(self, parameter: Array) -> Array:
        """Applies `compute_wide`, and then its transpose."""
        if self.row_gram is None:
            transpose = jax.linear_transpose(self.compute_wide, parameter)
            return transpose(self.compute_wide(parameter))[0]
        arranged = self._arrange_wide(parameter)
        arrange_back = jax.linear_transpose(self._arrange_wide, parameter)
        return arrange_back(self.row_gram.apply(arranged))[0]

    def _arrange_wide(self, parameter: Array) -> Array:
        """Arranges a parameter of float32 or wider, without the casts to less."""
        for eqn in self.origin.steps:
            options = eqn.params
            if eqn.primitive is P.convert_element_type_p:
                options = options | {"new_dtype": wide_dtype(self.eqn, options["new_dtype"])}
            parameter = eqn.primitive.bind(parameter, **options)
        return parameter


# --- the units among the features


def role_of_units(group: Group, leaf: int, index: Any) -> Role:
    """Returns the role of features that come out of a product with a parameter.

    It is that of the parameter's axis that they lie along: what is contracted with features that
    push forward is pulled back, as keys are that meet queries.

    Args:
        group: The group of the units among the features.
        leaf: The position of the parameter among the parts of the symmetry.
        index: Where the units are along their axis of the features.

    Returns:
        The role.
    """
    in_leaf = [member for member in group.members if member.leaf == leaf]
    same_index = [member for member in in_leaf if member.location.index == index]
    roles = {member.role for member in same_index or in_leaf}
    return "consumes" if roles == {"consumes"} else "produces"


def innermost(views: Sequence[GroupView]) -> list[int]:
    """Chooses views that have no features in common: of heads and of the units in them, the latter.

    Args:
        views: The groups whose units are among the features, nested ones last.

    Returns:
        The positions of the views that are chosen, ascending.
    """
    chosen = []
    for number, earlier in enumerate(views):
        if not any(_overlap(earlier, later) for later in views[number + 1 :]):
            chosen.append(number)
    return chosen


def _overlap(one: GroupView, other: GroupView) -> bool:
    """Whether there are features that are of a unit in both views."""
    location, other_location = one.view.location, other.view.location
    # Along different axes there is a feature for each pair of units.
    if location.axis != other_location.axis:
        return True
    positions = set(location.index.positions(one.group.size).flat)
    return not positions.isdisjoint(other_location.index.positions(other.group.size).flat)


# --- the features of the models


def moved_features(
    network: Network, average: Network, path: Path, roles: Sequence[Role], features: Array
) -> Array:
    """Moves the features of a network to where they are in the average.

    Args:
        network: The network.
        average: The average.
        path: Where the equation stands that puts the features out.
        roles: The role of the features for each group among them.
        features: The features.

    Returns:
        The features, of the shape that they have in the average.
    """
    if not network.plans or path not in network.produced:
        return features
    source_members, target_members = [], []
    for source, target, role in zip(
        network.produced[path], average.produced[path], roles, strict=True
    ):
        # As both run one program, a site has the views of the same groups in the same order.
        assert network.average_names[source.group.name] == target.group.name
        # An array of features is taken apart as a parameter would be that the units index.
        source_members.append((source.group, Member(0, "", source.view.location, role)))
        target_members.append((target.group, Member(0, "", target.view.location, role)))
    result: Any = average.equations[path].eqn.outvars[0].aval
    source_structure = leaf_structure_of(features.shape, source_members)
    target_structure = leaf_structure_of(result.shape, target_members)
    blocks = move_blocks(source_structure, network.plans, features)
    return target_structure.partition.join(blocks)


def unit_statistics(
    network: Network, path: Path, number: int, roles: Sequence[Role], features: Array
) -> UnitStatistics:
    """Takes the statistics of the units of a network, moved to those of the average.

    Args:
        network: The network.
        path: Where the equation stands that puts the features out.
        number: Which of the groups among the features is meant.
        roles: The role of the features for each of these groups.
        features: The features of the network, not moved.

    Returns:
        The statistics. For a unit of the average that several units are merged into they are the
        means over theirs.
    """
    views = network.produced[path]
    group, view = views[number]
    outer_role: Role = "produces"
    for other, role in zip(views, roles, strict=True):
        # The outer group may have several views here, as queries, keys and values have heads each.
        if other.group.name == group.outer:
            *_, outer_index = view.location.batch[-1]
            if other.view.location.index == outer_index:
                outer_role = role
    units = samples_of(features, view, group)
    units = units.astype(accumulation_dtype(units.dtype))

    def moved(numbers: Array) -> Array:
        return moved_units(group, network.plans, numbers, roles[number], outer_role)

    if group.rotates:
        # How far a mixture of units spreads depends on all of them together.
        units = jax.vmap(moved, in_axes=-2, out_axes=-2)(units)
        return UnitStatistics(jnp.mean(units, axis=-2), deviation(units, axis=-2))
    return UnitStatistics(moved(jnp.mean(units, axis=-2)), moved(deviation(units, axis=-2)))
