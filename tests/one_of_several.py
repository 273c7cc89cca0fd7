"""What each of several processes runs for `test_processes`: aligns, fuses, saves and restores."""

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import otfusion_jax as otf

METHOD = otf.CoordinateDescent(starts=("identity",))
SHAPES = {"first": (4, 8), "second": (8, 12), "third": (12, 4)}


def mlp(params: dict[str, Any], x: Any) -> Any:
    hidden = jnp.tanh(x @ params["first"])
    return jnp.tanh(hidden @ params["second"]) @ params["third"]


def model(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed).normal
    return {name: np.float32(draw(size=shape)) for name, shape in SHAPES.items()}


def symmetry() -> otf.Symmetry:
    return otf.trace_symmetry(mlp, model(0), np.ones((1, 4), np.float32))


def spread(params: dict[str, Any], mesh: jax.sharding.Mesh, spec: P) -> dict[str, jax.Array]:
    """Puts a model on all processes: each makes the part that it has."""
    arrays = {}
    for name, value in params.items():
        sharding = NamedSharding(mesh, spec)
        arrays[name] = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
    return arrays


def restored(folder: Path, fused: dict[str, jax.Array], mesh: jax.sharding.Mesh) -> Any:
    """Saves a model with Orbax, and restores it to another mesh."""
    import orbax.checkpoint as orbax

    def elsewhere(x: jax.Array) -> jax.ShapeDtypeStruct:
        spread_otherwise = NamedSharding(mesh, P("rows", "columns"))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread_otherwise)

    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "fused", fused)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "fused", jax.tree.map(elsewhere, fused))


def same(found: Any, expected: Any, check: Callable[..., None] = np.testing.assert_allclose):
    for name, value in process_allgather(found, tiled=True).items():
        check(value, process_allgather(expected[name], tiled=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("port", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--killed", type=int, default=-1, help="who is killed after aligning")
    options = parser.parse_args()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{options.port}",
        options.count,
        options.rank,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=20,
    )
    types = (AxisType.Auto,)
    mesh = jax.make_mesh((options.count,), ("fsdp",), axis_types=types)
    a, b = (spread(model(seed), mesh, P("fsdp")) for seed in (0, 1))
    found = otf.align(symmetry(), a, b, method=METHOD)
    if options.rank == options.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    fused = otf.fuse(symmetry(), [a, b], method=METHOD)
    for name, value in fused.items():
        assert value.sharding == a[name].sharding
    results = {"plans": jax.tree.map(np.asarray, found.plans)}
    results["fused"] = process_allgather(fused, tiled=True)
    other = jax.make_mesh((options.count // 2, 2), ("rows", "columns"), axis_types=types * 2)
    again = restored(options.folder, fused, other)
    assert again["first"].sharding.mesh == other
    same(again, fused, np.testing.assert_array_equal)
    if options.rank == 0:
        np.save(options.folder / "results.npy", np.array(results, object), allow_pickle=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
