"""Checks what plans do to parameters against explicit indexing, and that networks survive it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal, normals, stack, unstack

import otfusion_jax as otf


@functools.cache
def symmetry_of(kind):
    params = random_net(kind)
    inputs = jax.ShapeDtypeStruct(ref.INPUTS[kind], jnp.float32)
    return otf.trace_symmetry(ref.network, params, inputs)


def random_net(kind, seed=0):
    return ref.random_net(seed, kind)


def inputs_of(kind):
    return normal(*ref.INPUTS[kind], seed=9)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), a, b)


def as_matrix(plan):
    """The coupling of a permutation: `plan[j]`, a row, goes to column `j`."""
    n = len(plan)
    return jnp.zeros((n, n)).at[plan, jnp.arange(n)].set(1 / n)


# Permutations


@pytest.mark.parametrize("kind", ref.SHAPES)
def test_permutations_are_gathers_of_every_axis(kind):
    symmetry, net = symmetry_of(kind), random_net(kind)
    plans = symmetry.random(jax.random.key(1))
    moved = otf.transport(symmetry, plans, net)
    in_order = [np.asarray(plans[f"{i}/kernel"]) for i in range(len(net) - 1)]
    expected = ref.moved_by(jax.tree.map(np.asarray, net), in_order)
    assert_trees_equal(moved, expected)
    x = inputs_of(kind)
    np.testing.assert_allclose(ref.network(moved, x), ref.network(net, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ref.SHAPES)
def test_permutation_matrices_do_the_same(kind):
    symmetry, net = symmetry_of(kind), random_net(kind)
    plans = symmetry.random(jax.random.key(2))
    matrices = {name: as_matrix(plan) for name, plan in plans.items()}
    expected = otf.transport(symmetry, plans, net)
    assert_trees_close(otf.transport(symmetry, matrices, net), expected, atol=1e-6)


def test_the_inverse_restores_and_composition_composes():
    symmetry, net = symmetry_of("conv"), random_net("conv")
    first, second = (symmetry.random(jax.random.key(seed)) for seed in (3, 4))
    moved = otf.transport(symmetry, first, net)
    inverse = {name: jnp.argsort(plan) for name, plan in first.items()}
    assert_trees_equal(otf.transport(symmetry, inverse, moved), net)
    both = {name: plan[second[name]] for name, plan in first.items()}
    assert_trees_equal(otf.transport(symmetry, second, moved), otf.transport(symmetry, both, net))


def test_inputs_are_not_modified_and_groups_left_out_stay():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    copy = jax.tree.map(jnp.copy, net)
    arrays = jax.tree.map(np.array, net)
    arrays_copy = jax.tree.map(np.copy, arrays)
    plan = jnp.roll(jnp.arange(8), 1)
    moved = otf.transport(symmetry, {"1/kernel": plan}, net)
    otf.transport(symmetry, {"1/kernel": plan}, arrays)
    assert_trees_equal(net, copy)
    assert_trees_equal(arrays, arrays_copy)
    assert_trees_equal(moved[0], net[0])
    np.testing.assert_array_equal(moved[1]["kernel"], net[1]["kernel"][:, plan])
    np.testing.assert_array_equal(moved[2]["kernel"], net[2]["kernel"][plan])
    assert_trees_equal(otf.transport(symmetry, {}, net), net)
    assert_trees_equal(otf.transport(symmetry, symmetry.identity(), net), net)


def test_an_alignment_serves_as_plans():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    plans = symmetry.random(jax.random.key(5))
    zero = jnp.zeros(())
    alignment = otf.Alignment(plans, zero, zero[None], jnp.array(True), {})
    assert_trees_equal(otf.transport(symmetry, alignment, net), otf.transport(symmetry, plans, net))


# Soft plans


def coupling(key, n, m):
    """A coupling with marginals that are not uniform."""
    plan = jax.random.uniform(key, (n, m)) ** 3
    return plan / plan.sum()


def test_soft_plans_average_what_produces_and_spread_what_consumes():
    symmetry, net = symmetry_of("conv"), random_net("conv")
    plan = coupling(jax.random.key(0), 8, 6)
    moved = otf.transport(symmetry, {"1/kernel": plan}, net)
    p = np.asarray(plan, np.float64)
    make, take = p / p.sum(0), p / p.sum(1, keepdims=True)
    assert_trees_equal([moved[0], moved[3]], [net[0], net[3]])
    np.testing.assert_array_equal(moved[2]["bias"], net[2]["bias"])
    expected = np.einsum("hwio,op->hwip", net[1]["kernel"], make)
    np.testing.assert_allclose(moved[1]["kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(moved[1]["bias"], net[1]["bias"] @ make, atol=1e-6)
    # Flattened: position first, then channel.
    flat = np.asarray(net[2]["kernel"]).reshape(16, 8, 8)
    expected = np.einsum("piq,ij->pjq", flat, take).reshape(96, 8)
    np.testing.assert_allclose(moved[2]["kernel"], expected, atol=1e-6)


def halves(n):
    """Splits each unit into two: `[n, 2n]`, each row's mass on two columns."""
    return jnp.repeat(jnp.eye(n), 2, axis=1) / (2 * n)


