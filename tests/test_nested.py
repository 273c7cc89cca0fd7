"""Checks alignment, features and fusion where groups are nested: heads, experts, stacked layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo_attention  # noqa: F401, these add their networks to `CASES`
import zoo_convolution  # noqa: F401
import zoo_recurrent  # noqa: F401
from arrays import normals, uniform
from ott.geometry import costs
from zoo import CASES, randomise, shapes

import otfusion_jax as otf

NETWORKS = [
    "gpt2",
    "llama",
    "transformer_scanned_linen",
    "mixture_of_experts",
    "group_norm_resnet",
    "lstm_linen",
]


def setting(name: str):
    case = CASES[name]()
    return case, otf.trace_symmetry(case.fn, case.params, *case.inputs)


def close(a, b, atol: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_permutation_is_undone(name: str):
    case, symmetry = setting(name)
    source = otf.transport(symmetry, symmetry.random(jax.random.key(3)), case.params)
    alignment = otf.align(symmetry, source, case.params)
    assert bool(alignment.converged)
    assert float(alignment.objective) <= 1e-6 * float(alignment.history[0])
    close(otf.transport(symmetry, alignment, source), case.params)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("gpt2", "preactivation"),
        ("mixture_of_experts", "activation"),
        ("transformer_scanned_linen", "activation"),
    ],
)
def test_a_planted_permutation_is_undone_by_activations(name: str, at):
    case, symmetry = setting(name)
    source = otf.transport(symmetry, symmetry.random(jax.random.key(4)), case.params)
    grams = otf.feature_gram(symmetry, case.fn, source, case.params, [case.inputs], at=at)
    alignment = otf.align(symmetry, source, case.params, method=otf.ForwardPass(), grams=grams)
    moved = otf.transport(symmetry, alignment, source)
    # Where few inputs leave units alike, their order is open; the features must agree anyhow.
    ours = otf.features(symmetry, case.fn, moved, *case.inputs, at=at)
    theirs = otf.features(symmetry, case.fn, case.params, *case.inputs, at=at)
    close(ours, theirs, 1e-4)


def test_a_network_fused_with_itself_reordered_is_itself():
    case, symmetry = setting("transformer_scanned_linen")
    other = otf.transport(symmetry, symmetry.random(jax.random.key(5)), case.params)
    fused = otf.fuse(symmetry, [other, case.params])
    close(fused, case.params)


def heads(p, x):
    """Attention over rows by 2 heads of 3, the rest of the network as small as it can be."""
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("qhk,thk->hqt", q, k), -1)
    return jnp.einsum("hqt,thk,hkd->qd", weights, v, p["out"])


HEADS = shapes(q=(4, 2, 3), k=(4, 2, 3), v=(4, 2, 3), out=(2, 3, 4))


def test_heads_are_matched_with_what_is_inside_by_the_best_of_all_plans():
    a, b = randomise(HEADS, 0), randomise(HEADS, 1)
    symmetry = otf.trace_symmetry(heads, a, uniform(5, 4))
    outer, *inside = symmetry.groups
    assert [(g.size, g.batch) for g in symmetry.groups] == [(2, ()), (3, (2,)), (3, (2,))]
    orders = [np.array(p) for p in itertools.permutations(range(3))]
    best = np.inf
    for order in itertools.permutations(range(2)):
        for choices in itertools.product(orders, repeat=4):
            plans = {
                outer.name: jnp.array(order),
                inside[0].name: jnp.stack([jnp.array(c) for c in choices[:2]]),
                inside[1].name: jnp.stack([jnp.array(c) for c in choices[2:]]),
            }
            moved = jax.tree.map(np.asarray, _moved(symmetry, plans, a))
            distance = sum(np.sum((moved[n] - np.asarray(b[n])) ** 2) for n in HEADS)
            best = min(best, distance)
    found = otf.align(symmetry, a, b, method=otf.CoordinateDescent(starts=("identity",)))
    np.testing.assert_allclose(found.objective, best, rtol=1e-5)


def _moved(symmetry, plans, a):
    """Heads of a moved by numpy, which 2,592 times is faster than to compile once."""
    outer, qk, v = (np.asarray(plans[g.name]) for g in symmetry.groups)
    moved = {name: np.asarray(a[name])[:, outer] for name in ("q", "k", "v")}
    moved["out"] = np.asarray(a["out"])[outer]
    for name, inner in (("q", qk), ("k", qk), ("v", v)):
        moved[name] = np.take_along_axis(moved[name], inner[None], axis=2)
    moved["out"] = np.take_along_axis(moved["out"], v[:, :, None], axis=1)
    return moved


def test_features_of_heads_are_those_of_each_head():
    p, x = randomise(HEADS, 2), uniform(5, 4)
    symmetry = otf.trace_symmetry(heads, p, x)
    outer, qk, v = symmetry.groups
    found = otf.features(symmetry, heads, p, x)
    assert found[qk.name].shape == (2, 10, 3)  # queries and keys of 5 rows
    q, k = (np.einsum("td,dhk->htk", x, p[name]) for name in ("q", "k"))
    np.testing.assert_allclose(found[qk.name], np.concatenate([q, k], axis=1), atol=1e-5)
    values = np.einsum("td,dhk->htk", x, p["v"])
    np.testing.assert_allclose(found[v.name], values, atol=1e-5)


def test_features_inside_of_a_scan_are_those_of_each_iteration():
    def fn(p, x):
        def step(x, layer):
            return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

        return jax.lax.scan(step, x @ p["in"], {n: p[n] for n in ("up", "down")})[0] @ p["out"]

    p = randomise(shapes(**{"in": (3, 6)}, up=(4, 6, 5), down=(4, 5, 6), out=(6, 2)), 0)
    x = uniform(7, 3)
    symmetry = otf.trace_symmetry(fn, p, x)
    assert {(g.name, g.batch, g.size) for g in symmetry.groups} == {
        ("in", (), 6),
        ("up", (4,), 5),
    }
    produced = otf.features(symmetry, fn, p, x)
    consumed = otf.features(symmetry, fn, p, x, at="activation")
    h = x @ p["in"]
    for i in range(4):
        hidden = h @ p["up"][i]
        np.testing.assert_allclose(produced["up"][i], hidden, atol=1e-5)
        np.testing.assert_allclose(consumed["up"][i], jnp.tanh(hidden), atol=1e-5)
        h = h + jnp.tanh(hidden) @ p["down"][i]


def test_soft_plans_of_what_is_nested_need_no_soft_plans_of_heads():
    a, b = randomise(HEADS, 0), randomise(HEADS, 1)
    symmetry = otf.trace_symmetry(heads, a, uniform(5, 4))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = otf.align(
            symmetry,
            a,
            b,
            method=otf.ForwardPass(),
            solver=otf.Sinkhorn(),
            metric=costs.Euclidean(),
        )
    forms = [(plan.shape, plan.dtype) for plan in found.plans.values()]
    assert forms == [((2,), jnp.int32), ((2, 3, 3), jnp.float32), ((2, 3, 3), jnp.float32)]
    moved = otf.transport(symmetry, found, a)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, a)


def ensemble_of(seed: int) -> dict[str, jax.Array]:
    """Four networks of two hidden layers each: the units of both are nested in the networks."""
    return normals({"a": (4, 6, 12), "b": (4, 12, 12), "c": (4, 12, 3)}, seed)


def ensemble_output(p, x):
    def one(q):
        return jax.nn.relu(jax.nn.relu(x @ q["a"]) @ q["b"]) @ q["c"]

    return jax.vmap(one)(p).mean(0)


@pytest.mark.parametrize("start", ["identity", "forward"])
def test_two_groups_in_one_that_share_a_leaf_descend_to_a_planted_permutation(start: str):
    params = ensemble_of(0)
    symmetry = otf.trace_symmetry(ensemble_output, params, jnp.ones((1, 6)))
    assert {g.name: (*g.batch, g.size) for g in symmetry.groups} == {
        "a": (4,),
        "a#2": (4, 12),
        "b": (4, 12),
    }
    # From the identity a descent ends in a local minimum more often than not, but not here.
    planted = otf.transport(symmetry, symmetry.random(jax.random.key(0)), params)
    method = otf.CoordinateDescent(starts=(start,))
    found = otf.align(symmetry, planted, params, method=method)
    assert bool(found.converged)
    assert float(found.objective) < 1e-6
    close(otf.transport(symmetry, found, planted), params)


@pytest.mark.parametrize("key", [10, 20])
def test_two_groups_in_one_that_share_a_leaf_never_climb(key: int):
    """Each family's solve accounts for what the other hidden layer is carried along to."""
    params, other = ensemble_of(0), ensemble_of(key)
    symmetry = otf.trace_symmetry(ensemble_output, params, jnp.ones((1, 6)))
    method = otf.CoordinateDescent(starts=("identity",))
    found = otf.align(symmetry, other, params, method=method)
    history = np.asarray(found.history)
    history = history[np.isfinite(history)]
    assert np.all(np.diff(history) <= 1e-5 * history[0])
    assert history[-1] < history[0]
    assert bool(found.converged)
    moved = otf.transport(symmetry, found, other)
    distance = sum(float(jnp.sum((moved[k] - params[k]) ** 2)) for k in params)
    assert distance == pytest.approx(float(found.objective), rel=1e-5)
