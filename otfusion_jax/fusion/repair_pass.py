"""The passes over batches of inputs in which the parameters of an average are corrected.

1. The models and their average run side by side over a batch, chunk by chunk. In place of a model
   whose units plans have merged or split runs its original.
2. At the products of the stage that is due, the method sums up what it has to know of their
   features. Chunks that lead to later products alone are not run.
3. After the last batch of a pass, the parameters of the stage are corrected, and the biases that
   take what is to be added to their units. The next pass computes with them.

So what follows a correction sees the features that come of it, and the result has the architecture
of the models.

What a batch has come to by the first product that is not corrected yet need not be computed anew in
the next pass. It is kept, from where it takes least memory (`narrowest`), as long as that is no
more than allowed; of the first batch, always.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from otfusion_jax.common.host import Array, array_module, as_jax, as_numpy, program
from otfusion_jax.fusion.activation_tails import wanted_features
from otfusion_jax.fusion.corrections import Correction, Occurrence, Piece
from otfusion_jax.fusion.flat_program import ChunkCall, branch_taken, run_chunk
from otfusion_jax.fusion.linear_form import LinearForm, form_of
from otfusion_jax.fusion.product_features import (
    Mover,
    NetworkUnits,
    innermost,
    mover_of,
    network_units,
    role_of_units,
)
from otfusion_jax.fusion.repair_methods import (
    AbstractRepair,
    Correctable,
    Corrected,
    Moments,
    Part,
    Product,
    UnitStatistics,
    combine_units,
    members_at,
)
from otfusion_jax.fusion.repair_plan import RepairPlan
from otfusion_jax.fusion.side_by_side import GroupView, without_first_axes
from otfusion_jax.symmetry.groups import Group, Member, Plans, Role

Slots = dict[int, tuple[Array, ...]]
"""Arrays by the numbers of their slots, each in all networks."""

# --- what is static at the site of a correction


class UnitSite(NamedTuple):
    """Units that come out of a product.

    Attributes:
        group: The group of the units in the average, in one iteration of the scans around.
        members: The axes of the parameter that they lie along.
        networks: The units in each network, the average last.
        receivers: For each bias that takes a shift, the axes that the units lie along in it.
    """

    group: Group
    members: tuple[Member, ...]
    networks: tuple[NetworkUnits, ...]
    receivers: tuple[tuple[Member, ...], ...]


class Site(NamedTuple):
    """What is known of a product before any array is; equal ones share what is compiled.

    Attributes:
        method: The method that corrects the parameter.
        forms: The product in each network, the average last.
        movers: How what comes out of each model is moved.
        parts: The units that come out.
        owns_bias: Whether a bias follows that nothing else reads.
        has_tail: Whether a ReLU follows, and the method asks for what it puts out.
    """

    method: AbstractRepair
    forms: tuple[LinearForm, ...]
    movers: tuple[Mover | None, ...]
    parts: tuple[UnitSite, ...]
    owns_bias: bool
    has_tail: bool


def site_of(plan: RepairPlan, correction: Correction, method: AbstractRepair) -> Site:
    """Gathers what is static of a correction.

    Args:
        plan: The plan that the correction is of.
        correction: The correction.
        method: The method that corrects the parameter.

    Returns:
        The site.
    """
    path = correction.path
    arranging = [step for step in correction.parameter.steps if step is not None]
    forms = []
    for network in plan.networks:
        # A cast before a slice does the same behind it.
        eqns = [network.equations[step].eqn for step in arranging]
        forms.append(form_of(network.equations[path].eqn, correction.position, eqns))
    average = plan.networks[-1]
    views = average.produced.get(path, [])
    leaf = correction.piece.leaf
    roles: list[Role] = []
    for group, view in views:
        roles.append(role_of_units(group, leaf, view.location.index))
    movers = []
    for network in plan.networks[:-1]:
        movers.append(mover_of(network, average, path, roles))
    parts = []
    if method.looks_at_units(correction.owns_bias):
        for number in innermost(views):
            parts.append(_unit_site(plan, correction, views[number], number, roles))
    has_tail = correction.number in plan.tails
    found = tuple(forms), tuple(movers), tuple(parts), correction.owns_bias, has_tail
    return Site(method, *found)


def _unit_site(
    plan: RepairPlan, correction: Correction, view: GroupView, number: int, roles: list[Role]
) -> UnitSite:
    """Gathers what is static of some units that come out of a product."""
    networks = []
    for network in plan.networks:
        networks.append(network_units(network, correction.path, number, roles, correction.scans))
    found = functools.partial(_members, view, roles[number], correction.scans)
    receivers = tuple([found(receiver.piece) for receiver in correction.receivers])
    group = view.within(correction.scans).group
    return UnitSite(group, found(correction.piece), tuple(networks), receivers)


def _members(view: GroupView, role: Role, scans: int, piece: Piece) -> tuple[Member, ...]:
    """Returns the axes of a piece of a parameter that units of features lie along."""
    units = without_first_axes(view.group, view.view.location, scans)
    members = []
    for member in members_at(view.group, piece.leaf, role, view.view.location.index):
        sliced = without_first_axes(view.group, member.location, len(piece.indices))
        # A batch that is there in one of the two alone has other numbers than units.
        if units is not None and sliced is not None and sliced.kept == units.kept:
            members.append(dataclasses.replace(member, location=sliced.location))
    return tuple(members)


# --- the compiled parts


@functools.partial(jax.jit, static_argnames=("forms",))
def _outputs(
    forms: tuple[LinearForm, ...],
    leaves: tuple[Array, ...],
    positions: Int[Array, " n"],
    features: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Returns what a product puts out in each network."""
    outputs = []
    for form, x, leaf in zip(forms, features, leaves, strict=True):
        outputs.append(form.compute(x, _sliced(leaf, positions)))
    return tuple(outputs)


