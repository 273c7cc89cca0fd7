"""Align, compare and fuse neural networks that are pure functions of a pytree.

From top to bottom: trace the symmetry, measure the cost, solve for plans, transport, average.

    symmetry = otf.trace_symmetry(apply, params_a, x)
    plans = otf.align(symmetry, params_a, params_b)
    moved = otf.transport(symmetry, plans, params_a)
    fused = otf.fuse(symmetry, [params_a, params_b])
"""

from otfusion_jax.align import align
from otfusion_jax.barycenter import Barycenter, barycenter
from otfusion_jax.checks import SymmetryWarning
from otfusion_jax.corrections import AbstractRepair, LeastSquares, RestoreStatistics
from otfusion_jax.costs import Gram, feature_gram
from otfusion_jax.describe import draw
from otfusion_jax.entry_points import together
from otfusion_jax.evaluate import Barrier, barrier, ensemble, interpolate
from otfusion_jax.features import features
from otfusion_jax.frameworks import functional
from otfusion_jax.fuse import average, fuse, stack
from otfusion_jax.gromov import GromovWasserstein
from otfusion_jax.importance import feature_importance, weight_importance
from otfusion_jax.learning import LearnedAlignment, learn_alignment
from otfusion_jax.low_rank import LowRank
from otfusion_jax.methods import AbstractMethod, Alignment, CoordinateDescent, ForwardPass
from otfusion_jax.repair import Original, repair
from otfusion_jax.soft import Sinkhorn
from otfusion_jax.solvers import AbstractSolver, Exact, Solution
from otfusion_jax.symmetry import Group, Member, Pin, Symmetry
from otfusion_jax.trace import trace_symmetry
from otfusion_jax.training_state import transport_state
from otfusion_jax.transport import check_symmetry, compose, invert, transport
from otfusion_jax.walk import UnsupportedPrimitiveError, register

__all__ = [
    "AbstractMethod",
    "AbstractRepair",
    "AbstractSolver",
    "Alignment",
    "Barrier",
    "Barycenter",
    "CoordinateDescent",
    "Exact",
    "ForwardPass",
    "Gram",
    "GromovWasserstein",
    "Group",
    "LearnedAlignment",
    "LeastSquares",
    "LowRank",
    "Member",
    "Original",
    "Pin",
    "RestoreStatistics",
    "Sinkhorn",
    "Solution",
    "Symmetry",
    "SymmetryWarning",
    "UnsupportedPrimitiveError",
    "align",
    "average",
    "barrier",
    "barycenter",
    "check_symmetry",
    "compose",
    "draw",
    "ensemble",
    "feature_gram",
    "feature_importance",
    "features",
    "functional",
    "fuse",
    "interpolate",
    "invert",
    "learn_alignment",
    "register",
    "repair",
    "stack",
    "together",
    "trace_symmetry",
    "transport",
    "transport_state",
    "weight_importance",
]
