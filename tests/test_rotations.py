"""Alignment over rotations: planted elements come back, and one group is SciPy's Procrustes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from arrays import normal, normals
from jax import export
from numpy.testing import assert_allclose, assert_array_equal

import otfusion_jax as otf
from otfusion_jax.symmetry.balancing import randomly_scaled
from otfusion_jax.symmetry.groups import Motion
from otfusion_jax.symmetry.unread_means import with_random_means

HEADS = 2
WIDTH = 6
DEPTH = 4
TOKENS = np.random.default_rng(0).integers(0, 9, (3, 5))
any_otf: Any = otf  # for calls that a type checker would refuse

# --- three transformers of four blocks


def relaxed(fn):
    """Lets a network broadcast, which the suite forbids the library."""

    @functools.wraps(fn)
    def run(*args):
        with jax.numpy_rank_promotion("allow"):
            return fn(*args)

    return run


def layer_norm(x, scale, bias=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale + bias


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale


def turned(x):
    """Rotary positions, on the pairs of a head's dimensions."""
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * jnp.array([1.0, 0.3])
    cosine, sine = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    x, y = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x * cosine - y * sine, x * sine + y * cosine], axis=-1)


def attention(p, x, turn=lambda x: x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", turn(q), turn(k)) / 2)
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])


def sub(params, prefix):
    """The parameters of a part of the network, without its name in front."""
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


@relaxed
def vit(params, images):
    x = images @ params["patches"] + params["positions"]
    for number in range(DEPTH):
        p = sub(params, f"{number}/")
        x = x + attention(p, layer_norm(x, p["scale1"], p["bias1"]))
        hidden = layer_norm(x, p["scale2"], p["bias2"]) @ p["up"] + p["up_bias"]
        x = x + jax.nn.gelu(hidden) @ p["down"]
    return layer_norm(x, params["scale"], params["bias"])[:, 0] @ params["head"]


