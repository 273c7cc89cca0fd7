"""What is corrected when: the program of an average in chunks, and the stages of its corrections.

Corrections whose features do not depend on one another are of one stage: one pass over the data
serves them all.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from otfusion_jax.fusion.activation_tails import ReaderSearch, Tail
from otfusion_jax.fusion.corrections import Correction, Occurrence
from otfusion_jax.fusion.flat_program import (
    ChunkCall,
    Parameter,
    Reference,
    Slot,
    Step,
    chunk_of,
)
from otfusion_jax.fusion.narrowest import narrowest, slot_bytes
from otfusion_jax.fusion.repair_planner import Planner
from otfusion_jax.fusion.side_by_side import Network
from otfusion_jax.symmetry.groups import Leaf


class Way(NamedTuple):
    """What leads from one product to the next.

    Attributes:
        first: The steps up to where there is least to be kept.
        kept: The slots that are read after these.
        rest: The steps from there to the product; None if there are none.
        read: The slots that are read after these, at the product or later.
    """

    first: ChunkCall
    kept: tuple[int, ...]
    rest: ChunkCall | None
    read: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class RepairPlan:
    """What a repair does to a program.

    Attributes:
        networks: The networks that run side by side, the average last.
        corrections: The parameters that are corrected, in the order of the program.
        ways: What leads to each of the products, in order.
        cuts: For each of them the correction whose product follows, and which occurrence it is.
        out_of_reach: Why some parameters that features are multiplied by are not corrected, by
            their positions.
        uses: What else parameters are first used in, by their positions.
        tails: The ways from products to the ReLUs behind them, by the numbers of the corrections.
            Empty if nobody asks for them.
    """

    networks: tuple[Network, ...]
    corrections: tuple[Correction, ...]
    ways: tuple[Way, ...]
    cuts: tuple[tuple[int, Occurrence], ...]
    out_of_reach: dict[int, str]
    uses: dict[int, str]
    tails: dict[int, Tail]

    @property
    def stages(self) -> int:
        """How many passes over the data there are."""
        return max([correction.stage + 1 for correction in self.corrections], default=0)

    def cuts_of(self, stage: int) -> list[int]:
        """Returns the numbers of the cuts at products of a stage."""
        numbers = []
        for number, (correction, _) in enumerate(self.cuts):
            if self.corrections[correction].stage == stage:
                numbers.append(number)
        return numbers

    def first_cut_from(self, stage: int) -> int:
        """Returns the number of the first cut at a product of a stage or later.

        Nothing before it changes any more once the stages before have been corrected.
        """
        for number, (correction, _) in enumerate(self.cuts):
            if self.corrections[correction].stage >= stage:
                return number
        return len(self.cuts)


def plan_repair(
    networks: Sequence[Network],
    jaxpr: core.ClosedJaxpr,
    leaves: Sequence[Leaf],
    finds_tails: bool,
    outputs_alone: bool,
) -> RepairPlan:
    """Goes through the program of an average, and notes what is to be corrected.

    Args:
        networks: The networks, the average last.
        jaxpr: The program of the average. Its first arguments are the parameters.
        leaves: The parameters of the average, without their values.
        finds_tails: Whether to look for ReLUs behind products; not if `outputs_alone`.
        outputs_alone: Whether to leave out corrections that others depend on.

    Returns:
        The plan. The first slots of its program are the inputs.
    """
    planner = Planner(tuple(networks), tuple(leaves))
    arguments: list[Reference] = []
    for number in range(len(jaxpr.jaxpr.invars)):
        if number < len(leaves):
            arguments.append(Parameter(number, (), ()))
        else:
            arguments.append(planner.new_slot(is_feature=True, depends_on=0))
    results = planner.interpret(jaxpr, (), arguments)
    state = planner.state
    corrections = tuple(_last_of(state.corrections) if outputs_alone else state.corrections)
    if not corrections:
        for correction in state.corrections:
            why = "other products are made of what it puts out, as in a loop"
            state.out_of_reach.setdefault(correction.piece.leaf, why)
    _set_stages(corrections)
    search = ReaderSearch(
        planner.networks,
        state.steps,
        corrections,
        {result.number for result in results if isinstance(result, Slot)},
        planner.is_feature,
        planner.dependencies,
    )
    tails: dict[int, Tail] = {}
    # Features of a model that plans merge or split are not those that the ReLU is given. What
    # depends on what is known by the numbers that corrections had before some were left out.
    is_any_moved = any(network.is_moved for network in networks)
    looks_for_tails = finds_tails and not is_any_moved and not outputs_alone
    for correction in corrections:
        correction.owns_bias = search.owns_bias(correction)
        if not correction.owns_bias:
            # What is subtracted may be a threshold, which is no bias where it is read again.
            added = [receiver for receiver in correction.receivers if receiver.sign == 1]
            correction.receivers = added
        tail = search.tail_of(correction) if looks_for_tails else None
        if tail is not None:
            tails[correction.number] = tail
    sizes = slot_bytes(planner.networks, state.steps, jaxpr.in_avals[len(leaves) :])
    ways, cuts = _cut(planner.networks, state.steps, corrections, tails, sizes)
    found = ways, cuts, state.out_of_reach, state.uses, tails
    return RepairPlan(planner.networks, corrections, *found)


def _last_of(corrections: Sequence[Correction]) -> list[Correction]:
    """Returns the corrections that no other depends on, numbered anew."""
    needed = 0
    for correction in corrections:
        # What is used in a loop may depend on itself.
        needed |= correction.needs & ~(1 << correction.number)
    last = []
    for correction in corrections:
        if not needed >> correction.number & 1:
            last.append(dataclasses.replace(correction, number=len(last), needs=0))
    return last


def _set_stages(corrections: Sequence[Correction]) -> None:
    """Puts each correction into the first stage after those of all that it depends on."""
    for number, correction in enumerate(corrections):
        # In a loop, what comes first may depend on what comes later, by an earlier iteration.
        for earlier in range(number):
            if correction.needs >> earlier & 1:
                correction.stage = max(correction.stage, corrections[earlier].stage + 1)


def _cut(
    networks: Sequence[Network],
    steps: Sequence[Step],
    corrections: Sequence[Correction],
    tails: dict[int, Tail],
    sizes: dict[int, int],
) -> tuple[tuple[Way, ...], tuple[tuple[int, Occurrence], ...]]:
    """Cuts a program at the products, and leaves out what leads to none of them."""
    by_step: dict[int, tuple[int, Occurrence]] = {}
    for number, correction in enumerate(corrections):
        for occurrence in correction.occurrences:
            by_step[occurrence.step] = (number, occurrence)
    ends = sorted(by_step)
    # Backwards: what a chunk has to make is what is read after it.
    needed: set[int] = set()
    ways = []
    for cut in reversed(range(len(ends))):
        number, occurrence = by_step[ends[cut]]
        needed |= {occurrence.features, *[condition.which for condition in occurrence.conditions]}
        if number in tails:
            needed |= set(tails[number].others)
        start = ends[cut - 1] if cut else 0
        kept = []
        within = set(needed)
        for step in reversed(steps[start : ends[cut]]):
            if within.isdisjoint(step.results):
                continue
            kept.append(step)
            within |= {slot.number for slot in step.operands if isinstance(slot, Slot)}
        way = _way(networks, kept[::-1], needed, sizes)
        needed = (set(way.kept) - set(way.first.results)) | set(way.first.slots)
        ways.append(way)
    return tuple(ways[::-1]), tuple([by_step[end] for end in ends])


def _way(
    networks: Sequence[Network], steps: Sequence[Step], needed: set[int], sizes: dict[int, int]
) -> Way:
    """Divides the steps to a product where there is least to be kept."""
    read = set(needed)
    place = narrowest(steps, networks[-1], read, sizes)
    rest = None
    if place < len(steps):
        rest = chunk_of(networks, steps[place:], needed)
        needed = (needed - set(rest.results)) | set(rest.slots)
    first = chunk_of(networks, steps[:place], needed)
    return Way(first, tuple(sorted(needed)), rest, tuple(sorted(read)))
