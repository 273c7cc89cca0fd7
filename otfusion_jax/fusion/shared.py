"""Fusing the part that models share, where heads, vocabularies or channels of the input differ.

Each model is brought into the reference's tree: with its own leaves where these have the
reference's shapes, and with zeros elsewhere, which do not count when units are compared. Thus one
symmetry, that of the reference, serves all. Zeros have no weight in the average either, and what no
other model has is the reference's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ott.geometry import costs

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.leaf_weights import counted_by_default
from otfusion_jax.alignment.method import AbstractMethod
from otfusion_jax.averaging.average import Weights, checked_average, mixtures
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.arguments import checked_position, require_arrays, require_function
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.solvers.base import AbstractSolver
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.symmetry.checks import require_model, require_models, require_symmetry
from otfusion_jax.symmetry.folding import aligned
from otfusion_jax.symmetry.groups import Leaf, leaves_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport


class Unshared(NamedTuple):
    """A leaf of one model that had no part in a fusion.

    Attributes:
        path: The key path of the leaf.
        model: The position of the model.
        why: How it differs from the reference's, in words.
    """

    path: str
    model: int
    why: str


@dataclasses.dataclass(frozen=True)
class SharedFusion:
    """What models have in common, fused. Printed, it is a table of what was not.

    Attributes:
        params: The fused parameters, of the structure and the shapes of the reference.
        unshared: The leaves that had no part in it, model by model.
        shared: The number of leaves that were fused of two models or more.
    """

    params: PyTree
    unshared: tuple[Unshared, ...]
    shared: int

    def __str__(self) -> str:
        """Lists the leaves that were not fused, and why."""
        head = f"SharedFusion: {self.shared} of {len(leaves_of(self.params))} leaves fused"
        if not self.unshared:
            return head
        rows = [("not fused", "model", "why")]
        rows.extend((row.path, str(row.model), row.why) for row in self.unshared)
        return "\n".join([head, *aligned(rows)])


def fuse_shared(
    symmetry: Symmetry,
    models: Sequence[PyTree],
    weights: Weights = None,
    *,
    reference: int = -1,
    method: AbstractMethod = CoordinateDescent(),
    metric: costs.CostFn | None = None,
    solver: AbstractSolver = Exact(),
    leaf_weight: Callable[[str], float] | None = None,
) -> SharedFusion:
    """Fuses the part that models share; heads and vocabularies that differ are the reference's.

    Shared are leaves of one key path, shape and dtype. Leaves that the reference lacks, or has in
    another shape, count neither in the alignment nor in the average. So the reference says which
    head is kept: fuse once with each model as the reference to have one body for each of the heads.

    Args:
        symmetry: The symmetry that the reference was traced with, without rotations.
        models: The K >= 2 models, pytrees of arrays whose key paths say what corresponds.
        weights: The K weights of the models, summing to 1; uniform if None; or a function from the
            key path of a parameter of the reference to either, see `average`. For each leaf, those
            of the models that share it are divided by their sum.
        reference: The position of the model that the others are moved onto, and whose leaves are
            kept where no other has them; a negative one counts from the end.
        method: The method that aligns the models, an instance, see `align`.
        metric: The ground metric between units, see `align`.
        solver: The solver that turns costs into plans, an instance, see `align`.
        leaf_weight: A function from the key path of a parameter to how much it counts in the
            alignment, see `align`.

    Returns:
        The fused parameters, and what was not fused.

    Raises:
        ValueError: If leaves differ in the number of units (layers of another width), listing each
            by key path: these are matched by `fuse` with a list of symmetries; if a model shares
            no leaf that moves; if the reference does not fit the symmetry, or the symmetry has
            rotations; if `reference` is out of range; and as `align` and `average`.
        TypeError: As `align` and `average`.
        FloatingPointError: As `align` and `average`.

    Warns:
        StatisticsWarning: As `average`.
    """
    require_symmetry(symmetry, "fuse_shared(symmetry, models)")
    require_models(models)
    reference = checked_position(reference, "reference")
    if leaf_weight is not None:
        require_function(leaf_weight, "fuse_shared(..., leaf_weight=lambda path: 1.0)")
    if symmetry.orthogonal or symmetry.has_form:
        raise ValueError(
            "models that differ in some leaves are fused by permutations alone; pass the symmetry "
            "without with_rotations(), with_signs() and with_scales()"
        )
    count = len(models)
    if count < 2 or not -count <= reference < count:
        raise ValueError(f"reference is {reference}, and there are {count} models, of at least two")
    reference %= count
    target = models[reference]
    require_model(symmetry, target, f"model {reference}, the reference")
    shares = mixtures(weights, count, symmetry.leaves)
    unshared: list[Unshared] = []
    if leaf_weight is None:
        leaf_weight = counted_by_default(symmetry, target)
    moved, order, has = [], [], []
    for number, model in enumerate(models):
        if number == reference:
            continue
        filled = _in_tree_of(symmetry, target, model, number)
        unshared.extend(filled.unshared)
        counts = _counting_of(filled.has, leaf_weight)
        plans = align(
            symmetry,
            filled.params,
            target,
            method=method,
            metric=metric,
            solver=solver,
            leaf_weight=counts,
        )
        moved.append(transport(symmetry, plans, filled.params))
        order.append(number)
        has.append(filled.has)
    moved.append(target)
    shares = _renormalised(symmetry.leaves, shares, [*order, reference], has)
    warn_of_averaged_statistics(moved, False, shares)
    params = checked_average(symmetry.leaves, moved, shares, "fusing")
    shared = sum(any(of_model[leaf.path] for of_model in has) for leaf in symmetry.leaves)
    return SharedFusion(params, tuple(unshared), shared)


class _Filled(NamedTuple):
    """A model in the tree of the reference.

    Attributes:
        params: The parameters, zeros where the model has no leaf that fits.
        has: Whether it has a leaf that fits, by key path.
        unshared: The leaves that do not fit.
    """

    params: PyTree
    has: dict[str, bool]
    unshared: list[Unshared]


def _in_tree_of(symmetry: Symmetry, target: PyTree, model: PyTree, number: int) -> _Filled:
    """Brings a model into the tree of the reference.

    Args:
        symmetry: The symmetry of the reference.
        target: The reference.
        model: The model.
        number: Its position, for messages.

    Returns:
        The model in that tree.

    Raises:
        ValueError: If it differs in the number of units, or shares nothing that moves.
        TypeError: For shapes in place of arrays.
    """
    require_arrays(model, f"model {number}")
    try:
        known = {leaf.path: leaf for leaf in leaves_of(model)}
    except ValueError as error:
        raise ValueError(f"model {number}: {error}") from None
    own = dict(zip(known, jax.tree_util.tree_leaves(model), strict=True))
    values, has, unshared, other_widths = [], {}, [], []
    for leaf, default in zip(symmetry.leaves, jax.tree_util.tree_leaves(target), strict=True):
        found = known.pop(leaf.path, None)
        why = _difference(leaf, found)
        has[leaf.path] = why is None
        if why is None:
            values.append(own[leaf.path])
            continue
        unshared.append(Unshared(leaf.path, number, why))
        if found is not None and _differs_in_units(symmetry, leaf, found):
            other_widths.append(f"  {leaf.path}: {why}")
        values.append(jnp.zeros_like(default) if leaf.moves else default)
    if other_widths:
        raise ValueError(
            f"model {number} and the reference differ in the number of units, and not in what is "
            "pinned alone; fuse networks of several widths with a list of symmetries:\n"
            + "\n".join(other_widths)
        )
    if not any(leaf.moves and has[leaf.path] for leaf in symmetry.leaves):
        lines = [f"  {leaf.path}: {leaf.why}" for leaf in unshared]
        raise ValueError(
            f"model {number} has no leaf of the reference's key path, shape and dtype:\n"
            + "\n".join(lines)
        )
    # What is left has not been asked for.
    unshared.extend(Unshared(path, number, "not in the reference") for path in known)
    return _Filled(symmetry.treedef.unflatten(values), has, unshared)


def _difference(leaf: Leaf, found: Leaf | None) -> str | None:
    """Says how a leaf of a model differs from the reference's; None if it does not."""
    if found is None:
        return "missing"
    if found.shape != leaf.shape:
        return f"shape {found.shape}, in the reference {leaf.shape}"
    if found.dtype != leaf.dtype:
        return f"dtype {found.dtype}, in the reference {leaf.dtype}"
    return None


