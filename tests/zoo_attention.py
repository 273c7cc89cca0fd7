"""Networks with attention and the groups of each, worked out on paper.

Keys undo what queries do, so the dims of queries "produce" and those of keys "consume". The dims of
a head may be permuted differently in each head as long as nothing else shares them. Keys have no
bias where a softmax follows: it would add the same to all logits of a query and change nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from arrays import uniform
from flax import linen as nn
from flax import nnx
from zoo import Groups, Row, case, layer, linen, makes, norm, shapes, takes

# --- frameworks


def from_nnx(build: Callable[[nnx.Rngs], Any], *inputs: jax.Array) -> tuple[Callable, Any, tuple]:
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    params = nnx.to_pure_dict(state)

    def fn(params, *inputs):
        nnx.replace_by_pure_dict(state, params)
        # Flax 0.11 would else put variables of one trace into another.
        return nnx.merge(graph, state, copy=True)(*inputs)

    return fn, params, inputs


def from_haiku(net: Callable, *inputs: jax.Array) -> tuple[Callable, Any, tuple]:
    pure = hk.without_apply_rng(hk.transform(net))
    return pure.apply, jax.eval_shape(pure.init, jax.random.key(0), *inputs), inputs


def from_equinox(
    build: Callable[[jax.Array], Any], *inputs: jax.Array
) -> tuple[Callable, Any, tuple]:
    model = eqx.filter_eval_shape(build, jax.random.key(0))
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda params, *inputs: eqx.combine(params, static)(*inputs), params, inputs


def tokens(*shape: int, vocabulary: int) -> jax.Array:
    draw = np.random.default_rng(0).integers(0, vocabulary, shape)
    return jnp.asarray(draw, jnp.int32)


# --- parts of plain networks


def layer_norm(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * p["scale"][None, None] + p["bias"][None, None]


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def heads(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(*x.shape[:2], count, -1)


def logits_of(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5


def mixture(logits: jax.Array, v: jax.Array) -> jax.Array:
    """Values mixed by attention, heads and dims flattened."""
    x = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, -1), v)
    return x.reshape(*x.shape[:2], -1)


def causal(logits: jax.Array) -> jax.Array:
    mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    return jnp.where(mask[None, None], logits, -1e9)


def rotary(x: jax.Array) -> jax.Array:
    """Rotates the two halves of the last axis, each pair by its own angle per position."""
    half = x.shape[-1] // 2
    frequencies = 100.0 ** (-np.arange(half) / half)
    angles = np.arange(x.shape[1])[:, None, None] * frequencies
    cos, sin = (jnp.asarray(f(angles)[None], jnp.float32) for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# --- Linen


def linen_heads(path: str, first: int = 0, bias: bool = False) -> Groups:
    """Heads and dims of a `MultiHeadDotProductAttention`; `first` counts stacking axes."""
    q, k, v, out = (f"params/{path}/{name}" for name in ("query", "key", "value", "out"))
    head, dim = first + 1, first + 2
    groups = {
        f"{q}/kernel": {makes(f"{name}/kernel", head) for name in (q, k, v)}
        | {takes(f"{out}/kernel", first)},
        f"{q}/kernel#2": {makes(f"{q}/kernel", dim), takes(f"{k}/kernel", dim)},
        f"{v}/kernel": {makes(f"{v}/kernel", dim), takes(f"{out}/kernel", first + 1)},
    }
    if bias:
        groups[f"{q}/kernel"] |= {makes(f"{name}/bias", first) for name in (q, k, v)}
        groups[f"{q}/kernel#2"] |= {makes(f"{q}/bias", first + 1), takes(f"{k}/bias", first + 1)}
        groups[f"{v}/kernel"] |= {makes(f"{v}/bias", first + 1)}
    return groups


def linen_stream(path: str, first: int = 0, bias: bool = False) -> set[Row]:
    """What a `MultiHeadDotProductAttention` takes from the stream, and puts into it."""
    rows = {takes(f"params/{path}/{name}/kernel", first) for name in ("query", "key", "value")}
    rows |= {makes(f"params/{path}/out/kernel", first + 2)}
    return rows | ({makes(f"params/{path}/out/bias", first)} if bias else set())


class EncoderBlock(nn.Module):
    num_heads: int
    features: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(
            self.num_heads, qkv_features=self.features, use_bias=False, name="attention"
        )(nn.LayerNorm(name="ln1")(x))
        x = x + y
        y = nn.gelu(nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="ln2")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


def block_stream(path: str) -> set[Row]:
    return (
        linen_stream(f"{path}/attention")
        | norm(f"{path}/ln1")
        | norm(f"{path}/ln2")
        | {takes(f"params/{path}/up/kernel", 0)}
        | layer(f"{path}/down", 1)
    )


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        x = EncoderBlock(2, 10, 7, name="block")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="ln")(x).mean(1))


@case
def transformer_encoder_linen():
    query, value = (f"params/block/attention/{name}/kernel" for name in ("query", "value"))
    groups = {
        "params/embed/kernel": layer("embed", 1)
        | block_stream("block")
        | norm("ln")
        | {takes("params/head/kernel", 0)},
        "params/block/up/kernel": layer("block/up", 1) | {takes("params/block/down/kernel", 0)},
        **linen_heads("block/attention"),
    }
    nested = {f"{query}#2": (query, (2,)), value: (query, (2,))}
    return *linen(Encoder(), uniform(2, 5, 4)), groups, nested


def sigmoid_attention(query, key, value):
    weights = nn.sigmoid(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class SigmoidAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(
            3, qkv_features=12, attention_fn=sigmoid_attention, name="attention"
        )(x)
        return nn.Dense(2, name="head")(x.max(1))


@case
def attention_with_biases_linen():
    # No softmax, so that even a key's bias matters.
    query, value = (f"params/attention/{name}/kernel" for name in ("query", "value"))
    groups = {
        "params/embed/kernel": layer("embed", 1)
        | linen_stream("attention", bias=True)
        | {takes("params/head/kernel", 0)},
        **linen_heads("attention", bias=True),
    }
    nested = {f"{query}#2": (query, (3,)), value: (query, (3,))}
    return *linen(SigmoidAttention(), uniform(2, 5, 4)), groups, nested


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2, padding="VALID", name="patch")(x)
        x = x.reshape(x.shape[0], -1, 8)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("positions", nn.initializers.zeros, (1, 7, 8))
        for i, hidden in enumerate((10, 9)):
            x = EncoderBlock(2, 6, hidden, name=f"block{i}")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="ln")(x[:, 0]))


@case
def vit():
    # Patches are where they are in the image, and so are their positions.
    stream = (
        layer("patch", 3)
        | {makes("params/cls", 2), makes("params/positions", 2)}
        | norm("ln")
        | {takes("params/head/kernel", 0)}
    )
    groups, nested = {"params/patch/kernel": stream}, {}
    for i in range(2):
        stream |= block_stream(f"block{i}")
        query, value = (f"params/block{i}/attention/{name}/kernel" for name in ("query", "value"))
        groups |= linen_heads(f"block{i}/attention")
        groups[f"params/block{i}/up/kernel"] = layer(f"block{i}/up", 1) | {
            takes(f"params/block{i}/down/kernel", 0)
        }
        nested |= {f"{query}#2": (query, (2,)), value: (query, (2,))}
    return *linen(ViT(), uniform(2, 6, 4, 3)), groups, nested


class QKNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7, name="embed")(x)
        x = x + nn.MultiHeadDotProductAttention(
            2, qkv_features=10, normalize_qk=True, name="attention"
        )(x)
        return nn.Dense(3, name="head")(x.mean(1))


@case
def qk_norm_linen():
    # The scale of a norm is shared by all heads, so the dims of queries and keys move in all heads
    # alike; those of values don't. Normalisation follows the bias of keys, which therefore matters.
    query, value = (f"params/attention/{name}/kernel" for name in ("query", "value"))
    groups = {
        "params/embed/kernel": layer("embed", 1)
        | linen_stream("attention", bias=True)
        | {takes("params/head/kernel", 0)},
        **linen_heads("attention", bias=True),
    }
    groups[f"{query}#2"] |= {
        makes("params/attention/query_ln/scale", 0),
        takes("params/attention/key_ln/scale", 0),
    }
    return *linen(QKNormed(), uniform(2, 5, 4)), groups, {value: (query, (2,))}


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return EncoderBlock(2, 6, 9, name="block")(x), None


class ScannedEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="embed")(x)
        stack = nn.scan(
            ScannedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(4, name="head")(x.mean(1))


@case
def transformer_scanned_linen():
    # Layers are in the order they are in; within each, heads and hidden units are its own.
    at = "params/layers/block"
    query, value = (f"{at}/attention/{name}/kernel" for name in ("query", "value"))
    groups = {
        "params/embed/kernel": layer("embed", 1)
        | linen_stream("layers/block/attention", first=1)
        | {makes(f"{at}/{ln}/{name}", 1) for ln in ("ln1", "ln2") for name in ("scale", "bias")}
        | {takes(f"{at}/up/kernel", 1), makes(f"{at}/down/kernel", 2), makes(f"{at}/down/bias", 1)}
        | {takes("params/head/kernel", 0)},
        f"{at}/up/kernel": {
            makes(f"{at}/up/kernel", 2),
            makes(f"{at}/up/bias", 1),
            takes(f"{at}/down/kernel", 1),
        },
        **linen_heads("layers/block/attention", first=1),
    }
    nested = {
        f"{at}/up/kernel": (None, (3,)),
        query: (None, (3,)),
        f"{query}#2": (query, (3, 2)),
        value: (query, (3, 2)),
    }
    return *linen(ScannedEncoder(), uniform(2, 5, 6)), groups, nested


def windows(x: jax.Array) -> jax.Array:
    """Images of 4 by 4 as 4 windows of 4 tokens each."""
    b, c = x.shape[0], x.shape[-1]
    return x.reshape(b, 2, 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b * 4, 4, c)


def unwindowed(x: jax.Array) -> jax.Array:
    b, c = x.shape[0] // 4, x.shape[-1]
    return x.reshape(b, 2, 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, 4, 4, c)


class Swin(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(7, (1, 1), name="embed")(x)
        y = windows(jnp.roll(nn.LayerNorm(name="ln")(x), (-1, -1), (1, 2)))
        y = nn.Dense(3 * 8, use_bias=False, name="qkv")(y)
        q, k, v = (heads(part, 2) for part in jnp.split(y, 3, axis=-1))
        table = self.param("table", nn.initializers.zeros, (9, 2))
        at = np.stack(np.divmod(np.arange(4), 2), 1)
        index = (at[:, None] - at[None] + 1) @ np.array([3, 1])
        y = mixture(logits_of(q, k) + table[index].transpose(2, 0, 1)[None], v)
        x = x + jnp.roll(unwindowed(nn.Dense(7, name="out")(y)), (1, 1), (1, 2))
        # Merging patches: four neighbours side by side.
        x = jnp.concatenate([x[:, i::2, j::2] for j in range(2) for i in range(2)], axis=-1)
        x = nn.Dense(10, use_bias=False, name="merge")(nn.LayerNorm(name="ln_merge")(x))
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


@case
def swin_windows_and_patch_merging():
    quarters = range(0, 4 * 7, 7)
    qkv, out = "params/qkv/kernel", "params/out/kernel"
    groups = {
        "params/embed/kernel": layer("embed", 3)
        | norm("ln")
        | {takes(qkv, 0)}
        | layer("out", 1)
        | {makes("params/ln_merge/scale", 0, start=s) for s in quarters}
        | {makes("params/ln_merge/bias", 0, start=s) for s in quarters}
        | {takes("params/merge/kernel", 0, start=s) for s in quarters},
        qkv: {makes(qkv, 1, after=4, start=s) for s in (0, 8, 16)}
        | {makes("params/table", 1), takes(out, 0, after=4)},
        f"{qkv}#2": {makes(qkv, 1, before=2), takes(qkv, 1, before=2, start=8)},
        f"{qkv}#3": {makes(qkv, 1, before=2, start=16), takes(out, 0, before=2)},
        "params/merge/kernel": {makes("params/merge/kernel", 1), takes("params/head/kernel", 0)},
    }
    nested = {f"{qkv}#2": (qkv, (2,)), f"{qkv}#3": (qkv, (2,))}
    return *linen(Swin(), uniform(2, 4, 4, 3)), groups, nested


# --- plain functions


def gpt2_block(p: dict, x: jax.Array) -> jax.Array:
    y = layer_norm(x, p["ln1"]) @ p["qkv"]
    q, k, v = (heads(part, 2) for part in jnp.split(y, 3, axis=-1))
    x = x + mixture(causal(logits_of(q, k)), v) @ p["proj"] + p["proj_bias"][None, None]
    y = jax.nn.gelu(layer_norm(x, p["ln2"]) @ p["up"] + p["up_bias"][None, None])
    return x + y @ p["down"] + p["down_bias"][None, None]


@case
def gpt2():
    def fn(p, tokens):
        x = p["wte"][tokens] + p["wpe"][None]
        for block in p["blocks"]:
            x = gpt2_block(block, x)
        return layer_norm(x, p["ln"]) @ p["wte"].T

    ln = shapes(scale=(7,), bias=(7,))
    block = shapes(
        qkv=(7, 3 * 8), proj=(8, 7), proj_bias=(7,), up=(7, 9), up_bias=(9,), down=(9, 7)
    )
    block |= shapes(down_bias=(7,)) | {"ln1": ln, "ln2": ln}
    params = shapes(wte=(11, 7), wpe=(5, 7)) | {"blocks": [block, block], "ln": ln}

    # The embedding is the last layer as well; queries, keys and values are three segments.
    stream = {("wte", 1, 1, 1, "both", 0, 0), makes("wpe", 1)}
    stream |= {makes("ln/scale", 0), makes("ln/bias", 0)}
    groups, nested = {"wte": stream}, {}
    for at in ("blocks/0", "blocks/1"):
        qkv = f"{at}/qkv"
        stream |= {makes(f"{at}/{name}/{part}", 0) for name in ("ln1", "ln2") for part in ln}
        stream |= {takes(qkv, 0), makes(f"{at}/proj", 1), makes(f"{at}/proj_bias", 0)}
        stream |= {takes(f"{at}/up", 0), makes(f"{at}/down", 1), makes(f"{at}/down_bias", 0)}
        groups |= {
            qkv: {makes(qkv, 1, after=4, start=s) for s in (0, 8, 16)}
            | {takes(f"{at}/proj", 0, after=4)},
            f"{qkv}#2": {makes(qkv, 1, before=2), takes(qkv, 1, before=2, start=8)},
            f"{qkv}#3": {makes(qkv, 1, before=2, start=16), takes(f"{at}/proj", 0, before=2)},
            f"{at}/up": {makes(f"{at}/up", 1), makes(f"{at}/up_bias", 0), takes(f"{at}/down", 0)},
        }
        nested |= {f"{qkv}#2": (qkv, (2,)), f"{qkv}#3": (qkv, (2,))}
    return fn, params, (tokens(2, 5, vocabulary=11),), groups, nested


@case
def gpt_neox():
    def fn(p, tokens):
        x = p["embed"][tokens]
        y = heads(layer_norm(x, p["ln1"]) @ p["qkv"], 3)
        q, k, v = jnp.split(y, 3, axis=-1)
        y = mixture(causal(logits_of(q, k)), v) @ p["dense"]
        z = jax.nn.gelu(layer_norm(x, p["ln2"]) @ p["up"] + p["up_bias"][None, None]) @ p["down"]
        return layer_norm(x + y + z, p["ln"]) @ p["head"]

    ln = shapes(scale=(7,), bias=(7,))
    params = shapes(embed=(11, 7), qkv=(7, 3 * 3 * 4), dense=(12, 7), up=(7, 8), up_bias=(8,))
    params |= shapes(down=(8, 7), head=(7, 11)) | {"ln1": ln, "ln2": ln, "ln": ln}
    # Within each head come its query, its key and its value: 3 × (4, 4, 4).
    groups = {
        "embed": {makes("embed", 1), takes("qkv", 0), makes("dense", 1)}
        | {makes(f"{at}/{name}", 0) for at in ("ln1", "ln2", "ln") for name in ln}
        | {takes("up", 0), makes("down", 1), takes("head", 0)},
        "qkv": {makes("qkv", 1, after=12), takes("dense", 0, after=4)},
        "qkv#2": {
            makes("qkv", 1, before=3, pitch=12),
            takes("qkv", 1, before=3, start=4, pitch=12),
        },
        "qkv#3": {makes("qkv", 1, before=3, start=8, pitch=12), takes("dense", 0, before=3)},
        "up": {makes("up", 1), makes("up_bias", 0), takes("down", 0)},
    }
    nested = {"qkv#2": ("qkv", (3,)), "qkv#3": ("qkv", (3,))}
    return fn, params, (tokens(2, 5, vocabulary=11),), groups, nested


@case
def llama():
    def fn(p, tokens):
        x = p["embed"][tokens]
        y = rms_norm(x, p["norm1"])
        q, k, v = heads(y @ p["wq"], 6), heads(y @ p["wk"], 2), heads(y @ p["wv"], 2)
        q, k = rotary(q), rotary(k)
        q = q.reshape(*q.shape[:2], 2, 3, 4)  # key heads, and query heads for each
        logits = jnp.einsum("bqgrd,bkgd->bgrqk", q, k) / 2
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(mask[None, None, None], logits, -1e9), -1)
        y = jnp.einsum("bgrqk,bkgd->bqgrd", weights, v)
        x = x + y.reshape(*y.shape[:2], -1) @ p["wo"]
        gate, up = jnp.split(rms_norm(x, p["norm2"]) @ p["gate_up"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ p["down"]
        return rms_norm(x, p["norm"]) @ p["head"]

    params = shapes(
        embed=(11, 7), norm1=(7,), wq=(7, 24), wk=(7, 8), wv=(7, 8), wo=(24, 7), norm2=(7,)
    )
    params |= shapes(gate_up=(7, 2 * 9), down=(9, 7), norm=(7,), head=(7, 11))
    # Rotated dims have an angle each and stay; those of values don't.
    groups = {
        "embed": {makes("embed", 1), makes("norm1", 0), makes("norm2", 0), makes("norm", 0)}
        | {takes(name, 0) for name in ("wq", "wk", "wv", "gate_up", "head")}
        | {makes("wo", 1), makes("down", 1)},
        "wq": {
            makes("wq", 1, after=3 * 4),
            makes("wk", 1, after=4),
            makes("wv", 1, after=4),
            takes("wo", 0, after=3 * 4),
        },
        "wq#2": {makes("wq", 1, before=2, after=4), takes("wo", 0, before=2, after=4)},
        "wv": {makes("wv", 1, before=2), takes("wo", 0, before=2 * 3)},
        "gate_up": {makes("gate_up", 1), makes("gate_up", 1, start=9), takes("down", 0)},
    }
    nested = {"wq#2": ("wq", (2,)), "wv": ("wq", (2,))}
    return fn, params, (tokens(2, 5, vocabulary=11),), groups, nested


@case
def grouped_queries():
    def fn(p, x):
        x = x @ p["embed"]
        q, k, v = heads(x @ p["wq"], 6), heads(x @ p["wk"], 2), heads(x @ p["wv"], 2)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return (x + y.reshape(*y.shape[:2], -1) @ p["wo"]) @ p["head"]

    params = shapes(embed=(3, 7), wq=(7, 24), wk=(7, 8), wv=(7, 8), wo=(24, 7), head=(7, 5))
    groups = {
        "embed": {makes("embed", 1), makes("wo", 1)}
        | {takes(name, 0) for name in ("wq", "wk", "wv", "head")},
        "wq": {
            makes("wq", 1, after=3 * 4),
            makes("wk", 1, after=4),
            makes("wv", 1, after=4),
            takes("wo", 0, after=3 * 4),
        },
        "wq#2": {makes("wq", 1, before=2, after=4), takes("wo", 0, before=2, after=4)},
        "wq#3": {makes("wq", 1, before=2 * 3), takes("wk", 1, before=2)},
        "wv": {makes("wv", 1, before=2), takes("wo", 0, before=2 * 3)},
    }
    nested = dict.fromkeys(("wq#2", "wq#3", "wv"), ("wq", (2,)))
    return fn, params, (uniform(2, 5, 3),), groups, nested


@case
def multi_query():
    def fn(p, x):
        x = x @ p["embed"]
        q, k, v = heads(x @ p["wq"], 3), x @ p["wk"], x @ p["wv"]
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkd->bhqk", q, k), -1)
        y = jnp.einsum("bhqk,bke->bqhe", weights, v)
        return (x + y.reshape(*y.shape[:2], -1) @ p["wo"]) @ p["head"]

    params = shapes(embed=(2, 7), wq=(7, 12), wk=(7, 4), wv=(7, 5), wo=(15, 7), head=(7, 6))
    # One key and one value for all heads: their dims move in all heads alike.
    groups = {
        "embed": {makes("embed", 1), makes("wo", 1)}
        | {takes(name, 0) for name in ("wq", "wk", "wv", "head")},
        "wq": {makes("wq", 1, after=4), takes("wo", 0, after=5)},
        "wq#2": {makes("wq", 1, before=3), takes("wk", 1)},
        "wv": {makes("wv", 1), takes("wo", 0, before=3)},
    }
    return fn, params, (uniform(2, 4, 2),), groups, {}


def plain_attention(p: dict, x: jax.Array, count: int, logits: Callable) -> jax.Array:
    x = x @ p["embed"]
    q, k, v = (heads(x @ p[name], count) for name in ("wq", "wk", "wv"))
    return (x + mixture(logits(q, k), v) @ p["wo"]) @ p["head"]


def plain_stream() -> set[Row]:
    rows = {makes("embed", 1), makes("wo", 1)}
    return rows | {takes(name, 0) for name in ("wq", "wk", "wv", "head")}


@case
def partial_rotary():
    def partly(x):
        return jnp.concatenate([rotary(x[..., :4]), x[..., 4:]], axis=-1)

    def fn(p, x):
        return plain_attention(p, x, 2, lambda q, k: logits_of(partly(q), partly(k)))

    params = shapes(embed=(4, 6), wq=(6, 14), wk=(6, 14), wv=(6, 10), wo=(10, 6), head=(6, 3))
    # Of 7 dims per head the first 4 are rotated, and stay.
    groups = {
        "embed": plain_stream(),
        "wq": {makes("wq", 1, after=7), makes("wk", 1, after=7)}
        | {makes("wv", 1, after=5), takes("wo", 0, after=5)},
        "wq#2": {
            makes("wq", 1, before=2, start=4, pitch=7),
            takes("wk", 1, before=2, start=4, pitch=7),
        },
        "wv": {makes("wv", 1, before=2), takes("wo", 0, before=2)},
    }
    nested = {"wq#2": ("wq", (2,)), "wv": ("wq", (2,))}
    return fn, params, (uniform(2, 5, 4),), groups, nested


@case
def alibi():
    def fn(p, x):
        slopes = 2.0 ** -np.arange(1, 4)
        distance = np.abs(np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1])))
        bias = jnp.asarray(slopes[:, None, None] * distance, jnp.float32)
        return plain_attention(p, x, 3, lambda q, k: causal(logits_of(q, k) - bias[None]))

    params = shapes(embed=(5, 7), wq=(7, 12), wk=(7, 12), wv=(7, 6), wo=(6, 7), head=(7, 4))
    # Each head looks as far as its slope says: heads stay.
    groups = {
        "embed": plain_stream(),
        "wq": {makes("wq", 1, before=3), takes("wk", 1, before=3)},
        "wv": {makes("wv", 1, before=3), takes("wo", 0, before=3)},
    }
    nested = {"wq": (None, (3,)), "wv": (None, (3,))}
    return fn, params, (uniform(2, 6, 5),), groups, nested


@case
def relative_position_bias():
    def fn(p, x):
        positions = np.arange(x.shape[1])
        bias = p["table"][:, positions[:, None] - positions[None] + x.shape[1] - 1]
        return plain_attention(p, x, 3, lambda q, k: logits_of(q, k) + bias[None])

    params = shapes(embed=(5, 7), wq=(7, 12), wk=(7, 12), wv=(7, 6), wo=(6, 7), head=(7, 4))
    params |= shapes(table=(3, 2 * 6 - 1))
    groups = {
        "embed": plain_stream(),
        "wq": {makes("wq", 1, after=4), makes("wk", 1, after=4), makes("wv", 1, after=2)}
        | {makes("table", 0), takes("wo", 0, after=2)},
        "wq#2": {makes("wq", 1, before=3), takes("wk", 1, before=3)},
        "wv": {makes("wv", 1, before=3), takes("wo", 0, before=3)},
    }
    nested = {"wq#2": ("wq", (3,)), "wv": ("wq", (3,))}
    return fn, params, (uniform(2, 6, 5),), groups, nested


@case
def qk_norm_with_fused_biases():
    def fn(p, x):
        x = x @ p["embed"]
        y = x @ p["qkv"] + p["qkv_bias"][None, None]
        q, k, v = (heads(part, 2) for part in jnp.split(y, 3, axis=-1))
        logits = logits_of(rms_norm(q, p["q_scale"]), rms_norm(k, p["k_scale"]))
        return (x + mixture(logits, v) @ p["wo"]) @ p["head"]

    params = shapes(embed=(4, 7), qkv=(7, 24), qkv_bias=(24,), q_scale=(4,), k_scale=(4,))
    params |= shapes(wo=(8, 7), head=(7, 3))
    both = ("qkv", 1), ("qkv_bias", 0)
    groups = {
        "embed": {makes("embed", 1), takes("qkv", 0), makes("wo", 1), takes("head", 0)},
        "qkv": {makes(*at, after=4, start=s) for at in both for s in (0, 8, 16)}
        | {takes("wo", 0, after=4)},
        "qkv#2": {makes(*at, before=2) for at in both}
        | {takes(*at, before=2, start=8) for at in both}
        | {makes("q_scale", 0), takes("k_scale", 0)},
        "qkv#3": {makes(*at, before=2, start=16) for at in both} | {takes("wo", 0, before=2)},
    }
    return fn, params, (uniform(2, 5, 4),), groups, {"qkv#3": ("qkv", (2,))}


@case
def linear_attention():
    def fn(p, x):
        x = x @ p["embed"]
        q, k, v = (heads(x @ p[name], 2) for name in ("wq", "wk", "wv"))
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        state = jnp.einsum("bkhd,bkhe->bhde", k, v)
        total = jnp.einsum("bqhd,bhd->bqh", q, k.sum(1))
        y = jnp.einsum("bqhd,bhde->bqhe", q, state) / total[..., None]
        return (x + y.reshape(*y.shape[:2], -1) @ p["wo"]) @ p["head"]

    params = shapes(embed=(5, 7), wq=(7, 8), wk=(7, 8), wv=(7, 6), wo=(6, 7), head=(7, 4))
    groups = {
        "embed": plain_stream(),
        "wq": {makes("wq", 1, after=4), makes("wk", 1, after=4), makes("wv", 1, after=3)}
        | {takes("wo", 0, after=3)},
        "wq#2": {makes("wq", 1, before=2), takes("wk", 1, before=2)},
        "wv": {makes("wv", 1, before=2), takes("wo", 0, before=2)},
    }
    nested = {"wq#2": ("wq", (2,)), "wv": ("wq", (2,))}
    return fn, params, (uniform(2, 6, 5),), groups, nested


@case
def perceiver():
    def fn(p, x):
        x = jax.nn.gelu(x @ p["embed"])
        z = p["latents"][None] + (x.mean(1) @ p["shift"])[:, None]
        q, k, v = heads(z @ p["wq"], 2), heads(x @ p["wk"], 2), heads(x @ p["wv"], 2)
        z = z + mixture(logits_of(q, k), v) @ p["wo"]
        z = z + jax.nn.relu(z @ p["up"]) @ p["down"]
        return jnp.einsum("bqd,q->bd", z, p["pool"]) @ p["head"]

    params = shapes(embed=(4, 7), shift=(7, 5), latents=(6, 5), wq=(5, 8), wk=(7, 8), wv=(7, 10))
    params |= shapes(wo=(10, 5), up=(5, 9), down=(9, 5), pool=(6,), head=(5, 3))
    # The order of the latents is free, as long as each keeps its weight in the pool.
    groups = {
        "embed": {makes("embed", 1), takes("shift", 0), takes("wk", 0), takes("wv", 0)},
        "shift": {makes("shift", 1), makes("latents", 1), takes("wq", 0), makes("wo", 1)}
        | {takes("up", 0), makes("down", 1), takes("head", 0)},
        "latents": {makes("latents", 0), takes("pool", 0)},
        "wq": {makes("wq", 1, after=4), makes("wk", 1, after=4), makes("wv", 1, after=5)}
        | {takes("wo", 0, after=5)},
        "wq#2": {makes("wq", 1, before=2), takes("wk", 1, before=2)},
        "wv": {makes("wv", 1, before=2), takes("wo", 0, before=2)},
        "up": {makes("up", 1), takes("down", 0)},
    }
    nested = {"wq#2": ("wq", (2,)), "wv": ("wq", (2,))}
    return fn, params, (uniform(2, 5, 4),), groups, nested


# --- NNX, Haiku, Equinox


class NNXAttention(nnx.Module):
    def __init__(self, kv_heads: int | None, rngs: nnx.Rngs):
        # Flax 0.11 has no such argument.
        grouped: dict[str, Any] = {} if kv_heads is None else {"num_kv_heads": kv_heads}
        self.embed = nnx.Linear(5, 7, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=kv_heads and 6 or 2,
            in_features=7,
            qkv_features=kv_heads and 24 or 8,
            use_bias=False,
            decode=False,
            rngs=rngs,
            **grouped,
        )
        self.norm = nnx.RMSNorm(7, rngs=rngs)
        self.head = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        return self.head((x + self.attention(self.norm(x))).mean(1))


def nnx_stream() -> set[Row]:
    rows = {makes("embed/kernel", 1), makes("embed/bias", 0), makes("norm/scale", 0)}
    rows |= {takes(f"attention/{name}/kernel", 0) for name in ("query", "key", "value")}
    return rows | {makes("attention/out/kernel", 2), takes("head/kernel", 0)}


@case
def attention_nnx():
    q, k, v, out = (f"attention/{name}/kernel" for name in ("query", "key", "value", "out"))
    groups = {
        "embed/kernel": nnx_stream(),
        q: {makes(q, 1), makes(k, 1), makes(v, 1), takes(out, 0)},
        f"{q}#2": {makes(q, 2), takes(k, 2)},
        v: {makes(v, 2), takes(out, 1)},
    }
    net = from_nnx(lambda rngs: NNXAttention(None, rngs), uniform(2, 4, 5))
    return *net, groups, {f"{q}#2": (q, (2,)), v: (q, (2,))}


def grouped_queries_nnx():
    q, k, v, out = (f"attention/{name}/kernel" for name in ("query", "key", "value", "out"))
    groups = {
        "embed/kernel": nnx_stream(),
        q: {makes(q, 1, after=3), makes(k, 1), makes(v, 1), takes(out, 0, after=3)},
        f"{q}#2": {makes(q, 1, before=2), takes(out, 0, before=2)},
        f"{q}#3": {makes(q, 2), takes(k, 2)},
        v: {makes(v, 2), takes(out, 1)},
    }
    net = from_nnx(lambda rngs: NNXAttention(2, rngs), uniform(2, 4, 5))
    return *net, groups, dict.fromkeys((f"{q}#2", f"{q}#3", v), (q, (2,)))


if "num_kv_heads" in inspect.signature(nnx.MultiHeadAttention.__init__).parameters:
    case(grouped_queries_nnx)


def haiku_attention(x):
    x = hk.Linear(7, name="embed")(x)
    y = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, name="norm")(x)
    x = x + hk.MultiHeadAttention(
        num_heads=2,
        key_size=4,
        value_size=5,
        model_size=7,
        w_init=hk.initializers.VarianceScaling(),
        with_bias=False,
        name="attention",
    )(y, y, y)
    return hk.Linear(3, name="head")(x.mean(1))


@case
def attention_haiku():
    q, k, v, out = (f"attention/{name}/w" for name in ("query", "key", "value", "linear"))
    groups = {
        "embed/w": {makes("embed/w", 1), makes("embed/b", 0)}
        | {makes("norm/scale", 0), makes("norm/offset", 0)}
        | {takes(q, 0), takes(k, 0), takes(v, 0), makes(out, 1), takes("head/w", 0)},
        q: {makes(q, 1, after=4), makes(k, 1, after=4), makes(v, 1, after=5)}
        | {takes(out, 0, after=5)},
        f"{q}#2": {makes(q, 1, before=2), takes(k, 1, before=2)},
        v: {makes(v, 1, before=2), takes(out, 0, before=2)},
    }
    net = from_haiku(haiku_attention, uniform(2, 4, 6))
    return *net, groups, {f"{q}#2": (q, (2,)), v: (q, (2,))}


class EquinoxAttention(eqx.Module):
    embed: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(6, 7, key=keys[0])
        self.norm = eqx.nn.LayerNorm(7)
        self.attention = eqx.nn.MultiheadAttention(
            num_heads=3,
            query_size=7,
            qk_size=4,
            vo_size=5,
            use_query_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            key=keys[1],
        )
        self.head = eqx.nn.Linear(7, 2, key=keys[2])

    def __call__(self, images):
        def one(x):
            x = jax.vmap(self.embed)(x)
            y = jax.vmap(self.norm)(x)
            return self.head((x + self.attention(y, y, y)).mean(0))

        return jax.vmap(one)(images)


@case
def attention_equinox():
    # Weights are [out, in] here.
    q, k, v, out = (f"attention/{name}_proj" for name in ("query", "key", "value", "output"))
    groups = {
        "embed/weight": {makes("embed/weight", 0), makes("embed/bias", 0)}
        | {makes("norm/weight", 0), makes("norm/bias", 0)}
        | {takes(f"{name}/weight", 1) for name in (q, k, v)}
        | {makes(f"{out}/weight", 0), makes(f"{out}/bias", 0), takes("head/weight", 1)},
        f"{q}/weight": {makes(f"{q}/weight", 0, after=4), makes(f"{q}/bias", 0, after=4)}
        | {makes(f"{k}/weight", 0, after=4)}
        | {makes(f"{v}/weight", 0, after=5), makes(f"{v}/bias", 0, after=5)}
        | {takes(f"{out}/weight", 1, after=5)},
        f"{q}/weight#2": {
            makes(f"{q}/weight", 0, before=3),
            makes(f"{q}/bias", 0, before=3),
            takes(f"{k}/weight", 0, before=3),
        },
        f"{v}/weight": {
            makes(f"{v}/weight", 0, before=3),
            makes(f"{v}/bias", 0, before=3),
            takes(f"{out}/weight", 1, before=3),
        },
    }
    nested = {f"{name}": (f"{q}/weight", (3,)) for name in (f"{q}/weight#2", f"{v}/weight")}
    return *from_equinox(EquinoxAttention, uniform(2, 4, 6)), groups, nested
