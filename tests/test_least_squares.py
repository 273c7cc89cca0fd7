"""Checks that ridges are solved for together, and that the best of them is taken."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals

import otfusion_jax as otf
from otfusion_jax.fusion.normal_equations import shifted_solutions
from otfusion_jax.fusion.passes import Passes
from otfusion_jax.fusion.repair import repaired

RIDGES = (1e-4, 1e-2, 1.0, 100.0)
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def matrix(size: int, rank: int) -> np.ndarray:
    factors = np.random.default_rng(0).normal(size=(size, rank))
    return factors @ factors.T / rank


@pytest.mark.parametrize("rank", [12, 5])
def test_shifted_systems_are_solved_together(rank: int):
    operator = matrix(12, rank)
    right_side = operator @ np.random.default_rng(1).normal(size=(12, 3))
    shifts = np.array([1.0, 0.1, 0.5, 30.0])
    found = shifted_solutions(
        lambda x: jnp.asarray(operator, jnp.float32) @ x,
        jnp.asarray(right_side, jnp.float32),
        jnp.asarray(shifts, jnp.float32),
        60,
    )
    for shift, solution in zip(shifts, found, strict=True):
        close(solution, np.linalg.solve(operator + shift * np.eye(12), right_side))


def test_every_step_is_that_of_conjugate_gradients():
    operator = jnp.asarray(matrix(20, 20), jnp.float32)
    right_side = normal(20, 3, seed=2)
    shifts = jnp.array([0.0, 0.3, 2.0])
    for steps in (1, 2, 5):
        found = shifted_solutions(lambda x: operator @ x, right_side, shifts, steps)
        for shift, solution in zip(shifts, found, strict=True):
            expected, _ = jax.scipy.sparse.linalg.cg(
                lambda x, shift=shift: operator @ x + shift * x, right_side, maxiter=steps, tol=0
            )
            close(solution, expected, atol=1e-3)


def test_nothing_to_solve_stays_nothing():
    zero = jnp.zeros((4, 2))
    found = shifted_solutions(lambda x: 0 * x, zero, jnp.array([0.0, 1.0]), 5)
    np.testing.assert_array_equal(found, jnp.zeros((2, 4, 2)))


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


@functools.cache
def setting(samples: int):
    shapes = {"first": (5, 40), "second": (40, 3)}
    nets = [normals(shapes, seed) for seed in range(2)]
    return (
        otf.trace_symmetry(network, nets[0], normal(2, 5, seed=0)),
        nets,
        normal(samples, 5, seed=2),
    )


def fitted(symmetry, nets, x, ridge, steps: int | None = 400, fn=network):
    method = otf.LeastSquares(ridge=ridge, steps=steps)
    return repaired(symmetry, fn, nets, Passes([(x,)]), None, method, [None, None], 1)


@pytest.mark.parametrize("steps", [400, None])
@pytest.mark.parametrize("samples", [40, 200, 1000])
def test_the_ridge_that_is_best_for_samples_held_out_is_taken(samples: int, steps: int | None):
    symmetry, nets, x = setting(samples)
    found = fitted(symmetry, nets, x, RIDGES, steps)
    wide = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net) for net in nets]
    # The first layer sees the same inputs in all networks: its average is right.
    rows = np.tanh(np.asarray(x, np.float64) @ (wide[0]["first"] + wide[1]["first"]) / 2)
    kernel = (wide[0]["second"] + wide[1]["second"]) / 2
    missing = sum(np.tanh(x @ net["first"]) @ net["second"] for net in wide) / 2 - rows @ kernel
    edge = samples - samples // 5
    gram = rows[:edge].T @ rows[:edge]
    errors = []
    for ridge in RIDGES:
        penalised = gram + ridge * np.trace(gram) / 40 * np.eye(40)
        change = np.linalg.solve(penalised, rows[:edge].T @ missing[:edge])
        errors.append(np.sum((rows[edge:] @ change - missing[edge:]) ** 2))
    best = RIDGES[int(np.argmin(errors))]
    assert float(found.ridges["second"]) == pytest.approx(best)
    # With it, the parameter is fitted to all samples.
    expected = fitted(symmetry, nets, x, best, steps)
    assert not expected.ridges
    close(found.params["second"], expected.params["second"], atol=2e-3)


def test_complex_parameters_are_fitted_layer_by_layer():
    def net(params, x):
        return (x @ params["first"]) ** 2 @ params["second"]

    shapes = {"x": (300, 6), "a": (6, 5), "b": (6, 5), "c": (5, 3), "d": (5, 3)}
    real, imaginary = normals(shapes, 0), normals(shapes, 1)
    drawn = {name: jax.lax.complex(real[name], imaginary[name]) for name in shapes}
    x = drawn["x"]
    models = [{"first": drawn[a], "second": drawn[b]} for a, b in ("ac", "bd")]
    symmetry = otf.trace_symmetry(net, models[0], x)
    method = otf.LeastSquares(ridge=1e-7, steps=100)
    found = otf.repair(symmetry, net, models, x, method=method)

    preactivations = (x @ drawn["a"] + x @ drawn["b"]) / 2
    first = np.linalg.lstsq(np.asarray(x), np.asarray(preactivations), rcond=None)[0]
    close(found["first"], first, atol=1e-4)
    features = (np.asarray(x) @ first) ** 2
    answers = (net(models[0], x) + net(models[1], x)) / 2
    second = np.linalg.lstsq(features, np.asarray(answers), rcond=None)[0]
    close(found["second"], second, atol=1e-3)
    # Several ridges are solved for together.
    chosen = otf.repair(symmetry, net, models, x, method=otf.LeastSquares(ridge=(1e-7, 1e-6)))
    close(chosen["first"], first, atol=1e-3)


def test_a_penalty_does_not_depend_on_the_order_of_units():
    symmetry, nets, x = setting(40)
    order = np.random.default_rng(3).permutation(40)
    reordered = []
    for net in nets:
        reordered.append({"first": net["first"][:, order], "second": net["second"][order]})
    found, again = [fitted(symmetry, each, x, 0.3).params for each in (nets, reordered)]
    close(again["second"], found["second"][order])


def test_more_samples_want_less_of_a_ridge():
    chosen = [float(fitted(*setting(count), RIDGES).ridges["second"]) for count in (40, 1000)]
    assert chosen[0] > chosen[1]


def test_too_few_samples_to_hold_any_out_take_the_first_ridge():
    symmetry, nets, x = setting(40)
    found = fitted(symmetry, nets, x[:4], (0.5, 0.1))
    assert {float(ridge) for ridge in found.ridges.values()} == {0.5}


def test_ridges_are_chosen_on_samples_of_which_nothing_was_fitted():
    # A sequence repeats a single row: as many as are held out of it say what all of it does.
    rows = normal(7, 1, 6, seed=3)
    nets = [{"in": normal(6, 8, seed=seed), "out": normal(8, 2, seed=5 + seed)} for seed in (0, 1)]
    fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]  # noqa: E731
    symmetry = otf.trace_symmetry(fn, nets[0], rows)
    chosen = []
    for repeats in (1, 3, 7):
        x = jnp.concatenate([rows] * repeats, axis=1)
        found = fitted(symmetry, nets, x, (0.01, 0.03, 0.1, 0.3, 1.0), fn=fn)
        chosen.append(float(found.ridges["out"]))
    assert chosen == [chosen[0]] * 3


def test_ridges_in_a_tuple_of_their_own_are_refused():
    nested: Any = ((0.1,), 0.1)
    with pytest.raises(TypeError, match="LeastSquares needs numbers to choose from"):
        otf.LeastSquares(ridge=nested)


def grouped(params, x):
    x = jnp.tanh(x @ params["first"])
    return jax.lax.conv_general_dilated(
        x,
        params["second"],
        (1, 1),
        "SAME",
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.compatibility
def test_a_convolution_solved_to_the_end_is_the_regression_of_its_groups():
    shapes = {"first": (3, 6), "second": (2, 2, 3, 8)}
    nets = [normals(shapes, seed) for seed in range(2)]
    x = normal(40, 5, 4, 3, seed=2)
    symmetry = otf.trace_symmetry(grouped, nets[0], x)
    method = otf.LeastSquares(ridge=0.1, steps=None)
    found = otf.repair(symmetry, grouped, nets, batches=[x[:30], x[30:]], method=method)
    wide = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net) for net in nets]
    features = np.tanh(np.asarray(x, np.float64) @ (wide[0]["first"] + wide[1]["first"]) / 2)
    images = [np.tanh(x @ net["first"]) for net in wide]

    def patches(image, group):
        padded = np.pad(image[..., 3 * group : 3 * group + 3], [(0, 0), (0, 1), (0, 1), (0, 0)])
        rows = [padded[:, i : i + 5, j : j + 4] for i in (0, 1) for j in (0, 1)]
        return np.concatenate(rows, axis=-1).reshape(-1, 12)

    average = (wide[0]["second"] + wide[1]["second"]) / 2
    traces = [np.sum(patches(features, group) ** 2) / 12 for group in (0, 1)]
    for group in (0, 1):
        units = slice(4 * group, 4 * group + 4)
        rows, kernel = patches(features, group), average[..., units].reshape(12, 4)
        target = np.zeros((len(rows), 4))
        for image, net in zip(images, wide, strict=True):
            target += patches(image, group) @ net["second"][..., units].reshape(12, 4) / 2
        # The penalty is a row for each entry, in units of the mean eigenvalue of both groups.
        penalty = np.sqrt(0.1 * np.mean(traces)) * np.eye(12)
        change = np.linalg.lstsq(
            np.concatenate([rows, penalty]),
            np.concatenate([target - rows @ kernel, np.zeros((12, 4))]),
        )[0]
        expected = (kernel + change).reshape(2, 2, 3, 4)
        close(found["second"][..., units], expected)


def test_what_has_no_features_stays_also_where_there_is_no_factor():
    symmetry, nets, x = setting(40)
    # Some units of the first layer are always 0, and nothing is penalised.
    dead = [net | {"first": net["first"].at[:, :5].set(0)} for net in nets]
    solved = fitted(symmetry, dead, x, 0.0, None)
    stopped = fitted(symmetry, dead, x, 0.0, 200)
    close(solved.params["second"], stopped.params["second"])
    average = (nets[0]["second"] + nets[1]["second"]) / 2
    np.testing.assert_array_equal(solved.params["second"][:5], average[:5])


def test_a_parameter_that_is_repeated_is_solved_for_by_steps():
    def shared(params, x):
        hidden = jnp.tanh(x @ params["first"])
        return hidden @ jnp.broadcast_to(params["second"][:, None], (6, 4))

    nets = [normals({"first": (5, 6), "second": (6,)}, seed) for seed in range(2)]
    x = normal(80, 5, seed=2)
    symmetry = otf.trace_symmetry(shared, nets[0], x)
    methods = [otf.LeastSquares(ridge=0.1, steps=steps) for steps in (None, 200)]
    found, expected = [otf.repair(symmetry, shared, nets, x, method=method) for method in methods]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("steps", [20, None])
def test_ridges_are_chosen_under_jit(steps: int | None):
    symmetry, nets, x = setting(200)
    method = otf.LeastSquares(ridge=RIDGES, steps=steps)
    expected = otf.repair(symmetry, network, nets, x, method=method)

    @jax.jit
    def jitted(nets, x):
        return otf.repair(symmetry, network, nets, x, method=method)

    # By another ridge it would be another model by more than 1. Steps in float32 come to their end
    # within some 1e-3 of each other, by the processor.
    found = jitted(nets, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=0.02), found, expected)


def residual(params, x):
    """A normalised layer, and a block whose sum with what goes into it is cut at 0."""
    h = (x @ params["in"] - params["mean"][None]) * (params["gain"] / params["deviation"])[None]
    h = jax.nn.relu(h + params["bias"][None])
    return jax.nn.relu(h - h @ params["block"] + params["shift"][None]) @ params["out"]


VECTORS = dict.fromkeys(("mean", "gain", "bias", "shift"), (6,))


def residual_nets():
    shapes = {"in": (5, 6), "block": (6, 6), "out": (6, 3), **VECTORS}
    deviations = [{"deviation": 1 + normal(6, seed=seed) ** 2} for seed in range(2)]
    return [normals(shapes, seed) | deviations[seed] for seed in range(2)]


def wanted_of_numpy(before, ours):
    """What is to go into a ReLU so that it puts out what it does in the models, on average."""
    active = np.mean(np.maximum(before, 0), axis=0)
    return np.where(active > 0, active, np.minimum(ours, 0))


def test_activations_are_fitted_behind_a_normalisation_and_a_residual():
    nets, x = residual_nets(), normal(200, 5, seed=4)
    method = otf.LeastSquares(ridge=1e-6, steps=None, restore=False)
    symmetry = otf.trace_symmetry(residual, nets[0], x)
    found = otf.repair(symmetry, residual, nets, x, method=method)
    ours = {name: np.asarray(leaf, np.float64) for name, leaf in otf.average(nets).items()}
    nets, x = jax.tree.map(np.asarray, (nets, x))

    def first(p, kernel):
        return (x @ kernel - p["mean"]) * p["gain"] / p["deviation"] + p["bias"]

    before = [first(net, net["in"]) for net in nets]
    wanted = wanted_of_numpy(before, first(ours, ours["in"]))
    # Whatever the layer does to a product is undone for what is wanted of it.
    wanted = (wanted - ours["bias"]) / (ours["gain"] / ours["deviation"]) + ours["mean"]
    missing = np.linalg.lstsq(x, wanted - x @ ours["in"])[0]
    np.testing.assert_allclose(found["in"], ours["in"] + missing, atol=2e-3)
    h = np.maximum(first(ours, np.asarray(found["in"])), 0)
    theirs = [np.maximum(y, 0) for y in before]
    blocks = [y - y @ net["block"] + net["shift"] for y, net in zip(theirs, nets, strict=True)]
    wanted = wanted_of_numpy(blocks, h - h @ ours["block"] + ours["shift"])
    missing = np.linalg.lstsq(h, h + ours["shift"] - wanted - h @ ours["block"])[0]
    np.testing.assert_allclose(found["block"], ours["block"] + missing, atol=5e-3)


def read_twice(params, x):
    h = x @ params["in"]
    return jax.nn.relu(h) @ params["out"] + h @ params["beside"]


def clipped(params, x):
    return jnp.maximum(x @ params["in"], 0.5) @ params["out"]


def gated(params, x):
    return jax.nn.relu((x @ params["in"]) * (x @ params["beside"])) @ params["out"]


@pytest.mark.parametrize("fn", [read_twice, clipped, gated, jax.jit(read_twice)])
def test_where_no_relu_alone_follows_preactivations_are_fitted(fn):
    shapes = {"in": (5, 6), "out": (6, 3)}
    if fn is not clipped:
        shapes["beside"] = (5, 6) if fn is gated else (6, 3)
    nets, x = [normals(shapes, seed) for seed in range(2)], normal(60, 5, seed=4)
    symmetry = otf.trace_symmetry(fn, nets[0], x)
    methods = [otf.LeastSquares(0.1, None, at=at) for at in ("activation", "preactivation")]
    found = [otf.repair(symmetry, fn, nets, x, method=method) for method in methods]
    jax.tree.map(np.testing.assert_array_equal, *found)


def two_heads(params, x):
    h = jnp.tanh(x @ params["in"])
    return h @ params["out"], h @ params["beside"] + params["bias"][None]


def test_at_outputs_every_last_product_is_fitted_and_nothing_before():
    shapes = {"in": (5, 6), "out": (6, 3), "beside": (6, 2), "bias": (2,)}
    nets, x = [normals(shapes, seed) for seed in range(2)], normal(60, 5, seed=4)
    symmetry = otf.trace_symmetry(two_heads, nets[0], x)
    method = otf.LeastSquares(ridge=0, steps=None, at="output")
    found, average = otf.repair(symmetry, two_heads, nets, x, method=method), otf.average(nets)
    for name in ("in", "bias"):
        np.testing.assert_array_equal(found[name], average[name])
    hidden = np.tanh(x @ average["in"])
    heads = zip(*[two_heads(net, x) for net in nets], strict=True)
    biases = 0, np.asarray(average["bias"])
    for name, outputs, bias in zip(("out", "beside"), heads, biases, strict=True):
        close(found[name], np.linalg.lstsq(hidden, np.mean(outputs, axis=0) - bias)[0])


def gated_state(params, x):
    def step(h, row):
        return jax.nn.sigmoid(h @ params["gate"]) * jnp.tanh(h @ params["own"]) + row, None

    return jax.lax.scan(step, jnp.ones((len(x), 6)), x.swapaxes(0, 1))[0]


def test_at_outputs_a_loop_that_returns_its_state_stays_as_it_is():
    shapes = {"gate": (6, 6), "own": (6, 6)}
    nets, x = [normals(shapes, seed) for seed in range(2)], normal(4, 9, 6)
    symmetry = otf.trace_symmetry(gated_state, nets[0], x)
    with pytest.warns(otf.RepairWarning, match=r"(?s)corrects nothing.*own.*as in a loop"):
        found = otf.repair(symmetry, gated_state, nets, x, method=otf.LeastSquares(at="output"))
    jax.tree.map(np.testing.assert_array_equal, found, otf.average(nets))


def test_units_that_are_off_in_all_models_may_stay_as_the_average_has_them():
    x = jnp.abs(normal(100, 5, seed=4))
    off = {"in": -jnp.abs(normal(5, 6)), "out": normal(6, 3)}
    nets = [off, {"in": 3 * off["in"], "out": off["out"]}]
    net = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]  # noqa: E731
    symmetry = otf.trace_symmetry(net, off, x)
    found = otf.repair(symmetry, net, nets, x, method=otf.LeastSquares())
    np.testing.assert_allclose(found["in"], 2 * off["in"], rtol=1e-5)


def hidden(params, x):
    return jnp.tanh(x @ params["first"]) @ params["in"]


def read_beside_its_bias(params, x):
    h = hidden(params, x)
    return jax.nn.relu(h + params["b"][None]) @ params["out"] + jnp.sin(h) @ params["out"]


def added_twice(params, x):
    bias = params["b"][None]
    return jax.nn.relu(hidden(params, x) + bias + bias) @ params["out"]


def shared(params, x):
    h = jax.nn.relu(hidden(params, x) + params["b"][None])
    return jax.nn.relu(h @ params["again"] + params["b"][None]) @ params["out"]


def thresholded(params, x):
    h, threshold = hidden(params, x), params["b"][None]
    return (jax.nn.relu(h - threshold) - jax.nn.relu(-h - threshold)) @ params["out"]


@pytest.mark.parametrize("fn", [read_beside_its_bias, added_twice, shared, thresholded])
def test_a_bias_is_fitted_with_a_layer_only_if_nothing_else_reads_either(fn):
    shapes = {"first": (5, 8), "in": (8, 6), "b": (6,), "out": (6, 3)}
    if fn is shared:
        shapes["again"] = (6, 6)
    nets, x = [normals(shapes, seed) for seed in range(2)], 1 + normal(100, 5, seed=4)
    symmetry = otf.trace_symmetry(fn, nets[0], x)
    repair = functools.partial(otf.repair, symmetry, fn, nets, x)
    both, plain = (
        repair(method=otf.LeastSquares(0.1, None, at="preactivation", restore=restore))
        for restore in (True, False)
    )
    for name in ("in", "b"):
        np.testing.assert_array_equal(both[name], plain[name])
    if fn is thresholded:
        np.testing.assert_array_equal(repair()["b"], otf.average(nets)["b"])


def test_a_limit_that_is_traced_is_no_relu():
    shapes = {"in": (5, 6), "b": (6,), "out": (6, 3)}
    nets, x = [normals(shapes, seed) for seed in range(2)], normal(30, 5, seed=4)

    def limited(limit):
        return lambda p, x: jnp.maximum(x @ p["in"] + p["b"][None], limit) @ p["out"]

    symmetry = otf.trace_symmetry(limited(0.0), nets[0], x)
    found = jax.jit(
        lambda limit: otf.repair(symmetry, limited(limit), nets, x, method=otf.LeastSquares())
    )(jnp.float32(0))
    method = otf.LeastSquares(at="preactivation")
    jax.tree.map(close, found, otf.repair(symmetry, limited(0.0), nets, x, method=method))


@pytest.mark.parametrize("gain", [1e-3, 1e-6])
def test_a_unit_next_to_switched_off_does_not_become_large(gain):
    def net(p, x):
        h = (jnp.tanh(x @ p["first"]) @ p["in"] - p["mean"][None]) * p["gain"][None]
        return jax.nn.relu(h + p["b"][None]) @ p["out"]

    shapes = {"first": (5, 8), "in": (8, 6), "b": (6,), "out": (6, 3), "mean": (6,), "gain": (6,)}
    nets, x = [normals(shapes, seed) for seed in range(2)], normal(200, 5, seed=4)
    nets = [net | {"gain": (jnp.abs(net["gain"]) + 0.5).at[0].set(gain)} for net in nets]
    symmetry = otf.trace_symmetry(net, nets[0], x)
    found = otf.repair(symmetry, net, nets, x, method=otf.LeastSquares(restore=False))
    assert jnp.max(jnp.abs(found["in"][:, 0])) < 3 * jnp.max(jnp.abs(otf.average(nets)["in"]))


@pytest.mark.parametrize("exponent", [-40, -17, -13, 20])
@pytest.mark.parametrize(
    "method",
    [
        otf.LeastSquares(),
        otf.LeastSquares(at="preactivation"),
        otf.LeastSquares(ridge=(1e-3, 0.1), at="preactivation"),
        otf.LeastSquares(ridge=(1e-3, 0.1), steps=None),
    ],
)
def test_features_of_any_size_give_the_same_parameters(method: otf.LeastSquares, exponent: int):
    # Conjugate gradients square the equations, which are squares of features themselves.
    nets = [{"in": normal(6, 8, seed=seed), "out": normal(8, 3, seed=seed + 2)} for seed in (0, 1)]
    x = normal(40, 6, seed=5)

    def relu_net(params, x):
        return jax.nn.relu(x @ params["in"]) @ params["out"]

    symmetry = otf.trace_symmetry(relu_net, nets[0], x)
    expected = otf.repair(symmetry, relu_net, nets, x, method=method)
    found = otf.repair(symmetry, relu_net, nets, x * 2.0**exponent, method=method)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
