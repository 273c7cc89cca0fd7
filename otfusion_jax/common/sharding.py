"""Arrays that are spread over the devices of a mesh, inside of a program and outside of it.

JAX lays out what a program computes by what it is given, and gathers what an operation wants whole:
to permute an axis that is spread, all of the array on every device. Here the layout of a step is
said instead, so that an array moves from device to device in pieces. It is all that a program needs
to be of one device and of many: arrays that are not spread are passed on.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree

T = TypeVar("T")


# --- inside of a program


def is_spread(x: Array) -> bool:
    """Says whether an array lies on several devices, whose collectives the compiler chooses.

    Args:
        x: An array, known or traced.

    Returns:
        False on one device, and inside of a `jax.shard_map`, where each device has its own.
    """
    return bool(_axes_of_type(x, AxisType.Auto) or _axes_of_type(x, AxisType.Explicit))


def has_explicit_axes(x: Any) -> bool:
    """Says whether an array lies on several devices, by axes that its type speaks of.

    Args:
        x: An array of JAX or NumPy, or a number.
    """
    return isinstance(x, jax.Array) and bool(_axes_of_type(x, AxisType.Explicit))


def best_axis_to_spread(x: Array, axes: Sequence[int]) -> int | None:
    """Chooses the axis along which an array can be spread over the most devices of its mesh.

    Args:
        x: A traced array.
        axes: The axes to choose from.

    Returns:
        The axis; the longest where there are several. None if there is none to spread along.
    """
    chosen, best = None, (1, 0)
    for axis in axes:
        length = x.shape[axis]
        devices = math.prod([size for _, size in _mesh_axes_for(x, length)])
        if devices > 1 and (devices, length) > best:
            chosen, best = axis, (devices, length)
    return chosen


def spread_along_one(x: Array, layout: NamedSharding | None) -> Array:
    """Spreads a traced array along one of the axes that it is spread along.

    From there it can be spread along any other axis in pieces. Of an array that is spread along two
    axes the compiler would gather all of it first.

    Args:
        x: The array, whose mesh has axes of type `Auto`, as inside of `with_auto_axes`.
        layout: How it lies there, as far as that is known.

    Returns:
        The array, equal in value.
    """
    if layout is None or not is_spread(x):
        return x
    axes = [axis for axis, names in enumerate(layout.spec) if names]
    if len(axes) < 2:
        return x
    for axis in axes:
        names = [name for name, _ in _mesh_axes_for(x, x.shape[axis])]
        along = layout.spec[axis]
        # Of the first name of the mesh all pieces stay where they are, to be divided further.
        if names and names[0] == (along if isinstance(along, str) else along[0]):
            return spread_along(x, axis)
    return x


def spread_along(x: Array, axis: int | None) -> Array:
    """Spreads a traced array over the devices of its mesh along one axis, whole along all others.

    Args:
        x: The array, whose mesh has axes of type `Auto`, as inside of `with_auto_axes`.
        axis: The axis; None leaves the array to the compiler.

    Returns:
        The array, equal in value.
    """
    if axis is None:
        return x
    names = tuple(name for name, _ in _mesh_axes_for(x, x.shape[axis]))
    spec = [None] * axis + [names]
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, sharding)


def replicated(tree: PyTree) -> PyTree:
    """Lays out traced arrays in full on every device of their mesh.

    Args:
        tree: A pytree of small arrays, such as costs and plans, with axes of type `Auto`.

    Returns:
        The pytree, equal in value.
    """
    return jax.tree.map(_replicated, tree)


def _replicated(x: Array) -> Array:
    if not _axes_of_type(x, AxisType.Auto):
        return x
    everywhere = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(x, everywhere)


def with_auto_axes(
    fn: Callable[..., T], arrays: Sequence[Array], shape: Sequence[int] | None
) -> Callable[..., T]:
    """Leaves the layouts in a function to the compiler, where the axes of a mesh are explicit.

    Args:
        fn: A function of arrays, that returns arrays.
        arrays: Traced arrays among them. Those on a mesh need not be laid out alike.
        shape: The shape of the result, which is laid out like the last of them that is on a mesh;
            None if results are to be in full on every device.

    Returns:
        A function of the same arguments.
    """
    spread = [x for x in arrays if _axes_of_type(x, AxisType.Explicit)]
    if not spread:
        return fn
    sharding = jax.typeof(spread[-1]).sharding
    spec = PartitionSpec() if shape is None else _fitting_spec(sharding, shape)
    laid_out: Any = jax.sharding.auto_axes(fn, out_sharding=NamedSharding(sharding.mesh, spec))
    return laid_out


def laid_out_as_before(
    fn: Callable[[list[Array]], list[Array]],
) -> Callable[[list[Array]], list[Array]]:
    """Leaves the layouts in a function to the compiler, where the axes of a mesh are explicit.

    Args:
        fn: A function of traced arrays, that returns one of the same shape for each.

    Returns:
        The same function. Where axes are explicit, its results are laid out as the arrays are.
    """

    def in_place(arrays: list[Array]) -> list[Array]:
        spread = [x for x in arrays if _axes_of_type(x, AxisType.Explicit)]
        if not spread:
            return fn(arrays)
        mesh = jax.typeof(spread[0]).sharding.mesh
        layouts = [NamedSharding(mesh, jax.typeof(x).sharding.spec) for x in arrays]
        laid_out: Any = jax.sharding.auto_axes(fn, out_sharding=layouts)
        return laid_out(arrays)

    return in_place


# --- outside


def on_auto_axes(tree: PyTree) -> PyTree:
    """Lays arrays out as they are, by axes that their types do not speak of.

    Args:
        tree: A pytree of arrays.

    Returns:
        The tree. Known arrays on a mesh with explicit axes are on one of the same devices with
        axes of type `Auto`, which copies nothing; all else is as it was.
    """
    return jax.tree.map(_on_auto_axes, tree)


def _on_auto_axes(x: Any) -> Any:
    layout = layout_of(x)
    # Also of a single device: its axes are explicit to a trace as well.
    if layout is None or AxisType.Explicit not in layout.mesh.axis_types:
        return x
    return _with_axis_types(x, layout, (AxisType.Auto,) * len(layout.mesh.axis_names))


def auto_axes_in_force() -> AbstractContextManager[Any]:
    """Lets functions be traced for arrays of `on_auto_axes`, also where explicit axes are in force.

    Returns:
        A context. In it, the mesh that is in force (`jax.set_mesh`) has axes of type `Auto`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return contextlib.nullcontext()
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.use_abstract_mesh(mesh.update(axis_types=axis_types))


