"""Between checkpoints, whose arrays have names, and models, whose parameters have key paths."""

import contextlib
import dataclasses
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.common.typing import PyTree
from otfusion_jax.files.checkpoint import Checkpoint, CheckpointError, StoredArray
from otfusion_jax.symmetry.symmetry import Symmetry

# Trees are walked by recursion.
_MOST_LEVELS = 200


@dataclasses.dataclass(frozen=True)
class Naming:
    """How the names of a file are read as key paths.

    Attributes:
        separator: What stands between the keys of a name, such as `.`; empty if a name is one key.
            Formats that nest have `/` in any case.
        subtree: The key path below which the parameters are; all else is passed on. Empty if all
            arrays are parameters.
    """

    separator: str = ""
    subtree: str = ""

    def names(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Returns the names of the parameters of a checkpoint, by key path.

        Args:
            checkpoint: The checkpoint.

        Returns:
            The names, in the order of the file.

        Raises:
            CheckpointError: If two names are one key path, or if there are none.
        """
        names = {}
        # The slash keeps `params_ema` from being below `params`.
        prefix = f"{self.subtree.strip('/')}/" if self.subtree else ""
        for name in checkpoint.arrays:
            path = name if checkpoint.nests else self._key_path(name)
            if not path.startswith(prefix):
                continue
            path = path.removeprefix(prefix)
            if path in names:
                raise CheckpointError(
                    f"{names[path]!r} and {name!r} in {checkpoint.path} are both {path!r}; give"
                    " another --separator"
                )
            names[path] = name
        if not names:
            raise CheckpointError(f"{checkpoint.path} has no arrays below {prefix!r}")
        return names

    def _key_path(self, name: str) -> str:
        return name.replace(self.separator, "/") if self.separator else name

    def tree(self, checkpoint: Checkpoint) -> PyTree:
        """Returns the parameters as a function of `--apply` gets them.

        Args:
            checkpoint: The checkpoint.

        Returns:
            Nested dicts by the keys of the names, or one dict by name if a name is one key.

        Raises:
            CheckpointError: If a key path is a parameter and leads to others, too, or has hundreds
                of keys.
        """
        nests = checkpoint.nests or bool(self.separator)
        names = self.names(checkpoint)
        tree: dict[str, Any] = {}
        for path, name in names.items():
            array = native(checkpoint.arrays[name])
            if not nests:
                tree[path] = array
                continue
            node = tree
            keys = path.split("/")
            if len(keys) > _MOST_LEVELS:
                raise CheckpointError(
                    f"{name[:80]!r} in {checkpoint.path} has {len(keys)} keys, more than any model"
                )
            for depth, key in enumerate(keys[:-1], start=1):
                around = "/".join(keys[:depth])
                if around in names:
                    raise CheckpointError(
                        f"{name!r} in {checkpoint.path} is below the array {names[around]!r}; give"
                        " another --separator"
                    )
                node = node.setdefault(key, {})
            node[keys[-1]] = array
        return tree


def native(array: StoredArray) -> StoredArray:
    """Returns an array in the byte order of this machine, which is the only one that JAX takes.

    Args:
        array: The array, of any byte order.
    """
    if array.dtype.isnative:
        return array
    return np.asarray(array).astype(array.dtype.newbyteorder("="))


def fitted(
    symmetry: Symmetry, checkpoint: Checkpoint, naming: Naming, others: Sequence[Checkpoint] = ()
) -> PyTree:
    """Puts the arrays of a checkpoint into the tree of a symmetry, by key path.

    Args:
        symmetry: The symmetry.
        checkpoint: The checkpoint.
        naming: How names are read.
        others: The other checkpoints of the command, which may tell what is missing here.

    Returns:
        The parameters.

    Raises:
        ValueError: If arrays are missing or left over, of other shapes or kinds, or not finite. All
            of them are listed by key path.
    """
    names = naming.names(checkpoint)
    expected = {leaf.path for leaf in symmetry.leaves}
    lines = []
    for leaf in symmetry.leaves:
        if leaf.path not in names:
            lines.append(f"  {leaf.path}: missing{_tied_in(others, naming, leaf.path)}")
    for path in names:
        if path not in expected:
            lines.append(f"  {path}: not expected")
    if lines:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the symmetry (another architecture? another"
            " --separator or --subtree?):\n" + "\n".join(lines)
        )
    # By key path, so that it does not matter which containers the symmetry was traced with.
    arrays = [native(checkpoint.arrays[names[leaf.path]]) for leaf in symmetry.leaves]
    params = symmetry.treedef.unflatten(arrays)
    symmetry.validate(params, str(checkpoint.path))
    return params


def results_by_name(
    symmetry: Symmetry, result: PyTree, checkpoint: Checkpoint, naming: Naming
) -> dict[str, StoredArray]:
    """Names the parameters of a result as a checkpoint does.

    Args:
        symmetry: The symmetry.
        result: The parameters.
        checkpoint: The checkpoint whose names are wanted.
        naming: How its names are read.

    Returns:
        The arrays by name. Integers, booleans and keys are left out, which no one has changed.
    """
    names = naming.names(checkpoint)
    arrays: dict[str, StoredArray] = {}
    leaves = jax.tree_util.tree_leaves(result)
    for leaf, value in zip(symmetry.leaves, leaves, strict=True):
        # JAX may have narrowed integers of 64 bits; those of the file are passed on instead.
        if leaf.moves:
            arrays[names[leaf.path]] = value if isinstance(value, LazyArray) else np.asarray(value)
    return arrays


# --- tied arrays


def _tied_in(others: Sequence[Checkpoint], naming: Naming, path: str) -> str:
    """Says of a missing array to which one it is equal in another checkpoint; or nothing."""
    # safetensors has one of two arrays that share their memory, and which one may differ by model.
    for other in others:
        names = naming.names(other)
        if path in names:
            for first, second in tied(other.arrays):
                if names[path] in (first, second):
                    twin = second if names[path] == first else first
                    return f"; in {other.path} it is tied to {twin}"
    return ""


def tied(arrays: Mapping[str, StoredArray]) -> list[tuple[str, str]]:
    """Finds arrays that are equal, as those are that a model uses twice.

    Args:
        arrays: Arrays by name.

    Returns:
        Pairs of names, the first of each in the order of the file. Vectors, which may be all zeros,
        do not count, and neither do matrices of one value.
    """
    first_of: dict[tuple[Any, ...], str] = {}
    pairs = []
    for name, array in arrays.items():
        if array.ndim < 2 or not jnp.issubdtype(array.dtype, jnp.inexact) or array.size < 2:
            continue
        content = np.ascontiguousarray(array).reshape(-1)
        # As fresh kernels of zeros are, in which nothing is tied.
        if (content == content[0]).all():
            continue
        digest = hashlib.sha256(content.view(np.uint8).data).digest()
        key = (array.dtype.name, array.shape, digest)
        if key in first_of:
            pairs.append((first_of[key], name))
        else:
            first_of[key] = name
    return pairs


def precision_of(checkpoints: Sequence[Checkpoint]) -> contextlib.AbstractContextManager[Any]:
    """Lets JAX compute in 64 bits if there are weights of 64 bits, which it would round otherwise.

    Args:
        checkpoints: All checkpoints of a command.

    Returns:
        A context.
    """
    for checkpoint in checkpoints:
        for array in checkpoint.arrays.values():
            if array.dtype.kind in "fc" and native(array).dtype in (np.float64, np.complex128):
                return enable_x64()
    return contextlib.nullcontext()


def enable_x64() -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which JAX has 64 bits, by whichever name this JAX has for it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    experimental = importlib.import_module("jax.experimental")
    return experimental.enable_x64(True)
