"""Weight matching: coordinate descent on the distance of the moved source to the target.

The distance is minimised over all groups, one group tree at a time, which is a linear assignment,
until nothing improves. `DescentSweep` is one pass over all trees, for the loop in `visit`;
`_Descent` repeats it.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.descent_memory import DescentMemory
from otfusion_jax.alignment.descent_state import DescentState, initial_state
from otfusion_jax.alignment.forward_pass import ForwardSweep, leaves_used_twice
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.method import AbstractMethod, Alignment
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.alignment.solve_tree import overlap
from otfusion_jax.alignment.visit import AbstractSweep, visit_group_trees
from otfusion_jax.common.arguments import require_number
from otfusion_jax.common.host import Array, program
from otfusion_jax.solvers.base import Solution
from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.plans import is_orthogonal, is_permutation

ROUNDINGS: dict[np.dtype, float] = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-13}
"""How much better a plan must be, relative to the norms of what is compared, to be an improvement,
by the precision of what is summed up. Without it, plans that are equal up to rounding would replace
each other for ever."""


@dataclasses.dataclass(frozen=True)
class CoordinateDescent(AbstractMethod):
    """Weight matching: coordinate descent on the distance of the moved source to the target.

    Each group in turn is matched by all its members, given the plans of the others, until no group
    improves. A parameter that has one group on two axes makes the problem quadratic; it is
    linearised at the current plan, and only what improves the true objective is accepted. The same
    holds for plans between groups of different sizes: what is minimised is the mean squared
    distance of the units that are merged, which bounds that of their mean.

    Attributes:
        max_sweeps: How often to go over all groups at most.
        starts: Where to descend from, a tuple of `"identity"` and `"forward"` (the result of
            `ForwardPass`) or of one of them. The end whose layers are the most similar to the
            target's is returned, by the product of their cosines: it predicts the accuracy of the
            average better than the objective. Inner products of activations (`grams`) serve
            the start `"forward"` alone. What is found from the identity depends on the order that
            units are given in; from `"forward"` alone it does not.
        tolerance: Where groups rotate, the share of the objective that a sweep has to take off for
            another sweep to follow. Permutations are finitely many, and descent ends where none of
            them is better; of rotations there is always a better one, by less and less. Without
            rotations it makes no difference. 0 goes on until nothing improves by more than
            rounding.

    References:
        Ainsworth, Hayase and Srinivasa, Git Re-Basin, ICLR 2023, Algorithm 1.
    """

    max_sweeps: int = 50
    starts: tuple[str, ...] = ("forward", "identity")
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        require_number(self, "max_sweeps", least=1, whole=True)
        require_number(self, "tolerance", least=0)
        expected = "it must be a tuple of 'identity', 'forward' or both, as in ('forward',)"
        if not isinstance(self.starts, tuple):
            raise TypeError(f"starts is {self.starts!r}; {expected}")
        for start in self.starts:
            if start not in ("identity", "forward"):
                raise ValueError(f"starts is {self.starts!r}; {expected}")
        if not self.starts:
            raise ValueError(f"starts is {self.starts!r}; {expected}")

    def run(self, problem: AlignmentProblem, grams: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`. If `grams` are given, they serve the start `"forward"`.

        Raises:
            ValueError: If the solver returns soft plans; if there are `grams` that no start uses.
        """
        if grams is not None and "forward" not in self.starts:
            raise ValueError(
                "grams serve only the start 'forward' of coordinate descent, and starts is "
                f"{self.starts!r}; use CoordinateDescent(starts=('forward',)), or ForwardPass() to "
                "match by activations alone, or leave grams out"
            )
        initial = initial_state(problem)
        # What form of plan a solver returns is known from the state to start from. Groups of other
        # widths have couplings in any case, and are accepted by the objective alone.
        for group in problem.symmetry.groups:
            same_size = group.size == problem.target_groups[group.name].size
            is_soft = not group.orthogonal and not is_permutation(initial.plans[group.name])
            if same_size and is_soft:
                raise ValueError(
                    "coordinate descent composes permutations, and "
                    f"{type(problem.solver).__name__} returns soft plans; use Exact(), or "
                    "ForwardPass() with this solver"
                )
        # One program for all starts. The last sweep is the descent's; the forward pass, if there is
        # one, is the first.
        sweeps: list[AbstractSweep] = [DescentSweep(problem, costs.SqEuclidean())]
        if "forward" in self.starts:
            sweeps.insert(0, ForwardSweep(problem, problem.metric, grams, told_alone=True))
        # Of permutations alone, every improvement is worth another sweep.
        tolerance = self.tolerance if problem.symmetry.rotates else None
        descent = _Descent(problem, initial, sweeps, self.max_sweeps, tolerance)
        # Sweep -1 is the forward pass that a descent may begin with.
        first_sweeps = []
        for start in self.starts:
            first_sweeps.append(-1 if start == "forward" else 0)
        if problem.known:
            return descent.best_of_known(first_sweeps)
        if len(self.starts) == 1:
            return descent.run(jnp.array(first_sweeps)[0])
        # One after the other, so that none waits for the one that takes more sweeps.
        ends = jax.lax.map(descent.run, jnp.array(first_sweeps))
        best = jnp.argmax(jax.lax.map(problem.similarity, ends.plans))
        return jax.tree.map(operator.itemgetter(best), ends)


