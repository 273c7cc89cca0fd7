"""The primitives that differ between the supported versions of JAX, 0.7.2 to 0.12, in one place.

Versions differ in which primitives there are, and in which of them JAX exports. Nothing here asks
for the version: a primitive is found by its public name (`named`), by tracing what emits it
(`traced`), or where it is defined (`internal`). Each list below holds those that there are in the
installed version, and may be empty. Which rule they get is said in `rules`.
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
        names: Names without the suffix `_p`, separated by blanks.

    Returns:
        Those that the installed version exports, in the order of the names.
    """
    return _attributes(P, names)


def internal(module: str, names: str) -> list[core.Primitive]:
    """Looks up primitives that JAX neither exports nor emits from an operation that is cheap here.

    Args:
        module: The module inside of `jax._src` that defines them.
        names: Names without the suffix `_p`, separated by blanks.

    Returns:
        Those that there are, in the order of the names. A module or a name may be missing in the
        installed version.
    """
    try:
        home = importlib.import_module(f"jax._src.{module}")
    except ImportError:
        return []
    return _attributes(home, names)


def _attributes(module: Any, names: str) -> list[core.Primitive]:
    """Returns those of some primitives that a module has."""
    primitives = []
    for name in names.split():
        primitive = getattr(module, f"{name}_p", None)
        if primitive is not None:
            primitives.append(primitive)
    return primitives


def traced(name: str, fn: Callable[..., Any], *args: Any) -> list[core.Primitive]:
    """Finds a primitive that JAX does not export, by tracing what emits it.

    Args:
        name: The name of the primitive.
        fn: A function that emits it.
        *args: The function's arguments, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The primitive. Empty in a version of JAX where the function emits others instead.
    """
    for eqn in jax.make_jaxpr(fn)(*args).eqns:
        if eqn.primitive.name == name:
            return [eqn.primitive]
    return []


# Shapes alone: what is traced below is never run.
_X = jax.ShapeDtypeStruct((2, 2), jnp.float32)
_X3 = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
_BITS = jax.ShapeDtypeStruct((2,), jnp.uint32)
_SIZES = jax.ShapeDtypeStruct((1,), jnp.int32)
_KEY = jax.eval_shape(lambda: jax.random.key(0))


# --- elementwise operations, and moves of whole arrays

NAME = traced("name", lambda x: checkpoint_name(x, "x"), _X)
NEW_ELEMENTWISE = [
    *NAME,
    *named("log2 one_minus_square polynomial"),
    *internal("lax.lax", "mulhi"),
]
"""Functions of single elements that not every version has or exports."""

BARRIER = traced("optimization_barrier", jax.lax.optimization_barrier, _X)
CLONE = traced("random_clone", jax.random.clone, _KEY)
RELOCATIONS = [
    *named("device_put sharding_constraint"),
    *BARRIER,
    *CLONE,
    *internal("pjit", "layout_constraint relayout reshard"),
    *internal("shard_alike", "shard_alike"),
    *internal("xla_metadata", "xla_metadata_value"),
]
"""What returns its operands as they are: only where and how they are stored changes."""

TIE = internal("lax.lax", "tie")

SHARD_MAP = internal("shard_map", "shard_map")
"""What runs a jaxpr on every device, on the part of its operands that is there."""

SUMMED_OVER_DEVICES = internal("lax.parallel", "psum_invariant")
"""A sum that is the same on all devices afterwards, as `psum` has become inside of `shard_map`."""

VARYING = [*internal("lax.parallel", "ppermute"), *internal("core", "pvary")]
"""What returns its operand as it is, or as another device has it."""

ALL_GATHER = internal("lax.parallel", "all_gather all_gather_invariant")
"""What puts the parts of an array on all devices together along one of its axes."""

EXCHANGE = internal("lax.parallel", "all_to_all reduce_scatter")
"""What gives each device parts of what the others have along one of its axes."""

EMPTY = internal("lax.lax", "empty empty2")
"""What makes an array that is not filled yet."""


