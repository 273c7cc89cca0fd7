"""How plans are found: one forward pass, or coordinate descent over all groups.

`ForwardPass` is Algorithm 1 of Singh and Jaggi: groups in dataflow order, each matched by the
weights (or activations) that produce it, with what came before already in place.
`CoordinateDescent` is weight matching: it minimises the distance of the moved source to the target
over all groups, one group at a time, which is a linear assignment, until nothing improves.

A group and what is nested in it are matched at once (see `matching`). Everything here is traced:
`align` checks the input and jits it.
"""

import abc
import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram, Masses, gram, squared_norm, unit_gram
from otfusion_jax.alignment.group_tree import GroupTree, group_trees_of
from otfusion_jax.solvers.base import AbstractSolver
from otfusion_jax.symmetry.groups import Group, Member, Plans
from otfusion_jax.symmetry.plans import is_permutation
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import move, split_and_move
from otfusion_jax.symmetry.units import units_in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alignment:
    """Plans that move a source model onto a target, with what is known of their quality.

    Attributes:
        plans: group name to plan, as `transport` takes them.
        objective: squared distance of the moved source to the target, summed over all parameters;
            infinite if that is out of range, which does the plans no harm.
        history: for coordinate descent the objective at the start and after every sweep, float
            `[max_sweeps + 1]`, which stays as it is after the last; otherwise before and after.
        converged: whether every solve converged and nothing was left to improve.
        gaps: group name to the duality gap of its last solve, in the units of its ground cost; of a
            nested group the largest of its batch.
    """

    plans: Plans
    objective: Float[Array, ""]
    history: Float[Array, " sweeps"]
    converged: Bool[Array, ""]
    gaps: dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class AlignmentProblem:
    """What a method works on: flat parameters, and how a cost becomes a plan.

    The source has the groups of `symmetry`, the target those of `onto`, by the same names.
    `marginals` are the masses of the units of both, where they are not uniform.
    """

    symmetry: Symmetry
    onto: Symmetry
    source: list[Array]
    target: list[Array]
    metric: costs.CostFn
    solver: AbstractSolver
    marginals: tuple[dict[str, Array], dict[str, Array]] = ({}, {})

    @property
    def dtype(self) -> Any:
        """Of the inner products: float64 where there is any in the models, float32 otherwise."""
        wide = any(jnp.asarray(x).dtype in (jnp.float64, jnp.complex128) for x in self.source)
        return jnp.float64 if wide else jnp.float32

    @functools.cached_property
    def group_trees(self) -> tuple[GroupTree, ...]:
        """What is solved at once, in dataflow order."""
        return group_trees_of(self.symmetry)

    def masses(self, family: GroupTree) -> list[Masses]:
        """Returns the masses of the units of a group and of each nested one."""
        names = [group.name for group in (family.root, *family.nested)]
        source, target = self.marginals
        return [(source.get(name), target.get(name)) for name in names]

    def compare(self, family: GroupTree, plans: Plans, chosen: Collection[Member]) -> list[Gram]:
        """Compares the units of a family by their weights.

        Args:
            family: a group and what is nested in it.
            plans: where all other groups are by now.
            chosen: the members to compare by.

        Returns:
            Inner products of the group, by the members that belong to nothing nested in it, and of
            each nested one.
        """
        return [
            self._gram(family, group, members, plans) for group, members in family.split(chosen)
        ]

    def _gram(
        self, family: GroupTree, group: Group, members: Sequence[Member], plans: Plans
    ) -> Gram:
        if not members:
            a, b = (
                jnp.zeros((*g.batch, g.size, 0), self.dtype) for g in (group, self.onto[group.name])
            )
            return unit_gram(a, b, group, self.solver.quadratic)
        return functools.reduce(
            Gram.__add__, (self._compared(family, group, member, plans) for member in members)
        )

    def _compared(self, family: GroupTree, group: Group, member: Member, plans: Plans) -> Gram:
        """Compares the units of a group by one member."""
        leaf = member.leaf
        use = next(
            use for use in self.symmetry.leaf_structures[leaf].unit_axes if use.member is member
        )
        front = [*use.levels, use.dim]
        # What is compared stays; the same units elsewhere in the leaf move. Where the root stays,
        # what else is nested in it moves within each of its indices.
        frozen = family.beside(member)
        if any(m in family.root.members for m in frozen):
            plans = plans | self.carried(family, plans, self.symmetry.identity())
        source = units_in(
            split_and_move(self.symmetry, plans, leaf, self.source[leaf], frozen), front
        )
        target = units_in(self.onto.leaf_structures[leaf].partition.split(self.target[leaf]), front)
        for beside in family.beside(member):
            if beside.role == "consumes":
                # Of n units that become m, n/m take the place of one; what consumes them adds up.
                name = group.name if beside is member else family.root.name
                source = source * (self.symmetry[name].size / self.onto[name].size)
        return unit_gram(source, target, group, self.solver.quadratic)

    def carried(self, family: GroupTree, plans: Plans, to: Plans) -> Plans:
        """Returns the plans of what is nested in a root, but not in this family, as it moves.

        Args:
            family: whose root moves.
            plans: of all groups, as they are.
            to: where the root moves to, from the same place as in `plans`.

        Returns:
            Their plans: what is inside of an index of the root goes along with it.
        """
        root = family.root.name
        mine = {group.name for group in family.nested}
        inside = [g for g in self.symmetry.groups if g.outer == root and g.name not in mine]
        if not inside or not is_permutation(plans[root]):
            return {}
        # The plan at position j belongs to the index that has come there.
        came_from = jnp.take_along_axis(jnp.argsort(plans[root], axis=-1), to[root], axis=-1)
        found = {}
        for group in inside:
            plan = plans[group.name]
            ranks = plan.ndim - came_from.ndim
            index = came_from.reshape(*came_from.shape, *[1] * ranks)
            nowhere = group.size if is_permutation(plan) else jnp.nan
            found[group.name] = jnp.take_along_axis(
                plan, index, axis=came_from.ndim - 1, mode="fill", fill_value=nowhere
            )
        return found

    def _moved(self, plans: Plans, leaf: int) -> Array:
        return move(self.symmetry, plans, leaf, self.source[leaf], self.onto)

    def distance(self, plans: Plans) -> Float[Array, ""]:
        """Squared distance of the moved source to the target, over all parameters that move."""
        terms = [
            squared_norm(self._moved(plans, i) - b).astype(self.dtype)
            for i, b in enumerate(self.target)
            if self.symmetry.parts[i].moves
        ]
        return jnp.asarray(sum(terms, start=jnp.zeros((), self.dtype)))

    def similarity(self, plans: Plans) -> Float[Array, ""]:
        """Sum over weight matrices of the log cosine between the moved source and the target.

        Of what two layers compute, their average keeps a share that goes with their correlation,
        and the shares multiply with depth. The distance, a sum over layers, does not see that: it
        gladly trades a late layer for an early one.
        """
        total = jnp.zeros((), self.dtype)
        for i, b in enumerate(self.target):
            leaf = self.symmetry.parts[i]
            if leaf.moves and len(leaf.shape) > 1 and self.symmetry.leaf_structures[i].unit_axes:
                moved = self._moved(plans, i)
                g = gram(moved.reshape(1, -1), b.reshape(1, -1))
                norms = jnp.sqrt(g.source_sq_norms[0]) * jnp.sqrt(g.target_sq_norms[0])
                cosine = g.cross[0, 0] / jnp.where(norms > 0, norms, 1)
                total = total + jnp.log(jnp.maximum(cosine, 1e-6)).astype(self.dtype)
        return total


class AbstractMethod(abc.ABC):
    """How the plans of all groups are found. Subclasses are frozen, hashable dataclasses."""

    @abc.abstractmethod
    def run(self, problem: AlignmentProblem, grams: dict[str, Gram] | None) -> Alignment:
        """Finds the plans. Traced: called under `jax.jit`.

        Args:
            problem: models, metric and solver.
            grams: inner products of activations, or None to use the weights.

        Returns:
            The alignment.
        """

    def cost_degree(self, metric: costs.CostFn, by_grams: bool) -> int:
        """Says in which power of the weights' unit the gaps are.

        Args:
            metric: the ground metric.
            by_grams: whether inner products are given.

        Returns:
            The power: that of squared distances between weights, unless the method says otherwise.
        """
        return 2
