"""Checks the command line: it gives what the API gives, and says by name what does not fit."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file
from test_docs import fenced_blocks, run_block

import otfusion_jax as otf
from otfusion_jax.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "files.md"
SIZES = {"embed": (6, 5), "up.weight": (5, 7), "up.bias": (7,), "down": (7, 5)}

NETWORK = """
import jax
import jax.numpy as jnp


def flat(params, x):
    h = x @ params["embed"]
    h = jax.nn.relu(h @ params["up.weight"] + params["up.bias"][None])
    return h @ params["down"] @ params["embed"].T


def nested(params, x):
    params = params.get("params", params)
    up = {f"up.{key}": value for key, value in params["up"].items()}
    return flat({"embed": params["embed"], "down": params["down"]} | up, x)


def plain(params, x):
    h = jax.nn.relu(x @ params["embed"])
    h = jax.nn.relu(h @ params["up.weight"] + params["up.bias"][None])
    return h @ params["down"]


def bottleneck(params, x):
    h = jax.nn.relu(x @ params["embed"] @ params["up.weight"] + params["up.bias"][None])
    return h @ params["down"]


def gained(params, gain, x):
    return gain * plain(params, x)


def normed(params, x):
    h = x @ params["w"] - params["bn.running_mean"]
    h = h / jnp.sqrt(params["bn.running_var"] + 1e-5) * params["bn.weight"] + params["bn.bias"]
    return jax.nn.relu(h) @ params["v"]


def wrong(params, x):
    return params["not there"]


def twice(params, x):
    return x @ params["embed"] @ params["head"].T


def nothing(params, x):
    return flat(params, x) * jnp.nan


