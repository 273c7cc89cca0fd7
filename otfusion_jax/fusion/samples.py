"""Inputs that are kept, to choose by: read from any loader, bounded, and a share of them held out.

A loader may be gone through once only, and choices need the same inputs several times. So a bounded
number of them is kept, as arrays of NumPy: in the memory of the host, not of the device.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.arguments import kind_of, require_batches
from otfusion_jax.common.host import Array
from otfusion_jax.common.typing import PyTree

BATCH_SIZE = 250
"""How many samples are on the device at once, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of a function, a sample at each position of the first axis of every array.

    Attributes:
        inputs: The inputs, a tuple of pytrees of NumPy arrays `[n, ...]`.
        count: The number n of samples.
        batch_size: How many of them are on the device at once.
    """

    inputs: tuple[PyTree, ...]
    count: int
    batch_size: int = BATCH_SIZE

    def at(self, positions: np.ndarray | slice) -> "Samples":
        """Returns the samples at some positions."""
        chosen = jax.tree.map(lambda array: array[positions], self.inputs)
        return Samples(chosen, len(jax.tree.leaves(chosen)[0]), self.batch_size)

    def batches(self) -> Iterator[tuple[PyTree, ...]]:
        """Yields the inputs, so many at a time as may be on the device at once."""
        for first in range(0, self.count, self.batch_size):
            chosen = slice(first, first + self.batch_size)
            yield jax.tree.map(lambda array, chosen=chosen: jnp.asarray(array[chosen]), self.inputs)

    def on_device(self, least: int = 0) -> tuple[PyTree, ...]:
        """Returns all inputs as arrays of JAX.

        Args:
            least: How many samples each array has at least; zeros follow those that there are.

        Returns:
            The inputs.
        """
        missing = max(least - self.count, 0)

        def padded(array: np.ndarray) -> Array:
            if missing:
                array = np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)])
            return jnp.asarray(array)

        return jax.tree.map(padded, self.inputs)


def are_continuous(inputs: PyTree) -> bool:
    """Says whether inputs may be any numbers: tokens can be neither drawn nor mixed.

    Args:
        inputs: The inputs of a function, arrays or shapes.

    Returns:
        Whether there are any, and all are floating-point.
    """
    leaves = jax.tree.leaves(inputs)
    return bool(leaves) and all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)


def read_samples(batches: Iterable[Any], most: int) -> Samples:
    """Reads samples from batches, and keeps them.

    Args:
        batches: A list, a generator or a loader of batches: arrays `[n, ...]`, or tuples or lists
            of these for functions of several inputs. Whatever NumPy can read counts as an array.
            It is gone through once, and no further than needed.
        most: How many samples to keep at most.

    Returns:
        The first samples.

    Raises:
        ValueError: If there are no batches; if arrays of a batch have no samples, or not as many as
            each other; if a batch has another structure, shape or dtype than the first; if an input
            is not finite. All name the batch and the input.
        TypeError: If the batches are a single array or a dict, or what they hold is no array.
    """
    require_batches(batches)
    read: list[tuple[PyTree, ...]] = []
    count = 0
    for number, batch in enumerate(batches):
        # A loader of PyTorch puts the inputs of a batch into a list.
        given = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        arrays, size = _checked_batch(number, given)
        if read:
            _require_same_kind(number, arrays, read[0])
        read.append(arrays)
        count += size
        if count >= most:
            break
    if not read:
        raise ValueError("no batches of inputs were given; give at least one, or leave batches out")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:most], *read)
    return Samples(joined, min(count, most))


def _checked_batch(number: int, batch: tuple[Any, ...]) -> tuple[tuple[PyTree, ...], int]:
    """Reads the arrays of a batch, and counts its samples."""
    arrays = []
    size = None
    leaves, structure = jax.tree_util.tree_flatten_with_path(batch)
    for path, leaf in leaves:
        name = f"batch {number}, input {jax.tree_util.keystr(path, simple=True, separator='/')}"
        array = _as_array(leaf, name)
        if not array.ndim or not array.shape[0]:
            raise ValueError(f"{name} has shape {array.shape}; its first axis must be the samples")
        if size is not None and array.shape[0] != size:
            raise ValueError(
                f"{name} has {array.shape[0]} samples, where another input of the batch has "
                f"{size}; the first axis of every input must be the samples. What is the same for "
                "all of them belongs into the function"
            )
        size = array.shape[0]
        arrays.append(array)
    if size is None:
        raise ValueError(f"batch {number} has no arrays")
    return structure.unflatten(arrays), size


def _as_array(leaf: Any, name: str) -> np.ndarray:
    """Reads an array of any library by NumPy."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name} is a key of jax.random, which is no sample; close over a key that all batches "
            "share: lambda params, x: fn(params, x, key)"
        )
    try:
        array = np.asarray(leaf)
        is_number = jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool
    except (TypeError, ValueError, RuntimeError):
        is_number = False
    if not is_number:
        raise TypeError(f"{name} is {kind_of(leaf)}, which NumPy cannot read as numbers")
    # Whatever the host keeps, JAX would make float32 of it.
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    if jnp.issubdtype(array.dtype, jnp.inexact):
        wrong = int(np.sum(~np.isfinite(array.astype(np.result_type(array, np.float32)))))
        if wrong:
            raise ValueError(f"{name}: {wrong} of {array.size} values not finite; leave them out")
    return array


