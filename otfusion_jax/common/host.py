"""Known values on a CPU are worked on by NumPy, which has nothing to compile.

XLA compiles a program for every shape that it is given. For a network of ordinary size that takes
longer than all there is to compute. So what is done to one parameter, or to the units of one group,
is written once, in terms that `numpy` and `jax.numpy` share, and runs in two ways:

- Arrays of NumPy are worked on by NumPy, right away. `as_numpy` makes views of known arrays of JAX
  if they lie on the CPU that JAX works on, and `as_jax` takes results back.
- Arrays of JAX are worked on by JAX: on accelerators, and wherever values are traced.

The arrays decide. `program` takes the place of `jax.jit`, `array_module` says which module to take
functions from, and what the two modules do not share is here: loops, and products of matrices.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from otfusion_jax.common.lazy import LazyArray

if TYPE_CHECKING:
    # NumPy's arrays have the methods of JAX's, as far as they are used on both.
    from jaxtyping import Array
else:
    Array = jax.Array | np.ndarray | np.generic
    """An array of either kind, for annotations that are checked at run time."""

P = ParamSpec("P")
R = TypeVar("R")
State = TypeVar("State")

_NUMPY = (np.ndarray, np.generic)

# --- which of the two


def array_module(*arrays: Any) -> Any:
    """Says which module works on some arrays.

    Args:
        arrays: The arrays, at least one.

    Returns:
        `numpy` if all of them are arrays of NumPy, otherwise `jax.numpy`, which takes both kinds.
    """
    for array in arrays:
        if not isinstance(array, _NUMPY):
            return jnp
    return np


def program(
    *, static_argnames: Sequence[str] = (), donate_argnames: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a program of a function: called with arrays of NumPy it just runs, else it is jitted.

    Args:
        static_argnames: The arguments that are no arrays, as `jax.jit` takes them.
        donate_argnames: The arguments whose memory may be used for the result, likewise.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        jitted = jax.jit(function, static_argnames=static_argnames, donate_argnames=donate_argnames)

        @functools.wraps(function)
        def run(*args: P.args, **named: P.kwargs) -> R:
            if not _of_numpy(args, named):
                return jitted(*args, **named)
            # What is out of range shows in the result, as it does where JAX computes it.
            with np.errstate(all="ignore"):
                return function(*args, **named)

        return run

    return decorate


def _of_numpy(*trees: Any) -> bool:
    """Whether there are arrays of NumPy among the leaves of some trees, and none of JAX."""
    found = False
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array):
            return False
        found = found or isinstance(leaf, _NUMPY)
    return found


# --- from one to the other


def as_numpy(tree: Any) -> Any:
    """Views arrays as NumPy's if all of them are known and lie on the CPU that JAX works on.

    Args:
        tree: A pytree of arrays of JAX or NumPy, or Python numbers.

    Returns:
        The tree with read-only views in the dtypes that JAX gives the values; random keys and what
        is lazy stay. The tree as it is where any array is traced, lies elsewhere or on a mesh, and
        inside of what is traced, unless there is nothing but arrays of NumPy.
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    # Arrays of NumPy alone need not be asked where they are, which takes a while.
    if not all(isinstance(leaf, np.ndarray) for leaf in leaves) and not at_hand(tree):
        return tree
    return treedef.unflatten(map(_viewed, leaves))


def at_hand(tree: Any) -> bool:
    """Says whether NumPy can work on some arrays in place of JAX.

    Args:
        tree: A pytree of arrays of JAX or NumPy, lazy ones, or Python numbers.

    Returns:
        Whether all of them are known and lie on the device that JAX puts results on, and that is a
        CPU. Those that are lazy will, once they are read. False for what lies on a mesh, even of
        one device, and inside of what is traced.
    """
    # Inside of what is traced, even this has no value.
    probe = jax.device_put(np.zeros((), np.int32))
    if isinstance(probe, Tracer):
        return False
    devices = probe.devices()
    if any(device.platform != "cpu" for device in devices):
        return False
    for leaf in jax.tree_util.tree_leaves(tree):
        if isinstance(leaf, Tracer):
            return False
        if isinstance(leaf, jax.Array):
            # As a view of NumPy it would lose the layout that results are to have.
            if leaf.devices() != devices or isinstance(leaf.sharding, NamedSharding):
                return False
    return True


