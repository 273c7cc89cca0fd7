"""Seconds of aligning language models of growing size, stage by stage.

    python -m benchmarks.stages

A network with the parts of Llama and a permutation of it, in bfloat16, by Algorithm 1. Stages are
the trace, what XLA takes to compile, and, after one layer has been aligned, so that all is
compiled, costs, solutions, and the push.
Beside them what it takes to trace, and to compile inside of `jax.jit`, for growing depths of a
network whose layers are scanned, and of one whose layers are not.
Seconds are of the process's CPUs, which other processes of the machine disturb less; those of the
compiler are JAX's own, of the clock.
"""

import argparse
import contextlib
import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import otfusion_jax as otf
from benchmarks.networks import llama, transformer
from otfusion_jax.alignment import visit
from otfusion_jax.alignment.forward_pass import ForwardSweep

SIZES = {
    "0.03": (4, 512, 8, 1408, 16_000),
    "0.1": (10, 768, 12, 2048, 16_000),
    "0.3": (20, 1024, 16, 2816, 16_000),
    "1": (24, 1792, 28, 4864, 16_000),
    "3": (28, 2880, 45, 7808, 16_000),
}
"""Depth, width, heads, hidden units and vocabulary, by billions of parameters."""


class Stages:
    """The seconds of each stage so far."""

    def __init__(self):
        names = ("trace", "compile", "costs", "solve", "push")
        self.seconds: dict[str, float] = dict.fromkeys(names, 0.0)
        jax.monitoring.register_event_duration_secs_listener(self.note)

    def note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Adds what JAX says that it took to compile."""
        if event.endswith("/backend_compile_duration"):
            self.seconds["compile"] += duration_secs

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds what is done in a context to a stage."""
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function whose calls are a stage."""

        @functools.wraps(call)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            with self.stage(name):
                return jax.block_until_ready(call(*arguments, **named))

        return wrapped


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Draws parameters in bfloat16."""
    generator = np.random.default_rng(0)
    params = {}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, np.float32) / np.sqrt(shape[0])
        params[name] = jnp.asarray(values.astype(jnp.bfloat16))
    return params


def aligned(size: tuple[int, ...], stages: Stages) -> int:
    """Aligns a network to a permutation of itself; returns the number of parameters."""
    fn, shapes, tokens = llama(*size)
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    with stages.stage("trace"):
        symmetry = otf.trace_symmetry(fn, structs, jax.ShapeDtypeStruct(tokens, jnp.int32))
    params = drawn(shapes)
    planted = symmetry.random(jax.random.key(0))
    with stages.stage("push"):
        target = jax.block_until_ready(otf.transport(symmetry, planted, params))
    found = otf.align(symmetry, params, target, method=otf.ForwardPass())
    if float(found.objective):
        raise RuntimeError("what was planted was not found")
    return sum(map(math.prod, shapes.values()))


def measure(size: tuple[int, ...], stages: Stages) -> int:
    """Aligns a network once all is compiled; returns the number of parameters."""
    # One layer has all the shapes, and equal leaves share programs.
    aligned((1, *size[1:]), stages)
    stages.seconds |= dict.fromkeys(("trace", "costs", "solve", "push"), 0.0)
    return aligned(size, stages)


def compiled(depth: int, *, scanned: bool) -> tuple[float, float]:
    """Traces a small network of equal layers, and compiles what aligns it inside of `jax.jit`.

    Returns:
        The seconds of the trace, and those of `jax.jit` until there is a program.
    """
    fn, shapes, tokens = transformer(depth, 64, 4, 100, scanned=scanned)
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    jax.clear_caches()
    start = time.process_time()
    symmetry = otf.trace_symmetry(fn, structs, jax.ShapeDtypeStruct(tokens, jnp.int32))
    traced = time.process_time()
    plans = functools.partial(otf.align, symmetry, method=otf.ForwardPass())
    jax.jit(lambda a, b: plans(a, b).plans).lower(structs, structs).compile()
    return traced - start, time.process_time() - traced


def main() -> None:
    """Measures, and prints Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.03", "0.1", "0.3"])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 32])
    options = parser.parse_args()
    print(
        f"{jax.devices()[0].platform}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}\n\n"
        "| parameters | trace | compile | costs | solve | push |\n|---:|---:|---:|---:|---:|---:|"
    )
    counts, rows = [], []
    for name in options.sizes:
        jax.clear_caches()
        stages = Stages()
        with contextlib.ExitStack() as patches:
            for holder, attribute, stage in (
                (ForwardSweep, "compare", "costs"),
                (visit, "solve_assignment", "solve"),
                (visit, "_solved", "solve"),
            ):
                original = getattr(holder, attribute)
                setattr(holder, attribute, stages.timed(stage, original))
                patches.callback(setattr, holder, attribute, original)
            counts.append(measure(SIZES[name], stages))
        rows.append(list(stages.seconds.values()))
        cells = " | ".join([f"{seconds:.2f}" for seconds in rows[-1]])
        print(f"| {counts[-1]:,} | {cells} |", flush=True)
    if len(counts) > 1:
        logarithms = np.log(np.maximum(rows, 1e-3))
        exponents = np.polyfit(np.log(counts), logarithms, 1)[0]
        print("| exponent | " + " | ".join([f"{power:.2f}" for power in exponents]) + " |")
    print(
        "\n| layers | scanned: trace | jit and compile | not scanned: trace | jit and compile |\n"
        "|---:|---:|---:|---:|---:|"
    )
    compiled(min(options.depths), scanned=True)  # imports, and the first use of the compiler
    for depth in options.depths:
        seconds = (*compiled(depth, scanned=True), *compiled(depth, scanned=False))
        print(f"| {depth} | " + " | ".join([f"{each:.2f}" for each in seconds]) + " |", flush=True)


if __name__ == "__main__":
    main()
