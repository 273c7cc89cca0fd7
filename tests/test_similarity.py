"""Checks similarity measures against NumPy formulas, planted permutations, and what CKA ignores."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, normal, normals

import otfusion_jax as otf

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
SHAPES = {"in": (5, 7), "bias": (7,), "out": (7, 3)}
HEADS = {"key": (5, 2, 3), "out": (5, 2, 4), "query": (5, 2, 3)}


def net(params, x):
    hidden = jax.nn.relu(x @ params["in"] + params["bias"][None])
    return hidden @ params["out"]


def attention(params, x):
    queries = jnp.einsum("btd,dhk->bthk", x, params["query"])
    keys = jnp.einsum("btd,dhk->bthk", x, params["key"])
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", queries, keys))
    return jnp.einsum("bhts,bsd,dho->bto", weights, x, params["out"])


def cka(x, y):
    """Equation 4 of Kornblith et al., by inner products of samples: n_samples x n_samples."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    center = np.eye(len(x)) - 1 / len(x)
    of_x, of_y = center @ x @ x.T @ center, center @ y @ y.T @ center
    return np.sum(of_x * of_y) / np.linalg.norm(of_x) / np.linalg.norm(of_y)


def correlations(x, y):
    return np.corrcoef(np.asarray(x, np.float64).T, np.asarray(y, np.float64).T)[
        : x.shape[1], x.shape[1] :
    ]


def hidden(params, x):
    return np.maximum(np.asarray(x @ params["in"] + params["bias"][None]), 0)


@pytest.fixture(scope="module")
def symmetry():
    return otf.trace_symmetry(net, normals(SHAPES), normal(2, 5))


# Linear CKA


@pytest.mark.parametrize("sizes", [(60,), (20, 40), (1, 19, 40), (1,) * 60], ids=str)
def test_linear_cka_is_that_of_all_samples_however_they_come(sizes):
    x, y = normal(60, 5, seed=1) + 3, normal(60, 4, seed=2)
    y = y.at[:, :2].add(x[:, :2])
    stops = np.cumsum(sizes)[:-1]
    pairs = zip(map(array, np.split(x, stops)), map(array, np.split(y, stops)), strict=True)
    close(otf.linear_cka(pairs), cka(x, y))


def test_linear_cka_does_not_see_rotations_scales_and_shifts():
    x, y = normal(50, 4, seed=1), normal(50, 6, seed=2)
    rotation = np.linalg.qr(np.asarray(normal(6, 6, seed=3)))[0]
    turned = array(7 * np.asarray(y) @ rotation + 2)
    value = otf.linear_cka([(x, y)])
    assert 0 < value < 1
    close(otf.linear_cka([(x, turned)]), value)
    close(otf.linear_cka([(y, turned)]), 1)
    # It does see other linear maps, of which regression would be free.
    squeezed = turned * array([1, 1, 1, 0.01, 0.01, 0.01])[None]
    assert otf.linear_cka([(y, squeezed)]) < 0.9
    close(jax.jit(lambda x, y: otf.linear_cka([(x, y)]))(x, y), value)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_linear_cka_of_any_size(scale):
    x, y = normal(30, 4, seed=1), normal(30, 3, seed=2)
    close(otf.linear_cka([(x * scale, y)]), cka(x, y))
    close(otf.linear_cka([(x * scale, y * scale)]), cka(x, y))


def test_linear_cka_of_means_far_from_zero_and_of_half_precision():
    """Sums of squares would have nothing but rounding left."""
    x, y = normal(64, 4, seed=1), normal(64, 3, seed=2)
    x = (x * 8).round() / 8 + 4096
    close(otf.linear_cka([(x[:20], y[:20]), (x[20:], y[20:])]), cka(x, y), rtol=1e-3)
    half = array(x - 4000, jnp.float16)
    close(otf.linear_cka([(half, y)]), cka(half, y), rtol=1e-3)


