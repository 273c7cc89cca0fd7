"""What makes a first call fast: few programs, and nothing worked out twice."""

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from jax import export
from ott.geometry import costs
from zoo import CASES

import otfusion_jax as otf
from otfusion_jax.alignment import coordinate_descent, descent_memory, problem, visit
from otfusion_jax.alignment.problem import AlignmentProblem, set_up_problem
from otfusion_jax.common import host
from otfusion_jax.symmetry.groups import Plans


def residual(depth: int, width: int = 4, hidden: int = 6) -> tuple[Any, dict[str, jax.Array]]:
    """A residual stream with some blocks, all alike."""
    params = {"in": normal(3, width), "out": normal(width, 2)}
    for number in range(depth):
        params[f"up{number}"] = normal(width, hidden, seed=2 * number)
        params[f"down{number}"] = normal(hidden, width, seed=2 * number + 1)

    def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = x @ params["in"]
        for number in range(depth):
            x = x + jnp.tanh(x @ params[f"up{number}"]) @ params[f"down{number}"]
        return x @ params["out"]

    return apply, params


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    """Known values are worked on by JAX, as where they lie on an accelerator."""
    for module in (host, problem):
        monkeypatch.setattr(module, "at_hand", lambda tree: False)


def programs_of(caplog: pytest.LogCaptureFixture, depth: int) -> int:
    """How many programs are compiled to fuse two networks of some depth."""
    apply, a = residual(depth)
    b = jax.tree.map(lambda x: x[::-1], a)
    symmetry = otf.trace_symmetry(apply, a, normal(2, 3))
    jax.clear_caches()
    caplog.clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        jax.block_until_ready(otf.fuse(symmetry, [a, b]))
    return sum("Finished XLA compilation" in record.message for record in caplog.records)


@pytest.mark.usefixtures("elsewhere")
def test_blocks_that_are_alike_share_their_programs(caplog: pytest.LogCaptureFixture):
    few = programs_of(caplog, 3)
    assert few > 5
    assert programs_of(caplog, 12) <= few


@pytest.mark.compatibility
def test_known_values_on_a_cpu_need_no_program(caplog: pytest.LogCaptureFixture):
    assert programs_of(caplog, 3) == 0


def repair_of(depth: int, method: otf.AbstractRepair) -> Callable[[], Any]:
    """What repairs the average of two networks of some depth."""
    apply, a = residual(depth)
    b = jax.tree.map(lambda x: 0.5 * x[::-1] + x, a)
    x = normal(32, 3)
    symmetry = otf.trace_symmetry(apply, a, x)
    return lambda: otf.repair(symmetry, apply, [a, b], x, method=method)


REPAIRS = pytest.mark.parametrize(
    "method",
    [
        otf.RestoreStatistics(),
        otf.LeastSquares(),
        otf.LeastSquares(ridge=(0.01, 0.1), steps=None),
    ],
    ids=["statistics", "steps", "ridges"],
)


@REPAIRS
@pytest.mark.compatibility
def test_a_repair_compiles_the_network_alone_each_kind_of_layer_once(
    method: otf.AbstractRepair, caplog: pytest.LogCaptureFixture
):
    counts = []
    for depth in (3, 6):
        repair = repair_of(depth, method)
        jax.clear_caches()
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            repair()
        compiled = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
        assert all("run_program" in line or "_outputs" in line for line in compiled)
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0


@REPAIRS
def test_a_repair_elsewhere_is_that_of_numpy(
    method: otf.AbstractRepair, request: pytest.FixtureRequest
):
    repair = repair_of(2, method)
    by_numpy = repair()
    request.getfixturevalue("elsewhere")
    chex.assert_trees_all_close(repair(), by_numpy, atol=1e-4)


def planted(name: str) -> tuple[AlignmentProblem, otf.Symmetry]:
    """The problem of aligning a network of the zoo to another."""
    case = CASES[name]()
    symmetry = otf.trace_symmetry(case.fn, case.params, *case.inputs)
    noisy = jax.tree.map(
        lambda x: x + 0.5 * normal(*x.shape, seed=1) if x.dtype == np.float32 else x, case.params
    )
    metric = costs.SqEuclidean()
    made, _ = set_up_problem(symmetry, symmetry, case.params, noisy, metric, otf.Exact())
    return made, symmetry


def some_moved(symmetry: otf.Symmetry, plans: Plans, seed: int) -> Plans:
    """Plans of which some are the same arrays as before, and others have two units swapped."""
    draw = np.random.default_rng(seed)
    changed = {}
    for name, plan in plans.items():
        changed[name] = plan
        if draw.random() < 0.5 and plan.shape[-1] > 2:
            values = np.array(plan)
            first, second = draw.choice(plan.shape[-1], 2, replace=False)
            values[..., [first, second]] = values[..., [second, first]]
            changed[name] = jnp.asarray(values)
    return changed


