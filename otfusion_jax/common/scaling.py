"""Scaling by powers of two: exact, and a way around squares that are too large or too small.

On a CPU, XLA takes subnormal numbers for zero. Here they are read by their bits.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, PyTree


def exponent(x: Float[Array, "..."]) -> Int[Array, ""]:
    """Says which power of two is just above all magnitudes.

    Args:
        x: of any shape.

    Returns:
        int32 `[]`, the least k with `|x| < 2**k` everywhere; 0 if there is nothing but zeros.
    """
    x = _wide(lax.stop_gradient(x))
    info = jnp.finfo(x.dtype)
    top = jnp.max(_magnitude_bits(x), initial=0)
    field = (top >> info.nmant).astype(jnp.int32)
    length = (info.bits - lax.clz(top)).astype(jnp.int32)
    # A subnormal number has no leading digit of its own: its value is that of its bits.
    k = jnp.where(field > 0, field + info.minexp, length + info.minexp - info.nmant)
    return jnp.where(top > 0, k, 0)


def not_finite(x: Any) -> int:
    """Counts the values of an array that are not finite. Not to be called with a tracer.

    Args:
        x: of any shape and a floating-point or complex dtype.

    Returns:
        Their number.
    """
    # Where NumPy can read the values as they lie, nothing has to be compiled for their shape.
    here = not isinstance(x, jax.Array) or all(d.platform == "cpu" for d in x.devices())
    if here and getattr(x, "is_fully_addressable", True):
        return int(np.size(x) - np.count_nonzero(np.isfinite(np.asarray(x))))
    with jax.ensure_compile_time_eval():  # it may be closed over by what is traced
        return int(np.size(x) - jnp.isfinite(x).sum())


def common_exponent(arrays: Iterable[Inexact[Array, "..."]]) -> Int[Array, ""]:
    """Says which power of two is just above all magnitudes in some arrays.

    Args:
        arrays: of any shapes, real or complex.

    Returns:
        int32 `[]`, see `exponent`; 0 without any array.
    """
    parts = [p for x in arrays for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    largest = [jnp.max(jnp.abs(p), initial=0) for p in parts]
    if not largest:
        return jnp.zeros((), jnp.int32)
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in largest) else jnp.float32
    return exponent(jnp.stack([x.astype(dtype) for x in largest]))


def scaled(x: Inexact[Array, "..."], k: Int[Array, ""]) -> Inexact[Array, "..."]:
    """Multiplies by a power of two.

    Args:
        x: of any shape and precision.
        k: the exponent.

    Returns:
        `x * 2**k`, rounded only where the result is subnormal.
    """
    return all_scaled([x], k)[0]


def all_scaled(
    arrays: Sequence[Inexact[Array, "..."]], k: Int[Array, ""]
) -> list[Inexact[Array, "..."]]:
    """Multiplies several arrays by one power of two, which is worked out once for all.

    Args:
        arrays: each of any shape and precision.
        k: the exponent.

    Returns:
        Each as `scaled` returns it.
    """
    factors = {}
    for dtype in dict.fromkeys(x.dtype for x in arrays):
        lift = None
        if dtype in (jnp.float32, jnp.float64):
            info = jnp.finfo(dtype)
            lift = _factors(k + info.minexp - info.nmant, dtype)
        factors[dtype] = _factors(k, dtype), lift
    return [_multiplied(x, *factors[x.dtype]) for x in arrays]


def restored(tree: PyTree, k: Int[Array, ""], degree: int = 1) -> PyTree:
    """Brings back to its range what was computed from numbers that had been scaled by `2**-k`.

    A program of a third of the size of `all_scaled`: here it is left to the device whether
    subnormal numbers are taken for zero.

    Args:
        tree: arrays of any shape and precision.
        k: the exponent.
        degree: in which power of these numbers the arrays are, such as 2 for squares.

    Returns:
        Each array times `2**(k * degree)`, a factor at a time, none of which is out of range.
    """
    dtypes = dict.fromkeys(x.dtype for x in jax.tree_util.tree_leaves(tree))
    factors = {dtype: _factors(k, dtype) for dtype in dtypes}

    def multiplied(x: Array) -> Array:
        for factor in degree * factors[x.dtype]:
            x = x * factor
        return x

    return jax.tree.map(multiplied, tree)


@jax.custom_jvp
def _multiplied(x: Array, factors: tuple[Array, Array], lift: tuple[Array, Array] | None) -> Array:
    """Multiplies by two factors; the integers that the bits of subnormal numbers are, by others."""
    if lift is None:
        return x * factors[0] * factors[1]
    info = jnp.finfo(x.dtype)
    bits = _magnitude_bits(x)
    subnormal = bits >> info.nmant == 0
    integers = bits.astype(x.dtype)
    x = jnp.where(subnormal, jnp.where(jnp.signbit(x), -integers, integers), x)
    for normal, lifted in zip(factors, lift, strict=True):
        x = x * jnp.where(subnormal, lifted, normal)
    return x


@_multiplied.defjvp
def _multiplied_jvp(primals, tangents):
    _, factors, _ = primals
    return _multiplied(*primals), tangents[0] * factors[0] * factors[1]


def deviation(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Takes standard deviations, of values whose squares may be out of range.

    Args:
        x: the values.
        axis: along which.

    Returns:
        The deviations, without that axis.
    """
    k = common_exponent([x])
    return scaled(jnp.std(scaled(x, -k), axis=axis), k)


def _factors(k: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Splits a power of two into two: of the widest ratio neither is out of range."""
    half = k >> 1
    return _power(half, dtype), _power(k - half, dtype)


def _power(k: Array, dtype: np.dtype) -> Array:
    wide = jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32
    info = jnp.finfo(wide)
    k = lax.clamp(k.dtype.type(info.minexp), k, k.dtype.type(info.maxexp - 1))
    kind = jnp.uint64 if wide == jnp.float64 else jnp.uint32
    bits = (k + info.maxexp - 1).astype(kind) << info.nmant
    return lax.bitcast_convert_type(bits, wide).astype(dtype)


def _magnitude_bits(x: Array) -> Array:
    kind = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(x, kind)
    return bits << 1 >> 1  # without the sign


def _wide(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
