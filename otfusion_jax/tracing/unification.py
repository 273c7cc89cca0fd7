"""Unification: from what a program does to the equations between its axes.

The rule of a primitive (see `rules`) knows what its equation does to axes, and says it to the
`Unifier` of the trace in these words:

- `fresh`, `pinned`: a new axis, whose units may be permuted, or may not.
- `unify`: axes meet unit by unit. `x + y` is the same under a permutation of units only if both
  operands and the result are permuted alike, so their variables become one.
- `contract`: two axes are summed over together, as in `x @ w`. The sum is the same if both are
  permuted alike. Their variables become one, and their roles are opposite.
- `enter`: an axis of a parameter becomes an axis of features. This is where the parameter is found
  to produce units.
- `regroup`: a reshape. Axes are merged into products, and variables are split into products.
- `split_segments`: a slice or a split. Variables are split into sums.
- `pin`: the units of an axis may not be permuted.

So a variable is split when two axes meet of which one is the finer, or when a program looks inside
an axis, and for no other reason. At the end each variable that is not pinned is a set of hidden
units, and the axes of the parameters that it occurs in are those that must be permuted together.

Attention with 2 heads of 3 units is an example. The kernel has one axis for both, the bias has two:

>>> unifier = Unifier()
>>> kernel, bias_heads, bias_units = unifier.fresh(6), unifier.fresh(2), unifier.fresh(3)
>>> features = unifier.enter(kernel, Kind.PARAMETER, Kind.FEATURE)  # x @ kernel
>>> heads, units = unifier.regroup([features], [2, 3], "a reshape")  # .reshape(2, 3)
>>> kinds = [Kind.FEATURE, Kind.PARAMETER]
>>> heads = unifier.unify([heads, bias_heads], kinds)  # + bias
>>> units = unifier.unify([units, bias_units], kinds)
>>> [factor.size for factor in unifier.expand(kernel)]
[2, 3]
>>> unifier.variables_of(kernel) == unifier.variables_of((*bias_heads, *bias_units))
True

The work is divided by subject: `axis` has the expressions, `axis_variables` what is known of their
variables, `segments`, `matching` and `regrouping` how axes are split and compared, `roles` and
`parity` what is produced and what consumed.
"""

from collections.abc import Sequence

from otfusion_jax.tracing.axis import (
    Axis,
    Disagreement,
    Factor,
    Kind,
    Sum,
    Term,
)
from otfusion_jax.tracing.axis_variables import AxisVariables
from otfusion_jax.tracing.matching import match, pin_disagreement, tie_elementwise
from otfusion_jax.tracing.regrouping import regroup
from otfusion_jax.tracing.roles import RoleConstraint, RoleKey, role_key, role_signs
from otfusion_jax.tracing.segments import single_positions, split_segments


