"""Checks models that are spread over eight devices. `test_sharding` runs it in such a process."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import otfusion_jax as otf
from otfusion_jax.alignment.leaf_programs import units_compared
from otfusion_jax.averaging.average import mean_of_column
from otfusion_jax.symmetry import transport as transporting
from otfusion_jax.symmetry.transport import move

WIDTH, HEADS, HEAD_UNITS, HIDDEN, TOKENS = 16, 8, 2, 32, 24
# Spelled as users do it: what is not said of later axes is not said in the result either.
FSDP = {
    "embed": P("fsdp"),
    "gate": P("fsdp"),
    "head": P("fsdp"),
    "norm": P("fsdp"),
    "out": P("fsdp"),
    "query": P("fsdp"),
    "value": P("fsdp"),
}
BOTH = {
    "embed": P("fsdp", "tensor"),
    "gate": P("fsdp", "tensor"),
    "head": P("tensor", "fsdp"),
    "norm": P("fsdp"),
    "out": P("tensor", None, "fsdp"),
    "query": P("fsdp", "tensor"),
    "value": P("fsdp", "tensor"),
}
MESHES = {"fsdp": (8,), "fsdp and tensor": (4, 2)}
SPECS = {"fsdp": FSDP, "fsdp and tensor": BOTH}
TOKEN_IDS = np.arange(6, dtype=np.int32)


def transformer(params: dict[str, Any], tokens: Any) -> Any:
    """A block with heads, and a gated layer after it."""
    # With explicit axes a function says where it wants its weights whole; elsewhere it need not.
    if jax.typeof(params["embed"]).sharding.spec != P(None, None):
        params = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)
    x = params["embed"][tokens]
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * params["norm"][None]
    query = jnp.einsum("td,dhk->thk", y, params["query"])
    value = jnp.einsum("td,dhk->thk", y, params["value"])
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", query, query))
    x = x + jnp.einsum("hts,shk,hkd->td", weights, value, params["out"])
    return jax.nn.silu(x @ params["gate"]) @ params["head"]


def model(seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed).normal
    heads = (WIDTH, HEADS, HEAD_UNITS)
    shapes = {"embed": (TOKENS, WIDTH), "query": heads, "value": heads}
    shapes |= {"out": (HEADS, HEAD_UNITS, WIDTH), "gate": (WIDTH, HIDDEN), "head": (HIDDEN, 8)}
    params: dict[str, Any] = {"norm": np.float32(1 + draw(size=WIDTH) / 10)}
    for name, shape in shapes.items():
        params[name] = np.float32(draw(size=shape) / 4)
    return params


@pytest.fixture(scope="module")
def pair() -> tuple[dict[str, Any], dict[str, Any]]:
    return model(0), model(1)


@pytest.fixture(scope="module")
def symmetry(pair) -> otf.Symmetry:
    return otf.trace_symmetry(transformer, pair[0], TOKEN_IDS)


def spread(params: Any, layout: str, kind: AxisType) -> Any:
    sizes = MESHES[layout]
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor")[: len(sizes)], axis_types=(kind,) * len(sizes))
    return {
        name: jax.device_put(value, NamedSharding(mesh, SPECS[layout][name]))
        for name, value in params.items()
    }


def require_equal(found: Any, expected: Any, like: Any, atol: float = 2e-6) -> None:
    """Compares values, and shardings as they are spelled."""
    for name, value in found.items():
        assert value.sharding == like[name].sharding, name
        np.testing.assert_allclose(value, expected[name], atol=atol, err_msg=name)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=repr)
CORNERS = {
    "fsdp, auto": ("fsdp", AxisType.Auto),
    "both, explicit": ("fsdp and tensor", AxisType.Explicit),
}


@pytest.mark.parametrize(("layout", "kind"), list(CORNERS.values()), ids=list(CORNERS))
def test_fused_models_lie_where_the_models_do_and_equal_those_of_one_device(
    pair, symmetry, layout, kind
):
    a, b = (spread(params, layout, kind) for params in pair)
    method = otf.CoordinateDescent(starts=("identity",))
    with jax.set_mesh(a["norm"].sharding.mesh):
        found = otf.align(symmetry, a, b, method=method)
        moved = otf.transport(symmetry, found, a)
        averaged = otf.average([moved, b])
        fused = otf.fuse(symmetry, [a, b], method=method)
        assert otf.check_symmetry(symmetry, transformer, a, TOKEN_IDS) < 1e-5
        assert otf.trace_symmetry(transformer, a, TOKEN_IDS) == symmetry
    expected = otf.align(symmetry, *pair, method=method)
    for name, plan in found.plans.items():
        np.testing.assert_array_equal(plan, expected.plans[name])
        assert plan.sharding.is_fully_replicated
    on_one = otf.transport(symmetry, expected, pair[0])
    require_equal(moved, on_one, a)
    require_equal(averaged, otf.average([on_one, pair[1]]), a)
    require_equal(fused, averaged, a)


@KINDS
@pytest.mark.parametrize("layout", list(MESHES))
def test_canonical_forms_and_moved_models_lie_where_the_models_do(pair, symmetry, layout, kind):
    a = spread(pair[0], layout, kind)
    rotating = symmetry.with_rotations()
    plans = rotating.random(jax.random.key(0))
    with jax.set_mesh(a["norm"].sharding.mesh):
        form = otf.canonicalize(rotating, a)
        moved = otf.transport(rotating, plans, form)
    on_one = otf.canonicalize(rotating, pair[0])
    require_equal(form, on_one, a)
    require_equal(moved, otf.transport(rotating, plans, on_one), a)


def relu_mlp(params: dict[str, Any], x: Any) -> Any:
    return jax.nn.relu(x @ params["in"]) @ params["out"]


@pytest.fixture(scope="module")
def mlps() -> tuple[dict[str, Any], dict[str, Any]]:
    def mlp(seed: int) -> dict[str, Any]:
        draw = np.random.default_rng(seed).normal
        shapes = {"in": (8, 16), "out": (16, 8)}
        return {name: np.float32(draw(size=shape)) for name, shape in shapes.items()}

    return mlp(0), mlp(1)


def on_mesh_by(params: dict[str, Any], specs: dict[str, P], kind: AxisType) -> dict[str, Any]:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    return {
        name: jax.device_put(value, NamedSharding(mesh, specs[name]))
        for name, value in params.items()
    }


ONE_WAY = {"in": P("fsdp"), "out": P("fsdp", "tensor")}
OTHER_WAY = {"in": P(None, "tensor"), "out": P("tensor")}


@KINDS
def test_models_that_lie_in_different_ways_are_fused_onto_the_last(mlps, kind):
    symmetry = otf.trace_symmetry(relu_mlp, mlps[0], np.ones((1, 8), np.float32))
    a, b = on_mesh_by(mlps[0], ONE_WAY, kind), on_mesh_by(mlps[1], OTHER_WAY, kind)
    expected = otf.fuse(symmetry, list(mlps))
    require_equal(otf.fuse(symmetry, [a, b]), expected, b)
    # One of the two may lie on no mesh.
    require_equal(otf.fuse(symmetry, [mlps[0], b]), expected, b)
    require_equal(otf.average([a, b]), otf.average(list(mlps)), b)
    require_equal(otf.interpolate(a, b, 0.25), otf.interpolate(mlps[0], mlps[1], 0.25), b)
    path = otf.interpolate(a, b, jnp.array([0.25, 0.5]))
    np.testing.assert_allclose(path["in"][1], otf.average(list(mlps))["in"], atol=2e-6)


@KINDS
def test_balanced_scales_and_barycenters_lie_where_the_models_do(mlps, kind):
    symmetry = otf.trace_symmetry(relu_mlp, mlps[0], np.ones((1, 8), np.float32)).with_scales()
    a, b = (on_mesh_by(params, ONE_WAY, kind) for params in mlps)
    expected = otf.canonicalize(symmetry, mlps[0])
    require_equal(otf.canonicalize(symmetry, a), expected, a)
    inside = jax.jit(lambda params: otf.canonicalize(symmetry, params))(a)
    np.testing.assert_allclose(inside["in"], expected["in"], atol=2e-6)
    require_equal(otf.fuse(symmetry, [a, b]), otf.fuse(symmetry, list(mlps)), b)
    found = otf.barycenter(symmetry, [a, b]).params
    require_equal(found, otf.barycenter(symmetry, list(mlps)).params, b)


def test_plans_inside_of_a_program_are_whole_on_every_device(mlps):
    symmetry = otf.trace_symmetry(relu_mlp, mlps[0], np.ones((1, 8), np.float32))
    a, b = (on_mesh_by(params, ONE_WAY, AxisType.Auto) for params in mlps)
    plans = jax.jit(lambda a, b: otf.align(symmetry, a, b).plans)(a, b)
    assert all(plan.sharding.is_fully_replicated for plan in plans.values())


@KINDS
@pytest.mark.parametrize("method", [otf.RestoreStatistics(), otf.LeastSquares()], ids=repr)
def test_repaired_averages_lie_where_the_models_do(pair, symmetry, kind, method):
    a, b = (spread(params, "fsdp and tensor", kind) for params in pair)
    mesh = a["norm"].sharding.mesh
    repair = functools.partial(otf.repair, symmetry, transformer, method=method)
    expected = repair(list(pair), TOKEN_IDS)
    # Steps of conjugate gradients magnify what sums in another order are rounded by.
    require = functools.partial(require_equal, expected=expected, like=a, atol=5e-5)
    require(repair([a, b], TOKEN_IDS))
    plans = symmetry.random(jax.random.key(0))
    with jax.set_mesh(mesh):
        tokens = jax.device_put(TOKEN_IDS, NamedSharding(mesh, P()))
        require(repair([a, b], tokens))
        original = otf.Original(symmetry, transformer, a, plans)
        moved = otf.transport(symmetry, plans, a)
        by_original = repair([moved, b], tokens, originals=[original, None])
    require(by_original, expected=repair([moved, b], TOKEN_IDS))


def perceptron(params: dict[str, Any], x: Any) -> Any:
    return jax.nn.relu(x @ params["in"]) @ params["out"]


def gathered(params: dict[str, Any], x: Any) -> Any:
    """Gathers its weights, as functions do that were written for explicit axes."""
    return perceptron(jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params), x)


@pytest.mark.parametrize("on_mesh", ["models", "inputs", "both"])
def test_weights_that_are_gathered_are_repaired(on_mesh):
    draw = np.random.default_rng(0).normal
    models = [
        {"in": np.float32(draw(size=(8, 16))), "out": np.float32(draw(size=(16, 8)))}
        for _ in range(2)
    ]
    x = np.float32(draw(size=(64, 8)))
    symmetry = otf.trace_symmetry(perceptron, models[0], x)
    method = otf.LeastSquares(steps=None)
    repair = functools.partial(otf.repair, symmetry, gathered, method=method)
    expected = otf.repair(symmetry, perceptron, models, x, method=method)
    assert abs(expected["out"] - otf.average(models)["out"]).max() > 0.01
    explicit = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    layout = NamedSharding(explicit, P("d"))
    given = models if on_mesh == "inputs" else jax.device_put(models, layout)
    inputs = x if on_mesh == "models" else jax.device_put(x, layout)
    # What has been prepared under one mesh does not serve under another.
    require = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
    with jax.set_mesh(explicit):
        repaired = repair(given, inputs)
    for name, leaf in repaired.items():
        require(leaf, expected[name])
        if on_mesh != "inputs":
            assert leaf.sharding == layout
        else:
            assert AxisType.Auto not in leaf.sharding.mesh.axis_types
    one = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(one):
        require(repair(models, x)["out"], expected["out"])
        on_one = jax.device_put(models, NamedSharding(one, P()))
        repaired = repair(on_one, x)
    require(repaired["out"], expected["out"])
    assert repaired["out"].sharding == on_one[0]["out"].sharding


def test_models_on_an_explicit_mesh_are_not_repaired_in_a_trace(pair, symmetry):
    explicit = spread(pair[0], "fsdp and tensor", AxisType.Explicit)

    def repaired(models):
        return otf.repair(symmetry, transformer, models, TOKEN_IDS)

    for call in (
        lambda: jax.jit(repaired)([explicit, explicit]),
        jax.jit(lambda: repaired([explicit, explicit])),
    ):
        with pytest.raises(ValueError, match=r"explicit, and repair is called inside of jax\.jit"):
            call()


# --- what devices send each other


COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute)\(")
SHAPE = re.compile(r"f32\[([\d,]*)\]")
BIG, DEVICES = 256, 8


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Returns each collective of a program, and how many weights it leaves on a device."""
    found = []
    for results, name in COLLECTIVE.findall(compiled.as_text()):
        numbers = 0
        for sizes in SHAPE.findall(results):
            numbers += math.prod([int(size) for size in sizes.split(",") if size])
        found.append((name, numbers))
    return found