number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network's code, which commands are called in."""
    (tmp_path / "network.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("network", None)
    return tmp_path


def params(seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SIZES.items()}


def network() -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module("network")


def write_safetensors(name: str, seed: int, dtype: Any = np.float32) -> str:
    save_file(params(seed, dtype) | {"steps": np.array(seed)}, f"{name}.safetensors")
    return f"{name}.safetensors"


def write_npz(name: str, seed: int) -> str:
    np.savez(f"{name}.npz", allow_pickle=False, **params(seed))
    return f"{name}.npz"


def tree(seed: int) -> dict[str, Any]:
    flat = params(seed)
    up = {"weight": flat["up.weight"], "bias": flat["up.bias"]}
    nested = {"embed": flat["embed"], "down": flat["down"], "up": up}
    return {"params": nested, "step": np.array(seed, np.int32)}


def write_msgpack(name: str, seed: int) -> str:
    Path(f"{name}.msgpack").write_bytes(serialization.msgpack_serialize(tree(seed)))
    return f"{name}.msgpack"


def write_orbax(name: str, seed: int) -> str:
    with ocp.StandardCheckpointer() as orbax:
        orbax.save(Path(name).resolve(), tree(seed))
    return name


def write_shards(name: str, seed: int) -> str:
    Path(name).mkdir()
    weight_map = {}
    for number, shard in enumerate((("embed", "down"), ("up.weight", "up.bias"))):
        file = f"m-{number}.safetensors"
        save_file({key: params(seed)[key] for key in shard}, Path(name) / file)
        weight_map |= dict.fromkeys(shard, file)
    index = json.dumps({"weight_map": weight_map})
    Path(name, "m.safetensors.index.json").write_text(index)
    return name


FLAT = ("--apply", "network:flat", "--input", "f32[2,6]")
NESTED = ("--apply", "network:nested", "--input", "f32[2,6]", "--subtree", "params")
FORMATS: dict[str, tuple[Callable[[str, int], str], str, tuple[str, ...]]] = {
    "safetensors": (write_safetensors, ".safetensors", FLAT),
    "npz": (write_npz, ".npz", FLAT),
    "msgpack": (write_msgpack, ".msgpack", NESTED),
    "orbax": (write_orbax, "", NESTED),
    "shards": (write_shards, "", FLAT),
}


def read_back(path: str) -> dict[str, np.ndarray]:
    """The parameters of a result by the names of `SIZES`, by other libraries' readers."""
    if path.endswith(".safetensors"):
        return load_file(path)
    if path.endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    if Path(path, "m.safetensors.index.json").exists():
        return load_file(Path(path, "m-0.safetensors")) | load_file(Path(path, "m-1.safetensors"))
    if path.endswith(".msgpack"):
        found = serialization.msgpack_restore(Path(path).read_bytes())
    else:
        with ocp.StandardCheckpointer() as orbax:
            found = orbax.restore(Path(path).resolve())
    assert set(found) == {"params", "step"}
    nested: Any = found["params"]
    up = {f"up.{name}": value for name, value in nested["up"].items()}
    return {"embed": nested["embed"], "down": nested["down"], **up}


def traced() -> otf.Symmetry:
    return otf.trace_symmetry(network().flat, params(0), jnp.ones((2, 6)))


def run(*words: str, status: int = 0) -> None:
    assert main(words) == status


def fails(capsys: pytest.CaptureFixture, *words: str) -> str:
    """Runs a command that cannot be carried out, and returns what it says."""
    run(*words, status=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    _, _, message = captured.err.partition("error: ")
    assert message
    return message


# --- what comes out is what the API gives


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("format", FORMATS)
def test_fuse_and_align_equal_the_api(format: str, folder: Path):
    write, suffix, flags = FORMATS[format]
    a, b = write("a", 0), write("b", 1)
    run("fuse", a, b, *flags, "--out", f"fused{suffix}")
    run("align", a, b, *flags, "--out", f"moved{suffix}")
    symmetry = traced()
    fused = otf.fuse(symmetry, [params(0), params(1)])
    moved = otf.transport(symmetry, otf.align(symmetry, params(0), params(1)), params(0))
    for path, expected in ((f"fused{suffix}", fused), (f"moved{suffix}", moved)):
        found = read_back(path)
        for name in SIZES:
            np.testing.assert_array_equal(found[name], expected[name])
    # Nothing but what was asked for, and the inputs are as they were.
    names = {entry.name for entry in folder.iterdir()} - {"network.py", "__pycache__"}
    results = {f"fused{suffix}", f"moved{suffix}"}
    reports = {f"{name}.report.{kind}" for name in results for kind in ("json", "md")}
    assert names == {a, b} | results | reports
    for name, value in params(0).items():
        np.testing.assert_array_equal(read_back(a)[name], value)


@pytest.mark.usefixtures("default_promotion")
def test_running_statistics_decide_nothing(folder: Path, capsys: pytest.CaptureFixture):
    """In a state dict of PyTorch they are far larger than the weights, and differ by network."""
    rng = np.random.default_rng(0)
    units = 8
    learned = {"w": (6, units), "v": (units, 5), "bn.weight": (units,), "bn.bias": (units,)}
    a = {name: rng.normal(size=shape).astype(np.float32) for name, shape in learned.items()}
    order = rng.permutation(units)
    b = {}
    for name, value in a.items():
        # safetensors writes the memory of an array, whatever its strides.
        b[name] = np.ascontiguousarray(value[order] if name == "v" else value[..., order])
    for model in (a, b):
        for name in ("bn.running_mean", "bn.running_var"):
            model[name] = rng.uniform(0, 1000, units).astype(np.float32)
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    flags = ("a.safetensors", "b.safetensors", "--apply", "network:normed", "--input", "f32[2,6]")
    run("compare", *flags, "--report", "c")
    distance = json.loads((folder / "c.report.json").read_text())["facts"]
    before = sum(np.square(a[name].astype(float) - b[name]).sum() for name in learned)
    np.testing.assert_allclose(distance["squared distance"], before)
    np.testing.assert_allclose(distance["squared distance when aligned"], 0, atol=1e-5)
    run("align", *flags, "--out", "moved.safetensors")
    capsys.readouterr()
    run("fuse", *flags, "--out", "fused.safetensors")
    # What the average of the learned parameters is, now that they are those of one network.
    for name in learned:
        np.testing.assert_allclose(load_file("fused.safetensors")[name], b[name], rtol=1e-6)
    for name in a:
        moved = a[name][order] if name == "v" else a[name][..., order]
        np.testing.assert_array_equal(load_file("moved.safetensors")[name], moved)
    # The averages of the statistics are said to be wrong, once.
    assert capsys.readouterr().err.count("update_bn") == 1
    warnings = json.loads((folder / "fused.safetensors.report.json").read_text())["warnings"]
    assert ["update_bn" in warning for warning in warnings] == [True]


@pytest.mark.usefixtures("default_promotion")
def test_a_saved_symmetry_needs_no_code(folder: Path, capsys: pytest.CaptureFixture):
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    run("inspect", a, *FLAT, "--save-symmetry", "s.json")
    saved = otf.Symmetry.from_json((folder / "s.json").read_text())
    assert "up.weight" in saved
    assert str(saved) in capsys.readouterr().out
    (folder / "network.py").unlink()
    run("fuse", a, b, "--symmetry", "s.json", "--out", "f.safetensors")
    run("compare", a, b, "--symmetry", "s.json", "--report", "c")
    assert (folder / "c.report.md").exists()
    # Names are key paths, in whichever format they are.
    for seed, name in enumerate("cd"):
        np.savez(name, allow_pickle=False, steps=np.array(seed), **params(seed))
    run("fuse", "c.npz", "d.npz", "--symmetry", "s.json", "--out", "f.npz")
    for name, array in load_file("f.safetensors").items():
        np.testing.assert_array_equal(read_back("f.npz")[name], array)


@pytest.mark.usefixtures("default_promotion")
def test_precision_weights_and_reference_are_kept():
    paths = [write_safetensors(name, seed, np.float64) for seed, name in enumerate("abc")]
    weights = ("--weight", "0.5", "--weight", "0.25", "--weight", "0.25")
    run("fuse", *paths, *FLAT, *weights, "--reference", "0", "--out", "f.safetensors")
    models = [params(seed, np.float64) for seed in range(3)]
    with jax.enable_x64(True):
        symmetry = otf.trace_symmetry(network().flat, models[0], jnp.ones((2, 6)))
        fused = otf.fuse(symmetry, models, [0.5, 0.25, 0.25], reference=0)
    found = load_file("f.safetensors")
    assert found["steps"] == 0
    assert found["steps"].dtype == np.int64
    for name in SIZES:
        assert found[name].dtype == np.float64
        np.testing.assert_array_equal(found[name], fused[name])


@pytest.mark.usefixtures("default_promotion")
def test_half_precision_is_kept():
    def half(seed):
        values = params(seed)
        return {name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()}

    for seed, name in enumerate("ab"):
        save_file(half(seed), f"{name}.safetensors", {"format": "pt"})
    run("fuse", "a.safetensors", "b.safetensors", *FLAT, "--out", "f.safetensors")
    expected = otf.fuse(traced(), [half(0), half(1)])
    found = load_file("f.safetensors")
    for name in SIZES:
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.usefixtures("default_promotion")
def test_names_with_a_separator_are_nested():
    a, b = write_npz("a", 0), write_npz("b", 1)
    flags = ("--apply", "network:nested", "--input", "f32[2,6]", "--separator", ".")
    run("fuse", a, b, *flags, "--out", "f.npz")
    fused = otf.fuse(traced(), [params(0), params(1)])
    for name in SIZES:
        np.testing.assert_array_equal(read_back("f.npz")[name], fused[name])


# --- methods, solvers and widths


@pytest.mark.usefixtures("default_promotion")
def test_methods_and_solvers_reach_the_library():
    a, b = write_npz("a", 0), write_npz("b", 1)
    symmetry = otf.trace_symmetry(network().plain, params(0), jnp.ones((2, 6)))
    forward = otf.ForwardPass()
    apply = ("--apply", "network:plain", "--input", "f32[2,6]")
    soft = ("--method", "forward", "--solver", "sinkhorn", "--epsilon", "0.1")
    for number, (flags, solver) in enumerate(
        ((("--method", "forward"), otf.Exact()), (soft, otf.Sinkhorn(epsilon=0.1)))
    ):
        run("fuse", a, b, *apply, *flags, "--out", f"f{number}.npz")
        run("align", a, b, *apply, *flags, "--out", f"m{number}.npz")
        models = [params(0), params(1)]
        fused = otf.fuse(symmetry, models, method=forward, solver=solver)
        alignment = otf.align(symmetry, *models, method=forward, solver=solver)
        moved = otf.transport(symmetry, alignment, models[0])
        for name in SIZES:
            np.testing.assert_array_equal(read_back(f"f{number}.npz")[name], fused[name])
            np.testing.assert_array_equal(read_back(f"m{number}.npz")[name], moved[name])


@pytest.mark.usefixtures("default_promotion")
def test_models_of_other_widths(folder: Path, capsys: pytest.CaptureFixture):
    wide = {"embed": (6, 10), "up.weight": (10, 14), "up.bias": (14,), "down": (14, 5)}
    rng = np.random.default_rng(2)
    model = {name: rng.normal(size=shape).astype(np.float32) for name, shape in wide.items()}
    save_file(model | {"steps": np.array(0)}, "wide.safetensors")
    b = write_safetensors("b", 1)
    apply = ("--apply", "network:plain", "--input", "f32[2,6]")
    flags = (*apply, "--other-widths")
    run("fuse", "wide.safetensors", b, *flags, "--out", "f.safetensors")
    run("align", "wide.safetensors", b, *flags, "--out", "m.safetensors")
    capsys.readouterr()
    run("compare", "wide.safetensors", b, *flags, "--json")
    shown = json.loads(capsys.readouterr().out)
    x = jnp.ones((2, 6))
    symmetries = [otf.trace_symmetry(network().plain, p, x) for p in (model, params(1))]
    fused = otf.fuse(symmetries, [model, params(1)])
    alignment = otf.align(symmetries[0], model, params(1), onto=symmetries[1])
    moved = otf.transport(symmetries[0], alignment, model, onto=symmetries[1])
    for name in SIZES:
        np.testing.assert_array_equal(load_file("f.safetensors")[name], fused[name])
        np.testing.assert_array_equal(load_file("m.safetensors")[name], moved[name])
    # The counter is that of the model whose shapes the result has.
    assert load_file("m.safetensors")["steps"] == 1
    assert set(shown["tables"]["parameters"][0]) == {"parameter", "shape", "distance when aligned"}
    assert "expected (" in fails(
        capsys, "fuse", "wide.safetensors", b, *apply, "--out", "g.safetensors"
    )
    assert not (folder / "g.safetensors").exists()


@pytest.mark.usefixtures("default_promotion")
def test_units_of_models_of_other_widths_rotate():
    wide = {"embed": (6, 8), "up.weight": (8, 7), "up.bias": (7,), "down": (7, 5)}
    rng = np.random.default_rng(2)
    model = {name: rng.normal(size=shape).astype(np.float32) for name, shape in wide.items()}
    save_file(model, "wide.safetensors")
    save_file(params(1), "b.safetensors")
    flags = ("--apply", "network:bottleneck", "--input", "f32[2,6]", "--other-widths")
    run(
        "fuse", "wide.safetensors", "b.safetensors", *flags, "--rotations", "--out", "f.safetensors"
    )
    x = jnp.ones((2, 6))
    symmetries = []
    for trained in (model, params(1)):
        symmetry = otf.trace_symmetry(network().bottleneck, trained, x)
        symmetries.append(symmetry.with_rotations())
    assert symmetries[0]["embed"].rotates
    fused = otf.fuse(symmetries, [model, params(1)])
    for name in SIZES:
        np.testing.assert_array_equal(load_file("f.safetensors")[name], fused[name])


# --- merging


MERGE = ("--apply", "network:flat", "--outputs", "values")


@pytest.mark.usefixtures("default_promotion")
def test_merge_equals_the_api(folder: Path):
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    x = np.random.default_rng(5).normal(size=(120, 6))
    np.savez("x.npz", allow_pickle=False, inputs=x)
    choice = ("--candidate", "weights", "--candidate", "as they are", "--max-samples", "100")
    flags = (*MERGE, "--data", "x.npz", *choice, "--seed", "3")
    run("merge", a, b, *flags, "--out", "m.safetensors", "--dry-run")
    assert not (folder / "m.safetensors").exists()
    run("merge", a, b, *flags, "--out", "m.safetensors")
    models = [params(seed) | {"steps": np.array(1)} for seed in (0, 1)]
    merged = otf.merge(
        network().flat,
        models,
        [x.astype(np.float32)],
        outputs="values",
        candidates=["weights", "as they are"],
        max_samples=100,
        key=jax.random.key(3),
    )
    found = load_file("m.safetensors")
    for name in SIZES:
        np.testing.assert_array_equal(found[name], merged.params[name])
    assert found["steps"] == 1
    record = json.loads((folder / "m.safetensors.report.json").read_text())
    assert (record["facts"]["inputs fitted to"], record["facts"]["inputs chosen by"]) == (50, 50)
    trials = record["tables"]["trials"]
    assert [row["score"] for row in trials] == [row.score for row in merged.report.rows]
    (chosen,) = [row for row in trials if row["chosen"]]
    assert chosen["start"] == merged.report.chosen.start
    assert "| weights | permutations |" in (folder / "m.safetensors.report.md").read_text()


@pytest.mark.usefixtures("default_promotion")
def test_merge_takes_inputs_in_their_order(capsys: pytest.CaptureFixture):
    """That of an npz, and of the names in safetensors, whose writer puts wide dtypes first."""
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    gain, x = np.ones((4, 1), np.float16), np.ones((4, 6), np.float32)
    np.savez("x.npz", allow_pickle=False, second=gain, first=x)
    save_file({"0": gain, "1": x}, "x.safetensors")
    flags = ("--apply", "network:gained", "--outputs", "values", "--dry-run")
    for data in ("x.npz", "x.safetensors"):
        # The other way round, the function would refuse the shapes.
        run("merge", a, b, *flags, "--data", data, "--out", "m.safetensors")
        assert "would merge 2 models" in capsys.readouterr().out


@pytest.mark.usefixtures("default_promotion")
def test_merge_draws_inputs_where_there_are_none(capsys: pytest.CaptureFixture):
    a, b = write_npz("a", 0), write_npz("b", 1)
    flags = (*MERGE, "--input", "f32[2,6]", "--candidate", "weights")
    run("merge", a, b, *flags, "--out", "m.npz")
    assert "merging 2 models" in capsys.readouterr().err
    assert set(read_back("m.npz")) == set(SIZES)


# --- what is said


@pytest.mark.usefixtures("default_promotion")
def test_the_report(folder: Path):
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    run("align", a, b, *FLAT, "--out", "m.safetensors")
    record = json.loads((folder / "m.safetensors.report.json").read_text())
    assert record["format"] == "otfusion_jax.report"
    assert record["command"][:2] == ["otfusion", "align"]
    facts = record["facts"]
    assert facts["squared distance after"] < facts["squared distance before"]
    assert facts["passed on as they were"] == ["steps"]
    groups = {row["group"]: row for row in record["tables"]["groups"]}
    assert groups["up.weight"]["units"] == "7"
    assert {row["file"] for row in record["tables"]["files"]} == {a, b}
    assert "Symmetry: 2 groups" in record["symmetry"]
    # The same in words, and from the same files the same to the byte.
    text = (folder / "m.safetensors.report.md").read_text()
    assert "| up.weight | 7 | permuted |" in text
    first = (folder / "m.safetensors").read_bytes()
    for path in folder.glob("m.safetensors*"):
        path.unlink()
    run("align", a, b, *FLAT, "--out", "m.safetensors")
    assert (folder / "m.safetensors").read_bytes() == first
    assert (folder / "m.safetensors.report.md").read_text() == text


@pytest.mark.usefixtures("default_promotion")
def test_a_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture):
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    before = set(folder.iterdir())
    run("fuse", a, b, *FLAT, "--out", "f.safetensors", "--dry-run", "--quiet")
    run("align", a, b, *FLAT, "--out", "f.safetensors", "--dry-run", "--quiet")
    captured = capsys.readouterr()
    assert "would fuse 2 models, and write f.safetensors" in captured.out
    assert captured.err == ""
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


@pytest.mark.usefixtures("default_promotion")
def test_inspect_and_compare_show_json(capsys: pytest.CaptureFixture):
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    run("inspect", a, "--json")
    arrays = json.loads(capsys.readouterr().out)["tables"]["arrays"]
    assert {row["name"]: row["shape"] for row in arrays}["up.weight"] == "(5, 7)"
    run("compare", a, b, "--json")
    arrays = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tables"]["arrays"]}
    assert arrays["embed"]["what"] == "differs"
    assert arrays["embed"]["distance"] > 0
    run("compare", a, b, *FLAT, "--json")
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["squared distance when aligned"] < facts["squared distance"]


@pytest.mark.usefixtures("default_promotion")
def test_check_tells_right_from_wrong(folder: Path, capsys: pytest.CaptureFixture):
    a = write_safetensors("a", 0)
    run("check", a, *FLAT)
    assert "the symmetry holds" in capsys.readouterr().out
    run("inspect", a, *FLAT, "--save-symmetry", "s.json")
    run("check", a, *FLAT, "--symmetry", "s.json")
    # The columns of one kernel alone do not move.
    record = json.loads((folder / "s.json").read_text())
    for group in record["groups"]:
        group["members"] = group["members"][:1]
    (folder / "wrong.json").write_text(json.dumps(record))
    capsys.readouterr()
    run("check", a, *FLAT, "--symmetry", "wrong.json", status=1)
    assert "THE SYMMETRY DOES NOT HOLD" in capsys.readouterr().out


@pytest.mark.usefixtures("default_promotion")
def test_a_check_of_nothing_but_nan_says_so(capsys: pytest.CaptureFixture):
    a = write_safetensors("a", 0)
    flags = ("--apply", "network:nothing", "--input", "f32[2,6]")
    assert "have NaN on random inputs" in fails(capsys, "check", a, *flags)


@pytest.mark.usefixtures("default_promotion")
def test_rotations_signs_and_scales_reach_the_library():
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    run("fuse", a, b, *FLAT, "--rotations", "--scales", "--out", "f.safetensors")
    symmetry = traced().with_rotations().with_scales()
    fused = otf.fuse(symmetry, [params(0), params(1)])
    for name in SIZES:
        np.testing.assert_array_equal(load_file("f.safetensors")[name], fused[name])


# --- what does not fit


@pytest.mark.usefixtures("default_promotion")
def test_what_does_not_fit_is_named(folder: Path, capsys: pytest.CaptureFixture):
    a = write_safetensors("a", 0)
    run("inspect", a, *FLAT, "--save-symmetry", "s.json")
    capsys.readouterr()
    good = params(1) | {"steps": np.array(1)}
    other = {"up.bias": np.ones(8, np.float32), "down": np.ones((7, 5), np.int8)}
    nan = {"embed": np.full((6, 5), np.nan, np.float32)}
    for changes, gone, expected in (
        ({"more": np.ones(3, np.float32)}, "embed", ["embed: missing", "more: not expected"]),
        (other, "", [r"up.bias: shape \(8,\), expected \(7,\)", "down: dtype int8, expected"]),
        (nan, "", ["embed: 30 of 30 values not finite"]),
    ):
        arrays = good | changes
        arrays.pop(gone, None)
        save_file(arrays, "b.safetensors")
        for command in ("fuse", "align"):
            message = fails(
                capsys,
                command,
                a,
                "b.safetensors",
                "--symmetry",
                "s.json",
                "--out",
                "f.safetensors",
            )
            assert "b.safetensors" in message
            for line in expected:
                assert re.search(line, message)
    assert not (folder / "f.safetensors").exists()


@pytest.mark.usefixtures("default_promotion")
def test_integers_that_differ_are_named(capsys: pytest.CaptureFixture):
    for seed, name in enumerate("ab"):
        save_file(params(seed) | {"table": np.full(4, seed)}, f"{name}.safetensors")
    message = fails(
        capsys, "fuse", "a.safetensors", "b.safetensors", *FLAT, "--out", "f.safetensors"
    )
    assert "integers or booleans that differ" in message
    assert "  table: int" in message


@pytest.mark.usefixtures("default_promotion")
def test_tied_arrays_are_named(capsys: pytest.CaptureFixture):
    rng = np.random.default_rng(0)
    for name in "ab":
        embed = rng.normal(size=(6, 5)).astype(np.float32)
        save_file({"embed": embed, "head": embed.copy()}, f"{name}.safetensors")
    flags = ("--apply", "network:twice", "--input", "f32[2,6]")
    run("inspect", "a.safetensors", *flags, "--save-symmetry", "s.json")
    assert "| embed | head |" in capsys.readouterr().out
    run("fuse", "a.safetensors", "b.safetensors", *flags, "--out", "f.safetensors")
    found = load_file("f.safetensors")
    np.testing.assert_array_equal(found["embed"], found["head"])
    # As PyTorch saves it: one name alone.
    save_file({"embed": load_file("b.safetensors")["embed"]}, "b.safetensors")
    capsys.readouterr()
    message = fails(
        capsys,
        *(
            "fuse",
            "b.safetensors",
            "a.safetensors",
            "--symmetry",
            "s.json",
            "--out",
            "g.safetensors",
        ),
    )
    assert "head: missing; in a.safetensors it is tied to embed" in message


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.b", "a/b"), "'a.b' and 'a/b' in x.npz are both 'a/b'"),
        (("a.b", "a"), "'a.b' in x.npz is below the array 'a'"),
        (("a" + ".a" * 10_000,), "has 10001 keys, more than any model"),
    ],
)
def test_names_that_are_no_tree(
    names: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
):
    with zipfile.ZipFile("x.npz", "w") as archive:
        for name in names:
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.ones(3, np.float32))
    flags = ("--apply", "network:flat", "--input", "f32[2,6]", "--separator", ".")
    assert message in fails(capsys, "inspect", "x.npz", *flags)


