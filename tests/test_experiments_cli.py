"""Runs the command line end to end on small data, and checks what it leaves behind."""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import cli, data, plots, report
from experiments.evaluate import ACCURACY, BARRIERS, LOSS
from experiments.recipes import RECIPES
from experiments.report import where
from experiments.runs import Run
from experiments.studies import STUDIES
from experiments.studies.one_shot import OneShot

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    if "python -m experiments " in page.read_text()
]
METHODS = [
    "vanilla average",
    "Algorithm 1, weights",
    "Algorithm 1, activations",
    "coordinate descent (fuse)",
]


# --- the command line


def documented_commands(page: Path) -> list[list[str]]:
    """The words after `python -m experiments` in each command of a page, as bash expands them."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)
    script = [
        "pip() { :; }",
        'python() { [[ "$1 $2" != "-m experiments" ]] || printf "%s\\n" command "${@:3}"; }',
        *(block for block in blocks if "python -m experiments " in block),
    ]
    # In an empty environment and folder, where nothing but the shell's own commands can run.
    run = subprocess.run(
        ["/bin/bash", "-eu", "-c", "\n".join(script)],
        env={"PATH": ""},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return [command.splitlines() for command in run.stdout.split("command\n")[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_documented_command_can_be_parsed(page: Path):
    commands = documented_commands(page)
    assert len(commands) == page.read_text().count("python -m experiments ") - inline(page)
    for words in commands:
        study = cli.parse(words)
        study.check()
        assert study.command == words[0]


def inline(page: Path) -> int:
    """How often a page speaks of a command in a sentence."""
    return page.read_text().count("`python -m experiments ")


def test_every_documented_flag_is_there():
    """Those that the pages of studies speak of in a sentence."""
    documented = set()
    for page in (ROOT / "README.md", ROOT / "docs/studies.md"):
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for code in re.findall(r"`([^`]*)`", prose):
            documented |= set(re.findall(r"(?<!\S)--([a-z-]+)", code))
    flags = {"help"}
    for study in STUDIES.values():
        for field in dataclasses.fields(study):
            name = field.name.replace("_", "-")
            flags |= {name, f"no-{name}"} if field.type is bool else {name}
    assert len(documented) > 5
    assert documented <= flags


@pytest.mark.parametrize("name", STUDIES)
def test_every_flag_is_explained(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(STUDIES[name]):
        flag = f"--{field.name.replace('_', '-')}"
        # Behind the flag and what it takes stands a sentence, on this line or the next.
        assert re.search(rf"{flag}\b[^\n]*\n?[^\n]*[A-Z][a-z]+ [a-z]+", text), flag


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["no_study"], "no_study"),
        (["one_shot", "--seeds", "0"], "--seeds"),
        (["one_shot", "--methods", "no method"], "--methods"),
        (["one_shot", "--t", "0.5"], "--t"),
        (["prune", "--norms", "l3"], "l3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_no_command(words: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


# --- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["one_shot", "--epochs", "2", "--out", str(folder)]) == 0
    return folder


def settings(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_run_leaves_records_and_plot(finished: Path):
    content = settings(finished)
    assert content["command"].startswith("python -m experiments one_shot --epochs 2")
    assert content["config"]["epochs"] == 2
    assert content["config"]["seeds"] == [0, 1]
    assert {"device", "versions"} == content["environment"].keys()
    assert (finished / "one_shot.png").read_bytes().startswith(b"\x89PNG")
    assert "| coordinate descent (fuse) " in (finished / "results.md").read_text()
    records = pd.read_csv(finished / "results.csv")
    assert list(records.columns[:4]) == ["study", "dataset", "network", "seeds"]
    assert list(records.columns[-2:]) == ["metric", "value"]
    assert set(records["network"]) == {"mlpnet"}
    assert set(records["seeds"]) == {"0 1"}
    assert records["value"].notna().all()


def test_records_hang_together(finished: Path):
    records = pd.read_csv(finished / "results.csv")

    def value(metric: str, method: str, measure: str) -> float:
        return where(records, metric=metric, method=method, measure=measure)["value"].item()

    a, b = (value(ACCURACY, f"model {name}", "averaged") for name in "AB")
    losses = [value(LOSS, f"model {name}", "averaged") for name in "AB"]
    assert min(a, b) > 60
    methods = where(records, measure="statistics restored")["method"]
    assert list(methods.drop_duplicates()) == METHODS
    assert value(LOSS, "ensemble", "averaged") < max(losses)
    for name in METHODS:
        path = where(records, method=name, measure="path").set_index("t")
        correct = path[path["metric"] == ACCURACY]["value"]
        nats = path[path["metric"] == LOSS]["value"]
        assert len(correct) == len(nats) == 21
        # Aligned or not, a path starts at a model that does what A does, and ends at B.
        assert correct[0] == pytest.approx(a, abs=0.6)
        assert correct[1] == pytest.approx(b, abs=0.6)
        assert correct[0.5] == pytest.approx(value(ACCURACY, name, "averaged"), abs=0.6)
        assert nats[0] == pytest.approx(losses[0], abs=0.01)
        assert nats[1] == pytest.approx(losses[1], abs=0.01)
        assert nats[0.5] == pytest.approx(value(LOSS, name, "averaged"), abs=0.01)
        assert 0 <= value(LOSS, name, BARRIERS[LOSS]) <= max(nats)


def test_second_run_gives_the_same_results(finished: Path, capsys: pytest.CaptureFixture[str]):
    first = settings(finished)
    files = ("results.csv", "results.md", "one_shot.png")
    before = [(finished / name).read_bytes() for name in files]
    assert cli.main(["one_shot", "--epochs", "2", "--out", str(finished)]) == 0
    second = settings(finished)
    for content in (first, second):
        content.pop("timings_in_seconds")
    assert second == first
    assert [(finished / name).read_bytes() for name in files] == before
    table = capsys.readouterr().out
    for label in ["model A", "model B", "ensemble", *METHODS]:
        assert table.count(f"| {label}") == 2  # in accuracies, and in losses


def test_runs_have_folders_of_their_own():
    study = OneShot(seeds=(4, 5), bias=True, width=0.5)
    assert study.folder == Path("runs/one_shot-digits-mlpnet-bias-x0.5-4-5")
    assert study.title == "mlpnet-bias-x0.5 on digits, seeds 4, 5"
    assert dataclasses.replace(study, out=Path("x")).folder == Path("x")
    named = dataclasses.replace(study, weights=(Path("here/a.npz"), Path("there/b.npz")))
    assert named.folder == Path("runs/one_shot-digits-mlpnet-bias-x0.5-a-b")
    assert named.title == "mlpnet-bias-x0.5 on digits, a, b"


def test_epochs_replace_those_of_the_recipe():
    study = OneShot(epochs=3, dtype="bfloat16")
    recipe = RECIPES["digits", "mlpnet"]["short"]
    assert study.train_config == dataclasses.replace(recipe, epochs=3, dtype="bfloat16")
    assert OneShot().train_config == recipe


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vgg11"], "no recipe for vgg11 on digits"),
        (["--recipe", "other"], r"no recipe 'other' for mlpnet on digits; choose one of \['"),
        (["--norm"], "mlpnet has no batch norm"),
        (["--model", "vit", "--norm"], "vit has no batch norm"),
        (["--width", "0"], "leaves no units"),
        (["--test-images", "0"], "--test-images is 0"),
        (["--methods"], "--methods has no value"),
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
    part = Run(OneShot(train_images=100, test_images=50)).dataset
    whole = Run(OneShot()).dataset
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


# --- tables and plots


def test_table_is_aligned():
    table = report.markdown_table(("", "accuracy"), [("a model", "9.50"), ("b", "97.25")])
    assert table.splitlines() == [
        "|         | accuracy |",
        "| ------- | -------: |",
        "| a model |     9.50 |",
        "| b       |    97.25 |",
    ]


def test_records_become_a_table_in_their_order():
    rows = [("z", "second", 1.0), ("z", "first", 2.0), ("a", "second", 3.0), ("a", "second", 4.0)]
    records = pd.DataFrame(rows, columns=["method", "measure", "value"])
    cells = report.pivot(records, "method", "measure", report.mean_and_deviation)
    assert report.table(cells, "accuracy").splitlines() == [
        "| accuracy |      second | first |",
        "| -------- | ----------: | ----: |",
        "| z        |        1.00 |  2.00 |",
        "| a        | 3.50 ± 0.71 |       |",
    ]
    some = report.column(where(records, method="a"), "method", report.extent)
    every = report.column(records, ["method"], report.mean(digits=1))
    assert report.table({"mean": every, "extent": some}, "accuracy").splitlines()[2:] == [
        "| z        |  1.5 |              |",
        "| a        |  3.5 | 3.00 to 4.00 |",
    ]


def panel(curves: dict[str, list[float]], **options) -> plots.Panel:
    """A panel of curves over the positions 0.1 and 1; several values of a curve's in one place."""
    rows = []
    for name, values in curves.items():
        for index, value in enumerate(values):
            rows.append((name, (0.1, 1)[index % 2], value))
    records = pd.DataFrame(rows, columns=["name", "x", "value"])
    return plots.Panel("", records, "x", "name", "", **options)


