"""Where on the way to a product there is least to be kept.

A repair comes back to a product in its next pass, and keeps what the networks have come to until
then. Right before the product that can be much: a convolution as a product has patches there, nine
times as large as what they are cut out of. So what is kept is what the steps before need, where
those are cheap to take again.
"""

from collections.abc import Sequence
from typing import Any

from otfusion_jax.fusion.flat_program import Reference, Slot, Step
from otfusion_jax.fusion.linear_form import PRODUCTS, has_product
from otfusion_jax.fusion.side_by_side import Network


def slot_bytes(
    networks: Sequence[Network], steps: Sequence[Step], inputs: Sequence[Any]
) -> dict[int, int]:
    """Says how much memory the slots of a program take.

    Args:
        networks: The networks that it is evaluated in.
        steps: The steps of the program.
        inputs: The avals of its inputs, which are its first slots.

    Returns:
        For each slot the bytes of its arrays in all networks; what all share counts once.
    """
    sizes = dict(enumerate(map(_aval_bytes, inputs)))

    def size_of(reference: Reference) -> int:
        # What does not depend on the inputs is no larger than they are.
        return sizes[reference.number] if isinstance(reference, Slot) else 0

    for step in steps:
        eqns = [network.equations[step.path].eqn for network in networks]
        read = list(map(size_of, step.operands))
        if step.kind == "equation":
            for number, slot in enumerate(step.results):
                sizes[slot] = sum(_aval_bytes(eqn.outvars[number].aval) for eqn in eqns)
            continue
        (slot,) = step.results
        if step.kind == "slice":
            sizes[slot] = read[0] // max(1, eqns[-1].params["length"])
        elif step.kind == "stack":
            sizes[slot] = sum(read)
        else:
            # A copy is as large as its only operand, a choice as the largest of its branches.
            sizes[slot] = max(read)
    return sizes


def _aval_bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize


def narrowest(
    steps: Sequence[Step], network: Network, needed: set[int], sizes: dict[int, int]
) -> int:
    """Finds where among some steps the least has to be kept.

    Args:
        steps: The steps that lead from one product to the next.
        network: One of the networks that they are evaluated in.
        needed: The slots that are read after them.
        sizes: For each slot the bytes that it takes.

    Returns:
        The number of steps to take before; no product is among the others. Of equal places the
        last, which leaves least to be done again; and the end, unless there is less than half as
        much to be kept elsewhere, as other steps are compiled as a program of their own.
    """
    live = set(needed)
    place = len(steps)
    least = sum(sizes[slot] for slot in live) / 2
    for number in reversed(range(len(steps))):
        step = steps[number]
        eqn = network.equations[step.path].eqn
        if step.kind == "equation" and (eqn.primitive in PRODUCTS or has_product(eqn)):
            break
        live -= set(step.results)
        live |= {slot.number for slot in step.operands if isinstance(slot, Slot)}
        held = sum(sizes[slot] for slot in live)
        if held < least:
            place, least = number, held
    return place
