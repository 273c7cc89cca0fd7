"""Checks what notebooks show: well-formed, escaped, without anything from elsewhere."""

import xml.etree.ElementTree as ET
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals

import otfusion_jax as otf
from otfusion_jax.common.html import html_table

SHAPES = {"<b>in</b>": (3, 5), "out": (5, 2)}


def net(params, x):
    return jnp.tanh(x @ params["<b>in</b>"]) @ params["out"]


def shown(value: Any) -> ET.Element:
    """What a notebook shows, read as XML: every tag is closed, and all else is escaped."""
    return ET.fromstring(f"<body>{value._repr_html_()}</body>")


def rows(tree: ET.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


@pytest.fixture(scope="module")
def symmetry() -> otf.Symmetry:
    return otf.trace_symmetry(net, normals(SHAPES), normal(2, 3))


def test_tables_need_nothing_from_elsewhere_and_take_the_colours_of_their_page():
    text = html_table(("a", "b"), [("1", "<script>&\"'")], "of <this>")
    tree = ET.fromstring(f"<body>{text}</body>")
    assert rows(tree) == [["a", "b"], ["1", "<script>&\"'"]]
    assert {element.tag for element in tree.iter()} == {"body", "div", "table", "tr", "th", "td"}
    for element in tree.iter():
        assert set(element.attrib) <= {"style"}
        style = element.get("style", "")
        assert "url" not in style
        # Colours of its own would be unreadable on pages of the other kind.
        assert "#" not in style
        if element.tag in ("th", "td", "table"):
            assert "color: inherit" in style
            assert "background: transparent" in style


def test_a_symmetry_shows_its_table(symmetry: otf.Symmetry):
    tree = shown(symmetry)
    printed = [line.split() for line in str(symmetry).splitlines()]
    as_words = [" ".join(row).split() for row in rows(tree)]
    assert as_words == [words for words in printed[1:] if words]
    assert rows(tree)[1][0] == "<b>in</b>"
    (details,) = tree.iter("details")
    assert details[0].text == "2 axes are pinned"
    assert "Symmetry: 1 group over 2 leaves" in "".join(tree.itertext())


def test_a_symmetry_without_pins_has_no_empty_table():
    symmetry = otf.trace_symmetry(lambda p, x: x.sum() * (p @ p), jnp.ones(3), jnp.ones(2))
    tree = shown(symmetry)
    assert len(list(tree.iter("table"))) == 1 + bool(symmetry.pinned)


def test_an_alignment_shows_what_moved(symmetry: otf.Symmetry):
    a, b = normals(SHAPES, seed=0), normals(SHAPES, seed=1)
    alignment = otf.align(symmetry, a, b)
    header, row = rows(shown(alignment))
    assert header == ["group", "plan", "units moved", "gap"]
    plan = np.asarray(alignment.plans["<b>in</b>"])
    assert row[:3] == ["<b>in</b>", "(5,)", str(np.sum(plan != np.arange(5)))]
    assert float(row[3]) == pytest.approx(float(alignment.gaps["<b>in</b>"]), rel=1e-2)
    text = "".join(shown(alignment).itertext())
    assert f"{float(alignment.history[0]):.4g} → {float(alignment.objective):.4g}, conv" in text
    stacks = (jax.tree.map(lambda x: jnp.stack([x, x]), model) for model in (a, b))
    several = jax.vmap(lambda a, b: otf.align(symmetry, a, b))(*stacks)
    assert rows(shown(several)) == [["group", "plan"], ["<b>in</b>", "(2, 5)"]]


def test_mixed_units_have_not_moved(symmetry: otf.Symmetry):
    a, b = normals(SHAPES, seed=0), normals(SHAPES, seed=1)
    forward = otf.ForwardPass()
    soft = otf.align(symmetry, a, b, method=forward, solver=otf.Sinkhorn(epsilon=0.1))
    assert rows(shown(soft))[1][1:3] == ["(5, 5)", "mixed"]


def test_a_report_shows_trials_and_notes():
    trials = (
        otf.Trial("weights", "permutations", "nothing", 0.25, 1.0, chosen=True),
        otf.Trial("features", "permutations", "nothing", float("nan"), 2.0, problem="1 < 2\nmore"),
    )
    report = otf.Report(trials, 2, (0.5,), "a <measure>", 80, 20, ("a & b",), (), 3.0)
    tree = shown(report)
    printed = str(report).splitlines()
    words = [" ".join(row).split() for row in rows(tree)]
    assert words == [line.split() for line in printed[2:6]]
    text = [element.text for element in tree.iter("div")]
    assert text == [printed[0], *printed[7:]]
    assert text[1:] == ["features, permutations, nothing: 1 < 2", "a & b"]


def test_a_similarity_shows_its_table():
    ones = jnp.ones((1, 1))
    group = otf.GroupSimilarity(9, jnp.ones(()), ones / 2, ones, 1.0, 0.5)
    similarity = otf.Similarity({"<hidden>": group}, 1.0, 0.5)
    found = rows(shown(similarity))
    assert found[1] == ["<hidden>", "9", "1.000", "0.500 → 1.000", "1.000 → 0.500"]
