"""`otfusion check`: the proof that a symmetry is that of a network."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from otfusion_jax.cli.console import Console
from otfusion_jax.cli.functions import calling, draw_inputs, load_function, parse_inputs
from otfusion_jax.cli.models import fitted, precision_of
from otfusion_jax.cli.options import CommandWithSymmetry
from otfusion_jax.common.typing import PyTree
from otfusion_jax.files.checkpoint import Checkpoint
from otfusion_jax.symmetry.groups import leaves_of
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.verification import check_symmetry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(CommandWithSymmetry):
    """Move all units of a model at random, and see whether it computes the same; 1 if not.

    With --symmetry and --apply, the saved symmetry is checked; with --apply alone, that of a trace.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """The checkpoint."""
    tolerance: float = 1e-3
    """The largest relative change of an output that counts as rounding."""
    seed: int = 0
    """The seed of the inputs and of how units move."""

    def run(self, console: Console) -> int:
        """Carries the command out, see `Command.run`."""
        if self.apply is None or not self.input:
            raise ValueError(
                "a check runs the network: give --apply package.module:function and --input"
                " f32[8,64]"
            )
        if self.tolerance <= 0:
            raise ValueError(f"--tolerance is {self.tolerance}; give a number above 0")
        (checkpoint,) = self.read([self.model], console)
        with precision_of([checkpoint]):
            symmetry = self.find_symmetry(checkpoint, console)
            error = self._error(symmetry, checkpoint, console)
        if math.isnan(error):
            raise ValueError(
                "the network's outputs have NaN on random inputs, so that nothing can be compared:"
                " try another --seed, or integers within a bound, as i32[2,16]:100"
            )
        passed = error <= self.tolerance
        verdict = "the symmetry holds" if passed else "THE SYMMETRY DOES NOT HOLD"
        console.show(
            f"{verdict}: when all units of {len(symmetry)} groups move at random, an output changes"
            f" by {error:.2e} of the largest, and {self.tolerance:.0e} is allowed"
        )
        return 0 if passed else 1

    def _error(self, symmetry: Symmetry, checkpoint: Checkpoint, console: Console) -> float:
        """Returns the relative error of `check_symmetry`."""
        name = self.apply or ""
        fn = load_function(name)
        inputs = draw_inputs(parse_inputs(self.input), self.seed)
        params = self.naming.tree(checkpoint)
        treedef = jax.tree_util.tree_structure(params)
        positions = _positions(symmetry, params)

        # A symmetry that was saved may be of other containers than the function takes.
        def by_key_path(model: PyTree, *given: Any) -> Any:
            leaves = jax.tree_util.tree_leaves(model)
            in_order = [leaves[position] for position in positions]
            return fn(treedef.unflatten(in_order), *given)

        console.step("moving units at random")
        model = fitted(symmetry, checkpoint, self.naming)
        # Once before: what fails in the check is then not for want of other inputs.
        key = jax.random.key(self.seed)
        calling(name, lambda: by_key_path(model, *inputs))
        return check_symmetry(symmetry, by_key_path, model, *inputs, key=key)


def _positions(symmetry: Symmetry, params: PyTree) -> list[int]:
    """Returns for each leaf of a tree where the leaf of its key path is among a symmetry's."""
    position_of = {leaf.path: position for position, leaf in enumerate(symmetry.leaves)}
    return [position_of[leaf.path] for leaf in leaves_of(params)]
