"""What is done to the features that a product puts out, up to the ReLU that they go through.

Least squares on what comes before a ReLU ask for too much and too little: where a unit is off in
all models, by how much is of no account, and where it is on in one of two, the mean of both may be
off. So a method may ask what is wanted of a product for the ReLU behind it to put out what it does
in the models, on average (`wanted_features`).

Between the two are biases, batch normalisation in inference and a residual that is added: all that
is an affine function of the features, unit by unit. It is found in the flat program (`tail_of`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Float, Int

from otfusion_jax.common.host import Array, accumulation_dtype
from otfusion_jax.fusion.corrections import Correction
from otfusion_jax.fusion.flat_program import (
    Chunk,
    ChunkCall,
    Constant,
    Fixed,
    Reference,
    Slot,
    Step,
    chunk_of,
    run_chunk,
    value_of_constant,
)
from otfusion_jax.fusion.side_by_side import Network
from otfusion_jax.tracing.jaxprs import closed, is_jaxpr

_SUMS = (P.add_p, P.sub_p)


class Tail(NamedTuple):
    """The way from a product to the ReLU behind it.

    Attributes:
        call: The steps. They read what the product puts out, and make what the ReLU reads.
        product: The slot of what the product puts out.
    """

    call: ChunkCall
    product: int

    @property
    def others(self) -> tuple[int, ...]:
        """The other slots that are read: features that are added on the way."""
        return tuple([slot for slot in self.call.slots if slot != self.product])


# --- finding it


def cuts_at_zero(jaxpr: core.ClosedJaxpr) -> bool:
    """Whether there is a maximum with 0 in a program, as ReLUs are, so that there may be tails."""
    for eqn in jaxpr.jaxpr.eqns:
        for atom in eqn.invars if eqn.primitive is P.max_p else ():
            if isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 and atom.val == 0:
                return True
        for parameter in jax.tree.leaves(eqn.params):
            if is_jaxpr(parameter) and cuts_at_zero(closed(parameter)):
                return True
    return False


class TailSearch:
    """Finds the ways from products to ReLUs in a flat program.

    Attributes:
        networks: The networks, the average last.
        steps: The steps of the program.
        outputs: The slots that the program returns.
        is_feature: For each slot whether it depends on the inputs.
        depends_on: For each slot the corrections that it depends on in the average, as bits.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        steps: Sequence[Step],
        outputs: set[int],
        is_feature: Sequence[bool],
        depends_on: Sequence[int],
    ):
        self.networks = networks
        self.steps = steps
        self.outputs = outputs
        self.is_feature = is_feature
        self.depends_on = depends_on
        self._made_in: dict[int, int] = {}
        self._read_in: dict[int, list[int]] = {}
        for number, step in enumerate(steps):
            self._made_in.update(dict.fromkeys(step.results, number))
            for slot in _slots(step):
                self._read_in.setdefault(slot, []).append(number)

    def tail_of(self, correction: Correction) -> Tail | None:
        """Finds the way from the product of a correction to the ReLU behind it.

        Args:
            correction: The correction.

        Returns:
            The way; None if there is none that is affine, or anything else reads what is on it.
        """
        if len(correction.occurrences) != 1 or correction.occurrences[0].conditions:
            return None
        start = correction.occurrences[0].step
        (product,) = self.steps[start].results
        slot, chain = product, []
        while True:
            number = self._only_reader(slot)
            if number is None:
                return None
            if self._is_relu(self.steps[number], slot):
                break
            if not self._is_affine(self.steps[number], slot, start, correction):
                return None
            chain.append(number)
            (slot,) = self.steps[number].results
        numbers = sorted(self._with_what_they_need(chain, product))
        call = chunk_of(self.networks, [self.steps[number] for number in numbers], {slot})
        return Tail(call, product)

    def _only_reader(self, slot: int) -> int | None:
        """Returns the step that reads a slot; None if there are several, or none."""
        readers = self._read_in.get(slot, [])
        return readers[0] if len(readers) == 1 and slot not in self.outputs else None

    def _is_relu(self, step: Step, slot: int) -> bool:
        """Whether a step is the maximum of a slot and 0."""
        if step.kind != "equation" or self._primitive(step) is not P.max_p:
            return False
        (other,) = [operand for operand in step.operands if operand != Slot(slot)]
        return self._is_zero(other)

    def _is_zero(self, reference: Reference) -> bool:
        if isinstance(reference, Constant):
            values = [value_of_constant(network, reference) for network in self.networks]
        elif isinstance(reference, Fixed):
            values = [reference.value]
        else:
            return False
        return all(np.ndim(value) == 0 and value == 0 for value in values)

    def _is_affine(self, step: Step, slot: int, start: int, correction: Correction) -> bool:
        """Whether a step is an affine function of a slot, unit by unit, that is known at a product.

        Args:
            step: The step.
            slot: The slot.
            start: The number of the step of the product.
            correction: The correction of the product.
        """
        if step.kind != "equation":
            return False
        eqn = self.networks[-1].equations[step.path].eqn
        before: Any = eqn.invars[step.operands.index(Slot(slot))].aval
        after: Any = eqn.outvars[0].aval
        if before.shape != after.shape or not jnp.issubdtype(after.dtype, jnp.floating):
            return False
        others = [operand for operand in step.operands if operand != Slot(slot)]
        if eqn.primitive in (P.neg_p, P.convert_element_type_p):
            return True
        if len(others) != 1:
            return False
        if eqn.primitive in _SUMS:
            return self._is_known(others[0], start, correction)
        is_factor = eqn.primitive is P.mul_p
        is_divided = eqn.primitive is P.div_p and step.operands[0] == Slot(slot)
        return (is_factor or is_divided) and not self._is_feature(others[0])

    def _is_known(self, reference: Reference, start: int, correction: Correction) -> bool:
        """Whether something is known at a product, as corrected as it will be."""
        if not self._is_feature(reference):
            return True
        assert isinstance(reference, Slot), "only slots depend on inputs"
        comes_before = self._made_in.get(reference.number, -1) < start
        return comes_before and not self.depends_on[reference.number] & ~correction.needs

    def _is_feature(self, reference: Reference) -> bool:
        return isinstance(reference, Slot) and self.is_feature[reference.number]

    def _primitive(self, step: Step) -> Any:
        return self.networks[-1].equations[step.path].eqn.primitive

    def _with_what_they_need(self, chain: Sequence[int], product: int) -> set[int]:
        """Adds to some steps those that make of parameters what they read."""
        found = set(chain)
        stack = list(chain)
        while stack:
            for slot in _slots(self.steps[stack.pop()]):
                made_in = self._made_in.get(slot)
                if made_in is None or made_in in found or self.is_feature[slot]:
                    continue
                found.add(made_in)
                stack.append(made_in)
        return found


