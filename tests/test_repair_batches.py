"""Repairs over any number of batches: sums instead of features, and no more passes than needed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from arrays import normal, normals
from jax import lax

import otfusion_jax as otf
from otfusion_jax.fusion import repair_pass
from otfusion_jax.fusion.linear_form import LinearForm, form_of, multiplied, row_gram
from otfusion_jax.fusion.repair_methods import Moments

METHODS = pytest.mark.parametrize(
    "method",
    [
        otf.RestoreStatistics(),
        otf.LeastSquares(0.1, 50, at="preactivation", restore=False),
        otf.LeastSquares(ridge=0.1, steps=50),
    ],
    ids=["statistics", "least squares", "both"],
)
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@functools.cache
def setting(kind):
    nets = [ref.random_net(seed, kind, True) for seed in range(2)]
    x = normal(64, *ref.INPUTS[kind][1:], seed=2)
    return otf.trace_symmetry(ref.network, nets[0], x), nets, x


def in_three(x):
    """Batches of two sizes."""
    return [x[:24], x[24:48], x[48:]]


@METHODS
@pytest.mark.parametrize("kind", ref.SHAPES)
def test_batches_are_one_large_batch(kind, method):
    symmetry, nets, x = setting(kind)
    whole = otf.repair(symmetry, ref.network, nets, x, method=method)
    repaired = otf.repair(symmetry, ref.network, nets, batches=in_three(x), method=method)
    jax.tree.map(close, repaired, whole)


@METHODS
@pytest.mark.parametrize(
    "given",
    [
        in_three,
        lambda x: iter(in_three(x)),
        lambda x: lambda: iter(in_three(x)),
        lambda x: [[batch] for batch in in_three(x)],
    ],
    ids=["list", "generator", "function", "lists of PyTorch"],
)
@pytest.mark.parametrize("keep_bytes", [1, 2**30])
def test_all_forms_of_batches_give_equal_bits(given, keep_bytes, method):
    symmetry, nets, x = setting("mlp")
    expected = otf.repair(symmetry, ref.network, nets, batches=in_three(x), method=method)
    found = otf.repair(
        symmetry, ref.network, nets, batches=given(x), method=method, keep_bytes=keep_bytes
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_least_squares_over_batches_are_those_of_numpy():
    def linear(params, x):
        return jnp.tanh(x @ params["first"]) @ params["second"]

    nets = [normals({"first": (5, 8), "second": (8, 3)}, seed) for seed in range(2)]
    x = normal(96, 5, seed=2)
    symmetry = otf.trace_symmetry(linear, nets[0], x)
    method = otf.LeastSquares(ridge=1e-6, steps=300)
    found = otf.repair(symmetry, linear, nets, batches=in_three(x), method=method)
    wide = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net) for net in nets]
    # The first layer sees the same inputs in all networks: its average is right.
    rows = np.tanh(np.asarray(x, np.float64) @ (wide[0]["first"] + wide[1]["first"]) / 2)
    target = sum(np.tanh(x @ net["first"]) @ net["second"] for net in wide) / 2
    close(found["second"], np.linalg.lstsq(rows, target)[0], atol=1e-3)


def test_memory_is_one_batch_however_many_there_are(monkeypatch):
    symmetry, nets, x = setting("conv")
    most = []

    class Counted(repair_pass.RepairRun):
        def _keep(self, batch, kept):
            super()._keep(batch, kept)
            most.append(sum(repair_pass._byte_count(other) for other in self.kept.values()))

    monkeypatch.setattr("otfusion_jax.fusion.repair.RepairRun", Counted)
    for count in (1, 2, 8):
        otf.repair(
            symmetry,
            ref.network,
            nets,
            batches=[x] * count,
            method=otf.LeastSquares(),
            keep_bytes=1,
        )
        most.append(None)
    of_one, of_two, of_eight = " ".join(map(str, most)).split("None")[:3]
    largest = [max(map(int, text.split())) for text in (of_one, of_two, of_eight)]
    assert largest[0] == largest[1] == largest[2]


def cut_out(x):
    """Patches of nine positions, as a convolution multiplies them with its kernel."""
    shifted = [jnp.pad(x, ((0, 0), (shift, 8 - shift), (0, 0)))[:, 4:-4] for shift in range(9)]
    return jnp.stack(shifted, axis=-1).reshape(*x.shape[:2], -1)


def of_patches(params, x):
    for name in ("in", "out"):
        x = jnp.tanh(cut_out(x) @ params[name])
    return x.sum(axis=1) @ params["head"]


def of_patches_in_a_loop(params, x):
    def layer(x, kernel):
        return jnp.tanh(cut_out(x) @ kernel), None

    x, _ = lax.scan(layer, jnp.tanh(cut_out(x) @ params["in"]), params["out"])
    return x.sum(axis=1) @ params["head"]


@pytest.mark.parametrize(
    ("fn", "out"),
    [(of_patches, (36, 4)), (of_patches_in_a_loop, (1, 36, 4))],
    ids=["layers", "loop"],
)
def test_what_is_kept_between_passes_is_smaller_than_patches(monkeypatch, fn, out):
    nets = [normals({"in": (27, 4), "out": out, "head": (4, 2)}, seed) for seed in range(2)]
    x = normal(16, 10, 3, seed=2)
    symmetry = otf.trace_symmetry(fn, nets[0], x)
    expected = otf.repair(symmetry, fn, nets, x, method=otf.LeastSquares())
    kept = []

    class Counted(repair_pass.RepairRun):
        def _keep(self, batch, what):
            super()._keep(batch, what)
            kept.append(repair_pass._byte_count(what))

    monkeypatch.setattr("otfusion_jax.fusion.repair.RepairRun", Counted)
    found = otf.repair(symmetry, fn, nets, batches=[x[:8], x[8:]], method=otf.LeastSquares())
    jax.tree.map(close, found, expected)
    # Of 8 samples in float32: the inputs, in each of three networks 10 x 4 features, and 4 sums.
    assert kept == [8 * 10 * 3 * 4] * 2 + [3 * 8 * 10 * 4 * 4] * 2 + [3 * 8 * 4 * 4] * 2


def test_sums_do_not_grow_with_samples():
    rows = [normal(1, samples, 6, seed=0) for samples in (10, 1000)]
    assert row_gram(rows[0]).shape == row_gram(rows[1]).shape == (1, 6, 6)


def branches(params, x):
    """Two layers that do not depend on one another, and one that does on both."""
    x = jnp.tanh(x @ params["in"])
    return (jnp.tanh(x @ params["left"]) + x @ params["right"]) @ params["out"]


def test_layers_that_do_not_depend_on_one_another_share_a_pass():
    shapes = {"in": (4, 6), "left": (6, 6), "right": (6, 6), "out": (6, 2)}
    nets = [normals(shapes, seed) for seed in range(2)]
    x = normal(32, 4, seed=2)
    symmetry = otf.trace_symmetry(branches, nets[0], x)
    passes = []

    def batches():
        passes.append(True)
        return iter([x])

    otf.repair(symmetry, branches, nets, batches=batches, method=otf.LeastSquares())
    assert len(passes) == 3  # for four products


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (jnp.ones((3, 5)), TypeError, "batches is an array"),
        ((jnp.ones((3, 5)),), TypeError, "batches is a tuple of 1, of arrays"),
        ([], ValueError, "no batches"),
        ([jnp.ones((0, 5))], ValueError, "is empty"),
    ],
)
def test_batches_that_are_none_are_named(batches, error, message):
    symmetry, nets, _ = setting("mlp")
    with pytest.raises(error, match=message):
        otf.repair(symmetry, ref.network, nets, batches=batches)


def test_inputs_and_batches_are_refused():
    symmetry, nets, x = setting("mlp")
    with pytest.raises(TypeError, match="1 inputs and batches were given"):
        otf.repair(symmetry, ref.network, nets, x, batches=[x])


def test_a_function_that_runs_out_of_batches_is_named():
    symmetry, nets, x = setting("mlp")
    iterator = iter([[x, x], [x], [x]])
    with pytest.raises(ValueError, match="the first pass had 2 batches and a later one 1"):
        otf.repair(symmetry, ref.network, nets, batches=lambda: iter(next(iterator)))


def test_the_batch_that_is_not_finite_is_named():
    symmetry, nets, x = setting("mlp")
    wrong = x.at[3, :2].set(jnp.nan)
    with pytest.raises(FloatingPointError, match=r"batch 1, input 0: 2 of \d+ values not finite"):
        otf.repair(symmetry, ref.network, nets, batches=[x, wrong])


@METHODS
def test_complex_units_are_one_large_batch(method):
    drawn = [normals({"re": (4, 6), "im": (4, 6), "out": (6, 2)}, seed=seed) for seed in range(2)]
    nets = [{"in": lax.complex(net["re"], net["im"]), "out": net["out"]} for net in drawn]
    x = normal(64, 4, seed=2)

    def fn(p, x):
        return jnp.abs(x.astype(p["in"].dtype) @ p["in"]) @ p["out"]

    symmetry = otf.trace_symmetry(fn, nets[0], x)
    whole = otf.repair(symmetry, fn, nets, x, method=method)
    repaired = otf.repair(symmetry, fn, nets, batches=in_three(x), method=method)
    jax.tree.map(close, repaired, whole)


@pytest.mark.parametrize("units", [3 + normal(30, 4), lax.complex(normal(30, 4), normal(30, 4))])
def test_moments_add_up(units):
    parts = [Moments.of(part) for part in (units[:1], units[1:12], units[12:])]
    nothing = jax.tree.map(jnp.zeros_like, parts[0])
    total = functools.reduce(Moments.plus, parts, nothing)
    jax.tree.map(functools.partial(close, atol=1e-5), total, Moments.of(units))


def conv(strides, padding, lhs_dilation, rhs_dilation, groups, layout):
    return functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_group_count=groups,
        dimension_numbers=layout,
    )


LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
PRODUCTS = {
    "matrices": (jnp.matmul, (4, 6, 5), (5, 7)),
    "two axes": (lambda x, w: jnp.tensordot(x, w, axes=[[1, 2], [1, 0]]), (4, 6, 5), (5, 6, 7)),
    "batched": (lambda x, w: lax.batch_matmul(x, w), (3, 4, 5), (3, 5, 2)),
    "weights first": (lambda x, w: lax.batch_matmul(w, x), (3, 5, 4), (3, 2, 5)),
    "wide": (jnp.matmul, (20, 530), (530, 3)),
    "convolution": (conv((1, 1), "SAME", (1, 1), (1, 1), 1, LAST), (3, 9, 8, 4), (3, 3, 4, 8)),
    "grouped": (conv((2, 1), "VALID", (1, 1), (2, 1), 2, LAST), (3, 9, 8, 4), (3, 2, 2, 8)),
    "channels first": (
        conv((1, 2), [(0, 1), (-1, 2)], (2, 1), (1, 2), 4, FIRST),
        (3, 4, 9, 8),
        (8, 1, 3, 2),
    ),
    "smaller than the kernel": (
        conv((1, 1), "SAME", (1, 1), (1, 1), 2, LAST),
        (3, 2, 2, 4),
        (3, 3, 2, 8),
    ),
}


def product_of(fn, x, w) -> tuple[LinearForm, jax.Array]:
    jaxpr = jax.make_jaxpr(fn)(x, w).jaxpr
    (eqn,) = jaxpr.eqns
    position = list(eqn.invars).index(jaxpr.invars[1])
    operands = [(x, w)[jaxpr.invars.index(var)] for var in eqn.invars]
    return form_of(eqn, position, []), eqn.primitive.bind(*operands, **eqn.params)


@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_rows_times_a_matrix(case):
    fn, *shapes = case
    x, w = normal(*shapes[0], seed=0), normal(*shapes[1], seed=1)
    form, expected = product_of(fn, x, w)
    rows, matrix = form.rows(x), form.matrix(w)
    found = jnp.matmul(rows, matrix, precision="highest")
    close(found, form.columns(expected), atol=1e-3)
    close(form.compute(x, w), expected, atol=1e-3)
    # NumPy arranges them alike, and takes the parameter out of its matrix again.
    known: Any = jax.tree.map(np.asarray, {"x": x, "w": w, "y": expected})
    np.testing.assert_array_equal(form.rows(known["x"]), rows)
    np.testing.assert_array_equal(form.matrix(known["w"]), matrix)
    np.testing.assert_array_equal(form.columns(known["y"]), form.columns(expected))
    transpose = form.transposed_matrix(known["w"])
    np.testing.assert_array_equal(transpose(form.matrix(known["w"])), w)
    close(row_gram(form.rows(known["x"])), row_gram(rows), atol=1e-2)
    close(row_gram(rows), jnp.einsum("gsi,gsj->gij", rows, rows, precision="highest"), atol=1e-2)


def arranged(w):
    """A parameter cast, reshaped, turned around and repeated on its way into a product."""
    w = w.astype(jnp.bfloat16).astype(jnp.float32).reshape(6, 5)
    return jnp.broadcast_to(w.T[:, None, :], (5, 2, 6)).reshape(10, 6)


def test_numpy_adds_up_what_a_parameter_is_repeated_for():
    w = normal(3, 10, seed=1)
    *steps, product = jax.make_jaxpr(lambda w: normal(4, 10) @ arranged(w))(w).jaxpr.eqns
    form = form_of(product, 1, steps)
    known: Any = np.asarray(w)
    matrix = form.matrix(w)
    np.testing.assert_array_equal(form.matrix(known), matrix)
    close(form.transposed_matrix(known)(form.matrix(known)), form.transposed_matrix(w)(matrix))


def test_convolutions_of_small_images_are_those_of_jax():
    fn, *shapes = PRODUCTS["smaller than the kernel"]
    x, w = normal(*shapes[0], seed=0), normal(*shapes[1], seed=1)
    (eqn,) = jax.make_jaxpr(fn)(x, w).jaxpr.eqns
    close(multiplied(eqn.primitive, eqn.params, x, w), fn(x, w), atol=1e-5)
