"""Checks the pictures of docs/symmetries.md."""

from pathlib import Path

import pytest

from experiments import symmetries


def test_a_picture_says_how_units_move_and_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(symmetries, "_NETWORKS", {"mlpnet": (28, 28, 1)})
    picture, llama = symmetries.draw_all(tmp_path)
    drawn = picture.read_bytes()
    assert picture.name == "symmetry-mlpnet.svg"
    for units in (400, 200, 100):
        assert f"({units}, permuted, scaled)".encode() in drawn
    assert b"(64, rotated)" in llama.read_bytes()
    symmetries.draw_all(tmp_path)
    assert picture.read_bytes() == drawn
