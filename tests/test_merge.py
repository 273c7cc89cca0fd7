"""Checks that the one call finds what was planted, and keeps what is best on held-out inputs."""

import dataclasses
import functools
import inspect
import sys
import warnings
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import normal, normals
from flax import nnx

import otfusion_jax as otf
from otfusion_jax.fusion import candidates, distill, merge_trials, samples
from otfusion_jax.fusion.merge_setting import Known

SIZES = (6, 12, 10, 4)
SHAPE = jax.ShapeDtypeStruct((2, SIZES[0]), jnp.float32)


def net(params, x):
    *hidden, last = params
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ last


def draw(seed: int) -> list[Any]:
    keys = jax.random.split(jax.random.key(seed), len(SIZES) - 1)
    shapes = zip(SIZES, SIZES[1:], strict=False)
    return [
        jax.random.normal(k, shape) / shape[0] ** 0.5 for k, shape in zip(keys, shapes, strict=True)
    ]


@functools.cache
def symmetry() -> otf.Symmetry:
    return otf.trace_symmetry(net, draw(0), SHAPE)


def shuffled(params, seed: int):
    """The same function, its units in another order."""
    rng = np.random.default_rng(seed)
    plans = {}
    for group in symmetry().groups:
        plans[group.name] = jnp.asarray(rng.permutation(group.size), jnp.int32)
    return otf.transport(symmetry(), plans, params)


def near(seed: int) -> list[Any]:
    """Two models that are alike, up to the order of their units."""
    a, noise = draw(seed), draw(seed + 100)
    b = [kernel + 0.2 * other for kernel, other in zip(a, noise, strict=True)]
    return [a, shuffled(b, seed)]


def data(count: int = 60, seed: int = 5):
    return normal(count, SIZES[0], seed=seed)


# Training is tried where a test is about it: each program of its own takes a while to compile.
unpolished = functools.partial(otf.merge, polish=0)
merge = functools.partial(unpolished, net, outputs="values")
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def rows(merged: otf.Merged) -> dict[tuple[str, str], otf.Trial]:
    return {(row.start, row.repair): row for row in merged.report.rows}


# --- what is found


def test_inputs_that_halves_and_all_are_learned_from_are_of_one_size():
    inputs = (np.arange(12.0, dtype=np.float32).reshape(6, 2),)
    known = Known(
        (),
        samples.Samples(inputs, 6),
        samples.Samples(inputs, 6),
        whole=samples.Samples(inputs, 12),
    )
    assert known.most == known.exchanged().most == 12
    # Where there are more, all together are never learned from.
    assert known._replace(more=samples.Samples(inputs, 9)).most == 6
    assert known.fit is not None
    (padded,) = known.fit.on_device(8)
    np.testing.assert_array_equal(padded[:6], inputs[0])
    assert padded.shape == (8, 2)
    assert not np.any(padded[6:])


def test_permutations_are_found_without_data():
    a = draw(0)
    merged = merge([a, shuffled(a, 1)], inputs=SHAPE, candidates=["as they are", "weights"])
    x = data()
    close(net(merged.params, x), net(a, x))
    assert merged.report.chosen.start != "as they are"
    assert str(merged) == str(merged.report)
    assert repr(merged).startswith("<Merged: 2 models, weights, permutations, then nothing, score")
    assert merged.report.held_out > 0
    assert merged.symmetry == symmetry()
    for model in merged.models:
        close(net(model, x), net(a, x))


def test_outputs_alone_are_fitted_where_units_rotate():
    def normed(params, x):
        h = x @ params["in"]
        h = h / jnp.sqrt(jnp.maximum(jnp.mean(h * h, axis=-1, keepdims=True), 1e-6))
        return jax.nn.relu(h @ params["hidden"]) @ params["out"]

    def permuted(params, x):
        return normed(params | {"in": jnp.tanh(params["in"])}, x)

    shapes = {"in": (6, 8), "hidden": (8, 8), "out": (8, 3)}
    models = [normals(shapes, seed) for seed in range(2)]
    for fn, is_tried in ((normed, True), (permuted, False)):
        merged = unpolished(fn, models, [data()], outputs="values", candidates=["weights"])
        repairs = {row.repair for row in merged.report.rows}
        assert ("LeastSquares(at=output)" in repairs) == is_tried


def test_of_equal_models_nothing_is_repaired():
    def shifted(params, x):
        h = jax.nn.relu(x @ params["in"] + params["bias"][None])
        return jax.nn.relu(h @ params["hidden"]) @ params["out"]

    model = normals({"in": (6, 8), "bias": (8,), "hidden": (8, 7), "out": (7, 4)}, seed=2)
    merged = unpolished(shifted, [model, model], [data(200, seed=9)], outputs="logits")
    assert merged.report.chosen.repair == "nothing"
    jax.tree.map(close, merged.params, model)


def test_to_train_nothing_is_a_mistake():
    with pytest.raises(ValueError, match="there is nothing to train"):
        otf.distill(net, draw(0), [draw(1)], [data()], outputs="values", trains=lambda path: False)


def test_weights_below_zero_and_single_samples_are_refused_before_any_work():
    models = [draw(0), draw(1)]
    with pytest.raises(ValueError, match=r"weights are \[1.5, -0.5\].*no mean of probabilities"):
        unpolished(net, models, [data()], outputs="logits", weights=[1.5, -0.5])
    with pytest.raises(ValueError, match=r"weights are \[1.5, -0.5\].*no mean of probabilities"):
        otf.distill(net, draw(0), models, [data()], outputs="logits", weights=[1.5, -0.5])
    with pytest.raises(ValueError, match="max_samples is 1; give 2 or more"):
        merge(models, [data()], max_samples=1)


