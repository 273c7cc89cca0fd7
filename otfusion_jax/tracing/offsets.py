"""Biases that nothing but linear layers read, each of which has a bias of its own to take them up.

A LayerNorm adds a bias to its units, and the weights that read these multiply it and add biases of
their own: of `(x + b) @ W + d` only `b @ W + d` counts. So b may be 0, if every layer that reads
the units adds a bias, and if nothing else is done to them.

A bias is followed from where it is added to where it has been read, and each step has to be one of
the few that are listed here. Anything else keeps it as it is.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from jax import lax

from otfusion_jax.symmetry.groups import Offset, OffsetReader
from otfusion_jax.tracing import laws
from otfusion_jax.tracing.axis import Axis
from otfusion_jax.tracing.dataflow import Dataflow, round_finely
from otfusion_jax.tracing.interpreter import Interpreter
from otfusion_jax.tracing.laws import UNCHANGED, law_of
from otfusion_jax.tracing.records import Transfer
from otfusion_jax.tracing.rules.families import P
from otfusion_jax.tracing.shifts import Dims, rearranged
from otfusion_jax.tracing.units import Units
from otfusion_jax.tracing.values import TracedValue, sizes_of

_SELECTING = ("slice", "dynamic_slice", "split", "rev", "unstack")
"""What takes some of an operand's numbers, or puts them in another order along an axis."""


class Rearranged(NamedTuple):
    """A parameter in another shape.

    Attributes:
        leaf: The parameter.
        dims: For each axis the axis of the parameter that it is; None where it does not vary.
    """

    leaf: int
    dims: Dims


class Read(NamedTuple):
    """A value to which weights have added what they read of a bias.

    Attributes:
        kernel: The weights.
        axis: The axis of the weights that the units lie along.
        dims: For each axis the axis of the weights that it is; None of others.
    """

    kernel: int
    axis: int
    dims: Dims


class Added(NamedTuple):
    """A value that has the bias added to it, at every index of the other axes.

    Attributes:
        rank: How many axes it has. What a loop collects of it has one more.
    """

    rank: int


