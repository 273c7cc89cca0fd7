"""Two checkpoints that are larger than the memory they are aligned and fused in.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.larger_than_memory

Makes a network with the parts of Llama in bfloat16, 3 GB of it, and a second one of the same
function: in canonical form it is the first, moved by a random element of its symmetry
(permutations, heads, rotations of the residual stream and inside of heads), and its norms have
other gains. Both are brought into canonical form, aligned and fused leaf by leaf in a process that
is killed half-way and started again, and what was found is compared with what was planted. Memory
is what the kernel says of that process, looked at from here. Sizes are flags, and
`--no-rotations` leaves it at permutations, which move bfloat16 without rounding. Where cores are
shared, threads of OpenBLAS wait for each other: singular values of a head took a hundred times as
long with two of them.
"""

import argparse
import functools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

import otfusion_jax as otf
from benchmarks.networks import llama
from otfusion_jax.files.checkpoint import Checkpoint
from otfusion_jax.files.safetensors_format import SafetensorsLayout

GB = 1e9
BFLOAT16 = np.dtype(jnp.bfloat16)
ROUNDING = 2.0**-8
"""By how much bfloat16 rounds a number at most, relative to it."""


def traced(options: argparse.Namespace) -> tuple[otf.Symmetry, dict[str, tuple[int, ...]]]:
    """Traces the network, of which no array is made."""
    sizes = options.depth, options.width, options.heads, options.hidden, options.vocabulary
    fn, shapes, tokens = llama(*sizes)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    symmetry = otf.trace_symmetry(fn, params, jax.ShapeDtypeStruct(tokens, jnp.int32))
    return symmetry.with_rotations() if options.rotations else symmetry, shapes


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws one parameter, the same each time it is asked for."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(shape, np.float32)
    if len(shape) == 1:
        # The gain of a norm.
        values = 1 + values / 10
    else:
        values /= np.sqrt(shape[0])
    return values.astype(BFLOAT16)


def divided(array: Any, gains: np.ndarray) -> np.ndarray:
    """Divides what reads the residual stream, along its first axis, by the gains of a norm."""
    values = np.asarray(array)
    beside = (1,) * (values.ndim - 1)
    return values / gains.reshape((-1, *beside))


def with_gains(symmetry: otf.Symmetry, params: dict[str, Any]) -> dict[str, Any]:
    """Gives norms whose gains are 1 other gains, and keeps the function; all of it lazily."""
    changed = dict(params)
    for freedom in symmetry.freedoms:
        for fold in freedom.folds:
            shape = params[fold.path].shape
            draw = functools.partial(drawn, f"target {fold.path}", shape)
            changed[fold.path] = otf.LazyArray(shape, BFLOAT16, draw)
            for number, *_ in fold.others:
                name = symmetry.parts[number].path
                reader = changed[name]
                divide = functools.partial(divided, reader, draw())
                changed[name] = otf.LazyArray(reader.shape, BFLOAT16, divide)
    return changed


def in_form(symmetry: otf.Symmetry, checkpoint: Checkpoint) -> dict[str, Any]:
    """Brings a checkpoint into the form in which its units may move, leaf by leaf."""
    params = dict(checkpoint.arrays)
    return otf.canonicalize(symmetry, params) if symmetry.rotates else params


def make(options: argparse.Namespace, folder: Path) -> dict[str, np.ndarray]:
    """Writes the two checkpoints, one leaf in memory at a time; returns what was planted."""
    symmetry, shapes = traced(options)
    arrays = {}
    for name, shape in shapes.items():
        read = functools.partial(drawn, name, shape)
        arrays[name] = otf.LazyArray(shape, BFLOAT16, read)
    SafetensorsLayout(None).write(arrays, folder / "source.safetensors")
    source = otf.read_checkpoint(folder / "source.safetensors", lazily=True)
    planted = symmetry.random(jax.random.key(0))
    moved = otf.transport(symmetry, planted, in_form(symmetry, source))
    if symmetry.rotates:
        moved = with_gains(symmetry, moved)
    otf.write_like(source, moved, folder / "target.safetensors")
    return {name: np.asarray(plan) for name, plan in planted.items()}