WRONG_WORDS = {
    "two or more": ("fuse", "a.safetensors", *FLAT, "--out", "f.safetensors"),
    "which axes move together is not known": ("fuse", "A", "A", "--out", "f.safetensors"),
    "both given": ("fuse", "A", "A", *FLAT, "--symmetry", "s.json", "--out", "f.safetensors"),
    "needs example inputs": ("fuse", "A", "A", "--apply", "network:flat", "--out", "f.safetensors"),
    "give package.module:function": ("inspect", "A", "--apply", "network", "--input", "f32[2]"),
    "No module named 'nowhere'": ("inspect", "A", "--apply", "nowhere:f", "--input", "f32[2]"),
    "there is no 'f' in network": ("inspect", "A", "--apply", "network:f", "--input", "f32[2]"),
    "which is no function": ("inspect", "A", "--apply", "network:number", "--input", "f32[2]"),
    "give dtype and shape": ("inspect", "A", "--apply", "network:flat", "--input", "2x3"),
    "network:wrong failed: KeyError: 'not there'\n.*network.py, line": (
        *("inspect", "A", "--apply", "network:wrong", "--input", "f32[2,6]"),
    ),
    "network:flat failed: TypeError: .*dot_general": (
        *("inspect", "A", "--apply", "network:flat", "--input", "f32[2,9]"),
    ),
    "a name that ends in .safetensors": ("fuse", "A", "A", *FLAT, "--out", "f.npz"),
    "is there already": ("fuse", "A", "A", *FLAT, "--out", "A"),
    "is no folder; make it": ("fuse", "A", "A", *FLAT, "--out", "no/f.safetensors"),
    "can't be read": ("fuse", "A", "none.safetensors", *FLAT, "--out", "f.safetensors"),
    "2 --weight .* for 3": (
        *("fuse", "A", "A", "A", *FLAT, "--out", "f.safetensors", "--weight", "1", "--weight", "0"),
    ),
    "--reference is 2, but there are 2": (
        *("fuse", "A", "A", *FLAT, "--out", "f.safetensors", "--reference", "2"),
    ),
    "no arrays below 'x/'": (
        *("fuse", "A", "A", *FLAT, "--out", "f.safetensors", "--subtree", "x"),
    ),
    "a check runs the network": ("check", "A"),
    "--other-widths needs --apply": (
        *("fuse", "A", "A", "--symmetry", "s.json", "--other-widths", "--out", "f.safetensors"),
    ),
    "--solver sinkhorn needs --method forward": (
        *("fuse", "A", "A", *FLAT, "--solver", "sinkhorn", "--out", "f.safetensors"),
    ),
    "merging takes two or more": ("merge", "A", *MERGE, "--out", "f.safetensors"),
    "merging runs the network": (
        *("merge", "A", "A", "--outputs", "values", "--out", "f.safetensors"),
    ),
    "give --data inputs.npz to choose by, or --input": (
        *("merge", "A", "A", *MERGE, "--out", "f.safetensors"),
    ),
    "--data is a.pt; give an npz": (
        *("merge", "A", "A", *MERGE, "--data", "a.pt", "--out", "f.safetensors"),
    ),
    "n in n.npz has shape \\(\\); its first axis": (
        *("merge", "A", "A", *MERGE, "--data", "n.npz", "--out", "f.safetensors"),
    ),
    "candidate .*'magic'": (
        *("merge", "A", "A", *MERGE, "--input", "f32[2,6]", "--candidate", "magic"),
        *("--out", "f.safetensors"),
    ),
    "s.json: groups is 3, expected a list": (
        *("fuse", "A", "A", "--symmetry", "s.json", "--out", "f.safetensors"),
    ),
    "may be a pickle": ("inspect", "a.pt"),
}


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("message", WRONG_WORDS)
def test_each_mistake_is_one_clear_error(message: str, folder: Path, capsys: pytest.CaptureFixture):
    a = write_safetensors("a", 0)
    broken = json.loads(traced().to_json()) | {"groups": 3}
    (folder / "s.json").write_text(json.dumps(broken))
    (folder / "a.pt").write_bytes(b"")
    np.savez("n.npz", allow_pickle=False, n=np.array(3.0))
    words = [a if word == "A" else word for word in WRONG_WORDS[message]]
    assert re.search(message, fails(capsys, *words), re.S)
    assert not list(folder.glob("f.*"))


