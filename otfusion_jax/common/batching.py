"""Matching a group jointly with what is nested in it.

Which head is which can't be told before the units inside of it are matched: the cost between two
heads is that of their best match inside. So all pairs of heads are solved, then the heads, and each
head keeps the match that it was chosen for.
"""

from collections.abc import Callable
from typing import Any

import jax


def at_once(count: int) -> int:
    """Says how many of some equal problems to work on under one `jax.vmap`.

    Args:
        count: of the problems.

    Returns:
        All, but on a CPU one: it gains nothing by doing the same thing to many, and each would wait
        for the slowest.
    """
    return 1 if jax.default_backend() == "cpu" else count


def map_in_batches(fn: Callable[[Any], Any], stacked: Any, batch_size: int) -> Any:
    """Applies a function to each of a stack of arguments, some of them under one `jax.vmap`.

    Args:
        fn: from a pytree to a pytree.
        stacked: its arguments, with leaves `[count, ...]`.
        batch_size: how many to work on at once.

    Returns:
        The results, stacked.
    """
    # `jax.lax.map` cannot batch arrays without elements, which a leaf of the parameters may be.
    empty = any(x.size == 0 for x in jax.tree.leaves(stacked))
    return jax.lax.map(fn, stacked, batch_size=None if empty or batch_size == 1 else batch_size)
