"""Checks what the trace finds against the zoo's hand-written tables, and certifies it by moving."""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo_attention  # noqa: F401, these add their networks to `CASES`
import zoo_convolution  # noqa: F401
import zoo_recurrent  # noqa: F401
from arrays import uniform
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.extend.core import Primitive
from zoo import CASES, Groups, makes, randomise, relative, rolled, rows_of, shapes, takes

import otfusion_jax as otf
from benchmarks.networks import transformer
from otfusion_jax.tracing import registry

EXACT = 1e-5
"""Of a relative change of outputs: what rounding may make in float32."""
BROKEN = 1e-3
"""What no rounding makes."""

X = uniform(4, 5)
HIDDEN = {"in": {makes("in", 1), takes("out", 0)}}


def table(symmetry: otf.Symmetry) -> Groups:
    return {g.name: rows_of(g) for g in symmetry.groups}


def groups_of(fn: Callable, params: Any, *inputs: Any) -> Groups:
    """What a trace finds, once its certificate has been checked."""
    fn = jax.jit(fn)
    symmetry = otf.trace_symmetry(fn, params, *inputs)
    assert otf.check_symmetry(symmetry, fn, params, *inputs) <= EXACT
    return table(symmetry)


def weights(**sizes: tuple[int, ...]) -> dict[str, jax.Array]:
    return randomise(shapes(**sizes), 0)


def hidden_layer(act: Callable) -> tuple[Callable, dict]:
    """A network of one hidden layer of 8, and its parameters `in` and `out`."""
    return lambda p, x: act(x @ p["in"]) @ p["out"], weights(**{"in": (5, 8), "out": (8, 3)})


@functools.cache
def traced(name: str) -> otf.Symmetry:
    case = CASES[name]()
    return otf.trace_symmetry(case.fn, case.params, *case.inputs)


# --- the zoo


@pytest.mark.compatibility
@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_of_the_table(name: str):
    case, symmetry = CASES[name](), traced(name)
    assert table(symmetry) == case.groups
    assert {g.name: (g.outer, g.batch) for g in symmetry.groups if g.batch} == case.nested
    for group in symmetry.groups:
        for m in group.members:
            leaf = symmetry.leaves[m.leaf]
            assert leaf.path == m.path
            assert leaf.shape[m.axis] == m.location.length
            positions = m.location.index.positions(group.size)
            assert len(np.unique(positions)) == positions.size
            assert positions.max() < m.location.length


