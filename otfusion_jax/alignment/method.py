"""What a method of alignment is, and what it returns."""

import abc
import dataclasses

import jax
from jaxtyping import Bool, Float
from ott.geometry import costs

from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.problem import AlignmentProblem
from otfusion_jax.common.host import Array
from otfusion_jax.common.html import html_table
from otfusion_jax.common.known import all_known
from otfusion_jax.symmetry.groups import Plans
from otfusion_jax.symmetry.plans import count_moved_units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alignment:
    """Plans that move a source model onto a target, with what is known of their quality.

    Attributes:
        plans: Group name to plan, as `transport` takes them.
        objective: The squared distance of the moved source to the target, float `[]`, summed over
            all parameters as they count (see `align`: running statistics do not). It is infinite if
            that is out of range, which does the plans no harm.
        history: For coordinate descent the objective at the start and after every sweep, float
            `[max_sweeps + 1]`, which stays as it is after the last sweep. Otherwise the objective
            before and after, float `[2]`.
        converged: Whether every solve converged and nothing was left to improve, bool `[]`.
        gaps: Group name to the duality gap of its last solve, in the units of its ground cost,
            float `[]`. For a nested group it is the largest gap of its batch.
    """

    plans: Plans
    objective: Float[Array, ""]
    history: Float[Array, " sweeps"]
    converged: Bool[Array, ""]
    gaps: dict[str, Float[Array, ""]]

    def _repr_html_(self) -> str:
        """Shows a table of the plans in a notebook."""
        if not all_known(self) or self.objective.ndim:
            # Inside of `jax.jit`, and of many alignments at once, there is no one number to show.
            return html_table(("group", "plan"), _shapes(self.plans), "Alignment")
        rows = []
        for name, plan in self.plans.items():
            moved = count_moved_units(plan)
            gap = f"{float(self.gaps[name]):.3g}" if name in self.gaps else ""
            text = "mixed" if moved is None else f"{moved:,}"
            rows.append((name, str(plan.shape), text, gap))
        caption = (
            f"Alignment: squared distance {float(self.history[0]):.4g} → "
            f"{float(self.objective):.4g}, {'' if self.converged else 'not '}converged"
        )
        return html_table(("group", "plan", "units moved", "gap"), rows, caption)


def _shapes(plans: Plans) -> list[tuple[str, str]]:
    """Returns a row for each plan: the name of its group, and its shape."""
    return [(name, str(plan.shape)) for name, plan in plans.items()]


class AbstractMethod(abc.ABC):
    """How the plans of all groups are found. Subclasses are frozen, hashable dataclasses."""

    @abc.abstractmethod
    def run(self, problem: AlignmentProblem, grams: dict[str, Gram] | None) -> Alignment:
        """Finds the plans, of known values or traced, as `problem.known` says.

        Args:
            problem: The models, the metric and the solver.
            grams: The inner products of activations by the names of groups, or None to use the
                weights.

        Returns:
            The alignment.
        """

    def cost_degree(self, metric: costs.CostFn, by_grams: bool) -> int:
        """Says in which power of the weights' unit the gaps are.

        Args:
            metric: The ground metric.
            by_grams: Whether inner products of activations are given.

        Returns:
            The power: that of squared distances between weights, unless the method says otherwise.
        """
        return 2