class _Progress(NamedTuple):
    """What a descent carries from sweep to sweep.

    Attributes:
        state: The state after the last sweep.
        history: The objective at the start and after every sweep, float `[max_sweeps + 1]`.
        sweep: The number of the next sweep, int32 `[]`.
    """

    state: DescentState
    history: Array
    sweep: Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Descent:
    """A descent from a start until nothing improves.

    Attributes:
        problem: The alignment problem.
        initial: The state in which everything is in place.
        sweeps: What the program knows: a descent sweep, and perhaps a forward sweep before it.
        max_sweeps: How often to go over all groups at most.
        tolerance: The share of the objective that a sweep has to take off for another to follow;
            None where every improvement is enough.
    """

    problem: AlignmentProblem
    initial: DescentState
    sweeps: Sequence[AbstractSweep]
    max_sweeps: int
    tolerance: float | None

    def run(self, first_sweep: Array) -> Alignment:
        """Descends; `first_sweep` is -1 to begin with the forward pass, otherwise 0."""
        objective = self.problem.distance(self.initial.plans)
        history = jnp.full(self.max_sweeps + 1, objective)
        # The loop goes on while something improves, and has to begin.
        state = dataclasses.replace(self.initial, improved=jnp.array(True))
        start = _Progress(state, history, first_sweep)
        state, history, sweep = jax.lax.while_loop(self.is_unfinished, self.go_over_all, start)
        converged = state.all_converged() & ~state.improved
        # No NaN to fill it up: `jax_debug_nans` would take it for a fault.
        history = jnp.where(jnp.arange(len(history)) > sweep, history[sweep], history)
        return Alignment(state.plans, history[-1], history, converged, state.gaps)

    def best_of_known(self, first_sweeps: Sequence[int]) -> Alignment:
        """Descends from several starts, and returns the end that is the most similar."""
        ends = []
        for first_sweep in first_sweeps:
            end = self.run_known(first_sweep)
            if end.objective == 0:
                # The moved source is the target: no other end could be closer.
                return end
            ends.append(end)
        if len(ends) == 1:
            return ends[0]
        similarities = [self.problem.similarity(end.plans) for end in ends]
        return ends[int(np.argmax(similarities))]

    def run_known(self, first_sweep: int) -> Alignment:
        """The same as `run`, by a loop of Python, which goes over nothing that is perfect."""
        state = self.initial
        if first_sweep < 0:
            state = visit_group_trees(self.problem, state, self.sweeps, 0)
            state = self.sweeps[0].completed(state)
        xp = self.problem.xp
        memory = DescentMemory(self.problem)
        sweep = DescentSweep(self.problem, costs.SqEuclidean(), memory)
        history = [memory.distance(state.plans)]
        improved = bool(history[0] > 0)
        while improved and len(history) <= self.max_sweeps:
            state = dataclasses.replace(state, improved=xp.asarray(False))
            state = visit_group_trees(self.problem, state, [sweep])
            history.append(memory.distance(state.plans))
            improved = bool(state.improved & (history[-1] > 0))
            improved = improved and bool(self.is_worth_another(history[-2], history[-1]))
        converged = state.all_converged() & xp.asarray(not improved)
        objective = history[-1]
        unused = self.max_sweeps + 1 - len(history)
        values: Any = np.array(jax.device_get(history + [objective] * unused))
        if xp is jnp:
            values = jax.device_put(values)
        return Alignment(state.plans, objective, values, converged, state.gaps)

    def is_unfinished(self, progress: _Progress) -> Array:
        """Whether the last sweep has improved anything, and there may be another one."""
        return progress.state.improved & (progress.sweep < self.max_sweeps)

    def go_over_all(self, progress: _Progress) -> _Progress:
        """Makes one sweep. The forward pass, sweep -1, writes the first entry of the history."""
        state, history, sweep = progress
        state = dataclasses.replace(state, improved=jnp.array(False))
        which = jnp.where(sweep < 0, 0, len(self.sweeps) - 1)
        state = visit_group_trees(self.problem, state, self.sweeps, which)
        if self.problem.symmetry.rotates:
            state = jax.lax.cond(sweep < 0, self.sweeps[0].completed, lambda state: state, state)
        objective = self.problem.distance(state.plans)
        # After the forward pass, descent has yet to begin.
        goes_on = (sweep < 0) | self.is_worth_another(history[sweep], objective)
        state = dataclasses.replace(state, improved=state.improved & goes_on)
        return _Progress(state, history.at[sweep + 1].set(objective), sweep + 1)

    def is_worth_another(self, before: Array, after: Array) -> Array | bool:
        """Whether a sweep has taken enough off the objective for another one to follow."""
        return True if self.tolerance is None else before - after > self.tolerance * after