def test_where_no_group_has_features_no_trial_is_called_after_them(monkeypatch):
    monkeypatch.setattr(candidates, "feature_gram", lambda *args, **options: {})
    merged = merge([draw(0), draw(1)], [data()], repairs=())
    problems = {row.start: row.problem for row in merged.report.rows}
    assert "no group of model 0 has features" in problems["features"]
    assert "no group of model 0 has features" in problems["preactivations"]
    assert not problems["weights"]


def test_of_images_that_are_drawn_the_match_is_chosen_by_weights():
    """Networks of which the features of drawn images say little: what is closest is repaired."""

    def convolved(params, x):
        x = jax.lax.conv_general_dilated(
            x, params[0], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(x).mean((1, 2)) @ params[1]

    a = [normal(3, 3, 3, 8, seed=0), normal(8, 4, seed=1)]
    b = [normal(3, 3, 3, 8, seed=7), normal(8, 4, seed=8)]
    shape = jax.ShapeDtypeStruct((2, 12, 12, 3), jnp.float32)
    merged = unpolished(convolved, [a, b], inputs=shape, outputs="values")
    spreads = {}
    for row in merged.report.rows:
        if row.repair == "nothing":
            only = unpolished(
                convolved,
                [a, b],
                inputs=shape,
                outputs="values",
                candidates=[row.start],
                repairs=(),
            )
            first, last = only.models
            spreads[row.start] = sum(
                float(jnp.sum((x - y) ** 2)) for x, y in zip(first, last, strict=True)
            )
    least = min(spreads.values())
    assert max(spreads.values()) > 1.1 * least
    chosen = merged.report.chosen
    assert spreads[chosen.start] == pytest.approx(least)
    # Of that match, the repair that scores best; of others, no repair is tried.
    of_chosen = [row.score for row in merged.report.rows if row.start == chosen.start]
    assert chosen.score == min(of_chosen)
    assert {row.start for row in merged.report.rows if row.repair != "nothing"} == {chosen.start}
    assert "the weights have decided" in str(merged.report).replace("\n", " ")


@pytest.mark.parametrize("count", [3, 8])
def test_several_models_are_moved_to_one(count: int):
    a = draw(0)
    few = ["weights", "barycenter"]
    models = [shuffled(a, seed) for seed in range(count)]
    merged = merge(models, [data()], candidates=few, repairs=(otf.LeastSquares(),))
    close(net(merged.params, data()), net(a, data()))
    assert ("barycenter", "nothing") in rows(merged)
    assert merged.report.chosen.score < 1e-9
    assert merged.report.models == len(merged.models) == len(merged.report.parents) == count
    for model in merged.models:
        close(net(model, data()), net(a, data()))


def test_several_models_that_differ_are_merged_by_weights_that_sum_to_one():
    first = near(0)
    models = [*first, shuffled(near(0)[1], 3), shuffled(first[0], 4)]
    weights = (0.4, 0.3, 0.2, 0.1)
    merged = merge(models, [data()], weights=weights, repairs=(), candidates=["weights"])
    expected = otf.average(merged.models, weights)
    jax.tree.map(np.testing.assert_array_equal, merged.params, expected)
    fresh = data(200, seed=9)
    target = sum(w * net(model, fresh) for w, model in zip(weights, models, strict=True))
    error = jnp.mean((net(merged.params, fresh) - target) ** 2)
    unmoved = jnp.mean((net(otf.average(models, weights), fresh) - target) ** 2)
    assert error < 0.2 * unmoved


def tokens(params, x):
    return jax.nn.relu(params["embed"][x]) @ params["out"]


def test_tokens_are_decided_about_by_the_weights():
    a = {"embed": normal(7, 12, seed=0), "out": normal(12, 7, seed=1)}
    order = np.random.default_rng(0).permutation(12)
    b = {"embed": a["embed"][:, order], "out": a["out"][order]}
    # Outputs need not be named where none are looked at.
    merged = otf.merge(tokens, [a, b], inputs=jax.ShapeDtypeStruct((2, 5), jnp.int32), polish=5)
    close(merged.params["embed"], b["embed"])
    assert merged.report.chosen.start == "weights"
    assert merged.report.chosen.score < 1e-9
    assert {row.repair for row in merged.report.rows} == {"nothing"}
    assert merged.report.held_out == 0
    assert "the weights alone" in str(merged.report)
    with pytest.raises(ValueError, match="no path"):
        merged.report.plot()


def residual(params, x):
    x = x @ params["embed"]
    for block in params["blocks"]:
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        x = x + jax.nn.relu((y * block["scale"][None]) @ block["up"]) @ block["down"]
    return x @ params["head"]


def residual_params(seed: int):
    width, hidden = 8, 16
    rng = np.random.default_rng(seed)

    def kernel(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    blocks = []
    for _ in range(2):
        scale = jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32)
        blocks.append({"scale": scale, "up": kernel(width, hidden), "down": kernel(hidden, width)})
    return {"blocks": blocks, "embed": kernel(6, width), "head": kernel(width, 4)}


def odd(params, x):
    *hidden, last = params
    for kernel in hidden:
        x = jnp.tanh(x @ kernel)
    return x @ last


def test_signs_are_found():
    a = draw(0)
    signed = otf.trace_symmetry(odd, a, SHAPE).with_signs()
    b = otf.transport(signed, signed.random(jax.random.key(0)), a)
    x = data()
    merged = unpolished(odd, [a, b], [x], outputs="values", repairs=(), candidates=["weights"])
    close(odd(merged.params, x), odd(a, x))
    assert [row.units for row in merged.report.rows] == ["permutations", "signs"]
    assert merged.report.chosen.units == "signs"
    assert merged.symmetry == signed


def rotated_pair():
    """A model, the same with its units rotated, and the symmetry by which they are."""
    a = residual_params(0)
    rotating = otf.trace_symmetry(residual, a, SHAPE).with_rotations()
    assert rotating.rotates
    plans = {}
    rng = np.random.default_rng(1)
    for group in rotating.groups:
        if group.rotates:
            matrix = np.linalg.qr(rng.normal(size=(group.size, group.size)))[0]
            plans[group.name] = jnp.asarray(matrix, jnp.float32)
        else:
            plans[group.name] = jnp.asarray(rng.permutation(group.size), jnp.int32)
    return a, otf.transport(rotating, plans, otf.canonicalize(rotating, a)), rotating


def test_rotations_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "_MOST_LEARNING_STEPS", 3)
    a, b, rotating = rotated_pair()
    x = data()
    few = ["weights", "learned rotations"]
    merged = unpolished(residual, [a, b], [x], outputs="logits", repairs=(), candidates=few)
    np.testing.assert_allclose(residual(merged.params, x), residual(a, x), rtol=0, atol=1e-3)
    assert merged.report.chosen.units == "rotations"
    assert merged.symmetry == rotating
    # Without data the weights decide about rotations, in one form.
    blind = unpolished(residual, [a, b], inputs=SHAPE, outputs="logits", candidates=few[:1])
    np.testing.assert_allclose(residual(blind.params, x), residual(a, x), rtol=0, atol=1e-3)
    assert [(row.units, row.repair) for row in blind.report.rows] == [("rotations", "nothing")]
    assert "the weights have decided" in str(blind.report).replace("\n", " ")
    with pytest.raises(ValueError, match="drawn at random does not hold"):
        unpolished(residual, [a, b], inputs=SHAPE, outputs="logits", candidates=few)
    tried = [(row.start, row.units) for row in merged.report.rows]
    assert ("weights", "permutations") in tried
    assert ("weights", "rotations") in tried
    assert ("learned rotations", "rotations") in tried