def memory_of(compiled: Any) -> Any:
    """Returns what a program needs on each device."""
    return compiled.memory_analysis()


def compiled(program: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
    return jax.jit(program, **static).lower(*arguments).compile()


@pytest.fixture(scope="module", params=list(MESHES))
def kernel_and_symmetry(request) -> tuple[jax.Array, otf.Symmetry]:
    """A kernel with units along both axes, spread over both."""

    def mlp(params, x):
        hidden = jnp.tanh(x @ params["embed"])
        return jnp.tanh(hidden @ params["gate"]) @ params["head"]

    draw = np.random.default_rng(0).normal
    shapes = {"embed": (8, BIG), "gate": (BIG, BIG), "head": (BIG, 8)}
    params = {name: np.float32(draw(size=shape)) for name, shape in shapes.items()}
    symmetry = otf.trace_symmetry(mlp, params, np.ones((1, 8), np.float32))
    gate = spread({"gate": params["gate"]}, request.param, AxisType.Auto)["gate"]
    return gate, symmetry


def test_a_kernel_is_moved_without_being_gathered(kernel_and_symmetry):
    gate, symmetry = kernel_and_symmetry
    plans = symmetry.random(jax.random.key(0))
    number = [part.path for part in symmetry.parts].index("gate")
    program = compiled(
        lambda plans, gate: move(symmetry, plans, number, gate),
        plans,
        gate,
        out_shardings=gate.sharding,
    )
    found = collectives(program)
    assert "all-to-all" in {name for name, _ in found}
    # A device never has more than a few times its part, and none of the whole.
    part = gate.size // DEVICES
    assert max(numbers for _, numbers in found) <= part
    memory = memory_of(program)
    assert memory.output_size_in_bytes == 4 * part
    assert memory.temp_size_in_bytes <= 4 * part * 6


def normalised(params: dict[str, Any], x: Any) -> Any:
    """A residual block of heads and one of two layers, each behind a norm."""

    def norm(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))

    x = x @ params["embed"]
    query = jnp.einsum("td,dhk->thk", norm(x), params["query"])
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", query, query))
    x = x + jnp.einsum("hts,shk,hkd->td", weights, query, params["out"])
    return norm(x + jnp.tanh(norm(x) @ params["gate"]) @ params["down"]) @ params["head"]


