"""Small transformers, norm before each sublayer: of image patches, and of characters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from experiments.convolution import convolution

# Patches along either side of an image.
_PATCHES = 4
# Units of a hidden layer of a block, in multiples of the residual stream's.
_EXPANSION = 4
_SMALL = nn.initializers.normal(0.02)


class _Transformer(nn.Module):
    """What the vision transformer and the language model are made of.

    Attributes:
        depth: Blocks of attention and a hidden layer.
        heads: Of the attention.
        head_units: Of each head; the residual stream has `heads * head_units`.
        classes: Number of logits.
        use_bias: Whether the layers, norms among them, have biases.
        dtype: Of the activations; logits are float32.
    """

    depth: int
    heads: int
    head_units: int
    classes: int
    use_bias: bool
    dtype: Any

    @property
    def _width(self) -> int:
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
            hidden = nn.gelu(self._dense(self._norm(x), _EXPANSION * self._width))
            x = x + self._dense(hidden, self._width)
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
        del train
        count, height, width, _ = images.shape
        if height % _PATCHES or width % _PATCHES:
            raise ValueError(
                f"Images of {(height, width)} pixels can't be cut into {_PATCHES} by {_PATCHES}"
                f" patches; both sides must be multiples of {_PATCHES}."
            )
        patch = (height // _PATCHES, width // _PATCHES)
        x = nn.Conv(
            self._width,
            patch,
            strides=patch,
            padding="VALID",
            use_bias=self.use_bias,
            dtype=self.dtype,
            conv_general_dilated=convolution if jax.default_backend() == "cpu" else None,
        )(images)
        x = x.reshape(count, _PATCHES * _PATCHES, self._width)
        token = jnp.broadcast_to(self._added("class_token", 1), (count, 1, self._width))
        x = jnp.concatenate([token, x], axis=1)
        x = x + self._added("positions", x.shape[1])[None]
        return self._logits(self._blocks(x)[:, 0])


class GPT(_Transformer):
    """A language model: of each token, the logits of the next one, by those up to it alone.

    The embedding and the output layer are not tied.
    """

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch context"], train: bool = False
    ) -> Float[Array, "batch context classes"]:
        del train
        context = tokens.shape[1]
        x = nn.Embed(self.classes, self._width, dtype=self.dtype)(tokens)
        x = x + self._added("positions", context)[None]
        return self._logits(self._blocks(x, jnp.tril(jnp.ones((context, context), bool))))
