"""A program as one flat list of steps: calls entered, loops unrolled, branches all taken.

A repair stops at products, looks at what is there, and goes on. So what lies in calls, in the
iterations of a `scan` and in the branches of a `cond` stands here one after the other. What a step
reads is a `Reference`: an array that an earlier step or the caller has made, a parameter, or a
constant.

The steps from one product to the next are a `Chunk`. What it does in a network is compiled as one
program, which knows nothing of where it stands: it numbers what it reads and makes by itself, and
takes constants and the numbers of iterations as arrays. So networks of the same widths share what
is compiled, and layers that are built alike, and all iterations of a loop.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Int

from otfusion_jax.common.host import Array, array_module
from otfusion_jax.fusion.linear_form import PRODUCTS, multiplied
from otfusion_jax.fusion.side_by_side import Network
from otfusion_jax.tracing.activations import Path

# --- references


class Slot(NamedTuple):
    """An array that the caller or a step makes.

    Attributes:
        number: Its number in the program, or in a chunk, which numbers those of its own.
    """

    number: int


class Constant(NamedTuple):
    """A literal or a constant of a jaxpr, which may differ from network to network.

    Attributes:
        path: The path of an equation that reads it.
        position: The number of the operand.
    """

    path: Path
    position: int


class Parameter(NamedTuple):
    """A parameter in some arrangement.

    Attributes:
        leaf: The position of the parameter among the parts of the symmetry.
        steps: What arranges it, first to last: the path of an equation, or None for a slice along
            the first axis, which is what an iteration gets.
        indices: The position of each slice.
    """

    leaf: int
    steps: tuple[Path | None, ...]
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A value that is the same wherever it is read, compared by identity.

    Attributes:
        value: The value.
    """

    value: Any


Reference = Slot | Constant | Parameter | Fixed
"""What a step reads."""

StepKind = Literal["equation", "copy", "slice", "stack", "select"]
"""What a step does, see `Step`."""


class Step(NamedTuple):
    """A step of a flat program.

    Attributes:
        kind: `"equation"`; `"copy"` of its only operand; `"slice"` of its only operand along the
            first axis; `"stack"` of its operands along a new first axis; `"select"` of the operand
            that the first one says, as a branch.
        path: The path of the equation that it comes of.
        operands: What it reads.
        results: The numbers of the slots that it makes.
        index: The position of a slice.
    """

    kind: StepKind
    path: Path
    operands: tuple[Reference, ...]
    results: tuple[int, ...]
    index: int | None = None


# --- chunks


def value_of_constant(network: Network, constant: Constant) -> Any:
    """Returns a constant as it is in a network."""
    eqn, constants = network.equations[constant.path]
    atom = eqn.invars[constant.position]
    return atom.val if isinstance(atom, core.Literal) else constants[atom]


class Operation:
    """What an equation does to its operands. Equal ones do the same, wherever they stand.

    Attributes:
        primitive: The primitive.
        params: The parameters of the equation.
    """

    def __init__(self, eqn: core.JaxprEqn):
        self.primitive: Any = eqn.primitive
        self.params: dict[str, Any] = eqn.params
        params = []
        for name in sorted(eqn.params):
            value = eqn.params[name]
            params.append((name, type(value), _hashable(value)))
        self._key = self.primitive, tuple(params)
        # Asked for at every call of what is compiled.
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Operation) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def apply(self, *operands: Any) -> Sequence[Any]:
        """Evaluates the equation, and returns its results."""
        if self.primitive in PRODUCTS:
            return [multiplied(self.primitive, self.params, *operands)]
        results = self.primitive.bind(*operands, **self.params)
        return results if self.primitive.multiple_results else [results]


def _hashable(value: Any) -> Any:
    """Returns a value itself, or what is equal for the same object alone."""
    try:
        hash(value)
    except TypeError:
        return Fixed(value)
    return value


class Arranged(NamedTuple):
    """A parameter as a step of a chunk reads it.

    Attributes:
        leaf: Its place among the parameters that the chunk reads.
        steps: What arranges it, first to last; None for a slice along the first axis.
        places: For each slice the place of its position in the array of all positions.
    """

    leaf: int
    steps: tuple[Operation | None, ...]
    places: tuple[int, ...]


class Given(NamedTuple):
    """A constant that is given to a chunk as an array.

    Attributes:
        number: Its place among these.
    """

    number: int


class Number(NamedTuple):
    """A single number of the program, which is compiled with it.

    Attributes:
        dtype: Its dtype, or that of a Python number: compared, as 1 and 1.0 are equal.
        digits: Its digits: compared in place of the value, as those of 0 and -0 differ.
        value: The value.
    """

    dtype: Any
    digits: bytes
    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and self[:2] == other[:2]

    def __hash__(self) -> int:
        return hash(self[:2])


