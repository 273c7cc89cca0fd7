"""Checks the whole way, from a network to a fused one, on one network of each kind."""

import warnings

import jax
import numpy as np
import pytest
import zoo_attention  # noqa: F401, these add their networks to `CASES`
import zoo_convolution  # noqa: F401
from zoo import CASES

import otfusion_jax as otf

pytestmark = pytest.mark.compatibility


@pytest.mark.parametrize("name", ["mlp", "resnet", "attention"])
def test_permuted_copies_fuse_to_the_function_that_they_are(name: str):
    case = CASES[name]()
    symmetry = otf.trace_symmetry(case.fn, case.params, *case.inputs)
    keys = jax.random.split(jax.random.key(0), 2)
    copies = [otf.transport(symmetry, symmetry.random(key), case.params) for key in keys]
    right = case.fn(case.params, *case.inputs)
    spread = float(np.std(right))
    fused = case.fn(otf.fuse(symmetry, copies), *case.inputs)
    np.testing.assert_allclose(fused, right, atol=1e-4 * spread)
    with warnings.catch_warnings():
        # That an average of running statistics is worth little is what is shown here.
        warnings.simplefilter("ignore", otf.StatisticsWarning)
        vanilla = case.fn(otf.average(copies), *case.inputs)
    assert float(np.abs(vanilla - right).max()) > 1e-2 * spread