def test_plot_refuses_what_cannot_be_told_apart(tmp_path: Path):
    curves = {str(index): [0.0, 1.0] for index in range(9)}
    with pytest.raises(ValueError, match="9 curves"):
        plots.plot_lines(tmp_path / "paths.png", "", [panel(curves)])


def test_a_panel_of_other_curves_has_a_legend_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    panels = [
        panel({"a": [1, 2], "b": [2, 1]}, log=True),
        panel({"b": [0, 1, 1, 1]}, spread=True),
        panel({"c": [0, 1]}),
    ]
    plots.plot_lines(tmp_path / "panels.png", "", panels)
    first, second, third = drawn[0].axes
    assert [axes.get_legend() is None for axes in (first, second, third)] == [False, True, False]
    drawn[0].draw_without_rendering()
    for axes in (first, third):  # beside the curves: a place among them would have to be searched
        assert axes.get_legend().get_window_extent().y1 < axes.bbox.y0
    assert (first.get_xscale(), second.get_xscale()) == ("log", "linear")
    assert first.lines[1].get_color() == second.lines[0].get_color() != third.lines[0].get_color()
    # Of several values in one place, the mean is shown with their deviation.
    np.testing.assert_array_equal(second.lines[0].get_ydata(), [0.5, 1])
    (bar, none) = (np.ptp(line[:, 1]) for line in second.collections[0].get_segments())
    assert bar == pytest.approx(2 * 0.5**0.5, abs=1e-3)
    assert none == 0
