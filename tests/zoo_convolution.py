"""Convolutional networks and mixers, and the groups of each, worked out on paper.

Space is pinned throughout: a kernel's window, the pixels, and patches made of these.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from arrays import uniform
from flax import linen as nn
from flax import nnx
from zoo import case, layer, linen, makes, norm, takes
from zoo_attention import from_equinox, from_haiku, from_nnx

# --- concatenated channels


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def bn(name):
            return nn.BatchNorm(use_running_average=True, name=name)

        x = nn.Conv(5, (3, 3), use_bias=False, name="stem")(x)
        for i, growth in enumerate((3, 4)):
            y = nn.Conv(growth, (3, 3), use_bias=False, name=f"conv{i}")(nn.relu(bn(f"bn{i}")(x)))
            x = jnp.concatenate([x, y], axis=-1)
        x = nn.Conv(6, (1, 1), name="transition")(nn.relu(bn("bn2")(x)))
        return nn.Dense(2, name="head")(nn.relu(x).max((1, 2)))


@case
def densenet():
    # What the i-th convolution makes is read by all that follow, from the same channel on.
    def read(start, readers):
        rows = set()
        for bn, conv in readers:
            rows |= {makes(f"params/{bn}/{name}", 0, start=start) for name in ("scale", "bias")}
            rows |= {makes(f"batch_stats/{bn}/{name}", 0, start=start) for name in ("mean", "var")}
            rows |= {takes(f"params/{conv}/kernel", 2, start=start)}
        return rows

    readers = [("bn0", "conv0"), ("bn1", "conv1"), ("bn2", "transition")]
    groups = {
        "params/stem/kernel": {makes("params/stem/kernel", 3)} | read(0, readers),
        "params/conv0/kernel": {makes("params/conv0/kernel", 3)} | read(5, readers[1:]),
        "params/conv1/kernel": {makes("params/conv1/kernel", 3)} | read(8, readers[2:]),
        "params/transition/kernel": layer("transition", 3) | {takes("params/head/kernel", 0)},
    }
    return *linen(DenseNet(), uniform(2, 6, 6, 3)), groups, {}


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(4, (3, 3), name="down")(x))
        x = nn.relu(nn.Conv(6, (3, 3), name="middle")(nn.max_pool(skip, (2, 2), (2, 2))))
        x = nn.relu(nn.ConvTranspose(5, (2, 2), strides=(2, 2), name="up")(x))
        x = nn.relu(nn.Conv(7, (3, 3), name="merge")(jnp.concatenate([x, skip], axis=-1)))
        return nn.Conv(2, (1, 1), name="head")(x)


@case
def unet():
    groups = {
        "params/down/kernel": layer("down", 3)
        | {takes("params/middle/kernel", 2), takes("params/merge/kernel", 2, start=5)},
        "params/middle/kernel": layer("middle", 3) | {takes("params/up/kernel", 2)},
        "params/up/kernel": layer("up", 3) | {takes("params/merge/kernel", 2)},
        "params/merge/kernel": layer("merge", 3) | {takes("params/head/kernel", 2)},
    }
    return *linen(UNet(), uniform(2, 6, 6, 3)), groups, {}


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3), name="stem")(x))
        a = nn.Conv(3, (1, 1), name="one")(x)
        b = nn.Conv(4, (3, 3), name="three")(nn.relu(nn.Conv(2, (1, 1), name="reduce")(x)))
        c = nn.Conv(6, (1, 1), name="pool")(nn.max_pool(x, (3, 3), padding="SAME"))
        x = nn.relu(jnp.concatenate([a, b, c], axis=-1))
        return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))


@case
def inception():
    # Flattened: the 3 + 4 + 6 channels of one pixel, then those of the next.
    def into(start):
        return {takes("params/head/kernel", 0, before=4 * 3, start=start, pitch=13)}

    groups = {
        "params/stem/kernel": layer("stem", 3)
        | {takes(f"params/{name}/kernel", 2) for name in ("one", "reduce", "pool")},
        "params/one/kernel": layer("one", 3) | into(0),
        "params/reduce/kernel": layer("reduce", 3) | {takes("params/three/kernel", 2)},
        "params/three/kernel": layer("three", 3) | into(3),
        "params/pool/kernel": layer("pool", 3) | into(7),
    }
    return *linen(Inception(), uniform(2, 4, 3, 3)), groups, {}


class WaveNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="embed")(x)
        skip = 0.0
        for i, width in enumerate((4, 6)):
            conv = nn.Conv(
                2 * width, (2,), kernel_dilation=2**i, padding="CAUSAL", name=f"gated{i}"
            )
            a, b = jnp.split(conv(x), 2, axis=-1)
            y = jnp.tanh(a) * nn.sigmoid(b)
            x = x + nn.Dense(5, name=f"residual{i}")(y)
            skip = skip + nn.Dense(7, name=f"skip{i}")(y)
        # Nothing reads the last residual sum but this.
        return nn.Dense(3, name="head")(nn.relu(skip)) + nn.Dense(3, name="tail")(x)


@case
def wavenet():
    stream = layer("embed", 1) | {takes("params/tail/kernel", 0)}
    skips = {takes("params/head/kernel", 0)}
    groups = {"params/embed/kernel": stream, "params/skip0/kernel": skips}
    for i, width in enumerate((4, 6)):
        stream |= layer(f"residual{i}", 1) | {takes(f"params/gated{i}/kernel", 1)}
        skips |= layer(f"skip{i}", 1)
        groups[f"params/gated{i}/kernel"] = {
            *(makes(f"params/gated{i}/kernel", 2, start=s) for s in (0, width)),
            *(makes(f"params/gated{i}/bias", 0, start=s) for s in (0, width)),
            takes(f"params/residual{i}/kernel", 0),
            takes(f"params/skip{i}/kernel", 0),
        }
    return *linen(WaveNet(), uniform(2, 8, 2)), groups, {}


# --- groups of channels


class ShuffleNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(10, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(6, (1, 1), feature_group_count=2, name="first")(x))
        x = x.reshape(*x.shape[:3], 2, 3).swapaxes(3, 4).reshape(x.shape)
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = nn.relu(nn.Conv(12, (1, 1), feature_group_count=3, name="second")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@case
def shufflenet():
    # Channels are 2 × 5, then 2 × 3, shuffled 3 × 2, then 3 × 4: each of the 3 groups of the second
    # convolution reads one channel of each of the 2 groups of the first.
    def made(name, **at):
        return {makes(f"params/{name}/kernel", 3, **at), makes(f"params/{name}/bias", 0, **at)}

    groups = {
        "params/stem/kernel": made("stem", after=5)
        | made("first", after=3)
        | made("depthwise", before=3)
        | {takes("params/second/kernel", 2)},
        "params/stem/kernel#2": made("stem", before=2) | {takes("params/first/kernel", 2)},
        "params/first/kernel": made("first", before=2)
        | made("depthwise", after=2)
        | made("second", after=4)
        | {takes("params/head/kernel", 0, after=4)},
        "params/second/kernel": made("second", before=3)
        | {takes("params/head/kernel", 0, before=3)},
    }
    nested = {
        "params/stem/kernel#2": ("params/stem/kernel", (2,)),
        "params/second/kernel": ("params/first/kernel", (3,)),
    }
    return *linen(ShuffleNet(), uniform(2, 5, 5, 3)), groups, nested


class GroupNormResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def conv(name, width):
            return nn.Conv(width, (3, 3), use_bias=False, name=name)

        x = nn.relu(nn.GroupNorm(3, name="gn_in")(conv("conv_in", 6)(x)))
        y = nn.relu(nn.GroupNorm(2, name="gn1")(conv("conv1", 10)(x)))
        x = nn.relu(x + nn.GroupNorm(3, name="gn2")(conv("conv2", 6)(y)))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


@case
def group_norm_resnet():
    # Channels are 3 × 2 in the stream and 2 × 5 in the block.
    def normed(conv, gn, **at):
        rows = {makes(f"params/{gn}/scale", 0, **at), makes(f"params/{gn}/bias", 0, **at)}
        return rows | {makes(f"params/{conv}/kernel", 3, **at)}

    def stream(**at):
        rows = normed("conv_in", "gn_in", **at) | normed("conv2", "gn2", **at)
        return rows | {takes("params/conv1/kernel", 2, **at), takes("params/head/kernel", 0, **at)}

    outer, inner = "params/conv_in/kernel", "params/conv1/kernel"
    groups = {
        outer: stream(after=2),
        f"{outer}#2": stream(before=3),
        inner: normed("conv1", "gn1", after=5) | {takes("params/conv2/kernel", 2, after=5)},
        f"{inner}#2": normed("conv1", "gn1", before=2)
        | {takes("params/conv2/kernel", 2, before=2)},
    }
    nested = {f"{outer}#2": (outer, (3,)), f"{inner}#2": (inner, (2,))}
    return *linen(GroupNormResNet(), uniform(2, 5, 5, 3)), groups, nested


class SplitAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(2 * 5, (3, 3), name="conv")(x))
        x = x.reshape(*x.shape[:3], 2, 5)
        y = nn.relu(nn.Dense(4, name="squeeze")(x.sum(3).mean((1, 2))))
        y = nn.softmax(nn.Dense(2 * 5, name="attend")(y).reshape(-1, 2, 5), axis=1)
        return nn.Dense(3, name="head")((x * y[:, None, None]).sum(3).max((1, 2)))


@case
def split_attention():
    # Two splits of 5 channels. Nothing compares splits across channels: the two may be swapped in
    # any one channel, so the outer factor of the axis is nested in the inner one.
    def rows(**at):
        names = ("conv", 3), ("attend", 1)
        made = {makes(f"params/{name}/kernel", axis, **at) for name, axis in names}
        return made | {makes(f"params/{name}/bias", 0, **at) for name, _ in names}

    conv = "params/conv/kernel"
    groups = {
        conv: rows(after=5),
        f"{conv}#2": rows(before=2)
        | {takes("params/squeeze/kernel", 0), takes("params/head/kernel", 0)},
        "params/squeeze/kernel": layer("squeeze", 1) | {takes("params/attend/kernel", 0)},
    }
    return *linen(SplitAttention(), uniform(2, 5, 5, 3)), groups, {conv: (f"{conv}#2", (5,))}


# --- kernels that are something else


class StandardisedConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(kernel).mean((0, 1, 2), keepdims=True)
        kernel = kernel * (jax.lax.rsqrt(variance * 9 + 1e-4) * scale[None, None, None])
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class WeightStandardised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(StandardisedConv(5, name="first")(x))
        x = nn.relu(StandardisedConv(7, name="second")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@case
def weight_standardised_conv():
    def made(name):
        return {makes(f"params/{name}/kernel", 3), makes(f"params/{name}/scale", 0)}

    groups = {
        "params/first/kernel": made("first") | {takes("params/second/kernel", 2)},
        "params/second/kernel": made("second") | {takes("params/head/kernel", 0)},
    }
    return *linen(WeightStandardised(), uniform(2, 5, 5, 3)), groups, {}


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), strides=2, padding="VALID", name="stem")(x)
        x = nn.LayerNorm(name="ln_stem")(x)
        for i, width in enumerate((7, 9)):
            y = nn.Conv(6, (3, 3), feature_group_count=6, name=f"depthwise{i}")(x)
            y = nn.gelu(nn.Dense(width, name=f"up{i}")(nn.LayerNorm(name=f"ln{i}")(y)))
            y = nn.Dense(6, name=f"down{i}")(y)
            x = x + self.param(f"gamma{i}", nn.initializers.ones, (6,))[None, None, None] * y
        return nn.Dense(4, name="head")(nn.LayerNorm(name="ln")(x.mean((1, 2))))


@case
def convnext():
    stream = layer("stem", 3) | norm("ln_stem") | norm("ln") | {takes("params/head/kernel", 0)}
    groups = {"params/stem/kernel": stream}
    for i in range(2):
        stream |= layer(f"depthwise{i}", 3) | norm(f"ln{i}") | layer(f"down{i}", 1)
        stream |= {takes(f"params/up{i}/kernel", 0), makes(f"params/gamma{i}", 0)}
        groups[f"params/up{i}/kernel"] = layer(f"up{i}", 1) | {takes(f"params/down{i}/kernel", 0)}
    return *linen(ConvNeXt(), uniform(2, 6, 6, 3)), groups, {}


class LocallyConnected(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvLocal(5, (3,), padding="VALID", name="first")(x))
        x = nn.relu(nn.ConvLocal(4, (3,), strides=2, padding="VALID", name="second")(x))
        return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))


@case
def locally_connected():
    # Windows share nothing, so that each of the 3 last pixels has units of its own. Those of the
    # first layer overlap in the windows of the second, which keeps them in one order everywhere.
    groups = {
        "params/first/kernel": {
            makes("params/first/kernel", 2),
            makes("params/first/bias", 1),
            takes("params/second/kernel", 1, after=3),
        },
        "params/second/kernel": {
            makes("params/second/kernel", 2),
            makes("params/second/bias", 1),
            takes("params/head/kernel", 0, before=3),
        },
    }
    nested = {"params/second/kernel": (None, (3,))}
    return *linen(LocallyConnected(), uniform(2, 9, 3)), groups, nested


class PixelShuffle(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4 * 5, (3, 3), name="conv")(x))
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w, 2, 2, 5).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 5)
        return nn.Conv(3, (3, 3), name="head")(x)


@case
def pixel_shuffle():
    # Of 2 × 2 × 5 channels the first two factors become space.
    groups = {
        "params/conv/kernel": {
            makes("params/conv/kernel", 3, before=4),
            makes("params/conv/bias", 0, before=4),
            takes("params/head/kernel", 2),
        },
    }
    return *linen(PixelShuffle(), uniform(2, 3, 3, 2)), groups, {}


# --- mixing


class MLPMixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(7, (2, 2), strides=2, padding="VALID", name="patch")(x)
        x = x.reshape(x.shape[0], -1, 7)
        y = nn.LayerNorm(name="ln1")(x).swapaxes(1, 2)
        y = nn.Dense(6, name="token_down")(nn.gelu(nn.Dense(9, name="token_up")(y)))
        x = x + y.swapaxes(1, 2)
        y = nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm(name="ln2")(x)))
        x = x + nn.Dense(7, name="down")(y)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="ln")(x).mean(1))


@case
def mlp_mixer():
    groups = {
        "params/patch/kernel": layer("patch", 3)
        | norm("ln1")
        | norm("ln2")
        | {takes("params/up/kernel", 0)}
        | layer("down", 1)
        | norm("ln")
        | {takes("params/head/kernel", 0)},
        "params/token_up/kernel": layer("token_up", 1) | {takes("params/token_down/kernel", 0)},
        "params/up/kernel": layer("up", 1) | {takes("params/down/kernel", 0)},
    }
    return *linen(MLPMixer(), uniform(2, 6, 4, 3)), groups, {}


class FiLM(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, condition = x[..., :3], x[:, 0, 0, 3:]
        condition = nn.relu(nn.Dense(4, name="condition")(condition))
        x = nn.Conv(5, (3, 3), name="conv")(x)
        gamma, beta = jnp.split(nn.Dense(10, name="film")(condition)[:, None, None], 2, axis=-1)
        x = nn.relu(nn.Conv(6, (3, 3), name="next")(nn.relu(x * gamma + beta)))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@case
def film():
    groups = {
        "params/condition/kernel": layer("condition", 1) | {takes("params/film/kernel", 0)},
        "params/conv/kernel": layer("conv", 3)
        | {makes("params/film/kernel", 1, start=s) for s in (0, 5)}
        | {makes("params/film/bias", 0, start=s) for s in (0, 5)}
        | {takes("params/next/kernel", 2)},
        "params/next/kernel": layer("next", 3) | {takes("params/head/kernel", 0)},
    }
    return *linen(FiLM(), uniform(2, 4, 4, 5)), groups, {}


class ChannelConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        y = nn.Conv(1, (3,), name="over_channels")(x.mean((1, 2))[..., None])
        x = x * nn.sigmoid(y[:, None, None, :, 0])
        x = nn.relu(nn.Dense(5, name="hidden")(x.max((1, 2))))
        return nn.Dense(3, name="head")(x)


@case
def convolution_over_channels():
    # Efficient channel attention: channels have neighbours there, and stay.
    groups = {"params/hidden/kernel": layer("hidden", 1) | {takes("params/head/kernel", 0)}}
    return *linen(ChannelConvolution(), uniform(2, 5, 5, 3)), groups, {}


# --- NNX, Haiku, Equinox


class NNXConv(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 5, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
        self.up = nnx.ConvTranspose(5, 4, (2, 2), strides=(2, 2), rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.up(nnx.relu(self.bn(self.first(x)))))
        return self.head(x.mean((1, 2)))


@case
def conv_nnx():
    groups = {
        "first/kernel": {makes("first/kernel", 3), makes("first/bias", 0)}
        | {makes(f"bn/{name}", 0) for name in ("scale", "bias", "mean", "var")}
        | {takes("up/kernel", 2)},
        "up/kernel": {makes("up/kernel", 3), makes("up/bias", 0), takes("head/kernel", 0)},
    }
    return *from_nnx(NNXConv, uniform(2, 4, 4, 3)), groups, {}


def haiku_conv(x):
    x = jax.nn.relu(hk.Conv2D(6, 3, name="first")(x))
    x = hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID")(x)
    x = hk.GroupNorm(2, name="norm")(hk.Conv2D(8, 3, with_bias=False, name="second")(x))
    x = hk.Linear(5, name="hidden")(hk.Flatten()(jax.nn.relu(x)))
    return hk.Linear(2, name="head")(jax.nn.relu(x))


@case
def conv_haiku():
    # 2 × 2 pixels of 2 × 4 channels are flattened.
    def normed(**at):
        return {makes("second/w", 3, **at), makes("norm/scale", 0, **at)} | {
            makes("norm/offset", 0, **at)
        }

    groups = {
        "first/w": {makes("first/w", 3), makes("first/b", 0), takes("second/w", 2)},
        "second/w": normed(after=4) | {takes("hidden/w", 0, before=4, after=4)},
        "second/w#2": normed(before=2) | {takes("hidden/w", 0, before=4 * 2)},
        "hidden/w": {makes("hidden/w", 1), makes("hidden/b", 0), takes("head/w", 0)},
    }
    net = from_haiku(haiku_conv, uniform(2, 4, 4, 3))
    return *net, groups, {"second/w#2": ("second/w", (2,))}


class EquinoxConv(eqx.Module):
    first: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    pool: eqx.nn.MaxPool2d
    second: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0])
        self.norm = eqx.nn.GroupNorm(3, 6)
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.second = eqx.nn.Conv2d(6, 5, 3, padding=1, key=keys[1])
        self.head = eqx.nn.Linear(5 * 2 * 2, 4, key=keys[2])

    def __call__(self, images):
        def one(x):
            x = self.pool(jax.nn.relu(self.norm(self.first(x))))
            return self.head(jax.nn.relu(self.second(x)).reshape(-1))

        return jax.vmap(one)(images)


@case
def conv_equinox():
    # Channels first, one image at a time; 6 channels in 3 groups.
    def normed(**at):
        return {
            makes("first/weight", 0, **at),
            makes("first/bias", 0, **at),
            makes("norm/weight", 0, **at),
            makes("norm/bias", 0, **at),
            takes("second/weight", 1, **at),
        }

    groups = {
        "first/weight": normed(after=2),
        "first/weight#2": normed(before=3),
        "second/weight": {
            makes("second/weight", 0),
            makes("second/bias", 0),
            takes("head/weight", 1, after=2 * 2),
        },
    }
    net = from_equinox(EquinoxConv, uniform(2, 3, 4, 4))
    return *net, groups, {"first/weight#2": ("first/weight", (3,))}
