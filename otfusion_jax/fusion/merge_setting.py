"""What `merge` has to work with, and which ways to move models it tries.

All of it is known before the first trial: models, inputs, and the symmetries of the forms that
models are moved in.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from otfusion_jax.averaging.stacking import in_canonical_form
from otfusion_jax.common.host import Array, as_jax, as_numpy
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.candidates import Candidate, Task
from otfusion_jax.fusion.divergence import Objective
from otfusion_jax.fusion.drawn_inputs import look_like_images
from otfusion_jax.fusion.judges import Judge, Spread
from otfusion_jax.fusion.repair_methods import AbstractRepair
from otfusion_jax.fusion.samples import Samples
from otfusion_jax.symmetry.symmetry import Symmetry

AS_THEY_ARE = "as they are"
NOTHING = "nothing"
_WEIGHTS = "weights"
_TOKENS = (
    "Only floating-point inputs can be drawn at random: the weights alone have decided. Pass "
    "batches of inputs, or of tokens drawn from the range that they have."
)
_DRAWN_AT_RANDOM = (
    "The inputs were drawn at random: smooth noise cut at 0 to fit to, smooth noise to choose by."
)
_IMAGES_DRAWN = (
    "The inputs were drawn at random, as images of overlapping discs and squares. Which match is "
    "repaired, the weights have decided. Inputs that look like the data are better: pass batches."
)
_ROTATED = (
    "The inputs to match features by were drawn at random. Units are rotated, and so the weights "
    "have decided: what such an average answers to noise says little."
)


class Known(NamedTuple):
    """The inputs that are looked at.

    Attributes:
        example: Shapes of the inputs, two samples or more.
        fit: The inputs to fit to; None if there are none.
        held_out: The inputs to choose by; None if there are none.
        more: All but those to choose by, where they are many; None if there are no more.
        whole: All together; None if they are of two kinds.
    """

    example: tuple[PyTree, ...]
    fit: Samples | None
    held_out: Samples | None
    more: Samples | None = None
    whole: Samples | None = None

    @property
    def are_given(self) -> bool:
        """Whether inputs were given, and not drawn."""
        return self.whole is not None

    @property
    def most(self) -> int:
        """How many inputs are fitted to at most, with those to choose by once all is chosen."""
        # Where there are more, those that were held out are not fitted to in the end.
        last = self.whole if self.more is None else None
        counts = [x.count for x in (self.fit, self.held_out, last) if x is not None]
        return max(counts, default=0)

    def exchanged(self) -> "Known":
        """Returns the same with what is fitted to and what is chosen by exchanged."""
        return self._replace(fit=self.held_out, held_out=self.fit)


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What was asked for, checked.

    Attributes:
        fn: The function of the models.
        models: The parameters of the models as they were given.
        shares: How much each of them counts, float `[K]`.
        leaf_weight: How much each parameter counts.
        symmetry: The symmetry of the models.
        known: The inputs that are looked at.
        objective: What is to be small; None without inputs.
        mixes: Whether models are trained on mixtures of inputs.
        repairs: The repairs to try.
        update: A step in training mode, where running statistics are to be estimated anew.
        key: The source of randomness.
    """

    fn: Callable[..., Any]
    models: list[PyTree]
    shares: Array
    leaf_weight: Callable[[str], Any] | None
    symmetry: Symmetry
    known: Known
    objective: Objective | None
    mixes: bool
    repairs: tuple[AbstractRepair, ...]
    update: Callable[[PyTree, Any], PyTree] | None
    key: Array

    @property
    def free(self) -> Symmetry:
        """The symmetry with rotations and signs; the same as without, if there are none."""
        return self.symmetry.with_rotations().with_signs()

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the inputs."""
        if self.known.are_given:
            return ()
        if self.known.fit is None:
            return (_TOKENS,)
        if self.weights_decide:
            return (_ROTATED,)
        return (_IMAGES_DRAWN if self.weights_match else _DRAWN_AT_RANDOM,)

    @property
    def weights_decide(self) -> bool:
        """Whether weights alone decide.

        Where units rotate, as in transformers, what an average answers to noise says nothing of
        what it answers to data, and least squares on noise hurt it.
        """
        return not self.known.are_given and (self.known.fit is None or self.free.rotates)

    @property
    def spread(self) -> Spread:
        """What scores a match by the weights alone."""
        return Spread(self.shares, self.leaf_weight)

    @property
    def weights_match(self) -> bool:
        """Whether weights decide which match is repaired, and inputs by which repair.

        What is matched on one kind of noise is scored on another. Of images only one kind is drawn:
        what was matched on such looks best on others of them, and is not.
        """
        if self.known.are_given or self.weights_decide:
            return False
        return look_like_images(self.known.example)

    def judge(self) -> Judge | Spread:
        """Returns what scores averages."""
        if self.weights_decide or self.objective is None or self.known.held_out is None:
            return self.spread
        return Judge(self.objective, self.models, self.shares, self.known.held_out)

    def task(self, symmetry: Symmetry) -> Task:
        """Puts the models into the form of a symmetry."""
        models = self.models
        if symmetry.has_form:
            known = as_numpy(models)
            models = as_jax(in_canonical_form(symmetry, known, len(models), stacked=False))
        return Task(
            symmetry,
            self.fn,
            models,
            self.shares,
            self.leaf_weight,
            self.known.fit,
            self.known.most,
            self.objective,
            self.mixes,
            jax.random.fold_in(self.key, 1),
        )


class Step(NamedTuple):
    """A way to move models.

    Attributes:
        candidate: What they are matched by.
        symmetry: The symmetry of the form that they are moved in.
    """

    candidate: Candidate
    symmetry: Symmetry

    @property
    def start(self) -> str:
        """What the models are matched by."""
        return self.candidate.name

    @property
    def units(self) -> str:
        """What units are moved by, in a word."""
        if not self.candidate.moves:
            return NOTHING
        if self.symmetry.rotates:
            return "rotations"
        return "signs" if self.symmetry.orthogonal else "permutations"


def planned(candidates: list[Candidate], asked_for: bool, setting: Setting) -> list[Step]:
    """Says which candidates are tried, and with which symmetry.

    Args:
        candidates: The candidates.
        asked_for: Whether they were asked for, so that none may be left out.
        setting: The models, and what is known of them.

    Returns:
        The steps, in the order in which they are tried.

    Raises:
        ValueError: If a candidate that was asked for does not apply.
    """
    steps = []
    for candidate in candidates:
        problem = _why_not(candidate, setting)
        if problem and asked_for:
            raise ValueError(f"the candidate {candidate.name!r} does not apply: {problem}")
        if not problem:
            for symmetry in _forms(candidate, setting):
                steps.append(Step(candidate, symmetry))
    return steps


def _why_not(candidate: Candidate, setting: Setting) -> str:
    """Says why a candidate does not apply; nothing if it does."""
    if candidate.rotates and not setting.free.rotates:
        return "no units of this network can be rotated"
    if candidate.looks_at_inputs and setting.known.fit is None:
        return "there are no inputs to look at"
    if candidate.learns and not setting.known.are_given:
        return "what is learned on inputs drawn at random does not hold for others; pass batches"
    if candidate.permutes and setting.symmetry.orthogonal:
        return "the symmetry has rotations or signs; pass it without them"
    if candidate.least_models > len(setting.models):
        return f"of {len(setting.models)} models it makes what 'weights' makes"
    return ""


def _forms(candidate: Candidate, setting: Setting) -> list[Symmetry]:
    """Says with which symmetries a candidate is tried: with all freedoms, without, or both."""
    plain, free = setting.symmetry, setting.free
    if not free.orthogonal:
        return [plain]
    if setting.weights_decide:
        # Distances of weights can be compared in one form alone.
        return [free]
    if candidate.permutes or not candidate.moves:
        return [plain]
    # What `fuse` does unless it is told otherwise is tried beside the same with rotations. Signs
    # alone make less of a difference, which may be for the worse.
    tries_both = candidate.name == _WEIGHTS or not free.rotates
    return [plain, free] if tries_both and not plain.orthogonal else [free]
