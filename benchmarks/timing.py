"""The clock of the benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

LONGEST = 2.0
"""Seconds after which no call is timed once more."""


def seconds(runs: int, call: Callable[..., Any], *arguments: Any) -> float:
    """Median time of a call, its results awaited."""
    # Peers are timed where there is no JAX.
    import jax

    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def later_seconds(call: Callable[[], Any]) -> float:
    """Median time of up to nine calls, of fewer if these take long. Results have to be there."""
    times: list[float] = []
    while len(times) < 9 and sum(times) < LONGEST:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
