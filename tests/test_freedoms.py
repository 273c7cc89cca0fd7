"""Checks which units may be rotated, against the functions themselves.

Where rotations are claimed, random ones must change no output. Where they are refused, rotating the
units by hand has to change it, even by a matrix that fixes the vector of ones: the refusal is then
no whim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import array, normals
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import otfusion_jax as otf
from otfusion_jax.tracing import registry

D, ROWS, HEADS, K = 6, 5, 2, 4
"""The width of the stream, the rows of the input, the heads and what is in each."""

EXACT = 1e-4
BROKEN = 1e-2

Shapes = dict[str, tuple[int, ...]]
Axes = dict[str, tuple[int, ...]]

STREAM = {"embed": (3, D), "read": (D, 4)}
SCALED = STREAM | {"scale": (D,)}
NORM = SCALED | {"bias": (D,)}
SQUARE = STREAM | {"m": (D, D)}
ALONG: Axes = {"embed": (1,), "read": (0,)}
"""Where the units of the stream are."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A function of `(params, x)` whose stream may be rotated.

    Attributes:
        fn: The function.
        shapes: The shapes of its parameters.
        fixes_ones: Whether rotations have to fix the vector of ones.
        folds: The parameters that have to be 1.
        group: The group in question.
    """

    fn: Callable[..., Any]
    shapes: Shapes = dataclasses.field(default_factory=lambda: STREAM)
    fixes_ones: bool = False
    folds: tuple[str, ...] = ()
    group: str = "embed"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A function of `(params, x)` whose stream may not be rotated, though it may seem so.

    Attributes:
        fn: The function.
        shapes: The shapes of its parameters.
        axes: By the names of parameters the axes along which the units are.
        group: The group in question; None if the units do not even move.
        fixes_ones: Whether the matrix that shows why fixes the vector of ones.
    """

    fn: Callable[..., Any]
    shapes: Shapes = dataclasses.field(default_factory=lambda: STREAM)
    axes: Axes = dataclasses.field(default_factory=lambda: ALONG)
    group: str | None = "embed"
    fixes_ones: bool = True


@pytest.fixture(autouse=True)
def rank_promotion():
    """Lets the functions below be written as they are in the world, with `h * scale`."""
    with jax.numpy_rank_promotion("allow"):
        yield


# --- what functions are made of


def rms(h):
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


def centred(h):
    return h - jnp.mean(h, -1, keepdims=True)


def layer_norm(h):
    return rms(centred(h))


def on_stream(middle):
    """A function that embeds, does something to the stream, and reads it."""

    def fn(p, x):
        return middle(p, x @ p["embed"]) @ p["read"]

    return fn


def row_by_row(middle):
    """A function as `on_stream`, where what is done depends on the rows of the input as well."""
    return lambda p, x: middle(p, x, x @ p["embed"]) @ p["read"]


def repeated(step, start):
    """Goes through a loop three times."""
    return lax.scan(lambda carry, _: (step(carry), None), start, None, length=3)[0]


def attention(of_queries=lambda p, q: q, of_keys=lambda p, k: k, of_logits=lambda p, q, k: 0):
    def fn(p, x):
        h = x @ p["embed"]
        q, k, v = (jnp.einsum("td,dhk->thk", h, p[name]) for name in ("q", "k", "v"))
        q, k = of_queries(p, q), of_keys(p, k)
        logits = jnp.einsum("thk,shk->hts", q, k) / 4 + of_logits(p, q, k)
        mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(logits), v)
        return (h + jnp.einsum("thk,hkd->td", mixed, p["out"])) @ p["read"]

    return fn


KERNELS = dict.fromkeys(("q", "k", "v"), (D, HEADS, K))
ATTENTION: Shapes = STREAM | KERNELS | {"out": (HEADS, K, D)}
PER_UNIT = ATTENTION | {"c": (K,)}
INNER: Axes = {"q": (2,), "k": (2,)}


def per_unit_bias(p, q, k):
    """A bias of the logits for each head and key, from a vector that keys are multiplied with."""
    return jnp.einsum("shk,k->hs", k, p["c"])[:, None]


