"""Checks what a symmetry looks like to people: tables that fold, summaries, drawings."""

import jax
import jax.numpy as jnp
import pytest

import otfusion_jax as otf
from benchmarks.networks import transformer


def symmetry_of(depth: int, scanned: bool = False) -> otf.Symmetry:
    fn, shapes, tokens = transformer(depth, 32, 2, 11, scanned)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return otf.trace_symmetry(fn, params, jax.ShapeDtypeStruct(tokens, jnp.int32))


def test_repeated_blocks_are_shown_once():
    text = str(symmetry_of(12))
    assert len(text.splitlines()) == len(str(symmetry_of(3)).splitlines()) <= 30
    groups = [line.split() for line in text.splitlines() if not line.startswith(" ")]
    assert ["{0..11}/qkv", "2", "consumes", "{0..11}/out", "0", "as", "[1,", "2,", "16]"] in groups
    assert any(row[:4] == ["{0..11}/qkv#2", "2", "x", "16"] for row in groups)
    assert "consumes  {0..11}/gate_up  0" in text


def test_two_blocks_are_written_out():
    text = str(symmetry_of(2))
    assert "{" not in text
    for block in ("0", "1"):
        assert f"{block}/gate_up  128" in text.replace("     ", "  ")


def test_only_what_goes_up_by_one_is_folded():
    def fn(p, x):
        for i in (0, 1, 2, 5):
            x = x + jnp.tanh(x @ p[f"w{i}"]) @ p[f"v{i}"]
        return x @ p["out"]

    widths = {0: 6, 1: 6, 2: 6, 5: 6}
    params = {f"w{i}": jnp.ones((4, n)) for i, n in widths.items()}
    params |= {f"v{i}": jnp.ones((n, 4)) for i, n in widths.items()} | {"out": jnp.ones((4, 2))}
    lines = str(otf.trace_symmetry(fn, params, jnp.ones((1, 4)))).splitlines()
    names = [line.partition(" ")[0] for line in lines]
    assert "w{0..2}" in names
    assert "w5" in names


def test_layers_of_other_sizes_stay_apart():
    def fn(p, x):
        for i in range(4):
            x = jnp.tanh(x @ p[f"w{i}"])
        return x @ p["out"]

    sizes = [3, 5, 5, 5, 6]
    params = {f"w{i}": jnp.ones((sizes[i], sizes[i + 1])) for i in range(4)}
    text = str(otf.trace_symmetry(fn, params | {"out": jnp.ones((6, 2))}, jnp.ones((1, 3))))
    assert "w{0..2}  5      produces  w{0..2}  1" in text
    assert "w3       6      consumes" in text


def test_segments_are_shown_as_slices():
    text = str(symmetry_of(1))
    assert "1 [0:32] as [1, 2, 16]" in text
    assert "1 [64:96] as [2, 16, 1]" in text
    assert "1 [128:256]" in text


def test_the_summary_counts_groups_and_names_lines():
    summary = symmetry_of(6, scanned=True).summary()
    rows = [line.split() for line in summary.splitlines()]
    assert ["1", "32"] in rows
    assert any(row[:6] == ["2", "6", "x", "2", "x", "16"] for row in rows)
    assert "benchmarks/networks.py" in summary


def test_the_summary_says_where_an_input_holds_a_parameter():
    def fn(p, x):
        return jnp.cumsum(x @ p["in"], 1) @ p["out"]  # line of the pin

    params = {"in": jnp.ones((3, 5)), "out": jnp.ones((5, 2))}
    symmetry = otf.trace_symmetry(fn, params, jnp.ones((4, 3)))
    summary = symmetry.summary()
    line = fn.__code__.co_firstlineno + 1
    assert "0.0 % of 25 parameters" in summary
    assert f"tied to input 0, axis 1, at {__file__}:{line} (" in summary
    assert "cumsum along axis 1 at" in summary
    shares = [row.split()[0] for row in summary.splitlines() if " % " in row][1:]
    assert shares[0] == "100.0"


def test_where_a_pin_was_met_does_not_make_another_symmetry():
    def first(p, x):
        return jnp.tanh(x @ p["in"]) @ p["out"]

    def second(p, x):
        return jnp.tanh(x @ p["in"]) @ p["out"]

    params, x = {"in": jnp.ones((3, 5)), "out": jnp.ones((5, 2))}, jnp.ones((1, 3))
    a, b = (otf.trace_symmetry(fn, params, x) for fn in (first, second))
    assert a.pinned[0].source != b.pinned[0].source
    assert a == b
    assert hash(a) == hash(b)


def test_what_is_no_symmetry_is_not_drawn():
    with pytest.raises(TypeError, match=r"a list was given .* call draw\(symmetry, ax\)"):
        otf.draw([symmetry_of(1)])  # pyright: ignore[reportArgumentType]


def test_a_drawing_has_a_patch_for_each_leaf_of_each_group():
    plt = pytest.importorskip("matplotlib.pyplot")
    symmetry = symmetry_of(2)
    ax = otf.draw(symmetry)
    pairs = {(g.name, m.leaf) for g in symmetry.groups for m in g.members}
    assert len(ax.patches) == len(pairs)
    assert [t.get_text() for t in ax.get_yticklabels()] == [leaf.path for leaf in symmetry.leaves]
    assert ax.get_xticklabels()[2].get_text() == "0/qkv#2 (2 x 16)"
    moving = otf.draw(symmetry.with_rotations()).get_xticklabels()
    motions = {str(t.get_text()).partition(", ")[2]: t.get_color() for t in moving}
    assert motions["permuted)"] == "black"
    assert len(set(motions.values())) == len(motions) > 1
    _, other = plt.subplots()
    assert otf.draw(symmetry, other) is other
    plt.close("all")
