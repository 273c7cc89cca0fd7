"""Parameters that move on from where they are end where they would have come from the start."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import otfusion_jax as otf
from otfusion_jax.alignment import moved_leaves
from otfusion_jax.alignment.moved_leaves import MovedLeaves

PLANS = 6


def network(params, x):
    hidden = jax.nn.relu(x @ params["first"] + params["bias"][None])
    hidden = jax.nn.relu(hidden @ params["second"])
    return hidden @ params["last"]


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(0)
    shapes = {"first": (3, 5), "bias": (5,), "second": (5, 4), "last": (4, 2)}
    return {name: generator.normal(size=shape).astype("f4") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def symmetry(params):
    return otf.trace_symmetry(network, params, jnp.zeros((1, 3)))


def as_numpy(plans):
    return {name: np.asarray(plan) for name, plan in plans.items()}


@pytest.fixture(scope="module")
def sequence(symmetry):
    """Plans of which one, none or all change from one to the next."""
    drawn = [as_numpy(symmetry.random(jax.random.key(seed))) for seed in range(PLANS)]
    first, second = symmetry
    mixed = drawn[1] | {first: drawn[2][first]}
    return [*drawn[:2], mixed, mixed | {second: drawn[3][second]}, mixed, *drawn[3:]]


def moved_model(symmetry, leaves, plans):
    return symmetry.join([leaves.moved(n, plans) for n in range(len(symmetry.parts))])


def test_a_parameter_moves_on_to_where_it_would_move_from_the_start(symmetry, params, sequence):
    leaves = MovedLeaves(symmetry, symmetry, symmetry.split(params))
    for plans in sequence:
        expected = otf.transport(symmetry, plans, params)
        for name, leaf in moved_model(symmetry, leaves, plans).items():
            np.testing.assert_array_equal(leaf, expected[name])


def test_only_what_has_changed_is_moved(symmetry, params, sequence, monkeypatch):
    steps = []

    def move(symmetry, plans, *rest):
        steps.append(set(plans))
        return moved_leaves_move(symmetry, plans, *rest)

    moved_leaves_move = moved_leaves.move
    monkeypatch.setattr(moved_leaves, "move", move)
    leaves = MovedLeaves(symmetry, symmetry, symmetry.split(params))
    first, second = symmetry
    number = [part.path for part in symmetry.parts].index("second")
    leaves.moved(number, sequence[1])
    leaves.moved(number, sequence[2])  # another plan of the first group
    leaves.moved(number, sequence[2])
    assert steps == [{first, second}, {first}]


def test_after_a_plan_that_is_none_a_parameter_moves_from_the_start(symmetry, params, sequence):
    leaves = MovedLeaves(symmetry, symmetry, symmetry.split(params))
    first, *_ = symmetry
    unsolved = sequence[0] | {first: np.full_like(sequence[0][first], 5)}
    moved_model(symmetry, leaves, sequence[1])
    assert np.isnan(moved_model(symmetry, leaves, unsolved)["bias"]).all()
    for name, leaf in moved_model(symmetry, leaves, sequence[0]).items():
        np.testing.assert_array_equal(
            leaf, otf.transport(symmetry, sequence[0], params)[name], strict=True
        )


def test_wide_models_are_aligned_in_little_memory(monkeypatch):
    # As if these parameters were too large for the moved model to be kept.
    monkeypatch.setattr(moved_leaves, "LARGEST_KEPT", 2**18)
    width = 400
    generator = np.random.default_rng(0)
    shapes = [(16, width), (width, width), (width, width), (width, 4)]

    def wide(params, x):
        for kernel in params[:-1]:
            x = jax.nn.relu(x @ kernel)
        return x @ params[-1]

    def draw():
        return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]

    # Models that have nothing in common take assignments that have to be prepared.
    source, target = draw(), draw()
    wide_symmetry = otf.trace_symmetry(wide, source, jnp.zeros((1, 16)))
    otf.align(wide_symmetry, source, target)
    tracemalloc.start()
    otf.align(wide_symmetry, source, target)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    a_model = sum(kernel.nbytes for kernel in source)
    a_cost = 4 * width**2
    assert peak < 3 * a_model + 2 * a_cost
