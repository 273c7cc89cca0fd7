"""A product of features with a parameter, as rows times a matrix.

A repair asks of a matrix product or a convolution what a regression asks of its data: the rows that
the parameter is multiplied by, and the parameter as the matrix that multiplies them. Inner products
of rows say all that least squares have to know of the features, however many samples there are. Of
a convolution they are taken of its patches, once: to transpose the convolution anew in each step of
a solver is an order of magnitude slower on a CPU.

A `LinearForm` names no equation and no parameter, so that equal layers share what is compiled.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as P
from jaxtyping import Inexact, Shaped

from otfusion_jax.common.host import Array, array_module
from otfusion_jax.tracing.jaxprs import equations_within

PRODUCTS = (P.dot_general_p, P.conv_general_dilated_p)
"""The primitives that a parameter is corrected in."""

Params = tuple[tuple[str, Any], ...]
"""The parameters of an equation, by name."""

# Inner products are symmetric: a matrix of at least so many rows is taken in so many bands, and of
# each band the part from its diagonal on.
_BANDED_WIDTH = 512
_BANDS = 4


def has_rows(eqn: core.JaxprEqn, position: int) -> bool:
    """Whether a product can be read as rows times a matrix.

    Args:
        eqn: A matrix product or a convolution.
        position: Which of its two operands the parameter is.

    Returns:
        False for a convolution whose image is the parameter, or that groups the samples.
    """
    if eqn.primitive is P.dot_general_p:
        return True
    return position == 1 and eqn.params["batch_group_count"] == 1


def has_product(eqn: core.JaxprEqn) -> bool:
    """Whether a matrix product or a convolution is evaluated within an equation."""
    return any(inner.primitive in PRODUCTS for inner in equations_within(eqn))


@dataclasses.dataclass(frozen=True)
class LinearForm:
    """A product as a linear function of the parameter.

    Attributes:
        primitive: The product: a matrix product or a convolution.
        params: The parameters of its equation.
        position: Which of its two operands the parameter is.
        steps: The primitives that arrange the parameter on its way into the product, first to last,
            each with the parameters of its equation.
        dtype: The dtype of the features that come out.
        first_free: Of a matrix product, how many axes of the first operand come out.
        kernel_sizes: Of a convolution, how many offsets its kernel has along each axis of space.
    """

    primitive: Any
    params: Params
    position: int
    steps: tuple[tuple[Any, Params], ...]
    dtype: Any
    first_free: int
    kernel_sizes: tuple[int, ...]

    def arrange(self, parameter: Array) -> Array:
        """Arranges a parameter, in the dtypes of the program."""
        for primitive, params in self.steps:
            parameter = primitive.bind(parameter, **dict(params))
        return parameter

    def compute(self, features: Array, parameter: Array) -> Array:
        """Returns the features that come out, in the dtypes of the program."""
        first, second = self._operands(features, self.arrange(parameter))
        return multiplied(self.primitive, dict(self.params), first, second)

    def widened(self, array: Array) -> Array:
        """Returns a parameter or features in the precision that sums are taken in."""
        return array_module(array).asarray(array, self._wide(array.dtype))

    def arrange_wide(self, parameter: Array) -> Array:
        """Arranges a parameter of float32 or wider, without the casts to less."""
        for primitive, params in self.steps:
            options = dict(params)
            if primitive is P.convert_element_type_p:
                options["new_dtype"] = self._wide(options["new_dtype"])
            if array_module(parameter) is np:
                parameter = _arranged_by_numpy(primitive, options, parameter)
            else:
                parameter = primitive.bind(parameter, **options)
        return parameter

    def rows(self, features: Array) -> Inexact[Array, "groups samples width"]:
        """Returns the rows that the matrix of the parameter is multiplied by, widened."""
        features = self.widened(features)
        if self.primitive is P.dot_general_p:
            (contracted, batch) = self._own(1 - self.position)
            return _fronted(features, batch, contracted, others_first=True)
        return _patches(features, dict(self.params), self.kernel_sizes)

    def count_samples(self, features: Array) -> int:
        """Returns how many samples there are: the rows of each are next to one another."""
        if self.primitive is not P.dot_general_p:
            return features.shape[dict(self.params)["dimension_numbers"].lhs_spec[0]]
        contracted, batch = self._own(1 - self.position)
        free = [axis for axis in range(features.ndim) if axis not in (*contracted, *batch)]
        return features.shape[free[0]] if free else 1

    def columns(self, outputs: Array) -> Inexact[Array, "groups samples units"]:
        """Brings features that come out of the product to where `rows` times `matrix` has them."""
        params = dict(self.params)
        if self.primitive is P.dot_general_p:
            _, (batch, _) = params["dimension_numbers"]
            start = len(batch)
            # The free axes of the first operand come before those of the second.
            middle = start + self.first_free
            units = range(middle, outputs.ndim) if self.position == 1 else range(start, middle)
            return _fronted(outputs, tuple(range(start)), tuple(units), others_first=True)
        return _columns(outputs, params)

    def matrix(self, parameter: Array) -> Shaped[Array, "groups width units"]:
        """Returns a parameter of float32 or wider as the matrix that multiplies the rows."""
        arranged = self.arrange_wide(parameter)
        if self.primitive is P.dot_general_p:
            (contracted, batch) = self._own(self.position)
            return _fronted(arranged, batch, contracted, others_first=False)
        return _kernel_matrix(arranged, dict(self.params))

    def is_rearranged(self, parameter: Array) -> bool:
        """Whether `matrix` has every entry of a parameter once: its transpose undoes it."""
        # Nothing on the way into a product leaves entries out, but they may be repeated.
        return math.prod(self.matrix_shape(parameter)) == parameter.size

    def matrix_shape(self, parameter: Array) -> tuple[int, ...]:
        """Returns the shape of `matrix`."""
        return _shape_of_matrix(self, parameter.shape, parameter.dtype)

    def transposed_matrix(self, like: Array) -> Callable[[Array], Array]:
        """Returns the transpose of `matrix`, for parameters of the shape and dtype of one."""
        if array_module(like) is np:
            return functools.partial(_added_up, self._places(like), like)
        transpose = jax.linear_transpose(self.matrix, like)
        return lambda matrix: transpose(matrix)[0]

    def _places(self, parameter: Any) -> Any:
        """Returns the place in a parameter of each entry of its matrix, by NumPy."""
        without_casts = [step for step in self.steps if step[0] is not P.convert_element_type_p]
        form = dataclasses.replace(self, steps=tuple(without_casts))
        return form.matrix(np.arange(parameter.size).reshape(parameter.shape))

    def _operands(self, features: Array, parameter: Array) -> tuple[Array, Array]:
        return (features, parameter) if self.position == 1 else (parameter, features)

    def _own(self, position: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the axes of an operand that are contracted, and those of its batch."""
        contracted, batch = dict(self.params)["dimension_numbers"]
        # Both operands list the axes that meet in the order that they have in the features.
        pairs = sorted(zip(contracted[1 - self.position], contracted[self.position], strict=True))
        side = 1 if position == self.position else 0
        return tuple([pair[side] for pair in pairs]), tuple(batch[position])

    def _wide(self, dtype: Any) -> Any:
        """Says in what precision to compute with what meets in the product.

        Numbers are real or complex, of double precision if the product is; integers too.
        """
        is_double = jnp.finfo(self.dtype).bits == 64
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return jnp.dtype(jnp.complex128 if is_double else jnp.complex64)
        return jnp.dtype(jnp.float64 if is_double else jnp.float32)


