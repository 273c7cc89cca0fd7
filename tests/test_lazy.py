"""Checks models whose leaves are read whenever they are looked at, and alignments that go on."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from one_of_several import SHAPES, mlp
from ott.geometry import costs

import otfusion_jax as otf
from otfusion_jax.alignment.progress import Progress
from otfusion_jax.files.safetensors_format import SafetensorsLayout


def model(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed).normal
    params = {}
    for name, shape in SHAPES.items():
        params[name] = draw(size=shape).astype(jnp.bfloat16)
    return params


@pytest.fixture(scope="module")
def symmetry() -> otf.Symmetry:
    return otf.trace_symmetry(mlp, model(0), np.ones((1, 4), jnp.bfloat16))


@pytest.fixture
def stored(tmp_path) -> list[Any]:
    """Two models in files, not read."""
    checkpoints = []
    for seed in range(2):
        path = tmp_path / f"{seed}.safetensors"
        SafetensorsLayout(None).write(model(seed), path)
        checkpoints.append(otf.read_checkpoint(path, lazily=True))
    return checkpoints


@pytest.fixture
def stored_by_orbax(tmp_path) -> list[Any]:
    """The same in checkpoints of Orbax."""
    checkpoints = []
    for seed in range(2):
        path = tmp_path / f"{seed}.orbax"
        with ocp.StandardCheckpointer() as orbax:
            orbax.save(path, model(seed))
        checkpoints.append(otf.read_checkpoint(path, lazily=True))
    return checkpoints


class Counted:
    """Counts how many arrays are looked at, and how many are there at once."""

    def __init__(self, params: dict[str, Any]):
        self.looks = 0
        self.params = {
            name: otf.LazyArray(array.shape, array.dtype, self.look(array))
            for name, array in params.items()
        }

    def look(self, array: np.ndarray):
        def read() -> np.ndarray:
            self.looks += 1
            return array

        return read


@pytest.mark.parametrize("method", [otf.ForwardPass(), otf.CoordinateDescent()])
@pytest.mark.parametrize("kind", ["stored", "stored_by_orbax"])
def test_lazy_models_are_aligned_and_fused_as_others_are(symmetry, method, kind, request):
    models = [dict(checkpoint.arrays) for checkpoint in request.getfixturevalue(kind)]
    in_memory = [model(0), model(1)]
    found = otf.align(symmetry, *models, method=method)
    expected = otf.align(symmetry, *in_memory, method=method)
    for name, plan in expected.plans.items():
        np.testing.assert_array_equal(found.plans[name], plan)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6)
    fused = otf.fuse(symmetry, models, method=method)
    for name, value in otf.fuse(symmetry, in_memory, method=method).items():
        assert isinstance(fused[name], otf.LazyArray)
        np.testing.assert_array_equal(np.asarray(fused[name]), value)


def test_lazy_leaves_are_weighted(symmetry, stored):
    found, expected = (
        otf.align(symmetry, *models, leaf_weight=lambda path: 4.0 if path == "second" else 0.0)
        for models in ([dict(checkpoint.arrays) for checkpoint in stored], [model(0), model(1)])
    )
    for name, plan in expected.plans.items():
        np.testing.assert_array_equal(found.plans[name], plan)
    np.testing.assert_allclose(found.objective, expected.objective, rtol=1e-6)


def test_nothing_is_computed_before_it_is_looked_at(symmetry):
    counted = Counted(model(0))
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(0)), counted.params)
    checked = counted.looks
    averaged = otf.average([moved, moved])
    beside = counted.looks
    np.asarray(averaged["second"])
    # Values are checked as they come in; to average takes both models' leaf, and no other.
    assert (checked, beside, counted.looks) == (3, 3, 3 + 2)
    assert repr(moved["second"]) == "LazyArray(shape=(8, 12), dtype=bfloat16)"


def test_a_lazy_result_is_written_leaf_by_leaf(symmetry, stored, tmp_path):
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(0)), dict(stored[0].arrays))
    otf.write_like(stored[0], moved, tmp_path / "moved.safetensors")
    found = otf.read_checkpoint(tmp_path / "moved.safetensors").arrays
    expected = otf.transport(symmetry, symmetry.random(jax.random.key(0)), model(0))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_what_is_out_of_range_when_it_is_written_leaves_no_file(tmp_path):
    path = tmp_path / "half.safetensors"
    SafetensorsLayout(None).write({"w": np.ones(2, np.float16)}, path)
    stored = otf.read_checkpoint(path, lazily=True)
    large = otf.LazyArray((2,), np.dtype(np.float32), lambda: np.full(2, 1e6, np.float32))
    with pytest.raises(ValueError, match="w is beyond the range of float16"):
        otf.write_like(stored, {"w": large}, tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["half.safetensors"]


def test_what_takes_all_leaves_at_once_says_so(symmetry, tmp_path):
    huge = {name: np.float32(value) * np.float32(1e9) for name, value in model(0).items()}
    with pytest.raises(ValueError, match="squares would be out of range"):
        otf.align(symmetry, Counted(huge).params, Counted(huge).params)
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    with pytest.raises(ValueError, match="can't be read array by array, as safetensors and"):
        otf.read_checkpoint(tmp_path / "a.npz", lazily=True)


# --- progress


class Killed(Exception):
    """In the place of a signal."""


@pytest.fixture
def killed_after_the_first(monkeypatch) -> Iterator[None]:
    save = Progress.save

    def save_and_be_killed(self: Progress, number: int, *rest: Any) -> None:
        save(self, number, *rest)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "save", save_and_be_killed)
        yield


@pytest.mark.compatibility
def test_an_alignment_that_was_killed_goes_on(symmetry, tmp_path, killed_after_the_first):
    method = otf.ForwardPass(progress=tmp_path / "plans")
    for _ in symmetry.groups:
        with pytest.raises(Killed):
            otf.align(symmetry, model(0), model(1), method=method)
    # Each of the runs has solved one group, so that none is left.
    found = otf.align(symmetry, model(0), model(1), method=method)
    expected = otf.align(symmetry, model(0), model(1), method=otf.ForwardPass())
    for name, plan in expected.plans.items():
        np.testing.assert_array_equal(found.plans[name], plan)
        np.testing.assert_array_equal(found.gaps[name], expected.gaps[name])
    assert found.objective == expected.objective


def test_the_plans_of_another_call_are_refused(symmetry, tmp_path: Path):
    method = otf.ForwardPass(progress=tmp_path / "plans")
    pair = model(0), model(1)
    found = otf.align(symmetry, *pair, method=method)
    again = otf.align(symmetry, *pair, method=method)
    for name, plan in found.plans.items():
        np.testing.assert_array_equal(again.plans[name], plan)
    # The same two models in another order are as far apart.
    for others in [(model(0), model(2)), (model(1), model(0))]:
        with pytest.raises(ValueError, match="plans has the plans of a call with other models;"):
            otf.align(symmetry, *others, method=method)
    fewer = symmetry.only(lambda name: name != symmetry.groups[0].name)
    with pytest.raises(ValueError, match="with other symmetries;"):
        otf.align(fewer, *pair, method=method)
    one_sided = dataclasses.replace(method, unit_norm=True)
    for changed in ({"solver": otf.Sinkhorn()}, {"metric": costs.Cosine()}, {"method": one_sided}):
        with pytest.raises(ValueError, match=r"with other settings \(method, metric or solver\);"):
            otf.align(symmetry, *pair, **{"method": method, **changed})
    masses = {group.name: jnp.ones(group.size) / group.size for group in symmetry.groups}
    with pytest.raises(ValueError, match="with other grams or marginals;"):
        otf.align(symmetry, *pair, method=method, marginals=(masses, masses))
    # The same arrays in another place.
    weighted = otf.ForwardPass(progress=tmp_path / "weighted")
    otf.align(symmetry, *pair, method=weighted, marginals=(masses, {}))
    with pytest.raises(ValueError, match="with other grams or marginals;"):
        otf.align(symmetry, *pair, method=weighted, marginals=({}, masses))
    with pytest.raises(ValueError, match="outside of jax.jit alone"):
        jax.jit(lambda a, b: otf.align(symmetry, a, b, method=method))(model(0), model(1))
    with pytest.raises(TypeError, match=r"progress is 'plans'; give the pathlib\.Path"):
        otf.ForwardPass(progress=cast(Path, "plans"))
