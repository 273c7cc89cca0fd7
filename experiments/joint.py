"""Many models made one: which of them, at what cost, and how consistently they are aligned."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

import otfusion_jax as otf
from experiments.networks import Network, training_step

# How often a program is timed; the fastest run counts.
_RUNS = 3

# What running a program takes.
SECONDS = "(s)"
MEBIBYTES = "(MiB)"

PairPlans = Callable[[int, int], dict[str, Array]]
"""Gives the plans from one model to another, by their positions."""


def draws(number: int, count: int, wanted: int) -> list[tuple[int, ...]]:
    """Chooses some of the models, several times; the same for the same arguments.

    Args:
        number: How many models there are.
        count: How many of them to choose.
        wanted: How many choices to make; fewer are made where there are no more.

    Returns:
        First the first models in order, then choices at random. Any two differ in who is among
        them or, as it is what the others are moved onto, in who comes last.
    """
    rng = np.random.default_rng(0)
    there = math.comb(number, count) * count
    found = {}
    chosen = tuple(range(count))
    while True:
        members = frozenset(chosen)
        found.setdefault((members, chosen[-1]), chosen)
        if len(found) == min(wanted, there):
            return list(found.values())
        shuffled = rng.permutation(number).tolist()
        chosen = tuple(shuffled[:count])


def inconsistency(symmetry: otf.Symmetry, plans: PairPlans, number: int) -> float | None:
    """Computes the percentage of units that a detour from a to b to c takes elsewhere.

    Args:
        symmetry: The symmetry of the models.
        plans: Gives the plans from one model to another. Units that rotate are left out: no unit of
            theirs is another one.
        number: How many models there are. All detours in their order count.

    Returns:
        The percentage; None with fewer than three models, as there is no detour.
    """
    shares = []
    for a, b, c in itertools.combinations(range(number), 3):
        detour = otf.compose(symmetry, plans(a, b), plans(b, c))
        direct = plans(a, c)
        elsewhere = []
        for name, plan in direct.items():
            if symmetry[name].rotates:
                continue
            differs = detour[name] != plan
            elsewhere.append(np.ravel(differs))
        shares.append(np.mean(np.concatenate(elsewhere)))
    return float(100 * np.mean(shares)) if shares else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and what running it takes.

    Attributes:
        run: Runs the program.
        costs: Seconds to compile it and to run it, and the MiB that it holds, by their names.
    """

    run: Callable[[PyTree], Any]
    costs: dict[str, float]


def compiled(method: Callable[[PyTree], Any], stack: PyTree) -> Program:
    """Makes one compiled program of a method, and measures what fusing a stack of models takes.

    Args:
        method: Makes one model of a stack.
        stack: A stack of models.

    Returns:
        The program, for stacks of as many models.
    """
    began = time.perf_counter()
    program = jax.jit(method).lower(stack).compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        jax.block_until_ready(program(stack))
        seconds.append(time.perf_counter() - began)
    # All that the program holds at once: a stack, what it makes of it, and what it needs meanwhile.
    memory: Any = program.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    costs = {"compile (s)": compile_seconds, SECONDS: min(seconds), MEBIBYTES: held / 2**20}
    return Program(program, costs)


def into_the_universe(
    network: Network, models: Sequence[PyTree], plans: dict[str, Array]
) -> list[PyTree]:
    """Moves models to their barycenter.

    Args:
        network: The architecture of all.
        models: The models.
        plans: For each group the plans of all models, stacked.

    Returns:
        The models, moved.
    """
    moved = []
    for index, model in enumerate(models):
        own_plans = {name: plan[index] for name, plan in plans.items()}
        moved.append(otf.transport(network.symmetry, own_plans, model))
    return moved


def regressed(network: Network, moved: list[PyTree], images: Array) -> PyTree:
    """Averages models that have been moved, and repairs the average by least squares.

    Args:
        network: The architecture of all.
        moved: The models, moved.
        images: Images without labels, on which features are taken.

    Returns:
        The average, repaired.
    """
    method = otf.LeastSquares(at="preactivation")
    return otf.repair(network.symmetry, network.apply, moved, images, method=method)


def merge(network: Network, models: Sequence[PyTree], **settings: object) -> otf.Merged:
    """Merges models by the one call.

    Args:
        network: The architecture of all.
        models: The models.
        **settings: What else `otf.merge` is to be told, such as the images.

    Returns:
        What it returns.
    """
    return otf.merge(
        network.apply,
        models,
        outputs="logits",
        symmetry=network.symmetry,
        update=training_step(network),
        **settings,  # pyright: ignore[reportArgumentType]
    )
