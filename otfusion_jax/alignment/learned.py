"""Alignments learned by descent on a loss of the fused model.

Weight matching sees only weights. Here the costs themselves are what is learned: Sinkhorn makes
soft plans of them, these move the source, and a loss of its mean with the target is differentiated
back through the plans to the costs, which soft plans are smooth in. In the end each cost is matched
exactly. Units that rotate are learned as they are: an orthogonal matrix is smooth in the
skew-symmetric one that it is the Cayley transform of.

`learn_alignment` is the public function; what is descended, and where it stands, is in
`loss_descent`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.leaf_weights import leaf_weights
from otfusion_jax.alignment.learning_batches import batches_given
from otfusion_jax.alignment.learning_checks import (
    require_learned,
    require_state,
    steps_done,
    total_steps,
)
from otfusion_jax.alignment.loss_descent import (
    LearningState,
    LossDescent,
    first_state,
    plans_of,
)
from otfusion_jax.averaging.average import columns_of
from otfusion_jax.averaging.interpolate import checked_positions
from otfusion_jax.common.arguments import require_function, require_kind
from otfusion_jax.common.typing import PyTree
from otfusion_jax.solvers.sinkhorn import Sinkhorn
from otfusion_jax.symmetry.canonical import require_canonical
from otfusion_jax.symmetry.checks import (
    require_equal_integers,
    require_model,
    require_symmetry,
    warn_without_groups,
)
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import HasPlans, compose
from otfusion_jax.symmetry.symmetry import Symmetry


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
        history: The loss before each step of this call, on that step's batch, float `[steps]`.
        state: Where learning stands; with it another call goes on.
    """

    plans: Plans
    soft: Plans
    history: Float[Array, " steps"]
    state: LearningState


def learn_alignment(
    symmetry: Symmetry,
    loss: Callable[[PyTree, PyTree], Array],
    source: PyTree,
    target: PyTree,
    batches: PyTree | Iterable[PyTree],
    *,
    start: Plans | HasPlans | None = None,
    state: LearningState | None = None,
    steps: int | None = None,
    t: float = 0.5,
    solver: Sinkhorn | None = Sinkhorn(epsilon=0.5, relative=False, max_iterations=20),
    optimizer: optax.GradientTransformation | None = None,
    leaf_weight: Callable[[str], float] | None = None,
    progress: bool = False,
) -> LearnedAlignment:
    """Learns plans by gradient descent on the loss between the moved source and the target.

    What is learned is a cost for each group. It starts as that of weight matching, given the plans
    of the other groups in `start`, in units of its standard deviation. Groups in which others are
    nested (heads) stay as they are in `start`, as only permutations can move them; so do those that
    a parameter both produces and consumes. What is inside of heads is learned. Groups that rotate
    (see `Symmetry.with_rotations`) are turned from where `start` has them. One step a batch;
    jitted, and compiled anew for another `loss` or `optimizer` object. The same inside `jax.jit`.

    A long descent can be taken in parts: save `state` of the result, which is a pytree of arrays,
    and give it to another call with the batches that follow. Where batches come one by one, the
    parts end in the same bits as the whole.

    Args:
        symmetry: The symmetry of both models.
        loss: The loss, a differentiable function `loss(params, batch)` to a scalar. Arrays that it
            looks at may come in a `jax.tree_util.Partial(function, *arrays)`, which calls
            `function(*arrays, params, batch)`: with others of the same shapes, nothing is compiled
            anew. That needs arrays alone, in pytrees of any kind.
        source: The parameters of the model to be moved.
        target: The parameters of the model to be matched.
        batches: The batches that `loss` takes, of one shape. Either stacked, each leaf
            `[steps, ...]`, for one `jax.lax.scan`; or a list, a generator or another iterable of
            batches, of which one at a time is held in memory.
        start: Permutations of all groups or of some, or the result of `align`. None means
            `align(symmetry, source, target)`.
        state: Where an earlier call has left off, to go on from there in place of a start. The
            other arguments have to be the same again; of the models that is not checked.
        steps: How many steps learning takes in all, with those before `state`. No more batches are
            asked for, and the steps of the default optimizer fall to 0 over so many. None means as
            many as there are batches, which an iterator and a state do not tell.
        t: Where between the moved source (0) and the target (1) the loss is taken.
        solver: What makes soft plans of costs. A large `epsilon` lets more pairs of units take
            part; the descent sharpens the plans by itself, by scaling the costs up. With `relative`
            set, `epsilon` would be scaled up with them. None learns rotations alone, and leaves
            permutations as they are in `start`.
        optimizer: An optimizer of optax. None means Adam with steps of 0.1 that fall to 0 as a
            cosine.
        leaf_weight: How much each parameter counts for the first costs and for the alignment to
            start from, see `align`.
        progress: Whether to show a bar of the steps, and make them one by one; it needs tqdm.

    Returns:
        The learned alignment; pass it to `transport`.

    Raises:
        ValueError: If `align` raises it; if the start does not fit or has soft plans; if integers
            differ between the models; if the models are not in canonical form, where the symmetry
            has rotations; if the batches have no leading axis of one size; if `t` is not finite; if
            the solver is None and nothing rotates; if a state comes with a start, or is one of
            another symmetry, solver or optimizer; if the loss is no scalar; if `steps` is not given
            and there is nothing to tell it by.
        TypeError: If `align` raises it; if the optimizer is none of optax, or `t` or `steps` is no
            number.
        ImportError: If `progress` is asked for and tqdm is not installed.
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
    if state is not None:
        require_kind(state, LearningState, "state", "that of an earlier call's result, or None")
        if start is not None:
            raise ValueError("both start and state are given; a state has plans of its own")
    given = batches_given(batches)
    total = total_steps(given, state, steps, is_scheduled=optimizer is None)
    if optimizer is None:
        assert total is not None
        optimizer = _adam(total)
    descent = LossDescent(symmetry, source, target, position, _as_data(loss), solver, optimizer)
    weights = leaf_weights(symmetry, leaf_weight, source)
    if state is not None:
        require_state(descent, state, weights)
        now = state
    else:
        if start is None:
            start = align(symmetry, source, target, leaf_weight=leaf_weight)
        now = first_state(descent, compose(symmetry, start, {}), weights)
    left = None if total is None or steps is None else total - steps_done(state)
    now, history = given.learn(descent, now, left, progress)
    plans, soft = plans_of(descent, now)
    require_learned(plans | soft, history)
    return LearnedAlignment(plans, soft, history, now)


def _as_data(loss: Callable[[PyTree, PyTree], Array]) -> jax.tree_util.Partial:
    """Makes a pytree of a loss, of which nothing is data but the arrays that it brings along."""
    if isinstance(loss, jax.tree_util.Partial):
        leaves = jax.tree.leaves(loss)
        if all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
            return loss
    return jax.tree_util.Partial(loss)


@functools.lru_cache
def _adam(steps: int) -> optax.GradientTransformation:
    """The default; one object for each number of steps, so that nothing is compiled twice."""
    return optax.adam(optax.cosine_decay_schedule(0.1, steps))