@functools.lru_cache(maxsize=1024)
def _shape_of_matrix(form: LinearForm, shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    # To trace it takes longer than all that NumPy computes for a small parameter.
    return jax.eval_shape(form.matrix, jax.ShapeDtypeStruct(shape, dtype)).shape


def form_of(eqn: core.JaxprEqn, position: int, arranging: Sequence[core.JaxprEqn]) -> LinearForm:
    """Reads the form of a product off its equation.

    Args:
        eqn: A matrix product or a convolution.
        position: Which of its two operands the parameter is.
        arranging: The equations that arrange the parameter on its way into the product.

    Returns:
        The form.
    """
    steps = tuple([(step.primitive, tuple(step.params.items())) for step in arranging])
    result: Any = eqn.outvars[0].aval
    first, second = [cast(Any, atom.aval).shape for atom in eqn.invars]
    first_free, kernel_sizes = 0, ()
    if eqn.primitive is P.dot_general_p:
        (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
        first_free = len(first) - len(contracted) - len(batch)
    else:
        kernel_sizes = tuple(
            [second[axis] for axis in eqn.params["dimension_numbers"].rhs_spec[2:]]
        )
    return LinearForm(
        eqn.primitive,
        tuple(eqn.params.items()),
        position,
        steps,
        result.dtype,
        first_free,
        kernel_sizes,
    )


def multiplied(primitive: Any, params: dict[str, Any], first: Array, second: Array) -> Array:
    """Evaluates a product, or any other equation of two operands.

    XLA's convolutions of images that are smaller than the kernel take up to fifty times as long on
    a CPU as the same by patches (512 channels of 2 x 2).

    Args:
        primitive: The primitive of the equation.
        params: Its parameters.
        first: Its first operand.
        second: Its second operand.

    Returns:
        The result.
    """
    if primitive is P.conv_general_dilated_p and _is_small(params, first, second):
        kernel_sizes = [second.shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
        rows = _patches(first, params, kernel_sizes)
        matrix = _kernel_matrix(second, params)
        numbers = (((2,), (1,)), ((0,), (0,)))
        columns = jax.lax.dot_general(rows, matrix, numbers, precision=params["precision"])
        shape = jax.eval_shape(lambda x, y: primitive.bind(x, y, **params), first, second)
        transpose = jax.linear_transpose(lambda x: _columns(x, params), shape)
        # Bringing outputs to columns moves them about: its transpose moves them back.
        return transpose(columns.astype(shape.dtype))[0]
    return primitive.bind(first, second, **params)


def _is_small(params: dict[str, Any], image: Array, kernel: Array) -> bool:
    """Whether a convolution is of an image smaller than its kernel, and of real numbers."""
    spec = params["dimension_numbers"]
    space = math.prod([image.shape[axis] for axis in spec.lhs_spec[2:]])
    offsets = math.prod([kernel.shape[axis] for axis in spec.rhs_spec[2:]])
    is_wide = image.dtype == kernel.dtype and image.dtype in (jnp.float32, jnp.float64)
    return is_wide and space < offsets and params["batch_group_count"] == 1


def row_gram(rows: Inexact[Array, "groups samples width"]) -> Inexact[Array, "groups width width"]:
    """Takes the inner products of the columns of rows: Xᵀ X, of complex rows Xᴴ X.

    Args:
        rows: The rows, float32 or complex64, or wider.

    Returns:
        The inner products, symmetric or Hermitian.
    """
    width = rows.shape[-1]
    # Of a product with itself NumPy takes one half.
    if width < _BANDED_WIDTH or array_module(rows) is np:
        return _transposed_product(rows, rows)
    edges = [width * band // _BANDS for band in range(_BANDS + 1)]
    gram = jnp.zeros((len(rows), width, width), rows.dtype)
    for start, stop in zip(edges, edges[1:], strict=False):
        band = _transposed_product(rows[..., start:stop], rows[..., start:])
        gram = gram.at[:, start:stop, start:].set(band)
        beside = band[..., stop - start :]
        below = jnp.conj(jnp.swapaxes(beside, -1, -2))
        gram = gram.at[:, stop:, start:stop].set(below)
    return gram


def rows_times(
    rows: Inexact[Array, "groups samples width"], columns: Inexact[Array, "groups samples units"]
) -> Inexact[Array, "groups width units"]:
    """Takes the inner products of the columns of rows with others: Xᵀ Y, of complex rows Xᴴ Y.

    Args:
        rows: The rows, float32 or complex64, or wider.
        columns: The other columns, with as many samples.

    Returns:
        The inner products.
    """
    return _transposed_product(rows, columns)


def matrix_product(first: Array, second: Array) -> Array:
    """Multiplies stacks of matrices, real or complex, in full precision.

    Args:
        first: `[groups, n, d]`.
        second: `[groups, d, m]`.

    Returns:
        The products, `[groups, n, m]`.
    """
    if array_module(first, second) is np:
        return np.matmul(first, second)
    return jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST)


def _transposed_product(first: Array, second: Array) -> Array:
    if array_module(first, second) is np:
        return np.matmul(first.conj().swapaxes(1, 2), second)
    # Without a transposition, which XLA would sum up in another order.
    numbers = (((1,), (1,)), ((0,), (0,)))
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(jnp.conj(first), second, numbers, precision=highest)


def _arranged_by_numpy(primitive: Any, params: dict[str, Any], array: Any) -> Any:
    """Evaluates one of `ARRANGEMENTS` (see `side_by_side`) by NumPy."""
    if primitive is P.convert_element_type_p:
        return np.asarray(array, params["new_dtype"])
    if primitive is P.transpose_p:
        return array.transpose(params["permutation"])
    if primitive is P.broadcast_in_dim_p:
        shape, there = params["shape"], params["broadcast_dimensions"]
        absent = [axis for axis in range(len(shape)) if axis not in there]
        return np.broadcast_to(np.expand_dims(array, absent), shape)
    if primitive is P.reshape_p:
        return array.reshape(params["new_sizes"])
    if primitive is P.squeeze_p:
        return np.squeeze(array, params["dimensions"])
    # A copy, or one that only says where an array is.
    return array


def _added_up(places: Any, like: Any, matrix: Any) -> Any:
    """Adds up the entries of a matrix that are of one entry of a parameter, by NumPy."""
    found = np.zeros(like.size, matrix.dtype)
    if matrix.size == like.size:
        found[places] = matrix
    else:
        np.add.at(found, places, matrix)
    return found.reshape(like.shape)


def _fronted(
    array: Array, batch: Sequence[int], chosen: Sequence[int], others_first: bool
) -> Shaped[Array, "batch rows columns"]:
    """Makes three axes of all: the batch, the axes chosen, and the others, before or after them."""
    others = [axis for axis in range(array.ndim) if axis not in (*batch, *chosen)]
    order = (others, chosen) if others_first else (chosen, others)
    sizes = []
    for axes in (batch, *order):
        sizes.append(math.prod([array.shape[axis] for axis in axes]))
    arranged = array.transpose((*batch, *order[0], *order[1]))
    return arranged.reshape(sizes)


def _columns(outputs: Array, params: dict[str, Any]) -> Inexact[Array, "groups samples units"]:
    """Brings what comes out of a convolution to where patches times a matrix have it."""
    outputs = outputs.transpose(params["dimension_numbers"].out_spec)
    groups = params["feature_group_count"]  # [samples, units, *space]
    samples, _, *space = outputs.shape
    by_group = outputs.reshape(samples, groups, -1, math.prod(space))
    return by_group.transpose(1, 0, 3, 2).reshape(groups, -1, by_group.shape[2])


def _kernel_matrix(kernel: Array, params: dict[str, Any]) -> Shaped[Array, "groups width units"]:
    """Returns the kernel of a convolution as the matrix that multiplies patches."""
    kernel = kernel.transpose(params["dimension_numbers"].rhs_spec)
    groups = params["feature_group_count"]  # [groups, units, channels, offsets]
    units, channels = kernel.shape[:2]
    by_group = kernel.reshape(groups, units // groups, channels, -1)
    return by_group.transpose(0, 3, 2, 1).reshape(groups, -1, by_group.shape[1])


def _patches(
    image: Array, params: dict[str, Any], kernel_sizes: Sequence[int]
) -> Inexact[Array, "groups samples width"]:
    """Returns the patches that a convolution multiplies its kernel with.

    Columns are in the order of the offsets of the kernel, and of channels within an offset.
    """
    samples, channels, *space = params["dimension_numbers"].lhs_spec
    # The channels last, so that a patch is made of whole rows of memory.
    image = image.transpose((samples, *space, channels))
    edges = [(0, 0, 0)]
    for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True):
        edges.append((int(low), int(high), int(dilation) - 1))
    image = _padded(image, [*edges, (0, 0, 0)])
    ranges_by_axis = []
    for length, size, stride, dilation in zip(
        image.shape[1:-1],
        kernel_sizes,
        params["window_strides"],
        params["rhs_dilation"],
        strict=True,
    ):
        last_start = length - 1 - (size - 1) * dilation
        starts = [offset * dilation for offset in range(size)]
        ranges_by_axis.append([slice(start, start + last_start + 1, stride) for start in starts])
    groups = params["feature_group_count"]
    parts = []
    for ranges in itertools.product(*ranges_by_axis):
        part = image[(slice(None), *ranges)]
        parts.append(part.reshape(-1, groups, image.shape[-1] // groups))
    patches = array_module(image).concatenate(parts, axis=-1)
    return patches.transpose(1, 0, 2)


def _padded(image: Array, edges: Sequence[tuple[int, int, int]]) -> Array:
    """Pads an array by zeros: before and behind each axis, or less than none, and in between."""
    if array_module(image) is not np:
        return jax.lax.pad(image, jnp.zeros((), image.dtype), edges)
    shape, there, kept = [], [], []
    for size, (low, high, between) in zip(image.shape, edges, strict=True):
        length = max(size + (size - 1) * between, 0)
        # What is padded by less than nothing is cut off in the end.
        before = max(low, 0)
        behind = max(high, 0)
        shape.append(before + length + behind)
        there.append(slice(before, before + length, 1 + between))
        first = max(-low, 0)
        last = shape[-1] - max(-high, 0)
        kept.append(slice(first, max(first, last)))
    padded: Any = np.zeros(shape, image.dtype)
    padded[tuple(there)] = image
    return padded[tuple(kept)]
