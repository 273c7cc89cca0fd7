"""Align, compare and fuse neural networks that are pure functions of a pytree.

From top to bottom: trace the symmetry, measure the cost, solve for plans, transport, average.

    symmetry = otf.trace_symmetry(apply, params_a, x)
    plans = otf.align(symmetry, params_a, params_b)
    moved = otf.transport(symmetry, plans, params_a)
    fused = otf.fuse(symmetry, [params_a, params_b])
"""

from otfusion_jax.alignment.align import align
from otfusion_jax.alignment.coordinate_descent import CoordinateDescent
from otfusion_jax.alignment.costs import Gram
from otfusion_jax.alignment.feature_gram import feature_gram
from otfusion_jax.alignment.forward_pass import ForwardPass
from otfusion_jax.alignment.learned import LearnedAlignment, learn_alignment
from otfusion_jax.alignment.loss_descent import LearningState
from otfusion_jax.alignment.marginals import feature_importance, weight_importance
from otfusion_jax.alignment.method import AbstractMethod, Alignment
from otfusion_jax.averaging.adapters import LowRankPair, average_adapters
from otfusion_jax.averaging.average import average
from otfusion_jax.averaging.batch_norm import BatchNorm, fold_batch_norm, unfold_batch_norm
from otfusion_jax.averaging.estimation import estimate_statistics
from otfusion_jax.averaging.fisher import fisher_average
from otfusion_jax.averaging.interpolate import interpolate
from otfusion_jax.averaging.regmean import regmean
from otfusion_jax.averaging.slerp import slerp
from otfusion_jax.averaging.soup import Soup, greedy_soup
from otfusion_jax.averaging.stacking import stack
from otfusion_jax.averaging.statistics import StatisticsWarning, running_statistics
from otfusion_jax.averaging.task_vectors import dare, task_arithmetic, ties
from otfusion_jax.common.lazy import LazyArray
from otfusion_jax.evaluation.barrier import Barrier, barrier
from otfusion_jax.evaluation.cka import linear_cka
from otfusion_jax.evaluation.ensemble import ensemble
from otfusion_jax.evaluation.plane import Plane, plane
from otfusion_jax.evaluation.similarity import GroupSimilarity, Similarity, similarity
from otfusion_jax.files.formats import read_checkpoint
from otfusion_jax.files.writing import write_like
from otfusion_jax.fusion.barycenter import Barycenter, barycenter
from otfusion_jax.fusion.distill import distill
from otfusion_jax.fusion.fuse import fuse
from otfusion_jax.fusion.least_squares import LeastSquares
from otfusion_jax.fusion.merge import merge
from otfusion_jax.fusion.merge_report import Line, Merged, Report, Trial
from otfusion_jax.fusion.mixup import mixup
from otfusion_jax.fusion.repair import Original, repair
from otfusion_jax.fusion.repair_methods import AbstractRepair, RestoreStatistics
from otfusion_jax.fusion.repair_programs import RepairWarning
from otfusion_jax.fusion.shared import SharedFusion, Unshared, fuse_shared
from otfusion_jax.pictures.drawing import draw
from otfusion_jax.pictures.path import plot_path
from otfusion_jax.pictures.plane import plot_plane
from otfusion_jax.pictures.plans import plot_plans
from otfusion_jax.pictures.similarity import plot_similarity
from otfusion_jax.solvers.base import AbstractSolver, Solution, TransportProblem
from otfusion_jax.solvers.exact import Exact
from otfusion_jax.solvers.gromov_wasserstein import GromovWasserstein
from otfusion_jax.solvers.low_rank import LowRank
from otfusion_jax.solvers.sinkhorn import Sinkhorn
from otfusion_jax.symmetry.canonical import canonicalize
from otfusion_jax.symmetry.checks import SymmetryWarning
from otfusion_jax.symmetry.groups import (
    Fold,
    Freedom,
    Group,
    Member,
    Offset,
    OffsetReader,
    Pin,
    Scaling,
)
from otfusion_jax.symmetry.plans import compose, invert
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.symmetry.training_state import transport_state
from otfusion_jax.symmetry.transport import transport
from otfusion_jax.tracing.activations import features
from otfusion_jax.tracing.axis import Axis, Kind
from otfusion_jax.tracing.context import RuleContext
from otfusion_jax.tracing.modules import functional
from otfusion_jax.tracing.programs import together
from otfusion_jax.tracing.registry import UnsupportedPrimitiveError, register_rule
from otfusion_jax.tracing.trace import trace_symmetry
from otfusion_jax.tracing.values import TracedValue
from otfusion_jax.tracing.verification import check_symmetry

__version__ = "0.1.0"

__all__ = [
    "AbstractMethod",
    "AbstractRepair",
    "AbstractSolver",
    "Alignment",
    "Axis",
    "Barrier",
    "Barycenter",
    "BatchNorm",
    "CoordinateDescent",
    "Exact",
    "Fold",
    "ForwardPass",
    "Freedom",
    "Gram",
    "GromovWasserstein",
    "Group",
    "GroupSimilarity",
    "Kind",
    "LazyArray",
    "LearnedAlignment",
    "LearningState",
    "LeastSquares",
    "Line",
    "LowRank",
    "LowRankPair",
    "Member",
    "Merged",
    "Offset",
    "OffsetReader",
    "Original",
    "Pin",
    "Plane",
    "Report",
    "RepairWarning",
    "RestoreStatistics",
    "RuleContext",
    "Scaling",
    "SharedFusion",
    "Similarity",
    "Sinkhorn",
    "Solution",
    "Soup",
    "StatisticsWarning",
    "Symmetry",
    "SymmetryWarning",
    "TracedValue",
    "TransportProblem",
    "Unshared",
    "Trial",
    "UnsupportedPrimitiveError",
    "align",
    "average",
    "average_adapters",
    "barrier",
    "barycenter",
    "canonicalize",
    "check_symmetry",
    "compose",
    "dare",
    "distill",
    "draw",
    "ensemble",
    "estimate_statistics",
    "feature_gram",
    "feature_importance",
    "features",
    "fisher_average",
    "fold_batch_norm",
    "functional",
    "fuse",
    "fuse_shared",
    "greedy_soup",
    "interpolate",
    "invert",
    "learn_alignment",
    "linear_cka",
    "merge",
    "mixup",
    "plane",
    "plot_path",
    "plot_plane",
    "plot_plans",
    "plot_similarity",
    "read_checkpoint",
    "register_rule",
    "regmean",
    "repair",
    "running_statistics",
    "similarity",
    "slerp",
    "stack",
    "task_arithmetic",
    "ties",
    "together",
    "trace_symmetry",
    "transport",
    "transport_state",
    "unfold_batch_norm",
    "weight_importance",
    "write_like",
]