@relaxed
def llama(params, tokens):
    x = params["embedding"][tokens]
    for number in range(DEPTH):
        p = sub(params, f"{number}/")
        x = x + attention(p, rms_norm(x, p["scale1"]), turned)
        y = rms_norm(x, p["scale2"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    return rms_norm(x, params["scale"]) @ params["head"]


@relaxed
def gpt(params, tokens):
    x = params["embedding"][tokens] + params["positions"]
    for number in range(DEPTH):
        p = sub(params, f"{number}/")
        x = x + attention(p, layer_norm(x, p["scale1"]))
        x = x + jax.nn.gelu(layer_norm(x, p["scale2"]) @ p["up"]) @ p["down"]
    return layer_norm(x, params["scale"]) @ params["head"]


BLOCK: dict[str, tuple[int, ...]] = dict.fromkeys("qkv", (WIDTH, HEADS, 4))
BLOCK |= {"o": (HEADS, 4, WIDTH), "up": (WIDTH, 8), "down": (8, WIDTH)}
BLOCK |= {"scale1": (WIDTH,), "scale2": (WIDTH,)}
ENDS = {"scale": (WIDTH,), "head": (WIDTH, 9)}
TEXT = {"embedding": (9, WIDTH), **ENDS}
NETWORKS = {
    "vit": (
        vit,
        {"patches": (7, WIDTH), "positions": (5, WIDTH), "bias": (WIDTH,), **ENDS},
        {**BLOCK, "bias1": (WIDTH,), "bias2": (WIDTH,), "up_bias": (8,)},
        normal(3, 5, 7),
    ),
    "llama": (llama, TEXT, {**BLOCK, "gate": (WIDTH, 8)}, TOKENS),
    "gpt": (gpt, {**TEXT, "positions": (5, WIDTH)}, BLOCK, TOKENS),
}


@functools.cache
def network(name):
    """A function, its symmetry with rotations, random parameters, and inputs."""
    fn, ends, block, inputs = NETWORKS[name]
    shapes = dict(ends)
    for number in range(DEPTH):
        shapes |= {f"{number}/{key}": shape for key, shape in block.items()}
    params = normals(shapes, seed=1)
    params = {k: v * 0.3 + 1 if "scale" in k else v * 0.5 for k, v in params.items()}
    symmetry = otf.trace_symmetry(fn, params, inputs).with_rotations()
    return fn, symmetry, params, inputs


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(jnp.sum((x - y) ** 2)) for x, y in pairs)


def planted(name, seed):
    """A network in canonical form, and the same one after a random element of its group."""
    _, symmetry, params, _ = network(name)
    canonical = otf.canonicalize(symmetry, params)
    plans = symmetry.random(jax.random.key(seed))
    return canonical, otf.transport(symmetry, plans, canonical), plans


@pytest.mark.compatibility
@pytest.mark.parametrize("name", NETWORKS)
def test_planted_elements_come_back_20_times_of_20(name):
    _, symmetry, _, _ = network(name)
    assert {group.rotates for group in symmetry.groups} == {True, False}
    for seed in range(20):
        a, b, plans = planted(name, seed)
        found = otf.align(symmetry, a, b)
        assert found.converged
        assert distance(otf.transport(symmetry, found, a), b) < 1e-10 * distance(a, b)
        assert_allclose(found.objective, 0, atol=1e-10 * distance(a, b))
        for group in symmetry.groups:
            if not group.rotates:
                assert_array_equal(found.plans[group.name], plans[group.name])


def planted_of_full_group(name, seed):
    """A network in canonical form, and one after all that keeps its function at once."""
    _, symmetry, params, _ = network(name)
    free = symmetry.with_signs().with_scales()
    plans = free.random(jax.random.key(seed))
    moved = otf.transport(free, plans, otf.canonicalize(symmetry, params))
    moved = with_random_means(free, moved, jax.random.key(200 + seed))
    scaled = randomly_scaled(free, moved, jax.random.key(100 + seed))
    return free, otf.canonicalize(free, params), otf.canonicalize(free, scaled), plans


@pytest.mark.compatibility
@pytest.mark.parametrize("name", NETWORKS)
def test_elements_of_the_full_group_come_back_20_times_of_20(name):
    fn, _, params, inputs = network(name)
    for seed in range(20):
        free, a, b, plans = planted_of_full_group(name, seed)
        if not seed:
            motions = {group.motion for group in free.groups}
            assert (Motion.SIGNED in motions) == (name == "llama")
            assert any(group.rotates and group.scaled for group in free.groups)
            assert otf.check_symmetry(free, fn, params, inputs) < 1e-4
        found = otf.align(free, a, b)
        assert distance(otf.transport(free, found, a), b) < 1e-9 * distance(a, b)
        for group in free.groups:
            if not group.rotates:
                assert_array_equal(found.plans[group.name], plans[group.name])


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
@pytest.mark.parametrize("name", NETWORKS)
def test_noise_moves_elements_of_the_full_group_by_as_much(name, noise):
    for seed in range(3):
        free, a, b, plans = planted_of_full_group(name, seed)
        drawn = normals({k: v.shape for k, v in b.items()}, seed=seed)
        noisy = {k: v if "scale" in k else v + noise * drawn[k] for k, v in b.items()}
        found = otf.align(free, a, otf.canonicalize(free, noisy))
        size = sum(v.size for v in b.values())
        assert distance(otf.transport(free, found, a), b) < 20 * noise**2 * size
        for group in free.groups:
            if not group.rotates:
                assert_array_equal(found.plans[group.name], plans[group.name])


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
@pytest.mark.parametrize("name", NETWORKS)
def test_noise_moves_what_is_found_by_as_much(name, noise):
    _, symmetry, _, _ = network(name)
    for seed in range(3):
        a, b, plans = planted(name, seed)
        drawn = normals({k: v.shape for k, v in b.items()}, seed=seed)
        noisy = {k: v if "scale" in k else v + noise * drawn[k] for k, v in b.items()}
        found = otf.align(symmetry, a, noisy)
        size = sum(v.size for v in b.values())
        assert distance(otf.transport(symmetry, found, a), b) < 2 * noise**2 * size
        for group in symmetry.groups:
            if group.rotates:
                assert_allclose(found.plans[group.name], plans[group.name], atol=20 * noise)
            else:
                assert_array_equal(found.plans[group.name], plans[group.name])


def embedded(params, x):
    """A linear layer of few inputs, whose units rotate, and a hidden layer, whose units do not."""
    return jax.nn.relu(x @ params["in"] @ params["hidden"]) @ params["out"]


def embedded_and_normed(params, x):
    h = layer_norm(x @ params["in"], 1.0)
    return jax.nn.relu(h @ params["hidden"]) @ params["out"]


@pytest.mark.compatibility
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("fn", [embedded, embedded_and_normed])
@pytest.mark.parametrize(("inputs", "hidden"), [(2, 12), (6, 8), (6, 40)])
def test_units_behind_a_rotation_that_few_inputs_tell_come_back(fn, inputs, hidden, traced):
    shapes = {"in": (inputs, 16), "hidden": (16, hidden), "out": (hidden, 4)}
    fn = relaxed(fn)
    symmetry = otf.trace_symmetry(fn, normals(shapes, seed=0), normal(3, inputs)).with_rotations()
    assert {group.motion for group in symmetry.groups} == {
        Motion.ROTATED_ABOUT_ONES if "normed" in fn.__name__ else Motion.ROTATED,
        Motion.PERMUTED,
    }
    align = functools.partial(otf.align, symmetry)
    for seed in range(4):
        a = otf.canonicalize(symmetry, normals(shapes, seed=10 + seed))
        plans = symmetry.random(jax.random.key(seed))
        b = otf.transport(symmetry, plans, a)
        drawn = normals(shapes, seed=20 + seed)
        noisy = otf.canonicalize(symmetry, {k: b[k] + 1e-3 * drawn[k] for k in b})
        for target, error in ((b, 1e-10), (noisy, 1e-5)):
            found = (jax.jit(align) if traced else align)(a, target)
            assert distance(otf.transport(symmetry, found, a), target) < error * distance(a, b)
            assert_array_equal(found.plans["hidden"], plans["hidden"])


def test_one_group_is_procrustes_of_scipy():
    def bottleneck(params, x):
        return x @ params["down"] @ params["up"]

    shapes = {"down": (9, 5), "up": (5, 8)}
    a, b = normals(shapes, seed=2), normals(shapes, seed=3)
    symmetry = otf.trace_symmetry(bottleneck, a, normal(2, 9)).with_rotations()
    found = otf.align(symmetry, a, b, method=otf.CoordinateDescent(starts=("identity",)))
    units = [np.concatenate([p["down"], p["up"].T]) for p in (a, b)]
    rotation, _ = scipy.linalg.orthogonal_procrustes(units[0], units[1])
    assert_allclose(found.plans["down"], rotation, atol=1e-5)
    assert_allclose(found.objective, np.sum((units[0] @ rotation - units[1]) ** 2), rtol=1e-5)
    assert found.gaps["down"] < 1e-5
    # Permutations are orthogonal, too.
    permuted = otf.align(otf.trace_symmetry(bottleneck, a, normal(2, 9)), a, b)
    assert found.objective < 0.9 * permuted.objective


@pytest.mark.parametrize("by_sensitivity", [False, True], ids=["all alike", "by sensitivity"])
def test_features_start_where_weights_do(by_sensitivity: bool):
    fn, symmetry, _, inputs = network("vit")
    a, b, _ = planted("vit", 5)
    many = normal(64, 5, 7, seed=4)
    grams = otf.feature_gram(
        symmetry, fn, a, b, [many], at="activation", center=True, by_sensitivity=by_sensitivity
    )
    found = otf.align(symmetry, a, b, method=otf.ForwardPass(), grams=grams)
    moved = otf.transport(symmetry, found, a)
    assert distance(moved, b) < 1e-6 * distance(a, b)
    assert_allclose(fn(moved, inputs), fn(a, inputs), atol=1e-4)


def test_traced_and_known_values_give_the_same():
    _, symmetry, _, _ = network("gpt")
    a, b, _ = planted("gpt", 3)
    drawn = normals({k: v.shape for k, v in b.items()}, seed=3)
    b = {k: v if "scale" in k else v + 0.2 * drawn[k] for k, v in b.items()}
    known = otf.align(symmetry, a, b)
    traced = jax.jit(functools.partial(otf.align, symmetry))(a, b)
    assert_allclose(known.objective, traced.objective, rtol=1e-4)
    assert distance(known.plans, traced.plans) < 1e-4


def test_lowers_for_accelerators_without_callbacks_or_doubles():
    _, symmetry, _, _ = network("gpt")
    a, b, _ = planted("gpt", 0)
    fuse = jax.jit(lambda a, b: otf.fuse(symmetry, [a, b]))
    text = export.export(fuse, platforms=("cuda", "tpu"))(a, b).mlir_module()
    assert "custom_call @xla" not in text
    assert "f64" not in text


def test_fuse_brings_models_into_canonical_form():
    fn, symmetry, params, inputs = network("llama")
    _, b, _ = planted("llama", 1)
    fused = otf.fuse(symmetry, [params, b])
    assert_allclose(fn(fused, inputs), fn(params, inputs), atol=1e-4)
    stacked = otf.fuse(symmetry, otf.stack([params, b]))
    assert distance(fused, stacked) < 1e-8


def test_barycenter_of_rotated_models_is_one_of_them():
    fn, symmetry, params, inputs = network("gpt")
    models = [params, planted("gpt", 1)[1], planted("gpt", 2)[1]]
    found = otf.barycenter(symmetry, models, max_rounds=2)
    assert_allclose(found.history[-1], 0, atol=1e-6)
    assert_allclose(fn(found.params, inputs), fn(params, inputs), atol=1e-3)
    plans = {name: plan[0] for name, plan in found.plans.items()}
    moved = otf.transport(symmetry, plans, otf.canonicalize(symmetry, params))
    assert distance(moved, found.params) < 1e-6


def test_models_have_to_be_in_canonical_form():
    _, symmetry, params, _ = network("gpt")
    a, _, _ = planted("gpt", 0)
    message = r"the target is not in canonical form.*\n  0/scale1: up to 0\.\d+ from 1"
    with pytest.raises(ValueError, match=message):
        otf.align(symmetry, a, params)


def learned_from(name, seed, steps=150):
    """A planted element, learned by the loss of the average from where nothing is turned."""
    fn, symmetry, _, _ = network(name)
    a, b, plans = planted(name, seed)
    # Heads and hidden units are where they belong; what rotates has to be learned.
    start = {key: plan for key, plan in plans.items() if not symmetry[key].rotates}

    def loss(params, batch):
        return jnp.mean((fn(params, batch) - fn(b, batch)) ** 2)

    batches = np.random.default_rng(2).integers(0, 9, (steps, 8, 5))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2, steps))
    found = otf.learn_alignment(
        symmetry, loss, a, b, batches, start=start, solver=None, optimizer=optimizer
    )
    return symmetry, a, b, start, found


