"""Checks of what `learn_alignment` is given besides models, and of what it returns."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from otfusion_jax.alignment.checks import unusable
from otfusion_jax.alignment.learning_batches import Batches
from otfusion_jax.alignment.loss_descent import LearningState, LossDescent, first_state
from otfusion_jax.common.arguments import checked_count
from otfusion_jax.symmetry.groups import Plans


def total_steps(
    batches: Batches, state: LearningState | None, steps: int | None, is_scheduled: bool
) -> int | None:
    """Returns how many steps there will be in all, or None if nobody has to know.

    Args:
        batches: The batches of this call.
        state: Where learning stands; None at its start.
        steps: How many steps learning is to take; None if it was not said.
        is_scheduled: Whether the optimizer's steps depend on it.

    Returns:
        The number, with the steps that the state has made.

    Raises:
        ValueError: If the optimizer depends on it and nothing tells it, or it is not above the
            number of steps that the state has made.
    """
    if steps is None:
        if state is None and batches.count is not None:
            return batches.count
        if is_scheduled:
            raise ValueError(
                "steps is not given, over which the steps of the default optimizer fall to 0, and "
                f"{'batches' if state is None else 'a state'} can't tell it; pass steps=..., how "
                "many learning takes in all, or an optimizer"
            )
        return None
    total = checked_count(steps, "steps", "how many steps learning takes in all")
    if total <= steps_done(state):
        raise ValueError(f"steps is {total}, and the state has made as many already; give more")
    return total


def steps_done(state: LearningState | None) -> int:
    """Reads how many steps a state has made.

    Args:
        state: Where learning stands; None at its start.

    Returns:
        The number.

    Raises:
        ValueError: If the state is traced.
    """
    if state is None:
        return 0
    if isinstance(state.steps, Tracer):
        raise ValueError(
            "the state is traced, so that it is not known how many steps are left; call "
            "learn_alignment outside of jax.jit, or leave steps out and give an optimizer"
        )
    return int(state.steps)


def require_state(
    descent: LossDescent, state: LearningState, weights: tuple[float, ...] | None
) -> None:
    """Refuses a state of another symmetry, solver or optimizer.

    Args:
        descent: What is descended.
        state: The state that was given.
        weights: One weight per leaf, or None.

    Raises:
        ValueError: If a descent of these arguments has other states.
    """
    if set(state.plans) == set(descent.symmetry):
        fresh = jax.eval_shape(lambda: first_state(descent, state.plans, weights))
        if jax.tree.map(_form, fresh) == jax.tree.map(_form, state):
            return
    raise ValueError(
        "the state is not one of these arguments: pass result.state of a call of learn_alignment "
        "with the same symmetry, solver and optimizer"
    )


def _form(array: Any) -> tuple[tuple[int, ...], Any]:
    """Returns shape and dtype, by which states of one descent are told."""
    return jnp.shape(array), jnp.result_type(array)


def require_learned(plans: Plans, history: Array) -> None:
    """Refuses plans of costs that did not stay finite, as far as that can be known.

    Args:
        plans: The plans.
        history: The loss before each step.

    Raises:
        FloatingPointError: If a plan is not finite.
    """
    if not unusable(plans):
        return
    first = "a gradient of the loss is not finite"
    if not isinstance(history, Tracer):
        steps = np.flatnonzero(~np.isfinite(history))
        if len(steps):
            first = f"the loss is not finite, first at step {steps[0]}"
    raise FloatingPointError(
        f"nothing was learned: {first}. Look for NaN in the batches, or take smaller steps "
        "(optimizer)"
    )
