"""Checks arrays on meshes: of this process, and of one that has eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import otfusion_jax as otf


def test_arrays_on_an_explicit_mesh_are_aligned_fused_and_averaged():
    mesh = jax.make_mesh((1,), ("data",))
    draw = np.random.default_rng(0).normal

    def put(*shape):
        value = jnp.asarray(draw(size=shape), jnp.float32)
        return jax.device_put(value, jax.NamedSharding(mesh, jax.P()))

    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    a, b = ({"w": put(6, 8), "v": put(8, 3)} for _ in range(2))
    x = put(4, 6)
    plain_a, plain_b, plain_x = jax.tree.map(np.asarray, (a, b, x))
    symmetry = otf.trace_symmetry(fn, plain_a, plain_x)
    expected = otf.fuse(symmetry, [plain_a, plain_b])
    with jax.set_mesh(mesh):
        assert otf.trace_symmetry(fn, a, x) == symmetry
        assert otf.check_symmetry(symmetry, fn, a, x) < 1e-5
        found = otf.align(symmetry, a, b)
        moved = otf.transport(symmetry, found, a)
        averaged = otf.average([moved, b])
        fused = otf.fuse(symmetry, [a, b])
        mean = otf.barycenter(symmetry, [a, b])
    for got in (averaged, fused):
        jax.tree.map(lambda y, z: np.testing.assert_allclose(y, z, atol=1e-6), got, expected)
    assert mean.converged
    assert moved["w"].sharding.is_equivalent_to(a["w"].sharding, 2)


def test_what_is_said_of_eight_devices_holds():
    # How many devices a CPU has is settled when JAX is first used. XLA's pool has to have a thread
    # for each of them and for what runs beside, or collectives wait for ever on a small machine.
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "NPROC": "32",
    }
    program = Path(__file__).with_name("on_eight_devices.py")
    # As a worker of this run: it shares what has been compiled, and starts no workers itself.
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(program)]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=program.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
