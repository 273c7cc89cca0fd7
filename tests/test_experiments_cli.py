"""Runs the command line end to end on small data, and checks what it leaves behind."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import cli, data, report
from experiments.models import ModelConfig
from experiments.recipes import RECIPES
from experiments.runs import Request

METHODS = [
    "vanilla average",
    "Algorithm 1, weights",
    "Algorithm 1, activations",
    "coordinate descent (fuse)",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["one_shot", "--epochs", "2", "--out", str(folder)]) == 0
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_run_leaves_results_and_plot(finished: Path):
    content = read(finished)
    assert content["command"].startswith("python -m experiments one_shot --epochs 2")
    assert content["config"]["epochs"] == 2
    assert content["config"]["seeds"] == [0, 1]
    assert {"device", "versions"} == content["environment"].keys()
    assert (finished / "paths.png").read_bytes().startswith(b"\x89PNG")
    assert "| coordinate descent (fuse) " in (finished / "results.md").read_text()


def test_results_hang_together(finished: Path):
    results = read(finished)["results"]
    a, b = results["individuals"]
    assert min(a, b) > 60
    assert list(results["methods"]) == METHODS
    middle = results["t"].index(0.5)
    losses = results["losses"]
    assert losses["ensemble"] < max(losses["individuals"])
    for name, method in results["methods"].items():
        # Aligned or not, a path starts at a model that does what A does, and ends at B.
        path = method["path accuracy"]
        assert path[0] == pytest.approx(a, abs=0.6)
        assert path[-1] == pytest.approx(b, abs=0.6)
        assert path[middle] == pytest.approx(method["averaged"], abs=0.6)
        nats, lost = method["path loss"], losses["methods"][name]
        assert nats[0] == pytest.approx(losses["individuals"][0], abs=0.01)
        assert nats[-1] == pytest.approx(losses["individuals"][1], abs=0.01)
        assert nats[middle] == pytest.approx(lost["averaged"], abs=0.01)
        assert 0 <= lost["barrier"] <= max(nats)


def test_second_run_gives_the_same_results(finished: Path, capsys: pytest.CaptureFixture[str]):
    first, plot = read(finished), (finished / "paths.png").read_bytes()
    assert cli.main(["one_shot", "--epochs", "2", "--out", str(finished)]) == 0
    second = read(finished)
    for content in (first, second):
        content.pop("timings_in_seconds")
    assert second == first
    assert (finished / "paths.png").read_bytes() == plot
    table = capsys.readouterr().out
    for label in ["model A", "model B", "ensemble", *METHODS]:
        assert table.count(f"| {label}") == 2  # in accuracies, and in losses


def test_runs_have_folders_of_their_own():
    request = Request("", "digits", ModelConfig("mlpnet", use_bias=True, width=0.5), (4, 5))
    assert request.folder("one_shot") == Path("runs/one_shot-digits-mlpnet-bias-x0.5-4-5")
    assert dataclasses.replace(request, out=Path("x")).folder("one_shot") == Path("x")
    files = {"weights": [Path("here/a.npz"), Path("there/b.npz")]}
    named = dataclasses.replace(request, options=files)
    assert named.folder("one_shot") == Path("runs/one_shot-digits-mlpnet-bias-x0.5-a-b")
    assert named.title == "mlpnet-bias-x0.5 on digits, a, b"
    assert request.title == "mlpnet-bias-x0.5 on digits, seeds 4, 5"


def test_epochs_replace_those_of_the_recipe():
    request = Request("", "digits", ModelConfig("mlpnet"), (0, 1), epochs=3)
    recipe = RECIPES["digits", "mlpnet"]["short"]
    assert request.train_config == dataclasses.replace(recipe, epochs=3)
    assert dataclasses.replace(request, epochs=None).train_config == recipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vgg11"], "no recipe for vgg11 on digits"),
        (["--recipe", "long"], r"choose one of \['short'\]"),
        (["--norm"], "mlpnet has no batch norm"),
        (["--model", "vit", "--norm"], "vit has no batch norm"),
        (["--width", "0"], "leaves no units"),
        (["--test-images", "0"], "--test-images is 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_request_that_cannot_be_met_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["one_shot", "--out", str(tmp_path / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "results.json").exists()


def test_fewer_images_are_the_first():
    request = Request("", "digits", ModelConfig("mlpnet"), (0, 1), train_images=100, test_images=50)
    part, whole = request.load(), dataclasses.replace(request, test_images=None).load()
    assert part.train_images.shape == (100, 8, 8, 1)
    np.testing.assert_array_equal(part.test_images, whole.test_images[:50])
    np.testing.assert_array_equal(part.test_labels, whole.test_labels[:50])


def test_missing_data_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(data, "_tensorflow_installed", lambda: False)
    monkeypatch.chdir(tmp_path)
    command = ["one_shot", "--dataset", "mnist", "--data-dir", str(tmp_path / "nothing")]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mnist is not in")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_table_is_aligned():
    table = report.markdown_table(("", "accuracy"), [("a model", "9.50"), ("b", "97.25")])
    assert table.splitlines() == [
        "|         | accuracy |",
        "| ------- | -------: |",
        "| a model |     9.50 |",
        "| b       |    97.25 |",
    ]


def test_plot_refuses_what_cannot_be_told_apart(tmp_path: Path):
    curves = {str(index): [0.0, 1.0] for index in range(9)}
    with pytest.raises(ValueError, match="9 curves"):
        report.plot_lines(tmp_path / "paths.png", "", ("t", [0, 1]), {"": curves}, {})


def test_a_panel_of_other_curves_has_a_legend_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, path: drawn.append(figure))
    panels = [
        report.Panel("", ("epsilon", [0.1, 1]), {"a": [1, 2], "b": [2, 1]}, log=True),
        report.Panel("", ("t", [0, 1]), {"b": [0, 1]}, spreads={"b": [0.5, 0]}),
        report.Panel("", ("t", [0, 1]), {"c": [0, 1]}),
    ]
    report.plot_panels(tmp_path / "panels.png", "", panels)
    first, second, third = drawn[0].axes
    assert [axes.get_legend() is None for axes in (first, second, third)] == [False, True, False]
    drawn[0].draw_without_rendering()
    for axes in (first, third):  # beside the curves: a place among them would have to be searched
        assert axes.get_legend().get_window_extent().y1 < axes.bbox.y0
    assert (first.get_xscale(), second.get_xscale()) == ("log", "linear")
    assert first.lines[1].get_color() == second.lines[0].get_color() != third.lines[0].get_color()
