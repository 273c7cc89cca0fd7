"""Checks what hides the versions of JAX from the rest, and that no primitive is overlooked.

The primitives are those of the installed JAX, so that a release with a new one fails here, by its
name, and not at a user's.
"""

import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import uniform
from jax import lax
from jax.extend import core
from zoo import makes, randomise, rows_of, shapes, takes

import otfusion_jax as otf
from otfusion_jax.tracing import jaxprs, package_rules, primitives, registry

pytestmark = pytest.mark.compatibility

X = uniform(4, 5)

# --- every primitive has a rule, or a reason why no function of a network holds it

MODULES_WITHOUT_RULES = {
    "jax._src.export.shape_poly": "arithmetic of symbolic shapes, which a trace does not have",
    "jax._src.lax.parallel": "what few bodies of `shard_map` hold; `vmap` makes others of it",
    "jax._src.pallas": "inside of kernels; a call of a kernel has a rule",
    "jax._src.thunky": "inside of programs for one kind of device, which are compiled apart",
}

PRIMITIVES_WITHOUT_RULES = {
    "after_all": "between tokens, which are no arrays",
    "call_hi_primitive_linearized": "appears when a function is linearised",
    "broadcast_to": "of a reference's view, inside of kernels",
    "create_token": "makes a token, which is no array",
    "custom_jvp_call_jaxpr": "kept by JAX for old imports, bound by nothing",
    "custom_lin": "appears when a function is linearised",
    "custom_transpose_call": "appears when a function is transposed",
    "dce_sential": "marks what may be dropped, and is dropped itself at the end of a trace",
    "eval_jaxpr": "becomes a `closed_call` when it is traced",
    "full_to_shard": "between devices, made when a partitioned program is lowered",
    "program_order": "orders effects on devices, and has no arrays",
    "reduced_vary_cast": "casts types inside of `shard_map`",
    "reduced_vary_cast_p": "casts types inside of `shard_map`",
    "shard_to_full": "between devices, made when a partitioned program is lowered",
    "stage": "happens outside of traces only",
    "unreachable": "raises an error where it is evaluated",
    "with_memory_space_constraint": "places a reference, inside of kernels",
    "xla_pmap": "runs one program on each device",
    "zeros_like": "appears when a function is differentiated",
}


def homes() -> dict[core.Primitive, list[str]]:
    """All primitives of the installed JAX, and the modules that hold each."""
    for module in pkgutil.walk_packages(importlib.import_module("jax._src").__path__, "jax._src."):
        if not module.name.startswith((*MODULES_WITHOUT_RULES, "jax._src.internal_test_util")):
            try:
                importlib.import_module(module.name)
            except (ImportError, OSError):  # of another platform, or for JAX's own tests
                continue
    found: dict[core.Primitive, list[str]] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("jax._src.") and name != "jax._src.lax":  # which exports for the others
            for value in vars(module).values():
                if isinstance(value, core.Primitive):
                    found.setdefault(value, []).append(name)
    return found


def test_every_primitive_of_this_jax_has_a_rule_or_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of JAX's modules are deprecated
        found = homes()
    assert len(found) > 200
    exported = {value for value in vars(core.primitives).values() if type(value) is core.Primitive}
    assert exported <= found.keys()
    ruled = registry.registered()
    missing = {
        f"{primitive} of {', '.join(modules)}"
        for primitive, modules in found.items()
        if primitive not in ruled
        and primitive not in primitives.REFERENCES
        and package_rules.rule_of(primitive) is None
        and str(primitive) not in PRIMITIVES_WITHOUT_RULES
        and not all(name.startswith(tuple(MODULES_WITHOUT_RULES)) for name in modules)
    }
    assert sorted(missing) == [], (
        "primitives without a rule: give each one (otfusion_jax/tracing/rules), or say in "
        "this file why no function of a network holds it"
    )


# --- references


def two_layers(op: Callable) -> tuple[Callable, dict[str, jax.Array]]:
    params = randomise(shapes(**{"in": (5, 6), "out": (6, 3)}), 1)
    return lambda p, x: op(jnp.tanh(x @ p["in"])) @ p["out"], params


def written_to_a_reference(h: jax.Array) -> jax.Array:
    ref = jax.new_ref(jnp.zeros_like(h))
    ref[...] = h
    return jnp.sin(ref[...])


def test_references_are_refused_by_name_with_a_way_out():
    fn, params = two_layers(written_to_a_reference)
    with pytest.raises(otf.UnsupportedPrimitiveError) as info:
        otf.trace_symmetry(fn, params, X)
    for words in ("'new_ref'", "test_compat.py", "mutable reference", "lax.scan", "'pin'"):
        assert words in str(info.value)


