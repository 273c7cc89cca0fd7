"""Checks what moves where a program writes a part of an axis, and knows which part it is."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from arrays import normals, uniform

import otfusion_jax as otf

pytestmark = pytest.mark.compatibility

THIRDS = {"w": (5, 12), "b": (12,), "first": (4, 3), "second": (4, 3), "third": (4, 3)}
WRITES = {
    "set to a number": lambda b: b.at[4:8].set(1.0),
    "set to zero": lambda b: b.at[4:8].set(0.0),
    "add": lambda b: b.at[4:8].add(1.0),
    "multiply": lambda b: b.at[-4:].multiply(3.0),
    "max": lambda b: b.at[4:8].max(0.3),
    "apply": lambda b: b.at[4:8].apply(jnp.sin),
    "update": lambda b: jax.lax.dynamic_update_slice(b, jnp.ones(4), (8,)),
}


def in_thirds(write: Callable) -> Callable:
    def fn(p, x):
        h = x @ p["w"] + write(p["b"])[None]
        first, second, third = jnp.split(h, 3, -1)
        return first @ p["first"] + second @ p["second"] + jnp.tanh(third) @ p["third"]

    return fn


@pytest.mark.parametrize("name", WRITES)
def test_segments_written_at_known_places_move_by_themselves(name: str):
    fn = in_thirds(WRITES[name])
    params, x = normals(THIRDS), uniform(6, 5)
    symmetry = otf.trace_symmetry(fn, params, x)
    assert [group.size for group in symmetry.groups] == [4, 4, 4]
    for group in symmetry.groups:
        assert {member.path for member in group.members} >= {"w", "b"}
    for allowed in (symmetry, symmetry.with_signs(), symmetry.with_scales()):
        assert otf.check_symmetry(allowed, fn, params, x) < 1e-5
    rotating = symmetry.with_rotations()
    canonical = otf.canonicalize(rotating, params)
    assert otf.check_symmetry(rotating, fn, canonical, x) < 1e-5


def test_a_segment_written_from_another_moves_with_it():
    fn = in_thirds(lambda b: b.at[4:8].set(b[:4]))
    params, x = normals(THIRDS), uniform(6, 5)
    symmetry = otf.trace_symmetry(fn, params, x)
    assert [group.size for group in symmetry.groups] == [4, 4]
    assert otf.check_symmetry(symmetry, fn, params, x) < 1e-5


@pytest.mark.parametrize(
    "write",
    [
        lambda b: b.at[4:8].set(jnp.arange(4.0)),
        lambda b: b.at[jnp.argmax(b) + jnp.arange(2)].set(0.0),
        lambda b: jax.lax.dynamic_update_slice(b, jnp.ones(4), (jnp.argmax(b) % 8,)),
        lambda b: b.at[2:6].set(b[5:9]),
    ],
)
def test_what_is_written_where_it_is_not_known_stays(write: Callable):
    fn = in_thirds(write)
    params, x = normals(THIRDS), uniform(6, 5)
    symmetry = otf.trace_symmetry(fn, params, x)
    assert len(symmetry.groups) < 3
    assert otf.check_symmetry(symmetry, fn, params, x) < 1e-5


def test_caches_stay_where_they_are_written():
    """Positions of an input, written in front of what is still empty."""

    def fn(p, x):
        cache = jax.lax.dynamic_update_slice(jnp.zeros((9, 8)), jnp.tanh(x @ p["in"]), (0, 0))
        return p["mix"] @ cache @ p["out"]

    params, x = normals({"in": (5, 8), "mix": (2, 9), "out": (8, 3)}), uniform(6, 5)
    symmetry = otf.trace_symmetry(fn, params, x)
    assert [group.size for group in symmetry.groups] == [8]
    assert ("mix", 1) in {(pin.path, pin.axis) for pin in symmetry.pinned}