def _viewed(leaf: Any) -> Any:
    """Views an array as one of NumPy, without a copy unless JAX would take another dtype for it."""
    if type(leaf) is np.ndarray and leaf.dtype == np.float32:
        return leaf
    if isinstance(leaf, LazyArray):
        return leaf
    if isinstance(leaf, jax.Array):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return leaf if is_key else np.asarray(leaf)
    array = np.asarray(leaf)
    return np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))


def as_jax(tree: Any) -> Any:
    """Makes arrays of JAX of those of NumPy, all at once.

    Args:
        tree: A pytree of arrays. Those of NumPy must not be written to any more.

    Returns:
        The tree with arrays of JAX; what is lazy stays.
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    places = []
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array | LazyArray):
            places.append(number)
    put = jax.device_put([leaves[number] for number in places])
    for number, array in zip(places, put, strict=True):
        leaves[number] = array
    return treedef.unflatten(leaves)


def loaded(array: Any) -> Any:
    """Reads an array if it is lazy.

    Args:
        array: An array of any kind, or a number.

    Returns:
        The array; of one that was lazy, a view of NumPy where NumPy works in place of JAX, or else
        an array on JAX's default device.
    """
    if not isinstance(array, LazyArray):
        return array
    read = np.asarray(array)
    return _viewed(read) if at_hand(()) else jax.device_put(read)


def as_lazy_as(array: Any, compute: Callable[[], Any]) -> Any:
    """Computes an array of the shape and dtype of another, or puts it off if that one is lazy.

    Args:
        array: An array of any kind.
        compute: What computes the other array, out of arrays that were found finite.

    Returns:
        What it returns; a lazy array in the place of one.
    """
    if isinstance(array, LazyArray):
        return LazyArray(array.shape, array.dtype, compute, checked=True)
    return compute()


def filled_like(array: Any, value: float) -> Any:
    """Makes an array that is one number throughout.

    Args:
        array: An array of any kind, whose shape, dtype and kind the new one has.
        value: The number.

    Returns:
        The array; a lazy one in the place of one.
    """
    if isinstance(array, LazyArray):
        return as_lazy_as(array, functools.partial(np.full, array.shape, value, array.dtype))
    return array_module(array).full_like(array, value)


def kept(array: Any) -> Any:
    """Makes an array one's own, before it is passed on as it is: `as_jax` shares its memory.

    Args:
        array: An array of JAX or NumPy, or a Python number.

    Returns:
        An array of JAX or a lazy one as it is, as nobody writes to it; of anything else a copy, of
        NumPy.
    """
    return array if isinstance(array, jax.Array | LazyArray) else np.array(array)


# --- what the two modules do not share


_LONGEST_SUM = 2**15
"""How many products NumPy sums up in the precision of what is multiplied."""


def matmul(rows: Array, columns: Array) -> Array:
    """Multiplies matrices, or stacks of them, in full precision.

    Args:
        rows: `[*batch, n, d]`.
        columns: `[*batch, d, m]`, of the same dtype or a wider one.

    Returns:
        The products, `[*batch, n, m]`, in the dtype of the rows. Those of half precision are taken
        in single precision and rounded once.
    """
    dtype = rows.dtype
    xp = array_module(rows, columns)
    if dtype.itemsize < 4:
        # Neither sums nor what the rows are multiplied by may be rounded to half precision: a
        # matrix that is orthogonal would be so no more.
        rows = rows.astype(xp.float32)
    # What has this dtype already is not copied.
    columns = xp.asarray(columns, rows.dtype)
    if xp is np:
        products = np.matmul(rows, columns)
    else:
        products = jnp.matmul(rows, columns, precision=lax.Precision.HIGHEST)
    return xp.asarray(products, dtype)


def accumulation_dtype(dtype: np.dtype) -> np.dtype:
    """Says in what precision to add up values, to be rounded once at the end.

    Args:
        dtype: The floating-point or complex dtype of the values.

    Returns:
        At least float32, so that half-precision models lose nothing to the weights.
    """
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def inner_product(x: Array, y: Array) -> Array:
    """Takes the inner product of two real arrays of one shape.

    Args:
        x: One array.
        y: The other.

    Returns:
        The sum of the products of their entries, `[]`.
    """
    xp = array_module(x, y)
    if xp is not np:
        return xp.sum(x * y)
    # NumPy does without an array of the products.
    if x.size <= _LONGEST_SUM:
        return xp.vdot(x, y)
    total = 0.0
    for x_part, y_part in parts_to_sum(x.ravel(), y.ravel()):
        total += float(xp.vdot(x_part, y_part))
    return xp.asarray(total, xp.result_type(x, y))[()]


def parts_to_sum(x: Any, y: Any) -> Iterator[tuple[Any, Any]]:
    """Takes two vectors of NumPy apart, into parts whose products are summed up at once.

    A sum of millions of products is rounded by the more the longer it is.

    Args:
        x: One vector.
        y: The other, of the same size.

    Yields:
        A part of each.
    """
    for start in range(0, x.size, _LONGEST_SUM):
        part = slice(start, start + _LONGEST_SUM)
        yield x[part], y[part]


def sums_over_last(x: Array) -> Array:
    """Sums up real numbers along the last axis, however many there are.

    Args:
        x: The numbers, `[*batch, d]`, of single precision or wider.

    Returns:
        The sums, `[*batch]`, in the dtype of the numbers.
    """
    if array_module(x) is np:
        # Along an axis that is not the last in memory, NumPy adds one number after the other.
        total: Any = np.sum(x, axis=-1, dtype=np.float64)
        return total.astype(x.dtype)
    return x.sum(-1)


def taken(array: Array, index: Array, axis: int, fill: Any = None) -> Array:
    """Takes entries along an axis.

    Args:
        array: The array.
        index: The positions of the entries, integer `[n]`, or of the rank of the array, with which
            it is then broadcast along all other axes.
        axis: The axis, at least 0.
        fill: What stands where a position is out of range; None for what JAX puts there: NaN, the
            least integer, or True.

    Returns:
        The entries.
    """
    along = index.ndim > 1
    xp = array_module(array, index)
    if xp is jnp:
        take = jnp.take_along_axis if along else jnp.take
        return take(array, index, axis, mode="fill", fill_value=fill)
    size = array.shape[axis]
    in_range = (index >= 0) & (index < size)
    if along:
        entries = xp.take_along_axis(array, xp.clip(index, 0, size - 1), axis)
    else:
        # Without this mode, NumPy takes twice the time.
        entries = xp.take(array, index, axis, mode="clip")
        in_range = xp.expand_dims(in_range, tuple(range(1, array.ndim - axis)))
    if in_range.all():
        return entries
    if fill is None:
        fill = np.nan
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            fill = True if array.dtype == bool else np.iinfo(array.dtype).min
    return xp.where(in_range, entries, np.asarray(fill, array.dtype))


def while_loop(
    is_unfinished: Callable[[State], Any], step: Callable[[State], State], state: State
) -> State:
    """Repeats a step while there is something left to do.

    Args:
        is_unfinished: Whether to go on from a state.
        step: The step.
        state: The first state, a pytree.

    Returns:
        The last state.
    """
    if not _of_numpy(state):
        return lax.while_loop(is_unfinished, step, state)
    while is_unfinished(state):
        state = step(state)
    return state


def fori_loop(count: Any, step: Callable[[Any, State], State], state: State) -> State:
    """Makes a number of steps.

    Args:
        count: The number of steps.
        step: A step, from its number and a state to the next state.
        state: The first state, a pytree.

    Returns:
        The last state.
    """
    if not _of_numpy(state):
        return lax.fori_loop(0, count, step, state)
    for number in range(count):
        state = step(number, state)
    return state


def mapped(
    function: Callable[..., Array],
    *stacks: Array,
    loop: Callable[..., Callable[..., Array]] = jax.vmap,
) -> Array:
    """Calls a function for each entry along the first axis of some arrays.

    Args:
        function: A function of arrays, as many as there are stacks.
        *stacks: The arrays, of one length.
        loop: What makes a function of stacks of it where JAX computes.

    Returns:
        What it returns, stacked.
    """
    xp = array_module(*stacks)
    if xp is not np:
        return loop(function)(*stacks)
    results = []
    for entries in zip(*stacks, strict=True):
        results.append(function(*entries))
    return xp.stack(results)


def cond(condition: Any, if_true: Callable[[], R], if_false: Callable[[], R]) -> R:
    """Calls one of two functions.

    Args:
        condition: Which of them, bool `[]`.
        if_true: The function to be called if it holds.
        if_false: The function to be called if not.

    Returns:
        What the function returns.
    """
    if array_module(condition) is np:
        return if_true() if condition else if_false()
    return lax.cond(condition, if_true, if_false)


def without_gradient(x: Array) -> Array:
    """Takes a value for a constant, which has no gradient.

    Args:
        x: The value.

    Returns:
        The same value.
    """
    return x if array_module(x) is np else lax.stop_gradient(x)
