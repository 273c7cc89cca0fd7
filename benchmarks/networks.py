"""Networks of the sizes of the paper, as plain functions: what is timed are their shapes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Network = tuple[Callable[[Any, Array], Array], dict[str, tuple[int, ...]], tuple[int, ...]]
"""A function of (params, x), the shapes of its parameters, and the shape of its input."""


def _conv(x: Array, kernel: Array, stride: int = 1) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)


def mlpnet() -> Network:
    """784-400-200-100-10, ReLU, no biases."""
    return mlp((784, 400, 200, 100, 10))


def vgg11() -> Network:
    """64 M 128 M 256 256 M 512 512 M 512 512 M, 3x3, then 512 to 10; no biases, no norm."""
    plan = ((64, True), (128, True), (256, False), (256, True))
    plan += ((512, False), (512, True), (512, False), (512, True))
    shapes: dict[str, tuple[int, ...]] = {}
    width = 3
    for i, (out, _) in enumerate(plan):
        shapes[f"conv{i}"] = (3, 3, width, out)
        width = out
    shapes["dense"] = (width, 10)

    def apply(params: dict[str, Array], x: Array) -> Array:
        for i, (_, pool) in enumerate(plan):
            x = jax.nn.relu(_conv(x, params[f"conv{i}"]))
            if pool:
                window = (1, 2, 2, 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
        return x.reshape(len(x), -1) @ params["dense"]

    return apply, shapes, (1, 32, 32, 3)


def vgg16() -> Network:
    """The VGG16 of Git Re-Basin: LayerNorm after each convolution, biases, three dense layers.

    Parameters have the names of its specification.
    """
    plan = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
    shapes: dict[str, tuple[int, ...]] = {}
    width = 3
    for number, out in enumerate(filter(None, plan)):
        shapes[f"Conv_{number}/kernel"] = (3, 3, width, out)
        shapes[f"Conv_{number}/bias"] = (out,)
        shapes[f"LayerNorm_{number}/scale"] = (out,)
        shapes[f"LayerNorm_{number}/bias"] = (out,)
        width = out
    for number, out in enumerate((512, 512, 10)):
        shapes[f"Dense_{number}/kernel"] = (width, out)
        shapes[f"Dense_{number}/bias"] = (out,)

    def apply(params: dict[str, Array], x: Array) -> Array:
        number = 0
        for out in plan:
            if not out:
                window = (1, 2, 2, 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
                continue
            x = _conv(x, params[f"Conv_{number}/kernel"]) + params[f"Conv_{number}/bias"]
            x = jax.nn.standardize(x, axis=-1)
            x = x * params[f"LayerNorm_{number}/scale"] + params[f"LayerNorm_{number}/bias"]
            x = jax.nn.relu(x)
            number += 1
        x = x.reshape(len(x), -1)
        for number in range(3):
            x = x if number == 0 else jax.nn.relu(x)
            x = x @ params[f"Dense_{number}/kernel"] + params[f"Dense_{number}/bias"]
        return x

    return apply, shapes, (1, 32, 32, 3)


def mlp(widths: tuple[int, ...]) -> Network:
    """Dense layers of some widths, ReLU between them, no biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, pair in enumerate(zip(widths, widths[1:], strict=False)):
        shapes[f"dense{number}"] = pair

    def apply(params: dict[str, Array], x: Array) -> Array:
        for number, name in enumerate(shapes):
            x = (jax.nn.relu(x) if number else x) @ params[name]
        return x

    return apply, shapes, (1, widths[0])


def vit(depth: int = 12, head_units: int = 8) -> Network:
    """The vision transformer of the studies: 4 heads, images of MNIST.

    Args:
        depth: The number of blocks.
        head_units: The number of units of each head.
    """
    from experiments.transformers import ViT

    module = ViT(
        depth=depth,
        heads=4,
        head_units=head_units,
        classes=10,
        use_bias=True,
        dtype=jnp.float32,
    )
    size = (1, 28, 28, 1)
    tree = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(size))
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in flat}

    def apply(params: dict[str, Array], x: Array) -> Any:
        return module.apply(treedef.unflatten([params[name] for name in shapes]), x)

    return apply, shapes, size


