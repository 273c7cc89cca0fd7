"""One call that tries what the library has, and keeps what is best on inputs it was not fitted to.

`merge` checks its arguments and reads or draws inputs. `_Search` goes through the candidates (see
`candidates`) and the repairs of each, scores all of them alike (see `divergence`), and keeps the
best. Whatever it does can be done with public functions, one by one.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from otfusion_jax.averaging.average import average, mixture
from otfusion_jax.averaging.interpolate import interpolate
from otfusion_jax.averaging.stacking import in_canonical_form, require_alike
from otfusion_jax.common.arguments import checked_count, kind_of, require_function, require_kind
from otfusion_jax.fusion.candidates import Candidate, Task, checked_candidates
from otfusion_jax.fusion.distill import trained
from otfusion_jax.fusion.divergence import Judge, Objective, Outputs, Spread, objective_of
from otfusion_jax.fusion.drawn_inputs import can_be_drawn, drawn_samples
from otfusion_jax.fusion.merge_report import Line, Merged, Report, Trial
from otfusion_jax.fusion.repair import repair
from otfusion_jax.fusion.repair_methods import AbstractRepair, LeastSquares, RestoreStatistics
from otfusion_jax.fusion.samples import Samples, divided, read_samples
from otfusion_jax.symmetry.checks import require_symmetry
from otfusion_jax.symmetry.symmetry import Symmetry
from otfusion_jax.tracing.programs import as_function
from otfusion_jax.tracing.trace import trace_symmetry

_CALL = "merge(fn, models, batches, outputs='logits')"
_HELD_OUT = 0.2
"""The share of the inputs that choices are made on."""
_DRAWN = 1000
"""How many inputs of each kind are drawn where there are none."""
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


def merge(
    fn: Callable[..., Any],
    models: Sequence[PyTree],
    batches: Iterable[Any] | None = None,
    *,
    inputs: Any = None,
    outputs: Outputs | None = None,
    loss: Callable[..., Any] | None = None,
    symmetry: Symmetry | None = None,
    weights: Sequence[float] | None = None,
    leaf_weight: Callable[[str], Any] | None = None,
    candidates: Sequence[str] | None = None,
    repairs: Sequence[AbstractRepair] = (RestoreStatistics(), LeastSquares()),
    polish: int = 0,
    path: int = 0,
    max_samples: int = 1250,
    key: Array | None = None,
    progress: bool = False,
) -> Merged:
    """Fuses models by whatever is best: tries several ways, and scores each on held-out inputs.

    What is best differs by network. So models are matched by weights, by features, by both, and by
    learned rotations where units can be rotated; each average is scored as it is and after each
    repair; and of all of them that is kept which answers most like the models do on average, on
    inputs that nothing was fitted to. No labels are needed. A trial that fails is a row of the
    report that says why. In the end, the repair that was chosen is made once more, on all inputs.

    Without batches, inputs are drawn at random, of mean 0 and variance 1: smooth noise cut at 0 to
    fit to, and smooth noise to choose by. Where units can be rotated, noise serves to match
    features alone; the weights decide, and nothing is repaired. So do they where inputs cannot be
    drawn, as they are tokens.

    Args:
        fn: The function of all models, `fn(params, *inputs)` of a batch of inputs, hashable.
        models: The parameters of the K >= 2 models, a list of pytrees of one structure.
        batches: Inputs without labels: a list, a generator or a loader (tf.data, grain, PyTorch) of
            batches, each an array `[n, ...]` or a tuple or list of arrays for functions of several
            inputs. It is gone through once, until there are `max_samples` samples; these are kept
            in the memory of the host, and every fifth is held out, drawn at random. None draws
            inputs.
        inputs: Without batches, what the inputs look like: an array or `jax.ShapeDtypeStruct` `[n,
            ...]`, or a tuple of these. Values do not matter.
        outputs: What `fn` returns, wherever inputs are looked at: `"logits"` of classes along the
            last axis, compared by the divergence of their probabilities, or `"values"`, compared by
            squared differences.
        loss: A loss `loss(params, *inputs)`, a scalar mean over a batch, in place of `outputs`. To
            score by labels, let `fn` take them as another input, and ignore them.
        symmetry: The symmetry of the models; None traces it. Pass `symmetry.only(...)` to leave
            groups as they are.
        weights: The K weights of the models in the average and in their mean prediction, summing to
            1; uniform if None.
        leaf_weight: How much each parameter counts, see `align`. Those that count 0 are not
            polished either. Batch norm's running statistics are best left out.
        candidates: What to match by: some of `"as they are"`; `"weights"`, as `fuse`;
            `"preactivations"`, Algorithm 1 of the paper with activations; `"features"`, which are
            correlations after the nonlinearity, and features themselves of units that rotate;
            `"features, then weights"`, coordinate descent from there; `"learned rotations"`, which
            takes longest and needs batches; and `"barycenter"`, of three models or more. None tries
            all that apply. Where units can be rotated, models are matched with rotations, and by
            weights and preactivations without them as well.
        repairs: The repairs to try on each average, instances; `()` tries none. All features of the
            inputs that are fitted to are in memory at once, see `repair`.
        polish: How many steps of `distill` to try on the best, on the same inputs; 0 tries none.
            300 take about as long as all else.
        path: At how many points of the lines between the models to take the score, before they were
            moved and after, for `report.plot()`; 0 for none.
        max_samples: The number of samples that are kept at most, 2 or more.
        key: The source of all randomness, a key of JAX; `jax.random.key(0)` if None. The same key
            and inputs give the same result, bit by bit, on one machine.
        progress: Whether to show a bar of the trials; it needs tqdm.

    Returns:
        The fused parameters, the report (`print` it), the symmetry, and the models as moved.

    Raises:
        ValueError: Before any work: if models do not fit each other or the symmetry or are not
            finite, by key path; if there are fewer than two; if batches are empty or differ; if it
            is not said what the outputs are; if a candidate is unknown or does not apply. In the
            end: if every trial has failed.
        TypeError: If arguments are of another type, before any work.
        ImportError: If `progress` is asked for and tqdm is not installed.

    Example:
        >>> import jax
        >>> import otfusion_jax as otf
        >>> def net(params, x):
        ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
        >>> def draw(seed):
        ...     keys = jax.random.split(jax.random.key(seed))
        ...     return {"in": jax.random.normal(keys[0], (8, 16)),
        ...             "out": jax.random.normal(keys[1], (16, 4))}
        >>> x = jax.random.normal(jax.random.key(2), (100, 8))
        >>> merged = otf.merge(net, [draw(0), draw(1)], [x], outputs="values")
        >>> merged.report.chosen.repair
        'LeastSquares'
    """
    began = time.perf_counter()
    as_function(fn, ())
    require_function(fn, _CALL)
    _require_hashable(fn)
    require_alike(models)
    if len(models) < 2:
        raise ValueError(f"{len(models)} model given; merging takes at least two")
    shares = mixture(weights, len(models))
    if leaf_weight is not None:
        require_function(leaf_weight, "merge(..., leaf_weight=lambda path: 1.0)")
    chosen_candidates = checked_candidates(candidates)
    _require_repairs(repairs)
    for name, count in (("polish", polish), ("path", path)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} is {count!r}; give a whole number, 0 or more")
    key = jax.random.key(0) if key is None else key
    bar = _bar() if progress else _silent
    most = max(2, checked_count(max_samples, "max_samples", "2 or more"))
    known = _known_inputs(batches, inputs, most, key)
    objective = None
    if known.fit is not None:
        objective = objective_of(fn, outputs, loss, _CALL)
        objective.check(models[0], known.example)
    if symmetry is None:
        symmetry = trace_symmetry(fn, models[0], *known.example)
    require_symmetry(symmetry, "merge(fn, models, batches, symmetry=symmetry)")
    require_alike(models, symmetry)
    setting = _Setting(
        fn, list(models), shares, leaf_weight, symmetry, known, objective, tuple(repairs), key
    )
    search = _Search(setting)
    search.run(_plan(chosen_candidates, candidates is not None, setting), polish, bar)
    return search.result(path, began)


# --- arguments


class _Known(NamedTuple):
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


def _known_inputs(batches: Any, inputs: Any, most: int, key: Array) -> _Known:
    """Reads inputs and holds a share out, or draws them."""
    if batches is not None:
        if inputs is not None:
            raise ValueError("both batches and inputs are given; inputs is for want of batches")
        samples = read_samples(batches, most)
        fit, held_out = divided(samples, _HELD_OUT, jax.random.fold_in(key, 0))
        return _Known(_as_shapes(fit.inputs), fit, held_out, samples)
    if inputs is None:
        raise ValueError(
            "neither batches nor inputs are given; pass inputs=jax.ShapeDtypeStruct((2, 28, 28), "
            "jnp.float32), or an array, to say what the inputs look like"
        )
    example = _as_shapes(inputs if isinstance(inputs, tuple) else (inputs,))
    if not can_be_drawn(example):
        return _Known(example, None, None)
    fit, held_out = drawn_samples(example, _DRAWN, jax.random.fold_in(key, 0))
    return _Known(example, fit, held_out)


def _as_shapes(inputs: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """Returns the shapes of inputs, of two samples each: the axis of one sample could be any."""
    described = []
    leaves, structure = jax.tree_util.tree_flatten_with_path(inputs)
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = getattr(leaf, "shape", None)
        if shape is None or not hasattr(leaf, "dtype"):
            raise TypeError(f"input {name} is {kind_of(leaf)}; pass an array or ShapeDtypeStruct")
        if not shape:
            raise ValueError(f"input {name} is a scalar; its first axis must be the samples")
        if 0 in shape[1:]:
            raise ValueError(f"input {name} is empty: shape {tuple(shape)}")
        described.append(jax.ShapeDtypeStruct((2, *shape[1:]), leaf.dtype))
    return structure.unflatten(described)


def _require_hashable(fn: Any) -> None:
    """Refuses a function that JAX could not keep what it compiles of."""
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"the function, {kind_of(fn)}, cannot be hashed; pass a function of parameters and "
            "inputs, as otf.functional(module) makes of a module"
        ) from None


def _require_repairs(repairs: Any) -> None:
    """Refuses what is no sequence of repairs."""
    examples = "a list of instances, as [otf.LeastSquares()]"
    if isinstance(repairs, AbstractRepair) or not isinstance(repairs, Sequence):
        raise TypeError(f"repairs is {kind_of(repairs)}; pass {examples}")
    for number, method in enumerate(repairs):
        require_kind(method, AbstractRepair, f"repair {number}", examples)


Bar = Callable[[Sequence[Any]], Iterable[Any]]


def _bar() -> Bar:
    """Returns what shows a bar of the items that are gone through."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm; install it with: pip install tqdm, or leave it out"
        ) from None
    return lambda items: tqdm(items, desc="merging")


