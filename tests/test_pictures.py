"""Checks pictures by what is on their axes; none of them touches pyplot, or needs a screen."""

import io
import subprocess
import sys
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal, normals
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import otfusion_jax as otf
from otfusion_jax.pictures.canvas import STYLES, style_of

A, B, C = (normals({"x": (3,)}, seed=seed) for seed in range(3))


def hill(params):
    return jnp.sum(jnp.sin(3 * params["x"]))


def examples(params):
    """Two metrics of three examples."""
    rows = jnp.sin(jnp.arange(1.0, 4.0)[:, None] * params["x"][None]).sum(1)
    return jnp.stack([rows, rows**2], axis=1)


def axes() -> Axes:
    return Figure().subplots()


def labels(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def error_bars(ax: Axes) -> list[ErrorbarContainer]:
    return [found for found in ax.containers if isinstance(found, ErrorbarContainer)]


def write(ax: Axes) -> None:
    """Draws all of a picture."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.savefig(io.BytesIO(), format="png")


# Paths


def test_a_path_has_a_curve_for_each_method_and_the_height_of_its_barrier():
    paths = {name: otf.barrier(hill, A, model) for name, model in (("one", B), ("other", C))}
    ax = otf.plot_path(paths, label="loss")
    curves = [bars.lines[0] for bars in error_bars(ax)]
    for curve, path in zip(curves, paths.values(), strict=True):
        np.testing.assert_array_equal(curve.get_xdata(), path.t)
        np.testing.assert_array_equal(curve.get_ydata(), path.values)
    assert labels(ax) == [f"{name}, barrier {path.height:.3g}" for name, path in paths.items()]
    assert ax.get_ylabel() == "loss"
    write(ax)


def test_a_path_shows_one_of_several_metrics_with_its_standard_errors():
    path = otf.barrier(examples, A, B, per_example=True)
    assert path.values_error is not None
    assert path.height_error is not None
    ax = axes()
    assert otf.plot_path(path, metric=1, ax=ax) is ax
    (found,) = error_bars(ax)
    np.testing.assert_array_equal(found.lines[0].get_ydata(), path.values[:, 1])
    (bars,) = found.lines[2]
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, 2 * path.values_error[:, 1], atol=1e-5)
    assert labels(ax) == [f"barrier {path.height[1]:.3g} ± {path.height_error[1]:.1g}"]


def test_paths_that_cannot_be_plotted_are_refused():
    with pytest.raises(ValueError, match="no paths were given"):
        otf.plot_path({})
    with pytest.raises(TypeError, match="path 'a' is 3; pass what barrier returns"):
        otf.plot_path({"a": 3})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="paths is a list; give what barrier returns"):
        otf.plot_path([otf.barrier(hill, A, B)])  # pyright: ignore[reportArgumentType]
    several = otf.barrier(examples, A, B, per_example=True)
    with pytest.raises(ValueError, match="there are 2 metrics; say which to plot, as metric=0"):
        otf.plot_path(several)
    with pytest.raises(ValueError, match="metric is 2, but there are 2"):
        otf.plot_path(several, metric=2)
    with pytest.raises(ValueError, match="metric is 0, but there is one alone; leave it out"):
        otf.plot_path(otf.barrier(hill, A, B), metric=0)


def test_more_curves_than_colours_have_other_lines():
    styles = [tuple(sorted(style_of(number).items())) for number in range(3 * len(STYLES))]
    assert len(set(styles)) == len(styles)


# Planes


def test_a_plane_shows_the_models_where_they_are():
    plane = otf.plane(lambda p: jnp.stack([hill(p), -hill(p)]), A, B, C, points=5)
    ax = otf.plot_plane(plane, metric=1, label="loss", names=("a", "b", "fused"))
    places = np.stack([line.get_xydata() for line in ax.lines])
    np.testing.assert_allclose(places[:, 0], plane.models)
    assert [text.get_text() for text in ax.texts] == ["a", "b", "fused"]
    assert ax.get_xlabel() == "distance towards b"
    assert ax.get_aspect() == 1
    figure = ax.figure
    assert figure is not None
    assert [other.get_ylabel() for other in figure.axes if other is not ax] == ["loss"]
    # What is plotted is the second metric: its levels hold its values.
    (areas,) = ax.collections
    assert areas.get_clim()[1] == pytest.approx(float(plane.values[..., 1].max()), abs=1)
    write(ax)


def test_a_plane_with_levels_of_ones_own_and_holes():
    plane = otf.plane(lambda p: jnp.where(p["x"][0] > 0.5, jnp.nan, hill(p)), A, B, C, points=6)
    ax = axes()
    assert otf.plot_plane(plane, levels=[-1.0, 0.0, 1.0], ax=ax) is ax
    write(ax)
    nothing = otf.plane(lambda p: hill(p) * jnp.nan, A, B, C, points=2)
    with pytest.raises(ValueError, match="no value in the plane is finite"):
        otf.plot_plane(nothing)


def test_planes_that_cannot_be_plotted_are_refused():
    plane = otf.plane(hill, A, B, C, points=2)
    with pytest.raises(ValueError, match="there are 2 names, for three models"):
        otf.plot_plane(plane, names=("a", "b"))
    with pytest.raises(ValueError, match="levels is -1; give 1 or more"):
        otf.plot_plane(plane, levels=-1)
    with pytest.raises(TypeError, match="(?s)plane is .*; pass what otf.plane"):
        otf.plot_plane(otf.barrier(hill, A, B))  # pyright: ignore[reportArgumentType]


# Plans


def tiles(ax: Axes) -> list[np.ndarray]:
    """The matrices of a picture; NaN where they are blank."""
    return [np.ma.filled(np.ma.asarray(image.get_array()), np.nan) for image in ax.images]


def test_plans_are_drawn_as_matrices():
    order = np.array([2, 0, 3, 1])
    soft = np.array([[0.5, 0.0, 0.0], [0.0, 0.25, 0.25]], np.float32)
    rotation = np.linalg.qr(np.asarray(normal(3, 3)))[0]
    heads = np.array([[1, 0, 2], [2, 1, 0]])
    plans = {"order": order, "soft": soft, "rotation": rotation, "heads": heads}
    ax = otf.plot_plans({name: jnp.asarray(plan) for name, plan in plans.items()})
    found = dict(zip(plans, tiles(ax), strict=True))
    np.testing.assert_array_equal(found["order"], np.eye(4)[:, order])
    np.testing.assert_allclose(found["soft"], soft / 0.5)
    np.testing.assert_allclose(found["rotation"], rotation / np.abs(rotation).max(), atol=1e-6)
    expected = np.zeros((6, 6))
    for head, inside in enumerate(heads):
        expected[3 * head : 3 * head + 3, 3 * head : 3 * head + 3] = np.eye(3)[:, inside]
    np.testing.assert_array_equal(found["heads"], expected)
    names = [text.get_text() for text in ax.texts]
    assert names == ["order (4)", "soft (2 → 3)", "rotation (3 → 3)", "heads (3)"]
    write(ax)


def test_what_a_plan_does_is_what_its_tile_shows():
    """Columns are new units: a vector of old ones times the tile is the vector of new ones."""

    def net(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    params = normals({"in": (3, 5), "out": (5, 2)})
    symmetry = otf.trace_symmetry(net, params, normal(2, 3))
    plans = symmetry.random(jax.random.key(3))
    (tile,) = tiles(otf.plot_plans(plans))
    moved = otf.transport(symmetry, plans, params)
    np.testing.assert_allclose(np.asarray(params["in"]) @ tile, moved["in"], atol=1e-6)


@pytest.mark.parametrize("units", [127, 128, 129, 1000, 3072])
def test_plans_of_thousands_of_units_are_drawn_in_few_cells(units: int):
    (tile,) = tiles(otf.plot_plans({"identity": jnp.arange(units)}))
    assert len(tile) == min(units, 128)
    assert np.count_nonzero(np.diag(tile)) == len(tile)
    assert np.count_nonzero(np.triu(tile, 2)) == 0
    signs = -np.eye(units, dtype=np.float32)[:200]
    (tile,) = tiles(otf.plot_plans({"soft": jnp.asarray(signs)}))
    assert tile.min() == -1
    assert tile.max() == 0


def test_plans_that_are_none_are_refused():
    with pytest.raises(ValueError, match="there are no plans"):
        otf.plot_plans({})
    with pytest.raises(TypeError, match="plans is a list; pass a dict of arrays"):
        otf.plot_plans([jnp.arange(3)])  # pyright: ignore[reportArgumentType]


# Similarity


def test_correlations_are_drawn_before_and_after():
    before, after = np.array([[0.5, np.nan, 0.1]]), np.eye(3)
    group = otf.GroupSimilarity(9, jnp.ones(()), jnp.asarray(before), jnp.asarray(after), 1.0, 0.5)
    similarity = otf.Similarity({"hidden": group}, 1.0, 0.5)
    ax = otf.plot_similarity(similarity, "hidden")
    shown = tiles(ax)
    np.testing.assert_allclose(shown[0], before)
    np.testing.assert_allclose(shown[1], after)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["as they are", "aligned"]
    assert ax.images[0].get_extent()[1] < ax.images[1].get_extent()[0]
    write(ax)
    with pytest.raises(KeyError, match=r"no group 'a'; there are \['hidden'\]"):
        otf.plot_similarity(similarity, "a")
    with pytest.raises(TypeError, match=r"similarity is 1; pass what otf.similarity"):
        otf.plot_similarity(1, "a")  # pyright: ignore[reportArgumentType]


# Symmetries


def test_scales_signs_and_rotations_have_colours():
    def cells(params, x):
        return jax.nn.relu(jnp.tanh(x @ params["odd"]) @ params["relu"]) @ params["out"]

    params = {"odd": normal(3, 4), "relu": normal(4, 5), "out": normal(5, 2)}
    symmetry = otf.trace_symmetry(cells, params, normal(2, 3))
    for moving, motions in (
        (symmetry, {"odd (4)": "black", "relu (5)": "black"}),
        (
            symmetry.with_signs().with_scales(),
            {
                "odd (4, permuted, with signs)": "tab:red",
                "relu (5, permuted, scaled)": "tab:brown",
            },
        ),
    ):
        ticks = otf.draw(moving).get_xticklabels()
        assert {str(tick.get_text()): tick.get_color() for tick in ticks} == motions


def test_a_picture_of_one_group_is_wide_enough_for_its_legend():
    def mlp(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    params = {"in": normal(3, 4), "out": normal(4, 2)}
    ax = otf.draw(otf.trace_symmetry(mlp, params, normal(2, 3)))
    figure = cast(Figure, ax.figure)
    figure.draw_without_rendering()
    legend = ax.get_legend()
    assert legend is not None
    for artist in (legend, ax.xaxis.label):
        extent = artist.get_window_extent()
        assert figure.bbox.x0 <= extent.x0
        assert extent.x1 <= figure.bbox.x1


def deep(params, x):
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params["head"]


@pytest.mark.parametrize(("depth", "rows", "columns"), [(20, 41, 20), (60, 6, 2)])
def test_of_deep_networks_a_layer_is_drawn_once(depth: int, rows: int, columns: int):
    layer = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    layer["bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    params = {"layers": [layer] * depth, "head": layer["kernel"]}
    symmetry = otf.trace_symmetry(deep, params, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    ax = otf.draw(symmetry)
    assert len(ax.get_yticks()) == rows
    assert len(ax.get_xticks()) == columns
    write(ax)


# All of them


def test_what_are_no_axes_is_refused():
    symmetry = otf.trace_symmetry(lambda p, x: x * p, jnp.ones(1), jnp.ones(1))
    with pytest.raises(TypeError, match=r"ax is .*; pass axes as pyplot.gca\(\) or"):
        otf.draw(symmetry, Figure())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="ax is .*; pass axes"):
        otf.plot_plans({"a": jnp.arange(3)}, ax=np.array([axes()]))  # pyright: ignore[reportArgumentType]


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "otfusion-jax\[plot\]" matplotlib'):
        otf.plot_path(otf.barrier(hill, A, B))


def test_pictures_need_neither_pyplot_nor_a_screen(tmp_path: Path):
    """In a process of its own: this one has imported pyplot."""
    code = """
import sys
import jax.numpy as jnp
import otfusion_jax as otf
sys.modules["matplotlib.pyplot"] = None
ax = otf.plot_plans({"a": jnp.arange(3)})
otf.draw(otf.trace_symmetry(lambda p, x: x * p, jnp.ones(1), jnp.ones(1)))
ax.figure.savefig(sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "plans.png")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
