"""Means over units that nothing reads: what is proved of programs, and what becomes of models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normals
from flax import linen
from numpy.testing import assert_allclose

import otfusion_jax as otf
from otfusion_jax.symmetry.unread_means import with_random_means

pytestmark = pytest.mark.compatibility

WIDTH = 8
TOKENS = 3
SHAPES = {"in": (4, WIDTH), "b": (1, WIDTH), "back": (5, WIDTH), "out": (WIDTH, 5), "last": (5, 2)}


def normalised_by_variance(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def normalised_by_moments(x):
    mean = jnp.mean(x, -1)
    squares = jnp.mean(jax.lax.square(x), -1)
    variance = jnp.maximum(0, squares - jax.lax.square(mean))
    return (x - mean[..., None]) * jax.lax.rsqrt(variance + 1e-6)[..., None]


def normalised_by_sums(x):
    mean = (1 / WIDTH) * jnp.sum(x, -1, keepdims=True)
    centred = -mean + x
    return centred / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) - WIDTH * mean**2 + 1e-3)


def by_flax(x):
    norm = linen.LayerNorm(use_bias=False, use_scale=False)
    return norm.apply({}, x)


def in_half_precision(x):
    return normalised_by_moments(x.astype(jnp.bfloat16).astype(x.dtype))


def network(norm):
    def fn(p, x):
        stream = x @ p["in"] + p["b"]
        stream = stream + jnp.tanh(norm(stream) @ p["out"]) @ p["back"]
        return norm(stream) @ p["out"] @ p["last"]

    return fn


def unread(fn, shapes=SHAPES, x=None):
    """Traces a network, and returns the paths whose means are not read."""
    params = normals(shapes, seed=0)
    x = jnp.zeros((TOKENS, 4), jnp.float32) if x is None else x
    symmetry = otf.trace_symmetry(fn, params, x)
    found = set()
    for freedom in symmetry.freedoms:
        for leaf, axis in freedom.unread_means:
            found.add((symmetry.parts[leaf].path, axis))
    return found


@pytest.mark.parametrize(
    "norm",
    [
        normalised_by_variance,
        normalised_by_moments,
        normalised_by_sums,
        by_flax,
        in_half_precision,
        jax.jit(normalised_by_moments),
        jax.checkpoint(normalised_by_variance),
        jax.vmap(normalised_by_variance),
    ],
)
def test_a_layer_norm_reads_no_mean_of_what_produces_or_consumes(norm):
    fn = network(norm)
    assert unread(fn) == {("in", 1), ("b", 1), ("back", 1), ("out", 0)}
    params, x = normals(SHAPES, seed=1), normals({"x": (TOKENS, 4)}, seed=2)["x"]
    symmetry = otf.trace_symmetry(fn, params, x)
    moved = with_random_means(symmetry, params, jax.random.key(0))
    assert float(jnp.max(jnp.abs(moved["back"] - params["back"]))) > 0.1
    canonical = otf.canonicalize(symmetry, moved)
    for one in (moved, canonical):
        tolerance = 0.1 if norm is in_half_precision else 1e-4
        assert_allclose(fn(one, x), fn(params, x), rtol=tolerance, atol=tolerance)
    for path, axis in unread(fn):
        assert_allclose(jnp.mean(canonical[path], axis), 0, atol=1e-6)
    # Which of the models of one function it comes from makes no difference.
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, atol=1e-5),
        canonical,
        otf.canonicalize(symmetry, params),
    )


def test_a_second_call_changes_nothing():
    params = normals(SHAPES, seed=1)
    symmetry = otf.trace_symmetry(network(by_flax), params, jnp.zeros((TOKENS, 4)))
    once = otf.canonicalize(symmetry, params)
    twice = otf.canonicalize(symmetry, once)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), once, twice)))
    jitted = jax.jit(otf.canonicalize, static_argnums=0)(symmetry, params)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), once, jitted)


def normalised(x):
    return normalised_by_variance(x)


WRONG = {
    "another number of units": lambda x: x - jnp.sum(x, -1, keepdims=True) / (WIDTH + 1),
    "added": lambda x: x + jnp.mean(x, -1, keepdims=True),
    "twice": lambda x: x - 2 * jnp.mean(x, -1, keepdims=True),
    "of tokens as well": lambda x: x - jnp.mean(x, keepdims=True),
    "of another token": lambda x: x - jnp.roll(jnp.mean(x, -1, keepdims=True), 1, 0),
    "of the token before": lambda x: x - jnp.flip(jnp.mean(x, -1, keepdims=True), 0),
    "of all tokens": lambda x: x - jnp.cumsum(jnp.mean(x, -1, keepdims=True), 0),
    "of twice the value": lambda x: x - jnp.mean(2 * x, -1, keepdims=True),
    "of the absolute value": lambda x: x - jnp.mean(jnp.abs(x), -1, keepdims=True),
    "of the square": lambda x: x - jnp.mean(x * x, -1, keepdims=True),
    "with a bend": lambda x: x - jnp.tanh(jnp.mean(x, -1, keepdims=True)),
    "in few steps": lambda x: jnp.round(x) - jnp.mean(jnp.round(x), -1, keepdims=True),
    "the largest": lambda x: x - jnp.max(x, -1, keepdims=True),
    "variance about another mean": lambda x: (
        normalised(x)
        * jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) - 0.5 * jnp.mean(x, -1, keepdims=True) ** 2)
    ),
    "no mean": lambda x: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6),
    "a part of the tokens": lambda x: jnp.where(jnp.arange(TOKENS)[:, None] > 0, normalised(x), x),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_mean_of_the_same_value_is_read(name):
    found = unread(network(WRONG[name]))
    assert not {path for path, _ in found} & {"in", "b", "back"}


@pytest.mark.parametrize(
    "also",
    [
        lambda stream: jnp.mean(stream, -1),
        lambda stream: jnp.sum(stream**2, -1),
        lambda stream: jnp.max(stream, -1),
        lambda stream: jnp.mean(jnp.maximum(stream, 0), -1),
    ],
)
def test_what_is_read_elsewhere_is_read(also):
    def fn(p, x):
        stream = x @ p["in"] + p["b"]
        return normalised(stream) @ p["out"], also(stream)

    shapes = {name: SHAPES[name] for name in ("in", "b", "out")}
    assert unread(fn, shapes) == {("out", 0)}


def test_a_head_that_reads_the_stream_itself_reads_what_produces_it():
    def fn(p, x):
        stream = x @ p["in"]
        return normalised(stream) @ p["out"], stream @ p["head"]

    shapes = {"in": (4, WIDTH), "out": (WIDTH, 5), "head": (WIDTH, 3)}
    assert unread(fn, shapes) == {("out", 0)}


def test_a_bias_behind_the_norm_keeps_what_reads_it():
    def fn(p, x):
        stream = x @ p["in"]
        return (normalised(stream) * p["scale"] + p["bias"]) @ p["out"]

    shapes = {"in": (4, WIDTH), "scale": (1, WIDTH), "bias": (1, WIDTH), "out": (WIDTH, 5)}
    assert unread(fn, shapes) == {("in", 1)}
    without_bias = {name: shape for name, shape in shapes.items() if name != "bias"}

    def scaled(p, x):
        return (normalised(x @ p["in"]) * p["scale"]) @ p["out"]

    # The scale is 1 in canonical form, and is no part of it.
    assert unread(scaled, without_bias) == {("in", 1), ("out", 0)}
    params, x = normals(without_bias, seed=3), normals({"x": (TOKENS, 4)}, seed=4)["x"]
    symmetry = otf.trace_symmetry(scaled, params, x)
    canonical = otf.canonicalize(symmetry, params)
    assert_allclose(canonical["scale"], 1)
    assert_allclose(scaled(canonical, x), scaled(params, x), rtol=1e-4, atol=1e-5)


def test_a_tied_embedding_is_neither_read_where_it_is_looked_up_nor_where_it_reads():
    def fn(p, tokens):
        stream = p["embedding"][tokens]
        stream = stream + jnp.tanh(normalised(stream) @ p["out"]) @ p["back"]
        return normalised(stream) @ p["embedding"].T

    shapes = {"embedding": (7, WIDTH), "out": (WIDTH, 5), "back": (5, WIDTH)}
    found = unread(fn, shapes, jnp.zeros(TOKENS, int))
    assert found == {("embedding", 1), ("out", 0), ("back", 1)}


def blocks(p, x, of_start=False):
    start = x @ p["in"]

    def block(stream, layer):
        mean = jnp.mean(start if of_start else stream, -1, keepdims=True)
        return stream + jnp.tanh((stream - mean) @ layer["out"]) @ layer["back"], None

    stream, _ = jax.lax.scan(block, start, {"out": p["out"], "back": p["back"]})
    return normalised(stream) @ p["last"]


STACKED = {"in": (4, WIDTH), "out": (6, WIDTH, 5), "back": (6, 5, WIDTH), "last": (WIDTH, 2)}


def test_layers_in_a_loop_are_followed():
    found = unread(blocks, STACKED)
    assert found == {("in", 1), ("out", 1), ("back", 2), ("last", 0)}
    params, x = normals(STACKED, seed=5), normals({"x": (TOKENS, 4)}, seed=6)["x"]
    symmetry = otf.trace_symmetry(blocks, params, x).with_rotations()
    assert otf.check_symmetry(symmetry, blocks, params, x) < 1e-4


def test_the_mean_of_what_a_loop_starts_from_is_another_one():
    found = unread(lambda p, x: blocks(p, x, of_start=True), STACKED)
    assert found == {("last", 0)}


def slices_of_two_loops(p, x):
    stream = x @ p["in"]

    def outer(carry, one):
        def inner(total, other):
            return total + jnp.tanh((one - other.mean(keepdims=True)) @ p["out"]), None

        return carry, jax.lax.scan(inner, jnp.zeros(5), stream)[0]

    return jax.lax.scan(outer, 0.0, stream)[1] @ p["last"]


def collected_by_another_loop(p, x):
    stream = x @ p["in"]
    copies = jax.lax.scan(lambda carry, _: (carry, stream), 0.0, None, length=TOKENS)[1]

    def outer(carry, both):
        one, rows = both

        def inner(total, other):
            return total + jnp.tanh((one - other.mean(keepdims=True)) @ p["out"]), None

        return carry, jax.lax.scan(inner, jnp.zeros(5), rows)[0]

    return jax.lax.scan(outer, 0.0, (stream, copies))[1] @ p["last"]


@pytest.mark.parametrize("fn", [slices_of_two_loops, collected_by_another_loop])
def test_slices_of_two_loops_are_told_apart(fn):
    assert unread(fn, {name: SHAPES[name] for name in ("in", "out", "last")}) == set()


def test_a_number_of_whole_numbers_is_divided_as_these_are():
    def fn(p, x):
        stream = x @ p["in"]
        # 7.5, and not 8.
        count = jax.lax.div(jnp.int32(15), jnp.int32(2)).astype(x.dtype) + 0.5
        return jnp.tanh((stream - stream.sum(-1, keepdims=True) / count) @ p["out"])

    assert unread(fn, {name: SHAPES[name] for name in ("in", "out")}) == set()


def test_a_single_token_has_a_number_for_its_mean():
    def fn(p, x):
        stream = x @ p["in"]
        return (stream - stream.mean()) / jnp.sqrt(stream.var() + 1e-6) @ p["out"]

    shapes = {name: SHAPES[name] for name in ("in", "out")}
    assert unread(fn, shapes, jnp.zeros(4, jnp.float32)) == {("in", 1), ("out", 0)}


def test_large_means_leave_no_rounding_behind():
    params = normals(SHAPES, seed=1)
    params["back"] = params["back"] + 1e4
    symmetry = otf.trace_symmetry(network(by_flax), params, jnp.zeros((TOKENS, 4), jnp.float32))
    once = otf.canonicalize(symmetry, params)
    twice = otf.canonicalize(symmetry, once)
    assert_allclose(jnp.mean(once["back"], 1), 0, atol=1e-6)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), once, twice)))


def test_as_many_tokens_as_units_do_not_take_each_others_place():
    def fn(p, x):
        stream = x @ p["in"]
        # The mean of a token is subtracted from a unit.
        return (stream - jnp.mean(stream, -1)[None, :]) @ p["out"]

    shapes = {"in": (4, WIDTH), "out": (WIDTH, 5)}
    assert unread(fn, shapes, jnp.zeros((WIDTH, 4))) == set()


def test_a_mean_over_several_groups_of_units_is_not_theirs():
    def fn(p, x):
        both = jnp.concatenate([x @ p["one"], x @ p["other"]], -1)
        return normalised(both) @ p["out"]

    assert unread(fn, {"one": (4, 5), "other": (4, 6), "out": (11, 3)}) == set()


def test_half_precision_and_files_that_are_read_late_keep_what_they_are():
    params = normals(SHAPES, seed=7)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = jnp.zeros((TOKENS, 4), jnp.bfloat16)
    symmetry = otf.trace_symmetry(network(normalised), half, x)
    canonical = otf.canonicalize(symmetry, half)
    assert canonical["back"].dtype == jnp.bfloat16
    assert_allclose(np.mean(np.asarray(canonical["back"], np.float32), 1), 0, atol=0.01)
    lazy = jax.tree.map(lambda x: otf.LazyArray(x.shape, x.dtype, lambda: np.asarray(x)), half)
    read = jax.tree.map(np.asarray, otf.canonicalize(symmetry, lazy))
    jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(np.asarray, canonical))