@pytest.mark.parametrize("kind", ref.SHAPES)
def test_splitting_units_keeps_the_function_and_merging_undoes_it(kind):
    symmetry, net, x = symmetry_of(kind), random_net(kind), inputs_of(kind)
    split = {group.name: halves(group.size) for group in symmetry.groups}
    wide = otf.transport(symmetry, split, net)
    assert wide[0]["kernel"].shape[-1] == 16
    assert wide[-1]["kernel"].shape == (16, 3)
    np.testing.assert_array_equal(wide[0]["bias"], jnp.repeat(net[0]["bias"], 2))
    np.testing.assert_allclose(ref.network(wide, x), ref.network(net, x), rtol=0, atol=1e-5)

    wide_symmetry = otf.trace_symmetry(ref.network, wide, x)
    merge = {name: plan.T for name, plan in split.items()}
    merged = otf.transport(wide_symmetry, merge, wide)
    # Each half took half the weight of what consumes it; a merged unit takes the mean of these.
    np.testing.assert_allclose(merged[0]["kernel"], net[0]["kernel"], atol=1e-6)
    np.testing.assert_allclose(ref.network(merged, x), ref.network(net, x), rtol=0, atol=1e-5)


def test_marginals_that_are_not_uniform_keep_the_function():
    symmetry, net, x = symmetry_of("mlp"), random_net("mlp"), inputs_of("mlp")
    # Every new unit has one source only; the sources have masses and shares of all sizes.
    sources = jnp.concatenate([jnp.arange(8), jnp.array([0, 0, 3])])
    masses = jax.random.uniform(jax.random.key(1), (11,), minval=0.1)
    plan = jnp.zeros((8, 11)).at[sources, jnp.arange(11)].set(masses / masses.sum())
    wide = otf.transport(symmetry, {"0/kernel": plan, "1/kernel": plan}, net)
    assert wide[1]["kernel"].shape == (11, 11)
    np.testing.assert_allclose(ref.network(wide, x), ref.network(net, x), rtol=0, atol=1e-5)


def test_units_without_mass_become_zero_not_nan():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    plan = as_matrix(jnp.arange(8)).at[2, 2].set(0)
    moved = otf.transport(symmetry, {"0/kernel": plan}, net)
    assert not moved[0]["kernel"][:, 2].any()
    assert not moved[1]["kernel"][2].any()
    others = jnp.delete(jnp.arange(8), 2)
    np.testing.assert_allclose(
        moved[0]["kernel"][:, others], net[0]["kernel"][:, others], atol=1e-6
    )


def heads(params, x):
    """Units in 4 heads of 3: heads may be permuted, and the units of all of them alike."""
    h = (x @ params["a"]).reshape(len(x), 4, 3) * params["scale"][None, None]
    h = h / (1 + jnp.sum(h**2, axis=2, keepdims=True))
    return h.reshape(len(x), -1) @ params["b"]