class Unifier(AxisVariables):
    """The axis variables of one trace, and the operations by which rules tie them.

    Attributes:
        role_constraints: Where parameters have met features, in dataflow order.
        contracted_with_others: Axes that have been summed over together with other axes than
            themselves. Where a program selects some units of an axis, the others count as left out,
            unless it puts them to use elsewhere, in such a sum.
        contracted_parameters: Factors of parameters that have been contracted with features, or
            with other parameters. Their variables count as read, though no axis of any features may
            carry them: the features may be constant along the axis, or the axis may lie between the
            two factors of a low-rank product.
        contracted_with_constants: Factors of parameters that have been contracted with constants
            that may be 0. If that is all that they meet, they stay where they are: other inputs may
            have units in place of the constants, as recurrent weights meet zeros in a first step
            only.
        contracted_with_numbers: Factors of parameters that have been contracted with a constant
            that is nowhere 0, as the gradient of a sum contracts the last weights with ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.role_constraints: list[RoleConstraint] = []
        self.contracted_with_others: list[Axis] = []
        self.contracted_parameters: list[Factor] = []
        self.contracted_with_constants: list[Factor] = []
        self.contracted_with_numbers: list[Factor] = []

    # --- axes that meet

    def unify(self, axes: Sequence[Axis], kinds: Sequence[Kind]) -> Axis:
        """Ties axes that meet unit by unit.

        Args:
            axes: The axes, all of one size.
            kinds: The kind of the value that each belongs to.

        Returns:
            The axis of the result.
        """
        result_kind = max(kinds)
        result = self.enter(axes[0], kinds[0], result_kind)
        for axis, kind in zip(axes[1:], kinds[1:], strict=True):
            entered = self.enter(axis, kind, result_kind)
            result = tie_elementwise(self, result, entered)
        return result

    def contract(
        self,
        a: Axis,
        b: Axis,
        kinds: tuple[Kind, Kind],
        *,
        may_be_square: bool = True,
        is_nonzero: bool = False,
    ) -> None:
        """Ties two axes that are summed over together.

        Args:
            a: One axis.
            b: The other axis, of the same size.
            kinds: The kinds of the values that they belong to.
            may_be_square: Whether the two values may be one and the same.
            is_nonzero: Whether one of them is known to be a constant that is nowhere 0.
        """
        kind_a, kind_b = kinds

        def meet(x: Factor, y: Factor) -> Factor:
            if x.variable is None or y.variable is None:
                # A sum with equal weights, for which any order will do. It ties nothing.
                self._note_met_constant(x, kind_a, y, kind_b, is_nonzero)
                self._note_met_constant(y, kind_b, x, kind_a, is_nonzero)
                return x
            # A sum of squares, as in a normalisation, does not tell that units are put to use.
            is_square = may_be_square and kind_a is kind_b and self._is_same_axis(x, y)
            if not is_square:
                self.contracted_with_others += [a, b]
                if kind_a is kind_b is Kind.PARAMETER:
                    self.contracted_parameters.append(x)
            self.unite(x, y)
            if x.role and y.role:
                self._constrain_contracted(x, y, kinds)
            return x

        try:
            match(self, a, b, meet)
        except Disagreement as disagreement:
            pin_disagreement(self, disagreement)

    def _note_met_constant(
        self, x: Factor, kind: Kind, other: Factor, other_kind: Kind, is_nonzero: bool
    ) -> None:
        """Notes that `x` was contracted with a factor that may be constant."""
        if kind is not Kind.PARAMETER or x.variable is None:
            return
        # Features may be constant along this one axis, as a broadcast is. Padding stands for units
        # that other inputs have there.
        met_features = other_kind is not Kind.CONSTANT and not other.filled
        if met_features:
            self.contracted_parameters.append(x)
        elif is_nonzero:
            self.contracted_with_numbers.append(x)
        else:
            self.contracted_with_constants.append(x)

    def _is_same_axis(self, x: Factor, y: Factor) -> bool:
        """Says whether two factors are the same part of one axis, of parameters or of features."""
        assert x.variable is not None
        assert y.variable is not None
        if self.find(x.variable) != self.find(y.variable):
            return False
        if x.role == 0 or y.role == 0:
            return False
        root_x = self.roles.find(x.role)
        root_y = self.roles.find(y.role)
        return root_x == root_y

    def _constrain_contracted(self, x: Factor, y: Factor, kinds: tuple[Kind, Kind]) -> None:
        """Notes what a contraction of two factors says of their roles."""
        match kinds:
            case (Kind.FEATURE, Kind.PARAMETER):
                self.role_constraints.append(RoleConstraint(y, x, -1))
            case (Kind.PARAMETER, Kind.FEATURE):
                self.role_constraints.append(RoleConstraint(x, y, -1))
            case (Kind.PARAMETER, Kind.PARAMETER):
                # A low-rank product `x (u @ v)` is the same as `(x u) @ v`, where there would be
                # features between the two factors. Their role is made up here.
                features = x._replace(role=self.roles.fresh())
                self.role_constraints.append(RoleConstraint(x, features, 1))
                self.role_constraints.append(RoleConstraint(y, features, -1))
            case _:
                # Queries and keys: if plans push one of them forward, they pull the other back.
                self.roles.tie(x.role, y.role, -1)

    # --- from parameters to features

    def enter(self, axis: Axis, kind: Kind, result_kind: Kind) -> Axis:
        """Carries an axis of an operand into a result that may depend on more than the operand.

        Where parameters enter features, the features get roles of their own and the parameters are
        noted as what produces them.

        Args:
            axis: The axis.
            kind: The kind of the operand.
            result_kind: The kind of the result.

        Returns:
            The axis of the result.
        """
        if kind is Kind.PARAMETER and result_kind is Kind.FEATURE:
            return self._entered(self.expand(axis, keep_single=True))
        return axis

    def _entered(self, axis: Axis) -> Axis:
        terms: list[Term] = []
        for term in axis:
            if isinstance(term, Sum):
                segments = [self._entered(segment) for segment in term.segments]
                terms.append(Sum(term.size, tuple(segments)))
            elif term.variable is None or term.role == 0 or term.size == 1:
                terms.append(term)
            else:
                feature = term._replace(role=self.roles.fresh())
                self.role_constraints.append(RoleConstraint(term, feature, 1))
                terms.append(feature)
        return tuple(terms)

    # --- axes that are taken apart

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int], reason: str) -> list[Axis]:
        """Reads the same elements as axes of other sizes; see `regrouping.regroup`."""
        return regroup(self, axes, sizes, reason)

    def split_segments(self, axis: Axis, boundaries: Sequence[int]) -> list[Axis]:
        """Takes an axis apart into segments; see `segments.split_segments`."""
        return split_segments(self, axis, boundaries)

    def single_positions(self, axis: Axis, start: int, end: int) -> set[int]:
        """Returns the variables of single positions in a range; see `segments.single_positions`."""
        return single_positions(self, axis, start, end)

    # --- what has been found

    def role_key(self, factor: Factor) -> tuple[RoleKey, int]:
        """Returns which axis of a parameter a factor belongs to; see `roles.role_key`."""
        return role_key(self, factor)

    def role_signs(self) -> dict[RoleKey, set[int]]:
        """Solves the role constraints found so far; see `roles.role_signs`."""
        return role_signs(self, self.role_constraints)
