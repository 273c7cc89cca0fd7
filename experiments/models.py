"""Flax Linen models by name; the library sees no more of them than `apply` and parameters.

`MODELS`, at the end, names them all. A `ModelConfig` says which one is wanted, how wide and with
what, and `build_model` makes it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from experiments.convolution import convolution
from experiments.transformers import GPT, ViT

# The share of a running statistic that a step keeps.
BATCH_NORM_MOMENTUM = 0.9
# The smallest multiple of the usual widths that leaves the narrowest layer, of 64 units, one.
_NARROWEST = 1 / 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model to build.

    Attributes:
        name: The name of the model, a key of `MODELS`.
        use_bias: Whether its layers have biases; the models of the paper have none.
        use_norm: Whether batch norm follows its convolutions; not in the models of the paper.
        width: A factor that multiplies the number of units of every hidden layer.
    """

    name: str
    use_bias: bool = False
    use_norm: bool = False
    width: float = 1.0

    @property
    def label(self) -> str:
        """Name for folders and titles, such as `mlpnet` or `resnet18-norm-x0.25`."""
        label = self.name
        if self.use_bias:
            label += "-bias"
        if self.use_norm:
            label += "-norm"
        if self.width != 1:
            label += f"-x{self.width:g}"
        return label


class Model(Protocol):
    """What the experiments need of a model; Flax modules are typed for far more than this."""

    def init(self, key: PRNGKeyArray, images: Num[Array, "batch ..."], /) -> PyTree:
        """Draws parameters."""
        ...

    def apply(
        self,
        variables: PyTree,
        images: Num[Array, "batch ..."],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Maps images to logits `[batch, classes]`; what else it takes is Flax's.

        Instead of images, a language model takes tokens `[batch, context]` and gives the logits
        of the next ones, `[batch, context, classes]`.
        """
        ...


@functools.cache
def build_model(config: ModelConfig, classes: int, dtype: str = "float32") -> Model:
    """Builds a model; its parameters are held apart from it.

    Args:
        config: Which model to build.
        classes: The number of logits.
        dtype: The dtype of the activations; parameters, statistics and logits stay float32.

    Returns:
        A Flax module. Equal arguments give the same one, so that its methods can be static under
        jit: bound methods are equal only if they are of one object.

    Raises:
        ValueError: No model has this name, or a layer would have no units.
    """
    if config.name not in MODELS:
        raise ValueError(f"There is no model {config.name!r}; choose one of {sorted(MODELS)}.")
    if config.width < _NARROWEST:
        raise ValueError(f"A width of {config.width} leaves no units; give {_NARROWEST} or more.")
    build = MODELS[config.name]
    model = build(config, classes, jnp.dtype(dtype))
    return cast(Model, model)


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default initialisation of kernels and biases, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    The published recipes were tuned with it; Flax's default has three times its variance.

    Args:
        fan_in: The number of values that one unit takes in.

    Returns:
        An initializer as Flax takes it.
    """
    bound = 1 / math.sqrt(fan_in)

    def draw(key: PRNGKeyArray, shape: Any, dtype: Any, out_sharding: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return draw


class MLP(nn.Module):
    """A fully connected ReLU network on flattened images.

    Attributes:
        widths: The number of units of each hidden layer.
        classes: The number of logits.
        use_bias: Whether the layers have biases.
        dtype: The dtype of the activations; logits are float32.
    """

    widths: tuple[int, ...]
    classes: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch classes"]:
        del train  # what it computes in training is no different
        x = images.reshape((images.shape[0], -1))
        for width in self.widths:
            x = nn.relu(self._dense(x, width))
        return self._dense(x, self.classes).astype(jnp.float32)

    def _dense(self, x: Float[Array, "batch fan_in"], width: int) -> Float[Array, "batch width"]:
        init = uniform_fan_in(x.shape[-1])
        dense = nn.Dense(
            width, use_bias=self.use_bias, kernel_init=init, bias_init=init, dtype=self.dtype
        )
        return dense(x)


class LSTM(nn.Module):
    """A recurrent network that reads an image row by row (Hochreiter and Schmidhuber 1997).

    Attributes:
        width: The number of cells.
        classes: The number of logits.
        dtype: The dtype of the activations; logits are float32.
    """

    width: int
    classes: int
    dtype: Any

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        del train  # what it computes in training is no different
        rows = images.reshape((*images.shape[:2], -1))
        states: Any = nn.RNN(nn.LSTMCell(self.width, dtype=self.dtype), name="rnn")(rows)
        head = nn.Dense(self.classes, use_bias=False, dtype=self.dtype, name="head")
        return head(states[:, -1]).astype(jnp.float32)


class _Convolutional(nn.Module):
    """What VGG11 and ResNet18 are made of.

    Attributes:
        widths: The number of units of each layer (VGG), or of each stage (ResNet). `None` stands
            for max pooling, in a VGG alone.
        classes: The number of logits.
        use_bias: Whether the layers have biases.
        use_norm: Whether batch norm follows the convolutions.
        dtype: The dtype of the activations; logits are float32.
    """

    widths: tuple[int | None, ...]
    classes: int
    use_bias: bool
    use_norm: bool
    dtype: Any

    def _conv(self, x: Array, width: int, size: int, stride: int, train: bool) -> Array:
        """Convolves with a kernel of `size` by `size`, and normalises if batch norm is wanted."""
        init = uniform_fan_in(size * size * x.shape[-1])
        margin = (size // 2, size // 2)
        layer = nn.Conv(
            width,
            (size, size),
            strides=(stride, stride),
            padding=[margin, margin],
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            # Flax's own is fast on accelerators, and far slower on a CPU; see convolution.py.
            conv_general_dilated=convolution if jax.default_backend() == "cpu" else None,
        )
        x = layer(x)
        if self.use_norm:
            norm = nn.BatchNorm(not train, momentum=BATCH_NORM_MOMENTUM, dtype=self.dtype)
            x = norm(x)
        return x

    def _classify(self, x: Float[Array, "batch features"]) -> Float[Array, "batch classes"]:
        init = uniform_fan_in(x.shape[-1])
        dense = nn.Dense(
            self.classes,
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            dtype=jnp.float32,
        )
        return dense(x)


class VGG(_Convolutional):
    """Convolutions of 3x3 with ReLU, max pooling between them, and one dense layer."""

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        smallest = 2 ** self.widths.count(None)  # each pooling halves both sides
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"Images of {images.shape[1:3]} pixels are too small: {smallest} needed."
            )
        x = images.astype(self.dtype)
        for width in self.widths:
            if width is None:
                x = _halved(x)
            else:
                x = nn.relu(self._conv(x, width, 3, 1, train))
        flat = x.reshape((x.shape[0], -1))
        return self._classify(flat.astype(jnp.float32))


class ResNet(_Convolutional):
    """Basic blocks, two a stage, the first of each stage but one at half the resolution."""

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        widths = cast(tuple[int, ...], self.widths)
        x = images.astype(self.dtype)
        x = nn.relu(self._conv(x, widths[0], 3, 1, train))
        for stage, width in enumerate(widths):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(self._conv(x, width, 3, stride, train))
                y = self._conv(y, width, 3, 1, train)
                if x.shape != y.shape:
                    # The shortcut needs a projection where resolution or width change.
                    x = self._conv(x, width, 1, stride, train)
                x = nn.relu(x + y)
        pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return self._classify(pooled)


def _halved(x: Float[Array, "batch height width channels"]) -> Array:
    """Max pooling of 2x2; XLA runs the gradient of this form far faster than a window's."""
    batch, height, width, channels = x.shape
    rows = height // 2
    columns = width // 2
    whole = x[:, : 2 * rows, : 2 * columns]  # an odd last row or column is left out
    windows = whole.reshape(batch, rows, 2, columns, 2, channels)
    return windows.max(axis=(2, 4))


def _scaled(width: int, config: ModelConfig) -> int:
    """Returns the width that a layer of some width has in a model that is asked for."""
    return max(1, round(width * config.width))


def _without_batch_norm(config: ModelConfig) -> None:
    """Refuses batch norm in a model that has no place for it."""
    if config.use_norm:
        raise ValueError(
            f"{config.name} has no batch norm; leave --norm out or choose another model."
        )


def _mlpnet(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """MLPNet of Singh & Jaggi 2020, section 5: hidden layers of 400, 200 and 100 units."""
    _without_batch_norm(config)
    plan = (400, 200, 100)
    widths = tuple(_scaled(width, config) for width in plan)
    return MLP(widths, classes, config.use_bias, dtype)


def _lstm(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """An LSTM of 128 cells, whose gates have biases in any case."""
    _without_batch_norm(config)
    return LSTM(_scaled(128, config), classes, dtype)


def _vgg11(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """VGG11 of Singh & Jaggi 2020: for images of 32x32, which it pools down to one pixel."""
    plan = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)
    widths = tuple(width and _scaled(width, config) for width in plan)  # None stays None
    return VGG(widths, classes, config.use_bias, config.use_norm, dtype)


def _resnet18(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """ResNet18 of Singh & Jaggi 2020, with a stem for small images."""
    plan = (64, 128, 256, 512)
    widths = tuple(_scaled(width, config) for width in plan)
    return ResNet(widths, classes, config.use_bias, config.use_norm, dtype)


def _gpt(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """A language model in the manner of GPT-2: two blocks of 64 units, four heads."""
    _without_batch_norm(config)
    return GPT(2, 4, _scaled(16, config), classes, config.use_bias, dtype)


def _vit(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """A vision transformer (Dosovitskiy et al. 2021): two blocks of 64 units, four heads."""
    _without_batch_norm(config)
    return ViT(2, 4, _scaled(16, config), classes, config.use_bias, dtype)


def _vit_tiny(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """Half of the blocks of DeiT-Ti (Touvron et al. 2021): six of 192 units, three heads.

    A patch of an image of 32x32 has 192 values as well, so that none has to be lost. With the 64
    patches that are usual for such images, training would take four times as long.
    """
    _without_batch_norm(config)
    return ViT(6, 3, _scaled(64, config), classes, config.use_bias, dtype)


# The one place that names the models. A new one needs a line here, and a recipe in recipes.py.
MODELS: dict[str, Callable[[ModelConfig, int, Any], nn.Module]] = {
    "gpt": _gpt,
    "lstm": _lstm,
    "mlpnet": _mlpnet,
    "resnet18": _resnet18,
    "vgg11": _vgg11,
    "vit": _vit,
    "vit-tiny": _vit_tiny,
}