def random_heads():
    return normals({"a": (5, 12), "scale": (3,), "b": (12, 2)})


def without_scale(params, x):
    return heads(params | {"scale": jnp.ones(3)}, x)


def test_two_groups_on_one_axis_move_independently():
    params, x = random_heads(), normal(7, 5, seed=1)
    symmetry = otf.trace_symmetry(heads, params, x)
    outer, inner = symmetry.groups
    assert (outer.size, inner.size, inner.outer) == (4, 3, None)
    plans = symmetry.random(jax.random.key(2))
    p, q = (np.asarray(plans[g.name]) for g in (outer, inner))
    moved = otf.transport(symmetry, plans, params)
    index = np.array([3 * i + j for i in p for j in q])
    np.testing.assert_array_equal(moved["a"], params["a"][:, index])
    np.testing.assert_array_equal(moved["b"], params["b"][index])
    np.testing.assert_array_equal(moved["scale"], params["scale"][q])
    np.testing.assert_allclose(heads(moved, x), heads(params, x), rtol=0, atol=1e-5)


def test_two_groups_on_one_axis_change_their_widths_together():
    params = random_heads()
    symmetry = otf.trace_symmetry(heads, params, jnp.ones((7, 5)))
    outer, inner = symmetry.groups
    p, q = coupling(jax.random.key(3), 4, 2), coupling(jax.random.key(4), 3, 5)
    moved = otf.transport(symmetry, {outer.name: p, inner.name: q}, params)
    p, q = np.asarray(p), np.asarray(q)
    a = np.asarray(params["a"]).reshape(5, 4, 3)
    expected = np.einsum("nij,ik,jl->nkl", a, p / p.sum(0), q / q.sum(0)).reshape(5, 10)
    np.testing.assert_allclose(moved["a"], expected, atol=1e-5)
    b = np.asarray(params["b"]).reshape(4, 3, 2)
    expected = np.einsum("ijn,ik,jl->kln", b, p / p.sum(1)[:, None], q / q.sum(1)[:, None])
    np.testing.assert_allclose(moved["b"], expected.reshape(10, 2), atol=1e-5)


def test_a_nested_group_moves_in_another_way_at_each_index():
    params, x = random_heads(), normal(7, 5, seed=1)
    del params["scale"]
    symmetry = otf.trace_symmetry(without_scale, params, x)
    outer, inner = symmetry.groups
    assert (inner.outer, inner.batch, inner.size) == (outer.name, (4,), 3)
    plans = symmetry.random(jax.random.key(2))
    p, q = (np.asarray(plans[g.name]) for g in (outer, inner))
    assert len({tuple(row) for row in q}) > 1
    moved = otf.transport(symmetry, plans, params)
    # What lands at an index is in the order that the plan has for this index.
    index = np.array([3 * p[i] + q[i, j] for i in range(4) for j in range(3)])
    np.testing.assert_array_equal(moved["a"], params["a"][:, index])
    np.testing.assert_array_equal(moved["b"], params["b"][index])
    np.testing.assert_allclose(without_scale(moved, x), without_scale(params, x), rtol=0, atol=1e-5)


def test_soft_plans_of_a_nested_group_mix_within_each_index():
    params = random_heads()
    del params["scale"]
    symmetry = otf.trace_symmetry(without_scale, params, jnp.ones((7, 5)))
    inner = symmetry.groups[1]
    q = jnp.stack([coupling(jax.random.key(i), 3, 3) for i in range(4)])
    moved = otf.transport(symmetry, {inner.name: q}, params)
    q = np.asarray(q)
    a = np.asarray(params["a"]).reshape(5, 4, 3)
    expected = np.einsum("nij,ijl->nil", a, q / q.sum(1, keepdims=True)).reshape(5, 12)
    np.testing.assert_allclose(moved["a"], expected, atol=1e-5)
    b = np.asarray(params["b"]).reshape(4, 3, 2)
    expected = np.einsum("ijn,ijl->iln", b, q / q.sum(2, keepdims=True)).reshape(12, 2)
    np.testing.assert_allclose(moved["b"], expected, atol=1e-5)
    wider = jnp.stack([coupling(jax.random.key(i), 3, 5) for i in range(4)])
    moved = otf.transport(symmetry, {inner.name: wider}, params)
    q = np.asarray(wider)
    expected = np.einsum("nij,ijl->nil", a, q / q.sum(1, keepdims=True)).reshape(5, 20)
    np.testing.assert_allclose(moved["a"], expected, atol=1e-5)


