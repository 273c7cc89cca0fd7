"""Flax Linen models by name; the library sees no more of them than `apply` and parameters."""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol, cast

import flax.linen as nn
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model to build.

    Attributes:
        name: A key of `MODELS`.
        use_bias: Whether its layers have biases; the models of the paper have none.
    """

    name: str
    use_bias: bool = False

    @property
    def label(self) -> str:
        """Name for folders and titles, such as `mlpnet` or `mlpnet-bias`."""
        return f"{self.name}-bias" if self.use_bias else self.name


class Model(Protocol):
    """What the experiments need of a model; Flax modules are typed for far more than this."""

    def init(
        self, key: PRNGKeyArray, images: Float[Array, "batch height width channels"], /
    ) -> PyTree:
        """Draws parameters."""
        ...

    def apply(
        self, params: PyTree, images: Float[Array, "batch height width channels"], /
    ) -> Float[Array, "batch classes"]:
        """Maps images to logits."""
        ...


def build_model(config: ModelConfig, classes: int) -> Model:
    """Builds a model; its parameters are held apart from it.

    Args:
        config: Which model.
        classes: Number of logits.

    Returns:
        A Flax module; equal arguments give equal and equally hashed ones, so that it can be static
        under jit.

    Raises:
        ValueError: No model has this name.
    """
    if config.name not in MODELS:
        raise ValueError(f"There is no model {config.name!r}; choose one of {sorted(MODELS)}.")
    return cast(Model, MODELS[config.name](config, classes))


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
    """

    widths: tuple[int, ...]
    classes: int
    use_bias: bool

    @nn.compact
    def __call__(self, images: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
        x = images.reshape((images.shape[0], -1))
        for width in self.widths:
            x = nn.relu(self._dense(x, width))
        return self._dense(x, self.classes)

    def _dense(self, x: Float[Array, "batch fan_in"], width: int) -> Float[Array, "batch width"]:
        init = uniform_fan_in(x.shape[-1])
        return nn.Dense(width, use_bias=self.use_bias, kernel_init=init, bias_init=init)(x)


def _mlpnet(config: ModelConfig, classes: int) -> nn.Module:
    """MLPNet of Singh & Jaggi 2020, section 5: hidden layers of 400, 200 and 100 units."""
    return MLP((400, 200, 100), classes, config.use_bias)


MODELS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {"mlpnet": _mlpnet}