# --- operations on shapes and positions

BITCAST = traced("bitcast_convert_type", lambda x: x.view(jnp.uint32), _X)
SPLIT = traced("split", lambda x: jax.lax.split(x, (1, 1)), _X)
STACK = traced("stack", lambda x: jnp.stack([x, x]), _X)
UNSTACK = traced("unstack", jnp.unstack, _X)
TILE = traced("tile", lambda x: jnp.tile(x, (2, 2)), _X)
SCATTER_SUB = traced("scatter-sub", lambda x: x.at[0].subtract(1.0), _X)


# --- random numbers and linear algebra

WRAP = [
    *traced("random_wrap", jax.random.wrap_key_data, _BITS),
    *traced("random_unwrap", jax.random.key_data, _KEY),
]
"""What makes keys of numbers, and numbers of keys."""

NEW_RANDOM = [
    *internal("prng", "iota_2x32_shape"),
    *internal("random.prng", "iota_2x32_shape"),
    *internal("random.philox2x32", "philox2x32"),
    *internal("random.philox4x32", "philox4x32"),
    *internal("random.threefry4x32", "threefry4x32"),
]
"""Generators of random numbers that not every version has."""

NEW_MATRIX = internal("lax.linalg", "eigh_jacobi geqp3 geqrf ormqr symmetric_product")
"""What decompositions are made of, on which not all versions agree."""

RAGGED_DOT = traced("ragged_dot_general", jax.lax.ragged_dot, _X, _X3, _SIZES)
"""A product of rows with matrices, one for each group of rows, as of tokens with their experts."""

PIVOTS = internal("lax.linalg", "lu_pivots_to_permutation")
CHOLESKY_UPDATE = internal("lax.linalg", "cholesky_update")


# --- what JAX says little of

OBSERVERS = [
    *traced("debug_print", lambda x: jax.debug.print("{}", x), _X),
    *traced("debug_callback", lambda x: jax.debug.callback(lambda _: None, x), _X),
    *internal("debugging", "inspect_sharding"),
    *internal("checkify", "check"),
    *internal("lax.lax", "dce_sink"),
]
"""What looks at values and returns nothing."""

PURE_CALLBACK = traced("pure_callback", lambda x: jax.pure_callback(lambda y: y, _X, x), _X)

OPAQUE = [
    *traced("io_callback", lambda x: io_callback(lambda y: y, _X, x), _X),
    *traced("platform_index", lambda x: jax.lax.platform_dependent(x, default=abs), _X),
    *internal("ffi", "ffi_call"),
    *internal("lax.parallel", "axis_index ragged_all_to_all"),
    *internal("buffer_callback", "buffer_callback"),
    *internal("lax.lax", "from_edtype to_edtype"),
    *internal("lax.scaled_dot", "scaled_dot"),
    *CHOLESKY_UPDATE,
]
"""What is known to be called and no more, or what a rule has yet to be written for."""

REFERENCES = [
    *internal("core", "accum_grad_in_ref empty_ref free_ref freeze ref"),
    *internal("state.primitives", "addupdate get swap pin unpin create_linear"),
    *internal("state.discharge", "run_state"),
    *internal("hijax", "box_get box_set log_extend log_read new_box new_log"),
]
"""Primitives that make, read, write or end a mutable reference."""


# --- primitives that run a jaxpr

_CALLS = [
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
# Versions differ in which of them are one and the same.
CALLS = list(dict.fromkeys(_CALLS))
"""Primitives that run one jaxpr exactly once, on all of their operands."""

EQUALITY = named("eq ne")
"""Primitives that say whether two numbers are equal: all that positions may be asked."""

DERIVED_BY_RULE = named("custom_jvp_call custom_vjp_call")
"""Those of them that have a derivative of their own, which need not be that of the jaxpr."""

HIGHER = internal("hijax", "call_hi_primitive")
"""Primitives whose implementation is a method of a parameter, in terms of other primitives."""
