"""Checks which units may be scaled or turned around, against the functions themselves.

Where signs or scales are claimed, random ones must change no output. Where they are refused, doing
it by hand has to change it: the refusal is then no whim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import array, normal, normals
from flax import linen as nn
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import otfusion_jax as otf
from otfusion_jax.symmetry.balancing import randomly_scaled
from otfusion_jax.symmetry.groups import Motion

N, EXACT, BROKEN = 6, 1e-5, 1e-2
X = normal(5, 3, seed=2)

Degrees = dict[tuple[str, int], int]
"""By the names of parameters and their axes the power of the scale, or 1 for what changes signs."""

UNITS: Degrees = {("w", 1): 1, ("b", 0): 1, ("v", 0): -1}
SHAPES: dict[str, tuple[int, ...]] = {"w": (3, N), "b": (N,), "v": (N, 4)}
TWO = {"w": (3, N), "u": (3, N), "v": (N, 4)}
LOOP = SHAPES | {"r": (N, N)}
GATED: Degrees = {("u", 1): 1, ("v", 0): -1}


@pytest.fixture(autouse=True)
def rank_promotion():
    """Lets the functions below be written as they are in the world, with `h + b`."""
    with jax.numpy_rank_promotion("allow"):
        yield


def hidden(act):
    """A function that makes units, does something to them, and reads them."""
    return lambda p, x: act(p, x @ p["w"] + p["b"]) @ p["v"]


def spectrally_normed(weights):
    return weights / jnp.linalg.norm(weights, 2)


def read_by_normed(act):
    """A function as `hidden`, whose units are read by weights that are spectrally normed."""
    return lambda p, x: act(x @ p["w"] + p["b"]) @ spectrally_normed(p["v"])


def gated(act):
    return lambda p, x: (act(x @ p["w"]) * (x @ p["u"])) @ p["v"]


def recurrent(act):
    def fn(p, x):
        def step(h, xt):
            h = act(xt @ p["w"] + h @ p["r"] + p["b"])
            return h, jnp.mean(h * h)

        h, _ = lax.scan(step, jnp.zeros(N), x)
        return h @ p["v"]

    return fn


def positive(degrees: Degrees) -> Degrees:
    """The same for signs."""
    return dict.fromkeys(degrees, 1)


def batch_normed(p, h):
    return jax.nn.relu((h - p["mean"]) * lax.rsqrt(p["var"] + 1e-3) * p["gamma"] + p["beta"])


NORMED: dict[str, tuple[int, ...]] = SHAPES | dict.fromkeys(("mean", "var", "gamma", "beta"), (N,))
BEFORE_NORM: Degrees = {("w", 1): 1, ("b", 0): 1, ("mean", 0): 1}
AFTER_NORM: Degrees = {("gamma", 0): 1, ("beta", 0): 1, ("v", 0): -1}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A function of `(params, x)`, and all by which its units may be multiplied.

    Attributes:
        fn: The function.
        scales: Independent positive scalings.
        signs: Independent changes of signs.
        shapes: The shapes of its parameters.
        group: The group in question.
    """

    fn: Callable[..., Any]
    scales: tuple[Degrees, ...] = ()
    signs: tuple[Degrees, ...] = ()
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: SHAPES)
    group: str = "w"


BOTH = (UNITS,), (positive(UNITS),)
RECURRENT: Degrees = UNITS | {("r", 0): -1, ("r", 1): 1}