def test_of_many_inputs_rotations_are_learned_from_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("otfusion_jax.fusion.merge_arguments._MOST", 40)
    monkeypatch.setattr(candidates, "_MOST_LEARNING_STEPS", 6)
    looked_at = []

    def learn(symmetry, loss, a, b, chosen, **named):
        positions, _ = chosen
        looked_at.append((positions.shape[0], int(positions.max())))
        return otf.learn_alignment(symmetry, loss, a, b, chosen, **named)

    monkeypatch.setattr(candidates, "learn_alignment", learn)
    models = [residual_params(0), residual_params(1)]
    merged = unpolished(
        residual,
        models,
        [data(200)],
        outputs="logits",
        repairs=(),
        candidates=["learned rotations"],
    )
    assert [row.repair for row in merged.report.rows] == ["nothing", "nothing (160 inputs)"]
    # The 40 that decide are looked at by neither.
    assert [steps for steps, _ in looked_at[:2]] == [6, 6]
    assert looked_at[0][1] < 40 <= looked_at[1][1] < 160
    scores = [row.score for row in merged.report.rows]
    assert merged.report.chosen.score == min(scores)


def test_what_was_learned_is_distilled_beside_what_is_better(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "_MOST_LEARNING_STEPS", 1)
    few = functools.partial(otf.merge, residual, outputs="logits", repairs=(), polish=1)
    # Weights meet these models, and one step of learning does not.
    a, b, _ = rotated_pair()
    merged = few([a, b], [data()], candidates=["weights", "learned rotations"])
    distilled = [row for row in merged.report.rows if row.repair == "distilled"]
    assert [row.start for row in distilled] == ["weights", "learned rotations"]
    assert merged.report.chosen.start == "weights"
    # Where it is the best already, once is enough.
    models = [residual_params(0), residual_params(1)]
    once = few(models, [data()], candidates=["learned rotations"])
    assert [row.repair for row in once.report.rows] == ["nothing", "distilled"]


def test_of_many_inputs_distillation_sees_all_but_those_that_decide(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("otfusion_jax.fusion.merge_arguments._MOST", 40)
    counts = []

    def trained(*positional, **named):
        counts.append(positional[4].count)
        return distill.trained(*positional, **named)

    monkeypatch.setattr("otfusion_jax.fusion.merge_trials.trained", trained)
    merged = merge(near(4), [data(200)], candidates=["weights"], repairs=(), polish=2)
    assert counts == [160]
    last = merged.report.rows[-1]
    assert last.repair == "distilled (160 inputs)"


def test_each_of_several_models_is_turned_for_the_average_of_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "_MOST_LEARNING_STEPS", 4)
    averages, ends = [], []

    def learn(symmetry, loss, a, b, chosen, **named):
        averages.append(otf.interpolate(a, b, named["t"]))
        found = otf.learn_alignment(symmetry, loss, a, b, chosen, **named)
        moved = otf.transport(symmetry, found, a)
        ends.append(otf.interpolate(moved, b, named["t"]))
        return found

    monkeypatch.setattr(candidates, "learn_alignment", learn)
    models = [residual_params(0), residual_params(1), residual_params(2)]
    merged = unpolished(
        residual,
        models,
        [data(40)],
        outputs="logits",
        repairs=(),
        candidates=["learned rotations"],
        weights=[0.2, 0.3, 0.5],
    )
    # Two models in two rounds, by half of the inputs and then by all. Each goes on from the average
    # that the one before has ended with.
    assert len(averages) == 8
    averages, ends = averages[4:], ends[4:]
    for end, average in zip(ends[:-1], averages[1:], strict=True):
        chex.assert_trees_all_close(end, average, rtol=0, atol=1e-5)
    chex.assert_trees_all_close(ends[-1], merged.params, rtol=0, atol=1e-5)


