"""Repairing an average with data: its activations made to match those of the models averaged.

The average of aligned networks computes features of less variance than theirs, layer by layer, and
loses accuracy by it. Here the aligned models and their average run side by side over a batch of
inputs, equation by equation. Where the average's features come out of a product with a parameter,
that parameter is corrected, and what follows sees the corrected features. The result has the
architecture of the models: every correction is folded into the weights.

A model that plans merge or split units of computes something else after the move. Then its original
runs beside the others, and it is the features of this one that are moved.

This module has the function and its checks. The pass over the program is in `repair_pass`, what
runs in it in `side_by_side`, what it reads off a product in `product_features`, and the methods are
in `repair_methods`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.average import average, mixture
from otfusion_jax.common.arguments import require_function, require_kind
from otfusion_jax.common.finiteness import not_finite_counts
from otfusion_jax.fusion.repair_methods import AbstractRepair, RestoreStatistics
from otfusion_jax.fusion.repair_pass import RepairPass
from otfusion_jax.fusion.side_by_side import Origin, Value, network_of, require_same_programs
from otfusion_jax.symmetry.checks import (
    require_finite,
    require_model,
    require_models,
    require_symmetry,
)
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import HasPlans, plans_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import check_inputs, interpret, retrace
from otfusion_jax.tracing.programs import Program, as_function


@dataclasses.dataclass(frozen=True)
class Original:
    """A model before it was moved.

    Attributes:
        symmetry: The symmetry that the model was traced with.
        fn: The function of the model, `fn(params, *inputs)`, which differs from that of the average
            in widths alone.
        params: The parameters of the model, a pytree.
        plans: The plans that moved it, or the result of `align`.
    """

    symmetry: Symmetry
    fn: Callable[..., Any]
    params: PyTree
    plans: Plans | HasPlans


def repair(
    symmetry: Symmetry,
    fn: Program,
    models: Sequence[PyTree],
    *inputs: PyTree,
    weights: Sequence[float] | None = None,
    method: AbstractRepair = RestoreStatistics(),
    originals: Sequence[Original | None] | None = None,
) -> PyTree:
    """Averages aligned models and corrects the average on data, without labels.

    Parameters are corrected one after the other in dataflow order, each at its first use. Those
    that take part in no product with features, or are computed from several leaves on the way
    there, are averaged only. Inside of loops and branches nothing is corrected. A network with
    batch norm wants its running statistics estimated anew instead, which needs its training mode.

    Args:
        symmetry: The symmetry that the models were traced with.
        fn: The function that was traced, `fn(params, *inputs)`, or the list of functions and
            inputs.
        models: A list of the K models' parameters, aligned: `[transport(symmetry, plans, a), b]`.
        *inputs: A batch of inputs. All of its features are in memory at once; 1,000 images do.
        weights: The K weights of the models in the average, summing to 1; uniform if None.
        method: The method that corrects a parameter, an instance: `RestoreStatistics()`, or
            `LeastSquares()`, which corrects far more.
        originals: A list that says of each model what it was before the move, or None where that
            computes the same. Soft plans, and plans from one width to another, merge units: what is
            to be matched are then the features of the original, moved along the plans, and for
            statistics the means over the units that were merged.

    Returns:
        The parameters of the repaired average, a pytree of the models' structure and shapes, in the
        dtypes of `average`. Corrections are computed in float32 or wider and rounded once.

    Raises:
        ValueError: If models do not fit the symmetry or are not finite, listing every offender by
            key path; if `fn` and `inputs` give another symmetry; if a batch is empty; if weights do
            not fit; if integers can't be averaged; if an original is of another architecture.
        TypeError: If arguments are in another order or of another type: shapes in place of arrays,
            a class or a name in place of a method, a single original in place of a list.
        FloatingPointError: If features or their squares are out of range, or inputs are not finite.
    """
    require_symmetry(symmetry, "repair(symmetry, fn, models, *inputs)")
    fn, inputs = as_function(fn, inputs)
    require_kind(method, AbstractRepair, "method", "RestoreStatistics() or LeastSquares()")
    require_models(models)
    for number, model in enumerate(models):
        require_model(symmetry, model, f"model {number}")
    check_inputs(inputs)
    checked_originals = _checked_originals(originals, len(models))
    shares = mixture(weights, len(models))
    average_params = average(models, weights)

    # What runs in place of each model: a program is static, parameters and plans are arrays.
    programs, params_and_plans = [], []
    for model, original in zip(models, checked_originals, strict=True):
        if original is None:
            # The model computes what it did before the move, so its features are to be matched.
            programs.append(None)
            params_and_plans.append((symmetry.split(model), {}))
        else:
            programs.append((original.symmetry, original.fn))
            original_params = original.symmetry.split(original.params)
            params_and_plans.append((original_params, plans_of(original.plans)))
    repaired_parts = _repair(
        symmetry,
        fn,
        method,
        tuple(programs),
        symmetry.split(average_params),
        params_and_plans,
        shares,
        inputs,
    )
    try:
        require_finite(symmetry.parts, repaired_parts, "repairing")
    except FloatingPointError:
        # Numbers on the way are to blame only if all were finite that came in.
        _require_finite_inputs(inputs)
        raise
    return symmetry.join(repaired_parts)


def _require_finite_inputs(inputs: tuple[PyTree, ...]) -> None:
    """Refuses inputs that are known not to be finite, naming each of them."""
    names, values = [], []
    for path, value in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        if jnp.issubdtype(jnp.result_type(value), jnp.inexact) and not isinstance(value, Tracer):
            names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
            values.append(value)
    wrong = []
    for name, value, count in zip(names, values, not_finite_counts(values), strict=True):
        if count:
            wrong.append(f"  input {name}: {count} of {np.size(value)} values not finite")
    if wrong:
        raise FloatingPointError(
            "repairing gave values that are not finite, of inputs that are not; leave these "
            "samples out:\n" + "\n".join(wrong)
        )


def _cast_like(expected: Sequence[Array], arrays: Sequence[Array]) -> list[Array]:
    """Returns arrays in the dtypes of others."""
    cast = []
    for array, like in zip(arrays, expected, strict=True):
        # Random keys cannot be cast, and need not be.
        cast.append(array if array.dtype == like.dtype else jnp.asarray(array).astype(like.dtype))
    return cast


def _checked_originals(originals: Any, count: int) -> list[Original | None]:
    """Refuses what is no list of one original, or None, for each of the models."""
    if originals is None:
        return [None] * count
    if not isinstance(originals, Sequence) or isinstance(originals, str):
        raise TypeError(
            f"originals is of type {type(originals).__name__}; pass a list with an Original, or "
            "None, for each model"
        )
    if len(originals) != count:
        raise ValueError(f"{len(originals)} originals were given, but there are {count} models")
    for number, original in enumerate(originals):
        if original is not None:
            require_kind(original, Original, f"original {number}", "an Original, or None")
            require_symmetry(original.symmetry, "Original(symmetry, fn, params, plans)")
            require_function(original.fn, "Original(symmetry, fn, params, plans)")
            require_model(original.symmetry, original.params, f"original {number}")
    return list(originals)


@functools.partial(jax.jit, static_argnames=("symmetry", "fn", "method", "programs"))
def _repair(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    method: AbstractRepair,
    programs: tuple[tuple[Symmetry, Callable[..., Any]] | None, ...],
    average_parts: list[Array],
    params_and_plans: list[tuple[list[Array], Plans]],
    weights: Float[Array, " k"],
    inputs: tuple[PyTree, ...],
) -> list[Array]:
    """Sets up the networks, and goes through the program of the average."""
    average_trace = retrace(symmetry, fn, symmetry.join(average_parts), inputs)
    networks = []
    parts_of_networks = []
    for program, (parts, plans) in zip(programs, params_and_plans, strict=True):
        # One program runs in all: a model of another precision is run in that of the average.
        parts = _cast_like(average_parts, parts)
        parts_of_networks.append(parts)
        # A model of the average's own widths runs the average's program: one trace does for both.
        trace = average_trace
        if program is not None:
            original_symmetry, original_fn = program
            params = original_symmetry.join(parts)
            trace = retrace(original_symmetry, original_fn, params, inputs)
        networks.append(network_of(trace, symmetry, plans))
    networks.append(network_of(average_trace, symmetry, {}))
    require_same_programs(networks)

    # A jaxpr takes the parameters first, as `Symmetry.split` takes them apart, then the inputs.
    arguments = []
    parts_of_networks.append(average_parts)
    for number, arrays in enumerate(zip(*parts_of_networks, strict=True)):
        arguments.append(Value(arrays, origin=Origin(number)))
    for array in jax.tree_util.tree_leaves(inputs):
        arguments.append(Value((array,) * len(networks), is_feature=True))
    # A list of its own: the pass replaces its entries.
    repair_pass = RepairPass(networks, method, weights, list(average_parts))
    interpret(average_trace.jaxpr, arguments, (), repair_pass.step, repair_pass.enter)
    return repair_pass.parameters
