"""Small transformers, norm before each sublayer: of image patches, and of characters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from experiments.convolution import convolution

# How many patches lie along either side of an image.
_PATCHES = 4
# The number of units of a block's hidden layer, in multiples of the residual stream's.
_EXPANSION = 4
# What is added to the tokens starts small, as in ViT and GPT-2.
_SMALL = nn.initializers.normal(0.02)


class _Transformer(nn.Module):
    """What the vision transformer and the language model are made of.

    Attributes:
        depth: The number of blocks, each of attention and a hidden layer.
        heads: The number of heads of the attention.
        head_units: The number of units of each head; the residual stream has `heads * head_units`.
        classes: The number of logits.
        use_bias: Whether the layers, norms among them, have biases.
        dtype: The dtype of the activations; logits are float32.
    """

    depth: int
    heads: int
    head_units: int
    classes: int
    use_bias: bool
    dtype: Any

    @property
    def _width(self) -> int:
        """The number of units of the residual stream."""
        return self.heads * self.head_units

    def _added(self, name: str, count: int) -> Float[Array, "count width"]:
        """A learned vector for each of some tokens."""
        return self.param(name, _SMALL, (count, self._width)).astype(self.dtype)

    def _blocks(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Bool[Array, "tokens tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """All blocks and the last norm; `mask` says which tokens a token may look at."""
        for _ in range(self.depth):
            attention = nn.MultiHeadDotProductAttention(
                self.heads, qkv_features=self._width, use_bias=self.use_bias, dtype=self.dtype
            )
            x = x + attention(self._norm(x), mask=mask)
            hidden = self._dense(self._norm(x), _EXPANSION * self._width)
            x = x + self._dense(nn.gelu(hidden), self._width)
        return self._norm(x)

    def _norm(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        return nn.LayerNorm(use_bias=self.use_bias, dtype=self.dtype)(x)

    def _dense(self, x: Float[Array, "*batch fan_in"], units: int) -> Float[Array, "*batch units"]:
        return nn.Dense(units, use_bias=self.use_bias, dtype=self.dtype)(x)

    def _logits(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch classes"]:
        return self._dense(x, self.classes).astype(jnp.float32)


class ViT(_Transformer):
    """A vision transformer: sixteen patches, a class token, learned positions."""

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        del train  # what it computes in training is no different
        count, height, width, _ = images.shape
        if height % _PATCHES or width % _PATCHES:
            raise ValueError(
                f"Images of {(height, width)} pixels can't be cut into {_PATCHES} by {_PATCHES}"
                f" patches; both sides must be multiples of {_PATCHES}."
            )
        patch = (height // _PATCHES, width // _PATCHES)
        embedding = nn.Conv(
            self._width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=self.use_bias,
            dtype=self.dtype,
            # Flax's own is fast on accelerators, and far slower on a CPU; see convolution.py.
            conv_general_dilated=convolution if jax.default_backend() == "cpu" else None,
        )
        patches = embedding(images).reshape(count, _PATCHES * _PATCHES, self._width)
        class_token = self._added("class_token", 1)
        token = jnp.broadcast_to(class_token, (count, 1, self._width))
        x = jnp.concatenate([token, patches], axis=1)
        x = x + self._added("positions", x.shape[1])[None]
        of_class_token = self._blocks(x)[:, 0]
        return self._logits(of_class_token)


class GPT(_Transformer):
    """A language model: of each token, the logits of the next one, by those up to it alone.

    The embedding and the output layer are not tied.
    """

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch context"], train: bool = False
    ) -> Float[Array, "batch context classes"]:
        del train  # what it computes in training is no different
        context = tokens.shape[1]
        embedding = nn.Embed(self.classes, self._width, dtype=self.dtype)
        x = embedding(tokens) + self._added("positions", context)[None]
        # Row i is of token i, which sees itself and those before it.
        mask = jnp.tril(jnp.ones((context, context), bool))
        return self._logits(self._blocks(x, mask))
