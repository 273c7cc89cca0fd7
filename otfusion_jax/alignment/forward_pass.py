"""How plans are found: one forward pass, or coordinate descent over all groups.

`ForwardPass` is Algorithm 1 of Singh and Jaggi: groups in dataflow order, each matched by the
weights (or activations) that produce it, with what came before already in place.
`CoordinateDescent` is weight matching: it minimises the distance of the moved source to the target
over all groups, one group at a time, which is a linear assignment, until nothing improves.

A group and what is nested in it are matched at once (see `matching`). Everything here is traced:
`align` checks the input and jits it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from ott.geometry import costs

from otfusion_jax.alignment.costs import DEGREES, Gram
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.problem import AbstractMethod, Alignment, AlignmentProblem
from otfusion_jax.alignment.visit import DescentState, Pass, initial_state, visit_group_trees
from otfusion_jax.common.arguments import require_flag
from otfusion_jax.solvers.base import Solution
from otfusion_jax.symmetry.groups import Group, Member


@dataclasses.dataclass(frozen=True)
class ForwardPass(AbstractMethod):
    """Algorithm 1: one pass over the groups in dataflow order.

    With weights, units are compared by the members that produce them, whose consuming axes are
    already in place: the rows of incoming weights. Of a group that is written in several places (a
    residual stream), those count whose inputs have been placed by then. With features, by
    activations, group by group.

    Attributes:
        unit_norm: whether to scale units to norm 1 for the cost, as the original does on request.
        members: which weights make up a unit: `"producing"` it, as in the paper, or `"all"`, those
            that consume it as well, in the order in which they are.

    References:
        Singh and Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, Algorithm 1.
    """

    unit_norm: bool = False
    members: Literal["producing", "all"] = "producing"

    def __post_init__(self):
        require_flag(self, "unit_norm")
        if self.members not in ("producing", "all"):
            raise ValueError(f"members is {self.members!r}; it must be 'producing' or 'all'")

    def run(self, problem: AlignmentProblem, grams: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`."""
        state = visit_group_trees(problem, initial_state(problem), [self.only_pass(problem, grams)])
        initial_plans = initial_state(problem).plans
        history = jnp.stack([problem.distance(initial_plans), problem.distance(state.plans)])
        return Alignment(state.plans, history[-1], history, state.converged, state.gaps)

    def cost_degree(self, metric: costs.CostFn, by_grams: bool) -> int:
        """See `AbstractMethod.cost_degree`."""
        if by_grams or self.unit_norm:
            return 0
        return DEGREES.get(type(metric), 2)

    def only_pass(self, problem: AlignmentProblem, grams: dict[str, Gram] | None) -> Pass:
        """Returns how each group is solved, once the ones before are in place."""

        def compare(family: GroupTree, state: DescentState) -> list[Gram]:
            groups = family.root, *family.nested
            if grams is not None:
                found = [grams[group.name] for group in groups]
            else:
                chosen = [
                    m
                    for g in groups
                    for m in (g.members if self.members == "all" else _placed(problem, family, g))
                ]
                found = problem.compare(family, state.plans, chosen)
            return [g.normalised() for g in found] if self.unit_norm else found

        def accept(
            family: GroupTree, state: DescentState, _: list[Gram], solutions: list[Solution]
        ) -> DescentState:
            names = [group.name for group in (family.root, *family.nested)]
            pairs = ((solution.plan, solution) for solution in solutions)
            carried = problem.carried(family, state.plans, {names[0]: solutions[0].plan})
            state = dataclasses.replace(state, plans=state.plans | carried)
            return state.take(dict(zip(names, pairs, strict=True)), jnp.array(True))

        return Pass(compare, problem.metric, accept)


def _placed(problem: AlignmentProblem, family: GroupTree, group: Group) -> Sequence[Member]:
    """Returns the members that produce a group out of earlier groups or of what is pinned."""
    later = problem.group_trees[problem.group_trees.index(family) + 1 :]
    groups = [g for f in later for g in (f.root, *f.nested) if g is not family.root]
    waiting = {m.leaf for g in groups for m in g.members}
    waiting |= leaves_used_twice(group)
    candidates = group.having("produces") or group.members
    return [m for m in candidates if m.leaf not in waiting] or candidates


def leaves_used_twice(group: Group) -> set[int]:
    """Returns the leaves that have a group on two axes, which makes a quadratic problem of it."""
    axes = {(m.leaf, m.axis) for m in group.members}
    leaves = [leaf for leaf, _ in axes]
    return {leaf for leaf in leaves if leaves.count(leaf) > 1}