@pytest.mark.parametrize(
    ("name", "layout", "spec", "rotates"),
    [
        ("query", "fsdp and tensor", P("fsdp", "tensor"), False),
        ("out", "fsdp and tensor", P("tensor", None, "fsdp"), False),
        ("gate", "fsdp", P("fsdp"), True),
        ("down", "fsdp and tensor", P("tensor", "fsdp"), True),
    ],
)
def test_kernels_of_heads_and_rotated_ones_are_moved_without_being_gathered(
    name, layout, spec, rotates
):
    draw = np.random.default_rng(0).normal
    shapes = {"embed": (8, BIG), "query": (BIG, 8, 32), "out": (8, 32, BIG)}
    shapes |= {"gate": (BIG, 2 * BIG), "down": (2 * BIG, BIG), "head": (BIG, 8)}
    params = {key: np.float32(draw(size=shape)) for key, shape in shapes.items()}
    symmetry = otf.trace_symmetry(normalised, params, np.ones((3, 8), np.float32))
    symmetry = symmetry.with_rotations() if rotates else symmetry
    mesh = jax.make_mesh(MESHES[layout], ("fsdp", "tensor")[: len(MESHES[layout])])
    kernel = jax.device_put(params[name], NamedSharding(mesh, spec))
    number = [part.path for part in symmetry.parts].index(name)
    numbered = symmetry.numbered_leaves[number]
    plans = numbered.plans(symmetry.random(jax.random.key(0)))

    def moved(plans: Any, kernel: Any) -> Any:
        return transporting._moved(numbered.structure, None, plans, kernel, kernel_layout)

    kernel_layout = kernel.sharding
    program = compiled(moved, plans, kernel)
    part = kernel.size // DEVICES
    for kind, numbers in collectives(program):
        assert numbers <= part, kind
    assert memory_of(program).output_size_in_bytes == 4 * part