@pytest.mark.compatibility
@pytest.mark.parametrize("name", CASES)
def test_moving_all_groups_at_once_changes_no_output(name: str):
    case, symmetry = CASES[name](), traced(name)
    assert otf.check_symmetry(symmetry, case.fn, case.params, *case.inputs) <= EXACT
    moved = rolled(symmetry, case.params)
    assert relative(case.fn(case.params, *case.inputs), case.fn(moved, *case.inputs)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_no_member_can_be_left_behind(name: str):
    case, symmetry = CASES[name](), traced(name)
    before = case.fn(case.params, *case.inputs)
    for i, group in enumerate(symmetry.groups):
        for member in group.members:
            rest = tuple(m for m in group.members if m != member)
            groups = list(symmetry.groups)
            groups[i] = dataclasses.replace(group, members=rest)
            moved = rolled(dataclasses.replace(symmetry, groups=tuple(groups)), case.params)
            assert relative(before, case.fn(moved, *case.inputs)) > BROKEN, (group.name, member)


@pytest.mark.parametrize("name", ["mlp", "attention", "resnet"])
def test_the_certificate_fails_on_a_wrong_symmetry(name: str):
    case, symmetry = CASES[name](), traced(name)
    for keep in (slice(1, None), slice(1)):
        groups = [dataclasses.replace(g, members=g.members[keep]) for g in symmetry.groups]
        wrong = dataclasses.replace(symmetry, groups=tuple(groups))
        assert otf.check_symmetry(wrong, case.fn, case.params, *case.inputs) > BROKEN


@pytest.mark.parametrize("name", CASES)
def test_tracing_shapes_gives_the_same_symmetry(name: str):
    case = CASES[name]()
    abstract = jax.eval_shape(lambda: (case.params, case.inputs))
    symmetry = otf.trace_symmetry(case.fn, abstract[0], *abstract[1])
    assert symmetry == traced(name)
    assert hash(symmetry) == hash(traced(name))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_size_does_not_matter(name: str, batch: int):
    case = CASES[name]()
    (x,) = case.inputs
    other = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    symmetry = otf.trace_symmetry(case.fn, case.params, other)
    assert symmetry.groups == traced(name).groups


def test_groups_come_in_dataflow_order():
    fn, sizes = CASES["mlp_plain"]().fn, (5, 9, 8, 7, 3)
    params = [(jnp.ones((n, m)), jnp.ones(m)) for n, m in zip(sizes[:-1], sizes[1:], strict=True)]
    symmetry = otf.trace_symmetry(lambda p, x: fn(p[::-1], x), params[::-1], X)
    assert [g.size for g in symmetry.groups] == [9, 8, 7]
    order = ["conv_in", "conv_a1", "conv_b1", "conv_b2"]
    assert [g.name.split("/")[1] for g in traced("resnet").groups] == order


@pytest.mark.parametrize("scanned", [False, True])
def test_a_billion_parameters_are_traced_without_an_array(scanned: bool):
    depth, width, heads = 16, 2048, 16
    fn, sizes, tokens = transformer(depth, width, heads, 50_000, scanned)
    inputs = jax.ShapeDtypeStruct(tokens, jnp.int32)
    symmetry = otf.trace_symmetry(fn, shapes(**sizes), inputs)
    assert sum(np.prod(leaf.shape) for leaf in symmetry.leaves) > 1e9
    blocks = collections.Counter((g.batch, g.size) for g in symmetry.groups)
    layers, count = ((depth,), 1) if scanned else ((), depth)
    inside = (*layers, heads)
    assert blocks == {
        ((), width): 1,
        (layers, heads): count,
        (inside, width // heads): 2 * count,
        (layers, 4 * width): count,
    }


# --- activations


ACTIVATIONS = (
    "celu elu gelu hard_sigmoid hard_silu hard_tanh identity leaky_relu log_sigmoid log_softmax "
    "mish relu relu6 selu sigmoid silu soft_sign softmax softplus sparse_plus sparse_sigmoid "
    "squareplus standardize tanh"
).split()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_the_hidden_units(name: str):
    fn, params = hidden_layer(getattr(jax.nn, name))
    assert groups_of(fn, params, X) == HIDDEN


def test_exact_gelu_and_parametric_relu():
    fn, params = hidden_layer(functools.partial(jax.nn.gelu, approximate=False))
    assert groups_of(fn, params, X) == HIDDEN

    def prelu(p, x):
        h = x @ p["in"]
        return jnp.where(h > 0, h, p["slope"][None] * h) @ p["out"]

    slope = {"slope": weights(slope=(8,))["slope"]}
    assert groups_of(prelu, params | slope, X) == {"in": HIDDEN["in"] | {makes("slope", 0)}}


def test_maxout_moves_whole_units_and_the_pieces_of_all():
    def fn(p, x):
        return (x @ p["in"]).reshape(-1, 4, 3).max(2) @ p["out"]

    assert groups_of(fn, weights(**{"in": (5, 12), "out": (4, 3)}), X) == {
        "in": {makes("in", 1, after=3), takes("out", 0)},
        "in#2": {makes("in", 1, before=4)},
    }


def test_a_gate_in_the_same_kernel_moves_with_what_it_gates():
    def fn(p, x):
        return jax.nn.glu(x @ p["in"]) @ p["out"]

    params = weights(**{"in": (5, 12), "out": (6, 3)})
    rows = {makes("in", 1), makes("in", 1, start=6), takes("out", 0)}
    assert groups_of(fn, params, X) == {"in": rows}


def test_a_gate_with_a_kernel_of_its_own_moves_along():
    def fn(p, x):
        return (jax.nn.silu(x @ p["in"]) * (x @ p["gate"])) @ p["out"]

    params = weights(**{"in": (5, 8), "gate": (5, 8), "out": (8, 3)})
    assert groups_of(fn, params, X) == {"in": HIDDEN["in"] | {makes("gate", 1)}}


# --- control flow


@jax.custom_jvp
def scaled(x):
    return 2 * jnp.tanh(x)


@scaled.defjvp
def _(primals, tangents):
    return scaled(*primals), tangents[0]


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 8) / 8


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


WRAPPED = {
    "jit": jax.jit(jnp.tanh),
    "jit in jit": jax.jit(lambda x: jax.jit(jnp.sin)(x) + 1),
    "jit with constants": jax.jit(lambda x: x + jnp.asarray(np.full((1, 8), 0.5, np.float32))),
    "custom_jvp": scaled,
    "custom_vjp": straight_through,
    "remat": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))),
    "vmap": jax.vmap(jnp.tanh),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.tanh, x),
    "cond to a constant": lambda x: jax.lax.cond(x.sum() > 9, jnp.zeros_like, jnp.tanh, x),
    "switch": lambda x: jax.lax.switch(1, [jnp.sin, jnp.tanh, jax.nn.relu], x),
    "grad": jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 3)),
    "jvp": lambda x: jax.jvp(scaled, (x,), (jnp.sin(x),))[1],
    "optimization_barrier": lambda x: sum(jax.lax.optimization_barrier((x, 2 * x))),
    "checkpoint_name": lambda x: checkpoint_name(x, "hidden"),
    "stop_gradient": jax.lax.stop_gradient,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_calls_and_branches_pass_the_units_on(name: str):
    fn, params = hidden_layer(WRAPPED[name])
    assert groups_of(fn, params, X) == HIDDEN


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: f])
def test_one_function_called_twice_does_not_couple_the_calls(wrap: Callable):
    layer = wrap(lambda w, x: jnp.tanh(x @ w))

    def fn(p, x):
        return layer(p["b"], layer(p["a"], x)) @ p["c"]

    assert groups_of(fn, weights(a=(5, 5), b=(5, 5), c=(5, 3)), X) == {
        "a": {makes("a", 1), takes("b", 0)},
        "b": {makes("b", 1), takes("c", 0)},
    }