def rope(p, x):
    """Turns pairs of units by angles that grow with the position."""
    angle = array(np.arange(ROWS))[:, None, None] * array([1, 0.1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :2], x[..., 2:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


IMAGES: Shapes = {"embed": (1, 1, 3, D), "inner": (3, 3, D, D), "read": (1, 1, D, 4)}
IMAGE_AXES: Axes = {"embed": (3,), "inner": (2, 3), "read": (2,)}


def conv(x, kernel, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def on_images(middle):
    def fn(p, x):
        h = conv(x.reshape(1, ROWS, 1, 3), p["embed"])
        return conv(middle(p, h + conv(h, p["inner"])), p["read"])

    return fn


def group_norm(h):
    grouped = h.reshape(*h.shape[:-1], 2, D // 2)
    grouped = grouped - jnp.mean(grouped, (-3, -1), keepdims=True)
    grouped = grouped * lax.rsqrt(jnp.mean(grouped**2, (-3, -1), keepdims=True) + 1e-6)
    return grouped.reshape(h.shape)


def pooled(h, how, start):
    return lax.reduce_window(h, start, how, (1, 2, 1, 1), (1, 2, 1, 1), "VALID")


def either(p, x, one, other):
    """Takes one branch, and then the other one, so that both matter on any input."""
    both = [lax.cond(x[0, 0] > 0, *pair) for pair in ((one, other), (other, one))]
    return both[0] + 2 * both[1]


def bent(x):
    return 2 * jnp.tanh(x)


def unknown(name: str) -> Primitive:
    """A primitive that bends units, which the library knows nothing of."""
    primitive = Primitive(name)
    primitive.def_impl(bent)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, mlir.lower_fun(bent, multiple_results=False))
    return primitive


TWICE_TANH, TWICE = unknown("twice_tanh"), unknown("twice")


def twice_tanh(ctx, values):
    """Elementwise, for all that permutations need to know."""
    return [ctx.join(values)]


def twice(ctx, values):
    """Says by a linear function how units go through; it is not what the primitive computes."""
    jaxpr = jax.make_jaxpr(lambda x: 2 * x)(*[var.aval for var in ctx.eqn.invars])
    return ctx.call(jaxpr, values)


BRANCH = STREAM | {"up": (D, 7), "down": (7, D), "gamma": (D,)}
DEEP = BRANCH | {"b": (D,), "scale": (D,), "bias": (D,), "up_2": (D, 7), "down_2": (7, D)}
DEEP |= {"gamma_2": (D,), "scale_2": (D,), "last": (D,)}


def branch(p, h):
    """What is added to a stream, times a number for each unit, as LayerScale has them."""
    return p["gamma"] * (jnp.tanh(h @ p["up"]) @ p["down"])


def form(p, x, y):
    return jnp.einsum("ti,ij,tj->t", x, p["m"], y)


def deep(norm, first=0):
    """Two branches with a scale in front and behind, to which a number may be added."""

    def middle(p, h):
        at = {key: first + p[key] if first else p[key] for key in ("gamma", "scale", "scale_2")}
        y = norm(h) * at["scale"] + p["bias"]
        h = h + at["gamma"] * (jnp.tanh(y @ p["up"]) @ p["down"] + p["b"])
        y = norm(h) * at["scale_2"]
        h = h + (jnp.tanh(y @ p["up_2"]) @ p["down_2"]) * p["gamma_2"]
        return norm(h) * p["last"]

    return on_stream(middle)


DEEP_SCALES = ("gamma", "gamma_2", "last", "scale", "scale_2")


def spectrally_normed(h):
    """Divides by the largest singular value, as a matrix of rows and columns has it."""
    return h / jnp.linalg.norm(h, 2)


# --- where units may be rotated

CLAIMS = {
    "linear": Claim(on_stream(lambda p, h: h)),
    "RMSNorm": Claim(on_stream(lambda p, h: rms(h))),
    "RMSNorm by powers": Claim(
        on_stream(lambda p, h: h * (jnp.mean(h**2.0, -1, keepdims=True) + 1e-6) ** -0.5)
    ),
    "RMSNorm of absolute values": Claim(
        on_stream(lambda p, h: h / jnp.sqrt(jnp.mean(jnp.abs(h) ** 2, -1, keepdims=True) + 1e-6))
    ),
    "L2 norm": Claim(on_stream(lambda p, h: h / jnp.linalg.norm(h, axis=-1, keepdims=True))),
    "LayerNorm": Claim(on_stream(lambda p, h: layer_norm(h)), fixes_ones=True),
    "a scale that starts from 0": Claim(
        on_stream(lambda p, h: rms(h) * (1 + p["scale"])), SCALED, folds=("scale",)
    ),
    "a bias that 1 is added to": Claim(
        on_stream(lambda p, h: h + (1 + p["scale"])), SCALED, fixes_ones=True
    ),
    "variance in one pass": Claim(
        on_stream(lambda p, h: centred(h) / jnp.sqrt(jnp.mean(h * h) - jnp.mean(h) ** 2)),
        fixes_ones=True,
    ),
    "RMSNorm with a scale": Claim(
        on_stream(lambda p, h: rms(h) * p["scale"]), SCALED, folds=("scale",)
    ),
    "LayerNorm with scale and bias": Claim(
        on_stream(lambda p, h: layer_norm(h) * p["scale"] + p["bias"]), NORM, True, ("scale",)
    ),
    "a scale with an axis of size 1 in front": Claim(
        on_stream(lambda p, h: rms(h) * p["scale"]), STREAM | {"scale": (1, D)}, folds=("scale",)
    ),
    "a scale used twice": Claim(
        on_stream(lambda p, h: rms(h) * p["scale"] * p["scale"]), SCALED, folds=("scale",)
    ),
    "a scale before a norm": Claim(
        on_stream(lambda p, h: rms(h * p["scale"])), SCALED, folds=("scale",)
    ),
    "a scale in a branch": Claim(
        row_by_row(
            lambda p, x, h: either(p, x, lambda: rms(h) * p["scale"], lambda: h * p["scale"])
        ),
        SCALED,
        folds=("scale",),
    ),
    "a scale behind a branch, and one in front of the output": Claim(
        on_stream(lambda p, h: (h + branch(p, h)) * p["scale"]),
        BRANCH | {"scale": (D,)},
        folds=("gamma", "scale"),
    ),
    "scales in front of branches and behind": Claim(deep(rms), DEEP, folds=DEEP_SCALES),
    "scales around a LayerNorm": Claim(deep(layer_norm), DEEP, True, DEEP_SCALES),
    "scales in front and behind that start from 0": Claim(deep(rms, 1), DEEP, folds=DEEP_SCALES),
    "one scale in front and behind": Claim(
        on_stream(lambda p, h: (h + branch(p, rms(h) * p["gamma"])) * p["gamma"]),
        BRANCH,
        folds=("gamma",),
    ),
    "a vector that is normed, times a scale": Claim(
        on_stream(lambda p, h: h + rms(p["bias"]) * p["scale"]), NORM, folds=("scale",)
    ),
    "a scale in front of weights back to the stream": Claim(
        on_stream(lambda p, h: h + (h * p["scale"]) @ p["m"]), SQUARE | SCALED, folds=("scale",)
    ),
    "scales on both sides of weights back to the stream": Claim(
        on_stream(
            lambda p, h: rms(h) + ((layer_norm(h) * p["scale"] + p["bias"]) @ p["m"].T) * p["last"]
        ),
        SQUARE | NORM | {"last": (D,)},
        True,
        ("last", "scale"),
    ),
    "one scale on both sides of weights back to the stream": Claim(
        on_stream(lambda p, h: rms(h) + ((rms(h) * p["scale"]) @ p["m"]) * p["scale"]),
        SQUARE | SCALED,
        folds=("scale",),
    ),
    "scales of a bilinear form": Claim(
        on_stream(lambda p, h: form(p, h * p["scale"], h * p["bias"])[:, None] * h),
        SQUARE | NORM,
        folds=("bias", "scale"),
    ),
    "a scale in a loop that goes round": Claim(
        on_stream(
            lambda p, h: repeated(
                lambda c: c / 2 + (c * p["scale"]) @ p["m"] + h, jnp.zeros((ROWS, D))
            )
        ),
        SQUARE | SCALED,
        folds=("scale",),
    ),
    "a scale in front of a convolution back to the stream": Claim(
        on_images(lambda p, h: h + conv(rms(h) * p["scale"], p["next"]) * p["last"]),
        IMAGES | {"next": (3, 3, D, D), "scale": (D,), "last": (D,)},
        folds=("last", "scale"),
    ),
    "batch statistics that are subtracted": Claim(on_stream(lambda p, h: h - jnp.mean(h, 0))),
    "half precision": Claim(
        on_stream(lambda p, h: (0 * h.astype(jnp.bfloat16)).astype(jnp.float32) + h)
    ),
    "rows that are masked": Claim(row_by_row(lambda p, x, h: jnp.where(x[:, :1] > 0, h, 0.0))),
    "rows that are set to a constant": Claim(
        row_by_row(lambda p, x, h: jnp.where(x[:, :1] > 0, h, 2.0)), fixes_ones=True
    ),
    "rows beyond the last, NaN": Claim(on_stream(lambda p, h: jnp.take(h, array([0, 2], int), 0))),
    "rows beyond the last, filled": Claim(
        on_stream(lambda p, h: h.at[array([0, 9], int)].get(mode="fill", fill_value=5.0)),
        fixes_ones=True,
    ),
    "running sums over rows": Claim(on_stream(lambda p, h: jnp.cumsum(h, 0))),
    "attention between rows": Claim(on_stream(lambda p, h: jax.nn.softmax(h @ h.T) @ h)),
    "a matrix of units": Claim(on_stream(lambda p, h: h @ (h.T @ h))),
    "a matrix and its transpose": Claim(
        on_stream(lambda p, h: h @ (p["m"] + p["m"].T)), STREAM | {"m": (D, D)}
    ),
    "a matrix that is spectrally normed": Claim(
        on_stream(lambda p, h: h @ spectrally_normed(p["m"])), SQUARE
    ),
    "a matrix of units to themselves, spectrally normed": Claim(
        on_stream(lambda p, h: h + h @ spectrally_normed(p["m"])), SQUARE
    ),
    "singular values of features": Claim(on_stream(lambda p, h: spectrally_normed(h))),
    "singular values with a scale": Claim(
        on_stream(
            lambda p, h: (
                (rms(h) * p["scale"]) @ p["m"] / jnp.linalg.norm(p["scale"][:, None] * p["m"], 2)
            )
        ),
        SQUARE | {"scale": (D,)},
        folds=("scale",),
    ),
    "an outer product": Claim(
        on_stream(lambda p, h: jnp.einsum("ni,nj,ijk->nk", h, h, p["m"])),
        STREAM | {"m": (D, D, D)},
    ),
    "constants beside units, read as more of them": Claim(
        on_stream(
            lambda p, h: jnp.concatenate([h, 3 * jnp.ones((ROWS, D))], 1).reshape(ROWS, 2, D).sum(1)
        ),
        fixes_ones=True,
    ),
    "a loop from zeros": Claim(
        on_stream(lambda p, h: repeated(lambda c: c / 2 + h, jnp.zeros((ROWS, D))))
    ),
    "a loop from ones": Claim(
        on_stream(lambda p, h: repeated(lambda c: c / 2 + h, jnp.ones((ROWS, D)))), fixes_ones=True
    ),
    "squares, summed in a loop": Claim(
        on_stream(
            lambda p, h: h / repeated(lambda c: c + h * h, jnp.ones_like(h)).sum(1, keepdims=True)
        )
    ),
    "a norm in a loop's condition": Claim(
        on_stream(lambda p, h: lax.while_loop(lambda c: jnp.sum(c * c) < 900, lambda c: 2 * c, h))
    ),
    "a gradient": Claim(on_stream(lambda p, h: jax.grad(lambda h: jnp.sum(rms(h) * h))(h))),
    "a barrier, with whole numbers beside": Claim(
        on_stream(lambda p, h: lax.optimization_barrier((h, jnp.arange(3)))[0])
    ),
    "checkpoint": Claim(on_stream(lambda p, h: jax.checkpoint(rms)(h))),
    "convolutions around a skip": Claim(on_images(lambda p, h: h), IMAGES),
    "average pooling": Claim(on_images(lambda p, h: pooled(h, lax.add, 0.0)), IMAGES),
    "the stream of attention": Claim(attention(), ATTENTION),
    "queries and keys": Claim(attention(), ATTENTION, group="q#2"),
    "values": Claim(attention(), ATTENTION, group="v"),
    "values beside RoPE": Claim(attention(rope, rope), ATTENTION, group="v"),
    "queries that are normalised": Claim(
        attention(lambda p, q: rms(q), lambda p, k: rms(k)), ATTENTION, group="q#2"
    ),
    "a bias of queries": Claim(attention(lambda p, q: q + p["c"]), PER_UNIT, group="q#2"),
    # The vector is rotated along with the keys, whose product with it is what it was.
    "a bias of logits from a vector": Claim(
        attention(of_logits=per_unit_bias), PER_UNIT, group="q#2"
    ),
}


# --- where they may not

REFUSALS = {
    "ReLU": Refusal(on_stream(lambda p, h: jax.nn.relu(h))),
    "a LayerNorm that a nonlinearity reads": Refusal(
        on_stream(lambda p, h: jnp.tanh(layer_norm(h) * p["scale"] + p["bias"])),
        NORM,
        ALONG | {"bias": (0,)},
    ),
    "a bias that a nonlinearity reads": Refusal(
        on_stream(lambda p, h: layer_norm(h) + jnp.tanh(p["bias"])),
        STREAM | {"bias": (D,)},
        ALONG | {"bias": (0,)},
    ),
    "sums of absolute values, squared": Refusal(
        on_stream(lambda p, h: h / (1 + jnp.sum(jnp.sum(jnp.abs(h), 0) ** 2)))
    ),
    "running sums of absolute values, squared": Refusal(
        on_stream(lambda p, h: h * jnp.sum(jnp.cumsum(jnp.abs(h), 0) ** 2, -1, keepdims=True))
    ),
    "a norm of the third power": Refusal(
        on_stream(lambda p, h: h / (1 + jnp.mean(jnp.abs(h) ** 3.0, -1, keepdims=True)))
    ),
    "a scale that a nonlinearity reads": Refusal(
        on_stream(lambda p, h: rms(h) * jnp.exp(p["scale"])), SCALED
    ),
    "a scale that is read by its sum as well": Refusal(
        on_stream(lambda p, h: rms(h) * p["scale"] + jnp.sum(p["scale"])), SCALED
    ),
    "a scaled norm that is added to its input": Refusal(
        on_stream(lambda p, h: rms(h) * p["scale"] + h), SCALED
    ),
    "an embedding that is tied, with a scale": Refusal(
        lambda p, x: (rms(x @ p["embed"]) * p["scale"]) @ p["embed"].T,
        {"embed": (3, D), "scale": (D,)},
        {"embed": (1,)},
    ),
    "batch norm": Refusal(on_stream(lambda p, h: h * lax.rsqrt(jnp.var(h, 0)))),
    "softmax over the units": Refusal(on_stream(lambda p, h: jax.nn.softmax(h))),
    "a norm of absolute values": Refusal(
        on_stream(lambda p, h: h / jnp.sum(jnp.abs(h), -1, keepdims=True))
    ),
    "a clip at 1": Refusal(on_stream(lambda p, h: jnp.clip(h, -1, 1))),
    "squares that are read": Refusal(on_stream(lambda p, h: h * h)),
    "a quantised cast": Refusal(
        on_stream(lambda p, h: (4 * h).astype(jnp.int8).astype(jnp.float32))
    ),
    "a cast to 8 bits": Refusal(
        on_stream(lambda p, h: h.astype(jnp.float8_e4m3fn).astype(jnp.float32))
    ),
    "8 bits by another way": Refusal(on_stream(lambda p, h: lax.reduce_precision(h, 4, 3))),
    "a product in 8 bits": Refusal(
        lambda p, x: (
            lax.dot(x, p["embed"], preferred_element_type=jnp.float8_e4m3fn).astype(jnp.float32)
            @ p["read"]
        )
    ),
    "a mask of units": Refusal(on_stream(lambda p, h: h * array(np.arange(D) > 2)), group=None),
    "the first units": Refusal(lambda p, x: (x @ p["embed"])[:, :3] @ p["read"][:3], group=None),
    "the largest of some rows": Refusal(on_stream(lambda p, h: jnp.max(h, 0, keepdims=True))),
    "rows in order, unit by unit": Refusal(on_stream(lambda p, h: jnp.sort(h, 0)[1:])),
    "one unit to the next": Refusal(on_stream(lambda p, h: h - jnp.roll(h, 1, 1)), group=None),
    "attention between units": Refusal(on_stream(lambda p, h: h @ jax.nn.softmax(h.T @ h))),
    "sums of each unit with each": Refusal(
        on_stream(
            lambda p, h: h * jnp.einsum("nij,ij->n", h[:, :, None] + h[:, None], p["m"])[:, None]
        ),
        STREAM | {"m": (D, D)},
        ALONG | {"m": (0, 1)},
        fixes_ones=False,
    ),
    "a scale beside the singular values of what would take it": Refusal(
        on_stream(lambda p, h: (rms(h) * p["scale"]) @ spectrally_normed(p["m"])),
        SQUARE | {"scale": (D,)},
        {"embed": (1,), "m": (0,)},
    ),
    "singular values of squares": Refusal(
        on_stream(lambda p, h: h / jnp.linalg.norm(p["m"] ** 2, 2) @ p["m"]),
        SQUARE,
        {"embed": (1,), "m": (0,)},
    ),
    "singular values of a matrix for each unit": Refusal(
        on_stream(lambda p, h: h * jnp.linalg.norm(p["m"], 2, (1, 2))),
        STREAM | {"m": (D, 3, 2)},
        ALONG | {"m": (0,)},
    ),
    "a matrix that is squared": Refusal(
        on_stream(lambda p, h: h @ (p["m"] * p["m"])),
        STREAM | {"m": (D, D)},
        ALONG | {"m": (0, 1)},
    ),
    "a diagonal": Refusal(
        on_stream(lambda p, h: h * jnp.diagonal(p["m"]) + h @ p["m"]),
        STREAM | {"m": (D, D)},
        ALONG | {"m": (0, 1)},
        group=None,
    ),
    "branches along different axes": Refusal(
        row_by_row(
            lambda p, x, h: (
                h
                @ either(
                    p,
                    x,
                    lambda: jnp.broadcast_to(h[0][:, None], (D, D)),
                    lambda: jnp.broadcast_to(h[0], (D, D)),
                )
            )
        ),
        fixes_ones=False,
    ),
    "a branch with a nonlinearity": Refusal(
        row_by_row(lambda p, x, h: either(p, x, lambda: h, lambda: jnp.tanh(h)))
    ),
    "a loop that is linear the first time alone": Refusal(
        on_stream(lambda p, h: repeated(lambda c: c * c + h, jnp.zeros((ROWS, D))))
    ),
    # Made 1, the scale is the same at all units as the loop starts, and never again.
    "a loop that starts from a scale": Refusal(
        on_stream(
            lambda p, h: rms(h) * p["scale"] + repeated(lambda c: c * c * p["bias"], p["scale"])
        ),
        NORM,
    ),
    "two scales in front of the same weights back to the stream": Refusal(
        on_stream(
            lambda p, h: rms(h) + (rms(h) * p["scale"]) @ p["m"] + (rms(h) * p["bias"]) @ p["m"]
        ),
        SQUARE | NORM,
        ALONG | {"m": (0, 1)},
    ),
    "a scale in front of weights and of their transpose": Refusal(
        on_stream(lambda p, h: rms(h) + (rms(h) * p["scale"]) @ p["m"] + layer_norm(h) @ p["m"].T),
        SQUARE | SCALED,
        ALONG | {"m": (0, 1)},
    ),
    "a scale in front of weights whose rows are added, too": Refusal(
        on_stream(lambda p, h: rms(h) + (rms(h) * p["scale"]) @ p["m"] + p["m"].sum(0)),
        SQUARE | SCALED,
        ALONG | {"m": (0, 1)},
    ),
    "a scale in front of spectrally normed weights": Refusal(
        on_stream(lambda p, h: rms(h) + (rms(h) * p["scale"]) @ spectrally_normed(p["m"])),
        SQUARE | SCALED,
        ALONG | {"m": (0, 1)},
    ),
    "two scales behind the same weights": Refusal(
        on_stream(
            lambda p, h: (h + branch(p, h) + p["bias"] * branch(p | {"gamma": 1}, h)) * p["scale"]
        ),
        BRANCH | NORM,
        ALONG | {"up": (0,), "down": (1,)},
    ),
    "a scale behind a branch, and a bias at once": Refusal(
        on_stream(lambda p, h: rms((h + branch(p, h)) * p["scale"]) + p["gamma"]),
        BRANCH | {"scale": (D,)},
        ALONG | {"up": (0,), "down": (1,)},
    ),
    "a scale behind a branch, and a nonlinearity": Refusal(
        on_stream(lambda p, h: jnp.tanh(h + branch(p, h)) * p["scale"]),
        BRANCH | {"scale": (D,)},
        ALONG | {"up": (0,), "down": (1,)},
    ),
    "a scale that 1 is added to, and that is read as it is": Refusal(
        on_stream(lambda p, h: rms(h) * (1 + p["scale"]) + rms(h) * p["scale"]), SCALED
    ),
    "a scale that is less than 1 by a parameter": Refusal(
        on_stream(lambda p, h: rms(h) * (1 - p["scale"])), SCALED
    ),
    "a scale that 2 is added to": Refusal(
        on_stream(lambda p, h: rms(h) * (2 + p["scale"])), SCALED
    ),
    "products with vectors in a loop": Refusal(
        on_stream(lambda p, h: repeated(lambda c: c * p["scale"], h)), SCALED
    ),
    "custom_jvp": Refusal(on_stream(lambda p, h: jax.nn.silu(jax.nn.relu(h)))),
    "a primitive of one's own": Refusal(on_stream(lambda p, h: TWICE_TANH.bind(h))),
    "a rule of one's own that calls": Refusal(on_stream(lambda p, h: TWICE.bind(h))),
    "max pooling of a stream": Refusal(
        on_images(lambda p, h: pooled(h, lax.max, -jnp.inf)), IMAGES, IMAGE_AXES
    ),
    "GroupNorm and a nonlinearity": Refusal(
        on_stream(lambda p, h: jax.nn.relu(group_norm(h))), STREAM, ALONG
    ),
    "a convolution of each channel": Refusal(
        on_images(lambda p, h: conv(h, p["each"], groups=D)),
        IMAGES | {"each": (3, 3, 1, D)},
        IMAGE_AXES | {"each": (3,)},
    ),
    "queries with a scale for each dimension": Refusal(
        attention(lambda p, q: rms(q) * p["c"], lambda p, k: rms(k)), PER_UNIT, INNER, "q#2"
    ),
    "RoPE": Refusal(attention(rope, rope), ATTENTION, INNER, None),
    "queries and keys that are bent": Refusal(
        attention(lambda p, q: jnp.tanh(q), lambda p, k: jnp.tanh(k)), ATTENTION, INNER, "q#2"
    ),
    "values that are bent": Refusal(
        lambda p, x: (
            attention(lambda p, q: q)(p, x) + jnp.tanh(x @ p["embed"] @ p["v"][:, 0])[:, :4]
        ),
        ATTENTION,
        {"v": (2,), "out": (1,)},
        None,
    ),
}


def drawn(shapes: Shapes) -> dict[str, jax.Array]:
    return normals(shapes, seed=1)


X = normals({"x": (ROWS, 3)}, seed=2)["x"]


@functools.cache
def rotating(fn: Callable[..., Any], items: tuple[tuple[str, tuple[int, ...]], ...]):
    return otf.trace_symmetry(fn, drawn(dict(items)), X).with_rotations()


def symmetry_of(case: Claim | Refusal) -> otf.Symmetry:
    return rotating(case.fn, tuple(case.shapes.items()))


def orthogonal(n: int, fixes_ones: bool) -> np.ndarray:
    """Reflects by a vector: at right angles to the ones if these are to be fixed."""
    normal = np.random.default_rng(n).standard_normal(n)
    if fixes_ones:
        normal -= normal.mean()
    return np.eye(n) - 2 * np.outer(normal, normal) / (normal @ normal)


def along(leaf: jax.Array, axes: tuple[int, ...], matrix: np.ndarray) -> jax.Array:
    """Multiplies an array by a matrix along axes: an oracle that knows nothing of the library."""
    moved = np.asarray(leaf)
    for axis in axes:
        moved = np.moveaxis(np.tensordot(moved, matrix, (axis, 0)), -1, axis)
    return array(moved)


def change(fn: Callable[..., Any], before: Any, after: Any) -> float:
    old, new = (np.asarray(fn(params, X)) for params in (before, after))
    return float(np.max(np.abs(new - old)) / np.max(np.abs(old)))


@pytest.fixture(autouse=True)
def rules_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    # Other tests go through all rules that there are.
    monkeypatch.setitem(registry._registry, TWICE_TANH, twice_tanh)
    monkeypatch.setitem(registry._registry, TWICE, twice)


# --- what is claimed


@pytest.mark.compatibility
@pytest.mark.parametrize("name", CLAIMS)
def test_claimed_rotations_change_no_output(name: str):
    case = CLAIMS[name]
    symmetry = symmetry_of(case)
    group = symmetry[case.group]
    assert (group.rotates, group.fixes_ones) == (True, case.fixes_ones)
    (freedom,) = [freedom for freedom in symmetry.freedoms if freedom.group == case.group]
    assert tuple(fold.path for fold in freedom.folds) == case.folds
    params = drawn(case.shapes)
    assert otf.check_symmetry(symmetry, case.fn, params, X) < EXACT


NEED_ONES = [name for name, case in CLAIMS.items() if case.fixes_ones]


@pytest.mark.parametrize("name", NEED_ONES)
def test_ones_are_fixed_where_that_matters(name: str):
    case = CLAIMS[name]
    symmetry = symmetry_of(case)
    params = otf.canonicalize(symmetry, drawn(case.shapes))
    group = symmetry[case.group]
    moved = dict(params)
    for member in group.members:
        moved[member.path] = along(moved[member.path], (member.axis,), orthogonal(D, False))
    assert change(case.fn, params, moved) > BROKEN


@pytest.mark.compatibility
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_would_change_the_output(name: str):
    case = REFUSALS[name]
    symmetry = symmetry_of(case)
    if case.group is None:
        units = {(path, axis) for path, axes in case.axes.items() for axis in axes}
        for group in symmetry.groups:
            touched = {(member.path, member.axis) for member in group.members}
            assert not (group.rotates and touched & units)
    else:
        assert not symmetry[case.group].rotates
        (freedom,) = [freedom for freedom in symmetry.freedoms if freedom.group == case.group]
        assert freedom.reason
    params = drawn(case.shapes)
    moved = dict(params)
    for path, axes in case.axes.items():
        size = params[path].shape[axes[0]]
        moved[path] = along(params[path], axes, orthogonal(size, case.fixes_ones))
    assert change(case.fn, params, moved) > BROKEN


@pytest.mark.parametrize("name", [*CLAIMS, *REFUSALS])
def test_all_that_is_claimed_beside_it_holds_as_well(name: str):
    case = (CLAIMS | REFUSALS)[name]
    assert otf.check_symmetry(symmetry_of(case), case.fn, drawn(case.shapes), X) < EXACT


# --- scales of stacked layers


LAYERS = STREAM | {"scales": (3, D), "up": (3, D, 7), "down": (3, 7, D), "last": (D,)}


def layered(
    block: Callable[..., Any], after: Callable[..., Any] = lambda p, h, collected: h
) -> Callable[..., Any]:
    """A stream that goes through stacked layers: `block` gives what each adds, and collects."""

    def fn(p, x):
        def body(h, layer):
            added, collected = block(p, h, layer)
            return h + added, collected

        stacked = ("scales", "up", "down", "gammas", "b")
        h, collected = lax.scan(body, x @ p["embed"], {k: p[k] for k in stacked if k in p})
        return rms(after(p, h, collected)) * p["last"] @ p["read"]

    return fn


def normed(h: jax.Array, layer: Any) -> jax.Array:
    return rms(h) * layer["scales"]


def hidden(y: jax.Array, layer: Any) -> jax.Array:
    return jnp.tanh(y @ layer["up"]) @ layer["down"]


def hidden_at_each(y: jax.Array, layer: Any) -> jax.Array:
    """A hidden layer with weights of its own for each row."""
    return jnp.einsum(
        "tk,tkd->td", jnp.tanh(jnp.einsum("td,tdk->tk", y, layer["up"])), layer["down"]
    )


def test_scales_of_stacked_layers_are_folded_layer_by_layer():
    fn = layered(lambda p, h, layer: (hidden(normed(h, layer), layer), None))
    params = drawn(LAYERS)
    symmetry = otf.trace_symmetry(fn, params, X)
    folds = {fold.path: fold.layered for fold in symmetry.freedoms[0].folds}
    assert folds == {"scales": True, "last": False}
    canonical = otf.canonicalize(symmetry, params)
    assert (canonical["scales"] == 1).all()
    expected = params["up"] * params["scales"][:, :, None]
    np.testing.assert_allclose(canonical["up"], expected, rtol=1e-6)
    assert otf.check_symmetry(symmetry.with_rotations(), fn, params, X) < EXACT


def test_scales_of_stacked_layers_are_folded_in_front_and_behind():
    fn = layered(
        lambda p, h, layer: (layer["gammas"] * (hidden(normed(h, layer), layer) + layer["b"]), None)
    )
    params = drawn(LAYERS | {"gammas": (3, D), "b": (3, D)})
    # As some are that start from 0, or are pruned.
    params["gammas"] = params["gammas"].at[1, 2].set(0)
    symmetry = otf.trace_symmetry(fn, params, X)
    folds = {fold.path: fold.layered for fold in symmetry.freedoms[0].folds}
    assert folds == {"gammas": True, "scales": True, "last": False}
    canonical = otf.canonicalize(symmetry, params)
    for name in folds:
        np.testing.assert_array_equal(canonical[name], 1)
    expected = params["down"] * params["gammas"][:, None]
    mean = expected.mean(-1, keepdims=True) if symmetry.freedoms[0].unread_means else 0
    np.testing.assert_allclose(canonical["down"], expected - mean, rtol=1e-6)
    assert otf.check_symmetry(symmetry.with_rotations(), fn, params, X) < EXACT


def test_scales_of_stacked_layers_go_into_weights_back_to_the_stream():
    def fn(p, x):
        def body(h, layer):
            return h + ((rms(h) * layer["scales"]) @ layer["w"].T) * layer["gammas"], None

        h, _ = lax.scan(body, x @ p["embed"], {k: p[k] for k in ("scales", "w", "gammas")})
        return h @ p["read"]

    params = drawn(STREAM | {"scales": (3, D), "gammas": (3, D), "w": (3, D, D)})
    symmetry = otf.trace_symmetry(fn, params, X)
    assert all(fold.layered for fold in symmetry.freedoms[0].folds)
    canonical = otf.canonicalize(symmetry, params)
    expected = params["gammas"][:, :, None] * params["w"] * params["scales"][:, None]
    np.testing.assert_allclose(canonical["w"], expected, rtol=1e-6)
    assert otf.check_symmetry(symmetry.with_rotations(), fn, params, X) < EXACT


ENSEMBLE = {key: (2, *shape) for key, shape in DEEP.items()}


@pytest.mark.compatibility
@pytest.mark.parametrize("norm", [rms, layer_norm])
def test_scales_of_an_ensemble_are_folded_network_by_network(norm: Callable[..., Any]):
    of_one = deep(norm, 1)
    fn = jax.vmap(of_one, (0, None))
    params = drawn(ENSEMBLE)
    symmetry = otf.trace_symmetry(fn, params, X)
    (freedom,) = [freedom for freedom in symmetry.freedoms if freedom.group == "embed"]
    assert freedom.rotates
    assert tuple(fold.path for fold in freedom.folds) == DEEP_SCALES
    canonical = otf.canonicalize(symmetry, params)
    assert change(fn, params, canonical) < EXACT
    alone = {key: leaf[1] for key, leaf in params.items()}
    alone = otf.canonicalize(otf.trace_symmetry(of_one, alone, X), alone)
    np.testing.assert_allclose(canonical["down"][1], alone["down"], rtol=1e-5, atol=1e-6)
    again = otf.canonicalize(symmetry, canonical)
    jax.tree.map(np.testing.assert_array_equal, again, canonical)
    rotating = symmetry.with_rotations()
    assert otf.Symmetry.from_json(rotating.to_json()) == rotating
    assert otf.check_symmetry(rotating, fn, params, X) < EXACT
    moved = otf.transport(rotating, rotating.random(jax.random.key(0)), canonical)
    assert change(fn, params, otf.fuse(rotating, [params, moved])) < EXACT


def networks_mixed(p, y):
    return y + jnp.einsum("erd,ef->frd", y, p["mix"])


@pytest.mark.parametrize(
    "after", [lambda p, y: jnp.roll(y, 1, 0), lambda p, y: y + y.sum(0), networks_mixed]
)
def test_scales_of_an_ensemble_whose_networks_meet_stay(after: Callable[..., Any]):
    def fn(p, x):
        h = jnp.einsum("ri,eid->erd", x, p["embed"])
        return jnp.einsum("erd,edo->ero", after(p, rms(h) * p["scale"][:, None]), p["read"])

    params = drawn({key: (2, *shape) for key, shape in SCALED.items()} | {"mix": (2, 2)})
    symmetry = otf.trace_symmetry(fn, params, X)
    assert not any(freedom.rotates for freedom in symmetry.freedoms)
    assert otf.check_symmetry(symmetry, fn, params, X) < EXACT
    # Rotated network by network, and the scales in the weights that read them, it is another one.
    params["scale"] = jnp.ones_like(params["scale"])
    moved = dict(params)
    for key, axis in (("embed", 1), ("read", 0)):
        turned = along(params[key][1], (axis,), orthogonal(D, False))
        moved[key] = params[key].at[1].set(turned)
    assert change(fn, params, moved) > BROKEN


def test_scales_of_stacked_layers_for_each_position_stay():
    fn = layered(lambda p, h, layer: (hidden_at_each(normed(h, layer), layer), None))
    params = drawn(
        LAYERS | {"scales": (3, ROWS, D), "up": (3, ROWS, D, 7), "down": (3, ROWS, 7, D)}
    )
    symmetry = otf.trace_symmetry(fn, params, X)
    assert not symmetry["embed"].rotates
    assert not symmetry.freedoms[0].rotates
    np.testing.assert_array_equal(otf.canonicalize(symmetry, params)["scales"], params["scales"])


def test_the_scale_of_a_branch_goes_into_its_weights_whatever_the_names():
    def fn(p, x):
        h = x @ p["a"]
        h = h + p["scale"] * (jnp.tanh(h @ p["b"]) @ p["c"])
        return (h * p["last"]) @ p["d"]

    shapes = {"a": (3, D), "b": (D, 7), "c": (7, D), "d": (D, 4), "scale": (D,), "last": (D,)}
    params = drawn(shapes)
    params["scale"] = params["scale"].at[0].set(0)
    symmetry = otf.trace_symmetry(fn, params, X)
    # Divided out of all else that is added, it could not be 0.
    canonical = otf.canonicalize(symmetry, params)
    np.testing.assert_array_equal(canonical["c"], params["c"] * params["scale"])
    np.testing.assert_array_equal(canonical["a"], params["a"])
    assert otf.check_symmetry(symmetry.with_rotations(), fn, params, X) < EXACT


def test_models_with_scales_in_front_and_behind_are_fused():
    fn, params = deep(rms), drawn(DEEP)
    symmetry = otf.trace_symmetry(fn, params, X).with_rotations()
    again = otf.canonicalize(symmetry, params)
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(0)), again)
    assert change(fn, params, otf.fuse(symmetry, [params, moved])) < EXACT
    once_more = otf.canonicalize(symmetry, again)
    jax.tree.map(np.testing.assert_array_equal, once_more, again)


def test_scales_that_1_is_added_to_become_0():
    fn = layered(
        lambda p, h, layer: (hidden(rms(h) * (1 + layer["scales"]), layer), None),
    )
    params = drawn(LAYERS)
    symmetry = otf.trace_symmetry(fn, params, X)
    canonical = otf.canonicalize(symmetry, params)
    assert (canonical["scales"] == 0).all()
    assert (canonical["last"] == 1).all()
    np.testing.assert_allclose(fn(canonical, X), fn(params, X), rtol=1e-4, atol=1e-4)
    rotating = symmetry.with_rotations()
    assert otf.check_symmetry(rotating, fn, params, X) < EXACT
    with pytest.raises(ValueError, match=r"\n  scales: up to .* from 0"):
        otf.transport(rotating, {}, params)


IN_ANOTHER_LAYER = {
    "collected, and read by one matrix for all": layered(
        lambda p, h, layer: (hidden(h, layer), normed(h, layer)),
        lambda p, h, collected: h + collected.sum(0) @ p["embed"].T @ p["embed"],
    ),
    "carried on": layered(lambda p, h, layer: (normed(h, layer), None)),
    "read by a matrix that is not stacked": layered(
        lambda p, h, layer: (jnp.tanh(normed(h, layer) @ p["read"]) @ p["read"].T, None)
    ),
}


@pytest.mark.parametrize("name", IN_ANOTHER_LAYER)
def test_scales_that_another_layer_would_see_stay(name: str):
    fn = IN_ANOTHER_LAYER[name]
    params = drawn(LAYERS)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert not symmetry["embed"].rotates
    assert not symmetry.with_rotations()["embed"].rotates


def test_a_count_that_starts_from_0_is_a_number_after():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, h: h + 0.1 * i, x @ p["embed"]) @ p["read"]

    symmetry = otf.trace_symmetry(fn, drawn(STREAM), X).with_rotations()
    assert symmetry["embed"].fixes_ones
    assert otf.check_symmetry(symmetry, fn, drawn(STREAM), X) < EXACT


