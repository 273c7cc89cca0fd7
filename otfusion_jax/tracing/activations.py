"""The same walk, evaluated: the activations of each group, read off the jaxpr.

No hooks and no surgery on the model: the traced function is run equation by equation on real
inputs, and the arrays at the places where a group's units are produced or consumed are kept.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Array, Float, PyTree

from otfusion_jax.common.arguments import require_arrays, require_batches
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.units import units_of
from otfusion_jax.tracing.context import Site
from otfusion_jax.tracing.jaxprs import body, scan_operands
from otfusion_jax.tracing.programs import Program, as_function
from otfusion_jax.tracing.trace import Trace, View, trace

At = Literal["preactivation", "activation"]
Step = Callable[[core.JaxprEqn, tuple[int, ...], list[Any]], list[Any]]
"""From an equation, its path and its operands to its results."""


def features(
    symmetry: Symmetry,
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    at: At = "preactivation",
) -> dict[str, Float[Array, "*batch samples units"]]:
    """Evaluates a network and returns the activations of every group.

    Args:
        symmetry: of this function.
        fn: the function that was traced, `fn(params, *inputs)`, or the list of functions and
            inputs.
        params: its parameters.
        *inputs: a batch of inputs.
        at: `"preactivation"`: as a contraction puts them out, before bias and nonlinearity, as in
            Algorithm 1; `"activation"`: as the next contraction takes them up, after both.

    Returns:
        For each group `[samples, units]`, of nested groups `[*batch, samples, units]`. All other
        axes (inputs, space, tokens) count as samples; a group with several such places (a residual
        stream) has the samples of all of them, in dataflow order. Groups that no input reaches have
        no samples, and neither have those that appear only in branches and in while loops.

    Raises:
        ValueError: if `fn` and `inputs` give another symmetry, a batch is empty, or the parameters
            do not fit.
        TypeError: for arguments in another order, and shapes in place of arrays.
    """
    if at not in ("preactivation", "activation"):
        raise ValueError(f"at is {at!r}; it must be 'produced' or 'consumed'")
    require_symmetry(symmetry, "features(symmetry, fn, params, *inputs)")
    fn, inputs = as_function(fn, inputs)
    require_model(symmetry, params)
    check_inputs(inputs)
    return _features(symmetry, fn, at, params, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(
    symmetry: Symmetry, fn: Callable[..., Any], at: At, params: PyTree, inputs: tuple[PyTree, ...]
) -> dict[str, Array]:
    traced = retrace(symmetry, fn, params, inputs)
    views = traced.produced if at == "preactivation" else traced.consumed
    sites = {view.site for found in views.values() for view in found}
    arrays: dict[Site, Array] = {}
    wanted: dict[tuple[int, ...], list[Site]] = {}
    for site in sites:
        wanted.setdefault(site.path, []).append(site)

    interpret(
        traced.jaxpr,
        [*symmetry.split(params), *jax.tree_util.tree_leaves(inputs)],
        (),
        _keeping(wanted, arrays),
    )
    return {
        g.name: jnp.concatenate(
            [samples_of(arrays[v.site], v, g) for v in views.get(g.name, ())]
            or [jnp.zeros((*g.batch, 0, g.size))],
            axis=-2,
        )
        for g in symmetry.groups
    }


def _keeping(wanted: dict[tuple[int, ...], list[Site]], arrays: dict[Site, Array]) -> Step:
    """Returns a step of `interpret` that evaluates, and keeps what is wanted in `arrays`."""

    def step(eqn: core.JaxprEqn, path: tuple[int, ...], operands: list[Any]) -> list[Any]:
        if eqn.primitive is P.scan_p and any(found[: len(path)] == path for found in wanted):
            results, inside = _scanned(eqn, path, operands, wanted)
            arrays.update(inside)
        else:
            bound = eqn.primitive.bind(*operands, **eqn.params)
            results = bound if eqn.primitive.multiple_results else [bound]
        for site in wanted.get(path, ()):
            arrays[site] = (operands if site.side == "in" else results)[site.position]
        return results

    return step


def _scanned(
    eqn: core.JaxprEqn,
    path: tuple[int, ...],
    operands: list[Any],
    wanted: dict[tuple[int, ...], list[Site]],
) -> tuple[list[Any], dict[Site, Array]]:
    """Runs a scan and keeps what is wanted of each iteration, stacked along a new first axis."""
    fixed, init, stacked = scan_operands(eqn, operands)
    count = len(init)

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], tuple[list[Any], Any]]:
        kept: dict[Site, Array] = {}
        arguments = [*fixed, *carry, *slices]
        results = interpret(eqn.params["jaxpr"], arguments, path, _keeping(wanted, kept))
        return results[:count], (results[count:], kept)

    how = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, (results, kept) = jax.lax.scan(body, init, stacked, **how)
    return [*carry, *results], kept


def check_inputs(inputs: tuple[PyTree, ...]) -> None:
    """Refuses empty batches.

    Args:
        inputs: the inputs of a function.

    Raises:
        ValueError: if an array among them is empty.
        TypeError: for shapes in place of arrays.
    """
    require_arrays(inputs, "inputs")
    for path, value in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        if 0 in np.shape(value):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"input {name} is empty: shape {np.shape(value)}; pass some samples")


def retrace(
    symmetry: Symmetry, fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> Trace:
    """Traces a function whose symmetry is known, to get at its jaxpr.

    Args:
        symmetry: of this function.
        fn: the function.
        params: its parameters.
        inputs: its inputs.

    Returns:
        The trace.

    Raises:
        ValueError: if the symmetry is not that of this function on these inputs.
    """
    traced = trace(fn, params, *inputs, on_unsupported="pin")
    if traced.symmetry.groups != symmetry.groups:
        raise ValueError(
            "this function on these inputs has other groups than the symmetry given; trace it "
            f"again.\nGiven:\n{symmetry}\nFound:\n{traced.symmetry}"
        )
    return traced


def samples_of(array: Array, view: View, group: Group) -> Float[Array, "*batch samples units"]:
    """Brings the units to the last axis; everything else becomes samples.

    Args:
        array: features at the site of the view.
        view: where the units are among its axes.
        group: whose units.

    Returns:
        The features by unit.
    """
    return jnp.swapaxes(units_of(array, view.location, group), -1, -2)


def interpret(
    jaxpr: core.ClosedJaxpr,
    args: list[Any],
    path: tuple[int, ...],
    step: Step,
    enter: Callable[[tuple[int, ...], list[Any]], list[Any]] | None = None,
) -> list[Any]:
    """Goes through a jaxpr and the bodies of its calls, equation by equation.

    Args:
        jaxpr: what to run.
        args: its arguments, of any type that `step` understands.
        path: where the jaxpr lies: indices of the calls around it.
        step: evaluates an equation. Constants come to it as they are in the jaxpr.
        enter: from the path and the operands of a call to what its body is run on.

    Returns:
        The results.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env.update(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        here = (*path, index)
        operands = [read(v) for v in eqn.invars]
        inner = body(eqn)
        if inner is not None:
            operands = operands if enter is None else enter(here, operands)
            results = interpret(inner, operands, here, step, enter)
        else:
            results = step(eqn, here, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def batches_of(batches: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    """Yields every batch as a tuple of inputs.

    Args:
        batches: arrays, or tuples of arrays for functions of several inputs.

    Yields:
        Tuples.

    Raises:
        ValueError: if there are none.
        TypeError: for a single array, and for a dict.
    """
    require_batches(batches)
    empty = True
    for batch in batches:
        empty = False
        yield batch if isinstance(batch, tuple) else (batch,)
    if empty:
        raise ValueError("no batches of inputs were given; features need at least one")