def test_rotations_are_learned_from_a_loss():
    symmetry, a, b, start, found = learned_from("gpt", 0)
    assert found.history[-1] < 0.25 * found.history[0]
    for group in symmetry.groups:
        plan = found.plans[group.name]
        if group.rotates:
            products = plan @ jnp.swapaxes(plan, -1, -2)
            assert_allclose(products, np.broadcast_to(np.eye(group.size), plan.shape), atol=1e-5)
            if group.fixes_ones:
                assert_allclose(plan.sum(-1), 1, atol=1e-5)
        else:
            assert_array_equal(plan, start[group.name])
    # The plans are those of the last loss: `transport` takes them.
    assert distance(otf.transport(symmetry, found, a), b) < distance(a, b)


def test_soft_permutations_are_learned_beside_rotations():
    fn, symmetry, _, _ = network("gpt")
    a, b, _ = planted("gpt", 1)

    def loss(params, batch):
        return jnp.mean((fn(params, batch) - fn(b, batch)) ** 2)

    found = otf.learn_alignment(symmetry, loss, a, b, TOKENS[None])
    # The start is the planted element; what is left is that plans of hidden units are soft.
    assert found.history[0] < 0.1 * loss(otf.average([a, b]), TOKENS)
    assert found.soft["0/up"].shape == (8, 8)
    assert found.plans["0/up"].shape == (8,)


