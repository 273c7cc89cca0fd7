"""How the seconds and the memory of `align` grow with width and depth, and dozens of pairs at once.

    python -m benchmarks.growth --plot docs/growth.png

MLPs of three hidden layers as their width doubles, and transformers of width 64 as their depth
doubles. The target is the source, permuted, with noise of a third of the parameters' deviation, so
that costs have the structure of those of trained networks. Each size is a process of its own.
Prints one row per size, the exponents that fit the larger half of the sizes best, and then the
seconds of `align` of many pairs of small MLPs under one `jax.vmap` beside a loop.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import otfusion_jax as otf
from benchmarks.first_call import draw
from benchmarks.networks import Network, mlp, transformer

WIDTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = (6, 12, 24, 48, 96)
NOISE = 1 / 3


def network_of(kind: str, size: int) -> Network:
    """The network of a size."""
    if kind == "width":
        return mlp((784, size, size, size, 10))
    return transformer(size, 64, 4, 256)


def measure(kind: str, size: int) -> dict[str, float]:
    """Times `align` in this process, and reads off its peak of memory."""
    apply, shapes, input_size = network_of(kind, size)
    a = {name: jnp.asarray(x) for name, x in draw(shapes, 0).items()}
    x = jnp.zeros(input_size, jnp.float32 if kind == "width" else jnp.int32)
    symmetry = otf.trace_symmetry(apply, a, x)
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(0)), a)
    b = {}
    for number, (name, array) in enumerate(moved.items()):
        noise = np.random.default_rng(number).normal(size=array.shape).astype(np.float32)
        b[name] = jnp.asarray(np.asarray(array) + NOISE * float(jnp.std(array)) * noise)
    del moved
    jax.block_until_ready((a, b))
    before = _resident()
    start = time.perf_counter()
    jax.block_until_ready(otf.align(symmetry, a, b))
    first = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    jax.block_until_ready(otf.align(symmetry, a, b))
    model = sum(array.nbytes for array in a.values())
    # Both models are held by the caller: what comes on top of them is the call's.
    return {
        "first": first,
        "second": time.perf_counter() - start,
        "peak": (peak - before) / 1e9,
        "model": model / 1e9,
        "cost": 4 * max(group.size for group in symmetry.groups) ** 2 / 1e9,
    }


def _resident() -> int:
    """The memory that this process holds now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """The power of the size that the larger half of the values follow."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def time_pairs(count: int) -> None:
    """Prints the seconds of `align` of many pairs at once, and one after the other."""
    apply, shapes, size = mlp((16, 32, 32, 4))
    models = [draw(shapes, seed) for seed in range(2 * count)]
    symmetry = otf.trace_symmetry(apply, models[0], jnp.zeros(size))
    sources = jax.tree.map(lambda *x: jnp.stack(x), *models[:count])
    targets = jax.tree.map(lambda *x: jnp.stack(x), *models[count:])

    def plans(source: PyTree, target: PyTree) -> PyTree:
        return otf.align(symmetry, source, target).plans

    def loop(call: Callable[..., PyTree]) -> None:
        for source, target in zip(models[:count], models[count:], strict=True):
            jax.block_until_ready(call(source, target))

    at_once = jax.jit(jax.vmap(plans))
    jitted = jax.jit(plans)
    print(f"\n{count} pairs of MLPs of 16-32-32-4, first and second time:\n")
    for name, call in (
        ("under one `jax.vmap`", lambda: jax.block_until_ready(at_once(sources, targets))),
        ("in a loop, jitted", lambda: loop(jitted)),
        ("in a loop", lambda: loop(plans)),
    ):
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(f"- {name}: {seconds[0]:.2f} and {seconds[1]:.2f} s")


def main() -> None:
    """Measures all sizes, or the one of a child process, and prints Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--plot", metavar="FILE", help="draws the seconds and the memory")
    parser.add_argument("--pairs", type=int, default=200, help="how many pairs of small MLPs")
    parser.add_argument("--size", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size:
        kind, size = options.size
        print(json.dumps(measure(kind, int(size))))
        return
    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}"
    )
    found = {}
    for kind, sizes in (("width", WIDTHS), ("depth", DEPTHS)):
        print(
            f"\n| {kind} | first call (s) | second (s) | peak of the call (GB) | a model (GB) | "
            "largest cost (GB) |\n|---:|---:|---:|---:|---:|---:|"
        )
        rows = []
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.growth", "--size", kind, str(size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"| {size:,} | {row['first']:.1f} | {row['second']:.2f} | {row['peak']:.2f} | "
                f"{row['model']:.3f} | {row['cost']:.3f} |",
                flush=True,
            )
        found[kind] = rows
        seconds = exponent(sizes, [row["second"] for row in rows])
        memory = exponent(sizes, [max(row["peak"], 1e-3) for row in rows])
        print(f"\nSeconds grow with {kind} to the power of {seconds:.2f}, memory {memory:.2f}.")
    time_pairs(options.pairs)
    if options.plot:
        draw_growth(found, options.plot)


def draw_growth(found: dict[str, list[dict[str, float]]], path: str) -> None:
    """Draws seconds and memory over width and depth."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (kind, sizes) in zip(axes, (("width", WIDTHS), ("depth", DEPTHS)), strict=True):
        for name, label in (
            ("first", "first call (s)"),
            ("second", "second call (s)"),
            ("peak", "peak memory of the call (GB)"),
        ):
            axis.loglog(sizes, [row[name] for row in found[kind]], marker="o", label=label)
        axis.set_xlabel(f"{kind} of {'an MLP' if kind == 'width' else 'a transformer'}")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
