"""What the units of a group may do beyond being permuted, read off a program.

The rules have found which axes of parameters move together. Here every equation is gone through
once more with its law (see `laws`), group by group: may these units be multiplied by any orthogonal
matrix? The features of a transformer's residual stream may, those of a hidden layer may not, as a
nonlinearity looks at each of them by itself.

Often a single parameter is in the way, the scale of a normalisation, which multiplies units one by
one. If it can be made 1 without changing the function, by multiplying the weights that read these
units instead (a *fold*), units may be rotated once that is done (see `symmetry.canonical`).

What a nonlinearity looks at may still be scaled, if a ReLU is what looks, or change its sign, if
that is an odd function. Both are solutions of linear equations between the degrees of parameters.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence

import jax.numpy as jnp

from otfusion_jax.symmetry.groups import Fold, Freedom, Group, Leaf, Offset, Scaling
from otfusion_jax.symmetry.stretch import Stretch
from otfusion_jax.tracing.algebras import (
    Magnitude,
    PositiveScales,
    Rotations,
    Scales,
    Signs,
    Vector,
)
from otfusion_jax.tracing.axis import Axis, Kind, Sum, factors_of
from otfusion_jax.tracing.dataflow import Dataflow
from otfusion_jax.tracing.group_collection import CollectedGroups
from otfusion_jax.tracing.interpretation import Interpretation
from otfusion_jax.tracing.laws import (
    AXIS_BY_AXIS,
    COMPARISONS,
    POWERS,
    SINGLE,
    UNCHANGED,
    ZERO,
    Algebra,
    Law,
    PerAxis,
    Standing,
    UnitFlow,
    adding,
    law_of,
    rounds_finely,
)
from otfusion_jax.tracing.offsets import Parameters, find_offset
from otfusion_jax.tracing.primitives import named
from otfusion_jax.tracing.records import Transfer
from otfusion_jax.tracing.rules.families import P
from otfusion_jax.tracing.units import Units
from otfusion_jax.tracing.unread_means import unread_means
from otfusion_jax.tracing.values import TracedValue
from otfusion_jax.tracing.widths import Widths

_PARTS_OF_COMPLEX = named("conj imag real")
"""Functions of complex numbers that are linear by real numbers alone."""


def find_freedoms(
    interpretation: Interpretation, collected: CollectedGroups, parts: Sequence[Leaf]
) -> tuple[Freedom, ...]:
    """Finds what the units of each group may do.

    Args:
        interpretation: The finished interpretation.
        collected: The groups that were read off it.
        parts: The parts of the parameters.

    Returns:
        One `Freedom` for each group, in their order.
    """
    program = _Program(interpretation, collected)
    outer_names = {group.outer for group in collected.groups}
    freedoms = []
    for variable, group in zip(collected.names, collected.groups, strict=True):
        if group.name in outer_names:
            # Mixed heads would have no units of their own, which move in another way in each.
            freedoms.append(Freedom(group.name, rotates=False, reason="others nested in it"))
        elif (coarse := too_coarse(group, parts)) is not None:
            freedoms.append(Freedom(group.name, rotates=False, reason=coarse))
        else:
            freedom = _freedom_of(program, variable, group, parts)
            scales = program.scalings(variable, PositiveScales())
            signs = program.scalings(variable, Signs())
            linear = _is_linear(group, freedom, scales)
            stretch = program.stretch(variable, group, freedom) if freedom.rotates else None
            offsets = program.offsets(variable, group, parts)
            unread = program.unread_means(variable, group, freedom.folds, offsets)
            freedom = dataclasses.replace(
                freedom,
                scales=scales,
                signs=signs,
                linear=linear,
                stretch=stretch,
                offsets=offsets,
                unread_means=unread,
            )
            freedoms.append(freedom)
    return tuple(freedoms)


def _is_linear(group: Group, freedom: Freedom, scales: Sequence[Scaling]) -> bool:
    """Whether units may be multiplied by any invertible matrix.

    Every such matrix is a rotation, positive scales, and another rotation. So it is allowed if both
    are, and if each member is multiplied either by the scales or by their inverses: then the whole
    multiplies the one by a matrix, and the other by its inverse transpose.
    """
    if not freedom.rotates or freedom.fixes_ones or freedom.folds or len(scales) != 1:
        return False
    degrees = {(leaf, axis): degree for leaf, axis, degree in scales[0].degrees}
    for member in group.members:
        if degrees.get((member.leaf, member.axis)) not in (1, -1):
            return False
    return True


def find_signs(
    interpretation: Interpretation, collected: CollectedGroups, names: Collection[str]
) -> dict[str, tuple[Scaling, ...]]:
    """Finds how the units of some groups may change their signs, and nothing else.

    Args:
        interpretation: The finished interpretation.
        collected: The groups that were read off it.
        names: The names of the groups to ask about.

    Returns:
        For each of them by name what `Freedom.signs` has.
    """
    program = _Program(interpretation, collected)
    signs = {}
    for variable, name in collected.names.items():
        if name in names:
            signs[name] = program.scalings(variable, Signs())
    return signs


def too_coarse(group: Group, parts: Sequence[Leaf]) -> str | None:
    """Says which parameter of a group rounds too much to be mixed or scaled; None if none does.

    Args:
        group: The group.
        parts: The parts of the parameters.
    """
    for member in group.members:
        leaf = parts[member.leaf]
        if not rounds_finely(leaf.dtype):
            return f"{member.path} is {leaf.dtype}, too coarse for sums of units"
    return None


def _freedom_of(program: "_Program", variable: int, group: Group, parts: Sequence[Leaf]) -> Freedom:
    """Finds how a group may rotate, perhaps after some parameters have been made 1."""
    plain = program.rotations(variable, ())
    if plain.refused is None:
        return _rotating(group, plain, ())
    permuted = Freedom(group.name, rotates=False, reason=plain.refused)
    if not plain.in_the_way:
        return permuted
    candidates, without = _in_the_way(program, variable, group, parts, plain)
    if without.refused is not None:
        return Freedom(group.name, rotates=False, reason=without.refused)
    folds = _folds_of(program, variable, group, parts, candidates)
    if len(folds) < len(candidates):
        # Of two factors it is enough if one is a scale that can be 1.
        without = program.rotations(variable, {fold.leaf for fold in folds})
    return permuted if without.refused is not None else _rotating(group, without, folds)


def _in_the_way(
    program: "_Program",
    variable: int,
    group: Group,
    parts: Sequence[Leaf],
    rotations: Rotations,
) -> tuple[set[int], Rotations]:
    """Finds the scales without which units could be rotated, and what they may do then.

    Behind the first that is in the way nothing is known of a value any more. So the next, as the
    scale of a normalisation that comes after the scale of a branch, is seen once that one is 1.

    Args:
        program: The equations.
        variable: The axis variable of the group.
        group: The group.
        parts: The parts of the parameters.
        rotations: What was found with all scales as they are.
    """
    candidates: set[int] = set()
    while True:
        found = set()
        for number in rotations.in_the_way - candidates:
            is_scale = _is_scale_of(parts[number], group)
            if is_scale or (not group.batch and program.has_layers(number, group, parts)):
                found.add(number)
        if rotations.refused is None or not found:
            return candidates, rotations
        candidates |= found
        rotations = program.rotations(variable, candidates)


def _folds_of(
    program: "_Program",
    variable: int,
    group: Group,
    parts: Sequence[Leaf],
    candidates: Collection[int],
) -> tuple[Fold, ...]:
    """Finds how scales can be made 1; those that can't be are left out.

    Each fold leaves all the other scales as they are, so that one can be made after the other.
    """
    scales, unknowns, standings = program.scales(variable)
    numbers = []
    for number, (leaf, _) in enumerate(unknowns):
        if leaf in candidates:
            numbers.append(number)
    folds = []
    for number, degrees in sorted(scales.degrees_with(numbers).items()):
        scale, _ = unknowns[number]
        has_layers = not _is_scale_of(parts[scale], group)
        if has_layers and not program.stays_in_a_layer(variable, unknowns, standings, degrees):
            continue
        layered = has_layers or bool(group.batch)
        others = []
        changed = set()
        for other, degree in degrees.items():
            leaf, axis = unknowns[other]
            changed.add(leaf)
            if leaf != scale:
                others.append((leaf, axis, degree))
        if group.batch and not changed <= _leading_with_batch(group):
            continue
        is_complex = _is_complex(parts[scale])
        if is_complex and program.takes_parts(variable, standings, degrees):
            continue
        if all(program.holds_multiples(leaf, scale, parts) for leaf, *_ in others):
            shift = int(scale in program.shifted)
            fold = Fold(scale, parts[scale].path, tuple(sorted(others)), layered, shift)
            folds.append(fold)
    return tuple(folds)


def _rotating(group: Group, rotations: Rotations, folds: tuple[Fold, ...]) -> Freedom:
    """Describes a group whose units may be rotated."""
    fixes_ones = rotations.fixes_ones is not None
    return Freedom(group.name, True, fixes_ones, folds, reason=rotations.fixes_ones)


def _is_complex(leaf: Leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _is_vector_of(leaf: Leaf, group: Group) -> bool:
    """Whether a parameter has one number for each unit, and nothing else."""
    return leaf.moves and _sizes(leaf.shape) == [group.size]


def _is_scale_of(leaf: Leaf, group: Group) -> bool:
    """Whether a parameter has one number for each unit, at each index of what is around them."""
    return leaf.moves and _sizes(leaf.shape) == _sizes((*group.batch, group.size))


def _sizes(shape: Sequence[int]) -> list[int]:
    """Returns the sizes of a shape, without those of axes of a single position."""
    return [size for size in shape if size > 1]


def _leading_with_batch(group: Group) -> set[int]:
    """Returns the parameters whose first axis is what is around the units, as of an ensemble.

    The units at each index of it are others, which move by themselves, and so they are multiplied
    by other scales. The units of heads are left out, which change places with all they have.
    """
    leading = set()
    if group.outer is not None or len(group.batch) != 1:
        return leading
    for member in group.members:
        (batch,) = member.location.batch
        axis, length, _ = batch
        is_whole = group.batch == (length,)
        if axis == 0 and is_whole and member.axis > 0:
            leading.add(member.leaf)
    return leading


def _hold_offset(offset: Offset, parts: Sequence[Leaf]) -> bool:
    """Whether all that has to do with an offset are real, and what takes it up no coarser."""
    dtype = parts[offset.leaf].dtype
    for reader in offset.readers:
        for leaf in (offset.leaf, reader.leaf, reader.kernel):
            other = parts[leaf].dtype
            if not jnp.issubdtype(other, jnp.floating) or not rounds_finely(other):
                return False
        taking = parts[reader.leaf].dtype
        if taking != dtype and jnp.finfo(taking).bits <= jnp.finfo(dtype).bits:
            return False
    return True


class _Program:
    """The equations of a program, as the units of one group after the other go through them."""

    def __init__(self, interpretation: Interpretation, collected: CollectedGroups) -> None:
        self._interpreter = interpretation.interpreter
        self._param_axes = interpretation.param_axes
        self._groups = frozenset(collected.names)
        self._transfers_of: dict[int, list[Transfer]] = {variable: [] for variable in self._groups}
        self._occurrences = functools.cache(self._groups_along)
        self._dataflow = Dataflow(self._interpreter)
        self._widths = Widths(self._interpreter, self._dataflow, self._occurrences)
        self.shifted = self._find_shifted()
        self._zero_beside = self._find_zero_beside()
        for transfer in self._interpreter.transfers:
            self._add(transfer)

    def _add(self, transfer: Transfer) -> None:
        """Sorts a transfer by the groups whose units go through it."""
        variables: set[int] = set()
        for value in (*transfer.operands, *transfer.results):
            for axis in value.axes:
                variables.update(self._occurrences(axis))
        for variable in variables:
            self._transfers_of[variable].append(transfer)

    def _groups_along(self, axis: Axis) -> tuple[int, ...]:
        """Returns the groups along an axis, by their axis variables, as often as each occurs."""
        found = []
        for factor in factors_of(self._interpreter.unifier.expand(axis)):
            if factor.variable in self._groups:
                found.append(factor.variable)
        return tuple(found)

    def _find_shifted(self) -> dict[int, list[int]]:
        """Finds the parameters that nothing is done to but to add 1, as some scales start from 0.

        Returns:
            For each of these parameters the numbers of the values that are 1 more.
        """
        # What is a parameter, if in another shape, and what is one plus 1.
        same = dict(self._interpreter.parameters)
        shifted: dict[int, list[int]] = {}
        used_otherwise = set()
        for transfer in self._interpreter.transfers:
            numbers = [value.number for value in transfer.operands]
            parameters = {same[number] for number in numbers if number in same}
            if not parameters:
                continue
            (result, *_) = transfer.results or transfer.operands
            is_moved = transfer.context.eqn.primitive in UNCHANGED
            is_sum = transfer.context.eqn.primitive is P.add_p
            if transfer.form == "equation" and is_moved:
                same[result.number] = same[numbers[0]]
            elif transfer.form == "equation" and is_sum and self._interpreter.ones & {*numbers}:
                (parameter,) = parameters
                shifted.setdefault(parameter, []).append(result.number or 0)
            else:
                used_otherwise |= parameters
        return {key: found for key, found in shifted.items() if key not in used_otherwise}

    def _find_zero_beside(self) -> set[int | None]:
        """Finds the values that are zeros beside something that has no room for units.

        The state that a recurrent network starts from is such, beside the first input.

        Returns:
            The numbers of these values.
        """
        found = set()
        for transfer in self._interpreter.transfers:
            is_concatenation = transfer.context.eqn.primitive is P.concatenate_p
            if is_concatenation and all(map(self._is_zero_or_full, transfer.operands)):
                found.update([value.number for value in transfer.results])
        return found

    def _is_zero_or_full(self, value: TracedValue) -> bool:
        """Whether a value is 0 throughout, or varies along all of its axes."""
        if self._interpreter.is_zero(value):
            return True
        for axis in value.axes:
            for factor in factors_of(self._interpreter.unifier.expand(axis)):
                if factor.variable is None and factor.size > 1:
                    return False
        return True

    def rotations(self, variable: int, ones: Collection[int]) -> Rotations:
        """Asks whether units may be rotated.

        Args:
            variable: The axis variable of the group.
            ones: The numbers of parameters that are taken to be 1.
        """
        standings: dict[int, Standing] = {}
        rotations = Rotations()
        for number, parameter in self._parameters(variable):
            if parameter in ones:
                continue
            standings[number] = Vector(parameter)
            if parameter in self.shifted:
                # A vector plus the ones is moved as a vector by what fixes these.
                rotations.fixes_ones = "1 is added to a parameter"
        for transfer in self._transfers_of[variable]:
            rotations.source = transfer.context.because()
            self._follow(transfer, variable, standings, rotations)
        return rotations

    def scales(self, variable: int) -> tuple[Scales, list[tuple[int, int]], dict[int, Standing]]:
        """Asks how parameters may be scaled unit by unit.

        Args:
            variable: The axis variable of the group.

        Returns:
            The equations between degrees; the parameter and the axis that each of the unknowns is
            the degree of; and for each value by its number what its degree is made of.
        """
        scales = Scales()
        unknowns, standings = self._degrees(variable, as_sums=True)
        for transfer in self._transfers_of[variable]:
            self._follow(transfer, variable, standings, scales)
        return scales, unknowns, standings

    def _degrees(
        self, variable: int, *, as_sums: bool
    ) -> tuple[list[tuple[int, int]], dict[int, Standing]]:
        """Gives the parameters degrees, one for each axis that the units lie along.

        Args:
            variable: The axis variable of the group.
            as_sums: Whether it is the sum that has a degree of a parameter that 1 is added to.

        Returns:
            The parameter and the axis that each of the unknowns is the degree of; and how
            parameters stand, by their numbers.
        """
        # Where units lie along one axis twice, as gates side by side, these are not told apart, and
        # have none.
        unknowns: list[tuple[int, int]] = []
        standings: dict[int, Standing] = {}
        for number, parameter in self._parameters(variable, as_sums=as_sums):
            dims = self._dims_of(self._param_axes[parameter], variable)
            if len(set(dims)) < len(dims):
                continue
            along = []
            for dim in dims:
                place = parameter, dim
                if place not in unknowns:
                    unknowns.append(place)
                unknown = unknowns.index(place)
                along.append((dim, {unknown: 1}))
            _, of_first = along[0]
            standings[number] = of_first if len(along) == 1 else PerAxis(tuple(along))
        return unknowns, standings

    def scalings(self, variable: int, algebra: PositiveScales | Signs) -> tuple[Scaling, ...]:
        """Finds how parameters may be scaled unit by unit, by positive numbers or by signs.

        Args:
            variable: The axis variable of the group.
            algebra: The question, which nothing has been asked yet.

        Returns:
            Independent scalings, from which all others are combined.
        """
        # Of what 1 is added to, the parameter itself is scaled, and not the sum: there is no such
        # scaling, as the equation of the sum says.
        unknowns, standings = self._degrees(variable, as_sums=False)
        for transfer in self._transfers_of[variable]:
            self._follow(transfer, variable, standings, algebra)
        scalings = []
        for solution in algebra.independent(range(len(unknowns))):
            degrees = [(*unknowns[unknown], degree) for unknown, degree in solution.items()]
            scalings.append(Scaling(tuple(sorted(degrees))))
        return tuple(scalings)

    def stretch(self, variable: int, group: Group, freedom: Freedom) -> Stretch:
        """Finds by what units that rotate are multiplied where they become another number.

        Args:
            variable: The axis variable of the group.
            group: The group.
            freedom: How it rotates.
        """
        folded = {fold.leaf for fold in freedom.folds}
        return self._widths.stretch(group, variable, self._values(variable, folded))

    def offsets(self, variable: int, group: Group, parts: Sequence[Leaf]) -> tuple[Offset, ...]:
        """Finds the biases that others can take up.

        Args:
            variable: The axis variable of the group.
            group: The group.
            parts: The parts of the parameters.
        """
        found = []
        for member in group.having("produces"):
            leaf = parts[member.leaf]
            is_of_layers = sum(size > 1 for size in leaf.shape) == 2
            is_of_layers = is_of_layers and member.leaf in self._shapes.layered
            if not _is_vector_of(leaf, group) and not is_of_layers:
                continue
            offset = find_offset(
                self._dataflow,
                self._shapes,
                self._interpreter.outputs,
                self._units(variable, group),
                (member.leaf, member.axis),
            )
            if offset is not None and _hold_offset(offset, parts):
                found.append(offset)
        return tuple(found)

    @functools.cached_property
    def _shapes(self) -> Parameters:
        return Parameters(self._interpreter, self._dataflow, self._param_axes)

    def _units(self, variable: int, group: Group) -> Units:
        return Units(group.size, lambda value: self._dims_of(value.axes, variable))

    def unread_means(
        self,
        variable: int,
        group: Group,
        folds: Sequence[Fold],
        offsets: Sequence[Offset],
    ) -> tuple[tuple[int, int], ...]:
        """Finds the parameters whose mean over the units nothing reads.

        Args:
            variable: The axis variable of the group.
            group: The group.
            folds: The scales that are taken to be 1.
            offsets: The biases that are taken to be 0.
        """
        names = {transfer.context.eqn.primitive for transfer in self._transfers_of[variable]}
        # Nothing subtracts a mean of units that are never summed up.
        if P.reduce_sum_p not in names:
            return ()
        level, zeros = set(), set()
        folded = {fold.leaf for fold in folds}
        without = {offset.leaf for offset in offsets}
        for number, parameter in self._parameters(variable):
            if parameter in folded:
                level.add(number)
            if parameter in without:
                zeros.add(number)
        parameters = self._values(variable, folded | without)
        units = self._units(variable, group)
        return unread_means(self._interpreter, self._dataflow, units, parameters, level, zeros)

    def holds_multiples(self, parameter: int, scale: int, parts: Sequence[Leaf]) -> bool:
        """Whether a parameter can be multiplied by a scale: one that is real not by complex ones.

        What 1 is added to can't either, as the sum would have to be multiplied.
        """
        if parameter in self.shifted:
            return False
        return _is_complex(parts[parameter]) or not _is_complex(parts[scale])

    def takes_parts(
        self, variable: int, standings: dict[int, Standing], degrees: dict[int, int]
    ) -> bool:
        """Whether anything that is scaled is conjugated, or its real or imaginary part taken.

        A complex scale does not pass through that as it is.

        Args:
            variable: The axis variable of the group.
            standings: For each value by its number what its degree is made of.
            degrees: The degrees that are not 0, by their unknowns.
        """
        scaled = _scaled_values(standings, degrees)
        for transfer in self._transfers_of[variable]:
            values = (*transfer.operands, *transfer.results)
            is_part = transfer.context.eqn.primitive in _PARTS_OF_COMPLEX
            if is_part and any(value.number in scaled for value in values):
                return True
        return False

    def has_layers(self, parameter: int, group: Group, parts: Sequence[Leaf]) -> bool:
        """Whether a loop takes a slice in each iteration that has one number for each unit."""
        _, *rest = parts[parameter].shape or (1,)
        if _sizes(rest) != [group.size]:
            return False
        sliced = {number for number, _ in self._interpreter.sliced}
        numbers = self._interpreter.parameters
        return any(numbers[number] == parameter for number in sliced if number in numbers)

    def stays_in_a_layer(
        self,
        variable: int,
        unknowns: Sequence[tuple[int, int]],
        standings: dict[int, Standing],
        degrees: dict[int, int],
    ) -> bool:
        """Whether a scaling can have other scales in each iteration of a loop.

        It can if all that it scales are slices that one loop takes, and what is made of these
        within an iteration: nothing of it is carried on, collected, or used outside.

        Args:
            variable: The axis variable of the group.
            unknowns: The parameter and the axis that each of the unknowns is the degree of.
            standings: For each value by its number what its degree is made of.
            degrees: The degrees that are not 0, by their unknowns.
        """
        scaled = _scaled_values(standings, degrees)
        loops = set()
        for transfer in self._transfers_of[variable]:
            values = (*transfer.operands, *transfer.results)
            if any(value.number in scaled for value in values):
                loops.add(_loop_around(transfer))
        if len(loops) != 1:
            return False
        (loop,) = loops
        slices = set()
        for number, of_loop in self._interpreter.sliced:
            if of_loop == loop and number in self._interpreter.parameters:
                slices.add(self._interpreter.parameters[number])
        return {unknowns[number][0] for number in degrees} <= slices

    def _values(self, variable: int, without: Collection[int]) -> list[tuple[TracedValue, int]]:
        """Returns the parameters with these units but for some, as values, and which they are."""
        found = []
        # Where 1 is added to a parameter, the sum says what that demands.
        for number, parameter in self._parameters(variable, as_sums=False):
            if parameter not in without:
                axes = tuple(self._param_axes[parameter])
                found.append((TracedValue(axes, Kind.PARAMETER, number), parameter))
        return found

    def _parameters(self, variable: int, *, as_sums: bool = True) -> list[tuple[int, int]]:
        """Returns the numbers of the values that are parameters with these units, and which.

        Args:
            variable: The axis variable of the group.
            as_sums: Whether it is the sum that counts of a parameter that 1 is added to.
        """
        found = []
        for number, parameter in self._interpreter.parameters.items():
            axes = self._param_axes[parameter]
            if number is None or not any(variable in self._occurrences(axis) for axis in axes):
                continue
            shifted = self.shifted.get(parameter) if as_sums else None
            for value in shifted or [number]:
                found.append((value, parameter))
        return found

    def _follow(
        self, transfer: Transfer, variable: int, standings: dict[int, Standing], algebra: Algebra
    ) -> None:
        """Applies the law of a transfer, and notes how its results stand."""
        operand_dims = self._dims(transfer.operands, variable)
        flow = UnitFlow(
            name=transfer.context.eqn.primitive.name,
            params=transfer.context.eqn.params,
            result_types=tuple([var.aval for var in transfer.context.eqn.outvars]),
            standings=tuple(
                [
                    self._standing(value, dims, standings, algebra)
                    for value, dims in zip(transfer.operands, operand_dims, strict=True)
                ]
            ),
            operand_dims=operand_dims,
            result_dims=self._dims(transfer.results, variable),
            numbers=tuple(
                [self._interpreter.numbers.get(value.number) for value in transfer.operands]
            ),
            may_hold=tuple([self._may_hold(value, variable) for value in transfer.operands]),
        )
        results = self._applied(transfer, flow, algebra)
        for value, standing in zip(transfer.results, results, strict=True):
            if standing is not None and value.number is not None:
                # What is a parameter plus 1 has its standing already.
                standings.setdefault(value.number, standing)

    def _applied(self, transfer: Transfer, flow: UnitFlow, algebra: Algebra) -> list[Standing]:
        """Returns how the results of a transfer stand."""
        law = law_of(transfer.context.eqn.primitive)
        if transfer.form == "again":
            before, after = flow.standings
            if type(before) is not type(after):
                algebra.other(flow.standings)
            return []
        if transfer.form == "choice":
            law = adding
        elif transfer.form == "call" or law is None or self._is_rough(law, flow):
            # It may make something along these units out of operands that have none of them.
            made = any(flow.result_dims)
            return flow.for_results(algebra.other(flow.standings, unknown=made))
        if law not in AXIS_BY_AXIS and any(isinstance(x, PerAxis) for x in flow.standings):
            return flow.for_results(algebra.other(flow.standings))
        if law not in POWERS and any(isinstance(x, Magnitude) for x in flow.standings):
            # Sums of absolute values are no absolute values of sums.
            return flow.for_results(algebra.other(flow.standings))
        results = law(flow, algebra)
        counts = [len(dims) for dims in (*flow.operand_dims, *flow.result_dims)]
        if max(counts, default=0) > 1:
            if isinstance(algebra, Scales) and self._axes_told_apart(counts, flow, results):
                return results
            # Of `x[:, None] + y[None, :]` each term is the same along one of the axes.
            if law not in SINGLE and not flow.all_along_the_same():
                return flow.for_results(algebra.other(flow.standings))
            return flow.for_results(algebra.along_several([*flow.standings, *results]))
        return results

    def _is_rough(self, law: Law, flow: UnitFlow) -> bool:
        """Whether an equation rounds, other than to tell which of two numbers is larger."""
        return law not in COMPARISONS and flow.quantises()

    def _axes_told_apart(
        self, counts: Sequence[int], flow: UnitFlow, results: Sequence[Standing]
    ) -> bool:
        """Whether of all values with units along several axes it is known how each one stands."""
        for count, standing in zip(counts, (*flow.standings, *results), strict=True):
            if count > 1 and standing is not None and not isinstance(standing, PerAxis):
                return False
        return True

    def _standing(
        self,
        value: TracedValue,
        dims: tuple[int, ...],
        standings: dict[int, Standing],
        algebra: Algebra,
    ) -> Standing:
        """Returns how an operand stands, of which the units lie along some axes."""
        if self._interpreter.is_zero(value) or (not dims and value.number in self._zero_beside):
            return ZERO
        standing = standings.get(value.number) if value.number is not None else None
        if not isinstance(standing, PerAxis):
            return standing
        if len(dims) != len(standing.standings):
            return algebra.other([standing])
        # A slice that a loop takes goes by the number of the whole, and has one axis less.
        along = [by_itself for _, by_itself in standing.standings]
        return PerAxis(tuple(zip(dims, along, strict=True)))

    def _dims(self, values: Sequence[TracedValue], variable: int) -> tuple[tuple[int, ...], ...]:
        """Returns for each value the numbers of the axes that the units lie along.

        An axis is listed once for each time that it has the units, as a product of two may.
        """
        return tuple([self._dims_of(value.axes, variable) for value in values])

    def _dims_of(self, axes: Sequence[Axis], variable: int) -> tuple[int, ...]:
        along: list[int] = []
        for dim, axis in enumerate(axes):
            along += [dim] * self._occurrences(axis).count(variable)
        return tuple(along)

    def _may_hold(self, value: TracedValue, variable: int) -> bool:
        """Whether units lie along an axis of a value, or could where it is constant."""
        unifier = self._interpreter.unifier
        size = unifier.size(variable)
        for axis in value.axes:
            expanded = unifier.expand(axis)
            if _count(expanded, variable) or _count(expanded, None) >= size:
                return True
        return False


def _scaled_values(standings: dict[int, Standing], degrees: dict[int, int]) -> set[int | None]:
    """Returns the numbers of the values that are multiplied by a power of the scale."""
    scaled = set()
    for number, standing in standings.items():
        if _is_scaled(standing, degrees):
            scaled.add(number)
    return scaled


def _is_scaled(standing: Standing, degrees: dict[int, int]) -> bool:
    """Whether a value with some degrees is multiplied by a power of the scale, along any axis."""
    if isinstance(standing, PerAxis):
        return any(_is_scaled(along, degrees) for _, along in standing.standings)
    power = 0
    for unknown, count in standing.items():
        degree = degrees.get(unknown, 0)
        power += count * degree
    return power != 0


def _loop_around(transfer: Transfer) -> int | None:
    """Returns the innermost `scan` around an equation, by its identity; None outside of all."""
    context = transfer.context.caller
    while context is not None and context.eqn.primitive is not P.scan_p:
        context = context.caller
    return None if context is None else id(context.eqn)


def _count(axis: Axis, variable: int | None) -> int:
    """Returns at how many positions of an axis there are units, or constants for None."""
    size = others = 1
    for term in axis:
        if isinstance(term, Sum):
            count = sum(_count(segment, variable) for segment in term.segments)
        else:
            count = term.size if term.variable == variable else 0
        size *= term.size
        others *= term.size - count
    return size - others
