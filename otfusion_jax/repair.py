"""Repairing an average with data: its activations made to match those of the models averaged.

The average of aligned networks computes features of less variance than theirs, layer by layer, and
loses accuracy by it. Here the aligned models and their average run side by side over a batch of
inputs, equation by equation. Where the average's features come out of a product with a parameter,
that parameter is corrected, and what follows sees the corrected features. The result has the
architecture of the models: every correction is folded into the weights.
"""

import abc
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

from otfusion_jax.features import check_inputs, interpret, retrace, samples_of
from otfusion_jax.fuse import average, mixture
from otfusion_jax.symmetry import Group, Member, Symmetry
from otfusion_jax.trace import View
from otfusion_jax.units import units_of, with_units

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


class Product(NamedTuple):
    """A product of features with a parameter, in all models and in their average.

    Attributes:
        leaf: the parameter of the average.
        compute: from such a parameter to the average's features, linear.
        normal: the same, followed by its transpose.
        found: the features of each model, K arrays of one shape.
        weights: of the models, float `[K]`.
        units: brings features to `[*batch, samples, units]`; None if they belong to no group.
        group: whose units they are.
        along: the axes of the parameter that produce these units.
    """

    leaf: Array
    compute: Callable[[Array], Array]
    normal: Callable[[Array], Array]
    found: tuple[Array, ...]
    weights: Float[Array, " k"]
    units: Callable[[Array], Array] | None
    group: Group | None
    along: tuple[Member, ...]


class AbstractRepair(abc.ABC):
    """How a parameter of the average is corrected. Subclasses are frozen, hashable dataclasses."""

    @abc.abstractmethod
    def correct(self, product: Product) -> tuple[Array, Float[Array, "*batch units"] | None]:
        """Corrects one parameter. Traced: called under `jax.jit`.

        Args:
            product: where the parameter is used.

        Returns:
            The parameter, and what is to be added to each unit by a bias, if there is one.
        """


@dataclasses.dataclass(frozen=True)
class RestoreStatistics(AbstractRepair):
    """REPAIR: gives every unit the mean and the deviation that it has in the models, on average.

    Units are scaled by the parameter that produces them and shifted by the bias that follows. In a
    network without biases they are scaled alone. Outputs of the network are left alone.

    References:
        Jordan, Sedghi, Saukh, Entezari and Neyshabur, REPAIR, ICLR 2023, section 4.
    """

    def correct(self, product: Product) -> tuple[Array, Array | None]:
        """See `AbstractRepair.correct`."""
        if product.units is None or product.group is None or not product.along:
            return product.leaf, None
        ours = product.units(product.compute(product.leaf))
        theirs = [product.units(y) for y in product.found]
        deviations, means = (
            jnp.tensordot(product.weights, jnp.stack([f(y, axis=-2) for y in theirs]), axes=1)
            for f in (jnp.std, jnp.mean)
        )
        deviation = jnp.std(ours, axis=-2)
        scale = jnp.where(deviation > 0, deviations / jnp.where(deviation > 0, deviation, 1), 1)
        leaf = product.leaf
        for member in product.along:
            leaf = _along(jnp.multiply, leaf, member, product.group, scale)
        return leaf, means - scale * jnp.mean(ours, axis=-2)


@dataclasses.dataclass(frozen=True)
class LeastSquares(AbstractRepair):
    """Gives every product the features that the models have on average, in the least squares.

    The parameter is the one that comes closest to the mean of the models' features from the
    features that the average itself has there, with a penalty on the distance from the average. The
    outputs of the network are products too: they come close to the models' mean. Solved by
    conjugate gradients, so that neither shapes nor layouts matter. Layer by layer it is the
    regression of Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models
    (RegMean), ICLR 2023, on the features of the merged model instead of those of each parent.

    Attributes:
        ridge: the penalty, in units of the mean eigenvalue of the features' inner products.
        steps: of conjugate gradients; to stop early is a penalty too.
    """

    ridge: float = 0.01
    steps: int = 20

    def __post_init__(self):
        if self.ridge < 0 or self.steps < 1:
            raise ValueError(
                f"ridge is {self.ridge} and steps {self.steps}; they must be at least 0 and 1"
            )

    def correct(self, product: Product) -> tuple[Array, Array | None]:
        """See `AbstractRepair.correct`."""
        leaf, compute = product.leaf, product.compute
        # The squared length of the features of random weights is the trace, on average.
        random = jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype)
        penalty = self.ridge * _inner(compute(random)) / _inner(random)

        def normal(x: Array) -> Array:
            return product.normal(x) + penalty * x

        target = sum(w * y for w, y in zip(product.weights, product.found, strict=True))
        short = (target - compute(leaf)).astype(product.found[0].dtype)
        (missing,) = jax.linear_transpose(compute, leaf)(short)
        change, _ = jax.scipy.sparse.linalg.cg(normal, missing, maxiter=self.steps)
        return leaf + change, None


def _inner(x: Array) -> Array:
    return jnp.sum(x * x)


def repair(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    *inputs: PyTree,
    weights: Sequence[float] | None = None,
    method: AbstractRepair = RestoreStatistics(),
) -> PyTree:
    """Averages aligned models and corrects the average on data, without labels.

    Parameters are corrected one after the other in dataflow order, each at its first use. Those
    that take part in no product with features, or are computed from several leaves on the way
    there, are averaged only. Inside of loops and branches nothing is corrected. A network with
    batch norm wants its running statistics estimated anew instead, which needs its training mode.

    Args:
        symmetry: of the models.
        fn: the function that was traced, `fn(params, *inputs)`.
        models: K pytrees of parameters, aligned: `[transport(symmetry, plans, a), b]`.
        *inputs: a batch of inputs; all of its features are in memory at once. 1,000 images do.
        weights: K weights, summing to 1; uniform if None.
        method: `RestoreStatistics()`, or `LeastSquares()`, which corrects far more.

    Returns:
        The parameters of the repaired average.

    Raises:
        ValueError: if models do not fit the symmetry, `fn` and `inputs` give another symmetry, a
            batch is empty, or weights do not fit.
    """
    for number, model in enumerate(models):
        symmetry.validate(model, f"model {number}")
    check_inputs(inputs)
    fused = average(models, weights)
    leaves = [jax.tree_util.tree_leaves(model) for model in (*models, fused)]
    found = _repair(symmetry, fn, method, leaves, mixture(weights, len(models)), inputs)
    return symmetry.treedef.unflatten(found)