def test_branches_tie_what_they_return():
    def fn(p, x):
        branches = [lambda h: h @ p["left"], lambda h: jnp.sin(h) @ p["right"]]
        return jax.lax.cond(x.sum() > 0, *branches, jnp.tanh(x @ p["in"])) @ p["out"]

    params = weights(**{"in": (5, 8), "left": (8, 6), "right": (8, 6), "out": (6, 3)})
    assert groups_of(fn, params, X) == {
        "in": {makes("in", 1), takes("left", 0), takes("right", 0)},
        "right": {makes("left", 1), makes("right", 1), takes("out", 0)},
    }


@pytest.mark.parametrize("branch", [0, 1])
def test_a_branch_that_orders_the_units_pins_them(branch: int):
    branches = [jnp.sin, jnp.sin]
    branches[branch] = lambda h: jnp.cumsum(h, 1)
    fn, params = hidden_layer(lambda h: jax.lax.cond(h.sum() > 0, *branches, h))
    assert groups_of(fn, params, X) == {}


def test_dead_code_constrains_nothing():
    def fn(p, x):
        h = jnp.tanh(x @ p["in"])
        jnp.cumsum(h, 1)
        jax.lax.scan(lambda c, row: (c + row, row), h[0], h)
        return h @ p["out"]

    assert groups_of(fn, hidden_layer(jnp.tanh)[1], X) == HIDDEN


def test_an_unused_result_of_a_call_constrains_nothing():
    both = jax.jit(lambda h: (jnp.cumsum(h, 1), jnp.tanh(h)))

    def fn(p, x):
        return both(x @ p["in"])[1] @ p["out"]

    assert groups_of(fn, hidden_layer(jnp.tanh)[1], X) == HIDDEN


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function whose primitive has no rule."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    del registry._registry[core.primitives.cumsum_p]
    return functools.partial(jax.lax.cumsum, axis=1)


def test_unknown_primitives_are_refused_with_source_line_and_remedies(unknown: Callable):
    def act(h):
        return unknown(h)

    fn, params = hidden_layer(act)
    with pytest.raises(otf.UnsupportedPrimitiveError) as info:
        otf.trace_symmetry(fn, params, X)
    message = str(info.value)
    line = inspect.getsourcelines(act)[1] + 1
    assert "'cumsum'" in message
    assert f"{__file__}:{line} (" in message
    for remedy in ("on_unsupported='pin'", "register", "other primitives"):
        assert remedy in message
    assert isinstance(info.value, NotImplementedError)


def test_pinning_what_is_unsupported_leaves_a_sound_rest(unknown: Callable):
    def fn(p, x):
        h = unknown(jnp.tanh(x @ p["in"]))
        return jnp.tanh(h @ p["mid"]) @ p["out"]

    fn = jax.jit(fn)
    params = weights(**{"in": (5, 8), "mid": (8, 7), "out": (7, 3)})
    symmetry = otf.trace_symmetry(fn, params, X, on_unsupported="pin")
    assert table(symmetry) == {"mid": {makes("mid", 1), takes("out", 0)}}
    assert otf.check_symmetry(symmetry, fn, params, X) <= EXACT
    reasons = {(p.path, p.axis): p.reason for p in symmetry.pinned}
    for pinned in (("in", 1), ("mid", 0)):
        assert reasons[pinned].startswith("cumsum (no rule, pinned on demand)")
        assert __file__ in reasons[pinned]


