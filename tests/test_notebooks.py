"""Runs the notebooks in kernels of their own, as a reader does, in small settings."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


@pytest.fixture
def small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notebook's kernel inherits: few steps, the checkout, a quick compiler."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OTFUSION_QUICK", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


@pytest.mark.usefixtures("small_settings")
@pytest.mark.filterwarnings("default:::(zmq|jupyter_client|nbclient)")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_the_first_cell_to_the_last(path: Path, tmp_path: Path):
    notebook = read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    ).execute()
    pictures = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text
            pictures += "image/png" in output.get("data", {})
    assert pictures >= 1
    # An installation beside the one that is there would leave this file.
    assert not (tmp_path / "installed.txt").exists()


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_installs_without_touching_what_is_there(path: Path):
    first = next(cell for cell in read(path).cells if cell.cell_type == "code")
    assert "!pip list --format=freeze > installed.txt" in first.source
    assert "!pip install --quiet --constraint installed.txt {source}" in first.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path: Path):
    """Those of one machine and one version grow old, and pictures would fill the history."""
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
