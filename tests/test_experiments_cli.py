"""Runs the command line end to end on small data, and checks what it leaves behind."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import cli, data, report
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
    assert content["config"]["training"]["epochs"] == 2
    assert content["config"]["seeds"] == [0, 1]
    assert {"device", "versions"} == content["environment"].keys()
    assert (finished / "paths.png").read_bytes().startswith(b"\x89PNG")


def test_results_hang_together(finished: Path):
    results = read(finished)["results"]
    a, b = results["individuals"]
    assert min(a, b) > 60
    assert list(results["methods"]) == METHODS
    middle = results["t"].index(0.5)
    for method in results["methods"].values():
        # Aligned or not, a path starts at a model that does what A does, and ends at B.
        assert method["path"][0] == pytest.approx(a, abs=0.6)
        assert method["path"][-1] == pytest.approx(b, abs=0.6)
        assert method["path"][middle] == pytest.approx(method["accuracy"], abs=0.6)


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
        assert f"| {label}" in table


def test_runs_have_folders_of_their_own():
    request = Request("", "digits", "mlpnet", True, (4, 5), epochs=None, data_dir=None, out=None)
    assert request.folder("one_shot") == Path("runs/one_shot-digits-mlpnet-bias-4-5")
    assert dataclasses.replace(request, out=Path("x")).folder("one_shot") == Path("x")


def test_epochs_replace_those_of_the_recipe():
    request = Request("", "digits", "mlpnet", False, (0, 1), epochs=3, data_dir=None, out=None)
    recipe = RECIPES["digits", "mlpnet"]
    assert request.train_config == dataclasses.replace(recipe, epochs=3)
    assert dataclasses.replace(request, epochs=None).train_config == recipe


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
    curves = {str(index): [0.0, 1.0] for index in range(6)}
    with pytest.raises(ValueError, match="6 curves"):
        report.plot_paths(tmp_path / "paths.png", "", [0, 1], curves, {})
