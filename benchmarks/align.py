"""Compile time and warm time of `align`, beside its two ingredients alone, in one run.

    python -m benchmarks.align

For parameters of the shapes of MLPNet, VGG11 and ResNet18, drawn at random from two seeds (worse
for an assignment solver than trained ones, whose costs have more structure), prints one row per
method: seconds to compile, seconds of a warm call, and the warm time as a multiple of the matrix
products of one pass over the ground costs alone, and of scipy's `linear_sum_assignment` on these
costs alone. Times are medians.
"""

import argparse
import functools
import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ott.geometry import costs
from scipy.optimize import linear_sum_assignment

import otfusion_jax as otf
from benchmarks.networks import NETWORKS
from benchmarks.timing import seconds
from otfusion_jax.alignment.costs import ground_cost, unit_gram
from otfusion_jax.symmetry.units import units_of

METHODS: dict[str, otf.AbstractMethod] = {
    "Algorithm 1, weights": otf.ForwardPass(),
    "coordinate descent, one start": otf.CoordinateDescent(starts=("forward",)),
    "coordinate descent, default": otf.CoordinateDescent(),
}


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """Draws parameters with variance 2 / fan-in."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) * np.sqrt(2 / np.prod(shape[:-1])).astype(np.float32)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@functools.partial(jax.jit, static_argnums=0)
def all_costs(symmetry: otf.Symmetry, source: PyTree, target: PyTree) -> list[Array]:
    """The ground cost of every group from the members that produce it, nothing moved."""
    a, b = jax.tree.leaves(source), jax.tree.leaves(target)
    found = []
    for group in symmetry.groups:
        grams = (
            unit_gram(
                units_of(a[m.leaf], m.location, group),
                units_of(b[m.leaf], m.location, group),
                group,
            )
            for m in group.having("produces")
        )
        found.append(ground_cost(costs.SqEuclidean(), functools.reduce(otf.Gram.__add__, grams)))
    return found


def assign_all(matrices: list[np.ndarray]) -> list[Any]:
    """Scipy's assignment of every cost."""
    return [linear_sum_assignment(cost) for cost in matrices]


def main() -> None:
    """Runs the benchmark and prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--runs", type=int, default=5, help="warm calls, of which the median is taken"
    )
    options = parser.parse_args()

    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}\n\n"
        "| network | method | compile (s) | warm (s) | × matmuls | × scipy |\n"
        "|---|---|---|---|---|---|"
    )
    for name in options.networks:
        apply, shapes, size = NETWORKS[name]()
        source, target = draw(shapes, 0), draw(shapes, 1)
        symmetry = otf.trace_symmetry(apply, source, jax.ShapeDtypeStruct(size, jnp.float32))

        matrices = [np.asarray(c) for c in all_costs(symmetry, source, target)]
        matmuls = seconds(options.runs, all_costs, symmetry, source, target)
        scipy = seconds(options.runs, assign_all, matrices)
        print(f"| {name} | cost matmuls alone | | {matmuls:.3f} | 1 | |")
        print(f"| {name} | scipy assignments alone | | {scipy:.3f} | | 1 |")
        for label, method in METHODS.items():
            run = jax.jit(functools.partial(otf.align, symmetry, method=method))
            start = time.perf_counter()
            compiled = run.lower(source, target).compile()
            compile_time = time.perf_counter() - start
            warm = seconds(options.runs, compiled, source, target)
            print(
                f"| {name} | {label} | {compile_time:.1f} | {warm:.3f} | {warm / matmuls:.1f} "
                f"| {warm / scipy:.1f} |"
            )


if __name__ == "__main__":
    main()
