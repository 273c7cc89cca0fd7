"""A model that is fused with one of other widths, and what moves it; methods.py names the ways."""

import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import Array, PyTree

import otfusion_jax as otf
from experiments.narrow import reordered, selected, sizes, strongest
from experiments.networks import Network, counts
from otfusion_jax.symmetry.groups import Plans


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Two models that differ in widths; one is to be moved into the shapes of the other.

    Attributes:
        source: The architecture of A.
        target: The architecture of B: that of A with other widths.
        a: The variables of the model that is moved.
        b: The variables of the model that it is moved onto.
    """

    source: Network
    target: Network
    a: PyTree
    b: PyTree

    def rotating(self) -> "Crossing":
        """Returns the models in the form in which their units may rotate, and do where they can."""
        source = dataclasses.replace(self.source, symmetry=self.source.symmetry.with_rotations())
        target = dataclasses.replace(self.target, symmetry=self.target.symmetry.with_rotations())
        return Crossing(
            source,
            target,
            otf.canonicalize(source.symmetry, self.a),
            otf.canonicalize(target.symmetry, self.b),
        )

    def moved(self, plans: Plans) -> PyTree:
        """Moves A along plans into the shapes of B.

        Args:
            plans: The plan of each group of A, by its name.
        """
        return otf.transport(self.source.symmetry, plans, self.a, onto=self.target.symmetry)


def repaired(
    crossing: Crossing,
    plans: Plans,
    models: Sequence[PyTree],
    weights: tuple[float, ...],
    images: Array,
) -> PyTree:
    """Averages A as it was moved, and B if it is given too, and repairs by least squares.

    Args:
        crossing: The models. The features of A before the move are what it is to keep.
        plans: The plans that A was moved along.
        models: A as it was moved, and B or nothing.
        weights: How much each of them counts.
        images: Images without labels, on which features are taken.

    Returns:
        The average, repaired.
    """
    source = crossing.source
    target = crossing.target
    before = otf.Original(source.symmetry, source.apply, crossing.a, plans)
    originals = [before, None]  # B has not been moved
    return otf.repair(
        target.symmetry,
        target.apply,
        models,
        images,
        weights=weights,
        method=otf.LeastSquares(),
        originals=originals[: len(models)],
    )


def by_forward_pass(crossing: Crossing) -> Plans:
    """Finds plans by Algorithm 1 of the paper, with weights."""
    return _aligned(crossing, otf.ForwardPass())


def by_descent(crossing: Crossing) -> Plans:
    """Finds plans by coordinate descent on the weights."""
    return _aligned(crossing, otf.CoordinateDescent())


def truncated(crossing: Crossing) -> Plans:
    """Keeps the units with the largest incoming weights, in their order."""
    symmetry = crossing.source.symmetry
    units = strongest(symmetry, crossing.a, sizes(crossing.target.symmetry))
    return selected(symmetry, units)


def truncated_and_aligned(crossing: Crossing) -> Plans:
    """Keeps the units with the largest incoming weights, in the order of those of B."""
    few = truncated(crossing)
    order = otf.align(crossing.target.symmetry, crossing.moved(few), crossing.b, leaf_weight=counts)
    return reordered(crossing.source.symmetry, few, order.plans)


def as_original(source: Network, target: Network, moved: PyTree) -> PyTree:
    """Scales a moved model as the original's code does.

    There, what consumes units is multiplied by P diag(1/b), as what produces them is, and not by
    diag(1/a) P. Where n units become m, this makes each kernel m/n times as large.

    Args:
        source: The architecture that the model comes from.
        target: The architecture that it has been moved to.
        moved: The variables that it has there.

    Returns:
        The variables, scaled.
    """
    leaves, treedef = jax.tree.flatten(moved)
    new_sizes = sizes(target.symmetry)
    for group in source.symmetry.groups:
        # m/n of the docstring; groups that keep their size are left as they are.
        factor = new_sizes[group.name] / group.size
        for member in group.having("consumes"):
            leaves[member.leaf] = leaves[member.leaf] * factor
    return jax.tree.unflatten(treedef, leaves)


def _aligned(crossing: Crossing, method: otf.AbstractMethod) -> Plans:
    alignment = otf.align(
        crossing.source.symmetry,
        crossing.a,
        crossing.b,
        onto=crossing.target.symmetry,
        method=method,
        leaf_weight=counts,
    )
    return alignment.plans