def _slots(step: Step) -> list[int]:
    return [operand.number for operand in step.operands if isinstance(operand, Slot)]


# --- what is wanted


def wanted_features(
    tail: Tail,
    leaves: list[tuple[Array, ...]],
    outputs: tuple[Array, ...],
    others: dict[int, tuple[Array, ...]],
    weights: Float[Array, " k"],
) -> Array:
    """Returns what is wanted of a product for the ReLU behind it to put out the models' mean.

    Args:
        tail: The way to the ReLU.
        leaves: The parameters that are read on the way, each in all networks.
        outputs: What the product puts out in each network, the average last.
        others: The features that are added on the way, each in all networks.
        weights: The weights of the models, float `[K]`.

    Returns:
        The features, of float32 or wider.
    """
    read = []
    for slot in tail.call.slots:
        read.append(None if slot == tail.product else others[slot])
    positions = np.asarray(tail.call.positions, np.int32)
    return _wanted(tail.call.chunk, leaves, read, positions, outputs, weights)


@functools.partial(jax.jit, static_argnames=("chunk",))
def _wanted(
    chunk: Chunk,
    leaves: list[tuple[Array, ...]],
    read: list[tuple[Array, ...] | None],
    positions: Int[Array, " n"],
    outputs: tuple[Array, ...],
    weights: Float[Array, " k"],
) -> Array:
    """Computes what `wanted_features` returns."""

    def before_relu(product: tuple[Array, ...]) -> tuple[Array, ...]:
        found = product
        if chunk.steps:
            slots = [product if slot is None else slot for slot in read]
            (found,) = run_chunk(chunk, leaves, slots, positions)
        return tuple([x.astype(accumulation_dtype(x.dtype)) for x in found])

    *theirs, ours = before_relu(outputs)
    shares = [weight.astype(ours.dtype) for weight in weights]
    terms = list(zip(shares, theirs, strict=True))
    active = sum((share * jnp.maximum(x, 0) for share, x in terms), jnp.zeros_like(ours))
    # Where all models are off, to be off is all that is asked for.
    wanted = jnp.where(active > 0, active, jnp.minimum(ours, 0))
    # It is factor * product + rest, of which the product's part is asked for.
    rest = before_relu(tuple([jnp.zeros_like(x) for x in outputs]))[-1]
    factor = before_relu(tuple([jnp.ones_like(x) for x in outputs]))[-1] - rest
    is_any = factor != 0
    inverse = (wanted - rest) / jnp.where(is_any, factor, 1)
    return jnp.where(is_any, inverse, outputs[-1].astype(inverse.dtype))