def test_matrices_of_other_layers_than_the_scales_are_left_alone():
    def fn(p, x):
        def body(h, layer):
            return h + hidden(normed(h, layer), layer), None

        shifted = {"scales": p["scales"], "up": jnp.roll(p["up"], 1, axis=0), "down": p["down"]}
        h, _ = lax.scan(body, x @ p["embed"], shifted)
        return h @ p["read"]

    params = {name: leaf for name, leaf in drawn(LAYERS).items() if name != "last"}
    symmetry = otf.trace_symmetry(fn, params, X)
    assert not symmetry.with_rotations()["embed"].rotates


# --- dropout, several functions, dtypes


def test_a_mask_that_is_an_input_keeps_its_units():
    def dropout(p, x, mask):
        return jnp.where(mask, x @ p["embed"], 0) @ p["read"]

    params = drawn(STREAM)
    mask = array(np.random.default_rng(0).random((ROWS, D)) > 0.5, bool)
    symmetry = otf.trace_symmetry(dropout, params, X, mask)
    assert "embed" not in symmetry
    # Of whole rows it says nothing of single units.
    symmetry = otf.trace_symmetry(dropout, params, X, mask[:, :1]).with_rotations()
    assert symmetry["embed"].rotates
    assert otf.check_symmetry(symmetry, dropout, params, X, mask[:, :1]) < EXACT


