"""The last step from an average to a model: some steps towards what its parents answer.

It is training, if without labels, and on as few inputs as a repair sees. Everything before it
computes the parameters; here they are descended to.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.common.arguments import checked_count, checked_key, require_function, require_kind
from otfusion_jax.common.finiteness import not_finite_counts
from otfusion_jax.common.host import Array, accumulation_dtype
from otfusion_jax.common.known import all_known
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.divergence import Objective, Outputs, checked_shares, objective_of
from otfusion_jax.fusion.mixup import mixes_inputs, mixup
from otfusion_jax.fusion.samples import Samples, read_samples
from otfusion_jax.symmetry.checks import require_models
from otfusion_jax.symmetry.groups import leaves_of

_CALL = "distill(fn, params, teachers, batches, outputs='logits')"


def distill(
    fn: Callable[..., Any],
    params: PyTree,
    teachers: Sequence[PyTree],
    batches: Iterable[Any],
    *,
    outputs: Outputs | None = None,
    loss: Callable[..., Any] | None = None,
    weights: Sequence[float] | None = None,
    steps: int = 300,
    batch_size: int = 64,
    optimizer: optax.GradientTransformation | None = None,
    trains: Callable[[str], Any] | None = None,
    mixes: bool | None = None,
    max_samples: int = 5000,
    key: Array | None = None,
) -> PyTree:
    """Trains a model without labels towards the mean of what others predict.

    Meant for an average that has been repaired already, and some hundred steps. A thousand inputs,
    as a repair takes, are soon known by heart: so steps are made on mixtures of two of them, where
    that can be done (see `mixes`).

    Args:
        fn: The function of all models, `fn(params, *inputs)`, hashable.
        params: The parameters to start from, a pytree of arrays.
        teachers: The parameters of the K models whose mean prediction is to be met, a list of
            pytrees of that structure. They need not be aligned.
        batches: A list, a generator or a loader of batches of inputs without labels, arrays `[n,
            ...]` or tuples of these. It is gone through once, and the samples are kept in the
            memory of the host, `max_samples` at most.
        outputs: What `fn` returns: `"logits"` of classes along the last axis, compared by the
            divergence of their probabilities, or `"values"`, compared by squared differences.
        loss: A loss `loss(params, *inputs)`, a scalar, to descend on in place of that.
        weights: The K weights of the teachers in the mean, summing to 1; uniform if None.
        steps: The number of steps, 1 or more.
        batch_size: The number of samples of a step, drawn anew with replacement.
        optimizer: An optimizer of optax. None means Adam with steps of 1e-4 that fall to 0 as a
            cosine.
        trains: A function from the key path of a parameter to whether it is trained; None trains
            all that are floating-point. Running statistics of batch norm are best left out.
        mixes: Whether steps are made on mixtures of two inputs (`mixup`), which have to be
            floating-point. None mixes where they are, and no loss is given. Pass False if floats
            are masks or codes, between which there is nothing.
        max_samples: The number of samples that are kept at most.
        key: The source of randomness, a key of JAX; `jax.random.key(0)` if None.

    Returns:
        The trained parameters, a pytree of the same structure, shapes and dtypes.

    Raises:
        ValueError: If teachers do not fit the parameters, weights do not fit, batches are empty or
            differ, nothing is trained, outputs are a scalar, or it is not said what they are.
        TypeError: If arguments are of another type, or `mixes` is True and not all inputs are
            floating-point.
        FloatingPointError: If parameters do not stay finite.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> import otfusion_jax as otf
        >>> line, x = (lambda params, x: params * x), jnp.ones((8, 1))
        >>> between = otf.distill(line, jnp.array(0.0), [jnp.array(0.2), jnp.array(0.4)], [x],
        ...                       outputs="values", optimizer=optax.adam(0.01))
        >>> print(f"{float(between):.2f}")
        0.30
    """
    require_function(fn, _CALL)
    require_models(teachers, "teachers")
    names = [f"teacher {number}" for number in range(len(teachers))]
    require_alike([params, *teachers], names=["params", *names])
    objective = objective_of(fn, outputs, loss, _CALL)
    if not all_known(params, teachers):
        raise TypeError(
            "distill was called inside of jax.jit or another transformation; call it outside: it "
            "jits its steps"
        )
    if trains is not None:
        require_function(trains, "distill(..., trains=lambda path: True)")
    if optimizer is not None:
        examples = "an optimizer of optax such as optax.adam(1e-4), or None"
        require_kind(optimizer, optax.GradientTransformation, "optimizer", examples)
    steps = checked_count(steps, "steps", "1 or more")
    batch_size = checked_count(batch_size, "batch_size", "1 or more")
    key = checked_key(key)
    shares = checked_shares(weights, len(teachers), outputs)
    samples = read_samples(batches, checked_count(max_samples, "max_samples", "1 or more"))
    objective.check(params, samples.at(slice(2)).inputs)
    mixes = mixes_inputs(mixes, objective, samples.inputs)
    return trained(
        objective,
        params,
        list(teachers),
        shares,
        samples,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        trains=trains,
        mixes=mixes,
        key=key,
    )


def trained_leaves(params: PyTree, trains: Callable[[str], Any] | None) -> list[int]:
    """Says which leaves are trained: integers, keys and what is not to be trained stay.

    Args:
        params: The parameters of a model.
        trains: See `distill`.

    Returns:
        The positions of the leaves.
    """
    numbers = []
    for number, leaf in enumerate(leaves_of(params)):
        is_trained = trains is None or bool(trains(leaf.path))
        if is_trained and jnp.issubdtype(leaf.dtype, jnp.floating):
            numbers.append(number)
    return numbers


def trained(
    objective: Objective,
    params: PyTree,
    teachers: list[PyTree],
    weights: Float[Array, " k"],
    samples: Samples,
    *,
    steps: int,
    batch_size: int = 64,
    optimizer: optax.GradientTransformation | None = None,
    trains: Callable[[str], Any] | None = None,
    mixes: bool,
    key: Array,
) -> PyTree:
    """Trains a model on what `distill` has checked; see there."""
    optimizer = _adam(steps) if optimizer is None else optimizer
    flat, structure = jax.tree_util.tree_flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in flat]
    numbers, wide = trained_leaves(params, trains), []
    for number in numbers:
        # Steps are smaller than what half precision can tell from nothing.
        wide.append(leaves[number].astype(accumulation_dtype(leaves[number].dtype)))
    if not wide:
        raise ValueError("there is nothing to train: no floating-point leaf is trained by `trains`")
    state = _start(optimizer, wide)
    # Positions are drawn at once and looked up on the host, where the samples are.
    shape = (steps, min(batch_size, samples.count))
    drawn = np.asarray(jax.random.randint(key, shape, 0, samples.count))
    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    for positions, step_key in zip(drawn, keys, strict=True):
        inputs = samples.at(positions).on_device()
        wide, state = _step(
            objective,
            optimizer,
            structure,
            tuple(numbers),
            mixes,
            leaves,
            wide,
            state,
            teachers,
            weights,
            inputs,
            step_key,
        )
    for number, leaf in zip(numbers, wide, strict=True):
        leaves[number] = leaf.astype(leaves[number].dtype)
    if sum(not_finite_counts([leaves[number] for number in numbers])):
        raise FloatingPointError(
            "parameters did not stay finite; take smaller steps (optimizer), or look for NaN in "
            "what the function returns"
        )
    return structure.unflatten(leaves)


@functools.lru_cache
def _adam(steps: int) -> optax.GradientTransformation:
    """The default; one object for each number of steps, so that nothing is compiled twice."""
    return optax.adam(optax.cosine_decay_schedule(1e-4, steps))


@functools.partial(jax.jit, static_argnames="optimizer")
def _start(optimizer: optax.GradientTransformation, leaves: list[Array]) -> PyTree:
    """Returns the state that an optimizer starts in."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return optimizer.init(leaves)


@functools.partial(
    jax.jit, static_argnames=("objective", "optimizer", "structure", "numbers", "mixes")
)
def _step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    structure: Any,
    numbers: tuple[int, ...],
    mixes: bool,
    leaves: list[Array],
    wide: list[Array],
    state: PyTree,
    teachers: list[PyTree],
    weights: Float[Array, " k"],
    inputs: tuple[PyTree, ...],
    key: Array,
) -> tuple[Any, PyTree]:
    """Makes one step of the leaves at some positions, which are `wide` in full precision."""
    if mixes:
        inputs = mixup(inputs, key)

    def objective_at(chosen: list[Array]) -> Array:
        all_leaves = list(leaves)
        for number, leaf in zip(numbers, chosen, strict=True):
            all_leaves[number] = leaf.astype(leaves[number].dtype)
        return objective(structure.unflatten(all_leaves), teachers, weights, inputs)

    # optax promotes ranks and dtypes.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        gradient = jax.grad(objective_at)(wide)
        updates, state = optimizer.update(gradient, state, wide)
        return optax.apply_updates(wide, updates), state
