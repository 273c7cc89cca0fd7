"""Checks that mistaken arguments, settings and models are named, each in words of its own."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from mistakes import A, B, S, X, expected, fn

import otfusion_jax as otf

HERE = Path(__file__).resolve().parent


# Arguments


@functools.cache
def said() -> dict[str, str]:
    """What the library says of all mistakes, in a process without checks of annotations."""
    run = subprocess.run(
        [sys.executable, str(HERE / "mistakes.py")],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("mistake", expected())
def test_a_mistaken_call_is_told_what_to_do(mistake):
    assert re.search(expected()[mistake], said()[mistake], re.S), said()[mistake]


# Settings

SETTINGS: list[tuple[Any, str, Any, str]] = [
    (otf.CoordinateDescent, "max_sweeps", 0, "max_sweeps >= 1, got 0"),
    (otf.CoordinateDescent, "max_sweeps", 2.5, "max_sweeps >= 1, a whole number, got 2.5"),
    (otf.CoordinateDescent, "max_sweeps", True, "a whole number, got True, of type bool"),
    (otf.CoordinateDescent, "starts", "forward", "starts is 'forward'; it must be a tuple"),
    (otf.CoordinateDescent, "starts", ["forward"], "must be a tuple of 'identity', 'forward'"),
    (otf.CoordinateDescent, "starts", (), "must be a tuple of 'identity', 'forward'"),
    (otf.CoordinateDescent, "starts", ("random",), "must be a tuple of 'identity', 'forward'"),
    (otf.CoordinateDescent, "tolerance", -1e-3, "tolerance >= 0, got -0.001"),
    (otf.ForwardPass, "progress", "here", "progress is 'here'; give the pathlib.Path of a folder"),
    (otf.ForwardPass, "unit_norm", "yes", "unit_norm to be True or False, got 'yes'"),
    (otf.ForwardPass, "members", "some", "members is 'some'"),
    (otf.Exact, "tolerance", -1.0, "Exact needs tolerance >= 0, got -1.0"),
    (otf.Exact, "tolerance", float("nan"), "tolerance >= 0, got nan"),
    (otf.Exact, "tolerance", "tight", "tolerance >= 0, a number, got 'tight', of type str"),
    (otf.Exact, "tolerance", jnp.ones(()), "tolerance >= 0, a number, got .*, of type ArrayImpl"),
    (otf.Sinkhorn, "epsilon", -1.0, "epsilon > 0, got -1.0.*Exact"),
    (otf.Sinkhorn, "epsilon", float("inf"), "epsilon > 0, got inf"),
    (otf.Sinkhorn, "relative", 1, "relative to be True or False, got 1"),
    (otf.Sinkhorn, "threshold", 0.0, "threshold > 0, got 0.0"),
    (otf.Sinkhorn, "max_iterations", 0, "max_iterations >= 1, got 0"),
    (otf.Sinkhorn, "epsilon_init", 0.5, "epsilon_init >= 1, got 0.5"),
    (otf.Sinkhorn, "epsilon_decay", 1.0, r"epsilon_decay in \(0, 1\), got 1.0"),
    (otf.Sinkhorn, "tau_b", 1.5, r"tau_b in \(0, 1\], got 1.5"),
    (otf.LowRank, "rank", 0, "rank >= 1, got 0"),
    (otf.LowRank, "epsilon", -0.1, "epsilon >= 0, got -0.1"),
    (otf.LowRank, "gamma", 0.0, "gamma > 0, got 0.0"),
    (otf.LowRank, "threshold", float("nan"), "threshold > 0, got nan"),
    (otf.LowRank, "max_iterations", -3, "max_iterations >= 1, got -3"),
    (otf.GromovWasserstein, "alpha", 2.0, r"alpha in \[0, 1\], got 2.0"),
    (otf.GromovWasserstein, "epsilon", 0.0, "epsilon > 0, got 0.0.*Exact"),
    (otf.GromovWasserstein, "relative", None, "relative to be True or False, got None"),
    (otf.GromovWasserstein, "threshold", -1.0, "threshold > 0, got -1.0"),
    (otf.GromovWasserstein, "max_iterations", 0, "max_iterations >= 1, got 0"),
    (otf.GromovWasserstein, "max_inner_iterations", 0, "max_inner_iterations >= 1, got 0"),
    (otf.LeastSquares, "ridge", float("inf"), "ridge >= 0, got inf"),
    (otf.LeastSquares, "ridge", (0.1, -1.0), "ridge >= 0, got -1"),
    (otf.LeastSquares, "ridge", (), "a ridge, or several to choose from"),
    (otf.LeastSquares, "at", "outputs", "at is 'outputs'; it must be 'activation',"),
    (otf.LeastSquares, "restore", 1, "restore to be True or False, got 1"),
    (otf.LeastSquares, "steps", 2.0, "steps >= 1, a whole number, got 2.0"),
]


@pytest.mark.parametrize(("owner", "name", "value", "message"), SETTINGS)
def test_a_setting_without_sense_is_named_with_what_is_allowed(owner, name, value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        owner(**{name: value})


def test_every_setting_of_every_class_is_checked():
    owners = {owner for owner, *_ in SETTINGS} | {otf.Sinkhorn}
    checked = {(owner, name) for owner, name, *_ in SETTINGS} | {(otf.Sinkhorn, "tau_a")}
    fields = {(owner, field.name) for owner in owners for field in dataclasses.fields(owner)}
    assert fields == checked


def test_settings_may_be_numbers_of_numpy():
    assert otf.Exact(tolerance=np.float32(0)).tolerance == 0  # pyright: ignore
    assert otf.CoordinateDescent(max_sweeps=np.int64(3)).max_sweeps == 3  # pyright: ignore


# Keys


def test_keys_of_either_kind_will_do_and_batches_will_not():
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert S.random(key).keys() == {"w"}
    plans = jax.vmap(S.random)(jax.random.split(jax.random.key(0), 3))
    assert plans["w"].shape == (3, 8)
    with pytest.raises(TypeError, match="pass a single key"):
        S.random(jax.random.split(jax.random.key(0), 3))


# Symmetries that are not what was meant


def test_logits_that_are_ruled_out_may_stay_so():
    def masked(params, x):
        logits = jax.nn.relu(x @ params["in"]) @ params["out"]
        return jnp.where(jnp.arange(3) == 1, -jnp.inf, logits)

    params = {"in": normal(4, 6), "out": normal(6, 3, seed=1)}
    x = normal(5, 4, seed=2)
    symmetry = otf.trace_symmetry(masked, params, x)
    assert otf.check_symmetry(symmetry, masked, params, x) < 1e-5
    # Where a unit decides what is ruled out, the change has no bound.
    wrong = otf.trace_symmetry(lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"], params, x)

    def by_unit(params, x):
        hidden = jax.nn.relu(x @ params["in"])
        return jnp.where(hidden[:, :1] > 0.5, -jnp.inf, hidden @ params["out"])

    assert otf.check_symmetry(wrong, by_unit, params, x) == np.inf


def test_parameters_that_the_function_does_not_use_are_told():
    params = A | {"head": jnp.ones((8, 2)), "flat": jnp.ones((32, 2)), "bias": jnp.ones(5)}
    params |= {"scale": jnp.ones(()), "steps": jnp.arange(8)}
    with pytest.warns(otf.SymmetryWarning, match="does not use these parameters") as seen:
        symmetry = otf.trace_symmetry(fn, params, X)
    lines = str(seen[0].message).splitlines()[1:]
    assert lines == ["  flat: shape (32, 2)", "  head: shape (8, 2)"]
    # Whoever traces it again has been told.
    otf.features(symmetry, fn, params, X)
    otf.check_symmetry(symmetry, fn, params, X)


def linear(params, x):
    return x @ params["w"]


def test_nothing_to_align_is_told_outside_of_jit():
    models = [{"w": A["w"]}, {"w": B["w"]}]
    symmetry = otf.trace_symmetry(linear, models[0], X)
    with pytest.warns(otf.SymmetryWarning, match="no groups.*plain average"):
        fused = otf.fuse(symmetry, models)
    np.testing.assert_array_equal(fused["w"], otf.average(models)["w"])
    with pytest.warns(otf.SymmetryWarning, match="no groups.*plain average"):
        otf.barycenter(symmetry, models)
    with pytest.warns(otf.SymmetryWarning, match="no groups.*the alignment is empty"):
        otf.align(symmetry, *models)
    jax.jit(lambda models: otf.fuse(symmetry, models))(models)


# NaN and infinity on the way


@pytest.mark.parametrize("flag", [jax.debug_nans, jax.debug_infs], ids=["nans", "infs"])
def test_no_value_that_comes_out_is_nan_or_infinite(flag):
    jax.clear_caches()  # what is compiled already is not looked at again
    with flag(True):
        otf.check_symmetry(S, fn, A, X)
        found = otf.align(S, A, B)
        otf.align(S, A, B, method=otf.ForwardPass(), solver=otf.Sinkhorn())
        otf.align(S, A, A)
        otf.fuse(S, [A, B])
        otf.barycenter(S, [A, B])
        otf.Exact().solve(otf.TransportProblem(jnp.zeros((5, 5))))
        moved = otf.transport(S, found, A)
        otf.repair(S, fn, [moved, B], X)
        otf.repair(S, fn, [moved, B], X, method=otf.LeastSquares())
        otf.barrier(lambda p: jnp.mean(fn(p, X) ** 2), moved, B)
        grams = otf.feature_gram(S, fn, A, B, [X], center=True)
        otf.align(S, A, B, method=otf.ForwardPass(unit_norm=True), grams=grams)
        otf.weight_importance(S, A)