class ChunkStep(NamedTuple):
    """A step of a chunk: see `Step`, whose attributes are resolved here.

    Attributes:
        kind: The kind of the step.
        operation: What an equation does, None for other kinds.
        operands: What it reads.
        results: The numbers of the slots that it makes, in the chunk.
        place: The place of the position of a slice in the array of all positions.
    """

    kind: StepKind
    operation: Operation | None
    operands: tuple[Slot | Arranged | Given | Number, ...]
    results: tuple[int, ...]
    place: int | None


class ChunkProgram(NamedTuple):
    """What a chunk does in one network.

    Attributes:
        steps: The steps.
        made: The numbers of the slots that it makes for others.
    """

    steps: tuple[ChunkStep, ...]
    made: tuple[int, ...]


class Chunk(NamedTuple):
    """Some steps in a row.

    Attributes:
        programs: What they do in each network.
        constants: The constants that each of these is given.
    """

    programs: tuple[ChunkProgram, ...]
    constants: tuple[tuple[Any, ...], ...]


class ChunkCall(NamedTuple):
    """A chunk at its place in a program.

    Attributes:
        chunk: The chunk.
        leaves: The positions of the parameters that it reads.
        slots: The slots of the program that it reads.
        results: The slots of the program that it makes for others.
        positions: The positions of the slices that it takes.
    """

    chunk: Chunk
    leaves: tuple[int, ...]
    slots: tuple[int, ...]
    results: tuple[int, ...]
    positions: tuple[int, ...]


def chunk_of(
    networks: Sequence[Network], steps: Sequence[Step], needed_later: set[int]
) -> ChunkCall:
    """Makes a chunk of some steps in a row.

    Args:
        networks: The networks.
        steps: The steps.
        needed_later: The slots that are read after these steps.

    Returns:
        The chunk, and what it is called with.
    """
    made_here = {slot for step in steps for slot in step.results}
    # Those that it reads come first; equal chunks meet theirs in one order.
    slots: dict[int, int] = {}
    for step in steps:
        for reference in step.operands:
            if isinstance(reference, Slot) and reference.number not in made_here:
                slots.setdefault(reference.number, len(slots))
    read = tuple(slots)
    leaves: dict[int, int] = {}
    for step in steps:
        for reference in step.operands:
            if isinstance(reference, Parameter):
                leaves.setdefault(reference.leaf, len(leaves))
        for slot in step.results:
            slots.setdefault(slot, len(slots))
    made = tuple([slot for slot in slots if slot in made_here and slot in needed_later])
    local_made = tuple([slots[slot] for slot in made])
    programs, constants = [], []
    positions: list[int] = []
    for network in networks:
        resolver = _Resolver(network, slots, leaves)
        resolved = tuple([resolver.resolved(step) for step in steps])
        programs.append(ChunkProgram(resolved, local_made))
        constants.append(tuple(resolver.constants))
        positions = resolver.positions
    chunk = Chunk(tuple(programs), tuple(constants))
    return ChunkCall(chunk, tuple(leaves), read, made, tuple(positions))


class _Resolver:
    """Resolves steps in a network, and numbers what they read as their chunk does.

    Attributes:
        network: The network.
        slots: From the slots of the program to those of the chunk.
        leaves: From the positions of parameters to their places in the chunk.
        constants: The constants that were met, which become arguments.
        positions: The positions of the slices that were met.
    """

    def __init__(self, network: Network, slots: dict[int, int], leaves: dict[int, int]):
        self.network = network
        self.slots = slots
        self.leaves = leaves
        self.constants: list[Any] = []
        self.positions: list[int] = []

    def resolved(self, step: Step) -> ChunkStep:
        """Resolves a step."""
        operands = tuple([self._operand(reference) for reference in step.operands])
        results = tuple([self.slots[slot] for slot in step.results])
        operation = self._operation(step.path) if step.kind == "equation" else None
        place = None if step.index is None else self._place(step.index)
        return ChunkStep(step.kind, operation, operands, results, place)

    def _operand(self, reference: Reference) -> Slot | Arranged | Given | Number:
        if isinstance(reference, Slot):
            return Slot(self.slots[reference.number])
        if isinstance(reference, Parameter):
            steps = [None if path is None else self._operation(path) for path in reference.steps]
            places = tuple([self._place(index) for index in reference.indices])
            return Arranged(self.leaves[reference.leaf], tuple(steps), places)
        if isinstance(reference, Constant):
            value = value_of_constant(self.network, reference)
        else:
            value = reference.value
        if isinstance(value, bool | int | float | complex | np.generic):
            # Of a Python number it has to be known that it is one: its precision follows others.
            dtype = value.dtype if isinstance(value, np.generic) else type(value)
            digits = np.asarray(value).tobytes()
            return Number(dtype, digits, value)
        self.constants.append(value)
        return Given(len(self.constants) - 1)

    def _operation(self, path: Path) -> Operation:
        return Operation(self.network.equations[path].eqn)

    def _place(self, index: int) -> int:
        self.positions.append(index)
        return len(self.positions) - 1