@program(static_argnames=("site", "branches"))
def _summed(
    site: Site,
    branches: tuple[tuple[int, int], ...],
    leaf: Array,
    positions: Int[Array, " n"],
    features: Array,
    outputs: tuple[Array, ...],
    wanted: Array | None,
    choices: list[tuple[Array, ...]],
    plans: list[Plans],
    weights: Float[Array, " k"],
) -> Any:
    """Sums up what a method has to know of a product on one batch.

    Args:
        site: The product.
        branches: The branches that it is in, each with how many there are.
        leaf: The parameter of the average, whole.
        positions: Which slice of it is meant.
        features: The features that it is multiplied by in the average.
        outputs: What the product puts out in each network, the average last.
        wanted: What is wanted because of the ReLU behind it, or None.
        choices: For each of these branches which one each network takes.
        plans: The plans that each model is moved along.
        weights: The weights of the models.

    Returns:
        The sums of the method: zeros if some network takes another branch.
    """
    moved = []
    for mover, own_plans, output in zip(site.movers, plans, outputs, strict=False):
        moved.append(output if mover is None else mover.move(own_plans, output))
    units = []
    for part in site.parts:
        moments: list[Moments] = []
        for network, own_plans, output in zip(part.networks, [*plans, {}], outputs, strict=True):
            moments.append(network.moments(own_plans, output))
        units.append(tuple(moments))
    piece = _sliced(leaf, positions)
    in_models = tuple(moved)
    form = site.forms[-1]
    product = Product(piece, form, features, in_models, weights, wanted, tuple(units))
    sums = site.method.summed(product)
    if not branches:
        return sums
    is_taken: Any = True
    for (branch, count), chosen in zip(branches, choices, strict=True):
        for which in chosen:
            is_taken = is_taken & (branch_taken(which, count) == branch)

    def if_taken(array: Array) -> Array:
        # What a branch computes that is not taken may be anything.
        xp = array_module(array)
        return xp.where(is_taken, array, xp.zeros_like(array))

    return jax.tree.map(if_taken, sums)


@program(static_argnames=("method",))
def _added(method: AbstractRepair, one: Any, other: Any) -> Any:
    return method.added(one, other)


@program(static_argnames=("site",))
def _corrected(
    site: Site,
    leaf: Array,
    positions: Int[Array, " n"],
    sums: Any,
    plans: list[Plans],
    weights: Float[Array, " k"],
) -> Corrected:
    """Corrects a parameter from the sums over all batches.

    Returns:
        The parameter, whole, and what goes with it.
    """
    parts = []
    for part in site.parts:
        statistics = functools.partial(_statistics, part, plans)
        has_bias = site.owns_bias and any(part.receivers)
        parts.append(Part(part.group, part.members, has_bias, statistics))
    piece = _sliced(leaf, positions)
    form = site.forms[-1]
    correctable = Correctable(piece, form, weights, tuple(parts), site.has_tail)
    corrected = Corrected(*site.method.correct(correctable, sums))
    return corrected._replace(leaf=_with_slice(leaf, positions, corrected.leaf))


