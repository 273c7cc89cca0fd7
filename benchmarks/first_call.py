"""Seconds of a first call and of later ones, each case in a process of its own, beside peers.

    python -m benchmarks.first_call
    python -m benchmarks.first_call --weights A.safetensors B.safetensors \
        --otfusion CHECKOUT --git-re-basin CHECKOUT

A first call traces, compiles and runs, without a compilation cache; imports are a column of their
own. "From the cache" is the first call of a second process that shares JAX's persistent compilation
cache with a first. Without `--weights` (two VGG11 in PyTorch's names) VGG11 is drawn at random.
Peers run on the same arrays, see `benchmarks.peers`; `--torch-python` names the interpreter that
has PyTorch. Nothing else should run beside this.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks import Network, mlp, resnet18, vgg11, vgg16, vit
from benchmarks.timing import later_seconds

IDENTITY = "identity"

_BATCH = 64
"""How many samples a repair looks at."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        title: What the table calls it.
        network: Makes the network.
        call: `"forward"` and `"identity"` (`align` by Algorithm 1, and by descent from the
            identity), `"align"` and `"fuse"` with their defaults, `"rotate"` (`fuse` with
            rotations), `"check"`, `"repair"` (by least squares) or `"restore"` (of statistics),
            both of the plain average, on one batch.
        planted: Whether the second network is the first, permuted.
        peer: Whose code is timed on the same arrays.
        once: Whether the second call is left out.
    """

    title: str
    network: Callable[[], Network]
    call: str
    planted: bool = False
    peer: str | None = None
    once: bool = False


CASES = {
    "vgg11-forward": Case("VGG11, Algorithm 1", vgg11, "forward", peer="otfusion"),
    "vgg11-identity": Case("VGG11, descent from the identity", vgg11, IDENTITY),
    "vgg11-align": Case("VGG11, `align`", vgg11, "align"),
    "vgg11-fuse": Case("VGG11, `fuse`", vgg11, "fuse"),
    "vgg16-identity": Case(
        "VGG16 with LayerNorm, descent from the identity", vgg16, IDENTITY, peer="git-re-basin"
    ),
    "vit-align": Case("ViT, 12 blocks of 32, `align`", vit, "align"),
    "vit-fuse": Case("ViT, `fuse`", vit, "fuse"),
    "vit-rotate": Case("ViT, `fuse` with rotations", vit, "rotate"),
    "vit-wide-rotate": Case(
        "ViT, 12 blocks of 192, `fuse` with rotations", lambda: vit(head_units=48), "rotate"
    ),
    "vit-check": Case("ViT, `check_symmetry`", vit, "check"),
    "vit-repair": Case("ViT, `repair`", vit, "repair"),
    "vit-statistics": Case("ViT, `repair` of statistics", vit, "restore"),
    "resnet-small-align": Case("ResNet18 x 1/8, `align`", lambda: resnet18(8), "align"),
    "resnet-small-fuse": Case("ResNet18 x 1/8, `fuse`", lambda: resnet18(8), "fuse"),
    "resnet-small-repair": Case("ResNet18 x 1/8, `repair`", lambda: resnet18(8), "repair"),
    "resnet-align": Case("ResNet18, `align`", resnet18, "align"),
    "resnet-fuse": Case("ResNet18, `fuse`", resnet18, "fuse"),
    "mlp-align": Case(
        "MLP of 8 layers of 4,096, planted, `align`",
        lambda: mlp((784, *[4096] * 7, 10)),
        "align",
        planted=True,
        once=True,
    ),
}


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Draws parameters as Flax does: variance 1 / fan-in, biases of 0, scales of 1."""
    generator = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            params[name] = np.full(shape, 1 if "scale" in name or "norm" in name else 0, np.float32)
        else:
            deviation = 1 / np.sqrt(np.prod(shape[:-1]))
            params[name] = (generator.normal(size=shape) * deviation).astype(np.float32)
    return params