def test_linear_cka_of_units_that_do_not_vary_is_nan():
    x = normal(20, 3)
    constant = jnp.full((20, 2), 0.1)
    assert jnp.isnan(otf.linear_cka([(x, constant)]))
    assert jnp.isnan(otf.linear_cka([(constant[:7], x[:7]), (constant[7:], x[7:])]))
    # One that varies beside them is all that counts.
    close(otf.linear_cka([(x, jnp.concatenate([constant, x[:, :1]], 1))]), cka(x, x[:, :1]))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batches of activations"),
        ([(normal(3, 2), normal(4, 2))], ValueError, r"shapes \(3, 2\) and \(4, 2\); give"),
        ([(normal(3), normal(3))], ValueError, r"give \[samples, n\]"),
        ([(normal(3, 2), normal(3, 2)), (normal(3, 2), normal(3, 4))], ValueError, "has 4 units"),
    ],
    ids=["none", "samples", "vectors", "units"],
)
def test_activations_that_do_not_fit_are_refused(batches, error, message):
    with pytest.raises(error, match=message):
        otf.linear_cka(batches)


# Groups of two networks


def test_measures_are_those_of_numpy(symmetry):
    a, b, x = normals(SHAPES, seed=0), normals(SHAPES, seed=1), normal(40, 5, seed=2)
    alignment = otf.align(symmetry, a, b)
    found = otf.similarity(symmetry, net, a, b, [x[:10], x[10:]], plans=alignment)
    group = found.groups["in"]
    plan = np.asarray(alignment.plans["in"])
    assert group.samples == 40
    close(group.cka, cka(hidden(a, x), hidden(b, x)))
    before = correlations(hidden(a, x), hidden(b, x))
    close(group.before, before)
    close(group.after, before[plan])
    assert group.matched_before == pytest.approx(np.diag(before).mean(), abs=1e-5)
    assert group.matched_after == pytest.approx(np.diag(before[plan]).mean(), abs=1e-5)
    # The group is on all parameters, so that its distance is that of the whole.
    moved = {"in": a["in"][:, plan], "bias": a["bias"][plan], "out": a["out"][plan]}
    for model, distance in ((a, found.distance_before), (moved, found.distance_after)):
        step = np.concatenate([np.ravel(model[k] - b[k]) for k in SHAPES])
        norm = np.linalg.norm(np.concatenate([np.ravel(b[k]) for k in SHAPES]))
        assert distance == pytest.approx(np.linalg.norm(step) / norm, rel=1e-5)
    assert group.distance_after == found.distance_after < found.distance_before
    squared = sum([float(np.sum(np.square(b[name]))) for name in SHAPES]) * found.distance_after**2
    assert squared == pytest.approx(float(alignment.objective), rel=1e-4)


def test_planted_permutations_are_found(symmetry):
    a = normals(SHAPES)
    b = otf.transport(symmetry, symmetry.random(jax.random.key(0)), a)
    batches = (normal(8, 5, seed=seed) for seed in range(3))
    found = otf.similarity(symmetry, net, a, b, batches)
    group = found.groups["in"]
    close(group.cka, 1)
    assert group.matched_before < 0.8
    assert group.matched_after == pytest.approx(1, abs=1e-5)
    assert found.distance_before > 0.5
    assert found.distance_after == 0


def test_batches_do_not_matter(symmetry):
    a, b, x = normals(SHAPES, seed=0), normals(SHAPES, seed=1), normal(24, 5, seed=2)
    whole = otf.similarity(symmetry, net, a, b, [x], at="preactivation").groups["in"]
    parts = otf.similarity(symmetry, net, a, b, [x[:1], x[1:9], x[9:]], at="preactivation")
    for name in ("cka", "before", "after"):
        close(getattr(parts.groups["in"], name), getattr(whole, name))
    close(whole.before, correlations(x @ a["in"], x @ b["in"]))


def test_units_that_never_fire_have_no_correlation_and_do_not_count(symmetry):
    a, x = normals(SHAPES), normal(30, 5)
    dead = {**a, "bias": a["bias"].at[2].set(-100)}
    group = otf.similarity(symmetry, net, a, dead, [x[:15], x[15:]], plans={}).groups["in"]
    assert np.array_equal(np.isnan(group.before), np.arange(7)[None].repeat(7, 0) == 2)
    assert group.matched_before == pytest.approx(1, abs=1e-5)
    close(group.cka, cka(hidden(a, x), hidden(dead, x)))


def test_heads_are_compared_with_what_is_in_them():
    params, x = normals(HEADS), normal(6, 4, 5)
    symmetry = otf.trace_symmetry(attention, params, x)
    plans = {"query": jnp.array([1, 0]), "query#2": jnp.array([[2, 0, 1], [1, 0, 2]])}
    other = otf.transport(symmetry, plans, params)
    found = otf.similarity(symmetry, attention, params, other, [x], at="preactivation")
    group = found.groups["query#2"]
    assert group.before.shape == group.after.shape == (6, 6)
    # Head 0 holds what head 1 held, and the other way round.
    came_from = np.concatenate([3 + np.array([2, 0, 1]), [1, 0, 2]])
    close(np.diag(group.before[came_from]), 1)
    close(np.diag(group.after), 1)
    close(group.cka, 1)
    assert found.distance_after == 0