def work(options: argparse.Namespace, folder: Path) -> None:
    """Aligns and fuses, which is all that the measured process does."""
    symmetry, _ = traced(options)
    source, target = (
        otf.read_checkpoint(folder / f"{name}.safetensors", lazily=True)
        for name in ("source", "target")
    )
    start = time.perf_counter()
    models = [in_form(symmetry, checkpoint) for checkpoint in (source, target)]
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


class Run(NamedTuple):
    """What was seen of a process: its peak of resident memory, its times, and what it has said."""

    peak_bytes: int
    seconds: float
    cpu_seconds: float
    said: str


def cpu_seconds_of_children() -> float:
    """Returns what all processes that were started from here, and have ended, took of the CPUs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(command: list[str], folder: Path, kill_at: int | None) -> Run:
    """Runs the work, and kills it once there are so many plans."""
    start, cpu_start, peak = time.perf_counter(), cpu_seconds_of_children(), 0
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
    cpu_seconds = cpu_seconds_of_children() - cpu_start
    return Run(peak, time.perf_counter() - start, cpu_seconds, said)


def relative_error(found: Any, expected: Any) -> float:
    """Returns the norm of what two arrays differ by, relative to that of the second."""
    found, expected = (np.asarray(array).astype(np.float32) for array in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def errors(
    symmetry: otf.Symmetry, planted: dict[str, np.ndarray], folder: Path
) -> tuple[float, float]:
    """Compares what was found with what was planted, and what was fused with the target.

    Returns:
        The largest relative error of a rotation, and of a fused parameter to the target's in
        canonical form. Permutations alone have neither.

    Raises:
        RuntimeError: If a permutation is another one, or an error above the rounding of bfloat16.
    """
    wrong, of_rotations, of_leaves = [], [0.0], [0.0]
    with np.load(folder / "found.npz") as found:
        for name, plan in planted.items():
            if symmetry[name].rotates:
                of_rotations.append(relative_error(found[name], plan))
            elif not np.array_equal(found[name], plan):
                wrong.append(name)
    fused, target = (
        otf.read_checkpoint(folder / f"{name}.safetensors", lazily=True)
        for name in ("fused", "target")
    )
    for name, array in in_form(symmetry, target).items():
        # The moved source is the target, and so is the average of the two.
        of_leaves.append(relative_error(fused.arrays[name], array))
    worst = max(of_rotations), max(of_leaves)
    if wrong or max(worst) > (ROUNDING if symmetry.rotates else 0):
        raise RuntimeError(f"not recovered: {wrong}, relative errors {worst}")
    return worst


SIZES = {"depth": 28, "width": 2048, "heads": 32, "hidden": 5632, "vocabulary": 16_000}


def recovered(options: argparse.Namespace, folder: Path, planted: dict[str, np.ndarray]) -> str:
    """Has two checkpoints aligned, kills that, resumes and compares; returns a row of a table."""
    command = [sys.executable, "-m", "benchmarks.larger_than_memory", "--work"]
    command += ["--folder", str(folder), f"--{'' if options.rotations else 'no-'}rotations"]
    for flag in SIZES:
        command += [f"--{flag}", str(getattr(options, flag))]
    trees = options.depth * 2 + 1
    killed = run(command, folder, trees // 2)
    resumed = run(command, folder, None)
    of_rotations, of_leaves = errors(traced(options)[0], planted, folder)
    size = (folder / "source.safetensors").stat().st_size
    align, write, objective = resumed.said.split()
    return (
        "| checkpoints (GB) | until killed (s) | of the CPU | resumed: all (s) | of the CPU | "
        "align (s) | fuse and write (s) | distance | peak GB: killed | resumed |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
        f"| 2 x {size / GB:.2f} | {killed.seconds:.0f} | {killed.cpu_seconds:.0f} | "
        f"{resumed.seconds:.0f} | {resumed.cpu_seconds:.0f} | {align} | {write} | {objective} | "
        f"{killed.peak_bytes / GB:.2f} | {resumed.peak_bytes / GB:.2f} |\n\n"
        f"{len(planted)} groups, all as planted. Largest relative error of a rotation "
        f"{of_rotations:.1e}, of a fused parameter {of_leaves:.1e}; bfloat16 rounds by up "
        f"to {ROUNDING:.1e}."
    )


def main() -> None:
    """Makes, kills, resumes, compares, and prints a row of a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rotations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help="where there is room for three checkpoints")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        print(recovered(options, folder, make(options, folder)))


if __name__ == "__main__":
    main()
