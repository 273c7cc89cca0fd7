"""How plans are found: one forward pass, or coordinate descent over all groups.

`ForwardPass` is Algorithm 1 of Singh and Jaggi: groups in dataflow order, each matched by the
weights (or activations) that produce it, with what came before already in place.
`CoordinateDescent` is weight matching: it minimises the distance of the moved source to the target
over all groups, one group at a time, which is a linear assignment, until nothing improves.

Everything here is traced: `align` checks the input and jits it.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ott.geometry import costs

from otfusion_jax.costs import Gram, gram, ground_cost, weight_gram
from otfusion_jax.solvers import AbstractSolver, Solution
from otfusion_jax.symmetry import Group, Member, Plans, Symmetry
from otfusion_jax.transport import is_permutation, move


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alignment:
    """Plans that move a source model onto a target, with what is known of their quality.

    Attributes:
        plans: group name to plan, as `transport` takes them.
        objective: squared distance of the moved source to the target, summed over all parameters.
        history: for coordinate descent the objective at the start and after every sweep, float
            `[sweeps + 1]`, NaN after the last; otherwise before and after.
        converged: whether every solve converged and nothing was left to improve.
        gaps: group name to the duality gap of its last solve, in the units of its ground cost.
    """

    plans: Plans
    objective: Float[Array, ""]
    history: Float[Array, " sweeps"]
    converged: Bool[Array, ""]
    gaps: dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a method works on: flat parameters, and how a cost becomes a plan."""

    symmetry: Symmetry
    source: list[Array]
    target: list[Array]
    metric: costs.CostFn
    solver: AbstractSolver

    @property
    def dtype(self) -> Any:
        """Of the inner products: float64 where there is any in the models, float32 otherwise."""
        wide = any(jnp.asarray(x).dtype in (jnp.float64, jnp.complex128) for x in self.source)
        return jnp.float64 if wide else jnp.float32

    def gram(self, group: Group, members: Sequence[Member], plans: Plans) -> Gram:
        """Compares the units of a group by members whose other axes are moved along `plans`."""
        # The axis in question stays; the same units on another axis of the leaf move.
        source = [move(self.symmetry, plans, m.leaf, self.source[m.leaf], m) for m in members]
        target = [self.target[m.leaf] for m in members]
        return weight_gram(source, target, members, group.size)

    def distance(self, plans: Plans) -> Float[Array, ""]:
        """Squared distance of the moved source to the target, over all parameters that move."""
        terms = [
            _square(move(self.symmetry, plans, i, a) - b).astype(self.dtype)
            for i, (a, b) in enumerate(zip(self.source, self.target, strict=True))
            if self.symmetry.leaves[i].moves
        ]
        return jnp.asarray(sum(terms, start=jnp.zeros((), self.dtype)))

    def similarity(self, plans: Plans) -> Float[Array, ""]:
        """Sum over weight matrices of the log cosine between the moved source and the target.

        Of what two layers compute, their average keeps a share that goes with their correlation,
        and the shares multiply with depth. The distance, a sum over layers, does not see that: it
        gladly trades a late layer for an early one.
        """
        total = jnp.zeros((), self.dtype)
        for i, (a, b) in enumerate(zip(self.source, self.target, strict=True)):
            leaf = self.symmetry.leaves[i]
            if leaf.moves and len(leaf.shape) > 1 and self.symmetry.by_leaf[i]:
                moved = move(self.symmetry, plans, i, a)
                g = gram(moved.reshape(1, -1), b.reshape(1, -1))
                cosine = g.ab[0, 0] / jnp.sqrt(jnp.maximum(g.aa[0] * g.bb[0], 1e-30))
                total = total + jnp.log(jnp.maximum(cosine, 1e-6)).astype(self.dtype)
        return total


