"""Biases that weights alone read: which are found, and what takes them up."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normals
from numpy.testing import assert_allclose

import otfusion_jax as otf

pytestmark = [
    pytest.mark.compatibility,
    # Most networks here do without some of the parameters.
    pytest.mark.filterwarnings("ignore::otfusion_jax.SymmetryWarning"),
]

UNITS = 5
READ = 4
TOKENS = 4
SHAPES = {
    "in": (3, UNITS),
    "b": (1, UNITS),
    "w": (UNITS, READ),
    "d": (1, READ),
    "v": (UNITS, READ),
    "e": (1, READ),
    "out": (READ, 2),
    "square": (UNITS, UNITS),
    "number": (),
}


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def offsets_of(fn, shapes=SHAPES, x=None):
    """Traces a network, and returns for each bias that goes the biases that take it up."""
    x = jnp.zeros((TOKENS, 3), jnp.float32) if x is None else x
    symmetry = otf.trace_symmetry(fn, normals(shapes), x, on_unsupported="raise")
    found = {}
    for freedom in symmetry.freedoms:
        for offset in freedom.offsets:
            found[symmetry.parts[offset.leaf].path] = {
                symmetry.parts[reader.leaf].path: symmetry.parts[reader.kernel].path
                for reader in offset.readers
            }
    return found


def one_layer(p, x):
    return jnp.tanh((normalised(x @ p["in"]) + p["b"]) @ p["w"] + p["d"]) @ p["out"]


def two_layers(p, x):
    y = normalised(x @ p["in"]) + p["b"]
    return jnp.tanh(y @ p["w"] + p["d"]) * jnp.tanh(p["e"] + jnp.einsum("tn,nk->tk", y, p["v"]))


def by_the_first_token(p, x):
    y = jnp.expand_dims(normalised(x @ p["in"]) + p["b"], 1)[0]
    return jnp.tanh(y @ p["w"] + p["d"]) @ p["out"]


def weights_first(p, x):
    y = (normalised(x @ p["in"]) + p["b"]).T
    return p["out"].T @ jnp.tanh(p["w"].T @ y + p["d"].T)


def in_jit_and_vmap(p, x):
    def token(row):
        y = normalised(row @ p["in"]) + p["b"].squeeze(0)
        return jnp.tanh(jax.jit(jnp.dot)(y, p["w"]) + p["d"].squeeze(0)) @ p["out"]

    return jax.vmap(token)(x)


NETWORKS = {
    "one layer": (one_layer, {"b": {"d": "w"}}),
    "two layers": (two_layers, {"b": {"d": "w", "e": "v"}}),
    "the first token": (by_the_first_token, {"b": {"d": "w"}}),
    "weights first": (weights_first, {"b": {"d": "w"}}),
    "jit and vmap": (in_jit_and_vmap, {"b": {"d": "w"}}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bias_is_taken_up_by_those_of_its_readers(name):
    fn, expected = NETWORKS[name]
    assert offsets_of(fn) == expected
    params, x = normals(SHAPES, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    symmetry = otf.trace_symmetry(fn, params, x)
    canonical = otf.canonicalize(symmetry, params)
    assert_allclose(canonical["b"], 0)
    assert_allclose(canonical["d"], params["d"] + params["b"] @ params["w"], rtol=1e-5, atol=1e-5)
    assert_allclose(fn(canonical, x), fn(params, x), rtol=1e-4, atol=1e-5)
    again = otf.canonicalize(symmetry, canonical)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), canonical, again)))
    # However the whole is shared out between the two makes no difference.
    shift = normals({"b": SHAPES["b"]}, seed=3)["b"]
    other = params | {"b": params["b"] + shift, "d": params["d"] - shift @ params["w"]}
    if "e" in expected["b"]:
        other["e"] = params["e"] - shift @ params["v"]
    assert_allclose(otf.canonicalize(symmetry, other)["d"], canonical["d"], rtol=1e-4, atol=1e-4)


def test_heads_read_along_two_axes():
    def fn(p, x):
        y = normalised(x @ p["in"]) + p["b"]
        query = jnp.einsum("tn,nhd->thd", y, p["w"]) + p["d"]
        return jnp.einsum("thd,shd->hts", jnp.tanh(query), jnp.tanh(query)), query.sum((1, 2))

    shapes = {"in": (3, UNITS), "b": (1, UNITS), "w": (UNITS, 2, 3), "d": (1, 2, 3)}
    assert offsets_of(fn, shapes) == {"b": {"d": "w"}}
    params, x = normals(shapes, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    canonical = otf.canonicalize(otf.trace_symmetry(fn, params, x), params)
    for new, old in zip(fn(canonical, x), fn(params, x), strict=True):
        assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_layers_of_a_loop_have_biases_of_their_own():
    def fn(p, x):
        def block(stream, layer):
            y = normalised(stream) + layer["b"][None]
            return stream + jnp.tanh(y @ layer["w"] + layer["d"][None]) @ layer["back"], None

        layers = {name: p[name] for name in ("b", "w", "d", "back")}
        return jax.lax.scan(block, x @ p["in"], layers)[0] @ p["v"]

    shapes = {
        "in": (3, UNITS),
        "b": (6, UNITS),
        "w": (6, UNITS, READ),
        "d": (6, READ),
        "back": (6, READ, UNITS),
        "v": (UNITS, 2),
    }
    assert offsets_of(fn, shapes) == {"b": {"d": "w"}}
    params, x = normals(shapes, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    canonical = otf.canonicalize(otf.trace_symmetry(fn, params, x), params)
    expected = params["d"] + jnp.einsum("ln,lnk->lk", params["b"], params["w"])
    assert_allclose(canonical["d"], expected, rtol=1e-5, atol=1e-5)
    assert_allclose(fn(canonical, x), fn(params, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: x.astype(jnp.bfloat16).astype(x.dtype), jnp.flip]
)
def test_layers_that_are_changed_before_the_loop(change):
    def fn(p, x):
        def block(stream, layer):
            b, w, d, back = layer
            read = (normalised(stream) + b[None]) @ w + d[None]
            return stream + jnp.tanh(read) @ back, None

        layers = change(p["b"]), p["w"].swapaxes(0, 1), change(p["d"]), p["back"]
        return jax.lax.scan(block, x @ p["in"], layers)[0] @ p["v"]

    shapes = {
        "in": (3, UNITS),
        "b": (6, UNITS),
        "w": (UNITS, 6, READ),
        "d": (6, READ),
        "back": (6, READ, UNITS),
        "v": (UNITS, 2),
    }
    # The layers of the weights are no first axis.
    assert offsets_of(fn, shapes) == {}
    params, x = normals(shapes, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    canonical = otf.canonicalize(otf.trace_symmetry(fn, params, x), params)
    assert_allclose(fn(canonical, x), fn(params, x), rtol=0.02, atol=0.02)


def test_a_single_output_has_a_number_for_a_bias():
    def fn(p, x):
        return (normalised(x @ p["in"]) + p["b"]) @ p["w"] + p["number"]

    shapes = {"in": (3, UNITS), "b": (1, UNITS), "w": (UNITS,), "number": ()}
    assert offsets_of(fn, shapes) == {"b": {"number": "w"}}
    params, x = normals(shapes, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    canonical = otf.canonicalize(otf.trace_symmetry(fn, params, x), params)
    assert_allclose(fn(canonical, x), fn(params, x), rtol=1e-4, atol=1e-4)


def loops_in_loops(p, x):
    """Adds the bias of one layer, and reads with the weights of all."""
    y = normalised(x @ p["in"])
    layers = p["b"], p["w"], p["d"]

    def outer(total, layer):
        def inner(total, other):
            return total + jnp.tanh((y + layer[0][None]) @ other[1] + other[2][None]), None

        return total + jax.lax.scan(inner, jnp.zeros((TOKENS, READ)), layers)[0], None

    return jax.lax.scan(outer, jnp.zeros((TOKENS, READ)), layers)[0] @ p["out"]


def the_same_loop_twice(p, x):
    """Adds the biases of layers, and reads with weights that lie the other way round."""

    @jax.jit
    def loop(streams, b, w, d):
        def step(carry, layer):
            stream, b, w, d = layer
            return carry, (stream + b[None], stream @ w + d[None])

        return jax.lax.scan(step, 0.0, (streams, b, w, d))[1]

    y = jnp.stack([normalised(x @ p["in"])] * 6)
    added, _ = loop(y, p["b"], p["w0"], p["d0"])
    _, read = loop(added[::-1], p["b0"], p["w"], p["d"])
    return jnp.tanh(read).sum(0) @ p["out"]


@pytest.mark.parametrize("fn", [loops_in_loops, the_same_loop_twice])
def test_layers_of_two_loops_are_told_apart(fn):
    shapes: dict[str, tuple[int, ...]] = {"in": (3, UNITS), "out": (READ, 2)}
    for end in ("", "0"):
        shapes |= {f"b{end}": (6, UNITS), f"w{end}": (6, UNITS, READ), f"d{end}": (6, READ)}
    assert "b" not in offsets_of(fn, shapes)
    params, x = normals(shapes, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    canonical = otf.canonicalize(otf.trace_symmetry(fn, params, x), params)
    assert_allclose(fn(canonical, x), fn(params, x), rtol=1e-4, atol=1e-4)


def test_what_is_coarser_takes_nothing_up():
    params = normals(SHAPES)
    params["d"] = params["d"].astype(jnp.bfloat16)

    def fn(p, x):
        read = (normalised(x @ p["in"]) + p["b"]) @ p["w"] + p["d"].astype(x.dtype)
        return jnp.tanh(read) @ p["out"]

    symmetry = otf.trace_symmetry(fn, params, jnp.zeros((TOKENS, 3), jnp.float32))
    assert not any(freedom.offsets for freedom in symmetry.freedoms)


def test_a_chain_hands_its_biases_on_to_the_last():
    def fn(p, x):
        return ((x @ p["in"] + p["b"]) @ p["w"] + p["d"]) @ p["out"] + p["e"]

    shapes = {name: SHAPES[name] for name in ("in", "b", "w", "d", "out")} | {"e": (1, 2)}
    assert offsets_of(fn, shapes) == {"b": {"d": "w"}, "d": {"e": "out"}}
    params, x = normals(shapes, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    canonical = otf.canonicalize(otf.trace_symmetry(fn, params, x), params)
    assert not jnp.any(canonical["b"])
    assert not jnp.any(canonical["d"])
    assert_allclose(fn(canonical, x), fn(params, x), rtol=1e-4, atol=1e-4)


def test_a_bias_of_a_unit_whose_scale_is_0_is_no_longer_in_the_way():
    def fn(p, x):
        y = normalised(x @ p["in"]) * p["scale"] + p["b"]
        return jnp.tanh(y @ p["w"] + p["d"]) @ p["out"]

    shapes = SHAPES | {"scale": (1, UNITS)}
    params, x = normals(shapes, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    params["scale"] = params["scale"].at[0, 2].set(0)
    symmetry = otf.trace_symmetry(fn, params, x).with_rotations()
    canonical = otf.canonicalize(symmetry, params)
    assert_allclose(fn(canonical, x), fn(params, x), rtol=1e-4, atol=1e-5)


def changed(change):
    """A network of which one step is another one."""

    def fn(p, x):
        return change(p, normalised(x @ p["in"]))

    return fn


STAY = {
    "no bias behind": lambda p, y: jnp.tanh((y + p["b"]) @ p["w"]) @ p["out"],
    "one of two has none": lambda p, y: (
        jnp.tanh((y + p["b"]) @ p["w"] + p["d"]) * jnp.tanh((y + p["b"]) @ p["v"])
    ),
    "a nonlinearity": lambda p, y: jnp.tanh(jnp.tanh(y + p["b"]) @ p["w"] + p["d"]),
    "a product": lambda p, y: jnp.tanh(((y + p["b"]) * y) @ p["w"] + p["d"]),
    "a product behind": lambda p, y: jnp.tanh(((y + p["b"]) @ p["w"]) * 2 + p["d"]),
    "a difference": lambda p, y: jnp.tanh((y - p["b"]) @ p["w"] + p["d"]),
    "twice": lambda p, y: jnp.tanh((y + p["b"] + p["b"]) @ p["w"] + p["d"]),
    "another use": lambda p, y: jnp.tanh((y + p["b"]) @ p["w"] + p["d"]) * jnp.sum(p["b"] ** 2),
    "another use of what takes it up": lambda p, y: (
        jnp.tanh((y + p["b"]) @ p["w"] + p["d"]) * p["d"]
    ),
    "returned": lambda p, y: (jnp.tanh((y + p["b"]) @ p["w"] + p["d"]), p["d"]),
    "two that share a bias": lambda p, y: (
        jnp.tanh((y + p["b"]) @ p["w"] + p["d"]) * jnp.tanh((y + p["b"]) @ p["v"] + p["d"])
    ),
    "a bias along tokens": lambda p, y: jnp.tanh((y + p["b"]) @ p["w"] + p["d"].T),
    "tokens mixed": lambda p, y: jnp.tanh(jnp.tanh(y @ y.T) @ (y + p["b"]) @ p["w"] + p["d"]),
    "a mask": lambda p, y: jnp.tanh(jnp.where(y > 0, y + p["b"], 0) @ p["w"] + p["d"]),
    "some tokens": lambda p, y: jnp.tanh(
        jnp.concatenate([y[:2], y[2:] + p["b"]]) @ p["w"] + p["d"]
    ),
    "in few steps": lambda p, y: jnp.tanh(
        (y + p["b"]).astype(jnp.int8).astype(y.dtype) @ p["w"] + p["d"]
    ),
    "out of bounds": lambda p, y: jnp.tanh(
        (y + p["b"]).at[jnp.array([0, 9])].get(mode="fill", fill_value=0) @ p["w"] + p["d"]
    ),
    "itself": lambda p, y: jnp.tanh((y + p["b"]) @ p["square"] + p["b"]),
    "weights in few steps": lambda p, y: jnp.tanh(
        (y + p["b"]) @ p["w"].astype(jnp.int8).astype(y.dtype) + p["d"]
    ),
    "what takes it up in few steps": lambda p, y: jnp.tanh(
        (y + p["b"]) @ p["w"] + p["d"].astype(jnp.int8).astype(y.dtype)
    ),
    "itself in few steps": lambda p, y: jnp.tanh(
        (y + p["b"].astype(jnp.int8).astype(y.dtype)) @ p["w"] + p["d"]
    ),
    "a number behind it": lambda p, y: jnp.tanh((y + p["b"]) @ p["w"] + p["number"]),
    "its own weights": lambda p, y: jnp.tanh((y + p["b"]) @ p["b"].T + jnp.sum(p["d"])),
    "in a branch": lambda p, y: jnp.tanh(
        jax.lax.cond(y[0, 0] > 0, lambda: y + p["b"], lambda: y) @ p["w"] + p["d"]
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_any_other_use_leaves_a_bias_where_it_is(name):
    fn = changed(STAY[name])
    assert offsets_of(fn) == {}
    params, x = normals(SHAPES, seed=1), normals({"x": (TOKENS, 3)}, seed=2)["x"]
    symmetry = otf.trace_symmetry(fn, params, x)
    canonical = otf.canonicalize(symmetry, params)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-4), fn(canonical, x), fn(params, x)
    )


def test_half_precision_and_files_that_are_read_late_keep_what_they_are():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), normals(SHAPES, seed=1))
    x = jnp.zeros((TOKENS, 3), jnp.bfloat16)
    symmetry = otf.trace_symmetry(one_layer, params, x)
    canonical = otf.canonicalize(symmetry, params)
    assert canonical["d"].dtype == canonical["b"].dtype == jnp.bfloat16
    lazy = jax.tree.map(lambda x: otf.LazyArray(x.shape, x.dtype, lambda: np.asarray(x)), params)
    read = jax.tree.map(np.asarray, otf.canonicalize(symmetry, lazy))
    jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(np.asarray, canonical))


def test_what_is_taken_up_is_saved_with_the_symmetry():
    symmetry = otf.trace_symmetry(two_layers, normals(SHAPES), jnp.zeros((TOKENS, 3), jnp.float32))
    assert otf.Symmetry.from_json(symmetry.to_json()) == symmetry
    record = json.loads(symmetry.to_json())
    (offset,) = [offset for freedom in record["freedoms"] for offset in freedom["offsets"]]
    offset["readers"][0]["axes"] = [[1, 0]]
    with pytest.raises(
        ValueError, match=r"offsets\[0\]\.readers\[0\]\.axes .* two axes of one size"
    ):
        otf.Symmetry.from_json(json.dumps(record))