def test_rotated_streams_have_the_same_cka_and_meet_after_alignment():
    def stream(params, x):
        h = x @ params["embed"]
        h = h + jax.nn.relu(h @ params["up"]) @ params["down"]
        return h @ params["head"]

    shapes = {"embed": (4, 6), "up": (6, 9), "down": (9, 6), "head": (6, 3)}
    params, x = normals(shapes), normal(30, 4)
    symmetry = otf.trace_symmetry(stream, params, x).with_rotations()
    assert symmetry["embed"].rotates
    other = otf.transport(symmetry, symmetry.random(jax.random.key(1)), params)
    found = otf.similarity(symmetry, stream, params, other, [x[:10], x[10:]])
    group = found.groups["embed"]
    close(group.cka, 1, rtol=1e-3)
    assert abs(group.matched_before) < 0.6
    assert group.matched_after > 0.99
    assert found.distance_after < 0.05 < found.distance_before


def test_other_widths(symmetry):
    wide_shapes = {"in": (5, 14), "bias": (14,), "out": (14, 3)}
    a, b, x = normals(wide_shapes, seed=0), normals(SHAPES, seed=1), normal(20, 5)
    wide = otf.trace_symmetry(net, a, x)
    found = otf.similarity(wide, net, a, b, [x], onto=symmetry)
    group = found.groups["in"]
    close(group.cka, cka(hidden(a, x), hidden(b, x)))
    close(group.before, correlations(hidden(a, x), hidden(b, x)))
    assert group.after.shape == (7, 7)
    assert math.isnan(group.matched_before)
    assert math.isnan(found.distance_before)
    assert 0 < found.distance_after < 2
    assert "- → " in str(found)


def test_the_table_has_a_row_for_each_group(symmetry):
    a, b = normals(SHAPES, seed=0), normals(SHAPES, seed=1)
    found = otf.similarity(symmetry, net, a, b, [normal(1500, 5)])
    header, row, whole = [line.split() for line in str(found).splitlines()]
    assert header == ["group", "samples", "CKA", "correlation", "distance"]
    group = found.groups["in"]
    assert row[:4] == ["in", "1,500", f"{group.cka:.3f}", f"{group.matched_before:.3f}"]
    assert whole == ["all", f"{found.distance_before:.3f}", "→", f"{found.distance_after:.3f}"]


def test_numbers_of_python_are_parameters():
    def scaled_net(params, x):
        return params["scale"] * net(params, x)

    a, b = ({**normals(SHAPES, seed=seed), "scale": 1.0 + seed} for seed in range(2))
    x = normal(20, 5)
    scaled_symmetry = otf.trace_symmetry(scaled_net, a, x)
    found = otf.similarity(scaled_symmetry, scaled_net, a, b, [x])
    arrays_a, arrays_b = (jax.tree.map(jnp.asarray, params) for params in (a, b))
    expected = otf.similarity(scaled_symmetry, scaled_net, arrays_a, arrays_b, [x])
    assert found.distance_before == expected.distance_before
    assert found.distance_after == expected.distance_after


def test_what_does_not_fit_is_refused(symmetry):
    a, b, x = normals(SHAPES, seed=0), normals(SHAPES, seed=1), normal(4, 5)
    with pytest.raises(ValueError, match="no batches of inputs were given"):
        otf.similarity(symmetry, net, a, b, [])
    with pytest.raises(TypeError, match="batches is an array"):
        otf.similarity(symmetry, net, a, b, x)
    with pytest.raises(TypeError, match="a tuple of 1, of arrays"):
        otf.similarity(symmetry, net, a, b, (x,))
    with pytest.raises(TypeError, match=r"inside of jax.jit .* call it outside"):
        jax.jit(lambda a: otf.similarity(symmetry, net, a, b, [x]).groups["in"].cka)(a)
    with pytest.raises(ValueError, match="bias"):
        otf.similarity(symmetry, net, a, {**b, "bias": b["bias"] * jnp.nan}, [x])
