"""Draws the symmetries of the models: `python -m experiments.symmetries docs`.

The pictures are those of docs/symmetries.md. Nothing is trained, and no data is read.
"""

import argparse
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import matplotlib as mpl
from matplotlib.figure import Figure

import otfusion_jax as otf
from experiments.models import ModelConfig, build_model

# Of each kind of network one, with the images that it is for.
_NETWORKS = {
    "mlpnet": (28, 28, 1),
    "resnet18": (32, 32, 3),
    "lstm": (28, 28, 1),
    "vit": (28, 28, 1),
}
_CLASSES = 10
_BLOCKS, _WIDTH, _HEADS, _HIDDEN, _WORDS = 2, 64, 4, 128, 100


def draw_all(folder: Path) -> list[Path]:
    """Draws for each kind of network which parameters move together, and how.

    Args:
        folder: Where the pictures go, SVG files named after the networks.

    Returns:
        The pictures. The same networks give the same bytes.
    """
    drawn = []
    # Ids of SVG are random, and letters are drawn as curves, unless it is said.
    with mpl.rc_context({"svg.hashsalt": "otfusion-jax", "svg.fonttype": "none"}):
        symmetries = {name: _of_images(name, image) for name, image in _NETWORKS.items()}
        symmetries["llama"] = _of_llama()
        for name, symmetry in symmetries.items():
            path = folder / f"symmetry-{name}.svg"
            ax = otf.draw(symmetry.with_rotations().with_signs().with_scales())
            cast(Figure, ax.figure).savefig(path, metadata={"Date": None})
            drawn.append(path)
    return drawn


def _of_images(name: str, image: tuple[int, ...]) -> otf.Symmetry:
    """Traces a network on two images."""
    model = build_model(ModelConfig(name), _CLASSES)
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return otf.trace_symmetry(model.apply, variables, images)


def _of_llama() -> otf.Symmetry:
    """Traces a Llama-like network: RMSNorm, rotary positions, and a gated hidden layer."""
    heads = (_WIDTH, _HEADS, _WIDTH // _HEADS)
    block: dict[str, tuple[int, ...]] = dict.fromkeys("qkv", heads)
    block |= {"o": (*heads[1:], _WIDTH), "norm": (_WIDTH,), "hidden_norm": (_WIDTH,)}
    block |= dict.fromkeys(("gate", "up"), (_WIDTH, _HIDDEN)) | {"down": (_HIDDEN, _WIDTH)}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (_WORDS, _WIDTH)}
    for number in range(_BLOCKS):
        shapes |= {f"{number}/{name}": shape for name, shape in block.items()}
    shapes |= {"norm": (_WIDTH,), "head": (_WIDTH, _WORDS)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return otf.trace_symmetry(_llama, params, jnp.arange(8))


def _llama(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Predicts what follows each word of a text, of `[words]` numbers."""
    x = params["embedding"][tokens]
    mask = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
    for number in range(_BLOCKS):
        y = _rms_norm(x, params[f"{number}/norm"])
        q, k, v = (jnp.einsum("td,dhk->thk", y, params[f"{number}/{name}"]) for name in "qkv")
        logits = jnp.einsum("thk,shk->hts", _rotary(q), _rotary(k))
        attention = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf))
        x = x + jnp.einsum("hts,shk,hkd->td", attention, v, params[f"{number}/o"])
        y = _rms_norm(x, params[f"{number}/hidden_norm"])
        gated = jax.nn.silu(y @ params[f"{number}/gate"]) * (y @ params[f"{number}/up"])
        x = x + gated @ params[f"{number}/down"]
    return _rms_norm(x, params["norm"]) @ params["head"]


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None]


def _rotary(x: jax.Array) -> jax.Array:
    """Turns pairs of the dimensions of `[words, heads, dimensions]` by angles that grow."""
    first, second = jnp.split(x, 2, axis=-1)
    pairs = first.shape[-1]
    frequencies = 100.0 ** -jnp.linspace(0, 1, pairs, endpoint=False)
    angles = jnp.arange(len(x), dtype=x.dtype)[:, None, None] * frequencies[None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the symmetries of the models.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    for picture in draw_all(parser.parse_args().folder):
        print(picture)