def test_other_ways_to_treat_the_unsupported_are_refused():
    bad: Any = "ignore"
    with pytest.raises(ValueError, match="'ignore'; it must be 'raise' or 'pin'"):
        otf.trace_symmetry(*hidden_layer(jnp.tanh), X, on_unsupported=bad)


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    cube = Primitive("cube")
    cube.def_impl(lambda x: x**3)
    cube.def_abstract_eval(lambda x: x)
    fn, params = hidden_layer(cube.bind)
    with pytest.raises(otf.UnsupportedPrimitiveError, match="'cube'"):
        otf.trace_symmetry(fn, params, X)

    @otf.register_rule(cube)
    def _(ctx, values):
        return [ctx.join(values)]

    symmetry = otf.trace_symmetry(fn, params, X)
    assert table(symmetry) == HIDDEN
    assert otf.check_symmetry(symmetry, fn, params, X) <= EXACT


# --- inputs, outputs, leaves


def test_inputs_and_outputs_are_pinned_and_named():
    def fn(p, batch, scale):
        h = jnp.tanh(batch["image"] @ p["in"])
        return {"class": h @ p["out"] * scale, "norm": jnp.square(h).sum(1)}

    params = hidden_layer(jnp.tanh)[1]
    symmetry = otf.trace_symmetry(fn, params, {"image": X}, jnp.ones(()))
    assert {(p.path, p.axis, p.size, p.reason) for p in symmetry.pinned} == {
        ("in", 0, 5, "tied to input 0/image, axis 1"),
        ("out", 1, 3, "tied to output 0, axis 1"),
    }
    assert table(symmetry) == HIDDEN


def test_hidden_units_that_are_put_out_are_pinned():
    def fn(p, x):
        return ((h := jnp.tanh(x @ p["in"])) @ p["out"], h)

    assert groups_of(fn, hidden_layer(jnp.tanh)[1], X) == {}


def test_outputs_that_are_summed_may_be_permuted():
    fn, params = hidden_layer(jnp.tanh)
    found = groups_of(lambda p, x: jnp.square(fn(p, x)).sum(1), params, X)
    assert found == HIDDEN | {"out": {makes("out", 1)}}


def test_a_skip_from_the_input_pins():
    def fn(p, x):
        return (x + jnp.tanh(x @ p["in"])) @ p["out"]

    assert groups_of(fn, weights(**{"in": (5, 5), "out": (5, 3)}), X) == {}


def test_a_function_without_inputs():
    def fn(p):
        return jnp.square(p["a"] @ p["b"]).sum()

    found = groups_of(fn, weights(a=(4, 3), b=(3, 5)))
    assert list(found) == ["a", "a#2", "b"]
    rows = [{makes("a", 0)}, {makes("a", 1), takes("b", 0)}, {makes("b", 1)}]
    assert all(group in rows for group in found.values())


def test_unused_leaves_are_pinned():
    fn, params = hidden_layer(jnp.tanh)
    with pytest.warns(otf.SymmetryWarning, match="spare"):
        symmetry = otf.trace_symmetry(fn, params | weights(spare=(8, 8)), X)
    reasons = {(p.path, p.axis): p.reason for p in symmetry.pinned}
    assert table(symmetry) == HIDDEN
    assert reasons["spare", 0] == reasons["spare", 1] == "not used by the function"


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.uint8])
def test_leaves_that_are_not_floating_hold_what_they_meet(dtype: Any):
    def masked(p, x):
        h = jnp.tanh(x @ p["in"]) * p["mask"].astype(jnp.float32)[None]
        return jnp.tanh(h @ p["mid"]) @ p["out"]

    params = weights(**{"in": (5, 8), "mid": (8, 7), "out": (7, 3)})
    params["mask"] = jnp.array([0, 1, 1, 0, 1, 0, 0, 1], dtype)
    assert groups_of(masked, params, X) == {"mid": {makes("mid", 1), takes("out", 0)}}
    symmetry = otf.trace_symmetry(masked, params, X)
    reasons = {(p.path, p.axis): p.reason for p in symmetry.pinned}
    assert reasons["mask", 0] == f"a leaf of dtype {params['mask'].dtype} passes untouched"
    assert reasons["in", 1] == reasons["mid", 0] == reasons["mask", 0]
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(3)), params)
    assert moved["mask"].dtype == dtype
    assert np.array_equal(moved["mask"], params["mask"])