def _require_same_kind(number: int, batch: tuple, first: tuple) -> None:
    """Refuses a batch that differs from the first in more than the number of samples."""
    kinds = []
    for given in (batch, first):
        described = jax.tree.map(lambda array: f"{array.dtype}{list(array.shape[1:])}", given)
        kinds.append(described)
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"batch {number} has samples {kinds[0]}, where batch 0 has {kinds[1]}; pad them to one "
            "shape, or leave odd ones out"
        )


class Divided(NamedTuple):
    """Samples in parts, each drawn at random.

    Attributes:
        fit: Those to fit to.
        held_out: Those to choose by.
        more: All but those to choose by; None if that is what is fitted to anyway.
        whole: All together.
    """

    fit: Samples
    held_out: Samples
    more: Samples | None
    whole: Samples


def divided(samples: Samples, most: int, key: Array) -> Divided:
    """Divides samples into two halves, to fit to and to choose by; of many, less than half each.

    Batches of halves are all of one size, and so are those of the rest. For a last one that is
    smaller, whatever is made of a batch would be compiled once more. So an odd one is left out, and
    a few where there are several batches: fewer than there are batches.

    Args:
        samples: The samples, two or more.
        most: How many are in a half at most.
        key: The source of randomness, a key of JAX.

    Returns:
        The parts, at least one sample each.

    Raises:
        ValueError: If there is a single sample.
    """
    if samples.count < 2:
        raise ValueError(
            "the batches have a single sample, and some are to be held out; give more of them"
        )
    order = np.asarray(jax.random.permutation(key, samples.count))
    half = min(samples.count // 2, most)
    held_out, fit = _batched(samples, order[:half]), _batched(samples, order[half : 2 * half])
    if samples.count > 2 * most:
        return Divided(fit, held_out, _batched(samples, order[half:]), samples)
    inputs = jax.tree.map(lambda *parts: np.concatenate(parts), fit.inputs, held_out.inputs)
    whole = Samples(inputs, fit.count + held_out.count, fit.batch_size)
    return Divided(fit, held_out, None, whole)


def _batched(samples: Samples, positions: np.ndarray) -> Samples:
    """Returns samples at some positions, as many of the first as make batches of one size."""
    batches = -(-len(positions) // BATCH_SIZE)
    size = len(positions) // batches
    chosen = samples.at(positions[: batches * size])
    return dataclasses.replace(chosen, batch_size=size)
