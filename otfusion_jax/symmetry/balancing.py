"""Positive scales of units: by how much to multiply what produces them and divide what reads them.

A unit of a ReLU may be multiplied by any positive number, if the weights that read it are divided
by it. What is left of this freedom is nothing once a model has the smallest weights that compute
its function: then the weights that produce a unit have the same norm as those that read it. This
is convex in the logarithms of the scales, so that there is one such model, and it is found by going
from group to group until nothing changes.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from otfusion_jax.common.host import accumulation_dtype
from otfusion_jax.common.sharding import laid_out_as_before
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.blocks import mixed, multiplied
from otfusion_jax.symmetry.groups import Fold, Freedom, Group, Scaling
from otfusion_jax.symmetry.leaf_structure import LeafStructure, UnitAxis
from otfusion_jax.symmetry.rotation import random_rotation
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.units import units_in

MOST_SWEEPS = 1000
"""How often to go over all groups at most."""

SMALLEST_CHANGE = 1e-6
"""Of the logarithm of a scale: less is rounding, and balancing has come to its end."""

LARGEST_ROUNDING = 1e-4
"""Of an entry of a matrix: what changes by more has not come to its end."""

ROUNDS = 300
"""How often to balance scales and matrices in turn at most, where these meet in one parameter."""

SMALLEST_SHARE = 1e-4
"""Of the largest singular value of a side of a pair: with a smaller one, it is not balanced."""


Members = tuple[tuple[int, int], ...]
"""Leaves, by their positions in `Symmetry.parts`, each with an axis of it."""


class Balance(NamedTuple):
    """A scaling whose smallest weights are known in a formula.

    Attributes:
        group: The group whose units are scaled, by a number each, or if it rotates by a matrix.
        up: The leaves and axes that are multiplied by powers of the scale, all by one power.
        down: Those that are divided by a power of it, likewise. Of a matrix, they are multiplied by
            its inverse transpose.
        powers: These two powers, both positive; 1 and 1 for matrices.
    """

    group: Group
    up: Members
    down: Members
    powers: tuple[int, int]


def balances_of(symmetry: Symmetry) -> list[Balance]:
    """Lists the scalings by which weights are balanced.

    Args:
        symmetry: The symmetry.

    Returns:
        Those with one power up and one down. Of others, as of weights that a normalisation follows,
        smaller weights have no end, or are in no formula: they stay as they are. So do those by
        which a scale that is made 1 would be another one again.
    """
    balances = []
    for group, freedom in _scaled_groups(symmetry):
        for scaling in freedom.scales:
            if _undoes_a_fold(scaling, freedom.folds):
                continue
            up = {degree for *_, degree in scaling.degrees if degree > 0}
            down = {-degree for *_, degree in scaling.degrees if degree < 0}
            if len(up) == len(down) == 1:
                rising = [(leaf, axis) for leaf, axis, degree in scaling.degrees if degree > 0]
                falling = [(leaf, axis) for leaf, axis, degree in scaling.degrees if degree < 0]
                powers = up.pop(), down.pop()
                balances.append(Balance(group, tuple(rising), tuple(falling), powers))
    return balances


def _undoes_a_fold(scaling: Scaling, folds: Sequence[Fold]) -> bool:
    """Whether a scaling changes a scale that is made 1 at the cost of what it does not balance.

    To make it 1 and to balance it, again and again, would come to no end.
    """
    members = {leaf for leaf, *_ in scaling.degrees}
    for fold in folds:
        changed = {leaf for leaf, *_ in fold.others}
        if fold.leaf in members and not changed <= members:
            return True
    return False


def _scaled_groups(symmetry: Symmetry) -> list[tuple[Group, Freedom]]:
    """Lists the groups that are scaled, with what they may do."""
    found = []
    for freedom in symmetry.freedoms:
        if freedom.group in symmetry and symmetry[freedom.group].scaled:
            found.append((symmetry[freedom.group], freedom))
    return found


def balanced(symmetry: Symmetry, params: PyTree) -> PyTree:
    """Scales units so that the weights that produce them and those that read them have one norm.

    Args:
        symmetry: The symmetry. Only groups that are scaled change.
        params: Parameters that fit.

    Returns:
        The parameters of the smallest norm that units can be scaled to. Units that nothing
        produces, or that nothing reads, stay as they are.
    """
    balances = balances_of(symmetry)
    if not balances:
        return params
    # Only what changes goes into the program, and comes out: the rest may be of any dtype.
    arrays = symmetry.split(params)
    touched = {leaf for item in balances for leaf, _ in (*item.up, *item.down)}
    leaves = tuple(sorted(touched))
    changed = _balanced(symmetry, leaves, [jnp.asarray(arrays[leaf]) for leaf in leaves])
    for leaf, array in zip(leaves, changed, strict=True):
        arrays[leaf] = array
    return symmetry.join(arrays)


@functools.partial(jax.jit, static_argnames=("symmetry", "leaves"))
def _balanced(symmetry: Symmetry, leaves: tuple[int, ...], arrays: list[Array]) -> list[Array]:
    """Balances the leaves that are touched, see `balanced`."""
    return laid_out_as_before(functools.partial(_balance, symmetry, leaves))(arrays)


def _balance(symmetry: Symmetry, leaves: tuple[int, ...], arrays: list[Array]) -> list[Array]:
    pairs, units = _divided(balances_of(symmetry))
    original = dict(zip(leaves, arrays, strict=True))
    # In half precision a factor may be out of range where the product is not; and all in one
    # precision, as the scales of one group depend on those of the others.
    precisions = [jnp.finfo(accumulation_dtype(array.dtype)).dtype for array in arrays]
    dtype = max(precisions, key=lambda precision: precision.itemsize)
    wide = {}
    for leaf, array in original.items():
        is_complex = jnp.iscomplexobj(array)
        wide[leaf] = array.astype(np.result_type(dtype, np.complex64) if is_complex else dtype)

    # Each round begins with the parameters themselves, so that these are rounded once, however
    # many rounds there are: what is rounded in each changes the scales a little, not the function.
    def again(carry: tuple[_Scales, Array, Array, Array]) -> tuple[_Scales, Array, Array, Array]:
        before, last_change, _, number = carry
        by_leaf = _scaled(symmetry, pairs, units, before, wide)
        after, change = _round(symmetry, pairs, units, before, by_leaf)
        return after, change, last_change, number + 1

    def is_unfinished(carry: tuple[_Scales, Array, Array, Array]) -> Array:
        _, change, last_change, number = carry
        # Of large matrices, rounding is more than the smallest change: then it falls no more.
        still_falls = (change < last_change) | (change > LARGEST_ROUNDING)
        return (change > SMALLEST_CHANGE) & still_falls & (number < ROUNDS)

    scales = _no_scales(pairs, units, dtype)
    # Where none of these meets another, each has one solution that does not depend on the others.
    in_pairs = [leaf for pair in pairs for leaf, _ in (*pair.up, *pair.down)]
    in_units = {leaf for item in units for leaf, _ in (*item.up, *item.down)}
    if len(set(in_pairs)) == len(in_pairs) and not in_units.intersection(in_pairs):
        scales, _ = _round(symmetry, pairs, units, scales, wide)
    else:
        start = (
            scales,
            jnp.array(jnp.inf, jnp.float32),
            jnp.array(jnp.inf, jnp.float32),
            jnp.array(0),
        )
        scales, *_ = jax.lax.while_loop(is_unfinished, again, start)
    changed = _scaled(symmetry, pairs, units, scales, wide)
    return [changed[leaf].astype(original[leaf].dtype) for leaf in leaves]


class _Scales(NamedTuple):
    """By what the units of all balances are multiplied.

    Attributes:
        logs: Logarithms of scales, for each whose units are scaled one by one, `[*batch, n]`.
        matrices: The matrix of each that is scaled by one, `[*batch, n, n]`.
        inverses: The inverses of these, as far as rounding lets them be.
    """

    logs: list[Array]
    matrices: list[Array]
    inverses: list[Array]


def _no_scales(pairs: list[Balance], units: list[Balance], dtype: Any) -> _Scales:
    """Returns the scales that change nothing, of some dtype."""
    logs = []
    for balance in units:
        logs.append(jnp.zeros((*balance.group.batch, balance.group.size), dtype))
    matrices = []
    for pair in pairs:
        shape = (*pair.group.batch, pair.group.size, pair.group.size)
        matrices.append(_identities(shape, dtype))
    return _Scales(logs, matrices, matrices)


def _round(
    symmetry: Symmetry,
    pairs: list[Balance],
    units: list[Balance],
    scales: _Scales,
    by_leaf: dict[int, Array],
) -> tuple[_Scales, Array]:
    """Balances all units, and then each pair, given the others where they now are.

    Args:
        symmetry: The symmetry.
        pairs: What is scaled by matrices.
        units: Those whose units are scaled one by one.
        scales: The scales so far.
        by_leaf: The parameters with these scales, by their leaves.

    Returns:
        The scales of the next round, and the largest change: of a logarithm, or of an entry of a
        matrix that is 1 or 0 if nothing has changed.
    """
    logs, matrices, inverses = (list(found) for found in scales)
    largest = jnp.zeros((), jnp.float32)
    steps = _logs_of_units(symmetry, units, by_leaf, logs)
    for position, step in enumerate(steps):
        logs[position] = logs[position] + step
        largest = _larger(largest, step)
    by_leaf = _with_scaled_units(symmetry, units, by_leaf, steps)
    for position, pair in enumerate(pairs):
        matrix, inverse = _even_matrices(symmetry, pair, by_leaf)
        by_leaf = _mixed_pair(symmetry, pair, by_leaf, matrix, inverse)
        largest = _larger(largest, matrix - _identities(matrix.shape, matrix.dtype))
        matrices[position] = _product(matrices[position], matrix)
        inverses[position] = _product(inverse, inverses[position])
    return _Scales(logs, matrices, inverses), largest


def _identities(shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


def _larger(largest: Array, changes: Array) -> Array:
    return jnp.maximum(largest, jnp.max(jnp.abs(changes), initial=0).astype(jnp.float32))


def _scaled(
    symmetry: Symmetry,
    pairs: list[Balance],
    units: list[Balance],
    scales: _Scales,
    by_leaf: dict[int, Array],
) -> dict[int, Array]:
    """Multiplies parameters by all scales."""
    by_leaf = _with_scaled_units(symmetry, units, by_leaf, scales.logs)
    for pair, matrix, inverse in zip(pairs, scales.matrices, scales.inverses, strict=True):
        # A product of many inverses is the inverse of the product but for their rounding. Newton's
        # step squares what is missing.
        twice = 2 * _identities(matrix.shape, matrix.dtype)
        refined = _product(inverse, twice - _product(matrix, inverse))
        by_leaf = _mixed_pair(symmetry, pair, by_leaf, matrix, refined)
    return by_leaf


def _divided(balances: list[Balance]) -> tuple[list[Balance], list[Balance]]:
    """Tells those that are scaled by matrices from those whose units are scaled one by one."""
    by_matrices = [balance for balance in balances if balance.group.rotates]
    return by_matrices, [balance for balance in balances if not balance.group.rotates]


def _even_matrices(
    symmetry: Symmetry, pair: Balance, by_leaf: dict[int, Array]
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    """Returns a matrix and its inverse by which two sides of a product get one Gram matrix.

    Of W and V, with `R_W^T R_W` and `R_V^T R_V` for their Gram matrices and the singular values
    `R_W R_V^T = P S Q^T`, the matrix `A = S^-1/2 Q^T R_V` and its inverse `R_W^T P S^-1/2` give A W
    and A^-T V the one Gram matrix S. So they do in any rotation: of these, the one that makes A
    symmetric turns with the units if these are rotated. No Gram matrix is formed, which would
    square how much the singular values differ in size, and lose the small ones to rounding.
    """
    (risen, risen_size), (fallen, fallen_size) = (
        _root_of_units(symmetry, pair.group, members, by_leaf) for members in (pair.up, pair.down)
    )
    # A side that does not reach all dimensions has no inverse, and stays as it is.
    is_regular = _is_regular(risen) & _is_regular(fallen)
    left, values, right = jnp.linalg.svd(_product(risen, _transposed(fallen)))
    roots = jnp.sqrt(jnp.where(is_regular[..., None], values, 1))
    ratio = (jnp.sqrt(fallen_size) / jnp.sqrt(risen_size))[..., None, None]
    matrix = ratio * _product(right, fallen) / roots[..., None]
    inverse = _product(_transposed(risen), left) / roots[..., None, :] / ratio
    # In the rotation that makes it symmetric.
    first, _, last = jnp.linalg.svd(matrix)
    rotation = _product(_transposed(last), _transposed(first))
    matrix, inverse = _product(rotation, matrix), _product(inverse, _transposed(rotation))
    # Exactly the identity where there is nothing to be done.
    identity = _identities(matrix.shape, matrix.dtype)
    is_regular = is_regular[..., None, None]
    return jnp.where(is_regular, matrix, identity), jnp.where(is_regular, inverse, identity)


def _is_regular(root: Float[Array, "*batch n n"]) -> Array:
    """Whether a matrix, of numbers up to 1, has an inverse that rounding leaves something of."""
    values = jnp.linalg.svd(root, compute_uv=False)
    return values[..., -1] > SMALLEST_SHARE * values[..., 0]


def _mixed_pair(
    symmetry: Symmetry,
    pair: Balance,
    by_leaf: dict[int, Array],
    matrix: Float[Array, "*batch n n"],
    inverse: Float[Array, "*batch n n"],
) -> dict[int, Array]:
    """Multiplies one side by the transpose of a matrix, and the other by its inverse.

    Unit j becomes the sum of `matrix[i, j]` times unit i, and on the other side of `inverse[j, i]`.
    """
    by_leaf = dict(by_leaf)
    for members, factor in ((pair.up, matrix), (pair.down, jnp.swapaxes(inverse, -1, -2))):
        for leaf, axis in members:
            structure = symmetry.leaf_structures[leaf]
            blocks = structure.partition.split(jnp.asarray(by_leaf[leaf]))
            for unit_axis in _unit_axes(structure, pair.group, axis):
                for key, block in blocks.items():
                    if unit_axis.is_in(block):
                        cast = factor.astype(block.array.dtype)
                        blocks[key] = mixed(block, (unit_axis.dim,), unit_axis.levels, cast)
            by_leaf[leaf] = structure.partition.join(blocks)
    return by_leaf


def _root_of_units(
    symmetry: Symmetry,
    group: Group,
    members: Members,
    by_leaf: dict[int, Array],
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch"]]:
    """Returns R, for which `R^T R` has the inner products among units over some members.

    Returns:
        R over a number, so that no product is out of range, and this number.
    """
    found = []
    for leaf, axis in members:
        structure = symmetry.leaf_structures[leaf]
        blocks = structure.partition.split(by_leaf[leaf])
        (unit_axis,) = _unit_axes(structure, group, axis)
        units = units_in(blocks, [*unit_axis.levels, unit_axis.dim])
        # Real matrices mix real and imaginary parts alike.
        found += [units.real, units.imag] if jnp.iscomplexobj(units) else [units]
    # Of fewer numbers than units, R would not be square.
    found.append(jnp.zeros_like(found[0], shape=(*group.batch, group.size, group.size)))
    units = jnp.concatenate(found, axis=-1)
    size = jnp.max(jnp.abs(units), axis=(-2, -1))
    size = jnp.where(size > 0, size, 1)
    return jnp.linalg.qr(_transposed(units / size[..., None, None]), mode="r"), size


def _transposed(matrix: Array) -> Array:
    return jnp.swapaxes(matrix, -1, -2)


def _product(*matrices: Array) -> Array:
    return functools.reduce(
        functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST), matrices
    )


def _unit_axes(structure: LeafStructure, group: Group, axis: int) -> list[UnitAxis]:
    """Returns the unit axes of a group along one axis of a leaf."""
    found = []
    for unit_axis in structure.unit_axes:
        if unit_axis.group.name == group.name and unit_axis.member.axis == axis:
            found.append(unit_axis)
    return found


class _Squares(NamedTuple):
    """The squares of a parameter, in a range in which their sums are finite.

    Attributes:
        array: The squares over that of the largest number, float32 or float64.
        log: The logarithm of that square, float `[]`.
    """

    array: Array
    log: Array


def _logs_of_units(
    symmetry: Symmetry, balances: list[Balance], by_leaf: dict[int, Array], like: list[Array]
) -> list[Array]:
    """Returns the logarithms of the scales of all units for which nothing changes any more.

    Args:
        symmetry: The symmetry.
        balances: Those whose units are scaled one by one.
        by_leaf: The parameters, by their leaves.
        like: For each balance an array of the shape and dtype of its logarithms.
    """
    if not balances:
        return []
    # Norms are all that counts, and a scale multiplies squares by its square. So the parameters
    # themselves are multiplied once, in the end, and rounded once.
    squares = {}
    for leaf, array in by_leaf.items():
        squares[leaf] = _squares_of(symmetry, balances, leaf, array)

    def sweep(carry: tuple[list[Array], Array, Array]) -> tuple[list[Array], Array, Array]:
        logs, _, number = carry
        logs = list(logs)
        largest = jnp.zeros((), jnp.float32)
        # One after the other, each given the others where they now are, as in coordinate descent.
        for position, balance in enumerate(balances):
            old = logs[position]
            logs[position] = old + _step(symmetry, balances, balance, squares, logs)
            largest = _larger(largest, logs[position] - old)
        return logs, largest, number + 1

    def is_unfinished(carry: tuple[list[Array], Array, Array]) -> Array:
        _, largest, number = carry
        return (largest > SMALLEST_CHANGE) & (number < MOST_SWEEPS)

    start = [jnp.zeros_like(found) for found in like], jnp.array(jnp.inf, jnp.float32), jnp.array(0)
    logs, _, _ = jax.lax.while_loop(is_unfinished, sweep, start)
    return logs


def _with_scaled_units(
    symmetry: Symmetry, balances: list[Balance], by_leaf: dict[int, Array], logs: list[Array]
) -> dict[int, Array]:
    """Multiplies the units of all groups by their scales."""
    changed = {}
    for leaf, array in by_leaf.items():
        changed[leaf] = array
        for group, member, exponents in _exponents(balances, leaf, logs, 1):
            factors = jnp.exp(exponents)
            changed[leaf] = _multiplied(symmetry, group, member, changed[leaf], factors)
    return changed


def _squares_of(symmetry: Symmetry, balances: list[Balance], leaf: int, array: Array) -> _Squares:
    """Takes the squares of a parameter, without what no scale changes."""
    magnitudes = jnp.abs(array)
    wide = magnitudes.dtype if magnitudes.dtype == jnp.float64 else jnp.float32
    magnitudes = magnitudes.astype(wide)
    for balance in balances:
        up = [axis for number, axis in balance.up if number == leaf]
        down = [axis for number, axis in balance.down if number == leaf]
        if up and down and balance.powers[0] == balance.powers[1]:
            # What goes from a unit to itself is multiplied and divided. Counted on both sides it
            # would make each step smaller than it has to be.
            structure = symmetry.leaf_structures[leaf]
            for pair in itertools.product(up, down):
                magnitudes = _without_diagonal(structure, balance.group, pair, magnitudes)
    largest = jnp.max(magnitudes, initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    return _Squares((magnitudes / largest) ** 2, 2 * jnp.log(largest))


def _without_diagonal(
    structure: LeafStructure, group: Group, axes: tuple[int, int], array: Array
) -> Array:
    """Makes 0 of what is at one and the same unit along two axes."""
    (one,), (other,) = (_unit_axes(structure, group, axis) for axis in axes)
    if one.levels != other.levels:
        return array
    blocks = structure.partition.split(array)
    for key, block in blocks.items():
        if one.is_in(block) and other.is_in(block):
            shape = [1] * block.array.ndim
            shape[block.dims.index(one.dim)] = group.size
            shape[block.dims.index(other.dim)] = group.size
            kept = 1 - jnp.eye(group.size, dtype=array.dtype).reshape(shape)
            blocks[key] = block._replace(array=block.array * kept)
    return structure.partition.join(blocks)


def _exponents(
    balances: list[Balance], leaf: int, logs: list[Array], factor: int
) -> list[tuple[Group, tuple[int, int], Array]]:
    """Lists by what the units of a parameter are multiplied: logarithms times a factor."""
    found = []
    for balance, log in zip(balances, logs, strict=True):
        up, down = balance.powers
        for member in balance.up:
            if member[0] == leaf:
                found.append((balance.group, member, factor * up * log))
        for member in balance.down:
            if member[0] == leaf:
                found.append((balance.group, member, -factor * down * log))
    return found


def _step(
    symmetry: Symmetry,
    balances: list[Balance],
    balance: Balance,
    squares: dict[int, _Squares],
    logs: list[Array],
) -> Array:
    """Returns by how much the logarithms of the scales of one group have to change."""
    rising, falling = (
        _log_square_norms(symmetry, balances, balance.group, members, squares, logs)
        for members in (balance.up, balance.down)
    )
    p, q = balance.powers
    # The derivative of |up|^2 c^(2p) + |down|^2 c^(-2q) by c vanishes here.
    step = (jnp.log(q / p) + falling - rising) / (2 * (p + q))
    # A unit that nothing makes, or nothing reads, has no best scale.
    return jnp.where(jnp.isfinite(rising) & jnp.isfinite(falling), step, 0)


def _log_square_norms(
    symmetry: Symmetry,
    balances: list[Balance],
    group: Group,
    members: Members,
    squares: dict[int, _Squares],
    logs: list[Array],
) -> Float[Array, "*batch n"]:
    """Returns the logarithm of the squared norm of each unit over some members, -inf for 0."""
    terms = []
    for leaf, axis in members:
        array, log = squares[leaf]
        for of_group, member, exponents in _exponents(balances, leaf, logs, 2):
            array, largest = _multiplied_in_range(symmetry, of_group, member, array, exponents)
            log = log + largest
        sums = _sums_over_units(symmetry.leaf_structures[leaf], group, axis, array)
        terms.append(jnp.log(sums) + log)
    return jax.nn.logsumexp(jnp.stack(terms), axis=0)


def _sums_over_units(structure: LeafStructure, group: Group, axis: int, array: Array) -> Array:
    """Sums up an array over all but the units of a group, `[*batch, n]`."""
    (unit_axis,) = _unit_axes(structure, group, axis)
    blocks = structure.partition.split(array)
    return jnp.sum(units_in(blocks, [*unit_axis.levels, unit_axis.dim]), axis=-1)


def _multiplied_in_range(
    symmetry: Symmetry, group: Group, member: tuple[int, int], array: Array, exponents: Array
) -> tuple[Array, Array]:
    """Multiplies the units of a group along one axis by powers of e, over the largest factor.

    Args:
        symmetry: The symmetry.
        group: The group.
        member: The leaf and the axis.
        array: What is multiplied, of the leaf's shape.
        exponents: The power for each unit, `[*batch, n]`.

    Returns:
        The product, with 1 for the largest factor, so that none overflows, and the logarithm of
        what it is to be multiplied by. Entries along the axis that are no units of the group, but
        units of another one beside these, have a factor of 1 as well.
    """
    leaf, axis = member
    structure = symmetry.leaf_structures[leaf]
    unit_axes = _unit_axes(structure, group, axis)
    blocks = structure.partition.split(array)
    others = []
    for key, block in blocks.items():
        if not any(unit_axis.is_in(block) for unit_axis in unit_axes):
            others.append(key)
    largest = jnp.max(exponents, initial=0 if others else -jnp.inf)
    for key in others:
        block = blocks[key]
        blocks[key] = block._replace(array=block.array * jnp.exp(-largest).astype(array.dtype))
    array = structure.partition.join(blocks) if others else array
    return _multiplied(symmetry, group, member, array, jnp.exp(exponents - largest)), largest


def _multiplied(
    symmetry: Symmetry, group: Group, member: tuple[int, int], array: Array, factors: Array
) -> Array:
    """Multiplies the units of a group along one axis of a parameter by a number each."""
    leaf, axis = member
    structure = symmetry.leaf_structures[leaf]
    blocks = structure.partition.split(array)
    for unit_axis in _unit_axes(structure, group, axis):
        for key, block in blocks.items():
            if unit_axis.is_in(block):
                cast = factors.astype(block.array.dtype)
                blocks[key] = multiplied(block, unit_axis.dim, unit_axis.levels, cast)
    return structure.partition.join(blocks)


def randomly_scaled(symmetry: Symmetry, params: PyTree, key: Array) -> PyTree:
    """Multiplies the units of groups that are scaled by random positive numbers.

    Args:
        symmetry: The symmetry.
        params: Parameters that fit.
        key: A key of `jax.random`.

    Returns:
        The parameters of another model of the same function, by scales between 1/2 and 2.
    """
    groups = _scaled_groups(symmetry)
    if not groups:
        return params
    by_leaf = dict(enumerate(symmetry.split(params)))
    for number, (group, freedom) in enumerate(groups):
        for position, scaling in enumerate(() if group.rotates else freedom.scales):
            scaling_key = jax.random.fold_in(jax.random.fold_in(key, number), position)
            shape = (*group.batch, group.size)
            factors = 2 ** jax.random.uniform(scaling_key, shape, minval=-1, maxval=1)
            for leaf, axis, degree in scaling.degrees:
                array = jnp.asarray(by_leaf[leaf])
                by_leaf[leaf] = _multiplied(symmetry, group, (leaf, axis), array, factors**degree)
    pairs, _ = _divided(balances_of(symmetry))
    for number, pair in enumerate(pairs):
        pair_key = jax.random.fold_in(key, number)
        first, last = (
            random_rotation(jax.random.fold_in(pair_key, side), pair.group.size, pair.group.batch)
            for side in range(2)
        )
        shape = (*pair.group.batch, 1, pair.group.size)
        scales = 2 ** jax.random.uniform(pair_key, shape, minval=-1, maxval=1)
        inverse = jnp.swapaxes(_product(first / scales, last), -1, -2)
        by_leaf = _mixed_pair(symmetry, pair, by_leaf, _product(first * scales, last), inverse)
    return symmetry.join(by_leaf.values())
