"""The flags that commands share: where a symmetry comes from, and how names are read."""

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro

from otfusion_jax.cli.console import Console
from otfusion_jax.cli.functions import FunctionError, calling, load_function, parse_inputs
from otfusion_jax.cli.models import Naming
from otfusion_jax.files.checkpoint import Checkpoint, CheckpointError, require_regular
from otfusion_jax.files.formats import read_checkpoint
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.trace import trace_symmetry

# Of a network of a thousand layers it is a few megabytes.
_LONGEST_SYMMETRY = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(abc.ABC):
    """A command: its fields are its flags."""

    quiet: bool = False
    """Say nothing of what is being done."""
    lazily: bool = False
    """Read safetensors array by array, whenever one is needed, for models larger than the memory.
    """

    @abc.abstractmethod
    def run(self, console: Console) -> int:
        """Carries the command out.

        Args:
            console: Where it says what it does.

        Returns:
            The exit status.
        """

    def read(self, paths: Sequence[Path], console: Console) -> list[Checkpoint]:
        """Reads checkpoints.

        Args:
            paths: Their files or folders.
            console: Where it says what it does.

        Returns:
            The checkpoints.

        Raises:
            ValueError: If one of them cannot be read.
        """
        checkpoints = []
        for number, path in enumerate(paths, start=1):
            console.step(f"reading {path} ({number} of {len(paths)})")
            checkpoints.append(read_checkpoint(path, lazily=self.lazily))
        return checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandWithFunction(Command):
    """A command that may be given a network's function."""

    apply: Annotated[str | None, tyro.conf.arg(metavar="MODULE:FUNCTION")] = None
    """The network's function of its parameters and inputs. Parameters are a dict by name, or nested
    dicts if there is a separator, or if the format nests."""
    input: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="SHAPE")
    ] = ()
    """Dtype and shape of an input, as f32[8,64], or i32[2,16]:100 for integers below 100. Give it
    once for each input."""
    separator: str = ""
    """What stands between the keys of a name, such as a point or a slash."""
    subtree: str = ""
    """The keys, joined by slashes, below which the parameters are; all else is passed on."""

    @property
    def naming(self) -> Naming:
        """How the names of files are read."""
        return Naming(self.separator, self.subtree)

    def trace(
        self, checkpoint: Checkpoint, inputs: Sequence[jax.ShapeDtypeStruct], console: Console
    ) -> Symmetry:
        """Traces the network.

        Args:
            checkpoint: A checkpoint whose parameters the function takes.
            inputs: What its inputs look like.
            console: Where it says what it does.

        Returns:
            The symmetry.

        Raises:
            ValueError: If there is no such function, or if it fails.
        """
        name = self.apply or ""
        fn = load_function(name)
        params = self.naming.tree(checkpoint)
        console.step(f"tracing {name}")
        # First without the library: what fails then is the function's, or its inputs'.
        calling(name, lambda: jax.eval_shape(fn, params, *inputs))
        try:
            return trace_symmetry(fn, params, *inputs)
        except TypeError as error:  # a function of other arguments, or that returns no arrays
            raise FunctionError(f"{name} can't be traced: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandWithSymmetry(CommandWithFunction):
    """A command that needs the symmetry of a network."""

    symmetry: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """The symmetry of an earlier trace (inspect --save-symmetry), in the place of a function."""
    rotations: bool = False
    """Let units rotate where the network allows it, as transformers need it."""
    signs: bool = False
    """Let units change their signs where the network allows it."""
    scales: bool = False
    """Balance the scales of units where the network allows it."""

    @property
    def knows_symmetry(self) -> bool:
        """Whether there are flags that say where the symmetry comes from."""
        return self.apply is not None or self.symmetry is not None

    def require_source(self) -> None:
        """Refuses flags that say of no symmetry, or of two.

        Raises:
            ValueError: If there are neither --apply nor --symmetry, or both.
        """
        if not self.knows_symmetry:
            raise ValueError(
                "which axes move together is not known: give --apply package.module:function and"
                " --input f32[1,64], or --symmetry file.json of an earlier trace"
            )
        if self.apply is not None and self.symmetry is not None:
            raise ValueError("--apply and --symmetry are both given; give one of them")
        if self.apply is not None and not self.input:
            raise ValueError("--apply needs example inputs, as --input f32[1,64]")

    def find_symmetry(self, checkpoint: Checkpoint, console: Console) -> Symmetry:
        """Traces the network, or reads its symmetry.

        Args:
            checkpoint: A checkpoint whose parameters the function takes.
            console: Where it says what it does.

        Returns:
            The symmetry, with what the flags allow beyond permutations.

        Raises:
            ValueError: If the function fails, or the file is no symmetry.
        """
        # Signs come after rotations, which have them among their matrices.
        symmetry = self._found(checkpoint, console)
        if self.rotations:
            symmetry = symmetry.with_rotations()
        if self.signs:
            symmetry = symmetry.with_signs()
        return symmetry.with_scales() if self.scales else symmetry

    def _found(self, checkpoint: Checkpoint, console: Console) -> Symmetry:
        # A check has both: it proves what was saved.
        if self.symmetry is not None:
            console.step(f"reading {self.symmetry}")
            return read_symmetry(self.symmetry)
        return self.trace(checkpoint, shapes_of(self.input), console)


def shapes_of(words: Sequence[str]) -> list[jax.ShapeDtypeStruct]:
    """Reads what inputs look like.

    Args:
        words: The words of --input.

    Returns:
        Their shapes and dtypes.
    """
    return [struct for struct, _ in parse_inputs(words)]


def read_symmetry(path: Path) -> Symmetry:
    """Reads a symmetry that was saved.

    Args:
        path: The file.

    Returns:
        The symmetry.

    Raises:
        CheckpointError: If there is no such file, or if it holds no symmetry, saying where.
    """
    if require_regular(path) > _LONGEST_SYMMETRY:
        raise CheckpointError(f"{path} is too long for a symmetry")
    try:
        return Symmetry.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