def _square(x: Array) -> Array:
    x = jnp.abs(x)
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jnp.sum(wide * wide)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Plans so far, the gap of each group's last solve, and what happened since the last reset."""

    plans: Plans
    gaps: dict[str, Array]
    converged: Array
    improved: Array

    def take(self, group: Group, plan: Array, solution: Solution, improved: Array) -> "_State":
        """Returns the state after one more group has been solved."""
        return _State(
            self.plans | {group.name: plan},
            self.gaps | {group.name: solution.gap},
            self.converged & solution.converged,
            self.improved | improved,
        )


def _visit(
    problem: Problem,
    state: _State,
    compare: Callable[[Group, _State], Gram],
    solve: Callable[[Gram], Solution],
    accept: Callable[[Group, _State, Gram, Solution], _State],
) -> _State:
    """Solves one group after the other.

    Neighbours of one size share one solver in a loop: it is by far the largest piece of the
    program, and a ResNet18 would otherwise hold a dozen copies for XLA to compile.
    """
    for _, run in itertools.groupby(problem.symmetry.groups, key=lambda g: g.size):
        groups = list(run)

        def step(i: int | Array, state: _State, groups: list[Group] = groups) -> _State:
            found = jax.lax.switch(i, [functools.partial(compare, g) for g in groups], state)
            found = jax.tree.map(lambda x: x.astype(problem.dtype), found)
            accepts = [functools.partial(accept, g) for g in groups]
            return jax.lax.switch(i, accepts, state, found, solve(found))

        state = jax.lax.fori_loop(0, len(groups), step, state)
    return state


