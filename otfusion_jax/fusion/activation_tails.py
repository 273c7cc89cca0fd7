"""What is done to the features that a product puts out, up to the ReLU that they go through.

Least squares on what comes before a ReLU ask for too much and too little: where a unit is off in
all models, by how much is of no account, and where it is on in one of two, the mean of both may be
off. So a method may ask what is wanted of a product for the ReLU behind it to put out what it does
in the models, on average (`wanted_features`).

Between the two are biases, batch normalisation in inference and a residual that is added: all that
is an affine function of the features, unit by unit. It is found in the flat program (`tail_of`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Float

from otfusion_jax.common.host import (
    Array,
    accumulation_dtype,
    array_module,
    as_numpy,
    filled_like,
    program,
)
from otfusion_jax.fusion.corrections import Correction, overlap
from otfusion_jax.fusion.flat_program import (
    ChunkCall,
    Constant,
    Fixed,
    Parameter,
    Reference,
    Slot,
    Step,
    chunk_of,
    run_in_network,
    value_of_constant,
)
from otfusion_jax.fusion.side_by_side import Network
from otfusion_jax.tracing.jaxprs import equations_within

_SUMS = (P.add_p, P.sub_p)
_LEAST_FACTOR = 0.01
"""A unit multiplied by so much less than the others on the way to a ReLU is fitted before it."""


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
    """Whether there may be a maximum with 0 in a program, as ReLUs are.

    That of a softmax is one with minus infinity. What is no literal may be 0.
    """
    for outer in jaxpr.jaxpr.eqns:
        for eqn in [outer, *equations_within(outer)]:
            if eqn.primitive is P.max_p:
                literals = [atom.val for atom in eqn.invars if isinstance(atom, core.Literal)]
                if all(_is_known_zero(value) for value in literals):
                    return True
    return False


class ReaderSearch:
    """Follows what products put out to those who read it, in a flat program.

    Attributes:
        networks: The networks, the average last.
        steps: The steps of the program.
        corrections: The corrections, with their stages.
        outputs: The slots that the program returns.
        is_feature: For each slot whether it depends on the inputs.
        dependencies: From what a step reads to the corrections that it depends on, as bits.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        steps: Sequence[Step],
        corrections: Sequence[Correction],
        outputs: set[int],
        is_feature: Sequence[bool],
        dependencies: Callable[[Reference], int],
    ):
        self.networks = networks
        self.steps = steps
        self.corrections = corrections
        self.outputs = outputs
        self.is_feature = is_feature
        self.dependencies = dependencies
        self._made_in: dict[int, int] = {}
        self._read_in: dict[int, list[int]] = {}
        self._reads_of_leaf: dict[int, list[tuple[int, ...]]] = {}
        for number, step in enumerate(steps):
            self._made_in.update(dict.fromkeys(step.results, number))
            for slot in _slots(step):
                self._read_in.setdefault(slot, []).append(number)
            for operand in step.operands:
                if isinstance(operand, Parameter):
                    self._reads_of_leaf.setdefault(operand.leaf, []).append(operand.indices)

    def owns_bias(self, correction: Correction) -> bool:
        """Whether all that reads a product is a sum with a bias that nothing else reads.

        Then a shift of the product and one of the bias are the same. A bias that is read twice, as
        one that layers share, shifts more than this product.

        Args:
            correction: The correction of the product.
        """
        if len(correction.occurrences) != 1 or len(correction.receivers) != 1:
            return False
        (leaf, indices), _ = correction.receivers[0]
        reads = 0
        for other in self._reads_of_leaf.get(leaf, []):
            # Of stacked biases, each is read in an iteration of its own.
            reads += overlap(indices, other)
        (slot,) = self.steps[correction.occurrences[0].step].results
        while reads == 1:
            number = self._only_reader(slot)
            if number is None:
                return False
            step = self.steps[number]
            if any(isinstance(x, Parameter) and x.leaf == leaf for x in step.operands):
                return True
            # A cast.
            slot = step.results[0]
        return False

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
            if not self._is_affine(self.steps[number], slot, start):
                return None
            chain.append(number)
            (slot,) = self.steps[number].results
        numbers = sorted(self._with_what_they_need(chain))
        if not all(self._is_corrected_before(self.steps[number], correction) for number in numbers):
            return None
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
        return all(_is_known_zero(value) for value in values)

    def _is_affine(self, step: Step, slot: int, start: int) -> bool:
        """Whether a step is an affine function of a slot, unit by unit.

        Args:
            step: The step.
            slot: The slot.
            start: The number of the step of the product, before which features are made that are
                added.
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
            return not self._is_feature(others[0]) or self._is_made_before(others[0], start)
        is_factor = eqn.primitive is P.mul_p
        is_divided = eqn.primitive is P.div_p and step.operands[0] == Slot(slot)
        return (is_factor or is_divided) and not self._is_feature(others[0])

    def _is_made_before(self, reference: Reference, start: int) -> bool:
        assert isinstance(reference, Slot), "only slots depend on inputs"
        return self._made_in.get(reference.number, -1) < start

    def _is_corrected_before(self, step: Step, correction: Correction) -> bool:
        """Whether what a step reads has been corrected in earlier stages, if it ever is.

        The product itself is about to be, and so is its bias.
        """
        found = 0
        for operand in step.operands:
            found |= self.dependencies(operand)
        for number, other in enumerate(self.corrections):
            is_later = other.stage >= correction.stage
            if found >> number & 1 and is_later and number != correction.number:
                return False
        return True

    def _is_feature(self, reference: Reference) -> bool:
        return isinstance(reference, Slot) and self.is_feature[reference.number]

    def _primitive(self, step: Step) -> Any:
        return self.networks[-1].equations[step.path].eqn.primitive

    def _with_what_they_need(self, chain: Sequence[int]) -> set[int]:
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


def _is_known_zero(value: Any) -> bool:
    return not isinstance(value, Tracer) and np.ndim(value) == 0 and bool(value == 0)


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
    before_relu = []
    for number, output in enumerate(outputs):
        read = [others[slot][number] for slot in tail.others]
        before_relu.append(_before_relu(tail, number, leaves, output, read))
    # In the average, which is last, it is factor * product + rest. The factor is taken without what
    # is added on the way, beside which it may be small.
    of_average = functools.partial(_before_relu, tail, len(outputs) - 1, leaves)
    ours, added = as_numpy((outputs[-1], read))
    zeros, ones = filled_like(ours, 0.0), filled_like(ours, 1.0)
    nothing = [filled_like(array, 0.0) for array in added]
    at_zero, at_one = of_average(zeros, nothing), of_average(ones, nothing)
    found = outputs, tuple(before_relu), of_average(zeros, read), at_zero, at_one
    return _wanted(*as_numpy((*found, weights)))


def _before_relu(
    tail: Tail,
    number: int,
    leaves: list[tuple[Array, ...]],
    product: Array,
    others: list[Array],
) -> Array:
    """Returns what the ReLU reads in a network, of what the product puts out and of the others."""
    # Between the two there may be nothing.
    if not tail.call.results:
        return product
    arrays = dict(zip(tail.others, others, strict=True)) | {tail.product: product}
    slots = [arrays[slot] for slot in tail.call.slots]
    (found,) = run_in_network(tail.call, number, leaves, slots)
    return found


@program()
def _wanted(
    outputs: tuple[Array, ...],
    before_relu: tuple[Array, ...],
    rest: Array,
    at_zero: Array,
    at_one: Array,
    weights: Float[Array, " k"],
) -> Array:
    """Computes what `wanted_features` returns, from what the ReLU reads."""
    dtype = accumulation_dtype(rest.dtype)
    xp = array_module(rest)
    *theirs, ours = [x.astype(dtype) for x in before_relu]
    active = xp.zeros_like(ours)
    in_models = xp.zeros_like(ours)
    for weight, x, output in zip(weights, theirs, outputs, strict=False):
        share = weight.astype(dtype)
        active += share * xp.maximum(x, 0)
        in_models += share * output.astype(dtype)
    # Where all models are off, to be off is all that is asked for.
    wanted = xp.where(active > 0, active, xp.minimum(ours, 0))
    factor = at_one.astype(dtype) - at_zero.astype(dtype)
    size = abs(factor)
    # A unit that is next to switched off would have to become very large.
    matters = size > _LEAST_FACTOR * xp.mean(size)
    divisor = xp.where(matters, factor, 1)
    inverse = (wanted - rest.astype(dtype)) / divisor
    return xp.where(matters, inverse, in_models)
