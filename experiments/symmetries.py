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
        for name, image in _NETWORKS.items():
            path = folder / f"symmetry-{name}.svg"
            ax = otf.draw(_symmetry(name, image))
            cast(Figure, ax.figure).savefig(path, metadata={"Date": None})
            drawn.append(path)
    return drawn


def _symmetry(name: str, image: tuple[int, ...]) -> otf.Symmetry:
    """Traces a network on two images, with all that its units may do."""
    model = build_model(ModelConfig(name), _CLASSES)
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    symmetry = otf.trace_symmetry(model.apply, variables, images)
    return symmetry.with_rotations().with_signs().with_scales()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the symmetries of the models.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    for picture in draw_all(parser.parse_args().folder):
        print(picture)
