"""A pure function and its parameters from a module that holds its own.

Linen and Haiku separate the two by themselves; NNX and Equinox keep parameters inside of modules.
Neither is a dependency of this library: nothing of them is imported unless the user has done so.
"""

import sys
from collections.abc import Callable
from typing import Any

from otfusion_jax.common.arguments import kind_of
from otfusion_jax.common.typing import PyTree


def functional(module: Any) -> tuple[Callable[..., Any], PyTree]:
    """Takes an NNX or Equinox module apart into a pure function and its parameters.

    Switch it to inference first: `module.eval()` in NNX, `equinox.nn.inference_mode(module)`. Two
    modules of one architecture give interchangeable functions.

    Args:
        module: A `flax.nnx.Module` or an `equinox.Module`. It stays as it is.

    Returns:
        `fn(params, *inputs)` and `params`. Of an NNX module these are its `nnx.State`, of an
        Equinox module the module with everything but its floating arrays replaced by None. To have
        a module again: `nnx.update(module, params)`, and `equinox.combine(params, module)`.

    Raises:
        TypeError: If it is anything else. The message says what to do instead.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> models = [nnx.Linear(3, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
        >>> (fn, a), (_, b) = map(otf.functional, models)
        >>> fn(a, jnp.ones((1, 3))).shape
        (1, 2)
        >>> nnx.update(models[0], otf.average([a, b]))
    """
    # A module of a library can only be here if that library has been imported.
    nnx = sys.modules.get("flax.nnx")
    equinox = sys.modules.get("equinox")
    if nnx is not None and isinstance(module, nnx.Module):
        graph, state = nnx.split(module)

        def call_nnx(params: PyTree, *inputs: PyTree) -> PyTree:
            return nnx.merge(graph, params)(*inputs)

        return call_nnx, state
    if equinox is not None and isinstance(module, equinox.Module):
        params, static = equinox.partition(module, equinox.is_inexact_array)

        def call_equinox(params: PyTree, *inputs: PyTree) -> PyTree:
            return equinox.combine(params, static)(*inputs)

        return call_equinox, params
    if isinstance(module, type):
        raise TypeError(
            f"the class {module.__name__} was given as the module; pass an instance, which has "
            "parameters"
        )
    raise TypeError(
        f"{kind_of(module)} is no module of NNX or Equinox. Of a Linen module take `apply` "
        "and its variables, of a Haiku network `haiku.without_apply_rng(haiku.transform(f)).apply` "
        "and what its `init` returns; any pure function of a pytree will do as it is"
    )