def on_axes_in_force(tree: PyTree) -> PyTree:
    """Undoes `on_auto_axes` where explicit axes are in force.

    Args:
        tree: A pytree of arrays.

    Returns:
        The tree. Known arrays on a mesh like the one that is in force are on one with its types of
        axes, which copies nothing; all else is as it was.
    """
    return jax.tree.map(_on_axes_in_force, tree)


def _on_axes_in_force(x: Any) -> Any:
    layout = layout_of(x)
    in_force = jax.sharding.get_abstract_mesh()
    if layout is None or AxisType.Explicit not in in_force.axis_types:
        return x
    if tuple(layout.mesh.shape.items()) != tuple(in_force.shape.items()):
        return x
    return _with_axis_types(x, layout, in_force.axis_types)


def _with_axis_types(x: Any, layout: NamedSharding, axis_types: tuple[AxisType, ...]) -> Any:
    """Lays an array out as it is, on a mesh of the same devices with axes of other types."""
    devices: Any = layout.mesh.devices
    mesh = Mesh(devices, layout.mesh.axis_names, axis_types=axis_types)
    return jax.device_put(x, NamedSharding(mesh, layout.spec))


def layout_of(array: Any) -> NamedSharding | None:
    """Returns how a known array lies on a mesh.

    Args:
        array: An array of JAX or NumPy, or a number, known or traced.

    Returns:
        Its sharding; None for what is traced, and for what lies on a device without a mesh.
    """
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return None
    sharding = array.sharding
    return sharding if isinstance(sharding, NamedSharding) else None


def constrained(x: Array, layout: NamedSharding | None) -> Array:
    """Lays out a traced array.

    Args:
        x: The array.
        layout: The sharding, as `layout_of` has returned it for an array of that rank. Where a
            length is no multiple of the devices along it, it is whole. None changes nothing.

    Returns:
        The array, equal in value.
    """
    # With explicit axes the types of arrays have said it.
    if layout is None or not _axes_of_type(x, AxisType.Auto):
        return x
    mesh = jax.typeof(x).sharding.mesh
    fitting = NamedSharding(mesh, _fitting_spec(layout, x.shape))
    return jax.lax.with_sharding_constraint(x, fitting)


def laid_out_like(result: PyTree, params: PyTree) -> PyTree:
    """Gives the leaves of a result the shardings that parameters have, spelled as they are there.

    Args:
        result: A pytree of arrays.
        params: A pytree of the same structure.

    Returns:
        The result. Leaves that are traced, lazy, of another shape, or whose parameter lies on no
        mesh are passed on.
    """
    return jax.tree.map(_laid_out_like, result, params)


def _laid_out_like(x: Any, like: Any) -> Any:
    layout = layout_of(like)
    if layout is None or layout_of(x) == layout:
        return x
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or x.shape != like.shape:
        return x
    # Of the same pieces by another name, nothing is copied.
    return jax.device_put(x, layout)


# --- meshes


def _axes_of_type(x: Array, kind: AxisType) -> tuple[tuple[str, int], ...]:
    """Returns the axes of an array's mesh that are of some type and have several devices."""
    if not isinstance(x, jax.Array):
        return ()
    return _axes_of_mesh(jax.typeof(x).sharding.mesh, kind)


@functools.lru_cache(maxsize=256)
def _axes_of_mesh(mesh: Any, kind: AxisType) -> tuple[tuple[str, int], ...]:
    axes = []
    for name, size, axis_type in zip(
        mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
    ):
        if axis_type == kind and size > 1:
            axes.append((name, size))
    return tuple(axes)


def _mesh_axes_for(x: Array, length: int) -> list[tuple[str, int]]:
    """Returns those axes of an array's mesh that an axis of some length is spread over."""
    chosen = []
    devices = 1
    for name, size in _axes_of_type(x, AxisType.Auto):
        # Some devices may have more than others, but each of them has something.
        if devices * size <= length:
            chosen.append((name, size))
            devices *= size
    return chosen


def _fitting_spec(sharding: NamedSharding, shape: Sequence[int]) -> PartitionSpec:
    """Returns a spec for an array of another shape: whole where pieces would be of two sizes."""
    spec = []
    sizes = dict(sharding.mesh.shape)
    for names, length in zip(sharding.spec, shape, strict=False):
        along = (names,) if isinstance(names, str) else names or ()
        devices = math.prod([sizes[name] for name in along])
        spec.append(names if length % devices == 0 else None)
    return PartitionSpec(*spec)
