"""All methods that the studies compare, by name; no other module knows one by its name.

A study speaks of the objects below, and their names appear on the command line, in records, in
tables and in plots. There are four kinds:

- a `Method` moves model A onto model B of the same architecture;
- a `Correction` makes one model of A, moved, and B; a `Fusion` is a method with a correction;
- a `WidthMethod` moves a model onto one of other widths;
- a `JointMethod` makes one model of many at once.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TypeVar

from jaxtyping import PyTree
from ott.geometry import costs

import otfusion_jax as otf
from experiments import alignments, corrections, crossings
from experiments.corrections import Weights
from experiments.crossings import Crossing
from experiments.networks import counts
from experiments.pairs import AS_TRAINED, WITH_ROTATIONS, WITH_SCALES, WITH_SIGNS, Form, Pair
from otfusion_jax.symmetry.groups import Plans

EVENLY: Weights = (0.5, 0.5)
"""The weights of two models that count alike."""


class Needs(enum.Enum):
    """What a method has to be given besides the weights of the models."""

    NOTHING = "weights alone"
    IMAGES = "images without labels"


class _Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> Needs: ...


N = TypeVar("N", bound=_Named)


def by_name(*methods: N) -> dict[str, N]:
    """Makes a registry of some methods.

    Args:
        *methods: The methods, in the order that tables show them in.

    Returns:
        The methods by their names.
    """
    return {method.name: method for method in methods}


def listed(methods: Mapping[str, _Named]) -> str:
    """Lists some methods for a help text.

    Args:
        methods: The methods by their names.

    Returns:
        The names, each in quotes as a shell takes them, and what is needed besides weights.
    """
    names = []
    for name, method in methods.items():
        needed = "" if method.needs is Needs.NOTHING else f" ({method.needs.value})"
        names.append(f"'{name}'{needed}")
    return ", ".join(names)


# --- corrections


@dataclasses.dataclass(frozen=True)
class Correction:
    """A way to make one model of A, moved, and B.

    Attributes:
        name: The name of the correction.
        needs: What it looks at besides the weights.
        average: Makes the model, of the pair, A as it was moved, and the weights of the two.
    """

    name: str
    needs: Needs
    average: Callable[[Pair, PyTree, Weights], PyTree]

    def __str__(self) -> str:
        return self.name


AVERAGED = Correction("averaged", Needs.NOTHING, corrections.averaged)
RESTORED = Correction("statistics restored", Needs.IMAGES, corrections.restored)


def _regressed(name: str, at: Literal["preactivation", "activation", "output"]) -> Correction:
    """Least squares on features at some place."""
    return Correction(name, Needs.IMAGES, functools.partial(corrections.regressed, at=at))


LEAST_SQUARES = _regressed("least squares", "preactivation")
LEAST_SQUARES_ON_ACTIVATIONS = _regressed("least squares on activations", "activation")
LEAST_SQUARES_ON_OUTPUTS = _regressed("least squares on outputs", "output")

CORRECTIONS = by_name(
    AVERAGED,
    RESTORED,
    LEAST_SQUARES,
    LEAST_SQUARES_ON_ACTIVATIONS,
    LEAST_SQUARES_ON_OUTPUTS,
)

# What follows a method in a table: nearly everything; or no least squares, which take longest; or
# what makes a difference where there are no ReLUs, and models need not agree on features.
_MOST = (AVERAGED, RESTORED, LEAST_SQUARES, LEAST_SQUARES_ON_ACTIVATIONS)
_FEW = (AVERAGED, RESTORED)
_ROTATED = (AVERAGED, RESTORED, LEAST_SQUARES, LEAST_SQUARES_ON_OUTPUTS)


# --- methods for two models of one architecture


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to move model A onto model B.

    Attributes:
        name: The name of the method.
        needs: What it looks at besides the weights.
        move: Gives A as it enters the average.
        form: The form that both models are brought into before.
        corrections: What follows it in a table of all methods. Of many variants, repairs are few.
    """

    name: str
    needs: Needs
    move: Callable[[Pair], PyTree]
    form: Form = AS_TRAINED
    corrections: tuple[Correction, ...] = _MOST

    def __str__(self) -> str:
        return self.name

    @property
    def short(self) -> str:
        """The name without what stands in brackets."""
        return self.name.partition(" (")[0]

    @property
    def is_special(self) -> bool:
        """Whether it moves units in more ways than all networks allow."""
        return self.form is not AS_TRAINED