@pytest.mark.parametrize("inner_width", [3, 5])
def test_heads_that_merge_take_plans_of_all_pairs(inner_width: int):
    params = random_heads()
    del params["scale"]
    symmetry = otf.trace_symmetry(without_scale, params, jnp.ones((7, 5)))
    outer, inner = symmetry.groups
    p = coupling(jax.random.key(0), 4, 2)
    key = jax.random.key(1)
    if inner_width == 3:
        in_order = jnp.broadcast_to(jnp.arange(3), (4, 2, 3))
        q = jax.random.permutation(key, in_order, axis=-1, independent=True)
        pairs = np.asarray(jax.nn.one_hot(q, 3, axis=-2))
    else:
        q = jnp.stack([coupling(k, 3, 5) for k in jax.random.split(key, 8)]).reshape(4, 2, 3, 5)
        pairs = np.asarray(q)
    moved = otf.transport(symmetry, {outer.name: p, inner.name: q}, params)
    p = np.asarray(p)
    a = np.asarray(params["a"]).reshape(5, 4, 3)
    weights = (p / p.sum(0))[..., None, None] * pairs / pairs.sum(-2, keepdims=True)
    expected = np.einsum("nhi,hgij->ngj", a, weights).reshape(5, -1)
    np.testing.assert_allclose(moved["a"], expected, atol=1e-5)
    b = np.asarray(params["b"]).reshape(4, 3, 2)
    weights = (p / p.sum(1)[:, None])[..., None, None] * pairs / pairs.sum(-1, keepdims=True)
    expected = np.einsum("hin,hgij->gjn", b, weights).reshape(-1, 2)
    np.testing.assert_allclose(moved["b"], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(4, 2, 3\), one for every pair of what a moves"):
        otf.transport(symmetry, {outer.name: jnp.ones((4, 2)) / 8, inner.name: q[0]}, params)


# Kinds of leaves


def test_leaves_that_do_not_move_pass_bit_for_bit():
    def fn(params, x):
        return jax.nn.relu(x @ params["w"]) @ params["v"] + params["steps"].astype(jnp.float32)

    params = {
        "w": jnp.arange(20.0).reshape(5, 4),
        "v": jnp.arange(12.0).reshape(4, 3),
        "steps": jnp.arange(4 * 3).reshape(4, 3) - 2**30,
        "mask": jnp.array([True, False, True, True]),
        "key": jax.random.key(3),
    }
    symmetry = otf.trace_symmetry(fn, params, jnp.ones((4, 5)))
    moved = otf.transport(symmetry, {"w": jnp.array([2, 0, 3, 1])}, params)
    np.testing.assert_array_equal(moved["w"], params["w"][:, jnp.array([2, 0, 3, 1])])
    for name in ("steps", "mask"):
        assert moved[name].dtype == params[name].dtype
        np.testing.assert_array_equal(moved[name], params[name])
    assert jnp.array_equal(moved["key"], params["key"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_leaves_keep_their_dtype(dtype):
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    params = {"w": jnp.arange(20.0).reshape(5, 4), "v": jnp.arange(12.0).reshape(4, 3)}
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    symmetry = otf.trace_symmetry(fn, params, jnp.ones((2, 5), dtype))
    plan = jnp.array([2, 0, 3, 1])
    for kind in (plan, as_matrix(plan)):
        moved = otf.transport(symmetry, {"w": kind}, params)
        assert moved["w"].dtype == moved["v"].dtype == dtype
        np.testing.assert_array_equal(moved["w"], params["w"][:, plan])
        np.testing.assert_array_equal(moved["v"], params["v"][plan])


# Transformations of JAX


def test_a_plan_out_of_range_gives_nan_under_jit():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    move = jax.jit(lambda plan: otf.transport(symmetry, {"1/kernel": plan}, net))
    good = jnp.arange(8)
    assert_trees_equal(move(good), net)
    moved = move(good.at[0].set(8))
    assert jnp.isnan(moved[1]["kernel"][:, 0]).all()
    assert jnp.isnan(moved[2]["kernel"][0]).all()
    assert jnp.isnan(ref.network(moved, inputs_of("mlp"))).all()
    np.testing.assert_array_equal(moved[1]["kernel"][:, 1:], net[1]["kernel"][:, 1:])


def test_arrays_may_be_closed_over_in_jit():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    for plan in (symmetry.random(jax.random.key(6))["0/kernel"], coupling(jax.random.key(6), 8, 6)):
        plans = {"0/kernel": plan}
        expected = otf.transport(symmetry, plans, net)
        for moved in (
            jax.jit(lambda p: otf.transport(symmetry, p, net))(plans),
            jax.jit(lambda n, p=plans: otf.transport(symmetry, p, n))(net),
        ):
            assert_trees_close(moved, expected, atol=1e-6)


def test_vmap_over_plans_and_over_models():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    move = functools.partial(otf.transport, symmetry)
    plans = jax.vmap(symmetry.random)(jax.random.split(jax.random.key(6), 3))
    nets = stack([random_net("mlp", seed) for seed in range(3)])
    over_plans = jax.vmap(move, in_axes=(0, None))(plans, net)
    over_both = jax.vmap(move)(plans, nets)
    for i in range(3):
        plan = unstack(plans, i)
        assert_trees_equal(unstack(over_plans, i), move(plan, net))
        assert_trees_equal(unstack(over_both, i), move(plan, unstack(nets, i)))


@pytest.mark.parametrize("what", ["params", "plans"])
def test_gradients_agree_with_finite_differences(what):
    symmetry, net, x = symmetry_of("mlp"), random_net("mlp"), inputs_of("mlp")
    keys = jax.random.split(jax.random.key(7), 2)
    plans = {"0/kernel": coupling(keys[0], 8, 6), "1/kernel": coupling(keys[1], 8, 6)}

    def loss(net, plans):
        return jnp.mean(jnp.tanh(ref.network(otf.transport(symmetry, plans, net), x)))

    point = (net, plans)
    index = ("params", "plans").index(what)
    gradient = jax.grad(loss, argnums=index)(*point)
    direction = jax.tree.map(lambda leaf: leaf * normal(*leaf.shape, seed=8), point[index])
    slope = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))

    def along(step):
        shifted = list(point)
        shifted[index] = jax.tree.map(lambda x, d: x + step * d, point[index], direction)
        return float(loss(*shifted))

    expected = ref.central_difference(along, 1e-2)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(slope, expected, rtol=0.02, atol=1e-4)


# Plans that do not fit


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (jnp.arange(7), r"shape \(7,\), expected \(8,\)"),
        (jnp.zeros(8, jnp.int32), "not a permutation of 0 to 7"),
        (jnp.full(8, 8), "not a permutation of 0 to 7; its cost was not finite"),
        (jnp.arange(8) + 1, "not a permutation of 0 to 7; its indices start at 1, subtract 1"),
        (jnp.arange(8).at[0].set(9), "not a permutation of 0 to 7$"),
        (
            jnp.eye(8, dtype=int),
            r"int32 of shape \(8, 8\), expected int \(8,\); a plan of masses is",
        ),
        (jnp.eye(8, dtype=bool), "dtype bool, but a plan of masses is floating-point"),
        (jnp.zeros((8, 8)), "no mass at all, which would make the units 0"),
        (jnp.arange(8) - 1, "not a permutation of 0 to 7"),
        (jnp.ones(8), r"shape \(8,\), expected \(8, m\) for a transport plan"),
        (jnp.ones((7, 8)), r"shape \(7, 8\), expected \(8, m\) for a transport plan"),
        (jnp.eye(8) - 0.1, "masses that are negative or not finite"),
        (jnp.full((8, 8), jnp.nan), "masses that are negative or not finite"),
        (jnp.full((8, 8), jnp.inf), "masses that are negative or not finite"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, problem):
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    with pytest.raises(ValueError, match=rf"(?m)0/kernel: {problem}"):
        otf.transport(symmetry, {"0/kernel": plan}, net)


def test_all_plans_that_do_not_fit_are_named():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    plans = {"0/kernel": jnp.arange(8), "1/kernel": jnp.arange(3), "9/kernel": jnp.arange(8)}
    with pytest.raises(ValueError, match="9/kernel: no such group") as error:
        otf.transport(symmetry, plans, net)
    assert "  1/kernel: shape (3,)" in str(error.value)
    assert "  0/kernel" not in str(error.value)
    assert "Its groups: 0/kernel (8), 1/kernel (8)" in str(error.value)


def tied(params, tokens):
    return jnp.take(params["embedding"], tokens, axis=0) @ params["embedding"].T


def test_axes_of_both_roles_take_permutations_only():
    params = {"embedding": jnp.arange(20.0).reshape(5, 4)}
    tokens = jnp.array([0, 3])
    symmetry = otf.trace_symmetry(tied, params, tokens)
    (group,) = symmetry.groups
    assert group.members[0].role == "both"
    plan = jnp.array([1, 2, 3, 0])
    moved = otf.transport(symmetry, {group.name: plan}, params)
    np.testing.assert_array_equal(moved["embedding"], params["embedding"][:, plan])
    np.testing.assert_allclose(tied(moved, tokens), tied(params, tokens))
    with pytest.raises(ValueError, match="embedding both produce and consume the units"):
        otf.transport(symmetry, {group.name: as_matrix(plan)}, params)


def test_parameters_that_do_not_fit_are_refused():
    symmetry, net = symmetry_of("mlp"), random_net("mlp")
    with pytest.raises(ValueError, match=r"0/kernel: shape \(6, 8\), expected \(5, 8\)"):
        otf.transport(symmetry, {}, [{**net[0], "kernel": jnp.zeros((6, 8))}, *net[1:]])


# The certificate


def test_the_certificate_accepts_right_and_rejects_wrong_groups():
    symmetry, net, x = symmetry_of("conv"), random_net("conv"), inputs_of("conv")
    assert otf.check_symmetry(symmetry, ref.network, net, x) < 1e-5

    def ordered(params, x):
        return ref.network(params, x) * jnp.sum(params[0]["bias"] * jnp.arange(8.0))

    errors = [
        otf.check_symmetry(symmetry, ordered, net, x, key=jax.random.key(seed)) for seed in (1, 2)
    ]
    assert min(errors) > 1e-2
    assert errors[0] != errors[1]


def test_the_certificate_moves_every_unit():
    """Of two units, a uniform permutation leaves both in place half of the time."""
    params = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.array([[0.5], [3.0]])}
    fn = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"]  # noqa: E731
    x = jnp.ones((3, 1))
    symmetry = otf.trace_symmetry(fn, params, x)
    for seed in range(4):
        key = jax.random.key(seed)
        assert otf.check_symmetry(symmetry, fn, params, x, key=key) < 1e-5
        first = lambda p, x: fn(p, x) + p["in"][0, 0]  # noqa: E731
        assert otf.check_symmetry(symmetry, first, params, x, key=key) > 0.1


def test_the_certificate_does_not_hide_nan():
    symmetry, net, x = symmetry_of("mlp"), random_net("mlp"), inputs_of("mlp")
    assert np.isnan(otf.check_symmetry(symmetry, ref.network, net, x * jnp.nan))