def test_models_that_count_nothing_turn_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "_MOST_LEARNING_STEPS", 2)
    models = [residual_params(0), residual_params(1)]
    few = ["learned rotations"]
    x = data(40)
    merged = unpolished(
        residual, models, [x], outputs="logits", repairs=(), candidates=few, weights=[1.0, 0.0]
    )
    np.testing.assert_allclose(
        residual(merged.params, x), residual(models[0], x), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("mixes", [None, True, False])
def test_what_is_trained_sees_mixtures(mixes: bool | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "_LEARNING_STEPS", 3)
    monkeypatch.setattr(candidates, "_MOST_LEARNING_STEPS", 3)
    mixed = []

    def spied(module):
        def mixup(batch, key):
            mixed.append(module)
            return otf.mixup(batch, key)

        monkeypatch.setattr(module, "mixup", mixup)

    spied(candidates)
    spied(distill)
    models = [residual_params(2), residual_params(3)]
    otf.merge(
        # A function of its own, for which nothing has been traced yet.
        lambda params, x: residual(params, x),
        models,
        [data()],
        outputs="logits",
        repairs=(),
        candidates=["learned rotations"],
        polish=2,
        mixes=mixes,
    )
    assert set(mixed) == (set() if mixes is False else {candidates, distill})


def test_mixes_is_checked_before_any_work():
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    table = normal(5, 3, seed=0)

    def looked_up(params, x):
        return params[x]

    with pytest.raises(TypeError, match="mixes"):
        unpolished(looked_up, [table, table], inputs=tokens, outputs="values", mixes="yes")  # pyright: ignore
    with pytest.raises(TypeError, match="mixes is True"):
        unpolished(looked_up, [table] * 2, [jnp.arange(4)], outputs="values", mixes=True)


# --- batch norm


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(12)(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(4)(nn.tanh(x))


NORMALISED = Normalised()


@functools.cache
def normalised_pair():
    x = 2 + 3 * data(400, seed=3)
    return [
        otf.estimate_statistics(
            normalised_update, NORMALISED.init(jax.random.key(seed), x[:2]), [x]
        )
        for seed in range(2)
    ]


@jax.jit
def normalised_update(variables, batch):
    _, changed = NORMALISED.apply(variables, batch, train=True, mutable=["batch_stats"])
    return {**variables, **changed}


def test_running_statistics_are_estimated_anew():
    x = 2 + 3 * data(100, seed=4)
    merged = unpolished(
        NORMALISED.apply,
        normalised_pair(),
        [x],
        outputs="values",
        update=normalised_update,
        candidates=["as they are", "weights"],
        repairs=[otf.LeastSquares()],
    )
    scores: dict[str, list[float]] = {}
    for row in merged.report.rows:
        scores.setdefault(row.repair, []).append(row.score)
    assert scores.keys() == {
        "nothing",
        "statistics anew",
        "LeastSquares",
        "LeastSquares, statistics anew",
    }
    # What the first layer puts out is fitted in inference, and is to be normalised as it was there.
    assert scores["LeastSquares"] != scores["LeastSquares, statistics anew"]
    assert scores["nothing"] != scores["statistics anew"]


def test_running_statistics_that_are_averaged_are_named():
    few = functools.partial(
        otf.merge,
        NORMALISED.apply,
        normalised_pair(),
        [data()],
        outputs="values",
        candidates=["weights"],
        repairs=(),
    )
    with pytest.warns(otf.StatisticsWarning, match="batch_stats/BatchNorm_0/mean") as warned:
        merged = few()
    # Once, however many averages are taken. They are no weights to be matched by.
    assert len(warned) == 1
    with pytest.warns(otf.StatisticsWarning):
        left_out = few(leaf_weight=lambda path: not path.startswith("batch_stats"))
    jax.tree.map(np.testing.assert_array_equal, merged.params, left_out.params)


def test_statistics_of_nnx_are_estimated_anew():
    def layers(seed):
        rngs = nnx.Rngs(seed)
        return nnx.Sequential(
            nnx.Linear(6, 8, rngs=rngs),
            nnx.BatchNorm(8, rngs=rngs),
            nnx.tanh,
            nnx.Linear(8, 4, rngs=rngs),
        )

    graph, _ = nnx.split(layers(0))
    models = [nnx.split(layers(seed))[1] for seed in range(2)]

    def run(params, x):
        model = nnx.merge(graph, params)
        model.eval()
        return model(x)

    @jax.jit
    def update(params, batch):
        model = nnx.merge(graph, params)
        model.train()
        model(batch)
        return nnx.state(model)

    x = 2 + 3 * data(80)
    models = [otf.estimate_statistics(update, model, [x]) for model in models]
    statistics = otf.running_statistics(models[0])

    def wrong(params, x):
        first, norm = params["layers"][0], params["layers"][1]
        hidden = x @ first["kernel"][...] + first["bias"][...][None]
        return jnp.mean((hidden.var(0) / norm["var"][...] - 1) ** 2)

    merged = unpolished(
        run, models, [x], loss=wrong, update=update, candidates=["as they are"], repairs=()
    )
    assert merged.report.chosen.repair == "statistics anew"
    # They are those of what the layer before puts out, on all inputs.
    assert float(wrong(merged.params, x)) < 1e-6
    # Nothing else has changed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otf.StatisticsWarning)
        averaged = dict(jax.tree_util.tree_leaves_with_path(otf.average(models)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(merged.params):
        if jax.tree_util.keystr(path, simple=True, separator="/") not in statistics:
            np.testing.assert_array_equal(leaf, averaged[path])


# --- what is chosen


def test_what_scores_best_is_kept():
    models = near(0)
    merged = merge(models, [data(40), data(60, seed=6)])
    report = merged.report
    assert "barycenter" not in {row.start for row in report.rows}  # of two, it is as by weights
    assert (report.fitted, report.held_out) == (50, 50)
    # Those that were tried again are the best of all, and of them that of the least sum is taken.
    again = [row for row in report.rows if not np.isnan(row.again)]
    others = {row.score for row in report.rows} - {row.score for row in again}
    assert max(row.score for row in again) < min(others)
    assert report.chosen.score + report.chosen.again == min(row.score + row.again for row in again)
    assert [row.chosen for row in report.rows].count(True) == 1
    assert report.seconds > sum(row.seconds for row in report.rows) > 0
    # The average of models that are moved is closer to their mean answer than one that is not.
    found = rows(merged)
    assert found["weights", "nothing"].score < found["as they are", "nothing"].score
    fresh = data(200, seed=9)
    target = (net(models[0], fresh) + net(models[1], fresh)) / 2
    error = jnp.mean((net(merged.params, fresh) - target) ** 2)
    unmoved = jnp.mean((net(otf.average(models), fresh) - target) ** 2)
    assert error < 0.5 * unmoved


@pytest.mark.parametrize("outputs", ["values", "logits"])
def test_scores_are_those_of_inputs_held_out(outputs):
    models = near(1)
    x = data(50)
    merged = unpolished(net, models, [x], outputs=outputs, candidates=["as they are"], repairs=())
    # Which are held out is drawn by the key.
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), 50)
    held_out = np.asarray(x)[np.asarray(order)[:25]]
    answers = [np.asarray(net(params, held_out)) for params in (*models, merged.params)]
    if outputs == "values":
        a, b, ours = answers
        expected = np.mean((ours - (a + b) / 2) ** 2)
    else:
        a, b, ours = (np.exp(y) / np.exp(y).sum(-1, keepdims=True) for y in answers)
        mean = (a + b) / 2
        expected = np.mean(np.sum(mean * np.log(mean / ours), -1))
    (row,) = merged.report.rows
    assert row.score == pytest.approx(expected, rel=1e-4)


@dataclasses.dataclass(frozen=True)
class Slight(otf.RestoreStatistics):
    def correct(self, correctable, sums):
        return correctable.leaf * 1.0001, (None,) * len(correctable.parts)


def test_the_best_are_tried_again_on_inputs_exchanged():
    a, noise = draw(0), draw(100)
    models = [a, [kernel + 0.05 * other for kernel, other in zip(a, noise, strict=True)]]
    x = data(50)
    merged = merge(models, [x], candidates=["as they are"], repairs=[Slight()])
    order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), 50))
    answers = [np.asarray(net(params, x)) for params in (*models, otf.average(models))]
    errors = np.mean((answers[2] - (answers[0] + answers[1]) / 2) ** 2, axis=-1)[order]
    plain, slight = merged.report.rows
    assert plain.score == pytest.approx(errors[:25].mean(), rel=1e-4)
    assert plain.again == pytest.approx(errors[25:].mean(), rel=1e-4)
    assert not np.isnan(slight.again)
    assert "and again with the two exchanged" in str(merged.report)


