"""Trying what the library has to merge models, and keeping what is best on held-out inputs.

Trials are narrowed down, so that what takes long is tried where it is promising:

1. Models are moved by every candidate, and averaged.
2. The averages that score best, and differ, are repaired in all ways. Where images were drawn, it
   is the one whose models have come closest to each other.
3. The best trials of all are made again, with what they are fitted to and what they are chosen by
   exchanged. So every input has its say in the choice, and none in that of what was fitted to it.
4. Where there are many more inputs, the best is fitted to these, and what can be learned is learned
   from them, too; and the best is polished.
"""

import dataclasses
import math
import time

import jax
import numpy as np

from otfusion_jax.averaging.interpolate import interpolate
from otfusion_jax.common.progress import Bar
from otfusion_jax.common.typing import PyTree
from otfusion_jax.fusion.judges import Judge, Spread
from otfusion_jax.fusion.merge_report import Line, Merged, Report, Trial
from otfusion_jax.fusion.merge_setting import AS_THEY_ARE, Setting, Step
from otfusion_jax.fusion.merge_trials import Found, Recipe, Workshop

_REPAIRED = 3
"""How many averages are repaired."""
_AGAIN = 3
"""How many trials are made again with inputs exchanged."""
_FAR = 2.0
"""Trials that score more than so many times as much as the best are not made again."""
_FAILURES = (ValueError, ArithmeticError, jax.errors.JaxRuntimeError)
"""What a trial may end in for reasons of its own."""
_ROUNDING = 1e-6
"""Divergences, in nats, that differ by less differ by rounding: what was tried first is kept."""


