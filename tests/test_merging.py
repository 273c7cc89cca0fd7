"""Merges of models against a few lines of NumPy, written from the equations of the papers."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import otfusion_jax as otf

otf_any: Any = otf  # for calls that a type checker would refuse


def model(seed: int, dtype: Any = jnp.float32) -> dict[str, Any]:
    return {
        "body": {"w": normal(7, 5, seed=seed).astype(dtype), "b": normal(5, seed=seed + 50)},
        "head": normal(5, 3, seed=seed + 90),
        "steps": jnp.array(seed),
        "mask": jnp.array([True, False]),
        "key": jax.random.key(seed),
    }


BASE, MODELS = model(0), [model(1), model(2), model(3)]
FLOATS = ("body/b", "body/w", "head")


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The floating-point leaves by key path, in float64."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in FLOATS:
            found[name] = np.asarray(leaf).astype(np.float64)
    return found


def vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in flat(tree).values()])


def close(found: Any, right: dict[str, np.ndarray] | np.ndarray) -> None:
    if isinstance(right, dict):
        right = np.concatenate([np.ravel(x) for x in right.values()])
    np.testing.assert_allclose(vector(found), right, rtol=1e-5, atol=1e-6)


BASES_SQUARED = jax.tree.map(lambda x: x * x if x.dtype == jnp.float32 else x, BASE)
GRAM = jnp.asarray(np.cov(np.random.default_rng(3).normal(size=(5, 40))), jnp.float32)

# What all merges share

MERGES: dict[str, Callable[[list], Any]] = {
    "task_arithmetic": lambda models: otf.task_arithmetic(models, BASE, 0.4),
    "ties": lambda models: otf.ties(models, BASE, 0.7),
    "dare": lambda models: otf.dare(models, BASE, jax.random.key(0), drop=0.5)[-1],
    "slerp": lambda models: otf.slerp(models[0], models[-1], 0.3),
    "slerp of whole models": lambda models: otf.slerp(models[0], models[-1], 0.3, per_leaf=False),
    "fisher_average": lambda models: otf.fisher_average(models, [BASES_SQUARED] * len(models)),
    "regmean": lambda models: otf.regmean(models, [{"head": GRAM}] * len(models)),
}


@pytest.mark.parametrize("name", MERGES)
def test_jitted_merges_are_the_same(name: str):
    found, jitted = MERGES[name](MODELS), jax.jit(MERGES[name])(MODELS)
    close(jitted, vector(found))


@pytest.mark.parametrize("name", MERGES)
def test_what_has_no_mean_is_that_of_the_last(name: str):
    found = MERGES[name](MODELS)
    assert jax.tree.structure(found) == jax.tree.structure(BASE)
    assert int(found["steps"]) == 3
    assert found["key"] == MODELS[2]["key"]
    np.testing.assert_array_equal(found["mask"], BASE["mask"])
    other = {**MODELS[0], "mask": ~BASE["mask"]}
    with pytest.raises(ValueError, match=r"(?s)integers or booleans that differ.*mask: bool"):
        MERGES[name]([other, MODELS[1]])


@pytest.mark.parametrize("name", MERGES)
def test_models_that_do_not_fit_are_named(name: str):
    with pytest.raises(ValueError, match=re.escape("head: shape (2,), expected (5, 3)")):
        MERGES[name]([MODELS[0], {**MODELS[1], "head": jnp.ones(2)}])
    if "slerp" not in name:
        with pytest.raises(ValueError, match="no models were given"):
            MERGES[name]([])


IN_PRECISION: dict[str, Callable[[list, Any], Any]] = {
    "task_arithmetic": lambda models, base: otf.task_arithmetic(models, base, 0.4),
    "ties": lambda models, base: otf.ties(models, base, 0.7),
    "dare": lambda models, base: otf.dare(models, base, jax.random.key(0), drop=0.5)[-1],
    "slerp": lambda models, base: otf.slerp(models[0], base, 0.3),
    "fisher_average": lambda models, base: otf.fisher_average(
        models, [jax.tree.map(jnp.square, x) for x in models]
    ),
    "regmean": lambda models, base: otf.regmean(models, [{"w": jnp.eye(7) + n} for n in (0, 1, 2)]),
}


@pytest.mark.parametrize("name", IN_PRECISION)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(name: str, dtype: Any):
    base, *models = [{"w": normal(7, 5, seed=seed).astype(dtype)} for seed in range(4)]
    merge = IN_PRECISION[name]
    found = merge(models, base)["w"]
    wide = merge([widened(x) for x in models], widened(base))["w"]
    assert found.dtype == dtype
    # Importances are squared in half precision, too.
    rtol = 0.05 if name == "fisher_average" else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(found.astype(jnp.float32), wide, rtol=rtol, atol=1e-3)


def widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


# Task vectors


def test_task_arithmetic_is_a_sum_of_differences():
    base, (a, b, c) = vector(BASE), map(vector, MODELS)
    close(otf.task_arithmetic(MODELS, BASE, 0.4), base + 0.4 * (a + b + c - 3 * base))
    close(otf.task_arithmetic(MODELS, BASE), a + b + c - 2 * base)
    several = otf.task_arithmetic(MODELS, BASE, [0.5, -1.0, 2.0])
    close(several, base + 0.5 * (a - base) - (b - base) + 2 * (c - base))
    close(otf.task_arithmetic(MODELS, BASE, 1 / 3), vector(otf.average(MODELS)))
    by_path = otf.task_arithmetic(MODELS[:1], BASE, lambda p: float(p == "head"))
    np.testing.assert_array_equal(by_path["body"]["w"], BASE["body"]["w"])
    np.testing.assert_allclose(by_path["head"], MODELS[0]["head"], atol=1e-6)


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    keep = int(np.ceil(density * delta.size))
    smallest = np.sort(np.abs(delta.ravel()))[-keep]
    return np.where(np.abs(delta) >= smallest, delta, 0)


def merged(base: np.ndarray, deltas: list[np.ndarray], scale: float) -> np.ndarray:
    """Elects signs and merges, as in Algorithm 1 of the paper."""
    elected = np.sign(sum(deltas))
    out = base.copy()
    for i in np.ndindex(base.shape):
        agreeing = [d[i] for d in deltas if np.sign(d[i]) == elected[i] and d[i] != 0]
        if agreeing:
            out[i] += scale * np.mean(agreeing)
    return out


@pytest.mark.parametrize("density", [0.07, 0.2, 0.5, 1.0])
def test_ties_trims_elects_and_merges(density: float):
    base = vector(BASE)
    deltas = [trimmed(vector(m) - base, density) for m in MODELS]
    close(otf.ties(MODELS, BASE, 0.7, density=density), merged(base, deltas, 0.7))
    right = {}
    for name, start in flat(BASE).items():
        own = [trimmed(flat(m)[name] - start, density) for m in MODELS]
        right[name] = merged(start, own, 1.0)
    close(otf.ties(MODELS, BASE, density=density, per_leaf=True), right)


def test_ties_of_opposites_stay_at_the_base():
    base, delta = jnp.zeros(3), jnp.array([1.0, 2.0, -4.0])
    np.testing.assert_array_equal(otf.ties([delta, -delta], base, density=1.0), base)
    np.testing.assert_array_equal(otf.ties([delta, base], base, density=1.0), delta)


def test_dare_drops_and_rescales():
    base, delta = jnp.ones(20_000), normal(20_000, seed=4)
    for drop in (0.0, 0.5, 0.9):
        (found,) = otf.dare([base + delta], base, jax.random.key(1), drop=drop)
        left = np.asarray(found - base)
        kept = left != 0
        assert abs(kept.mean() - (1 - drop)) < 0.01
        np.testing.assert_allclose(left[kept], np.asarray(delta)[kept] / (1 - drop), atol=1e-5)
    one, two = otf.dare([base + delta, base + delta], base, jax.random.key(1))
    assert np.mean((one != base) & (two != base)) < 0.02  # each model has a key of its own
    again, _ = otf.dare([base + delta, base + delta], base, jax.random.key(1))
    np.testing.assert_array_equal(one, again)


def test_dare_keeps_running_statistics():
    base = {"bn": {"mean": normal(4), "var": jnp.ones(4)}, "kernel": normal(3, 4)}
    model = jax.tree.map(lambda leaf: leaf + 0.5, base)
    (found,) = otf.dare([model], base, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found["bn"], model["bn"])
    assert not np.array_equal(found["kernel"], model["kernel"])


def test_leaves_of_one_shape_are_thinned_apart():
    base = {"a": jnp.zeros(1000), "b": jnp.zeros(1000)}
    (found,) = otf.dare([{"a": jnp.ones(1000), "b": jnp.ones(1000)}], base, jax.random.key(0))
    assert not np.array_equal(found["a"], found["b"])


def test_mistaken_scales_and_shares_are_named():
    with pytest.raises(ValueError, match=r"scale has shape \(2,\); give a number, or 3 of them"):
        otf.task_arithmetic(MODELS, BASE, [0.5, 0.5])
    with pytest.raises(ValueError, match="body/b: scale is nan, which is not finite"):
        otf.task_arithmetic(MODELS, BASE, lambda path: float("nan"))
    with pytest.raises(TypeError, match="body/b: scale is None, of type NoneType"):
        otf.task_arithmetic(MODELS, BASE, lambda path: None)
    with pytest.raises(ValueError, match=r"(?s)the base.*head: missing"):
        otf.task_arithmetic(MODELS, {k: v for k, v in BASE.items() if k != "head"})
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="density is .*; give the share to keep"):
            otf.ties(MODELS, BASE, density=density)
    for drop in (1.0, -0.1):
        with pytest.raises(ValueError, match="drop is .*; give a probability"):
            otf.dare(MODELS, BASE, jax.random.key(0), drop=drop)


# Arcs


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
def test_slerp_is_the_formula_of_the_paper(t: float):
    def arc(a, b):
        cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        angle = np.arccos(cosine)
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)

    a, b = MODELS[:2]
    close(otf.slerp(a, b, t), {name: arc(x, flat(b)[name]) for name, x in flat(a).items()})
    close(otf.slerp(a, b, t, per_leaf=False), arc(vector(a), vector(b)))


def test_slerp_keeps_a_common_length_and_lies_on_the_plane():
    a, b = normal(50, seed=1), normal(50, seed=2)
    b = b * jnp.linalg.norm(a) / jnp.linalg.norm(b)
    arc = otf.slerp(a, b, jnp.linspace(0, 1, 7))
    assert arc.shape == (7, 50)
    np.testing.assert_allclose(jnp.linalg.norm(arc, axis=1), float(jnp.linalg.norm(a)), rtol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(arc), tol=1e-3) == 2


@pytest.mark.parametrize("factor", [2.0, 1.0, 1 + 1e-6, -1.0, 0.0])
def test_where_there_is_no_arc_slerp_is_the_line(factor: float):
    a = normal(9)
    found, line = otf.slerp(a, factor * a, 0.25), otf.interpolate(a, factor * a, 0.25)
    np.testing.assert_allclose(found, line, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_slerp_has_gradients_where_vectors_are_parallel(sign: int):
    ones = jnp.ones(3)
    found = jax.grad(lambda a: otf.slerp({"w": a}, {"w": sign * ones}, 0.5)["w"].sum())(ones)
    np.testing.assert_allclose(found, 0.5, atol=1e-6)


def test_slerp_of_huge_and_tiny_numbers_is_in_range():
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    for size in (1e30, 1e-30):
        found = otf.slerp(size * a, size * b, 0.5)
        np.testing.assert_allclose(found / size, [0.5**0.5] * 2, rtol=1e-5)


# Soups


def test_a_soup_is_that_of_the_recipe():
    rng = np.random.default_rng(0)
    models = [jnp.asarray(rng.normal(size=4), jnp.float32) for _ in range(8)]

    def score(x: Any) -> float:
        return -float(jnp.sum((x - 0.3) ** 2))

    soup = otf.greedy_soup(models, score)
    kept: list[int] = []
    for number in sorted(range(8), key=lambda n: -score(models[n])):
        tried = [*kept, number]
        if not kept or score(sum(models[n] for n in tried) / len(tried)) >= score(
            sum(models[n] for n in kept) / len(kept)
        ):
            kept = tried
    assert soup.members == tuple(kept)
    assert 1 < len(kept) < 8
    np.testing.assert_allclose(soup.params, np.mean([models[n] for n in kept], axis=0), atol=1e-6)
    assert soup.score == score(soup.params) >= max(soup.scores)
    assert soup.scores == tuple(map(score, models))


def test_of_equal_models_the_first_comes_first_and_all_are_kept():
    soup = otf.greedy_soup(MODELS, lambda params: 1)
    assert soup.members == (0, 1, 2)
    close(soup.params, vector(otf.average(MODELS)))


def test_scores_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match="the score of model 0 is NaN"):
        otf.greedy_soup(MODELS, lambda params: float("nan"))
    with pytest.raises(TypeError, match="the score of model 0 is an array; return a number"):
        otf.greedy_soup(MODELS, lambda params: params["head"])
    with pytest.raises(TypeError, match="greedy_soup was called inside of jax.jit"):
        jax.jit(lambda m: otf.greedy_soup(m, lambda p: p["head"].sum()).params)(MODELS)


# Weights of each number


def drawn_fishers() -> list[Any]:
    fishers = []
    for seed in range(3):
        rng = np.random.default_rng(seed)

        def draw(leaf: Any, rng: Any = rng) -> Any:
            if leaf.dtype != jnp.float32:
                return leaf
            # Squared gradients are tiny, and many are 0.
            values = rng.exponential(size=leaf.shape) * rng.integers(0, 2, size=leaf.shape)
            return jnp.asarray(1e-30 * values, jnp.float32)

        fishers.append(jax.tree.map(draw, BASE))
    return fishers


def test_fisher_averages_are_weighted_by_each_number():
    fishers, weights = drawn_fishers(), [0.5, 0.25, 0.25]
    f = np.stack([vector(x) for x in fishers]) * np.array(weights)[:, None]
    x = np.stack([vector(x) for x in MODELS])
    plain = np.average(x, axis=0, weights=weights)
    total = f.sum(0)
    assert (total == 0).any()
    right = np.where(total > 0, (f * x).sum(0) / np.where(total > 0, total, 1), plain)
    close(otf.fisher_average(MODELS, fishers, weights), right)
    ones = [jax.tree.map(lambda leaf: jnp.ones_like(leaf), drawn_fishers()[0])] * 3
    ones = [{**x, "key": BASE["key"]} for x in ones]
    close(otf.fisher_average(MODELS, ones, weights), plain)


def test_importances_are_not_weighted_below_zero():
    ones = [jax.tree.map(jnp.ones_like, model) for model in MODELS]
    with pytest.raises(ValueError, match="body/b: a weight is -0.5; give 0 or more"):
        otf.fisher_average(MODELS, ones, [-0.5, 0.75, 0.75])


def test_importances_that_do_not_fit_are_named():
    one, two, three = drawn_fishers()
    with pytest.raises(ValueError, match="2 importances, but 3 models"):
        otf.fisher_average(MODELS, [one, two])
    with pytest.raises(ValueError, match="importance 1 has another structure"):
        otf.fisher_average(MODELS, [one, {"head": two["head"]}, three])
    with pytest.raises(ValueError, match=r"head: shape \(2,\), expected \(5, 3\), in importance 2"):
        otf.fisher_average(MODELS, [one, two, {**three, "head": jnp.ones(2)}])
    with pytest.raises(ValueError, match="head: values below 0, or not finite, in importance 0"):
        otf.fisher_average(MODELS, [{**one, "head": one["head"] - 1}, two, three])


# Regression


def inputs(seed: int, size: int, n: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, size)) + 0.5


@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 0.9, 1.0])
def test_regmean_is_the_closed_form_of_the_paper(off_diagonal: float):
    weights = [0.5, 0.25, 0.25]
    xs = {name: [inputs(n, size) for n in range(3)] for name, size in (("body/w", 7), ("head", 5))}
    grams = [{name: x[k].T @ x[k] for name, x in xs.items()} for k in range(3)]
    right = flat(otf.average(MODELS, weights))
    for name in xs:
        total, wanted = 0, 0
        for k, model_k in enumerate(MODELS):
            g = grams[k][name]
            g = weights[k] * (off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)))
            total, wanted = total + g, wanted + g @ flat(model_k)[name]
        right[name] = np.linalg.solve(total, wanted)
    given = [{name: jnp.asarray(g, jnp.float32) for name, g in x.items()} for x in grams]
    found = otf.regmean(MODELS, given, weights, off_diagonal=off_diagonal)
    np.testing.assert_allclose(
        vector(found), np.concatenate([np.ravel(x) for x in right.values()]), atol=1e-4
    )


def test_regmean_minimises_the_distance_of_outputs_and_averages_the_rest():
    w = [normal(2, 3, 6, 4, seed=seed) for seed in (0, 1)]  # a convolution's kernel
    xs = [inputs(seed, 36, 200).astype(np.float32) for seed in (0, 1)]
    xs[0][:, :4] = 0
    xs[1][:, 2:6] = 0  # inputs 2 and 3 are 0 in both
    grams = [{"params": jnp.asarray(x.T @ x)} for x in xs]
    found = np.asarray(otf.regmean(w, grams, off_diagonal=1.0)).reshape(36, 4)
    targets = np.concatenate([x @ np.asarray(k).reshape(36, 4) for x, k in zip(xs, w, strict=True)])
    mean = (w[0] + w[1]).reshape(36, 4) / 2
    right, *_ = np.linalg.lstsq(np.concatenate(xs), targets - np.concatenate(xs) @ mean, rcond=1e-5)
    np.testing.assert_allclose(found, right + mean, atol=1e-3)
    np.testing.assert_allclose(found[2:4], mean[2:4], atol=1e-5)
    turned = otf.regmean(
        [jnp.moveaxis(x, -1, 0) for x in w], grams, off_diagonal=1.0, output_axis=0
    )
    np.testing.assert_allclose(np.moveaxis(turned, 0, -1).reshape(36, 4), found, atol=1e-5)


def test_numbers_of_python_are_averaged_beside_kernels():
    models = [{"scale": scale, "w": normal(5, 2, seed=0)} for scale in (1.5, 2.5)]
    found = otf.regmean(models, [{"w": jnp.eye(5)}] * 2)
    assert found["scale"] == 2.0
    np.testing.assert_allclose(found["w"], models[0]["w"], rtol=1e-5)


def test_weights_sum_to_one_up_to_rounding():
    models = [normal(4, seed=seed) for seed in range(3)]
    otf.average(models, np.full(3, 1 / 3, np.float32).tolist())
    with pytest.raises(ValueError, match=r"the weights sum to 0\.999.*; divide them by their sum"):
        otf.average(models, [0.333, 0.333, 0.333])


def test_inner_products_that_do_not_fit_are_named():
    good = {"head": jnp.eye(5)}
    with pytest.raises(ValueError, match=r"head: shape \(4, 4\) in model 1, expected \(5, 5\)"):
        otf.regmean(MODELS, [good, {"head": jnp.eye(4)}, good])
    with pytest.raises(ValueError, match="head: none of model 2"):
        otf.regmean(MODELS, [good, good, {}])
    with pytest.raises(ValueError, match="tail: not a parameter"):
        otf.regmean(MODELS, [{"tail": jnp.eye(5)}] * 3)
    with pytest.raises(ValueError, match=r"body/b: float32 of shape \(5,\) is no kernel"):
        otf.regmean(MODELS, [{"body/b": jnp.eye(1)}] * 3)
    with pytest.raises(ValueError, match="2 dicts of inner products, but 3 models"):
        otf.regmean(MODELS, [good, good])
    with pytest.raises(ValueError, match="off_diagonal is 2.0"):
        otf.regmean(MODELS, [good] * 3, off_diagonal=2.0)


# Units in another order

IN_ORDER: dict[str, Callable[[list[Any], Any], Any]] = {
    "task_arithmetic": lambda models, base: otf.task_arithmetic(models, base, 0.4),
    "ties": lambda models, base: otf.ties(models, base, density=0.3),
    "ties, leaf by leaf": lambda models, base: otf.ties(models, base, per_leaf=True),
    "slerp": lambda models, base: otf.slerp(models[0], base, 0.3),
    "slerp of whole models": lambda models, base: otf.slerp(models[0], base, 0.3, per_leaf=False),
    "fisher_average": lambda models, base: otf.fisher_average(
        models, [jax.tree.map(jnp.square, x) for x in models]
    ),
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_merged_and_moved_is_moved_and_merged(name: str):
    def network(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["body"]["w"] + params["body"]["b"][None]) @ params["head"]

    base, *models = [{k: m[k] for k in ("body", "head")} for m in (BASE, *MODELS)]
    symmetry = otf.trace_symmetry(network, base, jnp.ones((2, 7)))
    plans = symmetry.random(jax.random.key(0))

    def move(params: Any) -> Any:
        return otf.transport(symmetry, plans, params)

    merge = IN_ORDER[name]
    close(merge([move(m) for m in models], move(base)), vector(move(merge(models, base))))


# Integers, by a pair of functions


def dequantised(model: Any) -> Any:
    return jax.tree.map(lambda q, s: q.astype(jnp.float32) * s, model["q"], model["scale"])


def quantised(params: Any) -> Any:
    scale = jax.tree.map(lambda w: jnp.abs(w).max() / 127, params)
    q = jax.tree.map(lambda w, s: jnp.round(w / s).astype(jnp.int8), params, scale)
    return {"q": q, "scale": scale}


def test_quantised_models_are_fused_between_two_functions():
    def network(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"]) @ params["v"]

    a = quantised({"w": normal(7, 5), "v": normal(5, 3)})
    symmetry = otf.trace_symmetry(network, dequantised(a), jnp.ones((2, 7)))
    plans = symmetry.random(jax.random.key(1))
    b = {**a, "q": otf.transport(symmetry, plans, dequantised(a))}
    b = {**a, "q": jax.tree.map(lambda w, s: jnp.round(w / s).astype(jnp.int8), b["q"], a["scale"])}
    with pytest.raises(ValueError, match="Make floating-point weights of quantised ones first"):
        otf.average([a, b])
    fused = quantised(otf.fuse(symmetry, [dequantised(b), dequantised(a)]))
    jax.tree.map(np.testing.assert_array_equal, fused["q"], a["q"])
