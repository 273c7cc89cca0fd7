"""Scaling by powers of two: exact, and a way around squares that are too large or too small.

Squared distances between weights of 1e-30 are zero in float32, those between weights of 1e30 are
infinite. So numbers are multiplied by `2**-k`, with `k` their common exponent, computed with, and
brought back to their range by the power of `2**k` that the result is of.

On a CPU, XLA takes subnormal numbers for zero. `exponent` and `scaled` read them by their bits.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Inexact, Int

from otfusion_jax.common.host import Array, array_module
from otfusion_jax.common.typing import PyTree

Numbers = Inexact[Array, "..."]
"""An array of any shape and precision, real or complex."""
Exponent = Int[Array, "..."]
"""The exponent of a power of two, int32 `[]`; or several, which go with the numbers by shape."""

# --- exponents


def largest_magnitude(x: Float[Array, "..."], axis: tuple[int, ...] | None = None) -> Array:
    """Takes the largest magnitude without a copy of all magnitudes.

    Args:
        x: Real numbers.
        axis: The axes along which it is taken. None means all of them.

    Returns:
        The largest, NaN or infinite if any number is, `[]` or with the other axes; 0 of nothing.
    """
    xp = array_module(x)
    return xp.maximum(xp.max(x, axis=axis, initial=0), -xp.min(x, axis=axis, initial=0))


def exponent(x: Float[Array, "..."], axis: tuple[int, ...] | None = None) -> Exponent:
    """Returns the exponent of the power of two that is just above all magnitudes.

    Args:
        x: Real numbers, of any shape and precision.
        axis: The axes along which magnitudes have one exponent. None means all of them.

    Returns:
        int32, `[]` or with the other axes, the least k with `|x| < 2**k` everywhere; 0 if there is
        nothing but zeros.
    """
    if array_module(x) is np:
        largest: Any = largest_magnitude(x, axis)
        _, k = np.frexp(largest)
        return k
    x = _widened(x)
    info = jnp.finfo(x.dtype)
    largest_bits = _largest_bits(x, axis)
    biased_exponent = (largest_bits >> info.nmant).astype(jnp.int32)
    bit_length = (info.bits - lax.clz(largest_bits)).astype(jnp.int32)
    of_normal = biased_exponent + info.minexp
    # A subnormal number has no leading digit of its own: its value is that of its bits.
    of_subnormal = bit_length + info.minexp - info.nmant
    k = jnp.where(biased_exponent > 0, of_normal, of_subnormal)
    return jnp.where(largest_bits > 0, k, 0)


def common_exponent(arrays: Iterable[Numbers]) -> Exponent:
    """Returns the exponent of the power of two that is just above all magnitudes in some arrays.

    Args:
        arrays: Arrays of any shapes and precisions, real or complex.

    Returns:
        int32 `[]`, as `exponent` returns it. Of complex numbers the real and the imaginary parts
        count, each by itself. 0 if there are no arrays.
    """
    largest = []
    for array in arrays:
        parts = [array.real, array.imag] if jnp.iscomplexobj(array) else [array]
        for part in parts:
            largest.append(_largest(part))
    if not largest:
        return jnp.zeros((), jnp.int32)
    # Narrower dtypes have no larger range than float32.
    dtype = jnp.float32
    for magnitude in largest:
        if magnitude.dtype == jnp.float64:
            dtype = jnp.float64
    widened = [magnitude.astype(dtype) for magnitude in largest]
    return exponent(array_module(*widened).stack(widened))


def _largest(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Takes the largest magnitude, by its bits where subnormal numbers would be taken for zero."""
    if array_module(x) is np:
        return largest_magnitude(x)
    x = _widened(x)
    return lax.bitcast_convert_type(_largest_bits(x), x.dtype)


def _widened(x: Array) -> Array:
    """Returns numbers in float32 or float64, which exponents are read off, without gradient."""
    x = lax.stop_gradient(x)
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _largest_bits(x: Array, axis: tuple[int, ...] | None = None) -> Array:
    """Takes the largest of the bits of magnitudes: read as integers, they are in the same order."""
    return jnp.max(_magnitude_bits(x), axis=axis, initial=0)


# --- multiplication


def scaled(x: Numbers, k: Exponent) -> Numbers:
    """Multiplies an array by a power of two.

    Args:
        x: Numbers of any shape and precision.
        k: The exponent of the power.

    Returns:
        `x * 2**k`, rounded only where the result is subnormal.
    """
    return all_scaled([x], k)[0]


def all_scaled(arrays: Sequence[Numbers], k: Exponent) -> list[Numbers]:
    """Multiplies several arrays by one power of two, which is worked out once for all.

    Args:
        arrays: Arrays of any shapes and precisions.
        k: The exponent of the power.

    Returns:
        For each array `x * 2**k`, rounded only where the result is subnormal.
    """
    factors = {}
    lifts = {}
    products = []
    for x in arrays:
        dtype = x.dtype
        if array_module(x, k) is np:
            products.append(_scaled_by_numpy(x, k))
            continue
        if dtype not in factors:
            factors[dtype] = _power_in_two_factors(k, dtype)
            lifts[dtype] = _lift_of_subnormals(k, dtype)
        product = _multiplied(x, factors[dtype], lifts[dtype])
        products.append(product)
    return products


