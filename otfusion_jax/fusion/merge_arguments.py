"""What `merge` is given, checked: inputs that are read or drawn, repairs, what is not to count."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from otfusion_jax.alignment.leaf_weights import counted_by_default
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.arguments import kind_of, require_function, require_kind
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.activation_tails import cuts_at_zero
from otfusion_jax.fusion.drawn_inputs import drawn_samples, look_like_images
from otfusion_jax.fusion.least_squares import LeastSquares
from otfusion_jax.fusion.merge_setting import Known
from otfusion_jax.fusion.repair_methods import AbstractRepair, RestoreStatistics
from otfusion_jax.fusion.samples import are_continuous, divided, read_samples
from otfusion_jax.symmetry.symmetry import Symmetry

_MOST = 1000
"""How many inputs are fitted to at most, and chosen by, until it is known what is best."""
_RIDGES = (0.001, 0.01, 0.1, 1.0)
"""The ridges that least squares choose of."""
_DRAWN = 1000
"""How many inputs of each kind are drawn where there are none."""


def known_inputs(batches: Any, inputs: Any, most: int, key: Array) -> Known:
    """Reads inputs and holds a share out, or draws them."""
    if batches is not None:
        if inputs is not None:
            raise ValueError("both batches and inputs are given; inputs is for want of batches")
        samples = read_samples(batches, most)
        parts = divided(samples, _MOST, jax.random.fold_in(key, 0))
        shapes = _as_shapes(samples.inputs)
        return Known(shapes, parts.fit, parts.held_out, parts.more, parts.whole)
    if inputs is None:
        raise ValueError(
            "neither batches nor inputs are given; pass inputs=jax.ShapeDtypeStruct((2, 28, 28), "
            "jnp.float32), or an array, to say what the inputs look like"
        )
    example = _as_shapes(inputs if isinstance(inputs, tuple) else (inputs,))
    if not are_continuous(example):
        return Known(example, None, None)
    fit, held_out = drawn_samples(example, _DRAWN, jax.random.fold_in(key, 0))
    return Known(example, fit, held_out)


def _as_shapes(inputs: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """Returns the shapes of inputs, of two samples each: the axis of one sample could be any."""
    described = []
    leaves, structure = jax.tree_util.tree_flatten_with_path(inputs)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = getattr(leaf, "shape", None)
        if shape is None or not hasattr(leaf, "dtype"):
            raise TypeError(f"input {name} is {kind_of(leaf)}; pass an array or ShapeDtypeStruct")
        if not shape:
            raise ValueError(f"input {name} is a scalar; its first axis must be the samples")
        if 0 in shape[1:]:
            raise ValueError(f"input {name} is empty: shape {tuple(shape)}")
        described.append(jax.ShapeDtypeStruct((2, *shape[1:]), leaf.dtype))
    return structure.unflatten(described)


def require_hashable(fn: Any) -> None:
    """Refuses a function that JAX could not keep what it compiles of."""
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"the function, {kind_of(fn)}, cannot be hashed; pass a function of parameters and "
            "inputs, as otf.functional(module) makes of a module"
        ) from None


def usual_repairs(
    fn: Callable[..., Any], model: PyTree, known: Known, symmetry: Symmetry
) -> tuple[AbstractRepair, ...]:
    """Says which repairs are tried unless others are asked for.

    Args:
        fn: The function of the models.
        model: One of them.
        known: The inputs that are looked at.
        symmetry: The symmetry of the models.

    Returns:
        The repairs.
    """
    # A ridge that is best for one kind of noise says nothing of another.
    ridge = _RIDGES if known.are_given else 0.01
    usual: list[AbstractRepair] = [RestoreStatistics()]
    if not cuts_at_zero(jax.make_jaxpr(fn)(model, *known.example)):
        usual.append(LeastSquares(ridge=ridge))
    else:
        # Which units noise switches on says little of those that inputs do.
        if known.are_given or look_like_images(known.example):
            # What is wanted behind a ReLU is in part what the average does: large ridges would look
            # better than they are.
            usual.append(LeastSquares())
        usual.append(LeastSquares(ridge=ridge, at="preactivation"))
    # Models turned by learned rotations agree on what they answer, and on no features.
    if known.are_given and symmetry.with_rotations().rotates:
        usual.append(LeastSquares(ridge=ridge, at="output"))
    return tuple(usual)


def require_repairs(repairs: Any) -> None:
    """Refuses what is no sequence of repairs.

    Args:
        repairs: The repairs.

    Raises:
        TypeError: If something is no repair.
    """
    examples = "a list of instances, as [otf.LeastSquares()]"
    if isinstance(repairs, AbstractRepair) or not isinstance(repairs, Sequence):
        raise TypeError(f"repairs is {kind_of(repairs)}; pass {examples}")
    for number, method in enumerate(repairs):
        require_kind(method, AbstractRepair, f"repair {number}", examples)


def weighed_leaves(
    symmetry: Symmetry,
    models: Sequence[PyTree],
    shares: Array,
    leaf_weight: Callable[[str], Any] | None,
    update: Any,
) -> Callable[[str], Any] | None:
    """Says how much parameters count: unless told, running statistics of batch norm do not.

    Args:
        symmetry: The symmetry of the models.
        models: The parameters of the models.
        shares: How much each of them counts, float `[K]`.
        leaf_weight: How much each parameter counts; None if that was not said.
        update: A step in training mode; None warns if statistics are averaged.

    Returns:
        How much each parameter counts; None counts all alike.

    Raises:
        TypeError: If one of the two is no function.
        ValueError: If there is an update, and nothing to be updated.
    """
    if leaf_weight is not None:
        require_function(leaf_weight, "merge(..., leaf_weight=lambda path: 1.0)")
    without_statistics = counted_by_default(symmetry, models[0])
    if update is None:
        by_leaf = [shares] * len(jax.tree.leaves(models[0]))
        warn_of_averaged_statistics(models, False, by_leaf)
    else:
        require_function(update, "merge(..., update=update), with update(params, batch) to params")
        if without_statistics is None:
            raise ValueError(
                "update is given, and no leaves of the models look like running statistics (see "
                "running_statistics); leave it out, or estimate them by estimate_statistics(..., "
                "leaves=...)"
            )
    return without_statistics if leaf_weight is None else leaf_weight


def require_counts(**counts: Any) -> None:
    """Refuses what are no numbers of steps or points."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} is {count!r}; give a whole number, 0 or more")