def read_vgg11(path: str) -> dict[str, np.ndarray]:
    """Reads a VGG11 in PyTorch's names and layouts."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    layers = [name for name in arrays if name.startswith("features")]
    layers.sort(key=lambda name: int(name.split(".")[1]))
    params = {}
    for number, name in enumerate(layers):
        params[f"conv{number}"] = arrays[name].astype(np.float32).transpose(2, 3, 1, 0)
    params["dense"] = arrays["classifier.weight"].astype(np.float32).T
    return params


def arrays_of(case: Case, weights: list[str] | None) -> list[dict[str, np.ndarray]]:
    """The two networks of a case."""
    if case.network is vgg11 and weights:
        return [read_vgg11(path) for path in weights]
    _, shapes, _ = case.network()
    return [draw(shapes, seed) for seed in (0, 1)]


def time_case(case: Case, weights: list[str] | None) -> dict[str, Any]:
    """Times a case in this process."""
    start = time.perf_counter()
    import otfusion_jax as otf

    result: dict[str, Any] = {"import": time.perf_counter() - start}
    apply, _, size = case.network()
    a, b = ({k: jnp.asarray(v) for k, v in x.items()} for x in arrays_of(case, weights))
    x = jnp.zeros(size)
    symmetry = otf.trace_symmetry(apply, a, x)
    if case.planted:
        b = otf.transport(symmetry, symmetry.random(jax.random.key(0)), a)
    drawn = np.random.default_rng(0).normal(size=(_BATCH, *size[1:]))
    seen = jnp.asarray(drawn, jnp.float32)
    jax.block_until_ready((a, b, seen))
    identity = otf.CoordinateDescent(starts=(IDENTITY,))
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: otf.align(symmetry, a, b, method=otf.ForwardPass()),
        IDENTITY: lambda: otf.align(symmetry, a, b, method=identity),
        "align": lambda: otf.align(symmetry, a, b),
        "fuse": lambda: otf.fuse(symmetry, [a, b]),
        "rotate": lambda: otf.fuse(symmetry.with_rotations(), [a, b]),
        "check": lambda: otf.check_symmetry(symmetry, apply, a, x),
        "repair": lambda: otf.repair(symmetry, apply, [a, b], seen, method=otf.LeastSquares()),
        "restore": lambda: otf.repair(symmetry, apply, [a, b], seen),
    }

    def call() -> Any:
        return jax.block_until_ready(calls[case.call]())

    start = time.perf_counter()
    found = call()
    result["cold"] = time.perf_counter() - start
    if not case.once:
        result["warm"] = later_seconds(call)
    if isinstance(found, otf.Alignment):
        result["objective"] = float(found.objective)
    result["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    result["models"] = sum(v.nbytes for v in a.values()) / 1e9
    return result


def run(command: list[str], cache: str | None = None) -> dict[str, Any]:
    """Runs a process, with a folder as its compilation cache, and reads the last line it prints."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    if cache is not None:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "1"
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def time_peer(case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """Times the peer of a case on the same arrays, if its checkout is given."""
    checkout = {"otfusion": options.otfusion, "git-re-basin": options.git_re_basin}
    if case.peer is None or checkout[case.peer] is None:
        return None
    python = options.torch_python if case.peer == "otfusion" else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "pair.npz"))
        a, b = arrays_of(case, options.weights)
        arrays = {f"a:{k}": v for k, v in a.items()} | {f"b:{k}": v for k, v in b.items()}
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
        return run([python, "-m", "benchmarks.peers", case.peer, checkout[case.peer], path])


def cell(value: float | None, digits: int = 2) -> str:
    """A number of the table, nothing for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def main() -> None:
    """Times all cases, or the one of a child process, and prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--weights", nargs=2, metavar=("A", "B"))
    parser.add_argument("--otfusion", metavar="CHECKOUT")
    parser.add_argument("--git-re-basin", metavar="CHECKOUT")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(time_case(CASES[options.case], options.weights)))
        return
    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}\n\n"
        "| | import | first call | from the cache | later | objective | peak GB | a model | "
        "peer: first | later | objective | ratio: first | later |\n|" + "---|" * 13
    )
    for name in options.cases:
        case = CASES[name]
        command = [sys.executable, "-m", "benchmarks.first_call", "--case", name]
        if options.weights:
            command += ["--weights", *options.weights]
        ours = run(command)
        with tempfile.TemporaryDirectory() as cache:
            run(command, cache)
            cached = run(command, cache)
        peer = time_peer(case, options) or {}
        ratios = []
        for which in ("cold", "warm"):
            ratios.append(ours[which] / peer[which] if which in peer else None)
        cells = [
            case.title,
            cell(ours["import"]),
            cell(ours["cold"]),
            cell(cached["cold"]),
            cell(ours.get("warm"), 3),
            cell(ours.get("objective")),
            cell(ours["gigabytes"]),
            cell(ours["models"], 3),
            cell(peer.get("cold")),
            cell(peer.get("warm"), 3),
            cell(peer.get("objective")),
            *map(cell, ratios),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
