"""Checks that a symmetry in JSON is the symmetry, and that other texts are refused by name."""

import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import zoo_attention  # noqa: F401
import zoo_convolution  # noqa: F401
import zoo_recurrent  # noqa: F401
from zoo import CASES, Case

import otfusion_jax as otf

pytestmark = pytest.mark.compatibility

# Of heads in layers, flattened convolutions, fused projections, tied embeddings, stacked leaves.
STORED = [
    name
    for name in CASES
    if any(word in name for word in ("lenet", "llama", "mlp_linen", "resnet", "scan", "tied"))
]


def traced(case: Case) -> otf.Symmetry:
    return otf.trace_symmetry(case.fn, case.params, *case.inputs)


@functools.cache
def small() -> otf.Symmetry:
    """Two heads of three dimensions, with units that have signs, scales, folds and a key."""
    shapes = {"in": (4, 6), "scale": (6,), "heads": (6, 2, 3), "keys": (6, 2, 3), "out": (2, 3, 4)}
    params: dict[str, Any] = {name: jnp.ones(shape) for name, shape in shapes.items()}
    params |= {"more": [jnp.ones((2, 4, 4)), (jnp.ones(4),)], "key": jax.random.key(0)}
    params |= {"count": jnp.array(1, jnp.int32), "none": None}

    def fn(p, x):
        h = x @ p["in"]
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * p["scale"]
        queries = jnp.einsum("tc,chd->thd", h, p["heads"])
        keys = jnp.einsum("tc,chd->thd", h, p["keys"])
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", queries, keys))
        h = jnp.einsum("hts,shd,hdo->to", weights, queries, p["out"])
        stack, (bias,) = p["more"]
        return jnp.tanh(h @ stack[0] + bias) @ stack[1]

    with jax.numpy_rank_promotion("allow"):
        return otf.trace_symmetry(fn, params, jnp.ones((3, 4)))


def all_of(symmetry: otf.Symmetry) -> str:
    """Everything that a symmetry says: what `==` leaves out, reasons and source lines, as well."""
    return "\n".join(map(repr, (*symmetry.groups, *symmetry.pinned, *symmetry.freedoms)))


@pytest.mark.parametrize("name", STORED)
def test_what_is_read_is_what_was_written(name: str):
    symmetry = traced(CASES[name]())
    for written in (
        symmetry,
        symmetry.with_rotations(),
        symmetry.with_signs().with_scales(),
        symmetry.only(lambda group: group != next(iter(symmetry))),
    ):
        text = written.to_json()
        read = otf.Symmetry.from_json(text)
        assert read == written
        assert hash(read) == hash(written)
        assert all_of(read) == all_of(written)
        assert str(read) == str(written)
        assert read.to_json() == text


def test_keys_splits_and_empty_nodes_are_kept():
    symmetry = small()
    assert symmetry.leaf_splits
    assert any(freedom.folds for freedom in symmetry.freedoms)
    read = otf.Symmetry.from_json(symmetry.to_json())
    assert read == symmetry
    assert read.leaves == symmetry.leaves


def test_folds_of_a_scale_that_is_used_twice_are_kept():
    params = {"in": jnp.ones((4, 6)), "scale": jnp.ones(6), "out": jnp.ones((6, 3))}
    symmetry = otf.trace_symmetry(
        lambda p, x: x @ p["in"] * p["scale"][None] ** 2 @ p["out"], params, jnp.ones((2, 4))
    )
    (fold,) = symmetry.freedoms[0].folds
    assert [power for _, _, power in fold.others] == [-2]
    assert otf.Symmetry.from_json(symmetry.to_json()) == symmetry


def test_folds_of_an_earlier_version_are_read():
    symmetry = small()
    record = json.loads(symmetry.to_json())
    count = 0
    for freedom in record["freedoms"]:
        for fold in freedom["folds"]:
            fold["others"] = [[leaf, power] for leaf, _, power in fold["others"]]
            count += len(fold["others"])
    assert count
    read = otf.Symmetry.from_json(json.dumps(record | {"version": 3}))
    assert read == symmetry
    with pytest.raises(ValueError, match=r"folds\[0\]\.others\[0\] has 2 entries, expected 3"):
        otf.Symmetry.from_json(json.dumps(record))
    # What is damaged is named, in an earlier version too.
    for damaged in (3, [3], [[[], -1]], [["x"]], [[10**6, -1]]):
        freedom = next(freedom for freedom in record["freedoms"] if freedom["folds"])
        freedom["folds"][0]["others"] = damaged
        with pytest.raises(ValueError, match=r"freedoms\[\d\]\.folds\[0\]"):
            otf.Symmetry.from_json(json.dumps(record | {"version": 3}))