@dataclasses.dataclass(frozen=True, eq=False)
class DescentSweep(AbstractSweep):
    """How each group tree is solved by all its members, where all others are.

    Attributes:
        problem: The alignment problem.
        metric: The ground metric, squared distances: theirs is the objective.
        memory: What earlier sweeps of the same descent have compared; None where it is traced.
    """

    problem: AlignmentProblem
    metric: costs.CostFn
    memory: DescentMemory | None = None

    def is_settled(self, tree: GroupTree, state: DescentState) -> bool:
        """See `AbstractSweep.is_settled`. From the same costs would come the same plans."""
        return self.memory is not None and self.memory.is_current(tree, state.plans)

    def compare(self, tree: GroupTree, state: DescentState) -> list[Gram]:
        """See `AbstractSweep.compare`."""
        members = []
        for group in tree.groups:
            members.append(group.members)
        comparing = self.problem if self.memory is None else self.memory
        return comparing.compare(tree, state.plans, members)

    def accept(
        self,
        tree: GroupTree,
        state: DescentState,
        grams: list[Gram],
        solutions: list[Solution],
    ) -> DescentState:
        """See `AbstractSweep.accept`. Plans are kept if they are better by more than rounding."""
        old_plans = []
        new_plans = []
        for group, solution in zip(tree.groups, solutions, strict=True):
            old_plans.append(state.plans[group.name])
            new_plans.append(solution.plan)
        plans = self.problem.plans_after(tree, state.plans, new_plans)

        one_to_one = all(map(_keeps_norms, tree.groups, new_plans))
        if one_to_one:
            better = _is_better(grams, old_plans, new_plans)
        else:
            better = self.problem.xp.asarray(True)
        if not one_to_one or any(map(leaves_used_twice, tree.groups)):
            # What was minimised is not the objective.
            old_distance = self.problem.distance(state.plans)
            new_distance = self.problem.distance(state.plans | plans)
            shorter = (1 - ROUNDINGS[old_distance.dtype]) * old_distance
            better = better & (new_distance < shorter)
        # A problem without a solution must not pass for one that is solved.
        for solution in solutions:
            better = better | ~self.problem.xp.isfinite(solution.value)
        if self.problem.known:
            # A plan that stays is the same array as before, which tells that nothing has moved.
            plans = plans if better else {}
        else:
            for name, plan in plans.items():
                plans[name] = jnp.where(better, plan, state.plans[name])
        return state.after(tree, solutions, plans, better)


def _keeps_norms(group: Group, plan: Array) -> bool:
    """Whether units keep their norms along a plan: it is orthogonal, or permutes them."""
    return is_permutation(plan) or is_orthogonal(group, plan)


@program()
def _is_better(grams: list[Gram], old_plans: list[Array], new_plans: list[Array]) -> Array:
    """Whether plans bring the source closer to the target, by more than rounding."""
    # |moved - target|² = |moved|² + |target|² - 2 overlap, and moving keeps the norms.
    gain = overlap(grams, new_plans) - overlap(grams, old_plans)
    source_sq_norm = 0
    target_sq_norm = 0
    for group_grams in grams:
        source_sq_norm = source_sq_norm + group_grams.source_sq_norms.sum()
        target_sq_norm = target_sq_norm + group_grams.target_sq_norms.sum()
    return gain > ROUNDINGS[gain.dtype] * (source_sq_norm * target_sq_norm) ** 0.5
