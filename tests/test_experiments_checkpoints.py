"""Checks that damaged checkpoints are found, and that a kill leaves nothing that harms."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PyTree

from experiments import checkpoints
from experiments.checkpoints import Checkpoints


def state(number: int) -> PyTree:
    """What is saved under a number; random bytes keep the files from being compressed away."""
    rng = np.random.default_rng(number)
    values = rng.standard_normal((50, 40)).astype(np.float32)
    return {"values": jnp.asarray(values), "count": (jnp.asarray(number, jnp.int32),)}


def assert_newest(folder: Path, number: int):
    found, restored = Checkpoints(folder).newest(state(0))
    assert found == number
    jax.tree.map(np.testing.assert_array_equal, restored, state(number))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1 to 3, of which the first is deleted."""
    folder = tmp_path_factory.mktemp("pristine")
    saved = Checkpoints(folder)
    for number in (1, 2, 3):
        saved.save(number, state(number))
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "copy")


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def truncate(file: Path):
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path):
    """Flips up to 64 bytes in the middle."""
    content = bytearray(file.read_bytes())
    start = max(0, len(content) // 2 - 32)
    content[start : start + 64] = bytes(byte ^ 0xFF for byte in content[start : start + 64])
    file.write_bytes(content)


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, flip, Path.unlink)


def test_the_newest_two_are_kept(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    assert_newest(folder, 3)


def test_without_any_training_begins_with_what_it_is_given(tmp_path: Path):
    assert_newest(tmp_path / "none", 0)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_found_and_named(
    pristine: Path, tmp_path: Path, damage: Callable[[Path], None]
):
    names = [path.relative_to(pristine / "3") for path in files_of(pristine / "3")]
    assert len(names) > 5
    for index, name in enumerate(names):
        folder = shutil.copytree(pristine, tmp_path / str(index))
        damage(folder / "3" / name)
        named = f"checkpoint {re.escape(str(folder / '3'))} is damaged: it.*{re.escape(name.name)}"
        with pytest.warns(UserWarning, match=named):
            assert_newest(folder, 2)


def test_if_all_are_damaged_training_begins_anew(folder: Path):
    for number in ("2", "3"):
        truncate(max(files_of(folder / number), key=lambda path: path.stat().st_size))
    with (
        pytest.warns(UserWarning, match=f"{folder / '3'} is damaged"),
        pytest.warns(UserWarning, match=f"{folder / '2'} is damaged"),
    ):
        assert_newest(folder, 0)


def test_a_manifest_of_something_else_is_damage(folder: Path):
    (folder / "3" / "manifest.json").write_text("[]")
    with pytest.warns(UserWarning, match=r"its manifest\.json can't be read"):
        assert_newest(folder, 2)


def test_an_empty_folder_is_no_checkpoint(folder: Path):
    (folder / "4").mkdir()
    with pytest.warns(UserWarning, match=r"it has no manifest\.json"):
        assert_newest(folder, 3)


def test_a_damaged_checkpoint_is_replaced_and_deletes_none_that_is_whole(folder: Path):
    (folder / "5").mkdir()
    saved = Checkpoints(folder)
    saved.save(4, state(4))
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4", "5"]
    saved.save(5, state(5))
    assert sorted(path.name for path in folder.iterdir()) == ["4", "5"]
    assert_newest(folder, 5)


def test_a_kill_in_the_middle_of_saving_leaves_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_):
        raise KeyboardInterrupt

    # The arrays are there, but no digests; then the digests too, but not yet under its own name.
    for name, owner in (("_digest", checkpoints), ("rename", Path)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KeyboardInterrupt):
                Checkpoints(folder).save(4, state(4))
        assert (folder / "unfinished").exists()
        assert_newest(folder, 3)
    Checkpoints(folder).save(4, state(4))
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]
    assert_newest(folder, 4)
