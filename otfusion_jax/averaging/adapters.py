"""Low-rank adapters averaged by what they do: as products, which are factored again."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from otfusion_jax.averaging.average import Weights, checked_average, columns_of, mixtures
from otfusion_jax.averaging.stacking import require_alike
from otfusion_jax.averaging.statistics import warn_of_averaged_statistics
from otfusion_jax.common.arguments import checked_count, require_kind
from otfusion_jax.common.host import Array, accumulation_dtype
from otfusion_jax.common.typing import PyTree
from otfusion_jax.symmetry.checks import require_finite
from otfusion_jax.symmetry.groups import Leaf, leaves_of


@dataclasses.dataclass(frozen=True)
class LowRankPair:
    """Two leaves of which the product counts, by their key paths.

    Attributes:
        left: The left factor, `[n, rank]`.
        right: The right factor, `[rank, m]`.
    """

    left: str
    right: str


def average_adapters(
    models: Sequence[PyTree],
    weights: Weights = None,
    *,
    rank: int | None = None,
    pairs: Sequence[LowRankPair] | None = None,
) -> PyTree:
    """Averages models with low-rank adapters (LoRA), each adapter as the product of its factors.

    The average of products is not the product of averages, and factors of one product differ by
    any invertible matrix. The average of the K products has rank K * rank at most; the result has
    the factors of its closest matrix of the wanted rank, by its singular value decomposition, each
    with the square roots of the singular values. The products are never formed: the decomposition
    is that of a matrix of K * rank rows and columns. All other leaves are averaged as they are.

    Args:
        models: The models, or their adapters alone, K pytrees of the same structure and shapes.
        weights: The K weights of the models, summing to 1; uniform if None; or a function from the
            key path of a parameter to either, see `average`. A pair is weighted by its left factor.
        rank: The rank of the result, 1 or more; that of the models if None. At K times that, the
            average is exact. Leaves then have other shapes.
        pairs: The pairs. If None, they are found by name: `lora_a` `[n, rank]` and `lora_b`
            `[rank, m]` beside each other (NNX, where the product is `lora_a @ lora_b`), or `lora_A`
            `[rank, n]` and `lora_B` `[m, rank]` (PEFT, where it is `lora_B @ lora_A`; those of
            embeddings are `lora_embedding_A` and `lora_embedding_B`).

    Returns:
        A tree of the same structure. Where a factor is scaled by the rank as well (`alpha / rank`),
        that is the network's, and has to be the same in all models and after.

    Raises:
        ValueError: As `average`; for no pairs, key paths that are not there, and factors that do
            not fit each other, listing each; for a rank below 1.
        TypeError: As `average`, and for a rank that is no number.
        FloatingPointError: For a result that is out of range.

    Warns:
        StatisticsWarning: As `average`.

    Examples:
        >>> import jax.numpy as jnp
        >>> import otfusion_jax as otf
        >>> one = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2))}
        >>> same = {"lora_a": -one["lora_a"], "lora_b": -one["lora_b"]}
        >>> found = otf.average_adapters([one, same])
        >>> bool(jnp.allclose(found["lora_a"] @ found["lora_b"], 1))
        True

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022; Eckart and Young,
        The approximation of one matrix by another of lower rank, Psychometrika 1936.
    """
    require_alike(models)
    if rank is not None:
        rank = checked_count(rank, "rank", "1 or more, or None")
    leaves = leaves_of(models[0])
    checked = _checked_pairs(leaves, pairs)
    shares = mixtures(weights, len(models), leaves)
    warn_of_averaged_statistics(models, False, shares)
    place = {leaf.path: number for number, leaf in enumerate(leaves)}
    columns = columns_of(models)
    values = jax.tree_util.tree_leaves(checked_average(leaves, models, shares, "averaging"))
    for pair in checked:
        left, right = place[pair.left], place[pair.right]
        wanted = leaves[left].shape[1] if rank is None else rank
        _require_same_shares(pair, shares[left], shares[right])
        lefts, rights = (tuple(map(jnp.asarray, columns[number])) for number in (left, right))
        values[left], values[right] = _refactored(lefts, rights, shares[left], wanted)
    found = jax.tree_util.tree_structure(models[0]).unflatten(values)
    require_finite(leaves, found, "averaging adapters")
    return found


def _require_same_shares(pair: LowRankPair, left: Array, right: Array) -> None:
    """Refuses weights that differ within a pair: it is their product that is averaged."""
    known = not isinstance(left, Tracer) and not isinstance(right, Tracer)
    if known and not np.array_equal(np.asarray(left), np.asarray(right)):
        raise ValueError(
            f"{pair.left} and {pair.right} have other weights, {np.asarray(left).tolist()} and "
            f"{np.asarray(right).tolist()}, but it is their product that is averaged; give both "
            "the same"
        )


def _refactored(
    lefts: tuple[Array, ...], rights: tuple[Array, ...], weights: Float[Array, " k"], rank: int
) -> tuple[Array, Array]:
    """Returns the factors of the closest matrix of some rank to the average of products."""
    left, right = _decomposed(lefts, rights, weights)
    kept = min(rank, left.shape[1])
    # Of a rank that the average does not have, the rest are zeros.
    missing = rank - kept
    left = jnp.pad(left[:, :kept], ((0, 0), (0, missing)))
    right = jnp.pad(right[:kept], ((0, missing), (0, 0)))
    return left.astype(lefts[0].dtype), right.astype(rights[0].dtype)


@jax.jit
def _decomposed(
    lefts: tuple[Array, ...], rights: tuple[Array, ...], weights: Float[Array, " k"]
) -> tuple[Array, Array]:
    """Returns the factors of an average of products, by falling singular values."""
    wide = jnp.result_type(accumulation_dtype(lefts[0].dtype), accumulation_dtype(rights[0].dtype))
    # One product of wide factors is the sum of all.
    weighted = []
    for left, weight in zip(lefts, weights, strict=True):
        weighted.append(left.astype(wide) * weight.astype(wide))
    left = jnp.concatenate(weighted, axis=1)
    right = jnp.concatenate([x.astype(wide) for x in rights], axis=0)
    q_left, r_left = jnp.linalg.qr(left)
    q_right, r_right = jnp.linalg.qr(right.T)
    highest = jax.lax.Precision.HIGHEST
    core = jnp.matmul(r_left, r_right.T, precision=highest)
    u, singular, v = jnp.linalg.svd(core, full_matrices=False)
    roots = jnp.sqrt(singular).astype(wide)
    new_left = jnp.matmul(q_left, u * roots[None], precision=highest)
    new_right = jnp.matmul(roots[:, None] * v, q_right.T, precision=highest)
    return new_left, new_right


def _checked_pairs(
    leaves: Sequence[Leaf], pairs: Sequence[LowRankPair] | None
) -> tuple[LowRankPair, ...]:
    """Checks the pairs of factors, which are found if they are not given.

    Args:
        leaves: The leaves of the models.
        pairs: The pairs that were given.

    Returns:
        The pairs.

    Raises:
        ValueError: If there are none, or for leaves that do not fit, listing each.
    """
    known = {leaf.path: leaf for leaf in leaves}
    if isinstance(pairs, LowRankPair):
        raise TypeError(f"pairs is {pairs!r}; pass a list of it")
    checked = tuple(_found_pairs(known) if pairs is None else pairs)
    for pair in checked:
        require_kind(pair, LowRankPair, "a pair", "LowRankPair(left=..., right=...)")
    if not checked:
        raise ValueError(
            "no low-rank adapters were found; name the leaves, "
            "pairs=[LowRankPair(left=..., right=...)], of which the product counts"
        )
    wrong = []
    for pair in checked:
        missing = [path for path in (pair.left, pair.right) if path not in known]
        wrong.extend(f"  {path}: not there" for path in missing)
        if missing:
            continue
        left, right = known[pair.left], known[pair.right]
        for leaf in (left, right):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                wrong.append(f"  {leaf.path}: {leaf.dtype}, which is not real floating-point")
        fits = len(left.shape) == len(right.shape) == 2 and left.shape[1] == right.shape[0]
        if not fits:
            wrong.append(
                f"  {left.path} and {right.path}: shapes {left.shape} and {right.shape} have no "
                "product"
            )
    if wrong:
        raise ValueError("these leaves are no low-rank adapters:\n" + "\n".join(wrong))
    if pairs is None:
        _require_paired(known, checked)
    return checked


def _require_paired(known: dict[str, Leaf], pairs: Sequence[LowRankPair]) -> None:
    """Refuses leaves that are called as parts of adapters are, and belong to no pair."""
    paired = set()
    for pair in pairs:
        paired |= {pair.left, pair.right}
    alone = []
    for path, leaf in known.items():
        is_part = any(name.lower().startswith("lora_") for name in re.split(r"[/.]", path))
        if is_part and leaf.moves and path not in paired:
            alone.append(f"  {path}: shape {leaf.shape}")
    if alone:
        raise ValueError(
            "these leaves look like parts of low-rank adapters, and no pair was found for them; "
            "name all pairs by pairs=[LowRankPair(left=..., right=...)], and what is in none is "
            "averaged by itself:\n" + "\n".join(alone)
        )


_PARTNERS = {
    "lora_a": "lora_b",
    "lora_A": "lora_B",
    "lora_embedding_A": "lora_embedding_B",
}
"""The names of the factor that a product is found by, and of the other."""


def _found_pairs(known: dict[str, Any]) -> list[LowRankPair]:
    """Finds the adapters whose factors have names that libraries give."""
    found = []
    for path in known:
        # Of files, names are not cut into keys: `layers.0.lora_A.weight`.
        parts = re.split(r"([/.])", path)
        for at, part in enumerate(parts):
            # PEFT's are called after what the kernel takes up first, and multiplied from the left.
            partner = _PARTNERS.get(part)
            if partner is None:
                continue
            other = "".join([*parts[:at], partner, *parts[at + 1 :]])
            if other in known:
                a_first = part == "lora_a"
                found.append(LowRankPair(path, other) if a_first else LowRankPair(other, path))
    return found
