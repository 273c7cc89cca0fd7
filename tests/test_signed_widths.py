"""Checks units with signs that become another number of units."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals

import otfusion_jax as otf

X = normal(16, 4, seed=9)
WIDTHS = {"narrow": (3, 4), "wide": (6, 8), "other": (5, 7)}


def net(params, x):
    """Two layers of tanh. Squares change no sign, and so what reads them does not either."""
    first = jnp.tanh(x @ params["in"])
    second = jnp.tanh(first @ params["odd"] + (first * first) @ params["even"] + params["bias"])
    return second @ params["out"]


def network(name, seed):
    """Parameters of some widths, and the symmetry of their network with signs."""
    n, m = WIDTHS[name]
    shapes = {"in": (4, n), "odd": (n, m), "even": (n, m), "bias": (1, m), "out": (m, 2)}
    params = normals(shapes, seed)
    return otf.trace_symmetry(net, params, X).with_signs(), params


def planted(narrow, symmetry, seed):
    """Each unit twice, in any order, each time with a sign of its own."""
    plans = {}
    rng = np.random.default_rng(seed)
    for group in symmetry.groups:
        n = group.size
        signs = rng.choice([-1, 1], size=(1, 2 * n))
        copies = np.tile(np.eye(n), 2)[:, rng.permutation(2 * n)]
        plans[group.name] = jnp.asarray(signs * copies / (2 * n), jnp.float32)
    return plans, otf.transport(symmetry, plans, narrow)


def test_some_units_change_signs_and_some_weights_do_not():
    symmetry, _ = network("narrow", 0)
    first, second = symmetry.groups
    assert first.signed
    assert second.signed
    odd = {member.path: member.odd for member in first.members}
    assert odd == {"in": True, "odd": True, "even": False}
    assert all(member.odd for member in second.members)


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_network_is_found_in_a_wide_one_with_its_signs(seed):
    symmetry, narrow = network("narrow", seed)
    plans, wide = planted(narrow, symmetry, seed)
    np.testing.assert_allclose(net(wide, X), net(narrow, X), atol=1e-5)
    onto = otf.trace_symmetry(net, wide, X).with_signs()
    alignment = otf.align(symmetry, narrow, wide, onto=onto)
    chex.assert_trees_all_close(alignment.plans, plans, atol=1e-6)
    assert alignment.converged
    moved = otf.transport(symmetry, alignment, narrow, onto=onto)
    chex.assert_trees_all_close(moved, wide, atol=1e-5)
    # And back: of units that are alike up to signs, the mean is taken.
    back = otf.align(onto, wide, narrow, onto=symmetry)
    chex.assert_trees_all_close(otf.transport(onto, back, wide, onto=symmetry), narrow, atol=1e-5)


def test_a_network_moved_onto_twice_its_widths_stays_the_same_function():
    (symmetry, narrow), (onto, wide) = network("narrow", 0), network("wide", 1)
    alignment = otf.align(symmetry, narrow, wide, onto=onto)
    moved = otf.transport(symmetry, alignment, narrow, onto=onto)
    chex.assert_trees_all_equal_shapes(moved, wide)
    np.testing.assert_allclose(net(moved, X), net(narrow, X), atol=1e-5)
    assert (alignment.plans["in"] < 0).any()
    # Signs bring it closer than permutations do.
    plain, plain_onto = (otf.trace_symmetry(net, p, X) for p in (narrow, wide))
    permuted = otf.align(plain, narrow, wide, onto=plain_onto)
    assert alignment.objective < permuted.objective


@pytest.mark.parametrize("method", [otf.CoordinateDescent(), otf.ForwardPass()])
def test_the_same_under_jit(method):
    (symmetry, a), (onto, b) = network("wide", 0), network("other", 1)

    def moved(a):
        alignment = otf.align(symmetry, a, b, onto=onto, method=method)
        return otf.transport(symmetry, alignment, a, onto=onto)

    chex.assert_trees_all_close(jax.jit(moved)(a), moved(a), atol=1e-5)


def test_what_has_been_split_cannot_be_chained_or_turned_around():
    symmetry, narrow = network("narrow", 0)
    plans, _ = planted(narrow, symmetry, 0)
    signed = {"in": plans["in"]}
    for chain in (
        lambda: otf.invert(symmetry, signed),
        lambda: otf.compose(symmetry, signed, {}),
    ):
        with pytest.raises(ValueError, match=r"only permutations can be chained .*'in'"):
            chain()
    with pytest.raises(ValueError, match="no mass at all"):
        otf.transport(symmetry, {"in": 0 * signed["in"]}, narrow)