def _statistics(
    part: UnitSite, plans: list[Plans], moments: tuple[Moments, ...]
) -> tuple[UnitStatistics, ...]:
    """Returns the statistics of units of each model as units of the average."""
    statistics = []
    for network, own_plans, own in zip(part.networks, plans, moments, strict=False):
        statistics.append(network.statistics(own_plans, own))
    return tuple(statistics)


@program(static_argnames=("group", "members"))
def _shifted(
    group: Group,
    members: tuple[Member, ...],
    bias: Array,
    positions: Int[Array, " n"],
    amount: Array,
) -> Array:
    """Adds to a bias what is to be added to the units that lie along its axes."""
    piece = _sliced(bias, positions)
    for member in members:
        piece = combine_units(operator.add, piece, member, group, amount)
    return _with_slice(bias, positions, piece)


def _sliced(leaf: Array, positions: Int[Array, " n"]) -> Array:
    """Takes a slice along the first axes."""
    if array_module(leaf) is np:
        return leaf[tuple(positions)]
    for number in range(len(positions)):
        leaf = jax.lax.dynamic_index_in_dim(leaf, positions[number], 0, keepdims=False)
    return leaf


def _with_slice(leaf: Array, positions: Int[Array, " n"], piece: Array) -> Array:
    """Puts a slice along the first axes in its place."""
    if not len(positions):
        return piece
    if not isinstance(leaf, np.ndarray):
        return leaf.at[tuple(positions)].set(piece)
    whole = leaf.copy()
    whole[tuple(positions)] = piece
    return whole


# --- the passes


class _Kept(NamedTuple):
    """What a batch has come to on its way to some product.

    Attributes:
        cut: The number of the cut at the product.
        slots: The arrays that are needed from there on.
    """

    cut: int
    slots: Slots


class Prepared(NamedTuple):
    """A plan with its sites: all that is static about batches of one shape.

    Attributes:
        plan: The plan.
        sites: The site of each of its corrections.
    """

    plan: RepairPlan
    sites: tuple[Site, ...]


