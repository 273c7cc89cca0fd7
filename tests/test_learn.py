"""Checks gradients through plans, and alignments that are learned by descent along them."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference as ref
import zoo_attention  # noqa: F401, adds its networks to `CASES`
from arrays import array, normal, normals
from zoo import CASES

import otfusion_jax as otf
from otfusion_jax.alignment import loss_descent

SOLVER = otf.Sinkhorn(epsilon=0.3, threshold=1e-12, max_iterations=20000)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def mlp(seed, width=5):
    """A network of 4-width-width-3 whose hidden widths can be chosen."""
    sizes = (4, width, width, 3)
    rng = np.random.default_rng(seed)
    return [
        {"kernel": array(rng.standard_normal((n, m)) / n**0.5, np.float64)}
        for n, m in zip(sizes, sizes[1:], strict=False)
    ]


def loss(params, x):
    return jnp.mean(jnp.tanh(ref.network(params, x)) ** 2 - ref.network(params, x))


def agrees_with_differences(function, point, step=1e-5, rel=1e-4):
    """Compares the slope along a random direction with a central difference."""
    function = jax.jit(function)
    gradient = jax.jit(jax.grad(function))(point)
    chex.assert_tree_all_finite(gradient)
    leaves, treedef = jax.tree.flatten(point)
    rng = np.random.default_rng(9)
    direction = treedef.unflatten(array(rng.standard_normal(x.shape), x.dtype) for x in leaves)
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))

    def at(size):
        return float(function(jax.tree.map(lambda p, d: p + size * d, point, direction)))

    assert abs(float(slope)) > 1e-4  # there is something to compare
    assert float(slope) == pytest.approx((at(step) - at(-step)) / (2 * step), rel=rel)


# --- gradients


def costs(symmetry, source, target):
    """A cost for each group, of its own and not of any weights."""
    return normals({g.name: (source, target) for g in symmetry.groups}, 5, np.float64)


SOLVES = {
    "balanced": SOLVER,
    "unbalanced": dataclasses.replace(SOLVER, tau_a=0.9, tau_b=0.8),
    "half unbalanced": dataclasses.replace(SOLVER, tau_b=0.7),
}


@pytest.mark.usefixtures("x64", "default_promotion")
@pytest.mark.parametrize(
    ("width", "solve"),
    [
        (5, "balanced"),
        (7, "balanced"),
        (5, "unbalanced"),
        (4, "half unbalanced"),
    ],
)
def test_the_midpoints_loss_by_the_costs(width, solve):
    a, b = mlp(0, width), mlp(1)
    x = normal(6, 4, seed=2, dtype=np.float64)
    symmetry = otf.trace_symmetry(ref.network, a, x)

    def midpoint(cost):
        plans = {}
        for name, group_cost in cost.items():
            plans[name] = SOLVES[solve].solve(otf.TransportProblem(group_cost)).plan
        return loss(otf.average([otf.transport(symmetry, plans, a), b]), x)

    agrees_with_differences(midpoint, costs(symmetry, width, 5))


@pytest.mark.usefixtures("x64", "default_promotion")
def test_the_midpoints_loss_by_the_model_that_is_aligned():
    a, b = mlp(0), mlp(1)
    x = normal(6, 4, seed=2, dtype=np.float64)
    symmetry = otf.trace_symmetry(ref.network, a, x)

    def midpoint(a):
        plans = otf.align(symmetry, a, b, method=otf.ForwardPass(), solver=SOLVER)
        return loss(otf.average([otf.transport(symmetry, plans, a), b]), x)

    agrees_with_differences(midpoint, a)


@pytest.mark.usefixtures("x64", "default_promotion")
def test_a_plan_by_its_marginals():
    weights, cost = normal(2, 4, 3, seed=0, dtype=np.float64)

    def objective(logits):
        masses = jax.nn.softmax(logits[:4]), jax.nn.softmax(logits[4:])
        return jnp.sum(weights * SOLVER.solve(otf.TransportProblem(cost, *masses)).plan)

    agrees_with_differences(objective, jnp.linspace(0, 1, 7))


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_gradients_of_plans_that_are_nearly_hard_stay_finite(shape):
    # In float32, with far fewer iterations than it would take.
    cost, weights = normal(*shape, seed=0), normal(*shape, seed=1)

    def objective(cost, solver):
        return jnp.sum(weights * solver.solve(otf.TransportProblem(cost)).plan)

    for epsilon in (1e-1, 1e-3):
        solver = otf.Sinkhorn(epsilon=epsilon, max_iterations=30)
        gradient = jax.grad(objective)(cost, solver)
        assert jnp.all(jnp.isfinite(gradient))
        assert jnp.max(jnp.abs(gradient)) < 1 / epsilon


# --- learning


def pair():
    """Two networks apart, and a loss that is 0 where one computes what the second does."""
    a, b = ref.random_net(0, "mlp"), ref.random_net(1, "mlp")
    symmetry = otf.trace_symmetry(ref.network, a, jnp.ones(ref.INPUTS["mlp"]))
    batches = normal(60, 32, 5, seed=2)

    def loss(params, x):
        return jnp.mean(jnp.square(ref.network(b, x) - ref.network(params, x)))

    return symmetry, a, b, batches, loss


def midpoint(symmetry, plans, a, b):
    return otf.average([otf.transport(symmetry, plans, a), b])


def test_what_is_learned_beats_weight_matching():
    symmetry, a, b, batches, loss = pair()
    learned = otf.learn_alignment(symmetry, loss, a, b, batches)
    assert learned.history.shape == (60,)
    held_out = normal(500, 5, seed=3)
    matched = loss(midpoint(symmetry, otf.align(symmetry, a, b), a, b), held_out)
    for plans in (learned.plans, learned.soft):
        assert loss(midpoint(symmetry, plans, a, b), held_out) < 0.9 * matched
    x = batches[0]
    moved = otf.transport(symmetry, learned, a)  # permutations: the same function
    np.testing.assert_allclose(ref.network(moved, x), ref.network(a, x), atol=1e-5)


def test_the_same_under_jit_and_the_loss_is_taken_at_t():
    symmetry, a, b, batches, loss = pair()
    few = batches[:3]
    start = symmetry.random(jax.random.key(4))

    def learn(a):
        no_steps = optax.sgd(0.0)
        return otf.learn_alignment(
            symmetry, loss, a, b, few, start=start, t=0.3, optimizer=no_steps
        )

    expected = learn(a)
    chex.assert_trees_all_close(jax.jit(learn)(a), expected, atol=1e-5)
    moved = otf.transport(symmetry, expected.soft, a)
    for x, value in zip(few, expected.history, strict=True):
        np.testing.assert_allclose(loss(otf.interpolate(moved, b, 0.3), x), value, rtol=1e-4)


def test_arrays_that_a_loss_brings_along_are_data():
    symmetry, a, b, batches, _ = pair()
    traced = []

    def distance(teacher, params, x):
        traced.append(x)
        return jnp.mean(jnp.square(ref.network(teacher, x) - ref.network(params, x)))

    def learn(teacher):
        loss = jax.tree_util.Partial(distance, teacher)
        return otf.learn_alignment(symmetry, loss, a, b, batches[:4], start=symmetry.identity())

    first = learn(b)
    count = len(traced)
    second = learn(a)
    assert len(traced) == count
    assert not np.allclose(first.history, second.history, rtol=0.1)
    expected = otf.learn_alignment(
        symmetry,
        lambda params, x: distance(a, params, x),
        a,
        b,
        batches[:4],
        start=symmetry.identity(),
    )
    np.testing.assert_allclose(second.history, expected.history, rtol=1e-5)


def test_what_is_no_array_in_a_loss_stays_what_it_is():
    symmetry, a, b, batches, loss = pair()

    def distance(kind, params, x):
        assert kind == "mean"
        return loss(params, x)

    partial = jax.tree_util.Partial(distance, "mean")
    start = symmetry.identity()
    found = otf.learn_alignment(symmetry, partial, a, b, batches[:3], start=start)
    expected = otf.learn_alignment(symmetry, loss, a, b, batches[:3], start=start)
    chex.assert_trees_all_close(found.history, expected.history)


def test_groups_inside_of_others_are_learned():
    case = CASES["attention"]()
    symmetry = otf.trace_symmetry(case.fn, case.params, *case.inputs)
    planted = symmetry.random(jax.random.key(0))
    target = otf.transport(symmetry, planted, case.params)

    def loss(params, inputs):
        return jnp.mean(jnp.square(case.fn(params, *inputs) - case.fn(target, *inputs)))

    batches = jax.tree.map(lambda x: jnp.stack([x, x]), case.inputs)
    learned = otf.learn_alignment(symmetry, loss, case.params, target, batches, start=planted)
    # The costs are lowest where the units lie; groups with others inside stay.
    jax.tree.map(np.testing.assert_array_equal, learned.plans, planted)
    outer_names = {group.outer for group in symmetry.groups}
    for group in symmetry.groups:
        shape = (*group.batch, group.size)
        if group.name not in outer_names:
            shape = (*shape, group.size)
        assert learned.soft[group.name].shape == shape
    assert any(group.batch for group in symmetry.groups)


def rotating_pair():
    """Two linear bottlenecks, whose units rotate, and a loss as in `pair`."""
    a, b = (normals({"in": (5, 3), "out": (3, 4)}, seed) for seed in (0, 1))

    def bottleneck(params, x):
        return x @ params["in"] @ params["out"]

    def loss(params, x):
        return jnp.mean(jnp.square(bottleneck(b, x) - bottleneck(params, x)))

    symmetry = otf.trace_symmetry(bottleneck, a, jnp.ones((2, 5))).with_rotations()
    return symmetry, a, b, normal(60, 32, 5, seed=2), loss


@pytest.mark.parametrize("problem", [pair, rotating_pair])
@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_learning_goes_on_from_what_was_saved(problem, stacked):
    symmetry, a, b, batches, loss = problem()
    solver = None if symmetry.rotates else otf.Sinkhorn(epsilon=0.5, relative=False)

    def learn(first, last, state=None):
        chosen = batches[first:last] if stacked else iter(batches[first:last])
        return otf.learn_alignment(
            symmetry, loss, a, b, chosen, state=state, steps=7, solver=solver
        )

    whole = learn(0, 7)
    before = learn(0, 3)
    on_disk = jax.tree.map(np.asarray, before.state)
    after = learn(3, 7, on_disk)
    assert (int(before.state.steps), int(after.state.steps)) == (3, 7)
    chex.assert_trees_all_equal(after.state, whole.state)
    chex.assert_trees_all_equal((after.plans, after.soft), (whole.plans, whole.soft))
    losses = jnp.concatenate([before.history, after.history])
    np.testing.assert_array_equal(losses, whole.history)
    for name, numbers in after.state.learned.items():
        # The second part has learned something.
        assert jnp.abs(numbers - on_disk.learned[name]).max() > 1e-3


def test_batches_that_come_one_by_one_are_learned_from_like_a_stack():
    symmetry, a, b, batches, loss = pair()
    stream = iter(batches)
    streamed = otf.learn_alignment(symmetry, loss, a, b, stream, steps=5)
    stacked = otf.learn_alignment(symmetry, loss, a, b, batches[:5])
    np.testing.assert_allclose(streamed.history, stacked.history, rtol=1e-5)
    chex.assert_trees_all_close(streamed.soft, stacked.soft, atol=1e-3)
    np.testing.assert_array_equal(next(stream), batches[5])  # no more were taken than asked for


def test_a_bar_shows_the_steps(capsys):
    symmetry, a, b, batches, loss = rotating_pair()
    shown = otf.learn_alignment(symmetry, loss, a, b, batches[:4], solver=None, progress=True)
    said = capsys.readouterr()
    assert "learning" in said.err
    assert "4/4" in said.err
    assert not said.out
    silent = otf.learn_alignment(symmetry, loss, a, b, list(batches[:4]), solver=None)
    chex.assert_trees_all_equal(shown, silent)
    assert not capsys.readouterr().err


def test_a_state_that_learning_cannot_go_on_from_is_refused():
    symmetry, a, b, batches, loss = rotating_pair()
    learn = functools.partial(otf.learn_alignment, symmetry, loss, a, b, solver=None)
    state = learn(batches[:2]).state
    few = batches[2:4]
    with pytest.raises(ValueError, match="both start and state are given"):
        learn(few, state=state, start={}, steps=4)
    with pytest.raises(ValueError, match="a state can't tell it; pass steps"):
        learn(few, state=state)
    with pytest.raises(ValueError, match="batches can't tell it; pass steps"):
        learn(iter(few))
    with pytest.raises(ValueError, match="steps is 2, and the state has made as many"):
        learn(few, state=state, steps=2)
    with pytest.raises(ValueError, match="the state is not one of these arguments"):
        learn(few, state=state, optimizer=optax.sgd(0.1))
    other = dataclasses.replace(state, plans={})
    with pytest.raises(ValueError, match="the state is not one of these arguments"):
        learn(few, state=other, steps=4)
    with pytest.raises(ValueError, match="there are no batches"):
        learn([], steps=4)
    with pytest.raises(ValueError, match="there are no batches"):
        learn([])
    with pytest.raises(ValueError, match="the state is traced"):
        jax.jit(lambda state: learn(few, state=state, steps=4))(state)


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    symmetry, a, b, batches, loss = pair()
    few = batches[:4].at[2, 0].set(jnp.nan)
    with pytest.raises(FloatingPointError, match="the loss is not finite, first at step 2"):
        otf.learn_alignment(symmetry, loss, a, b, few)


def test_a_gradient_that_is_not_finite_is_told():
    symmetry, a, b, batches, loss = pair()

    def steep(params, x):
        # The root's slope at 0 is infinite.
        return loss(params, x) + jnp.sqrt(0 * loss(params, x))

    with pytest.raises(FloatingPointError, match="a gradient of the loss is not finite"):
        otf.learn_alignment(symmetry, steep, a, b, batches[:1])


def test_a_position_that_is_not_finite_is_refused():
    symmetry, a, b, batches, loss = pair()
    with pytest.raises(ValueError, match="t is nan; positions on the line .* are finite"):
        otf.learn_alignment(symmetry, loss, a, b, batches, t=float("nan"))


def test_what_cannot_be_learned_from_is_refused():
    symmetry, a, b, batches, loss = pair()
    for wrong in ((), (batches, batches[:3]), 1.0, batches[:0]):
        with pytest.raises(ValueError, match="batches must be"):
            otf.learn_alignment(symmetry, loss, a, b, wrong)
    soft = {"0/kernel": jnp.eye(8) / 8}
    with pytest.raises(ValueError, match="soft"):
        otf.learn_alignment(symmetry, loss, a, b, batches, start=soft)
    with pytest.raises(ValueError, match=r"returned an array of shape \(1,\); return a scalar"):
        otf.learn_alignment(symmetry, lambda *of: loss(*of)[None], a, b, batches)


def test_rotations_inside_of_heads_are_those_of_each_head():
    symmetry, *_ = rotating_pair()
    group = symmetry.groups[0]
    in_heads = dataclasses.replace(group, batch=(4,))
    n = group.size
    plans = jnp.broadcast_to(jnp.eye(n), (4, n, n))
    numbers = normal(4, n, n, seed=0)
    turned = loss_descent._turned(in_heads, plans, numbers)
    for plan, alone, own in zip(plans, turned, numbers, strict=True):
        np.testing.assert_allclose(alone, loss_descent._turned(group, plan, own), atol=1e-6)
        np.testing.assert_allclose(alone @ alone.T, np.eye(n), atol=1e-5)
