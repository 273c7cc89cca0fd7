"""Loops, and dense networks that share, gate, compare or stack, with the groups of each.

Worked out on paper. Whatever is carried from one step of a loop to the next has one order in all of
them. Layers that are scanned over stay where they are, and what does not leave a layer has an order
of its own in each.
"""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from arrays import uniform
from flax import linen as nn
from flax import nnx
from zoo import Row, case, layer, linen, makes, shapes, takes
from zoo_attention import from_equinox, from_haiku, from_nnx

# --- recurrent cells


class Recurrent(nn.Module):
    cell: nn.RNNCellBase

    @nn.compact
    def __call__(self, x):
        states: Any = nn.RNN(self.cell)(x)
        return nn.Dense(3, name="head")(states[:, -1])


@case
def lstm_linen():
    # All four gates have the units of the state, and nothing else has.
    rows = {takes("params/head/kernel", 0)}
    for gate in "ifgo":
        rows |= {makes(f"params/cell/i{gate}/kernel", 1), makes(f"params/cell/h{gate}/kernel", 1)}
        rows |= {makes(f"params/cell/h{gate}/bias", 0), takes(f"params/cell/h{gate}/kernel", 0)}
    groups = {"params/cell/ii/kernel": rows}
    return *linen(Recurrent(nn.LSTMCell(6)), uniform(2, 4, 5)), groups, {}


def linen_gru(path: str) -> set[Row]:
    rows = {makes(f"params/{path}/hn/bias", 0)}
    for gate in "rzn":
        rows |= {makes(f"params/{path}/i{gate}/kernel", 1), makes(f"params/{path}/i{gate}/bias", 0)}
        rows |= {makes(f"params/{path}/h{gate}/kernel", 1)}
        rows |= {takes(f"params/{path}/h{gate}/kernel", 0)}
    return rows


class GRUTwice(nn.Module):
    @nn.compact
    def __call__(self, x: Any):
        x = nn.RNN(nn.GRUCell(6, name="first"))(x)
        x = nn.RNN(nn.GRUCell(4, name="second"))(x)
        return nn.Dense(3, name="head")(x[:, -1])


@case
def gru_stacked_linen():
    groups = {
        "params/first/ir/kernel": linen_gru("first")
        | {takes(f"params/second/i{gate}/kernel", 0) for gate in "rzn"},
        "params/second/ir/kernel": linen_gru("second") | {takes("params/head/kernel", 0)},
    }
    return *linen(GRUTwice(), uniform(2, 5, 2)), groups, {}


class GRUBothWays(nn.Module):
    @nn.compact
    def __call__(self, x):
        forward = nn.RNN(nn.GRUCell(4, name="forward"))
        backward = nn.RNN(nn.GRUCell(6, name="backward"))
        return nn.Dense(3, name="head")(nn.Bidirectional(forward, backward)(x))


@case
def gru_bidirectional_linen():
    # The states of both ways side by side: 4 + 6.
    groups = {
        "params/forward/ir/kernel": linen_gru("forward") | {takes("params/head/kernel", 0)},
        "params/backward/ir/kernel": linen_gru("backward")
        | {takes("params/head/kernel", 0, start=4)},
    }
    return *linen(GRUBothWays(), uniform(2, 5, 2)), groups, {}


@case
def conv_lstm_linen():
    rows = {takes("params/cell/hh/kernel", 2), takes("params/head/kernel", 0)}
    for start in range(0, 4 * 5, 5):
        for name in ("ih", "hh"):
            rows |= {makes(f"params/cell/{name}/kernel", 3, start=start)}
            rows |= {makes(f"params/cell/{name}/bias", 0, start=start)}
    groups = {"params/cell/ih/kernel": rows}
    return *linen(Recurrent(nn.ConvLSTMCell(5, (3, 3))), uniform(2, 3, 4, 4, 2)), groups, {}


class NNXRecurrent(nnx.Module):
    def __init__(self, cell, width, rngs):
        self.rnn = nnx.RNN(cell(5, width, rngs=rngs), rngs=False)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        zeros = jnp.zeros((x.shape[0], self.head.in_features))
        carry = (zeros, zeros) if isinstance(self.rnn.cell, nnx.LSTMCell) else zeros
        states: Any = self.rnn(x, initial_carry=carry)
        return self.head(states[:, -1])


