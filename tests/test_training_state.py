"""What belongs to parameters moves like them, so that training goes on as it would have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from zoo import randomise, shapes

import otfusion_jax as otf

X = jnp.linspace(-1, 1, 20).reshape(4, 5)


def apply(p, x):
    h = jax.nn.relu(x @ p["in"]["w"] + p["in"]["b"][None])
    return jnp.tanh(h @ p["mid"]) @ p["out"]


PARAMS = randomise({"in": shapes(w=(5, 8), b=(8,)), **shapes(mid=(8, 6), out=(6, 3))}, seed=0)
SYMMETRY = otf.trace_symmetry(apply, PARAMS, X)
PLANS = SYMMETRY.random(jax.random.key(2))


def gradient(params: Any) -> Any:
    return jax.grad(lambda p: jnp.sum((apply(p, X) - 1) ** 2))(params)


def step(optimizer: optax.GradientTransformation, params: Any, state: Any) -> tuple[Any, Any]:
    updates, state = optimizer.update(gradient(params), state, params)
    return optax.apply_updates(params, updates), state


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def only_kernels(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "momentum": lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9),
    "masked": lambda: optax.masked(optax.adam(1e-2), only_kernels),
    "two optimizers": lambda: optax.multi_transform(
        {True: optax.adam(1e-2), False: optax.sgd(1e-2, momentum=0.9)}, only_kernels
    ),
    "moving average": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
}


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_step_of_the_moved_state_is_the_moved_next_step(name: str):
    optimizer = OPTIMIZERS[name]()
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        params, state = step(optimizer, params, state)

    moved = otf.transport(SYMMETRY, PLANS, params)
    moved_state = otf.transport_state(SYMMETRY, PLANS, state)
    assert jax.tree_util.tree_structure(moved_state) == jax.tree_util.tree_structure(state)
    params, state = step(optimizer, params, state)
    moved, moved_state = step(optimizer, moved, moved_state)
    close(moved, otf.transport(SYMMETRY, PLANS, params))
    close(moved_state, otf.transport_state(SYMMETRY, PLANS, state))


@pytest.mark.usefixtures("default_promotion")
def test_a_train_state_moves_as_a_whole():
    state = TrainState.create(apply_fn=apply, params=PARAMS, tx=optax.adam(1e-2))
    state = state.apply_gradients(grads=gradient(state.params))
    moved = otf.transport_state(SYMMETRY, PLANS, state)
    assert int(moved.step) == 1
    after = state.apply_gradients(grads=gradient(state.params))
    moved = moved.apply_gradients(grads=gradient(moved.params))
    close(moved, otf.transport_state(SYMMETRY, PLANS, after))
    close(moved.params, otf.transport(SYMMETRY, PLANS, after.params))


@pytest.mark.usefixtures("default_promotion")
def test_without_moving_the_state_the_next_step_is_another():
    optimizer = optax.adam(1e-2)
    params, state = step(optimizer, PARAMS, optimizer.init(PARAMS))
    moved = otf.transport(SYMMETRY, PLANS, params)
    wrong, _ = step(optimizer, moved, state)
    right, _ = step(optimizer, moved, otf.transport_state(SYMMETRY, PLANS, state))
    change = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), wrong, right)
    assert max(jax.tree.leaves(change)) > 1e-3


def test_parts_of_a_leaf_move_in_a_state_too():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]) @ p["out"]

    params = randomise(shapes(w=(2, 5, 5), out=(5, 3)), seed=0)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.leaf_splits
    plans = symmetry.random(jax.random.key(0))
    moved = otf.transport_state(symmetry, plans, {"ema": params, "count": 3})
    close(moved["ema"], otf.transport(symmetry, plans, params))
    assert moved["count"] == 3


def test_moments_of_other_shapes_are_refused_by_name():
    params = randomise(shapes(w=(256, 256), out=(256, 130)), seed=0)
    symmetry = otf.trace_symmetry(
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["out"], params, jnp.ones((1, 256))
    )
    state = optax.adafactor(1e-2).init(params)
    with pytest.raises(ValueError, match=r"v_row/w: shape \(256,\), of a parameter of shape"):
        otf.transport_state(symmetry, symmetry.identity(), state)


def test_arguments_in_another_order_are_refused():
    state: Any = optax.adam(1e-2).init(PARAMS)
    plans: Any = PLANS
    with pytest.raises(TypeError, match="call transport_state.*symmetry, plans, state"):
        otf.transport_state(plans, SYMMETRY, state)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="plans is a .*; pass a dict of arrays"):
        otf.transport_state(SYMMETRY, state, plans)
    with pytest.raises(TypeError, match="call transport_state.*onto=symmetry_of_the_target"):
        otf.transport_state(SYMMETRY, plans, state, onto=plans)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no part of this state has the structure"):
        otf.transport_state(SYMMETRY, PLANS, optax.adam(1e-2).init({"other": jnp.ones(3)}))


@pytest.mark.parametrize("state", [optax.sgd(1e-2).init(PARAMS), {"step": 3}], ids=["sgd", "count"])
def test_a_state_without_moments_stays_as_it_is(state: Any):
    assert otf.transport_state(SYMMETRY, PLANS, state) == state


@pytest.mark.usefixtures("default_promotion")
def test_accumulators_of_rows_and_columns_are_named():
    state = optax.sm3(1e-2).init(PARAMS)
    with pytest.warns(otf.SymmetryWarning, match=r"mu/in/w/1: shape \(8,\)"):
        moved = otf.transport_state(SYMMETRY, PLANS, state)
    assert jax.tree_util.tree_structure(moved) == jax.tree_util.tree_structure(state)


def test_what_is_beside_the_moments_of_one_array_stays():
    kernel = jnp.arange(25.0).reshape(5, 5)
    symmetry = otf.trace_symmetry(lambda w, x: jnp.tanh(x @ w).max(1), kernel, X)
    (name,) = symmetry.identity()
    plans = {name: jnp.array([1, 2, 3, 4, 0])}
    state = {"moment": kernel, "key": jnp.zeros(2, jnp.uint32), "history": jnp.ones(3)}
    moved = otf.transport_state(symmetry, plans, state)
    close(moved["moment"], otf.transport(symmetry, plans, kernel))
    close(moved["history"], state["history"])
    close(moved["key"], state["key"])
