"""Repairing an average with data: its activations made to match those of the models averaged.

The average of aligned networks computes features of less variance than theirs, layer by layer, and
loses accuracy by it. Here the aligned models and their average run side by side over a batch of
inputs, equation by equation. Where the average's features come out of a product with a parameter,
that parameter is corrected, and what follows sees the corrected features. The result has the
architecture of the models: every correction is folded into the weights.

A model that plans merge or split units of computes something else after the move. Then its original
runs beside the others, and it is the features of this one that are moved.

This module has the function and its checks. What is corrected, and in what order, is read off the
program once (`repair_plan`, which makes a `flat_program` of it). The passes over the data are in
`repair_pass`, and the methods in `repair_methods`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from otfusion_jax.averaging.average import average, mixture
from otfusion_jax.common.arguments import checked_count, require_function, require_kind
from otfusion_jax.common.finiteness import not_finite_counts
from otfusion_jax.common.host import Array
from otfusion_jax.common.known import all_known
from otfusion_jax.common.sharding import (
    auto_axes_in_force,
    has_explicit_axes,
    laid_out_like,
    on_auto_axes,
    on_axes_in_force,
)
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.passes import Passes, passes_of
from otfusion_jax.fusion.repair_methods import AbstractRepair, RestoreStatistics
from otfusion_jax.fusion.repair_pass import Prepared, RepairRun
from otfusion_jax.fusion.repair_programs import (
    Aval,
    Programs,
    Settings,
    prepared_for,
    warn_of_what_stays,
)
from otfusion_jax.symmetry.checks import (
    require_finite,
    require_model,
    require_models,
    require_symmetry,
)
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import HasPlans, plans_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.activations import check_inputs
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
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    weights: Sequence[float] | None = None,
    method: AbstractRepair = RestoreStatistics(),
    originals: Sequence[Original | None] | None = None,
    keep_bytes: int = 2**30,
) -> PyTree:
    """Averages aligned models and corrects the average on data, without labels.

    Parameters are corrected in dataflow order, each at its first use. Those that take part in no
    product with features, or are computed from several leaves on the way there, are averaged only.
    In a `scan`, the slices of stacked weights are corrected one by one, and weights that all
    iterations share from the features of all of them; in a `cond`, weights are corrected from the
    samples with which all models take their branch. A `while_loop` is left alone, and so is every
    loop and branch where there are originals. A network with batch norm wants its running
    statistics estimated anew instead, which needs its training mode.

    Args:
        symmetry: The symmetry that the models were traced with.
        fn: The function that was traced, `fn(params, *inputs)`, or the list of functions and
            inputs.
        models: A list of the K models' parameters, aligned: `[transport(symmetry, plans, a), b]`.
        *inputs: A single batch of inputs. What a layer computes of it is in memory at once.
        batches: Any number of batches in place of the one: arrays, or tuples or lists of them for
            functions of several inputs. Each layer, or each set of layers that do not depend on one
            another, takes a pass over all of them. So give a list, anything else that can be gone
            through again, or a function that returns an iterator. A generator can be gone through
            once, and its batches are copied to the memory of the host. Results are those of one
            batch of all samples, up to rounding. Batches of one shape share what is compiled.
        weights: The K weights of the models in the average, summing to 1; uniform if None.
        method: The method that corrects a parameter, an instance: `RestoreStatistics()`, or
            `LeastSquares()`, which corrects far more.
        originals: A list that says of each model what it was before the move, or None where that
            computes the same. Soft plans, and plans from one width to another, merge units: what is
            to be matched are then the features of the original, moved along the plans, and for
            statistics the means over the units that were merged.
        keep_bytes: How many bytes of features may be kept from pass to pass, at least 1. What is
            not kept is computed again. The first batch is kept in any case.

    Returns:
        The parameters of the repaired average, a pytree of the models' structure and shapes, in the
        dtypes of `average`. Corrections are computed in float32 or wider and rounded once. Beside
        models and kept features, memory is one batch's, and the sums of one pass: for each layer
        that it corrects the squared width of what its weights are multiplied by.

    Raises:
        ValueError: If models do not fit the symmetry or are not finite, listing every offender by
            key path, or are on a mesh with explicit axes while something is traced; if `fn` and
            inputs give another symmetry; if there are no batches, or one is empty, or one pass has
            more of them than another; if weights do not fit; if integers can't be averaged; if an
            original is of another architecture.
        TypeError: If arguments are in another order or of another type: shapes in place of arrays,
            a class or a name in place of a method, a single original in place of a list, a single
            array in place of batches, or both inputs and batches.
        FloatingPointError: If features or their squares are out of range, or inputs are not finite.

    Warns:
        RepairWarning: If nothing is corrected, or parameters in a loop or a branch are not, with
            the reason for each parameter.
    """
    require_symmetry(symmetry, "repair(symmetry, fn, models, *inputs)")
    if batches is not None and inputs:
        raise TypeError(f"{len(inputs)} inputs and batches were given; pass one or the other")
    fn, inputs = as_function(fn, inputs)
    require_kind(method, AbstractRepair, "method", "RestoreStatistics() or LeastSquares()")
    keep_bytes = checked_count(keep_bytes, "keep_bytes", "a number of bytes, 1 or more")
    require_models(models)
    for number, model in enumerate(models):
        require_model(symmetry, model, f"model {number}")
    one_pass = Passes([inputs], is_single=True) if batches is None else passes_of(batches)
    checked_originals = _checked_originals(originals, len(models))
    _require_layouts_known(models, checked_originals)
    settings = (method, checked_originals, keep_bytes)
    return repaired(symmetry, fn, models, one_pass, weights, *settings).params


class Repaired(NamedTuple):
    """What comes of a repair.

    Attributes:
        params: The parameters of the repaired average.
        ridges: Where the method chose of several ridges, that of each parameter, by key path; of a
            slice of stacked parameters with its indices.
    """

    params: PyTree
    ridges: dict[str, Array]


def repaired(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    passes: Passes,
    weights: Sequence[float] | None,
    method: AbstractRepair,
    originals: Sequence[Original | None],
    keep_bytes: int,
) -> Repaired:
    """Does what `repair` has checked; see there."""
    shares = mixture(weights, len(models))
    # Where axes are explicit, a trace has no products without devices: there are other equations.
    with auto_axes_in_force():
        networks = on_auto_axes(list(models))
        originals = [original and _on_auto_axes(original) for original in originals]
        average_parts = _arrays(symmetry.split(average(networks, weights)))
        parts_of_networks, plans = _side_by_side(symmetry, networks, originals, average_parts)
        programs = Programs(
            symmetry,
            fn,
            tuple([original and (original.symmetry, original.fn) for original in originals]),
            tuple([bool(own_plans) for own_plans in plans]),
            Aval.of_all(average_parts),
            tuple([Aval.of_all(parts) for parts in parts_of_networks]),
            method,
            Settings.now(),
        )
        run = RepairRun([*parts_of_networks, average_parts], plans, shares, keep_bytes)
        _run_passes(run, programs, passes)
        try:
            require_finite(symmetry.parts, average_parts, "repairing")
        except FloatingPointError:
            # Numbers on the way are to blame only if all were finite that came in.
            _require_finite_inputs(passes)
            raise
    ridges = {}
    for piece, ridge in run.ridges.items():
        indices = "".join([f"[{index}]" for index in piece.indices])
        ridges[symmetry.parts[piece.leaf].path + indices] = ridge
    params = on_axes_in_force(symmetry.join(average_parts))
    return Repaired(laid_out_like(params, models[-1]), ridges)


def _on_auto_axes(original: Original) -> Original:
    params, plans = on_auto_axes((original.params, plans_of(original.plans)))
    return dataclasses.replace(original, params=params, plans=plans)


def _side_by_side(
    symmetry: Symmetry,
    models: Sequence[PyTree],
    originals: Sequence[Original | None],
    average_parts: list[Array],
) -> tuple[list[list[Array]], list[Plans]]:
    """Returns the parameters of what runs beside the average, and the plans of each."""
    parts_of_networks, plans = [], []
    for model, original in zip(models, originals, strict=True):
        # The model computes what it did before the move, so its features are to be matched.
        parts = symmetry.split(model)
        if original is not None:
            parts = original.symmetry.split(original.params)
        # One program runs in all: a model of another precision is run in that of the average.
        parts_of_networks.append(_cast_like(average_parts, _arrays(parts)))
        plans.append({} if original is None else plans_of(original.plans))
    return parts_of_networks, plans


def _run_passes(run: RepairRun, programs: Programs, passes: Passes) -> None:
    """Goes over the batches until every parameter is corrected."""
    known: list[Prepared] = []

    def prepared_batches(is_first: bool) -> Iterator[tuple[Prepared, list[Any]]]:
        for batch in map(on_auto_axes, passes.batches()):
            if is_first:
                check_inputs(batch)
            arrays, structure = jax.tree_util.tree_flatten(batch)
            prepared = prepared_for(programs, Aval.of_all(arrays), structure)
            if not known:
                warn_of_what_stays(prepared, programs)
                known.append(prepared)
            yield prepared, _arrays(arrays)

    first_count = run.run_pass(prepared_batches(is_first=True), 0)
    for stage in range(1, known[0].plan.stages):
        count = run.run_pass(prepared_batches(is_first=False), stage)
        if count != first_count:
            raise ValueError(
                f"the first pass had {first_count} batches and a later one {count}; give what can "
                "be gone through again: a list, or a function that returns an iterator"
            )


def _require_layouts_known(models: Sequence[PyTree], originals: Sequence[Original | None]) -> None:
    """Refuses types that speak of devices: products are looked for in a trace that has no such.

    Of known arrays they can be taken away, see `on_auto_axes`.
    """
    arrays = [*models, *[original.params for original in originals if original is not None]]
    if all_known(arrays) or not any(map(has_explicit_axes, jax.tree_util.tree_leaves(arrays))):
        return
    raise ValueError(
        "a model is on a mesh whose axes are explicit, and repair is called inside of jax.jit or "
        "another transformation, where it cannot be moved to others; call repair outside: it jits "
        "what it computes"
    )


def _require_finite_inputs(passes: Passes) -> None:
    """Refuses inputs that are known not to be finite, naming each of them."""
    wrong = []
    for number, batch in enumerate(map(on_auto_axes, passes.batches())):
        names, values = [], []
        for path, value in jax.tree_util.tree_flatten_with_path(batch)[0]:
            is_number = jnp.issubdtype(jnp.result_type(value), jnp.inexact)
            if is_number and not isinstance(value, Tracer):
                names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
                values.append(value)
        place = "" if passes.is_single else f"batch {number}, "
        for name, value, count in zip(names, values, not_finite_counts(values), strict=True):
            if count:
                size = np.size(value)
                wrong.append(f"  {place}input {name}: {count} of {size} values not finite")
    if wrong:
        raise FloatingPointError(
            "repairing gave values that are not finite, of inputs that are not; leave these "
            "samples out:\n" + "\n".join(wrong)
        )


def _arrays(values: Iterable[Any]) -> list[Array]:
    """Brings values to the device, once for all that is computed with them."""
    return [jnp.asarray(value) for value in values]


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
