"""Checks the static result of a trace: what it accepts, how it prints, which plans it draws."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import CASES

import otfusion_jax as otf
from otfusion_jax.common import finiteness
from otfusion_jax.symmetry.groups import leaves_of
from otfusion_jax.symmetry.location import StridedIndex

LAYER = jnp.ones((3, 2))


def traced(name: str) -> tuple[otf.Symmetry, dict]:
    case = CASES[name]()
    return otf.trace_symmetry(case.fn, case.params, *case.inputs), case.params


def plain(**sizes: tuple[int, ...]) -> otf.Symmetry:
    """Of one hidden layer, `in` [4, 6] and `out` [6, 3], with leaves that it does not use."""
    params = {"in": jnp.ones((4, 6)), "out": jnp.ones((6, 3)), "count": jnp.array(3, jnp.int32)}

    def fn(p, x):
        return jnp.tanh(x @ p["in"]) @ p["out"]

    return otf.trace_symmetry(fn, params | {k: jnp.ones(v) for k, v in sizes.items()}, jnp.ones(4))


def params_like(symmetry: otf.Symmetry) -> dict:
    leaves = [jnp.ones(leaf.shape, leaf.dtype) for leaf in symmetry.leaves]
    return jax.tree_util.tree_unflatten(symmetry.treedef, leaves)


# --- validation


def test_validate_accepts_what_was_traced_and_changes_nothing():
    symmetry, params = traced("resnet")
    before = jax.tree.map(np.array, params)
    symmetry.validate(params)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def test_validate_accepts_other_precisions():
    symmetry = plain()
    half = {"in": jnp.ones((4, 6), jnp.bfloat16), "out": jnp.ones((6, 3), jnp.float16)}
    symmetry.validate(half | {"count": jnp.array(1, jnp.int32)})


def test_validate_names_missing_and_unexpected_leaves():
    symmetry, params = plain(gone=(2,), lost=(2,)), params_like(plain(new=(1,), odd=(1,)))
    with pytest.raises(ValueError, match="mine has another tree") as info:
        symmetry.validate(params, "mine")
    message = str(info.value)
    for line in ("gone: missing", "lost: missing", "new: not expected", "odd: not expected"):
        assert f"  {line}" in message
    assert "  in:" not in message
    assert "all models must be of one architecture" in message


@pytest.mark.parametrize(
    ("params", "difference"),
    [
        ((LAYER, {"b": [LAYER, LAYER]}), "the tree is a tuple, expected a list"),
        ([LAYER, {"b": (LAYER, LAYER)}], "1/b is a tuple, expected a list"),
        ([[LAYER], {"b": [LAYER, LAYER]}], "0: missing"),
    ],
)
def test_validate_tells_containers_from_leaves(params: Any, difference: str):
    def fn(p, x):
        return x @ p[0]

    traced_params = [LAYER, {"b": [LAYER, LAYER]}]
    symmetry = otf.trace_symmetry(fn, traced_params, jnp.ones(3))
    with pytest.raises(ValueError, match="another tree") as info:
        symmetry.validate(params)
    message = str(info.value)
    assert difference in message
    assert ("containers of other types" in message) == ("expected a" in difference)


@pytest.mark.parametrize(
    ("params", "lines"),
    [
        ({"a": None}, ["  a: None, not expected", "  k/none: missing, expected None"]),
        ({"k": {"none": None}, "z": {"in": []}}, ["  z/in: a list, not expected"]),
        ({"k": {"none": ()}}, ["  k/none: a tuple, expected None"]),
        ({"k": {"other": None}}, ["  k/none: missing, expected None", "  k/other: None, not"]),
    ],
)
def test_validate_names_what_is_empty_by_its_path(params: dict, lines: list[str]):
    traced_params = {"layer": LAYER, "k": {"none": None}}
    symmetry = otf.trace_symmetry(lambda p, x: x @ p["layer"], traced_params, jnp.ones(3))
    symmetry.validate(traced_params)
    with pytest.raises(ValueError, match="another tree") as info:
        symmetry.validate({"layer": LAYER} | params)
    for line in lines:
        assert line in str(info.value)
    assert "layer" not in str(info.value)


class Doubled:
    """A container that looks at the leaves it is given."""

    def __init__(self, leaf: Any):
        self.leaf = leaf


jax.tree_util.register_pytree_node(
    Doubled, lambda node: ((node.leaf,), None), lambda _, leaves: Doubled(leaves[0].T.T)
)


def test_validate_goes_without_names_where_a_container_takes_arrays_alone():
    symmetry = otf.trace_symmetry(lambda p, x: x @ p[0].leaf, [Doubled(LAYER)], jnp.ones(3))
    with pytest.raises(ValueError, match="the same leaves in containers of other types"):
        symmetry.validate([Doubled(LAYER), None])


def test_validate_lists_every_offender():
    symmetry = plain(fine=(2,), scale=(5,))
    params = params_like(symmetry)
    params["in"] = jnp.ones((4, 7))
    params["out"] = jnp.ones((6, 3), jnp.int32)
    params["count"] = jnp.array(1.0)
    params["scale"] = jnp.array([1.0, jnp.nan, 2.0, jnp.inf, -jnp.inf])
    with pytest.raises(ValueError, match="does not fit") as info:
        symmetry.validate(params)
    message = str(info.value)
    assert "in: shape (4, 7), expected (4, 6)" in message
    assert "out: dtype int32, expected float32" in message
    assert "count: dtype float32, expected int32" in message
    assert "scale: 3 of 5 values not finite, expected none" in message
    assert "fine" not in message


def test_validate_a_stack():
    symmetry = plain()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params_like(symmetry))
    symmetry.validate(stacked, batch=(2,))
    with pytest.raises(ValueError, match=r"in: shape \(2, 4, 6\), expected \(3, 4, 6\)"):
        symmetry.validate(stacked, batch=(3,))
    with pytest.raises(ValueError, match=r"expected \(4, 6\)"):
        symmetry.validate(stacked)


def test_validate_looks_at_no_values_of_tracers():
    symmetry = plain()
    params = params_like(symmetry)
    seen = []

    def check(params):
        symmetry.validate(params)
        seen.append(True)
        return params["in"]

    bad = params | {"in": jnp.full((4, 6), jnp.nan)}
    jax.eval_shape(check, bad)
    jax.eval_shape(jax.vmap(check), jax.tree.map(lambda x: x[None], bad))
    symmetry.validate(jax.eval_shape(lambda: params))
    assert len(seen) == 2
    with pytest.raises(ValueError, match="shape"):
        jax.eval_shape(check, params | {"in": jnp.ones((4, 5))})


def test_validate_waits_for_the_device_once(monkeypatch):
    """As on an accelerator: here NumPy would read the values as they lie."""
    symmetry = plain(scale=(5,))
    params = params_like(symmetry)
    params["scale"] = jnp.array([1.0, jnp.nan, 2.0, jnp.inf, -jnp.inf])
    params["in"] = params["in"].at[0, 0].set(jnp.nan)
    transfers = []

    def device_get(counts):
        transfers.append(counts)
        return jax.tree.map(np.asarray, counts)

    monkeypatch.setattr(finiteness, "can_be_read_in_place", lambda array: False)
    monkeypatch.setattr(jax, "device_get", device_get)
    with pytest.raises(ValueError, match="(?s)in: 1 of 24 .*scale: 3 of 5 values"):
        symmetry.validate(params)
    assert len(transfers) == 1
    jax.jit(lambda x: symmetry.validate(params | {"scale": jnp.ones(5), "in": x}))(params["in"])
    assert len(transfers) == 2


def test_validate_says_which_model_has_leaves_that_are_no_arrays():
    symmetry = plain()
    with pytest.raises(ValueError, match="leaves of model 1 are not arrays.*\n  out: str"):
        symmetry.validate(params_like(symmetry) | {"out": "text"}, "model 1")


def test_validate_takes_the_axes_of_a_stack_as_a_tuple():
    symmetry = plain()
    with pytest.raises(TypeError, match=r"batch is 2; pass the sizes .* as a tuple"):
        symmetry.validate(params_like(symmetry), batch=2)  # pyright: ignore[reportArgumentType]


def test_non_array_leaves_are_all_named():
    params = {"a": "text", "b": {"c": object(), "fine": jnp.ones(2)}, "d": None, "e": 1.5}
    with pytest.raises(ValueError, match="not arrays") as info:
        leaves_of(params)
    assert "a: str" in str(info.value)
    assert "b/c: object" in str(info.value)
    assert "fine" not in str(info.value)
    assert "partition" in str(info.value)


def test_what_to_do_about_an_array_of_the_other_byte_order_is_said():
    array = np.ones(3, np.dtype(float).newbyteorder())
    with pytest.raises(ValueError, match="w: ndarray of the other byte order") as info:
        leaves_of({"w": array})
    assert "x.astype(x.dtype.newbyteorder())" in str(info.value)
    assert array.astype(array.dtype.newbyteorder()).dtype.isnative


# --- plans


def test_random_draws_permutations_and_the_key_decides():
    symmetry, _ = traced("grouped_conv_group_norm")
    plans = symmetry.random(jax.random.key(1))
    again = symmetry.random(jax.random.key(1))
    other = symmetry.random(jax.random.key(2))
    assert plans.keys() == {g.name for g in symmetry.groups}
    for group in symmetry.groups:
        assert plans[group.name].dtype == jnp.int32
        assert plans[group.name].shape == (*group.batch, group.size)
        assert np.all(np.sort(plans[group.name]) == np.arange(group.size))
        assert np.array_equal(plans[group.name], again[group.name])
    assert any(not np.array_equal(plans[name], other[name]) for name in plans)


def test_groups_of_one_size_are_permuted_independently():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    params = {"a": jnp.ones((2, 32)), "b": jnp.ones((32, 32)), "c": jnp.ones((32, 2))}
    plans = otf.trace_symmetry(fn, params, jnp.ones(2)).random(jax.random.key(0))
    assert not np.array_equal(plans["a"], plans["b"])


def test_plans_are_in_the_order_of_the_groups():
    def fn(p, x):
        return jnp.tanh(jax.nn.relu(x @ p["z"]) @ p["b"]) @ p["a"]

    # The names are in another order than those of a sorted dict.
    params = {"z": jnp.ones((4, 6)), "b": jnp.ones((6, 5)), "a": jnp.ones((5, 3))}
    signed = otf.trace_symmetry(fn, params, jnp.ones(4)).with_signs()
    assert list(signed) == list(signed.identity()) == list(signed.random(jax.random.key(0)))
    shapes = {name: plan.shape for name, plan in signed.random(jax.random.key(0)).items()}
    assert shapes == {"z": (6,), "b": (5, 5)}


def test_identity_moves_nothing():
    symmetry, params = traced("resnet")
    moved = otf.transport(symmetry, symmetry.identity(), params)
    jax.tree.map(np.testing.assert_array_equal, params, moved)


def test_no_groups_no_plans():
    symmetry = otf.trace_symmetry(lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones(3))
    assert symmetry.groups == ()
    assert symmetry.random(jax.random.key(0)) == symmetry.identity() == {}


# --- reading


def test_lookup_by_name():
    symmetry, _ = traced("mlp_plain")
    assert symmetry["1/0"].size == 6
    with pytest.raises(KeyError, match=r"no group 'nope'; there are \['0/0', '1/0'\]"):
        symmetry["nope"]


def test_is_a_mapping_from_names_to_groups():
    symmetry, _ = traced("mlp_plain")
    assert len(symmetry) == 2
    assert list(symmetry) == ["0/0", "1/0"]
    assert "0/0" in symmetry
    assert "nope" not in symmetry
    assert 0 not in symmetry
    assert symmetry.keys() == {"0/0", "1/0"}
    assert tuple(symmetry.values()) == symmetry.groups
    assert dict(symmetry.items()) == {group.name: group for group in symmetry.groups}
    assert symmetry.get("nope") is None


def test_groups_are_left_out_by_a_function_of_their_names():
    symmetry, _ = traced("mlp_plain")
    assert list(symmetry.only(lambda name: name == "1/0")) == ["1/0"]
    with pytest.raises(TypeError, match=r"a list was given .* call symmetry.only\(lambda name"):
        symmetry.only(["1/0"])  # pyright: ignore[reportArgumentType]


def test_members_by_role():
    symmetry, _ = traced("tied_embedding")

    def paths(role):
        return {(m.path, m.axis) for m in symmetry["embed"].having(role)}

    assert paths("produces") == {("embed", 1), ("down", 1)}
    assert paths("consumes") == {("embed", 1), ("up", 0)}


def test_a_strided_index_gives_positions_along_an_axis():
    index = StridedIndex(start=2, outer=((2, 20), (3, 6)), after=2)
    expected = [
        [[2 + 20 * i + 6 * j + 2 * u + a for a in range(2)] for u in range(3)]
        for i in range(2)
        for j in range(3)
    ]
    np.testing.assert_array_equal(index.positions(3), expected)
    assert index.before == 6


def test_printing_shows_sizes_roles_views_and_reasons():
    symmetry, _ = traced("vgg")
    text = str(symmetry)
    head, *lines = text.splitlines()
    assert head.startswith("Symmetry: 3 groups over 8 leaves")
    for group in symmetry.groups:
        assert any(line.split()[:2] == [group.name, str(group.size)] for line in lines)
        for member in group.members:
            assert any(f"{member.role}  {member.path} " in line for line in lines)
    assert "0 as [4, 6, 1]" in text
    for pin in symmetry.pinned:
        assert any(line.startswith(pin.path) and line.endswith(pin.reason) for line in lines)
    assert "tied to the output, axis 1" in text
    assert "a spatial axis of a convolution" in text


def test_printed_share_counts_parameters_on_a_group():
    symmetry = plain(unused=(58,))  # 24 + 18 of 42 + 58 + 1
    assert "41.6 % of 101 parameters" in str(symmetry)


def test_one_of_a_kind_is_printed_in_the_singular():
    def sum_of_squares(params):
        return jnp.sum(params**2)

    symmetry = otf.trace_symmetry(sum_of_squares, jnp.ones(3))
    assert repr(symmetry) == "<Symmetry: 1 group, 1 leaf, 3 parameters>"
    assert str(symmetry).startswith("Symmetry: 1 group over 1 leaf; 100.0 % of 3 parameters")


def test_prints_without_groups_and_without_pins():
    one = otf.trace_symmetry(lambda p: p, jnp.array(1.0))
    assert str(one).startswith("Symmetry: 0 groups over 1 leaf;")
    assert str(otf.trace_symmetry(lambda p: jnp.zeros(()), {})).startswith("Symmetry: 0 groups")


def test_its_representation_is_one_line():
    symmetry, _ = traced("mlp_plain")
    assert repr(symmetry) == "<Symmetry: 2 groups, 6 leaves, 131 parameters>"
    assert len(str(symmetry).splitlines()) > 10


def test_is_hashed_once(monkeypatch):
    symmetry, other = traced("resnet")[0], traced("vgg")[0]
    value = hash(symmetry)
    hashed = []
    monkeypatch.setattr(otf.Group, "__hash__", lambda group: hashed.append(group) or 0)
    assert hash(symmetry) == value
    assert not hashed
    hash(dataclasses.replace(other, groups=other.groups[1:]))
    assert len(hashed) == len(other.groups) - 1


def test_a_pickle_has_no_hash_of_another_process():
    symmetry = plain()
    hash(symmetry)
    script = (
        "import pickle, sys\n"
        "symmetry = pickle.load(sys.stdin.buffer)\n"
        "fields = [getattr(symmetry, name) for name in symmetry.__dataclass_fields__]\n"
        "assert hash(symmetry) == hash(type(symmetry)(*fields))\n"
        "sys.stdout.buffer.write(pickle.dumps(symmetry))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(symmetry),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    back = pickle.loads(run.stdout)
    assert back == symmetry
    assert hash(back) == hash(symmetry)
    assert copy.deepcopy(symmetry) == symmetry


def test_is_a_static_value():
    symmetry, again = traced("resnet")[0], traced("resnet")[0]
    assert symmetry is not again
    assert symmetry == again
    assert hash(symmetry) == hash(again)
    assert symmetry != dataclasses.replace(symmetry, groups=symmetry.groups[1:])
    assert len({symmetry, again, traced("vgg")[0]}) == 2
    units = jax.jit(lambda s, x: x * sum(g.size for g in s.groups), static_argnames="s")
    assert units(symmetry, 1) == 4 + 5 + 7 + 6