def test_another_process_reads_it():
    symmetry = small()
    script = (
        "import sys, otfusion_jax as otf\n"
        "sys.stdout.write(otf.Symmetry.from_json(sys.stdin.read()).to_json())\n"
    )
    text = symmetry.to_json()
    run = subprocess.run(
        [sys.executable, "-c", script], input=text, capture_output=True, text=True, check=True
    )
    assert run.stdout == text


def test_the_same_program_compiles_once_for_both():
    symmetry = small()
    read = otf.Symmetry.from_json(symmetry.to_json())
    traces = []

    def fn(symmetry, x):
        traces.append(len(symmetry))
        return x

    jitted = jax.jit(fn, static_argnums=0)
    jitted(symmetry, 1.0)
    jitted(read, 1.0)
    assert len(traces) == 1


class Pair(NamedTuple):
    a: Any
    b: Any


@pytest.mark.parametrize(
    ("params", "named"),
    [
        (Pair(jnp.ones(3), jnp.ones(3)), "the tree of parameters is a Pair"),
        ({"x": [Pair(jnp.ones(3), jnp.ones(3))]}, "x/0 is a Pair"),
        ({"x": {1: jnp.ones(3)}}, "x is a dict with the key 1"),
    ],
)
def test_what_has_no_place_in_json_is_named(params: Any, named: str):
    symmetry = otf.trace_symmetry(lambda p, x: x, params, jnp.ones(3))
    with pytest.raises(ValueError, match=named):
        symmetry.to_json()


def test_a_tree_too_deep_is_refused_on_both_sides():
    params: Any = jnp.ones(3)
    for _ in range(300):
        params = [params]
    symmetry = otf.trace_symmetry(lambda p, x: x, params, jnp.ones(3))
    with pytest.raises(ValueError, match="more than 200 levels"):
        symmetry.to_json()
    record = json.loads(small().to_json())
    for depth in (300, 100_000):
        text = json.dumps(record | {"tree": 7}).replace('"tree": 7', '"tree": ' + nested(depth))
        with pytest.raises(ValueError, match="more than 200 levels|nested too deeply"):
            otf.Symmetry.from_json(text)


def nested(depth: int) -> str:
    return '{"list": [' * depth + "0" + "]}" * depth