def _weights(
    name: str, metric: costs.CostFn, unit_norm: bool, tabulated: tuple[Correction, ...]
) -> Method:
    """Algorithm 1 of the paper with weights, under some ground metric."""
    algorithm = otf.ForwardPass(unit_norm=unit_norm)
    return Method(
        name,
        Needs.NOTHING,
        lambda pair: alignments.by_weights(pair, algorithm, metric),
        corrections=tabulated,
    )


def _descent(
    name: str, form: Form = AS_TRAINED, tabulated: tuple[Correction, ...] = _MOST
) -> Method:
    """Coordinate descent on the weights of models in some form."""
    return Method(
        name,
        Needs.NOTHING,
        lambda pair: alignments.by_weights(pair, otf.CoordinateDescent()),
        form,
        tabulated,
    )


def _original(setting: str, metric: costs.CostFn, unit_norm: bool) -> Method:
    """What the original's own code does with weights: it moves the outputs as well."""
    algorithm = otf.ForwardPass(unit_norm=unit_norm)
    return Method(
        f"the original: {setting}",
        Needs.NOTHING,
        lambda pair: alignments.with_outputs(pair, algorithm, metric),
        corrections=(AVERAGED,),
    )


def _activations(name: str, samples: int, tabulated: tuple[Correction, ...]) -> Method:
    """Algorithm 1 of the paper with the activations of some images."""
    return Method(
        name,
        Needs.IMAGES,
        lambda pair: alignments.by_activations(pair, samples),
        corrections=tabulated,
    )


def _rotated(name: str, move: Callable[[Pair], PyTree]) -> Method:
    """A way to rotate A by what images say."""
    return Method(name, Needs.IMAGES, move, WITH_ROTATIONS, _ROTATED)


# A as it is: its units are not moved at all.
VANILLA = Method("vanilla average", Needs.NOTHING, lambda pair: pair.a)
WEIGHTS = _weights("Algorithm 1, weights", costs.SqEuclidean(), False, _MOST)
ACTIVATIONS = _activations("Algorithm 1, activations", 200, _MOST)
# What `otf.fuse` does unless it is told otherwise.
DESCENT = _descent("coordinate descent (fuse)")
# As in Git Re-Basin and REPAIR.
MATCHING = Method("activation matching (correlation)", Needs.IMAGES, alignments.by_correlations)
DESCENT_FROM_MATCHING = Method(
    "coordinate descent from activation matching",
    Needs.IMAGES,
    alignments.by_descent_from_correlations,
)

# Residual streams, and the dimensions inside of heads, are rotated.
ROTATED_DESCENT = _descent("coordinate descent, with rotations", WITH_ROTATIONS, _ROTATED)
ROTATED_BY_FEATURES = _rotated("features, with rotations", alignments.by_features)
ROTATED_DESCENT_FROM_FEATURES = _rotated(
    "coordinate descent from features, with rotations", alignments.by_descent_from_features
)
LEARNED_ROTATIONS = _rotated("learned rotations", alignments.by_learned_rotations)

# Units of odd functions change their signs, those of a ReLU their scales.
SIGNED_DESCENT = _descent("coordinate descent, with signs", WITH_SIGNS)
SIGNED_MATCHING = Method(
    "activation matching, with signs", Needs.IMAGES, alignments.by_correlations, WITH_SIGNS
)
SCALED_DESCENT = _descent("coordinate descent, with scales", WITH_SCALES)

