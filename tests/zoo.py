"""Small networks with tables, written by hand, of which parameter axes belong together.

The tables are the oracle of the tracer's tests, and so were worked out on paper from what each
network computes. Tests import this as `from zoo import CASES`: pytest puts this folder on the path.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arrays import array, uniform
from flax import linen as nn
from flax import nnx

from otfusion_jax.symmetry.groups import Group
from otfusion_jax.symmetry.symmetry import Symmetry

Row = tuple[str, int, int, int, str, int, int]
Groups = dict[str, set[Row]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network: `fn(params, *inputs)`, random values, and its groups.

    `groups` maps the name of a group to `(path, axis, before, after, role, start, pitch)` of each
    member: unit `u` is at the positions `start + b * pitch + u * after + a` of the axis. A pitch of
    0 means that nothing lies in between, `size * after`. `nested` maps the name of a nested group
    to the group around it, if that can be permuted, and its batch.
    """

    name: str
    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    groups: Groups
    nested: dict[str, tuple[str | None, tuple[int, ...]]]


def randomise(tree: Any, seed: int) -> Any:
    """Fills the floating leaves of a pytree with values that no permutation leaves as they are.

    Kernels are scaled by their fan-in, so that activations neither vanish nor grow; scales are
    around 1 and variances positive. Other leaves stay.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        draw = rng.standard_normal(leaf.shape)
        if "var" in name:
            value = 0.5 + np.abs(draw)
        elif "scale" in name:
            value = 1 + 0.3 * draw
        else:
            value = draw / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        return array(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def rolled(symmetry: Symmetry, params: Any) -> Any:
    """Transport by `numpy.roll`: every unit moves, each group by another step.

    The units of nested groups move by another step in each index around, outer groups first.
    """
    leaves, treedef = jax.tree.flatten(params)
    leaves = [np.array(leaf) for leaf in leaves]
    groups = sorted(enumerate(symmetry.groups), key=lambda pair: pair[1].outer is not None)
    for i, group in groups:
        for m in group.members:
            indices = np.indices(leaves[m.leaf].shape)
            found = np.zeros(group.batch or (1,), int)
            for index in np.ndindex(*found.shape):
                step = 1 + (i + sum(index)) % (group.size - 1)
                chosen = np.ones(leaves[m.leaf].shape, bool)
                for (axis, _, place), size, j in zip(
                    m.location.batch, group.batch, index, strict=False
                ):
                    chosen &= np.isin(indices[axis], place.positions(size)[:, j])
                positions = m.location.index.positions(group.size)
                sources = np.arange(m.location.length)
                sources[positions] = np.roll(positions, step, axis=1)
                moved = np.take(leaves[m.leaf], sources, axis=m.axis)
                leaves[m.leaf] = np.where(chosen, moved, leaves[m.leaf])
    return treedef.unflatten(jax.device_put(leaves))


def relative(a: Any, b: Any) -> float:
    """The largest difference, in units of the largest value of the first."""
    a, b = np.asarray(a), np.asarray(b)
    return float(abs(a - b).max() / abs(a).max())


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], tuple]) -> Callable[[], Case]:
    """Decorator: adds a network to `CASES` under its function's name, built on first use.

    The function returns what a `Case` holds after its name; `nested` may be left out.
    """
    name = build.__name__

    @functools.cache
    def cached() -> Case:
        fn, like, inputs, groups, *nested = build()
        params = randomise(like, zlib.crc32(name.encode()))
        return Case(name, jax.jit(fn), params, inputs, groups, *(nested or [{}]))

    CASES[name] = cached
    return cached


def shapes(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def linen(module: nn.Module, *inputs: jax.Array) -> tuple[Callable, Any, tuple]:
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))
    return module.apply, variables, inputs


def makes(
    path: str, axis: int, before: int = 1, after: int = 1, start: int = 0, pitch: int = 0
) -> Row:
    return path, axis, before, after, "produces", start, pitch


def takes(
    path: str, axis: int, before: int = 1, after: int = 1, start: int = 0, pitch: int = 0
) -> Row:
    return path, axis, before, after, "consumes", start, pitch


def rows_of(group: Group) -> set[Row]:
    """The members that a trace found, in the form of the tables."""
    rows = set()
    for m in group.members:
        place = m.location.index
        pitches = [stride for _, stride in place.outer]
        pitch = pitches[-1] if pitches and pitches[-1] != group.size * place.after else 0
        assert len(pitches) <= 1, "the tables have no form for this"
        rows.add((m.path, m.axis, m.before, m.after, m.role, place.start, pitch))
    return rows


def layer(path: str, axis: int) -> set[Row]:
    """Output axis of a kernel, and the bias next to it."""
    return {makes(f"params/{path}/kernel", axis), makes(f"params/{path}/bias", 0)}


def norm(path: str, statistics: bool = False) -> set[Row]:
    rows = {makes(f"params/{path}/scale", 0), makes(f"params/{path}/bias", 0)}
    if statistics:
        rows |= {makes(f"batch_stats/{path}/{name}", 0) for name in ("mean", "var")}
    return rows


# --- multi-layer perceptrons, in three frameworks


class MLPNet(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for width in (8, 6):
            x = nn.relu(nn.Dense(width, use_bias=self.bias)(x))
        return nn.Dense(3, use_bias=self.bias)(x)


@case
def mlp():
    return *linen(MLPNet(), uniform(4, 2, 3)), {
        "params/Dense_0/kernel": layer("Dense_0", 1) | {takes("params/Dense_1/kernel", 0)},
        "params/Dense_1/kernel": layer("Dense_1", 1) | {takes("params/Dense_2/kernel", 0)},
    }


@case
def mlp_without_bias():
    return *linen(MLPNet(bias=False), uniform(4, 2, 3)), {
        "params/Dense_0/kernel": {
            makes("params/Dense_0/kernel", 1),
            takes("params/Dense_1/kernel", 0),
        },
        "params/Dense_1/kernel": {
            makes("params/Dense_1/kernel", 1),
            takes("params/Dense_2/kernel", 0),
        },
    }


@case
def mlp_plain():
    def fn(params, x):
        *hidden, (w, b) = params
        for v, c in hidden:
            x = jax.nn.relu(x @ v + c[None])
        return x @ w + b[None]

    sizes = (6, 8, 6, 3)
    params = [
        tuple(shapes(w=(n, m), b=(m,)).values()) for n, m in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    return (
        fn,
        params,
        (uniform(4, 6),),
        {
            "0/0": {makes("0/0", 1), makes("0/1", 0), takes("1/0", 0)},
            "1/0": {makes("1/0", 1), makes("1/1", 0), takes("2/0", 0)},
        },
    )


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.second = nnx.Linear(8, 6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


@case
def mlp_nnx():
    graph, state = nnx.split(nnx.eval_shape(lambda: NNXNet(nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)

    def fn(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    return (
        fn,
        params,
        (uniform(4, 6),),
        {
            "first/kernel": {
                makes("first/kernel", 1),
                makes("first/bias", 0),
                takes("second/kernel", 0),
            },
            "second/kernel": {
                makes("second/kernel", 1),
                makes("second/bias", 0),
                takes("last/kernel", 0),
            },
        },
    )


# --- convolutional networks


class VGG(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (4, 6):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


@case
def vgg():
    return *linen(VGG(), uniform(2, 8, 8, 3)), {
        "params/Conv_0/kernel": layer("Conv_0", 3) | {takes("params/Conv_1/kernel", 2)},
        "params/Conv_1/kernel": layer("Conv_1", 3)
        | {takes("params/Dense_0/kernel", 0, before=2 * 2)},
        "params/Dense_0/kernel": layer("Dense_0", 1) | {takes("params/Dense_1/kernel", 0)},
    }


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def conv(name, width, stride=1, size=3):
            return nn.Conv(width, (size, size), strides=stride, use_bias=False, name=name)

        def bn(name):
            return nn.BatchNorm(use_running_average=True, name=name)

        x = nn.relu(bn("bn_in")(conv("conv_in", 4)(x)))
        y = nn.relu(bn("bn_a1")(conv("conv_a1", 5)(x)))
        x = nn.relu(x + bn("bn_a2")(conv("conv_a2", 4)(y)))
        y = nn.relu(bn("bn_b1")(conv("conv_b1", 7, 2)(x)))
        y = bn("bn_b2")(conv("conv_b2", 6)(y))
        x = nn.relu(bn("bn_skip")(conv("conv_skip", 6, 2, 1)(x)) + y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@case
def resnet():
    def conv(name):
        return makes(f"params/{name}/kernel", 3)

    def into(name):
        return takes(f"params/{name}/kernel", 2)

    return *linen(ResNet(), uniform(2, 8, 8, 3)), {
        "params/conv_in/kernel": {conv("conv_in"), conv("conv_a2")}
        | norm("bn_in", True)
        | norm("bn_a2", True)
        | {into("conv_a1"), into("conv_b1"), into("conv_skip")},
        "params/conv_a1/kernel": {conv("conv_a1"), into("conv_a2")} | norm("bn_a1", True),
        "params/conv_b1/kernel": {conv("conv_b1"), into("conv_b2")} | norm("bn_b1", True),
        # The stream of the second stage; of its two sources the main branch is computed first.
        "params/conv_b2/kernel": {conv("conv_b2"), conv("conv_skip")}
        | norm("bn_b2", True)
        | norm("bn_skip", True)
        | {takes("params/head/kernel", 0)},
    }


class DepthwiseSeparable(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="depthwise")(x))
        x = nn.relu(nn.Conv(6, (1, 1), name="pointwise")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@case
def depthwise_separable():
    # Each of 4 channels makes 2 of its own: the 8 are [4, 2].
    return (
        *linen(DepthwiseSeparable(), uniform(2, 6, 6, 3)),
        {
            "params/stem/kernel": layer("stem", 3)
            | {
                makes("params/depthwise/kernel", 3, after=2),
                makes("params/depthwise/bias", 0, after=2),
                takes("params/pointwise/kernel", 2, after=2),
            },
            "params/depthwise/kernel": {
                makes("params/depthwise/kernel", 3, before=4),
                makes("params/depthwise/bias", 0, before=4),
                takes("params/pointwise/kernel", 2, before=4),
            },
            "params/pointwise/kernel": layer("pointwise", 3) | {takes("params/head/kernel", 0)},
        },
        {"params/depthwise/kernel": ("params/stem/kernel", (4,))},
    )


class GroupedConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
        shape = x.shape
        x = x.reshape(*shape[:3], 2, 4)
        x = x - x.mean((1, 2, 4), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean((1, 2, 4), keepdims=True) + 1e-3)
        scale = self.param("scale", nn.initializers.ones, (8,))
        shift = self.param("shift", nn.initializers.zeros, (8,))
        x = nn.relu(x.reshape(shape) * scale[None, None, None] + shift[None, None, None])
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@case
def grouped_conv_group_norm():
    # Whole groups may be swapped, and the channels within each, and so may what they make.
    return (
        *linen(GroupedConv(), uniform(2, 6, 6, 3)),
        {
            "params/stem/kernel": {
                makes("params/stem/kernel", 3, after=3),
                makes("params/stem/bias", 0, after=3),
                makes("params/grouped/kernel", 3, after=4),
                makes("params/grouped/bias", 0, after=4),
                makes("params/scale", 0, after=4),
                makes("params/shift", 0, after=4),
                takes("params/head/kernel", 0, after=4),
            },
            "params/stem/kernel#2": {
                makes("params/stem/kernel", 3, before=2),
                makes("params/stem/bias", 0, before=2),
                takes("params/grouped/kernel", 2),
            },
            "params/grouped/kernel": {
                makes("params/grouped/kernel", 3, before=2),
                makes("params/grouped/bias", 0, before=2),
                makes("params/scale", 0, before=2),
                makes("params/shift", 0, before=2),
                takes("params/head/kernel", 0, before=2),
            },
        },
        {
            "params/stem/kernel#2": ("params/stem/kernel", (2,)),
            "params/grouped/kernel": ("params/stem/kernel", (2,)),
        },
    )


class SqueezeExcite(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        s = nn.relu(nn.Dense(4, name="squeeze")(x.mean((1, 2))))
        s = nn.sigmoid(nn.Dense(6, name="excite")(s))
        return nn.Dense(3, name="head")((x * s[:, None, None]).max((1, 2)))


@case
def squeeze_excite():
    return *linen(SqueezeExcite(), uniform(2, 6, 6, 3)), {
        "params/conv/kernel": layer("conv", 3)
        | layer("excite", 1)
        | {takes("params/squeeze/kernel", 0), takes("params/head/kernel", 0)},
        "params/squeeze/kernel": layer("squeeze", 1) | {takes("params/excite/kernel", 0)},
    }


class Pooled(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4
        return nn.Dense(3)(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))


@case
def average_pool_channels_first():
    # Flattened channels first, as PyTorch does: the units are the outer factor of the axis.
    return *linen(Pooled(), uniform(2, 4, 4, 3)), {
        "params/Conv_0/kernel": layer("Conv_0", 3)
        | {takes("params/Dense_0/kernel", 0, after=2 * 2)},
    }


# --- streams, ties, factors


class ResidualMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        for i, width in enumerate((6, 5)):
            y = nn.Dense(width, name=f"up{i}")(nn.LayerNorm(name=f"ln{i}")(x))
            x = x + nn.Dense(8, name=f"down{i}")(nn.gelu(y))
        return nn.Dense(3, name="head")(nn.LayerNorm(name="ln")(x))


@case
def residual_layer_norm():
    stream = layer("embed", 1) | norm("ln") | {takes("params/head/kernel", 0)}
    for i in range(2):
        stream |= layer(f"down{i}", 1) | norm(f"ln{i}") | {takes(f"params/up{i}/kernel", 0)}
    return *linen(ResidualMLP(), uniform(4, 6)), {
        "params/embed/kernel": stream,
        "params/up0/kernel": layer("up0", 1) | {takes("params/down0/kernel", 0)},
        "params/up1/kernel": layer("up1", 1) | {takes("params/down1/kernel", 0)},
    }


class PreActivation(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="embed")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="bn1")(x))
        y = nn.Dropout(0.5, deterministic=True)(nn.Dense(5, name="up")(y))
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="bn2")(y))
        return nn.Dense(3, name="head")(x + nn.Dense(7, name="down")(y))


@case
def pre_activation_dropout():
    return *linen(PreActivation(), uniform(4, 6)), {
        "params/embed/kernel": layer("embed", 1)
        | layer("down", 1)
        | norm("bn1", True)
        | {takes("params/up/kernel", 0), takes("params/head/kernel", 0)},
        "params/up/kernel": layer("up", 1) | norm("bn2", True) | {takes("params/down/kernel", 0)},
    }


@case
def weight_sharing():
    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        for _ in range(2):
            h = jnp.tanh(h @ p["loop"] + p["bias"][None])
        return h @ p["out"]

    # The output of the first pass is an input of the second: one group on both axes.
    return (
        fn,
        shapes(**{"in": (5, 8)}, loop=(8, 8), bias=(8,), out=(8, 3)),
        (uniform(4, 5),),
        {
            "in": {
                makes("in", 1),
                takes("loop", 0),
                makes("loop", 1),
                makes("bias", 0),
                takes("out", 0),
            },
        },
    )


@case
def low_rank():
    def fn(p, x):
        h = jax.nn.relu(x @ p["in"])
        h = jax.nn.relu(h @ (p["a"] @ p["b"]))
        return h @ p["out"]

    sizes = shapes(**{"in": (5, 8)}, a=(8, 3), b=(3, 7), out=(7, 4))
    return (
        fn,
        sizes,
        (uniform(4, 5),),
        {
            "in": {makes("in", 1), takes("a", 0)},
            "a": {makes("a", 1), takes("b", 0)},
            "b": {makes("b", 1), takes("out", 0)},
        },
    )


@case
def tied_embedding():
    def fn(p, tokens):
        h = p["embed"][tokens]
        h = h + jax.nn.relu(h @ p["up"]) @ p["down"]
        return h @ p["embed"].T

    sizes = shapes(embed=(10, 6), up=(6, 8), down=(8, 6))
    return (
        fn,
        sizes,
        (jnp.array([1, 7, 4], jnp.int32),),
        {
            "embed": {("embed", 1, 1, 1, "both", 0, 0), takes("up", 0), makes("down", 1)},
            "up": {makes("up", 1), takes("down", 0)},
        },
    )


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Dense(8))(x))
        return nn.WeightNorm(nn.Dense(3))(x)


@case
def weight_norm():
    return *linen(WeightNormed(), uniform(4, 6)), {
        "params/Dense_0/kernel": layer("Dense_0", 1)
        | {
            makes("params/WeightNorm_0/Dense_0/kernel/scale", 0),
            takes("params/Dense_1/kernel", 0),
        },
    }


@case
def attention():
    def fn(p, x):
        h = x @ p["embed"]
        q, k, v = ((h @ p[name]).reshape(-1, 2, 3) for name in ("wq", "wk", "wv"))
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k), axis=-1)
        mixed = jnp.einsum("hqk,khd->qhd", weights, v).reshape(-1, 6)
        return (h + mixed @ p["wo"]) @ p["head"]

    # Keys undo what queries do, so a key's features have to be pulled back: they "consume".
    sizes = {"embed": (4, 8), "wq": (8, 6), "wk": (8, 6), "wv": (8, 6), "wo": (6, 8)}
    return (
        fn,
        shapes(**sizes, head=(8, 3)),
        (uniform(5, 4),),
        {
            "embed": {makes("embed", 1), makes("wo", 1), takes("head", 0)}
            | {takes(name, 0) for name in ("wq", "wk", "wv")},
            "wq": {makes(name, 1, after=3) for name in ("wq", "wk", "wv")}
            | {takes("wo", 0, after=3)},
            "wq#2": {makes("wq", 1, before=2), takes("wk", 1, before=2)},
            "wv": {makes("wv", 1, before=2), takes("wo", 0, before=2)},
        },
        {"wq#2": ("wq", (2,)), "wv": ("wq", (2,))},
    )
