"""How many equal problems are worked on at once: all on an accelerator, one at a time on a CPU."""

from collections.abc import Callable
from typing import Any

import jax


def at_once(count: int) -> int:
    """Returns how many of some equal problems to work on under one `jax.vmap`.

    Args:
        count: The number of problems.

    Returns:
        The number that are worked on at once: all of them, or one on a CPU.
    """
    # A CPU gains nothing by doing the same thing to many problems, and each of them would wait for
    # the one that takes the most iterations.
    return 1 if jax.default_backend() == "cpu" else count


def map_in_batches(fn: Callable[[Any], Any], stacked: Any, batch_size: int) -> Any:
    """Applies a function to each of a stack of arguments, several of them under one `jax.vmap`.

    Args:
        fn: A function from a pytree to a pytree.
        stacked: The arguments, a pytree with leaves `[count, ...]`.
        batch_size: The number of arguments to work on at once.

    Returns:
        The results, a pytree with leaves `[count, ...]`.
    """
    # `jax.lax.map` cannot batch arrays without elements, which a leaf of the parameters may be.
    sizes = [leaf.size for leaf in jax.tree.leaves(stacked)]
    if batch_size == 1 or 0 in sizes:
        return jax.lax.map(fn, stacked)
    return jax.lax.map(fn, stacked, batch_size=batch_size)