@case
def gru_nnx():
    rows = {makes("rnn/cell/dense_i/kernel", 1, start=s) for s in (0, 6, 12)}
    rows |= {makes("rnn/cell/dense_i/bias", 0, start=s) for s in (0, 6, 12)}
    rows |= {makes("rnn/cell/dense_h/kernel", 1, start=s) for s in (0, 6, 12)}
    rows |= {takes("rnn/cell/dense_h/kernel", 0), takes("head/kernel", 0)}
    net = from_nnx(lambda rngs: NNXRecurrent(nnx.GRUCell, 6, rngs), uniform(2, 4, 5))
    return *net, {"rnn/cell/dense_i/kernel": rows}, {}


@case
def lstm_nnx():
    rows = {takes("head/kernel", 0)}
    for name in ("i", "f", "g", "o"):
        into = f"rnn/cell/i{name}_" if name == "f" else f"rnn/cell/i{name}"  # `if` is a keyword
        rows |= {makes(f"{into}/kernel", 1), makes(f"rnn/cell/h{name}/kernel", 1)}
        rows |= {makes(f"rnn/cell/h{name}/bias", 0), takes(f"rnn/cell/h{name}/kernel", 0)}
    net = from_nnx(lambda rngs: NNXRecurrent(nnx.LSTMCell, 7, rngs), uniform(2, 4, 5))
    return *net, {"rnn/cell/ii/kernel": rows}, {}


def haiku_lstm(x):
    core = hk.LSTM(6, name="lstm")
    states: Any
    states, _ = hk.static_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(3, name="head")(states[:, -1])


@case
def lstm_haiku_unrolled():
    # One kernel reads 5 inputs and then the state, and makes four gates.
    rows = {makes("lstm/linear/w", 1, start=s) for s in range(0, 24, 6)}
    rows |= {makes("lstm/linear/b", 0, start=s) for s in range(0, 24, 6)}
    rows |= {takes("lstm/linear/w", 0, start=5), takes("head/w", 0)}
    return *from_haiku(haiku_lstm, uniform(2, 3, 5)), {"lstm/linear/w": rows}, {}


def haiku_gru(x):
    x = jax.nn.relu(hk.Linear(4, name="embed")(x))
    core = hk.GRU(6, name="gru")
    states: Any
    states, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(3, name="head")(states[:, -1])


@case
def gru_haiku():
    thirds = (0, 6, 12)
    groups = {
        "embed/w": {makes("embed/w", 1), makes("embed/b", 0), takes("gru/w_i", 0)},
        "gru/w_i": {makes("gru/w_i", 1, start=s) for s in thirds}
        | {makes("gru/w_h", 1, start=s) for s in thirds}
        | {makes("gru/b", 0, start=s) for s in thirds}
        | {takes("gru/w_h", 0), takes("head/w", 0)},
    }
    return *from_haiku(haiku_gru, uniform(2, 5, 2)), groups, {}


class EquinoxRecurrent(eqx.Module):
    cell: Any
    head: eqx.nn.Linear

    def __init__(self, cell, width, key):
        keys = jax.random.split(key)
        self.cell = cell(5, width, key=keys[0])
        self.head = eqx.nn.Linear(width, 3, key=keys[1])

    def __call__(self, sequences):
        def one(xs):
            zeros = jnp.zeros(self.cell.hidden_size)
            state = (zeros, zeros) if isinstance(self.cell, eqx.nn.LSTMCell) else zeros
            state, _ = jax.lax.scan(lambda state, x: (self.cell(x, state), None), state, xs)
            return self.head(state[0] if isinstance(self.cell, eqx.nn.LSTMCell) else state)

        return jax.vmap(one)(sequences)


@case
def gru_equinox():
    rows = {takes("cell/weight_hh", 1), makes("cell/bias_n", 0), takes("head/weight", 1)}
    for name in ("weight_ih", "weight_hh", "bias"):
        rows |= {makes(f"cell/{name}", 0, start=s) for s in (0, 6, 12)}
    net = from_equinox(lambda key: EquinoxRecurrent(eqx.nn.GRUCell, 6, key), uniform(2, 4, 5))
    return *net, {"cell/weight_ih": rows}, {}


@case
def lstm_equinox():
    rows = {takes("cell/weight_hh", 1), takes("head/weight", 1)}
    for name in ("weight_ih", "weight_hh", "bias"):
        rows |= {makes(f"cell/{name}", 0, start=s) for s in range(0, 28, 7)}
    net = from_equinox(lambda key: EquinoxRecurrent(eqx.nn.LSTMCell, 7, key), uniform(2, 4, 5))
    return *net, {"cell/weight_ih": rows}, {}


# --- loops of another kind


