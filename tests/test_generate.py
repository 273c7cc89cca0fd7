"""Checks that `python -m tests.generate` finds what is wrong, and prints it as small as it gets."""

import re
import runpy

import generate
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from programs import Plant, Program, act, hidden, order, partly, residual, tied

import otfusion_jax as otf
from otfusion_jax.tracing import registry


def test_the_same_seed_draws_the_same_programs():
    first, again, other = generate.draw(5, 3), generate.draw(5, 3), generate.draw(5, 4)
    assert len(first) == 5
    assert first == again != other


def test_a_wrong_rule_is_printed_as_a_small_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A rule that takes a running sum for one of the functions that act on each unit alone."""
    (primitive,) = (p for p in registry.registered() if str(p) == "cumsum")
    monkeypatch.setitem(registry._registry, primitive, lambda ctx, values: [values[0]])
    large = Program(
        space=(2,),
        width=8,
        blocks=(
            act(fn="tanh"),
            residual(body=(order(how="cumsum", units=True), act(fn="sin"))),
        ),
        second="exit",
        seed=2,
    )
    monkeypatch.setattr(generate, "draw", lambda count, seed: [large])
    assert generate.main(["--count", "1"]) == 1
    printed = capsys.readouterr().out
    small = eval(printed.partition("\n")[2].rpartition("\n\n")[0], dict(vars(programs)))
    blocks = (order(how="cumsum", units=True),)
    assert small == Program(space=(), width=6, blocks=blocks)
    assert "1 programs, 1 violations, 0 crashes" in printed


def test_a_crash_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (primitive,) = (p for p in registry.registered() if str(p) == "tanh")
    monkeypatch.delitem(registry._registry, primitive)
    drawn = [Program((), 6, (act(fn="tanh"),)), Program((), 6, (act(fn="sin"), act(fn="tanh")))]
    monkeypatch.setattr(generate, "draw", lambda count, seed: drawn)
    generate.main([])
    printed = capsys.readouterr().out
    assert printed.count("# crash: UnsupportedPrimitiveError") == 1
    assert "2 programs, 0 violations, 2 crashes" in printed


def test_it_is_a_module_of_the_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["tests.generate", "--count", "2"])
    with pytest.raises(SystemExit):
        runpy.run_module("tests.generate", run_name="__main__")
    said = r"2 programs, \d+ violations, \d+ crashes, \d+ groups found of \d+ planted\n$"
    assert re.search(said, capsys.readouterr().out)


def test_groups_that_are_planted_are_found_or_counted_as_lost():
    program = Program((), 6, (hidden(kind="plain", width=4, fn="tanh"),))
    result = generate.certificate(program)
    assert (result.planted, result.lost) == (1, {})
    plants = Plant("w", 1, 4, 2, ("v",)), Plant("w", 0, 4, 1, ("v",))
    symmetry = otf.trace_symmetry(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"],
        {"w": np.ones((4, 4), np.float32), "v": np.ones((4, 2), np.float32)},
        np.ones((1, 4), np.float32),
    )
    assert [generate.freedom(symmetry, plant) for plant in plants] == [1, 0]


def test_units_that_are_tied_elsewhere_are_not_planted():
    blocks = (hidden(kind="plain", width=6, fn="tanh"), tied(pick=1, turn=False))
    assert any("up" in plant.leaf for plant in Program((), 6, blocks[:1]).build().planted)
    drawn = [Program((), 6, (blocks[0], tied(pick=pick, turn=False))) for pick in range(6)]
    assert not all(program.build().planted for program in drawn)


def test_both_settings_read_the_same_leaves():
    program = Program((3,), 6, (partly(how="width", width=3, beside=""),), second="settings")
    params, entries, unseen, _ = program.build()
    (fn, inputs), (other, _) = entries
    assert not unseen
    assert np.any(fn(params, *inputs) != other(params, *inputs))