def test_what_one_of_several_functions_does_counts():
    linear = on_stream(lambda p, h: h)
    bending = on_stream(lambda p, h: jnp.tanh(h))
    centring = on_stream(lambda p, h: layer_norm(h))
    params = drawn(STREAM)
    symmetry = otf.trace_symmetry([(linear, (X,)), (bending, (X,))], params)
    assert not symmetry.with_rotations().rotates
    functions = [(linear, (X,)), (centring, (X,))]
    symmetry = otf.trace_symmetry(functions, params).with_rotations()
    assert symmetry["embed"].rotates
    assert symmetry["embed"].fixes_ones
    assert otf.check_symmetry(symmetry, functions, params) < EXACT


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_parameters_of_few_bits_are_not_rotated(dtype: str):
    def fn(p, x):
        return (rms(x @ p["embed"]) * p["scale"]) @ p["read"].astype(jnp.float32)

    params = drawn(SCALED)
    params["read"] = params["read"].astype(dtype)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert not symmetry.with_rotations().rotates
    assert otf.check_symmetry(symmetry, fn, params, X) < EXACT


def test_complex_scales_are_folded_into_complex_weights_alone():
    def fn(p, x):
        h = rms(x @ p["embed"]).astype(jnp.complex64)
        return (h * p["scale"]) @ p["read"].astype(jnp.complex64)

    params = drawn(SCALED)
    params["scale"] = normals({"scale": (D,)}, dtype=np.complex64)["scale"] * 1j
    assert not otf.trace_symmetry(fn, params, X).with_rotations().rotates
    params["read"] = lax.complex(params["read"], 1 - params["read"])
    symmetry = otf.trace_symmetry(fn, params, X).with_rotations()
    assert symmetry["embed"].rotates
    assert otf.check_symmetry(symmetry, fn, params, X) < EXACT
    params["scale"] = array(np.full(D, 1 + 0.5j), np.complex64)
    with pytest.raises(ValueError, match="scale: up to 0.5 from 1"):
        otf.transport(symmetry, {}, params)


