"""Repairing an average with data: its activations made to match those of the models averaged.

The average of aligned networks computes features of less variance than theirs, layer by layer, and
loses accuracy by it. Here the aligned models and their average run side by side over a batch of
inputs, equation by equation. Where the average's features come out of a product with a parameter,
that parameter is corrected, and what follows sees the corrected features. The result has the
architecture of the models: every correction is folded into the weights.

A model that plans merge or split units of computes something else after the move. Then its original
runs beside the others, and it is the features of this one that are moved.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Array, Float, PyTree

from otfusion_jax.averaging.average import average, mixture
from otfusion_jax.common.arguments import require_kind
from otfusion_jax.common.scaling import deviation
from otfusion_jax.fusion.repair_methods import (
    AbstractRepair,
    Part,
    Product,
    RestoreStatistics,
    along,
    members_at,
)
from otfusion_jax.symmetry.checks import (
    require_finite,
    require_model,
    require_models,
    require_symmetry,
)
from otfusion_jax.symmetry.correspondence import match_groups, names
from otfusion_jax.symmetry.groups import Group, Member, Plans, Role
from otfusion_jax.symmetry.leaf_structure import leaf_structure_of
from otfusion_jax.symmetry.plans import HasPlans, plans_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import move_blocks, moved_units
from otfusion_jax.tracing.activations import check_inputs, interpret, retrace, samples_of
from otfusion_jax.tracing.jaxprs import body
from otfusion_jax.tracing.programs import Program, as_function
from otfusion_jax.tracing.trace import Trace, View

_PRODUCTS = (P.dot_general_p, P.conv_general_dilated_p)
# What a parameter may go through on its way to a product or a sum: linear, and nothing is mixed.
_ARRANGEMENTS = (
    P.broadcast_in_dim_p,
    P.convert_element_type_p,
    P.copy_p,
    P.reshape_p,
    P.squeeze_p,
    P.transpose_p,
)


@dataclasses.dataclass(frozen=True)
class Original:
    """A model before it was moved.

    Attributes:
        symmetry: of the model.
        fn: its function, which differs from that of the average in widths alone.
        params: its parameters.
        plans: that moved it, or the result of `align`.
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
        symmetry: of the models.
        fn: the function that was traced, `fn(params, *inputs)`, or the list of functions and
            inputs.
        models: K pytrees of parameters, aligned: `[transport(symmetry, plans, a), b]`.
        *inputs: a batch of inputs; all of its features are in memory at once. 1,000 images do.
        weights: K weights, summing to 1; uniform if None.
        method: `RestoreStatistics()`, or `LeastSquares()`, which corrects far more.
        originals: of each model what it was before the move, or None where that computes the same.
            Soft plans, and plans from one width to another, merge units: what is to be matched are
            then the features of the original, moved along the plans, and for statistics the means
            over the units that were merged.

    Returns:
        The parameters of the repaired average.

    Raises:
        ValueError: if models do not fit the symmetry, `fn` and `inputs` give another symmetry, a
            batch is empty, weights do not fit, integers can't be averaged, or an original is of
            another architecture.
        TypeError: for arguments in another order, and shapes in place of arrays.
        FloatingPointError: if features or their squares are out of range.
    """
    require_symmetry(symmetry, "repair(symmetry, fn, models, *inputs)")
    fn, inputs = as_function(fn, inputs)
    require_kind(method, AbstractRepair, "method", "RestoreStatistics() or LeastSquares()")
    require_models(models)
    for number, model in enumerate(models):
        require_model(symmetry, model, f"model {number}")
    check_inputs(inputs)
    befores = [None] * len(models) if originals is None else list(originals)
    if len(befores) != len(models):
        raise ValueError(f"{len(befores)} originals were given, but there are {len(models)} models")
    for number, before in enumerate(befores):
        if before is not None:
            require_kind(before, Original, f"original {number}", "an Original, or None")
            require_symmetry(before.symmetry, "Original(symmetry, fn, params, plans)")
            require_model(before.symmetry, before.params, f"original {number}")
    fused = average(models, weights)
    shares = mixture(weights, len(models))
    static = tuple(before and (before.symmetry, before.fn) for before in befores)
    arrays = [
        (symmetry.split(model), {})
        if before is None
        else (before.symmetry.split(before.params), plans_of(before.plans))
        for model, before in zip(models, befores, strict=True)
    ]
    mine = symmetry.split(fused)
    found = _repair(symmetry, fn, method, static, mine, arrays, shares, inputs)
    require_finite(symmetry.parts, found, "repairing")
    return symmetry.join(found)


Path = tuple[int, ...]


class _Network(NamedTuple):
    """One of the networks that run side by side.

    Attributes:
        program: its equations, and the constants around them, by path.
        views: where its groups are produced, by path.
        plans: that its features are moved along; empty if they are where they belong.
        symmetry: of the average, by the names of this network's groups.
        names: of the average's groups, by the names of this network's.
    """

    program: dict[Path, tuple[core.JaxprEqn, dict[Any, Any]]]
    views: dict[Path, list[tuple[Group, View]]]
    plans: Plans
    symmetry: Symmetry
    names: dict[str, str]


def _network(traced: Trace, symmetry: Symmetry, plans: Plans) -> _Network:
    views: dict[Path, list[tuple[Group, View]]] = {}
    for group in sorted(traced.symmetry.groups, key=lambda g: g.outer is not None):
        for view in traced.produced.get(group.name, ()):
            views.setdefault(view.site.path, []).append((group, view))
    mine = match_groups(traced.symmetry, symmetry)
    return _Network(_program(traced.jaxpr, ()), views, plans, mine, names(mine, symmetry))


def _program(jaxpr: core.ClosedJaxpr, path: Path) -> dict[Path, tuple[core.JaxprEqn, dict]]:
    """Returns the equations of a jaxpr and of the bodies of its calls, by path."""
    constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    found: dict[Path, tuple[core.JaxprEqn, dict]] = {}
    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        found[*path, index] = eqn, constants
        if (inner := body(eqn)) is not None:
            found |= _program(inner, (*path, index))
    return found


def _check_programs(networks: Sequence[_Network]) -> None:
    """Refuses networks that do not do the same thing step by step."""
    *others, mine = ({p: e.primitive for p, (e, _) in n.program.items()} for n in networks)
    for number, other in enumerate(others):
        if other != mine:
            differ = [p for p in mine | other if mine.get(p) is not other.get(p)]
            raise ValueError(
                f"original {number} runs other operations than the function given: "
                f"{other.get(differ[0])} where that one has {mine.get(differ[0])}"
            )


class _Origin(NamedTuple):
    """A value that is one parameter in another arrangement."""

    leaf: int
    arrange: Callable[[Array], Array]


class _Shift(NamedTuple):
    """What is still to be added to the units at a place of features."""

    group: Group
    view: View
    role: Role
    amount: Array


class _Value(NamedTuple):
    """A value in every model and last in the average; `shifts` are still to be added to units."""

    arrays: tuple[Any, ...]
    feature: bool = False
    origin: _Origin | None = None
    shifts: tuple[_Shift, ...] = ()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _repair(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    method: AbstractRepair,
    befores: tuple[tuple[Symmetry, Callable[..., Any]] | None, ...],
    fused: list[Array],
    models: list[tuple[list[Array], Plans]],
    weights: Float[Array, " k"],
    inputs: tuple[PyTree, ...],
) -> list[Array]:
    traced = retrace(symmetry, fn, symmetry.join(fused), inputs)
    networks = []
    for before, (leaves, plans) in zip(befores, models, strict=True):
        found = traced
        if before is not None:
            theirs, function = before
            found = retrace(theirs, function, theirs.join(leaves), inputs)
        networks.append(_network(found, symmetry, plans))
    networks.append(_network(traced, symmetry, {}))
    _check_programs(networks)
    mine = networks[-1]
    corrected = list(fused)
    done: set[int] = set()

    def lifted(path: Path, operands: list[Any]) -> list[_Value]:
        """Constants and literals may differ from network to network, as means divide by widths."""
        values = []
        for position, x in enumerate(operands):
            if not isinstance(x, _Value):
                x = _Value(tuple(_constant(n, path, position, x) for n in networks))
            values.append(x)
        return values

    def step(eqn: core.JaxprEqn, path: Path, operands: list[Any]) -> list[Any]:
        values = [_current(v) for v in lifted(path, operands)]
        if eqn.primitive in _PRODUCTS:
            pair = sorted(values, key=lambda v: v.feature)
            if pair[1].feature and pair[0].origin and pair[0].origin.leaf not in done:
                return [correct(eqn, path, values)]
        if eqn.primitive is P.add_p:
            for value, other in (values, values[::-1]):
                if value.shifts and other.origin and other.origin.leaf not in done:
                    add_shifts(other.origin.leaf, value.shifts)
                    values = [_current(v) for v in values]
        if eqn.primitive not in _ARRANGEMENTS:
            done.update(v.origin.leaf for v in values if v.origin)
        return _bind([n.program[path][0] for n in networks], values)

    def _current(value: _Value) -> _Value:
        """The same value, of the average's parameters as they are by now."""
        if value.origin is None or value.origin.leaf not in done:
            return value
        latest = value.origin.arrange(corrected[value.origin.leaf])
        return value._replace(arrays=(*value.arrays[:-1], latest))

    def add_shifts(leaf: int, shifts: tuple[_Shift, ...]) -> None:
        for group, view, role, amount in shifts:
            for member in members_at(group, leaf, role, view.location.index):
                corrected[leaf] = along(jnp.add, corrected[leaf], member, group, amount)
        done.add(leaf)

    def correct(eqn: core.JaxprEqn, path: Path, values: list[_Value]) -> _Value:
        position = int(values[0].feature)
        origin = values[position].origin
        assert origin is not None

        def compute(leaf: Array) -> Array:
            operands = [v.arrays[-1] for v in values]
            operands[position] = origin.arrange(leaf)
            return eqn.primitive.bind(*operands, **eqn.params)

        gram = _row_gram(eqn, values, position)

        def normal(leaf: Array) -> Array:
            if gram is None:
                return jax.linear_transpose(compute, leaf)(compute(leaf))[0]
            return jax.linear_transpose(origin.arrange, leaf)(gram(origin.arrange(leaf)))[0]

        found = []
        for k, network in enumerate(networks[:-1]):
            theirs = network.program[path][0]
            operands = [v.arrays[k] for v in values]
            found.append(theirs.primitive.bind(*operands, **theirs.params))
        views = mine.views.get(path, [])
        roles: list[Role] = [_role(group, view, origin.leaf) for group, view in views]
        pairs = list(zip(networks, found, strict=False))
        chosen = _innermost(views)
        parts = []
        for i in chosen:
            (group, view), role = views[i], roles[i]
            parts.append(
                Part(
                    group,
                    functools.partial(samples_of, view=view, group=group),
                    tuple(_statistics(network, path, i, roles, y) for network, y in pairs),
                    members_at(group, origin.leaf, role, view.location.index),
                )
            )
        product = Product(
            corrected[origin.leaf],
            compute,
            normal,
            tuple(_moved(network, mine, path, roles, y) for network, y in pairs),
            weights,
            tuple(parts),
        )
        corrected[origin.leaf], found_shifts = method.correct(product)
        done.add(origin.leaf)
        pending = tuple(
            _Shift(views[i][0], views[i][1], roles[i], shift)
            for i, shift in zip(chosen, found_shifts, strict=True)
            if shift is not None
        )
        return _Value((*found, compute(corrected[origin.leaf])), True, None, pending)

    columns = zip(*(leaves for leaves, _ in models), fused, strict=True)
    arguments = [_Value(x, origin=_Origin(i, _same)) for i, x in enumerate(columns)]
    count = len(networks)
    arguments += [_Value((x,) * count, feature=True) for x in jax.tree_util.tree_leaves(inputs)]
    interpret(traced.jaxpr, arguments, (), step, lifted)
    return corrected


