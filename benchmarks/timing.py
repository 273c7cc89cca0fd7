"""The clock of the benchmarks."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(runs: int, call: Callable[..., Any], *arguments: Any) -> float:
    """Median time of a call, its results awaited."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