def _differs_in_units(symmetry: Symmetry, leaf: Leaf, found: Leaf) -> bool:
    """Whether a leaf has another length than the reference's along an axis that has units."""
    if len(found.shape) != len(leaf.shape):
        return False
    axes = set()
    for group in symmetry.groups:
        for member in group.members:
            # A part of a leaf is called after it, with an index behind.
            if member.path == leaf.path or member.path.startswith(f"{leaf.path}["):
                axes.add(member.axis)
    return any(leaf.shape[axis] != found.shape[axis] for axis in axes)


def _counting_of(
    has: dict[str, bool], leaf_weight: Callable[[str], float] | None
) -> Callable[[str], float]:
    """Returns how much a leaf counts: nothing where a model does not have it."""

    def counts(path: str) -> Any:
        if not has[path]:
            return 0.0
        return 1.0 if leaf_weight is None else leaf_weight(path)

    return counts


def _renormalised(
    leaves: Sequence[Leaf],
    shares: Sequence[Float[Array, " k"]],
    order: list[int],
    has: Sequence[dict[str, bool]],
) -> list[Float[Array, " k"]]:
    """Divides the weights of the models that have a leaf by their sum.

    Args:
        leaves: The leaves of the reference.
        shares: The weights of all models, for each leaf.
        order: The positions of the models, the reference last.
        has: For each model but the reference, whether it has a leaf, by key path.

    Returns:
        For each leaf the weights in that order. Where all that have a leaf have no weight, the
        reference has all of it.
    """
    renormalised = []
    for leaf, share in zip(leaves, shares, strict=True):
        present = jnp.array([*[of_model[leaf.path] for of_model in has], True])
        own = jnp.where(present, share[np.array(order)], 0)
        total = jnp.sum(own)
        alone = jnp.zeros_like(own).at[-1].set(1)
        safe = jnp.where(total > 0, total, 1)
        renormalised.append(jnp.where(total > 0, own / safe, alone))
    return renormalised
