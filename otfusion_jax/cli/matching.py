"""Commands that match units: by which method and solver, and between which widths."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.forward_pass import ForwardPass
from otfusion_jax.alignment.leaf_weights import counted_by_default
from otfusion_jax.alignment.method import AbstractMethod, Alignment
from otfusion_jax.averaging.statistics import AllBut
from otfusion_jax.cli.alignments import distance, finite, table_of_distances
from otfusion_jax.cli.console import Console
from otfusion_jax.cli.models import fitted
from otfusion_jax.cli.options import CommandWithSymmetry
from otfusion_jax.cli.report import Table
from otfusion_jax.common.typing import PyTree
from otfusion_jax.files.checkpoint import Checkpoint
from otfusion_jax.solvers.base import AbstractSolver
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.sinkhorn import Sinkhorn
from otfusion_jax.symmetry.canonical import canonicalize
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.transport import transport


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models to be matched, in canonical form where their symmetry has one.

    Attributes:
        symmetry: The symmetry of the source.
        onto: The symmetry of the target: the same one, unless widths differ.
        source: The parameters of the source.
        target: The parameters of the target.
    """

    symmetry: Symmetry
    onto: Symmetry
    source: PyTree
    target: PyTree

    @property
    def leaf_weight(self) -> AllBut | None:
        """How much each parameter counts: running statistics do not."""
        return counted_by_default(self.symmetry, self.source)

    def squared_distance(self) -> float | None:
        """Takes the squared distance of the models as they are, of what counts.

        A history of the alignment will not do: it may begin where a forward pass has ended.

        Returns:
            The distance, None if widths differ, or if it is not finite.
        """
        if self.symmetry != self.onto:
            return None
        counts = self.leaf_weight
        sources, targets = map(jax.tree_util.tree_leaves, (self.source, self.target))
        total = 0.0
        for number, leaf in enumerate(self.symmetry.leaves):
            if leaf.moves and (counts is None or counts(leaf.path)):
                total += distance(sources[number], targets[number]) ** 2
        return finite(total)

    def distances(self, before: str, after: str, moved: PyTree) -> Table:
        """Says how far the source is from the target, parameter by parameter.

        Args:
            before: What the distance of the source is called. It is left out if widths differ.
            after: What that of the moved source is called.
            moved: The source as it was moved.

        Returns:
            The table.
        """
        models = {after: moved}
        if self.symmetry == self.onto:
            models = {before: self.source, after: moved}
        return table_of_distances(self.onto, models, self.target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandThatAligns(CommandWithSymmetry):
    """A command that matches the units of models."""

    method: Literal["descent", "forward"] = "descent"
    """In which order groups are matched: by coordinate descent on all weights, or in one forward
    pass by incoming weights, Algorithm 1 of the paper."""
    solver: Literal["exact", "sinkhorn"] = "exact"
    """What makes plans of costs. Sinkhorn's are soft, and need --method forward."""
    epsilon: float = Sinkhorn.epsilon
    """The strength of Sinkhorn's entropy, in standard deviations of the cost."""
    other_widths: bool = False
    """Models may have other widths than each other: each is traced by itself, with --apply."""

    def require_matching(self) -> None:
        """Refuses flags that do not go together.

        Raises:
            ValueError: If they do not, saying which.
        """
        self.require_source()
        if self.other_widths and self.symmetry is not None:
            raise ValueError(
                "--other-widths needs --apply, to trace each model: the symmetry in"
                f" {self.symmetry} is that of one width"
            )
        if self.solver == "sinkhorn" and self.method == "descent":
            raise ValueError("--solver sinkhorn needs --method forward: descent takes exact plans")

    @property
    def chosen_method(self) -> AbstractMethod:
        """The method of the flags."""
        return CoordinateDescent() if self.method == "descent" else ForwardPass()

    @property
    def chosen_solver(self) -> AbstractSolver:
        """The solver of the flags."""
        return Exact() if self.solver == "exact" else Sinkhorn(epsilon=self.epsilon)

    def find_symmetries(
        self, checkpoints: Sequence[Checkpoint], like: Checkpoint, console: Console
    ) -> list[Symmetry]:
        """Finds the symmetry of each model.

        Args:
            checkpoints: The checkpoints of the models.
            like: The one whose symmetry is that of all, unless they have other widths.
            console: Where it says what it does.

        Returns:
            A symmetry for each model.
        """
        if not self.other_widths:
            return [self.find_symmetry(like, console)] * len(checkpoints)
        return [self.find_symmetry(checkpoint, console) for checkpoint in checkpoints]

    def read_pair(self, source: Checkpoint, target: Checkpoint, console: Console) -> Pair:
        """Reads two models and their symmetries.

        Args:
            source: The checkpoint of the model to be moved.
            target: The checkpoint of the model to be matched.
            console: Where it says what it does.

        Returns:
            The models.

        Raises:
            ValueError: If a model does not fit its symmetry.
        """
        symmetry, onto = self.find_symmetries([source, target], source, console)
        params = fitted(symmetry, source, self.naming, [target])
        target_params = fitted(onto, target, self.naming, [source])
        if symmetry.has_form:
            # Rotations and scales are those of models in canonical form.
            params = canonicalize(symmetry, params)
            target_params = canonicalize(onto, target_params)
        return Pair(symmetry, onto, params, target_params)

    def align_pair(self, pair: Pair, console: Console) -> tuple[Alignment, PyTree]:
        """Aligns a model to another one, as the flags say.

        Args:
            pair: The models.
            console: Where it says what it does.

        Returns:
            The alignment, and the source as it was moved.
        """
        console.step("aligning")
        alignment = align(
            pair.symmetry,
            pair.source,
            pair.target,
            onto=pair.onto,
            method=self.chosen_method,
            solver=self.chosen_solver,
        )
        return alignment, transport(pair.symmetry, alignment, pair.source, onto=pair.onto)
