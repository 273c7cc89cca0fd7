"""Going over all group trees once: the loop that both methods share.

What differs between methods is a *sweep*: by what the units of a tree are compared, and which of
the new plans are accepted. `visit_group_trees` compares, solves and accepts one tree after the
other, in one of several sweeps.

Where all values are known, Python loops over the trees. What is traced is one program that holds
all trees and all sweeps, and a loop of JAX goes over them.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram, assignment_cost, ground_cost
from otfusion_jax.alignment.descent_state import DescentState
from otfusion_jax.alignment.group_tree import GroupTree
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.alignment.solve_tree import CostOf, Masses, solve_group_tree
from otfusion_jax.common.host import Array, array_module, program
from otfusion_jax.solvers.base import AbstractSolver, Solution
from otfusion_jax.solvers.padding import solve_assignment
from otfusion_jax.symmetry.groups import Motion


class AbstractSweep(abc.ABC):
    """How each group tree is solved in one sweep over all of them.

    Attributes:
        metric: The ground metric that units are compared by.
    """

    metric: costs.CostFn

    def is_settled(self, tree: GroupTree, state: DescentState) -> bool:
        """Whether solving a group tree is known to change nothing. Asked of known values alone.

        Args:
            tree: The group tree.
            state: The state before it would be solved.
        """
        return False

    def completed(self, state: DescentState) -> DescentState:
        """Completes what the sweep has left undone until all trees were visited.

        Args:
            state: The state after the sweep.

        Returns:
            The state that whatever comes next starts from.
        """
        return state

    @abc.abstractmethod
    def compare(self, tree: GroupTree, state: DescentState) -> list[Gram]:
        """Compares the units of a group tree.

        Args:
            tree: The group tree.
            state: The state before it is solved.

        Returns:
            The inner products of the units of each group of the tree.
        """

    @abc.abstractmethod
    def accept(
        self,
        tree: GroupTree,
        state: DescentState,
        grams: list[Gram],
        solutions: list[Solution],
    ) -> DescentState:
        """Takes those of the new plans into the state that are to be kept.

        Args:
            tree: The group tree.
            state: The state before it was solved.
            grams: The inner products that it was solved for.
            solutions: The solution for each of its groups.

        Returns:
            The state after.
        """


def visit_group_trees(
    problem: AlignmentProblem,
    state: DescentState,
    sweeps: Sequence[AbstractSweep],
    which: int | Array = 0,
) -> DescentState:
    """Solves one group tree after the other, in one of several sweeps.

    Args:
        problem: The alignment problem.
        state: The state to start from.
        sweeps: The sweeps that the program has to be able to make.
        which: The position in `sweeps` of the one that is made, int32 `[]`.

    Returns:
        The state after every tree has been solved once.
    """
    if problem.known:
        return _visit_known(problem, state, sweeps[int(which)])
    # The ground cost of the sweep that is made. Given a single branch, `switch` just calls it.
    branches = []
    metrics = set()
    for sweep in sweeps:
        branches.append(functools.partial(ground_cost, sweep.metric))
        metrics.add(type(sweep.metric))
    if len(metrics) == 1:
        branches = branches[:1]
    cost_of = functools.partial(jax.lax.switch, which, branches)
    visit = _Visit(problem, sweeps, which, cost_of, _sorted_by_shape(problem))
    return jax.lax.fori_loop(0, len(problem.group_trees), visit.step, state)


# --- known values


def _visit_known(
    problem: AlignmentProblem, state: DescentState, sweep: AbstractSweep
) -> DescentState:
    """Solves one group tree after the other, those that may have changed since the last sweep."""
    for tree in problem.group_trees:
        if sweep.is_settled(tree, state):
            continue
        grams = sweep.compare(tree, state)
        exact = problem.assignment_solver(tree)
        if exact is not None:
            cost = _cost(problem.dtype, sweep.metric, grams[0])
            solutions = [solve_assignment(exact, cost)]
            # Before the next group is compared: of large groups, every array that is held counts.
            del cost
        else:
            masses = _masses(problem, tree)
            solutions = _solved(
                problem.solver, problem.dtype, sweep.metric, grams, masses, tree.motions
            )
        state = sweep.accept(tree, state, grams, solutions)
    return state


@program(static_argnames=("dtype",))
def _cost(dtype: Any, metric: costs.CostFn, grams: Gram) -> Array:
    """Takes the ground cost of a group that is matched one to one."""
    return assignment_cost(metric, _converted(grams, dtype))


def _converted(tree: Any, dtype: Any) -> Any:
    """Converts arrays: grams of activations are in the dtype of these."""
    return jax.tree.map(lambda x: array_module(x).asarray(x, dtype), tree)


@program(static_argnames=("solver", "dtype", "motions"))
def _solved(
    solver: AbstractSolver,
    dtype: Any,
    metric: costs.CostFn,
    grams: list[Gram],
    masses: list[Masses],
    motions: tuple[Motion, ...],
) -> list[Solution]:
    """Solves a group tree, by a program that all trees of the same sizes share."""
    grams, masses = _converted((grams, masses), dtype)
    cost_of = functools.partial(ground_cost, metric)
    return solve_group_tree(solver, cost_of, grams, masses, motions)


def _masses(problem: AlignmentProblem, tree: GroupTree) -> list[Masses]:
    """Returns the masses of the units of each group of a tree."""
    source_masses, target_masses = problem.marginals
    masses = []
    for group in tree.groups:
        masses.append((source_masses.get(group.name), target_masses.get(group.name)))
    return masses


# --- trees that share a solver


@dataclasses.dataclass(frozen=True)
class _TreesOfOneShape:
    """Group trees that are compared by arrays of one shape, so that one solver serves them all.

    Attributes:
        trees: The trees, in dataflow order.
        contains: For each tree of the problem whether it is one of these.
        earlier: For each tree of the problem how many of these come before it.
    """

    trees: list[GroupTree]
    contains: list[bool]
    earlier: list[int]


def _sorted_by_shape(problem: AlignmentProblem) -> list[_TreesOfOneShape]:
    """Sorts group trees by what the shapes of their inner products and masses depend on."""
    source_masses, target_masses = problem.marginals
    shapes = []
    for tree in problem.group_trees:
        shape = []
        for group in tree.groups:
            target_group = problem.target_groups[group.name]
            sizes = group.batch, group.size, target_group.batch, target_group.size
            has_masses = group.name in source_masses, group.name in target_masses
            # Inside of another group, units of all its indices are compared with each other.
            shape.append((sizes, group.outer is None, has_masses))
        shapes.append((tree.motions, *shape))
    kinds = []
    for shape in dict.fromkeys(shapes):
        kind = _TreesOfOneShape([], [], [])
        for tree, other_shape in zip(problem.group_trees, shapes, strict=True):
            kind.earlier.append(len(kind.trees))
            kind.contains.append(other_shape == shape)
            if other_shape == shape:
                kind.trees.append(tree)
        kinds.append(kind)
    return kinds


# --- the loop


# Compared by identity: JAX keeps the functions of a loop in caches, and arrays have no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class _Visit:
    """One sweep over all group trees, as the body of a loop.

    Attributes:
        problem: The alignment problem.
        sweeps: The sweeps that the program has to be able to make.
        which: The position of the one that is made.
        cost_of: The ground cost of the sweep that is made.
        kinds: The group trees by shape.
    """

    problem: AlignmentProblem
    sweeps: Sequence[AbstractSweep]
    which: int | Array
    cost_of: CostOf
    kinds: list[_TreesOfOneShape]

    def step(self, number: int | Array, state: DescentState) -> DescentState:
        """Solves the group tree of some number.

        The solver is by far the largest piece of the program, and a ResNet18 would hold a dozen
        copies for XLA to compile if each tree had its own. So there is one for each shape, and
        which of the trees of that shape it is given is decided when the program runs.
        """
        for kind in self.kinds:
            # For trees of another shape this may be past the end, though nothing is done for them.
            earlier = jnp.array(kind.earlier)[number]
            index = jnp.minimum(earlier, len(kind.trees) - 1)
            solve = functools.partial(self.solve_one_of, kind.trees, index)
            if len(self.kinds) == 1:
                state = solve(state)
            else:
                contained = jnp.array(kind.contains)[number]
                state = jax.lax.cond(contained, solve, _unchanged, state)
        return state

    def solve_one_of(
        self, trees: Sequence[GroupTree], index: Array, state: DescentState
    ) -> DescentState:
        """Solves one of several group trees of one shape, by a single copy of the solver."""
        # What belongs to a single tree, and is small, are branches before and after the solver.
        compares = []
        accepts = []
        for tree in trees:
            compares.append(functools.partial(self.compare, tree))
            branches = []
            for sweep in self.sweeps:
                branches.append(functools.partial(sweep.accept, tree))
            accepts.append(functools.partial(jax.lax.switch, self.which, branches))
        grams, masses = jax.lax.switch(index, compares, state)
        motions = trees[0].motions
        solutions = solve_group_tree(self.problem.solver, self.cost_of, grams, masses, motions)
        return jax.lax.switch(index, accepts, state, grams, solutions)

    def compare(self, tree: GroupTree, state: DescentState) -> tuple[list[Gram], list[Masses]]:
        """Returns the inner products and the masses of a tree, in one dtype for all trees."""
        branches = []
        for sweep in self.sweeps:
            branches.append(functools.partial(sweep.compare, tree))
        grams = jax.lax.switch(self.which, branches, state)
        masses = _masses(self.problem, tree)
        # All branches of a `switch` must return the same dtypes.
        return _converted((grams, masses), self.problem.dtype)


def _unchanged(state: DescentState) -> DescentState:
    return state