class AbstractMethod(abc.ABC):
    """How the plans of all groups are found. Subclasses are frozen, hashable dataclasses."""

    @abc.abstractmethod
    def run(self, problem: Problem, features: dict[str, Gram] | None) -> Alignment:
        """Finds the plans. Traced: called under `jax.jit`.

        Args:
            problem: models, metric and solver.
            features: inner products of activations, or None to use the weights.

        Returns:
            The alignment.
        """


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
        if self.members not in ("producing", "all"):
            raise ValueError(f"members is {self.members!r}; it must be 'producing' or 'all'")

    def run(self, problem: Problem, features: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`."""
        state = self._pass(problem, features)
        history = jnp.stack([problem.distance({}), problem.distance(state.plans)])
        return Alignment(state.plans, history[-1], history, state.converged, state.gaps)

    def _pass(self, problem: Problem, features: dict[str, Gram] | None) -> _State:
        """Returns the state after the pass."""

        def compare(group: Group, state: _State) -> Gram:
            if features is not None:
                found = features[group.name]
            else:
                every = self.members == "all"
                members = group.members if every else _placed(problem.symmetry, group)
                found = problem.gram(group, members, state.plans)
            return _normalised(found) if self.unit_norm else found

        def solve(found: Gram) -> Solution:
            return problem.solver.solve(ground_cost(problem.metric, found))

        def accept(group: Group, state: _State, _: Gram, solution: Solution) -> _State:
            return state.take(group, solution.plan, solution, jnp.array(True))

        return _visit(problem, _start(problem), compare, solve, accept)


def _start(problem: Problem) -> _State:
    """Everything in place, in the form of plan that the solver returns."""
    plans, gaps = problem.symmetry.identity(), {}
    for group in problem.symmetry.groups:
        n = group.size
        cost = jax.ShapeDtypeStruct((n, n), problem.dtype)
        form = jax.eval_shape(problem.solver.solve, cost)
        gaps[group.name] = jnp.zeros(form.gap.shape, form.gap.dtype)
        if not is_permutation(form.plan):
            plans[group.name] = jnp.eye(n, dtype=form.plan.dtype) / n
    return _State(plans, gaps, jnp.array(True), jnp.array(False))


def _placed(symmetry: Symmetry, group: Group) -> Sequence[Member]:
    """Returns the members that produce a group out of earlier groups or of what is pinned."""
    later = symmetry.groups[symmetry.groups.index(group) + 1 :]
    waiting = {m.leaf for g in later for m in g.members}
    leaves = [m.leaf for m in group.members]
    waiting |= {leaf for leaf in leaves if leaves.count(leaf) > 1}
    candidates = group.having("produces") or group.members
    return [m for m in candidates if m.leaf not in waiting] or candidates


def _normalised(g: Gram) -> Gram:
    a = jax.lax.rsqrt(jnp.where(g.aa > 0, g.aa, 1))
    b = jax.lax.rsqrt(jnp.where(g.bb > 0, g.bb, 1))
    return Gram(g.aa * a * a, g.bb * b * b, g.ab * a[:, None] * b[None, :])


@dataclasses.dataclass(frozen=True)
class CoordinateDescent(AbstractMethod):
    """Weight matching: coordinate descent on the distance of the moved source to the target.

    Each group in turn is matched by all its members, given the plans of the others, until no group
    improves. A parameter that has one group on two axes makes the problem quadratic; it is
    linearised at the current plan, and only what improves the true objective is accepted.

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
        strange = [s for s in self.starts if s not in ("identity", "forward")]
        if strange or not self.starts:
            raise ValueError(f"starts is {self.starts}; choose from 'identity', 'forward'")

    def run(self, problem: Problem, features: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`. Features, if given, only serve the start `"forward"`."""
        still = _start(problem)
        if not all(is_permutation(plan) for plan in still.plans.values()):
            raise ValueError(
                f"coordinate descent composes permutations, and {type(problem.solver).__name__} "
                "returns soft plans; use Exact(), or ForwardPass() with this solver"
            )
        starts = [
            ForwardPass()._pass(problem, features) if name == "forward" else still
            for name in self.starts
        ]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        ends = jax.lax.map(functools.partial(self._descend, problem), stacked)
        best = jnp.argmax(jax.lax.map(problem.similarity, ends.plans))
        return jax.tree.map(lambda x: x[best], ends)

    def _descend(self, problem: Problem, state: _State) -> Alignment:
        """Goes over all groups until nothing improves."""
        start = problem.distance(state.plans)
        history = jnp.full(self.max_sweeps + 1, jnp.nan, start.dtype).at[0].set(start)

        def compare(group: Group, state: _State) -> Gram:
            return problem.gram(group, group.members, state.plans)

        def solve(found: Gram) -> Solution:
            return problem.solver.solve(ground_cost(costs.SqEuclidean(), found))

        def unfinished(loop: tuple[_State, Array, Array]) -> Array:
            state, _, count = loop
            return state.improved & (count < self.max_sweeps)

        def sweep(loop: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
            state, history, count = loop
            state = dataclasses.replace(state, converged=jnp.array(True), improved=jnp.array(False))
            accept = functools.partial(_accept, problem)
            state = _visit(problem, state, compare, solve, accept)
            history = history.at[count + 1].set(problem.distance(state.plans))
            return state, history, count + 1

        state = dataclasses.replace(state, improved=jnp.array(True))
        loop = state, history, jnp.zeros((), jnp.int32)
        state, history, count = jax.lax.while_loop(unfinished, sweep, loop)
        converged = state.converged & ~state.improved
        return Alignment(state.plans, history[count], history, converged, state.gaps)


def _accept(problem: Problem, group: Group, state: _State, g: Gram, solution: Solution) -> _State:
    """Takes a new plan only if it is better than the old one by more than rounding."""
    old, new = state.plans[group.name], solution.plan
    positions = jnp.arange(group.size)
    gain = jnp.sum(g.ab[new, positions]) - jnp.sum(g.ab[old, positions])
    better = gain > 1e-6 * jnp.sqrt(jnp.sum(g.aa) * jnp.sum(g.bb))
    leaves = [m.leaf for m in group.members]
    if len(set(leaves)) < len(leaves):  # the gain is that of the linearised objective
        moved = problem.distance(state.plans | {group.name: new})
        better = better & (moved < problem.distance(state.plans))
    # A problem without a solution must not pass for one that is solved.
    better = better | ~jnp.isfinite(solution.value)
    return state.take(group, jnp.where(better, new, old), solution, better)