@case
def state_space_model():
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def fn(p, x):
        x = x @ p["embed"]
        inputs = x @ p["b"]
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"])[None, None], inputs.shape)
        _, states = jax.lax.associative_scan(combine, (decay, inputs), axis=1)
        y = jax.nn.gelu(states @ p["c"] + x * p["skip"][None, None])
        return y[:, -1] @ p["head"]

    params = shapes(embed=(3, 6), b=(6, 8), decay=(8,), c=(8, 6), skip=(6,), head=(6, 2))
    # The recurrence is diagonal: each state decays by itself.
    groups = {
        "embed": {makes("embed", 1), makes("skip", 0), takes("b", 0), makes("c", 1)}
        | {takes("head", 0)},
        "b": {makes("b", 1), makes("decay", 0), takes("c", 0)},
    }
    return fn, params, (uniform(2, 5, 3),), groups, {}


@case
def fixed_point_while():
    def fn(p, x):
        drive = x @ p["in"] + p["bias"][None]

        def running(state):
            step, z = state
            return (step < 5) & (jnp.abs(z).max() < 9)

        def update(state):
            step, z = state
            return step + 1, jnp.tanh(z @ p["loop"] + drive)

        _, z = jax.lax.while_loop(running, update, (0, jnp.zeros_like(drive)))
        return z @ p["out"]

    params = shapes(**{"in": (5, 7)}, bias=(7,), loop=(7, 7), out=(7, 3))
    rows = {makes("in", 1), makes("bias", 0), takes("loop", 0), makes("loop", 1), takes("out", 0)}
    return fn, params, (uniform(4, 5),), {"in": rows}, {}


@case
def shared_layer_fori():
    def fn(p, x):
        def update(_, h):
            return h + jax.nn.relu(h @ p["up"] + p["bias"][None]) @ p["down"]

        return jax.lax.fori_loop(0, 3, update, x @ p["in"]) @ p["out"]

    params = shapes(**{"in": (5, 6)}, up=(6, 8), bias=(8,), down=(8, 6), out=(6, 3))
    groups = {
        "in": {makes("in", 1), takes("up", 0), makes("down", 1), takes("out", 0)},
        "up": {makes("up", 1), makes("bias", 0), takes("down", 0)},
    }
    return fn, params, (uniform(4, 5),), groups, {}


@case
def residual_layers_scanned():
    def fn(p, x):
        def update(h, layer):
            y = jax.nn.relu(h @ layer["up"] + layer["bias"][None])
            return h + y @ layer["down"], None

        return jax.lax.scan(update, x @ p["in"], p["layers"])[0] @ p["out"]

    layers = shapes(up=(4, 6, 8), bias=(4, 8), down=(4, 8, 6))
    params = shapes(**{"in": (5, 6)}, out=(6, 3)) | {"layers": layers}
    up, down = "layers/up", "layers/down"
    groups = {
        "in": {makes("in", 1), takes(up, 1), makes(down, 2), takes("out", 0)},
        up: {makes(up, 2), makes("layers/bias", 1), takes(down, 1)},
    }
    return fn, params, (uniform(4, 5),), groups, {up: (None, (4,))}


@case
def hidden_layers_scanned():
    def fn(p, x):
        def update(h, layer):
            return jax.nn.relu(h @ layer["w"] + layer["b"][None]), None

        return jax.lax.scan(update, x @ p["in"], p["layers"])[0] @ p["out"]

    params = shapes(**{"in": (5, 7)}, out=(7, 3)) | {"layers": shapes(w=(3, 7, 7), b=(3, 7))}
    # Unrolled, each layer's units could move by themselves; what is carried moves in all alike.
    rows = {makes("in", 1), takes("layers/w", 1), makes("layers/w", 2), makes("layers/b", 1)}
    return fn, params, (uniform(4, 5),), {"in": rows | {takes("out", 0)}}, {}


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NNXStack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return NNXBlock(rngs)

        self.embed = nnx.Linear(5, 6, rngs=rngs)
        self.blocks = stack(rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.head(run(self.blocks, self.embed(x)))


@case
def layers_stacked_nnx():
    up, down = "blocks/up/kernel", "blocks/down/kernel"
    groups = {
        "embed/kernel": {makes("embed/kernel", 1), makes("embed/bias", 0), takes("head/kernel", 0)}
        | {makes("blocks/norm/scale", 1), makes("blocks/norm/bias", 1), takes(up, 1)}
        | {makes(down, 2), makes("blocks/down/bias", 1)},
        up: {makes(up, 2), makes("blocks/up/bias", 1), takes(down, 1)},
    }
    return *from_nnx(NNXStack, uniform(4, 5)), groups, {up: (None, (3,))}


# --- experts, ensembles, gates


@case
def mixture_of_experts():
    def fn(p, x):
        x = x @ p["embed"]
        gates = jax.nn.softmax(x @ p["gate"], -1)
        y = jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["up"]) + p["bias"][None])
        y = jnp.einsum("bef,efd->bed", y, p["down"])
        return (x + jnp.einsum("bed,be->bd", y, gates)) @ p["head"]

    params = shapes(embed=(4, 6), gate=(6, 3), up=(3, 6, 7), bias=(3, 7), down=(3, 7, 6))
    params |= shapes(head=(6, 2))
    # The gates are contracted with what the experts put out: gates produce, experts consume.
    groups = {
        "embed": {makes("embed", 1), takes("gate", 0), takes("up", 1), makes("down", 2)}
        | {takes("head", 0)},
        "gate": {makes("gate", 1), takes("up", 0), takes("bias", 0), takes("down", 0)},
        "up": {makes("up", 2), makes("bias", 1), takes("down", 1)},
    }
    return fn, params, (uniform(4, 4),), groups, {"up": ("gate", (3,))}