def test_unknown_words_are_refused():
    for words in ([], ["melt"], ["fuse", "--heat"]):
        with pytest.raises(SystemExit):
            main(words)


@pytest.mark.usefixtures("default_promotion")
def test_warnings_are_in_the_report(capsys: pytest.CaptureFixture):
    for seed, name in enumerate("ab"):
        save_file(params(seed) | {"idle": np.ones(7, np.float32)}, f"{name}.safetensors")
    run("fuse", "a.safetensors", "b.safetensors", *FLAT, "--out", "f.safetensors")
    assert "warning: the function does not use these parameters" in capsys.readouterr().err
    (warning,) = json.loads(Path("f.safetensors.report.json").read_text())["warnings"]
    assert "  idle: shape (7,)" in warning


def test_names_that_a_terminal_would_obey_are_escaped(capsys: pytest.CaptureFixture):
    save_file({"\x1b[2J|\n": np.ones(3)}, "a.safetensors")
    run("inspect", "a.safetensors")
    shown = capsys.readouterr().out
    assert "| \\x1b[2J\\|\\n | (3,) |" in shown
    assert "\x1b" not in shown


# --- the process


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path])[1:]}


def test_the_library_needs_nothing_of_the_command_line():
    script = (
        "import sys\n"
        "for name in ('tyro', 'msgpack', 'safetensors', 'orbax', 'orbax.checkpoint'):\n"
        "    sys.modules[name] = None\n"
        "import otfusion_jax\n"
        "assert not [name for name in sys.modules if name.startswith('otfusion_jax.cli')]\n"
        "from otfusion_jax.cli.main import main\n"
        "sys.exit(main(['inspect', 'a.npz']))\n"
    )
    write_npz("a", 0)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 2
    assert 'needs the package tyro: pip install "otfusion-jax[cli]"' in done.stderr


