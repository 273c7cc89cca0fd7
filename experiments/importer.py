"""Networks trained in PyTorch, as arrays in a file, as variables of a Flax module.

Files are safetensors or npz: arrays by name and nothing else. A pickle runs what its author likes,
so it is never opened.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

import otfusion_jax as otf

# Of each kind of module: PyTorch's parameters, and where Flax keeps them.
_PARAMETERS = {
    "convolution": {"weight": "params/{}/kernel", "bias": "params/{}/bias"},
    "dense layer": {"weight": "params/{}/kernel", "bias": "params/{}/bias"},
    "batch norm": {
        "weight": "params/{}/scale",
        "bias": "params/{}/bias",
        "running_mean": "batch_stats/{}/mean",
        "running_var": "batch_stats/{}/var",
    },
}
_COUNTER = "num_batches_tracked"  # of batch norm; nothing in Flax corresponds to it


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads arrays by name.

    Args:
        path: A file of safetensors, or an npz.

    Returns:
        Name to array.

    Raises:
        ValueError: The file is neither, is missing or damaged, or holds pickled objects.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except Exception as error:  # each of the readers has exceptions of its own
        raise ValueError(f"{path} can't be read: {error}") from error
    raise ValueError(
        f"{path} is neither .safetensors nor .npz. Save the state dict as one of these from"
        " PyTorch (`safetensors.torch.save_file`); pickled files are not opened."
    )


def import_pytorch(
    symmetry: otf.Symmetry,
    arrays: Mapping[str, np.ndarray],
    names: Mapping[str, str] | None = None,
) -> PyTree:
    """Brings arrays in PyTorch's names and layouts into the variables of a Flax module.

    Modules are paired within their kind (convolution, dense, batch norm) in the order of their
    names, numbers compared as numbers: `features.0`, `features.3` with `Conv_0`, `Conv_1`. Kernels
    are transposed from (out, in, height, width) and (out, in). Where a dense layer follows a
    flattened convolution, PyTorch counts channels first and Flax last; the symmetry knows how
    often each channel comes, and the kernel is reordered. A dense layer right after flattened input
    images of several channels is not: flatten these in one order in both.

    Args:
        symmetry: Of the Flax module, traced on all its variables; says what is expected.
        arrays: Name to array, such as `features.0.weight`.
        names: PyTorch's module to Flax's, such as `{"head": "Dense_0"}`, for those that their
            order does not pair rightly.

    Returns:
        The variables, in the dtypes of the module.

    Raises:
        ValueError: Arrays are missing, left over, of other shapes or not finite; all are listed.
    """
    expected = {leaf.path: leaf for leaf in symmetry.leaves}
    theirs = _modules((name for name in arrays if not name.endswith(_COUNTER)), ".")
    mine = _modules((path.partition("/")[2] for path in expected), "/")
    kinds = {module: _kind(np.ndim(arrays.get(f"{module}.weight", ()))) for module in theirs}
    flax_kinds = {
        module: _kind(len(expected[f"params/{module}/kernel"].shape) if "kernel" in found else 1)
        for module, found in mine.items()
    }
    receivers = _pair(kinds, flax_kinds, names or {})

    filled: dict[str, np.ndarray] = {}
    wrong = []
    for module, parameters in theirs.items():
        for parameter in parameters:
            name = f"{module}.{parameter}"
            place = _PARAMETERS[kinds[module]].get(parameter)
            path = place.format(receivers[module]) if place and module in receivers else ""
            if path not in expected:
                wrong.append(f"  {name}: {kinds[module]}, nothing to receive it")
                continue
            array = np.asarray(arrays[name])
            value, shape = _arranged(symmetry, path, array), expected[path].shape
            if value is None or value.shape != shape:
                wrong.append(f"  {name}: shape {array.shape} does not fit {path}, {shape} in Flax")
            elif not np.isfinite(value).all():
                wrong.append(f"  {name}: values that are not finite")
            else:
                value = value.astype(expected[path].dtype)
            filled[path] = array if value is None else value
    wrong += [f"  {path}: no array for it" for path in expected if path not in filled]
    if wrong:
        raise ValueError(
            "These arrays do not fit the model (another architecture or width? biases or batch norm"
            " on one side alone? modules in another order, which `names` can say?):\n"
            + "\n".join(wrong)
        )
    return jax.tree.unflatten(symmetry.treedef, [filled[path] for path in expected])


def _modules(names: Iterable[str], separator: str) -> dict[str, list[str]]:
    """Groups parameters by module, modules in natural order: `layer10` comes after `layer2`."""
    found: dict[str, list[str]] = {}
    for name in names:
        module, _, parameter = name.rpartition(separator)
        found.setdefault(module, []).append(parameter)

    def key(module: str) -> list[tuple[int, str]]:
        return [
            (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", module)
        ]

    return {module: sorted(set(found[module])) for module in sorted(found, key=key)}


def _kind(rank: int) -> str:
    """Tells a module's kind by the rank of its weight."""
    return {4: "convolution", 2: "dense layer"}.get(rank, "batch norm")


def _pair(
    theirs: Mapping[str, str], mine: Mapping[str, str], names: Mapping[str, str]
) -> dict[str, str]:
    """Pairs modules with those of their kind, in order, but for those named."""
    strange = [f"{a!r}" for a in names if a not in theirs]
    strange += [f"{b!r}" for b in names.values() if b not in mine]
    if strange:
        raise ValueError(f"`names` speaks of modules that are not there: {', '.join(strange)}.")
    receivers = dict(names)
    for kind in _PARAMETERS:
        left = [a for a, found in theirs.items() if found == kind and a not in names]
        free = [b for b, found in mine.items() if found == kind and b not in names.values()]
        receivers.update(zip(left, free, strict=False))  # what is over will be reported
    return receivers


def _arranged(symmetry: otf.Symmetry, path: str, array: np.ndarray) -> np.ndarray | None:
    """Brings an array from PyTorch's layout to Flax's; None if it can't be."""
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if array.ndim != 2:
        return None
    for group in symmetry.groups:
        for member in group.members:
            if (member.path, member.axis) == (path, 0) and member.before > 1:
                if array.shape[1] != group.size * member.before * member.after:
                    return None
                split = array.reshape(len(array), group.size, member.before)
                array = split.transpose(0, 2, 1).reshape(len(array), -1)
    return array.T
