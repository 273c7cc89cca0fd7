"""Runs the studies end to end on small data, and checks what they say against its parts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals

import otfusion_jax as otf
from experiments import cli
from experiments.data import Dataset, load_dataset
from experiments.methods import (
    AVERAGES,
    VARIANTS,
    correlations,
    counts,
    reestimated,
)
from experiments.models import ModelConfig, build_model
from experiments.narrow import narrowed, reordered, selected, strongest
from experiments.pairs import network
from experiments.studies.many import draws, inconsistency
from experiments.studies.non_iid import divide
from experiments.studies.widths import as_original
from experiments.synthetic import dead_leaves
from experiments.train import augmented, initial


def run(folder: Path, *words: str) -> dict:
    assert cli.main([*words, "--out", str(folder)]) == 0
    content = json.loads((folder / "results.json").read_text())
    assert content["command"].startswith(f"python -m experiments {words[0]}")
    assert (folder / "results.md").read_text().endswith(f"`{content['command']}`\n")
    assert len(list(folder.glob("*.png"))) == 1
    return content["results"]


# Of one size and trained for as long, so that what trains, aligns and repairs is compiled once.
SMALL = ["--width", "0.25", "--epochs", "4"]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


# --- one_shot


def test_methods_are_evaluated_and_mended(tmp_path: Path):
    names = [
        "vanilla average",
        "coordinate descent (fuse)",
        "the original: unit norm, Euclidean",
        "Algorithm 1, activations of 100",
        "activation matching (correlation)",
    ]
    methods = run(tmp_path, "one_shot", *SMALL, "--path-points", "3", "--methods", *names)[
        "methods"
    ]
    assert list(methods) == names
    assert set(names) <= set(VARIANTS)
    assert all(
        method[kind] > 40 for method in methods.values() for kind in AVERAGES if kind in method
    )
    assert [name for name in names if "statistics restored" not in methods[name]] == names[2:3]
    assert [name for name in names if "least squares" not in methods[name]] == names[2:4]
    assert methods["coordinate descent (fuse)"]["averaged"] > methods["vanilla average"]["averaged"]


def test_models_come_from_files(tmp_path: Path):
    # A network of one's own in PyTorch's layout, and one that does not fit.
    rng = np.random.default_rng(0)
    sizes = [64, 100, 50, 25, 10]
    for name in "ab":
        arrays = {
            f"fc{i}.weight": rng.standard_normal((m, n)).astype(np.float32) / n**0.5
            for i, (n, m) in enumerate(zip(sizes, sizes[1:], strict=False))
        }
        np.savez(tmp_path / f"{name}.npz", **arrays)
    files = [str(tmp_path / f"{name}.npz") for name in "ab"]
    words = ["one_shot", *SMALL, "--path-points", "3", "--methods", "vanilla average"]
    results = run(tmp_path / "run", *words, "--weights", *files)
    assert all(value < 40 for value in results["individuals"])
    assert not (tmp_path / "run" / "models").exists()
    words = ["one_shot", "--width", "0.5", "--weights", *files, "--out", str(tmp_path / "other")]
    assert cli.main(words) == 2


def test_methods_can_do_without_data(tmp_path: Path):
    words = ["--methods", "activation matching (correlation)", "--path-points", "3"]
    results = run(tmp_path, "one_shot", *SMALL, "--synthetic", *words)
    assert list(results["methods"]) == ["activation matching (correlation)"]


def test_dead_leaves_are_normalised_and_smooth():
    images = dead_leaves(0, 50, 32, 24, 3)
    assert images.shape == (50, 32, 24, 3)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-4)
    np.testing.assert_array_equal(images, dead_leaves(0, 50, 32, 24, 3))
    assert abs(images - dead_leaves(1, 50, 32, 24, 3)).max() > 1

    # Neighbours are alike, and so are colours; far pixels less.
    def correlation(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    near = correlation(images[:, 1:], images[:, :-1])
    far = correlation(images[:, 16:], images[:, :-16])
    assert near > 0.8 > 0.5 > far
    assert correlation(images[..., 0], images[..., 1]) > 0.5


# Optax's AdamW promotes dtypes inside.
@pytest.mark.usefixtures("default_promotion")
def test_language_models_are_fused(tmp_path: Path):
    words = ["one_shot", "--dataset", "pydoc", "--model", "gpt", "--width", "0.25"]
    words += ["--epochs", "1", "--train-images", "256", "--test-images", "40", "--images", "20"]
    results = run(tmp_path, *words, "--path-points", "3", "--methods", "vanilla average")
    losses = results["losses"]
    assert losses["ensemble"] < max(losses["individuals"])
    found = losses["methods"]["vanilla average"]
    assert all(0 < found[kind] < 2 * max(losses["individuals"]) for kind in AVERAGES)
    assert results["methods"]["vanilla average"]["path loss"][1] == pytest.approx(
        found["averaged"], abs=1e-3
    )


@pytest.mark.parametrize(
    "words", [["one_shot", "--synthetic"], ["non_iid"], ["federated"]], ids=" ".join
)
def test_what_a_text_is_not_fit_for(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main([*words, "--dataset", "pydoc", "--model", "gpt", "--out", str(tmp_path)]) == 2
    assert "pydoc is a text" in capsys.readouterr().err


# --- fine_tune


@pytest.mark.usefixtures("default_promotion")  # of optax's schedules
def test_fine_tuning_chooses_by_validation(tmp_path: Path):
    names = ["model A", "model B", "coordinate descent, least squares"]
    words = ["--seeds", "0", "1", "2", "0", *SMALL, "--fine-tune-epochs", "2"]
    words += ["--factors", "1", "0.001", "--validation-images", "200", "--starts", *names]
    results = run(tmp_path, "fine_tune", *words)
    assert list(results["pairs"]) == ["0, 1", "2, 0"]
    for pair in results["pairs"].values():
        assert list(pair["starts"]) == names
        for start in pair["starts"].values():
            assert [found["schedule"] for found in start["runs"]] == [
                "one-cycle, 0.1",
                "halved, 0.1",
                "one-cycle, 0.0001",
                "halved, 0.0001",
            ]
            best = start["best"]["validation"]
            assert best == max(found["validation"] for found in start["runs"])
            # Hardly trained at all, a model stays what it was.
            assert start["runs"][-1]["test"] == pytest.approx(start["before"]["test"], abs=2)
            assert start["best"]["test"] > start["before"]["test"] - 2

    fused = [pair["starts"][names[-1]]["best"]["test"] for pair in results["pairs"].values()]
    parents = [
        max(pair["starts"][name]["best"]["test"] for name in names[:2])
        for pair in results["pairs"].values()
    ]
    mean = results["mean"]["starts"][names[-1]]
    assert mean["after"] == pytest.approx(np.mean(fused), abs=1e-3)
    above = np.subtract(fused, parents)
    assert mean["above the better parent"] == pytest.approx(above.mean(), abs=1e-3)
    assert mean["deviation"] == pytest.approx(above.std(ddof=1), abs=1e-3)
    # Of two step sizes either is the last one tried on its side.
    rows = (tmp_path / "results.md").read_text().splitlines()
    for name in names:
        row = next(row for row in rows if row.startswith(f"| {name} "))
        for pair in results["pairs"].values():
            best = pair["starts"][name]["best"]
            edge = {0.1: "largest", 0.0001: "smallest"}[best["step size"]]
            assert f"{best['schedule']} ({edge} tried)" in row


def test_fine_tuning_needs_pairs(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["fine_tune", "--seeds", "0", "1", "2"]) == 2
    assert "--seeds of pairs" in capsys.readouterr().err


def test_fine_tuning_needs_images_to_choose_by(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["fine_tune", "--validation-images", "2000"]) == 2
    assert "--validation-images is 2000" in capsys.readouterr().err


# --- non_iid


def test_labels_are_divided_as_in_the_paper(digits: Dataset):
    labels = digits.train_labels
    a, b = divide(labels, "label", 4)
    assert sorted([*a, *b]) == list(range(len(labels)))
    assert set(labels[a]) == set(range(10))
    assert set(labels[b]) == set(range(10)) - {4}
    for label in set(range(10)) - {4}:
        assert np.mean(labels[a] == label) * len(a) / np.sum(labels == label) == pytest.approx(
            0.1, abs=0.01
        )
    even, odd = divide(labels, "parity", 4)
    assert set(labels[even] % 2) == {0}
    assert set(labels[odd] % 2) == {1}
    tenth, rest = divide(labels, "size", 4)
    assert len(tenth) / (len(tenth) + len(rest)) == pytest.approx(0.1, abs=0.01)


def test_divisions_that_leave_nothing_are_refused(digits: Dataset):
    with pytest.raises(ValueError, match="without examples"):
        divide(digits.train_labels, "label", 11)
    with pytest.raises(ValueError, match="without examples"):
        divide(np.zeros(20, np.int32), "parity", 0)


@pytest.mark.parametrize("split", ["label", "parity"])
def test_models_of_other_data_are_fused(tmp_path: Path, split: str):
    words = ["--split", split, "--path-points", "5", "--validation-share", "0.2"]
    results = run(tmp_path, "non_iid", *SMALL, *words)
    a, b = results["individuals"]
    if split == "parity":
        assert a["test of B"] == b["test of A"] == 0
    for path in results["methods"].values():
        # Any method leaves the ends of the path as they are.
        assert path["test"][0] == pytest.approx(a["test"], abs=1.5)
        assert path["test"][-1] == pytest.approx(b["test"], abs=1.5)
    best = max(max(path["test"]) for path in results["methods"].values())
    assert best > max(a["test"], b["test"])


# --- federated


def test_clients_are_averaged_round_by_round(tmp_path: Path):
    results = run(tmp_path, "federated", *SMALL, "--same-start")
    a, b = results["shares"]
    assert a < b
    assert a + b == pytest.approx(1, abs=1e-3)
    first = [found["clients"][0] for found in results["methods"].values()]
    assert all(clients == first[0] for clients in first)  # nothing has been averaged yet
    for found in results["methods"].values():
        assert np.shape(found["clients"]) == (2, 2)
        assert found["global"][1] > found["global"][0] - 5
        assert max(found["global"]) < results["on all data"]
    # Of one start, models are aligned as they stand.
    fused, vanilla = (
        results["methods"][name]["global"]
        for name in ("coordinate descent (fuse)", "vanilla average")
    )
    assert fused == vanilla


def test_there_is_a_round(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["federated", "--rounds", "0"]) == 2
    assert "--rounds is 0" in capsys.readouterr().err


# --- ablate


def test_plans_are_softened_and_samples_drawn(tmp_path: Path):
    words = ["--epsilons", "10", "--iterations", "100", "--samples", "100", "--draws", "2"]
    results = run(tmp_path, "ablate", *SMALL, *words)
    for found in results["entropy"].values():
        assert list(found) == ["exact", "10"]
        assert found["exact"]["converged"]
        # Nothing is left of A once all its units are averaged.
        assert found["exact"]["moved"] == pytest.approx(results["individuals"][0], abs=0.3)
        assert found["10"]["moved"] < 40
        assert found["10"]["average"] == pytest.approx(results["individuals"][1], abs=3)
    for found in results["samples"].values():
        assert list(found) == ["100"]
        assert len(found["100"]) == 2
        assert min(found["100"]) > 40


@pytest.mark.parametrize("words", [["--samples", "1"], ["--draws", "0"]], ids=" ".join)
def test_there_is_something_to_draw(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["ablate", *words]) == 2
    assert "--samples are" in capsys.readouterr().err


# --- widths


def test_networks_of_other_widths_are_fused(tmp_path: Path):
    scaled = "coordinate descent, scaled as in the original"
    names = [scaled, "coordinate descent", "truncated by l1 norm", "truncated, then aligned"]
    words = [*SMALL, "--factors", "2", "--methods", *names]
    words += ["--grid", "0.3", "0.6", "--held-out", "0.1", "--images", "300"]
    directions = run(tmp_path, "widths", *words)["directions"]
    assert list(directions) == ["x2 onto x1", "x1 onto x2"]
    narrowing, widening = (found["methods"] for found in directions.values())
    assert list(narrowing) == names
    assert list(widening) == names[:2]
    # Units that are copied, and share what they put out, compute the same function.
    alone = directions["x1 onto x2"]["source"]
    assert widening["coordinate descent"]["moved"] == alone
    assert widening["coordinate descent"]["least squares"]["moved"] == pytest.approx(alone, abs=1)
    # Without biases the scaling of layers changes no prediction.
    assert narrowing[scaled]["moved"] == narrowing["coordinate descent"]["moved"]
    assert narrowing[scaled]["averages"] != narrowing["coordinate descent"]["averages"]
    assert narrowing[scaled]["least squares"] is None
    for values in (narrowing["coordinate descent"], narrowing["truncated, then aligned"]):
        assert values["averages"]["0.5"] > 80
        assert list(values["least squares"]) == ["moved", "0.5"]
        assert values["least squares"]["moved"] > max(80, values["moved"])
        assert values["best"]["t"] == max(values["held out"], key=values["held out"].get)
    assert all(values["moved"] > 40 for values in narrowing.values())


def test_the_network_that_is_moved_onto_comes_from_a_file(tmp_path: Path):
    rng = np.random.default_rng(0)
    sizes = [64, 100, 50, 25, 10]
    arrays = {
        f"fc{i}.weight": rng.standard_normal((m, n)).astype(np.float32) / n**0.5
        for i, (n, m) in enumerate(zip(sizes, sizes[1:], strict=False))
    }
    np.savez(tmp_path / "b.npz", **arrays)
    words = [*SMALL, "--factors", "2", "--weights"]
    words += [str(tmp_path / "b.npz"), "--methods", "Algorithm 1", "--grid", "0.5"]
    directions = run(tmp_path / "run", "widths", *words)["directions"]
    assert directions["x2 onto x1"]["source"] > 80
    assert directions["x2 onto x1"]["target"] < 40


def test_a_choice_of_units_is_followed_by_permutations(digits: Dataset):
    # Heads are all kept, and what is in each of them is not.
    wide, few = (network(ModelConfig("vit", width=w), digits) for w in (0.5, 0.25))
    params = initial(wide.config, digits, 0)
    sizes = {group.name: group.size for group in few.symmetry.groups}
    plans = selected(wide.symmetry, strongest(wide.symmetry, params, sizes))
    order = few.symmetry.random(jax.random.key(1))
    kept = otf.transport(wide.symmetry, plans, params, onto=few.symmetry)
    expected = otf.transport(few.symmetry, order, kept)
    both = reordered(wide.symmetry, plans, order)
    found = otf.transport(wide.symmetry, both, params, onto=few.symmetry)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


def test_the_original_shrinks_what_consumes(digits: Dataset):
    wide, narrow = (network(ModelConfig("mlpnet", width=w), digits) for w in (0.5, 0.125))
    moved = initial(narrow.config, digits, 0)
    found = as_original(wide, narrow, moved)["params"]
    for number, factor in enumerate((1, 50 / 200, 25 / 100, 12 / 50)):
        expected = moved["params"][f"Dense_{number}"]["kernel"] * factor
        np.testing.assert_allclose(found[f"Dense_{number}"]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--factors", "1"], "--factors are [1.0]"),
        (["--grid", "0"], "--grid is [0.0]"),
        (["--held-out", "1"], "--held-out is 1.0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_widths_differ_and_something_is_held_out(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["widths", *words]) == 2
    assert message in capsys.readouterr().err


# --- prune


def test_units_are_kept_by_norm(digits: Dataset):
    wide, few = (network(ModelConfig("mlpnet", True, width=w), digits) for w in (0.25, 0.125))
    params = initial(wide.config, digits, 0)
    sizes = {group.name: group.size for group in few.symmetry.groups}
    units = strongest(wide.symmetry, params, sizes, order=2)
    kernels = [np.asarray(params["params"][f"Dense_{i}"]["kernel"]) for i in range(4)]
    biases = [np.asarray(params["params"][f"Dense_{i}"]["bias"]) for i in range(4)]
    found = narrowed(wide.symmetry, params, few.symmetry, order=2)["params"]
    rows = np.arange(64)
    for number, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        columns = np.arange(10)
        if number < 3:  # all but the output
            order = np.argsort(np.linalg.norm(kernel, axis=0))
            columns = np.sort(order[-len(found[f"Dense_{number}"]["bias"]) :])
            np.testing.assert_array_equal(units[wide.symmetry.groups[number].name], columns)
        np.testing.assert_array_equal(found[f"Dense_{number}"]["kernel"], kernel[rows][:, columns])
        np.testing.assert_array_equal(found[f"Dense_{number}"]["bias"], bias[columns])
        rows = columns


def test_channels_are_kept_through_a_flattening():
    def apply(params: dict, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", None, None, numbers)
        x = jax.nn.relu(x).reshape(len(x), -1)
        return jax.nn.relu(x @ params["dense"]) @ params["out"]

    def init(channels: int, units: int) -> dict:
        shapes = {"conv": (3, 3, 2, channels), "dense": (16 * channels, units), "out": (units, 5)}
        return normals(shapes)

    noise = normal(2, 4, 4, 2, seed=1)
    params = init(6, 8)
    wide, few = (otf.trace_symmetry(apply, p, noise) for p in (params, init(3, 5)))
    found = narrowed(wide, params, few)
    assert [x.shape for x in found.values()] == [(3, 3, 2, 3), (48, 5), (5, 5)]
    # With the units that are left out silenced, the whole network does what is left of it does.
    units = strongest(wide, params, {"conv": 3, "dense": 5})
    for name in ("conv", "dense"):
        silent = np.setdiff1d(np.arange(params[name].shape[-1]), units[name])
        params[name] = params[name].at[..., silent].set(0)
    np.testing.assert_allclose(apply(found, noise), apply(params, noise), rtol=1e-4, atol=1e-4)


def test_networks_are_pruned_and_fused(tmp_path: Path):
    results = run(tmp_path, "prune", *SMALL, "--shares", "0.5", "--norms", "l2", "--t", "0.5")
    (row,) = results["rows"]
    assert (row["network"], row["share"], row["norm"]) == ("seed 0", 0.5, "l2")
    assert all(40 < row[name] < 100 for name in ("pruned", "parent, moved"))
    assert row["averages"]["0.5"] > 80


@pytest.mark.parametrize("words", [["--shares", "0", "0.5"], ["--t", "1"]], ids=" ".join)
def test_something_is_left_out_and_something_is_left(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["prune", *words]) == 2
    assert "give numbers between 0 and 1" in capsys.readouterr().err


# --- distill


def test_students_are_distilled_from_several_starts(tmp_path: Path):
    words = ["--student", "0.5", "--distill-epochs", "1", "--orders", "1"]
    results = run(tmp_path, "distill", *SMALL, *words)
    starts = results["starts"]
    assert len(starts) == 6
    assert starts["drawn at random"]["before"] < 40
    for start in starts.values():
        assert len(start["labels"]) == len(start["teacher"]) == 1
    fused = starts["teacher and narrow network, fused"]
    assert fused["teacher"][0] > starts["drawn at random"]["teacher"][0]


@pytest.mark.parametrize("words", [["--student", "1"], ["--orders", "0"]], ids=" ".join)
def test_a_student_is_narrower_and_trained(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["distill", *words]) == 2
    assert f"{words[0]} is" in capsys.readouterr().err


# --- many


def test_many_models_are_fused_at_once(tmp_path: Path):
    words = ["--seeds", "0", "1", "2", "--counts", "3", "2", "--draws", "2"]
    results = run(tmp_path, "many", *SMALL, *words)
    assert [row["models"] for row in results["counts"]] == [2, 3]
    two, three = results["counts"]
    assert [draw["seeds"] for draw in two["draws"]][0] == [0, 1]
    for draw in two["draws"]:
        chosen = [results["individuals"][seed] for seed in draw["seeds"]]
        assert draw["individuals"] == pytest.approx(np.mean(chosen), abs=1e-3)
    for name in ("Algorithm 1", "fuse"):
        assert three["mean"][name] > 30
        assert three["cost"][name]["MiB"] > two["cost"][name]["MiB"] > 0
    # Means and deviations are those of the draws, and gains are within a draw.
    fused = {name: [draw[name] for draw in three["draws"]] for name in ("fuse", "barycenter")}
    gain = np.subtract(fused["barycenter"], fused["fuse"])
    assert three["mean"]["fuse"] == pytest.approx(np.mean(fused["fuse"]), abs=1e-3)
    assert three["mean"]["barycenter - fuse"] == pytest.approx(np.mean(gain), abs=1e-3)
    assert three["standard deviation"]["barycenter - fuse"] == pytest.approx(
        abs(gain[1] - gain[0]) / 2**0.5, abs=1e-3
    )
    assert three["draws that gain"]["barycenter - fuse"] == np.sum(gain > 0)
    # All three in another order: the barycenter does not mind.
    assert np.ptp(fused["barycenter"]) < 1
    assert 0 < results["inconsistent units (%)"] <= 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--counts", "1"], "give 2 models or more"),
        (["--counts", "2", "9"], "give 2 models or more"),
        (["--draws", "0"], "--draws is 0"),
    ],
    ids=" ".join,
)
def test_what_many_can_not_do(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["many", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("count", "found"), [(2, 12), (4, 4)])
def test_draws_are_all_there_are_and_no_two_the_same(count: int, found: int):
    chosen = draws(4, count, 99)
    assert len(chosen) == found
    assert len({(frozenset(some), some[-1]) for some in chosen}) == found
    assert all(len(set(some)) == count and set(some) <= set(range(4)) for some in chosen)
    assert draws(4, count, 3) == chosen[:3]
    assert chosen[0] == tuple(range(count))


def test_detours_through_a_universe_lead_to_the_same_units(digits: Dataset):
    symmetry = network(ModelConfig("vit", width=0.25), digits).symmetry
    universe = [symmetry.random(jax.random.key(seed)) for seed in range(3)]

    def through(a: int, b: int) -> dict[str, jax.Array]:
        return otf.compose(symmetry, universe[a], otf.invert(symmetry, universe[b]))

    assert inconsistency(symmetry, through, 3) == 0
    assert inconsistency(symmetry, through, 2) is None
    # One model's first two units of one group of 400 + 200 + 100, exchanged on one of the maps.
    symmetry = network(ModelConfig("mlpnet"), digits).symmetry
    still = symmetry.identity()
    name = symmetry.groups[0].name
    other = still | {name: still[name].at[jnp.array([0, 1])].set(jnp.array([1, 0]))}
    maps = {(0, 1): still, (1, 2): other, (0, 2): still}
    found = inconsistency(symmetry, lambda a, b: maps[a, b], 3)
    assert found == pytest.approx(100 * 2 / 700, abs=1e-3)


# --- learn


def test_alignments_are_learned(tmp_path: Path):
    words = ["--path-points", "3", "--steps", "30", "--batch-size", "64"]
    results = run(tmp_path, "learn", *SMALL, "--seeds", "0", "1", *words)
    (pair,) = results["pairs"].values()
    assert len(pair["history"]) == 30
    methods = pair["methods"]
    found = methods["learned"]
    assert found["averaged loss"] < methods["coordinate descent (fuse)"]["averaged loss"]
    assert found["path accuracy"][1] == pytest.approx(found["averaged"], abs=1e-3)
    # A permuted model is the same model, but for rounding.
    assert methods["learned"]["path accuracy"][0] == pytest.approx(pair["individuals"][0], abs=0.5)


def test_there_is_something_to_learn_from(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["learn", "--steps", "0"]) == 2
    assert "at least one of --steps" in capsys.readouterr().err


# --- features


@pytest.mark.parametrize("heads", [1, 3], ids=["a group", "a group inside of another"])
def test_correlations_are_of_units_of_norm_1(heads: int):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, heads, 4, 7), dtype=np.float32)  # five of a batch
    a[:, :, 0] = 0
    units = "xhid,xkjd->xhikj" if heads > 1 else "xhid,xhjd->xij"

    def gram(a: np.ndarray, b: np.ndarray) -> otf.Gram:
        norms = (jnp.asarray(np.square(x).sum(-1)) for x in (a, b))
        source_sq_norms, target_sq_norms = (x if heads > 1 else x[:, 0] for x in norms)
        return otf.Gram(source_sq_norms, target_sq_norms, jnp.asarray(np.einsum(units, a, b)))

    found = correlations(gram(a, b))
    norms = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    expected = gram(
        *(x / np.where(norm > 0, norm, 1) for x, norm in zip((a, b), norms, strict=True))
    )
    np.testing.assert_allclose(found.cross, expected.cross, atol=1e-5)
    np.testing.assert_array_equal(found.target_sq_norms, 1)


# --- statistics of batch norm


@pytest.mark.parametrize("augment", [False, True])
def test_statistics_are_those_of_the_images_as_training_shows_them(augment: bool):
    config = ModelConfig("resnet18", use_norm=True, width=1 / 32)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((300, 32, 32, 3)).astype(np.float32)
    dataset = Dataset("noise", images, np.zeros(300, np.int32), images, np.zeros(300, np.int32), 10)
    variables = initial(config, dataset, 0)
    found = reestimated(network(config, dataset, augment), variables, jnp.asarray(images))
    kernel = variables["params"]["Conv_0"]["kernel"]
    numbers = ("NHWC", "HWIO", "NHWC")
    # A batch of 250; what is over is left out.
    shown = jnp.asarray(images)
    if augment:
        shown = augmented(jax.random.key(0), shown, jnp.min(shown, (0, 1, 2), keepdims=True))
    first = jax.lax.conv_general_dilated(shown[:250], kernel, (1, 1), "SAME", None, None, numbers)
    expected = {"mean": first.mean((0, 1, 2)), "var": first.var((0, 1, 2))}
    for name, value in found["batch_stats"]["BatchNorm_0"].items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])


def test_a_model_without_batch_norm_has_no_statistics(digits: Dataset):
    config = ModelConfig("mlpnet")
    variables = initial(config, digits, 0)
    assert reestimated(network(config, digits), variables, jnp.ones((2, 8, 8, 1))) is variables


def test_running_statistics_do_not_count():
    config = ModelConfig("resnet18", use_norm=True, width=1 / 32)
    model = build_model(config, 10)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    symmetry = otf.trace_symmetry(
        model.apply, jax.eval_shape(model.init, jax.random.key(0), images), images
    )
    out = {leaf.path for leaf in symmetry.leaves if not counts(leaf.path)}
    assert out == {leaf.path for leaf in symmetry.leaves if leaf.path.endswith(("mean", "var"))}
