"""Alignments learned by descent on a loss of the fused model.

Weight matching sees only weights. Here the costs themselves are what is learned: Sinkhorn makes
soft plans of them, these move the source, and a loss of its mean with the target is differentiated
back through the plans to the costs, which soft plans are smooth in. In the end each cost is matched
exactly. Units that rotate are learned as they are: an orthogonal matrix is smooth in the
skew-symmetric one that it is the Cayley transform of.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree
from ott.geometry import costs

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.checks import unusable
from otfusion_jax.alignment.costs import Gram, ground_cost
from otfusion_jax.alignment.leaf_weights import leaf_weights
from otfusion_jax.alignment.problem import set_up_problem
from otfusion_jax.alignment.solve_tree import picked
from otfusion_jax.averaging.average import columns_of
from otfusion_jax.averaging.interpolate import checked_positions, interpolate
from otfusion_jax.common.arguments import require_function, require_kind
from otfusion_jax.solvers.base import TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.sinkhorn import Sinkhorn
from otfusion_jax.solvers.stack import solve_stack
from otfusion_jax.symmetry.canonical import require_canonical
from otfusion_jax.symmetry.checks import (
    require_equal_integers,
    require_model,
    require_symmetry,
    warn_without_groups,
)
from otfusion_jax.symmetry.groups import Group, Plans
from otfusion_jax.symmetry.plans import HasPlans, chained, compose
from otfusion_jax.symmetry.rotation import fixing_ones
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedAlignment:
    """Plans that were learned, as permutations and as what they were before.

    Attributes:
        plans: Group name to permutation, int32 `[*batch, n]`, for all groups. It is the exact match
            of the learned cost, which is also the most likely one by the soft plan. Of groups that
            rotate, the learned orthogonal matrix, float `[*batch, n, n]`.
        soft: The plans that the loss was taken with at the end: float `[*batch, n, n]` for groups
            that were learned, and the permutation of the start for the others.
        history: The loss before each step, on that step's batch, float `[steps]`.
    """

    plans: Plans
    soft: Plans
    history: Float[Array, " steps"]


def learn_alignment(
    symmetry: Symmetry,
    loss: Callable[[PyTree, PyTree], Array],
    source: PyTree,
    target: PyTree,
    batches: PyTree,
    *,
    start: Plans | HasPlans | None = None,
    t: float = 0.5,
    solver: Sinkhorn | None = Sinkhorn(epsilon=0.5, relative=False, max_iterations=20),
    optimizer: optax.GradientTransformation | None = None,
    leaf_weight: Callable[[str], float] | None = None,
) -> LearnedAlignment:
    """Learns plans by gradient descent on the loss between the moved source and the target.

    What is learned is a cost for each group. It starts as that of weight matching, given the plans
    of the other groups in `start`, in units of its standard deviation. Groups in which others are
    nested (heads) stay as they are in `start`, as only permutations can move them; so do those that
    a parameter both produces and consumes. What is inside of heads is learned. Groups that rotate
    (see `Symmetry.with_rotations`) are turned from where `start` has them. One step a batch, in
    one `jax.lax.scan`; jitted, and compiled anew for another `loss` or `optimizer` object. The same
    inside `jax.jit`.

    Args:
        symmetry: The symmetry of both models.
        loss: The loss, a differentiable function `loss(params, batch)` to a scalar.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        batches: The batches that `loss` takes, stacked: each leaf is `[steps, ...]`. What is too
            large for memory can be looked up by `loss`, from indices or keys.
        start: Permutations of all groups or of some, or the result of `align`. None means
            `align(symmetry, source, target)`.
        t: Where between the moved source (0) and the target (1) the loss is taken.
        solver: What makes soft plans of costs. A large `epsilon` lets more pairs of units take
            part; the descent sharpens the plans by itself, by scaling the costs up. With `relative`
            set, `epsilon` would be scaled up with them. None learns rotations alone, and leaves
            permutations as they are in `start`.
        optimizer: An optimizer of optax. None means Adam with steps of 0.1 that fall to 0 as a
            cosine.
        leaf_weight: How much each parameter counts for the first costs and for the alignment to
            start from, see `align`.

    Returns:
        The learned alignment; pass it to `transport`.

    Raises:
        ValueError: If `align` raises it; if the start does not fit or has soft plans; if integers
            differ between the models; if the models are not in canonical form, where the symmetry
            has rotations; if the batches have no leading axis of one size; if `t` is not finite; if
            the solver is None and nothing rotates.
        TypeError: If `align` raises it; if batches are a list, which is to be stacked; if the
            optimizer is none of optax, or `t` is no number.
        FloatingPointError: If the loss or its gradient is not finite, so that no costs are learned.

    Warns:
        SymmetryWarning: If the symmetry has no groups.

    References:
        Peña et al., Re-basin via implicit Sinkhorn differentiation, CVPR 2023.
    """
    call = "learn_alignment(symmetry, loss, source, target, batches)"
    require_symmetry(symmetry, call)
    require_function(loss, call)
    if solver is not None:
        require_kind(solver, Sinkhorn, "solver", "Sinkhorn(), or None")
    elif not symmetry.rotates:
        raise ValueError(
            "solver is None, so that rotations alone are learned, and the symmetry has none; pass "
            "a Sinkhorn(), or symmetry.with_rotations()"
        )
    if optimizer is not None:
        examples = "an optimizer of optax such as optax.adam(1e-2), or None"
        require_kind(optimizer, optax.GradientTransformation, "optimizer", examples)
    if leaf_weight is not None:
        require_function(leaf_weight, "learn_alignment(..., leaf_weight=lambda path: 1.0)")
    position = checked_positions(t)
    if position.ndim:
        raise ValueError(f"t has shape {position.shape}; give a single number")
    require_model(symmetry, source, "the source")
    require_model(symmetry, target, "the target")
    require_canonical(symmetry, source, "the source")
    require_canonical(symmetry, target, "the target")
    columns = columns_of([source, target])
    require_equal_integers(symmetry.leaves, columns, [False] * len(columns), "")
    warn_without_groups(symmetry, (source, target), "there is nothing to learn")
    if isinstance(batches, list):
        raise TypeError(
            "batches is a list; pass them stacked, each leaf [steps, ...], as in "
            "jax.tree.map(lambda *x: jnp.stack(x), *batches)"
        )
    steps = _number_of_steps(batches)
    if start is None:
        start = align(symmetry, source, target, leaf_weight=leaf_weight)
    learned = _learn(
        symmetry,
        source,
        target,
        batches,
        compose(symmetry, start, {}),
        position,
        loss=loss,
        solver=solver,
        optimizer=_adam(steps) if optimizer is None else optimizer,
        weights=leaf_weights(symmetry, leaf_weight),
    )
    _require_learned(learned)
    return learned


def _require_learned(learned: LearnedAlignment) -> None:
    """Refuses plans of costs that did not stay finite, as far as that can be known."""
    if not unusable(learned.plans | learned.soft):
        return
    first = "a gradient of the loss is not finite"
    if not isinstance(learned.history, Tracer):
        steps = np.flatnonzero(~np.isfinite(learned.history))
        if len(steps):
            first = f"the loss is not finite, first at step {steps[0]}"
    raise FloatingPointError(
        f"nothing was learned: {first}. Look for NaN in the batches, or take smaller steps "
        "(optimizer)"
    )


def _number_of_steps(batches: PyTree) -> int:
    """Returns the size of the leading axis, after checking that it is that of all leaves."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise ValueError(
            "batches must be a pytree of arrays with one leading axis, of a size of at least 1, "
            f"that counts the steps; found the sizes {sorted(sizes)}"
        )
    return sizes.pop()[0]