def _silent(items: Sequence[Any]) -> Iterable[Any]:
    return items


# --- the search


@dataclasses.dataclass(frozen=True, eq=False)
class _Setting:
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
    known: _Known
    objective: Objective | None
    repairs: tuple[AbstractRepair, ...]
    key: Array

    @property
    def rotating(self) -> Symmetry:
        """The symmetry with rotations; the same as without, if there are none."""
        return self.symmetry.with_rotations()

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
        return self.known.whole is None and (self.known.fit is None or self.rotating.rotates)

    def judge(self) -> Judge | Spread:
        """Returns what scores averages."""
        if self.weights_decide or self.objective is None or self.known.held_out is None:
            return Spread(self.weights, self.leaf_weight)
        return Judge(self.objective, self.models, self.weights, [self.known.held_out])

    def task(self, symmetry: Symmetry) -> Task:
        """Puts the models into the form of a symmetry."""
        models = self.models
        if symmetry.rotates:
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
        return "rotations" if self.symmetry.rotates else "permutations"


def _plan(candidates: list[Candidate], asked_for: bool, setting: _Setting) -> list[_Step]:
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


def _why_not(candidate: Candidate, setting: _Setting) -> str:
    """Says why a candidate does not apply; nothing if it does."""
    if candidate.rotates and not setting.rotating.rotates:
        return "no units of this network can be rotated"
    if candidate.looks_at_inputs and setting.known.fit is None:
        return "there are no inputs to look at"
    if candidate.learns and setting.known.whole is None:
        return "what is learned on inputs drawn at random does not hold for others; pass batches"
    if candidate.permutes and setting.symmetry.rotates:
        return "the symmetry has rotations; pass it without them"
    if candidate.least_models > len(setting.models):
        return f"of {len(setting.models)} models it makes what 'weights' makes"
    return ""