@case
def ensemble_by_vmap():
    def member(p, x):
        x = jax.nn.relu(x @ p["w0"] + p["b0"][None])
        x = jax.nn.relu(x @ p["w1"] + p["b1"][None])
        return jax.nn.softmax(x @ p["w2"] + p["b2"][None], -1)

    def fn(p, x):
        return jax.vmap(member, in_axes=(0, None))(p, x).mean(0)

    params = shapes(w0=(4, 5, 7), b0=(4, 7), w1=(4, 7, 6), b1=(4, 6), w2=(4, 6, 3), b2=(4, 3))
    # Members may change places, and each has its units in an order of its own.
    groups = {
        "w0": {makes(name, 0) for name in params},
        "w0#2": {makes("w0", 2), makes("b0", 1), takes("w1", 1)},
        "w1": {makes("w1", 2), makes("b1", 1), takes("w2", 1)},
    }
    nested = {"w0#2": ("w0", (4,)), "w1": ("w0", (4,))}
    return fn, params, (uniform(3, 5),), groups, nested


@case
def gated_linear_unit():
    def fn(p, x):
        x = jax.nn.glu(x @ p["in"] + p["in_bias"][None])
        return jax.nn.silu(x @ p["mid"]) @ p["out"]

    params = shapes(**{"in": (5, 14)}, in_bias=(14,), mid=(7, 6), out=(6, 3))
    groups = {
        "in": {makes("in", 1, start=s) for s in (0, 7)}
        | {makes("in_bias", 0, start=s) for s in (0, 7)}
        | {takes("mid", 0)},
        "mid": {makes("mid", 1), takes("out", 0)},
    }
    return fn, params, (uniform(4, 5),), groups, {}


@case
def maxout():
    def fn(p, x):
        x = (x @ p["in"] + p["bias"][None]).reshape(-1, 5, 3).max(2)
        return x @ p["out"]

    params = shapes(**{"in": (4, 15)}, bias=(15,), out=(5, 2))
    # The 3 pieces of a unit are in no order, whatever the order of another's.
    groups = {
        "in": {makes("in", 1, after=3), makes("bias", 0, after=3), takes("out", 0)},
        "in#2": {makes("in", 1, before=5), makes("bias", 0, before=5)},
    }
    return fn, params, (uniform(4, 4),), groups, {"in#2": ("in", (5,))}


# --- encoders, towers, ties


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(7, name="encode")(x))
        mean, log_variance = jnp.split(nn.Dense(2 * 4, name="moments")(y), 2, axis=-1)
        z = mean + 0.5 * jnp.exp(0.5 * jnp.tanh(log_variance))
        divergence = (jnp.square(mean) + jnp.exp(log_variance) - log_variance).sum(-1)
        y = nn.Dense(5, name="out")(nn.relu(nn.Dense(6, name="decode")(z)))
        return jnp.concatenate([y, 0.1 * divergence[:, None]], axis=-1)


@case
def vae():
    groups = {
        "params/encode/kernel": layer("encode", 1) | {takes("params/moments/kernel", 0)},
        "params/moments/kernel": {makes("params/moments/kernel", 1, start=s) for s in (0, 4)}
        | {makes("params/moments/bias", 0, start=s) for s in (0, 4)}
        | {takes("params/decode/kernel", 0)},
        "params/decode/kernel": layer("decode", 1) | {takes("params/out/kernel", 0)},
    }
    return *linen(VAE(), uniform(4, 5)), groups, {}


class TwoTowers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, y = x[:, :3], x[:, 3:]
        x = nn.Dense(6, name="user_out")(nn.relu(nn.Dense(7, name="user")(x)))
        y = nn.Dense(6, name="item_out")(nn.relu(nn.Dense(8, name="item")(y)))
        x = x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True))
        y = y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True))
        return x @ y.T


