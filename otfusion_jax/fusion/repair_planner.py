"""Going through the program of an average, to find what a repair corrects.

A parameter is corrected where features first meet it in a product. It is followed there through
reshapes, transposes and casts; one that is used first in any other way stays as the average has it.
In a `scan`, the slices of stacked weights are corrected one by one, and weights that all iterations
share from the features of all of them. What a method would add to the units of a product waits for
the first bias that is added to them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.extend import core
from jax.extend.core import primitives as P

from otfusion_jax.fusion.corrections import (
    Condition,
    Correction,
    Occurrence,
    Piece,
    Receiver,
    overlap,
)
from otfusion_jax.fusion.flat_program import Constant, Fixed, Parameter, Reference, Slot, Step
from otfusion_jax.fusion.linear_form import PRODUCTS, has_product, has_rows
from otfusion_jax.fusion.side_by_side import ARRANGEMENTS, Network, inner_jaxprs
from otfusion_jax.symmetry.groups import Leaf
from otfusion_jax.tracing.activations import Path
from otfusion_jax.tracing.jaxprs import body, closed, equations_within, scan_operands, source
from otfusion_jax.tracing.primitives import RELOCATIONS


@dataclasses.dataclass
class State:
    """What a planner takes back when a loop turns out to have nothing to correct.

    Attributes:
        steps: The steps up to here.
        corrections: The corrections.
        numbers: Their numbers, by the path of the product and what is multiplied there.
        settled: The pieces of each parameter that do not change any more.
        effects: For each parameter the corrections that change pieces of it, as bits.
        out_of_reach: As `RepairPlan` has it.
        uses: As `RepairPlan` has it.
        progress: A number that grows with everything that is to be corrected.
    """

    steps: list[Step] = dataclasses.field(default_factory=list)
    corrections: list[Correction] = dataclasses.field(default_factory=list)
    numbers: dict[Any, int] = dataclasses.field(default_factory=dict)
    settled: dict[int, set[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    effects: dict[int, dict[tuple[int, ...], int]] = dataclasses.field(default_factory=dict)
    out_of_reach: dict[int, str] = dataclasses.field(default_factory=dict)
    uses: dict[int, str] = dataclasses.field(default_factory=dict)
    progress: int = 0

    def copy(self) -> "State":
        """Returns a state that stays as it is while this one goes on."""
        corrections = []
        for correction in self.corrections:
            lists = list(correction.occurrences), list(correction.receivers)
            corrections.append(
                dataclasses.replace(correction, occurrences=lists[0], receivers=lists[1])
            )
        return State(
            list(self.steps),
            corrections,
            dict(self.numbers),
            {leaf: set(pieces) for leaf, pieces in self.settled.items()},
            {leaf: dict(pieces) for leaf, pieces in self.effects.items()},
            dict(self.out_of_reach),
            dict(self.uses),
            self.progress,
        )


class Planner:
    """Goes through a program, all networks at once: see `interpret`.

    Attributes:
        networks: The networks.
        leaves: The parameters, without their values.
        state: What has been found up to here.
        is_feature: For each slot whether it depends on the inputs.
        depends_on: For each slot the corrections that it depends on in the average, as bits.
        shifts: The number of the correction whose units a slot has, as they came out.
        conditions: The branches that the program is in.
        scans: How many scans it is in.
    """

    def __init__(self, networks: tuple[Network, ...], leaves: tuple[Leaf, ...]):
        self.networks = networks
        self.leaves = leaves
        self.state: State = State()
        self.is_feature: list[bool] = []
        self.depends_on: list[int] = []
        self.shifts: dict[int, int] = {}
        self.conditions: tuple[Condition, ...] = ()
        self.scans: int = 0
        self._fixed: dict[tuple[Path, int], Fixed] = {}

    def interpret(
        self, jaxpr: core.ClosedJaxpr, path: Path, args: Sequence[Reference]
    ) -> list[Reference]:
        """Goes through a jaxpr, and returns where its results are."""
        env: dict[Any, Reference] = dict(zip(jaxpr.jaxpr.invars, args, strict=True))
        for index, eqn in enumerate(jaxpr.jaxpr.eqns):
            eqn_path = (*path, index)
            operands: list[Reference] = []
            for position, atom in enumerate(eqn.invars):
                known = None if isinstance(atom, core.Literal) else env.get(atom)
                operands.append(Constant(eqn_path, position) if known is None else known)
            env.update(zip(eqn.outvars, self._equation(eqn, eqn_path, operands), strict=True))
        constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        results = []
        for position, atom in enumerate(jaxpr.jaxpr.outvars):
            if isinstance(atom, core.Literal) or atom in constants:
                value = atom.val if isinstance(atom, core.Literal) else constants[atom]
                # The same in all iterations, so that these have equal chunks.
                results.append(self._fixed.setdefault((path, position), Fixed(value)))
            else:
                results.append(env[atom])
        return results

    def _equation(
        self, eqn: core.JaxprEqn, path: Path, operands: list[Reference]
    ) -> Sequence[Reference]:
        """Goes through an equation."""
        inner = body(eqn)
        if inner is not None:
            return self.interpret(inner, path, operands)
        if eqn.primitive in (P.scan_p, P.cond_p):
            results = self._entered(eqn, path, operands)
            if results is not None:
                return results
        # How a parameter is stored on its way is left to the compiler.
        if eqn.primitive in RELOCATIONS and all(isinstance(x, Parameter) for x in operands):
            return operands
        if eqn.primitive in (*ARRANGEMENTS, *RELOCATIONS) and len(operands) == 1:
            return [self._arrangement(eqn, path, operands[0])]
        if eqn.primitive in PRODUCTS:
            result = self._corrected_product(eqn, path, operands)
            if result is not None:
                return [result]
        if eqn.primitive in (P.add_p, P.sub_p):
            self._shift_bias(operands, is_sum=eqn.primitive is P.add_p)
        return self._step(eqn, path, operands)

    def new_slot(self, is_feature: bool, depends_on: int) -> Slot:
        """Makes a slot."""
        self.is_feature.append(is_feature)
        self.depends_on.append(depends_on)
        return Slot(len(self.is_feature) - 1)

    def _step(
        self, eqn: core.JaxprEqn, path: Path, operands: Sequence[Reference]
    ) -> Sequence[Slot]:
        """Evaluates an equation as it is."""
        is_product = has_product(eqn)
        for reference in operands:
            if is_product and isinstance(reference, Parameter):
                self._leave(reference, f"it is used inside of {_place(eqn)}")
        return self._emit("equation", path, operands, len(eqn.outvars), place=_place(eqn))

    def _emit(
        self,
        kind: Any,
        path: Path,
        operands: Sequence[Reference],
        count: int = 1,
        index: int | None = None,
        place: str = "",
    ) -> Sequence[Slot]:
        """Adds a step. The networks compute with its parameters, which change no more."""
        is_feature, depends_on = False, 0
        for reference in operands:
            is_feature |= self._is_feature(reference)
            depends_on |= self.dependencies(reference)
            if isinstance(reference, Parameter):
                self.state.uses.setdefault(reference.leaf, place)
                self._settle(reference)
        slots = [self.new_slot(is_feature, depends_on) for _ in range(count)]
        results = tuple([slot.number for slot in slots])
        self.state.steps.append(Step(kind, path, tuple(operands), results, index))
        return slots

    def _is_feature(self, reference: Reference) -> bool:
        return isinstance(reference, Slot) and self.is_feature[reference.number]

    def dependencies(self, reference: Reference) -> int:
        """Returns the corrections that a value depends on in the average, as bits."""
        if isinstance(reference, Slot):
            return self.depends_on[reference.number]
        found = 0
        if isinstance(reference, Parameter):
            for indices, corrections in self.state.effects.get(reference.leaf, {}).items():
                if overlap(indices, reference.indices):
                    found |= corrections
        return found

    # --- parameters

    def _arrangement(self, eqn: core.JaxprEqn, path: Path, operand: Reference) -> Reference:
        """Follows a parameter through what arranges it."""
        if isinstance(operand, Parameter):
            return operand._replace(steps=(*operand.steps, path))
        (slot,) = self._emit("equation", path, [operand])
        # Views say where units are in the features as the product put them out. A cast leaves them
        # there, and a layout.
        stay = eqn.primitive in (P.convert_element_type_p, *RELOCATIONS)
        if stay and isinstance(operand, Slot) and operand.number in self.shifts:
            self.shifts[slot.number] = self.shifts[operand.number]
        return slot

    def _piece(self, parameter: Parameter) -> Piece | None:
        """Returns what a parameter is a piece of; None if it is arranged and then sliced."""
        last_slice = 0
        for number, path in enumerate(parameter.steps):
            if path is None:
                last_slice = number
        for path in parameter.steps[:last_slice]:
            if path is not None and self._primitive(path) is not P.convert_element_type_p:
                return None
        return Piece(parameter.leaf, parameter.indices)

    def _primitive(self, path: Path) -> Any:
        return self.networks[-1].equations[path].eqn.primitive

    def _is_settled(self, piece: Piece) -> bool:
        settled = self.state.settled.get(piece.leaf, ())
        return any(overlap(piece.indices, other) for other in settled)

    def _settle(self, parameter: Parameter) -> None:
        piece = self._piece(parameter)
        indices = () if piece is None else piece.indices
        self.state.settled.setdefault(parameter.leaf, set()).add(indices)

    def _leave(self, parameter: Parameter, why: str) -> None:
        """Notes why a parameter that features are multiplied by is not corrected."""
        piece = self._piece(parameter)
        is_number = self.leaves[parameter.leaf].moves
        if is_number and (piece is None or not self._is_settled(piece)):
            self.state.out_of_reach.setdefault(parameter.leaf, why)

    # --- products and biases

    def _corrected_product(
        self, eqn: core.JaxprEqn, path: Path, operands: list[Reference]
    ) -> Slot | None:
        """Corrects the parameter of a product that is used for the first time, if there is one."""
        first, second = operands
        # Two parameters multiplied with each other have no features to be matched, and two features
        # no parameter to be corrected.
        if self._is_feature(first) == self._is_feature(second):
            return None
        position = 1 if self._is_feature(first) else 0
        features, parameter = operands[1 - position], operands[position]
        # Quantised weights stay, as they do in an average.
        if not isinstance(parameter, Parameter) or not self.leaves[parameter.leaf].moves:
            return None
        piece = self._piece(parameter)
        if piece is None:
            self._leave(parameter, "it is arranged anew before a scan takes its slices")
            return None
        if not has_rows(eqn, position):
            self._leave(parameter, f"{_place(eqn)} cannot be read as rows times a matrix")
            return None
        key = (path, piece, parameter.steps)
        if key not in self.state.numbers:
            if self._is_settled(piece):
                return None
            number = len(self.state.corrections)
            found = Correction(number, piece, path, position, parameter, self.scans)
            self.state.corrections.append(found)
            self.state.numbers[key] = number
            self._affect(piece, number)
        correction = self.state.corrections[self.state.numbers[key]]
        assert isinstance(features, Slot), "only slots depend on inputs"
        step = len(self.state.steps)
        occurrence = Occurrence(step, features.number, self.conditions)
        correction.occurrences.append(occurrence)
        correction.needs |= self.depends_on[features.number]
        self.state.progress += 1
        (slot,) = self._emit("equation", path, operands)
        self.shifts[slot.number] = correction.number
        return slot

    def _affect(self, piece: Piece, number: int) -> None:
        """Notes that a correction changes a piece of a parameter."""
        effects = self.state.effects.setdefault(piece.leaf, {})
        effects[piece.indices] = effects.get(piece.indices, 0) | 1 << number

    def _shift_bias(self, operands: Sequence[Reference], is_sum: bool) -> None:
        """Lets a bias that is about to be added to features take what these need.

        Or one that is subtracted from them, as the running mean of batch normalisation is.
        """
        first, second = operands
        # The bias may be either operand of a sum.
        pairs = ((first, second), (second, first)) if is_sum else ((first, second),)
        for features, bias in pairs:
            if not isinstance(features, Slot) or features.number not in self.shifts:
                continue
            if not isinstance(bias, Parameter) or not self.leaves[bias.leaf].moves:
                continue
            piece = self._piece(bias)
            if piece is None or self._is_settled(piece):
                continue
            correction = self.state.corrections[self.shifts[features.number]]
            correction.receivers.append(Receiver(piece, 1 if is_sum else -1))
            self._affect(piece, correction.number)
            self.state.progress += 1

    # --- loops and branches

    def _entered(
        self, eqn: core.JaxprEqn, path: Path, operands: list[Reference]
    ) -> Sequence[Reference] | None:
        """Goes through a loop or the branches of a choice, if there is something to correct."""
        # Plans say where units go in features of all iterations together, not in those of one.
        if any(network.is_moved for network in self.networks):
            return None
        if not has_product(eqn):
            return None
        # Of a branch that is not taken no effect may be seen, and a loop in it may have no end.
        if eqn.effects or any(inner.primitive is P.while_p for inner in equations_within(eqn)):
            return None
        before = self.state.copy()
        if eqn.primitive is P.scan_p:
            self.scans += 1
            results = self._scan(eqn, path, operands)
            self.scans -= 1
        else:
            results = self._cond(eqn, path, operands)
        if self.state.progress == before.progress:
            self.state = before
            return None
        return results

    def _scan(
        self, eqn: core.JaxprEqn, path: Path, operands: list[Reference]
    ) -> Sequence[Reference]:
        """Goes through all iterations, one after the other."""
        consts, carry, xs = scan_operands(eqn, operands)
        jaxpr = closed(eqn.params["jaxpr"])
        carry = self._carried(jaxpr.jaxpr, path, consts, carry, xs)
        length = eqn.params["length"]
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        results_by_iteration: dict[int, list[Reference]] = {}
        for index in order:
            slices = [self._slice(path, x, index) for x in xs]
            results = self.interpret(jaxpr, path, [*consts, *carry, *slices])
            carry = results[: len(carry)]
            results_by_iteration[index] = results[len(carry) :]
        stacked: list[Reference] = []
        for number in range(len(eqn.outvars) - len(carry)):
            if isinstance(eqn.outvars[len(carry) + number], core.DropVar):
                stacked.append(Fixed(None))
                continue
            slices = [results_by_iteration[index][number] for index in range(length)]
            stacked.extend(self._emit("stack", path, slices))
        return [*carry, *stacked]

    def _carried(
        self,
        jaxpr: core.Jaxpr,
        path: Path,
        consts: list[Reference],
        carry: list[Reference],
        xs: list[Reference],
    ) -> list[Reference]:
        """Makes features of what a loop starts from, where that is what it hands on.

        A recurrent weight is first multiplied by zeros. That is not its first use.
        """
        flags = [self._is_feature(reference) for reference in [*consts, *carry, *xs]]
        start, stop = len(consts), len(consts) + len(carry)
        while True:
            handed_on = _reached(jaxpr, flags)[: len(carry)]
            grown = [a or b for a, b in zip(flags[start:stop], handed_on, strict=True)]
            if grown == flags[start:stop]:
                break
            flags[start:stop] = grown
        carried = []
        for reference, is_feature in zip(carry, flags[start:stop], strict=True):
            if is_feature and not self._is_feature(reference):
                (slot,) = self._emit("copy", path, [reference])
                self.is_feature[slot.number] = True
                reference = slot
            carried.append(reference)
        return carried

    def _slice(self, path: Path, reference: Reference, index: int) -> Reference:
        """Returns what an iteration gets."""
        if isinstance(reference, Parameter):
            return Parameter(reference.leaf, (*reference.steps, None), (*reference.indices, index))
        return self._emit("slice", path, [reference], index=index)[0]

    def _cond(
        self, eqn: core.JaxprEqn, path: Path, operands: list[Reference]
    ) -> Sequence[Reference]:
        """Goes through all branches, and chooses among their results."""
        which, *rest = operands
        if not isinstance(which, Slot):
            (which,) = self._emit("copy", path, [which])
        outer = self.conditions
        branches = inner_jaxprs(eqn)
        results = []
        for number, (suffix, branch) in enumerate(branches):
            self.conditions = (*outer, Condition(which.number, number, len(branches)))
            results.append(self.interpret(branch, (*path, *suffix), rest))
        self.conditions = outer
        chosen = []
        for alternatives in zip(*results, strict=True):
            chosen.extend(self._emit("select", path, [which, *alternatives]))
        return chosen


def _reached(jaxpr: core.Jaxpr, flags: Sequence[bool]) -> list[bool]:
    """Says which results of a jaxpr depend on some of its arguments."""
    reached = {var for var, flag in zip(jaxpr.invars, flags, strict=True) if flag}
    for eqn in jaxpr.eqns:
        if not reached.isdisjoint([a for a in eqn.invars if not isinstance(a, core.Literal)]):
            reached.update(eqn.outvars)
    return [not isinstance(a, core.Literal) and a in reached for a in jaxpr.outvars]


def _place(eqn: core.JaxprEqn) -> str:
    """Names an equation and its source line."""
    line = source(eqn)
    name = eqn.primitive.name
    return f"`{name}`" if line is None else f"`{name}` at {line}"