# --- what is said of freedoms


def test_reasons_name_the_primitive_and_the_line():
    case = REFUSALS["a clip at 1"]
    (freedom,) = symmetry_of(case).freedoms
    assert freedom.reason is not None
    assert freedom.reason.startswith(("max at", "min at", "clamp at"))
    assert "test_freedoms.py" in freedom.reason
    # Two that differ in the line alone are equal.
    assert freedom == dataclasses.replace(freedom, reason="somewhere else")


def test_heads_are_not_mixed_with_each_other():
    symmetry = symmetry_of(CLAIMS["queries and keys"])
    assert [group.name for group in symmetry.groups if not group.rotates] == [symmetry["v"].outer]
    assert symmetry["q#2"].batch == (HEADS,)


def test_a_symmetry_without_rotations_is_what_it_was():
    case = CLAIMS["LayerNorm with scale and bias"]
    symmetry = otf.trace_symmetry(case.fn, drawn(case.shapes), X)
    assert not symmetry.rotates
    plans = symmetry.random(jax.random.key(0))
    assert all(jnp.issubdtype(plan.dtype, jnp.integer) for plan in plans.values())
    with_rotations = symmetry.with_rotations()
    assert with_rotations != symmetry
    assert with_rotations.with_rotations() == with_rotations


# --- complex scales


