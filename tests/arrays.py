"""Arrays for tests, made by NumPy and put on the device as they are.

JAX would compile a program for each operation and shape, at some 40 ms. There are thousands of them
in a suite whose every network has shapes of its own.
"""

from typing import Any

import jax
import numpy as np


def array(value: Any, dtype: Any = np.float32) -> jax.Array:
    """Puts what NumPy takes for an array on the device."""
    return jax.device_put(np.array(value, dtype))


def ones(*shape: int) -> jax.Array:
    return array(np.ones(shape))


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    """Draws from the normal distribution."""
    return array(np.random.default_rng(seed).standard_normal(shape), dtype)


def uniform(*shape: int, seed: int = 0) -> jax.Array:
    """Draws from the uniform distribution on [-1, 1]."""
    return array(np.random.default_rng(seed).uniform(-1, 1, shape))


def normals(
    shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: Any = np.float32
) -> dict[str, jax.Array]:
    """Draws parameters, one after the other."""
    rng = np.random.default_rng(seed)
    return {name: array(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def stack(trees: list[Any]) -> Any:
    """Puts models beside each other, along a new first axis."""
    return jax.tree.map(lambda *leaves: array(np.stack(leaves), leaves[0].dtype), *trees)


def unstack(tree: Any, index: int) -> Any:
    """Takes one model out of a stack."""
    return jax.tree.map(lambda x: array(np.asarray(x)[index], x.dtype), tree)
