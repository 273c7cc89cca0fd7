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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram, Masses, ground_cost
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.alignment.solve_tree import solve_group_tree
from otfusion_jax.solvers.base import Solution, TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import is_permutation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DescentState:
    """Plans so far, the gap of each group's last solve, and what happened since the last reset."""

    plans: Plans
    gaps: dict[str, Array]
    converged: Array
    improved: Array

    def take(self, found: dict[str, tuple[Array, Solution]], improved: Array) -> "DescentState":
        """Returns the state after one more family has been solved, by its groups' names."""
        solutions = [solution for _, solution in found.values()]
        return DescentState(
            self.plans | {name: plan for name, (plan, _) in found.items()},
            self.gaps | {name: solution.gap for name, (_, solution) in found.items()},
            functools.reduce(jnp.logical_and, (s.converged for s in solutions), self.converged),
            self.improved | improved,
        )


def _same(state: DescentState) -> DescentState:
    return state


class Pass(NamedTuple):
    """How all families are solved once.

    Attributes:
        compare: compares the units of a family and of what is nested in it.
        metric: the ground metric.
        accept: takes what is better of the solutions into the state.
    """

    compare: Callable[[GroupTree, DescentState], list[Gram]]
    metric: costs.CostFn
    accept: Callable[[GroupTree, DescentState, list[Gram], list[Solution]], DescentState]


def visit_group_trees(
    problem: AlignmentProblem, state: DescentState, passes: Sequence[Pass], which: int | Array = 0
) -> DescentState:
    """Solves one family after the other, in one of several ways.

    Families of one shape share one solver in a loop, and so do all ways: it is by far the largest
    piece of the program, and a ResNet18 would otherwise hold a dozen copies for XLA to compile.
    """
    group_trees = problem.group_trees

    def chosen(ways: Sequence[Callable[..., Any]], *args: Any) -> Any:
        return ways[0](*args) if len(ways) == 1 else jax.lax.switch(which, ways, *args)

    def compared(family: GroupTree, state: DescentState) -> tuple[list[Gram], list[Masses]]:
        grams = chosen([functools.partial(each.compare, family) for each in passes], state)
        return jax.tree.map(lambda x: x.astype(problem.dtype), (grams, problem.masses(family)))

    def accepted(family: GroupTree, *args: Any) -> DescentState:
        return chosen([functools.partial(each.accept, family) for each in passes], *args)

    metrics = {type(each.metric) for each in passes}
    ways = [functools.partial(ground_cost, each.metric) for each in passes]
    cost = ways[0] if len(metrics) == 1 else functools.partial(chosen, ways)

    forms = [jax.eval_shape(functools.partial(compared, f), state) for f in group_trees]
    shapes = [
        (jax.tree_util.tree_structure(form), *(x.shape for x in jax.tree.leaves(form)))
        for form in forms
    ]
    kinds = list(dict.fromkeys(shapes))
    kind_of = jnp.array([kinds.index(shape) for shape in shapes])

    def step(i: int | Array, state: DescentState) -> DescentState:
        for number, kind in enumerate(kinds):
            mine = [f for f, shape in zip(group_trees, shapes, strict=True) if shape == kind]
            rank = jnp.array([sum(s == kind for s in shapes[:j]) for j in range(len(shapes))])
            index = jnp.minimum(rank[i], len(mine) - 1)

            def run(
                state: DescentState, mine: list[GroupTree] = mine, index: Array = index
            ) -> DescentState:
                compares = [functools.partial(compared, f) for f in mine]
                grams, masses = jax.lax.switch(index, compares, state)
                solutions = solve_group_tree(problem.solver, cost, grams, masses)
                accepts = [functools.partial(accepted, f) for f in mine]
                return jax.lax.switch(index, accepts, state, grams, solutions)

            only = len(kinds) == 1
            state = run(state) if only else jax.lax.cond(kind_of[i] == number, run, _same, state)
        return state

    return jax.lax.fori_loop(0, len(group_trees), step, state)


def initial_state(problem: AlignmentProblem) -> DescentState:
    """Everything in place, in the form of plan that the solver returns."""
    plans, gaps = problem.symmetry.identity(), {}
    around = {group.outer for group in problem.symmetry.groups}
    for group in problem.symmetry.groups:
        n, m = group.size, problem.onto[group.name].size
        solver = Exact() if group.name in around else problem.solver
        form = jax.eval_shape(solver.solve, _form_of(problem, group.name, n, m))
        gaps[group.name] = jnp.zeros(form.gap.shape, form.gap.dtype)
        if not is_permutation(form.plan):
            initial_plans = _monotone(n, m).astype(form.plan.dtype)
            plans[group.name] = jnp.broadcast_to(initial_plans, (*group.batch, n, m))
        heads = problem.onto[group.name].batch[-1:]
        if group.outer and heads != group.batch[-1:]:  # a plan for every pair of heads
            rank = len(group.batch)
            initial_plans = plans[group.name]
            shape = (*group.batch, *heads, *initial_plans.shape[rank:])
            plans[group.name] = jnp.broadcast_to(jnp.expand_dims(initial_plans, rank), shape)
    return DescentState(plans, gaps, jnp.array(True), jnp.array(False))


def _form_of(problem: AlignmentProblem, name: str, n: int, m: int) -> TransportProblem:
    """Returns shapes and dtypes of the problem that the solver of a group is called with."""

    def form(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, problem.dtype)

    source, target = problem.marginals
    return TransportProblem(
        form(n, m),
        form(n) if name in source else None,
        form(m) if name in target else None,
        (form(n, n), form(m, m)) if problem.solver.quadratic else None,
    )


def _monotone(n: int, m: int) -> Array:
    """The coupling of uniform masses that keeps the order: the identity where n is m."""
    rows, columns = np.arange(n + 1) / n, np.arange(m + 1) / m
    ends = np.minimum(rows[1:, None], columns[None, 1:])
    starts = np.maximum(rows[:-1, None], columns[None, :-1])
    return jnp.asarray(np.maximum(ends - starts, 0))
