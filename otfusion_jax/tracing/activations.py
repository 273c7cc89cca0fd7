"""The activations of each group, read off the jaxpr that the symmetry was read from.

No hooks and no surgery on the model: the traced function is evaluated equation by equation on real
inputs, and the arrays at the sites where a group's features can be read are kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Array, Float

from otfusion_jax.common.arguments import require_arrays, require_batches
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_model, require_symmetry
from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.units import units_of
from otfusion_jax.tracing.jaxprs import body, evaluated, scan_operands
from otfusion_jax.tracing.misuse import find_foreign_input, require_params_first
from otfusion_jax.tracing.positions import OnTies
from otfusion_jax.tracing.primitives import DERIVED_BY_RULE
from otfusion_jax.tracing.programs import Program, as_function
from otfusion_jax.tracing.records import Site
from otfusion_jax.tracing.trace import Trace, trace
from otfusion_jax.tracing.views import View

At = Literal["preactivation", "activation"]
"""Where features are read: before bias and nonlinearity, or after."""

Path = tuple[int, ...]
"""The indices of the calls and scans that a jaxpr lies in, outermost first; of an equation its
index in the jaxpr last."""

_CALL = "features(symmetry, fn, params, *inputs)"


def features(
    symmetry: Symmetry,
    fn: Program,
    params: PyTree,
    *inputs: PyTree,
    at: At = "preactivation",
) -> dict[str, Float[Array, "*batch samples units"]]:
    """Evaluates a network and returns the activations of every group.

    Args:
        symmetry: The symmetry that was traced with this function.
        fn: The function that was traced, `fn(params, *inputs)`, or the list of functions and
            inputs.
        params: The parameters, arrays.
        *inputs: A batch of inputs, arrays.
        at: `"preactivation"`: as a contraction puts them out, before bias and nonlinearity, as in
            Algorithm 1; `"activation"`: as the next contraction takes them up, after both.

    Returns:
        For each group `[samples, units]`, of nested groups `[*batch, samples, units]`. All other
        axes (inputs, space, tokens) count as samples; a group with several such sites (a residual
        stream) has the samples of all of them, in dataflow order. Groups that no input reaches have
        no samples, and neither have those that appear only in branches and in while loops.

    Raises:
        ValueError: If `fn` and `inputs` give another symmetry, a batch is empty, or the parameters
            do not fit.
        TypeError: For arguments in another order or of a wrong kind, and shapes in place of arrays.
    """
    function, inputs = checked_program(symmetry, fn, params, inputs, at)
    return _features(symmetry, function, at, params, inputs)


def checked_program(
    symmetry: Symmetry, fn: Program, params: PyTree, inputs: tuple[PyTree, ...], at: At
) -> tuple[Callable[..., Any], tuple[PyTree, ...]]:
    """Checks the arguments of `features`.

    Args:
        symmetry: The symmetry that was traced with this function.
        fn: The function that was traced, or the list of functions and inputs.
        params: The parameters.
        inputs: The inputs; none if they come with the functions.
        at: Where features are read.

    Returns:
        The program as one function, and its inputs.

    Raises:
        ValueError: As `features`, but for functions of another symmetry.
        TypeError: As `features`.
    """
    if at not in ("preactivation", "activation"):
        raise ValueError(f"at is {at!r}; it must be 'preactivation' or 'activation'")
    require_symmetry(symmetry, _CALL)
    function, inputs = as_function(fn, inputs)
    require_params_first(symmetry, params, inputs, _CALL)
    require_model(symmetry, params)
    check_inputs(inputs)
    return function, inputs


@functools.partial(jax.jit, static_argnames=("symmetry", "fn", "at"))
def _features(
    symmetry: Symmetry, fn: Callable[..., Any], at: At, params: PyTree, inputs: tuple[PyTree, ...]
) -> dict[str, Array]:
    """Evaluates the traced program; `features` has checked the arguments."""
    traced = retrace(symmetry, fn, params, inputs)
    views = views_at(traced, at)
    arguments = [*symmetry.split(params), *jax.tree_util.tree_leaves(inputs)]
    _, arrays = record(traced, views, arguments, {})
    return by_group(symmetry, views, arrays)


def views_at(traced: Trace, at: At) -> dict[str, tuple[View, ...]]:
    """Returns where the features of each group can be read.

    Args:
        traced: The trace of the network.
        at: Where to read them, see `features`.

    Returns:
        The views of each group, in dataflow order; groups that no input reaches have none.
    """
    return traced.preactivations if at == "preactivation" else traced.activations


def record(
    traced: Trace,
    views: dict[str, tuple[View, ...]],
    arguments: list[Any],
    probes: dict[Site, Array],
    by_rules: bool = False,
) -> tuple[list[Any], dict[Site, Array]]:
    """Evaluates a traced program, and keeps the arrays at the sites of some views.

    Args:
        traced: The trace of the program.
        views: The views of each group.
        arguments: The arguments of the jaxpr.
        probes: Arrays that are added at some of these sites. The derivative by one of them is what
            the results owe to what is read there, by nothing but the equation that reads it.
        by_rules: Whether a function with a derivative of its own (`jax.custom_jvp`,
            `jax.custom_vjp`) keeps it, unless a site lies inside of it. A rule that looks at traced
            values besides its arguments can't be kept: to derive the results is then an error.

    Returns:
        The results, and the arrays at the sites.
    """
    sites = set()
    for views_of_group in views.values():
        for view in views_of_group:
            sites.add(view.site)
    wanted: dict[Path, list[Site]] = {}
    for site in sorted(sites):
        wanted.setdefault(site.path, []).append(site)
    around: set[Path] = set()
    for path in wanted:
        for length in range(1, len(path)):
            around.add(path[:length])
    recorder = _Recorder(wanted, around, by_rules, probes, {})
    results = recorder.evaluate(traced.jaxpr, arguments, ())
    return results, recorder.arrays


def by_group(
    symmetry: Symmetry, views: dict[str, tuple[View, ...]], arrays: dict[Site, Array]
) -> dict[str, Float[Array, "*batch samples units"]]:
    """Brings what was read at sites into the order of the groups' units.

    Args:
        symmetry: The symmetry of the program.
        views: The views of each group.
        arrays: The arrays at the sites of these views.

    Returns:
        The features of each group, as `features` returns them.
    """
    activations = {}
    for group in symmetry.groups:
        samples = []
        for view in views.get(group.name, ()):
            samples.append(samples_of(arrays[view.site], view, group))
        if not samples:
            # No input reaches the group.
            samples.append(jnp.zeros((*group.batch, 0, group.size)))
        activations[group.name] = jnp.concatenate(samples, axis=-2)
    return activations


@dataclasses.dataclass(frozen=True)
class _Recorder:
    """Evaluates a jaxpr, and keeps the arrays at some sites.

    Attributes:
        wanted: The sites by the path of their equation.
        around: The paths of the scans and calls that these lie in.
        by_rules: Whether functions keep derivatives of their own.
        probes: What is added at some of these sites.
        arrays: The arrays that have been met at these sites; filled by `evaluate`.
    """

    wanted: dict[Path, list[Site]]
    around: set[Path]
    by_rules: bool
    probes: dict[Site, Array]
    arrays: dict[Site, Array]

    def evaluate(self, jaxpr: core.ClosedJaxpr, args: list[Any], path: Path) -> list[Any]:
        """Evaluates a jaxpr, equation by equation.

        Args:
            jaxpr: The jaxpr.
            args: Its arguments.
            path: The path of the jaxpr; `()` for the outermost.

        Returns:
            The results.
        """
        env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        env.update(zip(jaxpr.jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.jaxpr.eqns):
            results = self._equation(eqn, (*path, index), list(map(read, eqn.invars)))
            env.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, jaxpr.jaxpr.outvars))

    def _equation(self, eqn: core.JaxprEqn, path: Path, operands: list[Any]) -> list[Any]:
        operands = self._read("in", path, operands)
        inner = body(eqn)
        is_around = path in self.around
        keeps_rule = self.by_rules and eqn.primitive in DERIVED_BY_RULE and not is_around
        if inner is not None and not keeps_rule:
            results = self.evaluate(inner, operands, path)
        elif eqn.primitive is P.scan_p and is_around:
            results = self._scan(eqn, path, operands)
        else:
            # A scan in which nothing is wanted is evaluated in one piece.
            results = evaluated(eqn, operands)
        return self._read("out", path, results)

    def _read(self, side: Literal["in", "out"], path: Path, values: list[Any]) -> list[Any]:
        """Keeps the operands or the results that are wanted, and returns all, with their probes."""
        values = list(values)
        for site in self.wanted.get(path, ()):
            if site.side != side:
                continue
            if site in self.probes:
                values[site.position] = values[site.position] + self.probes[site]
            self.arrays[site] = values[site.position]
        return values

    def _scan(self, eqn: core.JaxprEqn, path: Path, operands: list[Any]) -> list[Any]:
        """Evaluates a scan, and keeps arrays of each iteration, stacked along a new first axis."""
        consts, init, xs = scan_operands(eqn, operands)
        probes = {}
        for site, probe in self.probes.items():
            if _is_within(site.path, path):
                probes[site] = probe

        def step(carry: list[Any], slices: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
            # What is traced inside of a loop must leave it as a result, so the body has a recorder
            # of its own.
            of_iteration, probes_of_iteration = slices
            inside = dataclasses.replace(self, probes=probes_of_iteration, arrays={})
            arguments = [*consts, *carry, *of_iteration]
            results = inside.evaluate(eqn.params["jaxpr"], arguments, path)
            return results[: len(init)], (results[len(init) :], inside.arrays)

        carry, (results, stacked) = jax.lax.scan(
            step,
            init,
            (xs, probes),
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        # The arrays of a scan within this one have its axis in front. This scan's comes before it,
        # which is the order that `Site` promises.
        self.arrays.update(stacked)
        return [*carry, *results]


def _is_within(path: Path, outer: Path) -> bool:
    """Whether an equation lies inside of that at a path."""
    return len(path) > len(outer) and path[: len(outer)] == outer


def retrace(
    symmetry: Symmetry, fn: Callable[..., Any], params: PyTree, inputs: tuple[PyTree, ...]
) -> Trace:
    """Traces a function whose symmetry is known, to get at its jaxpr.

    Args:
        symmetry: The symmetry that the function is supposed to have.
        fn: The function.
        params: Its parameters.
        inputs: Its inputs.

    Returns:
        The trace, with rotations if the symmetry has them.

    Raises:
        ValueError: If this function on these inputs has another symmetry.
    """
    others: list[Symmetry] = []
    # A symmetry does not tell whether ties were ignored.
    for on_ties in get_args(OnTies):
        # Whoever has it may have pinned on demand, too, which gives the same groups then.
        traced = trace(fn, params, *inputs, on_unsupported="pin", on_ties=on_ties)
        found = traced.symmetry.as_free_as(symmetry)
        if found.groups == symmetry.groups:
            return dataclasses.replace(traced, symmetry=found)
        others.append(found)
    raise ValueError(
        "this function on these inputs has other groups than the symmetry given; trace it "
        f"again.\nGiven:\n{symmetry}\nFound:\n{others[0]}"
    )


def samples_of(array: Array, view: View, group: Group) -> Float[Array, "*batch samples units"]:
    """Brings the units to the last axis; everything else becomes samples.

    Args:
        array: The features at the site of the view.
        view: The positions of the units in the array.
        group: The group of the units.

    Returns:
        The features by unit.
    """
    return jnp.swapaxes(units_of(array, view.location, group), -1, -2)


def check_inputs(inputs: tuple[PyTree, ...]) -> None:
    """Refuses empty batches, and what is no array.

    Args:
        inputs: The inputs of a function.

    Raises:
        ValueError: If an array among them is empty.
        TypeError: If there are shapes, or anything else, in place of arrays.
    """
    require_arrays(inputs, "inputs")
    foreign = find_foreign_input(inputs)
    if foreign is not None:
        raise TypeError(foreign)
    require_samples(inputs)


def require_samples(inputs: tuple[PyTree, ...]) -> None:
    """Refuses empty batches, of which nothing can be learned.

    Args:
        inputs: The inputs of a function.

    Raises:
        ValueError: If an array among them is empty.
    """
    leaves_with_paths, _ = jax.tree_util.tree_flatten_with_path(inputs)
    for path, value in leaves_with_paths:
        # What is no array is refused elsewhere, in words of its own.
        if isinstance(value, jax.Array | np.ndarray) and 0 in value.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"input {name} is empty: shape {value.shape}; pass some samples")


def batches_of(batches: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    """Yields every batch as a tuple of inputs.

    Args:
        batches: Arrays, or tuples or lists of arrays for functions of several inputs. A loader of
            PyTorch puts the inputs of a batch into a list.

    Yields:
        The inputs of a batch.

    Raises:
        ValueError: If there are no batches.
        TypeError: If a single array or a dict is given.
    """
    require_batches(batches)
    # A generator says that it is empty only when it has been gone through.
    is_empty = True
    for batch in batches:
        is_empty = False
        yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if is_empty:
        raise ValueError("no batches of inputs were given; features need at least one")


def refuse_inputs_of_one_batch(batches: Any) -> None:
    """Refuses a tuple of arrays: in place of a list of batches it is most likely one batch.

    Each input would be taken for a batch of its own.

    Args:
        batches: The argument that was given.

    Raises:
        TypeError: If it is a tuple with an array.
    """
    if not isinstance(batches, tuple):
        return
    for batch in batches:
        if isinstance(batch, jax.Array | np.ndarray):
            raise TypeError(
                f"batches is a tuple of {len(batches)}, of arrays, which may be one batch of "
                "several inputs or several batches of one input; pass [(x, y)] for one batch of "
                "two inputs, and [x, y] for two batches of one input"
            )