def _constant(network: _Network, path: Path, position: int, value: Any) -> Any:
    """Returns an operand that is a constant, as it is in this network."""
    eqn, constants = network.program[path]
    atom = eqn.invars[position]
    return atom.val if isinstance(atom, core.Literal) else constants.get(atom, value)


def _role(group: Group, view: View, leaf: int) -> Role:
    """Returns the role of features that come out of a product with a parameter.

    They have that of the parameter's axis that they lie along: what is contracted with features
    that push forward is pulled back, as keys are that meet queries.
    """
    mine = [m for m in group.members if m.leaf == leaf]
    same = [m for m in mine if m.location.index == view.location.index] or mine
    return "consumes" if {m.role for m in same} == {"consumes"} else "produces"


def _innermost(views: list[tuple[Group, View]]) -> list[int]:
    """Chooses views that share no features: of heads and of the units in them, the latter."""
    positions = [
        (view.location.axis, set(view.location.index.positions(group.size).flat))
        for group, view in views
    ]
    return [
        i
        for i, (axis, mine) in enumerate(positions)
        if not any(axis != other or mine & theirs for other, theirs in positions[i + 1 :])
    ]


def _moved(
    network: _Network, mine: _Network, path: Path, roles: Sequence[Role], features: Array
) -> Array:
    """Moves the features at a site to where they are in the average."""
    if not network.plans or path not in network.views:
        return features
    places = {(g.name, i): v for i, (g, v) in enumerate(mine.views[path])}
    here, there = [], []
    for i, ((group, view), role) in enumerate(zip(network.views[path], roles, strict=True)):
        target = places[network.names[group.name], i]
        here.append((group, Member(0, "", view.location, role)))
        there.append((network.symmetry[group.name], Member(0, "", target.location, role)))
    form: Any = mine.program[path][0].outvars[0].aval
    cells = move_blocks(leaf_structure_of(features.shape, here), network.plans, features)
    return leaf_structure_of(form.shape, there).partition.join(cells)


