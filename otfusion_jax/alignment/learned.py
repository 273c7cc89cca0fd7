"""Alignments learned by descent: soft plans are smooth in the costs, and so is a loss of the fused.

Weight matching sees only weights. Here the costs themselves are what is learned: Sinkhorn makes
soft plans of them, these move the source, and a loss of its mean with the target is differentiated
back through the plans to the costs. In the end each cost is matched exactly.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from ott.geometry import costs

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.costs import Gram, ground_cost
from otfusion_jax.alignment.leaf_weights import leaf_weights, rescaled, weighted
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.alignment.solve_tree import picked
from otfusion_jax.averaging.average import columns_of
from otfusion_jax.averaging.interpolate import interpolate
from otfusion_jax.common.arguments import require_function, require_kind
from otfusion_jax.common.scaling import common_exponent
from otfusion_jax.solvers.base import TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.sinkhorn import Sinkhorn
from otfusion_jax.solvers.stack import solve_stack
from otfusion_jax.symmetry.checks import (
    require_equal_integers,
    require_model,
    require_symmetry,
    warn_without_groups,
)
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import HasPlans, compose
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedAlignment:
    """Plans that were learned, as permutations and as what they were before.

    Attributes:
        plans: group name to permutation, int32 `[*batch, n]`, of all groups: the exact match of the
            learned cost, which is also the most likely one by the soft plan.
        soft: the plans that the loss was taken with, at the end: float `[*batch, n, n]` of groups
            that were learned, the permutation of the start of the others.
        history: the loss before each step, on that step's batch, float `[steps]`.
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
    solver: Sinkhorn = Sinkhorn(epsilon=0.5, relative=False, max_iterations=20),
    optimizer: optax.GradientTransformation | None = None,
    leaf_weight: Callable[[str], float] | None = None,
) -> LearnedAlignment:
    """Learns plans by gradient descent on the loss between the moved source and the target.

    What is learned is a cost for each group. It starts as that of weight matching, given the plans
    of the other groups in `start`, in units of its standard deviation. Groups in which others are
    nested (heads) stay as they are in `start`, as only permutations can move them; so do those that
    a parameter both produces and consumes. What is inside of heads is learned. One step a batch, in
    one `jax.lax.scan`; jitted, and compiled anew for another `loss` or `optimizer` object. The same
    inside `jax.jit`.

    Args:
        symmetry: of both models.
        loss: `loss(params, batch)`, a differentiable scalar.
        source: parameters of the model to be moved.
        target: parameters of the model to be matched.
        batches: what `loss` takes, each leaf `[steps, ...]`. What is too large for memory can be
            looked up by `loss`, from indices or keys.
        start: permutations of all groups or of some, or the result of `align`; None means
            `align(symmetry, source, target)`.
        t: where between the moved source (0) and the target (1) the loss is taken.
        solver: from costs to soft plans. A large `epsilon` lets more pairs of units take part; the
            descent sharpens the plans by itself, by scaling the costs up. Its `relative` would keep
            it from that.
        optimizer: optax's; None means Adam with steps of 0.1 that fall to 0 as a cosine.
        leaf_weight: for the costs and the alignment to start from, see `align`.

    Returns:
        The learned alignment; pass it to `transport`.

    Raises:
        ValueError: as `align`, for a start that does not fit or has soft plans, for integers that
            differ between the models, and for batches that have no leading axis of one size.
        TypeError: as `align`, and for a list of batches, which are to be stacked.

    Warns:
        SymmetryWarning: if the symmetry has no groups.

    References:
        Peña et al., Re-basin via implicit Sinkhorn differentiation, CVPR 2023.
    """
    require_symmetry(symmetry, "learn_alignment(symmetry, loss, source, target, batches)")
    require_function(loss, "learn_alignment(symmetry, loss, source, target, batches)")
    require_kind(solver, Sinkhorn, "solver", "Sinkhorn()")
    require_model(symmetry, source, "the source")
    require_model(symmetry, target, "the target")
    columns = columns_of([source, target])
    require_equal_integers(symmetry.leaves, columns, [False] * len(columns), "")
    warn_without_groups(symmetry, (source, target), "there is nothing to learn")
    if isinstance(batches, list):
        raise TypeError(
            "batches is a list; pass them stacked, each leaf [steps, ...], as in "
            "jax.tree.map(lambda *x: jnp.stack(x), *batches)"
        )
    steps = _steps(batches)
    counting = leaf_weights(symmetry, leaf_weight)
    if start is None:
        start = align(symmetry, source, target, leaf_weight=leaf_weight)
    plans = compose(symmetry, start, {})
    optimizer = _adam(steps) if optimizer is None else optimizer
    return _learn(
        symmetry, loss, solver, optimizer, counting, source, target, batches, plans, jnp.asarray(t)
    )


