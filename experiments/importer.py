"""Networks trained in PyTorch, as arrays in a file, as variables of a Flax module.

Files are safetensors or npz: arrays by name and nothing else. A pickle runs what its author likes,
so it is never opened. Modules are paired in the order of their names, kernels are brought into
Flax's layout, and everything that does not fit is listed in one error.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

import otfusion_jax as otf
from otfusion_jax.symmetry.groups import Leaf

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
        The arrays of the file, by their names.

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
        symmetry: The symmetry of the Flax module, traced on all its variables. It says which leaves
            are expected, and their shapes.
        arrays: The arrays by their names, such as `features.0.weight`.
        names: Flax's module for a module of PyTorch, such as `{"head": "Dense_0"}`, for those that
            their order does not pair rightly.

    Returns:
        The variables, in the dtypes of the module.

    Raises:
        ValueError: Arrays are missing, left over, of other shapes or not finite; all are listed.
    """
    expected = {leaf.path: leaf for leaf in symmetry.leaves}
    # Without the collection in front: `params/Conv_0/kernel` is of the module `Conv_0`.
    flax_names = [path.partition("/")[2] for path in expected]
    pytorch_modules = _modules(arrays, ".")
    flax_modules = _modules(flax_names, "/")

    pytorch_kinds = {}
    for module in pytorch_modules:
        weight = arrays.get(f"{module}.weight")
        pytorch_kinds[module] = _kind(0 if weight is None else weight.ndim)
    flax_kinds = {}
    for module, parameters in flax_modules.items():
        rank = 1
        if "kernel" in parameters:
            kernel = expected[f"params/{module}/kernel"]
            rank = len(kernel.shape)
        flax_kinds[module] = _kind(rank)
    receivers = _pair(pytorch_kinds, flax_kinds, names or {})

    filling = _Filling(symmetry, expected)
    for module, parameters in pytorch_modules.items():
        kind = pytorch_kinds[module]
        for parameter in parameters:
            name = f"{module}.{parameter}"
            template = _PARAMETERS[kind].get(parameter)
            if template is None or module not in receivers:
                filling.refuse(f"{name}: {kind}, nothing to receive it")
            else:
                path = template.format(receivers[module])
                filling.fill(path, name, kind, arrays[name])
    return filling.tree()


@dataclasses.dataclass
class _Filling:
    """Variables of a Flax module that are being filled, and what was wrong with arrays so far."""

    symmetry: otf.Symmetry
    expected: Mapping[str, Leaf]
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Notes what is wrong with one array: all are to be reported at once."""
        self.wrong.append(f"  {reason}")

    def fill(self, path: str, name: str, kind: str, array: np.ndarray) -> None:
        """Puts an array into the leaf of a path, or notes why it does not fit."""
        if path not in self.expected:
            self.refuse(f"{name}: {kind}, nothing to receive it")
            return
        array = np.asarray(array)
        # A leaf for which there was an array is not missing, even where the array was refused.
        self.values[path] = array
        shape = self.expected[path].shape
        value = _arranged(self.symmetry, path, array)
        if value is None or value.shape != shape:
            self.refuse(f"{name}: shape {array.shape} does not fit {path}, {shape} in Flax")
        elif not np.isfinite(value).all():
            self.refuse(f"{name}: values that are not finite")
        else:
            self.values[path] = value.astype(self.expected[path].dtype)

    def tree(self) -> PyTree:
        """Returns the variables, if all of them are there and nothing was wrong."""
        for path in self.expected:
            if path not in self.values:
                self.refuse(f"{path}: no array for it")
        if self.wrong:
            raise ValueError(
                "These arrays do not fit the model (another architecture or width? biases or batch"
                " norm on one side alone? modules in another order, which `names` can say?):\n"
                + "\n".join(self.wrong)
            )
        leaves = [self.values[path] for path in self.expected]
        return jax.tree.unflatten(self.symmetry.treedef, leaves)


def _modules(names: Iterable[str], separator: str) -> dict[str, list[str]]:
    """Groups parameters by module, modules in natural order: `layer10` comes after `layer2`."""
    parameters: dict[str, set[str]] = {}
    for name in names:
        if not name.endswith(_COUNTER):
            module, _, parameter = name.rpartition(separator)
            parameters.setdefault(module, set()).add(parameter)
    ordered = {}
    for module in sorted(parameters, key=_natural_order):
        ordered[module] = sorted(parameters[module])
    return ordered


def _natural_order(module: str) -> list[tuple[int, str]]:
    """Returns a key to sort modules by, in which numbers are compared as numbers."""
    key = []
    for part in re.split(r"(\d+)", module):
        # Numbers come after words; a pair of each never compares an int with a string.
        if part.isdigit():
            key.append((int(part), ""))
        else:
            key.append((-1, part))
    return key


def _kind(rank: int) -> str:
    """Tells a module's kind by the rank of its weight."""
    kinds = {4: "convolution", 2: "dense layer"}
    return kinds.get(rank, "batch norm")


def _pair(
    pytorch_kinds: Mapping[str, str],
    flax_kinds: Mapping[str, str],
    names: Mapping[str, str],
) -> dict[str, str]:
    """Pairs modules with those of their kind, in order, but for those named."""
    unknown = [module for module in names if module not in pytorch_kinds]
    unknown += [module for module in names.values() if module not in flax_kinds]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise ValueError(f"`names` speaks of modules that are not there: {listed}.")
    receivers = dict(names)
    for kind in _PARAMETERS:
        senders = []
        for module, its_kind in pytorch_kinds.items():
            if its_kind == kind and module not in names:
                senders.append(module)
        free = []
        for module, its_kind in flax_kinds.items():
            if its_kind == kind and module not in names.values():
                free.append(module)
        # Of a longer list, what is over will be reported.
        receivers.update(zip(senders, free, strict=False))
    return receivers


def _arranged(symmetry: otf.Symmetry, path: str, array: np.ndarray) -> np.ndarray | None:
    """Brings an array from PyTorch's layout to Flax's; None if it can't be."""
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4:
        # (out, in, height, width) to (height, width, in, out).
        return array.transpose(2, 3, 1, 0)
    if array.ndim != 2:
        return None
    for group in symmetry.groups:
        for member in group.members:
            follows_flattening = member.before > 1
            if (member.path, member.axis) == (path, 0) and follows_flattening:
                if array.shape[1] != group.size * member.before * member.after:
                    return None
                # PyTorch flattens (channels, pixels), Flax (pixels, channels).
                by_channel = array.reshape(len(array), group.size, member.before)
                by_pixel = by_channel.transpose(0, 2, 1)
                array = by_pixel.reshape(len(array), -1)
    return array.T