def edit(*path: Any, value: Any) -> Callable[[Any], None]:
    def apply(record: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return apply


MEMBER = ("groups", 0, "members", 0)
LOCATION = (*MEMBER, "location")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("format", value="x"), "no saved symmetry"),
        (edit("version", value=5), "version 5 .* reads versions 1 to 4"),
        (edit("version", value="2"), "version '2' .* reads versions 1 to 4"),
        (edit("freedoms", 0, "stretch", "produced", value=1), "produced is 1, expected a number w"),
        (
            edit("freedoms", 0, "stretch", "produced", value=1e9),
            r"stretch is 10+\.0, expected a po",
        ),
        (edit("extra", value=1), "the symmetry has 'extra'"),
        (lambda r: r.pop("pinned"), "the symmetry has no 'pinned'"),
        (lambda r: r["groups"][0].pop("size"), r"groups\[0\] has no 'size'"),
        (edit("groups", value=3), "groups is 3, expected a list"),
        (edit("groups", 0, value=[]), r"groups\[0\] is \[\], expected a Group"),
        (edit("groups", 0, "size", value=True), r"groups\[0\]\.size is True, expected a whole"),
        (edit("groups", 0, "size", value=1.0), r"groups\[0\]\.size is 1\.0, expected a whole"),
        (edit("groups", 0, "size", value=-1), r"groups\[0\]\.size is -1, expected a size"),
        (edit("groups", 0, "size", value=7), r"location\.index\.start is 0, expected 7 positions"),
        (edit("groups", 0, "rotates", value=0), r"groups\[0\]\.rotates is 0, expected true"),
        (edit("groups", 1, "name", value="in"), r"groups\[1\]\.name is 'in', expected a name of"),
        (edit("groups", 0, "outer", value="x"), r"groups\[0\]\.outer is 'x', expected the name"),
        (edit("groups", 0, "outer", value="in"), r"groups\[0\]\.batch is \(\), expected \(6,\)"),
        (edit("groups", 0, "batch", value=[2]), r"location\.batch is 'of 0 entries'"),
        (edit(*MEMBER, "role", value="eats"), r"members\[0\]\.role is 'eats', expected one of"),
        (edit(*MEMBER, "leaf", value=99), r"members\[0\]\.leaf is 99, expected less than"),
        (edit(*MEMBER, "leaf", value=0), r"members\[0\]\.path is .*, expected 'count'"),
        (edit(*LOCATION, "axis", value=3), r"location\.axis is 3, expected an axis of shape"),
        (edit(*LOCATION, "length", value=3), r"location\.length is 3, expected 6"),
        (edit(*LOCATION, "index", "start", value=-1), r"index\.start is -1"),
        (edit(*LOCATION, "index", "after", value=0), r"index\.after is 0, expected 1"),
        (edit(*LOCATION, "index", "outer", value=[[10**15, 1]]), r"index\.outer is \(10+, 1\)"),
        (edit(*LOCATION, "index", "outer", value=[[1]]), r"outer\[0\] has 1 entries, expected 2"),
        (edit("leaves", 0, "path", value="z"), r"leaves\[0\]\.path is 'z', expected 'count'"),
        (edit("leaves", 0, "dtype", value="object"), r"leaves\[0\]\.dtype is 'object'"),
        (edit("leaves", 0, "dtype", value="key:md5"), r"leaves\[0\]\.dtype is 'key:md5'"),
        (edit("leaves", 1, "shape", value=[10**30]), r"leaves\[1\]\.shape is 10"),
        (edit("leaves", value=[]), "leaves is 'of 0 entries'"),
        (edit("leaf_splits", 0, "count", value=3), r"leaf_splits\[0\]\.count is 3, expected a div"),
        (edit("leaf_splits", 0, "leaf", value=-1), r"leaf_splits\[0\]\.leaf is -1"),
        (edit("pinned", 0, "path", value="z"), r"pinned\[0\]\.path is 'z'"),
        (edit("tree", value={"set": []}), "tree is {'set': \\[\\]}, expected a dict"),
        (edit("tree", "dict", "more", value=1), "tree/more is 1, expected 0"),
        (edit("freedoms", 0, "folds", 0, "leaf", value=-1), r"folds\[0\]\.leaf is -1"),
        (edit("freedoms", 0, "folds", 0, "others", 0, value=[1, 9, -1]), r"\.others is 9, expec"),
    ],
)
def test_each_wrong_field_is_named(change: Callable[[Any], Any], message: str):
    record = json.loads(small().to_json())
    change(record)
    with pytest.raises(ValueError, match=message):
        otf.Symmetry.from_json(json.dumps(record))


def test_what_an_earlier_version_has_saved_is_read_and_rotates_at_its_own_width_alone():
    params = {"in": jnp.ones((4, 6)), "out": jnp.ones((6, 3))}
    traced = otf.trace_symmetry(lambda p, x: x @ p["in"] @ p["out"], params, jnp.ones((2, 4)))
    record = json.loads(traced.to_json())
    for entry in (*record["groups"], *record["freedoms"]):
        del entry["stretch"]
    read = otf.Symmetry.from_json(json.dumps(record | {"version": 1}))
    assert read.groups == traced.groups
    narrower = {"in": jnp.eye(6)[:, :4]}
    otf.transport(traced.with_rotations(), narrower, params)
    with pytest.raises(ValueError, match="in: 6 units become 4, but .* trace it anew"):
        otf.transport(read.with_rotations(), narrower, params)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": NaN}', '{"a": 1, "a": 2}', "\x00", "[" * 10**6]
)
def test_other_texts_are_refused(text: str):
    with pytest.raises(ValueError, match="symmetry"):
        otf.Symmetry.from_json(text)


def test_flipped_bits_are_refused_or_give_a_symmetry():
    text = small().to_json().encode()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        try:
            read = otf.Symmetry.from_json(damaged.decode("utf-8", "replace"))
        except ValueError:
            refused += 1
        else:
            # Whatever it says, it is whole: it can be shown and taken apart.
            assert read.summary()
            assert len(read.leaf_structures) == len(read.parts)
    assert refused > 200