@case
def two_towers():
    # As queries and keys: what users produce, items consume.
    groups = {
        "params/user/kernel": layer("user", 1) | {takes("params/user_out/kernel", 0)},
        "params/user_out/kernel": layer("user_out", 1)
        | {takes("params/item_out/kernel", 1), takes("params/item_out/bias", 0)},
        "params/item/kernel": layer("item", 1) | {takes("params/item_out/kernel", 0)},
    }
    return *linen(TwoTowers(), uniform(3, 7)), groups, {}


class Siamese(nn.Module):
    dot: bool

    @nn.compact
    def __call__(self, x):
        hidden, out = nn.Dense(7, name="hidden"), nn.Dense(6, name="out")
        a, b = (nn.tanh(out(nn.relu(hidden(part)))) for part in (x[:, 0], x[:, 1]))
        if self.dot:
            return jnp.einsum("bi,bi->b", a, b)
        return nn.Dense(2, name="head")(jnp.abs(a - b))


@case
def siamese_difference():
    groups = {
        "params/hidden/kernel": layer("hidden", 1) | {takes("params/out/kernel", 0)},
        "params/out/kernel": layer("out", 1) | {takes("params/head/kernel", 0)},
    }
    return *linen(Siamese(dot=False), uniform(4, 2, 5)), groups, {}


@case
def siamese_product():
    # One tower on both sides of a contraction: it has both roles.
    groups = {
        "params/hidden/kernel": layer("hidden", 1) | {takes("params/out/kernel", 0)},
        "params/out/kernel": {
            ("params/out/kernel", 1, 1, 1, "both", 0, 0),
            ("params/out/bias", 0, 1, 1, "both", 0, 0),
        },
    }
    return *linen(Siamese(dot=True), uniform(4, 2, 5)), groups, {}


@case
def bilinear():
    def fn(p, x):
        a, b = jnp.tanh(x[:, 0] @ p["left"]), jnp.tanh(x[:, 1] @ p["right"])
        return jax.nn.relu(jnp.einsum("bi,oij,bj->bo", a, p["w"], b)) @ p["out"]

    params = shapes(left=(4, 5), right=(4, 6), w=(7, 5, 6), out=(7, 3))
    groups = {
        "left": {makes("left", 1), takes("w", 1)},
        "right": {makes("right", 1), takes("w", 2)},
        "w": {makes("w", 0), takes("out", 0)},
    }
    return fn, params, (uniform(3, 2, 4),), groups, {}


@case
def tied_autoencoder():
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["hidden"][None]) @ p["w"].T + p["visible"][None]

    params = shapes(w=(5, 7), hidden=(7,), visible=(5,))
    groups = {"w": {("w", 1, 1, 1, "both", 0, 0), makes("hidden", 0)}}
    return fn, params, (uniform(4, 5),), groups, {}


# --- multi-layer perceptrons of Haiku and Equinox


def haiku_sequential(x):
    layers = [hk.Flatten(), hk.Linear(7, name="first"), jax.nn.relu, hk.Linear(6, name="second")]
    return hk.Sequential([*layers, jnp.tanh, hk.Linear(3, name="head")])(x)


@case
def sequential_haiku():
    groups = {
        "first/w": {makes("first/w", 1), makes("first/b", 0), takes("second/w", 0)},
        "second/w": {makes("second/w", 1), makes("second/b", 0), takes("head/w", 0)},
    }
    return *from_haiku(haiku_sequential, uniform(4, 2, 3)), groups, {}


@case
def mlp_haiku():
    def at(i, name):
        return f"mlp/~/linear_{i}/{name}"

    groups = {
        at(i, "w"): {makes(at(i, "w"), 1), makes(at(i, "b"), 0), takes(at(i + 1, "w"), 0)}
        for i in range(2)
    }
    return *from_haiku(lambda x: hk.nets.MLP([7, 6, 3])(x), uniform(4, 5)), groups, {}


class EquinoxMLP(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(5, 3, width_size=7, depth=2, key=key)

    def __call__(self, x):
        return jax.vmap(self.mlp)(x)


@case
def mlp_equinox():
    def at(i, name):
        return f"mlp/layers/{i}/{name}"

    groups = {
        at(i, "weight"): {
            makes(at(i, "weight"), 0),
            makes(at(i, "bias"), 0),
            takes(at(i + 1, "weight"), 1),
        }
        for i in range(2)
    }
    return *from_equinox(EquinoxMLP, uniform(4, 5)), groups, {}
