"""Matching a group jointly with what is nested in it.

Which head is which can't be told before the units inside of it are matched: the cost between two
heads is that of their best match inside. So all pairs of heads are solved, then the heads, and each
head keeps the match that it was chosen for.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from otfusion_jax.costs import Gram, costs_within
from otfusion_jax.solvers import AbstractSolver, Exact, Solution
from otfusion_jax.symmetry import Group, Member, Symmetry
from otfusion_jax.transport import is_permutation


@dataclasses.dataclass(frozen=True)
class Family:
    """A group and the groups nested in it.

    Attributes:
        root: the group around.
        nested: the groups in each index of it.
    """

    root: Group
    nested: tuple[Group, ...] = ()

    def split(self, chosen: Collection[Member]) -> list[tuple[Group, list[Member]]]:
        """Returns the chosen members of each group; of the root those with nothing nested in it."""
        inside = [m for group in self.nested for m in group.members]
        kept = {id(m) for n in inside for m in self.beside(n) if m is not n}
        own = [m for m in self.root.members if m in chosen and id(m) not in kept]
        rest = [(g, [m for m in g.members if m in chosen]) for g in self.nested]
        return [(self.root, own), *rest]

    def beside(self, member: Member) -> list[Member]:
        """Returns a member; with a nested one, the root's that say in which index it is."""
        if not self.nested or member in self.root.members:
            return [member]
        axis, _, place = member.where.within[-1]
        roots = (m for m in self.root.members if m.leaf == member.leaf)
        return [member, *(m for m in roots if (m.axis, m.where.place) == (axis, place))]


def families_of(symmetry: Symmetry) -> tuple[Family, ...]:
    """Sorts groups by what they are nested in.

    Args:
        symmetry: whose groups.

    Returns:
        Families in dataflow order: one for each group that is in no other, or several if those
        nested in it are coupled. Then the root is matched anew with each of them, and the others
        are carried along, each with the index of the root that it is in.
    """
    inside: dict[str | None, list[Group]] = {}
    for group in symmetry.groups:
        inside.setdefault(group.outer, []).append(group)
    coupled = _coupled(symmetry)
    families: list[Family] = []
    for root in inside.get(None, ()):
        sets: list[list[Group]] = []
        for group in inside.get(root.name, ()):
            apart = (s for s in sets if not any({group.name, g.name} in coupled for g in s))
            found = next(apart, None)
            if found is None:
                sets.append([group])
            else:
                found.append(group)
        families += [Family(root, tuple(nested)) for nested in sets or [[]]]
    return tuple(families)


def _coupled(symmetry: Symmetry) -> list[set[str]]:
    """Finds the pairs of groups, nested in one and the same, that one array of numbers has both of.

    What either gains by moving depends on where the other is: they can't be matched at once.
    """
    found = []
    for layout, uses in symmetry.by_leaf:
        for number, use in enumerate(uses):
            for other in uses[:number]:
                outer = use.group.outer
                if outer and outer == other.group.outer and use.group is not other.group:
                    if layout.together({use.dim, other.dim}):
                        found.append({use.group.name, other.group.name})
    return found


def at_once(count: int) -> int:
    """Says how many of some equal problems to work on under one `jax.vmap`.

    Args:
        count: of the problems.

    Returns:
        All, but on a CPU one: it gains nothing by doing the same thing to many, and each would wait
        for the slowest.
    """
    return 1 if jax.default_backend() == "cpu" else count


def map_in_batches(fn: Callable[[Any], Any], stacked: Any, batch_size: int) -> Any:
    """Applies a function to each of a stack of arguments, some of them under one `jax.vmap`.

    Args:
        fn: from a pytree to a pytree.
        stacked: its arguments, with leaves `[count, ...]`.
        batch_size: how many to work on at once.

    Returns:
        The results, stacked.
    """
    # `jax.lax.map` cannot batch arrays without elements, which a leaf of the parameters may be.
    empty = any(x.size == 0 for x in jax.tree.leaves(stacked))
    return jax.lax.map(fn, stacked, batch_size=None if empty or batch_size == 1 else batch_size)


Masses = tuple[Array | None, Array | None]
"""Of the units of the source and of the target, float `[*batch, n]` and `[*batch, m]`."""


def solve_stack(
    solver: AbstractSolver, cost: Array, masses: Masses = (None, None), within: Any = None
) -> Solution:
    """Solves a stack of problems: under one vmap, on a CPU one after the other.

    Args:
        solver: from cost to plan.
        cost: float `[*batch, n, m]`.
        masses: of the units.
        within: costs within the source and within the target, `[*batch, n, n]`, `[*batch, m, m]`.

    Returns:
        The solutions, `batch` in front of everything.
    """
    *batch, n, m = cost.shape
    given = (cost, *masses, within)
    if not batch:
        return solver.solve(*given)
    count = math.prod(batch)
    stacked = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(batch) :]), given)
    solve = lambda problem: solver.solve(*problem)  # noqa: E731
    found = map_in_batches(solve, stacked, at_once(count))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)


