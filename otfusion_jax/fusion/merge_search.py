"""Trying what the library has to merge models, and keeping what is best on held-out inputs.

`Search` goes through the candidates (see `candidates`) and the repairs of each, scores all of them
alike (see `divergence`), and keeps the best.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from otfusion_jax.averaging.average import average
from otfusion_jax.averaging.interpolate import interpolate
from otfusion_jax.averaging.stacking import in_canonical_form
from otfusion_jax.common.host import Array
from otfusion_jax.fusion.candidates import Candidate, Task
from otfusion_jax.fusion.distill import trained
from otfusion_jax.fusion.divergence import Judge, Objective, Spread
from otfusion_jax.fusion.merge_report import Line, Merged, Report, Trial
from otfusion_jax.fusion.repair import repair
from otfusion_jax.fusion.repair_methods import AbstractRepair
from otfusion_jax.fusion.samples import Samples
from otfusion_jax.symmetry.symmetry import Symmetry

_NOTHING = "nothing"
_POLISHED = "distilled"
_AS_THEY_ARE = "as they are"
_WEIGHTS = "weights"
_TOKENS = (
    "Only floating-point inputs can be drawn at random: the weights alone have decided. Pass "
    "batches of inputs, or of tokens drawn from the range that they have."
)
_DRAWN_AT_RANDOM = (
    "The inputs were drawn at random: smooth noise cut at 0 to fit to, smooth noise to choose by."
)
_ROTATED = (
    "The inputs to match features by were drawn at random. Units are rotated, and so the weights "
    "have decided: what such an average answers to noise says little."
)

Bar = Callable[[Sequence[Any]], Iterable[Any]]
"""What goes through items, and may show how far it is."""


class Known(NamedTuple):
    """The inputs that are looked at.

    Attributes:
        example: Shapes of the inputs, two samples or more.
        fit: The inputs to fit to; None if there are none.
        held_out: The inputs to choose by; None if there are none.
        whole: Both together, to repair the result on; None if they are of two kinds.
    """

    example: tuple[PyTree, ...]
    fit: Samples | None
    held_out: Samples | None
    whole: Samples | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What was asked for, checked.

    Attributes:
        fn: The function of the models.
        models: The parameters of the models as they were given.
        weights: How much each of them counts, float `[K]`.
        leaf_weight: How much each parameter counts.
        symmetry: The symmetry of the models.
        known: The inputs that are looked at.
        objective: What is to be small; None without inputs.
        repairs: The repairs to try.
        key: The source of randomness.
    """

    fn: Callable[..., Any]
    models: list[PyTree]
    weights: Array
    leaf_weight: Callable[[str], Any] | None
    symmetry: Symmetry
    known: Known
    objective: Objective | None
    repairs: tuple[AbstractRepair, ...]
    key: Array

    @property
    def free(self) -> Symmetry:
        """The symmetry with rotations and signs; the same as without, if there are none."""
        return self.symmetry.with_rotations().with_signs()

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the inputs."""
        if self.known.whole is not None:
            return ()
        if self.known.fit is None:
            return (_TOKENS,)
        return (_ROTATED,) if self.weights_decide else (_DRAWN_AT_RANDOM,)

    @property
    def weights_decide(self) -> bool:
        """Whether weights alone decide.

        Where units rotate, as in transformers, what an average answers to noise says nothing of
        what it answers to data, and least squares on noise hurt it.
        """
        return self.known.whole is None and (self.known.fit is None or self.free.rotates)

    def judge(self) -> Judge | Spread:
        """Returns what scores averages."""
        if self.weights_decide or self.objective is None or self.known.held_out is None:
            return Spread(self.weights, self.leaf_weight)
        return Judge(self.objective, self.models, self.weights, [self.known.held_out])

    def task(self, symmetry: Symmetry) -> Task:
        """Puts the models into the form of a symmetry."""
        models = self.models
        if symmetry.has_form:
            models = in_canonical_form(symmetry, models, len(models), stacked=False)
        return Task(
            symmetry,
            self.fn,
            models,
            self.weights,
            self.leaf_weight,
            self.known.fit,
            self.objective,
            jax.random.fold_in(self.key, 1),
        )


class _Step(NamedTuple):
    """A candidate, and the symmetry of the form that models are moved in."""

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
            return _NOTHING
        if self.symmetry.rotates:
            return "rotations"
        return "signs" if self.symmetry.orthogonal else "permutations"


def planned(candidates: list[Candidate], asked_for: bool, setting: Setting) -> list[_Step]:
    """Says which candidates are tried, and with which symmetry; refuses those that do not apply."""
    steps = []
    for candidate in candidates:
        problem = _why_not(candidate, setting)
        if problem and asked_for:
            raise ValueError(f"the candidate {candidate.name!r} does not apply: {problem}")
        if not problem:
            for symmetry in _forms(candidate, setting):
                steps.append(_Step(candidate, symmetry))
    return steps


def _why_not(candidate: Candidate, setting: Setting) -> str:
    """Says why a candidate does not apply; nothing if it does."""
    if candidate.rotates and not setting.free.rotates:
        return "no units of this network can be rotated"
    if candidate.looks_at_inputs and setting.known.fit is None:
        return "there are no inputs to look at"
    if candidate.learns and setting.known.whole is None:
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


class _Found(NamedTuple):
    """What came of a trial.

    Attributes:
        params: The parameters.
        task: The models in the form that they were moved in.
        moved: The models as they were moved.
        method: The repair of their average; None for none.
        steps: How many steps it was polished for.
    """

    params: PyTree
    task: Task
    moved: list[PyTree]
    method: AbstractRepair | None = None
    steps: int = 0


class Search:
    """Goes through what is to be tried, and keeps the best.

    Attributes:
        setting: What was asked for.
        judge: What scores averages.
        rows: The trials so far.
        chosen: The number of the best trial's row; None as long as all have failed.
        best: What came of it.
    """

    def __init__(self, setting: Setting):
        """Starts without any trials."""
        self.setting = setting
        self.judge = setting.judge()
        self.rows: list[Trial] = []
        self.chosen: int | None = None
        self.best: _Found | None = None
        self._tasks: dict[Symmetry, Task] = {}

    def run(self, steps: list[_Step], polish: int, bar: Bar) -> None:
        """Tries candidates with all repairs, then to polish the best.

        Args:
            steps: The candidates.
            polish: How many steps to polish for; 0 for none.
            bar: What shows how far it is.

        Raises:
            ValueError: If every trial has failed.
        """
        for step in bar(steps):
            # A candidate that has failed leaves nothing to be repaired.
            averaged = self._try(step, _NOTHING, functools.partial(self._averaged, step))
            if averaged is None or self.setting.weights_decide:
                continue
            for method in self.setting.repairs:
                repaired = functools.partial(self._repaired, averaged, method)
                self._try(step, type(method).__name__, repaired)
        if self.best is None or self.chosen is None:
            problems = "\n".join(f"  {row.start}: {row.problem}" for row in self.rows)
            raise ValueError(f"every trial has failed:\n{problems}")
        if polish and not self.setting.weights_decide:
            was = self.rows[self.chosen]
            then = _POLISHED if was.repair == _NOTHING else f"{was.repair}, {_POLISHED}"
            polished = functools.partial(self._polished, self.best, polish)
            self._try(was, then, polished)

    def _try(self, step: _Step | Trial, then: str, make: Callable[[], _Found]) -> _Found | None:
        """Makes a trial, and adds its row. One that fails does so for a reason of its own."""
        began = time.perf_counter()
        found = None
        score, problem = math.nan, ""
        try:
            found = make()
            score = self.judge.score(found.params, found.moved)
            if not math.isfinite(score):
                problem = f"the score is {score}"
        except (ValueError, ArithmeticError, jax.errors.JaxRuntimeError) as error:
            problem = str(error)
        best = math.inf if self.chosen is None else self.rows[self.chosen].score
        # Of equal ones the first is kept, which did the least.
        if not problem and score < best:
            self.chosen, self.best = len(self.rows), found
        seconds = time.perf_counter() - began
        self.rows.append(Trial(step.start, step.units, then, score, seconds, problem))
        return found

    def _averaged(self, step: _Step) -> _Found:
        """Moves the models by a candidate, and averages them."""
        # What several candidates need, such as inner products of features, is kept by the task.
        if step.symmetry not in self._tasks:
            self._tasks[step.symmetry] = self.setting.task(step.symmetry)
        task = self._tasks[step.symmetry]
        moved = step.candidate.move(task)
        return _Found(average(moved, self.setting.weights.tolist()), task, moved)

    def _repaired(
        self, averaged: _Found, method: AbstractRepair, samples: Samples | None = None
    ) -> _Found:
        """Repairs an average on some inputs, or on those that are fitted to."""
        # Of what is held out no repair may see anything, until all is chosen.
        samples = self.setting.known.fit if samples is None else samples
        assert samples is not None
        params = repair(
            averaged.task.symmetry,
            self.setting.fn,
            averaged.moved,
            *samples.on_device(),
            weights=self.setting.weights.tolist(),
            method=method,
        )
        return averaged._replace(params=params, method=method)

    def _polished(self, found: _Found, steps: int, samples: Samples | None = None) -> _Found:
        """Trains a model towards the mean prediction of all."""
        setting = self.setting
        samples = setting.known.fit if samples is None else samples
        assert setting.objective is not None
        assert samples is not None
        params = trained(
            setting.objective,
            found.params,
            setting.models,
            setting.weights,
            samples,
            steps=steps,
            trains=setting.leaf_weight,
            key=jax.random.fold_in(setting.key, 2),
        )
        return found._replace(params=params, steps=steps)

    def _on_all(self, best: _Found) -> _Found:
        """Does what was chosen once more, on all inputs: now that nothing is chosen any more."""
        whole = self.setting.known.whole
        # Inputs that were drawn are of two kinds, and the one to choose by is not to be fitted to.
        if whole is None:
            return best
        if best.method is not None:
            steps = best.steps
            best = self._repaired(best, best.method, whole)
            return self._polished(best, steps, whole) if steps else best
        if best.steps:
            averaged = average(best.moved, self.setting.weights.tolist())
            return self._polished(best._replace(params=averaged), best.steps, whole)
        return best

    def result(self, points: int, began: float) -> Merged:
        """Puts together what was found.

        Args:
            points: At how many points of each line between models to take the score.
            began: When the work began, in seconds.

        Returns:
            The best, with the report.
        """
        assert self.best is not None
        assert self.chosen is not None
        setting, known = self.setting, self.setting.known
        best = self._on_all(self.best)
        self.rows[self.chosen] = dataclasses.replace(self.rows[self.chosen], chosen=True)
        parents, lines = [], []
        if isinstance(self.judge, Judge):
            parents = [self.judge.score(model) for model in setting.models]
            # The path as the models were, beside that as they were moved.
            if points:
                lines.extend(self._lines(_AS_THEY_ARE, setting.models, points))
                start = self.rows[self.chosen].start
                if start != _AS_THEY_ARE:
                    lines.extend(self._lines(start, best.moved, points))
        report = Report(
            rows=tuple(self.rows),
            models=len(setting.models),
            parents=tuple(parents),
            measure=self.judge.measure,
            fitted=0 if known.fit is None else known.fit.count,
            held_out=self.judge.count,
            notes=setting.notes,
            path=tuple(lines),
            seconds=time.perf_counter() - began,
        )
        return Merged(best.params, report, best.task.symmetry, best.moved)

    def _lines(self, start: str, moved: list[PyTree], points: int) -> list[Line]:
        """Takes scores along the lines from each model to the last."""
        positions = [float(t) for t in np.linspace(0, 1, points)]
        lines = []
        for number, model in enumerate(moved[:-1]):
            scores = []
            for t in positions:
                scores.append(self.judge.score(interpolate(model, moved[-1], t), moved))
            lines.append(Line(number, start, tuple(positions), tuple(scores)))
        return lines
