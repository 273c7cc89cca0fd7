"""Covariances of the activations of two models, over any number of batches.

What is kept of the batches are means and sums of products, from which the result is the same,
up to rounding, as if all samples had come at once: memory does not grow with their number.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from otfusion_jax.alignment.costs import Gram, gram
from otfusion_jax.common.host import accumulation_dtype

# A unit that deviates from its mean by no more than so many units in the last place is constant.
_ROUNDING = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Means of units over samples, and inner products of what they deviate from these.

    Attributes:
        count: The number of samples, float `[]`.
        source_mean: The means of the source's units, `[*batch, n]`.
        target_mean: The means of the target's units, `[*batch, m]`.
        gram: The inner products of the deviations. They are `count` times the covariances.
    """

    count: Float[Array, ""]
    source_mean: Inexact[Array, "*batch n"]
    target_mean: Inexact[Array, "*batch m"]
    gram: Gram

    def correlations(self) -> Float[Array, "*batch n m"]:
        """Returns the correlation of each unit of the source with each of the target.

        NaN stands where one of the two does not vary.
        """
        source_norms = self._norms(self.gram.source_sq_norms, self.source_mean)
        target_norms = self._norms(self.gram.target_sq_norms, self.target_mean)
        return self.gram.cross / source_norms[..., :, None] / target_norms[..., None, :]

    def _norms(self, sq_norms: Array, mean: Array) -> Array:
        """Returns the norms of deviations, and NaN in place of what is rounding."""
        norms = jnp.sqrt(sq_norms)
        rounding = _ROUNDING * jnp.finfo(norms.dtype).eps * jnp.sqrt(self.count) * jnp.abs(mean)
        return jnp.where(norms > rounding, norms, jnp.nan)

    def linear_cka(self) -> Float[Array, "*batch"]:
        """Returns the linear CKA of the two models, see `linear_cka`.

        NaN stands where the units of one of the two do not vary. It needs inner products within
        each model.
        """
        assert self.gram.intra is not None, "the caller has asked for them"
        within_source, within_target = self.gram.intra
        source_norms = self._norms(self.gram.source_sq_norms, self.source_mean)
        target_norms = self._norms(self.gram.target_sq_norms, self.target_mean)
        # Scaled by the total variance first: fourth powers of activations are soon out of range.
        source_scale = jnp.nansum(source_norms**2, axis=-1)[..., None, None]
        target_scale = jnp.nansum(target_norms**2, axis=-1)[..., None, None]
        # One after the other: their product is a fourth power as well.
        across = self.gram.cross / jnp.sqrt(source_scale) / jnp.sqrt(target_scale)
        source_norm = jnp.linalg.norm(within_source / source_scale, axis=(-2, -1))
        target_norm = jnp.linalg.norm(within_target / target_scale, axis=(-2, -1))
        return jnp.sum(across**2, axis=(-2, -1)) / (source_norm * target_norm)


@functools.partial(jax.jit, static_argnames="intra")
def moments(
    source: Inexact[Array, "*batch n samples"],
    target: Inexact[Array, "*batch m samples"],
    intra: bool,
) -> Moments:
    """Takes the moments of one batch of samples.

    Args:
        source: The source's units, each a vector of its samples, one or more.
        target: The target's units, at the same samples.
        intra: Whether to take the inner products within each model as well.

    Returns:
        The moments, to be added to those of other batches.
    """
    source, target = _widened(source), _widened(target)
    source_mean = jnp.mean(source, axis=-1, keepdims=True)
    target_mean = jnp.mean(target, axis=-1, keepdims=True)
    products = gram(source - source_mean, target - target_mean, intra)
    count = jnp.asarray(source.shape[-1], products.cross.dtype)
    return Moments(count, source_mean[..., 0], target_mean[..., 0], products)


def _widened(units: Array) -> Array:
    """Returns numbers in single precision or wider: means of narrow ones would be rounded."""
    return units.astype(accumulation_dtype(units.dtype))


@jax.jit
def joined(first: Moments, second: Moments) -> Moments:
    """Puts the moments of two sets of samples together.

    It is the update of Chan, Golub and LeVeque (Algorithms for Computing the Sample Variance, 1983,
    eq. 2.1). Sums of squares, from which means are subtracted in the end, would leave nothing but
    rounding of units that hardly vary.

    Args:
        first: The moments of a set of samples.
        second: Those of another set, of the same units.

    Returns:
        The moments of both.
    """
    count = first.count + second.count
    share = second.count / count
    source_step = second.source_mean - first.source_mean
    target_step = second.target_mean - first.target_mean
    # Between the two sets units deviate as if each were at its mean: by this much in all.
    weight = jnp.sqrt(first.count * share)
    between = gram(
        (source_step * weight)[..., None],
        (target_step * weight)[..., None],
        intra=first.gram.intra is not None,
    )
    return Moments(
        count,
        first.source_mean + source_step * share,
        first.target_mean + target_step * share,
        first.gram + second.gram + between,
    )
