"""Scaling by powers of two: exact, and a way around squares that are too large or too small.

On a CPU, XLA takes subnormal numbers for zero. Here they are read by their bits.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int


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


@jax.custom_jvp
def scaled(x: Inexact[Array, "..."], k: Int[Array, ""]) -> Inexact[Array, "..."]:
    """Multiplies by a power of two.

    Args:
        x: of any shape and precision.
        k: the exponent.

    Returns:
        `x * 2**k`, rounded only where the result is subnormal.
    """
    if x.dtype not in (jnp.float32, jnp.float64):
        return _times(x, k)
    info = jnp.finfo(x.dtype)
    bits = _magnitude_bits(x)
    subnormal = jnp.where(jnp.signbit(x), -1, 1).astype(x.dtype) * bits.astype(x.dtype)
    return jnp.where(
        bits >> info.nmant == 0, _times(subnormal, k + info.minexp - info.nmant), _times(x, k)
    )


@scaled.defjvp
def _scaled_jvp(primals, tangents):
    (x, k), (change, _) = primals, tangents
    return scaled(x, k), _times(change, k)


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


def _times(x: Array, k: Array) -> Array:
    """Multiplies by a power of two, in two steps: of the widest ratio neither is out of range."""
    half = k >> 1
    return x * _power(half, x.dtype) * _power(k - half, x.dtype)


def _power(k: Array, dtype: np.dtype) -> Array:
    wide = jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32
    info = jnp.finfo(wide)
    k = jnp.clip(k, info.minexp, info.maxexp - 1)
    kind = jnp.uint64 if wide == jnp.float64 else jnp.uint32
    bits = (k + info.maxexp - 1).astype(kind) << info.nmant
    return lax.bitcast_convert_type(bits, wide).astype(dtype)


def _magnitude_bits(x: Array) -> Array:
    kind = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(x, kind)
    return bits << 1 >> 1  # without the sign


def _wide(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