def _total(solution: Solution, plan: Array) -> Solution:
    """Sums up a stack of solutions."""
    return Solution(
        plan,
        jnp.sum(solution.value),
        jnp.all(solution.converged),
        jnp.max(solution.gap),
    )


def solve_family(
    solver: AbstractSolver,
    cost_of: Callable[[Gram], Array],
    grams: Sequence[Gram],
    masses: Sequence[Masses],
) -> list[Solution]:
    """Matches a group jointly with what is nested in it.

    The cost between two heads is that of their best match inside; all pairs are solved.

    Args:
        solver: from cost to plan. What has something nested in it is always matched exactly.
        cost_of: the ground cost between all pairs of units, of their inner products.
        grams: of the group and of each nested one.
        masses: of the units of each.

    Returns:
        For each group its plans, values summed up. Inside of heads that do not move one to one,
        plans are for all pairs of heads.
    """
    own, *inside = grams
    if not inside:
        found = solve_stack(solver, cost_of(own), masses[0], costs_within(cost_of, own))
        return [_total(found, found.plan)]
    problems = [_pairs(cost_of, g, pair) for g, pair in zip(inside, masses[1:], strict=True)]
    pairs: list[Solution] = []
    for _, alike in itertools.groupby(problems, key=_shapes):  # one solver for all
        found = solve_stack(solver, *jax.tree.map(lambda *x: jnp.stack(x), *alike))
        pairs += [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(found.gap))]
    # The masses of a problem's units sum up to 1.
    values = (g.ab.shape[-1] * p.value for g, p in zip(inside, pairs, strict=True))
    cost = functools.reduce(jnp.add, values, cost_of(own))
    outer = solve_stack(Exact(), cost)
    found = [_total(outer, outer.plan)]
    if not is_permutation(outer.plan):
        return [*found, *(_total(solution, solution.plan) for solution in pairs)]
    for solution in pairs:
        # For each head of the target, the match inside with the head that goes there.
        chosen = jax.tree.map(lambda x: picked(x, outer.plan), solution)
        found.append(_total(chosen, chosen.plan))
    return found


def _pairs(cost_of: Callable[[Gram], Array], g: Gram, masses: Masses) -> tuple[Array, Masses, Any]:
    """Sets up the problems of all pairs of heads: `[*batch, heads, heads, n, m]`."""
    # From [*batch, heads, n, heads, m].
    ab = jnp.moveaxis(g.ab, -3, -2)
    pairs = ab.shape[:-2]

    def of_source(x: Array, rank: int) -> Array:
        x = jnp.expand_dims(x, -rank - 1)
        return jnp.broadcast_to(x, (*pairs, *x.shape[x.ndim - rank :]))

    def of_target(x: Array, rank: int) -> Array:
        x = jnp.expand_dims(x, -rank - 2)
        return jnp.broadcast_to(x, (*pairs, *x.shape[x.ndim - rank :]))

    cost = cost_of(Gram(of_source(g.aa, 1), of_target(g.bb, 1), ab))
    a, b = masses
    within = costs_within(cost_of, g)
    return (
        cost,
        (None if a is None else of_source(a, 1), None if b is None else of_target(b, 1)),
        within and (of_source(within[0], 2), of_target(within[1], 2)),
    )


def _shapes(problem: Any) -> Any:
    return jax.tree_util.tree_structure(problem), [x.shape for x in jax.tree.leaves(problem)]


def picked(pairs: Array, plan: Array) -> Array:
    """Picks for each head of the target what belongs to the pair with the head that goes there.

    Args:
        pairs: `[*batch, heads, heads, ...]`.
        plan: of the heads, int `[*batch, heads]`.

    Returns:
        `pairs[*batch, plan[*batch, j], j]` for all `j`, `[*batch, heads, ...]`.
    """
    lead = plan.ndim + 1
    index = plan.reshape(*plan.shape[:-1], 1, plan.shape[-1], *[1] * (pairs.ndim - lead))
    return jnp.take_along_axis(pairs, index, axis=plan.ndim - 1, mode="fill").squeeze(plan.ndim - 1)


def overlap(grams: Sequence[Gram], plans: Sequence[Array]) -> Array:
    """Takes the inner product of the moved source with the target.

    Args:
        grams: of a group and of each nested one.
        plans: of these, permutations.

    Returns:
        The sum over all weights that the groups were compared by.
    """
    own, *inside = grams
    outer, *rest = plans
    total = jnp.sum(_along(own.ab, outer))
    for g, plan in zip(inside, rest, strict=True):
        total = total + jnp.sum(_along(picked(jnp.moveaxis(g.ab, -3, -2), outer), plan))
    return total


def _along(ab: Array, plan: Array) -> Array:
    """Takes `ab[..., plan[..., j], j]` for all `j`."""
    return jnp.take_along_axis(ab, plan[..., None, :], axis=-2, mode="fill")
