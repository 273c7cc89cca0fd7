"""Checks rotated units that become another number of units: by what they are multiplied, and why.

A network is expanded by isometries that are made here, in NumPy, and must stay the function that it
is, whatever its norms and its attention divide by. Then it has to be found in the expanded one.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals
from scipy.linalg import block_diag

import otfusion_jax as otf

X = normal(4, 5, 4, seed=9)
NARROW = {"width": 6, "heads": 2, "inside": 3, "hidden": 10}


def layer_norm(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 0.1) * scale


def fast_layer_norm(x, scale):
    mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.maximum(square - mean * mean, 0) + 0.1) * scale


def variance_norm(x, scale):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.1) * scale


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1) * scale


def length_norm(x, scale):
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 0.1) * scale


def unit_norm(x, scale):
    """Without a number that is added: the norm itself does not say what the stream is worth."""
    return x / jnp.sqrt((x * x).sum(-1, keepdims=True)) * scale


def shifted_norm(x, scale):
    return rms_norm(x, 1 + scale)


MEANS = (layer_norm, fast_layer_norm, variance_norm, rms_norm, shifted_norm)
SUMS = (length_norm, unit_norm)


def as_it_is(x, size):
    return x


def by_root(x, size):
    return x / jnp.sqrt(size)


def by_power(x, size):
    return 0.7 * x * size**-0.5


def by_number(x, size):
    return x * float(0.7 / np.sqrt(size))


@jax.numpy_rank_promotion("allow")
def model(params, x, *, norm, before=as_it_is, after=as_it_is):
    """One block of a transformer; the queries are scaled before they meet the keys, or after."""
    x = x @ params["embed"] + params["positions"]
    y = norm(x, params["norm1"])
    query, key, value = (jnp.einsum("btd,dhk->bthk", y, params[name]) for name in "qkv")
    size = query.shape[-1]
    scores = after(jnp.einsum("bthk,bshk->bhts", before(query, size), key), size)
    weights = jax.nn.softmax(scores)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, value, params["o"])
    y = norm(x, params["norm2"])
    hidden = jax.nn.silu(y @ params["gate"]) * (y @ params["up"])
    x = x + hidden @ params["down"]
    return norm(x.mean(1), params["norm"]) @ params["head"]


def network(seed, *, norm, width, heads, inside, hidden, before=as_it_is, after=as_it_is):
    """A function, canonical parameters of it, and its symmetry with rotations."""
    shapes = {"embed": (4, width), "positions": (5, width), "head": (width, 3)}
    shapes |= dict.fromkeys("qkv", (width, heads, inside)) | {"o": (heads, inside, width)}
    shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    params = {name: jnp.asarray(x) / 2 for name, x in normals(shapes, seed).items()}
    for number, name in enumerate(("norm1", "norm2", "norm")):
        ones = 0.0 if norm is shifted_norm else 1.0
        params[name] = ones + 0.1 * normal(width, seed=seed + number)
    fn = functools.partial(model, norm=norm, before=before, after=after)
    symmetry = otf.trace_symmetry(fn, params, X).with_rotations()
    return fn, otf.canonicalize(symmetry, params), symmetry


def isometry(rng, n, m, *, fixes_ones):
    """Orthonormal rows, drawn at random, or for `n > m` columns; the ones go to the ones."""

    def any_isometry(n, m):
        q, _ = np.linalg.qr(rng.normal(size=(max(n, m), max(n, m))))
        return q[:n, :m]

    if not fixes_ones:
        return any_isometry(n, m)
    bases = []
    for size in (n, m):
        ones_first = np.concatenate([np.ones((size, 1)), rng.normal(size=(size, size - 1))], 1)
        basis, _ = np.linalg.qr(ones_first)
        bases.append(basis * np.sign(basis[0, 0]))
    return bases[0] @ block_diag(1, any_isometry(n - 1, m - 1)) @ bases[1].T


def planted(symmetry, onto, seed):
    """Isometries of what rotates, each other unit as often as the widths say, in any order."""
    rng = np.random.default_rng(seed)
    plans = {}
    for group, target in zip(symmetry.groups, onto.groups, strict=True):
        n, m = group.size, target.size
        if group.rotates:
            fixes_ones = group.fixes_ones
            pairs = group.batch
            if group.batch and group.batch != target.batch:
                pairs = (*group.batch, *target.batch)
            plan = np.empty((*pairs, n, m))
            for index in np.ndindex(*pairs):
                plan[index] = isometry(rng, n, m, fixes_ones=fixes_ones)
        elif n == m:
            plans[group.name] = jnp.asarray(rng.permutation(n), jnp.int32)
            continue
        else:
            plan = np.tile(np.eye(n), m // n)[:, rng.permutation(m)] / m
        plans[group.name] = jnp.asarray(plan, jnp.float32)
    return plans


# --- what units are multiplied by


def powers(symmetry, name):
    """The powers for what produces the units and for what consumes them."""
    stretch = symmetry[name].stretch
    assert stretch is not None
    assert stretch.refused is None
    return stretch.produced, stretch.consumed


@pytest.mark.parametrize("norm", [*MEANS, *SUMS])
def test_the_power_is_read_off_what_norms_divide_by(norm):
    _, _, symmetry = network(0, norm=norm, **NARROW)
    # A mean of squares stays as it is, or a sum of squares.
    expected = (0.5, -0.5) if norm in MEANS else (0.0, 0.0)
    assert powers(symmetry, "embed") == expected


@pytest.mark.parametrize(
    ("scale", "expected"),
    [({}, 0), ({"before": by_root}, 0.25), ({"after": by_root}, 0.25), ({"after": by_power}, 0.25)],
)
def test_logits_that_are_divided_by_a_root_make_queries_and_keys_larger(scale, expected):
    _, _, symmetry = network(0, norm=rms_norm, **NARROW, **scale)
    assert powers(symmetry, "q#2") == (expected, expected)
    # Values and what reads them are divided by nothing.
    assert powers(symmetry, "v") == (0, 0)


def test_a_rank_that_divides_makes_both_matrices_larger():
    @jax.numpy_rank_promotion("allow")
    def adapter(params, x, rank):
        return jnp.tanh(x @ params["w"] + (x @ params["a"]) @ params["b"] / rank) @ params["out"]

    found = {}
    for rank in (3, 5):
        shapes = {"w": (4, 7), "a": (4, rank), "b": (rank, 7), "out": (7, 2)}
        params, fn = normals(shapes), functools.partial(adapter, rank=rank)
        symmetry = otf.trace_symmetry(fn, params, X[0]).with_rotations()
        found[rank] = fn, params, symmetry
    (fn, params, symmetry), (wide_fn, _, onto) = found[3], found[5]
    assert powers(symmetry, "a") == (0.5, 0.5)
    plans = planted(symmetry, onto, 0)
    wide = otf.transport(symmetry, plans, params, onto=onto)
    np.testing.assert_allclose(wide_fn(wide, X[0]), fn(params, X[0]), atol=1e-5)


def test_queries_keys_and_values_in_one_kernel_are_told_apart():
    def fused(params, x, heads):
        count, size = x.shape[0], params["qkv"].shape[1] // (3 * heads)
        parts = jnp.split(x @ params["qkv"], 3, axis=1)
        query, key, value = (part.reshape(count, heads, size) for part in parts)
        weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", query, key) / np.float32(size) ** 0.5)
        mixed = jnp.einsum("hts,shk->thk", weights, value)
        return mixed.reshape(count, heads * size) @ params["out"]

    found = []
    for size in (3, 5):
        params = normals({"qkv": (4, 3 * 2 * size), "out": (2 * size, 3)})
        fn = functools.partial(fused, heads=2)
        found.append((params, otf.trace_symmetry(fn, params, X[0]).with_rotations()))
    (params, symmetry), (_, onto) = found
    assert powers(symmetry, "qkv#2") == (0.25, 0.25)
    assert powers(symmetry, "qkv#3") == (0, 0)
    wide = otf.transport(symmetry, planted(symmetry, onto, 1), params, onto=onto)
    np.testing.assert_allclose(fused(wide, X[0], 2), fused(params, X[0], 2), atol=1e-5)


def test_a_mean_over_tokens_is_no_matter_of_widths():
    _, params, symmetry = network(0, norm=layer_norm, **NARROW)
    fn = functools.partial(model, norm=layer_norm)
    # As many tokens as units.
    params |= {"positions": jnp.ones((6, 6))}
    longer = otf.trace_symmetry(fn, params, normal(4, 6, 4)).with_rotations()
    assert powers(longer, "embed") == powers(symmetry, "embed")


# --- networks that are expanded

WIDE = {"width": 9, "heads": 2, "inside": 5, "hidden": 20}


@pytest.mark.parametrize("norm", [*MEANS, *SUMS])
def test_an_expanded_network_stays_the_same_function(norm):
    fn, params, symmetry = network(0, norm=norm, before=by_root, **NARROW)
    wide_fn, _, onto = network(1, norm=norm, before=by_root, **WIDE)
    plans = planted(symmetry, onto, 2)
    wide = otf.transport(symmetry, plans, params, onto=onto)
    np.testing.assert_allclose(wide_fn(wide, X), fn(params, X), atol=2e-5)
    # The plans say it all by themselves, the norms' scales included.
    chex.assert_trees_all_equal(otf.transport(symmetry, plans, params), wide)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_a_planted_network_is_found_in_the_wide_one_and_back(norm):
    fn, params, symmetry = network(3, norm=norm, after=by_power, **NARROW)
    wide_fn, _, onto = network(4, norm=norm, after=by_power, **WIDE)
    wide = otf.transport(symmetry, planted(symmetry, onto, 5), params, onto=onto)
    found = otf.align(symmetry, params, wide, onto=onto)
    moved = otf.transport(symmetry, found, params, onto=onto)
    chex.assert_trees_all_close(moved, wide, atol=1e-5)
    back = otf.align(onto, wide, params, onto=symmetry)
    moved = otf.transport(onto, back, wide, onto=symmetry)
    chex.assert_trees_all_close(moved, params, atol=1e-5)
    fused = otf.fuse([symmetry, onto], [params, wide])
    np.testing.assert_allclose(wide_fn(fused, X), fn(params, X), atol=2e-5)
    narrow = otf.fuse([symmetry, onto], [params, wide], reference=0)
    np.testing.assert_allclose(fn(narrow, X), fn(params, X), atol=2e-5)


def test_heads_of_another_number_and_size_are_found():
    fn, params, symmetry = network(0, norm=layer_norm, before=by_root, **NARROW)
    sizes = {"width": 8, "heads": 4, "inside": 4, "hidden": 10}
    wide_fn, _, onto = network(1, norm=layer_norm, before=by_root, **sizes)
    wide = otf.transport(symmetry, planted(symmetry, onto, 3), params, onto=onto)
    np.testing.assert_allclose(wide_fn(wide, X), fn(params, X), atol=2e-5)
    found = otf.align(symmetry, params, wide, onto=onto)
    moved = otf.transport(symmetry, found, params, onto=onto)
    chex.assert_trees_all_close(moved, wide, atol=1e-5)


def test_three_models_of_three_widths_go_into_one():
    fn, params, symmetry = network(0, norm=rms_norm, **NARROW)
    symmetries, models = [symmetry], [params]
    for width in (8, 9):
        sizes = NARROW | {"width": width}
        other_fn, _, onto = network(1, norm=rms_norm, **sizes)
        plans = planted(symmetry, onto, width)
        symmetries.append(onto)
        models.append(otf.transport(symmetry, plans, params, onto=onto))
    fused = otf.fuse(symmetries, models)
    np.testing.assert_allclose(other_fn(fused, X), fn(params, X), atol=2e-5)


def test_some_groups_rotate_and_the_others_stay():
    _, params, symmetry = network(0, norm=rms_norm, **NARROW)
    wide_fn, _, onto = network(1, norm=rms_norm, **(NARROW | {"width": 8}))
    stream = {"embed": planted(symmetry, onto, 3)["embed"]}
    wide = otf.transport(symmetry, stream, params)
    few, few_onto = (s.only(lambda group: group == "embed") for s in (symmetry, onto))
    found = otf.align(few, params, wide, onto=few_onto)
    np.testing.assert_allclose(found.plans["embed"], stream["embed"], atol=1e-4)
    np.testing.assert_allclose(wide_fn(wide, X), model(params, X, norm=rms_norm), atol=2e-5)


def test_the_same_under_jit():
    _, a, symmetry = network(0, norm=layer_norm, before=by_root, **NARROW)
    _, b, onto = network(1, norm=layer_norm, before=by_root, **WIDE)

    def moved(a):
        alignment = otf.align(symmetry, a, b, onto=onto, method=otf.ForwardPass())
        return otf.transport(symmetry, alignment, a, onto=onto)

    chex.assert_trees_all_close(jax.jit(moved)(a), moved(a), atol=1e-4)


def test_rotations_bring_networks_of_other_widths_closer_than_permutations():
    _, a, symmetry = network(0, norm=layer_norm, **NARROW)
    _, b, onto = network(1, norm=layer_norm, **WIDE)
    for source, target, ends in ((a, b, (symmetry, onto)), (b, a, (onto, symmetry))):
        rotated = otf.align(ends[0], source, target, onto=ends[1])
        assert rotated.objective <= rotated.history[0]
        fn = functools.partial(model, norm=layer_norm)
        plain, plain_onto = (otf.trace_symmetry(fn, params, X) for params in (source, target))
        permuted = otf.align(plain, source, target, onto=plain_onto)
        assert rotated.objective < permuted.objective


# --- what is refused


def both_norms(x, scale):
    """A mean and a sum of squares: no factor keeps both."""
    return rms_norm(x, scale) + length_norm(x, scale)


def test_a_stream_with_a_mean_and_a_sum_of_squares_keeps_its_number():
    _, a, symmetry = network(0, norm=both_norms, **NARROW)
    _, b, onto = network(1, norm=both_norms, **WIDE)
    assert symmetry["embed"].rotates
    message = r"embed: no factor makes up for another number of units in add at .*length_norm"
    with pytest.raises(ValueError, match=message):
        otf.align(symmetry, a, b, onto=onto)


def test_numbers_that_widths_do_not_explain_are_named():
    # The logits are multiplied by 0.404 in the one, and by 0.313 in the other.
    _, a, symmetry = network(0, norm=rms_norm, after=by_number, **NARROW)
    _, b, onto = network(1, norm=rms_norm, after=by_number, **WIDE)
    with pytest.raises(ValueError, match=r"q#2: the two programs .* 0\.404145 and .* 0\.31305"):
        otf.fuse([symmetry, onto], [a, b])
    # Of one number of dimensions they are the same, and the stream may have another.
    same, c, other = network(1, norm=rms_norm, after=by_number, **(NARROW | {"width": 8}))
    assert np.isfinite(same(otf.fuse([symmetry, other], [a, c]), X)).all()


def test_an_embedding_that_is_tied_keeps_its_number():
    def tied(params, x):
        x = rms_norm(params["embed"][x], 1.0)
        x = rms_norm(x + jnp.tanh(x @ params["up"]) @ params["down"], 1.0)
        return x @ params["embed"].T

    tokens = np.arange(6).reshape(2, 3) % 5
    models, symmetries = [], []
    for width in (6, 8):
        params = normals({"embed": (5, width), "up": (width, 7), "down": (7, width)}, width)
        models.append(params)
        symmetries.append(otf.trace_symmetry(tied, params, tokens).with_rotations())
    assert symmetries[0]["embed"].rotates
    with pytest.raises(ValueError, match="embed: no factor makes up"):
        otf.fuse(symmetries, models)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (np.eye(6, 8) + 0.1, "embed: a matrix that is not orthogonal"),
        (np.eye(6, 8), "embed: a rotation that moves the vector of ones"),
        (np.eye(6, 8)[:5], r"embed: shape \(5, 8\), expected \(6, 6\) for a rotation"),
    ],
)
def test_matrices_that_are_no_isometries_are_refused(plan, message):
    _, params, symmetry = network(0, norm=layer_norm, **NARROW)
    with pytest.raises(ValueError, match=message):
        otf.transport(symmetry, {"embed": jnp.asarray(plan, jnp.float32)}, params)
