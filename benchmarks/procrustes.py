"""Seconds of one orthogonal Procrustes problem beside scipy's, in one run.

    python -m benchmarks.procrustes

Prints one row per size: seconds to trace and compile, seconds of scipy's `orthogonal_procrustes`,
seconds of a warm call of `procrustes`, their ratio, and the duality gap as a share of the value.
"""

import argparse
import os
import platform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.linalg import orthogonal_procrustes

from benchmarks.timing import seconds
from otfusion_jax.solvers.procrustes import procrustes


def compile_for(cross: Array) -> None:
    """Traces and compiles the program for matrices of this size."""
    procrustes.lower(cross).compile()


def main() -> None:
    """Times all sizes, and prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--runs", type=int, default=9, help="calls, of which the median is taken")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}\n\n"
        "| n | compile (s) | scipy (s) | ours (s) | ratio | gap / value |\n"
        "|---:|---:|---:|---:|---:|---:|"
    )
    for size in options.sizes:
        cross = np.random.default_rng(size).normal(size=(size, size)).astype(np.float32)
        identity = np.eye(size, dtype=np.float32)
        on_device = jnp.asarray(cross)
        compilation = seconds(1, compile_for, on_device)
        found = jax.block_until_ready(procrustes(on_device))
        ours = seconds(options.runs, procrustes, on_device)
        # With the identity as the source, scipy is given the same matrix of inner products.
        theirs = seconds(options.runs, orthogonal_procrustes, identity, cross)
        share = abs(float(found.gap / found.value))
        print(
            f"| {size:,} | {compilation:.2f} | {theirs:.4f} | {ours:.4f} | {ours / theirs:.2f} "
            f"| {share:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
