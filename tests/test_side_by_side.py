"""Checks the signs of units that lie several times along an axis, as gates that share a kernel."""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normals, uniform
from flax import linen as nn
from jax import lax

import otfusion_jax as otf
from otfusion_jax.tracing import side_by_side

pytestmark = pytest.mark.compatibility

STATE, INPUTS, STEPS = 6, 3, 4
X = uniform(STEPS, 5, INPUTS)

Params = dict[str, jax.Array]
Carry = tuple[jax.Array, jax.Array]
Step = Callable[[Params, jax.Array, jax.Array, jax.Array], Carry]
Act = Callable[[jax.Array], jax.Array]


def gated(gates: list[jax.Array], cell: jax.Array, act: Act = jnp.tanh) -> Carry:
    """What an LSTM makes of its four gates (Hochreiter and Schmidhuber, 1997)."""
    i, f, g, o = gates
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * act(g)
    return jax.nn.sigmoid(o) * act(cell), cell


def fused(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    return gated(jnp.split(x @ p["k"] + h @ p["r"] + p["b"][None], 4, -1), cell)


def of_input_and_state(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    """One kernel for inputs and states, as Haiku has it."""
    both = jnp.concatenate([x, h], -1)
    return gated(jnp.split(both @ p["k"] + p["b"][None], 4, -1), cell)


def by_rows(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    """Kernels whose rows are units, as Equinox and PyTorch have them."""
    z = p["k"] @ x.T + p["r"] @ h.T + p["b"][:, None]
    return gated([gate.T for gate in jnp.split(z, 4, 0)], cell)


def sliced(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    z = x @ p["k"] + h @ p["r"] + p["b"][None]
    return gated([z[:, n * STATE : (n + 1) * STATE] for n in range(4)], cell)


def put_together(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    """Kernels of their own that are multiplied at once, as in flax's `OptimizedLSTMCell`."""
    of_input = jnp.concatenate([p[f"k{n}"] for n in range(4)], -1)
    of_state = jnp.concatenate([p[f"r{n}"] for n in range(4)], -1)
    return gated(jnp.split(x @ of_input + h @ of_state, 4, -1), cell)


def gru(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    """Cho et al., 2014, with the reset behind the product, as in cuDNN."""
    of_input = jnp.split(x @ p["k"] + p["b"][None], 3, -1)
    of_state = jnp.split(h @ p["r"], 3, -1)
    reset = jax.nn.sigmoid(of_input[0] + of_state[0])
    update = jax.nn.sigmoid(of_input[1] + of_state[1])
    new = jnp.tanh(of_input[2] + reset * of_state[2])
    return (1 - update) * new + update * h, cell


GATES = {"k": (INPUTS, 4 * STATE), "r": (STATE, 4 * STATE), "b": (4 * STATE,)}
APART = {f"k{n}": (INPUTS, STATE) for n in range(4)} | {f"r{n}": (STATE, STATE) for n in range(4)}
CELLS: dict[str, tuple[Step, dict]] = {
    "one kernel": (fused, GATES),
    "inputs and states": (
        of_input_and_state,
        {"k": (INPUTS + STATE, 4 * STATE), "b": (4 * STATE,)},
    ),
    "rows": (by_rows, GATES | {"k": (4 * STATE, INPUTS), "r": (4 * STATE, STATE)}),
    "slices": (sliced, GATES),
    "put together": (put_together, APART),
    "GRU": (gru, {"k": (INPUTS, 3 * STATE), "r": (STATE, 3 * STATE), "b": (3 * STATE,)}),
}


def network(step: Step, shapes: dict) -> tuple[Callable, Params]:
    """A recurrent network, which reads its last state."""

    def fn(p: Params, x: jax.Array) -> jax.Array:
        zeros = jnp.zeros((x.shape[1], STATE))
        (h, _), _ = lax.scan(lambda c, x: (step(p, x, *c), None), (zeros, zeros), x)
        return h @ p["out"]

    return fn, normals(shapes | {"out": (STATE, 2)})


@pytest.mark.parametrize("name", CELLS)
def test_states_change_their_signs_where_gates_share_a_kernel(name: str):
    fn, params = network(*CELLS[name])
    symmetry = otf.trace_symmetry(fn, params, X)
    signed = symmetry.with_signs()
    (group,) = signed.groups
    assert group.signed
    assert otf.check_symmetry(signed, fn, params, X) < 1e-5
    assert otf.Symmetry.from_json(signed.to_json()) == signed
    # The leaves stay whole, and the group has the members that it has without signs.
    assert symmetry.leaf_splits == ()
    assert [m.location for m in group.members] == [m.location for m in symmetry.groups[0].members]


@pytest.mark.parametrize("name", CELLS)
def test_planted_signs_are_found(name: str):
    fn, params = network(*CELLS[name])
    symmetry = otf.trace_symmetry(fn, params, X).with_signs()
    plans = symmetry.random(jax.random.key(3))
    assert any(np.min(plan) < 0 for plan in plans.values())
    planted = otf.transport(symmetry, plans, params)
    found = otf.transport(symmetry, otf.align(symmetry, planted, params), planted)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_the_gate_behind_a_tanh_alone_is_turned():
    symmetry = otf.trace_symmetry(*network(*CELLS["one kernel"]), X).with_signs()
    odd = {(m.path, m.axis, m.location.index.start) for m in symmetry.groups[0].members if m.odd}
    behind_tanh = 2 * STATE
    assert odd == {
        *[("k", 1, behind_tanh), ("r", 1, behind_tanh), ("b", 0, behind_tanh)],
        *[("r", 0, 0), ("out", 0, 0)],
    }


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell])
def test_cells_of_flax_have_signs(cell: Callable[[int], nn.RNNCellBase]):
    model = nn.Sequential([nn.RNN(cell(STATE)), nn.Dense(2)])
    x = jnp.moveaxis(X, 0, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    flat, treedef = jax.tree.flatten(shapes)
    drawn = normals({str(n): leaf.shape for n, leaf in enumerate(flat)})
    params = treedef.unflatten([drawn[str(n)] for n in range(len(flat))])
    symmetry = otf.trace_symmetry(model.apply, params, x).with_signs()
    assert [group.signed for group in symmetry.groups] == [True]
    assert otf.check_symmetry(symmetry, model.apply, params, x) < 1e-5


def test_gated_linear_units_change_their_signs_where_both_halves_share_a_kernel():
    def fn(p: Params, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(x @ p["in"], 2, -1)
        return (jax.nn.silu(gate) * up) @ p["out"]

    params = normals({"in": (INPUTS, 16), "out": (8, 2)})
    symmetry = otf.trace_symmetry(fn, params, X[0]).with_signs()
    odd = {(m.path, m.location.index.start) for m in symmetry.groups[0].members if m.odd}
    assert odd == {("in", 8), ("out", 0)}
    assert otf.check_symmetry(symmetry, fn, params, X[0]) < 1e-5


# --- where there are none


def with_relu(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    z = x @ p["k"] + h @ p["r"] + p["b"][None]
    return gated(jnp.split(z, 4, -1), cell, jax.nn.softplus)


def with_a_constant(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    z = x @ p["k"] + h @ p["r"] + p["b"][None]
    return gated(jnp.split(z + 1.0, 4, -1), cell)


def with_a_shared_gate(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    """The number behind the tanh opens a gate as well."""
    i, f, g, o = jnp.split(x @ p["k"] + h @ p["r"] + p["b"][None], 4, -1)
    return gated([i + g, f, g, o], cell)


def with_all_rounded(p: Params, x: jax.Array, h: jax.Array, cell: jax.Array) -> Carry:
    """All gates go through a function that is neither odd nor even, before they are told apart."""
    return gated(jnp.split(jax.nn.gelu(x @ p["k"] + h @ p["r"] + p["b"][None]), 4, -1), cell)


@pytest.mark.parametrize("step", [with_relu, with_a_constant, with_a_shared_gate, with_all_rounded])
def test_states_keep_their_signs_where_something_looks_at_them(step: Step):
    fn, params = network(step, GATES)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert symmetry.with_signs() == symmetry
    assert otf.check_symmetry(symmetry, fn, params, X) < 1e-5


def test_a_segment_that_is_left_as_it_was_breaks_the_certificate(monkeypatch: pytest.MonkeyPatch):
    fn, params = network(*CELLS["one kernel"])
    found = side_by_side._turned_places

    def all_but_one(places: dict, scaling: otf.Scaling) -> set | None:
        turned = found(places, scaling)
        return turned and set(sorted(turned)[1:])

    monkeypatch.setattr(side_by_side, "_turned_places", all_but_one)
    symmetry = otf.trace_symmetry(fn, params, X).with_signs()
    assert otf.check_symmetry(symmetry, fn, params, X) > 1e-2


def test_texts_of_earlier_versions_are_read():
    fn, params = network(*CELLS["put together"])
    symmetry = otf.trace_symmetry(fn, params, X)
    record = json.loads(symmetry.to_json())
    for freedom in record["freedoms"]:
        freedom["signs"] = [{"degrees": scaling["degrees"]} for scaling in freedom["signs"]]
    read = otf.Symmetry.from_json(json.dumps(record | {"version": 3}))
    assert read == symmetry
