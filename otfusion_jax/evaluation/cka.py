"""Linear CKA: how similar the activations of two networks are, whatever the order of units."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from otfusion_jax.common.arguments import kind_of, require_batches
from otfusion_jax.evaluation.moments import joined, moments


def linear_cka(
    batches: Iterable[tuple[Array, Array]],
) -> Float[Array, ""]:
    """Compares the activations of two networks, of any architectures, by linear CKA.

    It is the squared norm of the cross-covariance of the units over the norms of the covariances
    within each network (Kornblith et al., Similarity of Neural Network Representations Revisited,
    ICML 2019, eq. 4, centered): `|X'Y|² / (|X'X| |Y'Y|)`. Neither permutations and rotations of the
    units change it, nor one scale for all of them. It is that of all samples together, and not the
    mean over batches; what is kept of these is quadratic in the number of units.

    Args:
        batches: Pairs of activations of the same samples, `[samples, n]` and `[samples, m]`, a list
            or a generator.

    Returns:
        The linear CKA, from 0 to 1, in float32 or wider. NaN if the units of one of the networks do
        not vary.

    Raises:
        ValueError: If there are no batches, or if a pair has other samples or units than it should.
        TypeError: If the batches are a single array, or what they hold is no pair.
    """
    require_batches(batches)
    total = None
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"a batch is {kind_of(batch)}; give pairs of activations, as in "
                "linear_cka([(x, y)]) with x [samples, n] and y [samples, m]"
            )
        x, y = map(_as_array, batch)
        is_matrix = x.ndim == 2 and y.ndim == 2
        if not is_matrix or x.shape[0] != y.shape[0] or not x.size or not y.size:
            raise ValueError(
                f"activations have shapes {x.shape} and {y.shape}; give [samples, n] and "
                "[samples, m] of the same samples, one or more"
            )
        found = moments(x.T, y.T, intra=True)
        # Units are told apart by their position: batches of other units would be added up.
        if total is not None:
            _require_units(total.source_mean, x)
            _require_units(total.target_mean, y)
            found = joined(total, found)
        total = found
    if total is None:
        raise ValueError("no batches of activations were given; give at least one pair")
    return total.linear_cka()


def _as_array(activations: Any) -> Array:
    """Reads activations as floating-point numbers."""
    if not isinstance(activations, jax.Array | np.ndarray):
        raise TypeError(f"activations are {kind_of(activations)}; give arrays")
    is_inexact = jnp.issubdtype(activations.dtype, jnp.inexact)
    # Counts and masks are activations, too: as numbers they have means.
    return jnp.asarray(activations, None if is_inexact else jnp.float32)


def _require_units(mean: Array, activations: Array) -> None:
    """Refuses a batch whose units are not those of the batches before."""
    if mean.shape[0] != activations.shape[1]:
        raise ValueError(
            f"a batch has {activations.shape[1]} units, where those before have {mean.shape[0]}"
        )
