"""Descent on a loss of the average of two models, in what makes their plans.

A `LossDescent` is the function that is descended, `LearningState` where a descent stands. The
programs here go on from a state: by one batch, or by a stack of batches in one loop.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram, ground_cost
from otfusion_jax.alignment.problem import set_up_problem
from otfusion_jax.alignment.solve_tree import picked
from otfusion_jax.averaging.interpolate import interpolate
from otfusion_jax.common.linear_systems import solve_square
from otfusion_jax.common.typing import PyTree
from otfusion_jax.solvers.base import TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.sinkhorn import Sinkhorn
from otfusion_jax.solvers.stack import solve_stack
from otfusion_jax.symmetry.groups import Group, Plans
from otfusion_jax.symmetry.plans import chained
from otfusion_jax.symmetry.rotation import fixing_ones
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport

Learned = dict[str, Float[Array, "*batch n n"]]
"""What is learned, by the names of groups: costs, or of groups that rotate what they are turned by
(see `_turned`)."""

# Adam's steps are as large for every entry. A turn by a matrix of such entries is by an angle that
# grows with the square root of their number; costs in units of their spread take ten times this.
_TURN_PER_STEP = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearningState:
    """Where learning stands: all that it takes to go on, as a pytree of arrays to be saved.

    Attributes:
        plans: The plans that learning has started from, of all groups by name.
        learned: What is learned, by the names of groups: costs, float `[*batch, n, n]`, and of
            groups that rotate what they are turned by.
        optimizer: The state of the optimizer.
        steps: How many steps have been made, int32 `[]`.
    """

    plans: Plans
    learned: Learned
    optimizer: PyTree
    steps: Int[Array, ""]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("source", "target", "t", "loss"),
    meta_fields=("symmetry", "solver", "optimizer"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class LossDescent:
    """Gradient descent on the loss of the fused model, in the costs: a pytree of the two models.

    What the loss brings along is data, too: with another's, no program is compiled anew.

    Attributes:
        symmetry: The symmetry of both models.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        t: Where between the moved source (0) and the target (1) the loss is taken.
        loss: The loss of parameters on a batch, a `jax.tree_util.Partial`.
        solver: What makes soft plans of costs; None if there are none to be learned.
        optimizer: The optimizer.
    """

    symmetry: Symmetry
    source: PyTree
    target: PyTree
    t: Array
    loss: jax.tree_util.Partial
    solver: Sinkhorn | None
    optimizer: optax.GradientTransformation

    def soft_plans(self, start: Plans, learned: Learned) -> Plans:
        """Makes plans of what is learned.

        Args:
            start: The plans of all groups that learning has started from.
            learned: What is learned.

        Returns:
            The plans of all groups: soft ones of those that are learned.
        """
        plans = dict(start)
        for name, numbers in learned.items():
            group = self.symmetry[name]
            if group.rotates:
                plans[name] = _turned(group, plans[name], numbers)
            elif self.solver is not None:
                plans[name] = solve_stack(self.solver, TransportProblem(numbers)).plan
        return plans

    def objective(self, learned: Learned, start: Plans, batch: PyTree) -> Array:
        """Takes the loss of the fused model.

        Args:
            learned: What is learned.
            start: The plans of all groups that learning has started from.
            batch: A batch, as the loss takes it.

        Returns:
            The loss, `[]`.
        """
        moved = transport(self.symmetry, self.soft_plans(start, learned), self.source)
        value = self.loss(interpolate(moved, self.target, self.t), batch)
        if jnp.shape(value):
            raise ValueError(
                f"loss(params, batch) returned an array of shape {jnp.shape(value)}; return a "
                "scalar, the mean over a batch"
            )
        return value

    def step(self, state: LearningState, batch: PyTree) -> tuple[LearningState, Array]:
        """Makes one step on one batch.

        Args:
            state: Where learning stands.
            batch: A batch, as the loss takes it.

        Returns:
            Where it stands after the step, and the loss before.
        """
        # optax, and ott where it is differentiated, promote ranks and dtypes.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            graded = jax.value_and_grad(self.objective)
            value, gradient = graded(state.learned, state.plans, batch)
            updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.learned)
            learned = cast(Learned, optax.apply_updates(state.learned, updates))
        return LearningState(state.plans, learned, optimizer, state.steps + 1), value


@functools.partial(jax.jit, static_argnames="weights")
def first_state(
    descent: LossDescent, plans: Plans, weights: tuple[float, ...] | None
) -> LearningState:
    """Sets up learning: the costs are those of weight matching, and nothing is turned.

    Args:
        descent: What is descended.
        plans: The plans of all groups to start from.
        weights: One weight per leaf, or None.

    Returns:
        Where learning stands before the first step.
    """
    # Learned are the costs, not the plans: a plan would leave the couplings with the first step.
    learned = _no_turns(descent.symmetry, descent.source)
    if descent.solver is not None:
        learned |= _costs(descent.symmetry, descent.source, descent.target, plans, weights)
    optimizer = descent.optimizer.init(learned)
    return LearningState(plans, learned, optimizer, jnp.zeros((), jnp.int32))


@jax.jit
def after_batch(
    descent: LossDescent, state: LearningState, batch: PyTree
) -> tuple[LearningState, Array]:
    """Makes one step, see `LossDescent.step`."""
    return descent.step(state, batch)


@jax.jit
def after_stack(
    descent: LossDescent, state: LearningState, batches: PyTree
) -> tuple[LearningState, Array]:
    """Makes one step for each batch of a stack; returns the losses before, `[steps]`."""
    return jax.lax.scan(descent.step, state, batches)


@jax.jit
def plans_of(descent: LossDescent, state: LearningState) -> tuple[Plans, Plans]:
    """Makes plans of what has been learned.

    Args:
        descent: What was descended.
        state: Where learning stands.

    Returns:
        The plans of all groups, costs matched exactly, and the soft ones that the loss is taken
        with.
    """
    soft = descent.soft_plans(state.plans, state.learned)
    matched = dict(state.plans)
    for name, numbers in state.learned.items():
        if descent.symmetry[name].rotates:
            matched[name] = soft[name]
        else:
            # The permutation that a soft plan of this cost tends to as epsilon goes to 0.
            matched[name] = solve_stack(Exact(), TransportProblem(numbers)).plan
    return matched, soft


def _turned(group: Group, plan: Array, numbers: Array) -> Array:
    """Turns units on from where a plan has them.

    Args:
        group: The group, which rotates.
        plan: The plan, orthogonal matrices `[*batch, n, n]` or permutations `[*batch, n]`.
        numbers: What is learned, `[*batch, n, n]`, or of one dimension less if the vector of ones
            has to stay. Zeros turn nothing.

    Returns:
        Orthogonal matrices, `[*batch, n, n]`.
    """
    skew = _TURN_PER_STEP * (numbers - jnp.swapaxes(numbers, -1, -2))

    def turn(skew: Array) -> Array:
        return fixing_ones(_cayley(skew)) if group.fixes_ones else _cayley(skew)

    for _ in group.batch:
        turn = jax.vmap(turn)
    return chained(plan, turn(skew))


def _cayley(skew: Array) -> Array:
    """Makes a rotation of a skew-symmetric matrix, both `[n, n]`, by the Cayley transform."""
    identity = jnp.eye(skew.shape[-1], dtype=skew.dtype)
    return solve_square(identity - skew, identity + skew)


def _no_turns(symmetry: Symmetry, source: PyTree) -> Learned:
    """Returns what turns nothing, of each group that rotates, in the widest dtype of the model."""
    dtype = jnp.float32
    for part in jax.tree.leaves(source):
        if part.dtype == jnp.float64:
            dtype = jnp.float64
    turns = {}
    for group in symmetry.groups:
        if group.rotates:
            size = group.size - 1 if group.fixes_ones else group.size
            turns[group.name] = jnp.zeros((*group.batch, size, size), dtype)
    return turns


def _costs(
    symmetry: Symmetry,
    source: PyTree,
    target: PyTree,
    plans: Plans,
    weights: tuple[float, ...] | None,
) -> Learned:
    """Takes the cost of weight matching, of each group that is permuted and can be learned.

    Args:
        symmetry: The symmetry of both models.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        plans: The plans of all groups, under which each is compared.
        weights: One weight per leaf, or None.

    Returns:
        Costs of mean 0 and standard deviation 1.
    """
    metric = costs.SqEuclidean()
    problem, _ = set_up_problem(
        symmetry, symmetry, source, target, metric, Exact(), weights=weights
    )
    first = {}
    for tree in problem.group_trees:
        root, *nested = tree.groups
        members = [group.members for group in tree.groups]
        grams = problem.compare(tree, plans, members)
        for group, group_grams in zip(tree.groups, grams, strict=True):
            has_nested = group is root and nested
            if group.orthogonal:
                # Rotations are learned as they are, signs stay as the start has them.
                continue
            if has_nested or any(member.role == "both" for member in group.members):
                # Only permutations can move these.
                continue
            if group.outer is not None:
                # The heads stay where the start has put them.
                group_grams = _inside_heads(group_grams, plans[group.outer])
            # In units of the spread, the same epsilon and steps do for all groups.
            cost = ground_cost(metric, group_grams).astype(problem.dtype)
            mean = jnp.mean(cost, axis=(-2, -1), keepdims=True)
            spread = jnp.std(cost, axis=(-2, -1), keepdims=True)
            first[group.name] = (cost - mean) / jnp.where(spread > 0, spread, 1)
    return first


def _inside_heads(grams: Gram, plan: Array) -> Gram:
    """Takes the inner products inside of heads, for each of the target with the one moved there."""
    source_sq_norms = jnp.take_along_axis(grams.source_sq_norms, plan[..., None], axis=-2)
    cross = picked(jnp.moveaxis(grams.cross, -3, -2), plan)
    return Gram(source_sq_norms, grams.target_sq_norms, cross)