def _statistics(
    network: _Network, path: Path, number: int, roles: Sequence[Role], features: Array
) -> tuple[Array, Array]:
    """Returns the means and deviations of the units of one of the views at a site."""
    group, view = network.views[path][number]
    around: list[Role] = [
        role
        for (other, place), role in zip(network.views[path], roles, strict=True)
        if other.name == group.outer and place.location.index == view.location.batch[-1][2]
    ]
    above: Role = around[-1] if around else "produces"
    units = samples_of(features, view, group)
    found = jnp.mean(units, axis=-2), deviation(units, axis=-2)
    mean, spread = (moved_units(group, network.plans, x, roles[number], above) for x in found)
    return mean, spread


def _row_gram(
    eqn: core.JaxprEqn, values: list[_Value], position: int
) -> Callable[[Array], Array] | None:
    """A matrix product followed by its transpose, by inner products of the average's features.

    They are taken once, and then each application costs as much as the features are wide, however
    many samples there are.

    Args:
        eqn: the product.
        values: its operands.
        position: of the parameter among them.

    Returns:
        From a parameter, as it enters the product, to one of the same shape. None for convolutions
        and batched products, and if there are fewer samples than the features are wide.
    """
    if eqn.primitive is not P.dot_general_p:
        return None
    contracted, batch = eqn.params["dimension_numbers"]
    features = values[1 - position].arrays[-1]
    pairs = sorted(zip(contracted[1 - position], contracted[position], strict=True))
    mine, theirs = tuple(i for i, _ in pairs), tuple(j for _, j in pairs)
    free = tuple(i for i in range(features.ndim) if i not in mine)
    width = math.prod(features.shape[i] for i in mine)
    if batch[0] or width > features.size // width:
        return None
    product = functools.partial(jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST)
    gram = product(features, features, ((free, free), ((), ())))
    count = len(mine)

    def apply(parameter: Array) -> Array:
        dims = ((tuple(range(count, 2 * count)), theirs), ((), ()))
        return jnp.moveaxis(product(gram, parameter.astype(gram.dtype), dims), range(count), theirs)

    return apply


def _same(x: Array) -> Array:
    return x


def _bind(eqns: list[core.JaxprEqn], values: list[_Value]) -> list[_Value]:
    """Evaluates an equation in every model."""
    eqn = eqns[-1]
    results = []
    for k, theirs in enumerate(eqns):
        bound = theirs.primitive.bind(*(v.arrays[k] for v in values), **theirs.params)
        results.append(bound if eqn.primitive.multiple_results else [bound])
    feature = any(v.feature for v in values)
    origin, shifts = None, ()
    if eqn.primitive in _ARRANGEMENTS and len(values) == 1:
        shifts = values[0].shifts if eqn.primitive is P.convert_element_type_p else ()
        if values[0].origin is not None:
            leaf, before = values[0].origin

            def arrange(x: Array) -> Array:
                return eqn.primitive.bind(before(x), **eqn.params)

            origin = _Origin(leaf, arrange)
    return [_Value(arrays, feature, origin, shifts) for arrays in zip(*results, strict=True)]
