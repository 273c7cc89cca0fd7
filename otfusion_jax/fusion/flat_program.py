"""A program as one flat list of steps: calls entered, loops unrolled, branches all taken.

A repair stops at products, looks at what is there, and goes on. So what lies in calls, in the
iterations of a `scan` and in the branches of a `cond` stands here one after the other. What a step
reads is a `Reference`: an array that an earlier step or the caller has made, a parameter, or a
constant.

The steps from one product to the next are a `Chunk`, which is compiled as one program. A chunk
numbers what it reads and makes by itself, and takes the numbers of iterations as arrays: all
iterations of a loop share a program.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Int

from otfusion_jax.common.host import Array
from otfusion_jax.fusion.linear_form import PRODUCTS, multiplied
from otfusion_jax.fusion.side_by_side import Network
from otfusion_jax.tracing.activations import Path

# --- references


class Slot(NamedTuple):
    """An array that the caller or a step makes.

    Attributes:
        number: Its number in the program, or in a chunk.
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
        leaf: The position of the parameter among the parts of the symmetry; in a chunk, among those
            that the chunk reads.
        steps: What arranges it, first to last: the path of an equation, or None for a slice along
            the first axis, which is what an iteration gets.
        indices: The position of each slice; in a chunk, its place in the array of all positions.
    """

    leaf: int
    steps: tuple[Path | None, ...]
    indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """A value that is the same in all networks, compared by identity.

    Attributes:
        value: The value.
    """

    value: Any


Reference = Slot | Constant | Parameter | Fixed
"""What a step reads."""


class Step(NamedTuple):
    """A step of a flat program.

    Attributes:
        kind: `"equation"`; `"copy"` of its only operand; `"slice"` of its only operand along the
            first axis; `"stack"` of its operands along a new first axis; `"select"` of the operand
            that the first one says, as a branch.
        path: The path of the equation that it comes of.
        operands: What it reads.
        results: The numbers of the slots that it makes.
        index: The position of a slice; in a chunk, its place in the array of all positions.
    """

    kind: Literal["equation", "copy", "slice", "stack", "select"]
    path: Path
    operands: tuple[Reference, ...]
    results: tuple[int, ...]
    index: int | None = None


# --- evaluation


def value_of_constant(network: Network, constant: Constant) -> Any:
    """Returns a constant as it is in a network."""
    eqn, constants = network.equations[constant.path]
    atom = eqn.invars[constant.position]
    return atom.val if isinstance(atom, core.Literal) else constants[atom]


def arranged(
    network: Network, leaf: Array, parameter: Parameter, positions: Int[Array, " n"]
) -> Array:
    """Arranges a parameter of a network as a step reads it.

    Args:
        network: The network.
        leaf: The parameter, whole.
        parameter: How it is arranged.
        positions: The positions of all slices.

    Returns:
        The parameter, arranged.
    """
    places = iter(parameter.indices)
    for path in parameter.steps:
        if path is None:
            leaf = jax.lax.dynamic_index_in_dim(leaf, positions[next(places)], 0, keepdims=False)
        else:
            eqn = network.equations[path].eqn
            leaf = eqn.primitive.bind(leaf, **eqn.params)
    return leaf


class Chunk(NamedTuple):
    """Some steps in a row, with numbers of their own.

    Attributes:
        networks: The networks that it is evaluated in.
        steps: The steps.
        read: How many slots it reads that it has not made: the first ones.
        made: The numbers of those that it makes for others.
    """

    networks: tuple[Network, ...]
    steps: tuple[Step, ...]
    read: int
    made: tuple[int, ...]


@functools.partial(jax.jit, static_argnames=("chunk",))
def run_chunk(
    chunk: Chunk,
    leaves: list[tuple[Array, ...]],
    slots: list[tuple[Array, ...]],
    positions: Int[Array, " n"],
) -> list[tuple[Array, ...]]:
    """Evaluates a chunk in every network.

    Args:
        chunk: The chunk.
        leaves: The parameters that it reads, each in all networks.
        slots: The arrays that it reads, each in all networks.
        positions: The positions of the slices that it takes.

    Returns:
        The arrays that it makes for others, each in all networks.
    """
    made = []
    for number, network in enumerate(chunk.networks):
        own_leaves = [leaf[number] for leaf in leaves]
        env = dict(enumerate([slot[number] for slot in slots]))
        for step in chunk.steps:
            operands = []
            for reference in step.operands:
                operands.append(_value(network, reference, own_leaves, env, positions))
            env.update(zip(step.results, _results(network, step, operands, positions), strict=True))
        made.append([env[slot] for slot in chunk.made])
    return list(zip(*made, strict=True))


def _value(
    network: Network,
    reference: Reference,
    leaves: Sequence[Array],
    env: dict[int, Any],
    positions: Array,
) -> Any:
    """Returns what a reference stands for in a network."""
    if isinstance(reference, Slot):
        return env[reference.number]
    if isinstance(reference, Parameter):
        return arranged(network, leaves[reference.leaf], reference, positions)
    if isinstance(reference, Constant):
        return value_of_constant(network, reference)
    return reference.value


def _results(network: Network, step: Step, operands: list[Any], positions: Array) -> Sequence[Any]:
    """Evaluates a step in a network."""
    if step.kind == "equation":
        eqn = network.equations[step.path].eqn
        if eqn.primitive in PRODUCTS:
            return [multiplied(eqn.primitive, eqn.params, *operands)]
        results = eqn.primitive.bind(*operands, **eqn.params)
        return results if eqn.primitive.multiple_results else [results]
    if step.kind == "copy":
        return [jnp.asarray(operands[0])]
    if step.kind == "slice":
        assert step.index is not None, "a slice has a position"
        return [jax.lax.dynamic_index_in_dim(operands[0], positions[step.index], keepdims=False)]
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
    return jnp.clip(jnp.asarray(which).astype(jnp.int32), 0, count - 1)


# --- chunks


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
    positions: list[int] = []
    local_steps = []
    for step in steps:
        operands = []
        for reference in step.operands:
            operands.append(_localised(reference, slots, leaves, positions))
        results = tuple([slots.setdefault(slot, len(slots)) for slot in step.results])
        index = step.index
        if index is not None:
            positions.append(index)
            index = len(positions) - 1
        local_steps.append(step._replace(operands=tuple(operands), results=results, index=index))
    made = tuple([slot for slot in slots if slot in made_here and slot in needed_later])
    local_made = tuple([slots[slot] for slot in made])
    chunk = Chunk(tuple(networks), tuple(local_steps), len(read), local_made)
    return ChunkCall(chunk, tuple(leaves), read, made, tuple(positions))


def _localised(
    reference: Reference, slots: dict[int, int], leaves: dict[int, int], positions: list[int]
) -> Reference:
    """Numbers what a reference stands for as its chunk does, and notes the positions of slices."""
    if isinstance(reference, Slot):
        return Slot(slots[reference.number])
    if isinstance(reference, Parameter):
        places = tuple(range(len(positions), len(positions) + len(reference.indices)))
        positions.extend(reference.indices)
        leaf = leaves.setdefault(reference.leaf, len(leaves))
        return Parameter(leaf, reference.steps, places)
    return reference