def test_rotations_alone_need_some():
    fn, symmetry, params, inputs = network("gpt")
    permuted = otf.trace_symmetry(fn, params, inputs)

    def vanishing(params, batch):
        return jnp.zeros(())

    with pytest.raises(ValueError, match=r"the symmetry has none; pass a Sinkhorn\(\), or"):
        otf.learn_alignment(permuted, vanishing, params, params, TOKENS[None], solver=None)


def test_masses_and_optimizers_know_no_rotations():
    _, symmetry, _, _ = network("gpt")
    a, b, plans = planted("gpt", 0)
    masses = {"embedding": jnp.full(WIDTH, 1 / WIDTH)}
    with pytest.raises(ValueError, match="embedding, of the source: its units are rotated"):
        otf.align(symmetry, a, b, marginals=(masses, {}), method=otf.ForwardPass())
    with pytest.raises(ValueError, match="the state of an optimizer can't be rotated"):
        otf.transport_state(symmetry, plans, a)


# --- no way to a wrong model without a word


@pytest.mark.parametrize("transform", ["jit", "vmap"])
def test_traced_models_that_are_not_canonical_become_nan(transform):
    fn, symmetry, params, inputs = network("gpt")
    a, b, plans = planted("gpt", 1)
    move = functools.partial(otf.transport, symmetry, plans)

    def moved(model):
        if transform == "jit":
            return jax.jit(move)(model)
        return jax.tree.map(lambda leaf: leaf[0], jax.vmap(move)(otf.stack([model, a])))

    assert distance(moved(a), b) < 1e-8
    assert np.isnan(fn(moved(params), inputs)).all()