# Those that every comparison shows.
METHODS = by_name(VANILLA, WEIGHTS, ACTIVATIONS, DESCENT)
VARIANTS = by_name(
    *METHODS.values(),
    _weights("Algorithm 1, weights, Euclidean", costs.Euclidean(), False, _FEW),
    _weights("Algorithm 1, weights, unit norm, squared", costs.SqEuclidean(), True, _FEW),
    _weights("Algorithm 1, weights, unit norm, Euclidean", costs.Euclidean(), True, _FEW),
    _original("squared", costs.SqEuclidean(), unit_norm=False),
    _original("Euclidean", costs.Euclidean(), unit_norm=False),
    _original("unit norm, squared", costs.SqEuclidean(), unit_norm=True),
    _original("unit norm, Euclidean", costs.Euclidean(), unit_norm=True),
    _activations("Algorithm 1, activations of 100", 100, _FEW),
    _activations("Algorithm 1, activations of 400", 400, _FEW),
    MATCHING,
    DESCENT_FROM_MATCHING,
    ROTATED_DESCENT,
    ROTATED_BY_FEATURES,
    ROTATED_DESCENT_FROM_FEATURES,
    LEARNED_ROTATIONS,
    SIGNED_DESCENT,
    SIGNED_MATCHING,
    SCALED_DESCENT,
)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A method with what makes one model of A, moved, and B.

    Attributes:
        method: What moves A.
        correction: What makes one model.
        weights: How much A and B count.
        label: A name of its own; empty for one made of those of method and correction.
    """

    method: Method
    correction: Correction = AVERAGED
    weights: Weights = EVENLY
    label: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def needs(self) -> Needs:
        """What the method or the correction looks at besides the weights."""
        if Needs.IMAGES in (self.method.needs, self.correction.needs):
            return Needs.IMAGES
        return Needs.NOTHING

    @property
    def name(self) -> str:
        """The name of the fusion, such as "coordinate descent, least squares"."""
        if self.label:
            return self.label
        if self.correction is AVERAGED:
            return self.method.short
        return f"{self.method.short}, {self.correction.name}"


# --- methods for two models of other widths


@dataclasses.dataclass(frozen=True)
class WidthMethod:
    """A way to move a model onto one of other widths.

    Attributes:
        name: The name of the method.
        plans: Finds the plans that A is moved along.
        as_original: Whether A, once moved, is scaled as in the original's code.
        narrows: Whether it can only make networks narrower.
        rotates: Whether units rotate where they can, as those of transformers do.
        needs: What it looks at besides the weights.
    """

    name: str
    plans: Callable[[Crossing], Plans]
    as_original: bool = False
    narrows: bool = False
    rotates: bool = False
    needs: Needs = Needs.NOTHING

    def __str__(self) -> str:
        return self.name


FORWARD_PASS_ACROSS = WidthMethod("Algorithm 1", crossings.by_forward_pass)
DESCENT_ACROSS = WidthMethod("coordinate descent", crossings.by_descent)

WIDTH_METHODS = by_name(
    WidthMethod(
        "Algorithm 1, scaled as in the original", crossings.by_forward_pass, as_original=True
    ),
    FORWARD_PASS_ACROSS,
    WidthMethod(
        "coordinate descent, scaled as in the original", crossings.by_descent, as_original=True
    ),
    DESCENT_ACROSS,
    WidthMethod("truncated by l1 norm", crossings.truncated, narrows=True),
    WidthMethod("truncated, then aligned", crossings.truncated_and_aligned, narrows=True),
    WidthMethod("coordinate descent, with rotations", crossings.by_descent, rotates=True),
)


# --- methods for many models


@dataclasses.dataclass(frozen=True)
class JointMethod:
    """A way to make one model of a stack of models.

    Attributes:
        name: The name of the method.
        fuse: Makes one model of a stack, or their barycenter.
        needs: What it looks at besides the weights.
    """

    name: str
    fuse: Callable[[otf.Symmetry, PyTree], PyTree | otf.Barycenter]
    needs: Needs = Needs.NOTHING


def _by_forward_pass(symmetry: otf.Symmetry, stack: PyTree) -> PyTree:
    return otf.fuse(symmetry, stack, method=otf.ForwardPass(), leaf_weight=counts)


def _by_descent(symmetry: otf.Symmetry, stack: PyTree) -> PyTree:
    return otf.fuse(symmetry, stack, leaf_weight=counts)


def _at_the_barycenter(symmetry: otf.Symmetry, stack: PyTree) -> otf.Barycenter:
    return otf.barycenter(symmetry, stack, leaf_weight=counts)


FUSE = JointMethod("fuse", _by_descent)
BARYCENTER = JointMethod("barycenter", _at_the_barycenter)

JOINT_METHODS = by_name(JointMethod("Algorithm 1", _by_forward_pass), FUSE, BARYCENTER)
