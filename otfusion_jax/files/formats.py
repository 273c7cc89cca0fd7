"""Which format a file or a folder has, and the reader of that format."""

from pathlib import Path

from otfusion_jax.files import msgpack_format, npz_format, orbax_format, safetensors_format
from otfusion_jax.files.checkpoint import Checkpoint, CheckpointError

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".joblib")


def read_checkpoint(path: Path, *, lazily: bool = False) -> Checkpoint:
    """Reads a checkpoint, in the format that its name says.

    Args:
        path: A file that ends in `.safetensors`, `.npz` or `.msgpack`; the index of several
            (`model.safetensors.index.json`), or their folder; or a folder of Orbax.
        lazily: Whether to leave arrays on disk, to be read whenever they are looked at.

    Returns:
        The checkpoint; all of its arrays are in memory unless it is read lazily.

    Raises:
        CheckpointError: If there is no such file, if it is damaged or of another format, or of one
            that cannot be read lazily.
        ImportError: If the package that reads the format is not installed.
    """
    # By name and not by content: a file that lies about what it is is damaged.
    if path.is_dir():
        return _read_folder(path, lazily)
    if path.name.endswith(safetensors_format.INDEX_SUFFIX):
        return safetensors_format.read_sharded(path, lazily=lazily)
    if path.suffix == safetensors_format.SUFFIX:
        return safetensors_format.read_safetensors(path, lazily=lazily)
    if lazily:
        raise _not_lazily(path)
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


def _not_lazily(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} can't be read array by array, as safetensors and folders of Orbax can; write it"
        " as such, or read it into memory"
    )


def _read_folder(folder: Path, lazily: bool) -> Checkpoint:
    indices = sorted(folder.glob("*" + safetensors_format.INDEX_SUFFIX))
    if len(indices) == 1:
        return safetensors_format.read_sharded(indices[0], lazily=lazily)
    if indices:
        raise CheckpointError(f"{folder} has {len(indices)} indices; name one of them")
    for mark in orbax_format.MARKS:
        if (folder / mark).exists():
            return orbax_format.read_orbax(folder, lazily=lazily)
    raise CheckpointError(
        f"{folder} has neither a {safetensors_format.INDEX_SUFFIX} nor {orbax_format.MARKS[0]}, as"
        " a folder of Orbax has; name the file, or the folder of one step"
    )