def restored(tree: PyTree, k: Exponent, degree: int = 1) -> PyTree:
    """Brings back to its range what was computed from numbers that had been scaled by `2**-k`.

    The program is a third of the size of that of `all_scaled`: here it is left to the device
    whether subnormal numbers are taken for zero.

    Args:
        tree: A pytree of arrays of any shapes and precisions.
        k: The exponent of the power.
        degree: The power of the scaled numbers in which the arrays are, such as 2 for squares.

    Returns:
        Each array times `2**(k * degree)`.
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    factors = {}
    products = []
    for x in leaves:
        dtype = x.dtype
        if array_module(x, k) is np:
            products.append(_scaled_by_numpy(x, k * degree))
            continue
        if dtype not in factors:
            factors[dtype] = _power_in_two_factors(k, dtype)
        # One factor at a time: each is in range, which their product need not be.
        for _ in range(degree):
            for factor in factors[dtype]:
                x = x * factor
        products.append(x)
    return treedef.unflatten(products)


def _scaled_by_numpy(x: Numbers, k: Exponent) -> Numbers:
    """Multiplies an array of NumPy by a power of two, which NumPy can do for subnormal numbers."""
    product: Any
    if np.iscomplexobj(x):
        product = _scaled_by_numpy(x.real, k) + 1j * _scaled_by_numpy(x.imag, k)
        return product
    # NumPy does not know all narrow types.
    wide = np.asarray(x, np.float64 if x.dtype == np.float64 else np.float32)
    if np.all(abs(k) < -np.finfo(wide.dtype).minexp):
        # A product with a power of two is rounded in the same way, and takes a tenth of the time.
        product = wide * np.ldexp(wide.dtype.type(1), k)
    else:
        product = np.ldexp(wide, k)
    return product.astype(x.dtype, copy=False)


def deviation(x: Inexact[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Takes standard deviations of values whose squares may be out of range.

    Args:
        x: The values, real or complex, of any shape.
        axis: The axis along which deviations are taken.

    Returns:
        The deviations, without that axis.
    """
    k = common_exponent([x])
    in_range = scaled(x, -k)
    deviations = array_module(in_range).std(in_range, axis=axis)
    return scaled(deviations, k)


# --- the bits of numbers


_Factors = tuple[Array, Array]
"""Two numbers, the product of which is a power of two that need not be in range."""


@jax.custom_jvp
def _multiplied(x: Array, factors: _Factors, lift: _Factors | None) -> Array:
    """Multiplies by two factors, and subnormal numbers by those of their lift in place of these.

    Args:
        x: The numbers.
        factors: Two powers of two.
        lift: What `_lift_of_subnormals` returns for the dtype of `x`.

    Returns:
        The products.
    """
    if lift is None:
        return x * factors[0] * factors[1]
    bits = _magnitude_bits(x)
    exponent_bits = bits >> jnp.finfo(x.dtype).nmant
    subnormal = exponent_bits == 0
    integers = bits.astype(x.dtype)
    signed = jnp.where(jnp.signbit(x), -integers, integers)
    x = jnp.where(subnormal, signed, x)
    for factor, lifted in zip(factors, lift, strict=True):
        x = x * jnp.where(subnormal, lifted, factor)
    return x


@_multiplied.defjvp
def _multiplied_jvp(primals, tangents):
    # Multiplication is linear, which is lost on the way through the bits.
    x, factors, lift = primals
    tangent = tangents[0] * factors[0] * factors[1]
    return _multiplied(x, factors, lift), tangent


def _lift_of_subnormals(k: Array, dtype: np.dtype) -> _Factors | None:
    """Returns what the bits of subnormal numbers, read as integers, are to be multiplied by.

    A subnormal number is that integer times `2**(minexp - nmant)`, its last digit.

    Args:
        k: The exponent of the power of two that the numbers are multiplied by.
        dtype: The dtype of the numbers.

    Returns:
        Two factors; None for narrower dtypes and for complex ones, which are multiplied as they
        are.
    """
    if dtype not in (jnp.float32, jnp.float64):
        return None
    info = jnp.finfo(dtype)
    exponent_of_last_digit = info.minexp - info.nmant
    return _power_in_two_factors(k + exponent_of_last_digit, dtype)


def _power_in_two_factors(k: Array, dtype: np.dtype) -> _Factors:
    """Splits `2**k` in two: between the smallest and the largest number neither is out of range."""
    half = k >> 1
    first = _power_of_two(half, dtype)
    second = _power_of_two(k - half, dtype)
    return first, second


def _power_of_two(k: Array, dtype: np.dtype) -> Array:
    """Makes `2**k` of its bits: exact, which an exponential need not be."""
    is_double = dtype in (jnp.float64, jnp.complex128)
    wide = jnp.float64 if is_double else jnp.float32
    unsigned = jnp.uint64 if is_double else jnp.uint32
    info = jnp.finfo(wide)
    # The exponents of the smallest and of the largest power that is a normal number.
    integer = k.dtype.type
    lowest = integer(info.minexp)
    highest = integer(info.maxexp - 1)
    k = lax.clamp(lowest, k, highest)
    biased_exponent = (k + info.maxexp - 1).astype(unsigned)
    bits = biased_exponent << info.nmant
    power = lax.bitcast_convert_type(bits, wide)
    return power.astype(dtype)


def _magnitude_bits(x: Array) -> Array:
    unsigned = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(x, unsigned)
    return bits << 1 >> 1  # without the sign
