"""Mixtures of inputs, for training without labels on few of them.

A few inputs are soon known by heart. But what the teachers answer is known for any input, and
between two inputs there are as many others as one likes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from otfusion_jax.common.arguments import kind_of, require_key, require_kind
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.divergence import Objective
from otfusion_jax.fusion.samples import are_continuous


def mixup(batch: PyTree, key: Array) -> PyTree:
    """Mixes each sample of a batch with one of the others, at a share drawn at random.

    For training without labels on few inputs, as by `learn_alignment` towards what models answer on
    average. It may be called inside of `jax.jit`. Give each step a key of its own, as a part of the
    batch where the batches of a loss are stacked.

    Args:
        batch: A batch of inputs, floating-point arrays `[n, ...]` or a pytree of these. Integers,
            such as tokens, cannot be mixed; masks and codes that are stored as floats should not.
        key: The source of randomness, a key of JAX.

    Returns:
        A batch of the same structure and shapes, in the dtypes that JAX gives such arrays. Sample i
        is `s x_i + (1 - s) x_j`, with j by a random permutation of the batch, which may leave some
        in their places, and a share s uniform in `[0, 1)`, both the same for all arrays.

    Raises:
        ValueError: If there are no arrays, or these have no first axis, or not of one size.
        TypeError: If they are not floating-point.

    References:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018. Beyer et al., Knowledge
        distillation: A good teacher is patient and consistent, CVPR 2022, for a teacher's answers
        to such mixtures.

    Examples:
        >>> import jax
        >>> import otfusion_jax as otf
        >>> corners = jax.numpy.eye(3)
        >>> between = otf.mixup(corners, jax.random.key(0))
        >>> print(between.shape, bool(jax.numpy.allclose(between.sum(axis=1), 1)))
        (3, 3) True
    """
    require_key(key)
    count = _number_of_samples(batch)
    keys = jax.random.split(key)
    shares = jax.random.uniform(keys[0], (count,))
    partners = jax.random.permutation(keys[1], count)

    def mixed(array: Array) -> Array:
        # NumPy's arrays take no traced indices.
        array = jnp.asarray(array)
        beside = (count, *[1] * (array.ndim - 1))
        share = shares.astype(array.dtype).reshape(beside)
        # Where axes of a mesh are explicit, it has to be said how what is looked up lies on it.
        others = array.at[partners].get(out_sharding=jax.typeof(array).sharding)
        return share * array + (1 - share) * others

    return jax.tree.map(mixed, batch)


def mixes_inputs(asked: Any, objective: Objective | None, inputs: tuple[PyTree, ...]) -> bool:
    """Says whether training without labels is to mix inputs.

    Args:
        asked: What the user has said; None if nothing.
        objective: What is descended on; None if nothing is trained.
        inputs: The inputs, arrays or shapes.

    Returns:
        What the user has said, or whether inputs are continuous, and what the models answer is met:
        a loss may have labels among its inputs.

    Raises:
        TypeError: If it is not said by a bool, or inputs are to be mixed that cannot be.
    """
    if asked is not None:
        require_kind(asked, bool, "mixes", "True, False or None")
    if objective is None:
        return False
    if asked is None:
        return objective.loss is None and are_continuous(inputs)
    if asked and not are_continuous(inputs):
        raise TypeError(
            "mixes is True, and not all inputs are floating-point: there is nothing between "
            "tokens or labels; leave it out"
        )
    return asked


def _number_of_samples(batch: PyTree) -> int:
    """Returns how many samples a batch has, and refuses what cannot be mixed."""
    count = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the batch"
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            found = kind_of(leaf) if dtype is None else dtype
            raise TypeError(
                f"{name} is {found}, and only floating-point arrays can be mixed; leave tokens "
                "and labels as they are"
            )
        if not leaf.ndim or count not in (None, leaf.shape[0]):
            wanted = "samples" if count is None else f"the {count} samples of other arrays"
            raise ValueError(f"{name} has shape {leaf.shape}; its first axis must be {wanted}")
        count = leaf.shape[0]
    if count is None:
        raise ValueError("the batch has no arrays")
    return count
