"""Seconds of one exact assignment beside scipy's, in one run.

    python -m benchmarks.assignment

Prints one row per kind of cost and size: seconds of scipy's `linear_sum_assignment`, seconds of a
warm call of `Exact().solve`, their ratio, and the duality gap as a share of the value.
"""

import argparse
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

import otfusion_jax as otf
from benchmarks.timing import seconds

KINDS = ("planted", "unrelated", "drawn")
FEATURES = 256


def cost_of(kind: str, size: int) -> np.ndarray:
    """A cost of some kind, float32 `[size, size]`."""
    generator = np.random.default_rng(size)
    if kind == "drawn":
        return generator.normal(size=(size, size)).astype(np.float32)
    x = generator.normal(size=(size, FEATURES)).astype(np.float32)
    y = generator.normal(size=(size, FEATURES)).astype(np.float32)
    if kind == "planted":
        y = x[generator.permutation(size)] + y / 2
    return np.sum(x * x, 1)[:, None] + np.sum(y * y, 1)[None] - 2 * x @ y.T


def main() -> None:
    """Times all kinds and sizes, and prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--runs", type=int, default=3, help="calls, of which the median is taken")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}\n\n"
        "| cost | n | scipy (s) | ours (s) | ratio | gap / value |\n|---|---:|---:|---:|---:|---:|"
    )
    solve = jax.jit(otf.Exact().solve)
    for kind in KINDS:
        for size in options.sizes:
            cost = cost_of(kind, size)
            on_device = jnp.asarray(cost)
            found = jax.block_until_ready(solve(on_device))
            ours = seconds(options.runs, solve, on_device)
            theirs = seconds(options.runs, linear_sum_assignment, cost)
            share = abs(float(found.gap / found.value))
            print(
                f"| {kind} | {size:,} | {theirs:.3f} | {ours:.3f} | {ours / theirs:.2f} "
                f"| {share:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