CLAIMS = {
    "ReLU": Claim(hidden(lambda p, h: jax.nn.relu(h)), (UNITS,)),
    "leaky ReLU": Claim(hidden(lambda p, h: jax.nn.leaky_relu(h)), (UNITS,)),
    "a clip at 0": Claim(hidden(lambda p, h: jnp.clip(h, min=0)), (UNITS,)),
    "square root of ReLU": Claim(
        hidden(lambda p, h: jnp.sqrt(jax.nn.relu(h) + 0 * h)),
        ({("w", 1): 2, ("b", 0): 2, ("v", 0): -1},),
    ),
    "ReLU to a power that is no whole number": Claim(
        hidden(lambda p, h: jax.nn.relu(h) ** 1.5), ({("w", 1): 2, ("b", 0): 2, ("v", 0): -3},)
    ),
    "a root that float32 knows in part": Claim(
        hidden(lambda p, h: jax.nn.relu(h) ** (1 / 3)),
        ({("w", 1): 3, ("b", 0): 3, ("v", 0): -1},),
    ),
    "squared ReLU": Claim(
        hidden(lambda p, h: jax.nn.relu(h) ** 2), ({("w", 1): 1, ("b", 0): 1, ("v", 0): -2},)
    ),
    "absolute values": Claim(
        hidden(lambda p, h: jnp.abs(h)), (UNITS,), ({("w", 1): 1, ("b", 0): 1},)
    ),
    "tanh": Claim(hidden(lambda p, h: jnp.tanh(h)), (), (positive(UNITS),)),
    "sine": Claim(hidden(lambda p, h: jnp.sin(h)), (), (positive(UNITS),)),
    "cosine": Claim(hidden(lambda p, h: jnp.cos(h)), (), ({("w", 1): 1, ("b", 0): 1},)),
    "cube": Claim(
        hidden(lambda p, h: h**3),
        ({("w", 1): 1, ("b", 0): 1, ("v", 0): -3},),
        (positive(UNITS),),
    ),
    "softsign": Claim(hidden(lambda p, h: jax.nn.soft_sign(h)), (), (positive(UNITS),)),
    "a tanh of squares": Claim(
        hidden(lambda p, h: jnp.tanh(h * h)), (), ({("w", 1): 1, ("b", 0): 1},)
    ),
    "linear": Claim(hidden(lambda p, h: h), *BOTH),
    "a gate": Claim(gated(jax.nn.silu), (GATED,), (positive(GATED),), TWO),
    "a product of two": Claim(
        gated(lambda h: h),
        (GATED, {("u", 1): 1, ("w", 1): -1}),
        (positive(GATED), {("u", 1): 1, ("w", 1): 1}),
        TWO,
    ),
    "the largest of two": Claim(
        lambda p, x: jnp.maximum(x @ p["w"], x @ p["u"]) @ p["v"],
        ({("w", 1): 1, ("u", 1): 1, ("v", 0): -1},),
        (),
        TWO,
    ),
    "the larger chosen": Claim(
        lambda p, x: jnp.where(x @ p["w"] > x @ p["u"], x @ p["w"], x @ p["u"]) @ p["v"],
        ({("w", 1): 1, ("u", 1): 1, ("v", 0): -1},),
        (),
        TWO,
    ),
    "the largest of some rows": Claim(
        hidden(lambda p, h: jnp.max(h, 0, keepdims=True)), (UNITS,), ()
    ),
    "batch norm in use": Claim(
        hidden(batch_normed),
        (
            BEFORE_NORM | {("gamma", 0): -1},
            AFTER_NORM,
        ),
        (positive(BEFORE_NORM | {("gamma", 0): 1}),),
        NORMED,
    ),
    "a recurrent tanh": Claim(recurrent(jnp.tanh), (), (positive(RECURRENT),), LOOP),
    "a tanh before weights that are spectrally normed": Claim(
        read_by_normed(jnp.tanh), (), (positive(UNITS),)
    ),
    "singular values of a recurrent kernel": Claim(
        lambda p, x: recurrent(jnp.tanh)(p | {"w": p["w"] / jnp.linalg.norm(p["r"], 2)}, x),
        (),
        (positive(RECURRENT),),
        LOOP,
    ),
    "a recurrent kernel, transposed": Claim(
        lambda p, x: recurrent(jnp.tanh)(p | {"r": p["r"].T.T.T}, x),
        (),
        (positive(RECURRENT),),
        LOOP,
    ),
}


def turned_by_hand(params, degrees: Degrees, factors: np.ndarray):
    """Multiplies parameters unit by unit: an oracle that knows nothing of the library."""
    moved = dict(params)
    for (name, axis), degree in degrees.items():
        shape = [1] * moved[name].ndim
        shape[axis] = len(factors)
        moved[name] = array(np.asarray(moved[name]) * (factors**degree).reshape(shape))
    return moved


def change(fn: Callable[..., Any], before: Any, after: Any, x: Any = X) -> float:
    old, new = (np.asarray(fn(params, x)) for params in (before, after))
    return float(np.max(np.abs(new - old)) / np.max(np.abs(old)))


SCALES = np.array([0.5, 2, 1, 1.5, 0.7, 3])
SIGNS = np.array([-1.0, 1, 1, -1, -1, 1])