def test_an_average_needs_no_collectives(kernel_and_symmetry):
    gate, _ = kernel_and_symmetry
    program = jax.jit(mean_of_column).lower((gate, gate), jnp.full(2, 0.5)).compile()
    assert not collectives(program)
    memory = memory_of(program)
    assert memory.output_size_in_bytes == gate.nbytes // DEVICES
    assert memory.temp_size_in_bytes <= 2 * gate.nbytes // DEVICES


def test_costs_are_contracted_where_the_shards_are(kernel_and_symmetry):
    gate, symmetry = kernel_and_symmetry
    number = [part.path for part in symmetry.parts].index("gate")
    structure = symmetry.numbered_leaves[number].structure
    for axis in range(2):
        compare = functools.partial(
            units_compared,
            structure,
            structure.partition,
            {},
            axis=axis,
            frozen=(),
            ratio=1.0,
            intra=False,
            norms=True,
            dtype=jnp.float32,
            layouts=(gate.sharding, gate.sharding),
        )
        program = jax.jit(compare).lower(gate, gate).compile()
        found = collectives(program)
        # The cost is added up on all devices; of the kernels, no device has more than its part.
        assert max(numbers for name, numbers in found if name == "all-reduce") >= BIG * BIG
        part = gate.size // DEVICES
        assert all(numbers <= part for name, numbers in found if name != "all-reduce")
        assert "all-gather" not in {name for name, _ in found}
        cost_bytes = 4 * BIG * BIG
        assert memory_of(program).temp_size_in_bytes <= 2 * cost_bytes + 4 * part * 8