def complex_rms(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.mean(jnp.real(x * jnp.conj(x)), -1, keepdims=True))
    return x / norm.astype(x.dtype)


@pytest.mark.parametrize(
    ("part", "folds"), [(lambda v: v, 1), (jnp.conj, 0), (lambda v: jnp.real(v).astype(v.dtype), 0)]
)
def test_complex_scales_are_folded_where_nothing_conjugates_what_they_scale(part, folds):
    """Behind a conjugation, the weights would have to be multiplied by the scale's conjugate."""

    def fn(p, x):
        return jnp.abs(part(complex_rms(x @ p["in"]) * p["scale"][None]) @ p["out"])

    parts = normals({"in": (2, 3, 5), "scale": (2, 5), "out": (2, 5, 4)})
    params = {name: lax.complex(*part) for name, part in parts.items()}
    x = normals({"x": (4, 3)})["x"].astype(jnp.complex64)
    symmetry = otf.trace_symmetry(fn, params, x)
    assert [len(freedom.folds) for freedom in symmetry.freedoms] == [folds]
    for allowed in (symmetry.with_rotations(), symmetry.with_rotations().with_scales()):
        canonical = otf.canonicalize(allowed, params)
        np.testing.assert_allclose(fn(canonical, x), fn(params, x), rtol=1e-4)
        assert otf.check_symmetry(allowed, fn, canonical, x) < 1e-4