def test_features_are_compared_in_canonical_form():
    fn, symmetry, params, inputs = network("gpt")
    a, _, _ = planted("gpt", 1)
    with pytest.raises(ValueError, match="the source is not in canonical form"):
        otf.feature_gram(symmetry, fn, params, a, [inputs], at="activation")
    with pytest.raises(ValueError, match="the target is not in canonical form"):
        otf.feature_gram(symmetry, fn, a, params, [inputs], at="activation")


@pytest.mark.parametrize("method", [otf.RestoreStatistics(), otf.LeastSquares()])
def test_an_original_of_a_rotated_model_repairs_as_the_model_does(method):
    fn, symmetry, _, inputs = network("gpt")
    a, b, _ = planted("gpt", 1)
    drawn = normals({k: v.shape for k, v in b.items()}, seed=3)
    b = {k: v if "scale" in k else v + 0.1 * drawn[k] for k, v in b.items()}
    found = otf.align(symmetry, a, b)
    models = [otf.transport(symmetry, found, a), b]
    originals = [otf.Original(symmetry, fn, a, found), None]
    expected = otf.repair(symmetry, fn, models, inputs, method=method)
    repaired = otf.repair(symmetry, fn, models, inputs, method=method, originals=originals)
    assert_allclose(fn(repaired, inputs), fn(expected, inputs), atol=1e-3)


def test_a_stack_says_which_scale_cannot_be_1():
    _, symmetry, params, _ = network("vit")
    wrong = dict(params)
    wrong["0/scale1"] = params["0/scale1"].at[2].set(0)
    message = r"model 1: 0/scale1 is 0 at units \[2\], and 0/bias1 is added to them"
    for models in ([params, wrong], otf.stack([params, wrong])):
        for combine in (otf.fuse, otf.barycenter):
            with pytest.raises(ValueError, match=message):
                combine(symmetry, models)


def test_double_precision_is_kept_beside_rotations_of_single_precision():
    def bottleneck(params, x):
        return x @ params["down"] @ params["up"]

    with jax.enable_x64(True):
        shapes = {"down": (9, 5), "up": (5, 8)}
        a = {k: jnp.asarray(v, jnp.float64) for k, v in normals(shapes, seed=2).items()}
        x = jnp.ones((2, 9))
        symmetry = otf.trace_symmetry(bottleneck, a, x).with_rotations()
        drawn = symmetry.random(jax.random.key(0))
        found = otf.align(symmetry, a, a)
        assert otf.compose(symmetry, drawn, found)["down"].dtype == jnp.float64

        def loss(params, x):
            return jnp.mean((bottleneck(params, x) - bottleneck(a, x)) ** 2)

        learned = otf.learn_alignment(symmetry, loss, a, a, x[None], start=drawn, solver=None)
        plan = learned.plans["down"]
        assert plan.dtype == jnp.float64
