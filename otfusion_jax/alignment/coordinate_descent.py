"""How plans are found: one forward pass, or coordinate descent over all groups.

`ForwardPass` is Algorithm 1 of Singh and Jaggi: groups in dataflow order, each matched by the
weights (or activations) that produce it, with what came before already in place.
`CoordinateDescent` is weight matching: it minimises the distance of the moved source to the target
over all groups, one group at a time, which is a linear assignment, until nothing improves.

A group and what is nested in it are matched at once (see `matching`). Everything here is traced:
`align` checks the input and jits it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.forward_pass import ForwardPass, leaves_used_twice
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.problem import AbstractMethod, Alignment, AlignmentProblem
from otfusion_jax.alignment.solve_tree import overlap
from otfusion_jax.alignment.visit import DescentState, Pass, initial_state, visit_group_trees
from otfusion_jax.common.arguments import require_number
from otfusion_jax.solvers.base import Solution
from otfusion_jax.symmetry.plans import is_permutation


@dataclasses.dataclass(frozen=True)
class CoordinateDescent(AbstractMethod):
    """Weight matching: coordinate descent on the distance of the moved source to the target.

    Each group in turn is matched by all its members, given the plans of the others, until no group
    improves. A parameter that has one group on two axes makes the problem quadratic; it is
    linearised at the current plan, and only what improves the true objective is accepted. Likewise
    for plans between groups of different sizes: what is minimised is the mean squared distance of
    the units that are merged, which bounds that of their mean.

    Attributes:
        max_sweeps: how often to go over all groups at most.
        starts: where to descend from: `"identity"`, or `"forward"` (the result of `ForwardPass`).
            The end whose layers are the most similar to the target's is returned, by the product of
            their cosines: it predicts the accuracy of the average better than the objective.

    References:
        Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, Algorithm 1.
    """

    max_sweeps: int = 50
    starts: tuple[str, ...] = ("forward", "identity")

    def __post_init__(self):
        require_number(self, "max_sweeps", least=1, whole=True)
        known = isinstance(self.starts, tuple) and {*self.starts} <= {"identity", "forward"}
        if not known or not self.starts:
            raise ValueError(
                f"starts is {self.starts!r}; it must be a tuple of 'identity', 'forward' or both"
            )

    def run(self, problem: AlignmentProblem, grams: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`. Features, if given, only serve the start `"forward"`."""
        initial_plans = initial_state(problem)
        square = [
            initial_plans.plans[group.name]
            for group, other in zip(problem.symmetry.groups, problem.onto.groups, strict=True)
            if group.size == other.size
        ]
        if not all(map(is_permutation, square)):
            raise ValueError(
                f"coordinate descent composes permutations, and {type(problem.solver).__name__} "
                "returns soft plans; use Exact(), or ForwardPass() with this solver"
            )
        passes = [_sweep_of(problem)]
        if "forward" in self.starts:
            passes.insert(0, ForwardPass().only_pass(problem, grams))
        # A pass of another kind before the first sweep, or none.
        first = jnp.array([-1 if name == "forward" else 0 for name in self.starts])
        if len(first) == 1:
            return self._descend(problem, initial_plans, passes, first[0])
        ends = jax.lax.map(functools.partial(self._descend, problem, initial_plans, passes), first)
        best = jnp.argmax(jax.lax.map(problem.similarity, ends.plans))
        return jax.tree.map(lambda x: x[best], ends)

    def _descend(
        self, problem: AlignmentProblem, state: DescentState, passes: Sequence[Pass], first: Array
    ) -> Alignment:
        """Goes over all groups until nothing improves; sweep -1 is the first of the passes."""
        start = problem.distance(state.plans)
        history = jnp.full(self.max_sweeps + 1, start)

        def unfinished(loop: tuple[DescentState, Array, Array]) -> Array:
            state, _, count = loop
            return state.improved & (count < self.max_sweeps)

        def sweep(loop: tuple[DescentState, Array, Array]) -> tuple[DescentState, Array, Array]:
            state, history, count = loop
            state = dataclasses.replace(state, converged=jnp.array(True), improved=jnp.array(False))
            state = visit_group_trees(
                problem, state, passes, jnp.where(count < 0, 0, len(passes) - 1)
            )
            history = history.at[count + 1].set(problem.distance(state.plans))
            return state, history, count + 1

        state = dataclasses.replace(state, improved=jnp.array(True))
        loop = state, history, first
        state, history, count = jax.lax.while_loop(unfinished, sweep, loop)
        converged = state.converged & ~state.improved
        # No NaN to fill it up: `jax_debug_nans` would take it for a fault.
        history = jnp.where(jnp.arange(len(history)) > count, history[count], history)
        return Alignment(state.plans, history[-1], history, converged, state.gaps)


def _sweep_of(problem: AlignmentProblem) -> Pass:
    """Returns how each group is solved by all its members, where all others are."""

    def compare(family: GroupTree, state: DescentState) -> list[Gram]:
        chosen = [m for group in (family.root, *family.nested) for m in group.members]
        return problem.compare(family, state.plans, chosen)

    return Pass(compare, costs.SqEuclidean(), functools.partial(_accept, problem))


def _accept(
    problem: AlignmentProblem,
    family: GroupTree,
    state: DescentState,
    grams: list[Gram],
    solutions: list[Solution],
) -> DescentState:
    """Takes new plans only if they are better than the old ones by more than rounding."""
    groups = family.root, *family.nested
    old = [state.plans[group.name] for group in groups]
    new = [solution.plan for solution in solutions]
    better = jnp.array(True)
    permutations = all(map(is_permutation, new))
    if permutations:
        gain = overlap(grams, new) - overlap(grams, old)
        scale = sum(jnp.sum(g.source_sq_norms) for g in grams) * sum(
            jnp.sum(g.target_sq_norms) for g in grams
        )
        better = gain > 1e-6 * jnp.sqrt(scale)
    carried = problem.carried(family, state.plans, {family.root.name: new[0]})
    if not permutations or any(
        map(leaves_used_twice, groups)
    ):  # what was minimised is not the objective
        plans = carried | {group.name: plan for group, plan in zip(groups, new, strict=True)}
        before = problem.distance(state.plans)
        better = better & (problem.distance(state.plans | plans) < (1 - 1e-6) * before)
    # A problem without a solution must not pass for one that is solved.
    for solution in solutions:
        better = better | ~jnp.isfinite(solution.value)
    taken = {
        group.name: (jnp.where(better, solution.plan, before), solution)
        for group, solution, before in zip(groups, solutions, old, strict=True)
    }
    moved = {name: jnp.where(better, plan, state.plans[name]) for name, plan in carried.items()}
    return dataclasses.replace(state, plans=state.plans | moved).take(taken, better)