def test_random_keys_among_the_leaves_pass_untouched():
    class Net(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(5, 8, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(1))
            self.last = nnx.Linear(8, 3, rngs=nnx.Rngs(2))

        def __call__(self, x):
            return self.last(self.drop(nnx.tanh(self.first(x))))

    graph, state = nnx.split(Net())

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    symmetry = otf.trace_symmetry(fn, state, X)
    assert [g.size for g in symmetry.groups] == [8]
    moved = otf.transport(symmetry, symmetry.random(jax.random.key(0)), state)
    assert otf.check_symmetry(symmetry, fn, state, X) <= EXACT

    def is_key(leaf):
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    old, new = (list(filter(is_key, jax.tree.leaves(tree))) for tree in (state, moved))
    assert old == new
    assert len(new) == 1


def test_complex_values_are_masked_by_a_number():
    def masked(p, x):
        kept = jnp.where(x[:, :1] > 0, x.astype(jnp.complex64) @ p["in"], 0.0)
        return jnp.real(kept @ p["out"])

    params = jax.tree.map(lambda x: jax.lax.complex(x, x[::-1]), hidden_layer(jnp.tanh)[1])
    x = jax.random.normal(jax.random.key(0), (3, params["in"].shape[0]))
    symmetry = otf.trace_symmetry(masked, params, x)
    assert [group.size for group in symmetry.groups] == [params["in"].shape[1]]
    assert otf.check_symmetry(symmetry, masked, params, x) < 1e-5


def test_complex_leaves_move():
    params = jax.tree.map(lambda x: jax.lax.complex(x, x[::-1]), hidden_layer(jnp.tanh)[1])

    def fn(p, x):
        return jnp.abs(jnp.tanh(x.astype(jnp.complex64) @ p["in"]) @ p["out"])

    assert groups_of(fn, params, X) == HIDDEN


def test_leaves_that_are_not_arrays_are_all_named():
    fn, params = hidden_layer(jnp.tanh)
    with pytest.raises(ValueError, match="not arrays") as info:
        otf.trace_symmetry(fn, params | {"name": "mlp", "act": jnp.tanh}, X)
    assert "name: str" in str(info.value)
    assert "act: " in str(info.value)


# --- constants


def test_constants_that_vary_over_the_units_pin_them():
    mask = np.arange(8, dtype=np.float32)[None]
    fn, params = hidden_layer(lambda h: h * mask)
    assert groups_of(fn, params, X) == {}
    reasons = {(p.path, p.axis): p.reason for p in otf.trace_symmetry(fn, params, X).pinned}
    reason = "a constant of shape (1, 8) that varies along axis 1"
    assert reasons["in", 1] == reasons["out", 0] == reason


def test_constants_that_do_not_vary_over_the_units_pass():
    rows = np.repeat(np.arange(4, dtype=np.float32)[:, None], 8, axis=1)
    fn, params = hidden_layer(lambda h: h * rows + np.full((1, 8), 0.3, np.float32))
    assert groups_of(fn, params, X) == HIDDEN


@pytest.mark.parametrize("within", ["closed over", "made inside"])
def test_shared_zeros_do_not_couple_two_layers(within: str):
    outside = jnp.zeros((4, 8))

    def fn(p, x):
        zeros = outside if within == "closed over" else jnp.zeros((4, 8))
        h = jnp.maximum(x @ p["a"], zeros)
        return jnp.maximum(h @ p["b"], zeros) @ p["c"]

    assert groups_of(fn, weights(a=(5, 8), b=(8, 8), c=(8, 3)), X) == {
        "a": {makes("a", 1), takes("b", 0)},
        "b": {makes("b", 1), takes("c", 0)},
    }


def test_a_traced_constant_is_taken_to_vary():
    params = hidden_layer(jnp.tanh)[1]
    found = []

    def outer(rows, units):
        for constant in (rows, units):
            fn = hidden_layer(lambda h, c=constant: h * c)[0]
            found.append(table(otf.trace_symmetry(fn, params, X)))
        return rows

    jax.eval_shape(outer, jnp.ones((4, 1)), jnp.ones((1, 8)))
    assert found == [HIDDEN, {}]