@dataclasses.dataclass(eq=False)
class RepairRun:
    """The state of a repair on its way through the passes.

    Attributes:
        parts_of_networks: The parameters of each network. Those of the average, which are last, are
            corrected in place.
        plans: The plans that each model is moved along, empty for those that stay.
        weights: The weights of the models, float `[K]`.
        most_kept: How many bytes of features may be kept from pass to pass.
        kept: What is kept, by the number of the batch.
        ridges: What the method has chosen for each parameter that left it something to choose.
    """

    parts_of_networks: list[list[Array]]
    plans: list[Plans]
    weights: Float[Array, " k"]
    most_kept: int
    kept: dict[int, _Kept] = dataclasses.field(default_factory=dict)
    ridges: dict[Piece, Array] = dataclasses.field(default_factory=dict)

    def run_pass(self, batches: Iterable[tuple[Prepared, list[Any]]], stage: int) -> int:
        """Sums up what a stage has to know over all batches, and corrects its parameters.

        Args:
            batches: The batches: what is prepared for their shapes, and the arrays of each.
            stage: The stage.

        Returns:
            How many batches there were.
        """
        sums: dict[int, Any] = {}
        count = 0
        prepared = None
        for batch, (prepared, arrays) in enumerate(batches):
            self._run_batch(prepared, batch, arrays, stage, sums)
            # Without it, all batches would be on their way at a time.
            if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(sums)):
                jax.block_until_ready(sums)
            count += 1
        if prepared is not None:
            for number, correction_sums in sums.items():
                self._correct(prepared, number, correction_sums)
        return count

    def _run_batch(
        self, prepared: Prepared, batch: int, arrays: list[Any], stage: int, sums: dict[int, Any]
    ) -> None:
        """Runs one batch up to the last product of a stage, and adds to its sums."""
        plan = prepared.plan
        due = plan.cuts_of(stage)
        if not due:
            return
        kept = self.kept.pop(batch, None)
        count = len(plan.networks)
        slots = {number: (array,) * count for number, array in enumerate(arrays)}
        start = 0 if kept is None else kept.cut
        if kept is not None:
            slots = dict(kept.slots)
        resume = plan.first_cut_from(stage)
        for cut in range(start, due[-1] + 1):
            way = plan.ways[cut]
            if kept is None or cut > start:
                self._run_chunk(way.first, slots)
            slots = {slot: slots[slot] for slot in way.kept}
            if cut == resume:
                self._keep(batch, _Kept(cut, dict(slots)))
            if way.rest is not None:
                self._run_chunk(way.rest, slots)
            slots = {slot: slots[slot] for slot in way.read}
            number, occurrence = plan.cuts[cut]
            if plan.corrections[number].stage == stage:
                found = self._summed(prepared, number, occurrence, slots)
                if number in sums:
                    found = _added(prepared.sites[number].method, sums[number], found)
                sums[number] = found

    def _run_chunk(self, call: ChunkCall, slots: Slots) -> None:
        """Runs a chunk, and adds what it makes to the slots."""
        leaves = [self._in_all_networks(leaf) for leaf in call.leaves]
        read = [slots[slot] for slot in call.slots]
        made = run_chunk(call, leaves, read)
        slots.update(zip(call.results, made, strict=True))

    def _summed(self, prepared: Prepared, number: int, occurrence: Occurrence, slots: Slots) -> Any:
        """Sums up what a method has to know of one product."""
        piece = prepared.plan.corrections[number].piece
        site = prepared.sites[number]
        conditions = occurrence.conditions
        positions = _as_positions(piece.indices)
        leaves = self._in_all_networks(piece.leaf)
        features = slots[occurrence.features]
        outputs = _outputs(site.forms, leaves, positions, features)
        tail = prepared.plan.tails.get(number)
        wanted = None
        if tail is not None:
            on_the_way = [self._in_all_networks(leaf) for leaf in tail.call.leaves]
            wanted = wanted_features(tail, on_the_way, outputs, slots, self.weights)
        branches = tuple([(condition.branch, condition.count) for condition in conditions])
        choices = [slots[condition.which] for condition in conditions]
        arrays = leaves[-1], positions, features[-1], outputs, wanted, choices
        return _summed(site, branches, *as_numpy((*arrays, self.plans, self.weights)))

    def _correct(self, prepared: Prepared, number: int, sums: Any) -> None:
        """Corrects a parameter, and the biases that follow."""
        correction, site = prepared.plan.corrections[number], prepared.sites[number]
        average = self.parts_of_networks[-1]
        leaf, indices = correction.piece
        arrays = average[leaf], _as_positions(indices), sums, self.plans, self.weights
        corrected = as_jax(_corrected(site, *as_numpy(arrays)))
        average[leaf] = corrected.leaf
        if corrected.ridge is not None:
            self.ridges[correction.piece] = corrected.ridge
        # A method that does not look at units shifts none.
        for part, amount in zip(site.parts, corrected.shifts, strict=True):
            for receiver, members in zip(correction.receivers, part.receivers, strict=True):
                if amount is not None and members:
                    leaf, indices = receiver.piece
                    arrays = average[leaf], _as_positions(indices), receiver.sign * amount
                    average[leaf] = as_jax(_shifted(part.group, members, *as_numpy(arrays)))

    def _in_all_networks(self, leaf: int) -> tuple[Array, ...]:
        return tuple([parts[leaf] for parts in self.parts_of_networks])

    def _keep(self, batch: int, kept: _Kept) -> None:
        """Keeps what a batch has come to, if there is room for it."""
        held = sum(_byte_count(other) for other in self.kept.values())
        if batch == 0 or held + _byte_count(kept) <= self.most_kept:
            self.kept[batch] = kept


def _byte_count(kept: _Kept) -> int:
    """Returns how much memory arrays take; what all networks share counts once."""
    arrays = {}
    for slot in kept.slots.values():
        for array in slot:
            arrays[id(array)] = array
    total = 0
    for array in arrays.values():
        total += np.size(array) * _item_size(array)
    return total


def _item_size(array: Any) -> int:
    dtype = jnp.result_type(array)
    return dtype.itemsize


def _as_positions(indices: Sequence[int]) -> Int[np.ndarray, " n"]:
    return np.asarray(indices, np.int32)
