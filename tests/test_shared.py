"""Models that share a body: permuted bodies are found again, and the reference's head is kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import otfusion_jax as otf

TOKENS = jnp.array([[0, 3, 1], [2, 2, 4]])


def network(params: Any, tokens: Any) -> Any:
    h = params["embed"][tokens].mean(1)
    for layer in params["body"]:
        h = jax.nn.relu(h @ layer["w"] + layer["b"][None])
    return h @ params["head"]


def model(seed: int, vocabulary: int = 5, classes: int = 3) -> Any:
    body = [
        {"w": normal(6, 8, seed=seed), "b": normal(8, seed=seed + 10)},
        {"w": normal(8, 7, seed=seed + 20), "b": normal(7, seed=seed + 30)},
    ]
    return {
        "embed": normal(vocabulary, 6, seed=seed + 40),
        "body": body,
        "head": normal(7, classes, seed=seed + 50),
        "steps": jnp.array(seed),
    }


REFERENCE = model(0)


def traced(params: Any) -> otf.Symmetry:
    return otf.trace_symmetry(network, params, TOKENS)


@pytest.fixture(scope="module")
def symmetry() -> otf.Symmetry:
    return traced(REFERENCE)


def test_a_body_in_another_order_is_found_again(symmetry: otf.Symmetry):
    """With another head and another vocabulary than the reference's."""
    other = {**REFERENCE, "embed": normal(9, 6, seed=1), "head": normal(7, 10, seed=2)}
    theirs = traced(other)
    moved = otf.transport(theirs, theirs.random(jax.random.key(3)), other)
    # What the embedding's dimensions are called is known by the body alone.
    found = otf.fuse_shared(symmetry, [moved, REFERENCE])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.params, REFERENCE)
    assert [(row.path, row.model) for row in found.unshared] == [("embed", 0), ("head", 0)]
    assert found.shared == 5
    # The other head, and the other's order of units, with the other as the reference.
    found = otf.fuse_shared(theirs, [moved, REFERENCE], reference=0)
    np.testing.assert_allclose(network(found.params, TOKENS), network(moved, TOKENS), atol=1e-4)


def test_models_of_one_structure_are_fused_as_by_fuse(symmetry: otf.Symmetry):
    models = [model(1), model(2), REFERENCE]
    weights = [0.5, 0.25, 0.25]
    found = otf.fuse_shared(symmetry, models, weights, reference=1)
    right = otf.fuse(symmetry, models, weights, reference=1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found.params, right)
    assert str(found) == "SharedFusion: 7 of 7 leaves fused"


def test_each_leaf_is_the_mean_of_the_models_that_have_it(symmetry: otf.Symmetry):
    still = symmetry.only(lambda name: False)
    one, two = model(1, classes=10), {k: v for k, v in model(2).items() if k != "embed"}
    two["tail"] = normal(4)
    with pytest.warns(otf.SymmetryWarning, match="no groups"):
        found = otf.fuse_shared(still, [one, two, REFERENCE], [0.5, 0.3, 0.2])
    close = np.testing.assert_allclose
    close(found.params["embed"], (0.5 * one["embed"] + 0.2 * REFERENCE["embed"]) / 0.7, atol=1e-6)
    close(found.params["head"], (0.3 * two["head"] + 0.2 * REFERENCE["head"]) / 0.5, atol=1e-6)
    body = [x["body"][0]["w"] for x in (one, two, REFERENCE)]
    close(found.params["body"][0]["w"], 0.5 * body[0] + 0.3 * body[1] + 0.2 * body[2], atol=1e-6)
    assert str(found).splitlines() == [
        "SharedFusion: 7 of 7 leaves fused",
        "not fused  model  why",
        "head       0      shape (7, 10), in the reference (7, 3)",
        "embed      1      missing",
        "tail       1      not in the reference",
    ]


def test_jitted_it_is_the_same(symmetry: otf.Symmetry):
    models = [model(1, classes=10), REFERENCE]
    found = otf.fuse_shared(symmetry, models).params
    jitted = jax.jit(lambda models: otf.fuse_shared(symmetry, models).params)(models)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), jitted, found)


def test_what_can_not_be_shared_is_named(symmetry: otf.Symmetry):
    wide = model(1)
    wide["body"][1] = {"w": normal(8, 9), "b": normal(9)}
    with pytest.raises(ValueError, match=r"(?s)differ in the number of units.*body/1/b: shape"):
        otf.fuse_shared(symmetry, [wide, REFERENCE])
    with pytest.raises(ValueError, match="model 0 has no leaf of the reference's key path"):
        otf.fuse_shared(symmetry, [{"other": normal(3)}, REFERENCE])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model(1))
    with pytest.raises(ValueError, match=r"body/1/w: dtype bfloat16, in the reference float32"):
        otf.fuse_shared(symmetry, [half, REFERENCE])
    with pytest.raises(ValueError, match="reference is 2, and there are 2 models"):
        otf.fuse_shared(symmetry, [REFERENCE, REFERENCE], reference=2)
    with pytest.raises(TypeError, match="reference is True, of type bool; give a model's position"):
        otf.fuse_shared(symmetry, [REFERENCE] * 2, reference=True)
    with pytest.raises(ValueError, match="model 0: .*not arrays"):
        otf.fuse_shared(symmetry, [{**REFERENCE, "head": "none"}, REFERENCE])