# --- evaluation


def run_chunk(
    call: ChunkCall, leaves: list[tuple[Array, ...]], slots: list[tuple[Array, ...]]
) -> list[tuple[Array, ...]]:
    """Evaluates a chunk in every network.

    Args:
        call: The chunk at its place.
        leaves: The parameters that it reads, each in all networks.
        slots: The arrays that it reads, each in all networks.

    Returns:
        The arrays that it makes for others, each in all networks.
    """
    made = []
    for number in range(len(call.chunk.programs)):
        own_slots = [slot[number] for slot in slots]
        made.append(run_in_network(call, number, leaves, own_slots))
    return list(zip(*made, strict=True))


def run_in_network(
    call: ChunkCall, number: int, leaves: list[tuple[Array, ...]], slots: list[Array]
) -> list[Array]:
    """Evaluates a chunk in one network.

    Args:
        call: The chunk at its place.
        number: The number of the network.
        leaves: The parameters that it reads, each in all networks.
        slots: The arrays that it reads, in this network.

    Returns:
        The arrays that it makes for others.
    """
    chunk = call.chunk
    own_leaves = [leaf[number] for leaf in leaves]
    positions: Any = np.asarray(call.positions, np.int32)
    return run_program(
        chunk.programs[number], own_leaves, slots, chunk.constants[number], positions
    )


@functools.partial(jax.jit, static_argnames=("program",))
def run_program(
    program: ChunkProgram,
    leaves: Sequence[Array],
    slots: Sequence[Array],
    constants: Sequence[Any],
    positions: Int[Array, " n"],
) -> list[Array]:
    """Evaluates what a chunk does in a network, compiled.

    Args:
        program: What the chunk does in the network.
        leaves: The parameters that it reads.
        slots: The arrays that it reads.
        constants: The constants that it is given.
        positions: The positions of the slices that it takes.

    Returns:
        The arrays that it makes for others.
    """
    env = dict(enumerate(slots))

    def value(operand: Slot | Arranged | Given | Number) -> Any:
        if isinstance(operand, Slot):
            return env[operand.number]
        if isinstance(operand, Arranged):
            return _arranged(leaves[operand.leaf], operand, positions)
        return constants[operand.number] if isinstance(operand, Given) else operand.value

    for step in program.steps:
        operands = [value(operand) for operand in step.operands]
        env.update(zip(step.results, _results(step, operands, positions), strict=True))
    return [env[slot] for slot in program.made]


def _arranged(leaf: Array, arranged: Arranged, positions: Int[Array, " n"]) -> Array:
    """Arranges a parameter as a step reads it."""
    places = iter(arranged.places)
    for operation in arranged.steps:
        if operation is None:
            leaf = jax.lax.dynamic_index_in_dim(leaf, positions[next(places)], 0, keepdims=False)
        else:
            (leaf,) = operation.apply(leaf)
    return leaf


def _results(step: ChunkStep, operands: list[Any], positions: Array) -> Sequence[Any]:
    """Evaluates a step."""
    if step.operation is not None:
        return step.operation.apply(*operands)
    if step.kind == "copy":
        return [jnp.asarray(operands[0])]
    if step.kind == "slice":
        assert step.place is not None, "a slice has a position"
        return [jax.lax.dynamic_index_in_dim(operands[0], positions[step.place], keepdims=False)]
    if step.kind == "stack":
        return [jnp.stack(operands)]
    which, *branches = operands
    return [jax.lax.select_n(branch_taken(which, len(branches)), *branches)]


def branch_taken(which: Array, count: int) -> Int[Array, ""]:
    """Returns which branch a `cond` takes, whose index may be out of range.

    Args:
        which: The index, an integer or a boolean.
        count: How many branches there are.

    Returns:
        The number of the branch.
    """
    xp = array_module(which)
    number = xp.asarray(which).astype(np.int32)
    return xp.clip(number, 0, count - 1)