class _Origin(NamedTuple):
    """A value that is one parameter in another arrangement."""

    leaf: int
    arrange: Callable[[Array], Array]


class _Value(NamedTuple):
    """A value in every model and last in the average; `shift` is still to be added to units."""

    arrays: tuple[Any, ...]
    feature: bool = False
    origin: _Origin | None = None
    shift: tuple[Group, Array] | None = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _repair(
    symmetry: Symmetry,
    fn: Callable[..., Any],
    method: AbstractRepair,
    leaves: list[list[Array]],
    weights: Float[Array, " k"],
    inputs: tuple[PyTree, ...],
) -> list[Array]:
    count = len(leaves)
    treedef = symmetry.treedef
    traced = retrace(symmetry, fn, treedef.unflatten(leaves[-1]), inputs)
    views: dict[tuple[int, ...], list[tuple[Group, View]]] = {}
    for group in symmetry.groups:
        for view in traced.produced.get(group.name, ()):
            views.setdefault(view.site.path, []).append((group, view))
    corrected = list(leaves[-1])
    done: set[int] = set()

    def step(eqn: core.JaxprEqn, path: tuple[int, ...], operands: list[Any]) -> list[Any]:
        values = [x if isinstance(x, _Value) else _Value((x,) * count) for x in operands]
        values = [_current(v) for v in values]
        if eqn.primitive in _PRODUCTS:
            pair = sorted(values, key=lambda v: v.feature)
            if pair[1].feature and pair[0].origin and pair[0].origin.leaf not in done:
                return [correct(eqn, path, values)]
        if eqn.primitive is P.add_p:
            for value, other in (values, values[::-1]):
                if value.shift and other.origin and other.origin.leaf not in done:
                    add_shift(other.origin.leaf, *value.shift)
                    values = [_current(v) for v in values]
        if eqn.primitive not in _ARRANGEMENTS:
            done.update(v.origin.leaf for v in values if v.origin)
        return _bind(eqn, values, count)

    def _current(value: _Value) -> _Value:
        """The same value, of the average's parameters as they are by now."""
        if value.origin is None or value.origin.leaf not in done:
            return value
        mine = value.origin.arrange(corrected[value.origin.leaf])
        return value._replace(arrays=(*value.arrays[:-1], mine))

    def add_shift(leaf: int, group: Group, shift: Array) -> None:
        for member in _producing(group, leaf):
            corrected[leaf] = _along(jnp.add, corrected[leaf], member, group, shift)
        done.add(leaf)

    def correct(eqn: core.JaxprEqn, path: tuple[int, ...], values: list[_Value]) -> _Value:
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

        found = tuple(
            eqn.primitive.bind(*(v.arrays[k] for v in values), **eqn.params)
            for k in range(count - 1)
        )
        # Of several groups (a product of heads and their units) the last one counts.
        group, view = views.get(path, [(None, None)])[-1]
        along = _producing(group, origin.leaf) if group else ()
        units = functools.partial(samples_of, view=view, group=group) if group and view else None
        leaf = corrected[origin.leaf]
        product = Product(leaf, compute, normal, found, weights, units, group, along)
        corrected[origin.leaf], shift = method.correct(product)
        done.add(origin.leaf)
        pending = None if shift is None or group is None else (group, shift)
        return _Value((*found, compute(corrected[origin.leaf])), True, None, pending)

    arguments = [
        _Value(x, origin=_Origin(i, _same)) for i, x in enumerate(zip(*leaves, strict=True))
    ]
    arguments += [_Value((x,) * count, feature=True) for x in jax.tree_util.tree_leaves(inputs)]
    interpret(traced.jaxpr, arguments, (), step)
    return corrected


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


def _bind(eqn: core.JaxprEqn, values: list[_Value], count: int) -> list[_Value]:
    """Evaluates an equation in every model."""
    results = []
    for k in range(count):
        bound = eqn.primitive.bind(*(v.arrays[k] for v in values), **eqn.params)
        results.append(bound if eqn.primitive.multiple_results else [bound])
    feature = any(v.feature for v in values)
    origin, shift = None, None
    if eqn.primitive in _ARRANGEMENTS and len(values) == 1:
        shift = values[0].shift if eqn.primitive is P.convert_element_type_p else None
        if values[0].origin is not None:
            leaf, before = values[0].origin

            def arrange(x: Array) -> Array:
                return eqn.primitive.bind(before(x), **eqn.params)

            origin = _Origin(leaf, arrange)
    return [_Value(arrays, feature, origin, shift) for arrays in zip(*results, strict=True)]


def _producing(group: Group, leaf: int) -> tuple[Member, ...]:
    return tuple(m for m in group.members if m.leaf == leaf and m.role == "produces")


def _along(
    operation: Callable[..., Array], leaf: Array, member: Member, group: Group, numbers: Array
) -> Array:
    """Combines a parameter with one number per unit."""
    units = units_of(leaf, member.where, group)
    changed = operation(units, numbers[..., None].astype(leaf.dtype))
    return with_units(leaf, member.where, group, changed)