# The command line, which waits once all is written, before the file is given its name.
WITHOUT_A_NAME = """
import os, sys, time

from otfusion_jax.cli.main import main


def wait(*names):
    print("written", file=sys.stderr, flush=True)
    time.sleep(60)


os.link = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("default_promotion")
def test_a_killed_command_leaves_nothing_under_the_name(folder: Path):
    a, b = write_safetensors("a", 0), write_safetensors("b", 1)
    (folder / "s.json").write_text(traced_with_steps().to_json())
    words = ["fuse", a, b, "--symmetry", "s.json", "--out", "f.safetensors"]
    command = [sys.executable, "-c", WITHOUT_A_NAME, *words]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("written"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(folder.glob("f.safetensors*"))
    run(*words)
    assert set(load_file("f.safetensors")) == {*SIZES, "steps"}


def traced_with_steps() -> otf.Symmetry:
    model = params(0) | {"steps": np.array(0)}
    return otf.trace_symmetry(network().flat, model, jnp.ones((2, 6)))


# --- the page


@pytest.mark.usefixtures("default_promotion")
def test_the_page_runs_as_written(folder: Path, capsys: pytest.CaptureFixture):
    """A block that begins with a file's name is that file; commands and what they print follow."""
    namespace = {"__name__": "__main__"}
    printed = ""
    commands = 0
    for line, language, text in fenced_blocks(PAGE.read_text()):
        if language == "python" and (match := re.match(r"# (\w+\.py)\n", text)):
            (folder / match[1]).write_text(text)
        elif language == "python":
            printed = run_block(PAGE, line, text, namespace)
        elif language == "bash" and text.startswith("otfusion"):
            capsys.readouterr()
            for command in text.replace("\\\n", " ").splitlines():
                assert main(shlex.split(command)[1:]) == 0, f"docs/files.md, line {line}"
                commands += 1
            printed = capsys.readouterr().out
        elif language == "text":
            assert printed == text, f"docs/files.md, the block at line {line}"
    assert commands == 5
