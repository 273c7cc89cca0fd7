"""Several functions of one tree of parameters, traced as one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import makes, randomise, rows_of, shapes, takes

import otfusion_jax as otf

X = jnp.ones((2, 5))
ACTION = jnp.ones((2, 3))


def torso(p, x):
    return jnp.tanh(x @ p["in"])


def policy(p, x):
    return torso(p, x) @ p["policy"]


def value(p, x, action):
    return jax.nn.relu(torso(p, x) @ p["hidden"]) @ p["value"] + action.sum(1, keepdims=True)


PARAMS = randomise(shapes(**{"in": (5, 8)}, policy=(8, 3), hidden=(8, 6), value=(6, 1)), seed=0)
BOTH = [(policy, (X,)), (value, (X, ACTION))]
GROUPS = {
    "in": {makes("in", 1), takes("policy", 0), takes("hidden", 0)},
    "hidden": {makes("hidden", 1), takes("value", 0)},
}


def table(symmetry: otf.Symmetry) -> dict:
    return {group.name: rows_of(group) for group in symmetry.groups}


def test_what_moves_is_what_all_functions_allow():
    symmetry = otf.trace_symmetry(BOTH, PARAMS)
    assert table(symmetry) == GROUPS
    assert otf.check_symmetry(symmetry, BOTH, PARAMS) < 1e-5
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(1)), PARAMS)
    for fn, inputs in BOTH:
        np.testing.assert_allclose(fn(moved, *inputs), fn(PARAMS, *inputs), atol=1e-5)


def test_one_function_pins_for_all():
    def ordered(p, x):
        return jnp.cumsum(torso(p, x), 1)[:, :2]

    symmetry = otf.trace_symmetry([*BOTH, (ordered, (X,))], PARAMS)
    assert set(table(symmetry)) == {"hidden"}
    assert "cumsum" in next(p.reason for p in symmetry.pinned if (p.path, p.axis) == ("in", 1))


def test_a_second_function_reads_what_the_first_leaves_out():
    """At half its width the layer is pinned; at both widths the two halves move by themselves."""
    params = randomise(shapes(**{"in": (5, 8)}, out=(8, 3)), seed=0)

    def at(width: int):
        return lambda p, x: jnp.tanh(x @ p["in"][:, :width]) @ p["out"][:width]

    half, whole = at(4), at(8)
    assert otf.trace_symmetry(half, params, X).groups == ()
    both = [(half, (X,)), (whole, (X,))]
    symmetry = otf.trace_symmetry(both, params)
    assert [group.size for group in symmetry.groups] == [4, 4]
    assert otf.check_symmetry(symmetry, both, params) < 1e-5


def test_the_certificate_is_of_the_worst_function():
    """A large output of one function does not hide the change of a small one of another."""
    symmetry = otf.trace_symmetry(policy, {k: PARAMS[k] for k in ("in", "policy")}, X)

    def large(p, x):
        return 1e6 * policy(p, x)

    def ordered(p, x):
        return torso(p, x)[:, :2]

    params = {k: PARAMS[k] for k in ("in", "policy")}
    assert otf.check_symmetry(symmetry, [(large, (X,)), (ordered, (X,))], params) > 1e-2
    assert otf.check_symmetry(symmetry, [(large, (X,))], params) < 1e-5


def test_a_list_is_the_function_that_computes_all():
    joint = otf.together(policy, value)
    assert joint == otf.together(policy, value)
    one = otf.trace_symmetry(joint, PARAMS, (X,), (X, ACTION))
    assert one == otf.trace_symmetry(BOTH, PARAMS)
    assert otf.check_symmetry(one, joint, PARAMS, (X,), (X, ACTION)) < 1e-5
    found, same = (
        otf.features(one, BOTH, PARAMS),
        otf.features(one, joint, PARAMS, (X,), (X, ACTION)),
    )
    assert found["in"].shape == (4, 8)
    jax.tree.map(np.testing.assert_array_equal, found, same)
    grams = otf.feature_gram(one, joint, PARAMS, PARAMS, [((X,), (X, ACTION))])
    assert set(grams) == set(GROUPS)
    repaired = otf.repair(one, BOTH, [PARAMS, PARAMS])
    assert jax.tree.map(jnp.shape, repaired) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize(
    ("program", "inputs", "message"),
    [
        (3, (), "an int was given as the function"),
        ("fn", (), "a str was given as the function"),
        ([], (), "no functions"),
        ([policy], (), "entry point 0 is no pair"),
        ([(policy, (X,)), (3, (X,))], (), "entry point 1 is no pair"),
        ([(policy, X)], (), "inputs of entry point 0 are an array; pass a tuple"),
        (BOTH, (X,), "no further inputs"),
    ],
)
def test_what_is_no_program_is_refused(program: Any, inputs: tuple, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        otf.trace_symmetry(program, PARAMS, *inputs)


def test_inputs_for_each_function_are_asked_for():
    with pytest.raises(ValueError, match="inputs for 1 were given"):
        otf.trace_symmetry(otf.together(policy, value), PARAMS, (X,))