def test_of_many_inputs_the_best_is_fitted_to_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("otfusion_jax.fusion.merge_arguments._MOST", 20)
    x = data(100)
    method = otf.LeastSquares(ridge=0.1, at="preactivation")
    merged = merge(near(1), [x], candidates=["weights"], repairs=[method])
    assert (merged.report.fitted, merged.report.held_out) == (20, 20)
    assert merged.report.chosen.repair == "LeastSquares(ridge=0.1, at=preactivation) (80 inputs)"
    order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), 100))
    expected = otf.repair(symmetry(), net, merged.models, x[order[20:]], method=method)
    jax.tree.map(functools.partial(close, atol=1e-4), merged.params, expected)
    # What helps nowhere is not taken, on however many inputs.
    same = merge([near(1)[0]] * 2, [x], candidates=["as they are"], repairs=[method])
    assert same.report.chosen.repair == "nothing"


def test_what_looks_at_no_inputs_is_moved_once_for_all_of_them(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def counted(*args, **named):
        calls.append(named["grams"])
        return otf.align(*args, **named)

    monkeypatch.setattr(candidates, "align", counted)
    for name, count in (("weights", 1), ("features, then weights", 3)):
        calls.clear()
        merged = merge(near(1), [data(100)], candidates=[name], repairs=[Slight()])
        # The average and what is next to it were made for both halves, and the best for all inputs.
        assert not any(np.isnan(row.again) for row in merged.report.rows)
        assert len(calls) == count


def test_ridges_are_chosen_and_recorded():
    repairs = [otf.LeastSquares(ridge=(0.001, 0.01, 0.1, 1.0))]
    merged = merge(near(1), [data(200)], candidates=["weights"], repairs=repairs)
    ridges = rows(merged)["weights", "LeastSquares"].ridges
    assert set(ridges) == {"0", "1", "2"}
    assert set(ridges.values()) <= {np.float32(ridge) for ridge in (0.001, 0.01, 0.1, 1.0)}
    assert merged.report.chosen.ridges == ridges
    assert "Ridges by the number of parameters: " in str(merged.report)
    assert not rows(merged)["weights", "nothing"].ridges


def test_a_loss_takes_the_place_of_the_divergence():
    models = near(2)
    x = data(50)

    def loss(params, x):
        # All that it asks for is small weights.
        return sum(jnp.sum(kernel**2) for kernel in params) + 0 * jnp.sum(x)

    merged = otf.merge(net, models, [x], loss=loss, candidates=["weights"], repairs=(), polish=3)
    averaged, polished = merged.report.rows
    assert averaged.score == pytest.approx(float(loss(otf.fuse(symmetry(), models), x)), rel=1e-4)
    assert polished.chosen
    assert polished.score < averaged.score


@dataclasses.dataclass(frozen=True)
class Harmful(otf.RestoreStatistics):
    def correct(self, correctable, sums):
        return 0 * correctable.leaf, (None,) * len(correctable.parts)


@dataclasses.dataclass(frozen=True)
class Failing(otf.RestoreStatistics):
    def correct(self, correctable, sums):
        raise ValueError("more samples are needed\nthan there are")


def test_what_does_not_help_is_not_taken():
    models = near(3)
    plain = merge(models, [data()], repairs=())
    merged = merge(models, [data()], repairs=(Harmful(), Failing()))
    jax.tree.map(np.testing.assert_array_equal, merged.params, plain.params)
    found = rows(merged)
    assert found["weights", "Harmful"].score > found["weights", "nothing"].score
    failed = found["weights", "Failing"]
    assert np.isnan(failed.score)
    assert failed.problem.startswith("more samples are needed")
    assert "weights, permutations, Failing: more samples are needed\n" in f"{merged.report}\n"


def test_if_all_fails_it_says_why(monkeypatch: pytest.MonkeyPatch):
    def fails(task):
        raise FloatingPointError("out of range")

    failing = candidates.Candidate("as they are", fails)
    monkeypatch.setattr(candidates, "_ALL", (failing,))
    with pytest.raises(ValueError, match="every trial has failed:\n  as they are: out of range"):
        merge(near(0), [data()])


def test_polish_is_taken_where_it_helps():
    models = near(4)
    few = functools.partial(merge, models, [data()], candidates=["weights"], repairs=())
    plain, polished = few(), few(polish=100)
    last = polished.report.rows[-1]
    assert last.repair == "distilled"
    assert last.chosen
    assert last.score < plain.report.chosen.score
    # A model that is met already has nothing to gain.
    a = draw(0)
    merged = merge([a, a], [data()], candidates=["as they are"], repairs=(), polish=3)
    assert [row.chosen for row in merged.report.rows] == [True, False]
    jax.tree.map(np.testing.assert_array_equal, merged.params, a)


def test_polish_is_tried_unless_told_otherwise_where_inputs_are_given():
    few = functools.partial(otf.merge, net, near(4), outputs="values")
    few = functools.partial(few, candidates=["weights"], repairs=())
    given, drawn = few([data()]), few(inputs=SHAPE)
    assert [row.repair for row in given.report.rows] == ["nothing", "distilled"]
    assert [row.repair for row in drawn.report.rows] == ["nothing"]
    # A loss may have labels, and where nothing counts there is nothing to train.
    scored = few([data()], outputs=None, loss=lambda params, x: jnp.mean(net(params, x) ** 2))
    assert [row.repair for row in scored.report.rows] == ["nothing"]
    counted = few([data()], candidates=["as they are"], leaf_weight=lambda path: 0.0)
    assert [row.repair for row in counted.report.rows] == ["nothing"]


def test_what_fails_on_all_inputs_is_taken_from_a_half(monkeypatch: pytest.MonkeyPatch):
    make = merge_trials.Workshop.make

    def failing(self, recipe, samples=None):
        if samples is not None:
            raise FloatingPointError("out of range")
        return make(self, recipe)

    few = functools.partial(merge, near(4), [data()], candidates=["weights"])
    few = functools.partial(few, repairs=[otf.LeastSquares()])
    whole = few()
    monkeypatch.setattr(merge_trials.Workshop, "make", failing)
    half = few()
    assert half.report.chosen.repair == whole.report.chosen.repair == "LeastSquares"
    assert not np.array_equal(half.params[0], whole.params[0])


def test_of_negative_losses_the_best_is_made_again():
    def loss(params, x):
        return jnp.mean(net(params, x) ** 2) - 100

    few = functools.partial(merge, near(4), [data()], outputs=None, repairs=())
    report = few(loss=loss, candidates=["as they are", "weights", "features"]).report
    again = [row for row in report.rows if not np.isnan(row.again)]
    assert min(row.score for row in report.rows) in [row.score for row in again]
    assert report.chosen.score + report.chosen.again == min(row.score + row.again for row in again)


def test_the_same_key_gives_the_same_bits():
    models = near(5)
    again = functools.partial(merge, models, [data()], polish=5, candidates=["features"])
    one, two, other = again(key=jax.random.key(3)), again(key=jax.random.key(3)), again()
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert [row.score for row in one.report.rows] == [row.score for row in two.report.rows]
    assert [row.score for row in one.report.rows] != [row.score for row in other.report.rows]
    jax.tree.map(
        np.testing.assert_array_equal,
        merge(models, inputs=SHAPE, candidates=["features"]).params,
        merge(models, inputs=SHAPE, candidates=["features"]).params,
    )


# --- inputs


def test_a_generator_is_gone_through_once_and_no_further_than_needed():
    taken = []

    def loader():
        for number in range(100):
            taken.append(number)
            yield [np.asarray(data(8, seed=number), np.float64)]  # a list, as PyTorch has it

    merged = merge(near(0), loader(), max_samples=20, candidates=["weights"])
    assert taken == [0, 1, 2]
    assert (merged.report.fitted, merged.report.held_out) == (10, 10)


@pytest.mark.parametrize("count", [2, 3, 400, 1437, 2000, 2001, 2249, 9001])
def test_batches_of_halves_are_of_one_size(count: int):
    # What is made of a batch is compiled for each size.
    given = samples.Samples((np.arange(count)[:, None],), count)
    parts = samples.divided(given, 1000, jax.random.key(0))
    sizes = set()
    for half in (parts.fit, parts.held_out):
        assert min(count // 2, 1000) - 4 < half.count <= 1000
        for (batch,) in half.batches():
            sizes.add(len(batch))
    assert len(sizes) == 1
    assert sizes.pop() <= 250
    seen = [set(np.ravel(part.inputs[0])) for part in (parts.fit, parts.held_out, parts.whole)]
    fit, held_out, whole = seen
    assert not fit & held_out
    if count > 2000:
        assert parts.more is not None
        more = set(np.ravel(parts.more.inputs[0]))
        assert len({len(batch) for (batch,) in parts.more.batches()}) == 1
        assert more <= whole - held_out
        assert len(whole - held_out - more) < len(more) / 200
        assert len(whole) == count
    else:
        assert parts.more is None
        assert whole == fit | held_out


def test_functions_of_several_inputs():
    def gated(params, x, mask):
        return net(params, x) * mask["of"]

    batch = (data(30), {"of": jnp.ones((30, 1))})
    a = draw(0)
    merged = unpolished(gated, [a, shuffled(a, 1)], [batch], outputs="values", repairs=())
    close(net(merged.params, data()), net(a, data()))


def test_weights_and_leaf_weights_are_heeded():
    models = near(6)
    merged = merge(
        models,
        [data()],
        weights=(0.9, 0.1),
        leaf_weight=lambda path: path != "2",
        candidates=["weights"],
        repairs=(),
        polish=2,
    )
    expected = otf.fuse(symmetry(), models, (0.9, 0.1), leaf_weight=lambda path: path != "2")
    np.testing.assert_allclose(merged.params[2], expected[2], atol=1e-6)
    assert not np.array_equal(merged.params[0], expected[0])


# --- the report


def test_the_report_is_a_table():
    merged = merge(near(0), [data()], candidates=["as they are", "weights"], repairs=())
    text = inspect.cleandoc(str(merged.report)).splitlines()
    assert text[0].startswith("2 models, 2 trials in ")
    assert text[0].endswith(
        "fitted to 30 inputs; * has the least squared difference from the models' mean prediction "
        "on 30 others"
    )
    assert text[2].split() == ["start", "units", "moved", "by", "then", "score", "seconds"]
    assert text[3].split()[:2] == ["model", "0"]
    assert text[5].split()[:5] == ["as", "they", "are", "nothing", "nothing"]
    assert text[6].split()[:4] == ["*", "weights", "permutations", "nothing"]
    assert len({line.rstrip()[-1] for line in text[5:7]} & set("0123456789")) >= 1


def test_the_report_plots_the_path():
    models = near(0)
    merged = merge(models, [data()], candidates=["weights"], repairs=(), path=5)
    before, after = merged.report.path
    assert before.t == (0, 0.25, 0.5, 0.75, 1)
    assert before.scores[0] == pytest.approx(merged.report.parents[0], rel=1e-4)
    assert after.scores[2] == pytest.approx(merged.report.chosen.score, rel=1e-4)
    assert max(after.scores) < max(before.scores)
    axes = merged.report.plot()
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == ["as they are", "the result", "weights"]
    assert merged.report.plot(axes) is axes


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    merged = merge(near(0), [data()], candidates=["weights"], repairs=(), path=2)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r'pip install "otfusion-jax\[plot\]" matplotlib'):
        merged.report.plot()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'pip install "otfusion-jax\[plot\]" tqdm'):
        merge(near(0), [data()], progress=True)


