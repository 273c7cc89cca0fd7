"""Checks the canonical form, and how parameters in it are rotated: by hand, in chains and back."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, normals, stack, unstack
from jax import lax

import otfusion_jax as otf
from otfusion_jax.symmetry.correspondence import match_groups
from otfusion_jax.symmetry.rotation import random_rotation

D, ROWS, HEADS, K, HIDDEN = 6, 5, 2, 4, 8

SHAPES = {
    "embed": (3, D),
    "scale": (D,),
    "bias": (D,),
    "q": (D, HEADS, K),
    "k": (D, HEADS, K),
    "v": (D, HEADS, K),
    "out": (HEADS, K, D),
    "scale_2": (D,),
    "bias_2": (D,),
    "up": (D, HIDDEN),
    "down": (HIDDEN, D),
    "last_scale": (D,),
    "read": (D, 4),
}
SCALES = ("scale", "scale_2", "last_scale")
ROTATING = ("embed", "q#2", "v")


def layer_norm(h):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + jnp.asarray(1e-6, h.dtype))


def transformer(p, x):
    """A block of attention and one of a hidden layer, each after a LayerNorm."""
    h = x @ p["embed"]
    normed = layer_norm(h) * p["scale"][None] + p["bias"][None]
    q, k, v = (jnp.einsum("td,dhk->thk", normed, p[name]) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k) / 8)
    h = h + jnp.einsum("hts,shk,hkd->td", weights, v, p["out"])
    normed = layer_norm(h) * p["scale_2"][None] + p["bias_2"][None]
    h = h + jnp.tanh(normed @ p["up"]) @ p["down"]
    return (layer_norm(h) * p["last_scale"][None]) @ p["read"]


def random_net(seed=0, shapes=SHAPES):
    """Scales of both signs, none of them near 0."""
    params = normals(shapes, seed)
    for name in SCALES:
        params[name] = params[name] + jnp.sign(params[name])
    return params


X = normals({"x": (ROWS, 3)}, seed=9)["x"]


@functools.cache
def symmetry():
    return otf.trace_symmetry(transformer, random_net(), X)


def rotating():
    return symmetry().with_rotations()


def canonical_net(seed=0):
    return otf.canonicalize(symmetry(), random_net(seed))


def rotations(seed):
    return rotating().random(jax.random.key(seed))


def permutations(seed):
    return symmetry().random(jax.random.key(seed))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), a, b)


def assert_same_function(a, b, atol=2e-4):
    np.testing.assert_allclose(transformer(a, X), transformer(b, X), rtol=0, atol=atol)


# --- canonical form


def centred(leaf, axis=0):
    return leaf - jnp.mean(leaf, axis, keepdims=True)


@pytest.mark.compatibility
def test_scales_go_into_the_weights_that_read_them():
    net = random_net()
    moved = otf.canonicalize(symmetry(), net)
    assert_same_function(moved, net)
    expected = dict(net)
    for name in SCALES:
        expected[name] = jnp.ones(D)
    for name in ("q", "k", "v"):
        expected[name] = net[name] * net["scale"][:, None, None]
    expected["bias"] = net["bias"] / net["scale"]
    expected["up"] = net["up"] * net["scale_2"][:, None]
    expected["bias_2"] = net["bias_2"] / net["scale_2"]
    # No norm reads the mean of what is written, and what the last one returns has a mean of 0.
    for name in ("embed", "out", "down"):
        expected[name] = centred(net[name], -1)
    expected["read"] = centred(net["read"] * net["last_scale"][:, None])
    assert_close(moved, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_second_time_changes_no_bit(dtype: str):
    net = jax.tree.map(lambda leaf: leaf.astype(dtype), random_net())
    once = otf.canonicalize(symmetry(), net)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(once))
    assert_equal(otf.canonicalize(symmetry(), once), once)
    assert_equal(otf.canonicalize(rotating(), once), once)


def test_it_is_a_transform_of_pytrees():
    nets = [random_net(seed) for seed in (1, 2)]
    canonicalize = functools.partial(otf.canonicalize, symmetry())
    one_by_one = list(map(canonicalize, nets))
    assert_close(jax.jit(canonicalize)(nets[0]), one_by_one[0], atol=1e-6)
    batched = jax.vmap(canonicalize)(stack(nets))
    for number, expected in enumerate(one_by_one):
        assert_close(unstack(batched, number), expected, atol=1e-6)
    assert_equal(canonicalize(jax.tree.map(np.asarray, nets[0])), one_by_one[0])


def test_without_scales_there_is_nothing_to_do():
    params = {name: leaf for name, leaf in random_net().items() if name in ("embed", "read")}
    plain = otf.trace_symmetry(lambda p, x: x @ p["embed"] @ p["read"], params, X)
    assert_equal(otf.canonicalize(plain, params), params)


# --- scales of 0


def test_a_scale_of_0_takes_its_weights_with_it():
    net = random_net()
    net["last_scale"] = net["last_scale"].at[2].set(0)
    moved = otf.canonicalize(symmetry(), net)
    # Nothing but the mean of the others, which is not read, is taken off what the scale makes 0.
    read = net["read"] * net["last_scale"][:, None]
    np.testing.assert_allclose(moved["read"], centred(read), rtol=0, atol=1e-6)
    assert_same_function(moved, net)
    assert otf.check_symmetry(rotating(), transformer, net, X) < 1e-4


def test_what_is_added_to_a_scale_of_0_is_in_the_way():
    net = random_net()
    net["scale"] = net["scale"].at[2].set(0)
    with pytest.raises(ValueError, match=r"scale is 0 at units \[2\], and bias is added to them"):
        otf.canonicalize(symmetry(), net)
    # Other units do not matter.
    net["bias"] = net["bias"].at[2].set(0)
    moved = otf.canonicalize(symmetry(), net)
    assert_same_function(moved, net)


@pytest.mark.parametrize(("dtype", "scale", "bias"), [("float32", 1e-39, 1), ("float16", 6e-6, 3)])
def test_a_scale_next_to_0_is_in_the_way_as_well(dtype: str, scale: float, bias: float):
    net = random_net()
    net["scale"] = net["scale"].at[2].set(scale)
    net["bias"] = net["bias"].at[2].set(bias)
    net = jax.tree.map(lambda leaf: leaf.astype(dtype), net)
    with pytest.raises(ValueError, match=r"scale is .*e-.* at units \[2\], and bias is added"):
        otf.canonicalize(symmetry(), net)


def test_of_stacked_layers_the_message_names_the_layer():
    def stacked(p, x):
        def layer(h, w):
            return h + jnp.tanh((layer_norm(h) * w["scale"][None] + w["bias"][None]) @ w["up"]) @ (
                w["down"]
            ), None

        return lax.scan(layer, x @ p["embed"], p["layers"])[0] @ p["read"]

    layers = normals({"scale": (3, D), "bias": (3, D), "up": (3, D, 8), "down": (3, 8, D)}, 1)
    net = normals({"embed": (3, D), "read": (D, 4)}, 2) | {"layers": layers}
    traced = otf.trace_symmetry(stacked, net, X)
    layers["scale"] = layers["scale"].at[1, 2].set(0)
    message = r"layers/scale is 0 at \[layer, unit\] \[\[1, 2\]\], and layers/bias is added"
    with pytest.raises(ValueError, match=message):
        otf.canonicalize(traced, net)


def test_where_that_is_not_known_the_model_is_none():
    net = random_net()
    net["scale"] = net["scale"].at[2].set(0)
    moved = jax.jit(functools.partial(otf.canonicalize, symmetry()))(net)
    # Better no model at all than another one.
    assert np.isinf(moved["bias"][2])
    assert np.isfinite(np.delete(moved["bias"], 2)).all()


# --- transport


@pytest.mark.compatibility
def test_rotations_multiply_every_axis():
    net, plans = canonical_net(), rotations(1)
    moved = otf.transport(rotating(), plans, net)
    assert_same_function(moved, net)
    stream, heads, keys, values, hidden = (
        np.asarray(plans[name]) for name in ("embed", "q", "q#2", "v", "up")
    )
    product = functools.partial(np.einsum, optimize=True)
    expected = {name: np.asarray(leaf) for name, leaf in net.items()}
    for name in ("bias", "bias_2"):
        expected[name] = expected[name] @ stream
    expected["embed"] = expected["embed"] @ stream
    expected["read"] = stream.T @ expected["read"]
    expected["up"] = (stream.T @ expected["up"])[:, hidden]
    expected["down"] = (expected["down"] @ stream)[hidden]
    for name, inner in (("q", keys), ("k", keys), ("v", values)):
        expected[name] = product("dhk,de,hkj->ehj", expected[name][:, heads], stream, inner)
    expected["out"] = product("hkd,de,hkj->hje", expected["out"][heads], stream, values)
    assert_close(moved, jax.tree.map(array, expected))


def test_permutations_move_what_rotates_as_well():
    net, plans = canonical_net(), permutations(2)
    assert_equal(otf.transport(rotating(), plans, net), otf.transport(symmetry(), plans, net))


def test_transport_is_a_transform_of_pytrees():
    nets = [canonical_net(seed) for seed in (1, 2)]
    plans = rotations(3)
    move = functools.partial(otf.transport, rotating())
    one_by_one = [move(plans, net) for net in nets]
    assert_close(jax.jit(move)(plans, nets[0]), one_by_one[0])
    batched = jax.vmap(functools.partial(move, plans))(stack(nets))
    for number, expected in enumerate(one_by_one):
        assert_close(unstack(batched, number), expected)


def test_half_precision_is_kept():
    def halved(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    net, plans = canonical_net(), rotations(3)
    moved = otf.transport(rotating(), plans, halved(net))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(moved))
    expected = otf.transport(rotating(), plans, net)
    for name, leaf in moved.items():
        error = np.max(np.abs(np.asarray(leaf, np.float32) - expected[name]))
        assert error < 0.05 * np.max(np.abs(expected[name]))


def test_heads_whose_units_rotate_move_by_masses_as_well():
    net, plans = canonical_net(), rotations(4)
    heads = jnp.array([1, 0], jnp.int32)
    permuted = otf.transport(rotating(), plans | {"q": heads}, net)
    assert_same_function(permuted, net)
    soft = plans | {"q": jnp.eye(HEADS)[:, heads] / HEADS}
    for name in ("q#2", "v"):
        # One rotation for each pair of an old and a new head.
        soft[name] = jnp.stack([plans[name]] * HEADS)
    moved = otf.transport(rotating(), soft, net)
    for name, leaf in moved.items():
        np.testing.assert_allclose(leaf, permuted[name], atol=1e-5)


# --- what does not fit


def test_models_that_are_not_canonical_are_refused():
    net = random_net()
    with pytest.raises(ValueError, match="the model is not in canonical form") as caught:
        otf.transport(rotating(), rotations(0), net)
    for name in SCALES:
        distance = float(jnp.max(jnp.abs(net[name] - 1)))
        assert f"{name}: up to {distance:.3g} from 1" in str(caught.value)
    # Without rotations any form will do.
    otf.transport(symmetry(), permutations(0), net)


NOT_ROTATIONS = {
    "of another size": (np.eye(D - 1), "shape (5, 5), expected (6, 6) for a rotation or int (6,)"),
    "not orthogonal": (2 * np.eye(D), "a matrix that is not orthogonal"),
    "masses": (np.full((D, D), 1 / D), "a matrix that is not orthogonal"),
    "not finite": (np.eye(D) * np.nan, "a matrix that is not finite"),
    "about another axis": (-np.eye(D), "a rotation that moves the vector of ones"),
    "complex": (np.eye(D) * (1 + 0j), "a rotation is floating-point"),
    "integers": (np.eye(D, dtype=np.int32), "expected int (6,)"),
}


@pytest.mark.parametrize("name", NOT_ROTATIONS)
def test_plans_that_are_no_rotations_are_refused(name: str):
    plan, problem = NOT_ROTATIONS[name]
    with pytest.raises(ValueError, match="these plans do not fit the symmetry") as caught:
        otf.transport(rotating(), {"embed": array(plan, plan.dtype)}, canonical_net())
    assert problem in str(caught.value)


def test_rotations_are_no_plans_where_units_are_permuted():
    with pytest.raises(ValueError, match="embed: masses that are negative"):
        otf.transport(symmetry(), rotations(0), canonical_net())


def test_the_state_of_an_optimizer_is_not_rotated():
    with pytest.raises(ValueError, match=r"can't be rotated.*`optimizer.init`"):
        otf.transport_state(rotating(), rotations(0), {"momentum": canonical_net()})


# --- chains

KINDS = {"rotations": rotations, "permutations": permutations}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_chains_move_as_one_after_the_other(first: str, second: str):
    net = canonical_net()
    a, b, c = KINDS[first](5), KINDS[second](6), rotations(7)
    compose = functools.partial(otf.compose, rotating())
    move = functools.partial(otf.transport, rotating())
    assert_close(move(compose(a, b), net), move(b, move(a, net)))
    assert_close(move(compose(compose(a, b), c), net), move(compose(a, compose(b, c)), net))


@pytest.mark.parametrize("kind", KINDS)
def test_inverses_lead_back(kind: str):
    net, plans = canonical_net(), KINDS[kind](8)
    inverse = otf.invert(rotating(), plans)
    moved = otf.transport(rotating(), plans, net)
    assert_close(otf.transport(rotating(), inverse, moved), net)
    stays = otf.compose(rotating(), plans, inverse)
    assert_close(otf.transport(rotating(), stays, net), net)


def test_the_inverse_of_a_chain_is_the_chain_of_inverses():
    compose, invert = (functools.partial(f, rotating()) for f in (otf.compose, otf.invert))
    a, b, net = rotations(9), permutations(10), canonical_net()
    back = otf.transport(rotating(), invert(compose(a, b)), net)
    assert_close(otf.transport(rotating(), compose(invert(b), invert(a)), net), back)


# --- symmetries with rotations


def test_symmetries_are_static_values():
    again = pickle.loads(pickle.dumps(rotating()))
    assert again == rotating()
    assert hash(again) == hash(rotating())
    assert again != symmetry()
    assert [group.name for group in again.groups if group.rotates] == list(ROTATING)


@pytest.mark.parametrize("kept", [("embed",), ("q#2", "v"), ("q", "up"), ()])
def test_groups_that_are_left_out_are_not_folded_either(kept: tuple[str, ...]):
    net = random_net()
    for before in (symmetry(), rotating()):
        chosen = before.only(kept.__contains__).with_rotations()
        assert tuple(group.name for group in chosen.groups) == kept
        assert otf.check_symmetry(chosen, transformer, net, X) < 1e-4
        in_place = otf.canonicalize(chosen, net)
        assert_same_function(in_place, net)
        assert_same_function(otf.transport(chosen, chosen.random(jax.random.key(0)), in_place), net)


def of_width(**sizes: int) -> otf.Symmetry:
    shapes = {}
    for name, shape in SHAPES.items():
        shapes[name] = tuple(sizes["stream"] if size == D else size for size in shape)
        if "hidden" in sizes:
            shapes[name] = tuple(
                sizes["hidden"] if size == HIDDEN else size for size in shapes[name]
            )
    return otf.trace_symmetry(transformer, random_net(0, shapes), X).with_rotations()


def test_what_is_permuted_and_what_is_rotated_may_differ_in_width():
    wide = of_width(stream=D, hidden=HIDDEN + 1)
    plan = jnp.full((HIDDEN, HIDDEN + 1), 1 / (HIDDEN * (HIDDEN + 1)))
    moved = otf.transport(rotating(), rotations(0) | {"up": plan}, canonical_net(), onto=wide)
    assert moved["up"].shape == (D, HIDDEN + 1)
    assert match_groups(rotating(), of_width(stream=D + 1))["embed"].size == D + 1
    with pytest.raises(ValueError, match="v: its units are rotated in one of the two and permuted"):
        match_groups(rotating(), symmetry())


def test_matched_groups_keep_their_freedoms():
    names = {freedom.group for freedom in of_width(stream=D + 1).freedoms}
    wide = of_width(stream=D, hidden=HIDDEN + 1)
    matched = match_groups(rotating(), wide)
    assert {freedom.group for freedom in matched.freedoms} == names == set(matched)


@pytest.mark.parametrize("fixes_ones", [False, True])
def test_random_rotations_are_orthogonal(fixes_ones: bool):
    matrices = random_rotation(jax.random.key(0), 5, (2, 3), fixes_ones=fixes_ones)
    assert matrices.shape == (2, 3, 5, 5)
    products = np.einsum("abij,abkj->abik", matrices, matrices)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(5), products.shape), atol=1e-5)
    moved_by = np.abs(np.sum(matrices, -1) - 1).max((-2, -1))
    assert (moved_by < 1e-5).all() == fixes_ones
    # No two are alike.
    assert len(np.unique(np.round(matrices[..., 0, 0], 4))) == 6
