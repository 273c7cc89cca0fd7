"""Runs the studies end to end on small data, and checks what they say against its parts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from arrays import normal, normals

import otfusion_jax as otf
from experiments import cli
from experiments.alignments import correlations
from experiments.crossings import as_original
from experiments.data import Dataset, load_dataset
from experiments.divisions import divide
from experiments.evaluate import ACCURACY, LOSS
from experiments.joint import draws, inconsistency
from experiments.methods import CORRECTIONS, VARIANTS
from experiments.models import ModelConfig, build_model
from experiments.narrow import narrowed, reordered, selected, strongest
from experiments.networks import counts, network, reestimated
from experiments.report import where
from experiments.train import augmented, initial


def run(folder: Path, *words: str) -> pd.DataFrame:
    """Runs a command, checks what it leaves behind, and returns the records."""
    assert cli.main([*words, "--out", str(folder)]) == 0
    content = json.loads((folder / "results.json").read_text())
    assert content["command"].startswith(f"python -m experiments {words[0]}")
    assert (folder / "results.md").read_text().endswith(f"`{content['command']}`\n")
    assert [path.name for path in folder.glob("*.png")] == [f"{words[0]}.png"]
    records = pd.read_csv(folder / "results.csv", keep_default_na=True)
    assert set(records["study"]) == {words[0]}
    return records


def value(records: pd.DataFrame, **labels: object) -> float:
    """The one value with some labels."""
    return where(records, **labels)["value"].item()


def values(records: pd.DataFrame, **labels: object) -> list[float]:
    """All values with some labels, in the order of the records."""
    return list(where(records, **labels)["value"])


def names(records: pd.DataFrame, column: str) -> list:
    """The different values of a column, in the order of the records."""
    return list(records[column].dropna().drop_duplicates())


def best(records: pd.DataFrame) -> pd.Series:
    """The record with the highest value, the first of several."""
    return records.sort_values("value", ascending=False, kind="stable").iloc[0]


def row(folder: Path, *start: str) -> list[str]:
    """The cells of the one row in the printed tables that starts with some cells."""
    found = []
    for line in (folder / "results.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if tuple(cells[: len(start)]) == start:
            found.append(cells)
    (cells,) = found
    return cells


# Of one size and trained for as long, so that what trains, aligns and repairs is compiled once.
SMALL = ["--width", "0.25", "--epochs", "4"]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


# --- merge


def test_the_one_call_is_compared_with_single_methods(tmp_path: Path):
    method = "coordinate descent (fuse)"
    flags = ("--images", "200", "--polish", "20", "--controls", "--methods", method)
    records = run(tmp_path, "merge", *SMALL, *flags)
    assert names(records, "method") == [
        "model A",
        "model B",
        "ensemble",
        "coordinate descent",
        "coordinate descent, statistics restored",
        "coordinate descent, least squares",
        "coordinate descent, least squares on activations",
        "the best single method, weights alone",
        "the best single method, images without labels",
        "merge, no data",
        "merge, 200 images",
        "model A, polished",
        "vanilla average, polished",
    ]
    single = value(records, method="coordinate descent")
    assert value(records, method="the best single method, weights alone") == single
    assert value(records, method="merge, 200 images") > single - 5
    trained = value(records, method="model A, polished")
    assert value(records, method="vanilla average, polished") < trained
    report = (tmp_path / "merge-0-1-200-images.txt").read_text()
    assert "fitted to 100 inputs" in report


def test_the_one_call_is_measured_alone(tmp_path: Path):
    flags = ("--images", "100", "--polish", "0", "--no-drawn", "--methods")
    records = run(tmp_path, "merge", *SMALL, *flags)
    assert names(records, "method") == ["model A", "model B", "ensemble", "merge, 100 images"]


def test_what_cannot_be_merged_or_compared_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["merge", "--seeds", "0", "1", "2"]) == 2
    assert "two for each pair" in capsys.readouterr().err
    assert cli.main(["merge", "--polish", "0", "--controls"]) == 2
    assert "--controls make as many steps as --polish" in capsys.readouterr().err


# --- one_shot


def test_methods_are_evaluated_and_corrected(tmp_path: Path):
    methods = [
        "vanilla average",
        "coordinate descent (fuse)",
        "the original: unit norm, Euclidean",
        "Algorithm 1, activations of 100",
        "activation matching (correlation)",
    ]
    assert set(methods) <= set(VARIANTS)
    words = ["--path-points", "3", "--methods", *methods]
    records = run(tmp_path, "one_shot", *SMALL, *words)
    found = where(records, metric=ACCURACY).dropna(subset="measure")
    found = found[found["measure"].isin(CORRECTIONS)]
    assert names(found, "method") == ["model A", "model B", "ensemble", *methods]
    assert found["value"].min() > 40
    fused = found[found["method"].isin(methods)].groupby("measure")["method"].agg(list)
    assert fused["averaged"] == methods
    assert fused["statistics restored"] == [*methods[:2], *methods[3:]]
    assert fused["least squares"] == [*methods[:2], *methods[4:]]
    # Paths are those of the usual methods alone.
    assert names(where(records, measure="path"), "method") == methods[:2]
    averaged = where(found, measure="averaged")
    assert value(averaged, method=methods[1]) > value(averaged, method=methods[0])


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
    records = where(run(tmp_path / "run", *words, "--weights", *files), metric=ACCURACY)
    assert max(value(records, method=f"model {name}") for name in "AB") < 40
    assert set(records["seeds"]) == {"a b"}
    assert not (tmp_path / "run" / "models").exists()
    words = ["one_shot", "--width", "0.5", "--weights", *files, "--out", str(tmp_path / "other")]
    assert cli.main(words) == 2


def test_methods_can_do_without_data(tmp_path: Path):
    words = ["--methods", "activation matching (correlation)", "--path-points", "3"]
    records = run(tmp_path, "one_shot", *SMALL, "--synthetic", *words)
    fused = where(records, measure="least squares")
    assert names(fused, "method") == ["activation matching (correlation)"]


# Optax's AdamW promotes dtypes inside.
@pytest.mark.usefixtures("default_promotion")
def test_language_models_are_fused(tmp_path: Path):
    words = ["one_shot", "--dataset", "pydoc", "--model", "gpt", "--width", "0.25"]
    words += ["--epochs", "1", "--train-images", "256", "--test-images", "40", "--images", "20"]
    records = run(tmp_path, *words, "--path-points", "3", "--methods", "vanilla average")
    losses = where(records, metric=LOSS)
    worse = max(value(losses, method=f"model {name}") for name in "AB")
    assert value(losses, method="ensemble") < worse
    vanilla = where(losses, method="vanilla average")
    for correction in VARIANTS["vanilla average"].corrections:
        assert 0 < value(vanilla, measure=correction.name) < 2 * worse
    middle = value(vanilla, measure="path", t=0.5)
    assert middle == pytest.approx(value(vanilla, measure="averaged"), abs=1e-3)


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
    starts = ["model A", "model B", "coordinate descent, least squares"]
    words = ["--seeds", "0", "1", "2", "0", *SMALL, "--fine-tune-epochs", "2"]
    words += ["--factors", "1", "0.001", "--validation-images", "200", "--starts", *starts]
    records = run(tmp_path, "fine_tune", *words)
    assert names(records, "pair") == ["0, 1", "2, 0"]
    before = where(records, trained="before", metric=ACCURACY)
    chosen: dict[str, list[str]] = {start: [] for start in starts}
    after: dict[str, list[float]] = {start: [] for start in starts}
    for pair in names(records, "pair"):
        assert names(where(before, pair=pair), "start") == [*starts, "ensemble of the parents"]
        for start in starts:
            tuned = where(records, pair=pair, start=start, trained="after")
            assert names(tuned, "schedule") == [
                "one-cycle, 0.1",
                "halved, 0.1",
                "one-cycle, 0.0001",
                "halved, 0.0001",
            ]
            schedule = best(where(tuned, metric="validation accuracy (%)"))["schedule"]
            chosen[start].append(schedule)
            after[start].append(value(tuned, metric=ACCURACY, schedule=schedule))
            untrained = value(before, pair=pair, start=start)
            # Hardly trained at all, a model stays what it was.
            hardly = value(tuned, metric=ACCURACY, schedule="halved, 0.0001")
            assert hardly == pytest.approx(untrained, abs=2)
            assert after[start][-1] > untrained - 2

    above = np.subtract(after[starts[-1]], np.maximum(after["model A"], after["model B"]))
    for start in starts:
        cells = row(tmp_path, start)
        assert float(cells[1]) == pytest.approx(np.mean(values(before, start=start)), abs=6e-3)
        assert float(cells[2]) == pytest.approx(np.mean(after[start]), abs=6e-3)
        # Of two step sizes either is the last one tried on its side.
        for schedule in chosen[start]:
            edge = {"0.1": "largest", "0.0001": "smallest"}[schedule.split(", ")[1]]
            assert f"{schedule} ({edge} tried)" in cells[-1]
    mean, deviation = row(tmp_path, starts[-1])[3].split(" ± ")
    assert float(mean) == pytest.approx(above.mean(), abs=6e-3)
    assert float(deviation) == pytest.approx(above.std(ddof=1), abs=6e-3)


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
    records = run(tmp_path, "non_iid", *SMALL, *words)
    a, b = (where(records, method=f"model {name}") for name in "AB")
    if split == "parity":
        assert value(a, metric="test of B") == value(b, metric="test of A") == 0
    paths = where(records, metric=ACCURACY).dropna(subset="t")
    ends = [value(model, metric=ACCURACY) for model in (a, b)]
    for method in names(paths, "method"):
        path = values(paths, method=method)
        assert len(path) == 5
        # Any method leaves the ends of the path as they are.
        assert path[0] == pytest.approx(ends[0], abs=1.5)
        assert path[-1] == pytest.approx(ends[1], abs=1.5)
        # The table shows the path where it is best by validation.
        validation = where(records, method=method, metric="validation").dropna(subset="t")
        t = best(validation)["t"]
        cells = row(tmp_path, method)
        assert cells[1:3] == [f"{t:.2f}", f"{value(paths, method=method, t=t):.2f}"]
        assert cells[-1] == f"{max(path):.2f}"
    assert paths["value"].max() > max(ends)


# --- federated


def test_clients_are_averaged_round_by_round(tmp_path: Path):
    records = run(tmp_path, "federated", *SMALL, "--same-start")
    a, b = values(records, metric="share of the data")
    assert a < b
    assert a + b == pytest.approx(1, abs=1e-3)
    records = where(records, metric=ACCURACY)
    everything = value(records, method="trained on all data")
    servers = names(records, "method")[:-1]
    assert len(servers) == 6
    merged = {name: values(records, method=name, model="global model") for name in servers}
    clients = {name: where(records, method=name, round=1) for name in servers}
    for name in servers:
        both = [value(clients[name], model=f"client {client}") for client in "AB"]
        # Nothing has been averaged yet.
        assert both == [value(clients[servers[0]], model=f"client {client}") for client in "AB"]
        assert len(where(records, method=name)) == 2 * 3
        assert merged[name][1] > merged[name][0] - 5
        assert max(merged[name]) < everything
    # Of one start, models are aligned as they stand.
    assert merged["coordinate descent"] == merged["vanilla average"]


def test_there_is_a_round(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["one_shot", "--learning-steps", "0"]) == 2
    assert "--learning-steps is 0" in capsys.readouterr().err
    assert cli.main(["federated", "--rounds", "0"]) == 2
    assert "--rounds is 0" in capsys.readouterr().err


# --- ablate


def test_plans_are_softened_and_samples_drawn(tmp_path: Path):
    words = ["--epsilons", "10", "--iterations", "100", "--samples", "100", "--draws", "2"]
    records = run(tmp_path, "ablate", *SMALL, *words)
    a, b = (value(records, plans=f"model {name}") for name in "AB")
    entropy = where(records, draw=0).dropna(subset="epsilon")
    for units in ("weights", "activations", "correlations"):
        found = where(entropy, units=units)
        assert names(found, "plans") == ["exact", "epsilon 10"]
        assert where(found, plans="exact")["converged"].all()
        # Nothing is left of A once all its units are averaged.
        exact = value(found, plans="exact", measure="A moved")
        assert exact == pytest.approx(a, abs=0.3)
        assert value(found, plans="epsilon 10", measure="A moved") < 40
        average = value(found, plans="epsilon 10", measure="averaged")
        assert average == pytest.approx(b, abs=3)
    samples = records[records["draw"] > 0]
    assert names(samples, "units") == ["activations", "correlations"]
    for units in names(samples, "units"):
        drawn = values(samples, units=units, images=100)
        assert len(drawn) == len(where(samples, units=units)) == 2
        assert min(drawn) > 40


@pytest.mark.parametrize("words", [["--samples", "1"], ["--draws", "0"]], ids=" ".join)
def test_there_is_something_to_draw(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["ablate", *words]) == 2
    assert "--samples are" in capsys.readouterr().err


# --- widths


def test_networks_of_other_widths_are_fused(tmp_path: Path):
    scaled = "coordinate descent, scaled as in the original"
    methods = [scaled, "coordinate descent", "truncated by l1 norm", "truncated, then aligned"]
    words = [*SMALL, "--factors", "2", "--methods", *methods]
    words += ["--grid", "0.3", "0.6", "--held-out", "0.1", "--images", "300"]
    records = run(tmp_path, "widths", *words)
    narrowing, widening = where(records, source=2, target=1), where(records, source=1, target=2)
    assert names(narrowing, "method") == methods
    assert names(widening, "method") == methods[:2]
    # Units that are copied, and share what they put out, compute the same function.
    alone = value(records, measure="alone", source=1)
    copied = where(widening, method="coordinate descent")
    assert value(copied, measure="A moved") == alone
    assert value(copied, measure="A moved, least squares") == pytest.approx(alone, abs=1)
    # Without biases the scaling of layers changes no prediction.
    as_they, descent = (where(narrowing, method=name) for name in methods[:2])
    assert value(as_they, measure="A moved") == value(descent, measure="A moved")
    averages = ["t = 0.5", "t = 0.67"]
    assert [value(as_they, measure=t) for t in averages] != [
        value(descent, measure=t) for t in averages
    ]
    assert not as_they["measure"].str.contains("least squares").any()
    for method in ("coordinate descent", "truncated, then aligned"):
        found = where(narrowing, method=method)
        assert value(found, measure="t = 0.5") > 80
        repaired = [name for name in names(found, "measure") if "least squares" in name]
        assert repaired == ["A moved, least squares", "t = 0.5, least squares"]
        moved = value(found, measure="A moved")
        assert value(found, measure="A moved, least squares") > max(80, moved)
        held_out = where(found, metric="held-out accuracy (%)")
        assert list(held_out["t"]) == [0.3, 0.6]
        t = best(held_out)["t"]
        shown = f"{value(found, measure='best (t)', t=t):.2f} ({t:g})"
        way = f"{value(records, measure='alone', source=2):.2f} / {alone:.2f}"
        assert row(tmp_path, "x2 onto x1", way, method)[-1] == shown
    assert where(narrowing, measure="A moved")["value"].min() > 40


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
    alone = where(run(tmp_path / "run", "widths", *words), measure="alone")
    assert value(alone, source=2) > 80
    assert value(alone, source=1) < 40


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
    words = ["--shares", "0.5", "--norms", "l2", "--t", "0.5"]
    records = run(tmp_path, "prune", *SMALL, *words)
    whole, pruned = where(records, share=0), where(records, share=0.5)
    assert set(records["model"]) == {"seed 0"}
    assert set(pruned["norm"]) == {"l2"}
    assert len(whole) == 1
    assert names(pruned, "measure") == ["pruned", "parent, moved", "t = 0.5"]
    assert pruned["value"].between(40, 100).all()
    assert value(pruned, measure="t = 0.5") > 80
    cells = [f"{value:.2f}" for value in pruned["value"]]
    assert row(tmp_path, "seed 0", "50 %", "l2")[3:] == cells


@pytest.mark.parametrize("words", [["--shares", "0", "0.5"], ["--t", "1"]], ids=" ".join)
def test_something_is_left_out_and_something_is_left(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["prune", *words]) == 2
    assert "give numbers between 0 and 1" in capsys.readouterr().err


# --- distill


def test_students_are_distilled_from_several_starts(tmp_path: Path):
    words = ["--student", "0.5", "--distill-epochs", "1", "--orders", "1"]
    records = run(tmp_path, "distill", *SMALL, *words)
    starts = names(records, "start")
    assert len(starts) == 6 + 1  # and the teacher
    assert value(records, start="drawn at random", trained="before") < 40
    for start in starts[:-1]:
        trained = where(records, start=start, order=1)
        assert list(trained["trained"]) == ["by labels alone", "by the teacher too"]
    by_teacher = where(records, trained="by the teacher too")
    fused = value(by_teacher, start="teacher and narrow network, fused")
    assert fused > value(by_teacher, start="drawn at random")


@pytest.mark.parametrize("words", [["--student", "1"], ["--orders", "0"]], ids=" ".join)
def test_a_student_is_narrower_and_trained(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["distill", *words]) == 2
    assert f"{words[0]} is" in capsys.readouterr().err


# --- many


def test_many_models_are_fused_at_once(tmp_path: Path):
    words = ["--seeds", "0", "1", "2", "--counts", "3", "2", "--draws", "2"]
    records = run(tmp_path, "many", *SMALL, *words)
    accuracies = where(records, metric=ACCURACY)
    assert names(accuracies, "models") == [1, 2, 3]
    two = where(accuracies, models=2).pivot(index="draw", columns="method", values="value")
    three = where(accuracies, models=3).pivot(index="draw", columns="method", values="value")
    assert names(where(accuracies, models=2), "draw")[0] == "0 1"
    assert len(two) == len(three) == 2
    single = where(accuracies, models=1).set_index("draw")["value"]
    for draw in names(where(accuracies, models=2), "draw"):
        mean = single[draw.split()].mean()
        assert two["individuals"][draw] == pytest.approx(mean, abs=1e-3)
    costs = where(records, metric="(MiB)")
    for name in ("Algorithm 1", "fuse"):
        assert three[name].mean() > 30
        small, large = (value(costs, models=count, method=name) for count in (2, 3))
        assert large > small > 0
    # Means and deviations are those of the draws, and gains are within a draw.
    gains = np.asarray(three["barycenter"] - three["fuse"])
    cells = row_of_models(tmp_path, 3)
    assert cells["fuse"].split(" ± ")[0] == f"{three['fuse'].mean():.2f}"
    mean, rest = cells["barycenter - fuse"].split(" ± ")
    assert float(mean) == pytest.approx(gains.mean(), abs=6e-3)
    deviation, wins = rest.split(" ", 1)
    assert float(deviation) == pytest.approx(abs(gains[1] - gains[0]) / 2**0.5, abs=6e-3)
    assert wins == f"({np.sum(gains > 0)} of 2)"
    # All three in another order: the barycenter does not mind.
    assert np.ptp(three["barycenter"]) < 1
    assert 0 < value(records, metric="inconsistent units (%)") <= 100


def row_of_models(folder: Path, count: int) -> dict[str, str]:
    """The row of the first table for some number of models, by the titles of the columns."""
    lines = (folder / "results.md").read_text().splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("| models"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    cells = next(cells for cells in rows if cells[0] == str(count))
    return dict(zip(rows[0], cells, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--counts", "1"], "give 2 models or more"),
        (["--counts", "2", "9"], "give 2 models or more"),
        (["--draws", "0"], "--draws is 0"),
        (["--rotations"], "the units of mlpnet can't be rotated"),
    ],
    ids=" ".join,
)
def test_what_many_can_not_do(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["many", *words]) == 2
    assert message in capsys.readouterr().err


def test_many_models_are_merged_by_the_one_call(tmp_path: Path):
    words = ["--seeds", "0", "1", "2", "--counts", "3", "--draws", "1", "--images", "200"]
    records = run(tmp_path, "many", *SMALL, *words, "--merge")
    accuracies = where(records, metric=ACCURACY, models=3)
    merged = value(accuracies, method="merge")
    assert merged > value(accuracies, method="fuse") - 5
    assert "merge" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(("count", "found"), [(2, 12), (4, 4)])
def test_draws_are_all_there_are_and_no_two_the_same(count: int, found: int):
    chosen = draws(4, count, 99)
    assert len(chosen) == found
    assert len({(frozenset(some), some[-1]) for some in chosen}) == found
    assert all(len(set(some)) == count and set(some) <= set(range(4)) for some in chosen)
    assert draws(4, count, 3) == chosen[:3]
    assert chosen[0] == tuple(range(count))


@pytest.mark.parametrize("rotations", [False, True], ids=["permutations", "rotations"])
def test_detours_through_a_universe_lead_to_the_same_units(digits: Dataset, rotations: bool):
    symmetry = network(ModelConfig("vit", width=0.25), digits).symmetry
    if rotations:
        # Theirs come back up to rounding, so that they must not count.
        symmetry = symmetry.with_rotations()
    universe = [symmetry.random(jax.random.key(seed)) for seed in range(3)]

    def through(a: int, b: int) -> dict[str, jax.Array]:
        return otf.compose(symmetry, universe[a], otf.invert(symmetry, universe[b]))

    assert inconsistency(symmetry, through, 3) == 0
    assert inconsistency(symmetry, through, 2) is None


def test_units_that_a_detour_exchanges_are_counted(digits: Dataset):
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
    records = run(tmp_path, "learn", *SMALL, "--seeds", "0", "1", *words)
    assert names(records, "pair") == ["0, 1"]
    assert len(records.dropna(subset="step")) == 30
    averaged = where(records, measure="averaged")
    learned = where(records, method="learned")
    descent = value(averaged, method="coordinate descent (fuse)", metric=LOSS)
    assert value(learned, measure="averaged", metric=LOSS) < descent
    path = where(learned, measure="path", metric=ACCURACY)
    middle = value(averaged, method="learned", metric=ACCURACY)
    assert value(path, t=0.5) == pytest.approx(middle, abs=1e-3)
    # A permuted model is the same model, but for rounding.
    a, _ = values(averaged, method="individuals", metric=ACCURACY)
    assert value(path, t=0) == pytest.approx(a, abs=0.5)


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


# --- soups


def test_ways_to_merge_are_compared(tmp_path: Path):
    records = run(tmp_path, "soups", *SMALL, "--images", "60", "--seeds", "0", "1")
    found = where(records, metric=ACCURACY)
    aligned, plain = (where(found, measure=name) for name in ("aligned", "as they are"))
    assert names(aligned, "method") == names(plain, "method")[2:]
    assert len(names(aligned, "method")) == 5
    for method in ("average", "Fisher-weighted average"):
        assert value(aligned, method=method) > value(plain, method=method)
    assert value(aligned, method="partial zip, half of the layers") > 50


def test_only_known_layers_are_merged(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["soups", "--model", "vit"]) == 2
    assert "--model mlpnet" in capsys.readouterr().err


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
