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
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ott.geometry import costs

from otfusion_jax.checks import require_flag, require_number
from otfusion_jax.costs import DEGREES, Gram, gram, ground_cost, squared_norm, unit_gram
from otfusion_jax.matching import Family, Masses, families_of, overlap, solve_family
from otfusion_jax.solvers import AbstractSolver, Exact, Solution
from otfusion_jax.symmetry import Group, Member, Plans, Symmetry
from otfusion_jax.transport import is_permutation, move, placed
from otfusion_jax.units import units_in


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
class Problem:
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
    def families(self) -> tuple[Family, ...]:
        """What is solved at once, in dataflow order."""
        return families_of(self.symmetry)

    def masses(self, family: Family) -> list[Masses]:
        """Returns the masses of the units of a group and of each nested one."""
        names = [group.name for group in (family.root, *family.nested)]
        source, target = self.marginals
        return [(source.get(name), target.get(name)) for name in names]

    def compare(self, family: Family, plans: Plans, chosen: Collection[Member]) -> list[Gram]:
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

    def _gram(self, family: Family, group: Group, members: Sequence[Member], plans: Plans) -> Gram:
        if not members:
            a, b = (
                jnp.zeros((*g.batch, g.size, 0), self.dtype) for g in (group, self.onto[group.name])
            )
            return unit_gram(a, b, group, self.solver.quadratic)
        return functools.reduce(
            Gram.__add__, (self._compared(family, group, member, plans) for member in members)
        )

    def _compared(self, family: Family, group: Group, member: Member, plans: Plans) -> Gram:
        """Compares the units of a group by one member."""
        leaf = member.leaf
        use = next(use for use in self.symmetry.by_leaf[leaf].uses if use.member is member)
        front = [*use.levels, use.dim]
        # What is compared stays; the same units elsewhere in the leaf move. Where the root stays,
        # what else is nested in it moves within each of its indices.
        stay = family.beside(member)
        if any(m in family.root.members for m in stay):
            plans = plans | self.carried(family, plans, self.symmetry.identity())
        source = units_in(placed(self.symmetry, plans, leaf, self.source[leaf], stay), front)
        target = units_in(self.onto.by_leaf[leaf].layout.split(self.target[leaf]), front)
        for beside in family.beside(member):
            if beside.role == "consumes":
                # Of n units that become m, n/m take the place of one; what consumes them adds up.
                name = group.name if beside is member else family.root.name
                source = source * (self.symmetry[name].size / self.onto[name].size)
        return unit_gram(source, target, group, self.solver.quadratic)

    def carried(self, family: Family, plans: Plans, to: Plans) -> Plans:
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
            if leaf.moves and len(leaf.shape) > 1 and self.symmetry.by_leaf[i].uses:
                moved = self._moved(plans, i)
                g = gram(moved.reshape(1, -1), b.reshape(1, -1))
                norms = jnp.sqrt(g.aa[0]) * jnp.sqrt(g.bb[0])
                cosine = g.ab[0, 0] / jnp.where(norms > 0, norms, 1)
                total = total + jnp.log(jnp.maximum(cosine, 1e-6)).astype(self.dtype)
        return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Plans so far, the gap of each group's last solve, and what happened since the last reset."""

    plans: Plans
    gaps: dict[str, Array]
    converged: Array
    improved: Array

    def take(self, found: dict[str, tuple[Array, Solution]], improved: Array) -> "_State":
        """Returns the state after one more family has been solved, by its groups' names."""
        solutions = [solution for _, solution in found.values()]
        return _State(
            self.plans | {name: plan for name, (plan, _) in found.items()},
            self.gaps | {name: solution.gap for name, (_, solution) in found.items()},
            functools.reduce(jnp.logical_and, (s.converged for s in solutions), self.converged),
            self.improved | improved,
        )


def _same(state: _State) -> _State:
    return state


class _Pass(NamedTuple):
    """How all families are solved once.

    Attributes:
        compare: compares the units of a family and of what is nested in it.
        metric: the ground metric.
        accept: takes what is better of the solutions into the state.
    """

    compare: Callable[[Family, _State], list[Gram]]
    metric: costs.CostFn
    accept: Callable[[Family, _State, list[Gram], list[Solution]], _State]