@functools.lru_cache
def _adam(steps: int) -> optax.GradientTransformation:
    """The default; one object for each number of steps, so that nothing is compiled twice."""
    return optax.adam(optax.cosine_decay_schedule(0.1, steps))


@functools.partial(jax.jit, static_argnames=("symmetry", "loss", "solver", "optimizer", "weights"))
def _learn(
    symmetry: Symmetry,
    source: PyTree,
    target: PyTree,
    batches: PyTree,
    plans: Plans,
    t: Array,
    *,
    loss: Callable[[PyTree, PyTree], Array],
    solver: Sinkhorn | None,
    optimizer: optax.GradientTransformation,
    weights: tuple[float, ...] | None,
) -> LearnedAlignment:
    """Learns the costs, without checks."""
    descent = _LossDescent(symmetry, source, target, plans, t, loss, solver, optimizer)
    # Learned are the costs, not the plans: a plan would leave the couplings with the first step.
    if solver is None:
        first = _no_turns(symmetry, source)
    else:
        first = _no_turns(symmetry, source) | _costs(symmetry, source, target, plans, weights)
    start = first, optimizer.init(first)
    (learned, _), history = jax.lax.scan(descent.step, start, batches)
    soft = descent.soft_plans(learned)
    matched = dict(plans)
    for name, numbers in learned.items():
        if symmetry[name].rotates:
            matched[name] = soft[name]
        else:
            # The permutation that a soft plan of this cost tends to as epsilon goes to 0.
            matched[name] = solve_stack(Exact(), TransportProblem(numbers)).plan
    return LearnedAlignment(matched, soft, history)