@pytest.mark.compatibility
@pytest.mark.parametrize("name", CLAIMS)
def test_all_that_is_claimed_changes_no_output(name: str):
    case = CLAIMS[name]
    params = normals(case.shapes, seed=1)
    params = {k: jnp.abs(v) if k == "var" else v for k, v in params.items()}
    symmetry = otf.trace_symmetry(case.fn, params, X)
    (freedom,) = [freedom for freedom in symmetry.freedoms if freedom.group == case.group]
    for found, expected, factors in (
        (freedom.scales, case.scales, SCALES),
        (freedom.signs, case.signs, SIGNS),
    ):
        named = []
        for scaling in found:
            named.append(
                {(symmetry.parts[leaf].path, axis): d for leaf, axis, d in scaling.degrees}
            )
        assert len(named) == len(expected)
        for degrees in expected:
            assert degrees in named
        for degrees in named:
            assert change(case.fn, params, turned_by_hand(params, degrees, factors)) < EXACT
    free = symmetry.with_signs().with_scales()
    assert otf.check_symmetry(free, case.fn, params, X) < EXACT


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A function whose units may not be scaled or turned around, though it may seem so.

    Attributes:
        fn: The function.
        degrees: What would have to be multiplied.
        factors: By what.
        shapes: The shapes of its parameters.
    """

    fn: Callable[..., Any]
    degrees: Degrees
    factors: np.ndarray
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: SHAPES)


def normalised(h):
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-5)


REFUSALS = {
    "scales of tanh": Refusal(hidden(lambda p, h: jnp.tanh(h)), UNITS, SCALES),
    "scales of GELU": Refusal(hidden(lambda p, h: jax.nn.gelu(h)), UNITS, SCALES),
    "scales of a clip at 1": Refusal(hidden(lambda p, h: jnp.clip(h, 0, 1)), UNITS, SCALES),
    "scales of ReLU6": Refusal(hidden(lambda p, h: jax.nn.relu6(4 * h)), UNITS, SCALES),
    "scales of ELU": Refusal(hidden(lambda p, h: jax.nn.elu(h)), UNITS, SCALES),
    "scales and a constant": Refusal(hidden(lambda p, h: jax.nn.relu(h) + 1.0), UNITS, SCALES),
    "scales of what is normalised": Refusal(
        hidden(lambda p, h: normalised(jax.nn.relu(h))), UNITS, SCALES
    ),
    "scales of weights that are spectrally normed": Refusal(
        read_by_normed(jax.nn.relu), UNITS, SCALES
    ),
    "scales of a softmax": Refusal(hidden(lambda p, h: jax.nn.softmax(h)), UNITS, SCALES),
    "scales of the norm of batches": Refusal(
        hidden(lambda p, h: jax.nn.relu(h * lax.rsqrt(jnp.var(h, 0) + 1.0))), UNITS, SCALES
    ),
    "scales of units that are also summed": Refusal(
        hidden(lambda p, h: jax.nn.relu(h) * jnp.sum(h, -1, keepdims=True)), UNITS, SCALES
    ),
    "scales of whole numbers": Refusal(
        hidden(lambda p, h: (3 * jax.nn.relu(h)).astype(int).astype(float)), UNITS, SCALES
    ),
    "scales of a gate": Refusal(gated(jax.nn.silu), {("w", 1): 1, ("v", 0): -1}, SCALES, TWO),
    "scales of a recurrent ReLU with a norm": Refusal(
        recurrent(lambda h: jax.nn.relu(normalised(h))), RECURRENT, SCALES, LOOP
    ),
    "signs of ReLU": Refusal(hidden(lambda p, h: jax.nn.relu(h)), UNITS, SIGNS),
    "signs of GELU": Refusal(hidden(lambda p, h: jax.nn.gelu(h)), UNITS, SIGNS),
    "signs of a sigmoid": Refusal(hidden(lambda p, h: jax.nn.sigmoid(h)), UNITS, SIGNS),
    "signs and a constant": Refusal(hidden(lambda p, h: jnp.tanh(h) + 0.5), UNITS, SIGNS),
    "signs of the largest of rows": Refusal(
        hidden(lambda p, h: jnp.max(jnp.tanh(h), 0, keepdims=True)), UNITS, SIGNS
    ),
    "signs of which is larger": Refusal(
        hidden(lambda p, h: jnp.where(h > 0, h, 0.5 * h)), UNITS, SIGNS
    ),
    "signs of units that are also summed": Refusal(
        hidden(lambda p, h: jnp.tanh(h) * jnp.sum(h, -1, keepdims=True)), UNITS, SIGNS
    ),
    "signs of a tanh without its bias": Refusal(
        hidden(lambda p, h: jnp.tanh(h - p["b"]) + jax.nn.relu(p["b"])), UNITS, SIGNS
    ),
    "signs of a product with even units": Refusal(
        hidden(lambda p, h: jnp.tanh(h) * jnp.exp(h)), UNITS, SIGNS
    ),
}


@pytest.mark.compatibility
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_would_change_the_output(name: str):
    case = REFUSALS[name]
    params = normals(case.shapes, seed=1)
    symmetry = otf.trace_symmetry(case.fn, params, X)
    touched = set(case.degrees)
    for freedom in symmetry.freedoms:
        for scaling in freedom.scales if np.all(case.factors > 0) else freedom.signs:
            claimed = {(symmetry.parts[leaf].path, axis) for leaf, axis, _ in scaling.degrees}
            assert claimed != touched
    moved = turned_by_hand(params, case.degrees, case.factors)
    assert change(case.fn, params, moved) > BROKEN


# A scale that starts from 0, as Gemma has them, is added to 1: its sum could be scaled, but it is
# the parameter that would have to be.
SHIFTED: Degrees = {("b", 0): 1, ("v", 0): -1}


@pytest.mark.compatibility
@pytest.mark.parametrize("act", [jax.nn.relu, jnp.tanh])
def test_what_1_is_added_to_is_not_scaled(act):
    def fn(p, x):
        return (act(x @ p["w"]) * (1 + p["b"])) @ p["v"]

    params = normals(SHAPES, seed=1)
    symmetry = otf.trace_symmetry(fn, params, X)
    (freedom,) = symmetry.freedoms
    for scaling in (*freedom.scales, *freedom.signs):
        assert all(symmetry.parts[leaf].path != "b" for leaf, _, _ in scaling.degrees)
    free = symmetry.with_signs().with_scales()
    assert otf.check_symmetry(free, fn, params, X) < EXACT
    assert change(fn, params, otf.canonicalize(free, params)) < EXACT
    assert change(fn, params, turned_by_hand(params, SHIFTED, SCALES)) > BROKEN


@pytest.mark.compatibility
def test_a_function_applied_at_positions_is_any_function():
    def fn(p, x):
        return (x @ p["w"]).at[0].apply(jnp.exp) @ p["v"]

    params = {name: normals(SHAPES, seed=1)[name] for name in ("w", "v")}
    (freedom,) = otf.trace_symmetry(fn, params, X).freedoms
    assert not freedom.rotates
    assert not freedom.scales
    assert not freedom.signs


@pytest.mark.compatibility
@pytest.mark.parametrize("write", [lambda h: h.at[0].set(0.0), lambda h: h.at[0].add(h[1])])
def test_what_is_set_or_added_at_positions_is_linear(write):
    params = {name: normals(SHAPES, seed=1)[name] for name in ("w", "v")}
    symmetry = otf.trace_symmetry(lambda p, x: write(x @ p["w"]) @ p["v"], params, X)
    assert symmetry.freedoms[0].linear


# --- recurrent cells


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        states: Any = nn.RNN(nn.LSTMCell(N), name="rnn")(x)
        return nn.Dense(3, name="head")(states[:, -1])


def test_the_cells_of_an_lstm_change_signs_and_its_gates_do_not():
    x = normal(2, 4, 3)
    model = Recurrent()
    params = model.init(jax.random.key(0), x)
    symmetry = otf.trace_symmetry(model.apply, params, x).with_signs()
    (group,) = symmetry.groups
    assert group.motion is Motion.SIGNED
    odd = {(member.path.split("/")[-2], member.axis) for member in group.members if member.odd}
    reads = {(f"h{gate}", 0) for gate in "ifgo"} | {("head", 0)}
    # Of the kernels by which a bias stands, the bias is on axis 0 as well.
    assert odd == reads | {("hg", 0), ("hg", 1), ("ig", 1)}
    biases = {m.path.split("/")[-2]: m.odd for m in group.members if m.path.endswith("bias")}
    assert biases == {"hi": False, "hf": False, "hg": True, "ho": False}
    assert otf.check_symmetry(symmetry, model.apply, params, x) < EXACT


def test_the_outputs_of_an_lstm_tell_signs_and_its_preactivations_do_not():
    x = normal(20, 4, 3)
    model = Recurrent()
    drawn = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), drawn)
    symmetry = otf.trace_symmetry(model.apply, params, x).with_signs()
    plans = symmetry.random(jax.random.key(1))
    other = otf.transport(symmetry, plans, params)
    grams = otf.feature_gram(symmetry, model.apply, params, other, [x], at="activation")
    found = otf.align(symmetry, params, other, grams=grams, method=otf.ForwardPass())
    for name, plan in plans.items():
        assert_array_equal(found.plans[name], plan)
    assert not otf.feature_gram(symmetry, model.apply, params, other, [x], at="preactivation")


# --- moving along signs


def deep_tanh(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]) @ p["v"]


DEEP = {"w": (3, 8), "b": (8,), "u": (8, 7), "v": (7, 4)}


def signed_pair():
    params = normals(DEEP, seed=1)
    symmetry = otf.trace_symmetry(deep_tanh, params, X).with_signs()
    plans = symmetry.random(jax.random.key(3))
    return symmetry, params, otf.transport(symmetry, plans, params), plans


@pytest.mark.parametrize("method", [otf.CoordinateDescent(), otf.ForwardPass()])
@pytest.mark.parametrize("jitted", [False, True])
def test_planted_signs_come_back(method, jitted):
    symmetry, a, b, plans = signed_pair()
    align = jax.jit(otf.align, static_argnames=("symmetry", "method")) if jitted else otf.align
    found = align(symmetry, a, b, method=method)
    assert {plan.dtype for plan in found.plans.values()} == {jnp.dtype(jnp.float32)}
    for name, plan in plans.items():
        assert_array_equal(found.plans[name], plan)
    assert_array_equal(otf.transport(symmetry, found, a)["u"], b["u"])
    assert_allclose(float(found.objective), 0, atol=1e-10)


def test_signs_come_back_from_features():
    symmetry, a, b, plans = signed_pair()
    grams = otf.feature_gram(symmetry, deep_tanh, a, b, [normal(50, 3)])
    found = otf.align(symmetry, a, b, grams=grams, method=otf.ForwardPass())
    for name, plan in plans.items():
        assert_array_equal(found.plans[name], plan)


def test_one_group_with_signs_is_an_assignment_of_absolute_values():
    from scipy.optimize import linear_sum_assignment

    symmetry, a, _, _ = signed_pair()
    b = normals(DEEP, seed=5)
    symmetry = symmetry.only(lambda name: name == "w")
    found = otf.align(symmetry, a, b).plans["w"]
    cross = np.asarray(a["w"]).T @ b["w"] + np.outer(a["b"], b["b"]) + np.asarray(a["u"]) @ b["u"].T
    rows, columns = linear_sum_assignment(-np.abs(cross))
    expected = np.zeros((8, 8))
    expected[rows, columns] = np.sign(cross[rows, columns])
    assert_array_equal(found, expected)


def test_signs_are_chained_and_turned_around():
    symmetry, a, b, plans = signed_pair()
    back = otf.transport(symmetry, otf.invert(symmetry, plans), b)
    other = symmetry.random(jax.random.key(9))
    both = otf.compose(symmetry, plans, other)
    for name in DEEP:
        assert_array_equal(back[name], a[name])
        assert_array_equal(
            otf.transport(symmetry, both, a)[name], otf.transport(symmetry, other, b)[name]
        )


def test_signs_are_fused_by_all_who_average():
    symmetry, a, b, _ = signed_pair()
    for fused in (otf.fuse(symmetry, [a, b]), otf.barycenter(symmetry, [a, b]).params):
        assert_allclose(deep_tanh(fused, X), deep_tanh(b, X), atol=1e-5)
    third = otf.transport(symmetry, symmetry.random(jax.random.key(4)), a)
    assert_allclose(deep_tanh(otf.fuse(symmetry, [a, third, b]), X), deep_tanh(a, X), atol=1e-5)


def test_what_cannot_have_signs_says_so():
    symmetry, a, b, plans = signed_pair()
    with pytest.raises(ValueError, match="w: a matrix that is not orthogonal"):
        otf.transport(symmetry, plans | {"w": jnp.full((8, 8), 1 / 8)}, a)
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    with pytest.raises(ValueError, match="w: a matrix of more than ones and minus ones"):
        otf.transport(symmetry, plans | {"w": array(q)}, a)
    with pytest.raises(ValueError, match="can't be rotated or change signs"):
        otf.transport_state(symmetry, plans, optax.adam(1e-3).init(a))
    plain = otf.trace_symmetry(deep_tanh, a, X)
    grams = otf.feature_gram(plain, deep_tanh, a, b, [X])
    with pytest.raises(ValueError, match="w: its units may change their signs"):
        otf.align(symmetry, a, b, grams=grams)
    masses = {"w": jnp.full(8, 1 / 8)}
    with pytest.raises(ValueError, match="permuted, with signs, which gives all"):
        otf.align(symmetry, a, b, marginals=(masses, {}), method=otf.ForwardPass())


# --- balancing


def relu_net(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w"] + p["b"]) @ p["u"]) @ p["v"]


@pytest.mark.compatibility
def test_balancing_finds_the_smallest_weights():
    params = normals(DEEP, seed=1)
    params["w"] = params["w"] * jnp.exp(normal(8))[None]
    symmetry = otf.trace_symmetry(relu_net, params, X).with_scales()
    assert otf.check_symmetry(symmetry, relu_net, params, X) < EXACT
    balanced = otf.canonicalize(symmetry, params)
    assert change(relu_net, params, balanced) < EXACT
    # Stationary: what produces a unit has the norm of what reads it.
    produced = np.sum(np.square(balanced["w"]), 0) + np.square(balanced["b"])
    assert_allclose(produced, np.sum(np.square(balanced["u"]), 1), rtol=1e-4)
    assert_allclose(
        np.sum(np.square(balanced["u"]), 0), np.sum(np.square(balanced["v"]), 1), rtol=1e-4
    )
    scaled = randomly_scaled(symmetry, params, jax.random.key(0))
    for again in (
        otf.canonicalize(symmetry, balanced),
        otf.canonicalize(symmetry, scaled),
        jax.jit(otf.canonicalize, static_argnums=0)(symmetry, params),
    ):
        for name, leaf in balanced.items():
            assert_allclose(again[name], leaf, rtol=2e-4, atol=1e-6)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), params, scaled)
    both = jax.vmap(lambda model: otf.canonicalize(symmetry, model))(stacked)
    assert_allclose(both["u"][1], balanced["u"], rtol=2e-4, atol=1e-6)


def test_what_one_layer_beside_a_stream_may_do_is_found_by_itself():
    def net(p, x):
        stream = x @ p["in"]
        for name in ("one", "two"):
            h = (stream @ p[name]["w"] - p[name]["mean"][None]) * p[name]["gain"][None]
            stream = jax.nn.relu(stream + h + p[name]["bias"][None])
        return stream @ p["out"]

    layer = {"w": (6, 6), **dict.fromkeys(("mean", "gain", "bias"), (6,))}
    layers = {"one": normals(layer, seed=2), "two": normals(layer, seed=3)}
    params = normals({"in": (5, 6), "out": (6, 3)}) | layers
    x = normal(7, 5, seed=1)
    symmetry = otf.trace_symmetry(net, params, x)
    (freedom,) = symmetry.freedoms
    found = []
    for scaling in freedom.scales:
        found.append({(symmetry.parts[leaf].path, axis): d for leaf, axis, d in scaling.degrees})
    for name in ("one", "two"):
        own = {(f"{name}/gain", 0): 1, (f"{name}/mean", 0): -1, (f"{name}/w", 1): -1}
        assert own in found
    assert len(found) == 3
    canonical = otf.canonicalize(symmetry.with_scales(), params)
    np.testing.assert_allclose(net(canonical, x), net(params, x), rtol=1e-3, atol=1e-4)
    for name in ("one", "two"):
        layer = canonical[name]
        made = np.sqrt(np.sum(layer["w"] ** 2, axis=0) + layer["mean"] ** 2)
        # The diagonal of `w` is scaled by the stream as well.
        np.testing.assert_allclose(made, np.abs(layer["gain"]), rtol=1e-4)


@pytest.mark.parametrize("sizes", [(1e10, 1e-10), (1e20, 1.0), (1e-30, 1.0)])
def test_any_sizes_are_balanced(sizes):
    params = normals({"w": (3, N), "v": (N, 4)}, seed=1)
    params = {"w": params["w"] * sizes[0], "v": params["v"] * sizes[1]}

    def fn(p, x):
        return jax.nn.relu(x @ p["w"]) @ p["v"]

    symmetry = otf.trace_symmetry(fn, params, X).with_scales()
    balanced = otf.canonicalize(symmetry, params)
    assert change(fn, params, balanced) < EXACT
    assert_allclose(np.linalg.norm(balanced["w"]), np.linalg.norm(balanced["v"]), rtol=1e-4)


def test_half_precision_is_balanced_beyond_the_range_of_its_scales():
    params = normals({"w": (3, N), "v": (N, 4)}, seed=1)
    params = {
        "w": (params["w"] * 1e-4).astype("float16"),
        "v": (params["v"] * 1e4).astype("float16"),
    }

    def fn(p, x):
        return jax.nn.relu(x.astype("float16") @ p["w"]) @ p["v"]

    symmetry = otf.trace_symmetry(fn, params, X).with_scales()
    balanced = otf.canonicalize(symmetry, params)
    assert balanced["w"].dtype == jnp.float16
    assert change(fn, params, balanced) < 0.05


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_what_goes_from_a_unit_to_itself_does_not_hold_it_back(size):
    def fn(p, x):
        h = jax.nn.relu(x @ p["w"] + p["b"])
        return jax.nn.relu(h @ p["r"]) @ p["r"] @ p["v"]

    params = normals(LOOP, seed=1)
    params["r"] = array(size * np.eye(N)) + 0.1 * params["r"]
    symmetry = otf.trace_symmetry(fn, params, X).with_scales()
    one = otf.canonicalize(symmetry, params)
    scaled = turned_by_hand(params, RECURRENT, SCALES)
    for other in (otf.canonicalize(symmetry, scaled), otf.canonicalize(symmetry, one)):
        for name, leaf in one.items():
            assert_allclose(other[name], leaf, rtol=1e-4, atol=1e-5 * float(jnp.abs(leaf).max()))


def test_matrices_and_scales_that_meet_settle_together():
    def fn(p, x):
        h = x @ p["a"]
        return (h + jax.nn.relu(h @ p["u"]) @ p["d"] + h @ p["q"] @ p["v"]) @ p["b"]

    shapes: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (5, 4), "u": (5, 6), "d": (6, 5)}
    params = normals(shapes | {"q": (5, 2), "v": (2, 5)}, seed=1)
    free = otf.trace_symmetry(fn, params, X).with_rotations().with_scales()
    once = otf.canonicalize(free, params)
    assert change(fn, params, once) < 3e-6
    for name, leaf in otf.canonicalize(free, once).items():
        assert_allclose(leaf, once[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [3, 300])
def test_matrices_of_a_chain_settle_to_rounding(ratio: float):
    """Singular values that differ in size are no harder: no Gram matrix squares the ratio."""

    def chain(p, x):
        return x @ p["a"] @ p["b"] @ p["c"] @ p["d"]

    x = normal(7, N)
    params = {}
    for number, name in enumerate("abcd"):
        left, _, right = np.linalg.svd(normal(N, N, seed=number))
        params[name] = array((left * np.geomspace(1, 1 / ratio, N)) @ right * 10.0 ** (number - 2))
    free = otf.trace_symmetry(chain, params, x).with_rotations().with_scales()
    once = otf.canonicalize(free, params)
    assert change(chain, params, once, x) < 3e-6
    for name, leaf in otf.canonicalize(free, once).items():
        assert_allclose(leaf, once[name], rtol=0, atol=2e-5 * float(jnp.abs(leaf).max()))


@pytest.mark.parametrize("dtypes", [("f4", "f4", "f8"), ("f8", "f4", "f4"), ("f4", "f8", "f4")])
def test_parameters_of_several_precisions_are_balanced_together(dtypes):
    with jax.enable_x64(True):
        shapes = {"a": (3, 5), "b": (5, 6), "c": (6, 4)}
        params = normals(shapes, seed=1)
        for name, dtype in zip(shapes, dtypes, strict=True):
            params[name] = params[name].astype(dtype)

        def fn(p, x):
            for name in "abc":
                x = jax.nn.relu(x.astype(p[name].dtype) @ p[name])
            return x

        balanced = otf.canonicalize(otf.trace_symmetry(fn, params, X).with_scales(), params)
        assert [leaf.dtype for leaf in balanced.values()] == list(dtypes)
        assert change(fn, params, balanced) < 3e-6


def test_dead_units_stay_as_they_are():
    params = normals(DEEP, seed=1)
    params["w"] = params["w"].at[:, 0].set(0)
    params["b"] = params["b"].at[0].set(0)
    symmetry = otf.trace_symmetry(relu_net, params, X).with_scales()
    balanced = otf.canonicalize(symmetry, params)
    assert_array_equal(balanced["w"][:, 0], 0)
    assert all(np.isfinite(leaf).all() for leaf in balanced.values())
    assert change(relu_net, params, balanced) < EXACT


def bottleneck(p, x):
    return (x @ p["down"]) @ p["up"]


def test_two_matrices_share_their_product_evenly():
    params = normals({"down": (9, 4), "up": (4, 7)}, seed=1)
    params["down"] = params["down"] @ normal(4, 4)
    x = normal(5, 9)
    symmetry = otf.trace_symmetry(bottleneck, params, x)
    (freedom,) = symmetry.freedoms
    assert freedom.linear
    free = symmetry.with_rotations().with_scales()
    assert "linear" in str(free)
    assert "linear, 16 dimensions" in symmetry.summary()
    assert otf.check_symmetry(free, bottleneck, params, x) < EXACT
    even = otf.canonicalize(free, params)
    assert change(bottleneck, params, even, x) < 3e-6
    down, up = np.asarray(even["down"]), np.asarray(even["up"])
    assert_allclose(down.T @ down, up @ up.T, rtol=0, atol=1e-5 * np.max(down.T @ down))
    # The nuclear norm of the product, twice: no factors have a smaller sum of squares.
    product = np.asarray(params["down"]) @ params["up"]
    assert_allclose(np.sum(down**2) + np.sum(up**2), 2 * np.linalg.norm(product, "nuc"), rtol=1e-4)
    # Another model of the same product is the same, up to a rotation.
    other = randomly_scaled(free, params, jax.random.key(1))
    found = otf.align(free, otf.canonicalize(free, other), even)
    assert float(found.objective) < 1e-6 * float(np.sum(down**2))


@pytest.mark.parametrize("sizes", [(1e-20, 1e-20), (1e18, 1e18), (1e-18, 1e18), (1e15, 1e-20)])
def test_matrices_of_any_size_share_their_product_evenly(sizes):
    params = normals({"down": (9, 4), "up": (4, 7)}, seed=1)
    free = otf.trace_symmetry(bottleneck, params, normal(5, 9)).with_rotations().with_scales()
    plain = otf.canonicalize(free, params)
    scaled = {name: params[name] * size for name, size in zip(params, sizes, strict=True)}
    even = otf.canonicalize(free, scaled)
    for name, leaf in plain.items():
        # Both sides have the same share of the size of the product.
        size = np.sqrt(sizes[0]) * np.sqrt(sizes[1])
        assert_allclose(np.float64(even[name]) / size, leaf, rtol=0, atol=3e-6)


def test_matrices_without_an_inverse_stay_as_they_are():
    params = normals({"down": (9, 4), "up": (4, 7)}, seed=1)
    params["down"] = params["down"].at[:, 0].set(params["down"][:, 1])
    x = normal(5, 9)
    free = otf.trace_symmetry(bottleneck, params, x).with_rotations().with_scales()
    assert_array_equal(otf.canonicalize(free, params)["down"], params["down"])


def test_without_freedoms_these_are_the_same_symmetry():
    params = normals(SHAPES)
    symmetry = otf.trace_symmetry(hidden(lambda p, h: jax.nn.gelu(h)), params, X)
    assert symmetry.with_signs().with_scales() == symmetry
    assert otf.canonicalize(symmetry.with_scales(), params)["w"] is params["w"]


def side_by_side(p, x):
    """Units of two groups along one axis."""
    left, right = jax.nn.relu(x @ p["left"]), jax.nn.relu(x @ p["right"])
    return jnp.concatenate([left, right], axis=-1) @ p["out"]


def test_units_side_by_side_are_balanced_each_on_their_own():
    params = normals({"left": (3, 5), "right": (3, 6), "out": (11, 4)}, seed=1)
    params["left"] = 100 * params["left"]
    symmetry = otf.trace_symmetry(side_by_side, params, X).with_scales()
    balanced = otf.canonicalize(symmetry, params)
    assert change(side_by_side, params, balanced) < EXACT
    # As with a parameter of its own for each of them.
    for name, rows in {"left": slice(0, 5), "right": slice(5, 11)}.items():
        norms = np.linalg.norm(balanced[name], axis=0)
        assert_allclose(norms, np.linalg.norm(balanced["out"][rows], axis=1), rtol=1e-4)
    for name, leaf in otf.canonicalize(symmetry, balanced).items():
        assert_allclose(leaf, balanced[name], rtol=1e-5, atol=1e-6)


def test_a_stream_that_grows_block_by_block_stays_finite():
    def fn(p, x):
        h = x @ p["in"]
        for number in range(2):
            gate = p[f"gate{number}"].reshape(1, -1)
            new = jax.nn.relu(jax.nn.relu(h * gate) @ p[f"new{number}"])
            h = jnp.concatenate([h, new], axis=-1)
        return h @ p["out"]

    shapes = {"in": (3, 4), "gate0": (4,), "new0": (4, 5), "gate1": (9,), "new1": (9, 6)}
    params = normals(shapes | {"out": (15, 2)}, seed=1)
    symmetry = otf.trace_symmetry(fn, params, X).with_scales()
    balanced = otf.canonicalize(symmetry, params)
    assert change(fn, params, balanced) < 1e-4


def test_scales_that_are_made_1_are_not_balanced_against_what_stays():
    """A scale in front of a branch and behind it, beside an offset and a linear pair."""

    def fn(p, x):
        h = x @ p["in"]
        v = h * p["scale"][None] + p["bias"][None]
        u = ((v @ p["up"] + p["inner"][None]) @ p["down"]) * p["scale"][None]
        return (u + h) @ p["out"]

    shapes = {"in": (3, 5), "scale": (5,), "bias": (5,), "up": (5, 7), "inner": (7,)}
    params = normals(shapes | {"down": (7, 5), "out": (5, 2)})
    x = normals({"x": (3, 3)})["x"]
    symmetry = otf.trace_symmetry(fn, params, x).with_scales()
    once = otf.canonicalize(symmetry, params)
    np.testing.assert_allclose(fn(once, x), fn(params, x), rtol=1e-3, atol=1e-4)
    again = otf.canonicalize(symmetry, once)
    for name, balanced in again.items():
        np.testing.assert_allclose(balanced, once[name], rtol=1e-3, atol=1e-4)