class Search:
    """Goes through what is to be tried, and keeps the best.

    Attributes:
        setting: What was asked for.
        judge: What scores averages.
        rows: The trials so far.
        recipes: What each of them did.
        chosen: The number of the best trial; None as long as all have failed.
        best: What came of it; None if it was not kept.
    """

    def __init__(self, setting: Setting):
        """Starts without any trials."""
        self.setting = setting
        self.judge: Judge | Spread = setting.judge()
        self.rows: list[Trial] = []
        self.recipes: list[Recipe] = []
        self.chosen: int | None = None
        self.best: Found | None = None
        self._workshop = Workshop(setting)
        # How far models are from each other, where weights decide which match is repaired.
        self._spreads: dict[Step, float] = {}

    def run(self, steps: list[Step], polish: int, bar: Bar) -> None:
        """Tries candidates and repairs, then more inputs, then to polish the best.

        Args:
            steps: The candidates.
            polish: How many steps to polish for; 0 for none.
            bar: What shows how far it is.

        Raises:
            ValueError: If every trial has failed.
        """
        setting, looks = self.setting, not self.setting.weights_decide
        anew = looks and setting.update is not None
        promising: list[Step] = []
        for step in bar(steps, "moving"):
            self._try(Recipe(step))
            if anew:
                self._try(Recipe(step, anew=True))
            promising = self._promising()
            # The others are not moved again: what they take in memory is given back at once.
            self._workshop.keep(promising)
        if setting.weights_match:
            self._keep_to(promising)
        if looks and setting.repairs:
            for step in bar(promising, "repairing"):
                for method in setting.repairs:
                    self._try(Recipe(step, method))
                    # What least squares have fitted in inference may be best left alone.
                    if anew:
                        self._try(Recipe(step, method, anew=True))
        if self.chosen is None:
            problems = "\n".join(f"  {row.start}: {row.problem}" for row in self.rows)
            raise ValueError(f"every trial has failed:\n{problems}")
        if setting.known.are_given:
            self.chosen = self._chosen_again(self.chosen, bar)
        recipe = self.recipes[self.chosen]
        more = 0 if setting.known.more is None else setting.known.more.count
        if more:
            recipe = self._with_more_inputs(recipe, more)
        if polish and looks:
            # What was learned meets the answers and lacks features, what was repaired has features
            # and misses the answers: which of the two goes further, the steps themselves say.
            starts, learned = [recipe], self._best_learned()
            if learned is not None and not recipe.step.candidate.learns:
                starts.append(learned)
            for start in starts:
                polished = start._replace(polish_steps=polish, polish_more=more)
                recipe = self._better_of(recipe, polished)

    def _try(self, recipe: Recipe) -> None:
        """Makes a trial, and adds its row. One that fails does so for a reason of its own."""
        began = time.perf_counter()
        found = None
        score, problem = math.nan, ""
        try:
            found = self._workshop.make(recipe)
            score = self.judge.score(found.params, found.moved)
            if not math.isfinite(score):
                problem = f"the score is {score}"
            elif self.setting.weights_match and recipe.step not in self._spreads:
                spread = self.setting.spread.score(found.params, found.moved)
                self._spreads[recipe.step] = spread
        except _FAILURES as error:
            problem = str(error)
        # Of equal ones the first is kept, which did the least.
        best = math.inf if self.chosen is None else self.rows[self.chosen].score
        if not problem and score < best - self._rounding:
            self.chosen, self.best = len(self.rows), found
        seconds = time.perf_counter() - began
        step = recipe.step
        ridges = {}
        for path, ridge in {} if found is None else found.ridges.items():
            ridges[path] = float(ridge)
        row = Trial(step.start, step.units, recipe.then, score, seconds, problem, ridges=ridges)
        self.rows.append(row)
        self.recipes.append(recipe)

    def _with_more_inputs(self, recipe: Recipe, count: int) -> Recipe:
        """Tries to fit the best to more inputs, and to learn from them, and returns the best."""
        if recipe.fits:
            recipe = self._better_of(recipe, recipe._replace(fit_more=count))
        # What is learned from a few inputs knows them by heart: it may have lost by that alone.
        learned = self._best_learned()
        if learned is not None:
            recipe = self._better_of(recipe, Recipe(learned.step, learn_more=count))
        return recipe

    def _best_learned(self) -> Recipe | None:
        """Returns the recipe of the best trial of what was learned, if there is one."""
        learned = {}
        for row, recipe in zip(self.rows, self.recipes, strict=True):
            if recipe.step.candidate.learns and not row.problem:
                learned[row.score] = recipe
        return learned[min(learned)] if learned else None

    def _better_of(self, recipe: Recipe, other: Recipe) -> Recipe:
        """Tries another recipe than the best so far, and returns the better of the two."""
        before = len(self.rows)
        self._try(other)
        return other if self.chosen == before else recipe

    def _keep_to(self, steps: list[Step]) -> None:
        """Chooses among the trials of some steps alone."""
        scores = {}
        for number, (row, recipe) in enumerate(zip(self.rows, self.recipes, strict=True)):
            if not row.problem and recipe.step in steps:
                scores[number] = row.score
        if scores:
            self.chosen, self.best = min(scores, key=lambda number: scores[number]), None

    def _promising(self) -> list[Step]:
        """Returns the steps whose averages score best, the best first."""
        if self.setting.weights_match:
            return sorted(self._spreads, key=lambda step: self._spreads[step])[:1]
        best: dict[Step, float] = {}
        for row, recipe in zip(self.rows, self.recipes, strict=True):
            if not row.problem:
                best[recipe.step] = min(row.score, best.get(recipe.step, math.inf))
        # Steps of equal scores have found the same.
        distinct: dict[float, Step] = {}
        for step, score in best.items():
            distinct.setdefault(score, step)
        return [distinct[score] for score in sorted(distinct)[:_REPAIRED]]

    def _chosen_again(self, chosen: int, bar: Bar) -> int:
        """Makes the best trials again on inputs exchanged, and chooses by both scores."""
        least = self.rows[chosen].score
        # Of models that are met already scores are rounding, of either sign, and losses may be
        # negative.
        farthest = least + (_FAR - 1) * abs(least) + self._rounding
        distinct: dict[float, int] = {}
        for number, row in enumerate(self.rows):
            if not row.problem and row.score <= farthest and row.score != least:
                distinct.setdefault(row.score, number)
        near = [chosen]
        for score in sorted(distinct)[: _AGAIN - 1]:
            near.append(distinct[score])
        if len(near) < 2:
            return chosen
        workshop = self._workshop.with_inputs(self.setting.known.exchanged())
        judge = workshop.setting.judge()
        for number in bar(near, "choosing"):
            began = time.perf_counter()
            try:
                found = workshop.make(self.recipes[number])
                again = judge.score(found.params, found.moved)
            except _FAILURES:
                again = math.inf
            if not math.isfinite(again):
                again = math.inf
            row = self.rows[number]
            seconds = row.seconds + time.perf_counter() - began
            self.rows[number] = dataclasses.replace(row, again=again, seconds=seconds)
        sums = {number: self.rows[number].score + self.rows[number].again for number in near}
        least = min(sums.values())
        return min(number for number in near if sums[number] <= least + 2 * self._rounding)

    @property
    def _rounding(self) -> float:
        """By how much scores differ that are equal. Of other measures nobody knows the scale."""
        objective = self.setting.objective
        are_divergences = objective is not None and objective.outputs == "logits"
        return _ROUNDING if are_divergences and not self.setting.weights_decide else 0.0

    def _final(self, recipe: Recipe) -> Found:
        """Makes the best once more, on all inputs: now that nothing is chosen any more."""
        known = self.setting.known
        kept = self.best if self.best is not None and self.best.recipe == recipe else None
        # Inputs that were drawn are of two kinds, and the one to choose by is not to be fitted to.
        # Where there are many, those that were held out would add little.
        if known.are_given and known.more is None:
            try:
                if recipe.step.candidate.looks_at_inputs:
                    return self._workshop.with_inputs(known._replace(fit=known.whole)).make(recipe)
                if recipe.fits:
                    return self._workshop.make(recipe, known.whole)
            except _FAILURES:
                # What a half was good for is still good, though all together have failed.
                if kept is None:
                    raise
        return self._workshop.make(recipe) if kept is None else kept

    def result(self, points: int, began: float) -> Merged:
        """Puts together what was found.

        Args:
            points: At how many points of each line between models to take the score.
            began: When the work began, in seconds.

        Returns:
            The best, with the report.
        """
        assert self.chosen is not None
        setting, known = self.setting, self.setting.known
        best = self._final(self.recipes[self.chosen])
        self.rows[self.chosen] = dataclasses.replace(self.rows[self.chosen], chosen=True)
        parents, lines = [], []
        if isinstance(self.judge, Judge):
            parents = [self.judge.score(model) for model in setting.models]
            # The path as the models were, beside that as they were moved.
            if points:
                lines.extend(_lines(self.judge, AS_THEY_ARE, setting.models, points))
                start = self.rows[self.chosen].start
                if start != AS_THEY_ARE:
                    lines.extend(_lines(self.judge, start, best.moved, points))
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


def _lines(judge: Judge | Spread, start: str, moved: list[PyTree], points: int) -> list[Line]:
    """Takes scores along the lines from each model to the last."""
    positions = [float(t) for t in np.linspace(0, 1, points)]
    lines = []
    for number, model in enumerate(moved[:-1]):
        scores = []
        for t in positions:
            scores.append(judge.score(interpolate(model, moved[-1], t), moved))
        lines.append(Line(number, start, tuple(positions), tuple(scores)))
    return lines