class Parameters:
    """Where a program uses its parameters, each in whatever shape.

    Attributes:
        shaped: By the numbers of values those that are parameters in another shape.
        uses: For each parameter the transfers that do more than to give it another shape.
        layered: The parameters of which a loop takes slices, each with the loops.

    Args:
        interpreter: The finished pass over the program.
        dataflow: The equations of the program.
        param_axes: For each parameter its axes.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        dataflow: Dataflow,
        param_axes: Sequence[tuple[Axis, ...]],
    ) -> None:
        self.shaped: dict[int, Rearranged] = {}
        self.uses: dict[int, set[int]] = {}
        self.layered: dict[int, set[int]] = {}
        self._outputs = frozenset(interpreter.outputs)
        self._ambiguous = dataflow.ambiguous
        for number, leaf in interpreter.parameters.items():
            if number is not None:
                dims = tuple(range(len(param_axes[leaf])))
                self.shaped[number] = Rearranged(leaf, dims)
                self._note_output(number, leaf)
        dataflow.follow(list(self.shaped), self._step)
        for number, loop in interpreter.sliced:
            if number in self.shaped:
                self.layered.setdefault(self.shaped[number].leaf, set()).add(loop)

    def of(self, value: TracedValue) -> Rearranged | None:
        """Returns which parameter a value is, and in which shape; None if that is not known."""
        shaped = self.shaped.get(value.number or 0)
        if shaped is None or value.number in self._ambiguous:
            return None
        dims = shaped.dims
        if len(dims) == len(value.axes) + 1 and dims[0] == 0:
            # A slice that a loop takes goes by the number of the whole.
            dims = dims[1:]
        if len(dims) != len(value.axes):
            return None
        return Rearranged(shaped.leaf, _varying(dims, value))

    def _note_output(self, number: int, leaf: int) -> None:
        if number in self._outputs:
            self.uses.setdefault(leaf, set()).add(-1)

    def _step(self, transfer: Transfer) -> list[int]:
        """Follows parameters through an equation."""
        eqn = transfer.context.eqn
        found = []
        for value in transfer.operands:
            if value.number not in self.shaped:
                continue
            parameter = self.of(value)
            moved = None
            is_moved = transfer.form == "equation" and eqn.primitive in UNCHANGED
            # Of what rounds, sums are not rounded sums.
            is_moved = is_moved and round_finely(transfer)
            if parameter is not None and is_moved:
                moved = rearranged(parameter.dims, eqn)
            (number, *_) = [result.number for result in transfer.results] or [None]
            leaf = self.shaped[value.number].leaf
            if moved is None or number is None:
                self.uses.setdefault(leaf, set()).add(id(transfer))
                continue
            self.shaped[number] = Rearranged(leaf, moved)
            self._note_output(number, leaf)
            found.append(number)
        return found


def _varying(dims: Dims, value: TracedValue) -> Dims:
    """Leaves out the axes of a value that are of size 1, whatever they are."""
    sizes = sizes_of(value)
    return tuple([dim if size > 1 else None for dim, size in zip(dims, sizes, strict=True)])


def find_offset(
    dataflow: Dataflow,
    parameters: Parameters,
    outputs: Collection[int | None],
    units: Units,
    bias: tuple[int, int],
) -> Offset | None:
    """Asks whether a bias can be taken up by the biases of what reads it.

    Args:
        dataflow: The equations of the program.
        parameters: Where the program uses its parameters.
        outputs: The numbers of the values that the program returns.
        units: The units that the bias is added to.
        bias: The position of the bias in `Symmetry.parts`, and the axis that the units lie along.

    Returns:
        What becomes of the bias and of the others; None if it has to stay.
    """
    search = _Search(parameters, units, *bias)
    starts = [number for number, shaped in parameters.shaped.items() if shaped.leaf == bias[0]]
    dataflow.follow(starts, search.step)
    if search.stays or not search.standings.keys().isdisjoint(outputs):
        return None
    return search.offset()


class _Search:
    """What is known of values, as the equations that a bias gets to are gone through.

    Attributes:
        standings: By the numbers of values what the bias has done to them.
        stays: Whether the bias is used in another way.
    """

    def __init__(self, parameters: Parameters, units: Units, leaf: int, axis: int) -> None:
        self.standings: dict[int | None, object] = {}
        self.stays = False
        self._parameters = parameters
        self._units = units
        self._leaf = leaf
        self._axis = axis
        self._readers: dict[int, OffsetReader] = {}
        # The equations that add the bias, and those that add others to what has read it.
        self._uses: dict[int, set[int]] = {leaf: set()}

    def offset(self) -> Offset | None:
        """Returns the offset, if no bias that would take it up is used elsewhere."""
        layers = self._parameters.layered
        loops = layers.get(self._leaf)
        # Layer by layer, or not at all.
        for bias, reader in self._readers.items():
            if layers.get(bias) != loops or layers.get(reader.kernel) != loops:
                return None
        # What is used in another place as well, there would be another number.
        for leaf, uses in self._uses.items():
            if uses != self._parameters.uses[leaf]:
                return None
        if not self._readers:
            return None
        readers = tuple(self._readers[bias] for bias in sorted(self._readers))
        return Offset(self._leaf, self._axis, readers, layered=loops is not None)

    def step(self, transfer: Transfer) -> list[int]:
        """Goes through an equation.

        Args:
            transfer: The equation, once all before it have been gone through.

        Returns:
            The numbers of results that the bias is part of.
        """
        if self.stays:
            return []
        standings = [self._standing(value) for value in transfer.operands]
        if all(standing is None for standing in standings):
            # It is the bias itself, in another shape or where it is added to something.
            return self._begun(transfer)
        standing = self._passed_on(transfer, standings)
        if not round_finely(transfer):
            self.stays = True
        if standing is None or self.stays:
            return []
        found = []
        for value in transfer.results:
            # Of a part of the units the weights would read a part of the bias.
            if isinstance(standing, Added):
                if self._units.dim(value) is None:
                    self.stays = True
                    return []
                standing = Added(len(value.axes))
            if isinstance(standing, Read):
                standing = standing._replace(dims=_varying(standing.dims, value))
            self.standings[value.number] = standing
            found.append(value.number or 0)
        return found

    def _standing(self, value: TracedValue) -> object:
        """Returns what the bias has done to an operand; of another rank a loop has collected it."""
        standing = self.standings.get(value.number)
        rank = len(value.axes)
        if isinstance(standing, Read) and len(standing.dims) != rank:
            self.stays = True
        if isinstance(standing, Added) and standing.rank != rank:
            self.stays = True
        return standing

    def _begun(self, transfer: Transfer) -> list[int]:
        """Adds the bias to something, if that is what an equation does."""
        if id(transfer) not in self._parameters.uses.get(self._leaf, ()):
            return []
        name = transfer.context.eqn.primitive.name
        result = transfer.results[0] if len(transfer.results) == 1 else None
        shapes = [self._parameters.of(value) for value in transfer.operands]
        of_bias = [shaped for shaped in shapes if shaped is not None and shaped.leaf == self._leaf]
        is_sum = transfer.form == "equation" and name == "add" and len(of_bias) == 1
        dim = None if result is None else self._units.dim(result)
        if not is_sum or result is None or dim is None or None not in shapes:
            self.stays = True
            return []
        varying = [number for number, axis in enumerate(of_bias[0].dims) if axis is not None]
        if varying != [dim]:
            self.stays = True
            return []
        self._uses[self._leaf].add(id(transfer))
        self.standings[result.number] = Added(len(result.axes))
        return [result.number or 0]

    def _passed_on(self, transfer: Transfer, standings: Sequence[object]) -> object:
        """Returns what the bias has done to the results of an equation."""
        eqn = transfer.context.eqn
        law = law_of(eqn.primitive)
        name = eqn.primitive.name
        first = standings[0]
        others = [standing for standing in standings[1:] if standing is not None]
        if transfer.form == "equation":
            if law is laws.one_by_one and len(standings) == 1:
                return first
            if name == "add":
                return self._sum(transfer, standings)
            if law is laws.dot_general:
                return self._read(transfer, standings)
            if not others and isinstance(first, Read) and eqn.primitive in UNCHANGED:
                dims = rearranged(first.dims, eqn)
                if dims is not None:
                    return first._replace(dims=dims)
            if not others and isinstance(first, Added):
                if eqn.primitive in UNCHANGED or name in _SELECTING:
                    return first
                # A number that takes the place of a value has no bias added to it.
                fills = eqn.params.get("mode") == lax.GatherScatterMode.FILL_OR_DROP
                if eqn.primitive is P.gather_p and not fills:
                    return first
        self.stays = True
        return None

    def _sum(self, transfer: Transfer, standings: Sequence[object]) -> object:
        """Adds something to what the bias is part of: the bias of what has read it, at last."""
        # Two terms would have the bias twice.
        standing, *more = [standing for standing in standings if standing is not None]
        if more:
            self.stays = True
            return None
        for value, other in zip(transfer.operands, standings, strict=True):
            parameter = self._parameters.of(value)
            if other is not None or parameter is None or not isinstance(standing, Read):
                continue
            return self._taken_up(transfer, standing, parameter)
        # Whatever else is added, the bias is part of the sum.
        return standing

    def _taken_up(self, transfer: Transfer, read: Read, bias: Rearranged) -> object:
        """Notes that a bias is added to what weights have read, if both have the same axes."""
        axes = {}
        # A number by itself meets arrays of any rank.
        rank = max(len(read.dims), len(bias.dims))
        of_kernel, of_bias = (dims or (None,) * rank for dims in (read.dims, bias.dims))
        for kernel_axis, bias_axis in zip(of_kernel, of_bias, strict=True):
            # What varies along tokens, say, is no number for each unit of the layer.
            if (kernel_axis is None) != (bias_axis is None):
                self.stays = True
                return None
            if kernel_axis is not None and bias_axis is not None:
                axes[bias_axis] = kernel_axis
        if bias.leaf == self._leaf:
            # It would take up itself.
            self.stays = True
            return None
        reader = OffsetReader(bias.leaf, read.kernel, read.axis, tuple(sorted(axes.items())))
        if self._readers.setdefault(bias.leaf, reader) != reader:
            self.stays = True
        self._uses.setdefault(bias.leaf, set()).add(id(transfer))
        return None

    def _read(self, transfer: Transfer, standings: Sequence[object]) -> object:
        """Contracts units that the bias was added to with weights."""
        contracted, batch = transfer.context.eqn.params["dimension_numbers"]
        pairs = list(zip(*contracted, strict=True))
        side = 0 if standings[0] is not None else 1
        kernel = self._parameters.of(transfer.operands[1 - side])
        dim = self._units.dim(transfer.operands[side])
        # Contracted along further axes it would be added up, and along batch axes be multiplied.
        is_alone = isinstance(standings[side], Added) and standings[1 - side] is None
        if not is_alone or kernel is None or batch[0] or len(pairs) != 1 or pairs[0][side] != dim:
            self.stays = True
            return None
        along = pairs[0][1 - side]
        axis = kernel.dims[along]
        of_kernel = [d for number, d in enumerate(kernel.dims) if number != along]
        of_others: list[int | None] = [None] * (len(transfer.operands[side].axes) - 1)
        if axis is None:
            self.stays = True
            return None
        dims = of_others + of_kernel if side == 0 else of_kernel + of_others
        return Read(kernel.leaf, axis, tuple(dims))
