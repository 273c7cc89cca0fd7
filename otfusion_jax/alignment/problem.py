"""Two models whose units are to be matched, and how they compare.

An `AlignmentProblem` holds two models as flat lists of parameters and compares their units by
weights: under the plans so far, of one group tree at a time. It also says how far the moved source
is from the target. `set_up_problem` makes one.

All of it works on known values and inside of a trace. Known values are compared parameter by
parameter, by the programs of `leaf_programs`, and on a CPU they are arrays of NumPy, so that these
need not be compiled (see `common.host`).
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram, unit_gram
from otfusion_jax.alignment.group_tree import GroupTree, group_trees_of
from otfusion_jax.alignment.leaf_programs import (
    added,
    carried_plan,
    in_place,
    log_cosine,
    squared_distance,
    told_apart,
    units_compared,
)
from otfusion_jax.alignment.leaf_weights import rescaled, weighted
from otfusion_jax.alignment.moved_leaves import MovedLeaves, are_same_widths
from otfusion_jax.alignment.pair_sums import (
    COMFORTABLE_EXPONENT,
    PairSums,
    moving_parts,
    sums_of_pairs,
)
from otfusion_jax.common.host import Array, as_jax, as_numpy, at_hand, loaded
from otfusion_jax.common.known import all_known, largest_magnitudes
from otfusion_jax.common.lazy import LazyArray, any_lazy
from otfusion_jax.common.scaling import common_exponent
from otfusion_jax.common.sharding import layout_of
from otfusion_jax.common.typing import PyTree
from otfusion_jax.solvers.base import AbstractSolver
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.groups import Group, Member, Plans
from otfusion_jax.symmetry.leaf_structure import UnitAxis
from otfusion_jax.symmetry.plans import is_identity, is_permutation
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import move

Marginals = tuple[dict[str, Array], dict[str, Array]]
"""Masses of the source's units and of the target's, by the names of groups, float `[*batch, n]` and
`[*batch, m]`. Groups that are left out have uniform masses."""


@dataclasses.dataclass(frozen=True)
class AlignmentProblem:
    """Two models whose units are to be matched, and how a cost becomes a plan.

    The source has the groups of `symmetry`, the target those of `onto`, by the same names.

    Attributes:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, its groups in the source's order.
        source: The parameters of the source, one array for each of `symmetry.parts`.
        target: The parameters of the target, one array for each of `onto.parts`.
        metric: The ground metric between units.
        solver: The solver, from cost to plan.
        marginals: The masses of the units of both, where they are not uniform.
        dtype: The dtype of the inner products: float64 where either model has it, else float32.
        group_trees: What is solved at once, in dataflow order.
        target_groups: The groups of the target, by name.
        known: Whether Python can look at all values. If not, everything is being traced.
        lazy: Whether any parameter is read whenever it is looked at. Nothing large is kept then.
        moved: Of known values, the source's parameters as they were last moved; otherwise None.
        xp: The array module of all arrays: `numpy` for known values on a CPU if the solver takes
            them, otherwise `jax.numpy`.
        sums: Sums over the parameters of both models, if they were taken to see that squares are in
            range; otherwise None.
    """

    symmetry: Symmetry
    onto: Symmetry
    source: list[Any]
    target: list[Any]
    metric: costs.CostFn
    solver: AbstractSolver
    marginals: Marginals
    dtype: Any
    group_trees: tuple[GroupTree, ...]
    target_groups: dict[str, Group]
    known: bool
    lazy: bool
    moved: MovedLeaves | None
    xp: Any
    sums: PairSums | None

    def compare(
        self,
        tree: GroupTree,
        plans: Plans,
        members: Sequence[Collection[Member]],
        norms: bool = True,
    ) -> list[Gram]:
        """Compares the units of a group tree by their weights.

        Args:
            tree: The group tree.
            plans: The plans of all groups so far, under which the source is compared.
            members: For each group of the tree the members to compare by.
            norms: Whether to take the squared norms of units, see `gram`.

        Returns:
            The inner products of the units of each group of the tree. Those of the root leave out
            members in which nested units lie, as these are compared for every pair of indices of
            the root anyway.
        """
        grams = []
        for group, unit_axes in zip(tree.groups, self.compared_axes(tree, members), strict=True):
            total = None
            for unit_axis in unit_axes:
                term = self.awaited(self._compare_along(tree, unit_axis, plans, norms))
                if group.signed:
                    term = told_apart(term, odd=unit_axis.member.odd)
                total = term if total is None else added(total, term)
            if total is None:
                # Nothing but nested units: the root's have no cost of their own.
                total = self._compare_along_nothing(group)
                if group.signed:
                    total = told_apart(total, odd=True)
            grams.append(total)
        return grams

    def compared_axes(
        self, tree: GroupTree, members: Sequence[Collection[Member]]
    ) -> list[list[UnitAxis]]:
        """Finds the unit axes that the units of a group tree are compared along.

        Args:
            tree: The group tree.
            members: For each group of the tree the members to compare by.

        Returns:
            For each group of the tree those of its unit axes.
        """
        root, *nested = tree.groups
        # Where a member of the root lies around nested units, its own units are no vectors that
        # could be compared: what is in them depends on how the nested ones are matched.
        left_out = []
        for group in nested:
            for member in group.members:
                left_out += tree.root_members_around(member)
        axes = []
        for group, chosen in zip(tree.groups, members, strict=True):
            group_axes = []
            for member in chosen:
                if group is root and member in left_out:
                    continue
                for unit_axis in self.symmetry.leaf_structures[member.leaf].unit_axes:
                    if unit_axis.member is member:
                        group_axes.append(unit_axis)
            axes.append(group_axes)
        return axes

    def _compare_along(
        self, tree: GroupTree, unit_axis: UnitAxis, plans: Plans, norms: bool
    ) -> Gram:
        """Compares the units of a group by one member."""
        if self._is_plain(tree, unit_axis, plans):
            return self._compare_moved(unit_axis, plans, norms)
        group, member = unit_axis.group, unit_axis.member
        root, *nested = tree.groups
        around = tree.root_members_around(member) if nested else []
        if tree.siblings and (around or group is root):
            # Where the root stays, what else is nested in it moves within each of its indices.
            in_place = np.arange(root.size, dtype=np.int32)
            root_plan = self.xp.broadcast_to(in_place, plans[root.name].shape)
            plans = plans | self.carried(tree, plans, root_plan)
        frozen = []
        ratio = 1.0
        unit_axes = self.symmetry.leaf_structures[member.leaf].unit_axes
        for number, other in enumerate(unit_axes):
            # What is compared stays; the same units elsewhere in the leaf move.
            if other.member is member or other.member in around:
                frozen.append(number)
                ratio *= self._ratio_of(other)
        numbered = self.symmetry.numbered_leaves[member.leaf]
        source, target = self.source[member.leaf], self.target[member.leaf]
        return units_compared(
            numbered.structure,
            self.onto.leaf_structures[member.leaf].partition,
            numbered.plans(plans),
            self._loaded(source),
            self._loaded(target),
            axis=position_of(unit_axis, unit_axes),
            frozen=tuple(frozen),
            ratio=ratio,
            intra=self.solver.quadratic,
            norms=norms,
            dtype=self.dtype,
            layouts=(layout_of(source), layout_of(target)),
        )

    def assignment_solver(self, tree: GroupTree) -> Exact | None:
        """Returns the solver if it is exact, and a tree is one group that is matched one to one.

        Args:
            tree: The group tree.
        """
        group, *nested = tree.groups
        same_size = group.size == self.target_groups[group.name].size
        has_masses = any(group.name in masses for masses in self.marginals)
        if nested or group.batch or not same_size or has_masses or group.orthogonal:
            return None
        return self.solver if isinstance(self.solver, Exact) else None

    def _ratio_of(self, unit_axis: UnitAxis) -> float:
        """Returns how much larger a parameter becomes along units that become another number."""
        group, role = unit_axis.group, unit_axis.member.role
        n, m = group.size, self.target_groups[group.name].size
        if group.rotates and n != m:
            assert group.stretch is not None, "match_groups has refused it"
            return group.stretch.factor(role, n, m)
        # Of n units that become m, n/m take the place of one; what consumes them adds up.
        return n / m if role == "consumes" else 1.0

    def _is_plain(self, tree: GroupTree, unit_axis: UnitAxis, plans: Plans) -> bool:
        """Whether a group can be compared by its moved parameter, and brought back into place."""
        group = unit_axis.group
        same_widths = self._same_widths(unit_axis.member.leaf)
        alone = len(tree.groups) == 1 and not tree.siblings and not group.batch
        movable = is_permutation(plans[group.name]) and not self.solver.quadratic
        return self.known and same_widths and alone and movable

    def _compare_moved(self, unit_axis: UnitAxis, plans: Plans, norms: bool) -> Gram:
        """Compares the units of a group by one member, all of which has moved.

        To move a parameter is most of the program that compares it. Once it has been moved, it
        serves all groups in it, and the objective.
        """
        leaf = unit_axis.member.leaf
        unit_axes = self.symmetry.leaf_structures[leaf].unit_axes
        moved, target = self.moved_leaf(leaf, plans), self.target[leaf]
        grams = units_compared(
            self.symmetry.numbered_leaves[leaf].structure,
            self.onto.leaf_structures[leaf].partition,
            {},
            moved,
            self._loaded(target),
            axis=position_of(unit_axis, unit_axes),
            frozen=(),
            ratio=1.0,
            intra=False,
            norms=norms,
            dtype=self.dtype,
            layouts=(layout_of(moved), layout_of(target)),
        )
        plan = plans[unit_axis.group.name]
        if is_identity(plan):
            return grams
        inverse: Any = np.argsort(np.asarray(plan)).astype(np.int32)
        return in_place(grams, inverse)

    def moved_leaf(self, number: int, plans: Plans) -> Array:
        """Moves one parameter of the source.

        Args:
            number: The position of the parameter in `symmetry.parts`.
            plans: The plans of all groups.

        Returns:
            The parameter, moved. Of known values, the last result is kept, see `MovedLeaves`.
        """
        source = self.source[number]
        if isinstance(source, LazyArray):
            # Read anew each time: of all leaves at once, what is kept would be the model.
            array = self._loaded(source)
            if not self._stays(number, plans):
                array = move(self.symmetry, plans, number, array, self.onto)
            return jax.block_until_ready(array)
        if self.moved is None:
            return move(self.symmetry, plans, number, source, self.onto)
        return self.moved.moved(number, plans)

    def _stays(self, number: int, plans: Plans) -> bool:
        """Whether plans that are known leave a parameter as it is."""
        depends_on = self.symmetry.numbered_leaves[number].plans_by_name(plans)
        return self._same_widths(number) and all(map(is_identity, depends_on.values()))

    def _same_widths(self, number: int) -> bool:
        """Whether a parameter falls into the same blocks in both models."""
        return are_same_widths(self.symmetry, self.onto, number)

    def _compare_along_nothing(self, group: Group) -> Gram:
        """Returns inner products that are 0, as those of vectors without entries."""
        target_group = self.target_groups[group.name]
        source_units = self.xp.zeros((*group.batch, group.size, 0), self.dtype)
        target_units = self.xp.zeros((*target_group.batch, target_group.size, 0), self.dtype)
        return unit_gram(source_units, target_units, group, self.solver.quadratic)

    def plans_after(self, tree: GroupTree, plans: Plans, tree_plans: Sequence[Array]) -> Plans:
        """Returns the plans that change when a group tree gets new ones.

        Args:
            tree: The group tree.
            plans: The plans of all groups so far.
            tree_plans: The new plan of each group of the tree.

        Returns:
            The plans of the tree's groups, and those of its siblings, which are in place by the old
            order of the root's units and move along with these.
        """
        changed = self.carried(tree, plans, tree_plans[0]) if tree.siblings else {}
        for group, plan in zip(tree.groups, tree_plans, strict=True):
            changed[group.name] = plan
        return changed

    def carried(self, tree: GroupTree, plans: Plans, root_plan: Array) -> Plans:
        """Returns the plans of what is nested in a root, but not in this tree, as the root moves.

        Args:
            tree: The group tree whose root moves.
            plans: The plans of all groups so far.
            root_plan: The plan that the root gets in place of the one in `plans`.

        Returns:
            The plans of the tree's siblings: what is inside of an index of the root goes along
            with it. Empty if the root does not move one to one.
        """
        old_root_plan = plans[tree.groups[0].name]
        if not is_permutation(old_root_plan):
            return {}
        carried = {}
        for group in tree.siblings:
            carried[group.name] = carried_plan(
                plans[group.name], old_root_plan, root_plan, group.size
            )
        return carried

    def distance(
        self, plans: Plans, measured: Mapping[tuple[int, ...], float] | None = None
    ) -> Float[Array, ""]:
        """Takes the squared distance of the moved source to the target.

        Args:
            plans: The plans of all groups.
            measured: The distances under these plans that are known, by the positions of the
                parameters in `symmetry.parts` that they belong to. None knows of none.

        Returns:
            The sum over all parameters that move, in the problem's dtype.
        """
        measured = measured or {}
        distances = [self.xp.asarray(distance, self.dtype) for distance in measured.values()]
        known = set(itertools.chain.from_iterable(measured))
        for number, part in enumerate(self.symmetry.parts):
            # Integers, such as step counts, are no parameters that a plan could bring closer.
            if part.moves and number not in known:
                distances.append(self.leaf_distance(number, plans))
        return self.summed(distances)

    def leaf_distance(self, number: int, plans: Plans) -> Float[Array, ""]:
        """Takes the squared distance of one parameter of the moved source to that of the target.

        Args:
            number: The position of the parameter in `symmetry.parts`.
            plans: The plans of all groups.

        Returns:
            The squared distance, in the problem's dtype.
        """
        moved = self.moved_leaf(number, plans)
        target = self._loaded(self.target[number])
        return self.awaited(squared_distance(moved, target, dtype=self.dtype))

    def similarity(self, plans: Plans) -> Float[Array, ""]:
        """Takes the sum over weight matrices of the log cosine of the moved source and the target.

        Of what two layers compute, their average keeps a share that goes with their correlation,
        and the shares multiply with depth. The distance, a sum over layers, does not see that: it
        gladly trades a late layer for an early one.

        Args:
            plans: The plans of all groups.

        Returns:
            The sum of logarithms, in the problem's dtype.
        """
        similarities = []
        for number, part in enumerate(self.symmetry.parts):
            # A layer's kernel says what it computes. What no plan moves is alike for all plans.
            has_units = self.symmetry.leaf_structures[number].unit_axes
            if part.moves and len(part.shape) > 1 and has_units:
                moved = self.moved_leaf(number, plans)
                target = self._loaded(self.target[number])
                cosine = log_cosine(moved, target, dtype=self.dtype)
                similarities.append(self.awaited(cosine))
        return self.summed(similarities)

    def _loaded(self, array: Any) -> Array:
        """Reads a parameter if it is lazy, for the array module of the problem."""
        if not isinstance(array, LazyArray):
            return array
        return loaded(array) if self.xp is np else as_jax(loaded(array))

    def awaited(self, results: Any) -> Any:
        """Waits for results of leaves that are lazy, or many of them would be read ahead of time.

        Args:
            results: A pytree of arrays.

        Returns:
            The results.
        """
        return jax.block_until_ready(results) if self.lazy else results

    def summed(self, terms: Sequence[Array]) -> Float[Array, ""]:
        """Sums up numbers of all parameters; where they are known, they are fetched together.

        Args:
            terms: The numbers, float `[]`, in the problem's dtype.

        Returns:
            Their sum.
        """
        total = np.zeros((), self.dtype)
        if not self.known:
            return sum(terms, start=jnp.asarray(total))
        # A sum of numbers of NumPy is a number, and no array.
        fetched: Any = np.asarray(sum(jax.device_get(terms), start=total))
        return fetched if self.xp is np else jax.device_put(fetched)


def position_of(unit_axis: UnitAxis, unit_axes: Sequence[UnitAxis]) -> int:
    """Finds a unit axis among those of its leaf.

    Args:
        unit_axis: The unit axis.
        unit_axes: All unit axes of the leaf.

    Returns:
        Its position.
    """
    members = [other.member for other in unit_axes]
    return next(n for n, member in enumerate(members) if member is unit_axis.member)


def set_up_problem(
    symmetry: Symmetry,
    onto: Symmetry,
    source: PyTree,
    target: PyTree,
    metric: costs.CostFn,
    solver: AbstractSolver,
    *,
    marginals: Marginals = ({}, {}),
    weights: tuple[float, ...] | None = None,
    sums: PairSums | None = None,
) -> tuple[AlignmentProblem, Any]:
    """Takes two models apart, weighted and in a range in which their squares are finite.

    Args:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target, its groups in the source's order and by their names.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        metric: The ground metric between units.
        solver: The solver, from cost to plan.
        marginals: The masses of the units of both, where they are not uniform.
        weights: One weight per leaf, as `leaf_weights` returns them.
        sums: Sums over the models, if they have been taken.

    Returns:
        The problem, and the exponent k, int32 `[]`: the problem's parameters are those of the
        models times `2**-k`. It is 0 for a solver that is not scale-free.
    """
    given = symmetry.split(source), onto.split(target), marginals
    by_numpy = solver.takes_numpy and at_hand(given)
    sources, targets, marginals = as_numpy(given) if by_numpy else as_jax(given)
    if weights is not None:
        sources = weighted(symmetry, sources, weights)
        targets = weighted(symmetry, targets, weights)
        sums = None
    positions = moving_parts(symmetry)
    moving = [sources[number] for number in positions] + [targets[number] for number in positions]
    lazy = any_lazy(moving)
    known = all_known(moving, marginals)
    # A power of two rounds nothing, and a scale-free solver finds the same plans.
    exponent: Any = np.int32(0)
    if solver.scale_free:
        if not known:
            exponent = common_exponent(moving)
        else:
            # Sums of squares are less to take than the largest magnitude, and mostly tell enough.
            if sums is None:
                sums = sums_of_pairs(positions, sources, targets)
            if sums is None:
                exponent = _exponent_of_known(moving)
        if lazy and exponent:
            raise ValueError(
                f"the largest weight is about 2**{exponent}, and squares would be out of range; "
                "scaling takes models whose leaves are not lazy: jax.tree.map(np.asarray, model)"
            )
        if not known or exponent:
            sources = rescaled(symmetry.parts, sources, -exponent)
            targets = rescaled(symmetry.parts, targets, -exponent)
    # Either side may be the wider one.
    dtype = jnp.float32
    for array in moving:
        if array.dtype in (jnp.float64, jnp.complex128):
            dtype = jnp.float64
    target_groups = {}
    for group in onto.groups:
        target_groups[group.name] = group
    problem = AlignmentProblem(
        symmetry=symmetry,
        onto=onto,
        source=sources,
        target=targets,
        metric=metric,
        solver=solver,
        marginals=marginals,
        dtype=dtype,
        group_trees=group_trees_of(symmetry),
        target_groups=target_groups,
        known=known,
        lazy=lazy,
        moved=MovedLeaves(symmetry, onto, sources) if known else None,
        xp=np if by_numpy else jnp,
        # Elsewhere it takes little to go over the parameters once more.
        sums=sums if by_numpy else None,
    )
    return problem, exponent


def _exponent_of_known(arrays: Sequence[Any]) -> np.int32:
    """Returns the exponent of `common_exponent`, or 0 where squares and their sums are in range."""
    magnitudes = largest_magnitudes(arrays)
    _, exponent = np.frexp(max(magnitudes, default=0.0))
    # Sums of squares of a billion numbers below 2**16 are below 2**62. To scale is to copy both
    # models, so that it is left out where it makes no difference.
    if abs(exponent) <= COMFORTABLE_EXPONENT:
        exponent = 0
    return np.int32(exponent)
