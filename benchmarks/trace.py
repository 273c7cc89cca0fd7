"""Time of `trace_symmetry` against the depth of a transformer, and for one of a billion parameters.

    python -m benchmarks.trace

Prints one row per network: parameters, equations of its jaxpr (those inside of calls and loops
included), seconds to trace and to walk, the same per equation, groups found. Tracing costs as much
per equation however many there are. Nothing is run, and nothing is allocated. Times are medians.
"""

import argparse
import math
import os
import platform

import jax
import jax.numpy as jnp
from jax.extend import core

import otfusion_jax as otf
from benchmarks.networks import transformer
from benchmarks.timing import seconds
from otfusion_jax.tracing import jaxprs


def equations(jaxpr: core.Jaxpr) -> int:
    """Counts the equations of a jaxpr and of all jaxprs inside of it."""
    return len(jaxpr.eqns) + sum(map(equations, jaxprs.subjaxprs(jaxpr.eqns)))


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description="Time of trace_symmetry against depth.")
    parser.add_argument("--runs", type=int, default=3, help="timed calls for each row")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48, 96])
    arguments = parser.parse_args()

    cases = {f"{depth} blocks of 256": (depth, 256, 8, 1000, False) for depth in arguments.depths}
    cases["one billion, 16 blocks of 2048"] = (16, 2048, 16, 50_000, False)
    cases["the same, scanned"] = (16, 2048, 16, 50_000, True)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, jax {jax.__version__}")
    print("| network | parameters | equations | trace (s) | per equation (ms) | groups |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, sizes in cases.items():
        fn, shapes, tokens = transformer(*sizes)
        params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
        inputs = jax.ShapeDtypeStruct(tokens, jnp.int32)
        count = equations(jax.make_jaxpr(fn)(params, inputs).jaxpr)
        groups = len(otf.trace_symmetry(fn, params, inputs).groups)
        spent = seconds(arguments.runs, otf.trace_symmetry, fn, params, inputs)
        total = sum(math.prod(shape) for shape in shapes.values())
        each = 1000 * spent / count
        print(f"| {name} | {total:,} | {count} | {spent:.2f} | {each:.2f} | {groups} |")


if __name__ == "__main__":
    main()
