"""Flax Linen models by name; the library sees no more of them than `apply` and parameters."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from experiments.convolution import convolution
from experiments.transformers import GPT, ViT

# Of a running statistic, the share that a step keeps.
BATCH_NORM_MOMENTUM = 0.9
_NARROWEST = 1 / 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model to build.

    Attributes:
        name: A key of `MODELS`.
        use_bias: Whether its layers have biases; the models of the paper have none.
        use_norm: Whether batch norm follows its convolutions; not in the models of the paper.
        width: Multiplies the units of every hidden layer.
    """

    name: str
    use_bias: bool = False
    use_norm: bool = False
    width: float = 1.0

    @property
    def label(self) -> str:
        """Name for folders and titles, such as `mlpnet` or `resnet18-norm-x0.25`."""
        marks = [
            self.name,
            *(["bias"] if self.use_bias else []),
            *(["norm"] if self.use_norm else []),
            *([f"x{self.width:g}"] if self.width != 1 else []),
        ]
        return "-".join(marks)


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


def build_model(config: ModelConfig, classes: int, dtype: str = "float32") -> Model:
    """Builds a model; its parameters are held apart from it.

    Args:
        config: Which model.
        classes: Number of logits.
        dtype: Of the activations; parameters, statistics and logits stay float32.

    Returns:
        A Flax module; equal arguments give equal and equally hashed ones, so that it can be static
        under jit.

    Raises:
        ValueError: No model has this name, or a layer would have no units.
    """
    if config.name not in MODELS:
        raise ValueError(f"There is no model {config.name!r}; choose one of {sorted(MODELS)}.")
    if config.width < _NARROWEST:
        raise ValueError(f"A width of {config.width} leaves no units; give {_NARROWEST} or more.")
    return cast(Model, MODELS[config.name](config, classes, jnp.dtype(dtype)))


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default initialisation of kernels and biases, U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    The published recipes were tuned with it; Flax's default has three times its variance.
    """
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype, out_sharding=None: jax.random.uniform(
        key, shape, dtype, -bound, bound, out_sharding=out_sharding
    )


class MLP(nn.Module):
    """A fully connected ReLU network on flattened images.

    Attributes:
        widths: Units of each hidden layer.
        classes: Number of logits.
        use_bias: Whether the layers have biases.
        dtype: Of the activations.
    """

    widths: tuple[int, ...]
    classes: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch classes"]:
        del train
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


class _Convolutional(nn.Module):
    """What VGG11 and ResNet18 are made of; `None` in the plan of a VGG stands for max pooling.

    Attributes:
        widths: Units of each layer (VGG), or of each stage (ResNet).
        classes: Number of logits.
        use_bias: Whether the layers have biases.
        use_norm: Whether batch norm follows the convolutions.
        dtype: Of the activations.
    """

    widths: tuple[int | None, ...]
    classes: int
    use_bias: bool
    use_norm: bool
    dtype: Any

    def _conv(self, x: Array, width: int, size: int, stride: int, train: bool) -> Array:
        init = uniform_fan_in(size * size * x.shape[-1])
        x = nn.Conv(
            width,
            (size, size),
            strides=(stride, stride),
            padding=[(size // 2, size // 2)] * 2,
            use_bias=self.use_bias,
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            conv_general_dilated=convolution if jax.default_backend() == "cpu" else None,
        )(x)
        if self.use_norm:
            x = nn.BatchNorm(not train, momentum=BATCH_NORM_MOMENTUM, dtype=self.dtype)(x)
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
        smallest = 2 ** self.widths.count(None)
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"Images of {images.shape[1:3]} pixels are too small: {smallest} needed."
            )
        x = images.astype(self.dtype)
        for width in self.widths:
            x = _halved(x) if width is None else nn.relu(self._conv(x, width, 3, 1, train))
        return self._classify(x.reshape((x.shape[0], -1)).astype(jnp.float32))


class ResNet(_Convolutional):
    """Basic blocks, two a stage, the first of each stage but one at half the resolution."""

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        x = images.astype(self.dtype)
        x = nn.relu(self._conv(x, cast(int, self.widths[0]), 3, 1, train))
        for stage, width in enumerate(cast(tuple[int, ...], self.widths)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                y = nn.relu(self._conv(x, width, 3, stride, train))
                y = self._conv(y, width, 3, 1, train)
                if x.shape != y.shape:
                    x = self._conv(x, width, 1, stride, train)
                x = nn.relu(x + y)
        return self._classify(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


def _halved(x: Float[Array, "batch height width channels"]) -> Array:
    """Max pooling of 2x2; XLA runs the gradient of this form far faster than a window's."""
    batch, rows, columns, channels = x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]
    whole = x[:, : 2 * rows, : 2 * columns]
    return whole.reshape(batch, rows, 2, columns, 2, channels).max(axis=(2, 4))


def _scaled(width: int, config: ModelConfig) -> int:
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
    widths = tuple(_scaled(width, config) for width in (400, 200, 100))
    return MLP(widths, classes, config.use_bias, dtype)


def _vgg11(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """VGG11 of Singh & Jaggi 2020: for images of 32x32, which it pools down to one pixel."""
    plan = (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None)
    widths = tuple(width and _scaled(width, config) for width in plan)
    return VGG(widths, classes, config.use_bias, config.use_norm, dtype)


def _resnet18(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """ResNet18 of Singh & Jaggi 2020, with a stem for small images."""
    widths = tuple(_scaled(width, config) for width in (64, 128, 256, 512))
    return ResNet(widths, classes, config.use_bias, config.use_norm, dtype)


def _gpt(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """A language model in the manner of GPT-2: two blocks of 64 units, four heads."""
    _without_batch_norm(config)
    return GPT(2, 4, _scaled(16, config), classes, config.use_bias, dtype)


def _vit(config: ModelConfig, classes: int, dtype: Any) -> nn.Module:
    """A vision transformer (Dosovitskiy et al. 2021): two blocks of 64 units, four heads."""
    _without_batch_norm(config)
    return ViT(2, 4, _scaled(16, config), classes, config.use_bias, dtype)


MODELS: dict[str, Callable[[ModelConfig, int, Any], nn.Module]] = {
    "gpt": _gpt,
    "mlpnet": _mlpnet,
    "resnet18": _resnet18,
    "vgg11": _vgg11,
    "vit": _vit,
}