# --- functions that speak of devices


def over_batches(params: Any, x: Any) -> Any:
    """Each device has a part of the batch, and all of the weights."""

    def body(params: Any, x: Any) -> Any:
        y = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
        return y / jax.lax.pmean(jnp.mean(y * y), "fsdp")

    run = jax.shard_map(body, mesh=ROW, in_specs=(P(), P("fsdp")), out_specs=P("fsdp"))
    return run(params, x) @ params["third"]


def over_inputs(params: Any, x: Any) -> Any:
    """Each device has a part of the first kernel, and gathers the others."""

    def body(first: Any, second: Any, x: Any) -> Any:
        whole = jax.lax.all_gather(first, "fsdp", axis=0, tiled=True)
        return jnp.tanh(jnp.tanh(x @ whole) @ second)

    specs = (P("fsdp"), P(), P("fsdp"))
    run = jax.shard_map(body, mesh=ROW, in_specs=specs, out_specs=P("fsdp"))
    return run(params["first"], params["second"], x) @ params["third"]


def over_units(params: Any, x: Any) -> Any:
    """Each device has some of the units of the first layer."""

    def body(first: Any, second: Any, x: Any) -> Any:
        return jax.lax.psum(jnp.tanh(x @ first) @ second, "fsdp")

    specs = (P(None, "fsdp"), P("fsdp"), P())
    run = jax.shard_map(body, mesh=ROW, in_specs=specs, out_specs=P())
    return jnp.tanh(run(params["first"], params["second"], x)) @ params["third"]


def constrained(params: Any, x: Any) -> Any:
    """The compiler is told where features are, and what to keep for the backward pass."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(kernel: Any, x: Any) -> Any:
        y = jnp.tanh(x @ kernel)
        return jax.lax.with_sharding_constraint(y, NamedSharding(ROW, P("fsdp")))

    return layer(params["second"], layer(params["first"], x)) @ params["third"]


ROW = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
# Units of which every device has its own may not change places.
SPEAKING = {over_batches: 2, over_inputs: 2, over_units: 1, constrained: 2}


@pytest.mark.parametrize(("fn", "count"), SPEAKING.items())
def test_functions_that_speak_of_devices_have_symmetries(fn, count):
    draw = np.random.default_rng(0).normal
    shapes = {"first": (8, 16), "second": (16, 24), "third": (24, 2)}
    params = {name: np.float32(draw(size=shape) / 3) for name, shape in shapes.items()}
    x = np.float32(draw(size=(8, 8)))
    symmetry = otf.trace_symmetry(fn, params, x)
    assert [group.size for group in symmetry.groups] == [16, 24][-count:]
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(0)), params)
    np.testing.assert_allclose(fn(moved, x), fn(params, x), atol=1e-5)


def test_what_a_device_does_with_its_part_is_followed():
    def share(stream: Any) -> Any:
        return jax.lax.psum(jnp.sum(jnp.tanh(stream)), "fsdp")

    total = jax.shard_map(share, mesh=ROW, in_specs=P("fsdp", None), out_specs=P())
    params, x = {"in": np.ones((4, 6), np.float32)}, np.ones((8, 4), np.float32)
    (freedom,) = otf.trace_symmetry(lambda p, x: total(x @ p["in"]), params, x).freedoms
    # A tanh looks at each unit.
    assert not freedom.rotates
    assert not freedom.unread_means