def _visit(
    problem: Problem, state: _State, passes: Sequence[_Pass], which: int | Array = 0
) -> _State:
    """Solves one family after the other, in one of several ways.

    Families of one shape share one solver in a loop, and so do all ways: it is by far the largest
    piece of the program, and a ResNet18 would otherwise hold a dozen copies for XLA to compile.
    """
    families = problem.families

    def chosen(ways: Sequence[Callable[..., Any]], *args: Any) -> Any:
        return ways[0](*args) if len(ways) == 1 else jax.lax.switch(which, ways, *args)

    def compared(family: Family, state: _State) -> tuple[list[Gram], list[Masses]]:
        grams = chosen([functools.partial(each.compare, family) for each in passes], state)
        return jax.tree.map(lambda x: x.astype(problem.dtype), (grams, problem.masses(family)))

    def accepted(family: Family, *args: Any) -> _State:
        return chosen([functools.partial(each.accept, family) for each in passes], *args)

    metrics = {type(each.metric) for each in passes}
    ways = [functools.partial(ground_cost, each.metric) for each in passes]
    cost = ways[0] if len(metrics) == 1 else functools.partial(chosen, ways)

    forms = [jax.eval_shape(functools.partial(compared, f), state) for f in families]
    shapes = [
        (jax.tree_util.tree_structure(form), *(x.shape for x in jax.tree.leaves(form)))
        for form in forms
    ]
    kinds = list(dict.fromkeys(shapes))
    kind_of = jnp.array([kinds.index(shape) for shape in shapes])

    def step(i: int | Array, state: _State) -> _State:
        for number, kind in enumerate(kinds):
            mine = [f for f, shape in zip(families, shapes, strict=True) if shape == kind]
            rank = jnp.array([sum(s == kind for s in shapes[:j]) for j in range(len(shapes))])
            index = jnp.minimum(rank[i], len(mine) - 1)

            def run(state: _State, mine: list[Family] = mine, index: Array = index) -> _State:
                compares = [functools.partial(compared, f) for f in mine]
                grams, masses = jax.lax.switch(index, compares, state)
                solutions = solve_family(problem.solver, cost, grams, masses)
                accepts = [functools.partial(accepted, f) for f in mine]
                return jax.lax.switch(index, accepts, state, grams, solutions)

            only = len(kinds) == 1
            state = run(state) if only else jax.lax.cond(kind_of[i] == number, run, _same, state)
        return state

    return jax.lax.fori_loop(0, len(families), step, state)


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

    def cost_degree(self, metric: costs.CostFn, by_features: bool) -> int:
        """Says in which power of the weights' unit the gaps are.

        Args:
            metric: the ground metric.
            by_features: whether features are given.

        Returns:
            The power: that of squared distances between weights, unless the method says otherwise.
        """
        return 2


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

    def run(self, problem: Problem, features: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`."""
        state = _visit(problem, _start(problem), [self.only_pass(problem, features)])
        still = _start(problem).plans
        history = jnp.stack([problem.distance(still), problem.distance(state.plans)])
        return Alignment(state.plans, history[-1], history, state.converged, state.gaps)

    def cost_degree(self, metric: costs.CostFn, by_features: bool) -> int:
        """See `AbstractMethod.cost_degree`."""
        if by_features or self.unit_norm:
            return 0
        return DEGREES.get(type(metric), 2)

    def only_pass(self, problem: Problem, features: dict[str, Gram] | None) -> _Pass:
        """Returns how each group is solved, once the ones before are in place."""

        def compare(family: Family, state: _State) -> list[Gram]:
            groups = family.root, *family.nested
            if features is not None:
                found = [features[group.name] for group in groups]
            else:
                chosen = [
                    m
                    for g in groups
                    for m in (g.members if self.members == "all" else _placed(problem, family, g))
                ]
                found = problem.compare(family, state.plans, chosen)
            return [g.normalised() for g in found] if self.unit_norm else found

        def accept(
            family: Family, state: _State, _: list[Gram], solutions: list[Solution]
        ) -> _State:
            names = [group.name for group in (family.root, *family.nested)]
            pairs = ((solution.plan, solution) for solution in solutions)
            carried = problem.carried(family, state.plans, {names[0]: solutions[0].plan})
            state = dataclasses.replace(state, plans=state.plans | carried)
            return state.take(dict(zip(names, pairs, strict=True)), jnp.array(True))

        return _Pass(compare, problem.metric, accept)


def _start(problem: Problem) -> _State:
    """Everything in place, in the form of plan that the solver returns."""
    plans, gaps = problem.symmetry.identity(), {}
    around = {group.outer for group in problem.symmetry.groups}
    for group in problem.symmetry.groups:
        n, m = group.size, problem.onto[group.name].size
        solver = Exact() if group.name in around else problem.solver
        form = jax.eval_shape(solver.solve, *_problem(problem, group.name, n, m))
        gaps[group.name] = jnp.zeros(form.gap.shape, form.gap.dtype)
        if not is_permutation(form.plan):
            still = _monotone(n, m).astype(form.plan.dtype)
            plans[group.name] = jnp.broadcast_to(still, (*group.batch, n, m))
        heads = problem.onto[group.name].batch[-1:]
        if group.outer and heads != group.batch[-1:]:  # a plan for every pair of heads
            rank = len(group.batch)
            still = plans[group.name]
            shape = (*group.batch, *heads, *still.shape[rank:])
            plans[group.name] = jnp.broadcast_to(jnp.expand_dims(still, rank), shape)
    return _State(plans, gaps, jnp.array(True), jnp.array(False))


def _problem(problem: Problem, name: str, n: int, m: int) -> list[Any]:
    """Returns the form of what the solver of a group is called with."""
    sizes: list[tuple[int, ...]] = [(n, m), (n,), (m,), (n, n), (m, m)]
    cost, a, b, *within = (jax.ShapeDtypeStruct(size, problem.dtype) for size in sizes)
    source, target = problem.marginals
    masses = [a if name in source else None, b if name in target else None]
    return [cost, *masses, tuple(within) if problem.solver.quadratic else None]


def _monotone(n: int, m: int) -> Array:
    """The coupling of uniform masses that keeps the order: the identity where n is m."""
    rows, columns = np.arange(n + 1) / n, np.arange(m + 1) / m
    ends = np.minimum(rows[1:, None], columns[None, 1:])
    starts = np.maximum(rows[:-1, None], columns[None, :-1])
    return jnp.asarray(np.maximum(ends - starts, 0))


def _placed(problem: Problem, family: Family, group: Group) -> Sequence[Member]:
    """Returns the members that produce a group out of earlier groups or of what is pinned."""
    later = problem.families[problem.families.index(family) + 1 :]
    groups = [g for f in later for g in (f.root, *f.nested) if g is not family.root]
    waiting = {m.leaf for g in groups for m in g.members}
    waiting |= _twice(group)
    candidates = group.having("produces") or group.members
    return [m for m in candidates if m.leaf not in waiting] or candidates


def _twice(group: Group) -> set[int]:
    """Returns the leaves that have a group on two axes, which makes a quadratic problem of it."""
    axes = {(m.leaf, m.axis) for m in group.members}
    leaves = [leaf for leaf, _ in axes]
    return {leaf for leaf in leaves if leaves.count(leaf) > 1}


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

    def run(self, problem: Problem, features: dict[str, Gram] | None) -> Alignment:
        """See `AbstractMethod.run`. Features, if given, only serve the start `"forward"`."""
        still = _start(problem)
        square = [
            still.plans[group.name]
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
            passes.insert(0, ForwardPass().only_pass(problem, features))
        # A pass of another kind before the first sweep, or none.
        first = jnp.array([-1 if name == "forward" else 0 for name in self.starts])
        if len(first) == 1:
            return self._descend(problem, still, passes, first[0])
        ends = jax.lax.map(functools.partial(self._descend, problem, still, passes), first)
        best = jnp.argmax(jax.lax.map(problem.similarity, ends.plans))
        return jax.tree.map(lambda x: x[best], ends)

    def _descend(
        self, problem: Problem, state: _State, passes: Sequence[_Pass], first: Array
    ) -> Alignment:
        """Goes over all groups until nothing improves; sweep -1 is the first of the passes."""
        start = problem.distance(state.plans)
        history = jnp.full(self.max_sweeps + 1, start)

        def unfinished(loop: tuple[_State, Array, Array]) -> Array:
            state, _, count = loop
            return state.improved & (count < self.max_sweeps)

        def sweep(loop: tuple[_State, Array, Array]) -> tuple[_State, Array, Array]:
            state, history, count = loop
            state = dataclasses.replace(state, converged=jnp.array(True), improved=jnp.array(False))
            state = _visit(problem, state, passes, jnp.where(count < 0, 0, len(passes) - 1))
            history = history.at[count + 1].set(problem.distance(state.plans))
            return state, history, count + 1

        state = dataclasses.replace(state, improved=jnp.array(True))
        loop = state, history, first
        state, history, count = jax.lax.while_loop(unfinished, sweep, loop)
        converged = state.converged & ~state.improved
        # No NaN to fill it up: `jax_debug_nans` would take it for a fault.
        history = jnp.where(jnp.arange(len(history)) > count, history[count], history)
        return Alignment(state.plans, history[-1], history, converged, state.gaps)


def _sweep_of(problem: Problem) -> _Pass:
    """Returns how each group is solved by all its members, where all others are."""

    def compare(family: Family, state: _State) -> list[Gram]:
        chosen = [m for group in (family.root, *family.nested) for m in group.members]
        return problem.compare(family, state.plans, chosen)

    return _Pass(compare, costs.SqEuclidean(), functools.partial(_accept, problem))


def _accept(
    problem: Problem,
    family: Family,
    state: _State,
    grams: list[Gram],
    solutions: list[Solution],
) -> _State:
    """Takes new plans only if they are better than the old ones by more than rounding."""
    groups = family.root, *family.nested
    old = [state.plans[group.name] for group in groups]
    new = [solution.plan for solution in solutions]
    better = jnp.array(True)
    permutations = all(map(is_permutation, new))
    if permutations:
        gain = overlap(grams, new) - overlap(grams, old)
        scale = sum(jnp.sum(g.aa) for g in grams) * sum(jnp.sum(g.bb) for g in grams)
        better = gain > 1e-6 * jnp.sqrt(scale)
    carried = problem.carried(family, state.plans, {family.root.name: new[0]})
    if not permutations or any(map(_twice, groups)):  # what was minimised is not the objective
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
