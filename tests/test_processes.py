"""Checks models that are spread over several processes, which gloo connects on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import one_of_several
import pytest

import otfusion_jax as otf

# What they have to find out that one of them is gone: heartbeats are 10 seconds at most apart.
SECONDS = 60


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def started(count: int, folder: Path, *more: str) -> list[subprocess.Popen]:
    port = free_port()
    # One device in each of them, whatever this process has.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "8"}
    processes = []
    for rank in range(count):
        command = [sys.executable, one_of_several.__file__, str(rank), str(count), str(port)]
        process = subprocess.Popen(
            [*command, str(folder), *more],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    return processes


def finished(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Waits for processes, and leaves none behind."""
    ends = []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=2 * SECONDS)
            ends.append((process.returncode, errors))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ends


def results(folder: Path) -> dict[str, Any]:
    return np.load(folder / "results.npy", allow_pickle=True).item()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What one process finds."""
    symmetry = one_of_several.symmetry()
    a, b = one_of_several.model(0), one_of_several.model(1)
    method = one_of_several.METHOD
    plans = otf.align(symmetry, a, b, method=method).plans
    return {"plans": plans, "fused": otf.fuse(symmetry, [a, b], method=method)}


def require_expected(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, plan in expected["plans"].items():
        np.testing.assert_array_equal(found["plans"][name], plan)
    for name, value in expected["fused"].items():
        np.testing.assert_allclose(found["fused"][name], value, atol=1e-6)


def test_four_processes_align_fuse_save_and_restore_as_one_does(tmp_path, expected):
    for code, errors in finished(started(4, tmp_path)):
        assert code == 0, errors
    require_expected(results(tmp_path), expected)


def test_when_one_is_killed_the_other_fails_soon_and_a_second_run_is_as_if_nothing_was(
    tmp_path, expected
):
    processes = started(2, tmp_path, "--killed", "1")
    processes[1].wait(2 * SECONDS)
    start = time.monotonic()
    (code, errors), (killed, _) = finished(processes)
    assert time.monotonic() - start < SECONDS
    assert killed < 0 < abs(code)
    # Whichever notices first: the collective whose other end is closed, or the heartbeat.
    said = errors.lower()
    assert "gloo" in said or "heartbeat" in said, errors
    assert not (tmp_path / "results.npy").exists()
    for code, errors in finished(started(2, tmp_path)):
        assert code == 0, errors
    require_expected(results(tmp_path), expected)
