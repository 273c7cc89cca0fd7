"""The pass over a program in which the parameters of an average are corrected.

1. The models and their average run side by side over a batch of inputs, equation by equation, in
   dataflow order. In place of a model whose units plans have merged or split runs its original.
2. A parameter is followed through reshapes, transposes and casts. Where it is used, the average
   computes with the parameter as corrected by then.
3. Where features meet a parameter for the first time in a product, the method corrects the
   parameter: from the features of the models, moved along their plans, and from the features that
   the average itself has by now.
4. What the method would add to the units of the product waits for the first bias that is added to
   them, and goes into that.
5. A parameter that is used first in any other way stays as the average has it.
6. A parameter is settled by its first use. Later uses, of shared parameters, take it as it is.

So what follows a correction sees the features that come of it, and the pass returns parameters of
the same architecture.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Array, Float

from otfusion_jax.fusion.product_features import (
    LinearProduct,
    innermost,
    moved_features,
    role_of_units,
    row_gram_of,
    unit_statistics,
)
from otfusion_jax.fusion.repair_methods import (
    AbstractRepair,
    Part,
    Product,
    combine_units,
    members_at,
)
from otfusion_jax.fusion.side_by_side import (
    ARRANGEMENTS,
    Network,
    Shift,
    Value,
    evaluated,
    lifted,
)
from otfusion_jax.symmetry.groups import Role
from otfusion_jax.tracing.activations import Path

_PRODUCTS = (P.dot_general_p, P.conv_general_dilated_p)


@dataclasses.dataclass(eq=False)
class RepairPass:
    """The state of a repair on its way through the program.

    `step` and `enter` are what `interpret` asks for: how an equation is evaluated, and what a call
    hands to its body.

    Attributes:
        networks: The networks that run side by side, one for each model, and the average last.
        method: The method that corrects a parameter.
        weights: The weights of the models, float `[K]`.
        parameters: The parameters of the average, as corrected up to here.
        settled: The positions of the parameters that do not change any more.
    """

    networks: Sequence[Network]
    method: AbstractRepair
    weights: Float[Array, " k"]
    parameters: list[Array]
    settled: set[int] = dataclasses.field(default_factory=set)

    def enter(self, path: Path, operands: list[Any]) -> list[Any]:
        """Returns what the body of a call runs on: the operands of the call, as values."""
        return lifted(self.networks, path, operands)

    def step(self, eqn: core.JaxprEqn, path: Path, operands: list[Any]) -> list[Any]:
        """Evaluates an equation in every network, and corrects the parameter that it uses first."""
        values = [self._latest(value) for value in lifted(self.networks, path, operands)]
        if eqn.primitive in _PRODUCTS:
            position = self._unsettled_factor(values)
            if position is not None:
                return [self._corrected_product(eqn, path, values, position)]
        if eqn.primitive is P.add_p:
            values = self._with_shifted_bias(values)
        if eqn.primitive not in ARRANGEMENTS:
            # From here on the networks have computed with these parameters. To change them later
            # would make that untrue of the average.
            for value in values:
                if value.origin is not None:
                    self.settled.add(value.origin.leaf)
        return evaluated(self.networks, path, values)

    def _latest(self, value: Value) -> Value:
        """Returns the same value, computed from the average's parameters as they are by now."""
        origin = value.origin
        if origin is None or origin.leaf not in self.settled:
            return value
        return value.with_average(origin.arrange(self.parameters[origin.leaf]))

    # --- products

    def _unsettled_factor(self, values: list[Value]) -> int | None:
        """Returns which factor of features is a parameter that is used for the first time."""
        first, second = values
        # Two parameters multiplied with each other have no features to be matched, and two features
        # no parameter to be corrected.
        if first.is_feature == second.is_feature:
            return None
        position = 1 if first.is_feature else 0
        origin = values[position].origin
        if origin is None or origin.leaf in self.settled:
            return None
        # Quantised weights stay, as they do in an average.
        is_number = jnp.issubdtype(self.parameters[origin.leaf].dtype, jnp.inexact)
        return position if is_number else None

    def _corrected_product(
        self, eqn: core.JaxprEqn, path: Path, values: list[Value], position: int
    ) -> Value:
        """Corrects a parameter, and evaluates the product with it in every network."""
        origin = values[position].origin
        assert origin is not None, "the caller has chosen a parameter"
        leaf = origin.leaf
        operands = values[0].arrays[-1], values[1].arrays[-1]
        row_gram = row_gram_of(eqn, operands[1 - position], position)
        linear = LinearProduct(eqn, operands, position, origin, row_gram)
        features = self._features_of_models(path, values)
        roles = self._roles(path, leaf)
        parts = self._parts(path, leaf, roles, features)
        average = self.networks[-1]
        moved = []
        # There are features of all networks but the last, the average.
        for network, model_features in zip(self.networks, features, strict=False):
            moved.append(moved_features(network, average, path, roles, model_features))

        product = Product(
            leaf=self.parameters[leaf],
            compute=linear.compute,
            widened=linear.widened,
            compute_wide=linear.compute_wide,
            normal=linear.normal,
            model_features=tuple(moved),
            weights=self.weights,
            parts=parts,
        )
        self.parameters[leaf], amounts = self.method.correct(product)
        self.settled.add(leaf)

        shifts = []
        for part, amount in zip(parts, amounts, strict=True):
            if amount is not None:
                shifts.append(Shift(part.group, part.view, part.role, amount))
        # Each model goes on with its own features, not with those that were moved.
        arrays = *features, linear.compute(self.parameters[leaf])
        return Value(arrays, is_feature=True, shifts=tuple(shifts))

    def _features_of_models(self, path: Path, values: list[Value]) -> list[Array]:
        """Evaluates a product in every network but the average."""
        features = []
        for number, network in enumerate(self.networks[:-1]):
            eqn = network.equations[path].eqn
            first, second = values
            features.append(
                eqn.primitive.bind(first.arrays[number], second.arrays[number], **eqn.params)
            )
        return features

    def _roles(self, path: Path, leaf: int) -> list[Role]:
        """Returns the role of a product's features for each group among them."""
        roles = []
        for group, view in self.networks[-1].produced.get(path, []):
            roles.append(role_of_units(group, leaf, view.location.index))
        return roles

    def _parts(
        self, path: Path, leaf: int, roles: list[Role], features: list[Array]
    ) -> tuple[Part, ...]:
        """Returns the units that come out of a product, with their statistics in every model."""
        views = self.networks[-1].produced.get(path, [])
        parts = []
        for number in innermost(views):
            group, view = views[number]
            role = roles[number]
            statistics = []
            for network, model_features in zip(self.networks, features, strict=False):
                statistics.append(unit_statistics(network, path, number, roles, model_features))
            members = members_at(group, leaf, role, view.location.index)
            parts.append(Part(group, view, role, tuple(statistics), members))
        return tuple(parts)

    # --- biases

    def _with_shifted_bias(self, values: list[Value]) -> list[Value]:
        """Adds pending shifts to a bias that is about to be added to the features that need them.

        Returns:
            The operands of the addition, with the bias as it is then.
        """
        first, second = values
        # The bias may be either operand of the sum.
        for features, bias in ((first, second), (second, first)):
            if not features.shifts or bias.origin is None or bias.origin.leaf in self.settled:
                continue
            self._shift_parameter(bias.origin.leaf, features.shifts)
            # The operand is an arrangement of the parameter as it was before.
            values = [self._latest(value) for value in values]
        return values

    def _shift_parameter(self, leaf: int, shifts: Sequence[Shift]) -> None:
        """Adds to a parameter what is to be added to the units that lie along its axes."""
        for group, view, role, amount in shifts:
            for member in members_at(group, leaf, role, view.location.index):
                shifted = combine_units(jnp.add, self.parameters[leaf], member, group, amount)
                self.parameters[leaf] = shifted
        self.settled.add(leaf)
