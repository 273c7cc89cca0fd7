"""Two checkpoints that are larger than the memory they are aligned and fused in.

    python -m benchmarks.larger_than_memory

Makes a network with the parts of Llama in bfloat16, moves its units by a random element of its
symmetry, aligns and fuses the two leaf by leaf in a process that is killed half-way and started
again, and compares what was found with what was planted. Memory is what the kernel says of that
process, looked at from here. `--depth` and `--width` set the size.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import otfusion_jax as otf
from benchmarks.networks import llama
from otfusion_jax.files.safetensors_format import SafetensorsLayout

GB = 1e9


def traced(options: argparse.Namespace) -> tuple[otf.Symmetry, dict[str, tuple[int, ...]]]:
    """Traces the network, of which no array is made."""
    sizes = options.depth, options.width, options.heads, options.hidden, options.vocabulary
    fn, shapes, tokens = llama(*sizes)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    symmetry = otf.trace_symmetry(fn, params, jax.ShapeDtypeStruct(tokens, jnp.int32))
    return symmetry, shapes


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws one parameter, the same each time it is asked for."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(shape, np.float32) / np.sqrt(shape[0])
    return values.astype(jnp.bfloat16)


def make(options: argparse.Namespace, folder: Path) -> dict[str, np.ndarray]:
    """Writes the two checkpoints, one leaf in memory at a time; returns what was planted."""
    symmetry, shapes = traced(options)
    arrays = {}
    for name, shape in shapes.items():
        read = functools.partial(drawn, name, shape)
        arrays[name] = otf.LazyArray(shape, np.dtype(jnp.bfloat16), read)
    SafetensorsLayout(None).write(arrays, folder / "source.safetensors")
    source = otf.read_checkpoint(folder / "source.safetensors", lazily=True)
    planted = symmetry.random(jax.random.key(0))
    moved = otf.transport(symmetry, planted, dict(source.arrays))
    otf.write_like(source, moved, folder / "target.safetensors")
    return {name: np.asarray(plan) for name, plan in planted.items()}


def work(options: argparse.Namespace, folder: Path) -> None:
    """Aligns and fuses, which is all that the measured process does."""
    symmetry, _ = traced(options)
    source, target = (
        otf.read_checkpoint(folder / f"{name}.safetensors", lazily=True)
        for name in ("source", "target")
    )
    models = [dict(source.arrays), dict(target.arrays)]
    start = time.perf_counter()
    method = otf.ForwardPass(progress=folder / "plans")
    alignment = otf.align(symmetry, *models, method=method)
    aligned = time.perf_counter()
    moved = otf.transport(symmetry, alignment, models[0])
    otf.write_like(target, otf.average([moved, models[1]]), folder / "fused.safetensors")
    np.savez(folder / "found.npz", **cast(Any, alignment.plans))
    written = time.perf_counter()
    print(f"{aligned - start:.1f} {written - aligned:.1f} {float(alignment.objective):.3g}")


def peak_bytes(process: subprocess.Popen) -> int:
    """Reads the largest resident memory of a process so far; 0 once it has ended."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def run(command: list[str], folder: Path, kill_at: int | None) -> tuple[int, float, str]:
    """Runs the work, and kills it once there are so many plans.

    Returns:
        The peak of its resident memory in bytes, its seconds, and what it has printed.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, peak_bytes(process))
        found = len(list((folder / "plans").glob("tree-*.npz")))
        if kill_at is not None and found >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    said = process.communicate()[0]
    expected = 0 if kill_at is None else -signal.SIGKILL
    if process.returncode != expected:
        raise RuntimeError(f"the work ended with {process.returncode}, expected {expected}")
    return peak, time.perf_counter() - start, said


def require_recovered(planted: dict[str, np.ndarray], folder: Path) -> None:
    """Compares what was found with what was planted, and what was fused with the target."""
    with np.load(folder / "found.npz") as found:
        wrong = [name for name, plan in planted.items() if not np.array_equal(found[name], plan)]
    fused = otf.read_checkpoint(folder / "fused.safetensors", lazily=True).arrays
    target = otf.read_checkpoint(folder / "target.safetensors", lazily=True).arrays
    for name, array in target.items():
        # The moved source is the target, and so is the average of the two.
        if not np.array_equal(np.asarray(fused[name]), np.asarray(array)):
            wrong.append(name)
    if wrong:
        raise RuntimeError(f"not recovered: {wrong}")


def main() -> None:
    """Makes, kills, resumes, compares, and prints a row of a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes: dict[str, Any] = {"depth": 24, "width": 1280, "heads": 20, "hidden": 3456}
    for name, default in (sizes | {"vocabulary": 16_000}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="where there is room for three checkpoints")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        planted = make(options, folder)
        made = time.perf_counter() - start
        size = (folder / "source.safetensors").stat().st_size
        command = [sys.executable, "-m", "benchmarks.larger_than_memory", "--work"]
        command += ["--folder", str(folder)]
        for flag in (*sizes, "vocabulary"):
            command += [f"--{flag}", str(getattr(options, flag))]
        trees = options.depth * 2 + 1
        killed, before, _ = run(command, folder, trees // 2)
        resumed, after, said = run(command, folder, None)
        require_recovered(planted, folder)
    align, write, objective = said.split()
    print(
        "| checkpoints (GB) | made in (s) | until killed (s) | resumed: all (s) | align (s) | "
        "fuse and write (s) | distance | peak GB: killed | resumed |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        f"| 2 x {size / GB:.2f} | {made:.0f} | {before:.0f} | {after:.0f} | {align} | {write} | "
        f"{objective} | {killed / GB:.2f} | {resumed / GB:.2f} |\n\n"
        f"{len(planted)} groups, all as planted."
    )


if __name__ == "__main__":
    main()