def resnet18(divisor: int = 1) -> Network:
    """3x3 stem, basic blocks [2, 2, 2, 2], 1x1 shortcuts where the shape changes; no biases.

    Args:
        divisor: what the widths are divided by.
    """
    width = 64 // divisor
    shapes: dict[str, tuple[int, ...]] = {"stem": (3, 3, 3, width)}
    blocks = []
    for stage in range(4):
        out = (64 << stage) // divisor
        for number in range(2):
            name, stride = f"stage{stage}/block{number}", 2 if stage and not number else 1
            blocks.append((name, stride))
            shapes[f"{name}/first"] = (3, 3, width, out)
            shapes[f"{name}/second"] = (3, 3, out, out)
            if width != out:
                shapes[f"{name}/shortcut"] = (1, 1, width, out)
            width = out
    shapes["dense"] = (width, 10)

    def apply(params: dict[str, Array], x: Array) -> Array:
        x = jax.nn.relu(_conv(x, params["stem"]))
        for name, stride in blocks:
            y = jax.nn.relu(_conv(x, params[f"{name}/first"], stride))
            y = _conv(y, params[f"{name}/second"])
            if f"{name}/shortcut" in params:
                x = _conv(x, params[f"{name}/shortcut"], stride)
            x = jax.nn.relu(x + y)
        return jnp.mean(x, axis=(1, 2)) @ params["dense"]

    return apply, shapes, (1, 32, 32, 3)


def transformer(
    depth: int, width: int, heads: int, vocabulary: int, scanned: bool = False
) -> Network:
    """A language model: one kernel for queries, keys and values, RMSNorm, SwiGLU in one kernel.

    Args:
        depth: number of blocks.
        width: of the residual stream; that of the gated layers is 4 times as much.
        heads: of attention, of `width // heads` dimensions each.
        vocabulary: number of tokens.
        scanned: whether the blocks are stacked and run by `lax.scan`.

    Returns:
        The network, of tokens `[batch, time]`.
    """
    block = {
        "norm1": (width,),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "norm2": (width,),
        "gate_up": (width, 8 * width),
        "down": (4 * width, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocabulary, width)}
    if scanned:
        shapes |= {f"blocks/{name}": (depth, *shape) for name, shape in block.items()}
    else:
        shapes |= {f"{i}/{name}": shape for i in range(depth) for name, shape in block.items()}
    shapes |= {"norm": (width,), "head": (width, vocabulary)}

    def norm(x: Array, scale: Array) -> Array:
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x * scale[None, None]

    def step(x: Array, p: dict[str, Array]) -> Array:
        parts = jnp.split(norm(x, p["norm1"]) @ p["qkv"], 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in parts)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + y.reshape(x.shape) @ p["out"]
        gate, up = jnp.split(norm(x, p["norm2"]) @ p["gate_up"], 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ p["down"]

    def apply(params: dict[str, Array], tokens: Array) -> Array:
        x = params["embed"][tokens]
        if scanned:
            stacked = {name: params[f"blocks/{name}"] for name in block}
            x, _ = lax.scan(lambda x, p: (step(x, p), None), x, stacked)
        else:
            for i in range(depth):
                x = step(x, {name: params[f"{i}/{name}"] for name in block})
        return norm(x, params["norm"]) @ params["head"]

    return apply, shapes, (1, 8)


def llama(depth: int, width: int, heads: int, hidden: int, vocabulary: int) -> Network:
    """A language model with the parts of Llama: RMSNorm, rotary positions, SwiGLU.

    Args:
        depth: number of blocks.
        width: of the residual stream.
        heads: of attention, of `width // heads` dimensions each.
        hidden: number of units of each gated layer.
        vocabulary: number of tokens.

    Returns:
        The network, of tokens `[time]`.
    """
    each = (heads, width // heads)
    block = {"norm1": (width,), "norm2": (width,), "out": (*each, width)}
    block |= dict.fromkeys(("query", "key", "value"), (width, *each))
    block |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocabulary, width), "norm": (width,)}
    shapes["head"] = (width, vocabulary)
    for number in range(depth):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in block.items()}

    def norm(x: Array, scale: Array) -> Array:
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale[None]

    def rotated(x: Array) -> Array:
        """Turns pairs of dimensions by angles that grow with the position."""
        first, second = jnp.split(x, 2, axis=-1)
        frequencies = 1e4 ** -jnp.linspace(0, 1, first.shape[-1], endpoint=False)
        angles = jnp.arange(len(x))[:, None, None] * frequencies[None, None]
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        parts = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate(parts, axis=-1)

    def attention(p: dict[str, Array], y: Array) -> Array:
        query, key = (rotated(jnp.einsum("td,dhk->thk", y, p[name])) for name in ("query", "key"))
        value = jnp.einsum("td,dhk->thk", y, p["value"])
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return jnp.einsum("thk,hkd->td", y, p["out"])

    def apply(params: dict[str, Array], tokens: Array) -> Array:
        x = params["embed"][tokens]
        for number in range(depth):
            p = {name: params[f"layers.{number}.{name}"] for name in block}
            x = x + attention(p, norm(x, p["norm1"]))
            y = norm(x, p["norm2"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return norm(x, params["norm"]) @ params["head"]

    return apply, shapes, (8,)


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLPNet": mlpnet,
    "VGG11": vgg11,
    "ResNet18": resnet18,
}
