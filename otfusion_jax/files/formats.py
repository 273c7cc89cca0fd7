"""Which format a file or a folder has, and the reader of that format."""

from pathlib import Path

from otfusion_jax.files import msgpack_format, npz_format, orbax_format, safetensors_format
from otfusion_jax.files.checkpoint import Checkpoint, CheckpointError

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".joblib")


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, in the format that its name says.

    Args:
        path: A file that ends in `.safetensors`, `.npz` or `.msgpack`; the index of several
            (`model.safetensors.index.json`), or their folder; or a folder of Orbax.

    Returns:
        The checkpoint, all of its arrays in memory.

    Raises:
        CheckpointError: If there is no such file, if it is damaged or of another format.
        ImportError: If the package that reads the format is not installed.
    """
    # By name and not by content: a file that lies about what it is is damaged.
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(safetensors_format.INDEX_SUFFIX):
        return safetensors_format.read_sharded(path)
    if path.suffix == safetensors_format.SUFFIX:
        return safetensors_format.read_safetensors(path)
    if path.suffix == npz_format.SUFFIX:
        return npz_format.read_npz(path)
    if path.suffix == msgpack_format.SUFFIX:
        return msgpack_format.read_msgpack(path)
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} may be a pickle, which runs what its author likes and is never opened. Save"
            ' it as safetensors, safetensors.torch.save_model(model, "model.safetensors")'
        )
    raise CheckpointError(
        f"{path} is none of .safetensors, .safetensors.index.json, .npz, .msgpack, and no folder of"
        " Orbax"
    )


def _read_folder(folder: Path) -> Checkpoint:
    indices = sorted(folder.glob("*" + safetensors_format.INDEX_SUFFIX))
    if len(indices) == 1:
        return safetensors_format.read_sharded(indices[0])
    if indices:
        raise CheckpointError(f"{folder} has {len(indices)} indices; name one of them")
    for mark in orbax_format.MARKS:
        if (folder / mark).exists():
            return orbax_format.read_orbax(folder)
    raise CheckpointError(
        f"{folder} has neither a {safetensors_format.INDEX_SUFFIX} nor {orbax_format.MARKS[0]}, as"
        " a folder of Orbax has; name the file, or the folder of one step"
    )
