"""Every difference between the versions of JAX that we support, 0.7.2 to 0.12, in one place.

Versions differ in which primitives there are, in which of them JAX exports, and in the names of
their parameters. Nothing here asks for the version: a primitive is found by its public name, by
tracing what emits it, or where it is defined; a parameter is told by what it is.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.extend import core

P = core.primitives


# --- finding primitives


def named(names: str) -> list[core.Primitive]:
    """Looks primitives up in JAX's public namespace.

    Args:
        names: names without the suffix `_p`, separated by blanks.

    Returns:
        Those that the installed version exports.
    """
    found = (getattr(P, f"{name}_p", None) for name in names.split())
    return [primitive for primitive in found if primitive is not None]


def traced(name: str, fn: Callable[..., Any], *args: Any) -> list[core.Primitive]:
    """Finds a primitive that JAX does not export, by tracing what emits it.

    Args:
        name: of the primitive.
        fn: a function that emits it.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The primitive. Empty in a version of JAX where the function emits others instead.
    """
    eqns = jax.make_jaxpr(fn)(*args).eqns
    return [eqn.primitive for eqn in eqns if eqn.primitive.name == name][:1]


def internal(module: str, names: str) -> list[core.Primitive]:
    """Looks up primitives that JAX neither exports nor emits from an operation that is cheap here.

    Args:
        module: where they are defined, inside of `jax._src`.
        names: names without the suffix `_p`, separated by blanks.

    Returns:
        Those that there are: a module or a name may be missing in the installed version.
    """
    try:
        home = importlib.import_module(f"jax._src.{module}")
    except ImportError:
        return []
    found = (getattr(home, f"{name}_p", None) for name in names.split())
    return [primitive for primitive in found if primitive is not None]


_X = jax.ShapeDtypeStruct((2, 2), jnp.float32)
_X3 = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
_BITS = jax.ShapeDtypeStruct((2,), jnp.uint32)
_SIZES = jax.ShapeDtypeStruct((1,), jnp.int32)
_KEY = jax.eval_shape(lambda: jax.random.key(0))

# Unary and n-ary functions of single elements that not every version has or exports.
NAME = traced("name", lambda x: checkpoint_name(x, "x"), _X)
NEW_ELEMENTWISE = [
    *NAME,
    *named("log2 one_minus_square polynomial"),
    *internal("lax.lax", "mulhi"),
]

# What returns its operands as they are: only where and how they are stored changes.
BARRIER = traced("optimization_barrier", jax.lax.optimization_barrier, _X)
CLONE = traced("random_clone", jax.random.clone, _KEY)
RELOCATIONS = [
    *BARRIER,
    *CLONE,
    *internal("pjit", "layout_constraint relayout reshard"),
    *internal("shard_alike", "shard_alike"),
    *internal("xla_metadata", "xla_metadata_value"),
]

BITCAST = traced("bitcast_convert_type", lambda x: x.view(jnp.uint32), _X)
SPLIT = traced("split", lambda x: jax.lax.split(x, (1, 1)), _X)
STACK = traced("stack", lambda x: jnp.stack([x, x]), _X)
UNSTACK = traced("unstack", jnp.unstack, _X)
TILE = traced("tile", lambda x: jnp.tile(x, (2, 2)), _X)
TIE = internal("lax.lax", "tie")
SCATTER_SUB = traced("scatter-sub", lambda x: x.at[0].subtract(1.0), _X)

# Space that is not filled yet.
EMPTY = internal("lax.lax", "empty empty2")

# Numbers that are drawn, and keys as numbers or back.
WRAP = traced("random_wrap", jax.random.wrap_key_data, _BITS)
WRAP += traced("random_unwrap", jax.random.key_data, _KEY)
NEW_RANDOM = [
    *internal("prng", "iota_2x32_shape"),
    *internal("random.prng", "iota_2x32_shape"),
    *internal("random.philox2x32", "philox2x32"),
    *internal("random.philox4x32", "philox4x32"),
    *internal("random.threefry4x32", "threefry4x32"),
]

NEW_MATRIX = internal("lax.linalg", "eigh_jacobi geqp3 geqrf ormqr symmetric_product")
PIVOTS = internal("lax.linalg", "lu_pivots_to_permutation")

# What looks at values and returns nothing.
OBSERVERS = traced("debug_print", lambda x: jax.debug.print("{}", x), _X)
OBSERVERS += traced("debug_callback", lambda x: jax.debug.callback(lambda _: None, x), _X)
OBSERVERS += internal("debugging", "inspect_sharding")
OBSERVERS += internal("checkify", "check")
OBSERVERS += internal("lax.lax", "dce_sink")

# What JAX says no more of than that it is called.
PURE_CALLBACK = traced("pure_callback", lambda x: jax.pure_callback(lambda y: y, _X, x), _X)
CHOLESKY_UPDATE = internal("lax.linalg", "cholesky_update")
OPAQUE = [
    *traced("io_callback", lambda x: io_callback(lambda y: y, _X, x), _X),
    *traced("ragged_dot_general", jax.lax.ragged_dot, _X, _X3, _SIZES),
    *traced("platform_index", lambda x: jax.lax.platform_dependent(x, default=abs), _X),
    *internal("ffi", "ffi_call"),
    *internal("buffer_callback", "buffer_callback"),
    *internal("lax.lax", "from_edtype to_edtype"),
    *internal("lax.scaled_dot", "scaled_dot"),
    *CHOLESKY_UPDATE,
]

REFERENCES = [
    *internal("core", "accum_grad_in_ref empty_ref free_ref freeze ref"),
    *internal("state.primitives", "addupdate get swap pin unpin create_linear"),
    *internal("state.discharge", "run_state"),
    *internal("hijax", "box_get box_set log_extend log_read new_box new_log"),
]
"""Primitives that make, read, write or end a mutable reference."""


# --- primitives that run a jaxpr

CALLS = [
    *named("jit remat call closed_call custom_jvp_call custom_vjp_call"),
    *traced("remat2", jax.checkpoint(jnp.sin), _X),
    *internal("lax.lax", "composite"),
    *internal("custom_batching", "custom_vmap"),
    *internal("custom_dce", "custom_dce"),
    *internal("custom_derivatives", "linear_call remat_opt"),
    *internal("compute_on", "compute_on"),
    *internal("custom_partitioning", "custom_partitioning"),
    *internal("xla_metadata", "xla_metadata_call"),
]
"""Primitives that run one jaxpr exactly once, on all of their operands."""
CALLS = list(dict.fromkeys(CALLS))  # versions differ in which of them are one and the same

HIGHER = internal("hijax", "call_hi_primitive")
"""Primitives whose implementation is a method of a parameter, in terms of other primitives."""