Learned = dict[str, Float[Array, "*batch n n"]]
"""What is learned, by the names of groups: costs, or of groups that rotate what they are turned by
(see `_turned`)."""

# Adam's steps are as large for every entry. A turn by a matrix of such entries is by an angle that
# grows with the square root of their number; costs in units of their spread take ten times this.
_TURN_PER_STEP = 0.1


# Compared by identity: JAX keeps the functions of a loop in caches, and arrays have no hash.
@dataclasses.dataclass(frozen=True, eq=False)
class _LossDescent:
    """Gradient descent on the loss of the fused model, in the costs.

    Attributes:
        symmetry: The symmetry of both models.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        plans: The permutations of the start, which groups keep that are not learned.
        t: Where between the moved source (0) and the target (1) the loss is taken.
        loss: The loss of parameters on a batch.
        solver: What makes soft plans of costs; None if there are none to be learned.
        optimizer: The optimizer.
    """

    symmetry: Symmetry
    source: PyTree
    target: PyTree
    plans: Plans
    t: Array
    loss: Callable[[PyTree, PyTree], Array]
    solver: Sinkhorn | None
    optimizer: optax.GradientTransformation

    def soft_plans(self, learned: Learned) -> Plans:
        """Returns the plans of all groups: soft ones of those that are learned."""
        plans = dict(self.plans)
        for name, numbers in learned.items():
            group = self.symmetry[name]
            if group.rotates:
                plans[name] = _turned(group, plans[name], numbers)
            elif self.solver is not None:
                plans[name] = solve_stack(self.solver, TransportProblem(numbers)).plan
        return plans

    def objective(self, learned: Learned, batch: PyTree) -> Array:
        """Takes the loss of the fused model."""
        moved = transport(self.symmetry, self.soft_plans(learned), self.source)
        return self.loss(interpolate(moved, self.target, self.t), batch)

    def step(
        self, carry: tuple[PyTree, PyTree], batch: PyTree
    ) -> tuple[tuple[PyTree, PyTree], Array]:
        """Makes one step on one batch, from costs and optimizer state; returns the loss before."""
        learned, state = carry
        # optax, and ott where it is differentiated, promote ranks and dtypes.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            value, gradient = jax.value_and_grad(self.objective)(learned, batch)
            updates, state = self.optimizer.update(gradient, state, learned)
            learned = optax.apply_updates(learned, updates)
        return (learned, state), value


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
    identity = jnp.broadcast_to(jnp.eye(skew.shape[-1], dtype=skew.dtype), skew.shape)
    # The Cayley transform, which is orthogonal for every skew-symmetric matrix.
    turn = jnp.linalg.solve(identity - skew, identity + skew)
    if group.fixes_ones:
        extend = fixing_ones
        for _ in group.batch:
            extend = jax.vmap(extend)
        turn = extend(turn)
    return chained(plan, turn)


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
