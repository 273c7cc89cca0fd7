"""Pairs of small networks to align, of the kinds that `reference` has answers for.

Tests share stacks of one size, so that XLA compiles each program once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference as ref
from arrays import stack, unstack

import otfusion_jax as otf

COUNT = 24
"""How many pairs there are in a stack."""

DESCENT = otf.CoordinateDescent()
FROM_IDENTITY = otf.CoordinateDescent(starts=("identity",))
FORWARD = otf.ForwardPass()


@functools.cache
def symmetry_of(kind: str, bias: bool = True) -> otf.Symmetry:
    inputs = jax.ShapeDtypeStruct(ref.INPUTS[kind], jnp.float32)
    return otf.trace_symmetry(ref.network, ref.random_net(0, kind, bias), inputs)


@functools.cache
def pairs(kind: str, bias: bool = True) -> tuple[Any, Any]:
    """Two stacks of random networks."""
    nets = [ref.random_net(seed, kind, bias) for seed in range(2 * COUNT)]
    return stack(nets[:COUNT]), stack(nets[COUNT:])


def one_pair(index: int = 0, kind: str = "mlp") -> tuple[Any, Any]:
    sources, targets = pairs(kind)
    return unstack(sources, index), unstack(targets, index)


@functools.cache
def aligned(kind: str, method: otf.AbstractMethod) -> otf.Alignment:
    """The whole stack, aligned."""
    align = functools.partial(otf.align, symmetry_of(kind), method=method)
    return jax.vmap(align)(*pairs(kind))


def as_list(plans: Any) -> list[np.ndarray]:
    """The plans in the order of the layers, which is that of their names."""
    return [np.asarray(plans[name]) for name in sorted(plans)]