def test_progress_is_shown_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]):
    few = functools.partial(merge, near(0), [data()], candidates=["weights"], repairs=())
    few()
    assert capfd.readouterr() == ("", "")
    few(progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "moving" in shown.err


# --- errors


class Unhashable:
    __hash__ = None  # pyright: ignore

    def __call__(self, params, x):
        return net(params, x)


PAIR = near(0)
WRONG = {
    "no function": ({"fn": 3}, TypeError, "function"),
    "a class": ({"fn": dict}, TypeError, "the class dict"),
    "not hashable": ({"fn": Unhashable()}, TypeError, "cannot be hashed"),
    "one model": ({"models": PAIR[:1]}, ValueError, "1 model given"),
    "no list": ({"models": PAIR[0][0]}, (TypeError, ValueError), "list"),
    "others": ({"models": [PAIR[0], PAIR[1][:2]]}, ValueError, "model 1"),
    "not finite": ({"models": [PAIR[0], [jnp.nan * x for x in PAIR[1]]]}, ValueError, "model 1"),
    "nothing known": ({"batches": None}, ValueError, "neither batches nor inputs"),
    "both": ({"inputs": SHAPE}, ValueError, "both batches and inputs"),
    "an array": ({"batches": data()}, TypeError, "not a list of batches"),
    "no batches": ({"batches": []}, ValueError, "no batches"),
    "one sample": ({"batches": [data(1)]}, ValueError, "a single sample"),
    "an empty batch": ({"batches": [data(4), data(0)]}, ValueError, "batch 1, input 0"),
    "words": ({"batches": [["a"]]}, TypeError, "batch 0, input 0"),
    "NaN": ({"batches": [data(3), jnp.nan * data(3)]}, ValueError, "batch 1, input 0: 18 of 18"),
    "another shape": ({"batches": [data(3), data(3)[:, :5]]}, ValueError, "batch 1 has samples"),
    "other counts": ({"batches": [(data(3), data(4))]}, ValueError, "batch 0, input 1 has 4"),
    "outputs unsaid": ({"outputs": None}, ValueError, "say what the function returns"),
    "outputs unknown": ({"outputs": "probabilities"}, ValueError, "say what the function"),
    "both measures": ({"loss": net}, ValueError, "both loss and outputs"),
    "no scalar": ({"loss": net, "outputs": None}, ValueError, "return a scalar"),
    "unknown": ({"candidates": ["magic"]}, ValueError, "no candidate 'magic'"),
    "a string": ({"candidates": "weights"}, TypeError, "pass a list"),
    "none at all": ({"candidates": []}, ValueError, "candidates is empty"),
    "no rotations": ({"candidates": ["learned rotations"]}, ValueError, "can be rotated"),
    "of two": ({"candidates": ["barycenter"]}, ValueError, "does not apply"),
    "repair": ({"repairs": otf.LeastSquares()}, TypeError, "list of instances"),
    "repair class": ({"repairs": [otf.LeastSquares]}, TypeError, "repair 0"),
    "weights": ({"weights": (1.0,)}, ValueError, "weights has shape"),
    "polish": ({"polish": -1}, ValueError, "polish is -1"),
    "path": ({"path": True}, ValueError, "path is True"),
    "leaf weight": ({"leaf_weight": 1.0}, TypeError, "function"),
    "update": ({"update": 3}, TypeError, "function"),
    "nothing to update": ({"update": net}, ValueError, "no leaves of the models look like"),
    "symmetry": ({"symmetry": "traced"}, TypeError, "a symmetry is wanted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str, monkeypatch: pytest.MonkeyPatch):
    changes, error, words = WRONG[name]
    given: dict[str, Any] = {"fn": net, "models": PAIR, "batches": [data()], "outputs": "values"}
    given |= changes
    fn, models = given.pop("fn"), given.pop("models")
    # Before any work: nothing is tried.
    monkeypatch.setattr(candidates.Task, "moved", None)
    with pytest.raises(error, match=words):
        unpolished(fn, models, **given)


@pytest.mark.parametrize("outputs", ["values", "logits"])
def test_outputs_have_an_axis_of_samples(outputs: Any):
    def mean(params, x):
        return net(params, x).mean()

    words = "the output of .* is a scalar, .* axis of samples, .* a scalar loss, .* as loss="
    with pytest.raises(ValueError, match=words):
        unpolished(mean, PAIR, [data()], outputs=outputs)
    with pytest.raises(ValueError, match=words):
        otf.distill(mean, PAIR[0], PAIR, [data()], outputs=outputs)
    with pytest.raises(ValueError, match="output 1 of the function is a scalar"):
        unpolished(lambda p, x: (net(p, x), mean(p, x)), PAIR, [data()], outputs=outputs)
    assert unpolished(mean, PAIR, [data()], loss=mean, candidates=["as they are"], repairs=())


def test_keys_are_closed_over():
    def noisy(params, x, key):
        return net(params, x) + jax.random.normal(key, (1, 1))

    for key in (jax.random.key(0), jax.random.split(jax.random.key(0), len(data()))):
        with pytest.raises(TypeError, match="batch 0, input 1 is a key of jax.random.*x, key"):
            unpolished(noisy, PAIR, [(data(), key)], outputs="values")


def test_logits_have_classes():
    with pytest.raises(ValueError, match="two classes or more"):
        unpolished(lambda p, x: net(p, x)[:, :1], PAIR, [data()], outputs="logits")
    with pytest.raises(TypeError, match="single array"):
        unpolished(lambda p, x: (net(p, x), x), PAIR, [data()], outputs="logits")
    with pytest.raises(TypeError, match="int32"):
        unpolished(lambda p, x: net(p, x).argmax(-1), PAIR, [data()], outputs="values")


# --- distill


def test_distilling_comes_closer_to_the_mean_of_all():
    teachers = near(7)
    start = otf.fuse(symmetry(), teachers)
    x, fresh = data(200), data(100, seed=8)
    student = otf.distill(net, start, teachers, [x], outputs="values", weights=(0.25, 0.75))
    again = otf.distill(net, start, teachers, [x], outputs="values", weights=(0.25, 0.75))
    jax.tree.map(np.testing.assert_array_equal, student, again)
    target = 0.25 * net(teachers[0], fresh) + 0.75 * net(teachers[1], fresh)
    error = [float(jnp.mean((net(params, fresh) - target) ** 2)) for params in (start, student)]
    assert error[1] < error[0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_steps_are_summed_up_in_full_precision(dtype: Any):
    """Each is a tenth of what half precision can tell."""
    teachers = [jnp.asarray(1.0, dtype), jnp.asarray(1.1, dtype)]
    line, x = (lambda params, x: params * x), jnp.ones((8, 1), dtype)
    steps = {"steps": 200, "optimizer": optax.adam(3e-4), "outputs": "values"}
    student = otf.distill(line, teachers[0], teachers, [x], **steps)
    assert student.dtype == dtype
    assert float(student) == pytest.approx(1.05, abs=0.02)


def test_classes_that_are_ruled_out_are_no_difference():
    """As logits of -inf rule them out: what has no probability has no divergence."""

    def masked(params, x):
        return jnp.where(jnp.arange(SIZES[-1]) == 1, -jnp.inf, net(params, x))

    models, x = near(0), data()
    merged = unpolished(masked, models, [x], outputs="logits", repairs=[])
    assert np.isfinite(merged.report.chosen.score)
    student = otf.distill(masked, models[0], models, [x], outputs="logits", steps=2)
    for leaf in jax.tree.leaves(student):
        assert np.isfinite(leaf).all()


def test_what_is_no_key_is_named():
    models, x = near(0), data()
    key = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(TypeError, match="pass a single key"):
        unpolished(net, models, [x], outputs="values", key=key)
    with pytest.raises(TypeError, match="pass a single key"):
        otf.distill(net, models[0], models, [x], outputs="values", key=key)
    with pytest.raises(TypeError, match="pass a single key"):
        otf.mixup(x, key)


def test_what_is_not_trained_stays():
    def counted(params, x):
        return net(params["layers"], x)

    teachers = [{"layers": model, "step": jnp.array(3)} for model in near(0)]
    moved = otf.distill(
        counted,
        teachers[0],
        teachers,
        [data()],
        outputs="values",
        steps=2,
        trains=lambda path: path == "layers/1",
    )
    np.testing.assert_array_equal(moved["step"], 3)
    np.testing.assert_array_equal(moved["layers"][0], teachers[0]["layers"][0])
    assert not np.array_equal(moved["layers"][1], teachers[0]["layers"][1])


def test_distilling_names_what_is_wrong():
    a = draw(0)
    with pytest.raises(ValueError, match="steps is 0"):
        otf.distill(net, a, [a], [data()], outputs="values", steps=0)
    with pytest.raises(TypeError, match="optimizer"):
        otf.distill(net, a, [a], [data()], outputs="values", optimizer=jnp.sum)  # pyright: ignore
    with pytest.raises(FloatingPointError, match="did not stay finite"):
        otf.distill(net, a, near(0), [data()], loss=lambda p, x: jnp.sum(p[0]) * jnp.nan, steps=1)


def test_inside_of_jit_there_is_nothing_to_choose_by():
    models, x = near(0), data()
    with pytest.raises(TypeError, match=r"merge was called inside of jax\.jit"):
        jax.jit(lambda models: unpolished(net, models, [x], outputs="values").params)(models)
    with pytest.raises(TypeError, match=r"distill was called inside of jax\.jit"):
        jax.jit(lambda a: otf.distill(net, a, models, [x], outputs="values"))(models[0])