@pytest.mark.parametrize("name", ["vgg", "resnet", "residual_layer_norm", "attention", "low_rank"])
def test_what_a_descent_remembers_is_what_it_would_work_out_anew(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    # Networks as small as these would not be worth an update.
    monkeypatch.setattr(descent_memory, "LEAST_WORK", 0)
    updates = []
    update = descent_memory.cross_updated
    counted = lambda *x, **named: updates.append(1) or update(*x, **named)  # noqa: E731
    monkeypatch.setattr(descent_memory, "cross_updated", counted)
    planted_problem, symmetry = planted(name)
    memory = descent_memory.DescentMemory(planted_problem)
    plans = symmetry.identity()
    for seed in range(6):
        for tree in planted_problem.group_trees:
            members = [group.members for group in tree.groups]
            found = memory.compare(tree, plans, members)
            assert memory.is_current(tree, plans)
            expected = planted_problem.compare(tree, plans, members)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, expected
            )
        expected = planted_problem.distance(plans)
        np.testing.assert_allclose(memory.distance(plans), expected, rtol=1e-5)
        plans = some_moved(symmetry, plans, seed)
    # Of heads and what is inside of them, everything is compared anew.
    assert bool(updates) == (name != "attention")


def test_groups_whose_neighbours_stay_are_not_solved_again(monkeypatch: pytest.MonkeyPatch):
    apply, a = residual(6)
    symmetry = otf.trace_symmetry(apply, a, normal(2, 3))
    # Of the hidden layers, one alone is out of order.
    plans = {"up3": jnp.asarray([1, 0, 2, 3, 4, 5])}
    moved = otf.transport(symmetry, plans, a)
    b = jax.tree.map(lambda x: x + 0.01 * normal(*x.shape, seed=9), moved)
    solved = []
    solve = visit.solve_assignment

    def counted(*arguments: Any) -> Any:
        solved.append(1)
        return solve(*arguments)

    monkeypatch.setattr(visit, "solve_assignment", counted)
    method = otf.CoordinateDescent(starts=("identity",))
    found = otf.align(symmetry, a, b, method=method)
    assert found.converged
    np.testing.assert_array_equal(found.plans["up3"], plans["up3"])
    # All seven once; of the second sweep, the stream alone, which is next to what has moved.
    assert len(solved) == len(symmetry.groups) + 1


@pytest.mark.compatibility
@pytest.mark.filterwarnings("ignore::otfusion_jax.StatisticsWarning")
@pytest.mark.parametrize("name", ["vgg", "resnet", "attention", "mlp"])
@pytest.mark.parametrize("method", [otf.CoordinateDescent(), otf.ForwardPass()])
def test_known_values_and_traced_ones_come_to_the_same(
    name: str, method: otf.AbstractMethod, request: pytest.FixtureRequest
):
    planted_problem, symmetry = planted(name)
    source, target = planted_problem.source, planted_problem.target
    a, b = (host.as_jax(symmetry.join(arrays)) for arrays in (source, target))
    align = functools.partial(otf.align, symmetry, method=method)
    by_numpy = align(a, b)
    fused = otf.fuse(symmetry, [a, b], method=method)
    traced = jax.jit(align)(a, b)
    request.getfixturevalue("elsewhere")
    by_jax = align(a, b)
    for other in (traced, by_jax):
        for group in symmetry.groups:
            np.testing.assert_array_equal(by_numpy.plans[group.name], other.plans[group.name])
        np.testing.assert_allclose(by_numpy.objective, other.objective, rtol=1e-5)
        np.testing.assert_allclose(by_numpy.history, other.history, rtol=1e-5)
        assert by_numpy.converged == other.converged
        chex.assert_trees_all_equal_shapes_and_dtypes(by_numpy, other)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(by_numpy))
    fused_by_jax = otf.fuse(symmetry, [a, b], method=method)
    chex.assert_trees_all_equal_shapes_and_dtypes(fused, fused_by_jax)
    chex.assert_trees_all_close(fused, fused_by_jax, rtol=1e-6, atol=1e-6)


def test_a_descent_ends_where_nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    apply, a = residual(3)
    symmetry = otf.trace_symmetry(apply, a, normal(2, 3))
    b = otf.transport(symmetry, symmetry.random(jax.random.key(0)), a)
    solved = []
    solve = visit.solve_assignment
    monkeypatch.setattr(visit, "solve_assignment", lambda *x: solved.append(1) or solve(*x))
    monkeypatch.setattr(coordinate_descent.DescentSweep, "compare", None)
    found = otf.align(symmetry, a, b)
    assert found.objective == 0
    assert found.converged
    assert len(solved) == len(symmetry.groups)


SCRIPT = """
import jax, jax.monitoring
misses = []
jax.monitoring.register_event_listener(
    lambda name, **_: misses.append(name) if name.endswith("cache_misses") else None
)
import jax.numpy as jnp
import otfusion_jax as otf
def network(params, x):
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ params[-1]
def draw(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(k, s) for k, s in zip(keys, ((3, 5), (5, 4), (4, 2)))]
symmetry = otf.trace_symmetry(network, draw(0), jnp.ones((1, 3)))
fused = jax.jit(lambda a, b: otf.fuse(symmetry, [a, b]))(draw(0), draw(1))
print(len(misses), float(fused[0].sum()))
"""


def test_a_cache_of_programs_serves_the_next_process(tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    lines = []
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        lines.append(done.stdout.split())
    (first, value), (second, value_again) = lines
    assert int(first) > 5
    assert int(second) == 0
    assert value == value_again


@pytest.mark.compatibility
def test_a_traced_alignment_is_one_program_for_accelerators():
    apply, a = residual(2)
    symmetry = otf.trace_symmetry(apply, a, normal(2, 3))
    fuse = jax.jit(lambda a, b: otf.fuse(symmetry, [a, b]))
    exported = export.export(fuse, platforms=("cuda", "tpu"))(a, a)
    text = exported.mlir_module()
    assert "callback" not in text
    assert "f64" not in text
