"""What 8 and 70 billion parameters would take, on paper, from what is measured here.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.projection

Measures how fast a core multiplies matrices, assigns units and takes singular values, how fast the
disk is read, and how often aligning and fusing reads each model; then multiplies that with the
numbers of Llama 3. Seconds are of a core, those of the disk of the clock. One host has as many
cores as `--cores`, which share the products of matrices alone. A pod has `--chips` chips whose
`--flops` are those of float32, and `--hosts` hosts with a disk of their own each; every chip solves
all assignments, for which it is taken to be as fast as a core.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import otfusion_jax as otf
from benchmarks.assignment import cost_of
from benchmarks.networks import llama

GB = 1e9
FILE_BYTES = 2**28
ASSIGNMENTS = (1024, 2048, 4096)
SINGULAR_VALUES = (128, 256, 512)


class Model(NamedTuple):
    """The numbers of a network: `heads` are those of keys and values, each with its queries."""

    name: str
    parameters: float
    depth: int
    width: int
    hidden: int
    heads: int
    head_units: int
    vocabulary: int


MODELS = (
    Model("8 B", 8.03e9, 32, 4096, 14_336, 8, 128, 128_256),
    Model("70 B", 70.6e9, 80, 8192, 28_672, 8, 128, 128_256),
)
"""Llama 3, from its technical report."""


class Rates(NamedTuple):
    """What was measured: powers of a size are pairs of the factor and the exponent."""

    disk_bytes: float
    reads: float
    flops: float
    assignment: tuple[float, float]
    singular_values: tuple[float, float]


# --- measuring


def core_seconds(call: Callable[[], Any]) -> float:
    """Returns what a call takes of the CPU."""
    start = time.process_time()
    call()
    return time.process_time() - start


def power_law(sizes: tuple[int, ...], call: Callable[[int], float]) -> tuple[float, float]:
    """Fits seconds by a power of the size."""
    seconds = [call(size) for size in sizes]
    exponent, logarithm = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(np.exp(logarithm)), float(exponent)


def seconds_of(law: tuple[float, float], size: int) -> float:
    """Evaluates a power of the size."""
    factor, exponent = law
    return factor * size**exponent


def assigned(size: int) -> float:
    """Assigns units that have nothing to do with each other, as two trained networks' mostly do."""
    cost: Any = cost_of("unrelated", size)  # of NumPy, as it is where values are known
    return core_seconds(lambda: otf.Exact().compute(otf.TransportProblem(cost)))


def decomposed(size: int) -> float:
    """Takes the singular values and vectors of a matrix."""
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
    return core_seconds(lambda: np.linalg.svd(matrix))


def multiplied(size: int = 2048) -> float:
    """Returns how many operations of float32 a core does per second in a product of matrices."""
    matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
    return 2 * size**3 / core_seconds(lambda: matrix @ matrix)


def read(folder: Path | None) -> float:
    """Returns how many bytes per second come from the disk, and not from the system's memory."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(np.random.default_rng(0).bytes(FILE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        np.fromfile(file.name, np.uint8)
        return FILE_BYTES / (time.perf_counter() - start)


def reads() -> float:
    """Returns how often the bytes of both models are read in all, when they are fused."""
    fn, shapes, tokens = llama(4, 64, 4, 176, 500)
    looked_at = 0
    models = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        params = {}
        for name, shape in shapes.items():
            array = np.abs(rng.standard_normal(shape)).astype(jnp.bfloat16)

            def look(array: np.ndarray = array) -> np.ndarray:
                nonlocal looked_at
                looked_at += array.nbytes
                return array

            params[name] = otf.LazyArray(shape, array.dtype, look)
        models.append(params)
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    symmetry = otf.trace_symmetry(fn, structs, jax.ShapeDtypeStruct(tokens, jnp.int32))
    symmetry = symmetry.with_rotations()
    a, b = (otf.canonicalize(symmetry, model) for model in models)
    alignment = otf.align(symmetry, a, b, method=otf.ForwardPass())
    for leaf in otf.average([otf.transport(symmetry, alignment, a), b]).values():
        np.asarray(leaf)
    return looked_at / sum([leaf.nbytes for leaf in models[0].values()])


# --- on paper


class Work(NamedTuple):
    """What a model takes: bytes to be read, operations of float32, and seconds of a single core."""

    read_bytes: float
    flops: float
    assignments: float
    singular_values: float


def work_of(model: Model, rates: Rates) -> Work:
    """Counts what aligning by Algorithm 1 with rotations, and fusing, takes."""
    attention = model.width * model.heads * model.head_units
    gates = 2 * model.width * model.hidden
    # To compare n units by a parameter, each of its numbers is multiplied n times.
    costs = model.depth * 2 * (gates * model.hidden + attention * model.heads * model.head_units)
    costs += 2 * model.width * model.vocabulary * model.width
    # What is compared is rotated before, and then all parameters are, for the distance and for the
    # result.
    compared = model.depth * (gates + attention)
    moves = 2 * model.width * (compared + 2 * model.parameters)
    heads = model.depth * model.heads**2 * seconds_of(rates.singular_values, model.head_units)
    return Work(
        read_bytes=rates.reads * 2 * model.parameters,
        flops=costs + moves,
        assignments=model.depth * seconds_of(rates.assignment, model.hidden),
        singular_values=heads + seconds_of(rates.singular_values, model.width),
    )


def main() -> None:
    """Measures, multiplies, and prints Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=64, help="of one host")
    parser.add_argument("--chips", type=int, default=64, help="of a pod")
    parser.add_argument("--hosts", type=int, default=16, help="of a pod")
    # 197e12 of bfloat16, as Google says of a TPU v5e; in full precision it takes six of these.
    parser.add_argument("--flops", type=float, default=197e12 / 6, help="of a chip, in float32")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured")
    options = parser.parse_args()
    rates = Rates(
        read(options.folder),
        reads(),
        multiplied(),
        power_law(ASSIGNMENTS, assigned),
        power_law(SINGULAR_VALUES, decomposed),
    )
    print(
        "| disk (GB/s) | each model is read | float32 of a core (GFLOP/s) | "
        "assignment of 4,096 (s) | exponent | singular values of 512 (s) | exponent |\n"
        "|---:|---:|---:|---:|---:|---:|---:|\n"
        f"| {rates.disk_bytes / GB:.2f} | {rates.reads / 2:.1f} times | {rates.flops / 1e9:.0f} | "
        f"{seconds_of(rates.assignment, 4096):.2f} | {rates.assignment[1]:.2f} | "
        f"{seconds_of(rates.singular_values, 512):.2f} | {rates.singular_values[1]:.2f} |\n\n"
        "| parameters | on | read (h) | products (h) | assignments (h) | singular values (h) |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    places = {
        f"one host of {options.cores} cores": (1, options.cores * rates.flops),
        f"a pod of {options.chips} chips": (options.hosts, options.chips * options.flops),
    }
    for model in MODELS:
        work = work_of(model, rates)
        for place, (disks, flops) in places.items():
            seconds = (
                work.read_bytes / rates.disk_bytes / disks,
                work.flops / flops,
                work.assignments,
                work.singular_values,
            )
            cells = " | ".join([f"{each / 3600:.2f}" for each in seconds])
            print(f"| {model.name} | {place} | {cells} |")


if __name__ == "__main__":
    main()