def _forms(candidate: Candidate, setting: _Setting) -> list[Symmetry]:
    """Says with which symmetries a candidate is tried: with rotations, without, or both."""
    plain, rotating = setting.symmetry, setting.rotating
    if not rotating.rotates:
        return [plain]
    if setting.weights_decide:
        # Distances of weights can be compared in one form alone.
        return [rotating]
    if candidate.permutes or not candidate.moves:
        return [plain]
    # What `fuse` does unless it is told otherwise is tried beside the same with rotations.
    return [plain, rotating] if candidate.name == _WEIGHTS and not plain.rotates else [rotating]


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


class _Search:
    """Goes through what is to be tried, and keeps the best.

    Attributes:
        setting: What was asked for.
        judge: What scores averages.
        rows: The trials so far.
        chosen: The number of the best trial's row; None as long as all have failed.
        best: What came of it.
    """

    def __init__(self, setting: _Setting):
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
        if step.symmetry not in self._tasks:
            self._tasks[step.symmetry] = self.setting.task(step.symmetry)
        task = self._tasks[step.symmetry]
        moved = step.candidate.move(task)
        return _Found(average(moved, self.setting.weights.tolist()), task, moved)

    def _repaired(
        self, averaged: _Found, method: AbstractRepair, samples: Samples | None = None
    ) -> _Found:
        """Repairs an average on some inputs, or on those that are fitted to."""
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