def test_axes_that_meet_references_are_pinned_on_demand():
    fn, params = two_layers(written_to_a_reference)
    assert otf.trace_symmetry(fn, params, X, on_unsupported="pin").groups == ()


# --- parameters that change names


def test_operands_of_a_scan_are_sorted_by_their_part():
    def fn(table, start, rows):
        def step(carry, row):
            first, second = carry
            return (first + row @ table, second * 2), (first, second)

        return lax.scan(step, start, rows)

    jaxpr = jax.make_jaxpr(fn)(jnp.ones((3, 2)), (jnp.ones(2), jnp.ones(())), jnp.ones((4, 3)))
    (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.primitive is core.primitives.scan_p)
    shapes_of = [atom.aval.shape for atom in eqn.invars]
    consts, carry, xs = jaxprs.scan_operands(eqn, shapes_of)
    assert consts == [(3, 2)]
    assert sorted(carry) == [(), (2,)]
    assert xs == [(4, 3)]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.custom_jvp])
def test_the_body_of_a_call_is_what_it_runs(wrap: Callable):
    fn = wrap(lambda x: jnp.sin(x) * jnp.arange(5.0)[None])
    if wrap is jax.custom_jvp:
        fn.defjvps(lambda t, _, x: t)
    (eqn,) = jax.make_jaxpr(fn)(X).eqns
    body = jaxprs.body(eqn)
    assert body is not None
    (result,) = core.jaxpr_as_fun(body)(X)
    np.testing.assert_allclose(result, jnp.sin(X) * jnp.arange(5.0)[None], rtol=1e-6)
    assert jaxprs.body(jax.make_jaxpr(jnp.sin)(X).eqns[0]) is None


def test_jaxprs_inside_of_equations_are_found():
    def fn(x):
        x = lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)
        return lax.scan(lambda c, _: (jax.jit(jnp.tanh)(c), None), x, length=2)[0]

    jaxpr = jax.make_jaxpr(fn)(X).jaxpr
    inside = [[str(eqn.primitive) for eqn in inner.eqns] for inner in jaxprs.subjaxprs(jaxpr.eqns)]
    assert sorted(inside) == [["cos"], ["jit"], ["sin"]]


# --- what the installed JAX emits


def test_clones_of_random_keys_pin_nothing_else():
    def draw(h: jax.Array) -> jax.Array:
        return h + 0 * jax.random.normal(jax.random.clone(jax.random.key(0)))

    fn, params = two_layers(draw)
    symmetry = otf.trace_symmetry(fn, params, X)
    rows = {g.name: rows_of(g) for g in symmetry.groups}
    assert rows == {"in": {makes("in", 1), takes("out", 0)}}
    assert otf.check_symmetry(symmetry, fn, params, X) < 1e-5


def test_resharding_on_an_explicit_mesh_passes_units():
    mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Explicit,))
    fn, params = two_layers(lambda h: jax.sharding.reshard(h, jax.P()))
    with jax.set_mesh(mesh):
        symmetry = otf.trace_symmetry(fn, params, X)
        assert [g.size for g in symmetry.groups] == [6]
        assert otf.check_symmetry(symmetry, fn, params, X) < 1e-5


def test_powers_and_logarithms_of_this_jax_tie_what_they_meet():
    def squash(h: jax.Array) -> jax.Array:
        return jnp.log2(2 + h) + jnp.polyval(jnp.ones(3), h) + lax.square(h)

    fn, params = two_layers(squash)
    symmetry = otf.trace_symmetry(fn, params, X)
    assert [g.size for g in symmetry.groups] == [6]
    assert otf.check_symmetry(symmetry, fn, params, X) < 1e-5


def test_lines_of_packages_that_are_installed_beside_jax_are_named():
    """As those of jaxopt or jax_md, whose names begin as JAX's own does."""
    beside = os.path.join(os.path.dirname(os.path.dirname(jax.__file__)), "jax_nets", "net.py")
    code = "import jax.numpy as jnp\ndef ranked(x):\n    return jnp.sort(x, axis=-1)\n"
    package: dict[str, Any] = {}
    exec(compile(code, beside, "exec"), package)
    params = shapes(**{"in": (5, 8), "out": (8, 3)})
    symmetry = otf.trace_symmetry(lambda p, x: package["ranked"](x @ p["in"]) @ p["out"], params, X)
    reasons = {pin.path: pin.reason for pin in symmetry.pinned if pin.size == 8}
    assert reasons["in"] == "sort along axis 1 at jax_nets/net.py:3 (ranked)"
