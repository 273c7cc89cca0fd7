"""Averages of low-rank adapters against NumPy's decomposition of the average of their products."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from flax import nnx

import otfusion_jax as otf

RANK, N, M = 3, 9, 7
WEIGHTS = [0.5, 0.25, 0.25]


def adapter(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    factors = {
        "lora_a": normal(N, RANK, seed=seed).astype(dtype),
        "lora_b": normal(RANK, M, seed=seed + 20).astype(dtype),
    }
    return {"layer": factors, "bias": normal(M, seed=seed), "steps": jnp.array(seed)}


MODELS = [adapter(seed) for seed in range(3)]


def product(model: Any) -> np.ndarray:
    factors = model["layer"]
    return np.asarray(factors["lora_a"], float) @ np.asarray(factors["lora_b"], float)


def closest(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("rank", [None, 1, 2, 5, 9, 12])
def test_adapters_are_the_closest_to_the_average_of_products(rank: int | None):
    mean = np.average([product(m) for m in MODELS], axis=0, weights=WEIGHTS)
    found = otf.average_adapters(MODELS, WEIGHTS, rank=rank)
    wanted = RANK if rank is None else rank
    assert found["layer"]["lora_a"].shape == (N, wanted)
    assert found["layer"]["lora_b"].shape == (wanted, M)
    np.testing.assert_allclose(product(found), closest(mean, wanted), atol=1e-5)
    np.testing.assert_allclose(found["bias"], otf.average(MODELS, WEIGHTS)["bias"], atol=1e-6)
    assert int(found["steps"]) == 2
    jitted = jax.jit(lambda models: otf.average_adapters(models, WEIGHTS, rank=rank))(MODELS)
    np.testing.assert_allclose(product(jitted), product(found), atol=1e-5)


def test_factors_share_the_singular_values():
    factors = otf.average_adapters(MODELS)["layer"]
    left, right = (np.asarray(factors[name]) for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-4)


def test_one_product_in_other_factors_is_its_own_average():
    change = np.eye(RANK, dtype=np.float32) * 2 + np.ones((RANK, RANK), np.float32)
    factors = MODELS[0]["layer"]
    other = {
        "lora_a": factors["lora_a"] @ change,
        "lora_b": np.linalg.inv(change) @ factors["lora_b"],
    }
    found = otf.average_adapters([MODELS[0], {**MODELS[0], "layer": other}])
    np.testing.assert_allclose(product(found), product(MODELS[0]), atol=1e-4)
    # Where the average of the factors is another network.
    plain = otf.average([MODELS[0], {**MODELS[0], "layer": other}])
    assert np.abs(product(plain) - product(MODELS[0])).max() > 0.1


def test_half_precision_is_rounded_once():
    halves = [adapter(seed, jnp.bfloat16) for seed in range(3)]
    found = otf.average_adapters(halves)
    assert found["layer"]["lora_a"].dtype == jnp.bfloat16
    mean = np.mean([product(m) for m in halves], axis=0)
    np.testing.assert_allclose(product(found), closest(mean, RANK), atol=0.1)


def test_adapters_of_peft_and_of_nnx_are_found():
    peft = []
    for model in MODELS:
        factors = model["layer"]
        swapped = {"lora_A": {"w": factors["lora_b"]}, "lora_B": {"w": factors["lora_a"]}}
        peft.append({"layer": swapped})
    found = otf.average_adapters(peft)["layer"]
    right = otf.average_adapters(MODELS)
    whole = np.asarray(found["lora_B"]["w"]) @ np.asarray(found["lora_A"]["w"])
    np.testing.assert_allclose(whole, product(right), atol=1e-5)
    # In a file the names are whole.
    flat = []
    for model in peft:
        factors = model["layer"]
        flat.append({f"q.{name}.weight": factors[name]["w"] for name in factors})
    of_file = otf.average_adapters(flat)
    for name, factor in found.items():
        np.testing.assert_array_equal(of_file[f"q.{name}.weight"], factor["w"])


@pytest.mark.usefixtures("default_promotion")
def test_adapters_of_embeddings_are_averaged_as_products_too():
    models = []
    for sign in (1, -1):
        factors = {"lora_embedding_A": normal(RANK, N), "lora_embedding_B": normal(M, RANK, seed=1)}
        models.append({"embed": jax.tree.map(lambda leaf, sign=sign: sign * leaf, factors)})
    found = otf.average_adapters(models)["embed"]
    expected = models[0]["embed"]["lora_embedding_B"] @ models[0]["embed"]["lora_embedding_A"]
    np.testing.assert_allclose(
        found["lora_embedding_B"] @ found["lora_embedding_A"], expected, atol=1e-5
    )


def test_parts_of_adapters_that_belong_to_no_pair_are_named():
    models = [model | {"head": {"lora_magnitude": normal(M)}} for model in MODELS]
    with pytest.raises(ValueError, match=r"(?s)no pair was found.*  head/lora_magnitude: shape"):
        otf.average_adapters(models)
    pair = otf.LowRankPair("layer/lora_a", "layer/lora_b")
    found = otf.average_adapters(models, pairs=[pair])
    np.testing.assert_allclose(found["head"]["lora_magnitude"], normal(M), atol=1e-6)
    # What checks types in this suite sees a single pair, but not what is in a list.
    otf_any: Any = otf
    with pytest.raises(TypeError, match="LowRankPair"):
        otf_any.average_adapters(models, pairs=pair)
    with pytest.raises(TypeError, match="LowRankPair"):
        otf_any.average_adapters(models, pairs=[("layer/lora_a", "layer/lora_b")])


def test_networks_of_nnx_compute_the_average():
    nets = [nnx.LoRA(N, RANK, M, rngs=nnx.Rngs(seed)) for seed in range(2)]
    for seed, net in enumerate(nets):
        net.lora_b[...] = normal(RANK, M, seed=seed)
    states = [nnx.state(net) for net in nets]
    x = normal(4, N)
    mean = (np.asarray(nets[0](x)) + np.asarray(nets[1](x))) / 2
    wide = nnx.LoRA(N, 2 * RANK, M, rngs=nnx.Rngs(0))
    nnx.update(wide, otf.average_adapters(states, rank=2 * RANK))
    np.testing.assert_allclose(wide(x), mean, atol=1e-4)


def test_pairs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"name the leaves, pairs=\[LowRankPair"):
        otf.average_adapters([{"w": jnp.ones((2, 2))}])
    with pytest.raises(ValueError, match="layer/c: not there"):
        otf.average_adapters(MODELS, pairs=[otf.LowRankPair("layer/c", "layer/lora_b")])
    with pytest.raises(ValueError, match=r"shapes \(3, 7\) and \(9, 3\) have no product"):
        otf.average_adapters(MODELS, pairs=[otf.LowRankPair("layer/lora_b", "layer/lora_a")])
    with pytest.raises(ValueError, match="rank is 0; give 1 or more"):
        otf.average_adapters(MODELS, rank=0)


def test_both_factors_of_a_product_have_the_same_weights():
    models = [{"a": normal(4, 2, seed=n), "b": normal(2, 3, seed=n + 9)} for n in range(2)]
    pair = otf.LowRankPair("a", "b")
    with pytest.raises(ValueError, match="a and b have other weights, .* give both the same"):
        otf.average_adapters(
            models, lambda path: [1.0, 0.0] if path == "a" else [0.0, 1.0], pairs=[pair]
        )
