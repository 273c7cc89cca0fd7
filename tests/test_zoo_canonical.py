"""The canonical form of networks of all kinds: of the same function, finite, and at rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo_attention  # noqa: F401, these add their networks to `CASES`
import zoo_convolution  # noqa: F401
import zoo_recurrent  # noqa: F401
from zoo import CASES

import otfusion_jax as otf


def largest_change(before, after) -> float:
    """The largest change of any number, over the largest number of its array."""
    largest = 0.0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(jnp.asarray(old).dtype, jnp.inexact):
            old, new = np.asarray(old), np.asarray(new)
            assert np.all(np.isfinite(new))
            size = np.max(np.abs(old), initial=0)
            largest = max(largest, float(np.max(np.abs(new - old), initial=0) / (size or 1)))
    return largest


@pytest.mark.parametrize("name", CASES)
def test_canonical_forms_compute_the_same_and_do_not_change_again(name: str):
    case = CASES[name]()
    symmetry = otf.trace_symmetry(case.fn, case.params, *case.inputs)
    free = symmetry.with_rotations().with_signs().with_scales()
    once = otf.canonicalize(free, case.params)
    outputs = (case.fn(params, *case.inputs) for params in (case.params, once))
    assert largest_change(*outputs) < 1e-4
    # Where scales and matrices meet in one parameter, they settle to within float32's rounding.
    assert largest_change(once, otf.canonicalize(free, once)) < 1e-3
