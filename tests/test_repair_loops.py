"""Repairs inside of `scan`, `cond`, `vmap` and calls, and what they say where they cannot go."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals

import otfusion_jax as otf
from otfusion_jax.fusion.flat_program import run_program

METHODS = pytest.mark.parametrize(
    "method",
    [
        otf.RestoreStatistics(),
        otf.LeastSquares(0.1, 50, at="preactivation", restore=False),
        otf.LeastSquares(ridge=0.1, steps=50),
    ],
    ids=["statistics", "least squares", "both"],
)
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
SHAPES = {"in": (4, 6), "w": (3, 6, 8), "b": (3, 8), "v": (3, 8, 6), "out": (6, 3)}


def drawn(shapes):
    return [normals(shapes, seed) for seed in range(2)]


def layer(x, p):
    return x + jnp.tanh(x @ p["w"] / 3 + p["b"][None]) @ p["v"] / 3


def layers_of(p):
    return {name: p[name] for name in ("w", "b", "v")}


def scanned(p, x, reverse=False):
    def step(x, p):
        return layer(x, p), None

    return jax.lax.scan(step, x @ p["in"], layers_of(p), reverse=reverse)[0] @ p["out"]


def unrolled(p, x, order=(0, 1, 2)):
    x = x @ p["in"]
    for number in order:
        x = layer(x, {name: leaf[number] for name, leaf in layers_of(p).items()})
    return x @ p["out"]


@METHODS
@pytest.mark.parametrize("reverse", [False, True])
def test_scanned_layers_are_repaired_like_a_loop_of_python(reverse, method):
    nets, x = drawn(SHAPES), normal(64, 4, seed=2)
    loop = functools.partial(scanned, reverse=reverse)
    listed = functools.partial(unrolled, order=(2, 1, 0) if reverse else (0, 1, 2))
    found = otf.repair(otf.trace_symmetry(loop, nets[0], x), loop, nets, x, method=method)
    expected = otf.repair(otf.trace_symmetry(listed, nets[0], x), listed, nets, x, method=method)
    jax.tree.map(close, found, expected)
    assert jnp.abs(found["w"] - otf.average(nets)["w"]).max(axis=(1, 2)).min() > 1e-2


def test_iterations_share_what_is_compiled():
    compiled: Any = run_program
    counts = []
    for depth in (3, 9):
        shapes = SHAPES | {"w": (depth, 6, 8), "b": (depth, 8), "v": (depth, 8, 6)}
        nets, x = drawn(shapes), normal(32, 4, seed=2)
        symmetry = otf.trace_symmetry(scanned, nets[0], x)
        jax.clear_caches()
        otf.repair(symmetry, scanned, nets, x, method=otf.LeastSquares())
        counts.append(compiled._cache_size())
    assert counts[0] == counts[1]


def recurrent(p, xs):
    def step(h, x):
        return jnp.tanh(x @ p["x"] + h @ p["h"] + p["b"][None]), None

    return jax.lax.scan(step, jnp.zeros((xs.shape[1], 6)), xs)[0] @ p["out"]


def test_recurrent_weights_are_corrected_from_all_steps():
    shapes = {"x": (4, 6), "h": (6, 6), "b": (6,), "out": (6, 3)}
    nets, xs = drawn(shapes), normal(5, 64, 4, seed=2)
    symmetry = otf.trace_symmetry(recurrent, nets[0], xs)
    method = otf.LeastSquares(ridge=1e-6, steps=200)
    found = otf.repair(symmetry, recurrent, nets, xs, method=method)
    wide = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net) for net in nets]
    average = jax.tree.map(lambda a, b: (a + b) / 2, *wide)
    # Inputs are the same in all networks, so that their weights are right as they are.
    rows, targets = [], []
    states = [np.zeros((64, 6))] * 3
    for x in np.asarray(xs, np.float64):
        rows.append(states[2])
        targets.append(sum(h @ net["h"] for h, net in zip(states, wide, strict=False)) / 2)
        everyone = zip(states, [*wide, average], strict=True)
        states = [np.tanh(x @ net["x"] + h @ net["h"] + net["b"]) for h, net in everyone]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets))[0]
    close(found["h"], expected, atol=1e-2)


def choosing(p, x):
    def deep(x):
        return jnp.tanh(x @ p["deep"])

    def flat(x):
        return x @ p["flat"]

    return jax.lax.cond(x[0, 0] > 0, deep, flat, jnp.tanh(x @ p["in"])) @ p["out"]


def deep_alone(p, x):
    return jnp.tanh(jnp.tanh(x @ p["in"]) @ p["deep"]) @ p["out"]


@pytest.mark.filterwarnings("ignore::otfusion_jax.SymmetryWarning")
def test_branches_are_corrected_from_the_samples_that_take_them():
    nets = drawn({"in": (4, 6), "deep": (6, 8), "flat": (6, 8), "out": (8, 3)})
    # Of two batches, one takes each branch.
    x = normal(48, 4, seed=2)
    deep, flat = x.at[0, 0].set(1), x.at[0, 0].set(-1)
    method = otf.LeastSquares(ridge=0.1, steps=50)
    symmetry = otf.trace_symmetry(choosing, nets[0], x)
    found = otf.repair(symmetry, choosing, nets, batches=[deep, flat], method=method)
    only = otf.repair(symmetry, choosing, nets, deep, method=method)
    alone = otf.trace_symmetry(deep_alone, nets[0], x)
    expected = otf.repair(alone, deep_alone, nets, deep, method=method)
    jax.tree.map(close, only, expected | {"flat": otf.average(nets)["flat"]})
    assert jnp.abs(found["flat"] - only["flat"]).max() > 1e-2


@METHODS
@pytest.mark.parametrize("wrapper", [jax.jit, jax.checkpoint])
def test_calls_are_entered(wrapper, method):
    nets, x = drawn(SHAPES), normal(64, 4, seed=2)
    wrapped = wrapper(scanned)
    found = otf.repair(otf.trace_symmetry(wrapped, nets[0], x), wrapped, nets, x, method=method)
    symmetry = otf.trace_symmetry(scanned, nets[0], x)
    jax.tree.map(close, found, otf.repair(symmetry, scanned, nets, x, method=method))


def experts(p, x):
    return jax.vmap(lambda w, v, x: jnp.tanh(x @ w) @ v)(p["w"], p["v"], x).sum(0)


def test_weights_of_a_batch_of_experts_are_corrected_expert_by_expert():
    nets, x = drawn({"w": (3, 5, 6), "v": (3, 6, 2)}), normal(3, 40, 5, seed=2)
    method = otf.LeastSquares(ridge=1e-6, steps=100)
    symmetry = otf.trace_symmetry(experts, nets[0], x)
    found = otf.repair(symmetry, experts, nets, x, method=method)
    mean = otf.average(nets)
    for number in range(3):
        rows = np.tanh(x[number] @ mean["w"][number])
        target = sum(np.tanh(x[number] @ n["w"][number]) @ n["v"][number] for n in nets) / 2
        close(found["v"][number], np.linalg.lstsq(rows, target)[0], atol=2e-3)


def endless(p, x):
    def step(state):
        return state[0] + 1, jnp.tanh(state[1] @ p["w"])

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x @ p["in"]))[1] @ p["out"]


def test_what_lies_in_a_while_loop_is_named():
    nets, x = drawn({"in": (4, 6), "w": (6, 6), "out": (6, 2)}), normal(32, 4, seed=2)
    symmetry = otf.trace_symmetry(endless, nets[0], x)
    message = r"(?s)leaves these parameters.*\n  w: it is used inside of `while` at .*endless"
    with pytest.warns(otf.RepairWarning, match=message):
        otf.repair(symmetry, endless, nets, x, method=otf.LeastSquares())


def scaling(p, x):
    return x * p["scale"][None]


def test_a_repair_of_nothing_says_so():
    nets, x = drawn({"scale": (4,)}), normal(32, 4, seed=2)
    symmetry = otf.trace_symmetry(scaling, nets[0], x)
    message = r"(?s)corrects nothing.*scale: it is first used in `mul` at .*no product"
    with pytest.warns(otf.RepairWarning, match=message) as warned:
        otf.repair(symmetry, scaling, nets, x)
    with pytest.warns(otf.RepairWarning, match=message) as from_merge:
        otf.merge(scaling, nets, [x], outputs="values", candidates=["as they are"], polish=0)
    # However deep it was found, it names the line of the caller's.
    assert {warning.filename for warning in (*warned, *from_merge)} == {__file__}