def _steps(batches: PyTree) -> int:
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _learn(
    symmetry: Symmetry,
    loss: Callable[[PyTree, PyTree], Array],
    solver: Sinkhorn,
    optimizer: optax.GradientTransformation,
    counting: tuple[float, ...] | None,
    source: PyTree,
    target: PyTree,
    batches: PyTree,
    plans: Plans,
    t: Array,
) -> LearnedAlignment:
    def soft(now: dict[str, Array]) -> Plans:
        return plans | {
            name: solve_stack(solver, TransportProblem(cost)).plan for name, cost in now.items()
        }

    def objective(now: dict[str, Array], batch: PyTree) -> Array:
        return loss(interpolate(transport(symmetry, soft(now), source), target, t), batch)

    def step(carry: tuple[dict[str, Array], Any], batch: PyTree) -> Any:
        now, state = carry
        # optax, and ott where it is differentiated, promote ranks and dtypes.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            value, gradient = jax.value_and_grad(objective)(now, batch)
            updates, state = optimizer.update(gradient, state, now)
            return (optax.apply_updates(now, updates), state), value

    first = _matching_costs(symmetry, counting, source, target, plans)
    (learned, _), history = jax.lax.scan(step, (first, optimizer.init(first)), batches)
    rounded = {
        name: solve_stack(Exact(), TransportProblem(cost)).plan for name, cost in learned.items()
    }
    return LearnedAlignment(plans | rounded, soft(learned), history)


def _matching_costs(
    symmetry: Symmetry,
    counting: tuple[float, ...] | None,
    source: PyTree,
    target: PyTree,
    plans: Plans,
) -> dict[str, Float[Array, "*batch n n"]]:
    """Takes the cost of weight matching, of each group that can be learned.

    Args:
        symmetry: of both models.
        counting: weights of leaves, or None.
        source: the model to be moved.
        target: the model to be matched.
        plans: where the other groups are.

    Returns:
        Costs of mean 0 and standard deviation 1.
    """
    a, b = symmetry.split(source), symmetry.split(target)
    if counting is not None:
        a, b = (weighted(symmetry, parts, counting) for parts in (a, b))
    moving = [x for x, leaf in zip((*a, *b), 2 * symmetry.parts, strict=True) if leaf.moves]
    k = common_exponent(moving)
    a, b = (rescaled(symmetry.parts, parts, -k) for parts in (a, b))
    problem = AlignmentProblem(symmetry, symmetry, a, b, costs.SqEuclidean(), Exact())
    found = {}
    for family in problem.group_trees:
        groups = family.root, *family.nested
        grams = problem.compare(family, plans, [m for g in groups for m in g.members])
        for group, g in zip(groups, grams, strict=True):
            around = group is family.root and family.nested
            if around or any(m.role == "both" for m in group.members):
                continue
            if group.outer is not None:
                g = _inside(g, plans[group.outer])
            cost = ground_cost(problem.metric, g).astype(problem.dtype)
            spread = jnp.std(cost, axis=(-2, -1), keepdims=True)
            mean = jnp.mean(cost, axis=(-2, -1), keepdims=True)
            found[group.name] = (cost - mean) / jnp.where(spread > 0, spread, 1)
    return found


def _inside(g: Gram, plan: Array) -> Gram:
    """Takes the inner products inside of heads, for each of the target with the one moved there."""
    source_sq_norms = jnp.take_along_axis(g.source_sq_norms, plan[..., None], axis=-2)
    return Gram(source_sq_norms, g.target_sq_norms, picked(jnp.moveaxis(g.cross, -3, -2), plan))
